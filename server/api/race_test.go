package api

import (
	"context"
	"crypto/x509"
	"io"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/server/wire/terms"
	"github.com/assay-id/assay/workloadapi/identity"
)

// racing is a view and a CA: the picture changes while the CA signs.
type racing struct {
	View
	CA
	now, then *view.AgentPicture
	issued    ca.WorkloadParams
	token     ca.JWTParams
}

func (r *racing) Agent(spiffeid.ID) *view.AgentPicture { return r.now }

func (r *racing) SignWorkload(_ context.Context, p ca.WorkloadParams) ([]*x509.Certificate, error) {
	r.issued, r.now = p, r.then
	return []*x509.Certificate{{SerialNumber: big.NewInt(7)}}, nil
}

func (r *racing) SignWIT(context.Context, ca.WITParams) (*identity.WITSVID, error) {
	return nil, ca.ErrNoWIT
}

func (r *racing) SignJWT(_ context.Context, p ca.JWTParams) (*identity.JWTSVID, error) {
	r.token, r.now = p, r.then
	return &identity.JWTSVID{ID: p.ID, Token: "token"}, nil
}

// turned is who judges images, and knows of a verdict that no picture shows yet.
type turned struct{ Evidence }

func (turned) Issued(_ context.Context, serials ...records.Serial) []error {
	errs := make([]error, len(serials))
	for n, one := range serials {
		if one.GetEntryId() == "turned" {
			errs[n] = verdict.ErrTurned
		}
	}
	return errs
}

// steady is racing without a change; many may use it at the same time.
type steady struct{ *racing }

func (steady) SignWorkload(context.Context, ca.WorkloadParams) ([]*x509.Certificate, error) {
	return []*x509.Certificate{{SerialNumber: big.NewInt(7)}}, nil
}

func TestAVerdictThatNoPictureShowsYetBeatsWhatIsBeingSigned(t *testing.T) {
	scan := attestor.Selector{Type: "scan", Value: "policy:prod"}
	entry := func(id string, selectors ...attestor.Selector) *identity.Entry {
		return &identity.Entry{ID: id, SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/" + id), Selectors: attestor.NewSet(selectors...)}
	}
	uid := attestor.Selector{Type: "unix", Value: "uid:1"}
	picture := &view.AgentPicture{
		Entries:  []*identity.Entry{entry("plain", uid), entry("stands", uid, scan), entry("turned", uid, scan)},
		Verdicts: []*records.Verdict{{Digest: "sha256:" + strings.Repeat("a", 64), Seq: 1, Selectors: attestor.NewSet(scan)}},
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	r := steady{&racing{now: picture}}
	s := &svidService{api: New(Parts{View: r, CA: r, Evidence: turned{}}, Config{Log: log})}
	req := new(svidv1.BatchNewX509SVIDRequest)
	for _, id := range []string{"turned", "plain", "stands", "turned"} {
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: request(t)})
	}
	resp, err := s.BatchNewX509SVID(caller.NewContext(t.Context(), &caller.Caller{}), req)
	if err != nil {
		t.Fatal(err)
	}
	for i, got := range resp.GetResults() {
		want := codes.OK
		if req.GetParams()[i].GetEntryId() == "turned" {
			want = codes.FailedPrecondition
		}
		if codes.Code(got.GetStatus().GetCode()) != want || (got.GetSvid() != nil) != (want == codes.OK) {
			t.Errorf("%s: %v, want %s", req.GetParams()[i].GetEntryId(), got, want)
		}
	}
}

// moved is a view that has not heard yet where an entry was moved, and the records that know.
type moved struct {
	View
	Records
	was, is *identity.Entry
	deleted bool
}

func (m *moved) Entry(string) (*identity.Entry, bool) { return m.was, true }

func (m *moved) DeleteEntriesIf(_ context.Context, _ []string, still func(*identity.Entry) bool) ([]error, kv.Rev, error) {
	if m.deleted = still(m.is); !m.deleted {
		return []error{records.ErrNotFound}, 0, nil
	}
	return []error{nil}, 0, nil
}

func TestAnEntryThatLeavesARolesReachIsNotDeleted(t *testing.T) {
	at := func(path string) *identity.Entry {
		return &identity.Entry{ID: "e", SPIFFEID: spiffeid.RequireFromPath(spiffeid.RequireTrustDomainFromString("example.org"), path)}
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	shop := &caller.Role{Name: "shop", Verbs: []string{"*"}, Paths: []string{"/shop"}}
	for path, want := range map[string]codes.Code{"/shop/till": codes.OK, "/bank/till": codes.NotFound} {
		m := &moved{was: at("/shop/till"), is: at(path)}
		ctx := caller.NewContext(t.Context(), &caller.Caller{Kind: caller.Scoped, Roles: []*caller.Role{shop}})
		s := &entryService{api: New(Parts{View: m, Records: m}, Config{Log: log})}
		resp, err := s.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{"e"}})
		if err != nil {
			t.Fatal(err)
		}
		if got := codes.Code(resp.GetResults()[0].GetStatus().GetCode()); got != want || m.deleted != (want == codes.OK) {
			t.Errorf("moved to %s: %s, deleted %t", path, got, m.deleted)
		}
	}
}

func TestAChangeBeatsWhatIsBeingSigned(t *testing.T) {
	sel := func(texts ...string) attestor.Set {
		var list []attestor.Selector
		for _, text := range texts {
			kind, value, _ := strings.Cut(text, ":")
			list = append(list, attestor.Selector{Type: kind, Value: value})
		}
		return attestor.NewSet(list...)
	}
	digest := "sha256:" + strings.Repeat("a", 64)
	verdict := func(seq uint64, ttl time.Duration, texts ...string) *records.Verdict {
		return &records.Verdict{Digest: digest, Seq: seq, TTL: ttl, JWTTTL: ttl, Selectors: sel(texts...)}
	}
	entry := func(revision int64, texts ...string) *identity.Entry {
		return &identity.Entry{
			ID: "e", SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/shop"), Selectors: sel(texts...), Revision: revision,
		}
	}
	picture := func(e *identity.Entry, verdicts ...*records.Verdict) *view.AgentPicture {
		p := &view.AgentPicture{Verdicts: verdicts}
		if e != nil {
			p.Entries = []*identity.Entry{e}
		}
		return p
	}
	plain, gated := entry(1, "unix:uid:1"), entry(1, "unix:uid:1", "scan:policy:prod")
	good := verdict(1, time.Minute, "scan:policy:prod")
	over := func(left time.Duration) *identity.Entry {
		e := entry(1, "unix:uid:1")
		e.ExpiresAt = time.Now().Add(left)
		return e
	}
	csr := request(t)
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	for _, c := range []struct {
		name      string
		now, then *view.AgentPicture
		want      codes.Code
	}{
		{"nothing changed", picture(gated, good), nil, codes.OK},
		{"something else changed", picture(gated, good), picture(gated, good), codes.OK},
		{"the verdict was withdrawn", picture(gated, good), picture(gated, verdict(2, 0, "scan:status:prod:fail")), codes.FailedPrecondition},
		{"the verdict was deleted", picture(gated, good), picture(gated), codes.NotFound},
		{"the verdict was written anew and says the same", picture(gated, good), picture(gated, verdict(2, time.Minute, "scan:policy:prod")), codes.OK},
		{"the verdict allows less time", picture(gated, good), picture(gated, verdict(2, time.Second, "scan:policy:prod")), codes.FailedPrecondition},
		{"the entry was deleted", picture(plain), picture(nil), codes.NotFound},
		{"the entry was changed", picture(plain), picture(entry(2, "unix:uid:1")), codes.FailedPrecondition},
		{"the entry has expired, and the picture does not know yet", picture(over(-time.Second)), nil, codes.NotFound},
		{"the entry expires before anything could be signed", picture(over(500 * time.Millisecond)), nil, codes.NotFound},
		{"the entry expires later", picture(over(time.Hour)), nil, codes.OK},
		{"the entry demands a verdict by now", picture(plain), picture(entry(2, "unix:uid:1", "scan:policy:prod")), codes.NotFound},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.then == nil {
				c.then = c.now
			}
			service := func() (*svidService, *racing) {
				r := &racing{now: c.now, then: c.then}
				return &svidService{api: New(Parts{View: r, CA: r}, Config{Log: silent})}, r
			}
			ctx := caller.NewContext(t.Context(), &caller.Caller{})
			s, r := service()
			resp, err := s.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: "e", Csr: csr}}})
			if err != nil {
				t.Fatal(err)
			}
			got := resp.GetResults()[0]
			if codes.Code(got.GetStatus().GetCode()) != c.want || (got.GetSvid() != nil) != (c.want == codes.OK) {
				t.Errorf("X509-SVID: %v, want %s", got, c.want)
			}
			if len(c.now.Verdicts) > 0 && r.issued.MaxTTL != time.Minute {
				t.Errorf("the cap was %s", r.issued.MaxTTL)
			}
			s, r = service()
			token, err := s.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: "e", Audience: []string{"bank"}})
			if status.Code(err) != c.want || (token != nil) != (c.want == codes.OK) {
				t.Errorf("JWT-SVID: %v %v, want %s", token, err, c.want)
			}
			if len(c.now.Verdicts) > 0 && r.token.MaxTTL != time.Minute {
				t.Errorf("the cap was %s", r.token.MaxTTL)
			}
		})
	}
	// The agent says by what it asks; a change that has not come to it yet beats the request.
	other := strings.Repeat("b", 64)
	for _, c := range []struct {
		name string
		now  *view.AgentPicture
		by   terms.Item
		want codes.Code
	}{
		{"by what holds", picture(gated, good), terms.Item{Revision: 1, Verdicts: []terms.Verdict{{Digest: digest, Seq: 1}}}, codes.OK},
		{"by an older revision of the entry", picture(entry(2, "unix:uid:1")), terms.Item{Revision: 1}, codes.FailedPrecondition},
		{"by a revision that is not there yet", picture(plain), terms.Item{Revision: 2}, codes.FailedPrecondition},
		{"by an older verdict", picture(gated, verdict(2, time.Minute, "scan:policy:prod")), terms.Item{Revision: 1, Verdicts: []terms.Verdict{{Digest: digest, Seq: 1}}}, codes.FailedPrecondition},
		{
			"by another image beside one that still allows it", picture(gated, good),
			terms.Item{Revision: 1, Verdicts: []terms.Verdict{{Digest: digest, Seq: 1}, {Digest: "sha256:" + other, Seq: 1}}}, codes.FailedPrecondition,
		},
	} {
		t.Run("asked for "+c.name, func(t *testing.T) {
			service := func() *svidService {
				r := &racing{now: c.now, then: c.now}
				return &svidService{api: New(Parts{View: r, CA: r}, Config{Log: silent})}
			}
			md, _ := metadata.FromOutgoingContext(terms.With(t.Context(), c.by))
			ctx := metadata.NewIncomingContext(caller.NewContext(t.Context(), &caller.Caller{}), md)
			resp, err := service().BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: "e", Csr: csr}}})
			if err != nil || codes.Code(resp.GetResults()[0].GetStatus().GetCode()) != c.want {
				t.Errorf("X509-SVID: %v %v, want %s", resp, err, c.want)
			}
			if _, err := service().NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: "e", Audience: []string{"bank"}}); status.Code(err) != c.want {
				t.Errorf("JWT-SVID: %v, want %s", err, c.want)
			}
			two := []*svidv1.NewX509SVIDParams{{EntryId: "e", Csr: csr}, {EntryId: "e", Csr: csr}}
			if _, err := service().BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: two}); status.Code(err) != codes.InvalidArgument {
				t.Errorf("terms for one request of two: %v", err)
			}
		})
	}
}
