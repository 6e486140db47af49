package main

import (
	"context"
	"crypto/ed25519"
	"database/sql/driver"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Each part of a request stands beside a baseline that is measured in the same run. `make bench` reads
// them with benchstat; the service as a whole is measured beside its peers with a load generator.

func BenchmarkToken(b *testing.B) {
	a := newAuthenticator(testSecret, "", "", "")
	token := tokenFor(b, "ann")
	public, private, _ := ed25519.GenerateKey(nil)
	eddsa := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.MapClaims{"sub": "ann", "exp": time.Now().Add(time.Hour).Unix()})
	eddsa.Header["kid"] = "k"
	signed, _ := eddsa.SignedString(private)
	byJWKS := newAuthenticator("", "http://localhost", "", "")
	byJWKS.jwks.known.Store(&jwkSet{"k EdDSA": {public}})
	again := func(a *authenticator, token string) func(*testing.B) {
		return func(b *testing.B) {
			for b.Loop() {
				if _, err := a.subject(token); err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	first := func(a *authenticator, token string) func(*testing.B) {
		return func(b *testing.B) {
			for b.Loop() {
				if _, err := a.verify(token); err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	b.Run("HS256-first", first(a, token))
	b.Run("HS256-again", again(a, token))
	b.Run("EdDSA-first", first(byJWKS, signed))
	b.Run("EdDSA-again", again(byJWKS, signed))
	b.Run("baseline=golang-jwt", func(b *testing.B) {
		for b.Loop() {
			if _, err := jwt.Parse(token, func(*jwt.Token) (any, error) { return a.secret, nil },
				jwt.WithExpirationRequired()); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	text := []byte(`{"title": "Write the release notes", "description": "with every change since \"1.0\"", "is_completed": false}`)
	b.Run("ours", func(b *testing.B) {
		for b.Loop() {
			var parsed body
			var f faults
			err := parsed.parse(text)
			if in := f.changes(parsed, false); err != nil || f != nil || in.title == nil {
				b.Fatal(err, f)
			}
		}
	})
	b.Run("baseline=encoding-json", func(b *testing.B) {
		for b.Loop() {
			var in struct {
				Title       *string `json:"title"`
				Description *string `json:"description"`
				IsCompleted *bool   `json:"is_completed"`
			}
			if err := json.Unmarshal(text, &in); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	t := task{id: 4711, userID: "ann", title: "Write the release notes", description: "with every change", described: true,
		createdAt: 848_721_906_700_000, updatedAt: 848_721_906_789_012}
	b.Run("ours", func(b *testing.B) {
		var buffer []byte
		for b.Loop() {
			buffer = t.appendJSON(buffer[:0])
		}
	})
	b.Run("baseline=encoding-json", func(b *testing.B) {
		same := taskJSON{t.id, t.userID, t.title, &t.description, t.isCompleted, t.createdAt.String(), t.updatedAt.String()}
		for b.Loop() {
			if _, err := json.Marshal(same); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkCORS(b *testing.B) {
	inner := handler(func(*response, *http.Request) error { return nil })
	for name, h := range map[string]handler{"ours": cors([]string{"http://localhost:3000"}, inner), "baseline=none": inner} {
		b.Run(name, func(b *testing.B) {
			r := httptest.NewRequest("GET", "/", nil)
			r.Header.Set("Origin", "http://localhost:3000")
			for b.Loop() {
				_ = h(&response{ResponseWriter: httptest.NewRecorder()}, r)
			}
		})
	}
}

// BenchmarkStore runs each statement, beside the cheapest one that there is.
func BenchmarkStore(b *testing.B) {
	s := newStore(newDatabase(b), 4, 10*time.Second)
	defer s.close()
	ctx, title, c := context.Background(), "a title", chunk{}
	s.applied.Store(true)
	fill(b, s)
	for name, f := range map[string]func() error{
		"task":           func() error { _, err := s.readTask(ctx, "ann", 7); return err },
		"createTask":     func() error { _, err := s.createTask(ctx, "bob", "", changes{title: &title}); return err },
		"createTask-key": func() error { _, err := s.createTask(ctx, "bob", "key", changes{title: &title}); return err },
		"updateTask": func() error {
			_, err := s.updateTask(ctx, "ann", 7, nil, changes{title: &title})
			return err
		},
		"chunk-20":          func() error { return s.readChunk(ctx, "ann", listQuery{sortBy: "id", limit: 20}, &c) },
		"chunk-1000":        func() error { return s.readChunk(ctx, "ann", listQuery{sortBy: "id", limit: 1000}, &c) },
		"baseline=SELECT-1": func() error { return exchange(ctx, s.db, `SELECT $1::int`, arguments("1"), func([]driver.Value) {}) },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := f(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkHandler sends whole requests over 32 loopback connections, beside /health, which asks no database,
// and beside pgbench, which runs the same statement on 32 connections and does nothing else.
func BenchmarkHandler(b *testing.B) {
	const clients = 32
	database := newDatabase(b)
	s := newServiceWithin(b, database, 16, 10*time.Second)
	s.log = slog.New(slog.NewJSONHandler(io.Discard, nil))
	plain := httptest.NewServer(s.handler()) // without the comparison of each answer with openapi.json
	defer plain.Close()
	fill(b, s.store)
	http.DefaultTransport.(*http.Transport).MaxIdleConnsPerHost = clients
	var tokens [100]string
	for i := range tokens {
		tokens[i] = "Bearer " + tokenFor(b, fmt.Sprint("user", i))
	}
	const one, columns = ` WHERE user_id = 'user' || :user AND id = 1000 + :i`, ` RETURNING ` + taskColumns
	for _, request := range []struct{ name, method, path, body, statement string }{
		{"get", "GET", "/api/user%d/tasks/%d", "", `SELECT ` + taskColumns + ` FROM tasks` + one},
		{"list-10", "GET", "/api/user%d/tasks?%d", "",
			`SELECT ` + taskColumns + ` FROM tasks WHERE user_id = 'user' || :user ORDER BY id LIMIT 1025`},
		{"patch", "PATCH", "/api/user%d/tasks/%d", `{"title": "new"}`,
			`UPDATE tasks SET title = 'new', updated_at = now()` + one + columns},
		{"create", "POST", "/api/user%d/tasks?%d", `{"title": "new"}`,
			`INSERT INTO tasks (user_id, title) VALUES ('new' || :user, 'new')` + columns},
		{"health", "GET", "/health?%d,%d", "", ""},
	} {
		var next atomic.Int64
		b.Run(request.name+"/service", func(b *testing.B) {
			b.SetParallelism(clients / runtime.GOMAXPROCS(0))
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					i := int(next.Add(1) % 1000)
					r, _ := http.NewRequest(request.method, plain.URL+fmt.Sprintf(request.path, i%100, 1001+i),
						strings.NewReader(request.body))
					r.Header.Set("Authorization", tokens[i%100])
					if got := send(b, r); got.status > 299 {
						b.Error(got.status, got.body)
					}
				}
			})
		})
		if request.statement == "" {
			continue
		}
		script := filepath.Join(b.TempDir(), "script")
		text := "\\set i random(0, 999)\n\\set user :i % 100\n" + request.statement + ";\n"
		if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
		b.Run(request.name+"/baseline=pgbench", func(b *testing.B) {
			out, err := exec.Command("pgbench", "-n", "-M", "prepared", "-c", strconv.Itoa(clients), "-j", "2", "-t",
				strconv.Itoa(b.N/clients+1),
				"-f", script, "-h", database.Host, "-U", database.User, database.Database).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "number of failed transactions: 0 ") {
				b.Fatal(err, string(out))
			}
		})
	}
}

// fill gives ann 1,000 tasks among those of 100 others.
func fill(b *testing.B, s *store) {
	b.Helper()
	for _, users := range []string{"'ann'", "'user' || (i - 1) % 100"} {
		if err := exchange(context.Background(), s.db, fmt.Sprintf(`INSERT INTO tasks (user_id, title, description)
			SELECT %s, 'task number ' || i, 'what is to be done about ' || i FROM generate_series(1, 1000) i`, users),
			nil, func([]driver.Value) {}); err != nil {
			b.Fatal(err)
		}
	}
}
