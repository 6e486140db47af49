package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// keyPairs has two keys of each type, and others that no Better Auth uses.
var keyPairs = sync.OnceValue(func() map[string]crypto.Signer {
	keys := map[string]crypto.Signer{}
	for _, n := range []string{"", "2"} {
		_, keys["ed"+n], _ = ed25519.GenerateKey(rand.Reader)
		keys["p256"+n], _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		keys["p521"+n], _ = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
		keys["rsa"+n], _ = rsa.GenerateKey(rand.Reader, 2048)
	}
	keys["p384"], _ = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	keys["short"], _ = rsa.GenerateKey(rand.Reader, 2040)
	return keys
})

// algorithmsOf has what the types of key can sign with.
var algorithmsOf = map[string][]string{"ed": {"EdDSA"}, "p256": {"ES256"}, "p521": {"ES512"}, "rsa": {"RS256", "PS256"}}

// keyJSON is a public key as Better Auth publishes it, with more before its members.
func keyJSON(name, kid, more string) string {
	encode := base64.RawURLEncoding.EncodeToString
	switch public := keyPairs()[name].Public().(type) {
	case ed25519.PublicKey:
		return fmt.Sprintf(`{%s"crv":"Ed25519","x":%q,"kty":"OKP","kid":%q}`, more, encode(public), kid)
	case *ecdsa.PublicKey:
		point, _ := public.Bytes()
		half := 1 + len(point)/2
		return fmt.Sprintf(`{%s"crv":%q,"kty":"EC","x":%q,"y":%q,"kid":%q}`, more, public.Params().Name, encode(point[1:half]),
			encode(point[half:]), kid)
	default:
		return fmt.Sprintf(`{%s"kty":"RSA","n":%q,"e":"AQAB","kid":%q}`, more, encode(public.(*rsa.PublicKey).N.Bytes()), kid)
	}
}

// keySet publishes keys: the JSON of one, or the name of one of keyPairs, which is then its kid.
func keySet(keys ...string) string {
	for i, key := range keys {
		if keyPairs()[key] != nil {
			keys[i] = keyJSON(key, key, "")
		}
	}
	return `{"keys":[` + strings.Join(keys, ",") + `]}`
}

// tokenBy makes a token of ann's, signed by the key of that name with one of its algorithms.
func tokenBy(t testing.TB, name, signing, alg, kid string) string {
	t.Helper()
	return signed(t, jwt.GetSigningMethod(signing), keyPairs()[name], fmt.Sprintf(`{"alg":%q,"kid":%q}`, alg, kid), claimsOfAnn)
}

// An endpoint stands for Better Auth's in virtual time: it is the transport of a jwks.
type endpoint struct {
	answer  atomic.Value
	fetches []time.Time
}

type answer func(*http.Request) (*http.Response, error)

func (e *endpoint) RoundTrip(r *http.Request) (*http.Response, error) {
	e.fetches = append(e.fetches, time.Now())
	return e.answer.Load().(answer)(r)
}

// fetched expects fetches at these seconds since the first one.
func (e *endpoint) fetched(t testing.TB, seconds ...float64) {
	t.Helper()
	synctest.Wait()
	var got []float64
	for _, at := range e.fetches {
		got = append(got, at.Sub(e.fetches[0]).Seconds())
	}
	if !slices.Equal(got, seconds) {
		t.Errorf("fetches at %v, want %v", got, seconds)
	}
}

// answers makes an answer that comes after a while, unless the request ends before.
func answers(delay time.Duration, status int, body string) answer {
	return func(r *http.Request) (*http.Response, error) {
		select {
		case <-time.After(delay):
			w := httptest.NewRecorder()
			w.Header().Set("Location", "/elsewhere") // for a status that redirects
			w.WriteHeader(status)
			_, err := io.WriteString(w, body)
			return w.Result(), err
		case <-r.Context().Done():
			return nil, context.Cause(r.Context())
		}
	}
}

// withEndpoint judges by the secret and by the keys of an endpoint.
func withEndpoint(first answer) (*authenticator, *endpoint) {
	e, a := &endpoint{}, newAuthenticator(testSecret, "https://auth.example.com/api/auth/jwks", "", "")
	e.answer.Store(first)
	a.jwks.client.Transport = e
	return a, e
}

// saysBy expects a verdict on ann's tokens by the keys of these names.
func (a *authenticator) saysBy(t testing.TB, want string, names ...string) {
	t.Helper()
	for _, name := range names {
		alg := algorithmsOf[strings.TrimSuffix(name, "2")][0]
		a.says(t, want, "ann", tokenBy(t, name, alg, alg, name))
	}
}

func TestEveryAlgorithmOfBetterAuthWorksEndToEnd(t *testing.T) {
	t.Parallel()
	var keys []string
	for name, algorithms := range algorithmsOf {
		for _, alg := range algorithms {
			keys = append(keys, keyJSON(name, name+alg, fmt.Sprintf(`"alg":%q,`, alg)))
		}
	}
	set, fetches := keySet(keys...), 0
	better := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if fetches++; fetches > 1 {
			panic(http.ErrAbortHandler) // closes the connection
		}
		_, _ = io.WriteString(w, set)
	}))
	s := newServiceOf(t, newAuthenticator("", better.URL+"/api/auth/jwks", better.URL, better.URL), newStore(newDatabase(t), 2, time.Second))
	s.store.applied.Store(true)
	claims := fmt.Sprintf(`{"iat":1,"name":"Ann","email":"a@example.com","emailVerified":true,"image":null,"id":"ann",`+
		`"sub":"ann","exp":4102444800,"iss":%q,"aud":%[1]q}`, better.URL)
	ask := func(name, alg, kid string, status int, body string) {
		token := signed(t, jwt.GetSigningMethod(alg), keyPairs()[name], fmt.Sprintf(`{"alg":%q,"kid":%q}`, alg, kid), claims)
		s.as(t, "", "GET", "/api/ann/tasks", "", "Authorization", "Bearer "+token).is(t, status, body)
	}
	for name, algorithms := range algorithmsOf {
		for _, alg := range algorithms {
			ask(name, alg, name+alg, 200, `[]`)
			ask(name+"2", alg, name+alg, 401, `{"detail":"Invalid token"}`)
		}
	}
	s.auth.jwks.started = time.Time{} // as if five seconds had passed
	ask("ed", "EdDSA", "unknown", 503, `{"detail":"Service temporarily unavailable"}`)
	if better.Close(); fetches != 2 { // net/http's own repetition would be a third
		t.Errorf("%d requests for two fetches", fetches)
	}
}

func TestAKeyVerifiesOnlyItsOwnAlgorithm(t *testing.T) {
	t.Parallel()
	algorithms := []string{"EdDSA", "ES256", "ES512", "RS256", "PS256", "HS256", "PS512", "none", ""}
	var keys []string
	for name := range algorithmsOf {
		for _, own := range algorithms {
			keys = append(keys, keyJSON(name, name+" "+own, fmt.Sprintf(`"alg":%q,`, own)))
		}
		keys = append(keys, keyJSON(name, name, ""), keyJSON(name+"2", name+"2", ""))
	}
	synctest.Test(t, func(t *testing.T) {
		a, _ := withEndpoint(answers(0, 200, keySet(keys...)))
		for name := range algorithmsOf {
			for _, signing := range algorithmsOf[name] {
				for _, alg := range algorithms {
					kids := map[string]bool{} // whether the key may verify what it was signed with
					for _, own := range algorithms {
						kids[name+" "+own] = own == signing || own == ""
					}
					for other := range algorithmsOf {
						kids[other], kids[other+"2"] = other == name, false
					}
					for kid, may := range kids {
						a.says(t, map[bool]string{true: tokenGood, false: tokenInvalid}[may && alg == signing], "ann",
							tokenBy(t, name, signing, alg, kid))
					}
				}
			}
			// What everybody knows of a key is no secret.
			alg := algorithmsOf[name][0]
			der, _ := x509.MarshalPKIXPublicKey(keyPairs()[name].Public())
			block := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
			for _, secret := range []string{block, strings.TrimSpace(block), string(der), string(der[12:]), keyJSON(name, name, ""),
				keySet(keys...), name, ""} {
				byKeys := newAuthenticator("", a.jwks.url, "", "")
				byKeys.jwks = a.jwks
				for _, a := range []*authenticator{a, byKeys, bySecret()} {
					for _, alg := range []string{"HS256", alg} {
						a.says(t, tokenInvalid, "ann",
							signed(t, jwt.SigningMethodHS256, []byte(secret), fmt.Sprintf(`{"alg":%q,"kid":%q}`, alg, name), claimsOfAnn))
					}
				}
			}
			text, signature := cutLast(tokenBy(t, name, alg, alg, name))
			a.says(t, tokenInvalid, "ann", text+".AAAA"+signature[4:])
		}
		for _, header := range []string{headerHS256, `{"alg":"HS256","kid":"ed"}`} { // the secret counts for HS256, whatever the kid
			a.says(t, tokenGood, "ann", withSecret(t, header, claimsOfAnn))
		}
	})
}

func TestTheKeyIsTheOneThatKidNames(t *testing.T) {
	t.Parallel()
	set := keySet(keyJSON("ed", "one", ""), keyJSON("ed2", "two", ""), keyJSON("rsa", "all", ""), keyJSON("ed", "all", ""),
		keyJSON("ed2", "all", ""), keyJSON("ed", "ключ", ""))
	synctest.Test(t, func(t *testing.T) {
		a, _ := withEndpoint(answers(0, 200, set))
		for want, headers := range map[string][]string{
			tokenGood: {`"kid":"one"`, `"kid":"all"`, `"kid":"ключ"`, `"kid":"one","typ":"JWT","jku":"https://evil.example.com"`},
			tokenInvalid: {`"kid":"two"`, `"kid":"One"`, `"kid":""`, `"kid":null`, `"kid":1`, `"KID":"one"`, `"x":"one"`,
				`"kid":"one","crit":["exp"]`, `"kid":"one","alg":"ES256"`},
		} {
			for _, header := range headers {
				a.says(t, want, "ann", signed(t, jwt.SigningMethodEdDSA, keyPairs()["ed"], `{"alg":"EdDSA",`+header+`}`, claimsOfAnn))
			}
		}
		for name, alg := range map[string]string{"ed": "EdDSA", "ed2": "EdDSA", "rsa": "PS256"} {
			a.says(t, tokenGood, "ann", tokenBy(t, name, alg, alg, "all"))
		}
	})
}

func TestKeysThatCannotBeUsedArePassedOver(t *testing.T) {
	t.Parallel()
	with := func(name string, oldNew ...string) string { // the key with something replaced
		text := keyJSON(name, name, "")
		if !strings.Contains(text, oldNew[0]) {
			t.Fatalf("no %s in %s", oldNew[0], text)
		}
		return strings.NewReplacer(oldNew...).Replace(text)
	}
	encode, modulus := base64.RawURLEncoding.EncodeToString, keyPairs()["rsa"].Public().(*rsa.PublicKey).N
	n, zeros := encode(modulus.Bytes()), encode(make([]byte, 32))
	useless := []string{
		`null`, `5`, `"ed"`, `[]`, `{}`, `{"kid":"ed"}`, `{"kty":"oct","k":"c2VjcmV0","kid":"ed","alg":"HS256"}`,
		`{"kty":"oct","k":"c2VjcmV0","kid":"ed"}`, keyJSON("ed", "", ""), keyJSON("short", "rsa", ""), keyJSON("p384", "p384", ""),
		keyJSON("p384", "p384", `"alg":"ES384",`), keyJSON("ed", "ed", `"use":"enc",`), keyJSON("rsa", "rsa", `"use":"enc",`),
		keyJSON("p256", "p256", `"alg":5,`), keyJSON("p256", "p256", `"alg":"ECDH-ES",`), keyJSON("rsa", "rsa", `"alg":"RSA-OAEP",`),
		with("ed", `"kid":"ed"`, `"kid":5`), with("ed", `"kid":`, `"id":`), with("ed", `OKP`, `EC`), with("ed", "Ed25519", "X25519"),
		with("ed", `"x":"`, `"x":"AAAA`), with("ed", `"x":"`, `"x":"!`), with("ed", `"x":`, `"y":`), with("ed", `","kty"`, `=","kty"`),
		with("p256", `"x":"`, `"x":"AAAA`), with("p256", `"x":`, `"y":`, `"y":`, `"x":`), with("p256", `"y":`, `"z":`),
		with("p256", "P-256", "P-521"), with("p521", "P-521", "P-256"), with("p256", "P-256", "secp256k1"), with("p256", `"EC"`, `"RSA"`),
		`{"kty":"EC","crv":"P-256","kid":"p256","x":"` + zeros + `","y":"` + zeros + `"}`,
		`{"kty":"EC","crv":"P-256","kid":"p256","x":"` + n[:43] + `","y":"` + zeros + `"}`, // off the curve
		with("rsa", `AQAB`, ``), with("rsa", `AQAB`, `AQ`), with("rsa", `AQAB`, `Ag`), with("rsa", `AQAB`, `gAAAAAE`),
		with("rsa", `AQAB`, `AQABAQABAQABAQAB`), with("rsa", `"n":`, `"m":`), with("rsa", n, n[3:]), with("rsa", n, n+"=="),
	}
	for _, text := range useless {
		if set := (jwkSet{}); len(set) > 0 || func() error { _, err := set.add([]byte(text)); return err }() == nil {
			t.Errorf("taken: %s as %v", text, set)
		}
	}
	a, _ := withEndpoint(answers(0, 200, keySet(append(useless, "ed2")...)))
	a.saysBy(t, tokenGood, "ed2")
	a.saysBy(t, tokenInvalid, "ed", "p256", "p521", "rsa")
}

func TestKeysComeAndGoInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a, e := withEndpoint(answers(0, 502, ""))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		start := time.Now()
		until := func(at time.Duration) {
			time.Sleep(at - time.Since(start))
			synctest.Wait()
		}
		go a.jwks.refresh(ctx)
		until(5*time.Second - 1) // nothing works but the secret, and nobody is signed out
		a.saysBy(t, tokenInDoubt, "ed", "rsa")
		a.says(t, tokenInvalid, "ann", tokenBy(t, "p256", "ES256", "ES384", "p256")) // whatever the keys
		a.says(t, tokenGood, "ann", withSecret(t, headerHS256, claimsOfAnn))
		e.answer.Store(answers(0, 200, keySet("ed", "rsa")))
		until(5 * time.Second)
		a.saysBy(t, tokenGood, "ed", "rsa")

		until(10*time.Second - 1) // p256 comes, rsa goes
		e.answer.Store(answers(2*time.Second, 200, keySet("ed", "p256")))
		a.saysBy(t, tokenInvalid, "p256") // at once: the last fetch was good, and is a moment too near
		e.fetched(t, 0, 5)
		until(10 * time.Second)
		a.saysBy(t, tokenGood, "p256") // waits for the answer
		if waited := time.Since(start); waited != 12*time.Second {
			t.Errorf("waited until %s", waited)
		}
		a.saysBy(t, tokenInvalid, "rsa")
		a.saysBy(t, tokenGood, "ed")

		e.answer.Store(answers(time.Second, 200, keySet("rsa2"))) // in the background: rsa2 comes, the others go
		until(10 * time.Minute)
		a.saysBy(t, tokenGood, "ed", "p256")
		until(10*time.Minute + time.Second)
		a.saysBy(t, tokenInvalid, "ed", "p256")
		e.answer.Store(answers(0, 200, keySet()))
		until(20*time.Minute - 1)
		a.saysBy(t, tokenGood, "rsa2")
		until(20 * time.Minute)
		a.saysBy(t, tokenInvalid, "rsa2")
		cancel()
		until(time.Hour)
		e.fetched(t, 0, 5, 10, 600, 1200)
	})
}

func TestKnownKeysGoOnWorkingWhateverTheEndpointAnswers(t *testing.T) {
	t.Parallel()
	both := keySet("ed", "rsa2")
	trickle := func(pause time.Duration) answer { // a KiB each time
		return func(r *http.Request) (*http.Response, error) {
			body, writer := io.Pipe()
			context.AfterFunc(r.Context(), func() { _ = writer.CloseWithError(context.Cause(r.Context())) })
			go func() {
				for err := error(nil); err == nil; _, err = writer.Write(make([]byte, 1<<10)) {
					time.Sleep(pause)
				}
			}()
			return &http.Response{StatusCode: 200, Body: body}, nil
		}
	}
	const good, gone, bad = "rsa2 is known now", "ed is not known any more", "nothing has changed"
	for name, c := range map[string]struct {
		answer answer
		want   string
		takes  time.Duration
	}{
		"just in time":  {answers(3*time.Second-1, 200, both), good, 3*time.Second - 1},
		"256 KiB":       {answers(0, 200, both+strings.Repeat(" ", 256<<10-len(both))), good, 0},
		"an empty list": {answers(0, 200, `{"keys":[]}`), gone, 0}, "only useless keys": {answers(0, 200, keySet(`{}`)), gone, 0},
		"too late":                 {answers(3*time.Second+1, 200, both), bad, 3 * time.Second},
		"hanging":                  {answers(time.Hour, 200, both), bad, 3 * time.Second},
		"a body that trickles":     {trickle(time.Second), bad, 3 * time.Second},
		"a body that does not end": {trickle(time.Millisecond), bad, 257 * time.Millisecond},
		"256 KiB and a byte":       {answers(0, 200, both+strings.Repeat(" ", 256<<10-len(both)+1)), bad, 0},
		"no answer":                {func(*http.Request) (*http.Response, error) { return nil, io.EOF }, bad, 0},
		"500":                      {answers(0, 500, both), bad, 0},
		"302":                      {answers(0, 302, both), bad, 0},
		"HTML":                     {answers(0, 200, `<!DOCTYPE html><title>Sign in</title>`), bad, 0},
		"truncated":                {answers(0, 200, both[:len(both)-1]), bad, 0},
		"no keys":                  {answers(0, 200, `{"error":"x"}`), bad, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, e := withEndpoint(answers(0, 200, keySet("ed")))
				a.saysBy(t, tokenGood, "ed")
				time.Sleep(5 * time.Second)
				e.answer.Store(c.answer)
				start, onNew := time.Now(), map[string]string{good: tokenGood, gone: tokenInvalid, bad: tokenInDoubt}[c.want]
				a.saysBy(t, onNew, "rsa2")
				a.saysBy(t, map[string]string{good: tokenGood, gone: tokenInvalid, bad: tokenGood}[c.want], "ed")
				a.saysBy(t, map[string]string{good: tokenInvalid, gone: tokenInvalid, bad: tokenInDoubt}[c.want], "p256")
				a.saysBy(t, onNew, "rsa2")
				if took := time.Since(start); took != c.takes { // only the first has waited
					t.Errorf("took %s", took)
				}
				e.answer.Store(answers(0, 200, keySet("ed", "rsa2", "p256")))
				time.Sleep(5*time.Second - c.takes)
				a.saysBy(t, tokenGood, "p256", "ed", "rsa2")
				e.fetched(t, 0, 5, 10)
			})
		})
	}
}

func TestAStormOfUnknownKidsHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a, e := withEndpoint(answers(0, 200, keySet("ed")))
		a.saysBy(t, tokenGood, "ed")
		time.Sleep(5 * time.Second)
		e.answer.Store(answers(time.Hour, 200, ""))
		end := time.Now().Add(12 * time.Second)
		for i := range 200 {
			token := tokenBy(t, "ed2", "EdDSA", "EdDSA", fmt.Sprint(i))
			go func() {
				for ; time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
					a.says(t, tokenInDoubt, "ann", token)
				}
			}()
		}
		for ; time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			start := time.Now()
			another := newAuthenticator("", a.jwks.url, "", "") // which remembers no tokens
			another.jwks = a.jwks
			another.saysBy(t, tokenGood, "ed")
			if time.Since(start) != 0 {
				t.Errorf("a known key waited for %s", time.Since(start))
			}
		}
		time.Sleep(5 * time.Second)
		e.fetched(t, 0, 5, 10, 15)
	})
}
