package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"database/sql"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// must is for what fails only where nothing works.
func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

const (
	neon    = "postgresql://u:S3CRET@ep-x-pooler.region.aws.neon.tech/db?sslmode=require"
	neonsDB = "u|S3CRET|ep-x-pooler.region.aws.neon.tech:5432|db|"
)

// databaseURLs have what is made of each: user, password, hosts, database, sslmode, sslrootcert, target_session_attrs, with
// a ! when there is a warning; or a part of the error.
var databaseURLs = []struct{ env, url, want string }{
	{"", neon + "&channel_binding=require", neonsDB + "verify-full|system|"},
	{"", neon + "&channel_binding=prefer", neonsDB + "require|| !"},
	{"", neon + "&channel_binding=require&sslrootcert=/ca.pem", neonsDB + "verify-full|/ca.pem|"},
	{"PGSSLROOTCERT=/ca.pem", neon + "&channel_binding=require", neonsDB + "verify-full|/ca.pem|"},
	{"", "postgres://u@h/d?sslmode=require&sslrootcert=/dev/null", "u||h:5432|d|require|/dev/null|"},
	{"", "postgres://u@h/d?sslmode=require&sslrootcert=/missing.pem", "u||h:5432|d|require|/missing.pem| !"},
	{"", "postgres://u@h/d?sslmode=verify-ca&channel_binding=require", "u||h:5432|d|verify-full|system|"},
	{"", "postgres://u@h/d?channel_binding=require", "u||h:5432|d|verify-full|system|"},
	{"", "postgres://u@h/d?sslrootcert=system", "u||h:5432|d|verify-full|system|"},
	{"", "postgres://u@h/d", "u||h:5432|d|require|| !"},
	{"PGSSLMODE=disable", "postgres://u@h/d", "u||h:5432|d|disable||"},
	{"", "postgres://u@h/d?ssl=true", "u||h:5432|d|require|| !"},
	{"", "postgres://u@localhost/d", "u||localhost:5432|d|prefer||"},
	{"", "postgres://u@127.9.9.9:99/d", "u||127.9.9.9:99|d|prefer||"},
	{"", "postgres://u@[::1]:99/d", "u||::1:99|d|prefer||"},
	{"", "postgres://u@[2001:db8::1]/d", "u||2001:db8::1:5432|d|require|| !"},
	{"", "postgres://u@h/d?hostaddr=127.0.0.1", "u||h:5432|d|prefer||"},
	{"", "postgres://u@localhost/d?hostaddr=192.0.2.1", "u||localhost:5432|d|require|| !"},
	{"PGHOST=db.example", "postgres://u@/d", "u||localhost:5432|d|require|| !"}, // lib/pq reads the real PGHOST
	{"", "postgres://u@%2Frun%2Fpg:99/d", "u||/run/pg:99|d|disable||"},
	{"", "postgres://u@/d?host=/run/pg&port=99", "u||/run/pg:99|d|disable||"},
	{"", "postgres://u@/d?host=%2Frun%2Fp%20g", "u||/run/p g:5432|d|disable||"},
	{"", "postgres://u@:99/d?host=/run/pg", "u||/run/pg:99|d|disable||"},
	{"", "postgres://u@:5432/d?host=/a,/b", "u||/a:5432 /b:5432|d|disable||"},
	{"", "postgres://u@h1:1,h2:2/d?target_session_attrs=read-write", "u||h1:1 h2:2|d|require||read-write !"},
	{"", "postgres://u@h1,h2/d?port=1,2", "u||h1:1 h2:2|d|require|| !"},
	{"", "postgres://u@h1,h2/d?port=99", "u||h1:99 h2:99|d|require|| !"},
	{"", "postgres://u@h1,h2:2/d", "u||h1:5432 h2:2|d|require|| !"},
	{"", "postgres://u@[::1]:1,[::2]:2/d", "u||::1:1 ::2:2|d|require|| !"},
	{"", "postgres://u@localhost:1,127.0.0.1:2/d", "u||localhost:1 127.0.0.1:2|d|prefer||"},
	{"", `postgres://o%27neil%20%5C:p%40%2F%3A%5C%27%22+%25%20%3F%23@/d%27%20%5C%2F%C3%BC`,
		`o'neil \|p@/:\'"+% ?#|localhost:5432|d' \/ü|prefer||`},
	{"", "postgres://u:a:b@c'd@/d", "u|a:b@c'd|localhost:5432|d|prefer||"},
	{"", "postgres://u@h/d?options=-c%20a%3Db+c", "u||h:5432|d|require|| !"},
	{"", "postgres://u:p@localhost", "u|p|localhost:5432||prefer||"},
	{"", "postgres:///d?user=u&password=p%26q&", "u|p&q|localhost:5432|d|prefer||"},
	{"", "mysql://u:S3CRET@h/d", "must be a URL"},
	{"", "postgres://u:S3CRET%zz@h/d", "encoded"},
	{"", "postgres://u:S3CRET@%/d", "broken percent-encoding"},
	{"", "postgres://u:S3CRET@h/d?options=%", "broken percent-encoding"},
	{"", "postgres://u:S3CRET@h:no/d", `"port"`},
	{"", "postgres://u:S3CRET@h1,h2/d?port=1,2,3", "encoded"},
	{"", "postgres://u:S3CRET#pass@h/d", "# as %23"},
	{"", "postgres://u:12#S3CRET@h/d", "# as %23"}, // a port and a fragment, to lib/pq
	{"", "postgres://u:S3CRET/pass@h/d", `"port"`}, // it should have been encoded
	{"", "postgres://u:S3CRET?pass@h/d", "? as %3F"},
	{"", "postgres://u:?sslmode=S3CRET,@h/d", `"sslmode"`},
	{"", "postgres://:S3CRET\"\",0", `"port"`},
	{"", "postgres://u:S3CRET@h/d?sslmode=no-verify", `wrong value for "sslmode"`},
	{"", "postgres://u:S3CRET@h/d?sslmode=disable&channel_binding=require", "channel_binding=require contradicts sslmode=disable"},
	{"", "postgres://u:S3CRET@h/d?sslmode=require&sslrootcert=system", `use "verify-full"`},
}

func TestDatabaseURLsMeanWhatTheyMeanToPostgreSQLOrAreExplained(t *testing.T) {
	t.Parallel()
	for _, test := range databaseURLs {
		name, value, _ := strings.Cut(test.env, "=")
		c, warnings, err := parseDatabaseURL(test.url, func(asked string) string { return map[string]string{name: value}[asked] })
		hosts := fmt.Sprintf("%s:%d", c.Host, c.Port)
		for _, more := range c.Multi {
			hosts += fmt.Sprintf(" %s:%d", more.Host, more.Port)
		}
		got := strings.Join([]string{c.User, c.Password, hosts, c.Database, string(c.SSLMode), c.SSLRootCert, string(c.TargetSessionAttrs)},
			"|")
		if strings.Contains(strings.Join(warnings, ""), "identity is not verified") {
			got += " !"
		}
		switch {
		case err != nil && (!strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n")):
			t.Errorf("%s\ngot  %v\nwant %s", test.url, err, test.want)
		case err == nil && (got != test.want || len(c.Runtime) > 0 || !c.BinaryParameters):
			t.Errorf("%s\ngot  %s, %v\nwant %s", test.url, got, c.Runtime, test.want)
		}
	}
}

func FuzzDatabaseURL(f *testing.F) {
	for _, test := range databaseURLs {
		if before, after, ok := strings.Cut(test.url, "S3CRET"); ok {
			f.Add(before, after)
		}
	}
	f.Fuzz(func(t *testing.T, before, after string) {
		const password = "Marked5ecret"
		c, _, err := parseDatabaseURL(before+password+after, func(string) string { return "" })
		if err != nil && strings.Contains(err.Error(), password) || err == nil && c.SSLMode == "" {
			t.Errorf("%q, %+v", err, c)
		}
	})
}

// A proxy stands between a service and the cluster, and treats what has a certain text by a script.
type proxy struct {
	testing.TB
	config pq.Config // of the database, through the proxy
	socket string    // of the cluster
	pooler bool      // looks like one, which drops start-up parameters too
	open   atomic.Int32
	mu     sync.Mutex
	text   string
	script []string
	seen   []net.Conn // the connections on which the text came
}

func newProxy(t testing.TB, database pq.Config) *proxy {
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	p := &proxy{TB: t, config: database.Clone(), socket: filepath.Join(database.Host, ".s.PGSQL.5432")}
	p.config.Host, p.config.Port = "127.0.0.1", uint16(listener.Addr().(*net.TCPAddr).Port)
	ctx, stop := context.WithCancel(context.Background())
	var group sync.WaitGroup
	group.Go(func() {
		for client, err := listener.Accept(); err == nil; client, err = listener.Accept() {
			group.Go(func() { p.serve(ctx, client) })
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		stop()
		group.Wait()
	})
	return p
}

// treat says what to do with the next statements that have text in them, one word for each: "pass" them;
// "cut" the connection instead; "lose" the answer when it is there, with the connection; "half": the same in
// the middle of the answer; "stall" for good; an SQLSTATE is the answer. What comes later is passed.
func (p *proxy) treat(text, script string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text, p.script, p.seen = text, strings.Fields(script), nil
}

// count returns how often the text has come.
func (p *proxy) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.seen)
}

func (p *proxy) next(statement string, client net.Conn) (action string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pooler && statement == "PREPARE" {
		p.Error("a statement was prepared behind a pooler")
	}
	if p.text == "" || !strings.Contains(statement, p.text) {
		return "pass"
	}
	p.seen = append(p.seen, client)
	action = append(p.script, "pass")[0]
	if len(p.script) > 0 && action != "stall" {
		p.script = p.script[1:]
	}
	return action
}

// statement returns what messages to the server run, "PREPARE" when they only prepare it.
func statement(messages []byte, prepared map[string]string) (text string) {
	for len(messages) >= 5 && messages[0] != 0 {
		end := int(binary.BigEndian.Uint32(messages[1:])) + 1
		parts := strings.SplitN(string(messages[5:end]), "\x00", 3)
		switch kind := messages[0]; {
		case kind == 'Q':
			text = parts[0]
		case kind == 'P' && parts[0] != "":
			text, prepared[parts[0]] = "PREPARE", parts[1]
		case kind == 'P':
			text = parts[1]
		case kind == 'B' && parts[1] != "":
			text = prepared[parts[1]]
		}
		messages = messages[end:]
	}
	return text + string(messages) // which are left of a start, or a cancel request
}

func (p *proxy) serve(ctx context.Context, client net.Conn) {
	p.open.Add(1)
	defer p.open.Add(-1)
	server := must(net.Dial("unix", p.socket))
	cut := func() { _, _ = client.Close(), server.Close() }
	defer context.AfterFunc(ctx, cut)()
	var fate atomic.Value
	var answers sync.WaitGroup
	defer answers.Wait()
	defer cut()
	answers.Go(func() {
		defer cut()
		buffer := make([]byte, 64<<10)
		for n, err := server.Read(buffer); err == nil; n, err = server.Read(buffer) {
			answer := buffer[:n]
			if key := bytes.Index(answer, []byte("K\x00\x00\x00\x0c")); p.pooler && key > 0 {
				answer[key+5] ^= 1 // a process number of its own
			}
			switch fate.Load() { // PostgreSQL answers when it has committed
			case "half":
				_, _ = client.Write(answer[:n/2])
				return
			case "lose":
				return
			}
			_, _ = client.Write(answer)
		}
	})
	buffer, prepared := make([]byte, 64<<10), map[string]string{}
	for n, err := client.Read(buffer); err == nil; n, err = client.Read(buffer) {
		if start := buffer[:n]; p.pooler && bytes.HasPrefix(start[4:], []byte("\x00\x03\x00\x00")) { // StartupMessage
			n = copy(buffer[8:], fmt.Sprintf("user\x00%s\x00database\x00%s\x00\x00", p.config.User, p.config.Database)) + 8
			binary.BigEndian.PutUint32(buffer, uint32(n))
		}
		switch action := p.next(statement(buffer[:n], prepared), client); {
		case fate.Load() == "stall":
		case action == "cut":
			return
		case len(action) == 5 && action != "stall": // ErrorResponse, ReadyForQuery
			text := "SERROR\x00C" + action + "\x00Minjected\x00\x00"
			_, _ = fmt.Fprintf(client, "E\x00\x00\x00%c%sZ\x00\x00\x00\x05I", len(text)+4, text)
		default:
			if fate.Store(action); action != "stall" {
				_, _ = server.Write(buffer[:n])
			}
		}
	}
}

// ask runs a statement in a database and returns its one value, if it has one, as text.
func ask(t testing.TB, database pq.Config, query string, args ...any) string {
	t.Helper()
	db := sql.OpenDB(newConnector(database, 30*time.Second))
	defer db.Close()
	var value sql.NullString
	if err := db.QueryRow(query, args...).Scan(&value); err != nil && err != sql.ErrNoRows {
		t.Fatalf("%s: %v", query, err)
	}
	return value.String
}

// hold runs a statement in a transaction, and keeps its locks until release is called.
func hold(t testing.TB, database pq.Config, statement string) (release func()) {
	t.Helper()
	db := sql.OpenDB(newConnector(database, 30*time.Second))
	tx := must(db.Begin())
	must(tx.Exec(statement))
	release = sync.OnceFunc(func() { _, _ = tx.Rollback(), db.Close() })
	t.Cleanup(release)
	return release
}

// eventually waits for a state that nothing announces.
func eventually(t testing.TB, what string, reached func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !reached(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain: ", what)
		}
	}
}

// leaves sends a request as a user who hangs up when ctx ends.
func (s *service) leaves(ctx context.Context, t testing.TB, user, method, path, body string) {
	r := must(http.NewRequestWithContext(ctx, method, s.url+path, strings.NewReader(body)))
	r.Header.Set("Authorization", "Bearer "+tokenFor(t, user))
	if _, err := http.DefaultTransport.RoundTrip(r); err == nil {
		t.Errorf("%s %s: answered", method, path)
	}
}

const waiting = "wait_event_type = 'Lock'"

// others counts the other connections to a database of which a condition holds.
func others(t testing.TB, database pq.Config, condition string) string {
	return ask(t, database, `WITH others AS MATERIALIZED (SELECT * FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid())
		SELECT count(*) FROM others WHERE `+condition)
}

// terminate ends all other connections to a database.
func terminate(t testing.TB, database pq.Config) {
	others(t, database, "pg_terminate_backend(pid)")
	eventually(t, "they are gone", func() bool { return others(t, database, "true") == "0" })
}

const unavailable = `{"detail":"Service temporarily unavailable"}`

func TestAStatementIsRepeatedOnlyWhereThatIsHarmless(t *testing.T) {
	t.Parallel()
	tests := []struct {
		request, script string
		status, sent    int
		titles          string // that are there afterwards, besides the many
	}{
		// the answer is lost after the commit: in doubt
		{"POST", "lose", 503, 1, "first new"},
		{"KEY", "lose lose lose", 201, 4, "first new"},
		{"PATCH", "lose", 503, 1, "changed"},
		{"DELETE", "lose", 503, 1, ""},
		{"GET", "lose lose", 200, 3, "first"},
		{"LIST", "lose half half", 200, 4, "first"},
		// the connection ends before the server has the statement: as much in doubt
		{"POST", "cut", 503, 1, "first"},
		{"KEY", "cut", 201, 2, "first new"},
		{"PATCH", "cut", 503, 1, "first"},
		{"DELETE", "cut", 503, 1, "first"},
		// the server goes away, and a pooler's word for it
		{"POST", "57P01", 503, 1, "first"},
		{"KEY", "57P01", 201, 2, "first new"},
		{"PATCH", "08006", 503, 1, "first"},
		{"GET", "08006 57P02", 200, 3, "first"},
		// the server has rolled back, or is no longer the primary
		{"POST", "40001 40P01", 201, 3, "first new"},
		{"PATCH", "40P01", 200, 2, "changed"},
		{"DELETE", "40001", 204, 2, ""},
		{"POST", "25006", 201, 2, "first new"},
		{"PATCH", "25006 25006", 200, 3, "changed"},
		// a prepared statement is out of date, or is refused for good, or was only being prepared
		{"PATCH", "26000", 200, 2, "changed"},
		{"PATCH", "0A000", 200, 2, "changed"},
		{"PATCH", "0A000 0A000 0A000", 500, 2, "first"},
		{"DELETE", "0A000 0A000 0A000", 500, 2, "first"},
		{"PREPARE", "cut cut", 200, 3, "changed"},
		// other errors
		{"KEY", "53100", 503, 1, "first"},
		{"GET", "XX000", 503, 1, "first"},
	}
	database := newDatabase(t)
	for i := range 2 * len(tests) {
		test, pooler := tests[i/2], i%2 > 0
		name := fmt.Sprintf("%s %s %t", test.request, test.script, pooler)
		switch { // nothing is prepared behind a pooler
		case pooler && test.request == "PREPARE":
			continue
		case pooler && (test.script == "26000" || strings.HasPrefix(test.script, "0A000")):
			test.status, test.sent, test.titles = 500, 1, "first"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProxy(t, database)
			p.pooler = pooler
			s := newServiceWithin(t, p.config, 1, 5*time.Second)
			user := strings.ReplaceAll(name, " ", "-")
			path := "/api/" + user + "/tasks"
			ask(t, database, `INSERT INTO tasks (user_id, title) SELECT $1, 'many' FROM generate_series(1, 200)`, user)
			many := s.as(t, user, "GET", path, "")
			first := fmt.Sprintf("%s/%d", path, s.create(t, user, "first").ID)
			request := map[string][]string{ // what is in its statement, method, path, body, headers
				"POST":    {"INSERT", "POST", path, `{"title":"new"}`},
				"KEY":     {"ON CONFLICT", "POST", path, `{"title":"new"}`, "Idempotency-Key", "key"},
				"PATCH":   {"UPDATE tasks", "PATCH", first, `{"title":"changed"}`},
				"PREPARE": {"PREPARE", "PATCH", first, `{"title":"changed"}`},
				"DELETE":  {"DELETE", "DELETE", first, ""},
				"GET":     {"AND id = $2", "GET", first, ""},
				"LIST":    {"LIMIT", "GET", path + "?limit=200", ""},
			}[test.request]
			p.treat(request[0], test.script)
			got := s.as(t, user, request[1], request[2], request[3], request[4:]...)
			if test.request == "LIST" {
				got.is(t, 200, many.body)
			}
			if got.status != test.status || p.count() != test.sent || got.status == 503 && got.header.Get("Retry-After") == "" {
				t.Errorf("%d %.200s after %d times, want %d after %d", got.status, got.body, p.count(), test.status, test.sent)
			}
			if bugs := s.logs.at(slog.LevelError); (got.status == 500) != (len(bugs) == 1 && strings.Contains(bugs[0], "injected")) {
				t.Errorf("logged %q", bugs)
			}
			if strings.HasPrefix(test.script, "25006") && p.seen[0] == p.seen[1] {
				t.Error("asked the server that had become read-only again")
			}
			if titles := ask(t, database, `SELECT string_agg(title, ' ' ORDER BY id) FROM tasks WHERE user_id = $1 AND title <> 'many'`,
				user); titles != test.titles {
				t.Errorf("there is %q, want %q", titles, test.titles)
			}
			s.as(t, user, "GET", path+"?limit=1", "").tasks(t) // the pool's one connection is not lost
		})
	}
}

func TestAWriteThatSentNothingIsNotASentStatement(t *testing.T) {
	t.Parallel()
	near, far := net.Pipe()
	_ = far.Close()
	c := &netConn{Conn: near}
	if n, err := c.Write([]byte("x")); n > 0 || err == nil || c.lost != nil {
		t.Errorf("wrote %d, %v; its fate: %v", n, err, c.lost)
	}
}

func TestConnectionsThatTheServerHasClosedAreNoticedBeforeAStatementIsSent(t *testing.T) {
	t.Parallel()
	const size = 12
	database := newDatabase(t)
	p := newProxy(t, database)
	s := newServiceWithin(t, p.config, size, 10*time.Second)
	for range 3 {
		var group sync.WaitGroup
		for i := range 2 * size {
			group.Go(func() { s.create(t, fmt.Sprint("u", i), "x") })
		}
		group.Wait()
		terminate(t, database)
		eventually(t, "the connections are closed", func() bool { return p.open.Load() == 0 })
	}
	if n := ask(t, database, `SELECT count(*) FROM tasks`); n != fmt.Sprint(3*2*size) {
		t.Errorf("%s tasks", n)
	}
}

func TestNothingWaitsLongerThanItsTimeLimitForAHangingServer(t *testing.T) {
	t.Parallel()
	const limit = 300 * time.Millisecond
	for text, request := range map[string][2]string{"client_encoding": {"GET"}, "SELECT": {"GET"}, // the first while connecting
		"INSERT": {"POST", `{"title":"x"}`}} {
		t.Run(text, func(t *testing.T) {
			t.Parallel()
			p := newProxy(t, newDatabase(t))
			s := newServiceWithin(t, p.config, 1, limit)
			p.treat(text, "stall")
			var group sync.WaitGroup
			for _, user := range []string{"ann", "ann", "bob"} { // two of them wait for a place
				group.Go(func() {
					start := time.Now()
					s.as(t, user, request[0], "/api/"+user+"/tasks", request[1]).is(t, 503, unavailable)
					if took := time.Since(start); took < limit || took > limit+time.Second {
						t.Errorf("took %s", took)
					}
				})
			}
			group.Wait()
			p.treat("", "")
			eventually(t, "the server is reached again", func() bool { return s.as(t, "ann", "GET", "/api/ann/tasks", "").body == "[]" })
			eventually(t, "stalled connections are closed", func() bool { return p.open.Load() == 1 })
		})
	}
}

func TestAStatementBehindALockIsCancelledAndNotAppliedLater(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]time.Duration{"time is up": 300 * time.Millisecond, "client hangs up": time.Minute} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			database := newDatabase(t)
			s := newServiceWithin(t, database, 2, limit)
			mine := s.create(t, "ann", "mine")
			path := fmt.Sprintf("/api/ann/tasks/%d", mine.ID)
			release := hold(t, database, `SELECT FROM tasks FOR UPDATE`)
			ctx, hangUp := context.WithCancel(t.Context())
			defer hangUp()
			start := time.Now()
			var group sync.WaitGroup
			group.Go(func() {
				if name == "time is up" {
					s.as(t, "ann", "PATCH", path, `{"title":"late"}`).is(t, 503, unavailable)
				} else {
					s.leaves(ctx, t, "ann", "PATCH", path, `{"title":"late"}`)
				}
			})
			eventually(t, "the statement waits", func() bool { return others(t, database, waiting) == "1" })
			if name == "client hangs up" {
				hangUp()
				eventually(t, "the statement is cancelled", func() bool { return others(t, database, waiting) == "0" })
				eventually(t, "it is in the log, and no warning", func() bool {
					return strings.Contains(strings.Join(s.logs.at(slog.LevelInfo), ""), `"status":499`)
				})
			}
			if group.Wait(); others(t, database, waiting) != "0" || time.Since(start) > limit+time.Second {
				t.Errorf("the statement still waits, or %s was too long", time.Since(start))
			}
			eventually(t, "the connection is thrown away", func() bool { return s.store.db.Stats().OpenConnections == 0 })
			release()
			s.as(t, "ann", "GET", path, "").is(t, 200, mustJSON(t, mine))
		})
	}
}

func TestTheServerEndsAStatementWhoseCancelRequestIsLost(t *testing.T) {
	t.Parallel()
	const limit = time.Second
	database := newDatabase(t)
	p, pooler := newProxy(t, database), newProxy(t, database)
	p.treat("\x04\xd2\x16\x2e", "stall") // CancelRequest
	s := newServiceWithin(t, p.config, 8, limit)
	path := fmt.Sprintf("/api/ann/tasks/%d", s.create(t, "ann", "x").ID)
	hold(t, database, `LOCK TABLE tasks`)
	var group sync.WaitGroup
	start := time.Now()
	for i, request := range [][]string{{"POST", "/api/ann/tasks", `{"title":"x"}`},
		{"POST", "/api/ann/tasks", `{"title":"x"}`, "Idempotency-Key", "k"},
		{"PATCH", path, `{"title":"y"}`, "If-Match", "*"}, {"DELETE", path, "", "If-Match", `"x"`},
		{"GET", path, ""}, {"GET", "/api/ann/tasks", ""},
		{"POST", "/api/ann/tasks", `{"title":"x"}`}, {"POST", "/api/ann/tasks", `{"title":"x"}`}} { // the last two share a statement
		user := fmt.Sprint("user", i)
		group.Go(func() {
			s.as(t, user, request[0], strings.Replace(request[1], "ann", user, 1), request[2], request[3:]...).is(t, 503, unavailable)
		})
	}
	group.Wait()
	eventually(t, "none is left", func() bool { return others(t, database, waiting) == "0" })
	if took := time.Since(start); took > limit+2*time.Second || p.count() == 0 {
		t.Errorf("a statement ran on for %s; %d cancel requests", took, p.count())
	}
	pooler.pooler = true // there the setting would be another client's
	if setting := ask(t, pooler.config, `SHOW statement_timeout`); setting != "0" {
		t.Errorf("behind a pooler statement_timeout is %s", setting)
	}
}

func TestOneHostOfTwoMayBeDownOrHanging(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	hanging, up := newProxy(t, database), newProxy(t, database)
	hanging.treat("client_encoding", "stall")
	for _, port := range []uint16{1, hanging.config.Port} {
		text := fmt.Sprintf("postgresql://taskflow@127.0.0.1:%d,127.0.0.1:%d/%s?target_session_attrs=read-write", port, up.config.Port,
			database.Database)
		cfg, _, err := parseDatabaseURL(text, func(string) string { return "" })
		if err != nil {
			t.Fatal(err)
		}
		newServiceWithin(t, cfg, 2, 2*time.Second).create(t, "ann", "x")
	}
}

func TestAFailedTryToConnectLeavesNoConnectionOpen(t *testing.T) {
	t.Parallel()
	p := newProxy(t, newDatabase(t))
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which would close it too
	p.config.SSLMode = pq.SSLModePrefer              // the cluster has no TLS: a second try without it
	p.treat("\x04\xd2\x16\x2f", "")                  // SSLRequest
	conn := must(newConnector(p.config, 5*time.Second).Connect(t.Context()))
	defer conn.Close()
	if p.count() != 1 {
		t.Error("did not ask for TLS")
	}
	eventually(t, "one connection is open", func() bool { return p.open.Load() == 1 })
}

func TestNeonsStringWorksPastedUnchanged(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("SSL_CERT_FILE means nothing here, and 127.0.0.2 is no address of the machine")
	}
	t.Parallel()
	folder := must(os.MkdirTemp("", "taskflow-test"))
	account := -1 // that PostgreSQL is to run as, which the folder's owner is: ourselves or nobody
	if os.Getuid() == 0 {
		account = 65534
	}
	must(0, os.Chown(folder, account, -1))
	address := fmt.Sprintf("127.%d.%d.2", 1+os.Getpid()>>8&0x7f, os.Getpid()&0xff) // not that of another run
	other := strings.TrimSuffix(address, "2") + "3"
	private := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.ParseIP(address)},
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	certificate := must(x509.CreateCertificate(rand.Reader, template, template, private.Public(), private))
	file := func(name string, text []byte) string {
		path := filepath.Join(folder, name)
		return must(path, errors.Join(os.WriteFile(path, text, 0o600), os.Chown(path, account, -1)))
	}
	authority := file("ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}))
	key := file("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(private))}))
	hba := file("hba.conf", []byte("local all all trust\nhostssl all all all scram-sha-256\n"))
	database, stop, err := startPostgres(folder, "fsync=off", "hba_file="+hba, "listen_addresses="+address+","+other, "ssl=on",
		"ssl_cert_file="+authority, "ssl_key_file="+key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	ask(t, database, `CREATE ROLE neondb_owner LOGIN PASSWORD 'npg_Secret'`)
	ask(t, database, `CREATE DATABASE neondb OWNER neondb_owner`)

	right := "neondb_owner:npg_Secret@" + address + "/neondb?sslmode=require&channel_binding=require"
	instead := func(old, new string) string { return strings.Replace(right, old, new, 1) }
	tests := []struct{ name, authority, url, fault string }{
		{"right", authority, right, ""},
		{"own authority", "", right + "&sslrootcert=" + authority, ""},
		{"unverified", "", instead("&channel_binding=require", ""), ""},
		{"unknown authority", "", right, "certificate signed by unknown authority"},
		{"other host", authority, instead(address, other), "certificate is valid for " + address},
		{"wrong password", authority, instead("Secret", "Wrong"), "28P01"},
		{"no such user", authority, instead("owner", "guest"), "28P01"},
		{"no such database", authority, instead("/neondb", "/none"), "3D000"},
		{"without TLS", authority, instead("require&channel_binding=require", "disable"), "28000"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := start(t, t.TempDir(), []string{"ENVIRONMENT=production", secretVariable, "SSL_CERT_FILE=" + test.authority,
				"DATABASE_URL=postgresql://" + test.url})
			if test.fault != "" {
				p.exits(t, 1, test.fault)
			} else {
				p.await(t, `"ready"`)
			}
			if strings.Contains(p.output.String(), "npg_") {
				t.Errorf("the password is in the output:\n%s", &p.output)
			}
		})
	}
	cfg, _, _ := parseDatabaseURL("postgresql://"+tests[1].url, func(string) string { return "" })
	s := newServiceWithin(t, cfg, 2, time.Second)
	s.create(t, "ann", "mine")
	terminate(t, cfg)
	mine := s.create(t, "ann", "the idle connection had been closed")
	hold(t, cfg, `SELECT FROM tasks FOR UPDATE`)
	s.as(t, "ann", "DELETE", fmt.Sprintf("/api/ann/tasks/%d", mine.ID), "").is(t, 503, unavailable)
	if n := others(t, cfg, waiting); n != "0" {
		t.Errorf("%s statements still wait", n)
	}
}

func TestALostRaceForTheTableIsTriedAgain(t *testing.T) {
	t.Parallel()
	for code, ends := range map[pqerror.Code]bool{"42P07": false, "42701": false, "42710": false, "23505": false,
		"42P01": true, "23502": true} {
		if err := fmt.Errorf("wrapped: %w", &pq.Error{Code: code}); isStartupError(err) != ends {
			t.Errorf("%s ends the start: %v", code, !ends)
		}
	}
}
