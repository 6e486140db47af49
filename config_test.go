package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"
)

const localDatabase = "DATABASE_URL=postgres://u@localhost/d"

// environment is one with these variables, NAME=value, and what is required.
func environment(variables ...string) func(string) string {
	return bareEnvironment(append([]string{localDatabase, secretVariable}, variables...)...)
}

func bareEnvironment(variables ...string) func(string) string {
	return func(name string) string {
		for _, variable := range slices.Backward(variables) { // the last counts
			if value, ok := strings.CutPrefix(variable, name+"="); ok {
				return value
			}
		}
		return ""
	}
}

const remoteDatabase = "DATABASE_URL=postgres://u:p@db.example.com/tasks?sslmode=verify-full&sslrootcert=system"

func TestValuesAreReadAndAnEmptyOneIsUnset(t *testing.T) {
	t.Parallel()
	unset := config{development: true, secret: testSecret, origins: []string{"http://localhost:3000"}, host: "127.0.0.1", port: "8000",
		poolSize: 16, poolTimeout: 5 * time.Second}
	set := config{development: true, secret: strings.Repeat("ü", 16), jwksURL: "https://c", issuer: "i", audience: "a,b",
		origins: []string{"https://a", "http://b:1"}, host: "::1", port: "65535", poolSize: 1, poolTimeout: 30 * time.Second}
	for _, c := range []struct {
		variables []string
		want      config
	}{
		{nil, unset},
		{[]string{"BETTER_AUTH_JWKS_URL=", "BETTER_AUTH_ISSUER=", "BETTER_AUTH_AUDIENCE=\"\"", "CORS_ORIGINS= ", "ENVIRONMENT=", "HOST=",
			"PORT=", "DB_POOL_SIZE=", "DB_POOL_TIMEOUT="}, unset},
		{[]string{"BETTER_AUTH_SECRET=" + set.secret, "BETTER_AUTH_JWKS_URL=https://c", "BETTER_AUTH_ISSUER=i",
			"BETTER_AUTH_AUDIENCE=a,b", "CORS_ORIGINS=https://a , http://b:1", "ENVIRONMENT=development", "HOST=::1", "PORT=65535",
			"DB_POOL_SIZE=1", "DB_POOL_TIMEOUT=0m30s"}, set},
		{[]string{"BETTER_AUTH_SECRET=" + set.secret, "BETTER_AUTH_JWKS_URL=\"https://c\"\n", "BETTER_AUTH_ISSUER= i ", // pasted
			"BETTER_AUTH_AUDIENCE=' a,b'", "CORS_ORIGINS=\"https://a, http://b:1\"", "ENVIRONMENT=\"development\"", "HOST='::1'",
			"PORT= 65535\r\n", "DB_POOL_SIZE=1\n", "DB_POOL_TIMEOUT=30s "}, set},
	} {
		got, err := parseConfig(environment(c.variables...))
		if got.database.Host != "localhost" {
			t.Errorf("%q: the database is %+v", c.variables, got.database)
		}
		if got.database = (pq.Config{}); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q: %+v, %v", c.variables, got, err)
		}
	}
	for _, variable := range []string{"PORT=1", "DB_POOL_TIMEOUT=1ns", "DB_POOL_TIMEOUT=1.5s", "DB_POOL_SIZE=1000", "HOST=localhost",
		"BETTER_AUTH_SECRET=" + strings.Repeat("x", 32), "BETTER_AUTH_JWKS_URL=https://a.example/jwks",
		"BETTER_AUTH_JWKS_URL=https://10.0.0.1:8443/x?y=z", "BETTER_AUTH_JWKS_URL=http://localhost:3000/api/auth/jwks",
		"BETTER_AUTH_JWKS_URL=http://127.8.9.10/", "BETTER_AUTH_JWKS_URL=http://[::1]:3000/"} {
		if _, err := parseConfig(environment(variable)); err != nil {
			t.Errorf("%s: %v", variable, err)
		}
	}
}

func TestADatabaseURLIsTakenAsItIsPasted(t *testing.T) {
	t.Parallel()
	for _, value := range []string{"postgresql://u:p@h/d\n", "  postgres://u:p@h/d ", `"postgres://u:p@h/d"`, "'postgres://u:p@h/d'\r\n",
		` " postgres://u:p@h/d " `, "postgresql+psycopg2://u:p@h/d", "postgresql+psycopg://u:p@h/d", "postgres+asyncpg://u:p@h/d"} {
		c, err := parseConfig(environment("DATABASE_URL=" + value))
		if err != nil || c.database.Host != "h" || c.database.Password != "p" || c.database.Database != "d" {
			t.Errorf("%q: %+v, %v", value, c.database, err)
		}
	}
}

func TestTheDatabaseAndAWayToSignInAreRequiredEverywhere(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "development", "production", "Development", "dev", "test", "0"} {
		_, err := parseConfig(bareEnvironment("ENVIRONMENT=" + name))
		if err == nil || strings.Count(err.Error(), "\n") != 1 || !strings.HasPrefix(err.Error(), "DATABASE_URL ") ||
			!strings.Contains(err.Error(), "\nBETTER_AUTH_SECRET ") || strings.Count(err.Error(), "make run") != 2 {
			t.Errorf("%q: %v", name, err)
		}
		development := name == "" || name == "development"
		for _, auth := range []string{secretVariable, "BETTER_AUTH_JWKS_URL=https://a.example/jwks"} {
			if c, err := parseConfig(bareEnvironment("ENVIRONMENT="+name, remoteDatabase, auth)); err != nil ||
				c.development != development || (c.host == "") == development || c.database.Host != "db.example.com" {
				t.Errorf("%q with %s: %+v, %v", name, auth, c, err)
			}
		}
	}
}

// Not parallel: it changes the environment of the process.
func TestWhatOnlyLibpqKnowsIsDroppedOrRefused(t *testing.T) {
	for option, refused := range map[string]string{
		"gssencmode=disable": "", "gssencmode=prefer": "", "gssencmode=require": "gssencmode", "sslcompression=0": "",
		"keepalives=1&keepalives_idle=30&keepalives_interval=10&keepalives_count=5&tcp_user_timeout=3000": "", "sslcertmode=allow": "",
		"sslcertmode=require": "sslcertmode", "requiressl=0": "", "requiressl=1": "", "channel_binding=prefer": "",
		"channel_binding=disable": "", "require_auth=scram-sha-256": "require_auth", "requirepeer=postgres": "requirepeer",
		"sslcrl=/x": "sslcrl", "sslcrldir=/x": "sslcrldir", "sslpassword=hidden": "sslpassword", "gsslib=gssapi": "",
	} {
		for _, inURL := range []bool{true, false} {
			url, getenv := "postgres://u@h/d?"+option, func(string) string { return "" }
			variable := ""
			if name, value, _ := strings.Cut(option, "="); !inURL && !strings.Contains(option, "&") && name != "requiressl" {
				variable = "PG" + strings.ToUpper(strings.ReplaceAll(name, "_", ""))
				t.Setenv(variable, value)
				url, getenv = "postgres://u@h/d", os.Getenv
			}
			c, _, err := parseDatabaseURL(url, getenv)
			if refused == "" && (err != nil || len(c.Runtime) > 0) || refused != "" && (err == nil || !strings.Contains(err.Error(), refused)) {
				t.Errorf("%s: %v, %v", option, c.Runtime, err)
			}
			if err != nil && strings.Contains(err.Error(), "hidden") {
				t.Error(err)
			}
			_ = os.Unsetenv(variable)
		}
	}
	if c, _, err := parseDatabaseURL("postgres://u@h/d?search_path=x&work_mem=1MB", os.Getenv); err != nil || len(c.Runtime) != 2 {
		t.Errorf("settings of the server: %v, %v", c.Runtime, err)
	}
	t.Setenv("PGCHANNELBINDING", "require")
	if c, _, err := parseDatabaseURL("postgres://u@h/d", os.Getenv); err != nil || c.SSLMode != "verify-full" {
		t.Errorf("channel binding: %v, %v", c.SSLMode, err)
	}
}

// faulty has values that are one fault each, all of them with a mark that must not be printed where it is a secret.
var faulty = map[string][]string{
	"DATABASE_URL": {"mysql://u:s3cr3t@h/db", "u:s3cr3t@h/db", "s3cr3t", "postgres://u:s3cr3t@h/db?sslmode=perhaps",
		"postgres://u:s3cr3t@h:port/db", "postgres://u:s3cr3t@h/db?sslmode=disable&channel_binding=require", "postgres://u:%zzs3cr3t@h/db",
		"postgres://u:s3cr3t@h/db?connect_timeout=x"},
	"BETTER_AUTH_SECRET": {"s3cr3t", strings.Repeat("s3cr3t!", 4) + "xyz", "ü" + strings.Repeat("s3cr3t", 4)},
	"BETTER_AUTH_JWKS_URL": {"http://a.example/jwks", "http://0.0.0.0/jwks", "http://localhost.example.com/", "http://[2001:db8::1]/",
		"http://user:s3cr3t@a.example/", "ftp://a.example/s3cr3t", "a.example/jwks", "https://", "https://:443/", "http://%zz/"},
	"CORS_ORIGINS": {"*", "http://a/", "http://a,", "null", ",", "http://A", "https://user:s3cr3t@a.example",
		strings.Repeat("https://a.example/", 20)},
	"HOST":            {"[::1]", "::1]:8000", "http://a", "a b", "localhost:8000", "0.0.0.0:80", ":8000"},
	"PORT":            {"0", "65536", "-1", "+1", "http", "8000 1", "80.0", "0x50", "99999999999999999999"},
	"DB_POOL_SIZE":    {"0", "-1", "x", "1.5", "1 6", "99999999999999999999"},
	"DB_POOL_TIMEOUT": {"0", "0s", "-1s", "5", "30.000000001s", "31s", "1h", "x", "5 s", "9999999999h"},
}

func TestEveryFaultIsALineThatNamesTheVariableAndPrintsNoSecret(t *testing.T) {
	t.Parallel()
	check := func(lines int, err error, variables ...string) {
		t.Helper()
		if !errors.As(err, new(configError)) {
			t.Fatalf("%q: %v", variables, err)
		}
		got := strings.Split(err.Error(), "\n")
		for i, line := range got {
			if !strings.HasPrefix(line, strings.Split(variables[i], "=")[0]+" ") || strings.Contains(strings.ToLower(line), "s3cr3t") ||
				len(line) > 300 {
				t.Errorf("%q: %s", variables[i], line)
			}
		}
		if len(got) != lines {
			t.Errorf("%q: %d lines, want %d: %v", variables, len(got), lines, err)
		}
	}
	var all []string
	for _, name := range []string{"DATABASE_URL", "BETTER_AUTH_SECRET", "BETTER_AUTH_JWKS_URL", "CORS_ORIGINS", "HOST", "PORT",
		"DB_POOL_SIZE", "DB_POOL_TIMEOUT"} {
		for _, value := range faulty[name] {
			_, err := parseConfig(environment(name + "=" + value))
			check(1, err, name+"="+value)
		}
		all = append(all, name+"="+faulty[name][0])
	}
	for _, environ := range [][]string{all, append([]string{"ENVIRONMENT=production"}, all...)} {
		_, err := parseConfig(environment(environ...))
		check(len(all), err, all...)
	}
	// A password in which something is not encoded, and every other misfortune of a URL
	for _, password := range []string{"S3cr3t/x", "x/S3cr3t", "S3cr3t?x", "x?S3cr3t", "x?sslmode=S3cr3t", "x?s3cr3t=%zz", "S3cr3t#x",
		"1#S3cr3t", "S3cr3t@x", "x@S3cr3t", "S3cr3t:x", "%zzS3cr3t", "1,S3cr3t", "[S3cr3t", "S3cr3t]:", `S3cr3t"`,
		"x\nS3cr3t", "S3cr3t\xff", "S3cr3t%00"} {
		for _, rest := range []string{"h/db", "h:port", "h,i:1,x/db", "[::1", "/db?sslmode=perhaps",
			"h/db?sslpassword=S3cr3t%22&connect_timeout=x", "h/db?target_session_attrs=S3cr3t"} {
			variable := "DATABASE_URL=postgres://u:" + password + "@" + rest
			if c, err := parseConfig(environment(variable)); err != nil {
				check(1, err, variable)
			} else if text := strings.ToLower(fmt.Sprint(c.warnings)); strings.Contains(text, "s3cr3t") {
				t.Errorf("%q: %s", variable, text)
			}
		}
	}
}

func TestWarnings(t *testing.T) {
	t.Parallel()
	const jwks = "BETTER_AUTH_JWKS_URL=https://a.example/jwks"
	for _, c := range []struct {
		variables []string
		want      []string // what each warning names
	}{
		{[]string{remoteDatabase}, nil}, {[]string{"BETTER_AUTH_SECRET=" + testSecret + "\n"}, []string{"BETTER_AUTH_SECRET"}},
		{[]string{"BETTER_AUTH_SECRET='" + testSecret + "'"}, []string{"BETTER_AUTH_SECRET"}}, {[]string{jwks, "BETTER_AUTH_AUDIENCE=x"}, nil},
		{[]string{jwks}, []string{"BETTER_AUTH_AUDIENCE"}}, {[]string{jwks, "BETTER_AUTH_ISSUER=x"}, []string{"BETTER_AUTH_AUDIENCE"}},
		{[]string{"DATABASE_URL=postgres://u@db.example.com/d?sslmode=require"}, []string{"verif"}},
		{[]string{"DATABASE_URL=postgres://u@localhost,db.example.com/d?sslmode=require"}, []string{"verif"}},
		{[]string{"DATABASE_URL=postgres://u@127.0.0.1,[::1]/d?sslmode=require"}, nil},
		{[]string{jwks, "DATABASE_URL=postgres://u@db.example.com/d?sslmode=require"}, []string{"verif", "BETTER_AUTH_AUDIENCE"}},
	} {
		got, err := parseConfig(environment(c.variables...))
		if err != nil || !slices.EqualFunc(got.warnings, c.want, strings.Contains) {
			t.Errorf("%q: %q, %v", c.variables, got.warnings, err)
		}
	}
}

func TestTaskflowTokenPrintsATokenThatTheServiceAccepts(t *testing.T) {
	t.Parallel()
	both := []string{secretVariable, "BETTER_AUTH_ISSUER=https://a.example", "BETTER_AUTH_AUDIENCE=https://b.example"}
	for _, c := range []struct {
		variables, args []string
		lasts           time.Duration // 0: refused
	}{
		{[]string{secretVariable}, []string{"ann"}, time.Hour}, {both, []string{"ann"}, time.Hour},
		{both[:2], []string{"a/b é"}, time.Hour}, {both, []string{"-ttl", "90s", strings.Repeat("a", 255)}, 90 * time.Second},
		{both, []string{"--ttl=1000h", "ann"}, 1000 * time.Hour},
		{append([]string{"BETTER_AUTH_JWKS_URL=https://a.example/jwks"}, both...), []string{"ann"}, time.Hour}, {both, nil, 0},
		{both, []string{""}, 0}, {both, []string{"ann", "bob"}, 0}, {both, []string{strings.Repeat("a", 256)}, 0},
		{both, []string{"-ttl", "x", "ann"}, 0}, {both, []string{"-ttl", "0", "ann"}, 0},
		{[]string{"BETTER_AUTH_SECRET=short"}, []string{"ann"}, 0}, {append(both, "PORT=x"), []string{"ann"}, 0},
		{append(both, "ENVIRONMENT=production", remoteDatabase), []string{"ann"}, 0},
		{append(both, "ENVIRONMENT=dev", remoteDatabase), []string{"ann"}, 0},
	} {
		var stdout, stderr bytes.Buffer
		start, getenv := time.Now().Truncate(time.Second), environment(c.variables...)
		err := run(t.Context(), append([]string{"token"}, c.args...), getenv, &stdout, &stderr)
		if c.lasts == 0 {
			if !errors.As(err, new(configError)) || stdout.Len() > 0 {
				t.Errorf("%q with %q: %v\n%s", c.args, c.variables, err, &stdout)
			}
			continue
		}
		a, user := newAuthenticator(testSecret, "", getenv("BETTER_AUTH_ISSUER"), getenv("BETTER_AUTH_AUDIENCE")), c.args[len(c.args)-1]
		token, ok := strings.CutSuffix(stdout.String(), "\n")
		a.says(t, tokenGood, user, token)
		if left := a.verified[token].expires.Sub(start); !ok || err != nil || stderr.Len() > 0 || left < c.lasts ||
			left > c.lasts+10*time.Second {
			t.Errorf("%q with %q: lasts %s, %v\n%s%s", c.args, c.variables, left, err, &stdout, &stderr)
		}
		a = newAuthenticator(testSecret, "", "https://a.example", "https://b.example")
		a.says(t, map[bool]string{true: tokenGood, false: tokenInvalid}[getenv("BETTER_AUTH_AUDIENCE") != ""], user, token)
	}
}
