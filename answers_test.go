package main

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestAPanicIsA500AndLoggedOnce(t *testing.T) {
	t.Parallel()
	for development, want := range map[bool]string{
		false: `{"detail":"Internal server error"}`,
		true:  `{"detail":"Internal server error: panic: runtime error: invalid memory address or nil pointer dereference"}`,
	} {
		s := newServiceOn(t, bySecret())
		s.store = &store{timeout: time.Minute, users: userLimit{limit: 1, users: map[string]*userTurns{}}} // which lacks what newStore makes
		s.store.applied.Store(true)
		s.development = development
		s.as(t, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`).is(t, 500, want)
		lines := s.logs.at(slog.LevelError)
		if len(lines) != 1 || !strings.Contains(lines[0], "nil pointer") || !strings.Contains(lines[0], "store.go") {
			t.Errorf("logged %q", lines)
		}
		s.as(t, "", "GET", "/health", "").is(t, 200, `{"status":"healthy"}`)
	}
}

func TestADatabaseErrorIsA503WhoseCauseIsOnlyLogged(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.exec(t, `ALTER TABLE tasks RENAME TO away`)
	for _, test := range [][]string{{"GET", "", ""}, {"GET", "?limit=5", ""}, {"GET", "/1", ""}, {"POST", "", `{"title":"x"}`},
		{"PATCH", "/1", `{}`}, {"DELETE", "/1", ""}} {
		s.as(t, "ann", test[0], "/api/ann/tasks"+test[1], test[2]).is(t, 503, unavailable)
		if lines := s.logs.at(slog.LevelWarn); len(lines) != 1 || !strings.Contains(lines[0], "does not exist") {
			t.Errorf("%v: logged %q", test, lines)
		}
	}
}

func TestAReaderHas30SecondsForEachPartOfAnAnswer(t *testing.T) {
	t.Parallel()
	w := &deadlines{ResponseWriter: httptest.NewRecorder()}
	n, err := (&response{ResponseWriter: w, control: http.NewResponseController(w)}).Write(make([]byte, 3*writePart))
	if err != nil || n != 3*writePart || len(w.set) != 3 || time.Until(w.set[2]).Round(10*time.Second) != 30*time.Second {
		t.Errorf("%d bytes, %v, with %v", n, err, w.set)
	}
}

type deadlines struct {
	http.ResponseWriter
	set []time.Time
}

func (d *deadlines) SetWriteDeadline(t time.Time) error { d.set = append(d.set, t); return nil }
