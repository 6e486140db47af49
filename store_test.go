package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lib/pq"
)

// useAll uses all routes as a user who has no tasks yet.
func (s *service) useAll(t testing.TB, user string) {
	t.Helper()
	path := "/api/" + user + "/tasks"
	first := s.as(t, user, "POST", path, `{"title":"new"}`, "Idempotency-Key", "key").task(t)
	s.as(t, user, "POST", path, `{"title":"new"}`, "Idempotency-Key", "key").is(t, 201, mustJSON(t, first))
	second := s.create(t, user, "second")
	one := fmt.Sprintf("%s/%d", path, first.ID)
	changed := s.as(t, user, "PATCH", one, `{"title":"changed"}`).task(t)
	if second.ID <= first.ID || changed.Title != "changed" || changed.UpdatedAt <= first.UpdatedAt {
		t.Errorf("%+v was changed to %+v, then came %+v", first, changed, second)
	}
	s.as(t, user, "GET", one, "").is(t, 200, mustJSON(t, changed))
	s.as(t, user, "GET", path, "").is(t, 200, mustJSON(t, []taskJSON{changed, second}))
	s.as(t, user, "GET", path+"?sort_by=created_at&order=desc&limit=5&search=E", "").is(t, 200, mustJSON(t, []taskJSON{second, changed}))
	s.as(t, user, "DELETE", one, "").is(t, 204, "")
	s.as(t, user, "GET", one, "").is(t, 404, `{"detail":"Task not found"}`)
}

// apply brings a database to the schema as the starts of five replicas at once do.
func apply(t testing.TB, database pq.Config) error {
	var group sync.WaitGroup
	errs := make([]error, 5)
	for i := range errs {
		s := newStore(database, 1, 10*time.Second)
		defer s.close()
		group.Go(func() { errs[i] = s.applySchema(t.Context()) })
	}
	group.Wait()
	return errors.Join(errs...)
}

// The tables of the earlier service, as SQLModel and those who cared for it since may have left them.
var earlierTables = map[string]string{
	"serial": `
		CREATE TABLE tasks (id SERIAL PRIMARY KEY, user_id VARCHAR NOT NULL, title VARCHAR(200) NOT NULL, description VARCHAR,
			is_completed BOOLEAN NOT NULL, created_at TIMESTAMP WITHOUT TIME ZONE NOT NULL, updated_at TIMESTAMP WITHOUT TIME ZONE NOT NULL);
		CREATE INDEX ix_tasks_user_id ON tasks (user_id);`,
	"reordered": `
		CREATE TABLE users (id VARCHAR PRIMARY KEY); INSERT INTO users VALUES ('ann'), ('bob');
		CREATE TABLE tasks (updated_at TIMESTAMP(3) NOT NULL DEFAULT now(), gone INTEGER,
			created_at TIMESTAMP NOT NULL DEFAULT now(), is_completed BOOLEAN NOT NULL,
			description TEXT DEFAULT 'none', title VARCHAR(255) NOT NULL CHECK (title <> ''),
			user_id VARCHAR(36) NOT NULL REFERENCES users (id), id SERIAL PRIMARY KEY);
		ALTER TABLE tasks DROP COLUMN gone;
		CREATE TABLE comments (task_id INTEGER REFERENCES tasks (id) ON DELETE CASCADE);`,
	"nullable": `
		CREATE TABLE tasks (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, user_id TEXT, title TEXT, description TEXT,
			is_completed BOOLEAN, created_at TIMESTAMPTZ, updated_at TIMESTAMPTZ);
		SET TIME ZONE 'UTC';`,
}

const earlierRows = `INSERT INTO tasks (user_id, title, description, is_completed, created_at, updated_at) VALUES `

func TestATableOfTheEarlierServiceIsAdopted(t *testing.T) {
	t.Parallel()
	// neither of the first one's is a time in New York
	const rows = earlierRows + `('ann', 'one', 'with 🎈', true, '2024-03-10 02:30:00.123', '2024-11-03 01:30:00'),
		('ann', 'two', NULL, false, '1999-12-31 23:59:59.999', '2038-01-19 03:14:08.5'),
		('ann', 'three', '', false, '2024-07-01', '2024-07-01 12:00'),
		('ann', 'deleted', '', true, now(), now()); DELETE FROM tasks WHERE title = 'deleted';`
	balloon, empty := "with 🎈", ""
	want := []taskJSON{
		{1, "ann", "one", &balloon, true, "2024-03-10T02:30:00.123000Z", "2024-11-03T01:30:00.000000Z"},
		{2, "ann", "two", nil, false, "1999-12-31T23:59:59.999000Z", "2038-01-19T03:14:08.500000Z"},
		{3, "ann", "three", &empty, false, "2024-07-01T00:00:00.000000Z", "2024-07-01T12:00:00.000000Z"},
	}
	for name, table := range earlierTables {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			database := newDatabaseFrom(t, "template1")
			ask(t, database, `ALTER DATABASE `+database.Database+` SET timezone = 'America/New_York'`)
			elsewhere := database.Clone() // as a pooler may have it
			elsewhere.Runtime["timezone"] = "America/New_York"
			for _, before := range []string{table + rows, `DROP INDEX tasks_user_id_idempotency_key_idx`} { // the rest is there
				ask(t, elsewhere, before)
				if err := apply(t, elsewhere); err != nil {
					t.Fatal(err)
				}
			}
			s := newServiceWithin(t, database, 2, 10*time.Second)
			s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, mustJSON(t, want))
			if id := s.create(t, "ann", "next").ID; id != 5 { // 4 was the deleted one's
				t.Errorf("the next id is %d", id)
			}
			s.useAll(t, "bob")
			if name == "reordered" {
				ask(t, database, `INSERT INTO comments VALUES (1)`)
				s.as(t, "ann", "DELETE", "/api/ann/tasks/1", "").is(t, 204, "")
				if n := ask(t, database, `SELECT count(*) FROM comments`); n != "0" {
					t.Error("the foreign key of another table is lost")
				}
			}
		})
	}
}

func TestWhatTheEarlierServiceLeftEmptyIsFilledIn(t *testing.T) {
	t.Parallel()
	database := newDatabaseFrom(t, "template1")
	ask(t, database, earlierTables["nullable"]+earlierRows+`('ann', 'a', 'd', NULL, NULL, '2024-01-01'),
		('ann', 'b', 'd', true, '2024-01-02', NULL), ('ann', 'c', 'd', NULL, NULL, NULL)`)
	if err := apply(t, database); err != nil {
		t.Fatal(err)
	}
	tasks := newServiceWithin(t, database, 2, 10*time.Second).as(t, "ann", "GET", "/api/ann/tasks", "").tasks(t)
	if len(tasks) != 3 || tasks[0].IsCompleted || tasks[0].CreatedAt != "2024-01-01T00:00:00.000000Z" || !tasks[1].IsCompleted ||
		tasks[1].UpdatedAt != "2024-01-02T00:00:00.000000Z" || tasks[2].CreatedAt != tasks[2].UpdatedAt || !isInstant(tasks[2].CreatedAt) {
		t.Errorf("%+v", tasks)
	}
}

func TestADatabaseThatCannotBeUsedIsAStartupErrorThatSaysWhy(t *testing.T) {
	t.Parallel()
	serial := earlierTables["serial"] + earlierRows + `('ann', 'a', '', true, now(), now());`
	const everybody = `GRANT ALL ON SCHEMA public TO PUBLIC`
	tests := []struct {
		template, script string
		guest            bool
		want             string
	}{
		{"template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'", "", false, "must be encoded in UTF8, not LATIN1"},
		{"template1", serial + everybody, true, "must be owner of table tasks"},
		{"template1", "", true, "permission denied for schema public"},
		{"template1", earlierTables["nullable"] + earlierRows + `(NULL, 'a', 'd', NULL, NULL, NULL)`, false, `"user_id"`},
		{"template1", `CREATE TABLE tasks (id integer, name text)`, false, "column"},
		{"template1", `CREATE VIEW tasks AS SELECT 1 AS id`, false, "tasks"},
		{"template1", serial + `CREATE VIEW v AS SELECT title FROM tasks`, false, "view"},
	}
	for _, test := range tests {
		t.Run(test.want, func(t *testing.T) {
			t.Parallel()
			database := newDatabaseFrom(t, test.template)
			ask(t, database, test.script+";")
			const relations = `SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relnamespace = 'public'::regnamespace`
			before, by := ask(t, database, relations), database.Clone()
			if test.guest {
				by.User = by.Database
				ask(t, database, `CREATE ROLE `+by.User+` LOGIN`)
			}
			if err := apply(t, by); err == nil || !isStartupError(err) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want a start-up error with %q", err, test.want)
			}
			if after := ask(t, database, relations); after != before {
				t.Errorf("left %s, there was %s", after, before)
			}
		})
	}
}

func TestAnAppliedSchemaNeedsNoRightsButThoseOnTheRows(t *testing.T) {
	t.Parallel()
	database := newDatabaseFrom(t, "template1")
	if err := apply(t, database); err != nil {
		t.Fatal(err)
	}
	database.User = database.Database
	must(0, administer(`CREATE ROLE `+database.User+` LOGIN`))
	ask(t, clusterConfig(database.Database), `GRANT SELECT, INSERT, UPDATE, DELETE ON tasks TO `+database.User)
	if err := apply(t, database); err != nil {
		t.Fatal(err)
	}
	newServiceWithin(t, database, 2, 10*time.Second).useAll(t, "ann")
}

func TestTheTableMayChangeWhileInUse(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s := newServiceWithin(t, database, 1, 10*time.Second)
	s.useAll(t, "ann")
	ask(t, database, `ALTER TABLE tasks ALTER title TYPE varchar(300), ALTER description TYPE varchar, ADD COLUMN more integer`)
	s.useAll(t, "bob")
}

func TestReadinessAsksTheDatabaseAtMostTwiceASecond(t *testing.T) {
	t.Parallel()
	p := newProxy(t, newDatabase(t))
	s := newServiceWithin(t, p.config, 1, 10*time.Second)
	p.treat("to_regclass", "")
	start := time.Now()
	for time.Since(start) < 1200*time.Millisecond {
		s.as(t, "", "GET", "/ready", "").is(t, 200, `{"status":"ready"}`)
	}
	if most := int(time.Since(start)/(500*time.Millisecond)) + 1; p.count() > most || p.count() < 2 {
		t.Errorf("asked %d times in %s", p.count(), time.Since(start))
	}
}

func TestReadinessTellsHowTheDatabaseIs(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	p := newProxy(t, database)
	s := newServiceWithin(t, p.config, 2, 600*time.Millisecond)
	ready := func(status int) {
		t.Helper()
		s.readiness.Lock()
		s.readiness.next = time.Time{} // as if the last answer were old
		s.readiness.Unlock()
		s.as(t, "", "GET", "/ready", "").is(t, status, map[int]string{200: `{"status":"ready"}`, 503: unavailable}[status])
	}
	ready(200)
	p.treat("to_regclass", "lose")
	ready(503)
	ready(200)
	ask(t, database, `ALTER INDEX tasks_user_id_idempotency_key_idx RENAME TO gone`)
	ready(503)
	ask(t, database, `ALTER INDEX gone RENAME TO tasks_user_id_idempotency_key_idx`)
	ready(200)
	release := hold(t, database, `LOCK TABLE tasks`)
	s.store.timeout = 20 * time.Second
	var group sync.WaitGroup
	for _, user := range []string{"ann", "bob", "cid"} {
		group.Go(func() { s.as(t, user, "GET", "/api/"+user+"/tasks", "").is(t, 200, "[]") })
	}
	eventually(t, "the pool is taken", func() bool { return others(t, database, waiting) == "2" })
	ready(200)
	release()
	group.Wait()
	s.store.timeout = 600 * time.Millisecond
	p.treat("SELECT", "stall")
	start := time.Now()
	if ready(503); time.Since(start) > 1600*time.Millisecond {
		t.Errorf("took %s", time.Since(start))
	}
	p.treat("", "")
	ready(200)
}

func TestReadinessLeavesTheLastConnectionToTheRequests(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	role := "limited_" + database.Database
	ask(t, database, `CREATE ROLE `+role+` LOGIN CONNECTION LIMIT 1`)
	t.Cleanup(func() { ask(t, database, `DROP OWNED BY `+role+`; DROP ROLE `+role) })
	ask(t, database, `GRANT ALL ON tasks TO `+role)
	limited := database.Clone()
	limited.User = role
	s := newServiceWithin(t, limited, 4, 3*time.Second)
	for range 3 {
		s.as(t, "", "GET", "/ready", "").is(t, 200, `{"status":"ready"}`)
		s.readiness.next = time.Time{} // as if the answer were old
		s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, "[]")
	}
}

func TestNoAnswerDependsOnTheSettingsOfASession(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	plain := newServiceWithin(t, database, 2, 10*time.Second)
	own := fmt.Sprintf("/api/ann/tasks/%d", plain.create(t, "ann", "x").ID)
	ask(t, database, `UPDATE tasks SET created_at = '2026-07-01T00:30:00.5Z'`)
	list, one := plain.as(t, "ann", "GET", "/api/ann/tasks", ""), plain.as(t, "ann", "GET", own, "")
	for name, value := range map[string]string{"timezone": "Europe/Berlin", "datestyle": "German", "intervalstyle": "sql_standard",
		"bytea_output": "escape", "extra_float_digits": "-15"} {
		ask(t, database, fmt.Sprintf(`ALTER DATABASE %s SET %s = '%s'`, database.Database, name, value))
	}
	for _, pooler := range []bool{false, true} {
		p := newProxy(t, database)
		p.pooler = pooler
		s := newServiceWithin(t, p.config, 2, 10*time.Second)
		if got := s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, list.body); got.header.Get("ETag") != list.header.Get("ETag") {
			t.Errorf("the list's tag is %s", got.header.Get("ETag"))
		}
		s.as(t, "ann", "PATCH", own, `{"title":"x"}`, "If-Match", one.header.Get("ETag")).is(t, 200, one.body)
		user := fmt.Sprint("user", pooler)
		s.useAll(t, user)
		for i := range 5 {
			s.create(t, user, fmt.Sprint(i))
		}
		for _, sort := range []string{"created_at", "updated_at", "updated_at&order=desc"} {
			if n := len(s.pages(t, user, "/api/"+user+"/tasks?limit=2&sort_by="+sort)); n != 3 {
				t.Errorf("by %s: %d pages", sort, n)
			}
		}
	}
}

// PostgreSQL itself tells what is IMMUTABLE: an index takes nothing else. Citus refuses the rest in RETURNING and, but for now()
// outside CASE and COALESCE, in what an UPDATE assigns.
func TestTheStatementsAreSuchAsCitusTakes(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	for _, column := range strings.Split(taskColumns, ", ") {
		ask(t, database, `CREATE INDEX ON tasks ((`+column+`))`)
	}
	for _, statement := range []string{insertTask, insertTaskOnce, updateTask, deleteTask} {
		if _, returning, _ := strings.Cut(statement, "RETURNING "); returning != taskColumns {
			t.Errorf("%s returns something else", statement)
		}
	}
	constants := strings.NewReplacer("now()", "timestamptz '2026-01-01 00:00:00+00'", "new_title", "'x'::text", "describes", "true",
		"new_description", "'x'::text", "new_is_completed", "true")
	for _, assignment := range regexp.MustCompile(`,\n\t`).Split(strings.ReplaceAll(assignments, ",\n\t\t", ", "), -1) {
		column, expression, _ := strings.Cut(assignment, " = ")
		ask(t, database, `CREATE INDEX ON tasks ((`+constants.Replace(expression)+`))`)
		inCase := regexp.MustCompile(`(?s)(CASE .*? END|coalesce\([^()]*\))`).FindAllString(expression, -1)
		if strings.Contains(strings.Join(inCase, ""), "now()") {
			t.Errorf("%s: now() in CASE or COALESCE", column)
		}
	}
}

func TestARowThatTheDatabaseSwallowsIsABug(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s := newServiceWithin(t, database, 2, 10*time.Second)
	ask(t, database, `CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'`)
	ask(t, database, `CREATE TRIGGER swallow BEFORE INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION swallow()`)
	s.as(t, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`).is(t, 500, `{"detail":"Internal server error"}`)
	if lines := s.logs.at(slog.LevelError); len(lines) != 1 || !strings.Contains(lines[0], "no row") {
		t.Errorf("logged %q", lines)
	}
}

func TestOneUsersFloodLeavesRoomForOthers(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s := newServiceWithin(t, database, 4, 10*time.Second)
	path := fmt.Sprintf("/api/ann/tasks/%d", s.create(t, "ann", "mine").ID)
	release := hold(t, database, `SELECT FROM tasks FOR UPDATE`)
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() { s.as(t, "ann", "PATCH", path, `{"is_completed":true}`).task(t) })
	}
	eventually(t, "the flood waits", func() bool { return others(t, database, waiting) == "2" })
	for i := range 10 {
		s.useAll(t, fmt.Sprint("bob", i))
	}
	if n := others(t, database, waiting); n != "2" {
		t.Errorf("%s statements of the flood run", n)
	}
	release()
	group.Wait()
	if n := len(s.store.users.users); n != 0 {
		t.Errorf("%d users are remembered", n)
	}
}

func TestTheTimeLimitCountsTheWaitForATurnButOfAListUnderWay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &store{timeout: time.Second, users: userLimit{limit: 1, timeout: time.Second, users: map[string]*userTurns{}}}
		s.applied.Store(true)
		for patient, want := range map[bool]time.Duration{false: 100 * time.Millisecond, true: time.Second} {
			_ = s.users.enter(t.Context(), "ann")
			time.AfterFunc(900*time.Millisecond, func() { s.users.leave("ann", true) })
			err := s.attempt(t.Context(), "ann", true, patient, func(ctx context.Context) error {
				deadline, _ := ctx.Deadline()
				if left := time.Until(deadline); left != want {
					t.Errorf("patient %t: %v left, want %v", patient, left, want)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		}
	})
}
