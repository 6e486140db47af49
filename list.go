package main

import (
	"context"
	"crypto/sha256"
	"database/sql/driver"
	"encoding/base64"
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
	maxSearch = 200  // code points
	maxLimit  = 1000 // tasks on a page that was asked for with limit
	// A list without limit is read and sent in chunks of at most this many tasks, or bytes.
	chunkTasks = 1024
	chunkBytes = 1 << 19
	// A page with limit goes out whole, up to this many bytes; then it ends early, with a next page.
	pageBytes = 8 << 20
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

// parameters splits the query of a URL into values, undecoded since they may be broken, by their names. Of
// several of one name the last counts.
func parameters(rawQuery string) map[string]string {
	values := map[string]string{}
	for pair := range strings.SplitSeq(rawQuery, "&") {
		name, value, _ := strings.Cut(pair, "=")
		if name, err := url.QueryUnescape(name); err == nil && name != "" {
			values[name] = value
		}
	}
	return values
}

// listQuery reads the parameters of a list for user, each with its fault if it has one.
func (v *validation) listQuery(r *http.Request, user string) (q listQuery) {
	values := parameters(r.URL.RawQuery)
	q.sortBy = "id"
	for _, name := range []string{"is_completed", "search", "sort_by", "order", "limit", "cursor"} {
		value, ok := values[name]
		text, err := url.QueryUnescape(value)
		switch {
		case !ok:
		case err != nil || !utf8.ValidString(text):
			v.valueError("the value is not percent-encoded UTF-8", quote(value), "query", name)
		case name == "is_completed":
			completed := text == "true" || text == "1"
			if q.isCompleted = &completed; !completed && text != "false" && text != "0" {
				v.add("bool_parsing", "Input should be a valid boolean, unable to interpret input", quote(text), nil, "query", name)
			}
		case name == "search" && strings.ContainsRune(text, 0):
			v.unstorable(quote(text), "query", name)
		case name == "search":
			q.search = text
			v.length(text, 0, maxSearch, quote(text), "query", name)
		case name == "sort_by":
			q.sortBy = v.oneOf(text, name, "id", "created_at", "updated_at", "title")
		case name == "order":
			q.descending = v.oneOf(text, name, "asc", "desc") == "desc"
		case name == "limit":
			n, ok := v.integer(text, "query", name)
			if q.limit = int(n); ok && n < 1 {
				const msg = "Input should be greater than or equal to 1"
				v.add("greater_than_equal", msg, quote(text), map[string]any{"ge": 1}, "query", name)
			} else if n > maxLimit {
				msg := fmt.Sprintf("Input should be less than or equal to %d", maxLimit)
				v.add("less_than_equal", msg, quote(text), map[string]any{"le": maxLimit}, "query", name)
			}
		case name == "cursor": // the last one: its checksum covers all of the above
			if q.after = q.decodeCursor(user, text); q.after == nil {
				v.valueError("the cursor is damaged or belongs to another list: start again without it", quote(text), "query", name)
			}
		}
	}
	return q
}

// oneOf reads one of several words.
func (v *validation) oneOf(text, name string, words ...string) string {
	if !slices.Contains(words, text) {
		last := len(words) - 1
		expected := "'" + strings.Join(words[:last], "', '") + "' or '" + words[last] + "'"
		v.add("literal_error", "Input should be "+expected, quote(text), map[string]any{"expected": expected}, "query", name)
	}
	return text
}

// A cursor is unpadded base64url of a checksum and a keyset. The checksum is of all that the keyset
// means something for: the user, the order, the filter. It keeps out what is damaged or of another
// list; it need not keep out forgers, since every statement filters by user_id anyway.
func (q listQuery) encodeCursor(user string, k keyset) string {
	return base64.RawURLEncoding.EncodeToString(append(q.checksum(user, k), strconv.FormatInt(k.id, 10)+" "+k.value...))
}

func (q listQuery) checksum(user string, k keyset) []byte {
	text, _ := json.Marshal([]any{user, q.sortBy, q.descending, q.isCompleted, q.search, k.id, k.value})
	sum := sha256.Sum256(text)
	return sum[:12]
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
		"created_at": isRFC3339(value), "updated_at": isRFC3339(value)}
	if err != nil || !valid[q.sortBy] || q.encodeCursor(user, k) != cursor {
		return nil
	}
	return &k
}

// place returns the keyset of a task in this list.
func (q listQuery) place(t task) *keyset {
	value := map[string]string{"id": strconv.FormatInt(t.id, 10), "title": t.title,
		"created_at": string(appendRFC3339(nil, t.createdAt)), "updated_at": string(appendRFC3339(nil, t.updatedAt))}
	return &keyset{value[q.sortBy], t.id}
}

// listTasks sends a long list in chunks, each once the connection to the database has been given back. A
// failure after the first breaks the connection to the client, in logged.
func (s *server) listTasks(w *response, r *http.Request, user string) error {
	var v validation
	q := v.listQuery(r, user)
	if v != nil {
		return v
	}
	c, size := chunk{next: chunkTasks}, chunkBytes
	if q.limit > 0 {
		c.next, size = q.limit, pageBytes
	}
	buffer, _ := s.buffers.Get().(*[]byte)
	if buffer == nil {
		buffer = new([]byte)
	}
	defer func() {
		if *buffer = c.json; cap(c.json) <= 2*chunkBytes {
			s.buffers.Put(buffer)
		}
	}()
	c.json = append((*buffer)[:0], '[')
	w.Header()["Content-Type"] = []string{"application/json"}
	for {
		next, err := s.tasks().chunk(r.Context(), user, q, c.next, size, c.json)
		switch {
		case r.Context().Err() != nil:
			return context.Cause(r.Context())
		case errors.Is(err, errNoTurn) && w.status != 0:
			continue // a list under way has time to wait for its turn
		case err != nil:
			return err
		}
		if c = next; c.more && q.limit > 0 {
			w.Header().Set("Link", "<"+nextPage(user, r.URL.RawQuery, q.encodeCursor(user, *c.last))+`>; rel="next"`)
			c.more = false
		}
		if !c.more {
			c.json = append(c.json, ']')
		}
		if !c.more && w.status == 0 {
			return w.json(http.StatusOK, c.json)
		}
		if _, err := w.Write(c.json); err != nil || !c.more || r.Method == http.MethodHead {
			return nil // a client that went away needs no answer
		}
		_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // a GET's body, too, has been read by now
		q.after, c.json = c.last, c.json[:0]
	}
}

// nextPage returns the URL, as a path, of the same list from cursor on.
func nextPage(user, rawQuery, cursor string) string {
	query, _ := url.ParseQuery(strings.ReplaceAll(rawQuery, ";", "%3B")) // ; is data; what is broken is left out
	query.Del("cursor")
	return "/api/" + url.PathEscape(user) + "/tasks?" + query.Encode() + "&cursor=" + cursor
}

// A chunk is a part of a list.
type chunk struct {
	json []byte  // what was given, and the tasks, each behind a comma but the list's first
	last *keyset // of the last task
	more bool    // tasks follow
	next int     // how many tasks to ask for next
}

// chunk reads up to n tasks of a list in one statement, fewer when they come to maxBytes, and appends them
// to buffer, which is empty but for the first chunk.
func (s *store) chunk(ctx context.Context, user string, q listQuery, n, maxBytes int, buffer []byte) (chunk, error) {
	start := len(buffer)
	query, values := q.statement(user, int64(n)+1)
	args := arguments(values...)
	return do(ctx, s, user, true, func(ctx context.Context) (chunk, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		c := chunk{json: buffer[:start], next: n}
		count, last := 0, task{}
		err := perform(ctx, s.db, query, args, func(row []driver.Value) {
			if c.more = count == n || len(c.json)-start >= maxBytes; c.more {
				if count < n {
					cancel() // this costs the connection, but less than reading all that may still come
				}
				return
			}
			last = scanTask(row, user)
			if count++; count > 1 || start == 0 {
				c.json = append(c.json, ',')
			}
			c.json = last.appendJSON(c.json)
		})
		c.last = q.place(last)
		if c.more && count < n {
			c.next = count
			return c, nil // the error is that of cancel
		}
		if len(c.json)-start < maxBytes/2 {
			c.next = min(2*n, chunkTasks)
		}
		return c, err
	})
}

// statement composes the statement that reads n tasks from q.after on, and its arguments. Only words
// of this file go into its text.
func (q listQuery) statement(user string, n int64) (string, []any) {
	args := []any{user}
	arg := func(value any) string {
		args = append(args, value)
		return "$" + strconv.Itoa(len(args))
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
	return text, args // arg changes args, and Go leaves open which of a return's operands is read first
}
