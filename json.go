package main

import (
	"bytes"
	"encoding/json"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"
)

// This file reads JSON (RFC 8259) more strictly than encoding/json, which folds the case of member
// names, forgets duplicates and repairs bad text without a word. Bodies and tokens are read with it.

// maxDepth is how many arrays and objects may be nested in a body.
const maxDepth = 1000

// A jsonError says where a text stops being JSON, in the words of Python's json module, which the
// clients of the FastAPI service know.
type jsonError struct {
	msg    string
	offset int // in bytes
}

func (e *jsonError) Error() string { return e.msg + " at byte " + strconv.Itoa(e.offset) }

// A jsonValue is one JSON text: its bytes without white space around them, and the members of the
// outermost object in their order.
type jsonValue struct {
	raw     []byte
	members []jsonMember
}

type jsonMember struct {
	name string
	raw  []byte
}

// member returns the raw value of the last member called name, or nil, and how many there are.
func (v jsonValue) member(name string) (raw []byte, count int) {
	for _, m := range v.members {
		if m.name == name {
			raw = m.raw
			count++
		}
	}
	return raw, count
}

// isObject reports whether the text is an object.
func (v jsonValue) isObject() bool { return len(v.raw) > 0 && v.raw[0] == '{' }

// parseJSON checks that text is exactly one JSON value in UTF-8, nested no deeper than maxDepth.
// The error is a *jsonError.
func parseJSON(text []byte) (jsonValue, error) {
	if bytes.HasPrefix(text, []byte("\ufeff")) {
		return jsonValue{}, &jsonError{"Unexpected UTF-8 BOM (decode using utf-8-sig)", 0}
	}
	s := jsonScanner{text: text}
	s.space()
	start := s.pos
	err := s.value(0)
	v := jsonValue{text[start:s.pos], s.members}
	if s.space(); err == nil && s.pos < len(text) {
		err = s.fault("Extra data")
	}
	return v, err
}

// A jsonScanner goes once over a text; its methods move pos behind what they have recognised.
type jsonScanner struct {
	text    []byte
	pos     int
	members []jsonMember
}

// fault is about what stands at pos.
func (s *jsonScanner) fault(msg string) error {
	if r, size := utf8.DecodeRune(s.text[s.pos:]); r == utf8.RuneError && size == 1 {
		msg = "Invalid UTF-8"
	}
	return &jsonError{msg, s.pos}
}

// skip moves behind c if that is what stands at pos.
func (s *jsonScanner) skip(c byte) bool {
	if s.pos == len(s.text) || s.text[s.pos] != c {
		return false
	}
	s.pos++
	return true
}

func (s *jsonScanner) space() {
	for s.skip(' ') || s.skip('\t') || s.skip('\n') || s.skip('\r') {
	}
}

// literal matches the values that hold no others and no text. What follows one, like the 1 in 01, is for
// the caller to refuse.
var literal = regexp.MustCompile(`^(?:true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)`)

// value scans one value inside depth arrays and objects.
func (s *jsonScanner) value(depth int) error {
	switch start := s.pos; {
	case s.skip('"'):
		return s.string(start)
	case depth == maxDepth && (s.skip('{') || s.skip('[')):
		return &jsonError{"Too many nested levels", start}
	case s.skip('{'):
		return s.contents(depth+1, '}')
	case s.skip('['):
		return s.contents(depth+1, ']')
	}
	n := len(literal.Find(s.text[s.pos:]))
	if n == 0 {
		return s.fault("Expecting value")
	}
	s.pos += n
	return nil
}

// contents scans an object or an array, as end says, from behind its first byte on. What is in it is
// nested in depth levels.
func (s *jsonScanner) contents(depth int, end byte) error {
	if s.space(); s.skip(end) {
		return nil
	}
	for {
		var name []byte
		if start := s.pos; end == '}' {
			if !s.skip('"') {
				return s.fault("Expecting property name enclosed in double quotes")
			}
			if err := s.string(start); err != nil {
				return err
			}
			name = s.text[start:s.pos]
			if s.space(); !s.skip(':') {
				return s.fault("Expecting ':' delimiter")
			}
			s.space()
		}
		start := s.pos
		if err := s.value(depth); err != nil {
			return err
		}
		if name != nil && depth == 1 {
			text, _ := jsonText(name)
			s.members = append(s.members, jsonMember{text, s.text[start:s.pos]})
		}
		if s.space(); s.skip(end) {
			return nil
		}
		if !s.skip(',') {
			return s.fault("Expecting ',' delimiter")
		}
		s.space()
	}
}

// string scans a string that has begun at start, from behind its quote on.
func (s *jsonScanner) string(start int) error {
	for s.pos < len(s.text) {
		switch c := s.text[s.pos]; {
		case c == '"':
			s.pos++
			return nil
		case c < ' ':
			return s.fault("Invalid control character at")
		case c == '\\':
			if err := s.escape(s.text[s.pos+1:]); err != nil {
				return err
			}
		case c < utf8.RuneSelf:
			s.pos++
		default:
			r, n := utf8.DecodeRune(s.text[s.pos:])
			if r == utf8.RuneError && n == 1 {
				return s.fault("Invalid UTF-8")
			}
			s.pos += n
		}
	}
	return &jsonError{"Unterminated string starting at", start}
}

// escape skips the backslash at pos and what belongs to it in rest, the text behind it (RFC 8259 section 7).
func (s *jsonScanner) escape(rest []byte) error {
	n := 1
	if bytes.HasPrefix(rest, []byte("u")) {
		n = min(5, len(rest))
		if _, err := strconv.ParseUint(string(rest[1:n]), 16, 16); err != nil || n < 5 {
			return &jsonError{`Invalid \uXXXX escape`, s.pos + 1}
		}
	} else if len(rest) > 0 && strings.IndexByte(`"\/bfnrt`, rest[0]) < 0 {
		return s.fault(`Invalid \escape`)
	}
	s.pos = min(s.pos+1+n, len(s.text))
	return nil
}

// loneSurrogate matches escapes; its group matches one of a surrogate without the other.
var loneSurrogate = regexp.MustCompile(`\\u[dD][89abAB]..\\u[dD][c-fC-F]|(\\u[dD][89a-fA-F])|\\.`)

// jsonText decodes a JSON string that parseJSON has accepted. storable is false when the string has
// a U+0000 or a lone surrogate, neither of which PostgreSQL's text can hold.
func jsonText(raw []byte) (text string, storable bool) {
	if bytes.IndexByte(raw, '\\') < 0 {
		return string(raw[1 : len(raw)-1]), true
	}
	if err := json.Unmarshal(raw, &text); err != nil || strings.ContainsRune(text, 0) {
		return text, false
	}
	if !strings.ContainsRune(text, utf8.RuneError) { // which json.Unmarshal puts for a lone surrogate
		return text, true
	}
	for _, m := range loneSurrogate.FindAllSubmatchIndex(raw, -1) {
		if m[2] >= 0 {
			return text, false
		}
	}
	return text, true
}

// appendJSONString appends s, which is valid UTF-8, as a JSON string.
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
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, `\n`...)
		default:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
	}
	return append(append(b, s[start:]...), '"')
}
