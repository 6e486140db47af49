package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

const (
	maxBatch     = 64                   // requests in a statement
	maxBatchText = 4 << 10              // bytes of a description that is sent with others; a longer one would hold them up
	patience     = 5 * time.Millisecond // for which a statement holds up the next one
)

// errAlone tells a request that its batch has neither answered nor changed anything for it.
var errAlone = errors.New("not answered by the batch")

// A batcher lets requests of one kind that wait for the database at the same moment share one statement: a round trip
// and a commit cost both sides far more than a row does. A request that comes while none is under way goes out at once,
// alone. Those that come meanwhile go out together, when that one has ended or its patience is over: so a statement that
// waits, for a lock or on a bad connection, does not hold up the others for long.
type batcher struct {
	together func(context.Context, []*member) error // answers those that it can
	mu       sync.Mutex
	busy     bool // a statement that has not used up its patience is under way
	waiting  []*member
}

// A member is a request for one task. It is answered once done is closed.
type member struct {
	user       string
	id         int64
	in         changes
	times      []string        // of the precondition, if any
	repeatable bool            // as attempt has it
	ctx        context.Context // once it waits
	done       chan struct{}
	task       task
	err        error
}

// share answers m by a batch, or by alone, which runs a statement for m only: if none is under way, if the description
// is long, or if another request for the same task waits already, since a row's user and id tell whose answer it is.
func (b *batcher) share(ctx context.Context, m *member, alone func() (task, error)) (task, error) {
	if m.in.description != nil && len(*m.in.description) > maxBatchText {
		return alone()
	}
	b.mu.Lock()
	switch {
	case !b.busy:
		b.busy = true
		b.mu.Unlock()
		defer b.begin()()
		return alone()
	case m.id != 0 && slices.ContainsFunc(b.waiting, func(other *member) bool { return other.user == m.user && other.id == m.id }):
		b.mu.Unlock()
		return alone()
	}
	m = new(*m) // another try must not touch one that a batch may still hold
	m.ctx, m.done, m.err = ctx, make(chan struct{}), errAlone
	b.waiting = append(b.waiting, m)
	b.mu.Unlock()
	select {
	case <-m.done:
	case <-ctx.Done():
		return task{}, fmt.Errorf("no answer by the batch: %w", context.Cause(ctx))
	}
	if m.err == errAlone {
		return alone()
	}
	return m.task, m.err
}

// begin marks the beginning of a statement, and the function that it returns the end: defer b.begin()().
func (b *batcher) begin() (end func()) {
	next := sync.OnceFunc(b.next)
	timer := time.AfterFunc(patience, next)
	return func() {
		timer.Stop()
		next()
	}
}

// next sends the waiting requests that have not been given up, as one statement.
func (b *batcher) next() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = slices.DeleteFunc(b.waiting, func(m *member) bool { return m.ctx.Err() != nil })
	n := min(len(b.waiting), maxBatch)
	if b.busy = n > 0; b.busy {
		go b.run(slices.Clone(b.waiting[:n]))
		b.waiting = slices.Delete(b.waiting, 0, n)
	}
}

// run answers the members by one statement, which ends when all have left. If it is refused or cancelled, one of them or
// the batch itself may be the cause: then each runs a statement of its own.
func (b *batcher) run(members []*member) {
	defer b.begin()()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for _, m := range members {
			<-m.ctx.Done() // attempt cancels it at the latest when it returns
		}
		cancel()
	}()
	err := recovered(func() error { return b.together(ctx, members) }) // there is no other recover here
	if o := outcomeOf(err); err != nil && o != inDoubt && o != noTrace && !errors.Is(err, errPanic) {
		err = errAlone
	}
	for _, m := range members {
		if err != nil {
			m.err = err
		}
		close(m.done)
	}
}
