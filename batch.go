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
	maxBatch     = 64      // requests in a statement
	maxBatchText = 4 << 10 // bytes of a description that is sent with others; a longer one would hold them up
	patience     = 5 * time.Millisecond
)

// errAlone tells a request that its batch has neither answered nor changed anything for it.
var errAlone = errors.New("not answered by the batch")

// A batcher has requests of one kind that wait for the database at the same moment share one statement: a round trip
// and a commit cost both sides far more than a row does. One that comes while none is under way goes out at once,
// alone. Those that come meanwhile go out together, when that one has ended or has taken patience: so a statement
// that waits, for a lock or on a bad connection, holds up nobody for long.
type batcher struct {
	together func(context.Context, []*member) error //  answers those that it can
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

// share answers m by a batch, or by alone, which runs a statement for m only: always if b is nil, if there is a
// precondition, if the description is long, or if another request of the same user waits already: so the user of a
// row tells whose answer it is.
func (b *batcher) share(ctx context.Context, m *member, alone func() (task, error)) (task, error) {
	if b == nil || m.times != nil || m.in.description != nil && len(*m.in.description) > maxBatchText {
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
	m = new(*m) // for another try has another
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

// begin marks the beginning of a statement. The function it returns marks the end.
func (b *batcher) begin() (end func()) {
	next := sync.OnceFunc(b.next)
	timer := time.AfterFunc(patience, next)
	return func() {
		timer.Stop()
		next()
	}
}

// next sends off those who wait, but who have given up.
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

// run answers the members by one statement, which ends when all have left. What was refused or cancelled may have
// been so for the sake of one, or for being a batch: alone, the others get their answers.
func (b *batcher) run(members []*member) {
	defer b.begin()()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for _, m := range members {
			<-m.ctx.Done() // at the latest when it has its answer
		}
		cancel()
	}()
	err := recovered(func() error { return b.together(ctx, members) }) // here no net/http stands above
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
