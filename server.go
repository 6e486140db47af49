package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxBody     = 1 << 20
	bodyTimeout = 30 * time.Second
	// drainBytes of a body are read before an answer that does not need it: an answer to a client
	// that is still sending would be lost with the connection.
	drainBytes = 8 << 20
)

// A server answers HTTP requests. Its store is there once the database is.
type server struct {
	auth        *authenticator
	origins     []string // for CORS
	log         *slog.Logger
	development bool
	private     *devDB // nil with a DATABASE_URL
	store       atomic.Pointer[store]
	draining    atomic.Bool // since the first signal
	lastReady   struct {    // what the database said last, to be asked again from next on
		sync.Mutex
		next time.Time
		err  error
	}
	buffers sync.Pool // of *[]byte, for lists
}

var (
	errPanic    = errors.New("panic")
	errStopping = errors.New("the service is stopping")
)

// A handler answers a request or returns why not, for fail to answer.
type handler func(*response, *http.Request) error

type route struct {
	method, pattern string
	handler         handler
}

// routes lists all there is. The handlers under own run only for the owner of the path.
func (s *server) routes() []route {
	own := s.auth.own
	return []route{
		{"GET", "/health", s.health},
		{"GET", "/ready", s.ready},
		{"GET", "/openapi.json", s.openapi},
		{"GET", "/docs", s.docs},
		{"GET", "/api/{user_id}/tasks", own(s.listTasks)},
		{"POST", "/api/{user_id}/tasks", own(s.createTask)},
		{"GET", "/api/{user_id}/tasks/{task_id}", own(s.task)},
		{"PATCH", "/api/{user_id}/tasks/{task_id}", own(s.updateTask)},
		{"DELETE", "/api/{user_id}/tasks/{task_id}", own(s.deleteTask)},
	}
}

// handler is the way of a request: log and recover, CORS, route, auth (in own), handler.
func (s *server) handler() http.Handler { return s.logged(cors(s.origins, routed(s.routes()))) }

// routed sends a request to its route. net/http's ServeMux would redirect unclean paths and answer
// 404 and 405 in plain text.
func routed(routes []route) handler {
	return func(w *response, r *http.Request) error {
		var allow []string
		for _, route := range routes {
			if !matches(route.pattern, r) {
				continue
			}
			r.Pattern = route.pattern
			if route.method == r.Method || route.method == "GET" && r.Method == "HEAD" {
				return route.handler(w, r)
			}
			if allow = append(allow, route.method); route.method == "GET" {
				allow = append(allow, "HEAD")
			}
		}
		if allow == nil {
			return &httpError{http.StatusNotFound, "Not Found"}
		}
		w.Header().Set("Allow", strings.Join(allow, ", "))
		return &httpError{http.StatusMethodNotAllowed, "Method Not Allowed"}
	}
}

// matches compares the escaped path with a pattern, segment by segment, and sets the path values. A
// {name} stands for one segment that is not empty.
func matches(pattern string, r *http.Request) bool {
	path := cmp.Or(r.URL.RawPath, r.URL.EscapedPath()) // EscapedPath alone loses %2F beside some odd bytes
	if strings.Count(path, "/") != strings.Count(pattern, "/") {
		return false
	}
	segments := strings.Split(path, "/")
	for i, want := range strings.Split(pattern, "/") {
		text, err := url.PathUnescape(segments[i])
		if name, ok := strings.CutPrefix(want, "{"); ok && err == nil && text != "" {
			r.SetPathValue(strings.TrimSuffix(name, "}"), text)
		} else if text != want {
			return false
		}
	}
	return true
}

// A response is the http.ResponseWriter of all handlers: it remembers what the log wants to know.
type response struct {
	http.ResponseWriter
	status int
	bytes  int64
	user   string // whom the token names
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader remembers the status.
func (w *response) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Write counts what goes out.
func (w *response) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(b)
	w.bytes += int64(n)
	return n, err
}

// json answers with a whole JSON text. Here, as wherever each request passes, headers are set by their canonical
// names: Set would look for them, and allocate.
func (w *response) json(status int, body []byte) error {
	w.Header()["Content-Type"] = []string{"application/json"}
	w.Header()["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	_, _ = w.Write(body) // whoever has gone away needs no answer
	return nil
}

var saneRequestID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)

// logged is outermost: it names the request, bounds its body in time, recovers from panics, and
// writes the log line.
func (s *server) logged(next handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		start, w := time.Now(), &response{ResponseWriter: rw}
		id := r.Header.Get("X-Request-ID")
		if !saneRequestID.MatchString(id) {
			id = rand.Text()
		}
		h := w.Header()
		h["X-Request-Id"] = []string{id}
		h["Cache-Control"] = []string{"private, no-cache"}
		h["X-Content-Type-Options"] = []string{"nosniff"}
		if s.draining.Load() {
			h["Connection"] = []string{"close"}
		}
		if r.ContentLength != 0 {
			control := http.NewResponseController(rw)
			_ = control.SetReadDeadline(start.Add(bodyTimeout))
			defer context.AfterFunc(r.Context(), func() { _ = control.SetReadDeadline(time.Now()) })()
		}
		err := recovered(func() error { return next(w, r) })
		broken := err != nil && w.status != 0 // after the beginning of an answer
		if err != nil && !broken {
			s.fail(w, r, err)
		}
		s.logRequest(w, r, id, time.Since(start), err)
		if broken {
			panic(http.ErrAbortHandler) // breaks the connection, so that nobody takes what has gone out for all
		}
	})
}

// recovered runs f, and makes an error of a panic.
func recovered(f func() error) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("%w: %v\n%s", errPanic, cause, debug.Stack())
		}
	}()
	return f()
}

// logRequest writes the one line about a request that ended with err. A bug is an error, an outage a warning.
func (s *server) logRequest(w *response, r *http.Request, id string, took time.Duration, err error) {
	level := slog.LevelInfo
	if r.Method == http.MethodHead {
		w.bytes = 0
	}
	attrs := []slog.Attr{
		slog.String("method", r.Method), slog.String("route", r.Pattern), slog.Int("status", w.status),
		slog.Float64("duration_ms", float64(took.Microseconds())/1000), slog.Int64("bytes", w.bytes),
		slog.String("user", w.user), slog.String("remote", r.RemoteAddr), slog.String("request_id", id),
	}
	switch err.(type) {
	case nil, *httpError, validation: // the answer says it all
	default:
		attrs = append(attrs, slog.String("error", err.Error()))
		if isBug(err) {
			level = slog.LevelError
		} else if (w.status < 400 || w.status >= 500) && context.Cause(r.Context()) != context.Canceled { // by the client
			level = slog.LevelWarn
		}
	}
	s.log.LogAttrs(context.Background(), level, "request", attrs...)
}

// An httpError is an answer that says all there is to say: the public words for an error.
type httpError struct {
	status int
	detail string
}

func (e *httpError) Error() string { return e.detail }

// fail answers with an error: the only place where one becomes a response. What clients are told is
// fixed; the cause of a 5xx goes to the log.
func (s *server) fail(w *response, r *http.Request, err error) {
	var public *httpError
	var faults validation
	status, detail := http.StatusInternalServerError, any("Internal server error")
	h := w.Header()
	switch {
	case errors.As(err, &public):
		status, detail = public.status, public.detail
	case errors.As(err, &faults):
		status, detail = http.StatusUnprocessableEntity, faults
	case !isBug(err): // all that is left comes from the database, or the JWKS
		status, detail = http.StatusServiceUnavailable, "Service temporarily unavailable"
		h.Set("Retry-After", "1")
	case s.development:
		cause, _, _ := strings.Cut(err.Error(), "\n") // without the stack of a panic
		detail = "Internal server error: " + cause
	}
	if status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	if r.ContentLength != 0 && r.Header.Get("Expect") == "" { // who sends Expect waits for the answer first
		_, _ = io.CopyN(io.Discard, r.Body, drainBytes)
	}
	body, err := json.Marshal(map[string]any{"detail": detail})
	if err != nil {
		panic(err)
	}
	_ = w.json(status, body)
}

// readBody reads the body of a POST or PATCH as JSON. Its value is empty when the body is.
func readBody(w *response, r *http.Request) (jsonValue, error) {
	tooLarge := &httpError{http.StatusRequestEntityTooLarge, "Request body too large"}
	if r.ContentLength > maxBody {
		return jsonValue{}, tooLarge
	}
	text := bytes.NewBuffer(make([]byte, 0, max(r.ContentLength, 0)+bytes.MinRead))
	_, err := text.ReadFrom(io.LimitReader(r.Body, maxBody+1))
	switch {
	case text.Len() > maxBody:
		return jsonValue{}, tooLarge
	case context.Cause(r.Context()) == errStopping: // net/http itself cancels the context when a read fails
		return jsonValue{}, fmt.Errorf("reading the body: %w", errStopping)
	case errors.Is(err, os.ErrDeadlineExceeded):
		w.Header()["Connection"] = []string{"close"}
		return jsonValue{}, &httpError{http.StatusRequestTimeout, "Request body too slow"}
	case err != nil:
		w.Header()["Connection"] = []string{"close"}
		return jsonValue{}, &httpError{http.StatusBadRequest, "Request body incomplete or malformed"}
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	if lines, ok := r.Header["Content-Type"]; ok {
		media, _, err := mime.ParseMediaType(strings.Join(lines, ", ")) // of two lines: malformed
		structured, _ := path.Match("?*/?*+json", media)
		if err != nil || media != "application/json" && !structured {
			return jsonValue{}, &httpError{http.StatusUnsupportedMediaType, "Unsupported media type"}
		}
	}
	if text.Len() == 0 {
		return jsonValue{}, nil
	}
	body, fault := parseJSON(text.Bytes())
	if fault != nil {
		var v validation
		v.add("json_invalid", "JSON decode error", []byte("{}"), map[string]any{"error": fault.msg}, "body", fault.offset)
		return jsonValue{}, v
	}
	return body, nil
}

func (s *server) health(w *response, _ *http.Request) error {
	return w.json(http.StatusOK, []byte(`{"status":"healthy"}`))
}

const (
	readyPeriod  = 500 * time.Millisecond
	readyTimeout = 2 * time.Second
)

// ready tells whether to send requests here: the database is asked, at most once in readyPeriod, whether it
// answers and has the schema.
func (s *server) ready(w *response, r *http.Request) error {
	store := s.tasks()
	if s.draining.Load() {
		return errStopping
	}
	if store == noStore {
		return fmt.Errorf("%w: not connected yet", errUnavailable)
	}
	s.lastReady.Lock()
	defer s.lastReady.Unlock()
	if time.Now().After(s.lastReady.next) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), min(readyTimeout, store.timeout))
		defer cancel()
		applied, err := store.schemaApplied(ctx)
		if err == nil && !applied {
			err = fmt.Errorf("%w: the schema is not in place", errUnavailable)
		}
		s.lastReady.err, s.lastReady.next = err, time.Now().Add(readyPeriod) // from the answer on: those who waited for it take it
	}
	if s.lastReady.err != nil {
		return s.lastReady.err
	}
	return w.json(http.StatusOK, []byte(`{"status":"ready"}`))
}

// tasks returns the store, noStore as long as the database has not been reached.
func (s *server) tasks() *store { return cmp.Or(s.store.Load(), noStore) }
