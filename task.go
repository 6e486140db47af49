package main

import (
	"slices"
	"strconv"
	"strings"
	"time"
)

// A task is a row of the table.
type task struct {
	id                   int64
	userID, title        string
	description          string
	described            bool // else the description is null
	isCompleted          bool
	createdAt, updatedAt instant
}

// changes are what a POST or PATCH asks for: nil is absent, but for the description, where nil is null if describes is set.
type changes struct {
	title       *string
	description *string
	describes   bool
	isCompleted *bool
}

// appendJSON appends the task as clients see it. It is written by hand because encoding/json takes five times as long
// (BenchmarkEncode).
func (t *task) appendJSON(b []byte) []byte {
	b = strconv.AppendInt(append(b, `{"id":`...), t.id, 10)
	b = appendJSONString(append(b, `,"user_id":`...), t.userID)
	b = appendJSONString(append(b, `,"title":`...), t.title)
	b = append(b, `,"description":`...)
	if t.described {
		b = appendJSONString(b, t.description)
	} else {
		b = append(b, "null"...)
	}
	b = strconv.AppendBool(append(b, `,"is_completed":`...), t.isCompleted)
	b = t.createdAt.append(append(b, `,"created_at":"`...))
	b = t.updatedAt.append(append(b, `","updated_at":"`...))
	return append(b, `"}`...)
}

// appendJSONString appends s, which is valid UTF-8, as a JSON string (RFC 8259 section 7).
func appendJSONString(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		b = append(b, s[start:i]...)
		start = i + 1
		if c >= ' ' {
			b = append(b, '\\', c)
		} else {
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
	}
	return append(append(b, s[start:]...), '"')
}

// An instant is a time as PostgreSQL stores it: microseconds since the year 2000 began, in UTC.
type instant int64

const instantLayout = "2006-01-02T15:04:05.000000Z" // RFC 3339 in UTC with six decimals

var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro()

// append appends the time in instantLayout: through time.RFC3339, a layout that the standard library writes fast.
func (i instant) append(b []byte) []byte {
	t := time.UnixMicro(epoch + int64(i)).UTC()
	b = t.AppendFormat(b, time.RFC3339)
	z := len(b) - 1
	b = strconv.AppendInt(b[:z], int64(1e6+t.Nanosecond()/1000), 10) // a 1 and six decimals
	b[z] = '.'
	return append(b, 'Z')
}

func (i instant) String() string { return string(i.append(nil)) }

// isInstant reports whether text is a time just as append writes it.
func isInstant(text string) bool {
	t, err := time.Parse(instantLayout, text)
	return err == nil && t.Format(instantLayout) == text && t.Year() > 0
}

// etag returns the task's entity tag (RFC 9110 section 8.8.3): a strong one, since updated_at moves with every change.
func (t *task) etag() string { return `"` + t.updatedAt.String() + `"` }

// A precondition is the list of entity tags in If-Match or If-None-Match (RFC 9110 section 13.1); nil if there is no such
// header. The list is split at commas, which no entity tag of this service contains; what is malformed matches nothing.
type precondition []string

func parsePrecondition(lines []string) (p precondition) {
	for _, line := range lines {
		for tag := range strings.SplitSeq(line, ",") {
			p = append(p, strings.Trim(tag, " \t"))
		}
	}
	return p
}

func (p precondition) isAny() bool { return len(p) == 1 && p[0] == "*" }

// matchesWeakly compares as If-None-Match does, ignoring W/.
func (p precondition) matchesWeakly(etag string) bool {
	return p.isAny() || slices.ContainsFunc(p, func(tag string) bool { return strings.TrimPrefix(tag, "W/") == etag })
}

// times returns the values of updated_at that If-Match allows, nil when it allows all. If-Match compares strongly, so a
// weak tag is none of them.
func (p precondition) times() []string {
	if p == nil || p.isAny() {
		return nil
	}
	times := []string{}
	for _, tag := range p {
		if text := strings.Trim(tag, `"`); isInstant(text) && tag == `"`+text+`"` {
			times = append(times, text)
		}
	}
	return times
}
