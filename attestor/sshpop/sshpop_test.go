package sshpop_test

import (
	"context"
	"crypto"
	"crypto/dsa" //nolint:staticcheck // a key that must be refused
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/sshpop"
	"github.com/assay-id/assay/attestor/sshpop/node"
	"github.com/assay-id/assay/attestor/sshpop/server"
)

func newKey(t testing.TB, kind string) (crypto.Signer, ssh.Signer) {
	t.Helper()
	var key crypto.Signer
	var err error
	switch kind {
	case "rsa":
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	case "ecdsa":
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	default:
		_, key, err = ed25519.GenerateKey(rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromSigner(key)
	if err != nil {
		t.Fatal(err)
	}
	return key, signer
}

// host is a host with a certificate, in files.
type host struct {
	ca        ssh.Signer
	signer    ssh.Signer
	cert      *ssh.Certificate
	key, path string
}

func newHost(t testing.TB, ca ssh.Signer, kind string, change func(*ssh.Certificate)) *host {
	t.Helper()
	key, signer := newKey(t, kind)
	h := &host{ca: ca, signer: signer, cert: &ssh.Certificate{
		Key: signer.PublicKey(), CertType: ssh.HostCert, KeyId: "web1 key", Serial: 7,
		ValidPrincipals: []string{"web1.example.org", "web1"},
		ValidAfter:      uint64(time.Now().Add(-time.Hour).Unix()), ValidBefore: uint64(time.Now().Add(time.Hour).Unix()),
	}}
	if change != nil {
		change(h.cert)
	}
	if err := h.cert.SignCert(rand.Reader, ca); err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	h.key, h.path = filepath.Join(dir, "host"), filepath.Join(dir, "host-cert.pub")
	for path, text := range map[string][]byte{h.key: pem.EncodeToMemory(block), h.path: ssh.MarshalAuthorizedKey(h.cert)} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func (h *host) config() string {
	return fmt.Sprintf("host_key_path = %q\nhost_cert_path = %q\n", h.key, h.path)
}

func line(signer ssh.Signer) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
}

func payloadOf(t testing.TB, wire []byte) []byte {
	t.Helper()
	payload, err := json.Marshal(sshpop.Evidence{Certificate: wire})
	if err != nil {
		t.Fatal(err)
	}
	return payload
}

func openJudge(t testing.TB, c *sshpop.ServerConfig) attestor.Judge {
	t.Helper()
	judge, err := server.Kind().Open(c, attestor.Needs{TrustDomain: attestortest.TrustDomain})
	if err != nil {
		t.Fatal(err)
	}
	return judge
}

func openNode(t testing.TB, h *host) ([]byte, attestor.Ask) {
	t.Helper()
	n, err := node.Kind().Open(&sshpop.AgentConfig{HostKeyPath: h.key, HostCertPath: h.path}, attestor.Needs{})
	if err != nil {
		t.Fatal(err)
	}
	payload, answer, err := n.Evidence(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return payload, answer
}

func TestSuite(t *testing.T) {
	_, ca := newKey(t, "ed25519")
	for _, kind := range []string{"rsa", "ecdsa", "ed25519"} {
		t.Run(kind, func(t *testing.T) {
			h := newHost(t, ca, kind, nil)
			attestortest.Run(t, attestortest.Pair{
				Node: node.Kind(), Judge: server.Kind(),
				NodeConfig: h.config(), JudgeConfig: fmt.Sprintf("cert_authorities = [%q]\ncanonical_domain = \"example.org\"", line(ca)),
				Path: "sshpop/" + sshpop.Fingerprint(h.cert),
				Selectors: []string{
					"sshpop:ca:fingerprint:" + ssh.FingerprintSHA256(ca.PublicKey()),
					"sshpop:hostname:web1", "sshpop:key-id:web1 key", "sshpop:principal:web1", "sshpop:principal:web1.example.org",
				},
				CanReattest: true,
				Foreign: map[string][]byte{
					"join token":               []byte("0f7ba2b4-5a6e-4f5e-8d33-2f54a3f2f8f1"),
					"x509pop evidence":         []byte(`{"certificates":["MIIB"]}`),
					"the key alone":            payloadOf(t, h.cert.Key.Marshal()),
					"half a certificate":       payloadOf(t, h.cert.Marshal()[:200]),
					"a byte after it":          payloadOf(t, append(h.cert.Marshal(), 0)),
					"a certificate of 60 KiB":  payloadOf(t, make([]byte, 45<<10)),
					"a certificate in a field": []byte(`{"Certificate":{"a":1}}`),
				},
				README: "README.md",
			})
		})
	}
}

func TestForgedCertificateIsRefused(t *testing.T) {
	_, ca := newKey(t, "ed25519")
	_, another := newKey(t, "ed25519")
	_, rsaCA := newKey(t, "rsa")
	judge := openJudge(t, &sshpop.ServerConfig{CertAuthorities: []string{line(ca), line(rsaCA)}, CanonicalDomain: "example.org"})
	if _, err := judge.Judge(t.Context(), payloadOf(t, newHost(t, rsaCA, "ecdsa", nil).cert.Marshal()), nobody); !errors.Is(err, errAsked) {
		t.Fatalf("an honest host is not asked: %v", err)
	}
	hour := uint64(time.Hour / time.Second)
	// The library looks at most of this too, so it is the words that tell which check has refused.
	for why, c := range map[string]struct {
		ca     ssh.Signer
		change func(*ssh.Certificate)
		says   string
	}{
		"it has expired":           {ca, func(c *ssh.Certificate) { c.ValidBefore = c.ValidAfter + 1 }, "not valid now"},
		"it is not valid yet":      {ca, func(c *ssh.Certificate) { c.ValidAfter += 2 * hour; c.ValidBefore += 2 * hour }, "not valid now"},
		"it is a user's":           {ca, func(c *ssh.Certificate) { c.CertType = ssh.UserCert }, "is not a host's"},
		"it is of no type":         {ca, func(c *ssh.Certificate) { c.CertType = 3 }, "is not a host's"},
		"another authority signed": {another, nil, "signed by an unknown authority"},
		"it names nobody":          {ca, func(c *ssh.Certificate) { c.ValidPrincipals = nil }, "names no host"},
		"it is for another domain": {ca, func(c *ssh.Certificate) { c.ValidPrincipals[0] = "web1.example.com" }, "not in .example.org"},
		"its domain is a part of another's": {ca, func(c *ssh.Certificate) {
			c.ValidPrincipals[0] = "web1.notexample.org"
		}, "not in .example.org"},
		"it is for the domain itself":     {ca, func(c *ssh.Certificate) { c.ValidPrincipals[0] = "example.org" }, "not in .example.org"},
		"it is for nothing in the domain": {ca, func(c *ssh.Certificate) { c.ValidPrincipals[0] = ".example.org" }, "not in .example.org"},
		"only its second name is in the domain": {ca, func(c *ssh.Certificate) {
			c.ValidPrincipals = []string{"evil.example.com", "web1.example.org"}
		}, "not in .example.org"},
		"it has the critical option source-address": {ca, func(c *ssh.Certificate) {
			c.CriticalOptions = map[string]string{"source-address": "0.0.0.0/0"}
		}, "critical options"},
		"it has a critical option that nobody knows": {ca, func(c *ssh.Certificate) {
			c.CriticalOptions = map[string]string{"confined-to@example.org": "nothing"}
		}, "critical options"},
		"its authority signed with SHA-1": {sha1Signer{rsaCA}, nil, "SHA-1"},
	} {
		t.Run(why, func(t *testing.T) {
			h := newHost(t, c.ca, "ecdsa", c.change)
			_, err := judge.Judge(t.Context(), payloadOf(t, h.cert.Marshal()), nobody)
			if !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error is %v, want %q", err, c.says)
			}
		})
	}
	for why, bend := range map[string]func(*ssh.Certificate){
		"a name was changed after signing": func(c *ssh.Certificate) { c.ValidPrincipals = []string{"web2.example.org"} },
		"its time was changed":             func(c *ssh.Certificate) { c.ValidBefore += hour },
		"its key was changed":              func(c *ssh.Certificate) { _, other := newKey(t, "ecdsa"); c.Key = other.PublicKey() },
		"its signature is bent":            func(c *ssh.Certificate) { c.Signature.Blob[10] ^= 1 },
		"its signature is empty":           func(c *ssh.Certificate) { c.Signature.Blob = nil },
		"its signature is of another kind": func(c *ssh.Certificate) { c.Signature.Format = ssh.KeyAlgoRSASHA256 },
	} {
		t.Run(why, func(t *testing.T) {
			h := newHost(t, ca, "ecdsa", nil)
			bend(h.cert)
			_, err := judge.Judge(t.Context(), payloadOf(t, h.cert.Marshal()), nobody)
			if !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("error is %v", err)
			}
		})
	}
	for why, key := range map[string]ssh.PublicKey{"a DSA key": dsaKey(t), "an RSA key of 1024 bits": smallRSA(t)} {
		t.Run(why, func(t *testing.T) {
			h := newHost(t, ca, "ecdsa", func(c *ssh.Certificate) { c.Key = key })
			if _, err := judge.Judge(t.Context(), payloadOf(t, h.cert.Marshal()), nobody); !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("error is %v", err)
			}
		})
	}
	t.Run("a certificate that another certificate's key signed", func(t *testing.T) {
		// The authority's certificate for a host makes no authority of the host.
		between := newHost(t, ca, "ecdsa", nil)
		h := newHost(t, between.signer, "ecdsa", nil)
		if _, err := judge.Judge(t.Context(), payloadOf(t, h.cert.Marshal()), nobody); !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
	})
}

var errAsked = errors.New("asked")

func nobody(context.Context, []byte) ([]byte, error) { return nil, errAsked }

// sha1Signer signs as old authorities do.
type sha1Signer struct{ ssh.Signer }

func (s sha1Signer) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	return s.Signer.(ssh.AlgorithmSigner).SignWithAlgorithm(rand.Reader, data, ssh.KeyAlgoRSA)
}

func dsaKey(t *testing.T) ssh.PublicKey {
	t.Helper()
	// Parameters from FIPS 186's examples are not needed: a key of the form is.
	var key dsa.PrivateKey
	if err := dsa.GenerateParameters(&key.Parameters, rand.Reader, dsa.L1024N160); err != nil {
		t.Fatal(err)
	}
	if err := dsa.GenerateKey(&key, rand.Reader); err != nil {
		t.Fatal(err)
	}
	public, err := ssh.NewPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return public
}

func smallRSA(t *testing.T) ssh.PublicKey {
	t.Helper()
	t.Setenv("GODEBUG", "rsa1024min=0")
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	public, err := ssh.NewPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return public
}

func TestForgedAnswerIsRefused(t *testing.T) {
	_, ca := newKey(t, "ed25519")
	h := newHost(t, ca, "ecdsa", nil)
	payload, answer := openNode(t, h)
	judge := openJudge(t, &sshpop.ServerConfig{CertAuthorities: []string{line(ca)}})
	tamper := func(change func(*sshpop.Response)) attestor.Ask {
		return func(ctx context.Context, challenge []byte) ([]byte, error) {
			said, err := answer(ctx, challenge)
			if err != nil {
				return nil, err
			}
			var r sshpop.Response
			if err := json.Unmarshal(said, &r); err != nil {
				return nil, err
			}
			change(&r)
			return json.Marshal(r)
		}
	}
	var recorded []byte
	_, err := judge.Judge(t.Context(), payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
		said, err := answer(ctx, challenge)
		recorded = slices.Clone(said)
		return said, err
	})
	if err != nil {
		t.Fatal(err)
	}
	_, other := newKey(t, "ecdsa")
	// signedOver answers with a nonce of its own, and what is signed is over that.
	signedOver := func(signer ssh.Signer, nonce []byte) attestor.Ask {
		return func(_ context.Context, challenge []byte) ([]byte, error) {
			var c sshpop.Challenge
			if err := json.Unmarshal(challenge, &c); err != nil {
				return nil, err
			}
			digest := sha256.Sum256(append(c.Nonce, nonce...))
			s, err := signer.Sign(rand.Reader, digest[:])
			if err != nil {
				return nil, err
			}
			return json.Marshal(sshpop.Response{Nonce: nonce, Signature: s})
		}
	}
	if _, err := judge.Judge(t.Context(), payload, signedOver(h.signer, make([]byte, sshpop.NonceSize))); err != nil {
		t.Fatalf("the host key's own signature: %v", err)
	}
	for why, ask := range map[string]attestor.Ask{
		"no signature":           tamper(func(r *sshpop.Response) { r.Signature = nil }),
		"an empty signature":     tamper(func(r *sshpop.Response) { r.Signature.Blob = nil }),
		"a bent signature":       tamper(func(r *sshpop.Response) { r.Signature.Blob[12] ^= 1 }),
		"a huge signature":       tamper(func(r *sshpop.Response) { r.Signature.Blob = make([]byte, 20<<10) }),
		"bytes after it":         tamper(func(r *sshpop.Response) { r.Signature.Rest = []byte{1} }),
		"another kind":           tamper(func(r *sshpop.Response) { r.Signature.Format = ssh.KeyAlgoED25519 }),
		"another nonce":          tamper(func(r *sshpop.Response) { r.Nonce[0] ^= 1 }),
		"a short nonce":          tamper(func(r *sshpop.Response) { r.Nonce = r.Nonce[:16] }),
		"no nonce":               tamper(func(r *sshpop.Response) { r.Nonce = nil }),
		"an answer of yesterday": func(context.Context, []byte) ([]byte, error) { return recorded, nil },
		"the authority's signature": tamper(func(r *sshpop.Response) {
			r.Signature = h.cert.Signature
		}),
		"another key's":                signedOver(other, make([]byte, sshpop.NonceSize)),
		"a short nonce that is signed": signedOver(h.signer, make([]byte, sshpop.NonceSize-1)),
		"a long nonce that is signed":  signedOver(h.signer, make([]byte, sshpop.NonceSize+1)),
		"no nonce, and that is signed": signedOver(h.signer, nil),
	} {
		t.Run(why, func(t *testing.T) {
			if _, err := judge.Judge(t.Context(), payload, ask); !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func TestSignatureThatIsNoneIsNotVerified(t *testing.T) {
	_, ca := newKey(t, "ed25519")
	payload, _ := openNode(t, newHost(t, ca, "ecdsa", nil))
	judge := openJudge(t, &sshpop.ServerConfig{CertAuthorities: []string{line(ca)}})
	for why, signature := range map[string]*ssh.Signature{
		"none":           nil,
		"an empty one":   {Format: ssh.KeyAlgoECDSA256},
		"one too long":   {Format: ssh.KeyAlgoECDSA256, Blob: make([]byte, sshpop.MaxSignature+1)},
		"bytes after it": {Format: ssh.KeyAlgoECDSA256, Blob: make([]byte, 70), Rest: []byte{1}},
	} {
		answer, err := json.Marshal(sshpop.Response{Nonce: make([]byte, sshpop.NonceSize), Signature: signature})
		if err != nil {
			t.Fatal(err)
		}
		_, err = judge.Judge(t.Context(), payload, func(context.Context, []byte) ([]byte, error) { return answer, nil })
		if !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "no signature that is one") {
			t.Errorf("%s: error is %v", why, err)
		}
	}
}

func TestMessagesAreSPIREs(t *testing.T) {
	for want, message := range map[string]any{
		`{"Certificate":"AQID"}`: sshpop.Evidence{Certificate: []byte{1, 2, 3}},
		`{"Nonce":"AQID"}`:       sshpop.Challenge{Nonce: []byte{1, 2, 3}},
		`{"Nonce":"AQ==","Signature":{"Format":"f","Blob":"Ag==","Rest":null}}`: sshpop.Response{
			Nonce: []byte{1}, Signature: &ssh.Signature{Format: "f", Blob: []byte{2}},
		},
	} {
		if got, err := json.Marshal(message); err != nil || string(got) != want {
			t.Errorf("message is %s, want %s", got, want)
		}
	}
	t.Run("a SPIRE agent's RSA key signs with SHA-1", func(t *testing.T) {
		_, ca := newKey(t, "ed25519")
		h := newHost(t, ca, "rsa", nil)
		judge := openJudge(t, &sshpop.ServerConfig{CertAuthorities: []string{line(ca)}})
		_, err := judge.Judge(t.Context(), payloadOf(t, h.cert.Marshal()), func(_ context.Context, challenge []byte) ([]byte, error) {
			var c sshpop.Challenge
			if err := json.Unmarshal(challenge, &c); err != nil {
				return nil, err
			}
			nonce := make([]byte, sshpop.NonceSize)
			digest, err := sshpop.Digest(c.Nonce, nonce)
			if err != nil {
				return nil, err
			}
			s, err := h.signer.Sign(rand.Reader, digest)
			if err != nil || s.Format != ssh.KeyAlgoRSA {
				return nil, fmt.Errorf("not SHA-1: %w", err)
			}
			return json.Marshal(sshpop.Response{Nonce: nonce, Signature: s})
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func TestAgentPathTemplate(t *testing.T) {
	_, ca := newKey(t, "ed25519")
	h := newHost(t, ca, "ecdsa", func(c *ssh.Certificate) { c.KeyId = "../x509pop/0123" })
	payload, answer := openNode(t, h)
	for template, want := range map[string]string{
		"/{{ .PluginName}}/{{ .Hostname }}":    "sshpop/web1",
		"static/{{ index .ValidPrincipals 0}}": "static/web1.example.org",
		"sshpop/{{ .Serial }}":                 "sshpop/7",
	} {
		judge := openJudge(t, &sshpop.ServerConfig{CertAuthorities: []string{line(ca)}, CanonicalDomain: "example.org", AgentPathTemplate: template})
		proof, err := judge.Judge(t.Context(), payload, answer)
		if err != nil || proof.Path != want {
			t.Errorf("%s: path %q, %v; want %q", template, proof.Path, err, want)
		}
	}
	judge := openJudge(t, &sshpop.ServerConfig{CertAuthorities: []string{line(ca)}, AgentPathTemplate: "sshpop/{{ .KeyId }}"})
	if proof, err := judge.Judge(t.Context(), payload, answer); !errors.Is(err, attestor.ErrEvidence) {
		t.Errorf("a key ID shapes the path to %q: %v", proof.Path, err)
	}
}

func TestConfigurationIsRefused(t *testing.T) {
	_, ca := newKey(t, "ed25519")
	h := newHost(t, ca, "ecdsa", nil)
	file := filepath.Join(t.TempDir(), "cas")
	if err := os.WriteFile(file, []byte("# ours\n\n"+line(ca)+"\nnot a key\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for why, c := range map[string]struct {
		config sshpop.ServerConfig
		says   string
	}{
		"no authority":                         {sshpop.ServerConfig{}, "cert_authorities or cert_authorities_path"},
		"a line that is none":                  {sshpop.ServerConfig{CertAuthorities: []string{line(ca), "x"}}, "number 2"},
		"two lines in one":                     {sshpop.ServerConfig{CertAuthorities: []string{line(ca) + "\n" + line(ca)}}, "more than one line"},
		"a certificate":                        {sshpop.ServerConfig{CertAuthorities: []string{string(ssh.MarshalAuthorizedKey(h.cert))}}, "key is neither"},
		"options":                              {sshpop.ServerConfig{CertAuthorities: []string{"no-pty " + line(ca)}}, "options"},
		"a file that is not there":             {sshpop.ServerConfig{CertAuthoritiesPath: "/nowhere"}, "/nowhere"},
		"a file with a line that is none":      {sshpop.ServerConfig{CertAuthoritiesPath: file}, file + ":4"},
		"a template that cannot be understood": {sshpop.ServerConfig{CertAuthorities: []string{line(ca)}, AgentPathTemplate: "{{"}, "agent_path_template"},
	} {
		if _, err := server.Kind().Open(&c.config, attestor.Needs{}); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", why, err)
		}
	}
	other := newHost(t, ca, "ecdsa", nil)
	for why, c := range map[string]struct {
		config sshpop.AgentConfig
		says   string
	}{
		"another host's key":       {sshpop.AgentConfig{HostKeyPath: other.key, HostCertPath: h.path}, "does not belong"},
		"a key for a certificate":  {sshpop.AgentConfig{HostKeyPath: h.key, HostCertPath: h.key}, "OpenSSH's form"},
		"a certificate for a key":  {sshpop.AgentConfig{HostKeyPath: h.path, HostCertPath: h.path}, "no private key"},
		"a file that is not there": {sshpop.AgentConfig{HostKeyPath: "/nowhere", HostCertPath: h.path}, "/nowhere"},
	} {
		if _, err := node.Kind().Open(&c.config, attestor.Needs{}); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", why, err)
		}
	}
}

func FuzzCertificate(f *testing.F) {
	_, ca := newKey(f, "ed25519")
	for _, kind := range []string{"ecdsa", "ed25519"} {
		f.Add(newHost(f, ca, kind, nil).cert.Marshal())
	}
	f.Add([]byte{})
	judge := openJudge(f, &sshpop.ServerConfig{CertAuthorities: []string{line(ca)}})
	f.Fuzz(func(t *testing.T, wire []byte) {
		_, err := judge.Judge(t.Context(), payloadOf(t, wire), nobody)
		if !errors.Is(err, attestor.ErrEvidence) && !errors.Is(err, errAsked) {
			t.Fatal(err)
		}
	})
}
