package x509pop_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/x509pop"
	"github.com/assay-id/assay/attestor/x509pop/node"
	"github.com/assay-id/assay/attestor/x509pop/server"
)

const serverConfig = `ca_bundle_path = "testdata/real-root.pem"`

func nodeConfig(kind string) string {
	return fmt.Sprintf(`
		private_key_path   = "testdata/real-%[1]s.key"
		certificate_path   = "testdata/real-%[1]s.pem"
		intermediates_path = "testdata/real-intermediate.pem"`, kind)
}

func readCert(t testing.TB, path string) *x509.Certificate {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// forged reads the evidence with one flaw each; the file's name is the flaw.
func forged(t testing.TB) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob("testdata/forged/*.json")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no forged evidence: %v", err)
	}
	all := make(map[string][]byte)
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimSuffix(filepath.Base(path), ".json")] = text
	}
	return all
}

func TestSuite(t *testing.T) {
	authorities := []string{
		"x509pop:ca:fingerprint:" + x509pop.Fingerprint(readCert(t, "testdata/real-root.pem")),
		"x509pop:ca:fingerprint:" + x509pop.Fingerprint(readCert(t, "testdata/real-intermediate.pem")),
	}
	for kind, own := range map[string][]string{
		"ecdsa": {
			"x509pop:san:datacenter:us-east-1", "x509pop:san:rack:7/left",
			"x509pop:serialnumber:a1b2c3", "x509pop:subject:cn:web1",
		},
		"rsa": {"x509pop:serialnumber:0a1b2c3d4e5f", "x509pop:subject:cn:web2"},
	} {
		t.Run(kind, func(t *testing.T) {
			foreign := forged(t)
			foreign["join token"] = []byte("0f7ba2b4-5a6e-4f5e-8d33-2f54a3f2f8f1")
			attestortest.Run(t, attestortest.Pair{
				Node: node.Kind(), Judge: server.Kind(),
				NodeConfig: nodeConfig(kind), JudgeConfig: serverConfig,
				Path:        "x509pop/" + x509pop.Fingerprint(readCert(t, "testdata/real-"+kind+".pem")),
				Selectors:   slices.Sorted(slices.Values(slices.Concat(authorities, own))),
				CanReattest: true,
				Foreign:     foreign,
				README:      "README.md",
			})
		})
	}
}

func openJudge(t testing.TB, now time.Time, bundles ...string) attestor.Judge {
	t.Helper()
	judge, err := server.Kind().Open(&x509pop.ServerConfig{CABundlePaths: bundles}, attestor.Needs{
		TrustDomain: attestortest.TrustDomain, Now: func() time.Time { return now },
	})
	if err != nil {
		t.Fatal(err)
	}
	return judge
}

func openNode(t *testing.T, kind string) ([]byte, attestor.Ask) {
	t.Helper()
	payload, answer, err := attestortest.OpenNode(t, node.Kind(), nodeConfig(kind), attestor.Needs{}).Evidence(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return payload, answer
}

func TestMessagesAreSPIREs(t *testing.T) {
	t.Run("the field that is not used is null", func(t *testing.T) {
		message, err := json.Marshal(x509pop.Challenge{RSA: &x509pop.Nonce{Nonce: []byte{1, 2, 3}}})
		if want := `{"rsa_signature":{"nonce":"AQID"},"ecdsa_signature":null}`; err != nil || string(message) != want {
			t.Errorf("challenge is %s, want %s", message, want)
		}
		message, err = json.Marshal(x509pop.Response{ECDSA: &x509pop.ECDSASignature{Nonce: []byte{1}, R: []byte{2}, S: []byte{3}}})
		if want := `{"rsa_signature":null,"ecdsa_signature":{"nonce":"AQ==","r":"Ag==","s":"Aw=="}}`; err != nil || string(message) != want {
			t.Errorf("response is %s, want %s", message, want)
		}
	})
	t.Run("a message with fields of a later version is read", func(t *testing.T) {
		var c x509pop.Challenge
		if err := attestor.Decode([]byte(`{"ecdsa_signature":{"nonce":"AQID","x":1},"later":{}}`), &c); err != nil || c.ECDSA == nil {
			t.Errorf("%v, %v", c, err)
		}
	})
}

func TestJudge(t *testing.T) {
	now := time.Now()
	payload, answer := openNode(t, "ecdsa")
	judge := openJudge(t, now, "testdata/real-root.pem")
	tamper := func(change func(*x509pop.Response)) attestor.Ask {
		return func(ctx context.Context, challenge []byte) ([]byte, error) {
			said, err := answer(ctx, challenge)
			if err != nil {
				return nil, err
			}
			var r x509pop.Response
			if err := json.Unmarshal(said, &r); err != nil {
				return nil, err
			}
			change(&r)
			return json.Marshal(r)
		}
	}
	for why, change := range map[string]func(*x509pop.Response){
		"r is zero":          func(r *x509pop.Response) { r.ECDSA.R = nil },
		"both are zero":      func(r *x509pop.Response) { r.ECDSA.R, r.ECDSA.S = []byte{0}, []byte{0} },
		"s is huge":          func(r *x509pop.Response) { r.ECDSA.S = bytes.Repeat([]byte{0xff}, 4096) },
		"another nonce":      func(r *x509pop.Response) { r.ECDSA.Nonce[0] ^= 1 },
		"a short nonce":      func(r *x509pop.Response) { r.ECDSA.Nonce = r.ECDSA.Nonce[:16] },
		"no nonce":           func(r *x509pop.Response) { r.ECDSA.Nonce = nil },
		"a bent signature":   func(r *x509pop.Response) { r.ECDSA.R[3] ^= 1 },
		"answered as RSA":    func(r *x509pop.Response) { r.RSA, r.ECDSA = &x509pop.RSASignature{Nonce: r.ECDSA.Nonce}, nil },
		"answered as both":   func(r *x509pop.Response) { r.RSA = &x509pop.RSASignature{} },
		"answered as nobody": func(r *x509pop.Response) { r.ECDSA = nil },
	} {
		t.Run("an answer is refused: "+why, func(t *testing.T) {
			if _, err := judge.Judge(t.Context(), payload, tamper(change)); !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("error is %v", err)
			}
		})
	}
	t.Run("a signature by another key of the same kind is refused", func(t *testing.T) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		_, err = judge.Judge(t.Context(), payload, func(_ context.Context, challenge []byte) ([]byte, error) {
			var c x509pop.Challenge
			if err := json.Unmarshal(challenge, &c); err != nil {
				return nil, err
			}
			nonce := make([]byte, x509pop.NonceSize)
			digest, err := x509pop.Digest(c.ECDSA.Nonce, nonce)
			if err != nil {
				return nil, err
			}
			r, s, err := ecdsa.Sign(rand.Reader, key, digest)
			if err != nil {
				return nil, err
			}
			return json.Marshal(x509pop.Response{ECDSA: &x509pop.ECDSASignature{Nonce: nonce, R: r.Bytes(), S: s.Bytes()}})
		})
		if !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("the server's nonce is fresh each time", func(t *testing.T) {
		seen := make(map[string]bool)
		for range 3 {
			_, _ = judge.Judge(t.Context(), payload, func(_ context.Context, challenge []byte) ([]byte, error) {
				seen[string(challenge)] = true
				return nil, errors.New("enough")
			})
		}
		if len(seen) != 3 {
			t.Errorf("%d different challenges, want 3", len(seen))
		}
	})
	t.Run("the clock is the server's", func(t *testing.T) {
		_, err := openJudge(t, now.AddDate(200, 0, 0), "testdata/real-root.pem").Judge(t.Context(), payload, answer)
		if !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "not valid now") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("refusals name nothing out of the evidence", func(t *testing.T) {
		_, err := judge.Judge(t.Context(), forged(t)["signed-by-another-root"], answer)
		if err == nil || err.Error() != "verify certificate: signed by an unknown authority" {
			t.Errorf("error is %v", err)
		}
	})
}

// authority is a test CA that signs what openssl would refuse to.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	path string
}

func newAuthority(t testing.TB) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "root.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return authority{cert, key, path}
}

// sign returns evidence of one leaf.
func (a authority) sign(t testing.TB, public any, change func(*x509.Certificate)) []byte {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: a.cert.NotBefore, NotAfter: a.cert.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(x509pop.Evidence{Certificates: [][]byte{der}})
	if err != nil {
		t.Fatal(err)
	}
	return payload
}

func TestCostIsBounded(t *testing.T) {
	ca := newAuthority(t)
	judge := openJudge(t, time.Now(), ca.path)
	never := func(context.Context, []byte) ([]byte, error) {
		return nil, errors.New("challenged")
	}
	hugeRSA := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 9000), E: 65537}
	hugeRSA.N.Add(hugeRSA.N, big.NewInt(1))
	for why, payload := range map[string][]byte{
		"an RSA key of 9000 bits": ca.sign(t, hugeRSA, nil),
		"a thousand names": ca.sign(t, ca.key.Public(), func(c *x509.Certificate) {
			for i := range 1000 {
				c.DNSNames = append(c.DNSNames, fmt.Sprintf("n%d", i))
			}
		}),
		"a certificate of 20 KiB": ca.sign(t, ca.key.Public(), func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Value: make([]byte, 20<<10)}}
		}),
	} {
		t.Run(why+" is refused before it is verified", func(t *testing.T) {
			_, err := judge.Judge(t.Context(), payload, never)
			if !errors.Is(err, attestor.ErrEvidence) || !strings.HasPrefix(err.Error(), "read evidence: ") {
				t.Errorf("error is %v", err)
			}
		})
	}
	t.Run("a name that is no selector is left out", func(t *testing.T) {
		payload := ca.sign(t, ca.key.Public(), func(c *x509.Certificate) { c.Subject.CommonName = "a\x1b[2Jb" })
		proof, err := judge.Judge(t.Context(), payload, func(_ context.Context, challenge []byte) ([]byte, error) {
			var c x509pop.Challenge
			if err := json.Unmarshal(challenge, &c); err != nil {
				return nil, err
			}
			digest, err := x509pop.Digest(c.ECDSA.Nonce, c.ECDSA.Nonce)
			if err != nil {
				return nil, err
			}
			r, s, err := ecdsa.Sign(rand.Reader, ca.key, digest)
			if err != nil {
				return nil, err
			}
			return json.Marshal(x509pop.Response{ECDSA: &x509pop.ECDSASignature{Nonce: c.ECDSA.Nonce, R: r.Bytes(), S: s.Bytes()}})
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range proof.Selectors {
			if strings.HasPrefix(s.Value, "subject:") {
				t.Errorf("selector %q", s)
			}
		}
	})
}

func TestConfiguration(t *testing.T) {
	for why, c := range map[string]struct {
		config *x509pop.ServerConfig
		want   string
	}{
		"neither bundle":   {&x509pop.ServerConfig{}, "ca_bundle_path or ca_bundle_paths must be set"},
		"both bundles":     {&x509pop.ServerConfig{CABundlePath: "a", CABundlePaths: []string{"b"}}, "not both"},
		"a missing bundle": {&x509pop.ServerConfig{CABundlePath: "testdata/nothing"}, "no such file"},
		"a key for a CA":   {&x509pop.ServerConfig{CABundlePath: "testdata/real-rsa.key"}, "no PEM certificate"},
		"a leaf for a CA":  {&x509pop.ServerConfig{CABundlePath: "testdata/real-rsa.pem"}, "is not an authority's"},
	} {
		t.Run("the server refuses "+why, func(t *testing.T) {
			if _, err := server.Kind().Open(c.config, attestor.Needs{}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
	for why, c := range map[string]struct{ key, cert, more, want string }{
		"a missing key":        {"nothing", "real-rsa.pem", "", "no such file"},
		"somebody else's key":  {"real-ecdsa.key", "real-rsa.pem", "", "does not belong"},
		"a certificate as key": {"real-rsa.pem", "real-rsa.pem", "", "no PEM private key"},
		"a CA as certificate":  {"real-rsa.key", "real-root.pem", "", "not for digital signatures"},
		"missing links":        {"real-rsa.key", "real-rsa.pem", "nothing", "no such file"},
	} {
		t.Run("the agent refuses "+why, func(t *testing.T) {
			config := &x509pop.AgentConfig{PrivateKeyPath: "testdata/" + c.key, CertificatePath: "testdata/" + c.cert}
			if c.more != "" {
				config.IntermediatesPath = "testdata/" + c.more
			}
			if _, err := node.Kind().Open(config, attestor.Needs{}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
	t.Run("a renewed certificate is shown without a restart", func(t *testing.T) {
		dir := t.TempDir()
		install := func(kind string) {
			for _, ending := range []string{".pem", ".key"} {
				text, err := os.ReadFile("testdata/real-" + kind + ending)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, "node"+ending), text, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		install("rsa")
		n, err := node.Kind().Open(&x509pop.AgentConfig{
			PrivateKeyPath: filepath.Join(dir, "node.key"), CertificatePath: filepath.Join(dir, "node.pem"),
			IntermediatesPath: "testdata/real-intermediate.pem",
		}, attestor.Needs{})
		if err != nil {
			t.Fatal(err)
		}
		install("ecdsa")
		payload, answer, err := n.Evidence(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		proof, err := openJudge(t, time.Now(), "testdata/real-root.pem").Judge(t.Context(), payload, answer)
		if want := "x509pop/" + x509pop.Fingerprint(readCert(t, "testdata/real-ecdsa.pem")); err != nil || proof.Path != want {
			t.Errorf("path %q, %v; want %q", proof.Path, err, want)
		}
	})
}

func FuzzJudge(f *testing.F) {
	for _, payload := range forged(f) {
		f.Add(payload, []byte(`{"ecdsa_signature":{"nonce":"AQID","r":"AQ==","s":"AQ=="}}`))
	}
	judge := openJudge(f, time.Now(), "testdata/real-root.pem")
	f.Fuzz(func(t *testing.T, payload, said []byte) {
		_, err := judge.Judge(t.Context(), payload, func(context.Context, []byte) ([]byte, error) { return said, nil })
		if !errors.Is(err, attestor.ErrEvidence) {
			t.Fatalf("error is %v", err)
		}
	})
}
