package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// development makes a folder of this name with dev/ and bin/taskflow, as in a clone, that PostgreSQL's account can reach. They
// are links: a script that has just been written may be busy for a moment.
func development(t testing.TB, name string) string {
	t.Helper()
	above := must(os.MkdirTemp("", "taskflow-test"))
	t.Cleanup(func() { _ = os.RemoveAll(above) })
	folder := filepath.Join(above, name)
	must(0, errors.Join(os.Chmod(above, 0o755), os.MkdirAll(filepath.Join(folder, "bin"), 0o755),
		os.Symlink(must(filepath.Abs("dev")), filepath.Join(folder, "dev")),
		os.Symlink(taskflow(), filepath.Join(folder, "bin", "taskflow"))))
	t.Cleanup(func() { eventually(t, "no process is left", func() bool { return processesOf(t, folder) == nil }) })
	return folder
}

// runs starts dev/run and waits until it serves.
func runs(t testing.TB, folder string) *process {
	t.Helper()
	p := launch(t, filepath.Join(folder, "dev", "run"), folder, nil)
	p.await(t, "curl -H")
	return p
}

// processesOf lists dev/postgres of a folder and all of its PostgreSQL.
func processesOf(t testing.TB, folder string) (pids []int) {
	t.Helper()
	data := filepath.Join(folder, ".taskflow")
	sum := exec.Command("cksum")
	sum.Stdin = strings.NewReader(data)
	number := strings.Fields(string(must(sum.Output())))[0]
	for line := range strings.Lines(string(must(exec.Command("ps", "-A", "-ww", "-o", "pid=", "-o", "args=").Output()))) {
		if fields := strings.Fields(line); strings.Contains(line, "dev/postgres "+data) || strings.Contains(line, "taskflow-"+number) {
			pids = append(pids, must(strconv.Atoi(fields[0])))
		}
	}
	return pids
}

// demo sends a request with a token that dev/run prints.
func (p *process) demo(t testing.TB, method, body string) reply {
	t.Helper()
	out, err := exec.Command(filepath.Join(p.Dir, "dev", "run"), "token", "demo").Output()
	if err != nil {
		t.Fatal(err)
	}
	r := must(newRequest(method, p.url+"/api/demo/tasks", body))
	r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(out)))
	return send(t, r)
}

func TestDevRunStopsAllItStartedAndKeepsTheData(t *testing.T) {
	t.Parallel()
	folder := development(t, strings.Repeat("long ü ", 21)) // 168 bytes
	for i, stop := range []func(*process) error{
		func(p *process) error { return syscall.Kill(-p.Process.Pid, syscall.SIGINT) }, // Ctrl-C
		func(p *process) error { return p.Process.Signal(syscall.SIGTERM) },
		func(p *process) error { return p.Process.Signal(syscall.SIGHUP) },
		func(p *process) error { return signalService(p, syscall.SIGTERM) },
	} {
		p := runs(t, folder)
		if got := len(p.demo(t, "GET", "").tasks(t)); got != i {
			t.Errorf("%d tasks after %d starts", got, i)
		}
		p.demo(t, "POST", `{"title":"x"}`).task(t)
		if err := stop(p); err != nil {
			t.Fatal(err)
		}
		p.exits(t, 0, "stopping")
		if left := processesOf(t, folder); left != nil {
			t.Fatalf("%v are left after stop %d", left, i)
		}
	}
	for name, mode := range map[string]fs.FileMode{"": 0o700 | fs.ModeDir, "secret": 0o600} {
		if info, err := os.Stat(filepath.Join(folder, ".taskflow", name)); err != nil || info.Mode() != mode {
			t.Errorf("%q: %v, %v", name, info, err)
		}
	}
	for _, entry := range must(os.ReadDir(filepath.Join(folder, ".taskflow"))) {
		if !strings.Contains("data secret postgres.log", entry.Name()) {
			t.Errorf("%s is left", entry.Name())
		}
	}
}

// signalService signals the service that a dev/run has started.
func signalService(p *process, signal syscall.Signal) error {
	out, err := exec.Command("ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "args=").Output()
	for line := range strings.Lines(string(out)) {
		if fields := strings.Fields(line); fields[1] == fmt.Sprint(p.Process.Pid) && strings.Contains(line, "bin/taskflow") {
			pid, _ := strconv.Atoi(fields[0])
			return syscall.Kill(pid, signal)
		}
	}
	return errors.Join(errors.New("no service"), err)
}

// killAll kills dev/run, what it has started, and its PostgreSQL. Then the numbers in PostgreSQL's lock files are those of
// another process.
func killAll(t testing.TB, p *process) {
	_ = syscall.Kill(-p.Process.Pid, syscall.SIGKILL)
	for _, pid := range processesOf(t, p.Dir) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, name := range []string{"data/postmaster.pid", ".s.PGSQL.5432.lock"} {
		path := filepath.Join(p.Dir, ".taskflow", name)
		_, rest, _ := strings.Cut(string(must(os.ReadFile(path))), "\n")
		must(0, os.WriteFile(path, []byte(fmt.Sprintf("%d\n%s", os.Getppid(), rest)), 0o600))
	}
}

func TestAfterAKillTheNextDevRunComesUpWithTheDataWhole(t *testing.T) {
	t.Parallel()
	for what, act := range map[string]func(t testing.TB, p *process){
		"the service": func(t testing.TB, p *process) { _ = signalService(p, syscall.SIGKILL) },
		"the script":  func(t testing.TB, p *process) { _ = p.Process.Kill() }, // the service, too, must come to its end
		"the script and the service": func(t testing.TB, p *process) {
			_ = errors.Join(signalService(p, syscall.SIGKILL), p.Process.Kill())
		},
		"dev/postgres, too": func(t testing.TB, p *process) { _ = syscall.Kill(-p.Process.Pid, syscall.SIGKILL) },
		"PostgreSQL": func(t testing.TB, p *process) {
			for _, pid := range processesOf(t, p.Dir) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
			_ = p.Process.Signal(syscall.SIGTERM)
			p.exits(t, 0, "stopping")
		},
		"all": killAll,
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			folder := development(t, "clone")
			p := runs(t, folder)
			p.demo(t, "POST", `{"title":"kept"}`).task(t)
			act(t, p)
			<-p.exited
			again := runs(t, folder)
			if tasks := again.demo(t, "GET", "").tasks(t); len(tasks) != 1 || tasks[0].Title != "kept" {
				t.Errorf("got %v", tasks)
			}
			_ = again.Process.Signal(syscall.SIGTERM)
			again.exits(t, 0, "stopping")
		})
	}
}

func TestOfTwoDevRunsInOneFolderOneServesAndTheOtherSaysWhyNot(t *testing.T) {
	t.Parallel()
	folder := development(t, "clone")
	for _, killed := range []bool{false, true} {
		if killed {
			p := runs(t, folder)
			killAll(t, p)
			<-p.exited
		}
		dev := filepath.Join(folder, "dev", "run")
		serves, refused := launch(t, dev, folder, nil), launch(t, dev, folder, nil)
		select {
		case <-serves.exited:
			serves, refused = refused, serves
		case <-refused.exited:
		case <-time.After(20 * time.Second):
			t.Fatal("both run")
		}
		refused.exits(t, 1, "another dev/run uses the private PostgreSQL")
		serves.await(t, "curl -H")
		serves.demo(t, "POST", `{"title":"x"}`).task(t)
		_ = serves.Process.Signal(syscall.SIGTERM)
		serves.exits(t, 0, "stopping")
	}
}

func TestProcessesAtOnceEndWithOneGeneratedSecret(t *testing.T) {
	t.Parallel()
	folder := development(t, "clone")
	var processes []*process
	for range 8 {
		processes = append(processes, launch(t, filepath.Join(folder, "dev", "run"), folder, nil, "token", "ann"))
	}
	for _, p := range processes {
		p.exits(t, 0, "ey")
	}
	secret := must(os.ReadFile(filepath.Join(folder, ".taskflow", "secret")))
	for _, p := range processes {
		newAuthenticator(string(secret), "", "", "").says(t, tokenGood, "ann", strings.TrimSpace(p.output.String()))
	}
}

func TestWithoutServerProgramsDevRunSaysWhatToInstall(t *testing.T) {
	t.Parallel()
	folder := development(t, "clone")
	dev := filepath.Join(folder, "dev")
	must(0, errors.Join(os.Remove(dev), os.CopyFS(dev, os.DirFS("dev"))))
	programs := filepath.Join(dev, "programs")
	text := strings.NewReplacer("/usr/lib/postgresql", "/nowhere", "apt-get", "no-apt-get", "command -v initdb", "false").Replace(
		string(must(os.ReadFile(programs))))
	must(0, os.WriteFile(programs, []byte(text), 0o755))
	p := launch(t, filepath.Join(folder, "dev", "run"), folder, nil)
	p.exits(t, 1, "Install them:\n  Debian, Ubuntu ")
}
