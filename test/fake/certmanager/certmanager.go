// Package certmanager is a stand-in for a Kubernetes API server with cert-manager and one issuer: it takes
// CertificateRequests as their definition (cert-manager.io/v1) has them, and signs with a real authority.
package certmanager

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/assay-id/assay/test/fake/pki"
)

// Server is the API server.
type Server struct {
	*httptest.Server
	// Token is who may ask, Namespace and Issuer what is there.
	Token, Namespace, Issuer string
	// Condition, if not empty, is what requests end with instead of Ready, and a message.
	Condition, Message string
	// Answer, if not nil, is asked first; it reports whether it has answered.
	Answer func(w http.ResponseWriter, r *http.Request) bool

	mu       sync.Mutex // guards the rest
	requests map[string]map[string]any
	asks     map[string]int
	root     *x509.Certificate
	signer   crypto.Signer
}

// New starts a server.
func New(t testing.TB) *Server {
	root, key := pki.Authority(t, "cert-manager root", nil, nil)
	s := &Server{Token: "token-" + rand.Text(), Namespace: "trust", Issuer: "roots", requests: map[string]map[string]any{}, asks: map[string]int{}, root: root, signer: key}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	return s
}

// KubeConfig writes a kubeconfig file for the server.
func (s *Server) KubeConfig(t testing.TB, token string) string {
	dir := t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	text := `apiVersion: v1
kind: Config
current-context: here
contexts:
- name: elsewhere
  context: {cluster: other, user: other}
- name: here
  context: {cluster: fake, user: assay}
clusters:
- name: fake
  cluster: {server: "` + s.URL + `", certificate-authority: ca.crt}
users:
- name: assay
  user: {token: "` + token + `"}
`
	path := filepath.Join(dir, "config")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Left counts requests that were not deleted.
func (s *Server) Left() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.requests)
}

func fail(w http.ResponseWriter, code int, reason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code})
}

func reply(w http.ResponseWriter, code int, out any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(out)
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if s.Answer != nil && s.Answer(w, r) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	base := "/apis/cert-manager.io/v1/namespaces/" + s.Namespace + "/certificaterequests"
	name := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, base), "/")
	switch {
	case r.Header.Get("Authorization") != "Bearer "+s.Token:
		fail(w, http.StatusUnauthorized, "Unauthorized", "Unauthorized")
	case !strings.HasPrefix(r.URL.Path, base):
		fail(w, http.StatusNotFound, "NotFound", "the server could not find the requested resource")
	case r.Method == http.MethodPost && name == "":
		s.create(w, r)
	case s.requests[name] == nil:
		fail(w, http.StatusNotFound, "NotFound", `certificaterequests.cert-manager.io "`+name+`" not found`)
	case r.Method == http.MethodDelete:
		delete(s.requests, name)
		reply(w, http.StatusOK, map[string]any{"kind": "Status", "status": "Success"})
	case r.Method == http.MethodGet:
		// The issuer takes its time: the first look finds nothing done.
		if s.asks[name]++; s.asks[name] > 1 {
			s.issue(s.requests[name])
		}
		reply(w, http.StatusOK, s.requests[name])
	default:
		fail(w, http.StatusMethodNotAllowed, "MethodNotAllowed", "")
	}
}

func (s *Server) create(w http.ResponseWriter, r *http.Request) {
	var in map[string]any
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		fail(w, http.StatusBadRequest, "BadRequest", err.Error())
		return
	}
	meta, _ := in["metadata"].(map[string]any)
	name, _ := meta["name"].(string)
	if in["apiVersion"] != "cert-manager.io/v1" || in["kind"] != "CertificateRequest" || name == "" || meta["namespace"] != s.Namespace {
		fail(w, http.StatusUnprocessableEntity, "Invalid", "CertificateRequest is invalid")
		return
	}
	delete(in, "status") // a subresource
	s.requests[name] = in
	reply(w, http.StatusCreated, in)
}

func (s *Server) issue(in map[string]any) {
	end := func(kind, state, reason, message string) map[string]any {
		return map[string]any{"conditions": []any{map[string]any{"type": kind, "status": state, "reason": reason, "message": message}}}
	}
	text, err := json.Marshal(in["spec"])
	var spec struct {
		Request   []byte                             `json:"request"`
		IsCA      bool                               `json:"isCA"`
		Duration  string                             `json:"duration"`
		Usages    []string                           `json:"usages"`
		IssuerRef struct{ Name, Kind, Group string } `json:"issuerRef"`
	}
	if err == nil {
		err = json.Unmarshal(text, &spec)
	}
	life, lifeErr := time.ParseDuration(spec.Duration)
	block, _ := pem.Decode(spec.Request)
	switch {
	case s.Condition != "":
		in["status"] = end(s.Condition, "True", "Policy", s.Message)
		return
	case err != nil || lifeErr != nil || block == nil || spec.IssuerRef.Name != s.Issuer || spec.IssuerRef.Group != "cert-manager.io":
		in["status"] = end("Ready", "False", "Failed", "the request or its issuer is malformed")
		return
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		in["status"] = end("Ready", "False", "Failed", err.Error())
		return
	}
	c := &x509.Certificate{
		SerialNumber: pki.Serial(), RawSubject: csr.RawSubject, URIs: csr.URIs, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: spec.IsCA, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, s.root, csr.PublicKey, s.signer)
	if err != nil {
		in["status"] = end("Ready", "False", "Failed", err.Error())
		return
	}
	st := end("Ready", "True", "Issued", "Certificate fetched from issuer successfully")
	st["certificate"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	st["ca"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.root.Raw})
	in["status"] = st
}
