package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Issue 5, item 4: several replicas.

func rollingRestart(s *suite) {
	c := s.newCluster()
	database := c.newDatabase("rolling")
	replicas := []*service{s.newService(c.url(database)), s.newService(c.url(database))}
	for _, v := range replicas {
		v.ready()
	}
	c.longList(database, 3000, 400)
	base, balances := s.haproxy(replicas...)
	time.Sleep(time.Second)
	r := s.row("two replicas behind HAProxy restarted in turn, twice")
	l := workload(base, "rolling")
	l.long = 3000
	l.run()
	for range 2 {
		for _, v := range replicas {
			time.Sleep(500 * time.Millisecond)
			v.drain(r)
			v.start()
			v.ready()
			balances(v)
		}
	}
	l.finish(r, c, database, never, replicas...)
}

// drain stops a replica and looks how: not ready at once, still answering and closing for about a
// second, and then gone with exit status 0.
func (v *service) drain(r *row) {
	must(v.Process.Signal(syscall.SIGTERM))
	time.Sleep(100 * time.Millisecond)
	if status, _ := v.get("/ready"); status != http.StatusServiceUnavailable {
		r.fault("/ready while stopping: %d", status)
	}
	client := &http.Client{Transport: &http.Transport{}}
	if response, err := client.Get(v.url() + "/health"); err != nil || !response.Close {
		r.fault("while stopping: an answer without Connection: close, or none: %v", err)
	}
	start := time.Now()
	select {
	case <-v.done:
	case <-time.After(10 * time.Second):
		r.fault("still there 10 s after SIGTERM")
		v.stop(syscall.SIGKILL)
	}
	if took := time.Since(start); v.ProcessState.ExitCode() != 0 || took < 500*time.Millisecond {
		r.fault("stopped after %v with %v: %s", took, v.ProcessState, v.output())
	}
}

func tenReplicas(s *suite) {
	c := s.newCluster()
	r := s.row("ten replicas start on an empty database, three times")
	for round := range 3 {
		database := c.newDatabase(fmt.Sprintf("ten%d", round))
		replicas := []*service{}
		began := time.Now()
		for range 10 {
			replicas = append(replicas, s.newService(c.url(database), "DB_POOL_SIZE=4"))
		}
		var all sync.WaitGroup
		for n, v := range replicas {
			all.Go(func() {
				defer func() {
					if cause := recover(); cause != nil {
						r.fault("replica %d: %v", n, cause)
					}
				}()
				v.ready()
			})
		}
		all.Wait()
		r.longest = max(r.longest, time.Since(began))
		l := workload(replicas[round].url(), "ten")
		l.run()
		time.Sleep(300 * time.Millisecond)
		l.finish(r, c, database, never, replicas...)
		for _, v := range replicas {
			v.stop(syscall.SIGKILL)
		}
	}
}

// races has many ask three replicas for what only one may have.
func races(s *suite) {
	c := s.newCluster()
	database := c.newDatabase("races")
	replicas := []*service{s.newService(c.url(database)).ready(), s.newService(c.url(database)).ready(),
		s.newService(c.url(database)).ready()}
	r := s.row("three replicas race: If-Match, Idempotency-Key")
	expiry := time.Now().Add(time.Hour).Unix()
	// race sends a request twelve times at once and returns the answers by status.
	race := func(method, path, body string, header ...string) map[int][]task {
		var mu sync.Mutex
		var all sync.WaitGroup
		found := map[int][]task{}
		for i := range 12 {
			all.Go(func() {
				response, err := quickClient.Do(newRequest(context.Background(), replicas[i%3].url(), "racer", method, path,
					strings.ReplaceAll(body, "@", strconv.Itoa(i)), expiry, header...))
				mu.Lock()
				defer mu.Unlock()
				if r.requests++; err != nil {
					r.fault("%s: %v", method, err)
					return
				}
				defer response.Body.Close()
				var t task
				text, _ := io.ReadAll(response.Body)
				_ = json.Unmarshal(text, &t)
				found[response.StatusCode] = append(found[response.StatusCode], t)
			})
		}
		all.Wait()
		return found
	}
	for round := range 30 {
		made := race("POST", "", fmt.Sprintf(`{"title":"race %d"}`, round), "Idempotency-Key",
			fmt.Sprintf("race-%d", round))[http.StatusCreated]
		for _, t := range made {
			if t.ID != made[0].ID {
				r.doubled++
				r.fault("one key made the tasks %d and %d", made[0].ID, t.ID)
			}
		}
		if r.good += len(made); len(made) != 12 {
			r.fault("%d of 12 repeats were acknowledged", len(made))
			continue
		}
		path := fmt.Sprintf("/%d", made[0].ID)
		response, err := quickClient.Do(newRequest(context.Background(), replicas[0].url(), "racer", "GET", path, "", expiry))
		must(err)
		response.Body.Close()
		etag := response.Header.Get("ETag")
		won := race("PATCH", path, `{"description":"by @"}`, "If-Match", etag)
		if r.good += len(won[200]); len(won[200]) != 1 || len(won[412]) != 11 {
			r.fault("If-Match: %d changed it, %d were refused", len(won[200]), len(won[412]))
		}
		gone := race("DELETE", path, "")
		if r.good += len(gone[204]); len(gone[204]) != 1 || len(gone[404]) != 11 {
			r.fault("DELETE: %d deleted it, %d found nothing", len(gone[204]), len(gone[404]))
		}
	}
	if n := c.number(database, "SELECT count(*) FROM tasks"); n != 0 {
		r.fault("%d tasks are left", n)
	}
	r.note("12 at once, 30 times each; who did not win got 412 or 404")
}
