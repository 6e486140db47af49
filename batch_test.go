package main

import (
	"context"
	"database/sql/driver"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// shareAll has n requests wait at the same moment, and lets them go as the batches they make.
func (b *batcher) shareAll(t testing.TB, n int, request func(i int)) {
	t.Helper()
	eventually(t, "nothing is under way", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		was := b.busy
		b.busy = true
		return !was
	})
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { request(i) })
	}
	eventually(t, "all wait", func() bool { return b.queue() == n })
	b.next()
	group.Wait()
}

func (b *batcher) queue() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.waiting)
}

func TestRequestsThatWaitShareAStatementAndGetTheirOwnAnswers(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s := newServiceWithin(t, database, 24, 10*time.Second)
	const n = maxBatch + 6
	user := func(i int) string { return fmt.Sprint("user ", i%7) }
	path := func(i int) string { return fmt.Sprintf("/api/user%%20%d/tasks", i%7) }
	texts := []string{`"`, `\`, `a,b`, `{}`, `NULL`, ``, ` `, `é€😀`, "\n\t\x7f", `null`}
	made := make([]taskJSON, n)
	s.store.creations.shareAll(t, n, func(i int) { // several are equal
		title, description := "title"+texts[i%len(texts)], []*string{nil, &texts[i%len(texts)]}[i%2]
		got := s.as(t, user(i), "POST", path(i), mustJSON(t, map[string]any{"title": title, "description": description}))
		made[i] = got.task(t)
		got.is(t, 201, mustJSON(t, taskJSON{made[i].ID, user(i), title, description, false, made[i].CreatedAt, made[i].CreatedAt}))
		if got.header.Get("Location") != fmt.Sprint(path(i), "/", made[i].ID) {
			t.Errorf("Location %q", got.header.Get("Location"))
		}
	})
	one := func(i int) string { return fmt.Sprint(path(i), "/", made[i].ID) }
	s.store.updates.shareAll(t, n, func(i int) {
		if i == 3 {
			s.as(t, user(i), "PATCH", path(i)+"/0", `{}`).is(t, 404, notFound)
			return
		}
		changes := map[string]any{}
		if i%3 == 0 {
			changes["title"] = texts[(i+1)%len(texts)] + "!"
		}
		if i%4 < 2 {
			changes["description"] = []any{texts[(i+2)%len(texts)], nil}[i%4]
		}
		if i%5 < 2 {
			changes["is_completed"] = i%5 == 0
		}
		was, before := made[i].UpdatedAt, mustJSON(t, made[i])
		got := s.as(t, user(i), "PATCH", one(i), mustJSON(t, changes))
		must(0, json.Unmarshal([]byte(mustJSON(t, changes)), &made[i]))
		same := mustJSON(t, made[i]) == before
		made[i].UpdatedAt = got.task(t).UpdatedAt
		got.is(t, 200, mustJSON(t, made[i]))
		if made[i].UpdatedAt < was || same != (made[i].UpdatedAt == was) {
			t.Errorf("%v: updated_at %s, then %s", changes, was, made[i].UpdatedAt)
		}
	})
	s.store.reads.shareAll(t, n, func(i int) {
		switch i {
		case 3:
			s.as(t, user(i), "GET", path(i)+"/0", "").is(t, 404, notFound)
		case 4:
			s.as(t, user(i), "GET", fmt.Sprint(path(i), "/", made[5].ID), "").is(t, 404, notFound)
		default:
			s.as(t, user(i), "GET", one(i), "").is(t, 200, mustJSON(t, made[i]))
		}
	})
	if rows := ask(t, database, `SELECT count(*) || ' by ' || count(DISTINCT created_at) FROM tasks`); rows != fmt.Sprint(n, " by 2") {
		t.Errorf("made %s statements", rows)
	}
}

func TestChangesOfTheSameTasksThroughTwoReplicasAllSurvive(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	replicas := []*service{newServiceWithin(t, database, 16, 10*time.Second), newServiceWithin(t, database, 16, 10*time.Second)}
	const tasks, rounds = 6, 30
	var group sync.WaitGroup
	var times sync.Map
	last := make([]taskJSON, tasks)
	for i := range last {
		user := fmt.Sprint("user", i)
		last[i] = replicas[0].create(t, user, "x")
		path := fmt.Sprintf("/api/%s/tasks/%d", user, last[i].ID)
		for field := range 3 { // each has one who changes it
			group.Go(func() {
				for round := range rounds {
					change := []string{fmt.Sprintf(`"title":"%d"`, round), fmt.Sprintf(`"description":"%d"`, round),
						fmt.Sprintf(`"is_completed":%t`, round%2 == 0)}[field]
					got := replicas[(i+field+round)%2].as(t, user, "PATCH", path, "{"+change+"}")
					if _, again := times.LoadOrStore(user+got.task(t).UpdatedAt, true); again || !strings.Contains(got.body, change) {
						t.Errorf("to set %s gave %s; it has the time of another change: %t", change, got.body, again)
					}
				}
			})
		}
	}
	group.Wait()
	for _, was := range last {
		path := fmt.Sprintf("/api/%s/tasks/%d", was.UserID, was.ID)
		got := replicas[0].as(t, was.UserID, "GET", path, "")
		final := fmt.Sprint(rounds - 1)
		got.is(t, 200, mustJSON(t, taskJSON{was.ID, was.UserID, final, &final, false, was.CreatedAt, got.task(t).UpdatedAt}))
	}
}

func TestOneOfABatchThatIsLockedOrRefusedHoldsUpNobody(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s := newServiceWithin(t, database, 8, 10*time.Second)
	s.exec(t, `ALTER TABLE tasks ADD CHECK (title <> 'refused')`)
	paths := map[string]string{}
	for _, user := range []string{"ann", "bob", "cid", "dan"} {
		paths[user] = fmt.Sprintf("/api/%s/tasks/%d", user, s.create(t, user, "x").ID)
	}
	release := hold(t, database, `SELECT FROM tasks WHERE user_id = 'ann' FOR UPDATE`)
	var others sync.WaitGroup
	others.Add(2)
	s.store.updates.shareAll(t, 3, func(i int) {
		user := []string{"ann", "bob", "cid"}[i]
		if user == "ann" {
			go func() { // the others have their answers before the lock goes
				others.Wait()
				release()
			}()
		} else {
			defer others.Done()
		}
		if task := s.as(t, user, "PATCH", paths[user], `{"title":"new"}`).task(t); task.Title != "new" {
			t.Errorf("%s has %v", user, task)
		}
	})
	for method, b := range map[string]*batcher{"PATCH": &s.store.updates, "POST": &s.store.creations} {
		b.shareAll(t, 3, func(i int) {
			user := []string{"bob", "cid", "dan"}[i]
			path := map[string]string{"PATCH": paths[user], "POST": "/api/" + user + "/tasks"}[method]
			if i == 1 {
				s.as(t, user, method, path, `{"title":"refused"}`).is(t, 500, `{"detail":"Internal server error"}`)
			} else if task := s.as(t, user, method, path, `{"title":"`+method+`"}`).task(t); task.Title != method {
				t.Errorf("%s has %v", user, task)
			}
		})
		if lines := s.logs.at(slog.LevelError); len(lines) != 1 || !strings.Contains(lines[0], "tasks_title_check") {
			t.Errorf("logged %q", lines)
		}
	}
	if n := ask(t, database, `SELECT count(*) FROM tasks`); n != "6" {
		t.Errorf("there are %s tasks", n)
	}
}

func TestABatchWithoutAnAnswerIsInDoubtForAll(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	p := newProxy(t, database)
	s := newServiceWithin(t, p.config, 4, 10*time.Second)
	users := []string{"ann", "bob", "cid"}
	ask(t, database, `INSERT INTO tasks (user_id, title) VALUES ('ann', 'x'), ('bob', 'x'), ('cid', 'x')`)
	read := func(i int) { s.as(t, users[i], "GET", fmt.Sprintf("/api/%s/tasks/%d", users[i], i+1), "").task(t) }
	for _, test := range []struct {
		script string
		status int // of a write; a read is repeated
		made   string
	}{
		{"lose", 503, "6"}, {"40001", 201, "9"}, {"cut", 503, "9"},
	} {
		p.treat("INSERT", test.script)
		s.store.creations.shareAll(t, 3, func(i int) {
			if got := s.as(t, users[i], "POST", "/api/"+users[i]+"/tasks", `{"title":"y"}`); got.status != test.status {
				t.Errorf("%s: %v", test.script, got)
			}
		})
		if n := ask(t, database, `SELECT count(*) FROM tasks`); n != test.made {
			t.Errorf("%s: there are %s tasks", test.script, n)
		}
		p.treat("SELECT", test.script)
		s.store.reads.shareAll(t, 3, read)
	}
	p.treat("unnest", "0A000") // the database knows no such statements
	s.store.reads.shareAll(t, 3, read)
	if n := p.count(); n != 2 { // prepared, and not
		t.Errorf("tried %d times", n)
	}
}

func TestABatchEndsWhenAllHaveLeft(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s := newServiceWithin(t, database, 8, 30*time.Second) // which the server would take to end it
	release := hold(t, database, `LOCK TABLE tasks`)
	batches := func() string { return others(t, database, waiting+` AND query LIKE '%unnest%'`) }
	var left atomic.Int64
	s.store.creations.shareAll(t, 3, func(i int) { // they leave one after the other
		ctx, hangUp := context.WithCancel(t.Context())
		go func() {
			eventually(t, "the statement goes on for who is there", func() bool { return left.Load() == int64(i) && batches() == "1" })
			hangUp()
		}()
		s.leaves(ctx, t, fmt.Sprint("user", i), "POST", fmt.Sprintf("/api/user%d/tasks", i), `{"title":"x"}`)
		eventually(t, "that is noticed", func() bool { return len(s.logs.at(slog.LevelInfo)) > 0 })
		left.Add(1)
	})
	eventually(t, "it is cancelled", func() bool { return batches() == "0" })
	release()
	if n := ask(t, database, `SELECT count(*) FROM tasks`); n != "0" {
		t.Errorf("%s tasks were made", n)
	}
}

func TestWhoLeavesBeforeTheBatchIsNotInIt(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s := newServiceWithin(t, database, 8, 10*time.Second)
	ctx, hangUp := context.WithCancel(t.Context())
	s.store.creations.shareAll(t, 2, func(i int) {
		if i == 0 {
			s.leaves(ctx, t, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`)
			return
		}
		eventually(t, "ann waits", func() bool { return s.store.creations.queue() == 1 })
		hangUp()
		eventually(t, "that is noticed", func() bool { return len(s.logs.at(slog.LevelInfo)) > 0 })
		s.create(t, "bob", "x")
	})
	if users := ask(t, database, `SELECT string_agg(user_id, ' ') FROM tasks`); users != "bob" {
		t.Errorf("%s have tasks", users)
	}
}

func TestAPanicInABatchIsA500ForAllOfIt(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.creations.together = func(context.Context, []*member) error { panic("a bug") }
	s.store.creations.shareAll(t, 3, func(i int) {
		path := fmt.Sprintf("/api/user%d/tasks", i)
		s.as(t, fmt.Sprint("user", i), "POST", path, `{"title":"x"}`).is(t, 500, `{"detail":"Internal server error"}`)
	})
	if lines := s.logs.at(slog.LevelError); len(lines) != 3 || !strings.Contains(lines[2], "a bug") {
		t.Errorf("logged %q", lines)
	}
	s.create(t, "ann", "it goes on")
}

func TestWhatGoesAlone(t *testing.T) {
	t.Parallel()
	b := &batcher{busy: true, waiting: []*member{{user: "ann", id: 7}}}
	long := strings.Repeat("x", maxBatchText+1)
	for what, m := range map[string]*member{"a second request about a task": {user: "ann", id: 7},
		"a long description": {in: changes{description: &long}}} {
		got, err := b.share(t.Context(), m, func() (task, error) { return task{id: 7}, nil })
		if err != nil || got.id != 7 || b.queue() != 1 {
			t.Errorf("%s: %v, %v, %d wait", what, got, err, b.queue())
		}
	}
	st := newService(t).store
	st.updates.busy = true
	if _, err := st.updateTask(t.Context(), "ann", 7, precondition{"x"}, changes{}); err != errNotFound {
		t.Errorf("a precondition: %v", err)
	}
}

func TestNothingIsSharedWhereTheTableIsOnSeveralServers(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	ask(t, database, `CREATE TABLE pg_dist_partition ()`) // as if by Citus
	s := newServiceWithin(t, database, 8, 10*time.Second)
	if err := s.store.applySchema(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, b := range []*batcher{&s.store.reads, &s.store.creations, &s.store.updates} {
		b.busy = true // who shares would wait in vain
	}
	path := fmt.Sprint("/api/ann/tasks/", s.create(t, "ann", "x").ID)
	s.as(t, "ann", "GET", path, "").task(t)
	s.as(t, "ann", "PATCH", path, `{}`).task(t)
}

func TestABatchLooksEachTaskUpInTheIndex(t *testing.T) {
	t.Parallel()
	s := newService(t)
	byOwnerAndTask := regexp.MustCompile(`Index Cond: \(\(user_id = (wanted|changed)\.owner\) AND \(id = (wanted|changed)\.task\)\)`)
	for _, rows := range []int{0, 1000, 100_000} {
		s.exec(t, `INSERT INTO tasks (user_id, title) SELECT 'user ' || i % 2000, 'title ' || i FROM generate_series(1, $1) i`, rows)
		if rows == 100_000 { // earlier nothing is known of the table
			s.exec(t, `VACUUM ANALYZE tasks`)
		}
		for _, statement := range []string{selectTogether, updateTogether} {
			parameters := len(regexp.MustCompile(`\$\d+::`).FindAllString(statement, -1))
			plan := ""
			err := exchange(t.Context(), s.store.probe, `SET plan_cache_mode = force_generic_plan; PREPARE batch AS `+statement+
				`; EXPLAIN EXECUTE batch (`+strings.Repeat("'{}',", parameters-1)+`'{}')`, nil,
				func(row []driver.Value) { plan += row[0].(string) + "\n" })
			found := len(byOwnerAndTask.FindAllString(plan, -1))
			if err != nil || strings.Contains(plan, "Seq Scan") ||
				found != 1+strings.Count(statement, "UPDATE tasks") && os.Getenv("TASKFLOW_TEST_TABLE") == "" {
				t.Errorf("with %d rows: %s\n%s%v", rows, statement, plan, err)
			}
		}
	}
}
