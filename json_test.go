package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

// The offsets and words are those of Python's json.loads, counted in bytes.
func TestABodyThatIsNotJSONSaysWhere(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const value, name, comma, colon = "Expecting value", "Expecting property name enclosed in double quotes", "Expecting ',' delimiter",
		"Expecting ':' delimiter"
	const unterminated, unicodeEscape, control = "Unterminated string starting at", `Invalid \uXXXX escape`, "Invalid control character at"
	for _, test := range []struct {
		body   string
		offset int
		msg    string
	}{
		{"\ufeff{}", 0, "Unexpected UTF-8 BOM (decode using utf-8-sig)"}, {" \ufeff{}", 1, value},
		{"{\"title\":\"\xff\"}", 10, "Invalid UTF-8"}, {"{\"title\":\"é\xc3\"}", 12, "Invalid UTF-8"},
		{"\"\xed\xa0\x80\"", 1, "Invalid UTF-8"}, {"{} \xc0\x80", 3, "Invalid UTF-8"},
		{"  ", 2, value}, {"nul", 0, value}, {"True", 0, value}, {"NaN", 0, value}, {"-Infinity", 0, value}, {"'x'", 0, value},
		{"title=x", 0, value}, {"\x00", 0, value}, {"\u00a0{}", 0, value},
		{"-", 0, value}, {"+1", 0, value}, {".5", 0, value}, {"01", 1, "Extra data"}, {"-01", 2, "Extra data"}, {"0x1", 1, "Extra data"},
		{"1.", 1, "Extra data"}, {"1.e5", 1, "Extra data"},
		{"1.5e+", 3, "Extra data"}, {`{"title":"x"} x`, 14, "Extra data"}, {"{}{}", 2, "Extra data"}, {"nullx", 4, "Extra data"},
		{"{}\x00", 2, "Extra data"},
		{"{", 1, name}, {"{,}", 1, name}, {"{a:1}", 1, name}, {"{'a':1}", 1, name}, {`{"title":"x",}`, 13, name}, {`{"é":1,}`, 8, name},
		{"{1:2}", 1, name},
		{"[", 1, value}, {"[1,]", 3, value}, {"[,1]", 1, value}, {`{"a":}`, 5, value}, {`{"a":tru}`, 5, value}, {"[1 2]", 3, comma},
		{`{"a":01}`, 6, comma}, {`{"a":1 "b":2}`, 7, comma},
		{"[1}", 2, comma}, {`{"a" 1}`, 5, colon}, {`{"a"}`, 4, colon}, {`{"a"`, 4, colon},
		{`"abc`, 0, unterminated}, {`{"a":"b\"}`, 5, unterminated}, {`"\`, 0, unterminated}, {"\"a\nb\"", 2, control},
		{"{\"a\tb\":1}", 3, control}, {"\"\x00\"", 1, control},
		{`{"title":"é\x"}`, 12, `Invalid \escape`}, {`"\u12g4"`, 2, unicodeEscape}, {`"\u12`, 2, unicodeEscape},
		{`"\u+123"`, 2, unicodeEscape}, {`"\ud83d\u00"`, 8, unicodeEscape},
		{strings.Repeat("[", 1001) + strings.Repeat("]", 1001), 1000, "Too many nested levels"},
		{strings.Repeat(`{"title":[`, 501), 5000, "Too many nested levels"},
		{strings.Repeat("[", 1<<20), 1000, "Too many nested levels"},
	} {
		s.as(t, "ann", "POST", "/api/ann/tasks", test.body).is(t, 422, problems(invalidJSON(test.offset, test.msg)))
	}
	deep := strings.Repeat("[", 999) + strings.Repeat("]", 999)
	for _, body := range []string{"\t\r\n {\"title\":\"x\"}\r\n", `{"title":"x","other":` + deep + `}`,
		`{"title":"x","n":[-0.5e+7,0,1E5,-0,{}, [] ,true,{"title":null}]}`} {
		s.as(t, "ann", "POST", "/api/ann/tasks", body).task(t)
	}
}

// FuzzJSON compares with encoding/json, where that is not laxer.
func FuzzJSON(f *testing.F) {
	for _, seed := range []string{`{"title":"x","title":null,"Title":[1]}`,
		`{"\ud83d\ude00":"\ud83d\u0041\u0000","a":"\udc00\ud800\ud83d"}`, `[-0.5e+7, {"a":{}}, "\"\\\/\b\f\n\r\t"]`,
		"\ufeff{}", "\"\xff\"", "{} x", `{"a":01}`, strings.Repeat("[", 1001) + strings.Repeat("]", 1001), "\"é\u2028\x7f\"", "nul",
		`"\u12`, " "} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		v, err := parseJSON(text)
		deepest := 0
		for d, depth := json.NewDecoder(bytes.NewReader(text)), 0; ; deepest = max(deepest, depth) {
			token, err := d.Token()
			if err != nil {
				break
			}
			if delim, ok := token.(json.Delim); ok {
				depth += map[bool]int{true: 1, false: -1}[delim == '[' || delim == '{']
			}
		}
		if want := json.Valid(text) && utf8.Valid(text) && deepest <= maxDepth; (err == nil) != want {
			t.Fatalf("%q: %v, and it is %t that it is JSON", text, err, want)
		}
		if err != nil && (err.offset < 0 || err.offset > len(text)) || err == nil &&
			!bytes.Equal(v.raw, bytes.Trim(text, " \t\r\n")) {
			t.Fatalf("%q: %v in %q", text, err, v.raw)
		}
		var members map[string]json.RawMessage
		if err == nil && v.isObject() && json.Unmarshal(text, &members) != nil {
			t.Fatalf("%q is no object", text)
		}
		for name, want := range members {
			raw, n := v.members[name].raw, v.members[name].count
			if n < 1 || !bytes.Equal(raw, want) {
				t.Errorf("%q: %q is %q, not %q", text, name, raw, want)
			}
		}
		if text := ""; err == nil && json.Unmarshal(v.raw, &text) == nil && v.raw[0] == '"' {
			got, storable := jsonText(v.raw)
			again, also := jsonText(appendJSONString(nil, text))
			var back string
			if got != text || again != text || !also == !strings.ContainsRune(text, 0) || storable && !also ||
				json.Unmarshal(appendJSONString(nil, text), &back) != nil || back != text {
				t.Errorf("%q: got %q, then %q", text, got, again)
			}
		}
	})
}
