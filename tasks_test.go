package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"
)

// The tests go through the whole handler on a real PostgreSQL: one server for the run, without
// durability, and for each test a database of its own, copied from a template that has the schema.

const testSecret = "a secret of the tests, 32 bytes or more"

var cluster struct {
	*devDB
	databases atomic.Int64
}

func TestMain(m *testing.M) {
	code, err := withCluster(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func withCluster(run func() int) (code int, err error) {
	folder, err := temporaryFolder()
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(folder.path)
	ctx := context.Background()
	cluster.devDB, err = startDevDB(ctx, folder, slog.New(slog.DiscardHandler), func(error) {},
		"fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=500", "max_prepared_transactions=5")
	if err != nil {
		return 1, err
	}
	defer func() {
		if stopErr := cluster.stop(); err == nil {
			err = stopErr
		}
	}()
	if err := administer(`CREATE DATABASE template_tasks`); err != nil {
		return 1, err
	}
	s := newStore(clusterConfig("template_tasks"), 1, 30*time.Second)
	if err := s.applySchema(ctx); err != nil {
		return 1, err
	}
	if err := s.close(); err != nil {
		return 1, err
	}
	return run(), nil
}

// temporaryFolder is a devFolder that PostgreSQL's account can reach, outside the working directory.
func temporaryFolder() (f devFolder, err error) {
	if f.path, err = os.MkdirTemp("", "taskflow-test"); err != nil {
		return f, err
	}
	if os.Getuid() == 0 {
		if f.account, err = unprivileged(f.path); err != nil {
			return f, err
		}
	}
	return f, f.prepare()
}

func clusterConfig(database string) pq.Config {
	cfg := cluster.config.Clone()
	cfg.Database = database
	return cfg
}

// administer runs a statement in the cluster's database postgres.
func administer(statement string) error {
	db := sql.OpenDB(newConnector(clusterConfig("postgres"), 30*time.Second))
	defer db.Close()
	_, err := db.Exec(statement)
	return err
}

// newDatabase makes a database with the schema, dropped after the test.
func newDatabase(t testing.TB) pq.Config { return newDatabaseFrom(t, "template_tasks") }

func newDatabaseFrom(t testing.TB, template string) pq.Config {
	t.Helper()
	name := fmt.Sprintf("test_%d", cluster.databases.Add(1))
	if err := administer(`CREATE DATABASE ` + name + ` TEMPLATE ` + template); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := administer(`DROP DATABASE ` + name + ` WITH (FORCE)`); err != nil {
			t.Error(err)
		}
	})
	return clusterConfig(name)
}

// A service is one under test, with a client's view of it.
type service struct {
	*server
	url  string
	logs *logRecorder
}

// newService starts a service on a database of its own.
func newService(t testing.TB) *service {
	t.Helper()
	return newServiceWith(t, newDatabase(t), 8)
}

// newServiceWith starts a service on a database, with a pool of a size.
func newServiceWith(t testing.TB, cfg pq.Config, size int) *service {
	t.Helper()
	s := newServiceOn(t, &authenticator{secret: []byte(testSecret)})
	st := newStore(cfg, size, 10*time.Second)
	t.Cleanup(func() { _ = st.close() })
	s.store.Store(st)
	return s
}

// newServiceOn starts a service without a database that judges tokens with auth.
func newServiceOn(t testing.TB, auth *authenticator) *service {
	t.Helper()
	logs := &logRecorder{}
	s := &service{&server{auth: auth, origins: []string{"http://localhost:3000", "https://app.example.com"}, log: slog.New(logs)}, "", logs}
	ts := httptest.NewUnstartedServer(s.handler())
	ts.Listener = patientListener{ts.Listener}
	ts.Config.DisableGeneralOptionsHandler = true
	ts.Start()
	s.url = ts.URL
	t.Cleanup(func() {
		ts.Close()
		for _, line := range logs.at(slog.LevelError) {
			t.Errorf("unexpected error in the log: %s", line)
		}
	})
	return s
}

// A logRecorder is a slog.Handler that keeps what is logged, as JSON.
type logRecorder struct {
	mu    sync.Mutex
	lines []logLine
}

type logLine struct {
	level slog.Level
	text  string
}

func (l *logRecorder) Enabled(context.Context, slog.Level) bool { return true }
func (l *logRecorder) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *logRecorder) WithGroup(string) slog.Handler            { return l }
func (l *logRecorder) Handle(ctx context.Context, r slog.Record) error {
	var b strings.Builder
	if err := slog.NewJSONHandler(&b, nil).Handle(ctx, r); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, logLine{r.Level, b.String()})
	return nil
}

// at takes the lines of a level out of the record.
func (l *logRecorder) at(level slog.Level) (taken []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := l.lines[:0]
	for _, line := range l.lines {
		if line.level == level {
			taken = append(taken, line.text)
		} else {
			kept = append(kept, line)
		}
	}
	l.lines = kept
	return taken
}

// tokenFor makes a valid token for a user.
func tokenFor(t testing.TB, user string) string {
	t.Helper()
	token, err := (&authenticator{secret: []byte(testSecret)}).developmentToken(user, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// A reply is a response that has been read.
type reply struct {
	status int
	header http.Header
	body   string
}

// as sends a request as a user, "" for nobody, with the path just as it is. headers are names and values in turn; a name
// that comes twice makes two lines. It checks what every answer has.
func (s *service) as(t testing.TB, user, method, path, body string, headers ...string) reply {
	t.Helper()
	var content io.Reader
	if body != "" {
		content = strings.NewReader(body)
	}
	r, err := http.NewRequest(method, s.url, content)
	if err != nil {
		t.Fatal(err)
	}
	r.URL.Opaque = path
	if user != "" {
		r.Header.Set("Authorization", "Bearer "+tokenFor(t, user))
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	got := send(t, r)
	for name, want := range map[string]string{"Cache-Control": "^private, no-cache$", "X-Content-Type-Options": "^nosniff$",
		"Vary": "^Origin$", "X-Request-Id": "^[A-Za-z0-9._-]{1,128}$"} {
		if lines := got.header[name]; len(lines) != 1 || !regexp.MustCompile(want).MatchString(lines[0]) {
			t.Errorf("%s %s: %s is %q", method, path, name, lines)
		}
	}
	return got
}

// send sends a request as it is and reads all of the answer. It follows no redirects.
func send(t testing.TB, r *http.Request) reply {
	t.Helper()
	response, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{response.StatusCode, response.Header, string(text)}
}

// is checks the status and the whole JSON body against a text.
func (r reply) is(t testing.TB, status int, body string) reply {
	t.Helper()
	if r.status != status || !sameJSON(t, r.body, body) {
		t.Errorf("got %d %s\nwant %d %s", r.status, r.body, status, body)
	}
	if media := r.header.Get("Content-Type"); body != "" && media != "application/json" {
		t.Errorf("Content-Type is %q", media)
	}
	return r
}

func sameJSON(t testing.TB, got, want string) bool {
	t.Helper()
	if got == want {
		return true
	}
	decode := func(text string) (value any) {
		d := json.NewDecoder(strings.NewReader(text))
		d.UseNumber()
		if err := d.Decode(&value); err != nil {
			return err
		}
		return value
	}
	return reflect.DeepEqual(decode(got), decode(want))
}

// A taskJSON is a task as clients see it, written out again so that a renamed field is noticed.
type taskJSON struct {
	ID          int64   `json:"id"`
	UserID      string  `json:"user_id"`
	Title       string  `json:"title"`
	Description *string `json:"description"`
	IsCompleted bool    `json:"is_completed"`
	CreatedAt   string  `json:"created_at"`
	UpdatedAt   string  `json:"updated_at"`
}

// task reads the one task of a successful answer, which must have just these fields.
func (r reply) task(t testing.TB) (task taskJSON) {
	t.Helper()
	r.decode(t, &task)
	return task
}

// tasks reads the tasks of a successful answer.
func (r reply) tasks(t testing.TB) (tasks []taskJSON) {
	t.Helper()
	r.decode(t, &tasks)
	return tasks
}

func (r reply) decode(t testing.TB, into any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader([]byte(r.body)))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil || r.status > 299 {
		t.Fatalf("%d %s: %v", r.status, r.body, err)
	}
}

// create makes a task and returns it.
func (s *service) create(t testing.TB, user, title string) taskJSON {
	t.Helper()
	body, _ := json.Marshal(map[string]string{"title": title})
	return s.as(t, user, "POST", "/api/"+url.PathEscape(user)+"/tasks", string(body), "Content-Type", "application/json").task(t)
}

func TestEveryRouteJudgesPathThenTokenThenOwner(t *testing.T) {
	t.Parallel()
	s := newService(t)
	mine := s.create(t, "ann", "mine")
	expired, _ := s.auth.developmentToken("ann", -time.Second)
	own := fmt.Sprintf("/api/ann/tasks/%d", mine.ID)
	routes := []struct{ method, path, body string }{
		{"GET", "/api/ann/tasks", ""}, {"HEAD", "/api/ann/tasks", ""}, {"POST", "/api/ann/tasks", `{"title":"x"}`},
		{"GET", own, ""}, {"HEAD", own, ""}, {"PATCH", own, `{}`}, {"DELETE", own, ""},
	}
	tokens := []struct {
		name, authorization string
		status              int
		detail              string
	}{
		{"none", "", 401, "Invalid authorization header"},
		{"another scheme", "Basic YW5uOnB3", 401, "Invalid authorization header"},
		{"nonsense", "Bearer x.y.z", 401, "Invalid token"},
		{"expired", "Bearer " + expired, 401, "Token expired"},
		{"another user's", "Bearer " + tokenFor(t, "bob"), 403, "Forbidden"},
	}
	for _, route := range routes {
		for _, token := range tokens {
			t.Run(route.method+" "+token.name, func(t *testing.T) {
				headers := []string{"Authorization", token.authorization}
				if token.authorization == "" {
					headers = nil
				}
				got := s.as(t, "", route.method, route.path, route.body, headers...)
				want := fmt.Sprintf(`{"detail":%q}`, token.detail)
				if route.method == "HEAD" {
					want = got.body
				}
				got.is(t, token.status, want)
				challenge := ""
				if token.status == 401 {
					challenge = "Bearer"
				}
				if got.header.Get("WWW-Authenticate") != challenge {
					t.Errorf("WWW-Authenticate is %q", got.header.Get("WWW-Authenticate"))
				}
			})
		}
	}
	for _, id := range []string{"999999", "0", "-1", "+7", "99999999999999999999999999", "-99999999999999999999999999"} {
		for _, method := range []string{"GET", "PATCH", "DELETE"} {
			body := map[string]string{"PATCH": `{}`}[method]
			s.as(t, "ann", method, "/api/ann/tasks/"+id, body).is(t, 404, `{"detail":"Task not found"}`)
			s.as(t, "bob", method, fmt.Sprintf("/api/bob/tasks/%d", mine.ID), body).is(t, 404, `{"detail":"Task not found"}`)
		}
	}
	s.as(t, "ann", "GET", own, "").is(t, 200, mustJSON(t, mine))
}

func mustJSON(t testing.TB, value any) string {
	t.Helper()
	b, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
