package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	_ "github.com/lib/pq"
)

// This file runs the programs: PostgreSQL, the service, HAProxy, PgBouncer; and a forwarder that
// stands for a network.

// A suite is where a scenario happens.
type suite struct {
	folder  string              // scratch; holds the service's binary, taskflow
	account *syscall.Credential // whom the databases run as; nil: ourselves
	bin     string              // PostgreSQL's programs

	rows []*row

	mu      sync.Mutex
	running map[*process]bool
}

func newSuite(folder string) *suite {
	s := &suite{folder: folder, running: map[*process]bool{}}
	if os.Getuid() == 0 { // PostgreSQL refuses to run as root
		for _, name := range []string{"postgres", "nobody"} {
			if u, err := user.Lookup(name); err == nil && s.account == nil {
				uid, _ := strconv.Atoi(u.Uid)
				gid, _ := strconv.Atoi(u.Gid)
				s.account = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
			}
		}
	}
	places, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pg_basebackup") // Debian
	if path, err := exec.LookPath("pg_basebackup"); err == nil && len(places) == 0 {
		places = append(places, path)
	}
	if len(places) == 0 {
		panic("PostgreSQL's server programs are not there")
	}
	s.bin = filepath.Dir(places[len(places)-1])
	return s
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// newFolder makes a folder that the databases' account owns.
func (s *suite) newFolder(pattern string) string {
	folder, err := os.MkdirTemp(s.folder, pattern)
	must(err)
	if s.account != nil {
		must(os.Chown(folder, int(s.account.Uid), int(s.account.Gid)))
	}
	return folder
}

func freePort() int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// A process is a program that runs, or has ended when done is closed.
type process struct {
	*exec.Cmd
	done chan struct{}
	log  string // the file that has all it printed
}

// start starts a program, as account where that is not nil.
func (s *suite) start(account *syscall.Credential, folder string, env []string, args ...string) *process {
	log, err := os.CreateTemp(s.folder, filepath.Base(args[0])+".*.log")
	must(err)
	defer log.Close()
	p := &process{exec.Command(args[0], args[1:]...), make(chan struct{}), log.Name()}
	p.Dir, p.Stdout, p.Stderr = folder, log, log
	p.Env = append([]string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}, env...)
	p.SysProcAttr = &syscall.SysProcAttr{Credential: account, Pdeathsig: syscall.SIGKILL}
	must(p.Start())
	s.mu.Lock()
	s.running[p] = true
	s.mu.Unlock()
	go func() {
		_ = p.Wait()
		s.mu.Lock()
		delete(s.running, p)
		s.mu.Unlock()
		close(p.done)
	}()
	return p
}

// do runs a program to its end.
func (s *suite) do(args ...string) {
	p := s.start(s.account, s.folder, nil, args...)
	if <-p.done; p.ProcessState.ExitCode() != 0 {
		panic(fmt.Sprintf("%s: %s", strings.Join(args, " "), p.output()))
	}
}

func (p *process) output() string {
	text, _ := os.ReadFile(p.log)
	return string(text)
}

// stop sends a signal and waits.
func (p *process) stop(signal os.Signal) {
	_ = p.Process.Signal(signal)
	select {
	case <-p.done:
	case <-time.After(40 * time.Second):
		_ = p.Process.Kill()
		panic("did not stop: " + p.Path)
	}
}

// close ends everything that still runs.
func (s *suite) close() {
	s.mu.Lock()
	left := []*process{}
	for p := range s.running {
		left = append(left, p)
	}
	s.mu.Unlock()
	for _, p := range left {
		for _, child := range children(p.Process.Pid) {
			_ = syscall.Kill(child, syscall.SIGKILL)
		}
		_ = p.Process.Kill()
		<-p.done
	}
}

// children returns the processes that pid has started.
func children(pid int) (found []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range files {
		text, _ := os.ReadFile(file)
		_, rest, _ := bytes.Cut(text, []byte(") ")) // state, parent, …
		if fields := bytes.Fields(rest); len(fields) > 1 && string(fields[1]) == strconv.Itoa(pid) {
			child, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			found = append(found, child)
		}
	}
	return found
}

// A cluster is a PostgreSQL server of its own.
type cluster struct {
	s       *suite
	folder  string
	port    int
	options []string
	server  *process
}

// newCluster makes a cluster and starts it.
func (s *suite) newCluster(options ...string) *cluster {
	c := &cluster{s: s, folder: s.newFolder("pg"), port: freePort(), options: options}
	s.do(filepath.Join(s.bin, "initdb"), "-D", c.folder+"/data", "-U", "taskflow", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
	c.start()
	return c
}

// start starts the server and returns when it accepts connections.
func (c *cluster) start() time.Time {
	c.server = c.s.start(c.s.account, c.folder, nil,
		append([]string{filepath.Join(c.s.bin, "postgres"), "-D", c.folder + "/data", "-k", c.folder,
			"-p", strconv.Itoa(c.port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=400",
			"-c", "shared_preload_libraries=pg_stat_statements", "-c", "wal_receiver_status_interval=1"}, c.options...)...)
	return c.accepting()
}

// accepting waits until the server accepts connections, and returns when that was.
func (c *cluster) accepting() time.Time {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(3 * time.Millisecond) {
		db := c.open("postgres")
		_, err := db.Exec("SELECT 1")
		db.Close()
		if err == nil {
			return time.Now()
		}
	}
	panic("PostgreSQL does not accept connections: " + c.server.output())
}

// signalAll signals the server and all its processes.
func (c *cluster) signalAll(signal syscall.Signal) {
	pid := c.server.Process.Pid
	pids := append([]int{pid}, children(pid)...)
	if signal == syscall.SIGCONT { // the first comes last
		slices.Reverse(pids)
	}
	for _, pid := range pids {
		_ = syscall.Kill(pid, signal)
	}
}

// kill kills the server and all its processes, and waits until they are gone.
func (c *cluster) kill() {
	backends := children(c.server.Process.Pid)
	c.signalAll(syscall.SIGKILL)
	<-c.server.done
	for _, pid := range backends {
		for syscall.Kill(pid, syscall.SIGKILL) == nil {
			time.Sleep(time.Millisecond)
		}
	}
}

func (c *cluster) url(database string) string {
	return fmt.Sprintf("postgres://taskflow@127.0.0.1:%d/%s?sslmode=disable", c.port, database)
}

func (c *cluster) open(database string) *sql.DB {
	db, err := sql.Open("postgres", c.url(database)+"&connect_timeout=5")
	must(err)
	return db
}

// exec runs statements in a database.
func (c *cluster) exec(database, statements string) {
	db := c.open(database)
	defer db.Close()
	_, err := db.Exec(statements)
	must(err)
}

// number asks a database for a number.
func (c *cluster) number(database, query string) (n int) {
	db := c.open(database)
	defer db.Close()
	must(db.QueryRow(query).Scan(&n))
	return n
}

// newDatabase makes an empty database.
func (c *cluster) newDatabase(name string) string {
	c.exec("postgres", "CREATE DATABASE "+name)
	return name
}

// longList gives the user long a list that is sent in several parts.
func (c *cluster) longList(database string, tasks, size int) {
	c.exec(database, fmt.Sprintf(`INSERT INTO tasks (user_id, title, description)
		SELECT 'long', 'base ' || n, repeat('x', %d) FROM generate_series(1, %d) n; ANALYZE tasks`, size, tasks))
}

const secret = "a secret for the fault suite, 32 bytes or more"

// A service is one replica.
type service struct {
	s    *suite
	port int
	env  []string
	*process
}

// newService starts a replica; env has more of its environment.
func (s *suite) newService(databaseURL string, env ...string) *service {
	v := &service{s: s, port: freePort()}
	v.env = append([]string{"ENVIRONMENT=production", "HOST=127.0.0.1", "PORT=" + strconv.Itoa(v.port), "BETTER_AUTH_SECRET=" + secret,
		"DATABASE_URL=" + databaseURL, "DB_POOL_TIMEOUT=" + patience.String()}, env...)
	v.start()
	return v
}

func (v *service) start() {
	v.process = v.s.start(nil, v.s.folder, v.env, filepath.Join(v.s.folder, "taskflow"))
}

func (v *service) url() string { return "http://127.0.0.1:" + strconv.Itoa(v.port) }

// get asks for a path without a token.
func (v *service) get(path string) (status int, took time.Duration) {
	start := time.Now()
	response, err := quickClient.Get(v.url() + path)
	if err != nil {
		return 0, time.Since(start)
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, response.Body)
	return response.StatusCode, time.Since(start)
}

var quickClient = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// ready waits until the service says it is.
func (v *service) ready() *service {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if status, _ := v.get("/ready"); status == http.StatusOK {
			return v
		}
		if time.Now().After(deadline) {
			panic("the service does not become ready: " + v.output())
		}
	}
}

// memory returns the most that the process has had in memory, in MiB.
func (v *service) memory() int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.Process.Pid))
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	n, _ := strconv.Atoi(strings.Fields(rest + " 0")[0])
	return n >> 10
}

// configured writes a configuration file and starts a program with it.
func (s *suite) configured(program, flag, text string) *process {
	folder := s.newFolder(program)
	file := filepath.Join(folder, "cfg")
	must(os.WriteFile(file, []byte(text), 0o644))
	path, err := exec.LookPath(program)
	must(err)
	args := []string{path, file}
	if flag != "" {
		args = []string{path, flag, file}
	}
	return s.start(s.account, folder, nil, args...)
}

// haproxy starts HAProxy in front of replicas. It returns its URL, and a function that waits until HAProxy sends requests
// to a replica.
func (s *suite) haproxy(replicas ...*service) (url string, balances func(*service)) {
	port, socket := freePort(), s.newFolder("sock")+"/haproxy.sock"
	text := fmt.Sprintf(`
global
  maxconn 2000
  stats socket %s mode 666
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 60s
  timeout check 2s
frontend all
  bind 127.0.0.1:%d
  default_backend taskflow
backend taskflow
  balance roundrobin
  option httpchk GET /ready
  default-server check inter 200ms fall 1 rise 1
`, socket, port)
	for _, v := range replicas {
		text += fmt.Sprintf("  server s%d 127.0.0.1:%d\n", v.port, v.port)
	}
	s.configured("haproxy", "-f", text)
	reachable(port)
	return fmt.Sprintf("http://127.0.0.1:%d", port), func(v *service) {
		up := regexp.MustCompile(fmt.Sprintf(`(?m)^taskflow,s%d,.*,UP,`, v.port))
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			conn, err := net.Dial("unix", socket)
			must(err)
			_, err = io.WriteString(conn, "show stat\n")
			must(err)
			text, err := io.ReadAll(conn)
			must(err)
			conn.Close()
			if up.Match(text) {
				return
			}
			if time.Now().After(deadline) {
				panic(fmt.Sprintf("HAProxy leaves out the replica at port %d:\n%s", v.port, text))
			}
		}
	}
}

// pgbouncer starts PgBouncer on port in front of a cluster.
func (s *suite) pgbouncer(c *cluster, port int, mode, more string) *process {
	users := filepath.Join(s.newFolder("users"), "users.txt")
	must(os.WriteFile(users, []byte("\"taskflow\" \"\"\n"), 0o644))
	p := s.configured("pgbouncer", "", fmt.Sprintf(`
[databases]
* = host=127.0.0.1 port=%d
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = trust
auth_file = %s
admin_users = taskflow
pool_mode = %s
default_pool_size = 4
max_client_conn = 1000
log_connections = 0
log_disconnections = 0
%s
`, c.port, port, users, mode, more))
	reachable(port)
	return p
}

// reachable waits until something listens on a port.
func reachable(port int) {
	for range 1000 {
		if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			conn.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	panic(fmt.Sprintf("nothing listens on port %d", port))
}

// A forwarder passes connections on to a port that may change, and loses answers on demand.
type forwarder struct {
	listener net.Listener
	deaf     bool // loses cancel requests
	mu       sync.Mutex
	target   int
	links    map[*link]bool
	lost     int // answers
}

type link struct {
	client, server net.Conn
	lose           bool // the next answer, and the connection with it
}

func newForwarder(target int) *forwarder {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	f := &forwarder{listener: l, target: target, links: map[*link]bool{}}
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go f.serve(client)
		}
	}()
	return f
}

func (f *forwarder) port() int { return f.listener.Addr().(*net.TCPAddr).Port }

func (f *forwarder) serve(client net.Conn) {
	defer client.Close()
	f.mu.Lock()
	target := f.target
	f.mu.Unlock()
	server, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", target))
	if err != nil {
		return
	}
	defer server.Close()
	k := &link{client: client, server: server}
	f.mu.Lock()
	f.links[k] = true
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.links, k)
		f.mu.Unlock()
	}()
	go func() {
		begin := make([]byte, 8) // of a start-up message, or of a CancelRequest
		if _, err := io.ReadFull(client, begin); err == nil && !(f.deaf && string(begin[4:]) == "\x04\xd2\x16\x2e") {
			_, _ = server.Write(begin)
			_, _ = io.Copy(server, client)
		}
		_ = server.(*net.TCPConn).CloseWrite()
	}()
	buffer := make([]byte, 64<<10)
	for {
		n, err := server.Read(buffer)
		f.mu.Lock()
		lose := k.lose && n > 0
		if lose {
			f.lost++
		}
		reset := f.lost%2 == 0
		f.mu.Unlock()
		if lose && reset {
			_ = client.(*net.TCPConn).SetLinger(0)
		}
		if err != nil || lose {
			return
		}
		if _, err := client.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// aim sends new connections to another port, and cuts the old ones if so told.
func (f *forwarder) aim(target int, cut bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.target = target
	for k := range f.links {
		if cut {
			_ = errors.Join(k.client.Close(), k.server.Close())
		}
	}
}

// loseOne makes one connection lose its next answer.
func (f *forwarder) loseOne() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for k := range f.links {
		if !k.lose {
			k.lose = true
			return
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
