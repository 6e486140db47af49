package main

import (
	"bufio"
	"context"
	"database/sql"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// More than the service can do, and clients that misbehave.

const (
	memoryLimit = 200 // MiB
	stuck       = `SELECT count(*) FROM pg_stat_activity WHERE application_name = 'taskflow' AND wait_event_type = 'Lock'`
	connected   = `SELECT count(*) FROM pg_stat_activity WHERE application_name = 'taskflow'`
)

// small starts a service with a pool of 5 on a cluster and database of its own.
func (s *suite) small(name string) (*cluster, *service) {
	c := s.newCluster()
	return c, s.newService(c.url(c.newDatabase(name)), "DB_POOL_SIZE=5").ready()
}

// checkMemory notes how much memory the service has needed.
func (v *service) checkMemory(r *row) {
	if r.note("%d MiB", v.memory()); v.memory() > memoryLimit {
		r.fault("memory: %d MiB", v.memory())
	}
}

func overload(s *suite) {
	c, v := s.small("overload")
	r := s.row("300 busy connections on a pool of 5")
	l := &load{base: v.url(), name: "busy", workers: 300, users: 30}
	l.run()
	time.Sleep(5 * time.Second)
	l.finish(r, c, "overload", always, v)
	v.checkMemory(r)

	r = s.row("2,000 idle connections beside the usual load")
	l = workload(v.url(), "idle").run()
	conns := l.idle(strings.TrimPrefix(v.url(), "http://"), 2000)
	time.Sleep(2 * time.Second)
	for _, conn := range conns {
		must(conn.SetReadDeadline(time.Now().Add(time.Second)))
		if response, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || response.StatusCode != http.StatusOK {
			r.fault("an idle connection: %v", err)
		}
		conn.Close()
	}
	l.finish(r, c, "overload", never, v)
	v.checkMemory(r)

	r = s.row("/ready asked by 100 at once, /health always")
	calls := `SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE query LIKE '%to_regclass%' AND query NOT LIKE '%DO $$%'`
	c.exec("overload", "CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
	before := c.number("overload", calls)
	var mu sync.Mutex
	var all sync.WaitGroup
	began := time.Now()
	for range 100 {
		all.Go(func() {
			for time.Since(began) < 3*time.Second {
				status, took := v.get("/ready")
				mu.Lock()
				r.requests++
				if r.longest = max(r.longest, took); status == http.StatusOK {
					r.good++
				} else {
					r.fault("/ready: %d", status)
				}
				mu.Unlock()
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	all.Wait()
	if asked := c.number("overload", calls) - before; asked < 1 || asked > 8 {
		r.fault("asked the database %d times in 3 s", asked)
	} else {
		r.note("asked the database %d times in 3 s", asked)
	}
}

// hold keeps a lock until the function it returns is called.
func (c *cluster) hold(database, statement string) (release func()) {
	db := c.open(database)
	tx, err := db.BeginTx(context.Background(), &sql.TxOptions{})
	must(err)
	_, err = tx.Exec(statement)
	must(err)
	return func() { _ = tx.Rollback(); db.Close() }
}

func locked(s *suite) {
	c, v := s.small("locked")
	r := s.row("300 busy connections, the table locked for 5 s")
	l := &load{base: v.url(), name: "locked", workers: 300, users: 30, pause: 50 * time.Millisecond}
	l.run()
	time.Sleep(time.Second)
	release := c.hold("locked", "LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
	time.Sleep(5 * time.Second)
	release()
	up := time.Now()
	time.Sleep(4 * time.Second)
	l.finish(r, c, "locked", func(x sample) bool { return x.start.Before(up.Add(2 * time.Second)) }, v)
	l.recovered(r, up, 2*time.Second)
	v.checkMemory(r)
	if n := c.number("locked", connected); n > 6 {
		r.fault("%d connections to the database", n)
	}
}

// flood has one user ask for more than there is, while the others go about their business.
func flood(s *suite) {
	c, v := s.small("flood")
	for _, kind := range []string{"one user's 300 requests wait for a lock", "one user's 100 connections, busy all the time"} {
		r := s.row(kind)
		name := fmt.Sprintf("flood%d", len(s.rows))
		l := workload(v.url(), name)
		l.workers, l.pause = 10, 10*time.Millisecond
		ctx, cancel := context.WithCancel(context.Background())
		var all sync.WaitGroup
		expiry := time.Now().Add(time.Hour).Unix()
		client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 500}}
		flooding := func(n int, method, path, body string) {
			for range n {
				all.Go(func() {
					for ctx.Err() == nil {
						if response, err := client.Do(newRequest(ctx, v.url(), "greedy", method, path, body, expiry)); err == nil {
							_, _ = io.Copy(io.Discard, response.Body)
							response.Body.Close()
						}
					}
				})
			}
		}
		if strings.Contains(kind, "lock") {
			c.exec("flood", "INSERT INTO tasks (id, user_id, title) VALUES (1000000, 'greedy', 'base')")
			release := c.hold("flood", "SELECT FROM tasks WHERE id = 1000000 FOR UPDATE")
			defer release()
			flooding(300, "PATCH", "/1000000", `{"is_completed":true}`)
		} else {
			c.exec("flood", "INSERT INTO tasks (user_id, title, description) "+
				"SELECT 'greedy', 'base', repeat('x', 400) FROM generate_series(1, 1000)")
			flooding(100, "GET", "?limit=1000&sort_by=title", "")
		}
		time.Sleep(300 * time.Millisecond)
		l.run()
		time.Sleep(3 * time.Second)
		l.finish(r, c, "flood", never, v)
		cancel()
		all.Wait()
		times := []time.Duration{}
		for _, x := range l.samples {
			times = append(times, x.took())
		}
		slices.Sort(times)
		if p95 := times[len(times)*95/100]; p95 > 500*time.Millisecond {
			r.fault("the others wait for %v at p95", p95)
		} else {
			r.note("the others' p95 %.0f ms", float64(p95.Microseconds())/1000)
		}
	}
}

// memory has one user take what memory they can: with pages of large tasks and lists that are never read, and with bodies that
// never end.
func memory(s *suite) {
	c, v := s.small("memory")
	c.exec("memory", "INSERT INTO tasks (user_id, title, description) SELECT 'greedy', 'base', repeat('x', 1040000) "+
		"FROM generate_series(1, 12)")
	expiry := time.Now().Add(time.Hour).Unix()
	head := "Host: x\r\nAuthorization: Bearer " + token("greedy", expiry) + "\r\n"
	for i, attack := range []struct {
		what    string
		clients int
		request string
	}{
		{"300 pages of large tasks, never read, of one user", 300, "GET /api/greedy/tasks?limit=1000 HTTP/1.1\r\n" + head + "\r\n"},
		{"300 lists of large tasks, never read, of one user", 300, "GET /api/greedy/tasks HTTP/1.1\r\n" + head + "\r\n"},
		{"600 bodies of 1 MiB that never end, of one user", 600, "POST /api/greedy/tasks HTTP/1.1\r\n" + head +
			"Content-Length: 1048576\r\n\r\n" +
			`{"title":"x","description":"` + strings.Repeat("x", 1040000)},
	} {
		r := s.row(attack.what)
		name := fmt.Sprintf("memory%d", i)
		l := workload(v.url(), name)
		l.workers, l.pause = 10, 10*time.Millisecond
		l.run()
		var conns []net.Conn
		for range attack.clients {
			conn, err := net.Dial("tcp", strings.TrimPrefix(v.url(), "http://"))
			must(err)
			go func() { _, _ = io.WriteString(conn, attack.request) }()
			conns = append(conns, conn)
		}
		time.Sleep(6 * time.Second)
		l.finish(r, c, "memory", never, v)
		v.checkMemory(r)
		for _, conn := range conns {
			conn.Close()
		}
		began := time.Now()
		response, err := http.DefaultClient.Do(newRequest(context.Background(), v.url(), "greedy", "GET", "?limit=1", "", expiry))
		if must(err); response.StatusCode != http.StatusOK || time.Since(began) > time.Second {
			r.fault("afterwards the user gets %s in %v", response.Status, time.Since(began))
		}
		response.Body.Close()
		l.p99(r)
	}
}

// p99 checks that the others notice nothing of one user's flood.
func (l *load) p99(r *row) {
	times := []time.Duration{}
	for _, x := range l.samples {
		times = append(times, x.took())
	}
	slices.Sort(times)
	if p99 := times[len(times)*99/100]; p99 > time.Second {
		r.fault("the others wait for %v at p99", p99)
	} else {
		r.note("the others' p99 %.0f ms", float64(p99.Microseconds())/1000)
	}
}

// lostCancels has statements of all kinds wait for a lock behind a network that loses cancel requests: the server itself
// must end them.
func lostCancels(s *suite) {
	c := s.newCluster()
	database := c.newDatabase("cancels")
	f := newForwarder(c.port)
	f.deaf = true
	v := s.newService(fmt.Sprintf("postgres://taskflow@127.0.0.1:%d/%s?sslmode=disable", f.port(), database), "DB_POOL_SIZE=10").ready()
	c.exec(database, "INSERT INTO tasks (id, user_id, title) SELECT 1000000 + n, 'user-' || n, 'base' FROM generate_series(0, 39) n")
	r := s.row("40 statements wait for a lock, cancel requests are lost")
	release := c.hold(database, "LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
	expiry := time.Now().Add(time.Hour).Unix()
	began := time.Now()
	var all sync.WaitGroup
	for i := range 40 {
		all.Go(func() {
			method := []string{"GET", "POST", "PATCH", "DELETE", "GET"}[i%5]
			path := []string{fmt.Sprintf("/%d", 1000000+i), "", fmt.Sprintf("/%d", 1000000+i), fmt.Sprintf("/%d", 1000000+i), "?limit=5"}[i%5]
			body := map[string]string{"POST": `{"title":"x"}`, "PATCH": `{"title":"x"}`}[method]
			var header []string
			if i%2 > 0 {
				header = map[string][]string{"POST": {"Idempotency-Key", "k"}, "PATCH": {"If-Match", "*"}, "DELETE": {"If-Match", `"x"`}}[method]
			}
			response, err := http.DefaultClient.Do(newRequest(context.Background(), v.url(), fmt.Sprintf("user-%d", i),
				method, path, body, expiry, header...))
			if must(err); response.StatusCode != http.StatusServiceUnavailable {
				r.fault("%s %s: %s", method, path, response.Status)
			}
			response.Body.Close()
		})
	}
	all.Wait()
	for c.number(database, stuck) > 0 && time.Since(began) < 20*time.Second {
		time.Sleep(10 * time.Millisecond)
	}
	if took := time.Since(began); took > patience+2*time.Second {
		r.fault("a statement ran on for %v", took)
	} else {
		r.note("all ended after %.1f s", took.Seconds())
	}
	release()
	l := workload(v.url(), "cancels").run()
	time.Sleep(time.Second)
	l.finish(r, c, database, never, v)
}

// hangUps has clients go away while their statements wait.
func hangUps(s *suite) {
	c, v := s.small("hangups")
	r := s.row("100 clients hang up while their statements wait")
	release := c.hold("hangups", "LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
	expiry := time.Now().Add(time.Hour).Unix()
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	client := &http.Client{Transport: &http.Transport{}}
	for i := range 100 {
		all.Go(func() {
			r := newRequest(ctx, v.url(), fmt.Sprintf("user-%d", i), "POST", "", fmt.Sprintf(`{"title":"gone %d"}`, i), expiry)
			if response, err := client.Do(r); err == nil {
				response.Body.Close()
			}
		})
	}
	time.Sleep(500 * time.Millisecond)
	waiting := c.number("hangups", stuck)
	cancel()
	all.Wait()
	gone := time.Now()
	for c.number("hangups", stuck) > 0 && time.Since(gone) < 5*time.Second {
		time.Sleep(10 * time.Millisecond)
	}
	if r.recovery = time.Since(gone); waiting < 2 || waiting > 5 || r.recovery > time.Second {
		r.fault("%d statements waited, and were cancelled after %v", waiting, r.recovery)
	}
	release()
	l := workload(v.url(), "hangups").run()
	for range 30 {
		l.hangUp(20, 3*time.Millisecond)
		time.Sleep(50 * time.Millisecond)
	}
	l.finish(r, c, "hangups", never, v)
	if n := c.number("hangups", connected); n > 6 {
		r.fault("%d connections to the database", n)
	}
	if n := c.number("hangups", "SELECT count(*) FROM tasks WHERE title LIKE 'gone %'"); n > 0 {
		r.fault("%d tasks of clients that had gone", n)
	}
}

// slow has slow senders, slow readers, and readers that read nothing hold what they can.
func slow(s *suite) {
	c, v := s.small("slow")
	const tasks = 30000
	c.longList("slow", tasks, 600)
	r := s.row("100 slow senders, 60 slow readers, for 100 s")
	address, expiry := strings.TrimPrefix(v.url(), "http://"), time.Now().Add(time.Hour).Unix()
	began := time.Now()
	var mu sync.Mutex
	var all sync.WaitGroup
	fault := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		r.fault(format, args...)
	}
	open := func(method, user, header string) *net.TCPConn {
		conn, err := net.Dial("tcp", address)
		must(err)
		must(conn.(*net.TCPConn).SetReadBuffer(16 << 10))
		must(conn.SetReadDeadline(began.Add(120 * time.Second)))
		_, err = fmt.Fprintf(conn, "%s /api/%s/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n%s\r\n", method, user,
			token(user, expiry), header)
		must(err)
		return conn.(*net.TCPConn)
	}
	for i := range 100 {
		all.Go(func() { // a byte now and then; the service must end it after 30 s
			conn := open("POST", fmt.Sprintf("user-%d", i), "Content-Length: 1000\r\n")
			defer conn.Close()
			go func() {
				for range 400 {
					if _, err := io.WriteString(conn, "{"); err != nil {
						return
					}
					time.Sleep(500 * time.Millisecond)
				}
			}()
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if took := time.Since(began); err != nil || took < 28*time.Second || took > 34*time.Second {
				fault("a slow sender: %v after %v", err, took)
			} else if response.StatusCode/100 != 4 {
				fault("a slow sender is told %s", response.Status)
			}
		})
	}
	for i := range 60 {
		all.Go(func() { // each with a list that is far beyond what the kernel takes off the service
			conn := open("GET", "long", "")
			defer conn.Close()
			reader := bufio.NewReader(conn)
			response, err := http.ReadResponse(reader, nil)
			if err != nil {
				fault("a slow reader: %v", err)
				return
			}
			if i%2 == 0 { // reads some now and then, and must get on
				for time.Since(began) < 75*time.Second && err == nil {
					_, err = io.CopyN(io.Discard, response.Body, 20<<10)
					time.Sleep(100 * time.Millisecond)
				}
				if err != nil {
					fault("a slow reader was cut off after %v: %v", time.Since(began), err)
				}
				return
			}
			time.Sleep(time.Until(began.Add(100 * time.Second))) // reads nothing; kernels take some for it, but not for ever
			if n, err := io.Copy(io.Discard, response.Body); err == nil {
				fault("a reader that read nothing for 100 s got all %d bytes", n)
			}
		})
	}
	time.Sleep(time.Second)
	l := workload(v.url(), "slow")
	l.workers, l.pause = 6, 50*time.Millisecond
	l.run()
	time.Sleep(5 * time.Second)
	if n := c.number("slow", connected+" AND (state LIKE 'idle in%' OR now() - query_start > '2 s' AND state = 'active')"); n > 0 {
		r.fault("%d connections to the database are held", n)
	}
	time.Sleep(time.Until(began.Add(35 * time.Second)))
	l.finish(r, c, "slow", never, v)
	all.Wait()
	v.checkMemory(r)
}
