package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"database/sql/driver"
	_ "embed"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

//go:embed schema.sql
var schema string

var (
	errNotFound    = &httpError{http.StatusNotFound, "Task not found"}
	errModified    = &httpError{http.StatusPreconditionFailed, "Task has been modified"}
	errUnavailable = errors.New("database not available")
	errNoTurn      = errors.New("the user's other requests take all of their share")
)

// A store holds the tasks in PostgreSQL. Each method runs one statement (single a second one, to tell 404 from
// 412), which is sent once unless repeating it is harmless, within the store's time limit. The owner is its
// first argument and first condition. A method fails with errNotFound and the like, or with an error of the
// database. On its way a request goes through do (time, turn, repetition), share (batches), perform (a
// connection that lives) and careful.run (the statement).
type store struct {
	db      *sql.DB
	probe   *sql.DB // one connection of its own for readiness and schema
	timeout time.Duration
	users   fairness

	reads, creations, changes batcher
	distributed               atomic.Bool // each statement is for one of several servers
}

var noStore = new(store)

// newStore makes a store without connecting. size is the number of connections that requests share;
// timeout is how long a request may wait for the database, connecting and waiting included.
func newStore(cfg pq.Config, size int, timeout time.Duration) *store {
	db := sql.OpenDB(newConnector(cfg, timeout))
	db.SetMaxOpenConns(size)
	db.SetMaxIdleConns(size)
	db.SetConnMaxIdleTime(5 * time.Minute)
	db.SetConnMaxLifetime(time.Hour)
	probe := sql.OpenDB(newConnector(cfg, timeout))
	probe.SetMaxOpenConns(1)
	s := &store{db: db, probe: probe, timeout: timeout, users: fairness{limit: max(1, size/2), held: map[string]*held{}}}
	s.reads.together, s.creations.together, s.changes.together = s.readTogether, s.createTogether, s.changeTogether
	return s
}

func (s *store) close() error { return errors.Join(s.db.Close(), s.probe.Close()) }

// schemaApplied asks the database whether schema.sql has been applied in full, and whether the table is on
// several servers: by Citus, or in foreign partitions.
func (s *store) schemaApplied(ctx context.Context) (applied bool, err error) {
	const query = `SELECT to_regclass('tasks_user_id_idempotency_key_idx') IS NOT NULL, to_regclass('pg_dist_partition') IS NOT NULL OR
		EXISTS (SELECT 1 FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = to_regclass('tasks') AND relkind = 'f')`
	err = perform(ctx, s.probe, query, nil, func(row []driver.Value) {
		applied = row[0] == true
		s.distributed.Store(row[1] == true)
	})
	return applied, err
}

// applySchema brings the database to schema.sql where it is not there yet. It may wait for another
// replica that does the same.
func (s *store) applySchema(ctx context.Context) error {
	asking, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	applied, err := s.schemaApplied(asking)
	if applied {
		err = perform(asking, s.probe, `SELECT `+taskColumns+` FROM tasks LIMIT 0`, nil, discard)
	}
	missing := err == nil && !applied
	outdated := pq.As(err, "42703") != nil // undefined_column: one that this version has added
	if missing || outdated {
		return perform(ctx, s.probe, schema, nil, discard)
	}
	return err
}

// perform sends one statement over a connection of db, as careful.run does. One that turns out to have ended
// while it was idle is passed over.
func perform(ctx context.Context, db *sql.DB, query string, args []driver.NamedValue, row func([]driver.Value)) error {
	for {
		conn, err := db.Conn(ctx)
		if err != nil {
			return err
		}
		err = conn.Raw(func(c any) error { return c.(*careful).run(ctx, query, args, row) })
		_ = conn.Close()
		if err != driver.ErrBadConn {
			return err
		}
	}
}

// discard is for a result that does not matter.
func discard([]driver.Value) {}

// arguments are the values of $1, $2, …: whatever database/sql would take.
func arguments(values ...any) []driver.NamedValue {
	args := make([]driver.NamedValue, len(values))
	for i, value := range values {
		value, _ = driver.DefaultParameterConverter.ConvertValue(value)
		args[i] = driver.NamedValue{Ordinal: i + 1, Value: value}
	}
	return args
}

// do runs f, which sends one statement, for a user: within the time limit, in the user's turn, and
// again after a failure that left nothing behind. repeatable says that f is harmless to repeat even
// when nobody knows whether it took effect. noStore stands for one that has not reached its database yet.
func do[T any](ctx context.Context, s *store, user string, repeatable bool, f func(context.Context) (T, error)) (result T, err error) {
	if s == noStore {
		return result, fmt.Errorf("%w: not connected yet", errUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	own := s.users.count(user, 1)
	defer s.users.count(user, -1)
	select {
	case own.places <- struct{}{}:
		defer func() { <-own.places }()
	case <-ctx.Done():
		return result, fmt.Errorf("%w: %w", errNoTurn, ctx.Err())
	}
	for wait := time.Duration(0); ; wait = min(2*wait+10*time.Millisecond, 250*time.Millisecond) {
		if result, err = f(ctx); err == nil || !harmless(err) && !(repeatable && inDoubt(err)) {
			return result, err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return result, fmt.Errorf("%w: %w", errUnavailable, err)
		}
	}
}

// harmless reports a failure that left no trace of the statement: it was not sent, or rolled back.
func harmless(err error) bool {
	return errors.As(err, new(connectError)) ||
		// serialization_failure, deadlock_detected, read_only_sql_transaction, and the two of a prepared
		// statement that is out of date: feature_not_supported, invalid_sql_statement_name
		pq.As(err, "40001", "40P01", "25006", "0A000", "26000") != nil
}

// inDoubt reports a failure after which the statement may have taken effect.
func inDoubt(err error) bool {
	if e := pq.As(err); e != nil { // connection exception (a pooler's words), operator intervention
		return e.Code.Class() == "08" || e.Code.Class() == "57" && e.Code != "57014"
	}
	return errors.Is(err, errInDoubt)
}

// isBug reports an error that says something about this program rather than about the state of the
// database: a panic, bad data, a broken constraint, a wrong statement.
func isBug(err error) bool {
	if e := pq.As(err); e != nil && e.Code != "42P01" && e.Code != "42501" { // undefined_table, insufficient_privilege
		class := e.Code.Class()
		return class == "22" || class == "23" || class == "42"
	}
	return errors.Is(err, errPanic)
}

// taskColumns is what scanTask reads. Times travel as text, which lib/pq need not parse.
const taskColumns = `id, title, description, is_completed, created_at::text, updated_at::text`

// scanTask reads a row of taskColumns.
func scanTask(row []driver.Value, user string) task {
	t := task{id: row[0].(int64), userID: user, title: row[1].(string), isCompleted: row[3].(bool),
		createdAt: row[4].(string), updatedAt: row[5].(string)}
	t.description, t.hasDescription = row[2].(string)
	return t
}

// one runs a statement that returns one task at most, errNotFound when there is none.
func (s *store) one(ctx context.Context, user, query string, args []driver.NamedValue) (t task, err error) {
	err = errNotFound
	if failed := perform(ctx, s.db, query, args, func(row []driver.Value) {
		t, err = scanTask(row, user), nil
	}); failed != nil {
		err = failed
	}
	return t, err
}

const selectTask = `SELECT ` + taskColumns + ` FROM tasks WHERE user_id = $1 AND id = $2`

// single runs a statement about one task for m, alone or by a batch of b. One that finds no row since the
// task does not match fails with errModified: the statement has decided, this only finds the words.
func (s *store) single(ctx context.Context, b *batcher, m *member, query string, args ...any) (task, error) {
	alone := func(ctx context.Context) (task, error) {
		t, err := s.one(ctx, m.user, query, arguments(args...))
		if err == errNotFound && m.times != nil {
			if _, err = s.one(ctx, m.user, selectTask, arguments(m.user, m.id)); err == nil {
				err = errModified
			}
		}
		return t, err
	}
	return do(ctx, s, m.user, m.repeatable, func(ctx context.Context) (task, error) {
		return s.share(ctx, b, m, alone)
	})
}

// task returns one task.
func (s *store) task(ctx context.Context, user string, id int64) (task, error) {
	return s.single(ctx, &s.reads, &member{user: user, id: id, repeatable: true}, selectTask, user, id)
}

// createTask makes a task. With a key it makes one at most once: a repeat with the same title and
// description returns the task as it is now, one with others finds none: errNotFound.
func (s *store) createTask(ctx context.Context, user, key string, in taskInput) (task, error) {
	const insert = `INSERT INTO tasks (user_id, title, description) VALUES ($1, $2, $3) RETURNING ` + taskColumns
	// The update changes nothing: it makes the statement see, lock and return the earlier row, which
	// DO NOTHING would not.
	const insertOnce = `INSERT INTO tasks (user_id, title, description, idempotency_key, idempotency_hash)
		VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL
		DO UPDATE SET idempotency_key = excluded.idempotency_key
		WHERE tasks.idempotency_hash = excluded.idempotency_hash RETURNING ` + taskColumns
	if key == "" {
		return s.single(ctx, &s.creations, &member{user: user, in: in}, insert, user, in.title, in.description)
	}
	return s.single(ctx, nil, &member{user: user, repeatable: true}, insertOnce, user, in.title, in.description, key, in.hash())
}

// hash identifies the body of a POST.
func (in taskInput) hash() []byte {
	text := *in.title
	if in.description != nil {
		text += "\x00" + *in.description // no title has a NUL
	}
	sum := sha256.Sum256([]byte(text))
	return sum[:]
}

// made reports whether t has the title and the description of in.
func (in taskInput) made(t task) bool {
	return *in.title == t.title && (in.description != nil) == t.hasDescription &&
		(in.description == nil || *in.description == t.description)
}

// assignments set what a request has changed, given as the columns of changed. The time moves on if and
// only if a value does, and always forward.
const assignments = `title = coalesce(new_title, title),
	description = CASE WHEN describes THEN new_description ELSE description END,
	is_completed = coalesce(new_is_completed, is_completed),
	updated_at = CASE
		WHEN (coalesce(new_title, title), CASE WHEN describes THEN new_description ELSE description END,
			coalesce(new_is_completed, is_completed)) IS DISTINCT FROM (title, description, is_completed)
		THEN greatest(now(), updated_at + interval '1 microsecond') ELSE updated_at END`

// updateTask changes what in has, in one atomic statement, if the task matches; it fails with
// errModified when it exists and does not.
func (s *store) updateTask(ctx context.Context, user string, id int64, match precondition, in taskInput) (task, error) {
	const query = `UPDATE tasks SET ` + assignments + `
		FROM (SELECT $4::text AS new_title, $5::boolean AS describes, $6::text AS new_description,
			$7::boolean AS new_is_completed) AS changed
		WHERE user_id = $1 AND id = $2 AND ($3::timestamptz[] IS NULL OR updated_at = ANY ($3::timestamptz[]))
		RETURNING ` + taskColumns
	m := &member{user: user, id: id, in: in, times: match.times()}
	return s.single(ctx, &s.changes, m, query, user, id, m.times, in.title, in.hasDescription, in.description, in.isCompleted)
}

// deleteTask deletes a task if it matches; it fails with errModified when it exists and does not.
func (s *store) deleteTask(ctx context.Context, user string, id int64, match precondition) error {
	const query = `DELETE FROM tasks
		WHERE user_id = $1 AND id = $2 AND ($3::timestamptz[] IS NULL OR updated_at = ANY ($3::timestamptz[]))
		RETURNING ` + taskColumns
	m := &member{user: user, id: id, times: match.times()}
	_, err := s.single(ctx, nil, m, query, user, id, m.times)
	return err
}

// fairness bounds how many statements one user can have under way, so that nobody's flood takes the
// whole pool from the others. What is beyond waits.
type fairness struct {
	limit int
	mu    sync.Mutex
	held  map[string]*held // by users with requests here
}

type held struct {
	places   chan struct{}
	requests int // under way and waiting
}

// count adds a request to those of user, or with -1 takes one away.
func (f *fairness) count(user string, change int) *held {
	f.mu.Lock()
	defer f.mu.Unlock()
	own := f.held[user]
	if own == nil {
		own = &held{places: make(chan struct{}, f.limit)}
		f.held[user] = own
	}
	if own.requests += change; own.requests == 0 {
		delete(f.held, user)
	}
	return own
}
