package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// This file is the mixed load, and the oracle: it knows what the service has acknowledged, judges
// each answer, and at the end compares what the database holds with what it must hold.

// A load is users at work. Each worker changes tasks of its own, so that it knows what they are.
type load struct {
	base    string
	name    string // begins every title, so that loads tell their tasks apart
	workers int
	users   int
	pause   time.Duration // of a worker between requests
	long    int           // tasks that the user long has; 0: no long lists
	unkeyed bool          // no POST with Idempotency-Key

	client   *http.Client
	watching *http.Client // for /health and /ready
	expiry   int64
	ctx      context.Context
	stop     func()
	wg       sync.WaitGroup

	mu      sync.Mutex
	samples []sample
	ready   []sample
	health  []sample
	records []*record
	faults  []string
	stall   time.Duration // the longest that this machine kept the suite itself waiting; never blamed on the service
}

// A sample is a request and how it ended.
type sample struct {
	what       string
	start, end time.Time
	status     int  // 0: no answer
	cut        bool // the answer began, and broke off
}

func (x sample) took() time.Duration { return x.end.Sub(x.start) }

func (x sample) String() string {
	return fmt.Sprintf("%s at %s: %d after %.2f s", x.what, x.start.Format("05.000"), x.status, x.took().Seconds())
}

// A record is a task as the oracle knows it.
type record struct {
	user, title, key string
	id               int64   // 0 until acknowledged
	states           []state // what it may be; one as long as nothing is in doubt
	keep             bool    // a POST of it is in doubt, and after a DELETE could make it again
}

type state struct {
	gone        bool
	description string
	completed   bool
}

type task struct {
	ID          int64   `json:"id"`
	UserID      string  `json:"user_id"`
	Title       string  `json:"title"`
	Description *string `json:"description"`
	IsCompleted bool    `json:"is_completed"`
}

func (t task) state() state {
	if t.Description == nil {
		return state{completed: t.IsCompleted}
	}
	return state{description: *t.Description, completed: t.IsCompleted}
}

// run starts the load; end stops it and waits for what is under way.
func (l *load) run() *load {
	transport := func() *http.Client {
		return &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConns: 2000, MaxIdleConnsPerHost: 2000}}
	}
	l.client, l.watching, l.expiry = transport(), transport(), time.Now().Add(time.Hour).Unix()
	l.ctx, l.stop = context.WithCancel(context.Background())
	l.wg.Go(func() {
		for l.ctx.Err() == nil {
			start := time.Now()
			time.Sleep(5 * time.Millisecond)
			l.stall = min(max(l.stall, time.Since(start)-10*time.Millisecond), time.Second)
		}
	})
	for n := range l.workers {
		l.wg.Go(func() { l.worker(n) })
	}
	if l.long > 0 {
		l.wg.Go(func() {
			for l.ctx.Err() == nil {
				l.longList()
				sleep(l.ctx, 100*time.Millisecond)
			}
		})
	}
	watch := func(path string, period time.Duration, samples *[]sample) {
		for l.ctx.Err() == nil {
			x := sample{what: path, start: time.Now()}
			if response, err := l.watching.Get(l.base + path); err == nil {
				_, _ = io.Copy(io.Discard, response.Body)
				response.Body.Close()
				x.status = response.StatusCode
			}
			x.end = time.Now()
			l.mu.Lock()
			*samples = append(*samples, x)
			l.mu.Unlock()
			sleep(l.ctx, period)
		}
	}
	l.wg.Go(func() { watch("/health", 10*time.Millisecond, &l.health) })
	for range 5 { // several at once, so that a queue behind a hanging database shows
		l.wg.Go(func() { watch("/ready", 50*time.Millisecond, &l.ready) })
	}
	return l
}

func (l *load) end() {
	l.stop()
	l.wg.Wait()
	l.client.CloseIdleConnections()
	l.watching.CloseIdleConnections()
}

func (l *load) fault(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults = append(l.faults, fmt.Sprintf(format, args...))
}

// token makes the token of a user.
func token(user string, expiry int64) string {
	encode := base64.RawURLEncoding.EncodeToString
	text := encode([]byte(`{"alg":"HS256"}`)) + "." + encode(fmt.Appendf(nil, `{"sub":%q,"exp":%d}`, user, expiry))
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(text))
	return text + "." + encode(mac.Sum(nil))
}

// newRequest makes a request of a user. header has names and values.
func newRequest(ctx context.Context, base, user, method, path, body string, expiry int64, header ...string) *http.Request {
	r, err := http.NewRequestWithContext(ctx, method, base+"/api/"+user+"/tasks"+path, strings.NewReader(body))
	must(err)
	if body == "" {
		r.Body, r.GetBody = http.NoBody, nil
	}
	r.Header.Set("Authorization", "Bearer "+token(user, expiry))
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return r
}

// send sends a request and keeps how it ended.
func (l *load) send(what, user, method, path, body string, header ...string) (status int, answer []byte) {
	connections := 0
	ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connections++ }})
	x := sample{what: what, start: time.Now()}
	response, err := l.client.Do(newRequest(ctx, l.base, user, method, path, body, l.expiry, header...))
	if err == nil {
		x.status = response.StatusCode
		if answer, err = io.ReadAll(response.Body); err != nil {
			x.cut = true
		}
		response.Body.Close()
	}
	x.end = time.Now()
	if connections > 1 {
		l.fault("%v: the connection was dropped, and net/http tried again", x)
	}
	if x.status == http.StatusServiceUnavailable &&
		(response.Header.Get("Retry-After") == "" || !bytes.HasPrefix(answer, []byte(`{"detail":`))) {
		l.fault("%v: a 503 without Retry-After or detail: %s", x, answer)
	}
	if x.status != 503 && x.status/100 != 2 && x.status != 0 {
		l.fault("%v: %.200s", x, answer)
	} else if x.status == 0 {
		l.fault("%v: %v", x, err)
	}
	l.mu.Lock()
	l.samples = append(l.samples, x)
	l.mu.Unlock()
	if x.cut {
		return 0, nil
	}
	return x.status, answer
}

func (l *load) worker(n int) {
	rng := rand.New(rand.NewPCG(uint64(n), 7))
	user := fmt.Sprintf("user-%d", n%l.users)
	var live []*record // acknowledged, and nothing in doubt
	for i := 0; l.ctx.Err() == nil; i++ {
		dice, at := rng.IntN(100), 0
		if len(live) > 0 {
			at = rng.IntN(len(live))
		}
		switch {
		case dice < 30 || len(live) == 0:
			r := &record{user: user, title: fmt.Sprintf("%s w%d n%d.", l.name, n, i), states: []state{{}}}
			if dice%2 == 0 && !l.unkeyed {
				r.key = "key of " + r.title
				r.key = strings.ReplaceAll(r.key, " ", "-")
			}
			l.mu.Lock()
			l.records = append(l.records, r)
			l.mu.Unlock()
			if l.create(r, dice%8 == 0) {
				live = append(live, r)
			}
		case dice < 50:
			old, fresh := live[at].states[0], state{description: fmt.Sprintf("changed %d", i), completed: dice%2 == 0}
			status, answer := l.send("PATCH", user, "PATCH", fmt.Sprintf("/%d", live[at].id),
				fmt.Sprintf(`{"description":%q,"is_completed":%t}`, fresh.description, fresh.completed))
			live[at].states = []state{fresh}
			if status == http.StatusOK {
				l.expect(live[at], answer)
			} else {
				live[at].states = []state{old, fresh}
			}
		case dice < 57 && !live[at].keep:
			status, _ := l.send("DELETE", user, "DELETE", fmt.Sprintf("/%d", live[at].id), "")
			if gone := (state{gone: true}); status == http.StatusNoContent {
				live[at].states = []state{gone}
			} else {
				live[at].states = append(live[at].states, gone)
			}
			live = slices.Delete(live, at, at+1)
			at = 0
		case dice < 65 && live[at].key != "": // a repeat, long after
			status, answer := l.send("POST keyed", user, "POST", "", live[at].body(), "Idempotency-Key", live[at].key)
			if status == http.StatusCreated {
				l.expect(live[at], answer)
			}
		case dice < 85:
			if status, answer := l.send("GET", user, "GET", fmt.Sprintf("/%d", live[at].id), ""); status == http.StatusOK {
				l.expect(live[at], answer)
			}
		default:
			l.list(live[at])
		}
		if at < len(live) && len(live[at].states) > 1 { // in doubt, and perhaps still to come: hands off
			live = slices.Delete(live, at, at+1)
		}
		sleep(l.ctx, l.pause)
	}
}

func (r *record) body() string { return fmt.Sprintf(`{"title":%q,"description":""}`, r.title) }

// create makes the record's task and reports whether that was acknowledged. With a key it goes on
// until it was; twice says to ask twice at once.
func (l *load) create(r *record, twice bool) bool {
	if r.key == "" {
		status, answer := l.send("POST", r.user, "POST", "", r.body())
		if status != http.StatusCreated {
			r.states = append(r.states, state{gone: true})
			return false
		}
		return l.expect(r, answer)
	}
	var answers [2][]byte
	for deadline := time.Now().Add(20 * time.Second); answers[0] == nil &&
		answers[1] == nil; sleep(context.Background(), 20*time.Millisecond) {
		var both sync.WaitGroup
		for i := range answers {
			both.Go(func() {
				if i == 0 || twice {
					if status, answer := l.send("POST keyed", r.user, "POST", "", r.body(), "Idempotency-Key",
						r.key); status == http.StatusCreated {
						answers[i] = answer
					} else {
						r.keep = true
					}
				}
			})
		}
		if both.Wait(); time.Now().After(deadline) {
			l.fault("%s: a POST with a key is never acknowledged", r.title)
			r.states = append(r.states, state{gone: true})
			return false
		}
	}
	good := true
	for _, answer := range answers {
		good = good && (answer == nil || l.expect(r, answer))
	}
	return good
}

// expect compares an answer with what the oracle knows of the task.
func (l *load) expect(r *record, answer []byte) bool {
	var t task
	if err := json.Unmarshal(answer, &t); err != nil {
		l.fault("%s: not a task: %.200s", r.title, answer)
		return false
	}
	if r.id == 0 {
		r.id = t.ID
	}
	if t.ID != r.id || t.UserID != r.user || t.Title != r.title || !slices.Contains(r.states, t.state()) {
		l.fault("%s: wrong answer: %.300s", r.title, answer)
		return false
	}
	return true
}

// list asks for a list that has just the record's task, and for the user's last.
func (l *load) list(r *record) {
	status, answer := l.send("list", r.user, "GET", "?search="+url.QueryEscape(r.title), "")
	var found []task
	if status == http.StatusOK && (json.Unmarshal(answer, &found) != nil || len(found) != 1 || found[0].ID != r.id ||
		found[0].UserID != r.user || found[0].state() != r.states[0]) {
		l.fault("%s: wrong list: %.300s", r.title, answer)
	}
	status, answer = l.send("list", r.user, "GET", "?limit=20&order=desc&sort_by=created_at", "")
	if status != http.StatusOK {
		return
	}
	found = nil
	if json.Unmarshal(answer, &found) != nil || slices.ContainsFunc(found, func(t task) bool { return t.UserID != r.user }) {
		l.fault("%s: another user's task in the list: %.300s", r.user, answer)
	}
}

func (l *load) longList() {
	status, answer := l.send("long list", "long", "GET", "", "")
	if status != http.StatusOK {
		return
	}
	var found []task
	if err := json.Unmarshal(answer, &found); err != nil || len(found) != l.long ||
		slices.ContainsFunc(found, func(t task) bool { return t.UserID != "long" }) ||
		!slices.IsSortedFunc(found, func(a, b task) int { return int(a.ID - b.ID) }) {
		l.fault("a long list is wrong: %d tasks, %v", len(found), err)
	}
}

// hangUp sends requests whose client goes away before the answer.
func (l *load) hangUp(n int, after time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), after)
	defer cancel()
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			r := newRequest(ctx, l.base, fmt.Sprintf("gone-%d", i), "GET", "?search=nothing", "", l.expiry)
			if response, err := l.client.Do(r); err == nil {
				response.Body.Close()
			}
		})
	}
	all.Wait()
}

// An outage is a time in which 503 is an answer. After until, every request that begins must succeed.
type outage struct{ from, until time.Time }

func (o outage) excuses(x sample) bool { return !x.start.After(o.until) && !x.end.Before(o.from) }

func never(sample) bool  { return false }
func always(sample) bool { return true }

// finish ends the load and puts it into a row of the table: each request must have ended in time, and
// well unless it is excused; the database must hold what was acknowledged; and the services must not
// have met a bug.
func (l *load) finish(r *row, c *cluster, database string, excused func(sample) bool, services ...*service) {
	l.end()
	l.judge(r, excused)
	l.compare(r, c, database)
	for _, v := range services {
		for line := range strings.SplitSeq(v.output(), "\n") {
			if strings.Contains(line, `"level":"ERROR"`) && !strings.Contains(line, `"status":200`) { // a long list cut off
				r.fault("in the log: %.400s", line)
			}
		}
	}
}

func (l *load) judge(r *row, excused func(sample) bool) {
	r.faults = append(r.faults, l.faults...)
	for _, x := range l.samples {
		r.requests++
		switch {
		case x.cut:
			if r.cut++; x.what != "long list" || !excused(x) {
				r.fault("%v: cut off", x)
			}
		case x.status/100 == 2:
			r.good++
		case x.status == http.StatusServiceUnavailable:
			if r.unavailable++; !excused(x) {
				r.fault("%v: nothing excuses it", x)
			}
		default:
			r.other++
		}
		if r.longest = max(r.longest, x.took()); x.took() > longest+l.stall && x.what != "long list" {
			r.fault("%v: too long", x)
		}
	}
	if l.stall > 200*time.Millisecond {
		r.note("the machine stalled for %.1f s", l.stall.Seconds())
	}
	if r.good == 0 {
		r.fault("not one request succeeded")
	}
	times := []time.Duration{}
	for _, x := range l.health {
		if times = append(times, x.took()); x.status != http.StatusOK {
			r.fault("%v", x)
		}
	}
	slices.Sort(times)
	if p99 := times[len(times)*99/100]; p99 > 200*time.Millisecond+l.stall {
		r.fault("/health at p99: %v", p99)
	}
	for _, x := range l.ready {
		if x.took() > readyPatience+l.stall {
			r.fault("%v: too long", x)
		}
	}
}

// recovered notes how long after up the first write succeeded, and expects it within limit.
func (l *load) recovered(r *row, up time.Time, limit time.Duration) {
	for _, x := range l.samples {
		if write := x.what[0] == 'P' || x.what[0] == 'D'; write && x.status/100 == 2 && x.end.After(up) &&
			(r.recovery == 0 || x.end.Sub(up) < r.recovery) {
			r.recovery = x.end.Sub(up)
		}
	}
	if r.recovery == 0 || r.recovery > limit+l.stall {
		r.fault("the first write after the outage came after %v", r.recovery)
	}
}

// judgeReady compares /ready with the truth: 503 from notice after down until the database is let up
// again, unless notice is 0, and 200 before the outage and from a second after it.
func (l *load) judgeReady(r *row, o outage, notice time.Duration, down, again time.Time) {
	for _, x := range l.ready {
		switch {
		case notice > 0 && x.start.After(down.Add(notice)) && x.end.Before(again) && x.status != http.StatusServiceUnavailable:
			r.fault("%v, while the database was down", x)
		case (x.end.Before(o.from) || x.start.After(o.until.Add(time.Second+l.stall))) && x.status != http.StatusOK:
			r.fault("%v, while the database was up", x)
		}
	}
}

// compare compares the database with what has been acknowledged.
func (l *load) compare(r *row, c *cluster, database string) {
	db := c.open(database)
	defer db.Close()
	for range 100 { // what was in doubt may still be on its way
		n := 0
		must(db.QueryRow(`SELECT count(*) FROM pg_stat_activity WHERE application_name = 'taskflow' AND state <> 'idle'`).Scan(&n))
		if n == 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	rows, err := db.Query(`SELECT id, user_id, title, coalesce(description, ''), is_completed FROM tasks WHERE title LIKE $1 || ' %'`,
		l.name)
	must(err)
	defer rows.Close()
	held := map[string][]task{}
	for rows.Next() {
		var t task
		must(rows.Scan(&t.ID, &t.UserID, &t.Title, &t.Description, &t.IsCompleted))
		held[t.Title] = append(held[t.Title], t)
	}
	must(rows.Err())
	for _, record := range l.records {
		found := held[record.title]
		delete(held, record.title)
		gone := slices.Contains(record.states, state{gone: true})
		switch {
		case len(found) > 1:
			r.doubled++
			r.fault("%s: there are %d", record.title, len(found))
		case len(found) == 0 && !gone:
			r.lost++
			r.fault("%s: lost", record.title)
		case len(found) == 1 &&
			(!slices.Contains(record.states, found[0].state()) || record.id != 0 && record.id != found[0].ID ||
				found[0].UserID != record.user):
			r.lost++
			r.fault("%s: is %+v, not of %+v", record.title, found[0].state(), record.states)
		}
	}
	for title := range held {
		r.fault("%s: nobody asked for it", title)
	}
}

// idle opens connections that ask once and then keep quiet.
func (l *load) idle(address string, n int) (conns []net.Conn) {
	for range n {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			_, err = io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
		}
		if err != nil {
			l.fault("idle connection %d: %v", len(conns), err)
			return conns
		}
		conns = append(conns, conn)
	}
	return conns
}
