package trust

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// acmeCA is an ACME authority (RFC 8555) that verifies requests and the challenge TLS-ALPN-01 (RFC 8737).
type acmeCA struct {
	t        *testing.T
	server   *httptest.Server
	ca       *authority
	domain   string
	endpoint string // where the domain is

	mu      sync.Mutex // guards the rest
	account *jose.JSONWebKey
	proved  error // nil once the domain is
	cert    []byte
	orders  int
}

func newACME(t *testing.T, domain, endpoint string) *acmeCA {
	t.Helper()
	a := &acmeCA{t: t, ca: newAuthority(t, third), domain: domain, endpoint: endpoint, proved: errors.New("not yet")}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /directory", func(w http.ResponseWriter, _ *http.Request) {
		a.answer(w, http.StatusOK, map[string]string{"newNonce": a.at("/nonce"), "newAccount": a.at("/account"), "newOrder": a.at("/order/new"), "revokeCert": a.at("/revoke"), "keyChange": a.at("/key")})
	})
	mux.HandleFunc("HEAD /nonce", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Replay-Nonce", "n") })
	order := func(status string) map[string]any {
		o := map[string]any{
			"status": status, "identifiers": []any{map[string]string{"type": "dns", "value": domain}},
			"authorizations": []string{a.at("/authz")}, "finalize": a.at("/finalize"), "expires": time.Now().Add(time.Hour).Format(time.RFC3339),
		}
		if status == "valid" {
			o["certificate"] = a.at("/cert")
		}
		return o
	}
	state := func(before, after string) string {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.proved != nil {
			return before
		}
		return after
	}
	challenge := func() map[string]string {
		return map[string]string{"type": "tls-alpn-01", "url": a.at("/challenge"), "token": "token", "status": state("pending", "valid")}
	}
	a.post(mux, "/account", func(w http.ResponseWriter, _ []byte) {
		w.Header().Set("Location", a.at("/account/1"))
		a.answer(w, http.StatusCreated, map[string]string{"status": "valid"})
	})
	a.post(mux, "/order/new", func(w http.ResponseWriter, _ []byte) {
		a.mu.Lock()
		a.orders++
		a.mu.Unlock()
		w.Header().Set("Location", a.at("/order/1"))
		a.answer(w, http.StatusCreated, order(state("pending", "ready")))
	})
	a.post(mux, "/order/1", func(w http.ResponseWriter, _ []byte) {
		a.mu.Lock()
		issued := a.cert != nil
		a.mu.Unlock()
		if issued {
			a.answer(w, http.StatusOK, order("valid"))
			return
		}
		a.answer(w, http.StatusOK, order(state("pending", "ready")))
	})
	a.post(mux, "/authz", func(w http.ResponseWriter, _ []byte) {
		a.answer(w, http.StatusOK, map[string]any{
			"status": state("pending", "valid"), "identifier": map[string]string{"type": "dns", "value": domain},
			"challenges": []any{challenge()},
		})
	})
	a.post(mux, "/challenge", func(w http.ResponseWriter, _ []byte) {
		err := a.validate()
		a.mu.Lock()
		a.proved = err
		a.mu.Unlock()
		if err != nil {
			t.Errorf("challenge: %v", err)
		}
		a.answer(w, http.StatusOK, challenge())
	})
	a.post(mux, "/finalize", func(w http.ResponseWriter, payload []byte) {
		if err := a.issue(payload); err != nil {
			t.Errorf("finalize: %v", err)
		}
		// As it is with an authority that takes its time; that the answer says where the order is, RFC 8555 does
		// not demand.
		a.answer(w, http.StatusOK, order("processing"))
	})
	a.post(mux, "/cert", func(w http.ResponseWriter, _ []byte) {
		w.Header().Set("Content-Type", "application/pem-certificate-chain")
		a.mu.Lock()
		defer a.mu.Unlock()
		_ = pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: a.cert})
	})
	a.server = httptest.NewServer(mux)
	t.Cleanup(a.server.Close)
	return a
}

func (a *acmeCA) at(path string) string { return a.server.URL + path }

func (a *acmeCA) answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Replay-Nonce", "n")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}

// post handles a request that is signed with the account's key (RFC 8555 section 6.2).
func (a *acmeCA) post(mux *http.ServeMux, path string, do func(w http.ResponseWriter, payload []byte)) {
	mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Replay-Nonce", "n")
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		signed, err := jose.ParseSignedJSON(string(body), []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			a.t.Errorf("%s: %v", path, err)
			return
		}
		a.mu.Lock()
		if key := signed.Signatures[0].Protected.JSONWebKey; key != nil && a.account == nil {
			a.account = key
		}
		key := a.account
		a.mu.Unlock()
		payload, err := signed.Verify(key)
		if err != nil {
			a.t.Errorf("%s: %v", path, err)
			return
		}
		do(w, payload)
	})
}

// validate looks whether the domain answers the challenge.
func (a *acmeCA) validate() error {
	a.mu.Lock()
	thumbprint, err := a.account.Thumbprint(crypto.SHA256)
	a.mu.Unlock()
	if err != nil {
		return err
	}
	conn, err := tls.Dial("tcp", a.endpoint, &tls.Config{ServerName: a.domain, NextProtos: []string{"acme-tls/1"}, InsecureSkipVerify: true})
	if err != nil {
		return err
	}
	defer conn.Close()
	state := conn.ConnectionState()
	leaf := state.PeerCertificates[0]
	sum := sha256.Sum256([]byte("token." + base64.RawURLEncoding.EncodeToString(thumbprint)))
	want, err := asn1.Marshal(sum[:])
	if err != nil {
		return err
	}
	for _, e := range leaf.Extensions {
		if e.Id.Equal(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 1, 31}) && e.Critical && bytes.Equal(e.Value, want) &&
			state.NegotiatedProtocol == "acme-tls/1" && leaf.VerifyHostname(a.domain) == nil {
			return nil
		}
	}
	return fmt.Errorf("the certificate for %v proves nothing", leaf.DNSNames)
}

// issue signs what was asked for.
func (a *acmeCA) issue(payload []byte) error {
	var req struct {
		CSR string `json:"csr"`
	}
	if err := json.Unmarshal(payload, &req); err != nil {
		return err
	}
	der, err := base64.RawURLEncoding.DecodeString(req.CSR)
	if err != nil {
		return err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return err
	}
	if len(csr.DNSNames) != 1 || csr.DNSNames[0] != a.domain {
		return fmt.Errorf("certificate for %v", csr.DNSNames)
	}
	cert := sign(a.t, &x509.Certificate{DNSNames: csr.DNSNames, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, a.ca.cert, csr.PublicKey, a.ca.key)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cert = cert.Raw
	return nil
}

func TestACMECertificate(t *testing.T) {
	const domain = "bundle.own.test"
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	web := newACME(t, domain, l.Addr().String())
	cache := t.TempDir()
	config, err := ACME{Domain: domain, Email: "a@own.test", DirectoryURL: web.at("/directory"), AcceptTOS: true, Cache: cache}.Config(silent())
	if err != nil {
		t.Fatal(err)
	}
	p := &picture{}
	p.Store(bundle(own, 3, newAuthority(t, own)))
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- NewEndpoint(own, p, time.Minute, nil).Serve(ctx, l, config, silent()) }()
	roots := x509.NewCertPool()
	roots.AddCert(web.ca.cert)
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: roots, ServerName: domain, MinVersion: tls.VersionTLS12},
	}}
	for range 2 {
		resp, err := client.Get("https://" + l.Addr().String() + "/")
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if b, bad := parse(own, text); err != nil || bad != nil || b.Origin != 3 {
			t.Errorf("%v, %v", err, bad)
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if web.orders != 1 {
		t.Errorf("%d orders for one certificate", web.orders)
	}
	files, err := os.ReadDir(cache)
	if err != nil || len(files) < 2 {
		t.Fatalf("%v are cached, %v", files, err)
	}
	for _, file := range files {
		if info, err := file.Info(); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: mode %v, %v", file.Name(), info.Mode(), err)
		}
	}
}
