package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// This file stands between database/sql and lib/pq, and makes three promises that neither makes:
// a statement of which any byte was sent is never repeated behind the caller's back; nothing waits
// longer than its context and cancelGrace, whatever the server does; and a connection that the
// server has closed is found out before a statement is written to it.

const (
	// cancelGrace is how long a statement may go on after its context has ended: the cancel request
	// comes first, so that the server gives up too; then the connection is closed, which ends whatever waits
	// for it, also the farewell of TLS.
	cancelGrace = 700 * time.Millisecond
	// cancelDial bounds the connection that carries a cancel request.
	cancelDial = 500 * time.Millisecond
)

// errInDoubt marks an error after which nobody knows whether the statement took effect.
var errInDoubt = errors.New("connection lost while the statement ran")

// A connectError is a failure to connect: no statement was sent.
type connectError struct{ error }

func (e connectError) Unwrap() error { return e.error }

// A connector opens careful connections; it is what sql.OpenDB takes.
type connector struct {
	*pq.Connector
	timeout time.Duration // for connecting to one host, the handshake included
}

// newConnector makes a connector with a time limit for connecting, shared by the hosts of the URL.
func newConnector(cfg pq.Config, timeout time.Duration) *connector {
	if cfg.ConnectTimeout > 0 {
		timeout = min(timeout, cfg.ConnectTimeout)
	}
	cfg.ConnectTimeout = 0                 // this connector keeps the time itself
	inner, _ := pq.NewConnectorConfig(cfg) // which pq.NewConfig has judged
	return &connector{inner, timeout / time.Duration(1+len(cfg.Multi))}
}

// Connect opens a connection. Its error is a connectError.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // closes what is left of tries that came to nothing: lib/pq forgets one with sslmode=prefer
	each, dial := *c.Connector, &dialer{limit: c.timeout}
	each.Dialer(dial)
	inner, err := each.Connect(ctx)
	if err != nil {
		return nil, connectError{err}
	}
	defer dial.conn.keep()
	dial.limit = cancelDial
	conn := &careful{Conn: inner, QueryerContext: inner.(driver.QueryerContext), net: dial.conn, prepared: map[string]driver.Stmt{}}
	if err := errors.Join(conn.checkDirect(ctx), conn.net.SetDeadline(time.Time{})); err != nil {
		return nil, connectError{errors.Join(err, conn.Close())}
	}
	return conn, nil
}

// A dialer dials for one connection of lib/pq's, which asks for nothing but DialContext: for Connect, and
// then for cancel requests.
type dialer struct {
	pq.Dialer
	limit time.Duration // for dialling and the handshakes
	conn  *netConn      // the last one
}

// DialContext sets a deadline that also holds for the TLS and PostgreSQL handshakes which follow.
func (d *dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if cwd, err := os.Getwd(); err == nil && network == "unix" { // a socket's path must be short (103 bytes on macOS)
		address = strings.TrimPrefix(address, cwd+"/")
	}
	deadline := time.Now().Add(d.limit)
	inner, err := (&net.Dialer{Deadline: deadline}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	d.conn = &netConn{Conn: inner, keep: context.AfterFunc(ctx, func() { _ = inner.Close() })}
	return d.conn, inner.SetDeadline(deadline)
}

// A netConn is the network connection under lib/pq, and under TLS where that is used.
type netConn struct {
	net.Conn
	keep  func() bool // has it outlive the context in which it was dialled
	wrote bool        // since the statement began
}

// Write remembers that something has gone out: from then on the statement is in doubt if its answer is lost.
func (c *netConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.wrote = c.wrote || n > 0
	return n, err
}

// quiet reports that the server has sent nothing and closed nothing: before a statement is sent it
// has nothing to say but that it is going away.
func (c *netConn) quiet() bool {
	raw, _ := c.Conn.(syscall.Conn).SyscallConn() // which all have that net.Dialer makes
	var err error
	peek := func(fd uintptr) bool {
		_, _, err = syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return true
	}
	return raw.Read(peek) == nil && (err == syscall.EAGAIN || err == syscall.EINTR)
}

// careful is a connection as this file promises it. Statements go through run, by sql.Conn's Raw.
type careful struct {
	driver.Conn
	driver.QueryerContext // the same
	net                   *netConn
	broken                bool                   // to be thrown away instead of going back to the pool
	direct                bool                   // no pooler in between, so that statements can be prepared
	prepared              map[string]driver.Stmt // by their text
}

// IsValid is asked by database/sql before a connection goes back to the pool.
func (c *careful) IsValid() bool { return !c.broken && c.Conn.(driver.Validator).IsValid() }

// checkDirect finds out whether this connection leads to one and the same server process for as long
// as it lives. A transaction pooler has many clients share the processes, and statements that one has
// prepared are then another's. It gives its clients keys of its own making for cancel requests, where
// PostgreSQL gives its process number: they agree only where there is no pooler.
func (c *careful) checkDirect(ctx context.Context) error {
	key := reflect.ValueOf(c.Conn).Elem().FieldByName("pid") // not exported; were it renamed, all would count as pooled
	return c.run(ctx, "SELECT pg_backend_pid()", nil, func(row []driver.Value) {
		c.direct = key.IsValid() && key.CanInt() && row[0] == key.Int()
	})
}

// run sends one statement and hands each row of its result to row; the slice is then used
// again. It has read the server's last word when it returns without an error. driver.ErrBadConn says
// that nothing was sent.
func (c *careful) run(ctx context.Context, query string, args []driver.NamedValue, row func([]driver.Value)) error {
	if !c.net.quiet() {
		return driver.ErrBadConn
	}
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(cancelGrace, func() { _ = c.net.Close() }) })
	err := c.judge(c.exchange(ctx, query, args, row))
	if !stop() || ctx.Err() != nil {
		c.broken = true // it is closed, or will be: not a connection for others
		if err == nil { // a commit whose wait for the synchronous standby was cancelled looks like a success
			err = fmt.Errorf("%w: %w", errInDoubt, context.Cause(ctx))
		}
	}
	return err
}

// exchange sends the statement and reads all of its result.
func (c *careful) exchange(ctx context.Context, query string, args []driver.NamedValue, row func([]driver.Value)) error {
	rows, err := c.query(ctx, query, args)
	if err != nil {
		return err
	}
	values := make([]driver.Value, len(rows.Columns()))
	for err == nil {
		if err = rows.Next(values); err == nil {
			row(values)
		}
	}
	if closed := rows.Close(); err == io.EOF {
		return closed
	}
	return err
}

// query sends a statement, prepared where that is safe.
func (c *careful) query(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	c.net.wrote = false
	if !c.direct || args == nil {
		return c.QueryContext(ctx, query, args)
	}
	statement := c.prepared[query]
	if statement == nil {
		var err error
		statement, err = c.Conn.(driver.ConnPrepareContext).PrepareContext(ctx, query)
		c.net.wrote = false // nothing but the preparation
		if err != nil {
			return nil, err
		}
		c.prepared[query] = statement
	}
	return statement.(driver.StmtQueryContext).QueryContext(ctx, args)
}

// judge tells what an error means for the statement, and for the connection.
func (c *careful) judge(err error) error {
	if err == nil || pq.As(err) != nil {
		// read_only_sql_transaction: no longer the primary. feature_not_supported, invalid_sql_statement_name:
		// a statement prepared for a table that has changed since.
		c.broken = pq.As(err, "25006", "0A000", "26000") != nil
		return err
	}
	c.broken = true
	if !c.net.wrote {
		return driver.ErrBadConn
	}
	return fmt.Errorf("%w: %v", errInDoubt, err) // not as %w: driver.ErrBadConn says that the statement was not sent
}

// isStartupError reports an error that waiting does not cure: a refused password or user, a missing
// database, a certificate that does not fit, a schema that cannot be applied.
func isStartupError(err error) bool {
	if e := pq.As(err); e != nil {
		if pq.As(err, "42P07", "42701", "42710", "23505") != nil { // duplicate table, column, object, name:
			return false // somebody else made it at the same moment
		}
		return slices.Contains([]pqerror.Class{"28", "3D", "42", "22", "23", "0A", "P0"}, e.Code.Class())
	}
	return errors.As(err, new(*tls.CertificateVerificationError)) || errors.As(err, new(x509.UnknownAuthorityError)) ||
		errors.As(err, new(x509.CertificateInvalidError)) || errors.As(err, new(*fs.PathError)) || // sslrootcert, sslcert, sslkey
		errors.Is(err, pq.ErrSSLKeyHasWorldPermissions) || errors.Is(err, pq.ErrSSLNotSupported)
}
