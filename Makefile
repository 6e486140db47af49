# What a developer and CI run. `make` alone lists the targets.

# Tools run at a pinned version, so that go.mod names only what the service itself needs.
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0
BENCHSTAT   := golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da

# make bench BENCH=List COUNT=10, make fuzz FUZZTIME=5m
BENCH    ?= .
COUNT    ?= 6
FUZZTIME ?= 10s

.DEFAULT_GOAL := help
.PHONY: help run build test race partitioned lint vuln bench fuzz e2e faults check ci clean postgres

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: build ## serve on http://localhost:8000, with a private PostgreSQL unless DATABASE_URL is set
	@dev/run

build: ## make bin/taskflow, a static binary
	CGO_ENABLED=0 go build -trimpath -o bin/taskflow .

test: postgres ## run the tests, on a PostgreSQL of their own
	go test ./...

race: postgres ## run the tests under the race detector, in random order
	go test -race -shuffle=on ./...

partitioned: postgres ## run the tests on a table in hash partitions
	TASKFLOW_TEST_TABLE=faults/partitions.sql go test ./...

# find, not `gofmt -l .`: a package in e2e/node_modules may hold Go files.
lint: ## check format, go vet, staticcheck and shellcheck
	@files=$$(gofmt -l $$(find . -name node_modules -prune -o -name '*.go' -print)) || exit 1; \
	if [ -n "$$files" ]; then echo "not as gofmt would have it:"; echo "$$files"; exit 1; fi
	go vet ./... && cd faults && go vet ./...
	go run $(STATICCHECK) ./...
	cd faults && go run $(STATICCHECK) ./...
	@if command -v shellcheck >/dev/null; then shellcheck dev/* .ci/run e2e/run faults/run; \
	else echo "shellcheck is not installed: the scripts are not checked"; fi

vuln: ## look the dependencies up in Go's vulnerability database (needs the network)
	go run $(GOVULNCHECK) ./...

# Into a file and not through a pipe, which would hide a failure. To compare: mv bench.txt bench.old.txt, change, again.
bench: postgres ## measure, summarise with benchstat, compare with bench.old.txt if there is one
	go test -run '^$$' -bench '$(BENCH)' -benchmem -count=$(COUNT) -timeout 60m . >bench.txt || { cat bench.txt; exit 1; }
	go run $(BENCHSTAT) $(wildcard bench.old.txt) bench.txt

# go test fuzzes one target at a time.
fuzz: postgres ## fuzz each target for FUZZTIME
	@set -e; list=$$(go test -list '^Fuzz' .); \
	for target in $$(echo "$$list" | grep '^Fuzz'); do \
		echo "== $$target"; \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) .; \
	done

e2e: postgres ## drive the service as its users' programs do
	e2e/run

faults: postgres ## break the database and the network under the service
	faults/run

check: lint test ## what to run before a commit

ci: ## what CI runs
	.ci/run

clean: ## remove what these targets made; not the development database
	rm -rf bin bench.txt

postgres:
	@dev/programs -i >/dev/null
