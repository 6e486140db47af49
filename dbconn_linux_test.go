package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// On Linux only: elsewhere SSL_CERT_FILE means nothing, and 127.0.0.2 is no address of the machine.
func TestNeonsStringWorksPastedUnchanged(t *testing.T) {
	t.Parallel()
	folder := must(os.MkdirTemp("", "taskflow-test"))
	account := -1 // that PostgreSQL is to run as: ourselves
	if os.Getuid() == 0 {
		owner, err := user.Lookup("postgres")
		if err != nil {
			owner = must(user.Lookup("nobody"))
		}
		account = must(strconv.Atoi(owner.Uid))
	}
	address := fmt.Sprintf("127.%d.%d.2", 1+os.Getpid()>>8&0x7f, os.Getpid()&0xff) // not that of another run
	other := strings.TrimSuffix(address, "2") + "3"
	private := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.ParseIP(address)},
		NotAfter: time.Now().Add(time.Hour),
		IsCA:     true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	certificate := must(x509.CreateCertificate(rand.Reader, template, template, private.Public(), private))
	file := func(name string, text []byte) string {
		path := filepath.Join(folder, name)
		return must(path, errors.Join(os.WriteFile(path, text, 0o600), os.Chown(path, account, -1)))
	}
	authority := file("ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}))
	key := file("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(private))}))
	hba := file("hba.conf", []byte("local all all trust\nhostssl all all all scram-sha-256\n"))
	database, stop, err := startPostgres(folder, "fsync=off", "hba_file="+hba, "listen_addresses="+address+","+other, "ssl=on",
		"ssl_cert_file="+authority, "ssl_key_file="+key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	ask(t, database, `CREATE ROLE neondb_owner LOGIN PASSWORD 'npg_Secret'`)
	ask(t, database, `CREATE DATABASE neondb OWNER neondb_owner`)

	right := "neondb_owner:npg_Secret@" + address + "/neondb?sslmode=require&channel_binding=require"
	instead := func(old, new string) string { return strings.Replace(right, old, new, 1) }
	tests := []struct{ name, authority, url, fault string }{
		{"right", authority, right, ""},
		{"own authority", "", right + "&sslrootcert=" + authority, ""},
		{"unverified", "", instead("&channel_binding=require", ""), ""},
		{"unknown authority", "", right, "certificate signed by unknown authority"},
		{"other host", authority, instead(address, other), "certificate is valid for " + address},
		{"wrong password", authority, instead("Secret", "Wrong"), "28P01"},
		{"no such user", authority, instead("owner", "guest"), "28P01"},
		{"no such database", authority, instead("/neondb", "/none"), "3D000"},
		{"without TLS", authority, instead("require&channel_binding=require", "disable"), "28000"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := start(t, t.TempDir(),
				[]string{"ENVIRONMENT=production", secretVariable, "SSL_CERT_FILE=" + test.authority,
					"DATABASE_URL=postgresql://" + test.url})
			if test.fault != "" {
				p.exits(t, 1, test.fault)
			} else {
				p.await(t, `"ready"`)
			}
			if strings.Contains(p.output.String(), "npg_") {
				t.Errorf("the password is in the output:\n%s", &p.output)
			}
		})
	}
	cfg, _, _ := parseDatabaseURL("postgresql://"+tests[1].url, func(string) string { return "" })
	s := newServiceWithin(t, cfg, 2, time.Second)
	s.create(t, "ann", "mine")
	terminate(t, cfg)
	mine := s.create(t, "ann", "the idle connection had been closed")
	hold(t, cfg, `SELECT FROM tasks FOR UPDATE`)
	s.as(t, "ann", "DELETE", fmt.Sprintf("/api/ann/tasks/%d", mine.ID), "").is(t, 503, unavailable)
	if n := others(t, cfg, waiting); n != "0" {
		t.Errorf("%s statements still wait", n)
	}
}
