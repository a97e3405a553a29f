package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestWhatIsSignedLivesNoLongerThanItsEntryAndTheVerdicts(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct{ entry, grant, want time.Duration }{ // 0: without an end
		{0, 0, 0}, {0, time.Hour, time.Hour}, {time.Hour, 0, time.Hour}, {time.Hour, time.Minute, time.Minute}, {time.Minute, time.Hour, time.Minute},
	} {
		p := &permitted{entry: &identity.Entry{}}
		if c.entry > 0 {
			p.entry.ExpiresAt = now.Add(c.entry)
		}
		if got := p.most(c.grant, now); got != c.want {
			t.Errorf("of an entry for %s and verdicts for %s: %s, want %s", c.entry, c.grant, got, c.want)
		}
	}
}

// forgetful judges images, and cannot write down what was issued.
type forgetful struct{ Evidence }

func (forgetful) Issued(_ context.Context, serials ...records.Serial) []error {
	errs := make([]error, len(serials))
	for n := range errs {
		errs[n] = errors.New("disk full")
	}
	return errs
}

func TestWhatCouldNotBeRevokedDoesNotLeave(t *testing.T) {
	gate := attestor.Selector{Type: "scan", Value: "policy:prod"}
	uid := attestor.Selector{Type: "unix", Value: "uid:1"}
	entry := func(id string, selectors ...attestor.Selector) *identity.Entry {
		return &identity.Entry{ID: id, SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/" + id), Selectors: attestor.NewSet(selectors...)}
	}
	picture := &view.AgentPicture{
		Entries: []*identity.Entry{entry("gated", uid, gate), entry("plain", uid)},
		Verdicts: []*records.Verdict{{
			Digest: "sha256:" + strings.Repeat("a", 64), Seq: 1, TTL: time.Minute, JWTTTL: time.Minute, Selectors: attestor.NewSet(gate),
		}},
	}
	csr := request(t)
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	r := &racing{now: picture, then: picture}
	s := &svidService{api: New(Parts{View: r, CA: r, Evidence: forgetful{}}, Config{Log: silent})}
	for id, want := range map[string]codes.Code{"plain": codes.OK, "gated": codes.Internal} {
		resp, err := s.BatchNewX509SVID(caller.NewContext(t.Context(), &caller.Caller{}), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: id, Csr: csr}}})
		if err != nil {
			t.Fatal(err)
		}
		if got := resp.GetResults()[0]; codes.Code(got.GetStatus().GetCode()) != want || (got.GetSvid() != nil) != (want == codes.OK) {
			t.Errorf("%s: %v, want %s", id, got, want)
		}
	}
}

// request is a certificate request that says nothing but its key.
func request(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}
