package api

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/turn"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

// fleet is a view in which each agent has a thousand entries, and a CA that notes whose it signs.
type fleet struct {
	View
	CA
	mu     sync.Mutex
	signed []string
}

func (f *fleet) Agent(id spiffeid.ID) *view.AgentPicture {
	p := &view.AgentPicture{}
	for i := range 1000 {
		p.Entries = append(p.Entries, &identity.Entry{ID: fmt.Sprintf("%04d", i), SPIFFEID: spiffeid.RequireFromPath(id.TrustDomain(), "/of"+id.Path())})
	}
	return p
}

func (f *fleet) note(id spiffeid.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.signed = append(f.signed, id.Path()[strings.LastIndexByte(id.Path(), '/')+1:])
}

func (f *fleet) SignWorkload(_ context.Context, p ca.WorkloadParams) ([]*x509.Certificate, error) {
	f.note(p.ID)
	return []*x509.Certificate{{SerialNumber: big.NewInt(7)}}, nil
}

func (f *fleet) SignWIT(context.Context, ca.WITParams) (*identity.WITSVID, error) {
	return nil, ca.ErrNoWIT
}

func (f *fleet) SignJWT(_ context.Context, p ca.JWTParams) (*identity.JWTSVID, error) {
	f.note(p.ID)
	return &identity.JWTSVID{ID: p.ID, Token: "token"}, nil
}

func TestAgentsTakeTurnsToHaveThingsSigned(t *testing.T) {
	csr := request(t)
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	as := func(ctx context.Context, name string) context.Context {
		return caller.NewContext(ctx, &caller.Caller{Kind: caller.Agent, ID: spiffeid.RequireFromString("spiffe://example.org/spire/agent/" + name)})
	}
	batch := func(n int) *svidv1.BatchNewX509SVIDRequest {
		req := &svidv1.BatchNewX509SVIDRequest{}
		for i := range n {
			req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: fmt.Sprintf("%04d", i), Csr: csr})
		}
		return req
	}
	synctest.Test(t, func(t *testing.T) {
		f := &fleet{}
		stile := turn.New(1, 10_000)
		s := &svidService{api: New(Parts{View: f, CA: f, Signing: stile}, Config{Log: silent})}
		if err := stile.Enter(t.Context(), turn.Usual, "the test"); err != nil {
			t.Fatal(err)
		}
		var calls sync.WaitGroup
		ask := func(name string, n int) {
			calls.Go(func() {
				resp, err := s.BatchNewX509SVID(as(t.Context(), name), batch(n))
				if err != nil || slices.ContainsFunc(resp.GetResults(), func(r *svidv1.BatchNewX509SVIDResponse_Result) bool { return r.GetStatus().GetCode() != 0 }) {
					t.Errorf("%s: %v", name, err)
				}
			})
			synctest.Wait() // it waits for its turn
		}
		ask("restarting", 500)
		ask("restarting", 500) // again, for it is greedy
		ask("renewing", 20)
		calls.Go(func() {
			if _, err := s.NewJWTSVID(as(t.Context(), "token"), &svidv1.NewJWTSVIDRequest{EntryId: "0001", Audience: []string{"a"}}); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		stile.Leave("the test")
		calls.Wait()

		if len(f.signed) != 1021 {
			t.Fatalf("%d were signed", len(f.signed))
		}
		if at := slices.Index(f.signed, "token"); at > 2 {
			t.Errorf("the token came after %d others", at)
		}
		last := len(f.signed) - 1 - slices.Index(slices.Collect(func(yield func(string) bool) {
			for _, name := range slices.Backward(f.signed) {
				if !yield(name) {
					return
				}
			}
		}), "renewing")
		// Twenty of its own, at most one of the others' after each (on a machine that has much to do whoever is late by
		// a moment finds its place taken), and the token.
		if last > 41 {
			t.Errorf("the renewal of 20 was done after %d signatures", last)
		}
	})
}
