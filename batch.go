package main

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/lib/pq"
)

// This file has requests that wait for the database at the same moment share one statement: a round
// trip and a commit cost both sides far more than a row does.

const (
	maxBatch     = 64      // requests in a statement
	maxBatchText = 4 << 10 // bytes of a description that goes with others; a longer one would hold them up
	patience     = 5 * time.Millisecond
)

// errAlone tells a request that its batch has neither answered nor changed anything for it.
var errAlone = errors.New("not answered by the batch")

// A batcher runs the requests of one kind. One that comes while none is under way goes out at once,
// alone. Those that come meanwhile go out together, when that one has ended or has taken patience: so
// a statement that waits, for a lock or on a bad connection, holds up nobody for long.
type batcher struct {
	together func(context.Context, []*member) error // answers those that it can

	mu      sync.Mutex
	busy    bool // a statement that has not used up its patience is under way
	waiting []*member
}

// A member is a request for one task, with the answer to it once done is closed.
type member struct {
	user       string
	id         int64
	in         taskInput
	times      *string // of the precondition, if any
	repeatable bool    // as do has it

	deadline time.Time // of the request
	task     task
	err      error
	done     chan struct{}
	leave    func() // once it has been sent off: tells the batch that nobody waits for this answer any more
}

// share answers m by a batch of b, if there is one, or by alone, a statement for m only.
func (s *store) share(ctx context.Context, b *batcher, m *member, alone func(context.Context) (task, error)) (task, error) {
	if text := m.in.description; b == nil || m.times != nil || s.distributed.Load() || text != nil && len(*text) > maxBatchText {
		return alone(ctx)
	}
	b.mu.Lock()
	if !b.busy {
		b.busy = true
		b.mu.Unlock()
		defer b.statement()()
		return alone(ctx)
	}
	m.deadline, _ = ctx.Deadline()
	m.done, m.err = make(chan struct{}), errAlone
	b.waiting = append(b.waiting, m)
	b.mu.Unlock()
	select {
	case <-m.done:
	case <-ctx.Done():
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.waiting = slices.DeleteFunc(b.waiting, func(other *member) bool { return other == m }); m.leave != nil {
			m.leave()
		}
		return task{}, fmt.Errorf("%w: %w", errUnavailable, context.Cause(ctx))
	}
	if m.err == errAlone {
		return alone(ctx)
	}
	return m.task, m.err
}

// statement marks the beginning of a statement. The function it returns marks the end.
func (b *batcher) statement() (end func()) {
	next := sync.OnceFunc(b.next)
	timer := time.AfterFunc(patience, next)
	return func() {
		timer.Stop()
		next()
	}
}

// next sends off those who wait.
func (b *batcher) next() {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := min(len(b.waiting), maxBatch)
	if b.busy = n > 0; !b.busy {
		return
	}
	members := slices.Clone(b.waiting[:n])
	b.waiting = slices.Delete(b.waiting, 0, n)
	// What goes on after one's 503 may undo what he does next, so the statement has only cancelGrace left then,
	// like one of his own. It is not cancelled at once, unless all have left: that may leave in doubt what was
	// just about to end well for the others.
	first := slices.MinFunc(members, func(m, other *member) int { return m.deadline.Compare(other.deadline) })
	ctx, cancel := context.WithDeadline(context.Background(), first.deadline.Add(cancelGrace))
	staying := n
	for _, m := range members {
		m.leave = func() {
			if staying--; staying == 0 {
				cancel()
			}
		}
	}
	go b.run(ctx, cancel, members)
}

// run answers the members.
func (b *batcher) run(ctx context.Context, cancel func(), members []*member) {
	defer b.statement()()
	defer cancel()
	err := recovered(func() error { return b.together(ctx, members) }) // here no net/http stands above
	// What was refused, or cancelled, may have been so for the sake of one, or for being a batch (0A000,
	// feature_not_supported): alone, the others get their answers.
	sparesAll := err != nil && !inDoubt(err) && !harmless(err) && !errors.Is(err, errPanic)
	if sparesAll || pq.As(err, "0A000") != nil {
		err = errAlone
	}
	for _, m := range members {
		if err != nil {
			m.err = err
		}
		close(m.done)
	}
}

// whereSmall leaves out tasks that are better sent alone: see maxBatchText.
const whereSmall = ` WHERE (description IS NULL OR octet_length(description) <= 4096)`

// selectTogether looks each task up in the index, also by a plan that was made while the table was small, when
// reading all of it seemed as good: that is what LATERAL and LIMIT say.
const selectTogether = `SELECT ` + taskColumns + `, number
	FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS wanted (owner, task, number),
		LATERAL (SELECT * FROM tasks WHERE user_id = owner AND id = task LIMIT 1) AS tasks` + whereSmall

// readTogether reads tasks; who gets none goes alone, and learns so.
func (s *store) readTogether(ctx context.Context, members []*member) error {
	return perform(ctx, s.db, selectTogether, arguments(column(members, owner), column(members, taskID)), deliver(members))
}

// createTogether makes tasks of requests without a key.
func (s *store) createTogether(ctx context.Context, members []*member) error {
	const query = `INSERT INTO tasks (user_id, title, description)
		SELECT * FROM unnest($1::text[], $2::text[], $3::text[]) RETURNING ` + taskColumns + `, user_id`
	return perform(ctx, s.db, query, arguments(column(members, owner), column(members, title), column(members, description)),
		func(row []driver.Value) {
			// The rows come in the order of the arrays, but nobody promises it: each goes to who asked for its text,
			// or where a trigger has changed that, to one of the same user.
			t := scanTask(row, row[len(row)-1].(string))
			var m *member
			for _, other := range members {
				if other.err == errAlone && other.user == t.userID && (m == nil || other.in.made(t)) {
					m = other
				}
			}
			m.task, m.err = t, nil
		})
}

// updateTogether passes over tasks that are locked, so that it waits for nobody, nor two batches for each
// other, and over all but one change of the same task. OFFSET keeps the planner from joining in another order.
const updateTogether = `UPDATE tasks SET ` + assignments + `
	FROM (SELECT wanted.* FROM unnest($1::text[], $2::bigint[], $3::text[], $4::boolean[], $5::text[], $6::boolean[])
			WITH ORDINALITY AS wanted (owner, task, new_title, describes, new_description, new_is_completed, number),
		LATERAL (SELECT user_id, id, description FROM tasks WHERE user_id = owner AND id = task LIMIT 1
			FOR NO KEY UPDATE SKIP LOCKED) AS free` + whereSmall + ` AND user_id = owner AND id = task OFFSET 0) AS changed
	WHERE user_id = owner AND id = task RETURNING ` + taskColumns + `, number`

func (s *store) changeTogether(ctx context.Context, members []*member) error {
	describes := column(members, func(m *member) bool { return m.in.hasDescription })
	isCompleted := column(members, func(m *member) *bool { return m.in.isCompleted })
	return perform(ctx, s.db, updateTogether, arguments(column(members, owner), column(members, taskID), column(members, title), describes,
		column(members, description), isCompleted), deliver(members))
}

// deliver answers the members by rows of taskColumns and the number of the member, from 1 on.
func deliver(members []*member) func([]driver.Value) {
	return func(row []driver.Value) {
		m := members[row[len(row)-1].(int64)-1]
		m.task, m.err = scanTask(row, m.user), nil
	}
}

// column is what the members have in one place, as a PostgreSQL array.
func column[T any](members []*member, value func(*member) T) any {
	list := make([]T, len(members))
	for i, m := range members {
		list[i] = value(m)
	}
	return pq.Array(list)
}

// What the columns are made of.
func owner(m *member) string        { return m.user }
func taskID(m *member) int64        { return m.id }
func title(m *member) *string       { return m.in.title }
func description(m *member) *string { return m.in.description }
