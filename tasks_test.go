package main

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
)

// The tests go through the whole handler on a real PostgreSQL: one server for the run, without
// durability, and for each test a database of its own, copied from a template that has the schema.

const testSecret = "a secret of the tests, 32 bytes or more"

var cluster struct {
	config    pq.Config
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
	folder, err := os.MkdirTemp("", "taskflow-test")
	if err != nil {
		return 1, err
	}
	var stop func()
	if cluster.config, stop, err = startPostgres(folder, "fsync=off", "synchronous_commit=off", "full_page_writes=off",
		"max_connections=500", "max_prepared_transactions=5"); err != nil {
		return 1, err
	}
	defer stop()
	if err := administer(`CREATE DATABASE template_tasks`); err != nil {
		return 1, err
	}
	ctx, s := context.Background(), newStore(clusterConfig("template_tasks"), 1, 30*time.Second)
	if file := os.Getenv("TASKFLOW_TEST_TABLE"); file != "" { // that the service is to find, like faults/partitions.sql
		text, err := os.ReadFile(file)
		if err := errors.Join(err, exchange(ctx, s.probe, string(text), nil, func([]driver.Value) {})); err != nil {
			return 1, err
		}
	}
	if err := errors.Join(s.applySchema(ctx), s.close()); err != nil {
		return 1, err
	}
	return run(), nil
}

func (s *store) close() error { return errors.Join(s.db.Close(), s.probe.Close()) }

// startPostgres has dev/postgres run a PostgreSQL in a folder, which goes away with it: by stop, or when this process ends.
func startPostgres(folder string, settings ...string) (cfg pq.Config, stop func(), err error) {
	command := exec.Command("dev/postgres", append([]string{"-t", folder}, settings...)...)
	var complaints strings.Builder
	command.Stderr = &complaints
	held, err := command.StdinPipe()
	if err != nil {
		return cfg, nil, err
	}
	out, err := command.StdoutPipe()
	if err != nil {
		return cfg, nil, err
	}
	if err := command.Start(); err != nil {
		return cfg, nil, err
	}
	socket, err := bufio.NewReader(out).ReadString('\n')
	stop = func() { _, _ = held.Close(), command.Wait() }
	if err != nil {
		stop()
		return cfg, nil, fmt.Errorf("dev/postgres: %w: %s", err, &complaints)
	}
	return pq.Config{Host: strings.TrimSpace(socket), Port: 5432, User: "taskflow", Database: "postgres", SSLMode: pq.SSLModeDisable,
		ApplicationName: "taskflow", ClientEncoding: "UTF8", Datestyle: "ISO, MDY", BinaryParameters: true}, stop, nil
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
	return newServiceWithin(t, newDatabase(t), 8, 10*time.Second)
}

// newServiceWithin starts a service on a database that has the schema, with a pool of size connections and a time limit.
func newServiceWithin(t testing.TB, cfg pq.Config, size int, limit time.Duration) *service {
	t.Helper()
	s := newServiceOf(t, newAuthenticator(testSecret, "", "", ""), newStore(cfg, size, limit))
	s.store.applied.Store(true)
	return s
}

// newServiceOn starts a service that judges tokens with auth and has not reached its database.
func newServiceOn(t testing.TB, auth *authenticator) *service {
	t.Helper()
	return newServiceOf(t, auth, newStore(pq.Config{}, 1, time.Second))
}

func newServiceOf(t testing.TB, auth *authenticator, st *store) *service {
	logs := &logRecorder{}
	s := &service{server: &server{auth: auth, store: st,
		users:   userLimit{limit: maxRequests, timeout: st.timeout, users: map[string]*userTurns{}},
		origins: []string{"http://localhost:3000", "https://app.example.com"}, log: slog.New(logs)}, logs: logs}
	ts := httptest.NewUnstartedServer(asDescribed(t, s.handler()))
	ts.Config.DisableGeneralOptionsHandler = true
	ts.Start()
	s.url = ts.URL
	t.Cleanup(func() {
		ts.Close()
		_ = st.close()
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
	return newAuthenticator(testSecret, "", "", "").developmentToken(user, time.Hour)
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
	if r.Header.Get("Transfer-Encoding") != "" {
		r.ContentLength = -1 // unknown: net/http sends chunks
	}
	got := send(t, r)
	for name, want := range map[string]string{"Cache-Control": "^private, no-cache, no-transform$", "X-Content-Type-Options": "^nosniff$",
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

func mustJSON(t testing.TB, value any) string {
	t.Helper()
	b, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The bodies of errors. problem writes one entry of a 422, with the insides of loc and ctx as JSON.
const (
	notFound = `{"detail":"Task not found"}`
	modified = `{"detail":"Task has been modified"}`
	outage   = `{"detail":"Service temporarily unavailable"}`
)

func problems(list ...string) string { return `{"detail":[` + strings.Join(list, ",") + `]}` }

func problem(kind, loc, msg, input string, ctx ...string) string {
	text := fmt.Sprintf(`{"type":%q,"loc":[%s],"msg":%q,"input":%s`, kind, loc, msg, input)
	for _, members := range ctx {
		text += `,"ctx":{` + members + `}`
	}
	return text + "}"
}

func invalidJSON(offset int, msg string) string {
	return problem("json_invalid", fmt.Sprintf(`"body",%d`, offset), "JSON decode error", "{}", fmt.Sprintf(`"error":%q`, msg))
}

func noInteger(loc, input string) string {
	return problem("int_parsing", loc, "Input should be a valid integer, unable to parse string as an integer", input)
}

// raw sends what net/http's client would not, and reads the head of the answer.
func (s *service) raw(t testing.TB, head string) *http.Response {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, head+"\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(head, err)
	}
	return response
}

// exec runs a statement in the service's database, beside the service.
func (s *service) exec(t testing.TB, statement string, args ...any) {
	t.Helper()
	if _, err := s.store.probe.Exec(statement, args...); err != nil {
		t.Fatal(err)
	}
}

// behindLock has n calls of f wait for what the statement locks or changes, then releases them all at once.
func (s *service) behindLock(t testing.TB, n int, f func(int), statement string, args ...any) {
	t.Helper()
	tx, err := s.store.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(statement, args...); err != nil {
		t.Fatal(err)
	}
	var calls sync.WaitGroup
	for i := range n {
		calls.Go(func() { f(i) })
	}
	const query = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`
	for waiting, end := 0, time.Now().Add(8*time.Second); waiting < n; {
		if err := s.store.probe.QueryRow(query).Scan(&waiting); err != nil || time.Now().After(end) {
			t.Fatalf("%d of %d wait: %v", waiting, n, err)
		}
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	calls.Wait()
}

func TestEveryRouteJudgesTheTokenThenTheOwner(t *testing.T) {
	t.Parallel()
	s := newService(t)
	mine := s.create(t, "ann", "mine")
	expired := s.auth.developmentToken("ann", -time.Second)
	own := fmt.Sprintf("/api/ann/tasks/%d", mine.ID)
	for _, request := range []string{"GET /api/ann/tasks", "HEAD /api/ann/tasks", "POST /api/ann/tasks", "GET " + own, "HEAD " + own,
		"PATCH " + own, "DELETE " + own} {
		method, path, _ := strings.Cut(request, " ")
		for authorization, detail := range map[string]string{"": "Invalid authorization header",
			"Basic YW5uOnB3": "Invalid authorization header", "Bearer x.y.z": "Invalid token",
			"Bearer " + expired: "Token expired", "Bearer " + tokenFor(t, "bob"): "Forbidden"} {
			status, challenge, headers := 401, "Bearer", []string{"Authorization", authorization}
			if detail == "Forbidden" {
				status, challenge = 403, ""
			}
			if authorization == "" {
				headers = nil
			}
			got := s.as(t, "", method, path, `{"title":"x"}`, headers...)
			want := map[bool]string{false: fmt.Sprintf(`{"detail":%q}`, detail)}[method == "HEAD"]
			if got.is(t, status, want).header.Get("WWW-Authenticate") != challenge {
				t.Errorf("%s with %q: WWW-Authenticate is %q", request, authorization, got.header.Get("WWW-Authenticate"))
			}
		}
	}
	s.as(t, "ann", "GET", own, "").is(t, 200, mustJSON(t, mine))
}

func TestUnknownPathsAre404WhateverTheMethodAndToken(t *testing.T) {
	t.Parallel()
	s := newServiceOn(t, newAuthenticator("", "", "", ""))
	for _, path := range []string{"/", "/api", "/api/", "/api/ann", "/api/ann/", "/api/ann/tasks/", "/api//tasks", "/api/ann//tasks",
		"/api/ann/tasks//",
		"/api/ann/tasks/1/", "/api/ann/tasks/1/x", "/API/ann/tasks", "/api/ann/Tasks", "/health/", "/health/x", "/./health",
		"/api/../health", "/api/x/../ann/tasks",
		"/api%2Fann/tasks", "/api/ann%2Ftasks", "/api/ann/tasks%2F1", "/api/ann/tasks/1%2F/", "/healthz", "/ready%00", "/favicon.ico",
		"/tasks", "/api/ann/tasks;x"} {
		for _, method := range []string{"GET", "POST", "DELETE", "OPTIONS", "BREW"} {
			s.as(t, "", method, path, `{"title":`, "Content-Type", "text/plain").is(t, 404, `{"detail":"Not Found"}`)
		}
	}
}

func TestOtherMethodsOfAPathAre405WithAllow(t *testing.T) {
	t.Parallel()
	s := newServiceOn(t, newAuthenticator("", "", "", ""))
	for path, allow := range map[string]string{"/health": "GET, HEAD", "/ready": "GET, HEAD", "/openapi.json": "GET, HEAD",
		"/docs":          "GET, HEAD",
		"/api/ann/tasks": "GET, HEAD, POST", "/api/ann/tasks/1": "GET, HEAD, PATCH, DELETE",
		"/api/a%2Fb/tasks/x%2Fy": "GET, HEAD, PATCH, DELETE"} {
		for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW", "get", "PROPFIND"} {
			if slices.Contains(strings.Split(allow, ", "), method) {
				continue
			}
			got := s.as(t, "", method, path, "", "Origin", "https://elsewhere.example").is(t, 405, `{"detail":"Method Not Allowed"}`)
			if got.header.Get("Allow") != allow {
				t.Errorf("%s %s: Allow is %q", method, path, got.header["Allow"])
			}
		}
	}
}

func TestRequestsThatNoClientLibraryWouldSend(t *testing.T) {
	t.Parallel()
	s := newServiceOn(t, newAuthenticator(testSecret, "", "", ""))
	const nowhere, host = `{"detail":"Not Found"}`, "\r\nHost: x"
	token := host + "\r\nAuthorization: Bearer " + tokenFor(t, "ann")
	for _, test := range []struct {
		head   string
		status int
		body   string
	}{
		{"GET /health HTTP/1.0", 200, `{"status":"healthy"}`},
		{"GET http://elsewhere.example/health HTTP/1.1" + host, 200, `{"status":"healthy"}`},
		{"GET //health HTTP/1.1" + host, 404, nowhere},
		{"GET //api/ann/tasks HTTP/1.1" + token, 404, nowhere},
		{"GET http://elsewhere.example HTTP/1.1" + host, 404, nowhere},
		{"OPTIONS * HTTP/1.1" + host, 404, nowhere},
		{"POST /api/ann/tasks HTTP/1.1" + token + "\r\nExpect: 100-continue\r\nContent-Length: 1048577", 413,
			`{"detail":"Request body too large"}`},
		{"POST /api/bob/tasks HTTP/1.1" + token + "\r\nExpect: 100-continue\r\nContent-Length: 10", 403, `{"detail":"Forbidden"}`},
	} {
		response := s.raw(t, test.head)
		text, err := io.ReadAll(io.LimitReader(response.Body, response.ContentLength))
		if err != nil {
			t.Error(err)
		}
		reply{response.StatusCode, response.Header, string(text)}.is(t, test.status, test.body)
	}
}

func TestTheUserInThePathIsPercentDecodedOnce(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, test := range []struct {
		user         string
		same, others []string
	}{
		{"ann", []string{"ann", "%61nn", "%61%6E%6e"}, []string{"Ann", "ann%20", "%20ann", "ann%00", "ann%2F", "%2561nn", "ann%FF", "%2E"}},
		{"a/b", []string{"a%2Fb", "a%2fb"}, []string{"a%252Fb", "a", "b", `a\b`}},
		{"a%2Fb", []string{"a%252Fb", "a%252%46b"}, []string{"a%2Fb"}},
		{"a b", []string{"a%20b"}, []string{"a+b", "ab", "a%2520b"}},
		{"a+b", []string{"a+b", "a%2Bb"}, []string{"a%20b", "a%252Bb"}},
		{"ü €", []string{"%C3%BC%20%E2%82%AC", "ü%20€"}, []string{"u%CC%88%20%E2%82%AC", "%FC%20%E2%82%AC"}},
		{`a/"<b>^|`, []string{"a%2F%22%3Cb%3E%5E%7C"}, []string{`"<b>^|`}},
		{"$&'()*,;:@=!~", []string{"$&'()*,;:@=!~"}, []string{"$&'()*,"}},
		{"?#", []string{"%3F%23"}, []string{"%3F"}},
		{strings.Repeat("😀", 63) + "abc", []string{strings.Repeat("😀", 63) + "abc"}, []string{strings.Repeat("😀", 63)}},
	} {
		for n, name := range test.same {
			path := "/api/" + name + "/tasks"
			got := s.as(t, test.user, "POST", path, `{"title":"x"}`)
			task := got.task(t)
			s.as(t, test.user, "GET", got.header.Get("Location"), "").is(t, 200, mustJSON(t, task))
			if want := fmt.Sprintf("/api/%s/tasks/%d", url.PathEscape(test.user), task.ID); task.UserID != test.user ||
				got.header.Get("Location") != want {
				t.Errorf("%s: got user %q at %s", path, task.UserID, got.header.Get("Location"))
			}
			s.create(t, test.user, "y")
			if pages := s.pages(t, test.user, path+"?limit=1"); len(pages) != 2*n+2 {
				t.Errorf("%s: %d pages", path, len(pages))
			}
		}
		for _, name := range test.others {
			s.as(t, test.user, "GET", "/api/"+name+"/tasks", "").is(t, 403, `{"detail":"Forbidden"}`)
		}
	}
}

func TestHEADAnswersAsGETDoesWithoutABody(t *testing.T) {
	t.Parallel()
	s := newService(t)
	task := s.create(t, "ann", "x")
	s.create(t, "ann", "y")
	own := fmt.Sprintf("/api/ann/tasks/%d", task.ID)
	for _, test := range [][]string{{"/health"}, {"/ready"}, {"/docs"}, {"/openapi.json"}, {"/api/ann/tasks"}, {"/api/ann/tasks?limit=1"},
		{own},
		{own, "If-None-Match", "*"}, {"/api/ann/tasks/0"}, {"/api/ann/tasks/x"}, {"/api/ann/tasks?limit=x"}, {"/api/bob/tasks"},
		{"/nowhere"}, {own, "Authorization", "twice"}} {
		headers := append([]string{"X-Request-ID", "same", "Origin", "https://app.example.com"}, test[1:]...)
		get, head := s.as(t, "ann", "GET", test[0], "", headers...), s.as(t, "ann", "HEAD", test[0], "", headers...)
		get.header.Del("Date")
		head.header.Del("Date")
		if head.body != "" || head.status != get.status || !reflect.DeepEqual(head.header, get.header) {
			t.Errorf("%s: HEAD %d %v %q\nGET %d %v", test[0], head.status, head.header, head.body, get.status, get.header)
		}
	}
}

func TestASaneRequestIDIsTakenOver(t *testing.T) {
	t.Parallel()
	s := newServiceOn(t, newAuthenticator("", "", "", ""))
	seen := map[string]bool{}
	for id, sane := range map[string]bool{"a": true, "A-z_0.9": true, strings.Repeat("x", 128): true, strings.Repeat("x", 129): false,
		"a b": false, "": false, "é": false, "a/b": false, "a\tb": false} {
		for range 2 {
			got := s.as(t, "", "GET", "/health", "", "X-Request-ID", id).header.Get("X-Request-ID")
			if sane != (got == id) || !sane && seen[got] {
				t.Errorf("%q became %q", id, got)
			}
			seen[got] = true
		}
	}
}

func TestATaskIsShownWholeEverywhere(t *testing.T) {
	t.Parallel()
	s := newService(t)
	got := s.as(t, "ann", "POST", "/api/ann/tasks",
		` {"title" : "a title", "id": 77, "user_id": "bob", "is_completed": true, "created_at": 5} `)
	task := got.task(t)
	own := fmt.Sprintf("/api/ann/tasks/%d", task.ID)
	want := taskJSON{task.ID, "ann", "a title", nil, false, task.CreatedAt, task.UpdatedAt}
	if !strings.Contains(got.body, `"title":"a title"`) {
		t.Errorf("got %s", got.body)
	}
	got.is(t, 201, mustJSON(t, want))
	at, err := time.Parse("2006-01-02T15:04:05.000000Z", task.CreatedAt)
	if task.ID < 1 || err != nil || len(task.CreatedAt) != 27 || task.UpdatedAt != task.CreatedAt || time.Since(at).Abs() > time.Minute {
		t.Errorf("got %s", got.body)
	}
	if location := got.header.Get("Location"); location != own {
		t.Errorf("Location is %q", location)
	}
	for _, at := range []string{"2026-01-02T03:04:05.000000Z", "2026-01-02T03:04:05.100000Z", "1999-12-31T23:59:59.999999Z"} {
		s.exec(t, `UPDATE tasks SET created_at = $1, updated_at = $1`, at)
		want.CreatedAt, want.UpdatedAt = at, at
		one := s.as(t, "ann", "GET", own, "").is(t, 200, mustJSON(t, want))
		s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, mustJSON(t, []taskJSON{want}))
		empty := s.as(t, "ann", "PATCH", own, `{}`).is(t, 200, mustJSON(t, want))
		if tag := one.header.Get("ETag"); !regexp.MustCompile(`^"[!#-~]+"$`).MatchString(tag) || empty.header.Get("ETag") != tag {
			t.Errorf("ETag is %q, then %q", tag, empty.header.Get("ETag"))
		}
	}
	s.as(t, "ann", "DELETE", own, "", "Content-Type", "text/plain; =").is(t, 204, "")
	s.as(t, "ann", "DELETE", own, "and a body", "Content-Type", "nonsense").is(t, 404, notFound)
	s.as(t, "ann", "GET", own, "").is(t, 404, notFound)
	s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, `[]`)
	if next := s.create(t, "ann", "next"); next.ID <= task.ID {
		t.Errorf("id %d after %d", next.ID, task.ID)
	}
}

func TestEveryFaultOfABodyIsNamedInFieldOrder(t *testing.T) {
	t.Parallel()
	s := newService(t)
	old := s.create(t, "ann", "old")
	missing := problem("missing", `"body"`, "Field required", "null")
	untitled := func(body string) string { return problem("missing", `"body","title"`, "Field required", body) }
	object := func(input string) string {
		return problem("model_attributes_type", `"body"`, "Input should be a valid dictionary or object to extract fields from", input)
	}
	text := func(field, input string) string {
		return problem("string_type", `"body","`+field+`"`, "Input should be a valid string", input)
	}
	unstorable := func(field, input string) string {
		return problem("value_error", `"body","`+field+`"`, "Value error, text must not contain U+0000 or lone surrogates", input,
			`"error":{}`)
	}
	boolean := func(input string) string {
		return problem("bool_type", `"body","is_completed"`, "Input should be a valid boolean", input)
	}
	short := problem("string_too_short", `"body","title"`, "String should have at least 1 character", `""`, `"min_length":1`)
	long := `"` + strings.Repeat("😀", 201) + `"`
	tests := map[string]string{ // BOTH is POST and PATCH
		`POST {}`: untitled(`{}`), `POST {"Title":"x","TITLE":"y","titl\u0065 ":"z"}`: untitled(`{"Title":"x","TITLE":"y","title ":"z"}`),
		`POST {"is_completed":null}`:                          untitled(`{"is_completed":null}`),
		`POST {"description":5}`:                              untitled(`{"description":5}`) + "," + text("description", "5"),
		`POST {"title":"","description":[],"is_completed":7}`: short + "," + text("description", "[]"),
		`PATCH {"title":7,"is_completed":"yes","description":{"a":1}}`: text("title", "7") + "," + text("description", `{"a":1}`) +
			"," + boolean(`"yes"`),
		`PATCH {"description":"\udfff","title":"\u0000","is_completed":{}}`: unstorable("title", `"\u0000"`) + "," +
			unstorable("description", `"\udfff"`) + "," + boolean("{}"),
		`PATCH {"is_completed":true,"is_completed":null}`: boolean("null"),
		"BOTH ": missing, "BOTH null": missing, "BOTH  null\n": missing, "BOTH []": object("[]"),
		`BOTH [{"title":"x"}]`: object(`[{"title":"x"}]`), `BOTH "title"`: object(`"title"`),
		"BOTH  7 ": object("7"), "BOTH false": object("false"), `BOTH {"title":null}`: text("title", "null"),
		`BOTH {"title":["x"]}`: text("title", `["x"]`), `BOTH {"title":true}`: text("title", "true"),
		`BOTH {"title":1e400}`: text("title", "1e400"), `BOTH {"title":"x","title":"y","title":7}`: text("title", "7"),
		`BOTH {"title":""}`: short, `BOTH {"title":"x","description":false}`: text("description", "false"),
		`BOTH {"title":` + long +
			`}`: problem("string_too_long", `"body","title"`, "String should have at most 200 characters", long, `"max_length":200`),
		`BOTH {"title":"\ud83d\u0041"}`:             unstorable("title", `"\ud83d\u0041"`),
		`BOTH {"title":"\ude00\ud83d"}`:             unstorable("title", `"\ude00\ud83d"`),
		`BOTH {"title":"\ud83d\ude00\udbff"}`:       unstorable("title", `"\ud83d\ude00\udbff"`),
		`BOTH {"title":"x","description":"\u0000"}`: unstorable("description", `"\u0000"`),
	}
	for _, value := range []string{`null`, `"true"`, `1`, `0`, `1.0`, `""`, `[]`} {
		tests[`PATCH {"is_completed":`+value+`}`] = boolean(value)
	}
	for request, want := range tests {
		_, body, _ := strings.Cut(request, " ")
		for method, path := range map[string]string{"POST": "/api/ann/tasks", "PATCH": fmt.Sprintf("/api/ann/tasks/%d", old.ID)} {
			if strings.HasPrefix(request, method) || strings.HasPrefix(request, "BOTH") {
				got := s.as(t, "ann", method, path, body).is(t, 422, problems(want))
				if i := strings.Index(want, `\u`); i >= 0 &&
					!strings.Contains(got.body, want[i:i+6]) { // sameJSON does not see the difference
					t.Errorf("%s: the input is altered in %s", request, got.body)
				}
			}
		}
	}
	s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, mustJSON(t, []taskJSON{old}))
}

func TestTextIsKeptAsItIs(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for input, want := range map[string]string{
		`\ud83d\ude00 \uD83D\uDE00 😀`: "😀 😀 😀", `\"\\\/\b\f\n\r\t`: "\"\\/\b\f\n\r\t",
		`\u0001\u001f\u007f\u0080`:          "\x01\x1f\x7f\u0080",
		`\ufffd \ufeff \uffff \udbff\udfff`: "\ufffd \ufeff \uffff \U0010ffff", "\ufeff\u2028\u2029": "\ufeff\u2028\u2029",
		`\\u0000 \\ud800`: `\u0000 \ud800`,
		"e\u0301 é":       "e\u0301 é", "<b>&amp;'": "<b>&amp;'", "  spaces\u00a0 ": "  spaces\u00a0 ",
		`%_\\`: `%_\`, "\u202eevil": "\u202eevil",
		"$1 {} '); --":           "$1 {} '); --",
		strings.Repeat("😀", 200): strings.Repeat("😀", 200), strings.Repeat(`\ud83d\ude00`, 200): strings.Repeat("😀", 200),
	} {
		body := `{"\u0074itle":"` + input + `","description":"` + input + `","x":"\ud800\u0000"}`
		task := s.as(t, "ann", "POST", "/api/ann/tasks", body).task(t)
		want := mustJSON(t, taskJSON{task.ID, "ann", want, &want, false, task.CreatedAt, task.UpdatedAt})
		own := fmt.Sprintf("/api/ann/tasks/%d", task.ID)
		s.as(t, "ann", "GET", own, "").is(t, 200, want)
		s.as(t, "ann", "PATCH", own, body).is(t, 200, want)
		s.as(t, "ann", "GET", "/api/ann/tasks?order=desc&limit=1", "").is(t, 200, "["+want+"]")
	}
}

func TestABodyMayHaveOneMebibyte(t *testing.T) {
	t.Parallel()
	s := newService(t)
	patch := fmt.Sprintf("PATCH /api/ann/tasks/%d", s.create(t, "ann", "x").ID)
	for _, headers := range [][]string{{"Content-Length", "set by net/http"}, {"Transfer-Encoding", "chunked"}} {
		for _, request := range []string{"POST /api/ann/tasks", patch} {
			method, path, _ := strings.Cut(request, " ")
			body := `{"title":"x","description":"` + strings.Repeat("x", 1<<20-len(`{"title":"x","description":""}`)) + `"}`
			if task := s.as(t, "ann", method, path, body,
				headers...).task(t); len(*task.Description) != len(body)-len(`{"title":"x","description":""}`) {
				t.Errorf("%s: got %d bytes", request, len(*task.Description))
			}
			for _, more := range []string{" ", strings.Repeat(" ", 3<<20)} {
				s.as(t, "ann", method, path, body+more, append(headers, "Content-Type", "text/plain")...).is(t, 413,
					`{"detail":"Request body too large"}`)
			}
		}
	}
}

func TestAContentTypeIsJSONOrNone(t *testing.T) {
	t.Parallel()
	s := newService(t)
	path := fmt.Sprintf("/api/ann/tasks/%d", s.create(t, "ann", "x").ID)
	for media, ok := range map[string]bool{"application/json": true, "Application/JSON; charset=latin1": true,
		"application/problem+json": true, "model/x.y+json; a=\"b\"": true,
		"application/merge-patch+JSON": true, "": false, "text/plain": false, "text/json": false, "application/jsonp": false,
		"application/json+xml": false, "json": false,
		"application/json, text/plain": false, "application/json; charset": false, "application/": false, "/json": false, "+json": false,
		"application/x-www-form-urlencoded": false,
		"multipart/form-data; boundary=x":   false, "application/json\nContent-Type: application/json": false} {
		headers := strings.Split(strings.ReplaceAll("Content-Type: "+media, "\n", ": "), ": ")
		post, patch := s.as(t, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`, headers...),
			s.as(t, "ann", "PATCH", path, `{}`, headers...)
		if ok {
			post.task(t)
			patch.task(t)
		} else {
			post.is(t, 415, `{"detail":"Unsupported media type: send application/json"}`)
			patch.is(t, 415, `{"detail":"Unsupported media type: send application/json"}`)
		}
		s.as(t, "ann", "GET", path, "{", headers...).task(t)
	}
}

// Without a database: all that a request can be refused for comes before it.
func TestARequestIsJudgedInOrder(t *testing.T) {
	t.Parallel()
	s := newServiceOn(t, newAuthenticator(testSecret, "", "", ""))
	untitled := problem("missing", `"body","title"`, "Field required", `{}`)
	badID := noInteger(`"path","task_id"`, `"1.5"`)
	pattern := "^[!-~]{1,255}$"
	badKey := problem("string_pattern_mismatch", `"header","Idempotency-Key"`, "String should match pattern '"+pattern+"'", `"a b"`,
		`"pattern":"`+pattern+`"`)
	null := problem("string_type", `"body","title"`, "Input should be a valid string", `null`)
	large := `{"title":7` + strings.Repeat(" ", 1<<20)
	text, key := []string{"Content-Type", "text/plain"}, []string{"Idempotency-Key", "a b", "If-Match", `"x"`}
	for _, test := range []struct {
		user, request, body string
		headers             []string
		status              int
		want                string
	}{
		{"", "POST /api/ann/tasks/", large, text, 404, `{"detail":"Not Found"}`},
		{"", "PUT /api/ann/tasks", large, text, 405, `{"detail":"Method Not Allowed"}`},
		{"", "POST /api/ann/tasks", large, text, 401, `{"detail":"Invalid authorization header"}`},
		{"bob", "POST /api/ann/tasks", large, text, 403, `{"detail":"Forbidden"}`},
		{"bob", "PATCH /api/ann/tasks/1.5", `{`, text, 403, `{"detail":"Forbidden"}`},
		{"ann", "POST /api/ann/tasks", large, text, 413, `{"detail":"Request body too large"}`},
		{"ann", "PATCH /api/ann/tasks/1.5", large, text, 413, `{"detail":"Request body too large"}`},
		{"ann", "POST /api/ann/tasks", `{`, append(text, key...), 415, `{"detail":"Unsupported media type: send application/json"}`},
		{"ann", "PATCH /api/ann/tasks/1.5", `{`, text, 415, `{"detail":"Unsupported media type: send application/json"}`},
		{"ann", "POST /api/ann/tasks", `{`, key, 422, problems(invalidJSON(1, "unexpected end of JSON input"))},
		{"ann", "PATCH /api/ann/tasks/1.5", `{`, key, 422, problems(invalidJSON(1, "unexpected end of JSON input"))},
		{"ann", "POST /api/ann/tasks", `{}`, key, 422, problems(badKey, untitled)},
		{"ann", "PATCH /api/ann/tasks/1.5", `{"title":null}`, key, 422, problems(badID, null)},
		{"ann", "PATCH /api/ann/tasks/1.5", `{}`, key, 422, problems(badID)},
		{"ann", "DELETE /api/ann/tasks/1.5", `{`, append(text, key...), 422, problems(badID)},
		{"ann", "PATCH /api/ann/tasks/1", `{"title":null}`, key, 422, problems(null)},
		{"ann", "GET /api/ann/tasks/1.5?limit=x", ``, key, 422, problems(badID)},
		{"ann", "GET /api/ann/tasks?limit=x", ``, key, 422, problems(noInteger(`"query","limit"`, `"x"`))},
		{"ann", "POST /api/ann/tasks?limit=x", `{"title":"x"}`, nil, 503, outage},
		{"ann", "PATCH /api/ann/tasks/-99999999999999999999", `{}`, key, 503, outage},
		{"ann", "GET /api/ann/tasks?x=%zz", ``, key, 503, outage},
		{"ann", "DELETE /api/ann/tasks/+1", ``, key, 503, outage},
		{"", "GET /ready", ``, nil, 503, outage},
	} {
		method, path, _ := strings.Cut(test.request, " ")
		got := s.as(t, test.user, method, path, test.body, test.headers...).is(t, test.status, test.want)
		if after := got.header.Get("Retry-After"); (test.status == 503) != regexp.MustCompile(`^[1-9][0-9]*$`).MatchString(after) {
			t.Errorf("%s: Retry-After is %q", test.request, after)
		}
	}
}

func TestATaskIDIsAnIntegerAndTheOwners(t *testing.T) {
	t.Parallel()
	s := newService(t)
	task := s.create(t, "ann", "x")
	for _, id := range []string{"%d", "+%d", "00%d", "%%2B%d", "%%30%d"} {
		s.as(t, "ann", "GET", "/api/ann/tasks/"+fmt.Sprintf(id, task.ID), "").is(t, 200, mustJSON(t, task))
	}
	others := map[string]string{"x": "x", "1.0": "1.0", "1e3": "1e3", "0x1": "0x1", "%201": " 1", "1_0": "1_0", "+": "+", "-": "-",
		"+-1": "+-1", "-+1": "-+1", "--1": "--1", "1%2F2": "1/2",
		"%D9%A1": "١", "1,": "1,", "%2E": ".", "null": "null", "1%00": "1\x00", "%22": `"`, "%3Cb%3E": "<b>", "1%0A": "1\n"}
	for _, none := range []string{"999999", "0", "-1", "+7", strings.Repeat("9", 5000), "-99999999999999999999999999",
		"9223372036854775807", "-9223372036854775808"} {
		others[none] = ""
	}
	for _, method := range []string{"GET", "PATCH", "DELETE"} {
		body := map[string]string{"PATCH": `{}`}[method]
		for id, text := range others {
			if got := s.as(t, "ann", method, "/api/ann/tasks/"+id, body); text == "" {
				got.is(t, 404, notFound)
			} else {
				got.is(t, 422, problems(noInteger(`"path","task_id"`, mustJSON(t, text))))
			}
		}
		s.as(t, "bob", method, fmt.Sprintf("/api/bob/tasks/%d", task.ID), body).is(t, 404, notFound)
	}
}

func TestAPatchChangesWhatIsThereAndMovesTheTimeOnlyThen(t *testing.T) {
	t.Parallel()
	s := newService(t)
	got := s.as(t, "ann", "POST", "/api/ann/tasks", `{"title":"t","description":"d"}`)
	task := got.task(t)
	own, d, empty := fmt.Sprintf("/api/ann/tasks/%d", task.ID), "d", ""
	for _, test := range []struct {
		body        string
		changes     bool
		title       string
		description *string
		isCompleted bool
	}{
		{`{}`, false, "t", &d, false},
		{`{"title":"t"}`, false, "t", &d, false},
		{`{"description":"d","is_completed":false,"title":"t"}`, false, "t", &d, false},
		{`{"id":5,"user_id":"bob","updated_at":"x","Title":"z","IS_COMPLETED":true,"completed":true}`, false, "t", &d, false},
		{`{"title":"new"}`, true, "new", &d, false},
		{`{"description":null}`, true, "new", nil, false},
		{`{"description":null}`, false, "new", nil, false},
		{`{"description":""}`, true, "new", &empty, false},
		{`{"description":""}`, false, "new", &empty, false},
		{`{"is_completed":true}`, true, "new", &empty, true},
		{`{"is_completed":true}`, false, "new", &empty, true},
		{`{"title":"a","title":"b","is_completed":"no","is_completed":true}`, true, "b", &empty, true},
		{`{"title":"B"}`, true, "B", &empty, true},
		{`{"title":"c","description":"d","is_completed":false}`, true, "c", &d, false},
	} {
		tag, was := got.header.Get("ETag"), task.UpdatedAt
		got = s.as(t, "ann", "PATCH", own, test.body)
		task = got.task(t)
		want := mustJSON(t, taskJSON{task.ID, "ann", test.title, test.description, test.isCompleted, task.CreatedAt, task.UpdatedAt})
		got.is(t, 200, want)
		if (task.UpdatedAt > was) != test.changes || (task.UpdatedAt != was) != test.changes ||
			(got.header.Get("ETag") != tag) != test.changes {
			t.Errorf("%s: updated_at %s, then %s; ETag %s, then %s", test.body, was, task.UpdatedAt, tag, got.header.Get("ETag"))
		}
		if again := s.as(t, "ann", "GET", own, "").is(t, 200, want); again.header.Get("ETag") != got.header.Get("ETag") {
			t.Errorf("%s: GET has the ETag %s", test.body, again.header.Get("ETag"))
		}
	}
	for i := range 50 {
		was := task.UpdatedAt
		if i == 40 {
			was = "2999-12-31T23:59:59.999999Z"
			s.exec(t, `UPDATE tasks SET updated_at = $1`, was)
		}
		if task = s.as(t, "ann", "PATCH", own, fmt.Sprintf(`{"is_completed":%t}`, i%2 == 0)).task(t); task.UpdatedAt <= was {
			t.Errorf("updated_at %s, then %s", was, task.UpdatedAt)
		}
	}
}

func TestPatchesOfDifferentFieldsAtOnceAllSurvive(t *testing.T) {
	t.Parallel()
	s := newService(t)
	task := s.create(t, "ann", "x")
	own, times := fmt.Sprintf("/api/ann/tasks/%d", task.ID), make([]string, 3)
	s.behindLock(t, 3, func(i int) {
		times[i] = s.as(t, "ann", "PATCH", own,
			[]string{`{"title":"new"}`, `{"description":"d"}`, `{"is_completed":true}`}[i]).task(t).UpdatedAt
	}, `SELECT FROM tasks WHERE user_id = 'ann' FOR UPDATE`)
	d := "d"
	s.as(t, "ann", "GET", own, "").is(t, 200, mustJSON(t, taskJSON{task.ID, "ann", "new", &d, true, task.CreatedAt, slices.Max(times)}))
	if slices.Sort(times); len(slices.Compact(times)) != 3 {
		t.Errorf("got the times %q", times)
	}
}

func TestIfNoneMatch(t *testing.T) {
	t.Parallel()
	s := newService(t)
	own := fmt.Sprintf("/api/ann/tasks/%d", s.create(t, "ann", "x").ID)
	got := s.as(t, "ann", "GET", own, "")
	tag := got.header.Get("ETag")
	for _, test := range []struct {
		lines  []string
		status int
	}{
		{[]string{tag}, 304}, {[]string{"W/" + tag}, 304}, {[]string{"*"}, 304}, {[]string{`"x", ` + tag}, 304},
		{[]string{tag + ` ,"x"`}, 304}, {[]string{`"x",W/"",` + tag}, 304},
		{[]string{`"x"`, tag}, 304}, {[]string{`,, "a,b" ,` + tag + ","}, 304}, {[]string{"\"é\"", tag}, 304},
		{[]string{`"x"`}, 200}, {[]string{""}, 200}, {[]string{strings.Trim(tag, `"`)}, 200}, {[]string{"w/" + tag}, 200},
		{[]string{`"*"`}, 200},
		{[]string{strings.TrimSuffix(tag, `"`)}, 200}, {[]string{`"` + tag}, 200}, {[]string{"W/*"}, 200},
		{[]string{strings.ToLower(tag)}, 200},
	} {
		var headers []string
		for _, line := range test.lines {
			headers = append(headers, "If-None-Match", line)
		}
		body := map[int]string{200: got.body}[test.status]
		again := s.as(t, "ann", "GET", own, "", headers...).is(t, test.status, body)
		if again.header.Get("ETag") != tag || (again.header.Get("Content-Type") == "") != (test.status == 304) {
			t.Errorf("%q: got %v", test.lines, again.header)
		}
		s.as(t, "ann", "GET", "/api/ann/tasks/0", "", headers...).is(t, 404, notFound)
	}
}

func TestIfMatchGuardsPatchAndDelete(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, test := range []struct {
		lines []string // with TAG for the current entity tag
		ok    bool
	}{
		{[]string{`TAG`}, true}, {[]string{`*`}, true}, {[]string{`"x", TAG`}, true}, {[]string{`"x"`, `TAG`}, true},
		{[]string{`W/TAG,, TAG ,`}, true}, {nil, true},
		{[]string{`"x"`}, false}, {[]string{`W/TAG`}, false}, {[]string{``}, false}, {[]string{`2026`}, false}, {[]string{`"TAG`}, false},
		{[]string{`W/*`}, false}, {[]string{`"*"`}, false},
		{[]string{`"`}, false}, {[]string{`"2026-01-02T03:04:05.1Z"`}, false}, {[]string{`"2026-01-02 03:04:05.1+00"`}, false},
		{[]string{`"now"`, `"infinity"`}, false},
		{[]string{`"}"`, `"{"`, `"NULL"`, `"\"`, `"a,b"`, `""`, "\"\xff\""}, false},
		{[]string{`"2026-02-30T00:00:00.000000Z"`, `"0000-01-01T00:00:00.000000Z"`}, false},
		{[]string{`"2026-01-02T03:04:05.+10000Z"`, `"2026-01-02T03:04:05,100000Z"`, `"2026-01-02T24:00:00.000000Z"`}, false},
	} {
		for method, body := range map[string]string{"PATCH": `{"title":"new"}`, "DELETE": ""} {
			task := s.create(t, "ann", "old")
			s.exec(t, `UPDATE tasks SET updated_at = '2026-01-02T03:04:05.1Z' WHERE id = $1`, task.ID)
			own := fmt.Sprintf("/api/ann/tasks/%d", task.ID)
			before := s.as(t, "ann", "GET", own, "")
			var headers []string
			for _, line := range test.lines {
				headers = append(headers, "If-Match", strings.ReplaceAll(line, "TAG", before.header.Get("ETag")))
			}
			s.as(t, "bob", method, fmt.Sprintf("/api/bob/tasks/%d", task.ID), body, headers...).is(t, 404, notFound)
			got := s.as(t, "ann", method, own, body, headers...)
			switch after := s.as(t, "ann", "GET", own, ""); {
			case !test.ok:
				got.is(t, 412, modified)
				after.is(t, 200, before.body)
			case method == "PATCH":
				got.is(t, 200, after.body)
				if after.task(t).Title != "new" {
					t.Errorf("%q: got %s", headers, after.body)
				}
				s.as(t, "ann", "PATCH", own, `{}`, "If-Match", before.header.Get("ETag")).is(t, 412, modified)
			default:
				got.is(t, 204, "")
				after.is(t, 404, notFound)
				s.as(t, "ann", method, own, body, headers...).is(t, 404, notFound)
			}
		}
	}
}

func TestOfManyWritesWithOneIfMatchOneWins(t *testing.T) {
	t.Parallel()
	s := newServiceWithin(t, newDatabase(t), 40, 10*time.Second)
	for _, test := range []struct {
		statement string
		methods   []string
		want      map[int]int // how often which status comes
	}{
		{`SELECT FROM tasks WHERE title = 'x' FOR UPDATE`, []string{"PATCH"}, map[int]int{200: 1, 412: 19}},
		{`SELECT FROM tasks WHERE title = 'x' FOR UPDATE`, []string{"DELETE"}, map[int]int{204: 1, 404: 19}},
		{`UPDATE tasks SET updated_at = updated_at + interval '1 microsecond'`, []string{"PATCH", "DELETE"}, map[int]int{412: 20}},
		{`DELETE FROM tasks WHERE user_id = 'ann'`, []string{"PATCH", "DELETE"}, map[int]int{404: 20}},
	} {
		own := fmt.Sprintf("/api/ann/tasks/%d", s.create(t, "ann", "x").ID)
		tag := s.as(t, "ann", "GET", own, "").header.Get("ETag")
		answers, count := make([]reply, 20), map[int]int{}
		s.behindLock(t, len(answers), func(i int) {
			answers[i] = s.as(t, "ann", test.methods[i%len(test.methods)], own, fmt.Sprintf(`{"title":"%d"}`, i), "If-Match", tag)
		}, test.statement)
		for _, answer := range answers {
			if count[answer.status]++; answer.status == 200 {
				s.as(t, "ann", "GET", own, "").is(t, 200, answer.body)
			}
		}
		if !reflect.DeepEqual(count, test.want) {
			t.Errorf("%s: got %v", test.statement, count)
		}
	}
}

func TestAKeyMakesOneTask(t *testing.T) {
	t.Parallel()
	s := newService(t)
	post := func(user, body, key string) reply {
		t.Helper()
		return s.as(t, user, "POST", "/api/"+user+"/tasks", body, "Idempotency-Key", key)
	}
	reused := problems(problem("value_error", `"header","Idempotency-Key"`,
		"Value error, this key was used with another title or description", `"k"`, `"error":{}`))
	post("ann", `{"title":7}`, "k").is(t, 422, problems(problem("string_type", `"body","title"`, "Input should be a valid string", "7")))
	s.exec(t, `ALTER TABLE tasks RENAME TO away`)
	post("ann", `{"title":"other"}`, "k").is(t, 503, outage)
	s.exec(t, `ALTER TABLE away RENAME TO tasks`)
	first := post("ann", `{"title":"x","description":"d"}`, "k")
	own := fmt.Sprintf("/api/ann/tasks/%d", first.task(t).ID)
	for _, body := range []string{`{"title":"x","description":"d"}`,
		` {"description":"\u0064", "title":"y", "title":"x", "is_completed":true}`} {
		again := post("ann", body, "k").is(t, 201, first.body)
		if again.header.Get("Location") != own || again.header.Get("ETag") != first.header.Get("ETag") {
			t.Errorf("got %v", again.header)
		}
	}
	for _, body := range []string{`{"title":"x"}`, `{"title":"x","description":null}`, `{"title":"x","description":""}`,
		`{"title":"X","description":"d"}`, `{"title":"xd"}`} {
		post("ann", body, "k").is(t, 422, reused)
	}
	if post("ann", `{"title":"x"}`, "K").body == first.body || post("bob", `{"title":"x"}`, "k").task(t).UserID != "bob" {
		t.Error("keys are told apart by case and by user")
	}
	null := post("ann", `{"title":"n"}`, "null")
	post("ann", `{"title":"n","description":null}`, "null").is(t, 201, null.body)
	post("ann", `{"title":"n","description":""}`, "null").is(t, 422, strings.ReplaceAll(reused, `"k"`, `"null"`))
	now := s.as(t, "ann", "PATCH", own, `{"title":"changed","description":null}`, "Idempotency-Key", "a b")
	post("ann", `{"title":"x","description":"d"}`, "k").is(t, 201, now.body)
	post("ann", `{"title":"changed"}`, "k").is(t, 422, reused)
	s.as(t, "ann", "DELETE", own, "", "Idempotency-Key", "").is(t, 204, "")
	if second := post("ann", `{"title":"changed"}`, "k").task(t); second.Title != "changed" || second.ID <= now.task(t).ID {
		t.Errorf("got %v", second)
	}
	if n := len(s.as(t, "ann", "GET", "/api/ann/tasks", "", "Idempotency-Key", "a b").tasks(t)); n != 3 {
		t.Errorf("%d tasks", n)
	}
}

func TestAKeyIsVisibleASCII(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const pattern = "^[!-~]{1,255}$"
	for _, test := range [][]string{{""}, {" "}, {"a b"}, {"a\tb"}, {strings.Repeat("k", 256)}, {"é"}, {"k", "k"}, {"", ""}} {
		var headers []string
		for _, line := range test {
			headers = append(headers, "Idempotency-Key", line)
		}
		s.as(t, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`, headers...).is(t, 422,
			problems(problem("string_pattern_mismatch", `"header","Idempotency-Key"`,
				"String should match pattern '"+pattern+"'", mustJSON(t, strings.TrimPrefix(strings.Join(test, ", "), " ")),
				`"pattern":"`+pattern+`"`)))
	}
	for _, key := range []string{"!", "~", `a"b\,c'%`, strings.Repeat("k", 255)} {
		s.as(t, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`, "Idempotency-Key", key).task(t)
	}
	if n := len(s.as(t, "ann", "GET", "/api/ann/tasks", "").tasks(t)); n != 4 {
		t.Errorf("%d tasks", n)
	}
}

func TestSimultaneousPostsWithOneKeyMakeOneTask(t *testing.T) {
	t.Parallel()
	cfg := newDatabase(t)
	services := []*service{newServiceWithin(t, cfg, 20, 10*time.Second), newServiceWithin(t, cfg, 20, 10*time.Second)}
	answers := make([]reply, 20)
	services[0].behindLock(t, len(answers), func(i int) {
		answers[i] = services[i%2].as(t, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`, "Idempotency-Key", "k")
	}, `LOCK TABLE tasks IN SHARE MODE`)
	for _, answer := range answers {
		answer.is(t, 201, answers[0].body)
	}
	services[1].as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, "["+answers[0].body+"]")
}

func TestAPanicIsA500AndLoggedOnce(t *testing.T) {
	t.Parallel()
	for development, want := range map[bool]string{
		false: `{"detail":"Internal server error"}`,
		true:  `{"detail":"Internal server error: panic: runtime error: invalid memory address or nil pointer dereference"}`,
	} {
		s := newServiceOn(t, newAuthenticator(testSecret, "", "", ""))
		s.store = &store{timeout: time.Minute, users: userLimit{limit: 1, users: map[string]*userTurns{}}} // which lacks what newStore makes
		s.store.applied.Store(true)
		s.development = development
		s.as(t, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`).is(t, 500, want)
		lines := s.logs.at(slog.LevelError)
		if len(lines) != 1 || !strings.Contains(lines[0], "nil pointer") || !strings.Contains(lines[0], "store.go") {
			t.Errorf("logged %q", lines)
		}
		s.as(t, "", "GET", "/health", "").is(t, 200, `{"status":"healthy"}`)
	}
}

func TestADatabaseErrorIsA503WhoseCauseIsOnlyLogged(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.exec(t, `ALTER TABLE tasks RENAME TO away`)
	for _, test := range [][]string{{"GET", "", ""}, {"GET", "?limit=5", ""}, {"GET", "/1", ""}, {"POST", "", `{"title":"x"}`},
		{"PATCH", "/1", `{}`}, {"DELETE", "/1", ""}} {
		got := s.as(t, "ann", test[0], "/api/ann/tasks"+test[1], test[2]).is(t, 503, outage)
		if lines := s.logs.at(slog.LevelWarn); len(lines) != 1 || !strings.Contains(lines[0], "does not exist") ||
			got.header.Get("Retry-After") == "" {
			t.Errorf("%v: %v, logged %q", test, got.header, lines)
		}
	}
	s.exec(t, `ALTER TABLE away RENAME TO tasks`)
	s.exec(t, `ALTER TABLE tasks ADD CHECK (title <> 'a secret')`)
	s.as(t, "ann", "POST", "/api/ann/tasks", `{"title":"a secret"}`).is(t, 500, `{"detail":"Internal server error"}`)
	if lines := s.logs.at(slog.LevelError); len(lines) != 1 || !strings.Contains(lines[0], "check constraint") {
		t.Errorf("logged %q", lines)
	}
}

func TestEveryRequestIsOneLogLineWithoutSecrets(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const list, one = "/api/{user_id}/tasks", "/api/{user_id}/tasks/{task_id}"
	own := fmt.Sprintf("/api/ann/tasks/%d", s.create(t, "ann", "x").ID)
	for _, test := range []struct{ user, logged, method, path, route, body string }{
		{"ann", "ann", "GET", own + "?secret=hush", one, ""},
		{"ann", "ann", "POST", "/api/ann/tasks", list, `{"title":"hush"}`},
		{"bob", "bob", "PATCH", own, one, `{"title":"hush"}`},
		{"ann", "ann", "PATCH", own, one, `{"title":["hush"]}`},
		{"", "", "GET", "/api/ann/tasks", list, ""},
		{"ann", "", "GET", "/hush", "", ""},
		{"", "", "GET", "/health", "/health", ""},
		{"", "", "PUT", "/health", "/health", "hush"},
	} {
		s.logs.at(slog.LevelInfo)
		got := s.as(t, test.user, test.method, test.path, test.body, "X-Request-ID", "an-id", "Cookie", "session=hush")
		want := fmt.Sprintf(`^{"time":"2[-0-9T:.]+(Z|[+-]\d\d:\d\d)","level":"INFO","msg":"request","method":%q,"route":%q,`+
			`"status":%d,"duration_ms":[0-9.]+,"bytes":%d,"user":%q,`+
			`"remote":"127.0.0.1:\d+","request_id":"an-id"}\n$`, test.method, regexp.QuoteMeta(test.route), got.status, len(got.body),
			test.logged)
		if lines := s.logs.at(slog.LevelInfo); len(lines) != 1 ||
			!regexp.MustCompile(strings.ReplaceAll(want, `\\`, `\`)).MatchString(lines[0]) {
			t.Errorf("logged %q, want %s", lines, want)
		}
	}
}

func TestABodyThatIsNotJSONSaysWhereInTheWordsOfEncodingJSON(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const end, value = "unexpected end of JSON input", "looking for beginning of value"
	for _, test := range []struct {
		body   string
		offset int // in bytes
		msg    string
	}{
		{"\ufeff{}", 0, "invalid character 'ï' " + value}, {"  ", 2, end},
		{"nul", 2, "invalid character ' ' in literal null (expecting 'l')"},
		{"nulx", 3, "invalid character 'x' in literal null (expecting 'l')"},
		{"{\"title\":\"\xff\"}", 10, "invalid UTF-8"}, {"{\"é\":\"\ufffdé\xc3\"}", 12, "invalid UTF-8"},
		{"{\"a\":\"\xed\xa0\x80\"}", 6, "invalid UTF-8"}, {"\xff", 0, "invalid character 'ÿ' " + value},
		{"title=x", 1, "invalid character 'i' in literal true (expecting 'r')"}, {"NaN", 0, "invalid character 'N' " + value},
		{`{"title":"x"} x`, 14, "invalid character 'x' after top-level value"}, {"{}{}", 2, "invalid character '{' after top-level value"},
		{"{}\x00", 2, `invalid character '\x00' after top-level value`}, {"01", 1, "invalid character '1' after top-level value"},
		{`{"title":"x",}`, 13, "invalid character '}' looking for beginning of object key string"},
		{`{"a" 1}`, 5, "invalid character '1' after object key"},
		{`{"a":01}`, 6, "invalid character '1' after object key:value pair"}, {`{"title":`, 9, end}, {`{"title":"é`, 12, end},
		{"\"a\nb\"", 2, `invalid character '\n' in string literal`}, {`"\x"`, 2, "invalid character 'x' in string escape code"},
		{`"\u12g4"`, 5, `invalid character 'g' in \u hexadecimal character escape`},
		{strings.Repeat("[", 10001), 10000, "invalid character '[' exceeded max depth"},
	} {
		s.as(t, "ann", "POST", "/api/ann/tasks", test.body).is(t, 422, problems(invalidJSON(test.offset, test.msg)))
	}
	deep := strings.Repeat("[", 9999) + strings.Repeat("]", 9999)
	for _, body := range []string{"\t\r\n {\"title\":\"x\"}\r\n", `{"title":"x","other":` + deep + `}`,
		`{"title":"x","n":[-0.5e+7,0,1E5,-0,{}, [] ,true,{"title":null}]}`} {
		s.as(t, "ann", "POST", "/api/ann/tasks", body).task(t)
	}
}

// FuzzBody: what gets through is one JSON text in UTF-8, and a text of it is what encoding/json reads or is refused.
func FuzzBody(f *testing.F) {
	for _, seed := range []string{`{"title":"x","title":null,"Title":[1]}`, `{"title":"\ud83d\ude00","description":"\udc00\ud800\ud83d"}`,
		"\ufeff{}",
		"{\"title\":\"\xff\"}", "{} x", `{"a":01}`, `{"title":"\\ud800\u0000"}`, "nul", `"\u12`, " ", `{"title":"\uD83D\uDE00\uDBFF"}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var b body
		err := b.parse(text)
		if (err == nil) != (json.Valid(text) && utf8.Valid(text)) {
			t.Fatalf("%q: %v", text, err)
		}
		var v faults
		if in := v.changes(b, false); err == nil && v == nil {
			var want struct{ Title, Description *string }
			_ = json.Unmarshal(b.members["title"], &want.Title)
			if in.title != nil && (*in.title != *want.Title || strings.ContainsRune(*in.title, 0)) {
				t.Errorf("%q: the title is %q", text, *in.title)
			}
			if in.title != nil && strings.ContainsRune(*in.title, utf8.RuneError) {
				var again string // a lone surrogate would have become a U+FFFD that was not there
				if raw := string(b.members["title"]); !strings.Contains(raw, "\ufffd") && !strings.Contains(strings.ToLower(raw), `\ufffd`) {
					t.Errorf("%q: the title is %q%s", text, *in.title, again)
				}
			}
		}
	})
}

func FuzzPrecondition(f *testing.F) {
	for _, seed := range []string{``, `*`, `"a"`, `W/"a", "b"`, `"a" "b"`, `,,"a,b",`, `"`, `W/`, `"2026-01-02T03:04:05.100000Z"`,
		`"x",W/"2026-01-02T03:04:05.100000Z"`, "\"\xff\"\t,\"\x7f\"", `"a"b`} {
		f.Add(seed)
	}
	const tag = `"2026-01-02T03:04:05.100000Z"`
	task := task{updatedAt: instant(time.Date(2026, 1, 2, 3, 4, 5, 100e6, time.UTC).UnixMicro() - epoch)}
	// a list of entity tags, from its start to the tag in question
	strong := regexp.MustCompile(`^([, \t]|(W/)?"[^\x00-\x20",\x7f]*"[ \t]*,)*` + regexp.QuoteMeta(tag) + `[ \t]*(,|$)`)
	weak := regexp.MustCompile(`^([, \t]|(W/)?"[^\x00-\x20",\x7f]*"[ \t]*,)*(W/)?` + regexp.QuoteMeta(tag) + `[ \t]*(,|$)`)
	f.Fuzz(func(t *testing.T, line string) {
		p, all := parsePrecondition([]string{line}), strings.Trim(line, " \t") == "*"
		if (all || weak.MatchString(line)) && !p.matchesWeakly(task.etag()) {
			t.Errorf("%q does not match", line)
		}
		times := p.times()
		if (times == nil) != all || strong.MatchString(line) &&
			!slices.Contains(times, strings.Trim(tag, `"`)) || len(times) > strings.Count(line, "Z") {
			t.Errorf("%q allows %v", line, times)
		}
	})
}
