package main

import (
	"bytes"
	"strconv"
	"unicode/utf16"
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
	if !utf8.Valid(text) {
		return jsonValue{}, &jsonError{"Invalid UTF-8", invalidUTF8(text)}
	}
	s := jsonScanner{text: text}
	s.space()
	start := s.pos
	if err := s.value(0); err != nil {
		return jsonValue{}, err
	}
	v := jsonValue{text[start:s.pos], s.members}
	s.space()
	if s.pos < len(text) {
		return jsonValue{}, &jsonError{"Extra data", s.pos}
	}
	return v, nil
}

// invalidUTF8 returns the offset of the first byte of text that is not part of a valid sequence.
func invalidUTF8(text []byte) int {
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRune(text[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return len(text)
}

// A jsonScanner goes once over a text; its methods move pos behind what they have recognised.
type jsonScanner struct {
	text    []byte
	pos     int
	members []jsonMember
}

// peek returns the byte at pos, or 0 at the end (a NUL is never valid where peek is asked).
func (s *jsonScanner) peek() byte {
	if s.pos < len(s.text) {
		return s.text[s.pos]
	}
	return 0
}

func (s *jsonScanner) space() {
	for c := s.peek(); c == ' ' || c == '\t' || c == '\n' || c == '\r'; c = s.peek() {
		s.pos++
	}
}

// value scans one value inside depth arrays and objects.
func (s *jsonScanner) value(depth int) error {
	switch c := s.peek(); {
	case c == '"':
		return s.string()
	case c == '{' || c == '[':
		if depth == maxDepth {
			return &jsonError{"Too many nested levels", s.pos}
		}
		return s.container(depth+1, c == '{')
	case c == '-' || '0' <= c && c <= '9':
		return s.number()
	}
	for _, word := range []string{"true", "false", "null"} {
		if bytes.HasPrefix(s.text[s.pos:], []byte(word)) {
			s.pos += len(word)
			return nil
		}
	}
	return &jsonError{"Expecting value", s.pos}
}

// container scans an object or an array whose contents are nested in depth levels.
func (s *jsonScanner) container(depth int, object bool) error {
	end := byte(']')
	if object {
		end = '}'
	}
	s.pos++
	if s.space(); s.peek() == end {
		s.pos++
		return nil
	}
	for {
		var name []byte
		if object {
			start := s.pos
			if s.peek() != '"' {
				return &jsonError{"Expecting property name enclosed in double quotes", s.pos}
			}
			if err := s.string(); err != nil {
				return err
			}
			name = s.text[start:s.pos]
			if s.space(); s.peek() != ':' {
				return &jsonError{"Expecting ':' delimiter", s.pos}
			}
			s.pos++
			s.space()
		}
		start := s.pos
		if err := s.value(depth); err != nil {
			return err
		}
		if object && depth == 1 {
			text, _ := jsonText(name)
			s.members = append(s.members, jsonMember{text, s.text[start:s.pos]})
		}
		switch s.space(); s.peek() {
		case end:
			s.pos++
			return nil
		case ',':
			s.pos++
			s.space()
		default:
			return &jsonError{"Expecting ',' delimiter", s.pos}
		}
	}
}

func (s *jsonScanner) string() error {
	start := s.pos
	for s.pos++; ; s.pos++ {
		switch {
		case s.pos >= len(s.text):
			return &jsonError{"Unterminated string starting at", start}
		case s.text[s.pos] == '"':
			s.pos++
			return nil
		case s.text[s.pos] < ' ':
			return &jsonError{"Invalid control character at", s.pos}
		case s.text[s.pos] != '\\':
			continue
		}
		switch s.pos++; s.peek() {
		case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		case 'u':
			if _, ok := hex4(s.text[s.pos+1:]); !ok {
				return &jsonError{`Invalid \uXXXX escape`, s.pos}
			}
			s.pos += 4
		default:
			if s.pos >= len(s.text) {
				return &jsonError{"Unterminated string starting at", start}
			}
			return &jsonError{`Invalid \escape`, s.pos - 1}
		}
	}
}

// number scans a number; what does not belong to one is left for the caller to refuse.
func (s *jsonScanner) number() error {
	start := s.pos
	if s.peek() == '-' {
		s.pos++
	}
	if s.peek() == '0' {
		s.pos++
	} else if !s.digits() {
		return &jsonError{"Expecting value", start}
	}
	for _, part := range []string{".", "eE"} {
		whole := s.pos
		if c := s.peek(); c == 0 || !bytes.ContainsRune([]byte(part), rune(c)) {
			continue
		}
		s.pos++
		if c := s.peek(); part == "eE" && (c == '+' || c == '-') {
			s.pos++
		}
		if !s.digits() {
			s.pos = whole
			break
		}
	}
	return nil
}

func (s *jsonScanner) digits() bool {
	start := s.pos
	for c := s.peek(); '0' <= c && c <= '9'; c = s.peek() {
		s.pos++
	}
	return s.pos > start
}

// hex4 reads the four digits of a \u escape.
func hex4(text []byte) (rune, bool) {
	if len(text) < 4 {
		return 0, false
	}
	n := rune(0)
	for _, c := range text[:4] {
		switch {
		case '0' <= c && c <= '9':
			n = n<<4 | rune(c-'0')
		case 'a' <= c|0x20 && c|0x20 <= 'f':
			n = n<<4 | rune(c|0x20-'a'+10)
		default:
			return 0, false
		}
	}
	return n, true
}

// jsonText decodes a JSON string that parseJSON has accepted. storable is false when the string has
// a U+0000 or a lone surrogate, neither of which PostgreSQL's text can hold.
func jsonText(raw []byte) (text string, storable bool) {
	raw = raw[1 : len(raw)-1]
	if bytes.IndexByte(raw, '\\') < 0 {
		return string(raw), true
	}
	storable = true
	out := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			out = append(out, raw[i])
			continue
		}
		i++
		if raw[i] != 'u' {
			out = append(out, escapes[raw[i]])
			continue
		}
		r, _ := hex4(raw[i+1:])
		i += 4
		if utf16.IsSurrogate(r) {
			var low rune
			if rest := raw[i+1:]; bytes.HasPrefix(rest, []byte(`\u`)) {
				low, _ = hex4(rest[2:])
			}
			if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
				storable = false
			} else {
				i += 6
			}
		}
		storable = storable && r != 0
		out = utf8.AppendRune(out, r)
	}
	return string(out), storable
}

// escapes maps the letter of a two-character escape to what it stands for (RFC 8259 section 7).
var escapes = [256]byte{'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}

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
