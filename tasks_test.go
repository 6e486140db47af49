package main

import (
	"bufio"
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
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
	config, stop, err := startPostgres(must(os.MkdirTemp("", "taskflow-test")), "fsync=off", "synchronous_commit=off",
		"full_page_writes=off", "max_connections=500", "max_prepared_transactions=5")
	if err != nil {
		log.Fatal(err)
	}
	defer stop()
	cluster.config = config
	must(0, administer(`CREATE DATABASE template_tasks`))
	ctx, s := context.Background(), newStore(clusterConfig("template_tasks"), 1, 30*time.Second)
	if file := os.Getenv("TASKFLOW_TEST_TABLE"); file != "" { // that the service is to find, like faults/partitions.sql
		must(0, exchange(ctx, s.probe, string(must(os.ReadFile(file))), nil, func([]driver.Value) {}))
	}
	must(0, errors.Join(s.applySchema(ctx), s.close()))
	m.Run()
}

func (s *store) close() error { return errors.Join(s.db.Close(), s.probe.Close()) }

// startPostgres has dev/postgres run a PostgreSQL in a folder, which goes away with it: by stop, or when this process ends.
func startPostgres(folder string, settings ...string) (cfg pq.Config, stop func(), err error) {
	command := exec.Command("dev/postgres", append([]string{"-t", folder}, settings...)...)
	var complaints strings.Builder
	command.Stderr = &complaints
	held, out := must(command.StdinPipe()), must(command.StdoutPipe())
	must(0, command.Start())
	stop = func() { _, _ = held.Close(), command.Wait() }
	socket, err := bufio.NewReader(out).ReadString('\n')
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
	name := fmt.Sprintf("test_%d", cluster.databases.Add(1))
	must(0, administer(`CREATE DATABASE `+name+` TEMPLATE `+template))
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
func newService(t testing.TB) *service { return newServiceWithin(t, newDatabase(t), 8, 10*time.Second) }

// newServiceWithin starts a service on a database that has the schema, with a pool of size connections and a time limit.
func newServiceWithin(t testing.TB, cfg pq.Config, size int, limit time.Duration) *service {
	s := newServiceOf(t, bySecret(), newStore(cfg, size, limit))
	s.store.applied.Store(true)
	return s
}

// newServiceOn starts a service that judges tokens with auth and has not reached its database.
func newServiceOn(t testing.TB, a *authenticator) *service {
	return newServiceOf(t, a, newStore(pq.Config{}, 1, time.Second))
}

func newServiceOf(t testing.TB, auth *authenticator, st *store) *service {
	logs := &logRecorder{}
	s := &service{server: &server{auth: auth, store: st,
		users:   userLimit{limit: maxRequests, timeout: st.timeout, users: map[string]*userTurns{}},
		origins: []string{"http://localhost:3000", "https://app.example.com"}, log: slog.New(slog.NewJSONHandler(logs, nil))}, logs: logs}
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

// A logRecorder keeps the lines of a log.
type logRecorder struct {
	mu    sync.Mutex
	lines []string
}

func (l *logRecorder) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(line))
	return len(line), nil
}

// at takes the lines of a level out of the record.
func (l *logRecorder) at(level slog.Level) (taken []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = slices.DeleteFunc(l.lines, func(line string) bool {
		found := strings.Contains(line, fmt.Sprintf(`"level":%q`, level))
		if found {
			taken = append(taken, line)
		}
		return found
	})
	return taken
}

// tokenFor makes a valid token for a user.
func tokenFor(_ testing.TB, user string) string { return bySecret().developmentToken(user, time.Hour) }

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
	r := must(http.NewRequest(method, s.url, strings.NewReader(body)))
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
	return reply{response.StatusCode, response.Header, string(must(io.ReadAll(response.Body)))}
}

// is checks the status and the whole JSON body against a text.
func (r reply) is(t testing.TB, status int, body string) reply {
	t.Helper()
	if r.status != status || r.body != body && !reflect.DeepEqual(jsonValue(r.body), jsonValue(body)) {
		t.Errorf("got %d %s\nwant %d %s", r.status, r.body, status, body)
	}
	if media := r.header.Get("Content-Type"); body != "" && media != "application/json" {
		t.Errorf("Content-Type is %q", media)
	}
	return r
}

// jsonValue reads a JSON text, its numbers as they are written. What is no JSON becomes an error.
func jsonValue(text string) (value any) {
	if !json.Valid([]byte(text)) {
		return errors.New("no JSON: " + text)
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	_ = d.Decode(&value)
	return value
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
	d := json.NewDecoder(strings.NewReader(r.body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil || r.status > 299 {
		t.Fatalf("%d %s: %v", r.status, r.body, err)
	}
}

// create makes a task and returns it.
func (s *service) create(t testing.TB, user, title string) taskJSON {
	t.Helper()
	body := mustJSON(t, map[string]string{"title": title})
	return s.as(t, user, "POST", "/api/"+url.PathEscape(user)+"/tasks", body, "Content-Type", "application/json").task(t)
}

func mustJSON(_ testing.TB, value any) string { return string(must(json.Marshal(value))) }

// The bodies of errors. problem writes one entry of a 422, with the insides of loc and ctx as JSON.
const (
	forbidden   = `{"detail":"Forbidden"}`
	notFound    = `{"detail":"Task not found"}`
	modified    = `{"detail":"Task has been modified"}`
	tooLarge    = `{"detail":"Request body too large"}`
	unsupported = `{"detail":"Unsupported media type: send application/json"}`
)

func problems(list ...string) string { return `{"detail":[` + strings.Join(list, ",") + `]}` }

func problem(kind, loc, msg, input string, ctx ...string) string {
	text := fmt.Sprintf(`{"type":%q,"loc":[%s],"msg":%q,"input":%s`, kind, loc, msg, input)
	if members := strings.Join(ctx, ","); members != "" {
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

func noString(field, input string) string {
	return problem("string_type", `"body","`+field+`"`, "Input should be a valid string", input)
}

func noKey(input string) string {
	const pattern = "^[!-~]{1,255}$"
	return problem("string_pattern_mismatch", `"header","Idempotency-Key"`, "String should match pattern '"+pattern+"'", input,
		`"pattern":"`+pattern+`"`)
}

// raw sends what net/http's client would not, and reads the head of the answer.
func (s *service) raw(t testing.TB, head string) *http.Response {
	conn := must(net.Dial("tcp", strings.TrimPrefix(s.url, "http://")))
	t.Cleanup(func() { _ = conn.Close() })
	must(io.WriteString(conn, head+"\r\n\r\n"))
	return must(http.ReadResponse(bufio.NewReader(conn), nil))
}

// exec runs a statement in the service's database, beside the service.
func (s *service) exec(_ testing.TB, statement string, args ...any) {
	must(s.store.probe.Exec(statement, args...))
}

// behindLock has n calls of f wait for what the statement locks or changes, then releases them all at once.
func (s *service) behindLock(t testing.TB, n int, f func(int), statement string) {
	t.Helper()
	tx := must(s.store.db.Begin())
	must(tx.Exec(statement))
	var calls sync.WaitGroup
	for i := range n {
		calls.Go(func() { f(i) })
	}
	eventually(t, "all wait", func() bool {
		const query = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND ` + waiting
		count := 0
		return s.store.probe.QueryRow(query).Scan(&count) == nil && count >= n
	})
	must(0, tx.Commit())
	calls.Wait()
}

func TestEveryRouteJudgesTheTokenThenTheOwner(t *testing.T) {
	t.Parallel()
	s := newService(t)
	mine := s.create(t, "ann", "mine")
	list, own := "/api/ann/tasks", fmt.Sprintf("/api/ann/tasks/%d", mine.ID)
	for _, route := range [][]string{{"GET", list}, {"POST", list}, {"GET", own}, {"PATCH", own}, {"DELETE", own}} {
		for _, test := range []struct {
			authorization     []string
			status            int
			challenge, detail string
		}{
			{nil, 401, "Bearer", `{"detail":"Invalid authorization header"}`},
			{[]string{"Bearer x.y.z"}, 401, "Bearer", `{"detail":"Invalid token"}`},
			{[]string{"Bearer " + s.auth.developmentToken("ann", -time.Second)}, 401, "Bearer", `{"detail":"Token expired"}`},
			{[]string{"Bearer " + tokenFor(t, "bob")}, 403, "", forbidden},
		} {
			got := s.as(t, "", route[0], route[1], `{"title":"x"}`, pairs("Authorization", test.authorization)...)
			if got.is(t, test.status, test.detail).header.Get("WWW-Authenticate") != test.challenge {
				t.Errorf("%s with %q: WWW-Authenticate is %q", route, test.authorization, got.header.Get("WWW-Authenticate"))
			}
		}
		if route[1] == own {
			s.as(t, "bob", route[0], strings.Replace(own, "ann", "bob", 1), `{"title":"x"}`).is(t, 404, notFound)
		}
	}
	s.as(t, "ann", "GET", own, "").is(t, 200, mustJSON(t, mine))
}

func TestUnknownPathsAre404AndOtherMethods405WhateverTheToken(t *testing.T) {
	t.Parallel()
	s := newServiceOn(t, newAuthenticator("", "", "", ""))
	unknown := strings.Fields(`/ /api /api/ /api/ann /api/ann/ /api/ann/tasks/ /api//tasks /api/ann//tasks /api/ann/tasks// /api/ann/tasks/1/
		/api/ann/tasks/1/x /API/ann/tasks /api/ann/Tasks /health/ /health/x /./health /api/../health /api/x/../ann/tasks /api%2Fann/tasks
		/api/ann%2Ftasks /api/ann/tasks%2F1 /api/ann/tasks/1%2F/ /healthz /ready%00 /favicon.ico /tasks /api/ann/tasks;x`)
	known := map[string]string{"/health": "GET, HEAD", "/ready": "GET, HEAD", "/openapi.json": "GET, HEAD", "/docs": "GET, HEAD",
		"/api/ann/tasks": "GET, HEAD, POST", "/api/ann/tasks/1": "GET, HEAD, PATCH, DELETE",
		"/api/a%2Fb/tasks/x%2Fy": "GET, HEAD, PATCH, DELETE"}
	for _, method := range strings.Fields("GET POST PUT PATCH DELETE OPTIONS TRACE BREW get PROPFIND") {
		for _, path := range unknown {
			s.as(t, "", method, path, `{"title":`, "Content-Type", "text/plain").is(t, 404, `{"detail":"Not Found"}`)
		}
		for path, allow := range known {
			if strings.Contains(allow, method) {
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
	s := newServiceOn(t, bySecret())
	const nowhere, healthy, host = `{"detail":"Not Found"}`, `{"status":"healthy"}`, "\r\nHost: x"
	token := host + "\r\nAuthorization: Bearer " + tokenFor(t, "ann")
	expect := token + "\r\nExpect: 100-continue\r\nContent-Length: "
	for _, test := range []struct {
		head   string
		status int
		body   string
	}{
		{"GET /health HTTP/1.0", 200, healthy},
		{"GET http://elsewhere.example/health HTTP/1.1" + host, 200, healthy},
		{"GET //health HTTP/1.1" + host, 404, nowhere},
		{"GET //api/ann/tasks HTTP/1.1" + token, 404, nowhere},
		{"GET http://elsewhere.example HTTP/1.1" + host, 404, nowhere},
		{"OPTIONS * HTTP/1.1" + host, 404, nowhere},
		{"POST /api/ann/tasks HTTP/1.1" + expect + "1048577", 413, tooLarge},
		{"POST /api/bob/tasks HTTP/1.1" + expect + "10", 403, forbidden},
		{"POST /api/ann/tasks HTTP/1.1" + token + "\r\nTransfer-Encoding: chunked\r\n\r\nx", 400,
			`{"detail":"Request body incomplete or malformed"}`},
	} {
		response := s.raw(t, test.head)
		text := must(io.ReadAll(io.LimitReader(response.Body, response.ContentLength)))
		reply{response.StatusCode, response.Header, string(text)}.is(t, test.status, test.body)
	}
}

func TestTheUserInThePathIsPercentDecodedOnce(t *testing.T) {
	t.Parallel()
	s := newService(t)
	emojis := strings.Repeat("😀", 63)
	for user, names := range map[string][2]string{ // in a path: those of the user, and others
		"ann":           {"ann %61nn %61%6E%6e", "Ann ann%20 %20ann ann%00 ann%2F %2561nn ann%FF %2E"},
		"a/b":           {"a%2Fb a%2fb", `a%252Fb a b a\b`},
		"a%2Fb":         {"a%252Fb a%252%46b", "a%2Fb"},
		"a b":           {"a%20b", "a+b ab a%2520b"},
		"a+b":           {"a+b a%2Bb", "a%20b a%252Bb"},
		"ü €":           {"%C3%BC%20%E2%82%AC ü%20€", "u%CC%88%20%E2%82%AC %FC%20%E2%82%AC"},
		`a/"<b>^|`:      {"a%2F%22%3Cb%3E%5E%7C", `"<b>^|`},
		"$&'()*,;:@=!~": {"$&'()*,;:@=!~", "$&'()*,"},
		"?#":            {"%3F%23", "%3F"},
		emojis + "abc":  {emojis + "abc", emojis},
	} {
		for n, name := range strings.Fields(names[0]) {
			path := "/api/" + name + "/tasks"
			got := s.as(t, user, "POST", path, `{"title":"x"}`)
			task, location := got.task(t), got.header.Get("Location")
			if task.UserID != user || location != fmt.Sprintf("/api/%s/tasks/%d", url.PathEscape(user), task.ID) {
				t.Errorf("%s: got user %q at %s", path, task.UserID, location)
			}
			s.as(t, user, "GET", location, "").is(t, 200, got.body)
			s.create(t, user, "y")
			if pages := s.pages(t, user, path+"?limit=1"); len(pages) != 2*n+2 {
				t.Errorf("%s: %d pages", path, len(pages))
			}
		}
		for _, name := range strings.Fields(names[1]) {
			s.as(t, user, "GET", "/api/"+name+"/tasks", "").is(t, 403, forbidden)
		}
	}
}

func TestHEADAnswersAsGETDoesWithoutABody(t *testing.T) {
	t.Parallel()
	s := newService(t)
	own := fmt.Sprintf("/api/ann/tasks/%d", s.create(t, "ann", "x").ID)
	s.create(t, "ann", "y")
	for _, test := range [][]string{{"/health"}, {"/ready"}, {"/docs"}, {"/openapi.json"}, {"/api/ann/tasks"}, {"/api/ann/tasks?limit=1"},
		{own}, {own, "If-None-Match", "*"}, {"/api/ann/tasks/0"}, {"/api/ann/tasks/x"}, {"/api/ann/tasks?limit=x"}, {"/api/bob/tasks"},
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
	for id, sane := range map[string]bool{"a": true, "A-z_0.9": true, strings.Repeat("x", 128): true, strings.Repeat("x", 129): false,
		"a b": false, "": false, "é": false, "a/b": false, "a\tb": false} {
		ask := func() string { return s.as(t, "", "GET", "/health", "", "X-Request-ID", id).header.Get("X-Request-ID") }
		if one, two := ask(), ask(); (one == id) != sane || (two == one) != sane {
			t.Errorf("%q became %q and %q", id, one, two)
		}
	}
}

func TestEveryRequestIsOneLogLineWithoutSecrets(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const list, one = "/api/{user_id}/tasks", "/api/{user_id}/tasks/{task_id}"
	own := fmt.Sprintf("/api/ann/tasks/%d", s.create(t, "ann", "x").ID)
	varying := regexp.MustCompile(`"(time|duration_ms|remote)":("2[-0-9T:.]+(Z|[+-]\d\d:\d\d)"|[0-9.]+|"127.0.0.1:\d+")`)
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
		want := fmt.Sprintf(`{time,"level":"INFO","msg":"request","method":%q,"route":%q,"status":%d,duration_ms,"bytes":%d,"user":%q,`+
			`remote,"request_id":"an-id"}`+"\n", test.method, test.route, got.status, len(got.body), test.logged)
		if lines := s.logs.at(slog.LevelInfo); len(lines) != 1 || varying.ReplaceAllString(lines[0], "$1") != want {
			t.Errorf("logged %q, want %s", lines, want)
		}
	}
}

func TestEveryFaultOfABodyIsNamedInFieldOrder(t *testing.T) {
	t.Parallel()
	s := newService(t)
	old := s.create(t, "ann", "old")
	check := func(methods, body string, want ...string) {
		t.Helper()
		for method, path := range map[string]string{"POST": "/api/ann/tasks", "PATCH": fmt.Sprintf("/api/ann/tasks/%d", old.ID)} {
			if strings.Contains(methods, method) {
				got := s.as(t, "ann", method, path, body).is(t, 422, problems(want...)).body
				if escape := regexp.MustCompile(`\\u....`).FindString(want[0]); !strings.Contains(got, escape) { // is sees no difference
					t.Errorf("%s %s: the input is altered in %s", method, body, got)
				}
			}
		}
	}
	const both, title, description = "POST PATCH", `{"title":INPUT}`, `{"title":"x","description":INPUT}`
	const required, text, boolean = "Field required", "Input should be a valid string", "Input should be a valid boolean"
	const storable = "Value error, text must not contain U+0000 or lone surrogates"
	emojis := `"` + strings.Repeat("😀", 201) + `"`
	for _, test := range []struct {
		methods, body, kind, loc, msg, ctx string
		inputs                             []string
	}{
		{both, " INPUT\n", "missing", `"body"`, required, "", []string{"null"}},
		{both, " INPUT\n", "model_attributes_type", `"body"`, "Input should be a valid dictionary or object to extract fields from", "",
			[]string{"[]", `[{"title":"x"}]`, `"title"`, "7", "false"}},
		{"POST", "INPUT", "missing", `"body","title"`, required, "",
			[]string{"{}", `{"Title":"x","TITLE":"y","titl\u0065 ":"z"}`, `{"is_completed":null}`}},
		{both, title, "string_type", `"body","title"`, text, "", []string{"null", `["x"]`, "true", "1e400", `{"a":1}`}},
		{both, title, "string_too_short", `"body","title"`, "String should have at least 1 character", `"min_length":1`, []string{`""`}},
		{both, title, "string_too_long", `"body","title"`, "String should have at most 200 characters", `"max_length":200`, []string{emojis}},
		{both, title, "value_error", `"body","title"`, storable, `"error":{}`,
			[]string{`"\ud83d\u0041"`, `"\ude00\ud83d"`, `"\ud83d\ude00\udbff"`, `"\u0000"`}},
		{both, description, "string_type", `"body","description"`, text, "", []string{"false"}},
		{both, description, "value_error", `"body","description"`, storable, `"error":{}`, []string{`"\u0000"`, `"\udfff"`}},
		{"PATCH", `{"is_completed":INPUT}`, "bool_type", `"body","is_completed"`, boolean, "",
			[]string{"null", `"true"`, "1", "0", "1.0", `""`, "[]", "{}"}},
	} {
		for _, input := range test.inputs {
			check(test.methods, strings.Replace(test.body, "INPUT", input, 1), problem(test.kind, test.loc, test.msg, input, test.ctx))
		}
	}
	check(both, "", problem("missing", `"body"`, required, "null"))
	check(both, `{"title":"x","title":"y","title":7}`, noString("title", "7"))
	check("POST", `{"is_completed":7,"description":[]}`,
		problem("missing", `"body","title"`, required, `{"is_completed":7,"description":[]}`), noString("description", "[]"))
	check("PATCH", `{"title":7,"is_completed":true,"is_completed":"yes","description":{}}`,
		noString("title", "7"), noString("description", "{}"), problem("bool_type", `"body","is_completed"`, boolean, `"yes"`))
	s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, mustJSON(t, []taskJSON{old}))
}

func TestABodyThatIsNotJSONSaysWhereInTheWordsOfEncodingJSON(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for body, offset := range map[string]int{ // in bytes
		"\ufeff{}": 0, "  ": 2, "nul": 2, "nulx": 3, "\xff": 0, "title=x": 1, "NaN": 0, "{} x": 3, "{}{}": 2, "{}\x00": 2, "01": 1,
		`{"title":"x",}`: 13, `{"a" 1}`: 5, `{"a":01}`: 6, `{"title":`: 9, `{"title":"é`: 12, "\"a\nb\"": 2, `"\x"`: 2, `"\u12g4"`: 5,
		strings.Repeat("[", 10001): 10000, "{\"title\":\"\xff\"}": 10, "{\"é\":\"\ufffdé\xc3\"}": 12, "{\"a\":\"\xed\xa0\x80\"}": 6,
	} {
		reason := "invalid UTF-8"
		if err := json.Unmarshal([]byte(body), new(any)); err != nil {
			reason = err.Error()
		}
		s.as(t, "ann", "POST", "/api/ann/tasks", body).is(t, 422, problems(invalidJSON(offset, reason)))
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
		"\ufeff{}", "{\"title\":\"\xff\"}", "{} x", `{"a":01}`, `{"title":"\\ud800\u0000"}`, "nul", `"\u12`, " ",
		`{"title":"\uD83D\uDE00\uDBFF"}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var b body
		var v faults
		err := b.parse(text)
		if (err == nil) != (json.Valid(text) && utf8.Valid(text)) {
			t.Fatalf("%q: %v", text, err)
		}
		title := v.changes(b, false).title
		if err != nil || v != nil || title == nil {
			return
		}
		want, raw := "", strings.ToLower(string(b.members["title"]))
		_ = json.Unmarshal(b.members["title"], &want)
		invented := strings.ContainsRune(want, utf8.RuneError) && !strings.Contains(raw, "\ufffd") && !strings.Contains(raw, `\ufffd`)
		if *title != want || strings.ContainsRune(want, 0) || invented { // for a lone surrogate
			t.Errorf("%q: the title is %q", text, *title)
		}
	})
}

func TestABodyMayHaveOneMebibyte(t *testing.T) {
	t.Parallel()
	s := newService(t)
	description := strings.Repeat("x", 1<<20-len(`{"title":"x","description":""}`))
	body := `{"title":"x","description":"` + description + `"}`
	for _, headers := range [][]string{{"Content-Length", "set by net/http"}, {"Transfer-Encoding", "chunked"}} {
		if task := s.as(t, "ann", "POST", "/api/ann/tasks", body, headers...).task(t); *task.Description != description {
			t.Errorf("%s: got %d bytes", headers, len(*task.Description))
		}
		for _, more := range []string{" ", strings.Repeat(" ", 3<<20)} {
			s.as(t, "ann", "POST", "/api/ann/tasks", body+more, append(headers, "Content-Type", "text/plain")...).is(t, 413, tooLarge)
		}
	}
}

func TestAContentTypeIsJSONOrNone(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for ok, types := range map[bool][][]string{
		true: {nil, {"application/json"}, {"Application/JSON; charset=latin1"}, {"application/problem+json"}, {`model/x.y+json; a="b"`},
			{"application/merge-patch+JSON"}},
		false: {{""}, {"text/plain"}, {"text/json"}, {"application/jsonp"}, {"application/json+xml"}, {"json"}, {"application/json, text/plain"},
			{"application/json; charset"}, {"application/"}, {"/json"}, {"+json"}, {"application/x-www-form-urlencoded"},
			{"multipart/form-data; boundary=x"}, {"application/json", "application/json"}},
	} {
		for _, lines := range types {
			if got := s.as(t, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`, pairs("Content-Type", lines)...); ok {
				got.task(t)
			} else {
				got.is(t, 415, unsupported)
			}
			s.as(t, "ann", "GET", "/api/ann/tasks", "{", pairs("Content-Type", lines)...).tasks(t)
		}
	}
}

// Without a database: all that a request can be refused for comes before it.
func TestARequestIsJudgedInOrder(t *testing.T) {
	t.Parallel()
	s := newServiceOn(t, bySecret())
	untitled := problem("missing", `"body","title"`, "Field required", `{}`)
	badID, badKey, null := noInteger(`"path","task_id"`, `"1.5"`), noKey(`"a b"`), noString("title", "null")
	const list, one = "/api/ann/tasks", "/api/ann/tasks/1.5"
	large, cut := `{"title":7`+strings.Repeat(" ", 1<<20), problems(invalidJSON(1, "unexpected end of JSON input"))
	text, key := []string{"Content-Type", "text/plain"}, []string{"Idempotency-Key", "a b", "If-Match", `"x"`}
	for _, test := range []struct {
		user, method, path, body string
		headers                  []string
		status                   int
		want                     string
	}{
		{"", "POST", list + "/", large, text, 404, `{"detail":"Not Found"}`},
		{"", "PUT", list, large, text, 405, `{"detail":"Method Not Allowed"}`},
		{"", "POST", list, large, text, 401, `{"detail":"Invalid authorization header"}`},
		{"bob", "POST", list, large, text, 403, forbidden},
		{"bob", "PATCH", one, `{`, text, 403, forbidden},
		{"ann", "POST", list, large, text, 413, tooLarge},
		{"ann", "PATCH", one, large, text, 413, tooLarge},
		{"ann", "POST", list, `{`, append(text, key...), 415, unsupported},
		{"ann", "PATCH", one, `{`, text, 415, unsupported},
		{"ann", "POST", list, `{`, key, 422, cut},
		{"ann", "PATCH", one, `{`, key, 422, cut},
		{"ann", "POST", list, `{}`, key, 422, problems(badKey, untitled)},
		{"ann", "PATCH", one, `{"title":null}`, key, 422, problems(badID, null)},
		{"ann", "DELETE", one, `{`, append(text, key...), 422, problems(badID)},
		{"ann", "GET", one + "?limit=x", ``, key, 422, problems(badID)},
		{"ann", "GET", list + "?limit=x", ``, key, 422, problems(noInteger(`"query","limit"`, `"x"`))},
		{"ann", "POST", list + "?limit=x", `{"title":"x"}`, nil, 503, unavailable},
		{"ann", "PATCH", list + "/-99999999999999999999", `{}`, key, 503, unavailable},
		{"ann", "GET", list + "?x=%zz", ``, key, 503, unavailable},
		{"ann", "DELETE", list + "/+1", ``, key, 503, unavailable},
		{"", "GET", "/ready", ``, nil, 503, unavailable},
	} {
		got := s.as(t, test.user, test.method, test.path, test.body, test.headers...).is(t, test.status, test.want)
		if after := got.header.Get("Retry-After"); (test.status == 503) != regexp.MustCompile(`^[1-9][0-9]*$`).MatchString(after) {
			t.Errorf("%s %s: Retry-After is %q", test.method, test.path, after)
		}
	}
}

func TestATaskIDIsAnInteger(t *testing.T) {
	t.Parallel()
	s := newService(t)
	task := s.create(t, "ann", "x")
	for _, id := range []string{"%d", "+%d", "00%d", "%%2B%d", "%%30%d"} {
		s.as(t, "ann", "GET", "/api/ann/tasks/"+fmt.Sprintf(id, task.ID), "").is(t, 200, mustJSON(t, task))
	}
	for _, method := range []string{"GET", "PATCH", "DELETE"} {
		for _, none := range []string{"999999", "0", "-1", "+7", strings.Repeat("9", 5000), "-99999999999999999999999999",
			"9223372036854775807", "-9223372036854775808"} {
			s.as(t, "ann", method, "/api/ann/tasks/"+none, `{}`).is(t, 404, notFound)
		}
		for _, text := range []string{"x", "1.0", "1e3", "0x1", " 1", "1_0", "+", "-", "+-1", "-+1", "--1", "1/2", "١", "1,", ".", "null",
			"1\x00", `"`, "<b>", "1\n"} {
			path := "/api/ann/tasks/" + strings.ReplaceAll(url.PathEscape(text), ".", "%2E")
			s.as(t, "ann", method, path, `{}`).is(t, 422, problems(noInteger(`"path","task_id"`, mustJSON(t, text))))
		}
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
		{`{"description":"d","is_completed":false,"title":"t"}`, false, "t", &d, false},
		{`{"id":5,"user_id":"bob","updated_at":"x","Title":"z","IS_COMPLETED":true,"completed":true}`, false, "t", &d, false},
		{`{"title":"new"}`, true, "new", &d, false},
		{`{"description":null}`, true, "new", nil, false},
		{`{"description":""}`, true, "new", &empty, false},
		{`{"is_completed":true}`, true, "new", &empty, true},
		{`{"title":"a","title":"b","is_completed":"no","is_completed":true}`, true, "b", &empty, true},
		{`{"title":"B"}`, true, "B", &empty, true},
		{`{"title":"c","description":"d","is_completed":false}`, true, "c", &d, false},
	} {
		for _, changes := range []bool{test.changes, false} { // the second time it is all there
			tag, was := got.header.Get("ETag"), task.UpdatedAt
			got = s.as(t, "ann", "PATCH", own, test.body)
			task = got.task(t)
			want := taskJSON{task.ID, "ann", test.title, test.description, test.isCompleted, task.CreatedAt, task.UpdatedAt}
			now := got.is(t, 200, mustJSON(t, want)).header.Get("ETag")
			if (task.UpdatedAt > was) != changes || (task.UpdatedAt != was) != changes || (now != tag) != changes {
				t.Errorf("%s: updated_at %s, then %s; ETag %s, then %s", test.body, was, task.UpdatedAt, tag, now)
			}
			if again := s.as(t, "ann", "GET", own, "").is(t, 200, got.body); again.header.Get("ETag") != now {
				t.Errorf("%s: GET has the ETag %s", test.body, again.header.Get("ETag"))
			}
		}
	}
	const ahead = "2999-12-31T23:59:59.999999Z" // of the database's clock
	s.exec(t, `UPDATE tasks SET updated_at = $1`, ahead)
	if task = s.as(t, "ann", "PATCH", own, `{"title":"d"}`).task(t); task.UpdatedAt <= ahead {
		t.Errorf("updated_at %s, then %s", ahead, task.UpdatedAt)
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
		return s.as(t, user, "POST", "/api/"+user+"/tasks", body, "Idempotency-Key", key)
	}
	reused := problems(problem("value_error", `"header","Idempotency-Key"`,
		"Value error, this key was used with another title or description", `"k"`, `"error":{}`))
	post("ann", `{"title":7}`, "k").is(t, 422, problems(noString("title", "7")))
	s.exec(t, `ALTER TABLE tasks RENAME TO away`)
	post("ann", `{"title":"other"}`, "k").is(t, 503, unavailable)
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
	for _, lines := range [][]string{{""}, {" "}, {"a b"}, {"a\tb"}, {strings.Repeat("k", 256)}, {"é"}, {"k", "k"}, {"", ""}} {
		input := mustJSON(t, strings.TrimPrefix(strings.Join(lines, ", "), " "))
		s.as(t, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`, pairs("Idempotency-Key", lines)...).is(t, 422, problems(noKey(input)))
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
