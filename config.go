package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
)

const (
	minSecret      = 32 // bytes (RFC 7518 section 3.2)
	maxPoolTimeout = 30 * time.Second
)

type config struct {
	development bool
	database    pq.Config
	secret      string
	issuer      string
	audience    string
	jwksURL     string
	origins     []string
	host, port  string
	poolSize    int
	poolTimeout time.Duration
	warnings    []string
}

// A configError has one line for each fault of the environment, or of the command line. None quotes a secret.
type configError struct{ error }

// parseConfig reads the configuration from the environment. Its error is a configError with all faults.
func parseConfig(getenv func(string) string) (c config, err error) {
	var faults []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			faults = append(faults, fmt.Errorf(format, args...))
		}
	}
	value := func(name, fallback string) string { return cmp.Or(unquoted(getenv(name)), fallback) }
	c = config{
		development: value("ENVIRONMENT", "development") == "development",
		secret:      getenv("BETTER_AUTH_SECRET"),
		jwksURL:     value("BETTER_AUTH_JWKS_URL", ""),
		issuer:      value("BETTER_AUTH_ISSUER", ""),
		audience:    value("BETTER_AUTH_AUDIENCE", ""),
		host:        value("HOST", ""),
		port:        value("PORT", "8000"),
	}
	if c.host == "" && c.development {
		c.host = "127.0.0.1"
	}
	c.database, c.warnings, err = parseDatabaseURL(value("DATABASE_URL", ""), getenv)
	check(err == nil, "DATABASE_URL %w", err)
	check(c.secret != "" || c.jwksURL != "",
		"BETTER_AUTH_SECRET or BETTER_AUTH_JWKS_URL is required: without one no token can be verified; for development, `make run` sets one")
	check(c.secret == "" || len(c.secret) >= minSecret,
		"BETTER_AUTH_SECRET has %d bytes and needs at least %d: make one with `openssl rand -base64 32`", len(c.secret), minSecret)
	if unquoted(c.secret) != c.secret {
		c.warnings = append(c.warnings, "BETTER_AUTH_SECRET has white space or quotes around it, which are taken as part of the secret")
	}
	check(c.jwksURL == "" || isSafeURL(c.jwksURL),
		"BETTER_AUTH_JWKS_URL must be a URL like https://app.example.com/api/auth/jwks, with http:// only to localhost")
	if c.jwksURL != "" && c.audience == "" {
		c.warnings = append(c.warnings,
			"BETTER_AUTH_AUDIENCE is not set: a token that the same Better Auth made for another service counts here too")
	}
	c.origins, err = parseOrigins(value("CORS_ORIGINS", "http://localhost:3000"))
	check(err == nil, "CORS_ORIGINS %w", err)
	_, err = netip.ParseAddr(c.host)
	check(err == nil || !strings.ContainsAny(c.host, "[]/: "), "HOST must be an address or a name of this machine, without brackets and port")
	port, err := strconv.ParseUint(c.port, 10, 16)
	check(err == nil && port > 0, "PORT must be a number from 1 to 65535")
	c.poolSize, err = strconv.Atoi(value("DB_POOL_SIZE", "16")) // measured: 10 to 20 are best; below 6, writes lose half
	check(err == nil && c.poolSize > 0, "DB_POOL_SIZE must be a positive number of connections")
	c.poolTimeout, err = time.ParseDuration(value("DB_POOL_TIMEOUT", "5s"))
	check(err == nil && c.poolTimeout > 0 && c.poolTimeout <= maxPoolTimeout,
		"DB_POOL_TIMEOUT must be a duration like 5s or 500ms, at most %s", maxPoolTimeout)
	if faults != nil {
		return c, configError{errors.Join(faults...)}
	}
	return c, nil
}

// unquoted takes off what dashboards and .env files add: white space, and one pair of quotes around all of it.
func unquoted(value string) string {
	value = strings.TrimSpace(value)
	if n := len(value); n >= 2 && value[0] == value[n-1] && (value[0] == '"' || value[0] == '\'') {
		value = strings.TrimSpace(value[1 : n-1])
	}
	return value
}

// parseDatabaseURL turns a PostgreSQL URL (the manual's section "Connection URIs") into lib/pq's configuration, and
// returns what the operator should be warned about. Its errors go on after the word DATABASE_URL, and do not quote it.
func parseDatabaseURL(text string, getenv func(string) string) (cfg pq.Config, warnings []string, err error) {
	text, query, err := libpqURL(text)
	if err != nil {
		return cfg, nil, err
	}
	params := func(name, variable string) string { return cmp.Or(query.Get(name), getenv(variable)) }
	mode, root := params("sslmode", "PGSSLMODE"), params("sslrootcert", "PGSSLROOTCERT")
	binding := params("channel_binding", "PGCHANNELBINDING")
	hosts := strings.Split(cmp.Or(query.Get("hostaddr"), params("host", "PGHOST")), ",")
	local := !slices.ContainsFunc(hosts, func(host string) bool { // neither a socket (/… or @…) nor loopback
		return host != "" && !filepath.IsAbs(host) && !strings.HasPrefix(host, "@") && !isLoopback(host)
	})
	if err := dropUnsupported(query, getenv); err != nil {
		return cfg, nil, err
	}
	switch {
	case binding == "require" && mode == "disable":
		return cfg, nil, errors.New("channel_binding=require contradicts sslmode=disable: leave one of them out")
	case binding == "require":
		// lib/pq has no channel binding. What that protects against, somebody in the middle with another certificate,
		// a verified certificate and host name protect against as well.
		mode = "verify-full"
		query.Set("sslrootcert", cmp.Or(root, "system"))
	case mode == "" && root == "system":
		mode = "verify-full"
	case mode == "" && local:
		mode = "prefer"
	case mode == "":
		mode = "require"
	}
	if _, err := os.Stat(root); mode == "require" && !local && err != nil { // lib/pq ignores a file that is missing
		warnings = append(warnings, "the connection to the database is encrypted, but the server's identity is not verified: "+
			"use sslmode=verify-full&sslrootcert=system, or channel_binding=require")
	}
	query.Set("sslmode", mode)
	query.Set("fallback_application_name", "taskflow")
	query.Set("binary_parameters", "yes") // no separate Parse, which a transaction pooler could send to another server
	if cfg, err = pq.NewConfig(text + query.Encode()); err != nil {
		err = errors.New(cmp.Or(harmlessWords.FindString(err.Error()), "cannot be read") + encodingHint)
	}
	return cfg, warnings, err
}

// harmlessWords match the part of an error of lib/pq that cannot hold a piece of the password, as its quotations may
// when the password holds what should have been encoded. Of all other errors they match the empty end.
var harmlessWords = regexp.MustCompile(`wrong value for ("\w+"|\$\w+)|weak sslmode .*|$`)

const encodingHint = ": is something to be encoded? In a user or password, write ? as %3F, # as %23, @ as %40, / as %2F, : as %3A, % as %25"

// libpqURL moves the hosts and ports of a URL into its query: only there does lib/pq take lists and socket directories.
// It returns the URL up to its question mark, and the query.
func libpqURL(text string) (string, url.Values, error) {
	scheme, rest, ok := strings.Cut(text, "://")
	scheme, _, _ = strings.Cut(scheme, "+") // SQLAlchemy's postgresql+psycopg2://
	if text == "" {
		return "", nil, errors.New("is required: like postgres://user:password@host/database; for development, `make run` sets one")
	}
	if !ok || scheme != "postgres" && scheme != "postgresql" {
		return "", nil, errors.New("must be a URL that begins with postgres:// or postgresql://")
	}
	rest, options, _ := strings.Cut(rest, "?")
	query, err := url.ParseQuery(strings.ReplaceAll(options, "+", "%2B")) // in these URLs + is no space
	end := strings.IndexByte(rest+"/", '/')
	start := strings.LastIndexByte(rest[:end], '@') + 1
	var hosts, ports []string
	hasPort := false
	for host := range strings.SplitSeq(rest[start:end], ",") {
		port := ""
		if colon := strings.LastIndexByte(host, ':'); colon > strings.LastIndexByte(host, ']') {
			host, port = host[:colon], host[colon+1:]
		}
		host, escapeErr := url.PathUnescape(strings.Trim(host, "[]"))
		err = cmp.Or(err, escapeErr)
		hosts, ports, hasPort = append(hosts, host), append(ports, cmp.Or(port, "5432")), hasPort || port != ""
	}
	if err != nil || strings.Contains(rest, "#") { // which lib/pq would take for the beginning of a fragment
		return "", nil, errors.New("has a broken percent-encoding" + encodingHint)
	}
	if list := strings.Join(hosts, ","); list != "" { // else the query's own host counts
		query.Set("host", list)
	}
	if hasPort {
		query.Set("port", strings.Join(ports, ","))
	}
	if query.Get("ssl") == "true" || query.Get("requiressl") == "1" { // JDBC's word, and libpq's older one
		query.Set("sslmode", "require")
		query.Del("ssl")
	}
	return "postgres://" + rest[:start] + rest[end:] + "?", query, nil
}

// libpqOnly lists libpq's parameters that lib/pq does not know (PostgreSQL's manual, "Parameter Key Words"): first those
// that can be left out, unless require is their value, and then those that protect something.
var libpqOnly = [2][]string{
	strings.Fields("channel_binding gssdelegation gssencmode gsslib keepalives keepalives_count keepalives_idle keepalives_interval" +
		" requiressl sslcertmode sslcompression sslkeylogfile tcp_user_timeout"),
	strings.Fields("oauth_client_id oauth_issuer require_auth requirepeer scram_client_key scram_server_key sslcrl sslcrldir sslpassword"),
}

// dropUnsupported removes what can be left out from the query, where the server would take it for a setting, and from the
// process's environment (PGGSSENCMODE, …), where lib/pq would refuse it.
func dropUnsupported(query url.Values, getenv func(string) string) error {
	for list, names := range libpqOnly {
		for _, name := range names {
			variable := "PG" + strings.ToUpper(strings.ReplaceAll(name, "_", ""))
			value := cmp.Or(query.Get(name), getenv(variable))
			if value != "" && list == 1 || value == "require" && name != "channel_binding" {
				return fmt.Errorf("or %s asks for %s, a protection that the driver cannot give: leave it out", variable, name)
			}
			query.Del(name)
			_ = os.Unsetenv(variable)
		}
	}
	return nil
}
