package verdict

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/store/durable"
)

// Signer signs lists of revoked certificates; *ca.CA is one.
type Signer interface {
	// SignCRLs returns a list of each authority, as DER, the active one's first, with those of the
	// certificates that it signed.
	SignCRLs(ctx context.Context, number uint64, revoked []records.Serial, until time.Time) ([][]byte, error)
	// CRLsDue returns a channel that is closed when there are other authorities than now.
	CRLsDue() <-chan struct{}
}

// crl are the lists of revoked certificates. Service.mu guards what is no atomic.
type crl struct {
	number uint64
	lists  atomic.Pointer[[][]byte]
}

// Times of the lists: they are signed anew well before they end, for a verifier refuses everything when
// it has none that is current.
const (
	crlLife  = time.Hour
	crlRenew = 20 * time.Minute
	crlKeep  = time.Hour // how long an expired certificate stays in the books
)

// CRLs returns the current lists as DER, the active authority's first; none if there are none yet.
func (s *Service) CRLs() [][]byte {
	if lists := s.crl.lists.Load(); lists != nil {
		return *lists
	}
	return nil
}

// Issued writes down a certificate that is about to be given out on the strength of a verdict. Without
// that line it could not be revoked, so on an error it must not be given out.
func (s *Service) Issued(ctx context.Context, serials ...records.Serial) error {
	if !s.revokes.Load() {
		return nil // no policy ever revokes
	}
	if err := s.Store.PutSerials(ctx, serials...); err != nil {
		return fmt.Errorf("note issued certificate: %w", err)
	}
	return nil
}

// keepCRL signs the lists when the server starts, when another authority is prepared and before they end, and
// forgets what has expired.
func (s *Service) keepCRL(ctx context.Context) {
	if s.Signer == nil {
		return
	}
	for ctx.Err() == nil {
		another := s.Signer.CRLsDue()
		s.mu.Lock()
		now := s.cfg.Now()
		pause := crlRenew
		if err := s.signCRL(ctx, now); err != nil && ctx.Err() == nil {
			s.cfg.Log.WithError(err).Error("cannot sign the list of revoked certificates, will try again")
			pause, another = retryAfter, nil
		}
		if err := s.Store.SweepSerials(ctx, now.Add(-crlKeep)); err != nil && ctx.Err() == nil {
			s.cfg.Log.WithError(err).Warn("cannot forget expired certificates, will try again")
		}
		s.mu.Unlock()
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-another:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// signCRL makes the lists of all that is revoked and not expired. mu is held.
func (s *Service) signCRL(ctx context.Context, now time.Time) error {
	if s.Signer == nil {
		return nil
	}
	all, err := s.Store.Serials(ctx, now.Add(-crlKeep))
	if err != nil {
		return err
	}
	revoked := slices.DeleteFunc(all, func(one records.Serial) bool { return one.GetRevokedAt() == 0 })
	number := s.crl.number + 1
	lists, err := s.Signer.SignCRLs(ctx, number, revoked, now.Add(crlLife))
	if err != nil {
		return err
	}
	if err := s.Store.WriteEvidence(ctx, records.EvidenceChange{CRL: &stored.EvidenceCRL{Number: number}}); err != nil {
		return err
	}
	s.crl.number = number
	s.crl.lists.Store(&lists)
	if s.cfg.CRLPath != "" {
		if err := durable.Replace(s.cfg.CRLPath, 0o644, PEM(lists)); err != nil {
			return fmt.Errorf("write lists of revoked certificates: %w", err)
		}
	}
	if s.cfg.CRLChanged == nil {
		return nil
	}
	if len(revoked) == 0 && !s.revokes.Load() {
		return s.cfg.CRLChanged(ctx, nil)
	}
	// Empty lists too: what reads them from files does not start without, and refuses everybody once those
	// that it has are out of date.
	return s.cfg.CRLChanged(ctx, lists)
}

// revoke puts on the list what was issued on the strength of an earlier verdict on the image and would
// not be issued now. mu is held.
func (s *Service) revoke(ctx context.Context, i *image, now time.Time) error {
	all, err := s.Store.Serials(ctx, now)
	if err != nil {
		return err
	}
	var list []records.Serial
	for _, one := range all {
		if one.GetRevokedAt() != 0 || !slices.Contains(one.GetDigests(), i.digest) {
			continue
		}
		if e, ok := s.View.Entry(one.GetEntryId()); ok && i.published != nil && e.Gates().In(i.published.Selectors) {
			continue
		}
		one.RevokedAt, one.Reason = now.Unix(), "image "+i.digest
		list = append(list, one)
	}
	if len(list) == 0 {
		return nil
	}
	if err := s.Store.PutSerials(ctx, list...); err != nil {
		return err
	}
	for _, one := range list {
		s.note(audit.Line{
			Event: "svid.x509.revoke", Outcome: audit.Allow, Caller: "policy", Serial: one.Number, Agent: one.GetAgent(),
			EntryID: one.GetEntryId(), SPIFFEID: one.GetSpiffeId(), Verdicts: []string{i.name()},
		})
	}
	return errors.Join(s.signCRL(ctx, now))
}
