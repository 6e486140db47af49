package main

import (
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/golang-jwt/jwt/v5"
)

var (
	onlyVary = http.Header{"Vary": {"Origin"}}
	readable = http.Header{"Vary": {"Origin"}, "Access-Control-Allow-Origin": {"https://app.example.com"},
		"Access-Control-Allow-Credentials": {"true"}, "Access-Control-Expose-Headers": {"ETag, Link, Location, Retry-After, X-Request-ID"}}
	callable = http.Header{"Vary": {"Origin"}, "Access-Control-Allow-Origin": {"https://app.example.com"},
		"Access-Control-Allow-Credentials": {"true"}, "Access-Control-Max-Age": {"7200"},
		"Access-Control-Allow-Methods": {"GET, POST, PATCH, DELETE"},
		"Access-Control-Allow-Headers": {"Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-ID, " +
			"traceparent, tracestate, baggage, sentry-trace"}}
)

// shares expects just these headers that are about sharing an answer with pages.
func (r reply) shares(t testing.TB, want http.Header) {
	t.Helper()
	got := r.header.Clone()
	maps.DeleteFunc(got, func(name string, _ []string) bool {
		return name != "Vary" && !strings.HasPrefix(name, "Access-Control-")
	})
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %d with %v, want %v", r.status, got, want)
	}
}

// strangers are Origin headers that allow nothing.
var strangers = [][]string{nil, {""}, {"null"}, {"*"}, {"https://evil.example.com"}, {"https://app.example.com.evil.example"},
	{"https://app.example.com/"}, {"https://APP.example.com"}, {"http://app.example.com"},
	{"https://app.example.com:443"}, {"http://localhost"}, {"http://localhost:30000"}, {"http://127.0.0.1:3000"}, {"app.example.com"},
	{"https://app.example.com, https://app.example.com"}, {"https://app.example.com", "https://app.example.com"}}

func pairs(name string, values []string) (pairs []string) {
	for _, value := range values {
		pairs = append(pairs, name, value)
	}
	return pairs
}

func TestAllowedPagesReadEveryAnswerAndOthersNone(t *testing.T) {
	t.Parallel()
	s := newService(t)
	broken := newAuthenticator(testSecret, "http://localhost", "", "")
	broken.jwks = new(jwks)
	down := newServiceOn(t, broken) // where a token for the JWKS is a bug
	one := fmt.Sprintf("/api/ann/tasks/%d", s.create(t, "ann", "one").ID)
	bug := "Bearer " + signed(t, jwt.SigningMethodHS256, []byte{}, `{"alg":"EdDSA","kid":"x"}`, claimsOfAnn)
	for _, c := range []struct {
		status                   int
		on                       *service
		user, method, path, body string
		headers                  []string
	}{
		{200, s, "", "GET", "/health", "", nil}, {200, s, "", "HEAD", "/ready", "", nil}, {200, s, "ann", "GET", one, "", nil},
		{200, s, "ann", "GET", "/api/ann/tasks", "", nil}, {201, s, "ann", "POST", "/api/ann/tasks", `{"title":"x"}`, nil},
		{204, s, "bob", "DELETE", fmt.Sprintf("/api/bob/tasks/%d", s.create(t, "bob", "x").ID), "", nil},
		{304, s, "ann", "GET", one, "", []string{"If-None-Match", "*"}}, {401, s, "", "GET", one, "", nil},
		{401, s, "", "GET", one, "", []string{"Authorization", bug}},
		{403, s, "bob", "GET", one, "", nil}, {404, s, "ann", "GET", "/api/ann/tasks/0", "", nil},
		{404, s, "ann", "GET", "/nowhere", "", nil}, {404, s, "ann", "GET", "//", "", nil}, {404, s, "", "OPTIONS", "/nowhere", "", nil},
		{404, s, "", "OPTIONS", "*", "", nil},
		{405, s, "ann", "PUT", one, "", nil}, {405, s, "", "OPTIONS", one, "", nil},
		{405, s, "", "OPTIONS", "/health", "", []string{"Access-Control-Request-Headers", "x"}},
		{412, s, "ann", "PATCH", one, "{}", []string{"If-Match", `"x"`}},
		{413, s, "ann", "POST", "/api/ann/tasks", strings.Repeat(" ", 1<<20+1), nil},
		{415, s, "ann", "POST", "/api/ann/tasks", "{}", []string{"Content-Type", "text/plain"}},
		{422, s, "ann", "POST", "/api/ann/tasks", "{}", nil},
		{500, down, "", "GET", one, "", []string{"Authorization", bug}}, {503, down, "ann", "GET", one, "", nil},
		{503, down, "", "GET", "/ready", "", nil},
	} {
		ask := func(want http.Header, origin ...string) {
			got := c.on.as(t, c.user, c.method, c.path, c.body, append(pairs("Origin", origin), c.headers...)...)
			if got.shares(t, want); got.status != c.status || t.Failed() {
				t.Fatalf("%s %s from %q: %d %s, want %d", c.method, c.path, origin, got.status, got.body, c.status)
			}
		}
		if ask(readable, "https://app.example.com"); c.status != 204 { // which is once only
			for _, origin := range strangers {
				ask(onlyVary, origin...)
			}
		}
	}
	down.logs.at(slog.LevelError) // which the bug has left
}

func TestPreflightsAreAnsweredOnEveryPathWithoutToken(t *testing.T) {
	t.Parallel()
	s := newServiceOn(t, bySecret())
	paths := []string{"/", "/nowhere", "//", "*", "/api/ann/tasks/", "/api/%2F/tasks", "/api/ann/tasks/x?limit=0"}
	for path := range at(described, "paths").(object) {
		paths = append(paths, strings.NewReplacer("{user_id}", "ann", "{task_id}", "1").Replace(path))
	}
	for _, path := range paths {
		for _, headers := range [][]string{{"Access-Control-Request-Method", "PATCH", "Access-Control-Request-Headers",
			"authorization,content-type,if-match"}, {"Access-Control-Request-Method", "PUT", "Authorization", "nonsense"}} {
			preflight := func(want http.Header, origin ...string) {
				s.as(t, "", "OPTIONS", path, "", append(pairs("Origin", origin), headers...)...).is(t, http.StatusNoContent, "").shares(t,
					want)
			}
			preflight(callable, "https://app.example.com")
			for _, origin := range strangers[1:] {
				preflight(onlyVary, origin...)
			}
		}
	}
	s.as(t, "", "OPTIONS", "/health", "", "Access-Control-Request-Method", "GET").is(t, 405, `{"detail":"Method Not Allowed"}`).shares(t,
		onlyVary) // no Origin, no preflight
}

func TestOriginsAreTakenOnlyAsBrowsersWriteThem(t *testing.T) {
	t.Parallel()
	for list, want := range map[string][]string{
		"http://localhost:3000": {"http://localhost:3000"}, "https://a.example": {"https://a.example"},
		" https://a.example ,\thttp://b:1 , http://b:65535": {"https://a.example", "http://b:1", "http://b:65535"},
		"http://127.0.0.1:3000,http://[::1]:3000,http://[2001:db8::1]": {"http://127.0.0.1:3000", "http://[::1]:3000",
			"http://[2001:db8::1]"},
		"https://xn--bcher-kva.example,https://a_b-c.example.": {"https://xn--bcher-kva.example", "https://a_b-c.example."},
		"http://a:443,https://a:80,https://a:8443":             {"http://a:443", "https://a:80", "https://a:8443"},
	} {
		if got, err := parseOrigins(list); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v", list, got, err)
		}
	}
	for _, origin := range []string{"*", "null", "", " ", ",", "http://a,", ",http://a", "http://a,,http://b", "http://a/", "http://a/path",
		"http://a?q", "http://a#f", "http://a,*", "https://*.a.example", "a.example", "localhost:3000", "//a", "http:a", "http://",
		"http://:3000", "HTTP://a", "https://a.exaMple", "ftp://a", "ws://a:8080", "file://", "http://a:80", "https://a:443", "http://a:",
		"http://a:0", "http://a:080", "http://a:65536", "http://a:99999999999999999999", "http://a:x", "http://a:1:2", "http://u:p@a",
		"http://a b", "http://a;http://b", "http://a\nb", "http://bücher.example", "http://a%2Fb", "http://a\\b", "http://.a", "http://a..b",
		"http://[::ffff:1.2.3.4]", "http://[::1%25eth0]", "http://[::1", "http://::1", "http://[2001:DB8::1]", "http://[000]:3000",
		"http://[]", "'http://a'", "http://a\u00a0"} {
		if got, err := parseOrigins(origin); err == nil {
			t.Errorf("%q is taken as %q", origin, got)
		}
	}
}

// FuzzOrigins: what is taken is each time a scheme, a host and perhaps a port, and nothing else.
func FuzzOrigins(f *testing.F) {
	for _, list := range []string{"http://localhost:3000", "https://a, http://[::1]:3000", "*", "http://a/", "null", "http://u:p@a:80",
		"http://A", ","} {
		f.Add(list)
	}
	f.Fuzz(func(t *testing.T, list string) {
		origins, err := parseOrigins(list)
		if again, err2 := parseOrigins(strings.Join(origins, ",")); err == nil &&
			(err2 != nil || !slices.Equal(again, origins) || len(origins) != 1+strings.Count(list, ",")) {
			t.Errorf("%q: %q, then %q, %v", list, origins, again, err2)
		}
		for _, origin := range origins {
			u, err := url.Parse(origin)
			if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Scheme+"://"+u.Host != origin || u.Hostname() == "" ||
				strings.ToLower(origin) != origin || strings.ContainsAny(origin, "*,") {
				t.Errorf("%q: %q", list, origin)
			}
		}
	})
}
