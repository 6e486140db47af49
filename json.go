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

// A jsonValue is one JSON text: its bytes without white space around them, and the members of the
// outermost object by their names.
type jsonValue struct {
	raw     []byte
	members map[string]jsonMember
}

// A jsonMember is the last value of a name, and how many there are.
type jsonMember struct {
	raw   []byte
	count int
}

// isObject reports whether the text is an object.
func (v jsonValue) isObject() bool { return len(v.raw) > 0 && v.raw[0] == '{' }

// parseJSON checks that text is exactly one JSON value in UTF-8, nested no deeper than maxDepth.
func parseJSON(text []byte) (jsonValue, *jsonError) {
	if bytes.HasPrefix(text, []byte("\ufeff")) {
		return jsonValue{}, &jsonError{"Unexpected UTF-8 BOM (decode using utf-8-sig)", 0}
	}
	s := jsonScanner{text: text, members: map[string]jsonMember{}}
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
	members map[string]jsonMember
}

// fault is about what stands at pos.
func (s *jsonScanner) fault(msg string) *jsonError {
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

// scalar matches the values that hold no others and no text, as Python does: the 1 in 01 is for the caller to
// refuse.
var scalar = regexp.MustCompile(`^(?:true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)`)

// value scans one value inside depth arrays and objects.
func (s *jsonScanner) value(depth int) *jsonError {
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
	rest := s.text[s.pos:]
	word := rest[:len(rest)-len(bytes.TrimLeft(rest, "+-.0123456789Eaeflnrstu"))]
	if !json.Valid(word) { // only what is refused, like 01, needs the slow pattern, which finds its valid beginning
		word = scalar.Find(word)
	}
	if len(word) == 0 {
		return s.fault("Expecting value")
	}
	s.pos += len(word)
	return nil
}

// contents scans an object or an array, as end says, from behind its first byte on. What is in it is
// nested in depth levels.
func (s *jsonScanner) contents(depth int, end byte) *jsonError {
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
			s.members[text] = jsonMember{s.text[start:s.pos], s.members[text].count + 1}
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
func (s *jsonScanner) string(start int) *jsonError {
	for s.pos < len(s.text) {
		r, n := utf8.DecodeRune(s.text[s.pos:])
		switch {
		case r == '"':
			s.pos++
			return nil
		case r < ' ' || r == utf8.RuneError && n == 1:
			return s.fault("Invalid control character at")
		case r == '\\':
			if err := s.escape(s.text[s.pos+1:]); err != nil {
				return err
			}
		default:
			s.pos += n
		}
	}
	return &jsonError{"Unterminated string starting at", start}
}

// escape skips the backslash at pos and what belongs to it in rest, the text behind it (RFC 8259 section 7).
func (s *jsonScanner) escape(rest []byte) *jsonError {
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

// wholeEscape matches every escape but that of a surrogate without the other.
var wholeEscape = regexp.MustCompile(`(?i)\\(?:[^u]|u(?:d[89ab]..\\ud[c-f]|d[0-7]|[^d]))`)

// jsonText decodes a JSON string that parseJSON has accepted. storable is false when the string has
// a U+0000 or a lone surrogate, neither of which PostgreSQL's text can hold.
func jsonText(raw []byte) (text string, storable bool) {
	if bytes.IndexByte(raw, '\\') < 0 {
		return string(raw[1 : len(raw)-1]), true
	}
	_ = json.Unmarshal(raw, &text) // which puts U+FFFD for a lone surrogate
	lone := strings.ContainsRune(text, utf8.RuneError) && bytes.IndexByte(wholeEscape.ReplaceAll(raw, nil), '\\') >= 0
	return text, !lone && !strings.ContainsRune(text, 0)
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
