package caller

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"

	"github.com/assay-id/assay/workloadapi/identity"
)

// noEntries is a picture in which nobody is an administrator by an entry.
type noEntries struct{ View }

func (noEntries) EntriesBySPIFFEID(spiffeid.ID) []*identity.Entry { return nil }

// everybodys gives one role to each SVID and each token, also to the token that is no good.
type everybodys struct{ role *Role }

func (e everybodys) SVID(spiffeid.ID) []*Role { return []*Role{e.role} }
func (e everybodys) Token(_ context.Context, token string) (string, []*Role, error) {
	if token != "good" {
		return "somebody", []*Role{e.role}, errors.New("no good")
	}
	return "somebody", []*Role{e.role}, nil
}
func (everybodys) Unix(uint32, uint32) ([]*Role, bool) { return nil, false }

func TestRolesOfSVIDsAndTokens(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	log := logrus.New()
	log.SetOutput(io.Discard)
	own := spiffeid.RequireTrustDomainFromString("example.org")
	a := New(noEntries{}, nil, nil, Config{
		TrustDomain: own, Now: func() time.Time { return now }, Log: log, Roles: everybodys{&Role{Name: "reader", Verbs: []string{"entry:read", "server:read"}}},
		AdminIDs: []spiffeid.ID{spiffeid.RequireFromString("spiffe://example.org/boss")},
	})
	const list, create = "/spire.api.server.entry.v1.Entry/ListEntries", "/spire.api.server.entry.v1.Entry/BatchCreateEntry"
	const local = "/spire.api.server.debug.v1.Debug/GetInfo"
	svid := func(id string, ends time.Time) *Caller {
		return &Caller{ID: spiffeid.RequireFromString(id), Cert: &x509.Certificate{NotAfter: ends}}
	}
	const shop = "spiffe://example.org/shop"
	for _, c := range []struct {
		name, method  string
		who           *Caller
		authorization []string
		want          Kind
	}{
		{"an SVID may do what its role says", list, svid(shop, now), nil, Scoped},
		{"and nothing else", create, svid(shop, now), nil, 0},
		{"what is for local callers only is not for SVIDs", local, svid(shop, now), nil, 0},
		{"nor for tokens", local, &Caller{}, []string{"Bearer good"}, 0},
		{"an administrator's SVID may do everything", create, svid("spiffe://example.org/boss", now), nil, Admin},
		{"but not what is for local callers only", local, svid("spiffe://example.org/boss", now), nil, 0},
		{"nor anything once it has expired", create, svid("spiffe://example.org/boss", now.Add(-1)), nil, 0},
		{"an SVID of another trust domain has no role", list, svid("spiffe://other.test/shop", now), nil, 0},
		{"an SVID that expired while its connection stayed open has none", list, svid(shop, now.Add(-1)), nil, 0},
		{"an SVID is not helped by a token", list, svid(shop, now.Add(-1)), []string{"Bearer good"}, 0},
		{"a token may do what its role says", list, &Caller{}, []string{"bearer good"}, Scoped},
		{"and nothing else with a token", create, &Caller{}, []string{"Bearer good"}, 0},
		{"a token that is no good has no role", list, &Caller{}, []string{"Bearer bad"}, 0},
		{"of two tokens neither counts", list, &Caller{}, []string{"Bearer good", "Bearer good"}, 0},
		{"a token under another scheme is none", list, &Caller{}, []string{"Basic good"}, 0},
		{"a token without a scheme is none", list, &Caller{}, []string{"good"}, 0},
		{"who shows nothing has none", list, &Caller{}, nil, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := metadata.NewIncomingContext(t.Context(), metadata.MD{"authorization": c.authorization})
			got, err := a.allow(ctx, c.who, c.method, true)
			if got != c.want || (err != nil) != (c.want == 0) {
				t.Errorf("got %v, %v, want %v", got, err, c.want)
			}
		})
	}
	if (&Role{Verbs: []string{"*"}}).may("") {
		t.Error("all verbs are also none")
	}
}

// adminsAll has an entry for each ID that makes an administrator and a downstream server of who has it.
type adminsAll struct{ View }

func (adminsAll) EntriesBySPIFFEID(id spiffeid.ID) []*identity.Entry {
	return []*identity.Entry{{SPIFFEID: id, Admin: true, Downstream: true}}
}

func TestEntriesGiveRightsToOwnIDsOnly(t *testing.T) {
	a := New(adminsAll{}, nil, nil, Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Now: time.Now, Log: logrus.New()})
	for id, want := range map[string]Kind{"spiffe://example.org/boss": Admin, "spiffe://other.test/boss": 0} {
		who := &Caller{ID: spiffeid.RequireFromString(id), Cert: &x509.Certificate{NotAfter: time.Now().Add(time.Hour)}}
		if got, _ := a.allow(t.Context(), who, "/spire.api.server.entry.v1.Entry/BatchCreateEntry", true); got != want {
			t.Errorf("%s is let in as %v, want %v", id, got, want)
		}
	}
}
