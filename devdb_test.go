package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// workFolder makes a folder of this name that everybody can reach.
func workFolder(t testing.TB, name string) string {
	above := must(os.MkdirTemp("", "taskflow-test"))
	t.Cleanup(func() { _ = os.RemoveAll(above) })
	folder := filepath.Join(above, name)
	return must(folder, errors.Join(os.Chmod(above, 0o755), os.MkdirAll(folder, 0o755)))
}

// paste does what somebody does who pastes the line that a start in development prints.
func (p *process) paste(t testing.TB) string {
	t.Helper()
	command := regexp.MustCompile(`(?m)^curl -H 'Authorization: (Bearer [\w.-]+)' (http://127.0.0.1:\d+/api/demo/tasks)$`)
	line := command.FindStringSubmatch(p.await(t, "curl"))
	if line == nil {
		t.Fatalf("no line to paste:\n%s", &p.output)
	}
	if _, err := exec.LookPath("curl"); err == nil {
		out, _ := exec.Command("sh", "-c", line[0]).Output()
		return string(out)
	}
	r := must(http.NewRequest("GET", line[2], nil))
	r.Header.Set("Authorization", line[1])
	return send(t, r).body
}

// stops ends a process as a service manager does.
func (p *process) stops(t testing.TB) {
	t.Helper()
	_ = p.Process.Signal(syscall.SIGTERM)
	p.exits(t, 0, "stopping")
}

// postmaster returns the process of the private PostgreSQL in a folder, 0 when there is none.
func postmaster(folder string) int {
	text, _ := os.ReadFile(filepath.Join(folder, ".taskflow/data/postmaster.pid"))
	pid, _ := strconv.Atoi(strings.SplitN(string(text), "\n", 2)[0])
	return pid
}

func TestDevelopmentNeedsNothingButAnEmptyFolder(t *testing.T) {
	t.Parallel()
	folder := workFolder(t, `Ünï "quoted" it's 100%41, a\b`)
	p := start(t, folder, nil)
	if list := p.paste(t); list != "[]" {
		t.Fatal("pasting gives ", list)
	}
	f := devFolder{path: filepath.Join(folder, ".taskflow")}
	for name, want := range map[string]os.FileMode{"": 0o700, "secret": 0o600, "data": 0o700} {
		if info, err := os.Stat(filepath.Join(f.path, name)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if os.Getuid() == 0 {
		f.account = must(unprivileged(f.path))
		if info, err := os.Stat(fmt.Sprintf("/proc/%d", postmaster(folder))); runtime.GOOS == "linux" &&
			(err != nil || info.Sys().(*syscall.Stat_t).Uid == 0) {
			t.Errorf("PostgreSQL runs as root, or not at all: %v", err)
		}
	}
	list := "[" + p.as(t, string(must(os.ReadFile(filepath.Join(f.path, "secret")))), "POST", "/api/demo/tasks", `{"title":"kept"}`).body +
		"]"
	token := start(t, folder, nil, "token", "-ttl", "5m", "demo")
	token.exits(t, 0, ".")
	r := must(http.NewRequest("GET", p.url+"/api/demo/tasks", nil))
	r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(token.output.String()))
	send(t, r).is(t, 200, list)
	start(t, folder, nil).exits(t, 1, "another taskflow is running with the private PostgreSQL in "+f.path)
	p.stops(t)
	if pid := postmaster(folder); pid != 0 {
		t.Errorf("PostgreSQL, process %d, was left behind", pid)
	}
	again := func(env ...string) {
		t.Helper()
		p = start(t, folder, env)
		if got := p.paste(t); got != list {
			t.Fatalf("of %s there is %s", list, got)
		}
	}

	again("PGPORT=1", "PGHOST=nowhere.invalid", "PGHOSTADDR=192.0.2.1", "PGUSER=none", "PGSSLMODE=require", "PGCHANNELBINDING=require")
	_ = p.Process.Kill()
	if runtime.GOOS == "linux" { // the kernel ends PostgreSQL too
		eventually(t, "PostgreSQL is gone", func() bool { return postmaster(folder) == 0 })
	}

	// A server that a killed service has left behind, as where the kernel does not end it.
	left := must(startDevDB(t.Context(), f, slog.New(slog.DiscardHandler), func(error) {}))
	pidFile := filepath.Join(f.path, "data/postmaster.pid")
	_, rest, _ := strings.Cut(string(must(os.ReadFile(pidFile))), "\n")
	_ = left.lock.Close()
	again()
	left.server.Wait()

	// PostgreSQL crashes, and its number goes to another process of the same user.
	_ = syscall.Kill(postmaster(folder), syscall.SIGKILL)
	p.exits(t, 1, "the private PostgreSQL has ended (signal: killed)")
	other := f.command(t.Context(), "sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	must(0, os.WriteFile(pidFile, fmt.Appendf(nil, "%d\n%s", other.Process.Pid, rest), 0o600))
	again()
	p.stops(t)
	if err := other.Process.Kill(); err != nil {
		t.Error("not PostgreSQL, and yet killed: ", err)
	}
	_ = other.Wait()
}

func TestAnInterruptedFirstStartAndALongPathDoNoHarm(t *testing.T) {
	t.Parallel()
	folder := workFolder(t, strings.Repeat("long/", 30))
	p := start(t, folder, nil)
	p.await(t, "making a private PostgreSQL")
	_ = p.Process.Kill()
	<-p.exited
	p = start(t, folder, nil)
	if got := p.paste(t); got != "[]" {
		t.Error("pasting gives ", got)
	}
	p.stops(t)
	if list, _ := filepath.Glob(filepath.Join(folder, ".taskflow/data?*")); list != nil {
		t.Error("left behind: ", list)
	}
}

func TestAsRootAFolderThatOnlyRootCanReachIsReplacedByOneThatIsNamed(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		return // nobody else has this to fear
	}
	folder := t.TempDir()
	for range 2 {
		p := start(t, folder, nil)
		named := regexp.MustCompile(`folder=(/var/lib/taskflow-[0-9a-f]{12}) `).FindStringSubmatch(p.await(t, "private PostgreSQL started"))
		if named == nil {
			t.Fatal(&p.output)
		}
		t.Cleanup(func() { _ = os.RemoveAll(named[1]) })
		if got := p.paste(t); got != "[]" {
			t.Error("pasting gives ", got)
		}
		p.stops(t)
	}
}

func TestWithoutServerProgramsOneMessageSaysWhatToInstall(t *testing.T) {
	t.Setenv("PATH", "")
	defer func(places []string) { programPlaces = places }(programPlaces)
	if _, err := findPrograms("9"); err == nil || !strings.Contains(err.Error(), "PostgreSQL 9") || !errors.Is(err, errNoPostgres) {
		t.Error(err)
	}
	programPlaces = []string{t.TempDir()}
	for name, does := range map[string]string{"postgres": "echo 'postgres (PostgreSQL) 15.0'", "initdb": "echo no room; exit 1"} {
		must(0, os.WriteFile(filepath.Join(programPlaces[0], name), []byte("#!/bin/sh\n"+does+"\n"), 0o755))
	}
	if _, err := startDevDB(t.Context(), devFolder{path: t.TempDir()}, slog.New(slog.DiscardHandler), nil); err == nil ||
		!strings.Contains(err.Error(), "no room") {
		t.Error(err)
	}
	programPlaces = nil
	if _, err := startDevDB(t.Context(), devFolder{path: t.TempDir()}, slog.New(slog.DiscardHandler), nil); err != errNoPostgres ||
		!strings.Contains(err.Error(), "apt-get install postgresql") {
		t.Error(err)
	}
}

func TestAFolderIsReachableWhenAllAboveItAre(t *testing.T) {
	t.Parallel()
	uid, gid := uint32(os.Getuid()), uint32(os.Getgid())
	accounts := []*syscall.Credential{nil} // only root can become another, and may itself do all
	if os.Getuid() == 0 {
		accounts = []*syscall.Credential{{Uid: 1, Gid: 1}, {Uid: 2, Gid: gid}, {Uid: 2, Gid: 2}}
		uid = 1
	}
	for mode, want := range map[os.FileMode][3]bool{0o700: {true}, 0o010: {false, true}, 0o001: {false, false, true}, 0o666: {},
		0o711: {true, true, true}} {
		folder := t.TempDir()
		above := filepath.Join(folder, "above")
		dir := filepath.Join(above, "dir")
		err := errors.Join(os.Chmod(filepath.Dir(folder), 0o755), os.MkdirAll(dir, 0o755), os.Chown(above, int(uid), int(gid)),
			os.Chmod(above, mode))
		if err != nil {
			t.Fatal(err)
		}
		for i, account := range accounts {
			if got := reachable(dir, account); got != want[i] {
				t.Errorf("%v: account %d: %t", mode, i, got)
			}
		}
		_ = os.Chmod(above, 0o700)
	}
}
