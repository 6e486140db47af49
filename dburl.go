package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/lib/pq"
)

// parseDatabaseURL turns a PostgreSQL URL (the manual's section "Connection URIs") into lib/pq's
// configuration, and returns what the operator should be warned about. No error of it quotes the URL.
func parseDatabaseURL(text string, getenv func(string) string) (cfg pq.Config, warnings []string, err error) {
	params, err := urlParameters(text)
	if err != nil {
		return cfg, nil, err
	}
	local := !slices.ContainsFunc(strings.Split(cmp.Or(params["hostaddr"], params["host"], getenv("PGHOST")), ","),
		func(host string) bool { return !isLocal(host) })
	mode, root := cmp.Or(params["sslmode"], getenv("PGSSLMODE")), cmp.Or(params["sslrootcert"], getenv("PGSSLROOTCERT"))
	switch {
	case params["channel_binding"] == "require":
		// lib/pq has no channel binding. What that protects against, somebody in the middle with
		// another certificate, a verified certificate and host name protect against as well.
		if mode == "disable" {
			return cfg, nil, errors.New("channel_binding=require contradicts sslmode=disable: leave one of them out")
		}
		mode, params["sslrootcert"] = "verify-full", cmp.Or(root, "system")
	case mode == "" && root == "system":
		mode = "verify-full"
	case mode == "" && local:
		mode = "prefer"
	case mode == "":
		mode = "require"
	}
	if _, err := os.Stat(root); mode == "require" && !local && err != nil { // lib/pq passes over a file that is not there
		warnings = append(warnings, "the connection to the database is encrypted, but the server's identity is not verified: "+
			"use sslmode=verify-full&sslrootcert=system, or channel_binding=require")
	}
	params["sslmode"], params["timezone"] = mode, "UTC"
	params["fallback_application_name"] = cmp.Or(params["fallback_application_name"], "taskflow")
	params["binary_parameters"] = "yes" // one round trip for each statement, so a transaction pooler cannot split it
	delete(params, "channel_binding")

	var dsn strings.Builder
	for key, value := range params {
		fmt.Fprintf(&dsn, "%s='%s' ", key, strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value))
	}
	if cfg, err = pq.NewConfig(dsn.String()); err != nil {
		return cfg, nil, errors.New(harmlessWords.FindString(err.Error()))
	}
	return cfg, warnings, nil
}

// harmlessWords are those in front of what lib/pq's parser quotes: where a password holds what should have
// been encoded, that may be a part of the password. An sslmode that it finds weak is a known one.
var harmlessWords = regexp.MustCompile(`^(pq: )?(wrong value for ("\w+"|\$\w+)|weak sslmode .*|[^"]*)`)

// urlParameters takes a URL apart into libpq's parameter names. net/url cannot do it: it refuses
// host lists with ports and percent-encoded socket directories, which are legal here.
func urlParameters(text string) (map[string]string, error) {
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok || scheme != "postgres" && scheme != "postgresql" {
		return nil, errors.New("must be a URL that begins with postgres:// or postgresql://")
	}
	rest, query, _ := strings.Cut(rest, "?")
	authority, database, _ := strings.Cut(rest, "/")
	params := map[string]string{}
	var failed error
	set := func(name, value string) {
		value, err := url.PathUnescape(value)
		if err != nil || !utf8.ValidString(value) || strings.ContainsRune(value, 0) {
			failed = fmt.Errorf("has a broken percent-encoding in its %s", name)
		}
		if value != "" {
			params[name] = value
		}
	}
	if at := strings.LastIndexByte(authority, '@'); at >= 0 {
		user, password, _ := strings.Cut(authority[:at], ":")
		set("user", user)
		set("password", password)
		authority = authority[at+1:]
	}
	var hosts, ports []string
	hasPort := false
	for _, host := range strings.Split(authority, ",") {
		port := ""
		if colon := strings.LastIndexByte(host, ':'); colon > strings.LastIndexByte(host, ']') {
			host, port = host[:colon], host[colon+1:]
		}
		hasPort = hasPort || port != ""
		hosts = append(hosts, strings.Trim(host, "[]"))
		ports = append(ports, cmp.Or(port, "5432"))
	}
	set("host", strings.Join(hosts, ","))
	if hasPort {
		set("port", strings.Join(ports, ","))
	}
	set("dbname", database)
	for _, pair := range strings.Split(query, "&") {
		name, value, _ := strings.Cut(pair, "=")
		if pair != "" && (name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz_.") != "") {
			return nil, errors.New("has an option whose name is not made of lower-case letters")
		}
		if name == "ssl" && value == "true" { // as libpq has it for JDBC's sake
			name, value = "sslmode", "require"
		}
		set(name, value)
	}
	return params, failed
}

// isLocal reports whether host, one of a URL's, names this machine: a socket directory or loopback.
func isLocal(host string) bool {
	return host == "" || filepath.IsAbs(host) || strings.HasPrefix(host, "@") || isLoopback(host)
}
