package main

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Issue 5, items 1 to 3: the database restarts, dies, hangs, is not there, and moves.

// workload is the load that most scenarios put on a service.
func workload(base, name string) *load {
	return &load{base: base, name: name, workers: 24, users: 6, pause: 8 * time.Millisecond}
}

func restarts(s *suite) {
	c := s.newCluster()
	database := c.newDatabase("restarts")
	v := s.newService(c.url(database)).ready()
	const long = 4000
	c.longList(database, long, 400)
	for _, fault := range []struct {
		what, name string
		notice     time.Duration // until /ready must have seen that it is down; 0: too short to be seen
		act        func() (down, again, up time.Time)
	}{
		{"PostgreSQL restarted (fast)", "fast", 0, func() (down, again, up time.Time) {
			c.server.stop(syscall.SIGINT)
			return down, again, c.start()
		}},
		{"PostgreSQL killed (-9, all processes)", "killed", 0, func() (down, again, up time.Time) {
			c.kill()
			return down, again, c.start()
		}},
		{"one server process killed (-9), crash recovery", "crash", 0, func() (down, again, up time.Time) {
			held, err := c.open("postgres").Conn(context.Background())
			must(err)
			must(syscall.Kill(c.number(database, "SELECT pid FROM pg_stat_activity WHERE application_name = 'taskflow' LIMIT 1"),
				syscall.SIGKILL))
			for err == nil { // until the server has noticed, and ends all connections
				_, err = held.ExecContext(context.Background(), "SELECT 1")
			}
			return down, again, c.accepting()
		}},
		{"PostgreSQL stopped for 3 s", "stopped", time.Second, func() (down, again, up time.Time) {
			c.server.stop(syscall.SIGINT)
			down = time.Now()
			time.Sleep(3 * time.Second)
			return down, time.Now(), c.start()
		}},
		{"PostgreSQL frozen for 6 s", "frozen", readyPatience, func() (down, again, up time.Time) { return c.freeze(6 * time.Second) }},
	} {
		r := s.row(fault.what)
		l := workload(v.url(), fault.name)
		l.long = long
		l.run()
		time.Sleep(time.Second)
		o := outage{from: time.Now()}
		down, again, up := fault.act()
		o.until = up
		time.Sleep(2500 * time.Millisecond)
		l.finish(r, c, database, o.excuses, v)
		l.recovered(r, o.until, 3*time.Second)
		l.judgeReady(r, o, fault.notice, down, again)
	}

	r := s.row("PostgreSQL frozen for 1 s, less than DB_POOL_TIMEOUT")
	l := workload(v.url(), "paused").run()
	time.Sleep(500 * time.Millisecond)
	c.freeze(time.Second)
	time.Sleep(time.Second)
	l.finish(r, c, database, never, v)

	r = s.row("PostgreSQL read-only for 1 s, as after a switchover")
	l = workload(v.url(), "readonly").run()
	time.Sleep(500 * time.Millisecond)
	c.exec(database, "ALTER SYSTEM SET default_transaction_read_only = on")
	c.exec(database, "SELECT pg_reload_conf()")
	time.Sleep(time.Second)
	c.exec(database, "ALTER SYSTEM RESET default_transaction_read_only")
	c.exec(database, "SELECT pg_reload_conf()")
	time.Sleep(time.Second)
	l.finish(r, c, database, never, v)

	r = s.row("PostgreSQL restarted while nobody asks")
	for range 3 { // all connections of the pool are stale, and nobody has noticed
		c.server.stop(syscall.SIGINT)
		c.start()
		l := workload(v.url(), fmt.Sprintf("stale%d", r.requests)).run()
		time.Sleep(500 * time.Millisecond)
		l.finish(r, c, database, never, v)
	}
}

// freeze stops the server's processes for a while.
func (c *cluster) freeze(d time.Duration) (down, again, up time.Time) {
	c.signalAll(syscall.SIGSTOP)
	down = time.Now()
	time.Sleep(d)
	again = time.Now()
	c.signalAll(syscall.SIGCONT)
	return down, again, time.Now()
}

// lostAnswers has statements done and their answers lost: the case for which repeating is a question.
func lostAnswers(s *suite) {
	c := s.newCluster()
	database := c.newDatabase("answers")
	f := newForwarder(c.port)
	v := s.newService(fmt.Sprintf("postgres://taskflow@127.0.0.1:%d/%s?sslmode=disable", f.port(), database)).ready()
	const long = 3000
	c.longList(database, long, 400)
	r := s.row("answers lost after the statement was done")
	l := workload(v.url(), "answers")
	l.long = long
	l.run()
	for range 300 {
		f.loseOne()
		time.Sleep(15 * time.Millisecond)
	}
	l.finish(r, c, database, func(x sample) bool { return x.what == "POST" || x.what == "PATCH" || x.what == "DELETE" },
		v) // the others are safe to repeat
	if r.note("%d answers lost", f.lost); f.lost < 100 || r.unavailable == 0 {
		r.fault("hardly an answer was lost: %d, with %d times 503", f.lost, r.unavailable)
	}
}

// startUp starts the service on databases that are not there.
func startUp(s *suite) {
	c := s.newCluster()
	database := c.newDatabase("starts")
	c.server.stop(syscall.SIGINT)

	r := s.row("started while the database is down")
	v := s.newService(c.url(database))
	reachable(v.port)
	ask := func(method, body string) int {
		response, err := quickClient.Do(newRequest(context.Background(), v.url(), "alice", method, "", body,
			time.Now().Add(time.Hour).Unix()))
		must(err)
		defer response.Body.Close()
		if r.requests++; response.StatusCode == http.StatusServiceUnavailable {
			if r.unavailable++; response.Header.Get("Retry-After") == "" {
				r.fault("a 503 without Retry-After")
			}
		} else {
			r.good++
		}
		return response.StatusCode
	}
	for range 20 {
		if status, took := v.get("/health"); status != http.StatusOK || took > time.Second {
			r.fault("/health: %d after %v", status, took)
		}
		if status, _ := v.get("/ready"); status != http.StatusServiceUnavailable {
			r.fault("/ready: %d", status)
		}
		if status := ask("POST", `{"title":"early"}`); status != http.StatusServiceUnavailable {
			r.fault("POST: %d", status)
		}
		time.Sleep(50 * time.Millisecond)
	}
	up := c.start()
	v.ready()
	if r.recovery = time.Since(up); r.recovery > 2*time.Second {
		r.fault("ready only after %v", r.recovery)
	}
	if status := ask("POST", `{"title":"first"}`); status != http.StatusCreated {
		r.fault("POST: %d", status)
	}
	v.stop(syscall.SIGTERM)
	if code := v.ProcessState.ExitCode(); code != 0 {
		r.fault("exit status %d", code)
	}

	r = s.row("wrong password, missing database, missing role")
	c.exec("postgres", "CREATE ROLE locked LOGIN PASSWORD 'right'")
	hba := "host all locked 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n"
	s.do("/bin/sh", "-c", fmt.Sprintf("printf '%s' >%s/data/pg_hba.conf", hba, c.folder))
	c.exec("postgres", "SELECT pg_reload_conf()")
	time.Sleep(100 * time.Millisecond)
	for _, text := range []string{
		fmt.Sprintf("postgres://locked:unsaid-word@127.0.0.1:%d/%s?sslmode=disable", c.port, database),
		c.url("nowhere"),
		fmt.Sprintf("postgres://nobody-there:unsaid-word@127.0.0.1:%d/%s?sslmode=disable", c.port, database),
	} {
		v := s.newService(text)
		select {
		case <-v.done:
		case <-time.After(5 * time.Second):
			r.fault("still runs: %s", v.output())
			v.stop(syscall.SIGKILL)
		}
		if code := v.ProcessState.ExitCode(); code != 1 {
			r.fault("exit status %d: %s", code, v.output())
		}
		if strings.Contains(v.output(), "unsaid-word") || !strings.Contains(v.output(), "taskflow: database: ") {
			r.fault("says: %s", v.output())
		}
	}
}

// A pair is a primary and its synchronous standby.
type pair struct{ primary, standby *cluster }

func (s *suite) newPair() pair {
	primary := s.newCluster("-c", "synchronous_standby_names=*", "-c", "synchronous_commit=local")
	standby := &cluster{s: s, folder: s.newFolder("standby"), port: freePort()}
	s.do(filepath.Join(s.bin, "pg_basebackup"), "-h", "127.0.0.1", "-p", fmt.Sprint(primary.port), "-U", "taskflow",
		"-D", standby.folder+"/data", "-R", "-X", "stream", "-c", "fast", "--no-sync")
	standby.start()
	for primary.number("postgres", "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	primary.exec("postgres", "CREATE DATABASE pair")
	primary.exec("postgres", "ALTER DATABASE pair SET synchronous_commit = on")
	return pair{primary, standby}
}

func (p pair) url() string {
	return fmt.Sprintf("postgres://taskflow@127.0.0.1:%d,127.0.0.1:%d/pair?sslmode=disable&target_session_attrs=read-write", p.primary.port,
		p.standby.port)
}

// promote makes the standby the primary and returns when it takes writes.
func (p pair) promote() time.Time {
	db := p.standby.open("postgres")
	defer db.Close()
	_, err := db.Exec("SELECT pg_promote(false)")
	must(err)
	for recovering := true; recovering; {
		must(db.QueryRow("SELECT pg_is_in_recovery()").Scan(&recovering))
	}
	return time.Now()
}

func failover(s *suite) {
	p := s.newPair()
	v := s.newService(p.url()).ready()
	r := s.row("primary killed, synchronous standby promoted 1 s later")
	l := workload(v.url(), "failover").run()
	time.Sleep(1500 * time.Millisecond)
	o := outage{from: time.Now()}
	p.primary.kill()
	time.Sleep(time.Second)
	o.until = p.promote()
	time.Sleep(4 * time.Second)
	l.finish(r, p.standby, "pair", o.excuses, v)
	l.recovered(r, o.until, 3*time.Second)
	l.judgeReady(r, o, 0, o.from, o.until)
}

// synchronous loses the standby first: a write that is only on the primary must not be acknowledged,
// since the primary may be lost next.
func synchronous(s *suite) {
	p := s.newPair()
	v := s.newService(p.url()).ready()
	r := s.row("synchronous standby killed, then primary, promoted")
	l := workload(v.url(), "sync").run()
	time.Sleep(time.Second)
	o := outage{from: time.Now()}
	p.standby.kill()
	time.Sleep(2*patience + time.Second/2)
	p.primary.kill()
	p.standby.start()
	o.until = p.promote()
	time.Sleep(2 * time.Second)
	l.finish(r, p.standby, "pair", o.excuses, v)
	l.recovered(r, o.until, 3*time.Second)
}

// hangingPrimary has the first host accept connections and say nothing. What must hold is that nobody
// waits too long, nothing is lost, and service comes back; how soon depends on connect timeouts.
func hangingPrimary(s *suite) {
	p := s.newPair()
	v := s.newService(p.url()).ready()
	r := s.row("primary hangs, synchronous standby promoted")
	l := workload(v.url(), "hanging").run()
	time.Sleep(time.Second)
	o := outage{from: time.Now()}
	p.primary.signalAll(syscall.SIGSTOP)
	time.Sleep(500 * time.Millisecond)
	promoted := p.promote()
	o.until = promoted.Add(2 * longest)
	time.Sleep(time.Until(o.until.Add(3 * time.Second)))
	l.finish(r, p.standby, "pair", o.excuses, v)
	l.recovered(r, promoted, 2*longest)
	last := promoted
	for _, x := range l.samples {
		if x.status == http.StatusServiceUnavailable && x.start.After(last) {
			last = x.start
		}
	}
	r.note("the last request to fail began %.1f s after the promotion", last.Sub(promoted).Seconds())
	p.primary.kill()
}
