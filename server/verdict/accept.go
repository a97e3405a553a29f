package verdict

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/server/audit"
)

// Errors of Accept.
var (
	// ErrNotHeld says that no such report waits for an operator.
	ErrNotHeld = errors.New("no such report is held")
	// ErrReason says that an operator did not say why.
	ErrReason = errors.New("say why: somebody will ask")
)

// waiting is a report that was refused with ErrHeld, as it came. It is in memory only: after a restart
// its pusher brings it again, and is told again that it is held.
type waiting struct {
	who Pusher
	doc Document
	at  time.Time
}

// Limits on what waits; beyond them the oldest is forgotten.
const (
	maxHeld      = 32
	maxHeldBytes = 64 << 20
)

// hold keeps a report for an operator.
func (s *Service) hold(who Pusher, d Document, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	hash := digestOf(d.Content)
	s.held = slices.DeleteFunc(s.held, func(w waiting) bool { return w.doc.Image == d.Image && digestOf(w.doc.Content) == hash })
	s.held = append(s.held, waiting{who: who, doc: d, at: at})
	size := 0
	for n := range s.held {
		size += s.held[n].size()
	}
	for len(s.held) > maxHeld || size > maxHeldBytes {
		size -= s.held[0].size()
		s.held = slices.Delete(s.held, 0, 1)
	}
}

func (w *waiting) size() int {
	n := len(w.doc.Content)
	for _, m := range w.doc.Manifests {
		n += len(m)
	}
	return n
}

// Accept puts a report in force that was held (ErrHeld), by the digest of its bytes and, if the same bytes
// were pushed for several images, by what it was pushed for. Nothing else is waived: it counts from when it
// was pushed, and is refused if something newer has come since. who and reason are for the audit log.
func (s *Service) Accept(ctx context.Context, hash, image, reason, who string) (*Pushed, error) {
	if strings.TrimSpace(reason) == "" {
		return nil, fmt.Errorf("accept report: %w", ErrReason)
	}
	s.mu.Lock()
	var found []waiting
	for _, w := range s.held {
		if digestOf(w.doc.Content) == hash && (image == "" || w.doc.Image == image) {
			found = append(found, w)
		}
	}
	s.mu.Unlock()
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("accept report %q: %w; what is held is forgotten at a restart and when the rules change, and its pusher brings it again", clip(hash), ErrNotHeld)
	case len(found) > 1:
		return nil, fmt.Errorf("accept report %s: %w: it was pushed for %s and %s, say which is meant", hash, ErrNotHeld, clip(found[0].doc.Image), clip(found[1].doc.Image))
	}
	w := found[0]
	// The line comes first: what is accepted without a trace cannot be asked about.
	line := audit.Line{
		Event: "evidence.accept", Outcome: audit.Allow, Caller: who, Report: hash, Reason: clip(reason),
		Facts: []string{"image:" + clip(w.doc.Image), "pushed-by:" + clip(w.who.Name)},
	}
	if err := s.Audit.Write(line); err != nil {
		return nil, fmt.Errorf("accept report: %w", err)
	}
	out, err := s.pushed(ctx, w.who, w.doc, &incoming{now: w.at, hash: hash, accepted: true})
	if err != nil {
		return nil, fmt.Errorf("accept report: %w", err)
	}
	s.mu.Lock()
	s.held = slices.DeleteFunc(s.held, func(other waiting) bool { return other.doc.Image == w.doc.Image && digestOf(other.doc.Content) == hash })
	s.mu.Unlock()
	return out, nil
}
