package main

import (
	"cmp"
	"context"
	"database/sql/driver"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// fill gives ann n tasks, the i-th with the title 'i mod 1000' and a description of some bytes.
func (s *service) fill(t testing.TB, n, bytes int) {
	t.Helper()
	s.exec(t, `INSERT INTO tasks (user_id, title, description, is_completed, created_at)
		SELECT 'ann', (i % 1000)::text, repeat('x', $2), i % 3 = 0, '2026-01-01T00:00:00Z'::timestamptz + i % 500 * interval '1 second'
		FROM generate_series(1, $1) i`, n, bytes)
}

// next returns where a page says that the next one is, "" for nowhere.
func (r reply) next(t testing.TB) string {
	t.Helper()
	match := regexp.MustCompile(`^<(/api/[!#-;=?-~]+)>; rel="next"$`).FindStringSubmatch(r.header.Get("Link"))
	if (match == nil) != (len(r.header["Link"]) == 0) {
		t.Fatalf("Link is %q", r.header["Link"])
	}
	return append(match, "", "")[1]
}

// pages follows a list from a path to its end.
func (s *service) pages(t testing.TB, user, path string) (pages []reply) {
	t.Helper()
	for path != "" {
		page := s.as(t, user, "GET", path, "")
		if page.status != 200 || len(pages) > 30000 {
			t.Fatalf("%s: %d %s", path, page.status, page.body)
		}
		path = page.next(t)
		pages = append(pages, page)
	}
	return pages
}

func TestAListTakesWhatItsParametersAllow(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for i, title := range []string{"b", "a", "b", "100% sure", "a_b", `back\slash`, "Ann's; DROP", "plain", "+& =;"} {
		task := s.create(t, "ann", title)
		s.exec(t, `UPDATE tasks SET id = $1, is_completed = $2, created_at = '2026-01-01T00:00:00Z', updated_at = $3, description = $4
			WHERE id = $5`,
			i+1, i%2 == 0, fmt.Sprintf("2026-01-0%dT00:00:00Z", 9-i/2), []any{nil, "Needle in 100", ""}[i%3], task.ID)
	}
	s.create(t, "bob", "b")
	all := "123456789"
	for query, want := range map[string]string{
		"": all, "?": all, "?&&": all, "?unknown=1&%zz=%zz&LIMIT=x&limits=0": all, "?search=": all, "?search": all,
		"?sort_by=id&order=asc": all, "?order=desc": "987654321",
		"?is_completed=true": "13579", "?is_completed=1": "13579", "?is_completed=false": "2468", "?is_completed=0": "2468",
		"?is_completed=True": "13579", "?is_completed=FALSE": "2468", "?order=DESC": "987654321",
		"?is_completed=x&is_completed=%30": "2468", "?i%73_completed=1": "13579",
		"?search=NEEDLE": "258", "?search=SURE": "4", "?search=100": "2458", "?search=100%25": "4", "?search=%25": "4", "?search=_": "5",
		"?search=%5C": "6", "?search=%5Cs": "6", "?search=%27": "7",
		"?search=;": "79", "?search=s;+d": "7", "?search=s%3B%20D": "7", "?search=%2B%26+%3D;": "9", "?search=nowhere": "",
		"?search=%zz&search=plain": "8", "?search=a%00&search=plain": "8", "?search=&is_completed=1": "13579",
		"?search=100&is_completed=1&order=desc": "5", "?search=b": "1356", "?search=%F0%9F%98%80": "",
		"?sort_by=created_at": all, "?sort_by=created_at&order=desc": "987654321", "?sort_by=updated_at": "978563412",
		"?sort_by=updated_at&order=desc": "214365879",
		"?sort_by=title":                 "947251368", "?sort_by=title&order=desc": "863152749", "?sort_by=title&order=desc&limit=3": "863",
		"?limit=1": "1", "?limit=1000": all, "?limit=09": all, "?limit=x&limit=%32": "12", "?order=x&order=desc&limit=2": "98",
	} {
		got := ""
		for _, task := range s.as(t, "ann", "GET", "/api/ann/tasks"+query, "").tasks(t) {
			got += fmt.Sprint(task.ID)
		}
		if got != want {
			t.Errorf("%s: got %s, want %s", query, got, want)
		}
	}
	s.as(t, "ann", "GET", "/api/ann/tasks?search=nowhere&limit=1", "").is(t, 200, "[]")
	s.as(t, "eve", "GET", "/api/eve/tasks", "").is(t, 200, "[]")
}

func TestABadParameterOfAListIsNamed(t *testing.T) {
	t.Parallel()
	s := newService(t)
	in := func(name, kind, msg, input string, ctx ...string) string {
		return problem(kind, `"query","`+name+`"`, msg, mustJSON(t, input), ctx...)
	}
	boolean := func(input string) string {
		return in("is_completed", "bool_parsing", "Input should be a valid boolean, unable to interpret input", input)
	}
	literal := func(name, words, input string) string {
		return in(name, "literal_error", "Input should be "+words, input, fmt.Sprintf(`"expected":%q`, words))
	}
	encoding := func(name, input string) string {
		return in(name, "value_error", "Value error, the value is not percent-encoded UTF-8", input, `"error":{}`)
	}
	cursor := func(input string) string {
		return in("cursor", "value_error", "Value error, the cursor is damaged or belongs to another list: start again without it", input,
			`"error":{}`)
	}
	bound := func(kind, words, ctx string) func(string) string {
		return func(input string) string { return in("limit", kind, "Input should be "+words, input, ctx) }
	}
	small := bound("greater_than_equal", "greater than or equal to 1", `"ge":1`)
	large := bound("less_than_equal", "less than or equal to 1000", `"le":1000`)
	limit := func(input string) string { return noInteger(`"query","limit"`, mustJSON(t, input)) }
	const columns, orders = "'id', 'created_at', 'updated_at' or 'title'", "'asc' or 'desc'"
	long := strings.Repeat("😀", 201)
	tooLong := in("search", "string_too_long", "String should have at most 200 characters", long, `"max_length":200`)
	for query, want := range map[string]string{
		"is_completed=": boolean(""), "is_completed": boolean(""), "is_completed=on": boolean("on"), "is_completed=yes": boolean("yes"),
		"is_completed=+1": boolean(" 1"), "is_completed=1&is_completed=2": boolean("2"),
		"is_completed=null": boolean("null"), "is_completed=1;x": boolean("1;x"), "is_completed=%31%": encoding("is_completed", "%31%"),
		"search=" + long: tooLong, "search=" + url.QueryEscape(long): tooLong,
		"search=a%00": in("search", "value_error", "Value error, text must not contain U+0000 or lone surrogates", "a\x00", `"error":{}`),
		"search=%zz":  encoding("search", "%zz"), "search=100%": encoding("search", "100%"), "search=%FF": encoding("search", "%FF"),
		"search=%ED%A0%80": encoding("search", "%ED%A0%80"), "search=x&search=%C3": encoding("search", "%C3"),
		"sort_by=": literal("sort_by", columns, ""), "sort_by=ID": literal("sort_by", columns, "ID"),
		"sort_by=description": literal("sort_by", columns, "description"), "sort_by=id;--": literal("sort_by", columns, "id;--"),
		"order=": literal("order", orders, ""), "order=descending": literal("order", orders, "descending"),
		"order=%22": literal("order", orders, `"`),
		"order=%":   encoding("order", "%"),
		"limit=":    limit(""), "limit=1.5": limit("1.5"), "limit=0x1": limit("0x1"), "limit=%D9%A1": limit("١"),
		"limit=%1": encoding("limit", "%1"),
		"limit=0":  small("0"), "limit=-1": small("-1"), "limit=-99999999999999999999": small("-99999999999999999999"),
		"limit=1001": large("1001"), "limit=99999999999999999999": large("99999999999999999999"),
		"cursor=": cursor(""), "cursor": cursor(""), "cursor=x": cursor("x"),
		"cursor=AAAAAAAAAAAAAAAAAAAAAAAA": cursor("AAAAAAAAAAAAAAAAAAAAAAAA"), "cursor=%%": encoding("cursor", "%%"),
		"cursor=x&limit=0&order=up&sort_by=x&search=%80&is_completed=2": boolean("2") + "," + encoding("search", "%80") + "," +
			literal("sort_by", columns, "x") + "," + literal("order", orders, "up") + "," + small("0") + "," + cursor("x"),
		"limit=0&cursor=x": small("0") + "," + cursor("x"),
	} {
		s.as(t, "ann", "GET", "/api/ann/tasks?"+query, "").is(t, 422, problems(want))
	}
	s.as(t, "ann", "GET", "/api/ann/tasks?search="+strings.Repeat("😀", 200), "").is(t, 200, "[]")
}

func TestALinkKeepsTheListAndLeadsToItsRest(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.fill(t, 40, 3)
	s.exec(t, `UPDATE tasks SET title = '+&=;#"<é>\%' || title`)
	for query, n := range map[string]int{"limit=13": 40, "limit=13&order=desc&sort_by=title": 40,
		"sort_by=updated_at&limit=7&is_completed=false": 27, "search=%2B%26%3D;%23%22<%C3%A9>%5C%25&limit=5": 40,
		`search="<é&&order=desc&limit=5&x=%zz&y=a%20b&z`: 40, "search=;%23&limit=4&order=x&order=desc": 40, "limit=x&limit=40": 40,
		"limit=39": 40, "is_completed=1&search=%C3%A9&limit=1": 13} {
		query = strings.ReplaceAll(query, " ", "%20")
		whole := s.as(t, "ann", "GET", "/api/ann/tasks?"+regexp.MustCompile(`limit=\w+`).ReplaceAllString(query, ""), "").tasks(t)
		var walked []taskJSON
		for _, page := range s.pages(t, "ann", "/api/ann/tasks?"+query) {
			walked = append(walked, page.tasks(t)...)
			link := page.next(t)
			asked, _ := url.ParseQuery(strings.ReplaceAll(query, ";", "%3B"))
			kept, err := url.ParseQuery(strings.SplitN(link+"?", "?", 3)[1])
			for name, values := range asked {
				if link != "" && name != "" && (err != nil || !slices.Equal(kept[name], values)) {
					t.Errorf("%s: %s does not keep %q: %v", query, link, name, err)
				}
			}
			if link == "" {
				continue
			}
			rest := s.as(t, "ann", "GET", regexp.MustCompile(`limit=\w+&?`).ReplaceAllString(link, ""), "")
			if rest.next(t) != "" || mustJSON(t, append(slices.Clone(walked), rest.tasks(t)...)) != mustJSON(t, whole) {
				t.Errorf("%s: without limit, %s is not all the rest", query, link)
			}
		}
		if len(whole) != n || mustJSON(t, walked) != mustJSON(t, whole) {
			t.Errorf("%s: %d tasks, %d of them on the pages, want %d", query, len(whole), len(walked), n)
		}
	}
}

func TestACursorIsForItsListOnly(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.fill(t, 9, 3)
	path := "/api/ann/tasks?search=x&is_completed=false&sort_by=title&order=desc&limit=2"
	link := s.as(t, "ann", "GET", path, "").next(t)
	_, cursor, _ := strings.Cut(link, "cursor=")
	want := s.as(t, "ann", "GET", link, "")
	for _, same := range []string{"is_completed=0&limit=2&sort_by=title&order=desc&search=%78",
		"cursor=x&order=asc&order=desc&sort_by=title&is_completed=false&search=x&limit=2&new=1"} {
		s.as(t, "ann", "GET", "/api/ann/tasks?"+same+"&cursor="+cursor, "").is(t, 200, want.body)
	}
	others := []string{"sort_by=title&order=desc&search=x", "is_completed=true&sort_by=title&order=desc&search=x",
		"is_completed=false&sort_by=id&order=desc&search=x", "is_completed=false&order=desc&search=x",
		"is_completed=false&sort_by=created_at&order=desc&search=x", "is_completed=false&sort_by=title&search=x",
		"is_completed=false&sort_by=title&order=desc&search=X", "is_completed=false&sort_by=title&order=desc", ""}
	for i := range others {
		others[i] += "&limit=2&cursor=" + cursor
	}
	_, same, _ := strings.Cut(path, "?")
	for i := range cursor {
		others = append(others, same+"&cursor="+cursor[:i], same+"&cursor="+cursor[:i]+string(cursor[i]^1)+cursor[i+1:])
	}
	others = append(others, strings.Split(link, "?")[1]+"A", strings.Split(link, "?")[1]+"=", strings.Split(link, "?")[1]+"%0A")
	for _, query := range others {
		if got := s.as(t, "ann", "GET", "/api/ann/tasks?"+query, ""); got.status != 422 ||
			!strings.Contains(got.body, `"loc":["query","cursor"]`) || strings.Count(got.body, `"loc"`) != 1 {
			t.Errorf("%s: got %d %s", query, got.status, got.body)
		}
	}
	if got := s.as(t, "bob", "GET", strings.Replace(link, "ann", "bob", 1), ""); got.status != 422 {
		t.Errorf("bob got %d %s", got.status, got.body)
	}
}

func TestAListHasATagThatChangesWithItsTasksOrderAndLinkOnly(t *testing.T) {
	t.Parallel()
	database := newDatabase(t)
	s, replica := newServiceWithin(t, database, 4, 10*time.Second), newServiceWithin(t, database, 4, 10*time.Second)
	seen := map[string]string{}
	tag := func(what, user, path string) string {
		t.Helper()
		got := s.as(t, user, "GET", path, "")
		tag := got.header.Get("ETag")
		if !regexp.MustCompile(`^"[!#-~]+"$`).MatchString(tag) || got.status != 200 {
			t.Fatalf("%s: %d with the tag %s", what, got.status, tag)
		}
		for _, same := range []*service{s, replica} {
			again := same.as(t, user, "GET", path, "", "If-None-Match", `"x", W/`+tag).is(t, 304, "")
			if again.header.Get("ETag") != tag || again.header.Get("Link") != got.header.Get("Link") || again.header.Get("Cache-Control") == "" {
				t.Errorf("%s: 304 with %v", what, again.header)
			}
			same.as(t, user, "HEAD", path, "", "If-None-Match", tag).is(t, 304, "")
			same.as(t, user, "GET", path, "", "If-None-Match", `"x"`).is(t, 200, got.body)
		}
		return tag
	}
	changes := func(what, path string) {
		t.Helper()
		now := tag(what, "ann", path)
		if before, ok := seen[now]; ok {
			t.Errorf("%s has the tag of %s", what, before)
		}
		seen[now] = what
	}
	const list = "/api/ann/tasks"
	changes("no task", list)
	first := s.create(t, "ann", "x")
	changes("one task", list)
	second := s.create(t, "ann", "x")
	changes("two", list)
	changes("the other way round", list+"?order=desc")
	if tag("by title", "ann", list+"?sort_by=title&search=X") != tag("whole", "ann", list) ||
		tag("a page", "ann", list+"?limit=2") != tag("whole", "ann", list) {
		t.Error("the same tasks in the same order have two tags")
	}
	changes("a page with a link", list+"?limit=1")
	s.as(t, "ann", "PATCH", fmt.Sprintf("%s/%d", list, second.ID), `{"is_completed":true}`).task(t)
	changes("a changed one", list)
	whole := tag("whole", "ann", list)
	s.as(t, "ann", "PATCH", fmt.Sprintf("%s/%d", list, second.ID), `{"is_completed":true}`).task(t)
	s.create(t, "bob", "x")
	if tag("nothing changed", "ann", list) != whole {
		t.Error("nothing has changed, but the tag has")
	}
	s.as(t, "ann", "DELETE", fmt.Sprintf("%s/%d", list, first.ID), "").is(t, 204, "")
	changes("one less", list)
	s.fill(t, 2*maxLimit, 3)
	for _, headers := range [][]string{nil, {"If-None-Match", "*"}} {
		if got := s.as(t, "ann", "GET", list, "", headers...); got.status != 200 || got.header.Get("ETag") != "" {
			t.Errorf("a list of several parts: %d, %v", got.status, got.header)
		}
	}
	changes("a page of a long list", list+"?limit=1000")
}

func TestAPageEndsWhereItsJSONPassesAMebibyte(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.fill(t, 12, 400_000)
	sizes, n := []int{}, 0
	for _, page := range s.pages(t, "ann", "/api/ann/tasks?limit=1000") {
		sizes, n = append(sizes, len(page.body)), n+len(page.tasks(t))
	}
	if len(sizes) != 4 || sizes[0] < 1<<20 || sizes[0] > 1<<20+401_000 || n != 12 {
		t.Errorf("%d tasks on pages of %d", n, sizes)
	}
}

func TestAWalkSeesEveryTaskThatWasThereThroughoutOnce(t *testing.T) {
	t.Parallel()
	s := newServiceWithin(t, newDatabase(t), 16, 10*time.Second)
	s.fill(t, 120, 3)
	stop, end := context.WithCancel(t.Context())
	var writers, walkers sync.WaitGroup
	for i := range 2 {
		writers.Go(func() {
			for n := 0; stop.Err() == nil; n++ {
				user := []string{"ann", "ann", "bob"}[n%3]
				task := s.create(t, user, fmt.Sprint((n*7+i)%130))
				if n%5 > 0 {
					s.as(t, user, "DELETE", fmt.Sprintf("/api/%s/tasks/%d", user, task.ID), "").is(t, 204, "")
				}
			}
		})
	}
	for _, query := range []string{"id", "created_at", "updated_at", "title", "id&order=desc", "created_at&order=desc",
		"updated_at&order=desc", "title&order=desc"} {
		walkers.Go(func() {
			seen := map[int64]int{}
			for _, page := range s.pages(t, "ann", "/api/ann/tasks?limit=7&sort_by="+query) {
				for _, task := range page.tasks(t) {
					seen[task.ID]++
				}
			}
			for id := range int64(120) {
				if seen[id+1] != 1 {
					t.Errorf("%s: task %d came %d times", query, id+1, seen[id+1])
				}
			}
		})
	}
	walkers.Wait()
	end()
	writers.Wait()
}

func TestALongListIsWholeInOrderAndTheSameOnPages(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.fill(t, 20*maxLimit, 0) // whole chunks
	for _, query := range []string{"sort_by=id", "order=desc", "sort_by=created_at&order=desc", "sort_by=title",
		"sort_by=updated_at&order=desc&is_completed=false"} {
		whole := s.as(t, "ann", "GET", "/api/ann/tasks?"+query, "")
		tasks := whole.tasks(t)
		var pages []string
		for _, page := range s.pages(t, "ann", "/api/ann/tasks?limit=1000&"+query) {
			pages = append(pages, strings.Trim(page.body, "[]"))
		}
		if want := map[bool]int{true: 13334, false: 20000}[strings.Contains(query, "false")]; len(tasks) != want ||
			len(pages) != (want+999)/1000 || whole.body != "["+strings.Join(pages, ",")+"]" {
			t.Errorf("%s: %d tasks, %d pages, or they differ", query, len(tasks), len(pages))
		}
		if strings.Contains(query, "desc") {
			slices.Reverse(tasks)
		}
		if !slices.IsSortedFunc(tasks, func(a, b taskJSON) int {
			keys := map[byte][2]string{'c': {a.CreatedAt, b.CreatedAt}, 't': {a.Title, b.Title},
				'u': {a.UpdatedAt, b.UpdatedAt}}[strings.TrimPrefix(query, "sort_by=")[0]]
			return cmp.Or(cmp.Compare(keys[0], keys[1]), cmp.Compare(a.ID, b.ID))
		}) {
			t.Errorf("%s: not in order", query)
		}
	}
	if head := s.as(t, "ann", "HEAD", "/api/ann/tasks", "").is(t, 200, ""); head.header.Get("Content-Length") != "" {
		t.Errorf("HEAD has %v", head.header)
	}
}

// While a list is under way, which is more than sockets hold, its reader waits after the head, and so the service.
func TestAListUnderWayIsWholeOrBreaksTheConnection(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		meanwhile func(testing.TB, *service, *http.Response)
		tasks     int    // that arrive at least; 0 for a broken connection
		logged    string // as a warning, or at level INFO of who hung up
	}{
		"the one connection is free": {func(t testing.TB, s *service, _ *http.Response) { s.create(t, "bob", "x") }, 600, ""},
		"the rest is deleted":        {func(t testing.TB, s *service, _ *http.Response) { s.exec(t, `DELETE FROM tasks`) }, 1, ""},
		"it waits for its turn": {func(t testing.TB, s *service, _ *http.Response) {
			must(0, s.store.users.enter(t.Context(), "ann")) // as another request of hers does
			time.AfterFunc(s.store.timeout*3/2, func() { s.store.users.leave("ann", true) })
		}, 600, ""},
		"the database fails": {func(t testing.TB, s *service, _ *http.Response) { s.exec(t, `ALTER TABLE tasks RENAME TO away`) }, 0,
			"does not exist"},
		"its client hangs up": {func(t testing.TB, s *service, response *http.Response) { _ = response.Body.Close() }, 0, `"status":499`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServiceWithin(t, newDatabase(t), 1, time.Second)
			s.fill(t, 600, 100_000)
			r := must(newRequest("GET", s.url+"/api/ann/tasks", ""))
			r.Header.Set("Authorization", "Bearer "+tokenFor(t, "ann"))
			response := must(http.DefaultTransport.RoundTrip(r))
			defer response.Body.Close()
			test.meanwhile(t, s, response)
			text, err := io.ReadAll(response.Body)
			var tasks []taskJSON
			jsonErr := json.Unmarshal(text, &tasks)
			if broken := test.tasks == 0; (err != nil) != broken || (jsonErr != nil) != broken || len(tasks) < test.tasks {
				t.Errorf("%d tasks in %d bytes, %v, %v", len(tasks), len(text), err, jsonErr)
			}
			eventually(t, "the cause is logged", func() bool {
				lines := append(s.logs.at(slog.LevelWarn), s.logs.at(slog.LevelInfo)...)
				lines = slices.DeleteFunc(lines, func(line string) bool { return !strings.Contains(line, `"error"`) })
				return len(lines) == min(1, len(test.logged)) && strings.Contains(strings.Join(lines, ""), test.logged)
			})
		})
	}
}

func TestEveryListIsReadFromAnIndexOfTheUser(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.exec(t, `INSERT INTO tasks (user_id, title, is_completed, created_at)
		SELECT 'user ' || i % 2000, 'title ' || i, i % 3 = 0, now() - i * interval '1 second' FROM generate_series(1, 200000) i`)
	s.exec(t, `VACUUM ANALYZE tasks`)
	yes := true
	for _, sort := range []string{"id", "created_at", "updated_at", "title"} {
		for _, q := range []listQuery{{}, {descending: true}, {isCompleted: &yes}, {search: "x"},
			{after: &keyset{"2026-01-01T00:00:00.000000Z", 100_000}},
			{after: &keyset{"2026-01-01T00:00:00.000000Z", 100_000}, descending: true}} {
			if q.sortBy = sort; sort == "id" && q.after != nil {
				q.after.value = "100000"
			}
			statement, args := q.statement("user 7", 21)
			plan := ""
			err := exchange(t.Context(), s.store.probe, "EXPLAIN "+statement, args, func(row []driver.Value) { plan += row[0].(string) + "\n" })
			sorted := sort == "updated_at" || sort == "title" || q.search != "" ||
				q.isCompleted != nil && os.Getenv("TASKFLOW_TEST_TABLE") != "" // in a small partition that is cheaper
			if err != nil || !regexp.MustCompile(`Index Cond: \(+user_id = 'user 7'`).MatchString(plan) ||
				strings.Contains(plan, "Seq Scan") || !sorted &&
				(strings.Contains(plan, "Sort") || q.after != nil && !regexp.MustCompile(`Index Cond: .*100000`).MatchString(plan)) {
				t.Errorf("%s\n%s\n%v", statement, plan, err)
			}
		}
	}
}

func FuzzCursor(f *testing.F) {
	f.Add("ann", "id", false, int64(7), "7", "", "AAAA")
	f.Add("b\x00b", "title", true, int64(-1), " a  b ", "x", "")
	f.Add("é", "created_at", true, int64(1<<62), "2026-01-02T03:04:05.000000Z", "%", "====")
	f.Add("x", "created_at", false, int64(1), "2026-01-02T03:04:05.+10000Z", "", "")
	f.Add("", "updated_at", false, int64(0), "9999-12-31T23:59:59.999999Z", "", "\n")
	f.Fuzz(func(t *testing.T, user, sortBy string, descending bool, id int64, value, search, cursor string) {
		q := listQuery{sortBy: sortBy, descending: descending, search: search}
		if k := q.decodeCursor(user, cursor); k != nil && q.encodeCursor(user, *k) != cursor {
			t.Errorf("%q became %v", cursor, k)
		}
		ok := sortBy == "id" && value == fmt.Sprint(id) || sortBy == "title" && utf8.ValidString(value) && !strings.ContainsRune(value, 0)
		if at, err := time.Parse(time.RFC3339, value); sortBy == "created_at" || sortBy == "updated_at" {
			ok = err == nil && at.Year() > 0 && regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$`).MatchString(value)
		}
		if k := q.decodeCursor(user, q.encodeCursor(user, keyset{value, id})); (k != nil) != ok || ok && *k != (keyset{value, id}) {
			t.Errorf("%q, %d in the order of %q became %v", value, id, sortBy, k)
		}
	})
}
