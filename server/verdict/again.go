package verdict

import (
	"context"
	"errors"
	"runtime"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/trust"
)

// verifyAgain asks the trust policies in force about every document that was taken in, so that a key
// that was revoked or a source that is no longer trusted takes with it what it vouched for. mu is held.
//
// It is done at every start, however long ago the policies were changed: that nothing is remembered of
// an earlier answer is what makes it certain. A document that is no longer vouched for stays, and does
// not count; it counts again if it is trusted again.
func (s *Service) verifyAgain(ctx context.Context) error {
	type answer struct {
		void  string
		proof *trust.Proof
	}
	// Documents that share their bytes are looked at once.
	byRaw := map[string][]*document{}
	answers := map[string]*answer{}
	for _, d := range s.state.documents {
		if d.GetRaw() != nil {
			byRaw[d.GetRaw().GetHash()] = append(byRaw[d.GetRaw().GetHash()], d)
			answers[d.GetRaw().GetHash()] = &answer{}
		}
	}
	group, deep := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for hash, docs := range byRaw {
		group.Go(func() error {
			d, a := docs[0], answers[hash]
			raw, err := s.Store.Blob(deep, d.GetRaw())
			if err == nil {
				a.proof, err = s.verifier.VerifyAt(deep, raw, trust.Want{Digests: d.GetWanted(), Repository: d.GetRepository()}, timeOf(d.GetReceivedAt()))
			}
			switch {
			case errors.Is(err, trust.ErrRefused), errors.Is(err, records.ErrNotFound), errors.Is(err, records.ErrDamaged):
				a.void = clip(err.Error())
			case err != nil:
				return err
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	change := records.EvidenceChange{Documents: map[string]*stored.EvidenceDocument{}}
	for _, d := range s.state.documents {
		void, selectors := d.GetVoid(), d.GetSelectors()
		switch a := answers[d.GetRaw().GetHash()]; {
		case a != nil:
			void = a.void
			if a.proof != nil {
				selectors = storedSelectors(a.proof.Selectors().All())
				if !slices.Contains(a.proof.TrustPolicies, d.GetSource()) {
					void = "trust policy " + d.GetSource() + " does not vouch for it any more"
				}
			}
		case len(d.GetCallerPolicies()) > 0:
			void = s.stillAllowed(d)
		}
		if void == d.GetVoid() && len(selectors) == len(d.GetSelectors()) && slices.Equal(selectorsOf(selectors), selectorsOf(d.GetSelectors())) {
			continue
		}
		d.Void, d.Selectors = void, selectors
		d.selectors = selectorsOf(selectors)
		change.Documents[d.id] = d.EvidenceDocument
		if change.Full() {
			if err := s.Store.WriteEvidence(ctx, change); err != nil {
				return err
			}
			change.Documents = map[string]*stored.EvidenceDocument{}
		}
	}
	return s.Store.WriteEvidence(ctx, change)
}

// stillAllowed says why a document does not count any more that came unsigned from a source.
func (s *Service) stillAllowed(d *document) string {
	for _, source := range s.rules.Sources {
		if source.Name() != d.GetSource() {
			continue
		}
		switch {
		case !source.AllowUnsigned():
			return "evidence source " + d.GetSource() + " may not push unsigned documents any more"
		case !source.Allows(d.GetRepository()):
			return "evidence source " + d.GetSource() + " may not push for this repository any more"
		}
		return ""
	}
	return "there is no evidence source " + d.GetSource() + " any more"
}
