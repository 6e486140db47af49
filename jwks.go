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
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

var errJWKSDown = errors.New("the key of a token is unknown and the JWKS endpoint cannot be asked")

const (
	fetchTimeout  = 3 * time.Second
	fetchBytes    = 256 << 10
	fetchInterval = 5 * time.Second // at least, between the starts of two fetches: the endpoint is rate-limited
	fetchPeriod   = 10 * time.Minute
	minRSABits    = 2048 // RFC 7518 section 3.3
)

// asymmetric has the algorithms that Better Auth can sign with (RFC 7518, RFC 8037).
var asymmetric = []string{"EdDSA", "ES256", "ES512", "RS256", "PS256"}

// A jwk is a public key (RFC 7517) with the algorithms that it may verify.
type jwk struct {
	kid        string
	algorithms []string
	public     crypto.PublicKey
}

// A jwkSet has the keys by their kid.
type jwkSet map[string][]jwk

// A jwks is the key set that Better Auth publishes at url. Reading known keys waits for nothing.
type jwks struct {
	url    string
	client *http.Client
	known  atomic.Pointer[jwkSet]

	mu   sync.Mutex
	last *fetch // nil before the first
}

// A fetch is one question to the endpoint. Its error is there once done is closed.
type fetch struct {
	started time.Time
	done    chan struct{}
	err     error
}

func newJWKS(url string) *jwks {
	j := &jwks{url: url, client: &http.Client{
		Timeout: fetchTimeout,
		// On a kept connection that turns out closed, net/http would ask a second time by itself.
		Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment, MaxResponseHeaderBytes: fetchBytes, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	j.known.Store(&jwkSet{})
	return j
}

// refresh fetches the keys now and every fetchPeriod until ctx ends.
func (j *jwks) refresh(ctx context.Context) {
	for ctx.Err() == nil {
		j.latest()
		select {
		case <-time.After(fetchPeriod):
		case <-ctx.Done():
		}
	}
}

// keys returns the keys called kid, none when the JWKS does not list it. For an unknown kid it
// asks the endpoint, unless it has just been asked, and waits for the answer. It fails with
// errJWKSDown when that was not to be had.
func (j *jwks) keys(ctx context.Context, kid string) ([]jwk, error) {
	if keys := (*j.known.Load())[kid]; keys != nil {
		return keys, nil
	}
	f := j.latest()
	select {
	case <-f.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", errJWKSDown, ctx.Err())
	}
	keys := (*j.known.Load())[kid]
	if keys == nil && f.err != nil {
		return nil, errJWKSDown
	}
	return keys, nil
}

// latest returns the last fetch, a new one when that has started longer ago than fetchInterval: so only one
// is under way, since none takes longer than fetchTimeout.
func (j *jwks) latest() *fetch {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.last != nil && time.Since(j.last.started) < fetchInterval {
		return j.last
	}
	f := &fetch{started: time.Now(), done: make(chan struct{})}
	j.last = f
	go func() {
		defer close(f.done)
		keys, err := j.ask()
		if f.err = err; err == nil {
			j.known.Store(&keys)
		} else {
			slog.Warn("fetching the JWKS failed; known keys go on working", "error", err)
		}
	}()
	return f
}

// ask asks the endpoint once. An answer is good when it is a JWKS, be it an empty one; keys in it
// that this service cannot use are passed over.
func (j *jwks) ask() (jwkSet, error) {
	response, err := j.client.Get(j.url)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the endpoint answered %s", response.Status)
	}
	body, err := io.ReadAll(http.MaxBytesReader(nil, response.Body, fetchBytes))
	if err != nil {
		return nil, err
	}
	var set struct{ Keys []json.RawMessage }
	if err := json.Unmarshal(body, &set); err != nil || set.Keys == nil {
		return nil, errors.Join(errors.New("the answer is not a JWKS"), err)
	}
	keys := jwkSet{}
	for _, text := range set.Keys {
		if key, err := parseJWK(text); err == nil {
			keys[key.kid] = append(keys[key.kid], key)
		} else {
			slog.Warn("a key of the JWKS is passed over", "kid", key.kid, "error", err)
		}
	}
	return keys, nil
}

// parseJWK reads a public key and binds it to the algorithm that it names, or else to those of its type.
func parseJWK(text []byte) (jwk, error) {
	var p struct{ Kid, Kty, Alg, Use, Crv, X, Y, N, E string }
	if err := json.Unmarshal(text, &p); err != nil {
		return jwk{}, err
	}
	key := jwk{kid: p.Kid}
	decode := func(text string) []byte {
		b, err := base64.RawURLEncoding.DecodeString(text)
		if err != nil {
			return nil // not what could be read of it, which is another key
		}
		return b
	}
	var err error
	switch p.Kty + " " + p.Crv {
	case "OKP Ed25519":
		key.algorithms = []string{"EdDSA"}
		if x := decode(p.X); len(x) == ed25519.PublicKeySize {
			key.public = ed25519.PublicKey(x)
		}
	case "EC P-256":
		key.algorithms = []string{"ES256"}
		key.public, err = ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, decode(p.X), decode(p.Y)))
	case "EC P-521":
		key.algorithms = []string{"ES512"}
		key.public, err = ecdsa.ParseUncompressedPublicKey(elliptic.P521(), slices.Concat([]byte{4}, decode(p.X), decode(p.Y)))
	case "RSA ":
		key.algorithms = []string{"RS256", "PS256"}
		n, e := new(big.Int).SetBytes(decode(p.N)), new(big.Int).SetBytes(decode(p.E))
		if n.BitLen() >= minRSABits && e.IsInt64() && e.Int64() > 2 && e.Int64() < 1<<31 {
			key.public = &rsa.PublicKey{N: n, E: int(e.Int64())}
		}
	}
	if p.Alg != "" {
		key.algorithms = slices.DeleteFunc(key.algorithms, func(alg string) bool { return alg != p.Alg })
	}
	if err != nil || p.Kid == "" || key.public == nil || len(key.algorithms) == 0 || p.Use == "enc" {
		return key, errors.Join(errors.New("not a signing key of a known type and algorithm with a kid"), err)
	}
	return key, nil
}
