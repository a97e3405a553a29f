package aws_test

import (
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/server/ca/aws"
	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/keys/awskms"
	"github.com/assay-id/assay/server/ca/keys/keystest"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/upstream/awspca"
	"github.com/assay-id/assay/server/ca/upstream/upstreamtest"
	fake "github.com/assay-id/assay/test/fake/awskeys"
)

func client(t *testing.T, s *fake.Server, service aws.Service, secret string) *aws.Client {
	t.Helper()
	c, err := aws.New(t.Context(), service, aws.Config{Region: s.Region, Endpoint: s.URL, AccessKeyID: s.KeyID, SecretAccessKey: secret, HTTP: s.Client()})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestKMS(t *testing.T) {
	servers := map[keys.Manager]*fake.Server{}
	open := func(t *testing.T, s *fake.Server) keys.Manager {
		m := awskms.New(client(t, s, aws.KMS, s.Secret), awskms.Config{})
		servers[m] = s
		return m
	}
	keystest.Run(t, keystest.Options{
		Open:   func(t *testing.T) keys.Manager { return open(t, fake.New(t)) },
		Reopen: func(t *testing.T, m keys.Manager) keys.Manager { return open(t, servers[m]) },
	})
	t.Run("a key without its alias is not left behind", func(t *testing.T) {
		s := fake.New(t)
		m := open(t, s)
		s.Answer = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".CreateAlias") {
				return false
			}
			w.WriteHeader(http.StatusBadRequest)
			_, _ = w.Write([]byte(`{"__type":"LimitExceededException","message":"too many"}`))
			return true
		}
		if _, err := m.Generate(t.Context(), "a", keys.EC256); err == nil || !strings.Contains(err.Error(), "LimitExceededException: too many") {
			t.Errorf("got %v", err)
		}
		if n := s.Live(); n != 0 {
			t.Errorf("%d keys are left", n)
		}
	})
}

func TestPCA(t *testing.T) {
	s := fake.New(t)
	upstreamtest.Run(t, awspca.New(client(t, s, aws.PCA, s.Secret), awspca.Config{ARN: s.ARN}), upstreamtest.Options{})
	t.Run("an authority that is not in use is not asked to sign", func(t *testing.T) {
		s := fake.New(t)
		s.Answer = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".DescribeCertificateAuthority") {
				t.Errorf("it is asked for %s", r.Header.Get("X-Amz-Target"))
			}
			_, _ = w.Write([]byte(`{"CertificateAuthority":{"Status":"DISABLED","CertificateAuthorityConfiguration":{"SigningAlgorithm":"SHA256WITHECDSA"}}}`))
			return true
		}
		a := awspca.New(client(t, s, aws.PCA, s.Secret), awspca.Config{ARN: s.ARN})
		if _, err := a.Sign(t.Context(), upstream.Request{}); err == nil || !strings.Contains(err.Error(), `is "DISABLED", and not ACTIVE`) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a supplemental bundle that is none is an error", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "roots.pem")
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		a := awspca.New(client(t, s, aws.PCA, s.Secret), awspca.Config{ARN: s.ARN, SupplementalBundlePath: path})
		if _, err := a.Sign(t.Context(), upstream.Request{}); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("got %v", err)
		}
	})
}

func TestLyingPCA(t *testing.T) {
	upstreamtest.RunLies(t, func(t *testing.T, lie func(crypto.PublicKey) upstreamtest.Lie) upstream.Authority {
		s := fake.New(t)
		var mu sync.Mutex // guards told
		var told upstreamtest.Lie
		s.Answer = func(w http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			switch _, operation, _ := strings.Cut(r.Header.Get("X-Amz-Target"), "."); operation {
			case "IssueCertificate":
				var in struct{ Csr []byte }
				if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
					t.Error(err)
				}
				told = lie(upstreamtest.Public(t, in.Csr))
				_ = json.NewEncoder(w).Encode(map[string]any{"CertificateArn": s.ARN + "/certificate/1"})
			case "GetCertificate":
				switch {
				case told.Hang:
					_, _ = io.Copy(io.Discard, r.Body) // or nobody notices that the caller has left
					<-r.Context().Done()
					panic(http.ErrAbortHandler) // an empty answer may still get there
				case told.Text == "":
					told.Text = upstreamtest.PEM(told.Chain[0])
				}
				above := append(told.Chain[min(1, len(told.Chain)):], told.Roots...)
				_ = json.NewEncoder(w).Encode(map[string]any{"Certificate": told.Text, "CertificateChain": upstreamtest.PEM(above...)})
			default:
				return false
			}
			return true
		}
		return awspca.New(client(t, s, aws.PCA, s.Secret), awspca.Config{ARN: s.ARN})
	})
}

func TestHostile(t *testing.T) {
	t.Run("who has another secret is refused, and does not tell it", func(t *testing.T) {
		s := fake.New(t)
		_, err := awskms.New(client(t, s, aws.KMS, "hunter2"), awskms.Config{}).List(t.Context())
		if !aws.Is(err, "InvalidSignatureException") || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("got %v", err)
		}
	})
	for name, c := range map[string]struct{ answer, want string }{
		"a huge answer": {`{"Aliases":["` + strings.Repeat("a", 2<<20) + `"]}`, "is over 1048576 bytes long"},
		"no JSON":       {"<html>", "is not understood"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			s := fake.New(t)
			s.Answer = func(w http.ResponseWriter, _ *http.Request) bool { _, _ = w.Write([]byte(c.answer)); return true }
			if _, err := awskms.New(client(t, s, aws.KMS, s.Secret), awskms.Config{}).List(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	t.Run("one that fails for a moment is asked again", func(t *testing.T) {
		s := fake.New(t)
		asked := 0
		s.Answer = func(w http.ResponseWriter, _ *http.Request) bool {
			if asked++; asked > 1 {
				return false
			}
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		if _, err := awskms.New(client(t, s, aws.KMS, s.Secret), awskms.Config{}).List(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("keys have the tags that are wished for", func(t *testing.T) {
		s := fake.New(t)
		m := awskms.New(client(t, s, aws.KMS, s.Secret), awskms.Config{Tags: map[string]string{"team": "pki", "cost-centre": "42"}})
		if _, err := m.Generate(t.Context(), "a", keys.EC256); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(map[string]string{"team": "pki", "cost-centre": "42"}, s.Tags("alias/assay-a")); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("a bent signature does not leave", func(t *testing.T) {
		s := fake.New(t)
		key, err := awskms.New(client(t, s, aws.KMS, s.Secret), awskms.Config{}).Generate(t.Context(), "a", keys.EC256)
		if err != nil {
			t.Fatal(err)
		}
		s.Answer = func(w http.ResponseWriter, _ *http.Request) bool {
			_, _ = w.Write([]byte(`{"Signature":"MAYCAQECAQE="}`))
			return true
		}
		digest := sha256.Sum256(nil)
		if _, err := key.Sign(nil, digest[:], crypto.SHA256); err == nil || !strings.Contains(err.Error(), "no signature by that key") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("plain http is refused", func(t *testing.T) {
		if _, err := aws.New(t.Context(), aws.KMS, aws.Config{Region: "x", Endpoint: "http://kms.example.org"}); err == nil {
			t.Error("no error")
		}
	})
}
