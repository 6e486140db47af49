package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	maxSubject       = 255  // bytes
	maxRequests      = 64   // of one user, at a time
	maxVerified      = 4096 // tokens; when that many are remembered, all are forgotten
	maxVerifiedBytes = 2048 // in one token; a longer one is verified each time
)

// owned guards a route: next runs only for the user whom both the token and the path name. Beyond maxRequests a
// user's requests wait here, before anything of their body is read.
func owned(a *authenticator, users *userLimit, next func(*response, *http.Request, string) error) handler {
	return func(w *response, r *http.Request) error {
		token, err := bearer(r.Header["Authorization"])
		if err != nil {
			return err
		}
		if w.user, err = a.subject(token); err != nil {
			return err
		}
		if r.PathValue("user_id") != w.user {
			return errForbidden
		}
		if err := users.enter(r.Context(), w.user); err != nil {
			return err
		}
		defer users.leave(w.user, true)
		return next(w, r, w.user)
	}
}

// bearer returns the token from the lines of the Authorization header (RFC 6750 section 2.1).
func bearer(lines []string) (string, error) {
	scheme, token, _ := strings.Cut(strings.Join(lines, "\t"), " ") // a second line adds a tab, which is refused
	token = strings.Trim(token, " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" || strings.ContainsAny(token, " \t") {
		return "", errNoBearer
	}
	return token, nil
}

// An authenticator verifies tokens: those with HS256 by the secret, all others by the JWKS.
type authenticator struct {
	secret           []byte
	jwks             *jwks
	issuer, audience string // "" for any
	parser           *jwt.Parser
	mismatch         sync.Once // of iss or aud: the log has it once in detail
	mu               sync.Mutex
	verified         map[string]verified
}

// verified is what is remembered of a good token: its user, until when, and with which keys of the JWKS.
type verified struct {
	user    string
	expires time.Time
	keys    *jwkSet // then known
}

// newAuthenticator makes an authenticator. secret and jwksURL may be empty, as may issuer and audience, which then
// are not checked.
func newAuthenticator(secret, jwksURL, issuer, audience string) *authenticator {
	methods := []string{}
	if secret != "" {
		methods = append(methods, jwt.SigningMethodHS256.Alg())
	}
	if jwksURL != "" {
		methods = append(methods, asymmetric...)
	}
	options := []jwt.ParserOption{jwt.WithValidMethods(methods), jwt.WithStrictDecoding(), jwt.WithExpirationRequired()}
	options = append(options, jwt.WithIssuer(issuer)) // an empty issuer is any, but an empty audience would be required
	if audience != "" {
		options = append(options, jwt.WithAudience(audience))
	}
	return &authenticator{secret: []byte(secret), jwks: newJWKS(jwksURL), issuer: issuer, audience: audience,
		parser: jwt.NewParser(options...), verified: map[string]verified{}}
}

// subject returns the user whom the token names. It fails with errInvalidToken, errExpiredToken or errJWKSDown.
func (a *authenticator) subject(token string) (user string, err error) {
	keys := a.jwks.known.Load()
	a.mu.Lock()
	v, ok := a.verified[token]
	a.mu.Unlock()
	if !ok || v.keys != keys {
		if v, err = a.verify(token); err != nil {
			return "", err
		}
		if v.keys = keys; len(token) <= maxVerifiedBytes {
			a.mu.Lock()
			if len(a.verified) == maxVerified {
				clear(a.verified)
			}
			a.verified[token] = v
			a.mu.Unlock()
		}
	}
	if !time.Now().Before(v.expires) {
		return "", errExpiredToken
	}
	return v.user, nil
}

// verify lets golang-jwt check a token, except for sub, and for crit, which golang-jwt leaves to its callers.
func (a *authenticator) verify(token string) (v verified, err error) {
	claims := jwt.MapClaims{}
	_, err = a.parser.ParseWithClaims(token, claims, func(t *jwt.Token) (any, error) {
		if _, ok := t.Header["crit"]; ok {
			return nil, errors.New("crit names extensions, and none is understood") // RFC 7515 section 4.1.11
		}
		if t.Method == jwt.SigningMethodHS256 {
			return a.secret, nil
		}
		return a.jwks.keysFor(t)
	})
	switch {
	case errors.Is(err, errJWKSDown):
		return v, err
	case errors.Is(err, jwt.ErrTokenExpired):
		return v, errExpiredToken
	case err != nil:
		if errors.Is(err, jwt.ErrTokenInvalidIssuer) || errors.Is(err, jwt.ErrTokenInvalidAudience) {
			a.mismatch.Do(func() {
				slog.Warn("a token's iss or aud is not the configured one: is it a slash at the end?", "iss", claims["iss"], "aud", claims["aud"])
			})
		}
		return v, fmt.Errorf("%w: %v", errInvalidToken, err)
	}
	expires, _ := claims.GetExpirationTime() // which the parser has found good
	subject, err := claims.GetSubject()
	if err != nil || subject == "" || len(subject) > maxSubject || strings.ContainsRune(subject, 0) {
		return v, fmt.Errorf("%w: sub must be a string of 1 to %d bytes, without NUL", errInvalidToken, maxSubject)
	}
	return verified{user: subject, expires: expires.Time}, nil
}

// developmentToken makes a token that this service accepts, for the user and time given.
func (a *authenticator) developmentToken(user string, ttl time.Duration) string {
	now := time.Now()
	claims := jwt.MapClaims{"sub": user, "iat": now.Unix(), "exp": now.Add(ttl).Unix()}
	for name, value := range map[string]string{"iss": a.issuer, "aud": a.audience} {
		if value != "" {
			claims[name] = value
		}
	}
	token, _ := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString(a.secret) // no error with a key of bytes
	return token
}

// A userLimit bounds what one user can have under way, so that a flood leaves the others their part. More waits its turn.
type userLimit struct {
	limit   int
	timeout time.Duration
	mu      sync.Mutex
	users   map[string]*userTurns // of the users who have or await a turn
}

type userTurns struct {
	taken chan struct{} // a semaphore
	here  int           // turns taken and awaited
}

// enter waits for a turn of the user's, to be ended by leave. It fails with errBusy after the timeout, or when ctx ends.
func (l *userLimit) enter(ctx context.Context, user string) error {
	l.mu.Lock()
	own := l.users[user]
	if own == nil {
		own = &userTurns{taken: make(chan struct{}, l.limit)}
		l.users[user] = own
	}
	own.here++
	l.mu.Unlock()
	select {
	case own.taken <- struct{}{}:
		return nil
	default: // only now is a timer needed
	}
	select {
	case own.taken <- struct{}{}: // who has waited longest comes first
		return nil
	case <-ctx.Done():
	case <-time.After(l.timeout):
	}
	l.leave(user, false)
	return errBusy
}

// leave ends a turn, or the wait for one (entered is false).
func (l *userLimit) leave(user string, entered bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.users[user]
	if entered {
		<-own.taken
	}
	if own.here--; own.here == 0 {
		delete(l.users, user)
	}
}
