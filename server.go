package main

import (
	"context"
	"crypto/rand"
	_ "embed"
	"log/slog"
	"net/http"
	"path"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const bodyTimeout = 30 * time.Second // from the start of the request, so that waiting for a turn counts

type server struct {
	auth        *authenticator
	users       userLimit // of requests
	store       *store
	origins     []string // for CORS
	log         *slog.Logger
	development bool
	draining    atomic.Bool // since the first signal
	readiness   struct {    // the database's last answer; it is asked again after next
		sync.Mutex
		next time.Time
		err  error
	}
	chunks sync.Pool // of *chunk, so that lists use their buffers again
}

// handler wires the way of a request: log and recover, CORS, route, token and owner (owned), the route's own handler.
func (s *server) handler() http.Handler { return s.logged(cors(s.origins, s.routes())) }

// routes has all routes. The handlers in own run only for the owner of the path.
func (s *server) routes() handler {
	mux, allow := http.NewServeMux(), map[string]string{}
	handle := func(pattern string, h handler) {
		mux.Handle(pattern, h)
		method, path, _ := strings.Cut(pattern, " ")
		allow[path] += ", " + strings.Replace(method, "GET", "GET, HEAD", 1)
	}
	own := func(next func(*response, *http.Request, string) error) handler { return owned(s.auth, &s.users, next) }

	handle("GET /health", constant([]byte(`{"status":"healthy"}`)))
	handle("GET /ready", s.ready)
	handle("GET /openapi.json", constant(openapiJSON))
	handle("GET /docs", s.docs)
	handle("GET /api/{user_id}/tasks", own(s.listTasks))
	handle("POST /api/{user_id}/tasks", own(s.createTask))
	handle("GET /api/{user_id}/tasks/{task_id}", own(s.readTask))
	handle("PATCH /api/{user_id}/tasks/{task_id}", own(s.updateTask))
	handle("DELETE /api/{user_id}/tasks/{task_id}", own(s.deleteTask))

	for path, methods := range allow { // a pattern without a method matches the methods that are left
		mux.Handle(path, handler(func(w *response, _ *http.Request) error {
			w.Header().Set("Allow", strings.TrimPrefix(methods, ", "))
			return errMethodNotAllowed
		}))
	}
	mux.Handle("/", handler(func(_ *response, r *http.Request) error {
		r.Pattern = "" // no route in the log
		return errNoRoute
	}))
	return func(w *response, r *http.Request) error {
		// ServeMux would redirect an unclean path, and answer OPTIONS * itself.
		if escaped := r.URL.EscapedPath(); !strings.HasPrefix(escaped, "/") || path.Clean(escaped) != escaped {
			return errNoRoute
		}
		mux.ServeHTTP(w, r)
		return w.err
	}
}

var requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9._-]+$`) // and at most 128 bytes

// logged is outermost: it names the request, bounds its body in time, recovers from panics, answers with the error of
// a handler, and writes the log line: a bug at the level of errors, an outage as a warning, and a request whose client
// has gone away with status 499, as nginx does.
func (s *server) logged(next handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		start, w := time.Now(), &response{ResponseWriter: rw, control: http.NewResponseController(rw)}
		id := r.Header.Get("X-Request-ID")
		if len(id) > 128 || !requestIDPattern.MatchString(id) {
			id = rand.Text()
		}
		h := w.Header()
		h["X-Request-Id"] = []string{id}
		h["Cache-Control"] = []string{"private, no-cache, no-transform"} // compression would weaken entity tags
		h["X-Content-Type-Options"] = []string{"nosniff"}
		if s.draining.Load() {
			h["Connection"] = []string{"close"}
		}
		if r.ContentLength != 0 {
			_ = w.control.SetReadDeadline(start.Add(bodyTimeout))
			_ = w.control.SetWriteDeadline(start.Add(bodyTimeout))                                       // for a 100 Continue
			defer context.AfterFunc(r.Context(), func() { _ = w.control.SetReadDeadline(time.Now()) })() // ends reading at a stop
		}
		err := recovered(func() error { return next(w, r) })
		gone := context.Cause(r.Context()) == context.Canceled // by net/http, when the client hung up
		broken := err != nil && w.status != 0                  // the answer had begun
		if err != nil && !broken {
			w.fail(r, err, s.development)
		}
		level, status, cause := slog.LevelInfo, w.status, slog.Attr{}
		if _, public := err.(*publicError); err != nil && !public { // a public error that is not wrapped has no other cause
			cause = slog.String("error", err.Error())
			switch {
			case outcomeOf(err) == bug:
				level = slog.LevelError
			case gone:
				status = 499
			case status < 400 || status >= 500:
				level = slog.LevelWarn
			}
		}
		s.log.LogAttrs(context.Background(), level, "request",
			slog.String("method", r.Method), slog.String("route", r.Pattern[max(0, strings.IndexByte(r.Pattern, '/')):]),
			slog.Int("status", status), slog.Float64("duration_ms", float64(time.Since(start).Microseconds())/1000),
			slog.Int64("bytes", w.bytes), slog.String("user", w.user), slog.String("remote", r.RemoteAddr),
			slog.String("request_id", id), cause)
		if broken {
			panic(http.ErrAbortHandler) // breaks the connection, so that nobody takes a part for the whole answer
		}
	})
}

// ready tells whether to send requests here: the database is asked, at most twice a second, whether it answers
// and has the schema.
func (s *server) ready(w *response, r *http.Request) error {
	switch {
	case s.draining.Load():
		return errStopping
	case !s.store.applied.Load():
		return errNoSchema
	}
	s.readiness.Lock()
	defer s.readiness.Unlock()
	if time.Now().After(s.readiness.next) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), 2*time.Second)
		defer cancel()
		s.readiness.err = s.store.ready(ctx)
		s.readiness.next = time.Now().Add(500 * time.Millisecond) // counted from the answer, which those who waited for the lock take, too
	}
	if s.readiness.err != nil {
		return s.readiness.err
	}
	return w.json(http.StatusOK, []byte(`{"status":"ready"}`))
}

//go:embed openapi.json
var openapiJSON []byte

//go:embed docs.html
var docsHTML []byte

// constant answers with a JSON text.
func constant(text []byte) handler {
	return func(w *response, _ *http.Request) error { return w.json(http.StatusOK, text) }
}

// docsPolicy allows the page its own style and script, by their hashes, and requests to this service. When docs.html
// changes, TestTheDocsRunNothingButTheirOwnScript says what the hashes must be.
const docsPolicy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" +
	"; style-src 'sha256-lln0R5VgA+toCeQQQVmcO8dF9PF2FzKxk3j+hcG0rE4='; script-src 'sha256-t+cAqpLGoHxbVd+c1ge/fZdWHq+fYZTkefLaAanRopg='"

func (s *server) docs(w *response, _ *http.Request) error {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", docsPolicy)
	h.Set("Referrer-Policy", "no-referrer")
	_, _ = w.Write(docsHTML)
	return nil
}
