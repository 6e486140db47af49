package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql/driver"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxSearch  = 200     // code points
	maxLimit   = 1000    // tasks in a page (of a list with limit) or in a chunk (of one without)
	pageBytes  = 1 << 20 // JSON with which a page ends early
	chunkBytes = 1 << 19 // JSON with which a chunk ends early
)

// A listQuery is what GET .../tasks asks for.
type listQuery struct {
	isCompleted *bool
	search      string // "" for all
	sortBy      string
	descending  bool
	limit       int     // 0 for all
	after       *keyset // from the cursor
}

// A keyset is the place of a task in an order: the value it is sorted by, and the id.
type keyset struct {
	value string
	id    int64
}

// listTasks sends a list of one chunk in one piece, with an entity tag, and a longer one chunk by chunk. While it sends,
// it holds no connection to the database. A failure after the first chunk breaks the client's connection (see logged).
func (s *server) listTasks(w *response, r *http.Request, user string) error {
	var f faults
	q := f.listQuery(r, user)
	if f != nil {
		return f.err()
	}
	w.Header()["Content-Type"] = []string{"application/json"}
	c, _ := s.chunks.Get().(*chunk)
	if c == nil {
		c = new(chunk)
	}
	c.json, c.next = append(c.json[:0], '['), cmp.Or(q.limit, maxLimit)
	defer s.chunks.Put(c)
	for first := true; ; first = false {
		err := s.store.readChunk(r.Context(), user, q, c)
		switch {
		case r.Context().Err() != nil:
			return context.Cause(r.Context())
		case errors.Is(err, errBusy) && !first:
			continue // waiting for its turn
		case err != nil:
			return err
		case !first:
			_ = w.control.SetWriteDeadline(time.Now().Add(writeTimeout))
		}
		if c.more && q.limit == 0 { // more than one part
			if _, err := w.Write(c.json); err != nil || r.Method == http.MethodHead {
				return err
			}
			_ = w.control.SetReadDeadline(time.Time{}) // net/http has read a GET's body by now; its deadline would end the list
			q.after, c.json = c.last, c.json[:0]
			continue
		}
		c.json = append(c.json, ']')
		if !first {
			_, err = w.Write(c.json)
			return err
		}
		link := ""
		if c.more {
			link = "<" + nextPage(user, r.URL.RawQuery, q.encodeCursor(user, *c.last)) + `>; rel="next"`
			w.Header().Set("Link", link)
		}
		if w.notModified(r, c.etag(link)) {
			return nil
		}
		return w.json(http.StatusOK, c.json)
	}
}

// nextPage returns the URL, as a path, of the same list from cursor on.
func nextPage(user, rawQuery, cursor string) string {
	query, _ := url.ParseQuery(strings.ReplaceAll(rawQuery, ";", "%3B")) // as in listQuery ; is data; what is broken is left out
	query.Del("cursor")
	return "/api/" + url.PathEscape(user) + "/tasks?" + query.Encode() + "&cursor=" + cursor
}

// listQuery reads the parameters of a list for user, each with its fault if it has one. Of several of one name the last counts.
func (f *faults) listQuery(r *http.Request, user string) (q listQuery) {
	values := map[string]string{} // undecoded, since they may be broken
	for pair := range strings.SplitSeq(r.URL.RawQuery, "&") {
		name, value, _ := strings.Cut(pair, "=")
		name, _ = url.QueryUnescape(name)
		values[name] = value
	}
	q.sortBy = "id"
	for _, name := range []string{"is_completed", "search", "sort_by", "order", "limit", "cursor"} {
		value, ok := values[name]
		text, err := url.QueryUnescape(value)
		switch {
		case !ok:
		case err != nil || !utf8.ValidString(text):
			f.addValueError("the value is not percent-encoded UTF-8", quote(value), "query", name)
		case name == "is_completed":
			lower := strings.ToLower(text)
			if q.isCompleted = new(lower == "true" || lower == "1"); !*q.isCompleted && lower != "false" && lower != "0" {
				f.add("bool_parsing", "Input should be a valid boolean, unable to interpret input", quote(text), nil, "query", name)
			}
		case name == "search":
			q.search = text
			f.checkText(text, true, 0, maxSearch, quote(text), "query", name)
		case name == "sort_by":
			q.sortBy = text
			f.checkOneOf(text, text, name, "id", "created_at", "updated_at", "title")
		case name == "order":
			q.descending = strings.EqualFold(text, "desc")
			f.checkOneOf(strings.ToLower(text), text, name, "asc", "desc")
		case name == "limit":
			n, ok := f.integer(text, "query", name)
			if q.limit = int(n); ok && n < 1 {
				f.add("greater_than_equal", "Input should be greater than or equal to 1", quote(text), map[string]any{"ge": 1}, "query", name)
			} else if n > maxLimit {
				msg := fmt.Sprintf("Input should be less than or equal to %d", maxLimit)
				f.add("less_than_equal", msg, quote(text), map[string]any{"le": maxLimit}, "query", name)
			}
		case name == "cursor": // the last one: its checksum covers all of the above
			if q.after = q.decodeCursor(user, text); q.after == nil {
				f.addValueError("the cursor is damaged or belongs to another list: start again without it", quote(text), "query", name)
			}
		}
	}
	return q
}

func (f *faults) checkOneOf(word, input, name string, words ...string) {
	if !slices.Contains(words, word) {
		last := len(words) - 1
		expected := "'" + strings.Join(words[:last], "', '") + "' or '" + words[last] + "'"
		f.add("literal_error", "Input should be "+expected, quote(input), map[string]any{"expected": expected}, "query", name)
	}
}

// encodeCursor makes a cursor: a keyset and a checksum over it, the user, the order and the filter. That keeps out what is
// damaged or of another list; it need not keep out forgers, since every statement filters by user_id anyway.
func (q listQuery) encodeCursor(user string, k keyset) string {
	text, _ := json.Marshal([]any{user, q.sortBy, q.descending, q.isCompleted, q.search, k.id, k.value})
	sum := sha256.Sum256(text)
	return base64.RawURLEncoding.EncodeToString(append(sum[:12], fmt.Sprint(k.id, " ", k.value)...))
}

// decodeCursor returns the place that cursor stands for in this list, or nil.
func (q listQuery) decodeCursor(user, cursor string) *keyset {
	b, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil || len(b) < 12 {
		return nil
	}
	id, value, _ := strings.Cut(string(b[12:]), " ")
	k := keyset{value: value}
	k.id, err = strconv.ParseInt(id, 10, 64)
	valid := map[string]bool{"id": value == id, "title": utf8.ValidString(value) && !strings.ContainsRune(value, 0),
		"created_at": isInstant(value), "updated_at": isInstant(value)}
	if err != nil || !valid[q.sortBy] || q.encodeCursor(user, k) != cursor {
		return nil
	}
	return &k
}

func (q listQuery) place(t task) *keyset {
	value := map[string]string{"id": strconv.FormatInt(t.id, 10), "title": t.title,
		"created_at": t.createdAt.String(), "updated_at": t.updatedAt.String()}
	return &keyset{value[q.sortBy], t.id}
}

type chunk struct {
	json  []byte  // its tasks, each but the list's first behind a comma
	state []byte  // the id and the updated_at of each
	last  *keyset // of the last task
	more  bool    // tasks follow
	next  int     // tasks to ask for next: twice as many while few bytes come, as many as fitted when too many do
}

// etag identifies a list that is all in this chunk: the same tasks in the same states and order, with the same link.
func (c *chunk) etag(link string) string {
	sum := sha256.Sum256(append(c.state, link...))
	return `"` + base64.RawURLEncoding.EncodeToString(sum[:18]) + `"`
}

// readChunk reads the next tasks of a list in one statement and appends them to c: up to c.next, fewer if their JSON
// passes a limit. A list under way (start is 0) has time to wait for its turn.
func (s *store) readChunk(ctx context.Context, user string, q listQuery, c *chunk) error {
	start, n, maxBytes := len(c.json), c.next, chunkBytes
	if q.limit > 0 {
		maxBytes = pageBytes
	}
	query, args := q.statement(user, n+1)
	return s.attempt(ctx, user, true, start == 0, func(ctx context.Context) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		var last task
		count := 0
		c.json, c.state, c.more = c.json[:start], c.state[:0], false
		err := exchange(ctx, s.db, query, args, func(row []driver.Value) {
			if c.more = count == n || len(c.json)-start >= maxBytes; c.more {
				if count < n {
					cancel() // this costs the connection, but less than reading all that may still come
				}
				return
			}
			if count++; count > 1 || start == 0 {
				c.json = append(c.json, ',')
			}
			last = scanTask(row, user)
			c.json = last.appendJSON(c.json)
			c.state = binary.BigEndian.AppendUint64(c.state, uint64(last.id))
			c.state = binary.BigEndian.AppendUint64(c.state, uint64(last.updatedAt))
		})
		c.last = q.place(last)
		if c.more && count < n {
			c.next, err = count, nil // the error is that of cancel
		} else if len(c.json)-start < maxBytes/2 {
			c.next = min(2*n, maxLimit)
		}
		return err
	})
}

// statement composes the statement that reads n tasks from q.after on, and its arguments. Its text has no words of a
// client: sortBy is one of listQuery's.
func (q listQuery) statement(user string, n int) (string, []driver.NamedValue) {
	values := []any{user}
	arg := func(value any) string {
		values = append(values, value)
		return "$" + strconv.Itoa(len(values))
	}
	text := `SELECT ` + taskColumns + ` FROM tasks WHERE user_id = $1`
	if q.isCompleted != nil {
		text += ` AND is_completed = ` + arg(*q.isCompleted)
	}
	if q.search != "" {
		pattern := arg("%" + strings.NewReplacer(`\`, `\\`, `%`, `\%`, `_`, `\_`).Replace(q.search) + "%")
		text += ` AND (title ILIKE ` + pattern + ` OR description ILIKE ` + pattern + `)`
	}
	comparison, direction := " > ", ""
	if q.descending {
		comparison, direction = " < ", " DESC"
	}
	if q.after != nil {
		text += ` AND (tasks.` + q.sortBy + `, id)` + comparison + `(` + arg(q.after.value) + `, ` + arg(q.after.id) + `)`
	}
	text += ` ORDER BY tasks.` + q.sortBy + direction + `, id` + direction + ` LIMIT ` + arg(n)
	return text, arguments(values...)
}
