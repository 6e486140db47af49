package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lib/pq"
)

// This file runs a private PostgreSQL for development, and for the tests, from the server programs of
// the machine. All it keeps is in one folder of mode 0700, and only a Unix socket leads to it.

const stopPatience = 10 * time.Second

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
	config pq.Config
	cancel func() // has the server end
	server sync.WaitGroup
	lock   *os.File
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
	alive, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer context.AfterFunc(ctx, cancel)() // while it starts
	db := &devDB{cancel: cancel}
	if db.lock, err = lock(filepath.Join(f.path, "lock"), syscall.LOCK_NB); err != nil {
		return nil, fmt.Errorf("another taskflow is running with the private PostgreSQL in %s: stop it, or give this one "+
			"a DATABASE_URL (the other's is 'postgres://taskflow@/postgres?host=%s'): %w", f.path, url.PathEscape(f.path), err)
	}
	defer func() {
		if err != nil {
			_ = db.stop()
		}
	}()
	logFile, err := f.takeOver(ctx)
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	if version == nil {
		log.Info("making a private PostgreSQL", "folder", f.path, "programs", programs)
		if err := f.initialise(alive, programs, data); err != nil {
			return nil, err
		}
	}
	// The path of a socket must be short: it is one from data here, and one from the working directory in DialContext.
	args := []string{"-D", data, "-k", "..", "-p", "5432", "-c", "listen_addresses=", "-c", "unix_socket_permissions=0700",
		"-c", "logging_collector=off"}
	for _, setting := range settings {
		args = append(args, "-c", setting)
	}
	command := f.command(alive, filepath.Join(programs, "postgres"), args...)
	command.Stdout, command.Stderr = logFile, logFile
	if err := db.launch(command, func(err error) {
		cancel()
		onExit(fmt.Errorf("the private PostgreSQL has ended (%v); it says why in %s", err, logFile.Name()))
	}); err != nil {
		return nil, err
	}
	// by hand, since the environment, PGPORT for one, has a say in what a URL means
	db.config = pq.Config{Host: f.path, Port: 5432, User: "taskflow", Database: "postgres", SSLMode: pq.SSLModeDisable,
		ApplicationName: "taskflow", ClientEncoding: "UTF8", Datestyle: "ISO, MDY", BinaryParameters: true,
		Runtime: map[string]string{"timezone": "UTC"}}
	if err := db.await(alive); err != nil {
		return nil, fmt.Errorf("the private PostgreSQL does not start: %w; see %s", err, logFile.Name())
	}
	log.Info("private PostgreSQL started", "folder", f.path, "programs", programs)
	return db, nil
}

// launch starts the server, and calls onExit when it ends.
func (db *devDB) launch(command *exec.Cmd, onExit func(error)) error {
	started := make(chan error)
	db.server.Go(func() {
		runtime.LockOSThread() // the kernel sends Pdeathsig when the thread ends that started the process
		err := command.Start()
		if started <- err; err == nil {
			onExit(command.Wait())
		}
	})
	return <-started
}

// await waits until the server takes connections, or ctx ends.
func (db *devDB) await(ctx context.Context) error {
	connector := newConnector(db.config, stopPatience)
	for ctx.Err() == nil {
		if conn, err := connector.Connect(ctx); err == nil {
			return conn.Close()
		}
		time.Sleep(5 * time.Millisecond)
	}
	return ctx.Err()
}

// initialise makes the data directory: under another name first, so that what has its name is whole.
func (f devFolder) initialise(ctx context.Context, programs, data string) (err error) {
	fresh, out := data+".new", []byte(nil)
	for _, locale := range []string{"C.UTF-8", "C"} { // the first is not known everywhere
		_ = os.RemoveAll(fresh) // initdb says so if that has failed
		command := f.command(ctx, filepath.Join(programs, "initdb"), "-D", fresh, "-U", "taskflow", "--auth=trust",
			"--encoding=UTF8", "--locale="+locale, "--no-instructions")
		if out, err = command.CombinedOutput(); err == nil {
			return os.Rename(fresh, data)
		}
	}
	return fmt.Errorf("initdb: %w: %s", err, out)
}

// command is one that runs as the folder's account, without a terminal's signals, that ends with ctx, and
// that the kernel ends with this process where it can.
func (f devFolder) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	command := exec.CommandContext(ctx, program, args...)
	command.Dir = f.path
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGINT) }
	command.WaitDelay = stopPatience // then it is killed
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: f.account}
	// Only Linux has this field, and this file is for macOS too.
	if field := reflect.ValueOf(command.SysProcAttr).Elem().FieldByName("Pdeathsig"); field.IsValid() {
		field.SetInt(int64(syscall.SIGINT))
	}
	return command
}

// lock opens a file and takes it for this process, and for those that inherit it, until the last of them ends.
func lock(path string, how int) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|how)
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

// takeOver opens the server's log and locks it: since that is the server's stderr, it is locked as long as the
// server runs. One that a killed service has left behind is ended here. The rest, crash recovery included,
// PostgreSQL does itself.
func (f devFolder) takeOver(ctx context.Context) (*os.File, error) {
	pidFile := filepath.Join(f.path, "data", "postmaster.pid")
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		file, err := lock(filepath.Join(f.path, "postgres.log"), syscall.LOCK_NB)
		if err == nil {
			_ = os.Remove(pidFile) // PostgreSQL would take whatever process has that number now for its server
			return file, file.Truncate(0)
		}
		if ctx.Err() != nil || time.Since(start) > stopPatience {
			return nil, fmt.Errorf("the PostgreSQL that was left behind in %s does not end: %w", f.path, err)
		}
		text, _ := os.ReadFile(pidFile)
		pid, _, _ := strings.Cut(string(text), "\n")
		if pid, err := strconv.Atoi(pid); err == nil && pid > 1 {
			_ = syscall.Kill(pid, syscall.SIGINT)
		}
	}
}

// stop ends the server: it closes its connections, writes what it must, and goes. If it does not, it is made to.
func (db *devDB) stop() error {
	db.cancel()
	db.server.Wait()
	return db.lock.Close()
}
