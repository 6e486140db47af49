package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
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
	t.Parallel()
	s := newServiceOn(t, newAuthenticator("", "", "", ""))
	for path, item := range at(described, "paths").(object) {
		var want []string
		for method := range item.(object) {
			if method != "parameters" {
				want = append(want, strings.ToUpper(method))
			}
		}
		if slices.Contains(want, "GET") {
			want = append(want, "HEAD")
		}
		path = strings.NewReplacer("{user_id}", "ann", "{task_id}", "1").Replace(path)
		served := strings.Split(s.as(t, "", "BREW", path, "").is(t, 405, `{"detail":"Method Not Allowed"}`).header.Get("Allow"), ", ")
		slices.Sort(want)
		if slices.Sort(served); !slices.Equal(served, want) {
			t.Errorf("%s: served %q, described %q", path, served, want)
		}
	}
	source, err := os.ReadFile("server.go")
	if routes := strings.Count(string(source), "\thandle(\""); err != nil || routes != 9 {
		t.Errorf("%d routes are described, %d served", 9, routes)
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
	_, path, _ := strings.Cut(r.Pattern, " ")
	operation := at(described, "paths", path, method)
	if operation == nil {
		return "" // an unknown path, another method, a preflight
	}
	response := at(operation, "responses", fmt.Sprint(a.status))
	if response == nil {
		return "the status is not described"
	}
	headers, _ := at(response, "headers").(object)
	for name := range headers {
		required := at(headers[name], "required") == true || name != "Link" && name != "Allow" && name != "ETag"
		if required && a.Header().Get(name) == "" {
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
	if choices, ok := s["anyOf"].([]any); ok {
		fault := ""
		for _, choice := range choices {
			if fault = mismatch(value, choice, where); fault == "" {
				break
			}
		}
		return fault
	}
	kinds, ok := s["type"].([]any)
	if kind, one := s["type"].(string); one {
		kinds, ok = []any{kind}, true
	}
	kind := map[string]any{"string": "string", "json.Number": "integer", "bool": "boolean", "<nil>": "null", "[]interface {}": "array",
		"map[string]interface {}": "object"}[fmt.Sprintf("%T", value)]
	if ok && !slices.Contains(kinds, kind) {
		return fmt.Sprintf("%s is not %v", where, kinds)
	}
	switch value := value.(type) {
	case string:
		if pattern, _ := s["pattern"].(string); !regexp.MustCompile(pattern).MatchString(value) {
			return where + " has another form"
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

// contentHash is the source expression (CSP level 3) for the text of the page's one element of that name.
func contentHash(element string) string {
	_, rest, _ := strings.Cut(string(docsHTML), "<"+element+">")
	text, _, _ := strings.Cut(rest, "</"+element+">")
	sum := sha256.Sum256([]byte(text))
	return element + "-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

func TestTheDocsRunNothingButTheirOwnScript(t *testing.T) {
	t.Parallel()
	got := newServiceOn(t, newAuthenticator("", "", "", "")).as(t, "", "GET", "/docs", "")
	policy := got.header.Get("Content-Security-Policy")
	for _, part := range []string{"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", contentHash("script"),
		contentHash("style")} {
		if !strings.Contains(policy, part) {
			t.Errorf("the policy lacks %s: %s", part, policy)
		}
	}
	for _, element := range []string{"<script>", "<style>"} {
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
	source := string(must(os.ReadFile("config.go")))
	for _, match := range regexp.MustCompile(`(?:getenv|value)\("([A-Z_]+)"`).FindAllStringSubmatch(source, -1) {
		for _, file := range []string{"README.md", ".env.example"} {
			if !bytes.Contains(must(os.ReadFile(file)), []byte(match[1])) {
				t.Errorf("%s does not tell of %s", file, match[1])
			}
		}
	}
}
