package verdict

import (
	"errors"
	"testing"
	"time"

	"github.com/assay-id/assay/server/audit"
)

func TestAnOperatorAcceptsAHeldReport(t *testing.T) {
	image := config(1)
	// held condemns an image by a report on 100 packages, and pushes a clean one on 10.
	held := func(t *testing.T) (*world, string) {
		t.Helper()
		w := newWorld(t, prod)
		w.mustPush(scan{image: image, packages: 100, findings: []string{critical}})
		w.pass(time.Minute)
		small := scan{image: image, at: w.now(), packages: 10}
		if _, err := w.push(small); !errors.Is(err, ErrHeld) {
			t.Fatalf("the push is answered with %v", err)
		}
		w.wantGate(image, false)
		return w, digestOf(small.json(t))
	}
	t.Run("with a reason, which is audited", func(t *testing.T) {
		w, hash := held(t)
		w.pass(time.Minute)
		out, err := w.Accept(t.Context(), hash, "", "distroless now, see SEC-7", "alice")
		if err != nil || out.Duplicate || len(out.Images) != 1 || out.Images[0] != image {
			t.Fatalf("%+v, %v", out, err)
		}
		w.wantGate(image, true)
		lines := w.log.of("evidence.accept")
		if len(lines) != 1 || lines[0].Caller != "alice" || lines[0].Report != hash || lines[0].Reason != "distroless now, see SEC-7" {
			t.Errorf("the audit log says %+v", lines)
		}
		w.restart()
		w.wantGate(image, true)
		if _, err := w.Accept(t.Context(), hash, "", "again", "alice"); !errors.Is(err, ErrNotHeld) {
			t.Errorf("a second time is answered with %v", err)
		}
		w.pass(time.Minute)
		w.mustPush(scan{image: image, packages: 10, findings: []string{critical}})
		w.wantGate(image, false)
	})
	t.Run("not without a reason, nor one that nobody pushed", func(t *testing.T) {
		w, hash := held(t)
		if _, err := w.Accept(t.Context(), hash, "", " ", "alice"); !errors.Is(err, ErrReason) {
			t.Errorf("no reason: %v", err)
		}
		for _, c := range [][2]string{{config(9), ""}, {hash, "reg/other@" + image}, {"", ""}} {
			if _, err := w.Accept(t.Context(), c[0], c[1], "why not", "alice"); !errors.Is(err, ErrNotHeld) {
				t.Errorf("%q: %v", c, err)
			}
		}
		w.wantGate(image, false)
		if n := len(w.log.of("evidence.accept")); n != 0 {
			t.Errorf("%d lines say that something was accepted", n)
		}
	})
	t.Run("not once something newer has come", func(t *testing.T) {
		w, hash := held(t)
		w.pass(time.Minute)
		w.mustPush(scan{image: image, packages: 100, findings: []string{critical}})
		if _, err := w.Accept(t.Context(), hash, "", "too late", "alice"); !errors.Is(err, ErrStale) {
			t.Errorf("got %v", err)
		}
		w.wantGate(image, false)
	})
	t.Run("not when the log cannot be written", func(t *testing.T) {
		w, hash := held(t)
		w.Audit = deaf{}
		if _, err := w.Accept(t.Context(), hash, "", "why not", "alice"); err == nil {
			t.Error("it was accepted without a trace")
		}
		w.wantGate(image, false)
	})
	t.Run("not after the rules changed, for its pusher may not be let in any more", func(t *testing.T) {
		w, hash := held(t)
		if err := w.Replace(t.Context(), w.rules); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Accept(t.Context(), hash, "", "why not", "alice"); !errors.Is(err, ErrNotHeld) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("what was pushed for two images needs to be told apart, and few wait", func(t *testing.T) {
		w, hash := held(t)
		doc := Document{Image: "reg/other@" + image, Content: scan{image: image, at: w.now(), packages: 10}.json(t)}
		w.hold(admin, doc, w.now())
		if _, err := w.Accept(t.Context(), hash, "", "which?", "alice"); !errors.Is(err, ErrNotHeld) {
			t.Errorf("got %v", err)
		}
		if _, err := w.Accept(t.Context(), hash, "reg/shop@"+image, "this one", "alice"); err != nil {
			t.Error(err)
		}
		for n := range 2 * maxHeld {
			doc.Content = append(doc.Content, byte(' '+n%2))
			w.hold(admin, doc, w.now())
		}
		if len(w.held) != maxHeld {
			t.Errorf("%d wait", len(w.held))
		}
	})
}

// deaf is an audit log that takes nothing.
type deaf struct{}

func (deaf) Write(audit.Line) error { return errors.New("disk full") }
