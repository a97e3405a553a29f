// Package vault is a stand-in for HashiCorp Vault and OpenBao: the transit and the PKI engine, and logging in
// by token, AppRole, TLS certificate and Kubernetes, as their HTTP API documentation has it. It keeps real
// keys and makes real certificates.
package vault

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/assay-id/assay/test/fake/pki"
)

// Server is a Vault that listens.
type Server struct {
	*httptest.Server
	// Token is the root token. RoleID and SecretID are an AppRole's, Role and JWT what Kubernetes logs in with.
	Token, RoleID, SecretID, Role, JWT string

	// Answer, if not nil, is asked first; it reports whether it has answered.
	Answer func(w http.ResponseWriter, r *http.Request) bool

	mu     sync.Mutex // guards the rest
	tokens map[string]bool
	keys   map[string]*key
	chain  []*x509.Certificate // the issuing CA first
	signer crypto.Signer
	logins int
	lives  map[string]*Life
}

// Life is how long a token lives, in seconds, as Vault says it; renewals say that it is Created from then on, as long as
// that is below Max.
type Life struct {
	Left, Created, Max int64
	Renewable          bool
	Renewed            int
}

type key struct {
	kind      string
	signer    crypto.Signer
	deletable bool
}

// New starts a server, over TLS, with a PKI whose CA hangs on a root.
func New(t testing.TB) *Server {
	s := &Server{
		Token: "root-" + rand.Text(), RoleID: "role-" + rand.Text(), SecretID: "secret-" + rand.Text(), Role: "assay", JWT: "jwt-" + rand.Text(),
		tokens: map[string]bool{}, keys: map[string]*key{}, lives: map[string]*Life{},
	}
	s.tokens[s.Token] = true
	root, rootKey := pki.Authority(t, "Vault root", nil, nil)
	issuing, issuingKey := pki.Authority(t, "Vault issuing", root, rootKey)
	s.chain, s.signer = []*x509.Certificate{issuing, root}, issuingKey
	s.Server = httptest.NewTLSServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	return s
}

// CAPEM is what verifies the server's own certificate.
func (s *Server) CAPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

// Logins counts those that went well.
func (s *Server) Logins() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logins
}

// Forget revokes all tokens but the root token.
func (s *Server) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens = map[string]bool{s.Token: true}
}

// Give makes a token that lives so long.
func (s *Server) Give(life Life) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	token := "hvs." + rand.Text()
	s.tokens[token], s.lives[token] = true, &life
	return token
}

// Renewed counts how often a token was renewed.
func (s *Server) Renewed(token string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lives[token].Renewed
}

// self answers about the token that asks.
func (s *Server) self(w http.ResponseWriter, r *http.Request, renew bool) {
	life := s.lives[r.Header.Get("X-Vault-Token")]
	switch {
	case life == nil && renew:
		fail(w, http.StatusBadRequest, "lease is not renewable")
	case life == nil:
		data(w, map[string]any{"ttl": 0, "creation_ttl": 0, "renewable": false})
	case !renew:
		data(w, map[string]any{"ttl": life.Left, "creation_ttl": life.Created, "renewable": life.Renewable, "policies": []string{"default"}})
	case !life.Renewable:
		fail(w, http.StatusBadRequest, "lease is not renewable")
	default:
		life.Renewed++
		if life.Left = life.Created; life.Max > 0 {
			life.Left = min(life.Left, life.Max)
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"auth": map[string]any{"client_token": r.Header.Get("X-Vault-Token"), "lease_duration": life.Left, "renewable": true}})
	}
}

func fail(w http.ResponseWriter, code int, why ...string) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": append([]string{}, why...)})
}

func data(w http.ResponseWriter, data any) {
	_ = json.NewEncoder(w).Encode(map[string]any{"request_id": rand.Text(), "lease_duration": 0, "data": data})
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if s.Answer != nil && s.Answer(w, r) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	path, ok := strings.CutPrefix(r.URL.Path, "/v1/")
	var in map[string]any
	if r.Method == http.MethodPost {
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			fail(w, http.StatusBadRequest, "failed to parse JSON input")
			return
		}
	}
	parts := strings.Split(path, "/")
	switch {
	case !ok:
		fail(w, http.StatusNotFound)
	case parts[0] == "auth" && len(parts) == 3 && parts[2] == "login":
		s.login(w, r, parts[1], in)
	case !s.tokens[r.Header.Get("X-Vault-Token")]:
		fail(w, http.StatusForbidden, "permission denied")
	case path == "auth/token/lookup-self" && r.Method == http.MethodGet, path == "auth/token/renew-self" && r.Method == http.MethodPost:
		s.self(w, r, r.Method == http.MethodPost)
	case path == "transit/keys" && r.URL.Query().Get("list") == "true":
		s.list(w)
	case len(parts) >= 3 && parts[0] == "transit" && parts[1] == "keys":
		s.key(w, r, parts[2], len(parts) == 4 && parts[3] == "config", in)
	case len(parts) == 4 && parts[0] == "transit" && parts[1] == "sign":
		s.sign(w, parts[2], parts[3], in)
	case path == "pki/root/sign-intermediate":
		s.intermediate(w, in)
	default:
		fail(w, http.StatusNotFound, "no handler for route \""+path+"\". route entry not found.")
	}
}

func (s *Server) login(w http.ResponseWriter, r *http.Request, mount string, in map[string]any) {
	good := false
	switch mount {
	case "approle":
		good = in["role_id"] == s.RoleID && in["secret_id"] == s.SecretID
	case "kubernetes":
		good = in["role"] == s.Role && in["jwt"] == s.JWT
	case "cert":
		good = len(r.TLS.PeerCertificates) > 0
	}
	if !good {
		fail(w, http.StatusBadRequest, "invalid role or secret ID")
		return
	}
	token := "hvs." + rand.Text()
	s.tokens[token] = true
	s.logins++
	_ = json.NewEncoder(w).Encode(map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": 3600, "renewable": true}})
}

func (s *Server) list(w http.ResponseWriter) {
	names := []string{}
	for name := range s.keys {
		names = append(names, name)
	}
	if len(names) == 0 {
		fail(w, http.StatusNotFound)
		return
	}
	slices.Sort(names)
	data(w, map[string]any{"keys": names})
}

func (s *Server) key(w http.ResponseWriter, r *http.Request, name string, config bool, in map[string]any) {
	k := s.keys[name]
	switch {
	case config && k == nil:
		fail(w, http.StatusBadRequest, fmt.Sprintf("no existing key named %s could be found", name))
	case config:
		k.deletable, _ = in["deletion_allowed"].(bool)
		w.WriteHeader(http.StatusNoContent)
	case r.Method == http.MethodGet && k == nil:
		fail(w, http.StatusNotFound)
	case r.Method == http.MethodGet:
		s.show(w, name, k)
	case r.Method == http.MethodDelete && k == nil:
		fail(w, http.StatusBadRequest, "could not delete key; not found")
	case r.Method == http.MethodDelete && !k.deletable:
		fail(w, http.StatusBadRequest, "error deleting policy "+name+": deletion is not allowed for this key")
	case r.Method == http.MethodDelete:
		delete(s.keys, name)
		w.WriteHeader(http.StatusNoContent)
	default:
		kind, _ := in["type"].(string)
		if k == nil {
			if k = generate(kind); k == nil {
				fail(w, http.StatusBadRequest, "unknown key type "+kind)
				return
			}
			s.keys[name] = k
		}
		s.show(w, name, k)
	}
}

func generate(kind string) *key {
	var signer crypto.Signer
	var err error
	switch kind {
	case "ecdsa-p256":
		signer, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ecdsa-p384":
		signer, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "rsa-2048":
		signer, err = rsa.GenerateKey(rand.Reader, 2048)
	case "rsa-4096":
		signer, err = rsa.GenerateKey(rand.Reader, 4096)
	default:
		return nil
	}
	if err != nil {
		return nil
	}
	return &key{kind: kind, signer: signer}
}

func (s *Server) show(w http.ResponseWriter, name string, k *key) {
	der, err := x509.MarshalPKIXPublicKey(k.signer.Public())
	if err != nil {
		fail(w, http.StatusInternalServerError, err.Error())
		return
	}
	data(w, map[string]any{"name": name, "type": k.kind, "latest_version": 1, "exportable": false, "deletion_allowed": k.deletable, "keys": map[string]any{
		"1": map[string]any{"name": k.kind, "creation_time": time.Now().Format(time.RFC3339Nano), "public_key": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))},
	}})
}

func (s *Server) sign(w http.ResponseWriter, name, hash string, in map[string]any) {
	k := s.keys[name]
	if k == nil {
		fail(w, http.StatusBadRequest, "signing key not found")
		return
	}
	input, _ := in["input"].(string)
	digest, err := base64.StdEncoding.DecodeString(input)
	h := map[string]crypto.Hash{"sha2-256": crypto.SHA256, "sha2-384": crypto.SHA384}[hash]
	_, isRSA := k.signer.(*rsa.PrivateKey)
	switch {
	case err != nil || h == 0 || in["prehashed"] != true || len(digest) != h.Size():
		fail(w, http.StatusBadRequest, "invalid input or hash")
		return
	case isRSA && in["signature_algorithm"] != "pkcs1v15":
		fail(w, http.StatusBadRequest, "this stand-in signs PKCS #1 v1.5 only")
		return
	}
	signature, err := k.signer.Sign(rand.Reader, digest, h)
	if err != nil {
		fail(w, http.StatusInternalServerError, err.Error())
		return
	}
	data(w, map[string]any{"signature": "vault:v1:" + base64.StdEncoding.EncodeToString(signature), "key_version": 1})
}

func (s *Server) intermediate(w http.ResponseWriter, in map[string]any) {
	text, _ := in["csr"].(string)
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		fail(w, http.StatusBadRequest, "csr contains no data")
		return
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		fail(w, http.StatusBadRequest, "certificate request could not be parsed: "+err.Error())
		return
	}
	ttl, _ := in["ttl"].(string)
	life, err := time.ParseDuration(ttl)
	if err != nil || in["use_csr_values"] != true {
		fail(w, http.StatusBadRequest, "this stand-in wants ttl and use_csr_values")
		return
	}
	c := &x509.Certificate{
		SerialNumber: pki.Serial(), RawSubject: csr.RawSubject, URIs: csr.URIs, NotBefore: time.Now().Add(-30 * time.Second), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, s.chain[0], csr.PublicKey, s.signer)
	if err != nil {
		fail(w, http.StatusInternalServerError, err.Error())
		return
	}
	text = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	var chain []string
	for _, above := range s.chain {
		chain = append(chain, strings.TrimSpace(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: above.Raw}))))
	}
	data(w, map[string]any{"certificate": strings.TrimSpace(text), "issuing_ca": chain[0], "ca_chain": chain, "serial_number": "aa"})
}
