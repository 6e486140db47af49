package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"sync/atomic"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	fetchBytes    = 256 << 10
	fetchInterval = 5 * time.Second // at least, between the starts of two fetches: the endpoint is rate-limited
	fetchPeriod   = 10 * time.Minute
	minRSABits    = 2048 // RFC 7518 section 3.3
)

// asymmetric lists the algorithms that Better Auth can sign with (RFC 7518, RFC 8037).
var asymmetric = []string{"EdDSA", "ES256", "ES512", "RS256", "PS256"}

// A jwkSet maps "kid alg" to the public keys (RFC 7517) that may verify such tokens.
type jwkSet map[string][]jwt.VerificationKey

// A jwks is the key set that Better Auth publishes at url. What is known is read without waiting.
type jwks struct {
	url     string
	client  *http.Client
	known   atomic.Pointer[jwkSet]
	turn    chan struct{} // full during a fetch: there is one at a time
	started time.Time     // the last fetch
	err     error         // of the last fetch
}

func newJWKS(url string) *jwks {
	j := &jwks{url: url, turn: make(chan struct{}, 1), client: &http.Client{
		Timeout: 3 * time.Second,
		// On a kept connection that turns out closed, net/http would ask a second time by itself.
		Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment, MaxResponseHeaderBytes: fetchBytes, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	j.known.Store(&jwkSet{})
	return j
}

// isSafeURL reports whether text is a URL with https, or http to this machine: other keys could be anybody's.
func isSafeURL(text string) bool {
	u, err := url.Parse(text)
	return err == nil && u.Hostname() != "" && (u.Scheme == "https" || u.Scheme == "http" && isLoopback(u.Hostname()))
}

// isLoopback reports whether host, without a port, is this machine's own name or address.
func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// refresh fetches the keys now and every fetchPeriod until ctx ends.
func (j *jwks) refresh(ctx context.Context) {
	ticker := time.NewTicker(fetchPeriod)
	for ctx.Err() == nil {
		_ = j.update()
		select {
		case <-ticker.C:
		case <-ctx.Done():
		}
	}
}

// keysFor returns the keys that may verify a token: those with its kid that are meant for its algorithm. If there are
// none it fetches the key set, unless that has just been done. It fails with errJWKSDown if the last fetch failed.
func (j *jwks) keysFor(token *jwt.Token) (jwt.VerificationKeySet, error) {
	kid, _ := token.Header["kid"].(string)
	name := kid + " " + token.Method.Alg()
	keys := (*j.known.Load())[name]
	if keys == nil && kid != "" {
		err := j.update()
		if keys = (*j.known.Load())[name]; keys == nil && err != nil {
			return jwt.VerificationKeySet{}, fmt.Errorf("%w: %w", errJWKSDown, err)
		}
	}
	return jwt.VerificationKeySet{Keys: keys}, nil // golang-jwt refuses a token for which there are none
}

// update fetches the keys, one fetch at a time. Within fetchInterval of the last one it returns how that ended.
func (j *jwks) update() error {
	j.turn <- struct{}{}
	defer func() { <-j.turn }()
	if time.Since(j.started) < fetchInterval {
		return j.err
	}
	j.started = time.Now()
	var keys jwkSet
	if keys, j.err = j.fetch(); j.err == nil {
		j.known.Store(&keys)
	} else {
		slog.Warn("fetching the JWKS failed; known keys go on working", "error", j.err)
	}
	return j.err
}

// fetch asks the endpoint once. Keys that this service cannot use are passed over.
func (j *jwks) fetch() (jwkSet, error) {
	response, err := j.client.Get(j.url)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, fetchBytes+1))
	switch {
	case response.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("the endpoint answered %s", response.Status)
	case err != nil:
		return nil, err
	case len(body) > fetchBytes:
		return nil, fmt.Errorf("the endpoint's answer is larger than %d bytes", fetchBytes)
	}
	var set struct{ Keys []json.RawMessage }
	if err := json.Unmarshal(body, &set); err != nil || set.Keys == nil {
		return nil, errors.Join(errors.New("the endpoint's answer is not a JWKS"), err)
	}
	keys := jwkSet{}
	for _, text := range set.Keys {
		if kid, err := keys.add(text); err != nil {
			slog.Warn("a key of the JWKS is passed over", "kid", kid, "error", err)
		}
	}
	return keys, nil
}

// add reads a public key and binds it to the algorithm that it names, or else to those of its type.
func (s jwkSet) add(text []byte) (kid string, err error) {
	var p struct {
		Kid, Kty, Alg, Use, Crv string
		X, Y, N, E              base64URL
	}
	if err := json.Unmarshal(text, &p); err != nil {
		return "", err
	}
	var algorithms []string
	var key crypto.PublicKey
	point := slices.Concat([]byte{4}, p.X, p.Y) // SEC 1, section 2.3.3
	switch p.Kty + " " + p.Crv {
	case "OKP Ed25519":
		if algorithms = []string{"EdDSA"}; len(p.X) == ed25519.PublicKeySize {
			key = ed25519.PublicKey(p.X)
		}
	case "EC P-256":
		algorithms = []string{"ES256"}
		key, err = ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	case "EC P-521":
		algorithms = []string{"ES512"}
		key, err = ecdsa.ParseUncompressedPublicKey(elliptic.P521(), point)
	case "RSA ": // without a crv
		algorithms = []string{"RS256", "PS256"}
		if n, e := new(big.Int).SetBytes(p.N), new(big.Int).SetBytes(p.E); n.BitLen() >= minRSABits && e.BitLen() < 32 && e.Int64() > 2 {
			key = &rsa.PublicKey{N: n, E: int(e.Int64())}
		}
	}
	if p.Alg != "" {
		algorithms = slices.DeleteFunc(algorithms, func(alg string) bool { return alg != p.Alg })
	}
	if err != nil || p.Kid == "" || key == nil || len(algorithms) == 0 || p.Use == "enc" {
		return p.Kid, errors.Join(errors.New("it has no kid, or is no signing key of a supported type and algorithm"), err)
	}
	for _, alg := range algorithms {
		s[p.Kid+" "+alg] = append(s[p.Kid+" "+alg], key)
	}
	return p.Kid, nil
}

// base64URL is a JSON string of unpadded base64url (RFC 7515 section 2).
type base64URL []byte

func (b *base64URL) UnmarshalText(text []byte) (err error) {
	*b, err = base64.RawURLEncoding.DecodeString(string(text))
	return err
}
