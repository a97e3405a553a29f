package trust

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// ErrRefused says that what a bundle endpoint sent, or who it is, is not to be trusted. Other errors say
// that nothing came, or that it could not be stored.
var ErrRefused = errors.New("bundle is refused")

// Failure says why a bundle endpoint gave nothing that is of use, in words that an operator may read.
type Failure struct {
	text    string
	refused bool
}

// Error returns the text.
func (f *Failure) Error() string { return f.text }

// Is makes a Failure ErrRefused if it is one.
func (f *Failure) Is(target error) bool { return f.refused && target == ErrRefused }

// Endpoint returns the text: it is about the endpoint, and nothing of it is a secret of this server.
func (f *Failure) Endpoint() string { return f.text }

func refuse(format string, args ...any) error {
	return &Failure{text: "bundle is refused: " + fmt.Sprintf(format, args...), refused: true}
}

func fail(format string, args ...any) error {
	return &Failure{text: "fetch bundle: " + fmt.Sprintf(format, args...)}
}

// fetch gets a bundle, stores it if it is another than the one that is held, and tells of it. It returns
// the bundle as it is held now, and the commit that made it so, 0 if that was before the server started.
func (f *Fetcher) fetch(ctx context.Context, federation *records.Federation) (*identity.Bundle, kv.Rev, error) {
	name := federation.TrustDomain.Name()
	s := f.of(federation.TrustDomain)
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	held, changed, err := f.exchange(ctx, federation, s)
	if ctx.Err() != nil && err != nil {
		return nil, 0, err // who asked has gone: it says nothing of the endpoint
	}
	log := f.cfg.Log.WithFields(logrus.Fields{"trust_domain": name, "url": federation.URL})
	switch {
	case err == nil:
		outcome := "same"
		if changed {
			outcome = "changed"
			log.WithField("origin", held.Origin).Info("federated bundle has changed")
		} else if s.said != "" {
			log.Info("federated bundle can be fetched again")
		}
		s.said = ""
		f.fetches.WithLabelValues(name, outcome).Inc()
		f.fresh.WithLabelValues(name).Set(float64(f.cfg.Now().Unix()))
		return held, s.rev, nil
	case errors.Is(err, ErrRefused):
		f.fetches.WithLabelValues(name, "refused").Inc()
	default:
		f.fetches.WithLabelValues(name, "failed").Inc()
	}
	// A failure that goes on is told once: it is fetched every few minutes, for days.
	if text := err.Error(); text != s.said {
		s.said = text
		log.WithError(err).Warn("federated bundle is not fetched")
		if errors.Is(err, ErrRefused) {
			f.tell(audit.Line{SPIFFEID: federation.TrustDomain.IDString(), Peer: federation.URL, Outcome: audit.Deny, Reason: text})
		}
	}
	return nil, 0, err
}

// tell writes an audit line that nothing depends on.
func (f *Fetcher) tell(line audit.Line) {
	line.Time, line.Event = f.cfg.Now(), "federation.fetch"
	if err := f.audit.Write(line); err != nil {
		f.cfg.Log.WithError(err).Error("The audit log cannot be written")
	}
}

// exchange is fetch without what is told of it. s.turn is held.
func (f *Fetcher) exchange(ctx context.Context, federation *records.Federation, s *state) (*identity.Bundle, bool, error) {
	td := federation.TrustDomain
	text, err := f.get(ctx, federation)
	if err != nil {
		return nil, false, err
	}
	given, err := parse(td, text)
	if err != nil {
		return nil, false, err
	}
	held, err := f.store.Bundle(ctx, td)
	switch {
	case errors.Is(err, records.ErrNotFound):
		// Nobody holds it: as if there had never been one.
		held, s.seen = &identity.Bundle{}, 0
	case err != nil:
		return nil, false, err
	case held.Origin == 0:
		s.seen = 0 // put there by hand
	}
	if err := newer(given, max(s.seen, held.Origin)); err != nil {
		return nil, false, err
	}
	if !held.TrustDomain.IsZero() && same(held, given) && (held.Origin != 0 || given.Origin == 0) {
		s.seen = max(s.seen, given.Origin)
		return held, false, nil
	}
	// No line, no bundle: that is written before anybody believes it.
	line := audit.Line{
		Time: f.cfg.Now(), Event: "federation.fetch", SPIFFEID: td.IDString(), Peer: federation.URL, Outcome: audit.Allow,
		Reason: fmt.Sprintf("sequence %d: %d X.509 authorities, %d JWT authorities", given.Origin, len(given.X509), len(given.JWT)),
	}
	if err := f.audit.Write(line); err != nil {
		return nil, false, fmt.Errorf("write audit line: %w", err)
	}
	changed := false
	held, rev, err := f.store.UpdateBundle(ctx, td, func(b *identity.Bundle) error {
		if err := newer(given, b.Origin); err != nil {
			return err
		}
		changed = !same(b, given)
		b.X509, b.JWT, b.WIT, b.RefreshHint, b.Origin = given.X509, given.JWT, given.WIT, given.RefreshHint, given.Origin
		return nil
	})
	if err != nil {
		return nil, false, fmt.Errorf("store bundle: %w", err)
	}
	s.seen, s.rev = max(s.seen, given.Origin), rev
	return held, changed, nil
}

// newer refuses a document that is older than one that was seen. One without a number says nothing of its
// age, and the number is optional (SPIFFE Trust Domain and Bundle section 4.1.1).
func newer(given *identity.Bundle, seen uint64) error {
	if given.Origin != 0 && given.Origin < seen {
		return refuse("its sequence number is %d, and %d was seen already", given.Origin, seen)
	}
	return nil
}

// same reports whether two bundles say the same, in whatever order.
func same(a, b *identity.Bundle) bool {
	if a.RefreshHint != b.RefreshHint || len(a.X509) != len(b.X509) || len(a.JWT) != len(b.JWT) || len(a.WIT) != len(b.WIT) {
		return false
	}
	for _, authority := range a.X509 {
		if !b.HasX509(authority.Certificate) {
			return false
		}
	}
	return sameKeys(a.JWT, b.JWT) && sameKeys(a.WIT, b.WIT)
}

func sameKeys(a, b []identity.JWTAuthority) bool {
	for _, key := range a {
		if !slices.ContainsFunc(b, func(other identity.JWTAuthority) bool {
			known, ok := other.Key.(interface{ Equal(crypto.PublicKey) bool })
			return other.KeyID == key.KeyID && ok && known.Equal(key.Key)
		}) {
			return false
		}
	}
	return true
}
