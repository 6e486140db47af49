package main

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"net"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// What the whole handler says about a token, see says.
const (
	tokenGood    = `415 {"detail":"Unsupported media type: send application/json"}`
	tokenInvalid = `401 {"detail":"Invalid token"}`
	tokenExpired = `401 {"detail":"Token expired"}`
	tokenInDoubt = `503 {"detail":"Service temporarily unavailable"}`
)

// bySecret judges as a service that has only the secret.
func bySecret() *authenticator {
	return newAuthenticator(testSecret, "", "", "")
}

// says sends a token with a request of user's that only its media type keeps from the database. It does
// so twice: a token found good is remembered.
func (a *authenticator) says(t testing.TB, want, user, token string) {
	t.Helper()
	for range 2 {
		r := httptest.NewRequestWithContext(t.Context(), "POST", "/api/"+url.PathEscape(user)+"/tasks", nil)
		r.Header.Set("Authorization", "Bearer "+token)
		r.Header.Set("Content-Type", "text/plain")
		w := httptest.NewRecorder()
		s := &server{auth: a, users: userLimit{limit: 1, users: map[string]*userTurns{}}, log: slog.New(slog.DiscardHandler)}
		s.handler().ServeHTTP(w, r)
		if got := fmt.Sprint(w.Code, " ", w.Body); got != want {
			t.Errorf("got %s, want %s: user %.99q, token %.999s", got, want, user, token)
		}
		if (w.Code == 401) != (w.Header().Get("WWW-Authenticate") == "Bearer") || (w.Code == 503) != (w.Header().Get("Retry-After") != "") {
			t.Errorf("%d with the headers %v", w.Code, w.Header())
		}
	}
}

// seal signs text, which is to be the first two parts of a token.
func seal(t testing.TB, method jwt.SigningMethod, key any, text string) string {
	t.Helper()
	signature, err := method.Sign(text, key)
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// signed makes a token of a header and claims, whatever they are.
func signed(t testing.TB, method jwt.SigningMethod, key any, header, claims string) string {
	t.Helper()
	return seal(t, method, key,
		base64.RawURLEncoding.EncodeToString([]byte(header))+"."+base64.RawURLEncoding.EncodeToString([]byte(claims)))
}

const (
	headerHS256 = `{"alg":"HS256"}`
	claimsOfAnn = `{"sub":"ann","exp":4102444800}`
)

// withSecret signs as whoever knows the secret of the tests.
func withSecret(t testing.TB, header, claims string) string {
	t.Helper()
	return signed(t, jwt.SigningMethodHS256, []byte(testSecret), header, claims)
}

func TestAuthorizationIsOneHeaderWithBearerAndOneToken(t *testing.T) {
	t.Parallel()
	s := newService(t)
	good := withSecret(t, headerHS256, claimsOfAnn)
	for want, headers := range map[string][][]string{
		`[]`: {{"Bearer " + good}, {"bearer " + good}, {"BEARER " + good}, {"bEARER " + good}, {"Bearer     " + good},
			{"  Bearer " + good + "  "}},
		`{"detail":"Invalid authorization header"}`: {
			nil, {""}, {"Bearer"}, {"Bearer "}, {"bearer      "}, {good}, {"Basic " + good}, {"Token " + good}, {"Digest Bearer " + good},
			{"Bearer" + good}, {"Bearer\t" + good}, {"Bearer \t" + good}, {"Bearer " + good + " x"}, {"Bearer " + good + "\tx"},
			{"Bearer x " + good}, {"Bearer " + good + ", Bearer " + good}, {"Bearer " + good, "Bearer " + good}, {"Bearer " + good, ""},
			{"", "Bearer " + good}, {"Bearer: " + good}, {"Bearer\u00a0" + good},
		},
		`{"detail":"Invalid token"}`: {{"Bearer Bearer"}, {"Bearer " + good + ","}, {"Bearer =" + good}, {"Bearer \"" + good + "\""},
			{"Bearer token=" + good}, {"Bearer \u00a0" + good}},
	} {
		for _, lines := range headers {
			var pairs []string
			for _, line := range lines {
				pairs = append(pairs, "Authorization", line)
			}
			s.as(t, "", "GET", "/api/ann/tasks", "", pairs...).is(t, map[bool]int{true: 200, false: 401}[want == "[]"], want)
			if t.Failed() {
				t.Fatalf("for the lines %q", lines)
			}
		}
	}
}

func TestTokenIsExactlyThreePartsOfStrictBase64URL(t *testing.T) {
	t.Parallel()
	a := bySecret()
	sealed := func(text string) string { return seal(t, jwt.SigningMethodHS256, []byte(testSecret), text) }
	good := withSecret(t, headerHS256, claimsOfAnn)
	text, signature := cutLast(good)
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, signature[42]) // the next character differs in a bit that stands for nothing
	a.says(t, tokenGood, "ann", good)
	for _, token := range []string{
		"x", ".", "..", "...", text, text + ".", "." + text, good + ".", good + "." + signature, "." + good, sealed(text[:20]),
		sealed(text + "."), sealed("." + text), good + "=", sealed(text + "="), sealed(text + "!"), sealed(headerHS256 + "." + claimsOfAnn),
		text + "." + signature[:42], text + "." + signature + "AA", text + "." + signature[:42] + alphabet[last+1:][:1], good[1:],
	} {
		a.says(t, tokenInvalid, "ann", token)
	}
}

func TestOnlyHS256WithTheSecretIsAccepted(t *testing.T) {
	t.Parallel()
	a := bySecret()
	for _, header := range []string{
		headerHS256, `{"typ":"JWT","alg":"HS256"}`, `{"alg":"HS256","kid":"x"}`, `{"alg":"HS256","kid":5}`, `{"alg":"HS256","ALG":"none"}`,
		`{"alg":"HS256","typ":"x","jwk":{"kty":"oct","k":"AA"},"jku":"https://evil.example.com","x5u":"x","b64":false,"Crit":["x"]}`,
	} {
		a.says(t, tokenGood, "ann", withSecret(t, header, claimsOfAnn))
	}
	for _, header := range []string{
		`{}`, `{"ALG":"HS256"}`, `{"alg":null}`, `{"alg":["HS256"]}`, `{"alg":"hs256"}`, `{"alg":"none"}`, `{"alg":"None"}`, `{"alg":"HS384"}`,
		`{"alg":"HS512"}`, `{"alg":"RS256"}`, `{"alg":"ES256"}`, `{"alg":"PS256","kid":"x"}`, `{"alg":"EdDSA","kid":"x"}`,
		`{"alg":"HS256","crit":["exp"],"exp":1}`, `{"alg":"HS256","crit":[]}`, `{"alg":"HS256","crit":null}`, `{"alg":"HS256","crit":"alg"}`,
		``, `null`, `["HS256"]`, `{"alg":"HS256"`, `{"alg":"HS256"}x`, headerHS256 + "\x00",
	} {
		token := withSecret(t, header, claimsOfAnn)
		a.says(t, tokenInvalid, "ann", token)
		a.says(t, tokenInvalid, "ann", token[:strings.LastIndex(token, ".")+1])
	}
	a.says(t, tokenInvalid, "ann", signed(t, jwt.SigningMethodHS512, []byte(testSecret), `{"alg":"HS512"}`, claimsOfAnn))
	for _, secret := range []string{"", testSecret[1:], testSecret + "\n", " " + testSecret, strings.ToUpper(testSecret),
		base64.StdEncoding.EncodeToString([]byte(testSecret))} {
		for _, a := range []*authenticator{a, newAuthenticator("", "", "", ""), newAuthenticator("", "http://127.0.0.1:1/", "", "")} {
			a.says(t, tokenInvalid, "ann", signed(t, jwt.SigningMethodHS256, []byte(secret), headerHS256, claimsOfAnn))
		}
	}
}

func TestExpIsRequiredAndNbfHonouredToTheInstant(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { // where it is 946684800
		a := bySecret()
		check := func(want, claims string) {
			a.says(t, want, "ann", withSecret(t, headerHS256, `{"sub":"ann"`+claims+`}`))
		}
		for _, exp := range []string{"946684801", "946684801.000001", "9.46684801e8", "946684801.0", "946684801E+0", "9007199254740991"} {
			check(tokenGood, `,"exp":`+exp)
			check(tokenInvalid, `,"exp":4102444800,"nbf":`+exp)
		}
		for _, exp := range []string{"946684800", "946684799.999999", "1e3", "1", "-1", "-9e9"} {
			check(tokenExpired, `,"exp":`+exp)
			check(tokenGood, `,"exp":946684801,"nbf":`+exp)
			check(tokenExpired, `,"exp":946684800,"nbf":`+exp)
		}
		for _, exp := range []string{"NaN", "01", `"946684801"`, `""`, `"2000-01-01T00:00:01Z"`, "true", "[946684801]", "{}"} {
			check(tokenInvalid, `,"exp":`+exp)
			check(tokenInvalid, `,"exp":4102444800,"nbf":`+exp)
		}
		for _, iat := range []string{"9999999999", "-1", `"x"`, "null"} {
			check(tokenGood, `,"exp":946684801,"iat":`+iat)
		}
		for _, claims := range []string{``, `,"EXP":946684801`, `,"exp":null`, `,"exp":0`} {
			check(tokenInvalid, claims)
		}
		late := withSecret(t, headerHS256, `{"sub":"ann","exp":1}`) // "Token expired" is said of a good signature only
		a.says(t, tokenExpired, "bob", late)
		a.says(t, tokenInvalid, "ann", late+"=")
		a.says(t, tokenInvalid, "ann", signed(t, jwt.SigningMethodHS256, []byte("another secret"), headerHS256, `{"sub":"ann","exp":1}`))
		check(tokenGood, `,"exp":946684801,"NBF":946684801`)                              // the next token is remembered, its expiry is not:
		for _, want := range []string{tokenInvalid, tokenGood, tokenGood, tokenExpired} { // at :00, :30, :59.999999 and :60
			check(want, `,"exp":946684860,"nbf":946684830`)
			time.Sleep(map[int]time.Duration{0: 30 * time.Second, 30: 30*time.Second - time.Microsecond,
				59: time.Microsecond}[time.Now().Second()])
		}
	})
}

func TestSubAloneIsTheUser(t *testing.T) {
	t.Parallel()
	a := bySecret()
	as, euros := strings.Repeat("a", 255), strings.Repeat("€", 85)
	for want, users := range map[string][][2]string{ // and their claims
		tokenGood: {
			{"ann", `"sub":"ann"`}, {"ann", ` "sub" : "\u0061nn"`}, {"ann", `"\u0073ub":"ann"`},
			{"ann", `"sub":"ann","SUB":"bob","Sub":5,"id":"bob","user_id":"bob","email":"bob","email":"eve"`},
			{"ann", `"sub":"ann","user":{"sub":"bob","sub":"eve"},"name":"\ud800\u0000"`},
			{as, `"sub":"` + as + `"`}, {euros, `"sub":"` + euros + `"`}, {"a/b", `"sub":"a/b"`}, {"%2F", `"sub":"%2F"`}, {" ", `"sub":" "`},
			{"💡", `"sub":"\ud83d\udca1"`}, {"\ufffd", `"sub":"\ufffd"`}, {"\"\\\n\x7f", `"sub":"\"\\\n` + "\x7f" + `"`},
		},
		tokenInvalid: {
			{as + "a", `"sub":"` + as + `a"`}, {euros + "a", `"sub":"` + strings.Repeat(`\u20ac`, 85) + `a"`}, {"42", `"sub":42`},
			{"null", `"sub":null`}, {"ann", `"sub":["ann"]`}, {"ann", `"sub":""`}, {"a\x00", `"sub":"a\u0000"`}, {"ann", `"SUB":"ann"`},
			{"ann", `"id":"ann","user_id":"ann","userId":"ann","name":"ann","email":"ann"`},
			// and Better Auth's session cookie and e-mail links:
			{"ann", `"session":{"id":"s","userId":"ann","token":"t"},"user":{"id":"ann","email":"ann@example.com"},` +
				`"updatedAt":1,"version":"1","iat":1`},
			{"a@example.com", `"email":"a@example.com","updateTo":"b@example.com","iat":1`},
		},
		`403 {"detail":"Forbidden"}`: {{"bob", `"sub":"ann"`}, {"Ann", `"sub":"ann"`}, {"ann ", `"sub":"ann"`}, {"é", `"sub":"e\u0301"`},
			{"\xff", `"sub":"\ufffd"`}},
	} {
		for _, user := range users {
			a.says(t, want, user[0], withSecret(t, headerHS256, `{`+user[1]+`,"exp":4102444800}`))
		}
	}
	for _, claims := range []string{``, `null`, `[` + claimsOfAnn + `]`, claimsOfAnn + `x`, claimsOfAnn[1:]} {
		a.says(t, tokenInvalid, "ann", withSecret(t, headerHS256, claims))
	}
}

func TestIssuerAndAudienceAreCheckedWhenSet(t *testing.T) {
	t.Parallel()
	const origin = "https://app.example.com"
	const iss, aud = `,"iss":"` + origin + `"`, `,"aud":"` + origin + `"`
	for good, claims := range map[[4]bool][]string{ // with neither set, with the issuer, the audience, both
		{true, false, false, false}: {``, `,"iss":{},"iss":"\u0000","aud":false,"aud":[[],"\ud800"]`},
		{true, true, true, true}: {iss + aud, aud + `,"iss":"https:\/\/app.example.com"`, iss + `,"aud":["` + origin + `"]`,
			iss + `,"aud":[ "x" , "` + origin + `" ]`, iss + `,"aud":["` + origin + `","\ud800"]`, iss + `,"AUD":"x"` + aud},
		{true, true, false, false}: {
			iss, iss + `,"aud":["https:","` + origin + `.evil.example",""]`, iss + `,"aud":[]`, iss + `,"aud":null`, iss + `,"aud":5`,
			iss + `,"AUD":"` + origin + `"`, iss + `,"aud":"` + origin + `/"`,
		},
		{true, false, true, false}: {aud, aud + `,"iss":["` + origin + `"]`, aud + `,"iss":null`, aud + `,"iss":""`,
			aud + `,"iss":5`, aud + `,"iss":"` + origin + `/"`, aud + `,"ISS":"` + origin + `"`},
	} {
		for i, configured := range [][2]string{{"", ""}, {origin, ""}, {"", origin}, {origin, origin}} {
			a := newAuthenticator(testSecret, "", configured[0], configured[1])
			for _, text := range claims {
				a.says(t, map[bool]string{true: tokenGood, false: tokenInvalid}[good[i]], "ann",
					withSecret(t, headerHS256, `{"sub":"ann","exp":4102444800`+text+`}`))
			}
		}
	}
}

func TestOnlySomeTokensAreRemembered(t *testing.T) {
	t.Parallel()
	a := bySecret()
	for i := range maxVerified + 1 {
		a.says(t, tokenGood, "ann", withSecret(t, headerHS256, fmt.Sprintf(`{"i":%d,`, i)+claimsOfAnn[1:]))
	}
	a.says(t, tokenGood, "ann", withSecret(t, headerHS256, strings.Repeat(" ", maxVerifiedBytes)+claimsOfAnn))
	a.says(t, tokenInvalid, "ann", withSecret(t, headerHS256, `{}`))
	if n := len(a.verified); n != 1 {
		t.Errorf("%d are remembered", n)
	}
}

func TestASlashTooManyInTheIssuerIsToldOnceInTheLog(t *testing.T) {
	var log strings.Builder
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(before)
	a := newAuthenticator(testSecret, "", "https://app.example.com/", "")
	for range 3 {
		a.says(t, tokenInvalid, "ann", withSecret(t, headerHS256, `{"sub":"ann","exp":4102444800,"iss":"https://app.example.com"}`))
	}
	if strings.Count(log.String(), "slash") != 1 || !strings.Contains(log.String(), "iss=https://app.example.com") {
		t.Errorf("logged %s", &log)
	}
}

func TestOneUsersRequestsWaitBeyondTheirShareHoldingNothing(t *testing.T) {
	t.Parallel()
	s := newServiceWithin(t, newDatabase(t), 4, time.Second)
	head := func(user string) string {
		return "POST /api/" + user + "/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + tokenFor(t, user) +
			"\r\nContent-Length: 20\r\n\r\n{"
	}
	var slow []net.Conn
	for range maxRequests {
		conn := must(net.Dial("tcp", strings.TrimPrefix(s.url, "http://")))
		defer conn.Close()
		must(fmt.Fprint(conn, head("ann")))
		slow = append(slow, conn)
	}
	eventually(t, "all bodies are being read", func() bool {
		s.users.mu.Lock()
		defer s.users.mu.Unlock()
		return s.users.users["ann"] != nil && len(s.users.users["ann"].taken) == maxRequests
	})
	start := time.Now()
	if got := s.as(t, "ann", "GET", "/api/ann/tasks", "").is(t, 503, unavailable); got.header.Get("Retry-After") == "" ||
		time.Since(start) < time.Second {
		t.Errorf("after %s: %v", time.Since(start), got.header)
	}
	s.useAll(t, "bob")
	time.AfterFunc(200*time.Millisecond, func() { _, _ = fmt.Fprint(slow[0], `"title": "enough!"}`) })
	s.as(t, "ann", "GET", "/api/ann/tasks?limit=1", "").tasks(t) // has waited for its turn
	s.logs.at(slog.LevelWarn)
}

// FuzzAuthorization: whatever the header, its token is one word behind Bearer, and lets nobody in but ann.
func FuzzAuthorization(f *testing.F) {
	good := withSecret(f, headerHS256, claimsOfAnn)
	for _, line := range []string{"", "Bearer", "bearer  " + good, "Bearer " + good + "\n", "Bearer " + good[:20] + "\r\n" + good[20:],
		"Bearer a.b.c", "Bearer ..", "Basic x", "Bearer " + good + "."} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		token, err := bearer([]string{line})
		if scheme, rest, _ := strings.Cut(line, " "); err == nil &&
			(!strings.EqualFold(scheme, "bearer") || strings.Trim(rest, " ") != token || strings.ContainsAny(token, " \t")) {
			t.Errorf("%q: the token is %q", line, token)
		}
		if user, err := bySecret().subject(token); err == nil && user != "ann" {
			t.Errorf("%q lets %q in", line, user)
		}
	})
}

// cutLast parts a token from its signature.
func cutLast(token string) (signed, signature string) {
	dot := strings.LastIndexByte(token, '.')
	return token[:dot], token[dot+1:]
}
