package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

var (
	errNoBearer     = &httpError{http.StatusUnauthorized, "Invalid authorization header"}
	errInvalidToken = &httpError{http.StatusUnauthorized, "Invalid token"}
	errExpiredToken = &httpError{http.StatusUnauthorized, "Token expired"}
	errForbidden    = &httpError{http.StatusForbidden, "Forbidden"}
)

const maxSubject = 255 // bytes

// invalid is an errInvalidToken with the reason, which only the log gets.
func invalid(reason string) error { return fmt.Errorf("%w: %s", errInvalidToken, reason) }

// An authenticator judges tokens: those of HS256 with the secret, all others with the JWKS.
type authenticator struct {
	secret   []byte // empty: HS256 is refused
	jwks     *jwks  // nil: everything else is refused
	issuer   string // "" for any
	audience string // "" for any

	mu       sync.Mutex
	verified map[string]verified // tokens whose signature and claims were found good
}

// verified is what is left to check of a token each time: the expiry, and that the keys are still the same.
type verified struct {
	user string
	exp  float64 // seconds since 1970
	keys *jwkSet // that were known
}

const (
	maxVerified      = 4096 // tokens; when that many are remembered, all are forgotten
	maxVerifiedBytes = 2048 // in one token; one that is longer is checked each time
)

// authenticator makes what judges tokens from the configuration.
func (c config) authenticator() (a *authenticator, err error) {
	a = &authenticator{secret: []byte(c.secret), issuer: c.issuer, audience: c.audience}
	if c.secret == "" && c.development {
		a.secret, err = developmentSecret()
	}
	if c.jwksURL != "" {
		a.jwks = newJWKS(c.jwksURL)
	}
	return a, err
}

// own guards a route: next runs only for the user whom both the token and the path name.
func (a *authenticator) own(next func(*response, *http.Request, string) error) handler {
	return func(w *response, r *http.Request) error {
		token, err := bearer(r.Header["Authorization"])
		if err != nil {
			return err
		}
		user, err := a.subject(r.Context(), token)
		if err != nil {
			return err
		}
		w.user = user
		if r.PathValue("user_id") != user {
			return errForbidden
		}
		return next(w, r, user)
	}
}

// bearer returns the token from the lines of the Authorization header (RFC 6750 section 2.1).
func bearer(lines []string) (string, error) {
	scheme, token, _ := strings.Cut(strings.Join(lines, "\t"), " ") // of two lines: with a tab
	token = strings.Trim(token, " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" || strings.ContainsAny(token, " \t") {
		return "", errNoBearer
	}
	return token, nil
}

// subject returns the user whom the token names. It fails with errInvalidToken, errExpiredToken, or errJWKSDown.
func (a *authenticator) subject(ctx context.Context, token string) (string, error) {
	now, keys := float64(time.Now().UnixNano())/1e9, (*jwkSet)(nil)
	if a.jwks != nil {
		keys = a.jwks.known.Load()
	}
	a.mu.Lock()
	v, ok := a.verified[token]
	a.mu.Unlock()
	if !ok || v.keys != keys {
		var err error
		if v, err = a.judge(ctx, token, now); err != nil {
			return "", err
		}
		v.keys = keys
		if len(token) <= maxVerifiedBytes {
			a.mu.Lock()
			if len(a.verified) == maxVerified || a.verified == nil {
				a.verified = map[string]verified{}
			}
			a.verified[token] = v
			a.mu.Unlock()
		}
	}
	if now >= v.exp {
		return "", errExpiredToken
	}
	return v.user, nil
}

// judge checks all of a token but its expiry.
func (a *authenticator) judge(ctx context.Context, token string, now float64) (v verified, err error) {
	head, rest, _ := strings.Cut(token, ".")
	body, signature, ok := strings.Cut(rest, ".") // a third dot is no base64url
	header, ok1 := tokenPart(head)
	claims, ok2 := tokenPart(body)
	sig, err := base64.RawURLEncoding.Strict().DecodeString(signature)
	if !ok || !ok1 || !ok2 || err != nil {
		return v, invalid("not a JWT")
	}
	if header.members["crit"].count > 0 {
		return v, invalid("crit") // RFC 7515 section 4.1.11: no extension is understood here
	}
	if v, err = a.readClaims(claims, now); err != nil {
		return v, err
	}
	return v, a.verify(ctx, header, strings.TrimSuffix(token, "."+signature), sig)
}

// verify checks the signature with a key that is meant for the header's alg.
func (a *authenticator) verify(ctx context.Context, header jsonValue, signed string, signature []byte) error {
	alg, _ := claimText(header, "alg")
	if alg == jwt.SigningMethodHS256.Alg() {
		if len(a.secret) == 0 || jwt.SigningMethodHS256.Verify(signed, signature, a.secret) != nil {
			return invalid("signature")
		}
		return nil
	}
	kid, ok := claimText(header, "kid")
	if a.jwks == nil || !slices.Contains(asymmetric, alg) || !ok {
		return invalid("alg, or no kid")
	}
	keys, err := a.jwks.keys(ctx, kid)
	if err != nil {
		return err
	}
	for _, key := range keys {
		if slices.Contains(key.algorithms, alg) && jwt.GetSigningMethod(alg).Verify(signed, signature, key.public) == nil {
			return nil
		}
	}
	return invalid("signature, or no such key")
}

// readClaims reads the claims, and fails when they are not to be accepted whatever the signature.
func (a *authenticator) readClaims(claims jsonValue, now float64) (v verified, err error) {
	var ok bool
	if v.user, ok = claimText(claims, "sub"); !ok || v.user == "" || len(v.user) > maxSubject {
		return v, invalid("sub")
	}
	if v.exp, ok = claimTime(claims, "exp"); !ok {
		return v, invalid("exp")
	}
	if claims.members["nbf"].count > 0 {
		if nbf, ok := claimTime(claims, "nbf"); !ok || now < nbf {
			return v, invalid("nbf")
		}
	}
	if issuer, ok := claimText(claims, "iss"); a.issuer != "" && (!ok || issuer != a.issuer) {
		return v, invalid("iss")
	}
	if a.audience != "" && !claimHolds(claims, "aud", a.audience) {
		return v, invalid("aud")
	}
	return v, nil
}

// tokenPart decodes a part of a token that must be a JSON object.
func tokenPart(part string) (v jsonValue, ok bool) {
	text, err := base64.RawURLEncoding.Strict().DecodeString(part)
	v, fault := parseJSON(text)
	return v, err == nil && fault == nil && v.isObject()
}

// claimText returns a string that is there exactly once.
func claimText(v jsonValue, name string) (string, bool) {
	m := v.members[name]
	if m.count != 1 || m.raw[0] != '"' {
		return "", false
	}
	return jsonText(m.raw)
}

// claimTime returns a NumericDate (RFC 7519 section 2) that is there exactly once.
func claimTime(v jsonValue, name string) (float64, bool) {
	m := v.members[name]
	seconds, err := strconv.ParseFloat(string(m.raw), 64)
	// Beyond 2^53 a float64 cannot tell one second from the next; 2^53+1 is rounded to 2^53.
	exact := math.Abs(seconds) < 1<<53 || string(m.raw) == "9007199254740992"
	return seconds, m.count == 1 && err == nil && exact
}

// claimHolds reports whether the member, which is there exactly once, is text or a list of strings with text in it.
func claimHolds(v jsonValue, name, text string) bool {
	raw := v.members[name].raw
	if v.members[name].count != 1 {
		return false
	}
	if raw[0] != '[' {
		raw = slices.Concat([]byte("["), raw, []byte("]"))
	}
	var list []*string
	return json.Unmarshal(raw, &list) == nil && !slices.Contains(list, nil) &&
		slices.ContainsFunc(list, func(s *string) bool { return *s == text })
}

// developmentToken makes a token that this service accepts, for the user and time given.
func (a *authenticator) developmentToken(user string, ttl time.Duration) string {
	now := time.Now()
	claims := jwt.MapClaims{"sub": user, "iat": now.Unix(), "exp": now.Add(ttl).Unix()}
	if a.issuer != "" {
		claims["iss"] = a.issuer
	}
	if a.audience != "" {
		claims["aud"] = a.audience
	}
	token, _ := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString(a.secret) // no error with a key of bytes
	return token
}
