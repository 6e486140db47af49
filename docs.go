package main

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"net/http"
	"net/url"
)

// This file serves the API's description and the page that shows it.

//go:embed openapi.json
var openapiJSON []byte

//go:embed docs.html
var docsHTML []byte

func (s *server) openapi(w *response, _ *http.Request) error {
	return w.json(http.StatusOK, openapiJSON)
}

// docs answers with the page. In development, asked through a name of this machine, it brings a token
// for demoUser; another name could be a stranger's that has been pointed here (DNS rebinding).
func (s *server) docs(w *response, r *http.Request) error {
	page := docsHTML
	if s.development && isLoopback((&url.URL{Host: r.Host}).Hostname()) {
		token := s.auth.developmentToken(demoUser, demoTokenTTL)
		page = bytes.Replace(page, []byte("<!-- demo-token -->"), []byte(`<meta name="taskflow-demo-token" content="`+token+`">`), 1)
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", docsPolicy)
	h.Set("Referrer-Policy", "no-referrer")
	_, _ = w.Write(page)
	return nil
}

// docsPolicy allows the page its own style and script, and requests to this service.
var docsPolicy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" +
	"; style-src " + contentHash("style") + "; script-src " + contentHash("script")

// contentHash is the source expression (CSP level 3) for the text of the page's one element of that name.
func contentHash(element string) string {
	_, rest, _ := bytes.Cut(docsHTML, []byte("<"+element+">"))
	text, _, _ := bytes.Cut(rest, []byte("</"+element+">"))
	sum := sha256.Sum256(text)
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}
