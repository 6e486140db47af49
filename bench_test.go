package main

import (
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

	"github.com/lib/pq"
)

// Each part stands beside a baseline that is measured in the same run. `make bench` reads them with benchstat; the service
// as a whole is measured beside its peers with a load generator.

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
			must(json.Marshal(same))
		}
	})
}

// BenchmarkHandler sends whole requests over 32 loopback connections, beside pgbench, which runs the same statement on
// 32 connections and does nothing else.
func BenchmarkHandler(b *testing.B) {
	const clients = 32
	database := newDatabase(b)
	s := newServiceWithin(b, database, 16, 10*time.Second)
	s.log = slog.New(slog.NewJSONHandler(io.Discard, nil))
	plain := httptest.NewServer(s.handler()) // without the comparison of each answer with openapi.json
	defer plain.Close()
	fill(b, database)
	http.DefaultTransport.(*http.Transport).MaxIdleConnsPerHost = clients
	var tokens [100]string
	for i := range tokens {
		tokens[i] = "Bearer " + tokenFor(b, fmt.Sprint("user", i))
	}
	const one, columns = ` WHERE user_id = 'user' || :user AND id = 1001 + :i`, ` RETURNING ` + taskColumns
	for _, request := range []struct{ name, method, path, body, statement string }{
		{"get", "GET", "/api/user%d/tasks/%d", "", `SELECT ` + taskColumns + ` FROM tasks` + one},
		{"list-10", "GET", "/api/user%d/tasks?%d", "",
			`SELECT ` + taskColumns + ` FROM tasks WHERE user_id = 'user' || :user ORDER BY id LIMIT 1025`},
		{"patch", "PATCH", "/api/user%d/tasks/%d", `{"title": "new"}`,
			`UPDATE tasks SET title = 'new', updated_at = now()` + one + columns},
		{"create", "POST", "/api/user%d/tasks?%d", `{"title": "new"}`,
			`INSERT INTO tasks (user_id, title) VALUES ('new' || :user, 'new')` + columns},
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
		script := filepath.Join(b.TempDir(), "script")
		text := "\\set i random(0, 999)\n\\set user :i % 100\n" + request.statement + ";\n"
		must(0, os.WriteFile(script, []byte(text), 0o600))
		b.Run(request.name+"/baseline=pgbench", func(b *testing.B) {
			out, err := exec.Command("pgbench", "-n", "-M", "prepared", "-c", strconv.Itoa(clients), "-j", "2", "-t",
				strconv.Itoa(b.N/clients+1), "-f", script, "-h", database.Host, "-U", database.User, database.Database).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "number of failed transactions: 0 ") {
				b.Fatal(err, string(out))
			}
		})
	}
}

// fill gives ann the tasks 1 to 1,000, and the next 1,000 to 100 others in turn.
func fill(b *testing.B, database pq.Config) {
	b.Helper()
	ask(b, database, `INSERT INTO tasks (user_id, title, description)
		SELECT CASE WHEN i < 1000 THEN 'ann' ELSE 'user' || i % 100 END, 'task number ' || i, 'what is to be done about ' || i
		FROM generate_series(0, 1999) i`)
}
