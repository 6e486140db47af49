package main

import (
	"fmt"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const maxTitle = 200 // code points

// A task. Its times are as PostgreSQL prints them in UTC, like 2026-11-23 04:05:06.7+00.
type task struct {
	id                   int64
	userID               string
	title                string
	description          string
	hasDescription       bool // else it is null
	isCompleted          bool
	createdAt, updatedAt string
}

// appendJSON appends the task as JSON.
func (t *task) appendJSON(b []byte) []byte {
	b = strconv.AppendInt(append(b, `{"id":`...), t.id, 10)
	b = appendJSONString(append(b, `,"user_id":`...), t.userID)
	b = appendJSONString(append(b, `,"title":`...), t.title)
	b = append(b, `,"description":`...)
	if t.hasDescription {
		b = appendJSONString(b, t.description)
	} else {
		b = append(b, `null`...)
	}
	b = strconv.AppendBool(append(b, `,"is_completed":`...), t.isCompleted)
	b = appendRFC3339(append(b, `,"created_at":"`...), t.createdAt)
	b = appendRFC3339(append(b, `","updated_at":"`...), t.updatedAt)
	return append(b, `"}`...)
}

// appendRFC3339 appends a time of PostgreSQL's in the form of RFC 3339, with six decimals.
func appendRFC3339(b []byte, text string) []byte {
	const decimals = ".000000"
	text, utc := strings.CutSuffix(text, "+00")
	if !utc || len(text) < 19 {
		return append(b, text...) // infinity
	}
	day := strings.IndexByte(text, ' ')
	b = append(append(append(b, text[:day]...), 'T'), text[day+1:]...)
	return append(append(b, decimals[len(text)-day-len(" 04:05:06"):]...), 'Z')
}

// etag returns the task's entity tag (RFC 9110 section 8.8.3). updated_at moves with every change, so
// it is a strong one.
func (t *task) etag() string {
	return string(append(appendRFC3339([]byte(`"`), t.updatedAt), '"'))
}

// write answers with the task.
func (t *task) write(w *response, status int) error {
	w.Header()["Etag"] = []string{t.etag()}
	return w.json(status, t.appendJSON(make([]byte, 0, 512)))
}

// A taskInput is the body of a POST or PATCH: what is nil is not there, except description, which
// hasDescription tells.
type taskInput struct {
	title          *string
	description    *string
	hasDescription bool
	isCompleted    *bool
}

// taskInput reads the members that a POST (create) or PATCH knows from the body, in field order.
func (v *validation) taskInput(body jsonValue, create bool) (in taskInput) {
	if string(body.raw) == "null" || body.raw == nil {
		v.add("missing", "Field required", []byte("null"), nil, "body")
		return in
	}
	if !body.isObject() {
		v.add("model_attributes_type", "Input should be a valid dictionary or object to extract fields from", body.raw, nil, "body")
		return in
	}
	if raw := body.members["title"].raw; raw != nil {
		in.title = v.text(raw, "title", 1, maxTitle)
	} else if create {
		v.add("missing", "Field required", body.raw, nil, "body", "title")
	}
	if raw := body.members["description"].raw; raw != nil {
		in.hasDescription = true
		if string(raw) != "null" {
			in.description = v.text(raw, "description", 0, math.MaxInt)
		}
	}
	if raw := body.members["is_completed"].raw; raw != nil && !create {
		value := string(raw) == "true"
		if in.isCompleted = &value; !value && string(raw) != "false" {
			v.add("bool_type", "Input should be a valid boolean", raw, nil, "body", "is_completed")
		}
	}
	return in
}

// text reads a string of lower to upper code points from the body.
func (v *validation) text(raw []byte, name string, lower, upper int) *string {
	if raw[0] != '"' {
		v.add("string_type", "Input should be a valid string", raw, nil, "body", name)
		return nil
	}
	text, storable := jsonText(raw)
	if !storable {
		v.unstorable(raw, "body", name)
	} else {
		v.length(text, lower, upper, raw, "body", name)
	}
	return &text
}

// idempotencyKey reads the header of that name, "" when there is none.
func (v *validation) idempotencyKey(r *http.Request) string {
	lines, ok := r.Header["Idempotency-Key"]
	if !ok {
		return ""
	}
	key := strings.Join(lines, ", ") // of two lines: not visible
	visible := strings.IndexFunc(key, func(c rune) bool { return c <= ' ' || c > '~' }) < 0
	if !visible || len(key) < 1 || len(key) > 255 {
		const pattern = "^[!-~]{1,255}$"
		ctx := map[string]any{"pattern": pattern}
		v.add("string_pattern_mismatch", "String should match pattern '"+pattern+"'", quote(key), ctx, "header", "Idempotency-Key")
	}
	return key
}

func (s *server) createTask(w *response, r *http.Request, user string) error {
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	var v validation
	key := v.idempotencyKey(r)
	in := v.taskInput(body, true)
	if v != nil {
		return v
	}
	t, err := s.tasks().createTask(r.Context(), user, key, in)
	if err == errNotFound { // none that was made of this body
		v.valueError("this key was used with another title or description", quote(key), "header", "Idempotency-Key")
		return v
	}
	if err != nil {
		return err
	}
	w.Header().Set("Location", fmt.Sprintf("/api/%s/tasks/%d", url.PathEscape(user), t.id))
	return t.write(w, http.StatusCreated)
}

func (s *server) task(w *response, r *http.Request, user string) error {
	var v validation
	id, _ := v.integer(r.PathValue("task_id"), "path", "task_id")
	if v != nil {
		return v
	}
	t, err := s.tasks().task(r.Context(), user, id)
	if err != nil {
		return err
	}
	if etag := t.etag(); parsePrecondition(r.Header["If-None-Match"]).weakly(etag) {
		w.Header()["Etag"] = []string{etag}
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return t.write(w, http.StatusOK)
}

func (s *server) updateTask(w *response, r *http.Request, user string) error {
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	var v validation
	id, _ := v.integer(r.PathValue("task_id"), "path", "task_id")
	in := v.taskInput(body, false)
	if v != nil {
		return v
	}
	t, err := s.tasks().updateTask(r.Context(), user, id, parsePrecondition(r.Header["If-Match"]), in)
	if err != nil {
		return err
	}
	return t.write(w, http.StatusOK)
}

func (s *server) deleteTask(w *response, r *http.Request, user string) error {
	var v validation
	id, _ := v.integer(r.PathValue("task_id"), "path", "task_id")
	if v != nil {
		return v
	}
	if err := s.tasks().deleteTask(r.Context(), user, id, parsePrecondition(r.Header["If-Match"])); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// A precondition has what If-Match or If-None-Match lists (RFC 9110 section 13.1), nil without the header.
// It is cut at each comma, of which a task's entity tag has none: what is malformed matches nothing.
type precondition []string

func parsePrecondition(lines []string) (p precondition) {
	for _, line := range lines {
		for tag := range strings.SplitSeq(line, ",") {
			p = append(p, strings.Trim(tag, " \t"))
		}
	}
	return p
}

func (p precondition) matchesAny() bool { return len(p) == 1 && p[0] == "*" }

// weakly compares as If-None-Match does, where W/ makes no difference.
func (p precondition) weakly(etag string) bool {
	return p.matchesAny() || slices.ContainsFunc(p, func(tag string) bool { return strings.TrimPrefix(tag, "W/") == etag })
}

// times returns the values of updated_at that If-Match allows, as a PostgreSQL array, or nil when it
// allows all. A weak tag never matches strongly, nor does one that is not a task's.
func (p precondition) times() *string {
	if p == nil || p.matchesAny() {
		return nil
	}
	var times []string
	for _, tag := range p {
		if text := strings.Trim(tag, `"`); isRFC3339(text) && tag == `"`+text+`"` {
			times = append(times, text)
		}
	}
	list := "{" + strings.Join(times, ",") + "}"
	return &list
}

// isRFC3339 reports whether text is a time just as appendRFC3339 writes it.
func isRFC3339(text string) bool {
	const layout = "2006-01-02T15:04:05.000000Z"
	t, err := time.Parse(layout, text)
	return err == nil && t.Format(layout) == text && t.Year() > 0
}
