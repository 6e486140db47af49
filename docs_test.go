package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// described is openapi.json as the tests read it.
var described = func() (document object) {
	if err := json.Unmarshal(openapiJSON, &document); err != nil {
		panic(err)
	}
	return document
}()

type object = map[string]any

// at follows names from v down, and every $ref on the way; nil when there is nothing.
func at(v any, names ...string) any {
	for {
		o, _ := v.(object)
		if ref, ok := o["$ref"].(string); ok {
			v = at(described, strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
		} else if len(names) == 0 {
			return v
		} else {
			v, names = o[names[0]], names[1:]
		}
	}
}

func TestTheDescriptionHasEveryRouteAndNoOther(t *testing.T) {
	var have, want []string
	for _, route := range (&server{auth: &authenticator{}}).routes() {
		have = append(have, strings.ToLower(route.method)+" "+route.pattern)
	}
	for path, item := range at(described, "paths").(object) {
		for method := range item.(object) {
			if method != "parameters" {
				want = append(want, method+" "+path)
			}
		}
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		t.Errorf("served:    %q\ndescribed: %q", have, want)
	}
}

// asDescribed wraps the service of every test: each answer on a route must be one that openapi.json
// describes for it, with its headers and in its schema.
func asDescribed(t testing.TB, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := &answerRecorder{ResponseWriter: w}
		next.ServeHTTP(answer, r)
		if fault := answer.undescribed(r); fault != "" {
			t.Errorf("%s %s: %d %.300s: %s", r.Method, r.URL, answer.status, answer.body.String(), fault)
		}
	})
}

type answerRecorder struct {
	http.ResponseWriter
	status int
	body   bytes.Buffer
}

func (a *answerRecorder) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *answerRecorder) WriteHeader(status int) {
	a.status = status
	a.ResponseWriter.WriteHeader(status)
}

func (a *answerRecorder) Write(b []byte) (int, error) {
	if a.status == 0 {
		a.status = http.StatusOK
	}
	a.body.Write(b)
	return a.ResponseWriter.Write(b)
}

// undescribed says what is not as openapi.json has it.
func (a *answerRecorder) undescribed(r *http.Request) string {
	method := strings.ToLower(r.Method)
	if method == "head" {
		method = "get"
	}
	operation := at(described, "paths", r.Pattern, method)
	if operation == nil {
		return "" // an unknown path, another method, a preflight
	}
	response := at(operation, "responses", fmt.Sprint(a.status))
	if response == nil {
		return "the status is not described"
	}
	headers, _ := at(response, "headers").(object)
	for name := range headers {
		if name != "Link" && name != "Allow" && a.Header().Get(name) == "" {
			return "the header " + name + " is missing"
		}
	}
	schema := at(response, "content", "application/json", "schema")
	if schema == nil || r.Method == "HEAD" || a.body.Len() > 1<<16 {
		return ""
	}
	var body any
	decoder := json.NewDecoder(&a.body)
	decoder.UseNumber()
	if err := decoder.Decode(&body); err != nil {
		return err.Error()
	}
	return mismatch(body, schema, "body")
}

// mismatch says where a value is not what a schema allows (JSON Schema 2020-12, as far as openapi.json uses it).
func mismatch(value, schema any, where string) string {
	s, _ := at(schema).(object)
	kinds, ok := s["type"].([]any)
	if kind, one := s["type"].(string); one {
		kinds, ok = []any{kind}, true
	}
	kind := map[string]any{"string": "string", "json.Number": "integer", "bool": "boolean", "<nil>": "null", "[]interface {}": "array",
		"map[string]interface {}": "object"}[fmt.Sprintf("%T", value)]
	if ok && !slices.Contains(kinds, kind) {
		return fmt.Sprintf("%s is not %v", where, kinds)
	}
	if want, ok := s["const"]; ok && !reflect.DeepEqual(want, value) {
		return where + " has another value"
	}
	switch value := value.(type) {
	case string:
		pattern, _ := s["pattern"].(string)
		lower, _ := s["minLength"].(float64)
		if utf8.RuneCountInString(value) < int(lower) || !regexp.MustCompile(pattern).MatchString(value) {
			return where + " has another form"
		}
	case json.Number:
		if n, err := value.Int64(); err != nil && ok || s["minimum"] != nil && n < 1 {
			return where + " is too small"
		}
	case []any:
		for i, element := range value {
			if fault := mismatch(element, s["items"], fmt.Sprintf("%s[%d]", where, i)); fault != "" {
				return fault
			}
		}
	case object:
		required, _ := s["required"].([]any)
		for _, name := range required {
			if _, ok := value[name.(string)]; !ok {
				return fmt.Sprintf("%s has no %s", where, name)
			}
		}
		properties, _ := s["properties"].(object)
		for name, member := range value {
			if _, known := properties[name]; !known && s["additionalProperties"] == false {
				return where + " must not have " + name
			}
			if fault := mismatch(member, properties[name], where+"."+name); fault != "" {
				return fault
			}
		}
	}
	return ""
}

func TestTheDocsBringATokenOnlyInDevelopmentAndToThisMachine(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		development bool
		host        string
		token       bool
	}{
		{true, "localhost:8000", true}, {true, "127.0.0.1", true}, {true, "[::1]:8000", true}, {true, "[::1]", true},
		{true, "evil.example:8000", false}, {true, "localhost.evil.example", false}, {false, "localhost:8000", false},
	} {
		s := newServiceOn(t, &authenticator{secret: []byte(testSecret)})
		s.development = test.development
		r, _ := http.NewRequest("GET", s.url+"/docs", nil)
		r.Host = test.host
		got := send(t, r)
		_, rest, found := strings.Cut(got.body, `<meta name="taskflow-demo-token" content="`)
		if found != test.token || got.status != 200 || got.header.Get("Content-Type") != "text/html; charset=utf-8" {
			t.Errorf("%+v: %d, %v", test, got.status, found)
		}
		if token, _, _ := strings.Cut(rest, `"`); found {
			if user, err := s.auth.subject(t.Context(), token); user != demoUser || err != nil {
				t.Errorf("the token is %q's: %v", user, err)
			}
		}
	}
}

func TestTheDocsRunNothingButTheirOwnScript(t *testing.T) {
	t.Parallel()
	got := newServiceOn(t, &authenticator{}).as(t, "", "GET", "/docs", "")
	policy := got.header.Get("Content-Security-Policy")
	for _, part := range []string{"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", contentHash("script"),
		contentHash("style")} {
		if !strings.Contains(policy, part) {
			t.Errorf("the policy lacks %s: %s", part, policy)
		}
	}
	for _, element := range []string{"<script>", "<style>", "<!-- demo-token -->"} {
		if strings.Count(got.body, element) != 1 {
			t.Errorf("%s is there %d times", element, strings.Count(got.body, element))
		}
	}
	if elsewhere := regexp.MustCompile(`(src|href)="?(https?:)?//`).FindString(got.body); elsewhere != "" ||
		strings.Contains(got.body, " style=") {
		t.Errorf("the page loads something or has inline style: %s", elsewhere)
	}
}

func TestTheReadmeQuotesTheConfiguration(t *testing.T) {
	for _, file := range []string{"README.md", ".env.example", "main.go"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("grep", "-ohE", `(getenv|value)\("[A-Z_]+"`, "config.go").Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`[A-Z_]{4,}`).FindAllString(string(out), -1) {
			if !strings.Contains(string(text), name) {
				t.Errorf("%s does not tell of %s", file, name)
			}
		}
	}
}
