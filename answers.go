package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// writeTimeout is how long a client may take for the next writePart bytes of an answer.
const (
	writeTimeout = 30 * time.Second
	writePart    = 64 << 10
)

// A response is the http.ResponseWriter of all handlers. It remembers what the log wants to know.
type response struct {
	http.ResponseWriter
	control *http.ResponseController
	status  int
	bytes   int64
	user    string // whom the token names
	err     error  // what the handler returned
}

// A handler answers a request, or returns why it cannot: an error that fail turns into the answer.
type handler func(*response, *http.Request) error

// ServeHTTP lets http.ServeMux call a handler. It leaves the error in the response, since ServeMux returns none.
func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	response := w.(*response)
	response.err = h(response, r)
}

// WriteHeader remembers the status.
func (w *response) WriteHeader(status int) {
	w.status = status
	_ = w.control.SetWriteDeadline(time.Now().Add(writeTimeout))
	w.ResponseWriter.WriteHeader(status)
}

// Write writes b in parts, each within writeTimeout.
func (w *response) Write(b []byte) (written int, err error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	for len(b) > 0 && err == nil {
		var n int
		n, err = w.ResponseWriter.Write(b[:min(len(b), writePart)])
		if b, written = b[n:], written+n; len(b) > 0 {
			_ = w.control.SetWriteDeadline(time.Now().Add(writeTimeout))
		}
	}
	w.bytes += int64(written)
	return written, err
}

// json answers with a whole JSON text. Headers that every answer has are set by their canonical names: Header.Set
// would look the name up each time.
func (w *response) json(status int, body []byte) error {
	w.Header()["Content-Type"] = []string{"application/json"}
	w.Header()["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	_, _ = w.Write(body) // a client that has gone away needs no answer
	return nil
}

// notModified sets the entity tag, and answers 304 if the client has what it stands for (RFC 9110 section 13.1.2).
func (w *response) notModified(r *http.Request, etag string) bool {
	w.Header()["Etag"] = []string{etag}
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	if !reads || !parsePrecondition(r.Header["If-None-Match"]).matchesWeakly(etag) {
		return false
	}
	w.WriteHeader(http.StatusNotModified)
	return true
}

// fail answers with an error. It is the only place where one becomes a response: what clients are told is fixed, and
// the cause is for the log. In development a 500 has the cause too.
func (w *response) fail(r *http.Request, err error, development bool) {
	status, detail := http.StatusInternalServerError, any("Internal server error")
	public, _ := errors.AsType[*publicError](err)
	switch {
	case public != nil:
		status, detail = public.status, public.detail
	case outcomeOf(err) != bug: // what is left comes from the database, or the JWKS
		status, detail = http.StatusServiceUnavailable, "Service temporarily unavailable"
		w.Header().Set("Retry-After", "1")
	case development:
		cause, _, _ := strings.Cut(err.Error(), "\n") // without the stack of a panic
		detail = "Internal server error: " + cause
	}
	if status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer") // RFC 6750 section 3
	}
	if r.Header.Get("Expect") != "" { // net/http must not wait for a body that will not come
		_ = w.control.SetReadDeadline(time.Now())
	} else if r.ContentLength != 0 { // a client that is still sending would get a reset instead of the answer
		_, _ = io.CopyN(io.Discard, r.Body, 8<<20)
	}
	body, _ := json.Marshal(map[string]any{"detail": detail}) // no error: what it holds was JSON, or is text
	_ = w.json(status, body)
}

// A publicError is an error with a status and words for the client.
type publicError struct {
	status int
	detail any // a sentence, or faults
}

func (e *publicError) Error() string { return fmt.Sprint(e.detail) }

// The errors with public words. Wrap one with %w to give the log a reason that clients do not see.
var (
	errNoBearer         = &publicError{http.StatusUnauthorized, "Invalid authorization header"}
	errInvalidToken     = &publicError{http.StatusUnauthorized, "Invalid token"}
	errExpiredToken     = &publicError{http.StatusUnauthorized, "Token expired"}
	errForbidden        = &publicError{http.StatusForbidden, "Forbidden"}
	errNoRoute          = &publicError{http.StatusNotFound, "Not Found"}
	errNotFound         = &publicError{http.StatusNotFound, "Task not found"}
	errMethodNotAllowed = &publicError{http.StatusMethodNotAllowed, "Method Not Allowed"}
	errBodySlow         = &publicError{http.StatusRequestTimeout, "Request body too slow"}
	errBodyBroken       = &publicError{http.StatusBadRequest, "Request body incomplete or malformed"}
	errModified         = &publicError{http.StatusPreconditionFailed, "Task has been modified"}
	errBodyTooLarge     = &publicError{http.StatusRequestEntityTooLarge, "Request body too large"}
	errMediaType        = &publicError{http.StatusUnsupportedMediaType, "Unsupported media type: send application/json"}
)

// Every other error is a 503 or a 500: see outcome.
var (
	errStopping = errors.New("the service is stopping")
	errNoSchema = errors.New("the schema is not in place yet")
	errBusy     = errors.New("the user's other requests take all of their share")
	errJWKSDown = errors.New("the key of a token is unknown, and the JWKS endpoint cannot be asked")
	errPanic    = errors.New("panic")
	errNoRow    = errors.New("the database made no row, and gave no reason")
	errNotSent  = errors.New("no connection")
	errInDoubt  = errors.New("the statement may or may not have taken effect")
)

// recovered runs f, and makes an error of a panic.
func recovered(f func() error) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("%w: %v\n%s", errPanic, cause, debug.Stack())
		}
	}()
	return f()
}

// An outcome is what an error of the database, or of this program, means for the statement and for the answer.
type outcome int

const (
	failed  outcome = iota // a 503, and no reason to send the statement again
	noTrace                // a 503, but the statement can be sent again: it was not sent, or was rolled back for a passing reason
	inDoubt                // a 503, and the statement may have taken effect
	bug                    // a 500: a panic, bad data, a violated constraint, a wrong or refused statement
)

func outcomeOf(err error) outcome {
	switch e := pq.As(err); {
	case errors.Is(err, errNotSent):
		return noTrace
	case errors.Is(err, errInDoubt):
		return inDoubt
	case errors.Is(err, errPanic), errors.Is(err, errNoRow):
		return bug
	case e == nil || slices.Contains([]pqerror.Code{"42P01", "42501", "57014"}, e.Code):
		return failed // undefined_table and insufficient_privilege, which an operator mends; query_canceled
	case slices.Contains([]pqerror.Code{"40001", "40P01", "25006"}, e.Code):
		return noTrace // serialization_failure, deadlock_detected, read_only_sql_transaction
	case slices.Contains([]pqerror.Class{"08", "57"}, e.Code.Class()):
		return inDoubt // connection_exception (from a pooler), operator_intervention
	case slices.Contains([]pqerror.Class{"0A", "22", "23", "26", "42"}, e.Code.Class()):
		return bug
	}
	return failed
}

// faults are what is wrong with a request, in the shape and words of Pydantic v2, which the clients of the FastAPI
// service know. They make a 422.
type faults []fault
type fault struct {
	Type  string          `json:"type"`
	Loc   []any           `json:"loc"`
	Msg   string          `json:"msg"`
	Input json.RawMessage `json:"input"`
	Ctx   map[string]any  `json:"ctx,omitempty"`
}

// err returns the error that the faults make.
func (f faults) err() error { return &publicError{http.StatusUnprocessableEntity, f} }

// add adds a fault. input is the JSON text of what was given, loc where.
func (f *faults) add(kind, msg string, input []byte, ctx map[string]any, loc ...any) {
	*f = append(*f, fault{kind, loc, msg, input, ctx})
}

// addValueError adds a fault for which Pydantic has no type of its own.
func (f *faults) addValueError(msg string, input []byte, loc ...any) {
	f.add("value_error", "Value error, "+msg, input, map[string]any{"error": struct{}{}}, loc...)
}

// checkText checks that PostgreSQL can store a text, and that it has lower (at most 1) to upper code points.
func (f *faults) checkText(text string, storable bool, lower, upper int, input []byte, loc ...any) {
	switch n := utf8.RuneCountInString(text); {
	case !storable || strings.ContainsRune(text, 0):
		f.addValueError("text must not contain U+0000 or lone surrogates", input, loc...)
	case n < lower:
		f.add("string_too_short", "String should have at least 1 character", input, map[string]any{"min_length": lower}, loc...)
	case n > upper:
		msg := fmt.Sprintf("String should have at most %d characters", upper)
		f.add("string_too_long", msg, input, map[string]any{"max_length": upper}, loc...)
	}
}

var integerPattern = regexp.MustCompile(`^[+-]?[0-9]+$`)

// integer reads an integer. One beyond int64 becomes the nearest within, which no task has for an id.
func (f *faults) integer(text string, loc ...any) (n int64, ok bool) {
	if ok = integerPattern.MatchString(text); !ok {
		f.add("int_parsing", "Input should be a valid integer, unable to parse string as an integer", quote(text), nil, loc...)
	}
	n, _ = strconv.ParseInt(text, 10, 64)
	return n, ok
}

func quote(text string) []byte {
	b, _ := json.Marshal(text)
	return b
}
