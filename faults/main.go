// Command faults breaks what TaskFlow stands on, and looks whether TaskFlow keeps its promises. See
// README.md; faults/run builds and runs it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	patience      = 2 * time.Second // DB_POOL_TIMEOUT of the services
	longest       = patience + time.Second
	readyPatience = 3500 * time.Millisecond // 2 s for the database, 0.7 s to give up, and somewhat more
)

// A row of the table: what was done, and what came of it.
type row struct {
	what               string
	requests, good     int
	unavailable, other int
	cut                int // long lists that broke off
	longest, recovery  time.Duration
	lost, doubled      int
	notes              []string
	faults             []string // broken promises
}

func (r *row) fault(format string, args ...any) {
	r.faults = append(r.faults, fmt.Sprintf(format, args...))
}
func (r *row) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// row begins a row of the table.
func (s *suite) row(what string) *row {
	r := &row{what: what}
	s.rows = append(s.rows, r)
	return r
}

const layout = "%-54s %8s %8s %6s %6s %8s %9s %5s %8s  %s\n"

// print prints the row, and what is wrong with it.
func (r *row) print() {
	verdict := "ok"
	if len(r.faults) > 0 {
		verdict = "BROKEN"
	}
	if r.cut > 0 {
		r.note("%d long lists cut off", r.cut)
	}
	seconds := func(d time.Duration) string {
		if d == 0 {
			return "-"
		}
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
	fmt.Printf(layout, r.what, fmt.Sprint(r.requests), fmt.Sprint(r.good), fmt.Sprint(r.unavailable), fmt.Sprint(r.other),
		seconds(r.longest), seconds(r.recovery), fmt.Sprint(r.lost), fmt.Sprint(r.doubled),
		strings.Join(append([]string{verdict}, r.notes...), "; "))
	for i, fault := range r.faults {
		if i == 8 {
			fmt.Printf("    … and %d more\n", len(r.faults)-i)
			break
		}
		fmt.Printf("    %s\n", fault)
	}
}

// A scenario makes rows.
type scenario struct {
	name string
	run  func(*suite)
}

func main() {
	inTurn := []scenario{
		{"restart", restarts}, {"answers", lostAnswers}, {"start", startUp}, {"failover", failover}, {"synchronous", synchronous},
		{"hanging", hangingPrimary}, {"rolling", rollingRestart}, {"ten", tenReplicas}, {"race", races}, {"pgbouncer", pgbouncer},
		{"switch", switched}, {"overload", overload}, {"locked", locked}, {"flood", flood}, {"memory", memory}, {"cancels", lostCancels},
		{"hangup", hangUps},
		{"partitions", partitions}, {"foreign", foreignPartitions},
	}
	aside := scenario{"slow", slow} // takes long and does little: runs beside the others
	began := time.Now()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	var suites []*suite
	start := func(sc scenario) (done chan *suite) {
		s := newSuite(os.Args[1])
		suites = append(suites, s)
		done = make(chan *suite, 1)
		go func() {
			s.perform(sc)
			done <- s
		}()
		return done
	}
	passed, failed := 0, 0
	finish := func(done chan *suite) {
		select {
		case s := <-done:
			for _, r := range s.rows {
				if r.print(); len(r.faults) > 0 {
					failed++
				} else {
					passed++
				}
			}
		case <-ctx.Done():
			for _, s := range suites {
				s.close()
			}
			os.Exit(1)
		}
	}
	wanted := func(sc scenario) bool {
		return len(os.Args) == 2 || slices.ContainsFunc(os.Args[2:], func(word string) bool { return strings.Contains(sc.name, word) })
	}
	fmt.Printf(layout, "what was done", "requests", "2xx", "503", "other", "longest", "recovery", "lost", "doubled", "")
	var last chan *suite
	if wanted(aside) {
		last = start(aside)
	}
	for _, sc := range inTurn {
		if wanted(sc) {
			finish(start(sc))
		}
	}
	if last != nil {
		finish(last)
	}
	fmt.Printf("\n%.0f s\n%d passed, %d failed\n", time.Since(began).Seconds(), passed, failed)
	if failed > 0 || passed == 0 {
		os.Exit(1)
	}
}

// perform runs a scenario, and ends what it has started. One that cannot go on has failed.
func (s *suite) perform(sc scenario) {
	defer s.close()
	defer func() {
		if cause := recover(); cause != nil {
			s.row(sc.name+" could not go on").fault("%v", cause)
		}
	}()
	sc.run(s)
}
