package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"database/sql/driver"
	_ "embed"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

//go:embed schema.sql
var schema string

// A store holds the tasks in PostgreSQL. Each method about tasks runs one statement, and fails with errNotFound,
// errModified or an error of the database. README.md shows the way of a statement.
type store struct {
	db                        *sql.DB
	probe                     *sql.DB // for readiness and schema; keeps no connection
	timeout                   time.Duration
	users                     userLimit // of statements
	reads, creations, updates batcher
	distributed               atomic.Bool // the table is on several servers: a statement should be for one of them
	applied                   atomic.Bool // schema.sql, without which each statement fails with errNoSchema
}

// newStore makes a store without connecting. Requests share size connections; timeout is how long one may wait for the
// database, connecting included.
func newStore(cfg pq.Config, size int, timeout time.Duration) *store {
	s := &store{db: sql.OpenDB(newConnector(cfg, timeout)), probe: sql.OpenDB(newConnector(cfg, timeout)), timeout: timeout,
		users: userLimit{limit: max(1, size/2), timeout: timeout, users: map[string]*userTurns{}}}
	s.db.SetMaxOpenConns(size)
	s.db.SetMaxIdleConns(size)
	s.db.SetConnMaxIdleTime(5 * time.Minute)
	s.db.SetConnMaxLifetime(time.Hour)
	s.probe.SetMaxIdleConns(-1) // an idle probe must not keep the last connection that the server allows
	owner, id := func(m *member) any { return m.user }, func(m *member) any { return m.id }
	title, description := func(m *member) any { return m.in.title }, func(m *member) any { return m.in.description }
	s.reads.together = s.together(selectTogether, owner, id)
	s.creations.together = s.together(insertTogether, owner, title, description)
	s.updates.together = s.together(updateTogether, owner, id, title, func(m *member) any { return m.in.describes }, description,
		func(m *member) any { return m.in.isCompleted })
	return s
}

// ready asks the database whether it answers and has the schema: on a connection of its own, since a busy pool is no
// reason to be unready, or on one of the pool when the server allows no more (too_many_connections).
func (s *store) ready(ctx context.Context) error {
	err := s.checkSchema(ctx, s.probe)
	if pq.As(err, "53300") != nil {
		err = s.checkSchema(ctx, s.db)
	}
	return err
}

// checkSchema asks the database whether schema.sql has been applied in full, and whether the table is on several
// servers: by Citus, or in foreign partitions. It fails with errNoSchema.
func (s *store) checkSchema(ctx context.Context, db *sql.DB) error {
	const query = `SELECT to_regclass('tasks_user_id_idempotency_key_idx') IS NOT NULL, to_regclass('pg_dist_partition') IS NOT NULL OR
		EXISTS (SELECT 1 FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = to_regclass('tasks') AND relkind = 'f')`
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	applied := false
	err := exchange(ctx, db, query, nil, func(row []driver.Value) {
		applied = row[0] == true
		s.distributed.Store(row[1] == true)
	})
	if err == nil && !applied {
		err = errNoSchema
	}
	return err
}

// applySchema brings the database to schema.sql where it is not there yet. It may wait for another replica that does the same.
func (s *store) applySchema(ctx context.Context) error {
	err := s.checkSchema(ctx, s.probe)
	if err == errNoSchema {
		err = exchange(ctx, s.probe, schema, nil, func([]driver.Value) {})
	}
	s.applied.Store(err == nil)
	return err
}

// arguments are the values of $1, $2, …: whatever database/sql would take.
func arguments(values ...any) []driver.NamedValue {
	args := make([]driver.NamedValue, len(values))
	for i, value := range values {
		value, _ = driver.DefaultParameterConverter.ConvertValue(value)
		args[i] = driver.NamedValue{Ordinal: i + 1, Value: value}
	}
	return args
}

// attempt runs f, which sends one statement, in the user's turn and within the time limit, and again after a failure that
// left no trace; if repeatable, also after one in doubt. If patient, the limit begins anew once the turn has come.
func (s *store) attempt(ctx context.Context, user string, repeatable, patient bool, f func(context.Context) error) error {
	if !s.applied.Load() {
		return errNoSchema
	}
	limited, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	if err := s.users.enter(limited, user); err != nil {
		return err
	}
	defer s.users.leave(user, true)
	if patient {
		limited, cancel = context.WithTimeout(ctx, s.timeout)
		defer cancel()
	}
	for wait := time.Duration(0); ; wait = min(2*wait+10*time.Millisecond, 250*time.Millisecond) {
		err := f(limited)
		if o := outcomeOf(err); err == nil || o != noTrace && !(o == inDoubt && repeatable) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-limited.Done():
			return fmt.Errorf("no time left to try again: %w", err)
		}
	}
}

// exchange sends one statement over a connection of db, as conn.run does.
func exchange(ctx context.Context, db *sql.DB, query string, args []driver.NamedValue, row func([]driver.Value)) error {
	c, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Raw(func(c any) error { return c.(*conn).run(ctx, query, args, row) })
}

// taskColumns is what scanTask reads. timestamptz_send gives a time as eight bytes, which depend on no setting of the
// session; and Citus takes it in RETURNING, where it refuses a cast to text.
const taskColumns = `id, title, description, is_completed, timestamptz_send(created_at), timestamptz_send(updated_at)`

func scanTask(row []driver.Value, user string) task {
	t := task{id: row[0].(int64), userID: user, title: row[1].(string), isCompleted: row[3].(bool)}
	t.description, t.described = row[2].(string)
	t.createdAt = instant(binary.BigEndian.Uint64(row[4].([]byte)))
	t.updatedAt = instant(binary.BigEndian.Uint64(row[5].([]byte)))
	return t
}

// one runs a statement that returns one task at most, errNotFound when there is none.
func (s *store) one(ctx context.Context, user, query string, args ...any) (t task, err error) {
	found := false
	err = exchange(ctx, s.db, query, arguments(args...), func(row []driver.Value) { t, found = scanTask(row, user), true })
	if err == nil && !found {
		err = errNotFound
	}
	return t, err
}

// single runs a statement about one task for m, alone or in a batch of b. If it finds no task that matches the
// precondition, a second statement tells whether there is one that does not: errModified or errNotFound.
func (s *store) single(ctx context.Context, b *batcher, m *member, query string, args ...any) (t task, err error) {
	err = s.attempt(ctx, m.user, m.repeatable, false, func(ctx context.Context) error {
		if b == nil || m.times != nil || s.distributed.Load() {
			t, err = s.one(ctx, m.user, query, args...)
		} else {
			t, err = b.share(ctx, m, func() (task, error) { return s.one(ctx, m.user, query, args...) })
		}
		if err == errNotFound && m.times != nil {
			if _, err = s.one(ctx, m.user, selectTask, m.user, m.id); err == nil {
				err = errModified
			}
		}
		return err
	})
	return t, err
}

const selectTask = `SELECT ` + taskColumns + ` FROM tasks WHERE user_id = $1 AND id = $2`

func (s *store) readTask(ctx context.Context, user string, id int64) (task, error) {
	return s.single(ctx, &s.reads, &member{user: user, id: id, repeatable: true}, selectTask, user, id)
}

const insertTask = `INSERT INTO tasks (user_id, title, description) VALUES ($1, $2, $3) RETURNING ` + taskColumns

// The update changes nothing: it makes the statement see, lock and return the earlier row, which DO NOTHING would not.
const insertTaskOnce = `INSERT INTO tasks (user_id, title, description, idempotency_key, idempotency_hash)
	VALUES ($1, $2, $3, $4, $5)
	ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL
	DO UPDATE SET idempotency_key = excluded.idempotency_key
	WHERE tasks.idempotency_hash = excluded.idempotency_hash RETURNING ` + taskColumns

// createTask makes a task. With a key it makes one at most once: a repeat with the same title and description returns
// the task as it is now, one with others finds none: errNotFound.
func (s *store) createTask(ctx context.Context, user, key string, in changes) (task, error) {
	if key != "" {
		m := &member{user: user, repeatable: true}
		return s.single(ctx, nil, m, insertTaskOnce, user, in.title, in.description, key, in.hash())
	}
	t, err := s.single(ctx, &s.creations, &member{user: user, in: in}, insertTask, user, in.title, in.description)
	if err == errNotFound { // a trigger returned NULL
		err = errNoRow
	}
	return t, err
}

func (c changes) hash() []byte {
	text := *c.title
	if c.description != nil {
		text += "\x00" + *c.description // no title has a NUL
	}
	sum := sha256.Sum256([]byte(text))
	return sum[:]
}

// assignments set what a request changes, given as the columns of changed. updated_at grows, by a microsecond at least,
// if and only if a value changes. It is computed from times without a zone because Citus allows only IMMUTABLE functions
// of a column in an UPDATE, and now() only outside CASE.
const assignments = `title = coalesce(new_title, title),
	description = CASE WHEN describes THEN new_description ELSE description END,
	is_completed = coalesce(new_is_completed, is_completed),
	updated_at = timezone('UTC', timezone('UTC', updated_at) +
		greatest(timezone('UTC', now()) - timezone('UTC', updated_at), interval '1 microsecond') *
		((coalesce(new_title, title), CASE WHEN describes THEN new_description ELSE description END,
			coalesce(new_is_completed, is_completed)) IS DISTINCT FROM (title, description, is_completed))::int)`

const matches = `user_id = $1 AND id = $2 AND ($3::timestamptz[] IS NULL OR updated_at = ANY ($3::timestamptz[]))`

const updateTask = `UPDATE tasks SET ` + assignments + `
	FROM (SELECT $4::text AS new_title, $5::boolean AS describes, $6::text AS new_description,
		$7::boolean AS new_is_completed) AS changed
	WHERE ` + matches + ` RETURNING ` + taskColumns

// updateTask changes what in has, in one atomic statement, if the task matches; it fails with errModified when it
// exists and does not.
func (s *store) updateTask(ctx context.Context, user string, id int64, match precondition, in changes) (task, error) {
	m := &member{user: user, id: id, in: in, times: match.times()}
	return s.single(ctx, &s.updates, m, updateTask, user, id, pq.Array(m.times), in.title, in.describes, in.description, in.isCompleted)
}

const deleteTask = `DELETE FROM tasks WHERE ` + matches + ` RETURNING ` + taskColumns

func (s *store) deleteTask(ctx context.Context, user string, id int64, match precondition) error {
	m := &member{user: user, id: id, times: match.times()}
	_, err := s.single(ctx, nil, m, deleteTask, user, id, pq.Array(m.times))
	return err
}

// selectTogether looks each task up in the index: LATERAL and LIMIT ask for that, also in a plan that was made while the
// table was small and a sequential scan looked cheap.
const selectTogether = `SELECT ` + taskColumns + `, user_id FROM unnest($1::text[], $2::bigint[]) AS wanted (owner, task),
	LATERAL (SELECT * FROM tasks WHERE user_id = owner AND id = task LIMIT 1) AS tasks`

const insertTogether = `INSERT INTO tasks (user_id, title, description)
	SELECT * FROM unnest($1::text[], $2::text[], $3::text[]) RETURNING ` + taskColumns + `, user_id`

// updateTogether skips tasks that are locked, so that batches neither wait nor deadlock. OFFSET keeps the planner from
// joining in another order.
const updateTogether = `UPDATE tasks SET ` + assignments + `
	FROM (SELECT wanted.* FROM unnest($1::text[], $2::bigint[], $3::text[], $4::boolean[], $5::text[], $6::boolean[])
			AS wanted (owner, task, new_title, describes, new_description, new_is_completed),
		LATERAL (SELECT user_id, id FROM tasks WHERE user_id = owner AND id = task LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS free
		WHERE user_id = owner AND id = task OFFSET 0) AS changed
	WHERE user_id = owner AND id = task RETURNING ` + taskColumns + `, user_id`

// together returns the function with which a batcher answers its members: it runs query, whose parameters are arrays
// of what the columns take from each member. A member that gets no row goes alone, and learns why.
func (s *store) together(query string, columns ...func(*member) any) func(context.Context, []*member) error {
	return func(ctx context.Context, members []*member) error {
		args := make([]any, len(columns))
		for i, column := range columns {
			list := make([]any, len(members))
			for j, m := range members {
				list[j] = column(m)
			}
			args[i] = pq.Array(list)
		}
		return exchange(ctx, s.db, query, arguments(args...), func(row []driver.Value) {
			t := scanTask(row, row[len(row)-1].(string))
			var match *member // asked for this task; a new one has its id from here: of the user's, best one with the same text
			for _, m := range members {
				if m.err == errAlone && m.user == t.userID && (m.id == t.id || query == insertTogether && (match == nil || m.in.made(t))) {
					match = m
				}
			}
			match.task, match.err = t, nil
		})
	}
}

func (c changes) made(t task) bool {
	return *c.title == t.title && (c.description != nil) == t.described && (c.description == nil || *c.description == t.description)
}
