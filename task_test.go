package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestATaskIsShownWholeEverywhere(t *testing.T) {
	t.Parallel()
	s := newService(t)
	got := s.as(t, "ann", "POST", "/api/ann/tasks",
		` {"title" : "a title", "id": 77, "user_id": "bob", "is_completed": true, "created_at": 5} `)
	task := got.task(t)
	own, want := fmt.Sprintf("/api/ann/tasks/%d", task.ID), taskJSON{task.ID, "ann", "a title", nil, false, task.CreatedAt, task.CreatedAt}
	got.is(t, 201, mustJSON(t, want))
	at, err := time.Parse("2006-01-02T15:04:05.000000Z", task.CreatedAt)
	if task.ID < 1 || err != nil || len(task.CreatedAt) != 27 || time.Since(at).Abs() > time.Minute || got.header.Get("Location") != own {
		t.Errorf("got %s at %s", got.body, got.header.Get("Location"))
	}
	for _, at := range []string{"2026-01-02T03:04:05.000000Z", "2026-01-02T03:04:05.100000Z", "1999-12-31T23:59:59.999999Z"} {
		s.exec(t, `UPDATE tasks SET created_at = $1, updated_at = $1`, at)
		want.CreatedAt, want.UpdatedAt = at, at
		one := s.as(t, "ann", "GET", own, "").is(t, 200, mustJSON(t, want))
		if tag := one.header.Get("ETag"); !regexp.MustCompile(`^"[!#-~]+"$`).MatchString(tag) {
			t.Errorf("ETag is %q", tag)
		}
		s.as(t, "ann", "PATCH", own, `{}`).is(t, 200, one.body)
		s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, "["+one.body+"]")
	}
	s.as(t, "ann", "DELETE", own, "and a body", "Content-Type", "text/plain; =").is(t, 204, "")
	s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 200, `[]`)
	if next := s.create(t, "ann", "next"); next.ID <= task.ID {
		t.Errorf("id %d after %d", next.ID, task.ID)
	}
}

func TestTextIsKeptAsItIs(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const plain = "\ufeff\u2028\u2029 e\u0301 é \u202eevil <b>&amp;' %_ $1 {} '); -- \u00a0 "
	emojis := strings.Repeat("😀", 200)
	for _, test := range []struct{ input, want string }{
		{plain, plain}, {emojis, emojis}, {strings.Repeat(`\ud83d\ude00`, 200), emojis},
		{`  \ud83d\ude00 \uD83D\uDE00 \ufffd \ufeff \uffff \udbff\udfff e\u0301 \\u0000 \\ud800 \"\\\/\b\f\n\r\t\u0001\u001f\u007f\u0080`,
			"  😀 😀 \ufffd \ufeff \uffff \U0010ffff e\u0301 \\u0000 \\ud800 \"\\/\b\f\n\r\t\x01\x1f\x7f\u0080"},
	} {
		body := `{"\u0074itle":"` + test.input + `","description":"` + test.input + `","x":"\ud800\u0000"}`
		task := s.as(t, "ann", "POST", "/api/ann/tasks", body).task(t)
		want := mustJSON(t, taskJSON{task.ID, "ann", test.want, &test.want, false, task.CreatedAt, task.UpdatedAt})
		own := fmt.Sprintf("/api/ann/tasks/%d", task.ID)
		s.as(t, "ann", "GET", own, "").is(t, 200, want)
		s.as(t, "ann", "PATCH", own, body).is(t, 200, want)
		s.as(t, "ann", "GET", "/api/ann/tasks?order=desc&limit=1", "").is(t, 200, "["+want+"]")
	}
}

func TestIfNoneMatchComparesWeaklyAndIfMatchStrongly(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const changes, tag, setTag = `{"title":"new"}`, `"2026-01-02T03:04:05.100000Z"`, `UPDATE tasks SET updated_at = '2026-01-02T03:04:05.1Z'`
	type matches struct{ weakly, strongly bool }
	for want, tests := range map[matches][][]string{ // lines of the header
		{true, true}: {{tag}, {`*`}, {`"x", ` + tag}, {tag + ` ,"x"`}, {`"x",W/"",` + tag}, {`"x"`, tag}, {`,, "a,b" ,` + tag + `,`},
			{`"é"`, tag}, {`W/` + tag + `,, ` + tag + ` ,`}},
		{true, false}: {{`W/` + tag}, {`"x"`, `W/` + tag}},
		{false, true}: {nil},
		{false, false}: {{`"x"`}, {``}, {`"` + tag}, {`w/` + tag}, {`W/*`}, {`"*"`}, {`"`}, {`2026`}, {strings.Trim(tag, `"`)},
			{strings.TrimSuffix(tag, `"`)}, {strings.ToLower(tag)}, {`"2026-01-02T03:04:05.1Z"`}, {`"2026-01-02 03:04:05.1+00"`},
			{`"now"`, `"infinity"`}, {`"}"`, `"{"`, `"NULL"`, `"\"`, `"a,b"`, `""`, "\"\xff\""},
			{`"2026-02-30T00:00:00.000000Z"`, `"0000-01-01T00:00:00.000000Z"`},
			{`"2026-01-02T03:04:05.+10000Z"`, `"2026-01-02T03:04:05,100000Z"`, `"2026-01-02T24:00:00.000000Z"`}},
	} {
		for _, lines := range tests {
			own := fmt.Sprintf("/api/ann/tasks/%d", s.create(t, "ann", "old").ID)
			s.exec(t, setTag)
			before := s.as(t, "ann", "GET", own, "")
			status, body := map[bool]int{true: 304, false: 200}[want.weakly], map[bool]string{false: before.body}[want.weakly]
			got := s.as(t, "ann", "GET", own, "", pairs("If-None-Match", lines)...).is(t, status, body)
			if got.header.Get("ETag") != tag || (got.header.Get("Content-Type") == "") != want.weakly {
				t.Errorf("If-None-Match: %q: got %v", lines, got.header)
			}
			s.as(t, "ann", "GET", "/api/ann/tasks/0", "", pairs("If-None-Match", lines)...).is(t, 404, notFound)
			for _, method := range []string{"PATCH", "DELETE"} {
				s.as(t, "bob", method, strings.Replace(own, "ann", "bob", 1), changes, pairs("If-Match", lines)...).is(t, 404, notFound)
				got := s.as(t, "ann", method, own, changes, pairs("If-Match", lines)...)
				switch after := s.as(t, "ann", "GET", own, ""); {
				case !want.strongly:
					got.is(t, 412, modified)
					after.is(t, 200, before.body)
				case method == "PATCH":
					if got.is(t, 200, after.body); after.task(t).Title != "new" {
						t.Errorf("If-Match: %q: got %s", lines, after.body)
					}
					s.as(t, "ann", "PATCH", own, `{}`, "If-Match", tag).is(t, 412, modified)
					s.exec(t, setTag)
				default:
					got.is(t, 204, "")
					after.is(t, 404, notFound)
					s.as(t, "ann", "DELETE", own, "", pairs("If-Match", lines)...).is(t, 404, notFound)
				}
			}
		}
	}
}

func FuzzPrecondition(f *testing.F) {
	for _, seed := range []string{``, `*`, `"a"`, `W/"a", "b"`, `"a" "b"`, `,,"a,b",`, `"`, `W/`, `"2026-01-02T03:04:05.100000Z"`,
		`"x",W/"2026-01-02T03:04:05.100000Z"`, "\"\xff\"\t,\"\x7f\"", `"a"b`} {
		f.Add(seed)
	}
	const tag = `"2026-01-02T03:04:05.100000Z"`
	task := task{updatedAt: instant(time.Date(2026, 1, 2, 3, 4, 5, 100e6, time.UTC).UnixMicro() - epoch)}
	// a list of entity tags, from its start to the tag in question
	strong := regexp.MustCompile(`^([, \t]|(W/)?"[^\x00-\x20",\x7f]*"[ \t]*,)*` + regexp.QuoteMeta(tag) + `[ \t]*(,|$)`)
	weak := regexp.MustCompile(`^([, \t]|(W/)?"[^\x00-\x20",\x7f]*"[ \t]*,)*(W/)?` + regexp.QuoteMeta(tag) + `[ \t]*(,|$)`)
	f.Fuzz(func(t *testing.T, line string) {
		p, all := parsePrecondition([]string{line}), strings.Trim(line, " \t") == "*"
		if (all || weak.MatchString(line)) && !p.matchesWeakly(task.etag()) {
			t.Errorf("%q does not match", line)
		}
		times := p.times()
		if (times == nil) != all || strong.MatchString(line) &&
			!slices.Contains(times, strings.Trim(tag, `"`)) || len(times) > strings.Count(line, "Z") {
			t.Errorf("%q allows %v", line, times)
		}
	})
}
