package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/lib/pq"
)

// This file runs a private PostgreSQL for development, and for the tests, from the server programs of
// the machine. All it keeps is in one folder of mode 0700, and only a Unix socket leads to it.

const (
	maxSocketPath = 103 // bytes; macOS has room for 104 with the NUL, Linux for 108
	socketName    = ".s.PGSQL.5432"
	stopPatience  = 10 * time.Second
)

// errNoPostgres is what somebody without PostgreSQL's server programs reads.
var errNoPostgres = errors.New(`development needs PostgreSQL's server programs (initdb, postgres), or a DATABASE_URL. Install them:
  Debian, Ubuntu:  sudo apt-get install postgresql
  Fedora, RHEL:    sudo dnf install postgresql-server
  macOS:           brew install postgresql@18, or Postgres.app`)

// programPlaces is where to look for the server programs besides PATH, as filepath.Match has it.
var programPlaces = []string{
	"/usr/lib/postgresql/*/bin",                            // Debian, Ubuntu
	"/usr/pgsql-*/bin", "/usr/lib64/pgsql/bin", "/usr/bin", // Red Hat
	"/opt/homebrew/opt/postgresql*/bin",                  // Homebrew on Apple silicon
	"/usr/local/opt/postgresql*/bin",                     // Homebrew on Intel
	"/Applications/Postgres.app/Contents/Versions/*/bin", // Postgres.app
	"/usr/local/pgsql/bin", "/home/linuxbrew/.linuxbrew/opt/postgresql*/bin",
}

// findPrograms returns the folder with the newest server programs, or those of the given major
// version where that is not "".
func findPrograms(major string) (string, error) {
	for _, place := range append(filepath.SplitList(os.Getenv("PATH")), programPlaces...) {
		found, _ := filepath.Glob(filepath.Join(place, "initdb"))
		slices.SortFunc(found, func(a, b string) int { return cmp.Or(len(b)-len(a), strings.Compare(b, a)) }) // 18 before 9
		for _, initdb := range found {
			initdb, _ = filepath.EvalSymlinks(initdb)
			programs := filepath.Dir(initdb)
			out, _ := exec.Command(filepath.Join(programs, "postgres"), "--version").Output()
			words := strings.Fields(string(out)) // postgres (PostgreSQL) 18.1 …
			if len(words) > 2 && (major == "" || strings.HasPrefix(words[2]+".", major+".")) {
				return programs, nil
			}
		}
	}
	if major != "" {
		return "", fmt.Errorf("the data was made by PostgreSQL %s, whose programs are not installed: "+
			"install them, or move the folder away: %w", major, errNoPostgres)
	}
	return "", errNoPostgres
}

// A devDB is a running private PostgreSQL.
type devDB struct {
	config  pq.Config
	process *os.Process
	exited  chan struct{} // closed when it has
	lock    *os.File
	socket  string // its directory, if that is a temporary one
}

// startDevDB starts the PostgreSQL of a folder, making its data first if there are none. settings are
// for its command line. onExit is called when it ends.
func startDevDB(ctx context.Context, f devFolder, log *slog.Logger, onExit func(error), settings ...string) (running *devDB, err error) {
	data := filepath.Join(f.path, "data")
	version, err := os.ReadFile(filepath.Join(data, "PG_VERSION"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	programs, err := findPrograms(strings.TrimSpace(string(version)))
	if err != nil {
		return nil, err
	}
	db := &devDB{exited: make(chan struct{})}
	if db.lock, err = lock(filepath.Join(f.path, "lock")); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = db.stop()
		}
	}()
	if version == nil {
		log.Info("making a private PostgreSQL", "folder", f.path, "programs", programs)
		if err := f.initialise(programs, data); err != nil {
			return nil, err
		}
	} else if err := endStale(ctx, data); err != nil {
		return nil, err
	}
	socket, err := db.socketFolder(f)
	if err != nil {
		return nil, err
	}
	quoted := `"` + strings.ReplaceAll(socket, `"`, `""`) + `"` // an element of a list
	args := []string{"-D", data, "-k", quoted, "-p", "5432", "-c", "listen_addresses=", "-c", "unix_socket_permissions=0700"}
	for _, setting := range settings {
		args = append(args, "-c", setting)
	}
	logFile, err := os.OpenFile(filepath.Join(f.path, "postgres.log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	command := f.command(filepath.Join(programs, "postgres"), args...)
	command.Stdout, command.Stderr = logFile, logFile
	if err := db.launch(command, func(err error) {
		onExit(fmt.Errorf("the private PostgreSQL has ended (%v); it says why in %s", err, logFile.Name()))
	}); err != nil {
		return nil, err
	}
	// by hand, since the environment, PGPORT for one, has a say in what a URL means
	db.config = pq.Config{Host: socket, Port: 5432, User: "taskflow", Database: "postgres", SSLMode: pq.SSLModeDisable,
		ApplicationName: "taskflow", ClientEncoding: "UTF8", Datestyle: "ISO, MDY", BinaryParameters: true,
		Runtime: map[string]string{"timezone": "UTC"}}
	if err := db.await(ctx); err != nil {
		return nil, fmt.Errorf("the private PostgreSQL does not start: %w; see %s", err, logFile.Name())
	}
	log.Info("private PostgreSQL started", "folder", f.path, "programs", programs)
	return db, nil
}

// socketFolder returns where the socket is to be: in the folder, or in one of its own where the path
// would be too long for a socket.
func (db *devDB) socketFolder(f devFolder) (path string, err error) {
	if len(filepath.Join(f.path, socketName)) <= maxSocketPath {
		return f.path, nil
	}
	if db.socket, err = os.MkdirTemp("", "taskflow"); err != nil {
		return "", err
	}
	return db.socket, devFolder{db.socket, f.account}.prepare()
}

// launch starts the server, and calls onExit when it ends.
func (db *devDB) launch(command *exec.Cmd, onExit func(error)) error {
	started := make(chan error)
	go func() {
		// The kernel sends Pdeathsig when the thread ends that started the process.
		runtime.LockOSThread()
		err := command.Start()
		db.process = command.Process
		if started <- err; err == nil {
			err = command.Wait()
			close(db.exited)
			onExit(err)
		}
	}()
	return <-started
}

// await waits until the server takes connections. It fails when it has ended.
func (db *devDB) await(ctx context.Context) error {
	connector := newConnector(db.config, stopPatience)
	for ctx.Err() == nil {
		if conn, err := connector.Connect(ctx); err == nil {
			return conn.Close()
		}
		select {
		case <-db.exited:
			return errors.New("it has ended")
		case <-time.After(5 * time.Millisecond):
		}
	}
	return ctx.Err()
}

// initialise makes the data directory: under another name first, so that what has its name is whole.
func (f devFolder) initialise(programs, data string) (err error) {
	fresh, out := data+".new", []byte(nil)
	for _, locale := range []string{"C.UTF-8", "C"} { // the first is not known everywhere
		_ = os.RemoveAll(fresh) // initdb says so if that has failed
		command := f.command(filepath.Join(programs, "initdb"), "-D", fresh, "-U", "taskflow", "--auth=trust",
			"--encoding=UTF8", "--locale="+locale, "--no-instructions")
		if out, err = command.CombinedOutput(); err == nil {
			return os.Rename(fresh, data)
		}
	}
	return fmt.Errorf("initdb: %w: %s", err, out)
}

// command is one that runs as the folder's account, without a terminal's signals, and that the kernel
// ends with this process where it can.
func (f devFolder) command(program string, args ...string) *exec.Cmd {
	command := exec.Command(program, args...)
	command.Dir = f.path
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: f.account}
	// Only Linux has this field, and this file is for macOS too.
	if field := reflect.ValueOf(command.SysProcAttr).Elem().FieldByName("Pdeathsig"); field.IsValid() {
		field.SetInt(int64(syscall.SIGINT))
	}
	return command
}

// lock takes the file for this process until it ends, however it ends.
func lock(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("another taskflow is running with the private PostgreSQL in %s: stop it, "+
			"or give this one a DATABASE_URL (the other's is 'postgres://taskflow@/postgres?host=%s')",
			filepath.Dir(path), url.PathEscape(filepath.Dir(path)))
	}
	return file, nil
}

// endStale ends the server that a killed service has left behind, if it still runs. The rest, crash
// recovery included, PostgreSQL does itself.
func endStale(ctx context.Context, data string) error {
	pidFile := filepath.Join(data, "postmaster.pid")
	text, _ := os.ReadFile(pidFile)
	lines := strings.Split(string(text), "\n") // process, data, start, port, socket directory, …
	pid, err := strconv.Atoi(lines[0])
	if err != nil || pid <= 1 || len(lines) < 5 {
		return nil
	}
	if !isPostgres(pid) {
		return os.Remove(pidFile) // another process has that number now; PostgreSQL would take it for its server
	}
	for start := time.Now(); time.Since(start) < stopPatience && ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(pidFile); err != nil || syscall.Kill(pid, 0) == syscall.ESRCH {
			return nil
		}
		// Only the answering socket shows that the process is that server and not another PostgreSQL.
		if conn, err := net.Dial("unix", filepath.Join(lines[4], socketName)); err == nil {
			_ = conn.Close()
			if err := syscall.Kill(pid, syscall.SIGINT); err != nil {
				return fmt.Errorf("stopping the PostgreSQL that was left behind (process %d): %w", pid, err)
			}
		}
	}
	return ctx.Err()
}

// isPostgres reports whether the process is called postgres, or its name is not to be had.
func isPostgres(pid int) bool {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		name, err = exec.Command("ps", "-o", "comm=", "-p", strconv.Itoa(pid)).Output()
	}
	return err != nil || strings.Contains(string(name), "postgres")
}

// stop ends the server: it closes its connections, writes what it must, and goes. If it does not, it is made to.
func (db *devDB) stop() error {
	for _, signal := range []os.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGKILL} {
		if db.process == nil {
			break
		}
		_ = db.process.Signal(signal) // it may have ended by itself
		select {
		case <-db.exited:
			db.process = nil
		case <-time.After(stopPatience):
		}
	}
	if db.socket != "" {
		_ = os.RemoveAll(db.socket)
	}
	return db.lock.Close()
}
