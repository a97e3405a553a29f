package external_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	block "github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/upstream/external"
	"github.com/assay-id/assay/server/ca/upstream/upstreamtest"
	"github.com/assay-id/assay/test/fake/spireplugin"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestMain(m *testing.M) {
	spireplugin.RunIfAsked()
	os.Exit(m.Run())
}

func open(t *testing.T, mode string) *external.Authority {
	t.Helper()
	path, sum := spireplugin.Self(t)
	log := logrus.New()
	log.SetOutput(io.Discard)
	a, err := external.Open(&block.Config{
		Name: "corporate", Cmd: path, Args: spireplugin.Args(spireplugin.Upstream), Env: spireplugin.Env(), Checksum: fmt.Sprintf("%x", sum),
		Data: fmt.Sprintf("mode = %q\ndirectory = %q", mode, t.TempDir()),
	}, attestor.Needs{TrustDomain: upstreamtest.TD, Log: log, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

func TestSuite(t *testing.T) {
	upstreamtest.Run(t, open(t, "bundle"), upstreamtest.Options{Bundle: true})
}

func sign(t *testing.T, a *external.Authority) (*upstream.Checked, error) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Organization: []string{"SPIFFE"}}, URIs: []*url.URL{upstreamtest.TD.ID().URL()},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), upstream.Patience)
	defer cancel()
	signed, err := a.Sign(ctx, upstream.Request{CSR: csr, TTL: time.Hour, Now: time.Now()})
	if err != nil {
		return nil, err
	}
	return upstream.Check(signed, key, upstreamtest.TD, time.Now())
}

func TestLies(t *testing.T) {
	for _, c := range []struct{ mode, want string }{
		{"other-key", "answer of the upstream authority is refused"},
		{"other-domain", "answer of the upstream authority is refused"},
		{"no-ca", "is no CA certificate"},
		{"expired", "has expired at"},
		{"constrained", "nobody would accept what its certificate signs"},
		{"huge", "received message larger than max"},
		{"other-root", "leads to none of its root certificates"},
		{"no-chain", "it contains no certificate"},
		{"no-roots", "it contains no root certificate"},
		{"garbage", "its chain: certificate 1"},
		{"many", "301 certificates, the limit is 100"},
		{"silent", "it ended without an answer"},
		{"error", "it went wrong in"},
		{"crash", "plugin has ended"},
	} {
		t.Run(c.mode, func(t *testing.T) {
			if _, err := sign(t, open(t, c.mode)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	t.Run("one that hangs costs the patience of who asks, no more", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := open(t, "hang").Sign(ctx, upstream.Request{TTL: time.Hour, Now: time.Now()}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// follow returns what Follow hands over, and ends it with the test.
func follow(t *testing.T, a *external.Authority) <-chan upstream.Bundle {
	t.Helper()
	bundles, ended := make(chan upstream.Bundle), make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(ended)
		_ = a.Follow(ctx, func(b upstream.Bundle) {
			select {
			case bundles <- b:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return bundles
}

func next(t *testing.T, from <-chan upstream.Bundle) upstream.Bundle {
	t.Helper()
	select {
	case b := <-from:
		return b
	case <-time.After(time.Minute):
		t.Fatal("no bundle")
		panic("unreachable")
	}
}

func TestFollow(t *testing.T) {
	t.Run("roots that are made known later come in addition", func(t *testing.T) {
		a := open(t, "subscribe")
		bundles := follow(t, a)
		first, err := sign(t, a)
		if err != nil {
			t.Fatal(err)
		}
		b := next(t, bundles)
		if !b.Partial || len(b.X509) != 1 || b.X509[0].Certificate.Equal(first.Root) {
			t.Errorf("got %+v", b)
		}
		if _, err := upstream.CheckBundle(b, time.Now()); err != nil {
			t.Error(err)
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.PublishJWT(t.Context(), identity.JWTAuthority{KeyID: "k", Key: key.Public(), ExpiresAt: time.Now().Add(time.Hour)}); err != nil {
			t.Fatal(err)
		}
		if b := next(t, bundles); len(b.JWT) != 1 || b.JWT[0].KeyID != "k" || len(b.X509) != 1 {
			t.Errorf("got %+v", b)
		}
	})
	t.Run("the bundle of a plugin that publishes it is all there is", func(t *testing.T) {
		b := next(t, follow(t, open(t, "bundle")))
		if b.Partial || len(b.X509) != 1 {
			t.Errorf("got %+v", b)
		}
	})
	t.Run("nothing is followed of one that says nothing, and it publishes no JWT keys", func(t *testing.T) {
		a := open(t, "")
		if _, err := sign(t, a); err != nil {
			t.Fatal(err)
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.PublishJWT(t.Context(), identity.JWTAuthority{KeyID: "k", Key: key.Public()}); !errors.Is(err, upstream.ErrNoJWT) {
			t.Errorf("got %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := a.Follow(ctx, func(b upstream.Bundle) { t.Errorf("got %+v", b) }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}
