package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lib/pq"
)

// taskflow builds the program, once, and returns its path.
var taskflow = sync.OnceValue(func() string {
	path := filepath.Join(cluster.config.Host, "taskflow") // goes away with the cluster
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", path, ".").CombinedOutput(); err != nil {
		panic(fmt.Sprintf("%v\n%s", err, out))
	}
	return path
})

// A process is taskflow, running.
type process struct {
	*exec.Cmd
	url    string
	mu     sync.Mutex
	output strings.Builder
	more   chan struct{} // closed when there is more output
	exited chan struct{}
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.more)
	p.more = make(chan struct{})
	return p.output.Write(b)
}

var nextPort atomic.Int64

// start starts taskflow in a folder with nothing but this environment, and a port that is free.
func start(t testing.TB, folder string, env []string, args ...string) *process {
	t.Helper()
	return launch(t, taskflow(), folder, env, args...)
}

// launch does so with another program.
func launch(t testing.TB, program, folder string, env []string, args ...string) *process {
	t.Helper()
	port, busy := "", errors.New("not yet tried")
	for busy != nil { // below the ports that the system gives away by itself
		port = fmt.Sprint(10000 + (int64(os.Getpid())*97+nextPort.Add(1))%20000)
		var listener net.Listener
		if listener, busy = net.Listen("tcp", "127.0.0.1:"+port); busy == nil {
			_ = listener.Close()
		}
	}
	p := &process{Cmd: exec.Command(program, args...), url: "http://127.0.0.1:" + port, more: make(chan struct{}),
		exited: make(chan struct{})}
	p.Dir, p.Stdout, p.Stderr = folder, p, p
	p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + folder, "PORT=" + port}, env...)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		_ = p.Process.Kill()
		<-p.exited
	})
	return p
}

// await waits until the output has a text in it, and returns the output.
func (p *process) await(t testing.TB, text string) string {
	t.Helper()
	for patience := time.After(30 * time.Second); ; {
		p.mu.Lock()
		output, more := p.output.String(), p.more
		p.mu.Unlock()
		if strings.Contains(output, text) {
			return output
		}
		select {
		case <-more:
		case <-p.exited:
			t.Fatalf("ended (%v) without %q:\n%s", p.ProcessState, text, output)
		case <-patience:
			t.Fatalf("waited in vain for %q:\n%s", text, output)
		}
	}
}

// exits waits for the end and checks exit status and output.
func (p *process) exits(t testing.TB, status int, text string) {
	t.Helper()
	select {
	case <-p.exited:
		if p.ProcessState.ExitCode() != status || !strings.Contains(p.output.String(), text) {
			t.Errorf("%v, want status %d and %q:\n%s", p.ProcessState, status, text, &p.output)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("does not end")
	}
}

func newRequest(method, url, body string) (*http.Request, error) {
	return http.NewRequest(method, url, strings.NewReader(body))
}

// as sends a request as the user demo.
func (p *process) as(t testing.TB, secret, method, path, body string) reply {
	t.Helper()
	r := must(http.NewRequest(method, p.url+path, strings.NewReader(body)))
	r.Header.Set("Authorization", "Bearer "+newAuthenticator(secret, "", "", "").developmentToken("demo", time.Hour))
	return send(t, r)
}

const secretVariable = "BETTER_AUTH_SECRET=" + testSecret

// productionOn is an environment with a database of the cluster.
func productionOn(database pq.Config) []string {
	return []string{"ENVIRONMENT=production", "HOST=127.0.0.1", secretVariable,
		fmt.Sprintf("DATABASE_URL=postgres://taskflow@/%s?host=%s", database.Database, url.PathEscape(database.Host))}
}

// get asks for a path as nobody, on a connection of its own, and tells whether the server closes that.
func (p *process) get(path string) (got reply, closed bool) {
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	response := must((&http.Client{Transport: transport}).Get(p.url + path))
	defer response.Body.Close()
	return reply{response.StatusCode, response.Header, string(must(io.ReadAll(response.Body)))}, response.Close
}

func TestASignalLetsRequestsFinish(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		signal syscall.Signal
		second bool // signal, which ends it at once
	}{{syscall.SIGTERM, false}, {syscall.SIGINT, false}, {syscall.SIGTERM, true}} {
		t.Run(fmt.Sprint(test), func(t *testing.T) {
			t.Parallel()
			database := newDatabase(t)
			ask(t, database, `INSERT INTO tasks (user_id, title) VALUES ('demo', 'mine')`)
			p := start(t, t.TempDir(), productionOn(database))
			p.await(t, `"ready"`)
			release := hold(t, database, `SELECT FROM tasks FOR UPDATE`)
			r := must(http.NewRequest("PATCH", p.url+"/api/demo/tasks/1", strings.NewReader(`{"title":"changed"}`)))
			r.Header.Set("Authorization", "Bearer "+tokenFor(t, "demo"))
			status := make(chan int, 1)
			go func() {
				response, err := http.DefaultTransport.RoundTrip(r)
				if err != nil {
					response = &http.Response{Body: http.NoBody}
				}
				_ = response.Body.Close()
				status <- response.StatusCode
			}()
			eventually(t, "the request is in flight", func() bool { return others(t, database, waiting) == "1" })
			_ = p.Process.Signal(test.signal)
			p.await(t, "stopping")
			if test.second {
				_ = p.Process.Signal(test.signal)
				p.exits(t, -1, "stopping")
				if got := <-status; got != 0 {
					t.Errorf("answered %d", got)
				}
				return
			}
			for path, want := range map[string]int{"/ready": 503, "/health": 200, "/api/demo/tasks": 401} {
				if got, closed := p.get(path); got.status != want || !closed {
					t.Errorf("%s: %d %t", path, got.status, closed)
				}
			}
			eventually(t, "the listener is closed", func() bool {
				conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
				if err == nil {
					_ = conn.Close()
				}
				return err != nil
			})
			release()
			if got := <-status; got != 200 {
				t.Errorf("the request in flight was answered %d", got)
			}
			p.exits(t, 0, "stopping")
			eventually(t, "no connections are left", func() bool { return others(t, database, "true") == "0" })
		})
	}
}

func TestWhatHasNotFinishedAfter25SecondsGetsA503(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	ask(t, database, `INSERT INTO tasks (user_id, title) VALUES ('demo', 'mine')`)
	p := start(t, t.TempDir(), append(productionOn(database), "DB_POOL_TIMEOUT=30s"))
	p.await(t, `"ready"`)
	release := hold(t, database, `SELECT FROM tasks FOR UPDATE`)
	answer := make(chan reply, 1)
	go func() { answer <- p.as(t, testSecret, "DELETE", "/api/demo/tasks/1", "") }()
	eventually(t, "the request is in flight", func() bool { return others(t, database, waiting) == "1" })
	stranger := must(net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))) // whose body never ends
	defer stranger.Close()
	must(fmt.Fprint(stranger, "POST /api/demo/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"))
	began := time.Now()
	_ = p.Process.Signal(syscall.SIGTERM)
	got := <-answer
	got.is(t, 503, `{"detail":"Service temporarily unavailable"}`)
	if took := time.Since(began).Round(time.Second); took < 24*time.Second || took > 27*time.Second || got.header.Get("Retry-After") == "" {
		t.Errorf("answered after %s: %v", took, got.header)
	}
	if refused := must(http.ReadResponse(bufio.NewReader(stranger), nil)); refused.StatusCode != 401 {
		t.Errorf("the stranger gets %s", refused.Status)
	}
	p.exits(t, 0, "stopping")
	release()
	if left := ask(t, database, `SELECT count(*) FROM tasks`); left != "1" {
		t.Errorf("%s tasks are left", left)
	}
}

func TestWhatCannotWorkEndsTheStartAndSaysWhy(t *testing.T) {
	t.Parallel()
	taken := must(net.Listen("tcp", "127.0.0.1:0"))
	t.Cleanup(func() { _ = taken.Close() })
	port := fmt.Sprint(taken.Addr().(*net.TCPAddr).Port)
	tests := []struct {
		name   string
		env    []string
		args   []string
		status int
		lines  []string // the beginning of each line of the output
	}{
		{"nothing in production", []string{"ENVIRONMENT=prod"}, nil, 2,
			[]string{"taskflow: DATABASE_URL ", "taskflow: BETTER_AUTH_SECRET "}},
		{"wrong", []string{"DATABASE_URL=mysql://u:hidden@h/d", "BETTER_AUTH_SECRET=hidden"}, nil, 2,
			[]string{"taskflow: DATABASE_URL ", "taskflow: BETTER_AUTH_SECRET "}},
		{"no such command", nil, []string{"serve"}, 2, []string{"taskflow: usage: taskflow"}},
		{"too many words", nil, []string{"healthcheck", "x"}, 2, []string{"taskflow: usage: taskflow"}},
		{"a token in production", productionOn(clusterConfig("none")), []string{"token", "ann"}, 2, []string{"taskflow: ENVIRONMENT "}},
		{"port taken", append(productionOn(clusterConfig("postgres")), "PORT="+port), nil, 1,
			[]string{"taskflow: HOST or PORT: listen tcp 127.0.0.1:" + port + ": bind: address already in use"}},
		{"no such database", productionOn(clusterConfig("none")), nil, 1,
			[]string{`{`, `taskflow: database: no connection: pq: database "none" does not exist (3D000)`}},
		{"another machine's name", append(productionOn(clusterConfig("postgres")), "HOST=192.0.2.1"), nil, 1,
			[]string{"taskflow: HOST or PORT: listen "}},
		{"a search path without a schema", append(productionOn(clusterConfig("template1")), "PGOPTIONS=-csearch_path=nowhere"), nil, 1,
			[]string{`{`, `taskflow: database: pq: no schema has been selected to create in`}},
		{"a setting that cannot be set", []string{secretVariable, productionOn(clusterConfig("template1"))[3] + "&ssl=false"}, nil, 1,
			[]string{`time=`, `taskflow: database: no connection: pq: parameter "ssl" cannot be changed now (55P02)`}},
		{"healthcheck of nobody", nil, []string{"healthcheck"}, 1, []string{"taskflow: healthcheck: "}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, t.TempDir(), test.env, test.args...)
			p.exits(t, test.status, "")
			lines := strings.Split(strings.TrimSuffix(p.output.String(), "\n"), "\n")
			if !slices.EqualFunc(lines, test.lines, strings.HasPrefix) || strings.Contains(p.output.String(), "hidden") {
				t.Errorf("the output is\n%s", &p.output)
			}
		})
	}
}

func TestTenMayStartBeforeTheirEmptyDatabase(t *testing.T) {
	t.Parallel()
	database := newDatabaseFrom(t, "template1")
	later := database.Clone()
	later.Host = filepath.Join(t.TempDir(), "later")
	var ten []*process
	for range 10 {
		ten = append(ten, start(t, t.TempDir(), append(productionOn(later), "DB_POOL_TIMEOUT=1s")))
	}
	for _, p := range ten {
		p.await(t, "trying again")
	}
	p := ten[0]
	health, closed := p.get("/health")
	if health.is(t, 200, `{"status":"healthy"}`); closed {
		t.Error("the connection was closed")
	}
	ready, _ := p.get("/ready")
	for _, got := range []reply{ready, p.as(t, testSecret, "GET", "/api/demo/tasks", "")} {
		if got.is(t, 503, unavailable); got.header.Get("Retry-After") == "" {
			t.Error("without Retry-After")
		}
	}
	p.as(t, testSecret, "GET", "/api/other/tasks", "").is(t, 403, `{"detail":"Forbidden"}`)
	port := p.url[strings.LastIndex(p.url, ":")+1:]
	start(t, t.TempDir(), []string{"PORT=" + port}, "healthcheck").exits(t, 0, "")
	start(t, t.TempDir(), []string{"PORT=" + port, "HOST=127.0.0.9"}, "healthcheck").exits(t, 1, "127.0.0.9:"+port)
	must(0, os.Symlink(database.Host, later.Host))
	for i, p := range ten {
		p.await(t, `"ready"`)
		ready, _ = p.get("/ready")
		ready.is(t, 200, `{"status":"ready"}`)
		p.as(t, testSecret, "POST", "/api/demo/tasks", `{"title":"x"}`)
		if n := len(p.as(t, testSecret, "GET", "/api/demo/tasks", "").tasks(t)); n != i+1 {
			t.Errorf("%d tasks after %d", n, i+1)
		}
	}
}

func TestStrangersCannotTakeMuch(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	ask(t, database, `INSERT INTO tasks (user_id, title, description) SELECT 'demo', 'task ' || n, repeat('x', 100)
		FROM generate_series(1, 100000) n`)
	p := start(t, t.TempDir(), append(productionOn(database), "DB_POOL_SIZE=1", "DB_POOL_TIMEOUT=10s"))
	p.await(t, `"ready"`)
	if n := len(p.as(t, testSecret, "GET", "/api/demo/tasks", "").tasks(t)); n != 100000 {
		t.Errorf("%d tasks", n)
	}
	if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid)); err == nil { // on Linux
		_, peak, _ := strings.Cut(string(status), "VmHWM:")
		if kib := must(strconv.Atoi(strings.Fields(peak)[0])); kib > 40<<10 {
			t.Errorf("a list of 100,000 tasks took %d KiB", kib)
		}
	}

	raw := func(request string) *bufio.Reader {
		conn := must(net.Dial("tcp", strings.TrimPrefix(p.url, "http://")))
		t.Cleanup(func() { _ = conn.Close() })
		go func() { _, _ = conn.Write([]byte(request)) }()
		return bufio.NewReaderSize(conn, 16)
	}
	bearer := "Host: x\r\nAuthorization: Bearer " + tokenFor(t, "demo") + "\r\n"
	for range 5 { // who sends slowly, and who reads slowly, does not hold the one connection to the database
		raw("POST /api/demo/tasks HTTP/1.1\r\n" + bearer + "Content-Length: 100\r\n\r\n{")
		if line, err := raw("GET /api/demo/tasks HTTP/1.1\r\n" + bearer + "\r\n").ReadString('\n'); line != "HTTP/1.1 200 OK\r\n" {
			t.Error(line, err)
		}
	}
	p.as(t, testSecret, "GET", "/api/demo/tasks?limit=1", "").tasks(t)
	for size, want := range map[int]string{60 << 10: "HTTP/1.1 200 OK", 70 << 10: "HTTP/1.1 431"} {
		if line, err := raw("GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat("x", size) +
			"\r\n\r\n").ReadString('\n'); !strings.HasPrefix(line, want) {
			t.Errorf("%d bytes: %s %v", size, line, err)
		}
	}
}

func TestARefusedExpectationIsGoneAtOnce(t *testing.T) {
	t.Parallel()
	p := start(t, t.TempDir(), productionOn(newDatabase(t)))
	p.await(t, `"ready"`)
	conn := must(net.Dial("tcp", strings.TrimPrefix(p.url, "http://")))
	defer conn.Close()
	must(fmt.Fprint(conn, "POST /api/ann/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\nExpect: 100-continue\r\n\r\n"))
	began := time.Now()
	reader := bufio.NewReader(conn)
	response := must(http.ReadResponse(reader, nil))
	_, _ = io.Copy(io.Discard, response.Body)
	_ = p.Process.Signal(syscall.SIGTERM)
	if _, err := reader.ReadByte(); response.StatusCode != 401 || err != io.EOF || time.Since(began) > time.Second {
		t.Errorf("%s, then %v after %s", response.Status, err, time.Since(began))
	}
	p.exits(t, 0, "stopping")
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the stop took %s", took)
	}
}

func TestAStartFetchesTheKeysAndWithItsDatabaseUpBeginsWithoutA503(t *testing.T) {
	t.Parallel()
	fetched := make(chan struct{}, 1)
	better := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { fetched <- struct{}{} }))
	defer better.Close()
	database := newDatabase(t)
	begin := time.Now()
	p := start(t, t.TempDir(), append(productionOn(database), "BETTER_AUTH_JWKS_URL="+better.URL))
	p.await(t, "listening")
	if got, _ := p.get("/ready"); got.status != 200 && time.Since(begin) < headStart {
		t.Errorf("%d after %s", got.status, time.Since(begin))
	}
	<-fetched
}
