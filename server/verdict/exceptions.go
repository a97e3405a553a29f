package verdict

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/workloadapi/identity"
)

// ErrNoException says that there is no exception with the ID.
var ErrNoException = errors.New("there is no such exception")

// maxExceptions bounds how many there are: each is looked at for each image.
const maxExceptions = 2000

func exceptionOf(id string, m *stored.EvidenceException) policy.Exception {
	return policy.Exception{
		ID: id, Policy: m.GetPolicy(), Digest: m.GetDigest(), Package: m.GetPackage(), Vulnerability: m.GetVulnerability(),
		Reason: m.GetReason(), Approver: m.GetApprover(), CreatedAt: timeOf(m.GetCreatedAt()), Expires: timeOf(m.GetExpiresAt()),
	}
}

// PutException puts an exception in force, or changes the one with its ID. CreatedAt is now.
func (s *Service) PutException(ctx context.Context, e policy.Exception, who string) (policy.Exception, error) {
	s.mu.Lock()
	defer s.settle(ctx)
	defer s.mu.Unlock()
	now := s.cfg.Now().UTC()
	e.CreatedAt = now
	if e.ID == "" {
		e.ID = rand.Text()
	}
	e.Vulnerability = strings.ToUpper(e.Vulnerability)
	if err := s.checkException(&e, now); err != nil {
		return e, err
	}
	m := &stored.EvidenceException{
		Policy: e.Policy, Digest: e.Digest, Package: e.Package, Vulnerability: e.Vulnerability, Reason: e.Reason, Approver: e.Approver,
		CreatedAt: nanos(e.CreatedAt), ExpiresAt: nanos(e.Expires),
	}
	// No line, no exception.
	err := s.Audit.Write(audit.Line{
		Event: "evidence.except", Outcome: audit.Allow, Caller: who, Policy: e.Policy, Finding: e.Vulnerability, Verdicts: only(e.Digest),
		Facts: only(e.Package), Reason: e.Reason + " (approved by " + e.Approver + ")", ExpiresAt: e.Expires,
	})
	if err != nil {
		return e, fmt.Errorf("put exception: %w", err)
	}
	err = s.Store.WriteEvidence(ctx, records.EvidenceChange{Exceptions: map[string]*stored.EvidenceException{e.ID: m}})
	if err != nil {
		return e, fmt.Errorf("put exception: %w", err)
	}
	s.state.excepted[e.ID] = e
	return e, s.evaluate(ctx, "exception "+e.ID, s.excepts(&e))
}

func only(text string) []string {
	if text == "" {
		return nil
	}
	return []string{text}
}

// idForm is what an exception may be called.
func idForm(id string) bool {
	return len(id) <= 64 && strings.Trim(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == ""
}

func (s *Service) checkException(e *policy.Exception, now time.Time) error {
	switch {
	case !idForm(e.ID):
		return clash(ErrImage, "%q is no ID: use at most 64 letters, digits, dots, dashes and underscores", clip(e.ID))
	case len(s.state.excepted) >= maxExceptions && s.state.excepted[e.ID].ID == "":
		return clash(ErrMany, "there are %d exceptions already, which is the limit", maxExceptions)
	case e.Digest != "" && !identity.ValidDigest(e.Digest):
		return clash(ErrImage, "%q is no digest: it must be sha256: and 64 lower-case hex digits, the image's config digest", clip(e.Digest))
	case !e.Expires.After(now):
		return clash(ErrStale, "the exception ends at %s, which is over", e.Expires.Format(time.RFC3339))
	case len(e.Reason) > maxText || len(e.Approver) > maxText || len(e.Package) > 4*maxText || len(e.Vulnerability) > maxText:
		return clash(ErrMany, "a text of the exception is longer than %d bytes", maxText)
	case e.Policy != "" && !slices.ContainsFunc(s.rules.Policies, func(p *policy.ScanPolicy) bool { return p.Name == e.Policy }):
		return fmt.Errorf("except under %q: %w", e.Policy, ErrNoPolicy)
	}
	if err := e.Check(); err != nil {
		return clash(ErrImage, "%w", err)
	}
	for _, p := range s.rules.Policies {
		if (e.Policy == "" || e.Policy == p.Name) && p.ExceptionMaxAge > 0 && e.Expires.Sub(now) > p.ExceptionMaxAge {
			return clash(ErrMany, "the exception would last %s; policy %q lets one last %s at most", e.Expires.Sub(now).Round(time.Second), p.Name, p.ExceptionMaxAge)
		}
	}
	return nil
}

// excepts returns the images that an exception may be for.
func (s *Service) excepts(e *policy.Exception) []string {
	if e.Digest == "" {
		return s.all()
	}
	if s.state.images[e.Digest] == nil {
		return nil
	}
	return s.alike(map[string]bool{e.Digest: true})
}

// Exceptions returns all exceptions, sorted by ID.
func (s *Service) Exceptions() []policy.Exception {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]policy.Exception, 0, len(s.state.excepted))
	for _, id := range slices.Sorted(maps.Keys(s.state.excepted)) {
		list = append(list, s.state.excepted[id])
	}
	return list
}

// DeleteException takes an exception back.
func (s *Service) DeleteException(ctx context.Context, id, who string) error {
	s.mu.Lock()
	defer s.settle(ctx)
	defer s.mu.Unlock()
	e, ok := s.state.excepted[id]
	if !ok {
		return ErrNoException
	}
	if err := s.Store.WriteEvidence(ctx, records.EvidenceChange{Exceptions: map[string]*stored.EvidenceException{id: nil}}); err != nil {
		return fmt.Errorf("delete exception: %w", err)
	}
	delete(s.state.excepted, id)
	s.note(audit.Line{Event: "evidence.unexcept", Outcome: audit.Allow, Caller: who, Policy: e.Policy, Finding: e.Vulnerability, Verdicts: only(e.Digest), Facts: only(e.Package)})
	return s.evaluate(ctx, "exception "+id+" deleted", s.excepts(&e))
}
