package verdict

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/store/durable"
	"github.com/assay-id/assay/server/store/kv"
)

// Signer signs lists of revoked certificates; *ca.CA is one.
type Signer interface {
	// SignCRLs returns a list of each authority, as DER, the active one's first, with those of the
	// certificates that it signed.
	SignCRLs(ctx context.Context, number uint64, revoked []records.Serial, until time.Time) ([][]byte, error)
	// CRLsDue returns a channel that is closed when there are other authorities than now.
	CRLsDue() <-chan struct{}
}

// ErrTurned says that a certificate must not be given out any more: a verdict that it rests on grants it no longer.
var ErrTurned = errors.New("a verdict that the certificate rests on has turned")

// crl are the lists of revoked certificates. Service.mu guards what is no atomic.
type crl struct {
	number uint64
	owed   bool // something is revoked that may not be on the lists yet
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

// Issued writes down certificates that are about to be given out on the strength of verdicts. It returns for
// each of them why it must not be given out, nil if it may be: without that line it could not be revoked, and
// for one whose verdict has turned by now nobody looks any more.
//
// First the line, then the look at the verdict, as publish and revoke first write the verdict and then look for
// lines: whichever comes second sees the other. The view would not do, for it may be behind the store.
func (s *Service) Issued(ctx context.Context, serials ...records.Serial) []error {
	refused := make([]error, len(serials))
	if !s.revokes.Load() {
		return refused // no policy ever revokes
	}
	if err := s.Store.PutSerials(ctx, serials...); err != nil {
		for n := range refused {
			refused[n] = fmt.Errorf("note issued certificate: %w", err)
		}
		return refused
	}
	known := map[string]*records.Verdict{}
	for n, one := range serials {
		for _, digest := range one.GetDigests() {
			v, looked := known[digest]
			if !looked {
				var err error
				if v, err = s.Store.Verdict(ctx, digest); err != nil && !errors.Is(err, records.ErrNotFound) {
					refused[n] = fmt.Errorf("look whether the verdict still stands: %w", err)
					break
				}
				known[digest] = v
			}
			if !s.grants(one, v) {
				refused[n] = ErrTurned
				break
			}
		}
	}
	return refused
}

// grants reports whether the certificate would be issued now, as far as one verdict is concerned.
func (s *Service) grants(one records.Serial, v *records.Verdict) bool {
	e, ok := s.View.Entry(one.GetEntryId())
	return ok && v != nil && e.Gates().In(v.Selectors)
}

// keepCRL signs the lists when the server starts, when another authority is prepared and before they end, and
// forgets what has expired. At the start it revokes what the server that ended did not come to.
func (s *Service) keepCRL(ctx context.Context) {
	if s.Signer == nil {
		return
	}
	select {
	case <-s.View.Ready():
	case <-ctx.Done():
		return
	}
	for ctx.Err() == nil {
		another := s.Signer.CRLsDue()
		pause := crlRenew
		if err := s.renewLists(ctx); err != nil && ctx.Err() == nil {
			s.cfg.Log.WithError(err).Error("cannot sign the list of revoked certificates, will try again")
			pause, another = retryAfter, nil
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-another:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// renewLists revokes what is owed, signs the lists anew and forgets what has expired.
func (s *Service) renewLists(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	err := errors.Join(s.revoke(ctx, slices.Collect(maps.Values(s.state.images)), now), s.signCRL(ctx, now))
	if err := s.Store.SweepSerials(ctx, now.Add(-crlKeep)); err != nil && ctx.Err() == nil {
		s.cfg.Log.WithError(err).Warn("cannot forget expired certificates, will try again")
	}
	return err
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
	if err := s.handOut(ctx, lists, len(revoked) > 0); err != nil {
		return err
	}
	s.crl.owed = false
	return nil
}

// handOut brings the lists to where they are looked for. mu is held.
func (s *Service) handOut(ctx context.Context, lists [][]byte, revoked bool) error {
	if s.cfg.CRLPath != "" {
		if err := durable.Replace(s.cfg.CRLPath, 0o644, PEM(lists)); err != nil {
			return fmt.Errorf("write lists of revoked certificates: %w", err)
		}
	}
	if s.cfg.CRLChanged == nil {
		return nil
	}
	if !revoked && !s.revokes.Load() {
		return s.cfg.CRLChanged(ctx, nil)
	}
	// Empty lists too: what reads them from files does not start without, and refuses everybody once those
	// that it has are out of date.
	return s.cfg.CRLChanged(ctx, lists)
}

// revoke puts on the list what was issued on the strength of earlier verdicts on the images and would not be
// issued now. What it could not do stays owed, and is tried again. mu is held.
func (s *Service) revoke(ctx context.Context, images []*image, now time.Time) error {
	owed := map[string]*image{}
	for _, i := range images {
		if i.owed {
			owed[i.digest] = i
		}
	}
	if len(owed) == 0 {
		return nil
	}
	select {
	case <-s.View.Ready():
	default:
		return nil // no entry is known yet, so that all would seem to be lost; keepCRL comes back to it
	}
	if err := s.revokeOf(ctx, owed, now); err != nil {
		for _, i := range owed {
			i.due = now
		}
		return fmt.Errorf("revoke certificates: %w", err)
	}
	for _, i := range owed {
		i.owed = false
	}
	return nil
}

// revokeOf is revoke for images by their digests.
func (s *Service) revokeOf(ctx context.Context, owed map[string]*image, now time.Time) error {
	all, err := s.Store.Serials(ctx, now)
	if err != nil {
		return err
	}
	var list []records.Serial
	var lines []audit.Line
	for _, one := range all {
		if one.GetRevokedAt() != 0 {
			continue
		}
		for _, digest := range one.GetDigests() {
			i := owed[digest]
			if i == nil || s.grants(one, i.published) {
				continue
			}
			one.RevokedAt, one.Reason = now.Unix(), "image "+i.digest
			list = append(list, one)
			lines = append(lines, audit.Line{
				Event: "svid.x509.revoke", Outcome: audit.Allow, Caller: "policy", Serial: one.Number, Agent: one.GetAgent(),
				EntryID: one.GetEntryId(), SPIFFEID: one.GetSpiffeId(), Verdicts: []string{i.name()},
			})
			break
		}
	}
	for len(list) > 0 {
		n := min(len(list), kv.MaxOps) // what is written at once is told at once
		s.crl.owed = true              // even after an error, for it may be written all the same
		if err := s.Store.PutSerials(ctx, list[:n]...); err != nil {
			return err
		}
		for _, line := range lines[:n] {
			s.note(line)
		}
		list, lines = list[n:], lines[n:]
	}
	if !s.crl.owed {
		return nil
	}
	return s.signCRL(ctx, now)
}
