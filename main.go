// Taskflow is the backend of a multi-user task list: tasks in PostgreSQL, users by the tokens of
// Better Auth.
//
//	taskflow                       serve, configured by the environment
//	taskflow token [-ttl 1h] USER  print a token for USER (in development)
//	taskflow healthcheck           ask the running service's /health; exit status 0 or 1
//	taskflow version               print the version
//
// The environment, with defaults; an empty variable is an unset one:
//
//	DATABASE_URL          a PostgreSQL URL; in development a private PostgreSQL, started here
//	BETTER_AUTH_SECRET    HS256 secret of at least 32 bytes; in development generated and kept
//	BETTER_AUTH_JWKS_URL  Better Auth's JWKS; tokens with other algorithms than HS256
//	BETTER_AUTH_ISSUER    what iss must be; BETTER_AUTH_AUDIENCE: what aud must have
//	CORS_ORIGINS          http://localhost:3000; comma-separated
//	ENVIRONMENT           development; every other value is production
//	HOST, PORT            loopback in development, else all interfaces; 8000
//	DB_POOL_SIZE          16 connections to the database
//	DB_POOL_TIMEOUT       5s; how long a request may wait for the database before its 503
//
// Exit status 2 means a bad configuration or command line, 1 a failure to start or to stop.
// SIGTERM, SIGINT and SIGHUP stop it: /ready turns 503, after a second the listener closes, and requests in
// flight finish. A second signal ends it at once.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
)

const (
	demoUser     = "demo"
	demoTokenTTL = 24 * time.Hour

	headerTimeout = 10 * time.Second
	headerBytes   = 64 << 10
	idleTimeout   = 120 * time.Second
	writeTimeout  = 30 * time.Second // without any progress

	drainTime    = time.Second            // from the signal until the listener closes: balancers need to notice
	finishTime   = 25 * time.Second       // from the signal until requests in flight get a 503
	abandonTime  = 2 * time.Second        // from finishTime until connections are cut
	headStart    = 100 * time.Millisecond // for a database that is up, so that nobody gets a 503 at the start
	schemaPeriod = 250 * time.Millisecond
)

func main() {
	err := run(context.Background(), os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		fmt.Fprintln(os.Stderr, "taskflow:", line)
	}
	if errors.As(err, new(configError)) {
		os.Exit(2)
	}
	os.Exit(1)
}

const usage = "usage: taskflow | taskflow token [-ttl 1h] USER | taskflow healthcheck | taskflow version"

// run does what args say, until ctx ends or a signal comes. A configError calls for exit status 2.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	cfg, err := parseConfig(getenv)
	switch command := strings.Join(args, " "); {
	case command == "version":
		_, err = fmt.Fprintln(stdout, version())
		return err
	case command == "healthcheck": // a bad configuration has been reported by the service
		return healthcheck(cfg)
	case command == "-h" || command == "-help" || command == "--help":
		_, err = fmt.Fprintln(stdout, usage)
		return err
	case command != "" && args[0] != "token":
		return configError{errors.New("cannot make sense of the command line; " + usage)}
	case err != nil:
		return err
	case command == "":
		return serve(ctx, cfg, stdout, stderr)
	}
	return printToken(cfg, args[1:], stdout)
}

// version is the module's: the tag or commit that it was built from, (devel) without one.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}

// printToken prints a development token alone, so that a shell can take it.
func printToken(cfg config, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("taskflow token", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	ttl := flags.Duration("ttl", time.Hour, "how long the token is valid")
	err := flags.Parse(args)
	user := flags.Arg(0)
	switch {
	case err != nil:
		return configError{fmt.Errorf("%w; %s", err, usage)}
	case flags.NArg() != 1 || user == "" || len(user) > maxSubject || *ttl <= 0:
		return configError{fmt.Errorf("a token needs a user of 1 to %d bytes and a positive -ttl; %s", maxSubject, usage)}
	case !cfg.development:
		return configError{errors.New("ENVIRONMENT must be development for `taskflow token`: in production tokens come from Better Auth")}
	}
	auth, err := cfg.authenticator()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, auth.developmentToken(user, *ttl))
	return err
}

// healthcheck asks the service that runs with the same configuration. An address that stands for all of this
// machine's is dialled as its loopback address.
func healthcheck(cfg config) error {
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{}} // no proxy
	response, err := client.Get("http://" + net.JoinHostPort(cfg.host, cfg.port) + "/health")
	if err != nil {
		return fmt.Errorf("healthcheck: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("healthcheck: /health answered %s", response.Status)
	}
	return nil
}

// serve listens at once, brings up the database behind it, and serves until a signal comes or the
// database turns out to be one that cannot be used.
func serve(ctx context.Context, cfg config, stdout, stderr io.Writer) (err error) {
	stops := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // by nohup
		stops = append(stops, syscall.SIGHUP)
	}
	signals, stopSignals := signal.NotifyContext(ctx, stops...)
	defer stopSignals()
	logger := newLogger(cfg, stderr)
	limitMemory()
	for _, warning := range cfg.warnings {
		logger.Warn(warning)
	}
	auth, err := cfg.authenticator()
	if err != nil {
		return err
	}
	s := &server{auth: auth, origins: cfg.origins, log: logger, development: cfg.development}

	// Requests live on after the signal, so their context is not that of the signals.
	base, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	abandon := func() { cancel(errStopping) }
	defer abandon()
	httpServer := s.httpServer(base)
	listener, err := new(net.ListenConfig).Listen(signals, "tcp", net.JoinHostPort(cfg.host, cfg.port))
	if err != nil {
		return err
	}
	failed := make(chan error, 3) // from bringUp, its PostgreSQL, and Serve: room for all, so that none waits
	logger.Info("listening", "address", listener.Addr().String(), "version", version())

	if auth.jwks != nil {
		go auth.jwks.refresh(base)
	}
	database := make(chan struct{}) // closed when bringUp has ended
	starting, stopStarting := context.WithCancel(signals)
	go func() {
		defer close(database)
		if err := s.bringUp(starting, cfg, func(err error) { failed <- err }); err != nil && starting.Err() == nil {
			failed <- err
		} else if err == nil && cfg.development {
			fmt.Fprintln(stdout, pasteLine(auth, listener.Addr().(*net.TCPAddr)))
		}
	}()
	select {
	case <-database:
	case <-time.After(headStart):
	}
	go func() { failed <- httpServer.Serve(patientListener{listener, writeTimeout}) }()

	select {
	case <-signals.Done():
		stopSignals() // a second signal ends the process at once
		s.draining.Store(true)
		logger.Info("stopping")
		err = shutdown(httpServer, abandon, failed)
	case err = <-failed:
		_ = httpServer.Close()
	}
	stopStarting()
	<-database
	return errors.Join(err, s.close())
}

// newLogger logs text in development and JSON in production, also for what calls slog directly.
func newLogger(cfg config, stderr io.Writer) *slog.Logger {
	logger := slog.New(slog.NewJSONHandler(stderr, nil))
	if cfg.development {
		logger = slog.New(slog.NewTextHandler(stderr, nil))
	}
	slog.SetDefault(logger)
	return logger
}

// limitMemory lets the heap grow to four times of what is in use, but beyond 128 MiB has the garbage collector
// run more often, unless the environment says how.
func limitMemory() {
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(300)
		debug.SetMemoryLimit(128 << 20)
	}
}

// httpServer limits everything that a stranger controls. base is the context of all requests.
func (s *server) httpServer(base context.Context) *http.Server {
	return &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout,
		MaxHeaderBytes:    headerBytes,
		IdleTimeout:       idleTimeout,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // nowhere: strangers' nonsense is no news
		BaseContext:       func(net.Listener) context.Context { return base },

		DisableGeneralOptionsHandler: true,
	}
}

// bringUp reaches the database, tries again as long as it may help, applies the schema, and gives the
// server its store. In development without DATABASE_URL it starts a private PostgreSQL.
func (s *server) bringUp(ctx context.Context, cfg config, onExit func(error)) error {
	if cfg.database == nil {
		folder, err := openDevFolder()
		if err != nil {
			return err
		}
		if s.private, err = startDevDB(ctx, folder, s.log, onExit); err != nil {
			return err
		}
		cfg.database = &s.private.config
	}
	store := newStore(*cfg.database, cfg.poolSize, cfg.poolTimeout)
	for last := ""; ; {
		err := store.applySchema(ctx)
		if err == nil {
			s.store.Store(store)
			s.log.Info("ready")
			return nil
		}
		if isStartupError(err) || ctx.Err() != nil {
			return errors.Join(fmt.Errorf("database: %w", err), store.close())
		}
		if text := err.Error(); text != last {
			s.log.Warn("the database cannot be reached yet; trying again", "error", text)
			last = text
		}
		select {
		case <-time.After(schemaPeriod):
		case <-ctx.Done():
		}
	}
}

// close closes what bringUp has opened.
func (s *server) close() (err error) {
	if store := s.store.Load(); store != nil {
		err = store.close()
	}
	if s.private != nil {
		err = errors.Join(err, s.private.stop())
	}
	return err
}

// shutdown closes the listener after drainTime and waits for the requests in flight; at finishTime it
// abandons them, which makes them answer 503.
func shutdown(httpServer *http.Server, abandon func(), failed <-chan error) error {
	defer time.AfterFunc(finishTime, abandon).Stop()
	ctx, cancel := context.WithTimeout(context.Background(), finishTime+abandonTime)
	defer cancel()
	select {
	case <-time.After(drainTime):
		_ = httpServer.Shutdown(ctx) // who reads nothing is not there to be waited for any longer
		return httpServer.Close()
	case err := <-failed:
		return err
	}
}

// pasteLine is a command for a shell that lists the tasks of demoUser.
func pasteLine(auth *authenticator, address *net.TCPAddr) string {
	host := address.IP.String()
	if address.IP.IsUnspecified() {
		host = "localhost"
	}
	return fmt.Sprintf("curl -H 'Authorization: Bearer %s' http://%s/api/%s/tasks",
		auth.developmentToken(demoUser, demoTokenTTL), net.JoinHostPort(host, fmt.Sprint(address.Port)), demoUser)
}

// A patientListener's connections wait for a slow reader as long as it takes something within limit.
type patientListener struct {
	net.Listener
	limit time.Duration
}

func (l patientListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return patientConn{c.(*net.TCPConn), l.limit}, nil
}

type patientConn struct {
	*net.TCPConn
	limit time.Duration
}

// Write fails when the peer has taken nothing for the limit, or a sixth more. It tries again so often because
// Linux wakes who waits only when a third of the socket's buffer is free: that may take a slow reader long.
func (c patientConn) Write(b []byte) (written int, err error) {
	for end := time.Now().Add(c.limit); ; {
		_ = c.SetWriteDeadline(time.Now().Add(c.limit / 6))
		n, err := c.TCPConn.Write(b[written:])
		written += n
		if n > 0 {
			end = time.Now().Add(c.limit)
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end) {
			return written, err
		}
	}
}
