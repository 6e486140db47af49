// Taskflow is the backend of a multi-user task list: tasks in PostgreSQL, users by the tokens of Better Auth.
//
//	taskflow                       serve, configured by the environment (see README.md)
//	taskflow token [-ttl 1h] USER  print a token for USER (in development)
//	taskflow healthcheck           ask the running service's /health; exit status 0 or 1
//
// Exit status 2 means a bad configuration or command line, 1 any other failure. SIGTERM and SIGINT stop it: /ready
// turns 503, after a second the listener closes, and requests in flight finish. A second signal ends it at once.
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
	drainTime   = time.Second            // from the signal until the listener closes: balancers need to notice
	finishTime  = 25 * time.Second       // from the signal until requests in flight get a 503
	abandonTime = 2 * time.Second        // from finishTime until connections are cut
	headStart   = 100 * time.Millisecond // how long the first request may wait for the database at a start, instead of a 503
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			fmt.Fprintln(os.Stderr, "taskflow:", line)
		}
		if errors.As(err, new(configError)) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

const usage = "usage: taskflow | taskflow token [-ttl 1h] USER | taskflow healthcheck"

// run does what args say, until ctx ends or a signal comes. A configError calls for exit status 2.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	cfg, err := parseConfig(getenv)
	switch command := strings.Join(args, " "); {
	case command == "healthcheck": // err does not matter: the service itself has reported it
		return healthcheck(cfg)
	case command != "" && args[0] != "token":
		return configError{errors.New(usage)}
	case err != nil:
		return err
	case command == "":
		return serve(ctx, cfg, stdout, stderr)
	}
	return printToken(cfg, args[1:], stdout)
}

// printToken prints a development token and nothing else, for TOKEN=$(taskflow token USER).
func printToken(cfg config, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("taskflow token", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	ttl := flags.Duration("ttl", time.Hour, "how long the token is valid")
	err := flags.Parse(args)
	user := flags.Arg(0)
	switch {
	case err != nil || flags.NArg() != 1 || user == "" || len(user) > maxSubject || *ttl <= 0:
		return configError{fmt.Errorf("%s; USER has 1 to %d bytes, and -ttl is a positive duration", usage, maxSubject)}
	case !cfg.development || cfg.secret == "":
		return configError{errors.New("ENVIRONMENT must be development, and BETTER_AUTH_SECRET set, for `taskflow token`")}
	}
	auth := newAuthenticator(cfg.secret, "", cfg.issuer, cfg.audience)
	_, err = fmt.Fprintln(stdout, auth.developmentToken(user, *ttl))
	return err
}

// healthcheck asks the service that runs with the same configuration.
func healthcheck(cfg config) error {
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{}} // no proxy
	switch response, err := client.Get("http://" + net.JoinHostPort(cfg.host, cfg.port) + "/health"); {
	case err != nil:
		return fmt.Errorf("healthcheck: %w", err)
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("healthcheck: the service answered %s", response.Status)
	}
	return nil
}

// serve listens at once and brings up the database behind it, until a signal comes or an error that waiting does not cure.
func serve(ctx context.Context, cfg config, stdout, stderr io.Writer) error {
	signals, stopSignals := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stopSignals()
	s := newServer(cfg, stderr)
	defer s.store.db.Close() // whose error would only say that the database is gone
	defer s.store.probe.Close()
	listener, err := new(net.ListenConfig).Listen(signals, "tcp", net.JoinHostPort(cfg.host, cfg.port))
	if err != nil {
		return fmt.Errorf("HOST or PORT: %w", err)
	}
	s.log.Info("listening", "address", listener.Addr().String())
	// Requests live on after the signal, so their context is not that of the signals.
	base, abandon := context.WithCancelCause(context.WithoutCancel(ctx))
	defer abandon(errStopping)
	httpServer := &http.Server{ // bodies and answers have their time limits in logged and response.Write
		Handler:                      s.handler(),
		ReadHeaderTimeout:            10 * time.Second,
		MaxHeaderBytes:               64 << 10,
		IdleTimeout:                  120 * time.Second,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // not logged: any client can cause these
		BaseContext:                  func(net.Listener) context.Context { return base },
		DisableGeneralOptionsHandler: true,
	}
	if cfg.jwksURL != "" {
		go s.auth.jwks.refresh(base)
	}
	failed := make(chan error, 2) // from bringUp and Serve: room for both, so that neither waits
	serveNow, up := context.WithTimeout(signals, headStart)
	go func() {
		<-serveNow.Done()
		failed <- httpServer.Serve(listener)
	}()
	go func() {
		if err := s.bringUp(signals, up); err != nil && signals.Err() == nil {
			failed <- err
		} else if err == nil && cfg.development && cfg.secret != "" {
			token := s.auth.developmentToken("demo", 24*time.Hour)
			fmt.Fprintf(stdout, "curl -H 'Authorization: Bearer %s' http://%s/api/demo/tasks\n", token, listener.Addr())
		}
	}()
	select {
	case <-signals.Done():
		stopSignals() // a second signal ends the process at once
		s.draining.Store(true)
		s.log.Info("stopping")
		return shutdown(httpServer, func() { abandon(errStopping) })
	case err := <-failed:
		return errors.Join(err, httpServer.Close())
	}
}

// newServer makes the server that the configuration describes, without connecting to anything. It also sets the
// process's default logger (text in development, JSON in production) and the limits of its garbage collector.
func newServer(cfg config, stderr io.Writer) *server {
	logger := slog.New(slog.NewJSONHandler(stderr, nil))
	if cfg.development {
		logger = slog.New(slog.NewTextHandler(stderr, nil))
	}
	slog.SetDefault(logger)
	for _, warning := range cfg.warnings {
		logger.Warn(warning)
	}
	// The heap may grow to four times what is in use, up to a soft limit, unless the environment has its own.
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(300)
		debug.SetMemoryLimit(128 << 20)
	}
	return &server{
		auth:  newAuthenticator(cfg.secret, cfg.jwksURL, cfg.issuer, cfg.audience),
		users: userLimit{limit: maxRequests, timeout: cfg.poolTimeout, users: map[string]*userTurns{}},
		store: newStore(cfg.database, cfg.poolSize, cfg.poolTimeout), origins: cfg.origins, log: logger, development: cfg.development,
	}
}

// bringUp applies the schema and then calls up. It tries again as long as that may help, or until ctx ends.
func (s *server) bringUp(ctx context.Context, up func()) error {
	for last := ""; ; {
		err := s.store.applySchema(ctx)
		switch {
		case err == nil:
			s.log.Info("ready")
			up()
			return nil
		case isStartupError(err) || ctx.Err() != nil:
			return fmt.Errorf("database: %w", err)
		case err.Error() != last:
			last = err.Error()
			s.log.Warn("the database cannot be reached yet; trying again", "error", last)
		}
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// shutdown closes the listener after drainTime and waits for the requests in flight; at finishTime it abandons them,
// which makes them answer 503.
func shutdown(httpServer *http.Server, abandon func()) error {
	defer time.AfterFunc(finishTime, abandon).Stop()
	ctx, cancel := context.WithTimeout(context.Background(), finishTime+abandonTime)
	defer cancel()
	time.Sleep(drainTime)
	_ = httpServer.Shutdown(ctx) // its error says that connections are left, which Close cuts
	return httpServer.Close()
}
