package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// shareAll has n requests wait at the same moment, and lets them go as the batches they make.
func (b *batcher) shareAll(t testing.TB, n int, request func(i int), before ...func()) {
	t.Helper()
	eventually(t, "nothing is under way", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.busy {
			return false
		}
		b.busy = true
		return true
	})
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { request(i) })
	}
	eventually(t, "all wait", func() bool { return b.queue() == n })
	for _, f := range before {
		f()
	}
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
	s := newServiceWithin(t, newDatabase(t), 24, 10*time.Second)
	const n = maxBatch + 6
	user := func(i int) string { return fmt.Sprint("user ", i%7) }
	path := func(i int) string { return fmt.Sprintf("/api/user%%20%d/tasks", i%7) }
	texts := []string{`"`, `\`, `a,b`, `{}`, `NULL`, ``, ` `, `é€😀`, "\n\t\x7f", `null`}
	made := make([]taskJSON, n)
	body := func(i int) string { // several are equal
		return mustJSON(t, map[string]any{"title": "title" + texts[i%len(texts)], "description": []any{nil, texts[i%len(texts)]}[i%2]})
	}
	s.store.creations.shareAll(t, n, func(i int) {
		got := s.as(t, user(i), "POST", path(i), body(i))
		made[i] = got.task(t)
		want := taskJSON{made[i].ID, user(i), "title" + texts[i%len(texts)], nil, false, made[i].CreatedAt, made[i].UpdatedAt}
		if i%2 == 1 {
			want.Description = &texts[i%len(texts)]
		}
		if got.is(t, 201, mustJSON(t, want)); got.header.Get("Location") != fmt.Sprint(path(i), "/", made[i].ID) {
			t.Errorf("Location %q", got.header.Get("Location"))
		}
	})
	times := map[string]int{}
	for _, task := range made {
		times[task.CreatedAt]++
	}
	if len(times) != 2 {
		t.Errorf("created at %v: not by two statements", times)
	}
	one := func(i int) string { return fmt.Sprint(path(i), "/", made[i].ID) }
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
	s.store.updates.shareAll(t, n, func(i int) {
		was, want := made[i], made[i]
		changes := map[string]any{}
		if i%3 == 0 {
			want.Title = texts[(i+1)%len(texts)] + "!"
			changes["title"] = want.Title
		}
		if i%4 == 0 {
			want.Description = &texts[(i+2)%len(texts)]
			changes["description"] = *want.Description
		} else if i%4 == 1 {
			want.Description = nil
			changes["description"] = nil
		}
		if i%5 < 2 {
			want.IsCompleted = i%5 == 0
			changes["is_completed"] = want.IsCompleted
		}
		if i == 3 {
			s.as(t, user(i), "PATCH", path(i)+"/0", mustJSON(t, changes)).is(t, 404, notFound)
			return
		}
		got := s.as(t, user(i), "PATCH", one(i), mustJSON(t, changes))
		want.UpdatedAt = got.task(t).UpdatedAt
		got.is(t, 200, mustJSON(t, want))
		made[i] = want
		same := want.Title == was.Title && want.IsCompleted == was.IsCompleted &&
			mustJSON(t, want.Description) == mustJSON(t, was.Description)
		if want.UpdatedAt < was.UpdatedAt || same != (want.UpdatedAt == was.UpdatedAt) {
			t.Errorf("%v: updated_at %s, then %s", changes, was.UpdatedAt, want.UpdatedAt)
		}
	})
	for i := range 7 {
		var want []taskJSON
		for j := i; j < n; j += 7 {
			want = append(want, made[j])
		}
		slices.SortFunc(want, func(a, b taskJSON) int { return int(a.ID - b.ID) })
		s.as(t, user(i), "GET", path(i), "").is(t, 200, mustJSON(t, want))
	}
}

func TestChangesOfTheSameTasksThroughTwoReplicasAllSurvive(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	replicas := []*service{newServiceWithin(t, database, 16, 10*time.Second), newServiceWithin(t, database, 16, 10*time.Second)}
	const tasks, rounds = 6, 30
	var group sync.WaitGroup
	times := make([][3][]string, tasks)
	for i := range tasks {
		user := fmt.Sprint("user", i)
		path := fmt.Sprintf("/api/%s/tasks/%d", user, replicas[0].create(t, user, "x").ID)
		for field, name := range []string{"title", "description", "is_completed"} { // each has one who changes it
			group.Go(func() {
				for round := range rounds {
					value := any(fmt.Sprint(name, round))
					if field == 2 {
						value = round%2 == 0
					}
					got := replicas[(i+field+round)%2].as(t, user, "PATCH", path, mustJSON(t, map[string]any{name: value}))
					var members map[string]any
					if got.decode(t, &members); members[name] != value {
						t.Errorf("set %s to %v, got %s", name, value, got.body)
						return
					}
					times[i][field] = append(times[i][field], got.task(t).UpdatedAt)
				}
			})
		}
	}
	group.Wait()
	for i := range tasks {
		user := fmt.Sprint("user", i)
		all := slices.Concat(times[i][0], times[i][1], times[i][2])
		if slices.Sort(all); len(slices.Compact(all)) != 3*rounds {
			t.Errorf("%d changes have %d times", 3*rounds, len(slices.Compact(all)))
		}
		got := replicas[0].as(t, user, "GET", "/api/"+user+"/tasks", "").tasks(t)[0]
		if last := rounds - 1; got.Title != fmt.Sprint("title", last) || *got.Description != fmt.Sprint("description", last) ||
			got.IsCompleted {
			t.Errorf("%s has %+v", user, got)
		}
	}
}

func TestOneOfABatchThatIsLockedOrRefusedHoldsUpNobody(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s := newServiceWithin(t, database, 8, 10*time.Second)
	s.exec(t, `ALTER TABLE tasks ADD CHECK (title <> 'refused')`)
	path := func(user string) string {
		return fmt.Sprintf("/api/%s/tasks/%d", user, s.create(t, user, "x").ID)
	}
	paths := map[string]string{"ann": path("ann"), "bob": path("bob"), "cid": path("cid"), "dan": path("dan")}
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
	refused := func(b *batcher, n int, status int, method, title string, path func(string) string) {
		b.shareAll(t, n, func(i int) {
			user, body := []string{"bob", "cid", "dan"}[i], `{"title":"`+title+`"}`
			if i == 1 {
				s.as(t, user, method, path(user), `{"title":"refused"}`).is(t, 500, `{"detail":"Internal server error"}`)
			} else if got := s.as(t, user, method, path(user), body); got.status != status || got.task(t).Title != title {
				t.Errorf("%s got %v", user, got)
			}
		})
		if lines := s.logs.at(slog.LevelError); len(lines) != 1 || !strings.Contains(lines[0], "tasks_title_check") {
			t.Errorf("logged %q", lines)
		}
	}
	refused(&s.store.updates, 3, 200, "PATCH", "newer", func(user string) string { return paths[user] })
	refused(&s.store.creations, 3, 201, "POST", "fresh", func(user string) string { return "/api/" + user + "/tasks" })
	if n := ask(t, database, `SELECT count(*) FROM tasks`); n != "6" {
		t.Errorf("there are %s tasks", n)
	}
}

func TestAStatementThatTakesLongLetsTheNextGo(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s := newServiceWithin(t, database, 8, 10*time.Second)
	paths := map[string]string{}
	for _, user := range []string{"ann", "bob", "cid"} {
		paths[user] = fmt.Sprintf("/api/%s/tasks/%d", user, s.create(t, user, "x").ID)
	}
	release := hold(t, database, `SELECT FROM tasks WHERE user_id = 'ann' FOR UPDATE`)
	var group sync.WaitGroup
	group.Go(func() { s.as(t, "ann", "PATCH", paths["ann"], `{"title":"new"}`).task(t) })
	eventually(t, "it waits", func() bool { return others(t, database, waiting) == "1" })
	for _, user := range []string{"bob", "cid", "bob"} {
		s.as(t, user, "PATCH", paths[user], `{"title":"new"}`).task(t)
	}
	release()
	group.Wait()
}

func TestABatchWithoutAnAnswerIsInDoubtForAll(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	p := newProxy(t, database)
	s := newServiceWithin(t, p.config, 4, 10*time.Second)
	users := []string{"ann", "bob", "cid"}
	paths := map[string]string{}
	for _, user := range users {
		paths[user] = fmt.Sprintf("/api/%s/tasks/%d", user, s.create(t, user, "x").ID)
	}
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
		s.store.reads.shareAll(t, 3, func(i int) { s.as(t, users[i], "GET", paths[users[i]], "").task(t) })
	}
	p.treat("unnest", "0A000") // the database knows no such statements
	s.store.reads.shareAll(t, 3, func(i int) { s.as(t, users[i], "GET", paths[users[i]], "").task(t) })
	if n := p.count(); n != 2 { // prepared, and not
		t.Errorf("tried %d times", n)
	}
}

func TestABatchDoesNotOutliveThoseWhoWaitForIt(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s := newServiceWithin(t, database, 8, time.Second)
	release := hold(t, database, `LOCK TABLE tasks`)
	s.store.creations.shareAll(t, 3, func(i int) {
		user := []string{"ann", "bob", "cid"}[i]
		s.as(t, user, "POST", "/api/"+user+"/tasks", `{"title":"x"}`).is(t, 503, unavailable)
	})
	eventually(t, "nothing waits", func() bool { return others(t, database, waiting) == "0" })
	release()
	s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, "[]")
	s.logs.at(slog.LevelWarn)
}

func TestABatcherAnswersAllThatItTakes(t *testing.T) {
	t.Parallel()
	var asked [][]string
	b := &batcher{together: func(_ context.Context, members []*member) error {
		var users []string
		for _, m := range members {
			if users = append(users, m.user); strings.HasPrefix(m.user, "bad") {
				asked = append(asked, users)
				panic("a bug")
			}
			m.task, m.err = task{userID: m.user}, nil
		}
		asked = append(asked, users)
		return nil
	}}
	alone := func() (task, error) { return task{}, errors.New("asked alone") }
	request := func(ctx context.Context, user, want string, failure error) {
		if got, err := b.share(ctx, &member{user: user}, alone); got.userID != want || !errors.Is(err, failure) {
			t.Errorf("%s: got %q, %v", user, got.userID, err)
		}
	}
	ctx, hangUp := context.WithCancel(t.Context())
	b.shareAll(t, 3, func(i int) {
		if i == 0 {
			request(ctx, "gone", "", context.Canceled)
		} else {
			request(t.Context(), fmt.Sprint("user", i), fmt.Sprint("user", i), nil)
		}
	}, hangUp)
	b.shareAll(t, 3, func(i int) { request(t.Context(), fmt.Sprint("bad", i), "", errPanic) })
	b.shareAll(t, 0, nil) // the last one has ended
	if len(asked) != 2 || len(asked[0]) != 2 || len(asked[1]) != 1 || b.queue() > 0 {
		t.Errorf("asked %q; %d wait", asked, b.queue())
	}
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
	explain := func(rows string) {
		for _, statement := range []string{selectTogether, updateTogether} {
			parameters := regexp.MustCompile(`\$\d+::`).FindAllString(statement, -1)
			arguments := strings.TrimSuffix(strings.Repeat("'{}',", len(parameters)), ",")
			conn := must(s.store.db.Conn(t.Context()))
			for _, before := range []string{`SET plan_cache_mode = force_generic_plan`, `PREPARE batch AS ` + statement} {
				must(conn.ExecContext(t.Context(), before))
			}
			lines := must(conn.QueryContext(t.Context(), `EXPLAIN EXECUTE batch (`+arguments+`)`))
			plan := ""
			for lines.Next() {
				var line string
				if err := lines.Scan(&line); err != nil {
					t.Fatal(err)
				}
				plan += line + "\n"
			}
			byOwnerAndTask := regexp.MustCompile(`Index Cond: \(\(user_id = (wanted|changed)\.owner\) AND \(id = (wanted|changed)\.task\)\)`)
			found := byOwnerAndTask.FindAllString(plan, -1)
			if os.Getenv("TASKFLOW_TEST_TABLE") == "" && len(found) != 1+strings.Count(statement, "UPDATE tasks") ||
				strings.Contains(plan, "Seq Scan") {
				t.Errorf("with %s rows: %s\n%s", rows, statement, plan)
			}
			must(conn.ExecContext(t.Context(), `DEALLOCATE batch`))
			if err := errors.Join(lines.Err(), conn.Close()); err != nil {
				t.Fatal(err)
			}
		}
	}
	explain("no")
	s.exec(t, `INSERT INTO tasks (user_id, title) SELECT 'user ' || i % 100, 'title ' || i FROM generate_series(1, 1000) i`)
	explain("1,000")
	s.exec(t, `INSERT INTO tasks (user_id, title) SELECT 'user ' || i % 2000, 'title ' || i FROM generate_series(1, 100000) i`)
	s.exec(t, `VACUUM ANALYZE tasks`)
	explain("100,000")
}

func TestABatchEndsWhenAllHaveLeft(t *testing.T) {
	t.Parallel()
	var hangUp [3]func()
	b := &batcher{together: func(ctx context.Context, members []*member) error {
		hangUp[0]()
		hangUp[2]()
		if ctx.Err() != nil {
			t.Error("it ended while one was there")
		}
		hangUp[1]()
		<-ctx.Done()
		return ctx.Err()
	}}
	ctx := [3]context.Context{}
	for i := range ctx {
		ctx[i], hangUp[i] = context.WithCancel(t.Context())
	}
	b.shareAll(t, 3, func(i int) {
		if _, err := b.share(ctx[i], &member{user: fmt.Sprint(i)}, nil); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
