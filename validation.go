package main

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"unicode/utf8"
)

// This file says what is wrong with a request, in the words of Pydantic, which the clients of the FastAPI
// service know.

// A validation collects the faults of a request, in Pydantic's shape and words.
type validation []fault

type fault struct {
	Type  string          `json:"type"`
	Loc   []any           `json:"loc"`
	Msg   string          `json:"msg"`
	Input json.RawMessage `json:"input"`
	Ctx   map[string]any  `json:"ctx,omitempty"`
}

func (v validation) Error() string { return fmt.Sprintf("%d faults in the request", len(v)) }

// add adds a fault. input is the JSON text of what was given.
func (v *validation) add(kind, msg string, input []byte, ctx map[string]any, loc ...any) {
	*v = append(*v, fault{kind, loc, msg, input, ctx})
}

// valueError adds a fault that Pydantic's own types have no name for.
func (v *validation) valueError(msg string, input []byte, loc ...any) {
	v.add("value_error", "Value error, "+msg, input, map[string]any{"error": struct{}{}}, loc...)
}

// unstorable adds the fault of a text that PostgreSQL has no room for.
func (v *validation) unstorable(input []byte, loc ...any) {
	v.valueError("text must not contain U+0000 or lone surrogates", input, loc...)
}

// quote returns text as JSON.
func quote(text string) []byte {
	b, _ := json.Marshal(text)
	return b
}

// length checks that a text has lower, 0 or 1, to upper code points.
func (v *validation) length(text string, lower, upper int, input []byte, loc ...any) {
	if n := utf8.RuneCountInString(text); n < lower {
		v.add("string_too_short", "String should have at least 1 character", input, map[string]any{"min_length": lower}, loc...)
	} else if n > upper {
		msg := fmt.Sprintf("String should have at most %d characters", upper)
		v.add("string_too_long", msg, input, map[string]any{"max_length": upper}, loc...)
	}
}

var anInteger = regexp.MustCompile(`^[+-]?[0-9]+$`)

// integer reads a whole number. One beyond int64 becomes the nearest within, which no task has for an id.
func (v *validation) integer(text string, loc ...any) (n int64, ok bool) {
	if ok = anInteger.MatchString(text); !ok {
		v.add("int_parsing", "Input should be a valid integer, unable to parse string as an integer", quote(text), nil, loc...)
	}
	n, _ = strconv.ParseInt(text, 10, 64)
	return n, ok
}
