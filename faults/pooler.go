package main

import (
	"fmt"
	"syscall"
	"time"
)

// Issue 5, item 5: PgBouncer. The service is never told of it.

func pgbouncer(s *suite) {
	c := s.newCluster()
	s.pooler(c, "PgBouncer, transaction mode, 200 requests on 4", "transaction", "", 200, 0, nil)
	s.pooler(c, "the same; clients hang up", "transaction", "", 100, 5*time.Millisecond, func(l *load, _ *int) {
		for range 20 {
			l.hangUp(20, 5*time.Millisecond)
			sleep(l.ctx, 50*time.Millisecond)
		}
	})
	s.pooler(c, "PgBouncer, short-lived server connections, DISCARD", "transaction",
		"server_lifetime = 0\nserver_reset_query = DISCARD ALL\nserver_reset_query_always = 1", 16, 5*time.Millisecond, nil)
	s.pooler(c, "PgBouncer, statement mode", "statement", "", 60, 5*time.Millisecond, nil)
	s.pooler(c, "PgBouncer, session mode", "session", "default_pool_size = 20\nserver_reset_query = DISCARD ALL", 60, 5*time.Millisecond,
		nil)
	// PgBouncer takes a connection that PAUSE ends while it logs in for a failed login, and waits before it tries again.
	s.pooler(c, "PgBouncer, PAUSE, RESUME, RECONNECT", "transaction", "server_login_retry = 0.1", 60, 5*time.Millisecond,
		func(_ *load, port *int) {
			console := *c
			console.port = *port
			for range 3 {
				time.Sleep(300 * time.Millisecond)
				console.exec("pgbouncer", "PAUSE")
				time.Sleep(300 * time.Millisecond)
				console.exec("pgbouncer", "RESUME")
				time.Sleep(300 * time.Millisecond)
				console.exec("pgbouncer", "RECONNECT")
			}
		})
}

// pooler puts load on a service behind a PgBouncer, and has act disturb it.
func (s *suite) pooler(c *cluster, what, mode, more string, workers int, pause time.Duration, act func(l *load, port *int)) {
	name := fmt.Sprintf("pooler%d", len(s.rows))
	database := c.newDatabase(name)
	port := freePort()
	p := s.pgbouncer(c, port, mode, more)
	size := min(workers, 16)
	if pause == 0 {
		size = workers
	}
	v := s.newService(fmt.Sprintf("postgres://taskflow@127.0.0.1:%d/%s?sslmode=disable", port, database),
		fmt.Sprintf("DB_POOL_SIZE=%d", size)).ready()
	c.longList(database, 3000, 400)
	r := s.row(what)
	l := &load{base: v.url(), name: name, workers: workers, users: 20, pause: pause, long: 3000}
	l.run()
	if act != nil {
		act(l, &port)
	}
	time.Sleep(2500 * time.Millisecond)
	l.finish(r, c, database, never, v)
	v.stop(syscall.SIGTERM)
	p.stop(syscall.SIGKILL)
}

// switched moves the address of the database under the service: from PostgreSQL to a PgBouncer, which
// then dies and comes back, and to PostgreSQL again.
func switched(s *suite) {
	c := s.newCluster()
	database := c.newDatabase("switched")
	port := freePort()
	f := newForwarder(c.port)
	p := s.pgbouncer(c, port, "transaction", "")
	v := s.newService(fmt.Sprintf("postgres://taskflow@127.0.0.1:%d/%s?sslmode=disable", f.port(), database)).ready()
	for _, step := range []struct {
		what, name string
		act        func()
	}{
		{"the address leads to PgBouncer, old connections stay", "stay", func() { f.aim(port, false) }},
		{"old connections are cut", "cut", func() { f.aim(port, true) }},
		{"PgBouncer killed (-9) and started", "dies", func() {
			p.stop(syscall.SIGKILL)
			time.Sleep(300 * time.Millisecond)
			p = s.pgbouncer(c, port, "transaction", "")
		}},
		{"and back to PostgreSQL, old connections are cut", "back", func() { f.aim(c.port, true) }},
	} {
		r := s.row(step.what)
		l := workload(v.url(), step.name)
		l.pause = 2 * time.Millisecond
		l.run()
		time.Sleep(500 * time.Millisecond)
		o := outage{from: time.Now()}
		step.act()
		o.until = time.Now()
		time.Sleep(2 * time.Second)
		l.finish(r, c, database, o.excuses, v)
		l.recovered(r, o.until, 3*time.Second)
	}
}
