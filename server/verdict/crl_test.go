package verdict

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/workloadapi/identity"
)

const revoking = `
scan_policy "prod" {
  sources = ["local"]
  fail {
    severity = "critical"
  }
  on_fail = "withdraw+revoke"
}
`

// lister signs lists that say nothing, and remembers what would be on the last one.
type lister struct {
	mu     sync.Mutex // guards all
	listed []string
	signed int
	broken bool
}

func (s *lister) SignCRLs(_ context.Context, _ uint64, revoked []records.Serial, _ time.Time) ([][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken {
		return nil, errors.New("the key is away")
	}
	s.signed++
	s.listed = nil
	for _, one := range revoked {
		s.listed = append(s.listed, one.Number)
	}
	slices.Sort(s.listed)
	return [][]byte{[]byte("list")}, nil
}

func (s *lister) CRLsDue() <-chan struct{} { return nil }

func (s *lister) want(t *testing.T, numbers ...string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.listed, numbers) {
		t.Errorf("on the list are %q, want %q", s.listed, numbers)
	}
}

// books is a store that does not take down that anything is revoked while it is full.
type books struct {
	Store
	mu   sync.Mutex // guards full
	full bool
}

func (b *books) set(full bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.full = full
}

func (b *books) PutSerials(ctx context.Context, serials ...records.Serial) error {
	b.mu.Lock()
	full := b.full
	b.mu.Unlock()
	if full && slices.ContainsFunc(serials, func(one records.Serial) bool { return one.GetRevokedAt() != 0 }) {
		return errors.New("no space left")
	}
	return b.Store.PutSerials(ctx, serials...)
}

// newRevoking opens a service with a policy that revokes, and entries named after the gate that they demand.
func newRevoking(t *testing.T, change ...func(*world)) (*world, *lister, *books) {
	t.Helper()
	sign, full := &lister{}, &books{}
	w := newWorld(t, revoking, append([]func(*world){func(w *world) {
		for id, value := range map[string]string{"gated": "policy:prod", "quarantine": "status:prod:fail"} {
			w.view.entries = append(w.view.entries, &identity.Entry{ID: id, Selectors: attestor.NewSet(attestor.Selector{Type: "scan", Value: value})})
		}
		w.parts = func(p Parts) Parts {
			full.Store = p.Store
			p.Store, p.Signer = full, sign
			return p
		}
	}}, change...)...)
	return w, sign, full
}

// issue takes down a certificate, and fails if that is refused.
func (w *world) issue(number, entry string, digests ...string) {
	w.t.Helper()
	if err := w.Issued(w.t.Context(), w.certificate(number, entry, digests...))[0]; err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) certificate(number, entry string, digests ...string) records.Serial {
	return records.Serial{Number: number, EvidenceSerial: &stored.EvidenceSerial{EntryId: entry, Digests: digests, ExpiresAt: w.now().Add(24 * time.Hour).Unix()}}
}

func TestACertificateIsOnTheListOrNotGivenOut(t *testing.T) {
	w, sign, _ := newRevoking(t)
	one, two := config(1), config(2)
	critical := []string{"CVE-2026-1 CRITICAL"}
	for _, image := range []string{one, two} {
		w.run(image, 1)
		w.mustPush(scan{image: image})
	}
	// Taken down before the verdict turns: on the list.
	w.issue("100", "gated", one)
	w.issue("101", "gated", two)
	w.issue("102", "gated", two, one)
	w.pass(time.Minute)
	w.mustPush(scan{image: one, findings: critical})
	sign.want(t, "100", "102")
	// Signed before, and taken down after it was looked for: nobody would look for it again.
	refused := w.Issued(t.Context(),
		w.certificate("200", "gated", one), w.certificate("201", "gated", two), w.certificate("202", "gated", two, one),
		w.certificate("203", "quarantine", one), w.certificate("204", "deleted", two), w.certificate("205", "gated", config(3)))
	for n, want := range []error{ErrTurned, nil, ErrTurned, nil, ErrTurned, ErrTurned} {
		if !errors.Is(refused[n], want) {
			t.Errorf("certificate %d: %v, want %v", 200+n, refused[n], want)
		}
	}
	w.pass(time.Minute)
	w.mustPush(scan{image: one})
	w.issue("300", "gated", one)
}

func TestWhatCouldNotBeRevokedIsTriedAgain(t *testing.T) {
	condemned := func(t *testing.T, w *world) (image string, err error) {
		t.Helper()
		image = config(1)
		w.run(image, 1)
		w.mustPush(scan{image: image})
		w.issue("100", "gated", image)
		w.pass(time.Minute)
		_, err = w.push(scan{image: image, findings: []string{"CVE-2026-1 CRITICAL"}})
		w.wantGate(image, false)
		return image, err
	}
	again := func(t *testing.T, w *world, sign *lister) {
		t.Helper()
		w.pass(time.Second)
		sign.want(t, "100")
		if got := len(w.log.of("svid.x509.revoke")); got != 1 {
			t.Errorf("%d audit lines", got)
		}
		signed := sign.signed
		w.pass(time.Second)
		if sign.signed != signed {
			t.Error("lists are signed although nothing is owed")
		}
	}
	t.Run("when the store does not take it", func(t *testing.T) {
		w, sign, full := newRevoking(t)
		full.set(true)
		if _, err := condemned(t, w); err == nil || !strings.Contains(err.Error(), "no space left") {
			t.Errorf("got %v", err)
		}
		sign.want(t)
		full.set(false)
		again(t, w, sign)
	})
	t.Run("when the list cannot be signed", func(t *testing.T) {
		w, sign, _ := newRevoking(t)
		sign.broken = true
		if _, err := condemned(t, w); err == nil || !strings.Contains(err.Error(), "the key is away") {
			t.Errorf("got %v", err)
		}
		sign.broken = false
		again(t, w, sign)
	})
	t.Run("when the server ends in between", func(t *testing.T) {
		w, sign, full := newRevoking(t)
		full.set(true)
		image, _ := condemned(t, w)
		full.set(false)
		w.issue("101", "quarantine", image)
		// Until the entries are known, all would seem to be lost.
		entries := w.view.entries
		w.view.entries, w.view.loading = nil, make(chan struct{})
		w.restart()
		if err := w.renewLists(t.Context()); err != nil {
			t.Fatal(err)
		}
		sign.want(t)
		w.view.entries = entries
		close(w.view.loading)
		if err := w.renewLists(t.Context()); err != nil {
			t.Fatal(err)
		}
		again(t, w, sign)
	})
}
