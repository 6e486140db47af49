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
	"reflect"
	"slices"
	"syscall"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// This file stands between database/sql and lib/pq, and makes four promises that neither makes: a statement of which
// any byte was sent is never repeated behind the caller's back; nothing waits longer than its context and
// cancelGrace, whatever the server does; a connection that the server has closed is found out before a statement is
// sent; and the server ends a statement when the cancel request is lost.

// cancelGrace is how long a statement may go on after its context has ended: the cancel request comes first, so that the
// server gives up too; then the connection is closed.
const cancelGrace = 700 * time.Millisecond

type connector struct {
	*pq.Connector
	timeout   time.Duration // for a statement
	handshake time.Duration // for connecting to one host, the handshake included
}

// newConnector makes a connector. timeout limits connecting, shared by the hosts of the URL, and each statement.
func newConnector(cfg pq.Config, timeout time.Duration) *connector {
	inner, _ := pq.NewConnectorConfig(cfg) // pq.NewConfig has checked it
	return &connector{inner, timeout, timeout / time.Duration(1+len(cfg.Multi))}
}

// Connect opens a connection. Its error is errNotSent.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // closes what failed tries leave behind: with sslmode=prefer lib/pq does not close the one over TLS
	each, dial := *c.Connector, &dialer{limit: c.handshake}
	each.Dialer(dial)
	inner, err := each.Connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNotSent, err)
	}
	defer dial.conn.keep()
	dial.limit = cancelGrace - 200*time.Millisecond // for cancel requests, which must end first
	conn := &conn{Conn: inner, QueryerContext: inner.(driver.QueryerContext), net: dial.conn, prepared: map[string]driver.Stmt{}}
	if err := errors.Join(conn.checkDirect(ctx, c.timeout), conn.net.SetDeadline(time.Time{})); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("%w: %w", errNotSent, err)
	}
	return conn, nil
}

// A dialer dials for one connection of lib/pq: for Connect, and then for cancel requests.
type dialer struct {
	pq.Dialer
	limit time.Duration
	conn  *netConn // the last one
}

// DialContext sets a deadline that also holds for the TLS and PostgreSQL handshakes which follow.
func (d *dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
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
	keep func() bool // lets it outlive the context in which it was dialled
	lost error       // what the loss of the connection means: errNotSent, or errInDoubt once a byte has gone out
}

func (c *netConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if n > 0 {
		c.lost = errInDoubt
	}
	return n, err
}

// A conn is a connection that keeps these promises. Statements go through run, by sql.Conn's Raw.
type conn struct {
	driver.Conn
	driver.QueryerContext // the same
	net                   *netConn
	broken                bool                   // to be thrown away instead of going back to the pool
	direct                bool                   // no pooler in between, so that statements can be prepared
	prepared              map[string]driver.Stmt // by their text
}

// IsValid is called by database/sql before it puts a connection back into the pool.
func (c *conn) IsValid() bool { return !c.broken && c.Conn.(driver.Validator).IsValid() }

// ResetSession is called by database/sql when it takes a connection from the pool; ErrBadConn discards the connection. An
// idle server sends nothing unless it is going away.
func (c *conn) ResetSession(context.Context) error {
	raw, _ := c.net.Conn.(syscall.Conn).SyscallConn() // which all have that net.Dialer makes
	var peeked error
	err := raw.Read(func(fd uintptr) bool {
		_, _, peeked = syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return true
	})
	if err != nil || peeked != syscall.EAGAIN && peeked != syscall.EINTR {
		return driver.ErrBadConn
	}
	return nil
}

// checkDirect finds out whether this connection leads to one server process. Through a transaction pooler it leads to
// many, which prepare and set things for other clients, too. With the key for cancel requests comes a process number:
// a pooler makes up one, which pg_backend_pid() does not return. A server itself is told to end statements in time.
func (c *conn) checkDirect(ctx context.Context, timeout time.Duration) error {
	pid := reflect.ValueOf(c.Conn).Elem().FieldByName("pid") // not exported; were it renamed, all would count as pooled
	if !pid.IsValid() || !pid.CanInt() {
		return nil
	}
	query := fmt.Sprintf(`SELECT set_config('statement_timeout', '%d', false) WHERE pg_backend_pid() = %d`,
		(timeout + time.Second).Milliseconds(), pid.Int())
	return c.run(ctx, query, nil, func([]driver.Value) { c.direct = true })
}

// run sends one statement and calls row with each row of the result, which row must not keep: the memory is used again.
// If it returns no error, it has read all of the server's answer. It fails with errNotSent if nothing was sent, with
// errInDoubt if the answer was lost, and else with the server's own error.
func (c *conn) run(ctx context.Context, query string, args []driver.NamedValue, row func([]driver.Value)) error {
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(cancelGrace, func() { _ = c.net.Close() }) })
	err := c.send(ctx, query, args, c.direct && args != nil, row)
	// feature_not_supported, invalid_sql_statement_name: perhaps it was prepared for a table that has changed since
	if c.prepared[query] != nil && pq.As(err, "0A000", "26000") != nil {
		err = c.send(ctx, query, args, false, row)
		c.broken = true // and with it goes all that it has prepared
	}
	if err != nil && pq.As(err) == nil {
		c.broken = true
		err = fmt.Errorf("%w: %v", c.net.lost, err) // not %w: at driver.ErrBadConn database/sql would act by itself
	} else if pq.As(err, "25006") != nil { // read_only_sql_transaction: no longer the primary
		c.broken = true
	}
	if !stop() || ctx.Err() != nil {
		c.broken = true // it is closed, or will be: not a connection for others
		if err == nil { // a commit whose wait for the synchronous standby was cancelled looks like a success
			err = fmt.Errorf("%w: %w", errInDoubt, context.Cause(ctx))
		}
	}
	return err
}

// send sends the statement, prepared or not, and reads all of its result.
func (c *conn) send(ctx context.Context, query string, args []driver.NamedValue, prepare bool, row func([]driver.Value)) (err error) {
	var rows driver.Rows
	statement := c.prepared[query]
	if prepare && statement == nil {
		if statement, err = c.Conn.(driver.ConnPrepareContext).PrepareContext(ctx, query); err == nil {
			c.prepared[query] = statement
		}
	}
	c.net.lost = errNotSent // a preparation changes nothing
	switch {
	case err != nil:
	case prepare:
		rows, err = statement.(driver.StmtQueryContext).QueryContext(ctx, args)
	default:
		rows, err = c.QueryContext(ctx, query, args)
	}
	if err != nil {
		return err
	}
	values := make([]driver.Value, len(rows.Columns()))
	for err = rows.Next(values); err == nil; err = rows.Next(values) {
		row(values)
	}
	if closed := rows.Close(); err == io.EOF {
		return closed
	}
	return err
}

// isStartupError reports an error that waiting does not cure, such as a refused password or a missing database.
func isStartupError(err error) bool {
	if e := pq.As(err); e != nil {
		raced := pq.As(err, "42P07", "42701", "42710", "23505") != nil // another made the table, or what belongs to it
		return e.Code == "55P02" || !raced && slices.Contains([]pqerror.Class{"28", "3D", "3F", "42", "22", "23", "0A", "P0"}, e.Code.Class())
	}
	return errors.As(err, new(*tls.CertificateVerificationError)) || errors.As(err, new(x509.UnknownAuthorityError)) ||
		errors.As(err, new(x509.CertificateInvalidError)) || errors.As(err, new(*fs.PathError)) || // sslrootcert, sslcert, sslkey
		errors.Is(err, pq.ErrSSLKeyHasWorldPermissions) || errors.Is(err, pq.ErrSSLNotSupported)
}
