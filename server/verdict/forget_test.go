package verdict

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/server/records"
)

const day = 24 * time.Hour

func TestWhatNobodyUsesIsForgotten(t *testing.T) {
	w := newWorld(t, prod, func(w *world) { w.rules.KeepUnused = 90 * day })
	blob, manifest := manifestOf(config(3))
	idle, running, byManifest := config(1), config(2), config(3)
	old := scan{image: idle, at: w.now(), findings: []string{critical}}
	w.mustPush(old)
	w.mustPush(scan{image: running})
	if _, err := w.send(manifest, scan{image: byManifest, at: w.now()}.json(t), blob); err != nil {
		t.Fatal(err)
	}
	w.run(running, 1)
	w.run(manifest, 1)
	known := func(digest string) bool { _, err := w.Show(digest, nil); return err == nil }
	// days lets time pass as it does, with its rounds.
	days := func(n int) {
		for range n {
			w.pass(day)
		}
	}
	days(89)
	if !known(idle) || !known(running) || !known(manifest) {
		t.Fatal("something was forgotten before its time")
	}
	t.Run("a restart, after which no agent has said yet what it runs, takes nothing for unused", func(t *testing.T) {
		w.view.mu.Lock()
		runs := w.view.runs
		w.view.runs = map[string]int{}
		w.view.mu.Unlock()
		w.restart()
		days(3)
		if !known(running) || !known(manifest) || !known(byManifest) {
			t.Error("an image that runs was forgotten")
		}
		w.view.mu.Lock()
		w.view.runs = runs
		w.view.mu.Unlock()
	})
	t.Run("the image goes with its documents, its verdict and its bytes", func(t *testing.T) {
		days(2)
		if known(idle) {
			t.Fatal("it is still known")
		}
		w.restart()
		if known(idle) {
			t.Error("it is known again after a restart")
		}
		if _, err := w.rec.Verdict(t.Context(), idle); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("its verdict: %v", err)
		}
		e, err := w.rec.ReadEvidence(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range e.Documents {
			if d.GetImage() == "reg/shop@"+idle {
				t.Error("a document is left")
			}
		}
		blobs, err := w.rec.Blobs(t.Context())
		if err != nil || len(blobs) != len(w.state.blobs)-1 { // those without a blob name ""
			t.Errorf("%d blobs are stored, %d are named: %v", len(blobs), len(w.state.blobs)-1, err)
		}
		if lines := w.log.of("evidence.forget"); len(lines) != 1 || len(lines[0].Facts) != 1 || lines[0].Facts[0] != idle {
			t.Errorf("the audit log says %+v", lines)
		}
	})
	t.Run("its mark stays, compactly, and an older clean report is refused", func(t *testing.T) {
		marks, err := os.ReadFile(w.cfg.MarksPath)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(marks), "\n"); n != len(w.state.marks) {
			t.Errorf("the file has %d lines for %d marks", n, len(w.state.marks))
		}
		words := 0
		for _, m := range w.state.marks {
			if m.GetRepository() == "" && m.GetSubject() == "" && m.GetTime() != 0 {
				words++
			}
		}
		if words != 1 {
			t.Errorf("%d marks are compact", words)
		}
		if _, err := w.push(scan{image: idle, at: old.at.Add(-time.Hour)}); !errors.Is(err, ErrStale) {
			t.Errorf("a replay is answered with %v", err)
		}
	})
	t.Run("it comes back as it was with the report that was known last, or a newer one", func(t *testing.T) {
		if p, err := w.push(old); err != nil || p.Duplicate {
			t.Errorf("%+v, %v", p, err)
		}
		w.wantGate(idle, false)
		w.mustPush(scan{image: idle})
		w.wantGate(idle, true)
	})
	t.Run("what ran goes when it has not for so long, under both its names", func(t *testing.T) {
		w.view.mu.Lock()
		w.view.runs = map[string]int{running: 1}
		w.view.mu.Unlock()
		days(92)
		if known(manifest) || known(byManifest) {
			t.Error("it is still known")
		}
		if !known(running) {
			t.Error("the one that runs was forgotten")
		}
		if n := len(w.state.leads); n != 0 {
			t.Errorf("%d digests lead nowhere", n)
		}
	})
	t.Run("the same report again is a use", func(t *testing.T) {
		image := config(4)
		s := scan{image: image, at: w.now()}
		w.mustPush(s)
		days(80)
		if p, err := w.push(s); err != nil || !p.Duplicate {
			t.Fatalf("%+v, %v", p, err)
		}
		days(80)
		if !known(image) {
			t.Error("it was forgotten")
		}
	})
}

func TestNothingIsForgottenThatCouldNotBeWritten(t *testing.T) {
	w := newWorld(t, prod, func(w *world) { w.rules.KeepUnused = 2 * day })
	image := config(1)
	w.mustPush(scan{image: image})
	store := &brokenStore{Store: w.Store, broken: true}
	w.Store = store
	w.pass(3 * day)
	if _, err := w.Show(image, nil); err != nil {
		t.Errorf("it is forgotten: %v", err)
	}
	store.broken = false
	w.pass(longest)
	if _, err := w.Show(image, nil); err == nil {
		t.Error("it is still known")
	}
}
