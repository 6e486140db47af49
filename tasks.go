package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxBody  = 1 << 20
	maxTitle = 200 // code points
)

func (s *server) createTask(w *response, r *http.Request, user string) error {
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	var f faults
	key := f.idempotencyKey(r)
	in := f.changes(body, true)
	if f != nil {
		return f.err()
	}
	t, err := s.store.createTask(r.Context(), user, key, in)
	if err == errNotFound { // the key's task was made of another body
		f.addValueError("this key was used with another title or description", quote(key), "header", "Idempotency-Key")
		return f.err()
	}
	if err == nil {
		w.Header().Set("Location", fmt.Sprintf("/api/%s/tasks/%d", url.PathEscape(user), t.id))
	}
	return writeTask(w, r, http.StatusCreated, t, err)
}

func (s *server) readTask(w *response, r *http.Request, user string) error {
	id, f := taskID(r)
	if f != nil {
		return f.err()
	}
	t, err := s.store.readTask(r.Context(), user, id)
	return writeTask(w, r, http.StatusOK, t, err)
}

func (s *server) updateTask(w *response, r *http.Request, user string) error {
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	id, f := taskID(r)
	in := f.changes(body, false)
	if f != nil {
		return f.err()
	}
	t, err := s.store.updateTask(r.Context(), user, id, parsePrecondition(r.Header["If-Match"]), in)
	return writeTask(w, r, http.StatusOK, t, err)
}

func (s *server) deleteTask(w *response, r *http.Request, user string) error {
	id, f := taskID(r)
	if f != nil {
		return f.err()
	}
	err := s.store.deleteTask(r.Context(), user, id, parsePrecondition(r.Header["If-Match"]))
	if err == nil {
		w.WriteHeader(http.StatusNoContent)
	}
	return err
}

func taskID(r *http.Request) (id int64, f faults) {
	id, _ = f.integer(r.PathValue("task_id"), "path", "task_id")
	return id, f
}

// writeTask answers with the task, or that it is unchanged. If err is not nil it returns it.
func writeTask(w *response, r *http.Request, status int, t task, err error) error {
	if err != nil || w.notModified(r, t.etag()) {
		return err
	}
	return w.json(status, t.appendJSON(make([]byte, 0, 512)))
}

var visiblePattern = regexp.MustCompile("^[!-~]+$") // of ASCII

// idempotencyKey reads the header of that name, "" when there is none.
func (f *faults) idempotencyKey(r *http.Request) string {
	lines, ok := r.Header["Idempotency-Key"]
	key := strings.Join(lines, ", ") // a second line adds a space, which is refused
	if pattern := "^[!-~]{1,255}$"; ok && (len(key) > 255 || !visiblePattern.MatchString(key)) {
		msg := "String should match pattern '" + pattern + "'"
		f.add("string_pattern_mismatch", msg, quote(key), map[string]any{"pattern": pattern}, "header", "Idempotency-Key")
	}
	return key
}

// changes reads the fields of a POST (create) or of a PATCH from its body. It adds their faults in field order.
func (f *faults) changes(b body, create bool) (c changes) {
	switch {
	case len(b.raw) == 0 || string(b.raw) == "null":
		f.add("missing", "Field required", []byte("null"), nil, "body")
		return c
	case b.members == nil:
		f.add("model_attributes_type", "Input should be a valid dictionary or object to extract fields from", b.raw, nil, "body")
		return c
	}
	if raw := b.members["title"]; raw != nil {
		c.title = f.text(raw, "title", 1, maxTitle)
	} else if create {
		f.add("missing", "Field required", b.raw, nil, "body", "title")
	}
	if raw := b.members["description"]; raw != nil {
		c.describes = true
		if string(raw) != "null" {
			c.description = f.text(raw, "description", 0, maxBody) // no limit but the body's
		}
	}
	if raw := b.members["is_completed"]; raw != nil && !create {
		if c.isCompleted = new(string(raw) == "true"); !*c.isCompleted && string(raw) != "false" {
			f.add("bool_type", "Input should be a valid boolean", raw, nil, "body", "is_completed")
		}
	}
	return c
}

// pairedEscape matches all escapes but those of lone surrogates: without what it matches, a backslash is one of those.
var pairedEscape = regexp.MustCompile(`(?i)\\(?:[^u]|u(?:d[89ab]..\\ud[c-f]|d[0-7]|[^d]))`)

func (f *faults) text(raw []byte, name string, lower, upper int) *string {
	if raw[0] != '"' {
		f.add("string_type", "Input should be a valid string", raw, nil, "body", name)
		return nil
	}
	text, lone := string(raw[1:len(raw)-1]), false
	if strings.Contains(text, `\`) {
		lone = bytes.IndexByte(pairedEscape.ReplaceAll(raw, nil), '\\') >= 0
		_ = json.Unmarshal(raw, &text) // which puts U+FFFD for a lone surrogate
	}
	f.checkText(text, !lone, lower, upper, raw, "body", name)
	return &text
}

// A body is the JSON of a request.
type body struct {
	raw     []byte                     // the text, without white space around it
	members map[string]json.RawMessage // by their exact names; nil if it is not an object
}

func readBody(w *response, r *http.Request) (b body, err error) {
	if r.ContentLength > maxBody {
		return b, errBodyTooLarge
	}
	text, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	switch {
	case len(text) > maxBody:
		return b, errBodyTooLarge
	case context.Cause(r.Context()) == errStopping: // not Err: net/http cancels the context when a read fails
		return b, fmt.Errorf("reading the body: %w", errStopping)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return b, errBodySlow
	case err != nil:
		return b, errBodyBroken
	}
	_ = w.control.SetReadDeadline(time.Time{})
	if lines, ok := r.Header["Content-Type"]; ok {
		media, _, err := mime.ParseMediaType(strings.Join(lines, ", ")) // a second line makes it malformed
		if err != nil || media != "application/json" && !(strings.Contains(media, "/") && strings.HasSuffix(media, "+json")) {
			return b, errMediaType
		}
	}
	if len(text) > 0 {
		err = b.parse(text)
	}
	return b, err
}

// parse reads text. It fails if that is not exactly one JSON text (RFC 8259) in UTF-8.
func (b *body) parse(text []byte) error {
	b.raw = bytes.Trim(text, " \t\r\n")
	err := json.Unmarshal(text, &b.members) // any other error than of syntax says that it is no object
	syntax, _ := errors.AsType[*json.SyntaxError](err)
	offset, reason := 0, "invalid UTF-8"
	switch {
	case syntax != nil:
		offset, reason = int(syntax.Offset)-1, err.Error() // Offset counts the offending byte
		if strings.HasPrefix(reason, "unexpected end") {
			offset = len(text)
		}
	case utf8.Valid(text):
		return nil
	default: // encoding/json silently replaces it
		for r, n := utf8.DecodeRune(text); r != utf8.RuneError || n > 1; r, n = utf8.DecodeRune(text[offset:]) {
			offset += n
		}
	}
	var f faults
	f.add("json_invalid", "JSON decode error", []byte("{}"), map[string]any{"error": reason}, "body", offset)
	return f.err()
}
