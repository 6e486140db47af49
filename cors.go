package main

import (
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// What a page may send and read beyond what the Fetch standard allows by itself.
const (
	corsMethods = "GET, POST, PATCH, DELETE"
	corsHeaders = "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-ID"
	corsExposed = "ETag, Link, Location, Retry-After, X-Request-ID"
	corsMaxAge  = "7200" // seconds; Chromium keeps it no longer
)

// cors lets pages of the given origins call next (Fetch standard, section 3.2 "CORS protocol"). It
// sets its headers before anything can fail, so that a page can read errors too, and answers
// preflights itself: they come without a token.
func cors(origins []string, next handler) handler {
	return func(w *response, r *http.Request) error {
		h := w.Header()
		h["Vary"] = []string{"Origin"} // also without an Origin: a cache must not hand this answer to a page
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
				h.Set("Access-Control-Max-Age", corsMaxAge)
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

// parseOrigins reads a comma-separated list of origins, each just as a browser serialises it (HTML
// standard, "ASCII serialisation of an origin").
func parseOrigins(list string) ([]string, error) {
	origins := strings.Split(list, ",")
	for i := range origins {
		origins[i] = strings.Trim(origins[i], " \t")
		if fault := originFault(origins[i]); fault != "" {
			return nil, fmt.Errorf("number %d is not an origin like https://app.example.com: %s", i+1, fault)
		}
	}
	return origins, nil
}

// anOrigin has the scheme, the host and the port of an origin. A browser writes other letters as xn--….
var anOrigin = regexp.MustCompile(`^(https?)://([a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?|\[[0-9a-f:]+\])(:[1-9][0-9]{0,4})?$`)

// originFault says what keeps a text from being an origin, "" for nothing.
func originFault(origin string) string {
	parts := anOrigin.FindStringSubmatch(origin)
	switch {
	case origin == "":
		return "it is empty (is there a comma too many?)"
	case strings.Contains(origin, "*"):
		return "wildcards would let every page act for the user; list the origins"
	case parts == nil:
		return "there must be http:// or https://, a host in lower case (in its ASCII form, xn--…), perhaps a port, and no / at the end"
	case parts[3] == map[string]string{"http": ":80", "https": ":443"}[parts[1]]:
		return "browsers leave out the port that is the scheme's default"
	case len(parts[3]) == len(":65535") && parts[3] > ":65535":
		return "there is no such port"
	}
	host := parts[2]
	last := host[strings.LastIndex(strings.TrimSuffix(host, "."), ".")+1:]
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	if strings.HasPrefix(host, "[") && (err != nil || "["+addr.String()+"]" != host) {
		return "the IPv6 address must be in its shortest form"
	} else if strings.Trim(last, "0123456789.") == "" && err != nil { // URL standard, "ends in a number checker"
		return "a host that ends in a number must be an IPv4 address with four parts"
	}
	return ""
}
