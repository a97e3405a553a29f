package agent

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/files"
	"github.com/assay-id/assay/workloadapi/identity"
)

// filesPause is how long the agent waits before it tries anew to use a directory that it cannot make.
const filesPause = time.Minute

// keepFiles keeps the files of one block of the configuration until ctx ends. A directory that cannot be
// used is no reason for the agent to end: all others are served.
func (a *agent) keepFiles(ctx context.Context, f Files) {
	log := a.cfg.Log.WithField("component", "files").WithField("files", f.Name)
	// Before the first picture, that nothing matches says nothing.
	if a.view.Wait(ctx) != nil {
		return
	}
	f.Log, f.Now = a.cfg.Log.WithField("component", "files"), a.cfg.Now
	f.Changed = func(ids []string) { a.auditFiles(f, ids) }
	src := &held{source: a.issue, facts: f.Selectors, only: f.SPIFFEID}
	for ctx.Err() == nil {
		if err := files.New(src, f.Config).Run(ctx); err != nil && ctx.Err() == nil {
			log.WithError(err).Error("files cannot be kept; trying again in a minute")
		}
		timer := time.NewTimer(filesPause)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// auditFiles writes the line of what was written to files, or withdrawn from them.
func (a *agent) auditFiles(f Files, ids []string) {
	if a.cfg.Audit == nil {
		return
	}
	l := workloadapi.Line{
		Time: a.cfg.Now().UTC(), Event: "files", PID: os.Getpid(), UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), //nolint:gosec // never negative here
		Types: []string{attestorOf(f.Selectors)}, Selectors: f.Selectors.Strings(), SPIFFEIDs: ids, Outcome: "allow",
	}
	if len(ids) == 0 {
		l.Outcome, l.Reason = "deny", "the identity is withdrawn"
	}
	a.cfg.Audit.Audit(l)
}

func attestorOf(s attestor.Set) string {
	if s.Len() == 0 {
		return ""
	}
	return s.All()[0].Type
}

// held gives what the agent holds for a set of facts, as a Workload API would.
type held struct {
	source workloadapi.Source
	facts  attestor.Set
	only   string // restricts JWT-SVIDs to a SPIFFE ID, if not empty
}

// X509 implements files.Source.
func (h *held) X509(ctx context.Context, fn func(*workload.X509SVIDResponse) error) error {
	return follow(ctx, func() (<-chan struct{}, error) {
		x, changed, err := h.source.X509(ctx, h.facts)
		switch {
		case err != nil:
			return changed, err
		case len(x.SVIDs) == 0:
			return changed, fn(nil)
		case x.Bundle == nil:
			return changed, fmt.Errorf("no bundle of the own trust domain: %w", identity.ErrUnavailable)
		}
		resp, err := workloadapi.X509Response(x)
		if err != nil {
			return changed, err
		}
		return changed, fn(resp)
	})
}

// JWTBundles implements files.Source.
func (h *held) JWTBundles(ctx context.Context, fn func(*workload.JWTBundlesResponse) error) error {
	return follow(ctx, func() (<-chan struct{}, error) {
		set, changed := h.source.Bundles(h.facts)
		if set.Matched == 0 || set.Own == nil {
			return changed, fn(nil)
		}
		resp := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
		for _, b := range append([]*identity.Bundle{set.Own}, set.Federated...) {
			keys, err := workloadapi.JWTBundle(b)
			if err != nil {
				return changed, err
			}
			resp.Bundles[b.TrustDomain.IDString()] = keys
		}
		return changed, fn(resp)
	})
}

// follow calls give again whenever what it gave may have changed.
func follow(ctx context.Context, give func() (<-chan struct{}, error)) error {
	for {
		changed, err := give()
		if err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// JWT implements files.Source.
func (h *held) JWT(ctx context.Context, audience []string) (*workload.JWTSVIDResponse, error) {
	var id spiffeid.ID
	if h.only != "" {
		var err error
		if id, err = spiffeid.FromString(h.only); err != nil {
			return nil, err
		}
	}
	svids, _, err := h.source.JWT(ctx, h.facts, audience, id)
	if err != nil {
		return nil, err
	}
	if len(svids) == 0 {
		return nil, files.ErrNoIdentity
	}
	resp := &workload.JWTSVIDResponse{}
	for _, s := range svids {
		resp.Svids = append(resp.Svids, &workload.JWTSVID{SpiffeId: s.ID.String(), Svid: s.Token, Hint: s.Hint})
	}
	return resp, nil
}

var _ files.Source = (*held)(nil)
