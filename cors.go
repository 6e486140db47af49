package main

import (
	"errors"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// What a page may send and read beyond what the Fetch standard allows by itself.
const (
	corsMethods = "GET, POST, PATCH, DELETE"
	corsHeaders = "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-ID"
	corsExposed = "ETag, Link, Location, Retry-After, X-Request-ID"
	corsMaxAge  = "7200" // seconds; no browser keeps it longer than a few hours
)

// cors lets pages of the given origins call next (Fetch standard, section 3.2 "CORS protocol"). It
// stands outside all that can answer with an error, so that a page can read that too, and answers
// preflights itself: they come without a token.
func cors(origins []string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
			return
		}
		if allowed {
			h["Access-Control-Expose-Headers"] = []string{corsExposed}
		}
		next.ServeHTTP(w, r)
	})
}

// parseOrigins reads a comma-separated list of origins, each just as a browser serialises it (HTML
// standard, "ASCII serialisation of an origin").
func parseOrigins(list string) (origins []string, err error) {
	for origin := range strings.SplitSeq(list, ",") {
		origin = strings.Trim(origin, " \t")
		if fault := originFault(origin); fault != "" {
			return nil, errors.New(quoted(origin) + " is not an origin like https://app.example.com: " + fault)
		}
		origins = append(origins, origin)
	}
	return origins, nil
}

// originFault says what keeps a text from being an origin, "" for nothing.
func originFault(origin string) string {
	scheme, rest, _ := strings.Cut(origin, "://")
	u, err := url.Parse(origin)
	switch {
	case origin == "":
		return "it is empty (is there a comma too many?)"
	case origin == "*" || strings.Contains(origin, "*"):
		return "wildcards would let every page act for the user; list the origins"
	case scheme != "http" && scheme != "https" || err != nil:
		return "it must begin with http:// or https:// and a host name"
	case rest != u.Host || u.Hostname() == "":
		return "there must be nothing but a scheme, a host and perhaps a port, not even a / at the end"
	case strings.HasSuffix(u.Host, ":"):
		return "the port is missing behind the colon"
	case u.Port() == map[string]string{"http": "80", "https": "443"}[scheme]:
		return "browsers leave out the port that is the scheme's default"
	}
	if port := u.Port(); port != "" && (port[0] == '0' || len(port) > 5 || len(port) == 5 && port > "65535") {
		return "there is no such port"
	}
	host := u.Hostname()
	last := host[strings.LastIndex(strings.TrimSuffix(host, "."), ".")+1:]
	addr, err := netip.ParseAddr(host)
	if strings.HasPrefix(u.Host, "[") {
		if err != nil || addr.String() != host || addr.Is4In6() || addr.Zone() != "" {
			return "the IPv6 address must be in its shortest form"
		}
	} else if strings.Trim(last, "0123456789.") == "" && err != nil { // URL standard, "ends in a number checker"
		return "a host that ends in a number must be an IPv4 address with four parts"
	} else if strings.Trim(host, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" || strings.Contains("."+host, "..") {
		return "the host name must be in lower case, in its ASCII form (xn--…) where it has other letters"
	}
	return ""
}
