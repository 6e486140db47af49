package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
)

const (
	minSecret      = 32 // bytes (RFC 7518 section 3.2)
	maxPoolTimeout = 30 * time.Second
	// defaultPoolSize was chosen by measurement: 10 to 20 connections are best, under 6 writes lose half.
	defaultPoolSize = 16
)

// A config is the environment, checked.
type config struct {
	development bool
	database    *pq.Config // nil: a private PostgreSQL
	secret      string     // "" in development: one that is generated and kept
	jwksURL     string
	issuer      string
	audience    string
	origins     []string
	host, port  string
	poolSize    int
	poolTimeout time.Duration
	warnings    []string
}

// A configError has one line for each fault of the environment, or of the command line. None quotes a secret.
type configError struct{ error }

// parseConfig reads the configuration from the environment. Its error is a configError with all faults.
func parseConfig(getenv func(string) string) (config, error) {
	var faults []error
	fault := func(name, format string, args ...any) {
		faults = append(faults, fmt.Errorf("%s "+format, append([]any{name}, args...)...))
	}
	value := func(name, fallback string) string { return cmp.Or(getenv(name), fallback) }
	c := config{
		development: value("ENVIRONMENT", "development") == "development",
		secret:      getenv("BETTER_AUTH_SECRET"),
		jwksURL:     getenv("BETTER_AUTH_JWKS_URL"),
		issuer:      getenv("BETTER_AUTH_ISSUER"),
		audience:    getenv("BETTER_AUTH_AUDIENCE"),
		host:        getenv("HOST"),
		port:        value("PORT", "8000"),
	}
	if c.host == "" && c.development {
		c.host = "127.0.0.1"
	}
	if text := getenv("DATABASE_URL"); text != "" {
		database, warnings, err := parseDatabaseURL(text, getenv)
		if c.database, c.warnings = &database, warnings; err != nil {
			fault("DATABASE_URL", "%w", err)
		}
	} else if !c.development {
		fault("DATABASE_URL", "is required in production: a PostgreSQL URL, like postgres://user:password@host/database")
	}
	switch n := len(c.secret); {
	case n == 0 && c.jwksURL == "" && !c.development:
		fault("BETTER_AUTH_SECRET", "or BETTER_AUTH_JWKS_URL is required in production: without one nobody can sign in")
	case n > 0 && n < minSecret:
		fault("BETTER_AUTH_SECRET", "has %d bytes and needs at least %d: make one with `openssl rand -base64 32`", n, minSecret)
	}
	if c.jwksURL != "" {
		if err := checkJWKSURL(c.jwksURL); err != nil {
			fault("BETTER_AUTH_JWKS_URL", "%w", err)
		}
		if c.audience == "" {
			c.warnings = append(c.warnings,
				"BETTER_AUTH_AUDIENCE is not set: a token that the same Better Auth made for another service counts here too")
		}
	}
	var err error
	if c.origins, err = parseOrigins(value("CORS_ORIGINS", "http://localhost:3000")); err != nil {
		fault("CORS_ORIGINS", "%w", err)
	}
	if strings.ContainsAny(c.host, "[]/ ") {
		fault("HOST", "must be an address or a name, without brackets and port")
	}
	if n, err := strconv.ParseUint(c.port, 10, 16); err != nil || n == 0 {
		fault("PORT", "must be a number from 1 to 65535")
	}
	if c.poolSize, err = strconv.Atoi(value("DB_POOL_SIZE", strconv.Itoa(defaultPoolSize))); err != nil || c.poolSize < 1 {
		fault("DB_POOL_SIZE", "must be a positive number of connections")
	}
	c.poolTimeout, err = time.ParseDuration(value("DB_POOL_TIMEOUT", "5s"))
	if err != nil || c.poolTimeout <= 0 || c.poolTimeout > maxPoolTimeout {
		fault("DB_POOL_TIMEOUT", "must be a duration like 5s or 500ms, at most %s", maxPoolTimeout)
	}
	if faults != nil {
		return c, configError{errors.Join(faults...)}
	}
	return c, nil
}

// checkJWKSURL takes https, and http to this machine: keys that came unprotected over a network could
// be anybody's.
func checkJWKSURL(text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" || u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())) {
		return errors.New("must be a URL like https://app.example.com/api/auth/jwks, with http:// only to localhost")
	}
	return nil
}

// isLoopback reports whether host, without a port, is this machine's own name or address.
func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}
