package main

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// What a page may send and read beyond what the Fetch standard allows by default; the last four request headers are those of tracing.
const (
	corsMethods = "GET, POST, PATCH, DELETE"
	corsHeaders = "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-ID, " +
		"traceparent, tracestate, baggage, sentry-trace"
	corsExposed = "ETag, Link, Location, Retry-After, X-Request-ID"
)

// cors lets pages of the given origins call next (Fetch standard, section 3.2 "CORS protocol"). It sets its headers before
// anything can fail, so that a page can read errors too, and answers preflights itself: they come without a token.
func cors(origins []string, next handler) handler {
	return func(w *response, r *http.Request) error {
		h := w.Header()
		h["Vary"] = []string{"Origin"} // also without an Origin, or a cache could give this answer to a page
		origin := r.Header["Origin"]
		allowed := len(origin) == 1 && slices.Contains(origins, origin[0])
		if allowed {
			h["Access-Control-Allow-Origin"] = origin
			h["Access-Control-Allow-Credentials"] = []string{"true"}
		}
		if r.Method == http.MethodOptions && origin != nil && r.Header["Access-Control-Request-Method"] != nil {
			if allowed {
				h.Set("Access-Control-Allow-Methods", corsMethods)
				h.Set("Access-Control-Allow-Headers", corsHeaders)
				h.Set("Access-Control-Max-Age", "7200") // seconds; Chromium keeps it no longer
			}
			w.WriteHeader(http.StatusNoContent)
			return nil
		}
		if allowed {
			h["Access-Control-Expose-Headers"] = []string{corsExposed}
		}
		return next(w, r)
	}
}

// originPattern captures the scheme and the port of an origin. A browser writes the other letters of a host as xn--….
var originPattern = regexp.MustCompile(`^(https?)://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?|\[[0-9a-f:]+\])(?::([1-9][0-9]{0,4}))?$`)

// parseOrigins reads a comma-separated list of origins, each just as a browser serialises it (HTML standard, "ASCII
// serialisation of an origin").
func parseOrigins(list string) ([]string, error) {
	origins := strings.Split(list, ",")
	for i, origin := range origins {
		origins[i] = strings.Trim(origin, " \t")
		parts := originPattern.FindStringSubmatch(origins[i])
		_, err := url.Parse(origins[i]) // for an IPv6 address
		switch {
		case strings.Contains(origin, "*"):
			return nil, errors.New("must list the origins: a wildcard would let every page act for the user")
		case err != nil, parts == nil, len(parts[2]) == 5 && parts[2] > "65535", slices.Contains([]string{"http80", "https443"}, parts[1]+parts[2]):
			return nil, fmt.Errorf("must list origins like https://app.example.com; entry %d is not one: there must be http:// or https://, "+
				"a host in lower case (in its ASCII form, xn--…), perhaps a port other than the scheme's own, and nothing else", i+1)
		}
	}
	return origins, nil
}
