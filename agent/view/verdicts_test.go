package view_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

func digest(digit string) string { return "sha256:" + strings.Repeat(digit, 64) }

func verdict(digit string, seq uint64, selectors ...string) *identity.Verdict {
	return &identity.Verdict{Digest: digest(digit), Seq: seq, Selectors: set(selectors...)}
}

func TestMatchingWithVerdicts(t *testing.T) {
	v := view.New(nil)
	apply(t, v, view.Update{
		StoreID: "s", Rev: 1, Full: true,
		Entries: []*identity.Entry{
			entry("plain", 9, "unix:uid:1"), entry("scanned", 8, "unix:uid:1", "scan:policy:prod"),
			entry("both", 7, "scan:policy:prod", "prov:policy:ci"), entry("failed", 6, "scan:status:prod:fail"),
		},
		Verdicts: []*identity.Verdict{
			verdict("a", 1, "scan:policy:prod", "prov:policy:ci"), verdict("b", 2, "scan:status:prod:fail"), verdict("c", 3, "scan:policy:prod"),
		},
	})
	for _, c := range []struct {
		name  string
		facts []string
		want  []string
	}{
		{"without an image", []string{"unix:uid:1"}, []string{"plain"}},
		{"a good image", []string{"unix:uid:1", "image:id:" + digest("a")}, []string{"plain", "scanned", "both"}},
		{"a bad one", []string{"unix:uid:1", "image:id:" + digest("b")}, []string{"plain", "failed"}},
		{"one that nothing is known of", []string{"unix:uid:1", "image:id:" + digest("d")}, []string{"plain"}},
		{"facts that only a verdict can state", []string{"unix:uid:1", "scan:policy:prod", "prov:policy:ci", "sig:policy:x"}, []string{"plain"}},
		{"such facts beside a bad image", []string{"unix:uid:1", "scan:policy:prod", "image:id:" + digest("b")}, []string{"plain", "failed"}},
		{"two images have what both have", []string{"unix:uid:1", "image:id:" + digest("a"), "image:id:" + digest("c")}, []string{"plain", "scanned"}},
		{"a good image beside a bad one", []string{"unix:uid:1", "image:id:" + digest("a"), "image:id:" + digest("b")}, []string{"plain"}},
		{"a good image beside an unknown one", []string{"unix:uid:1", "image:id:" + digest("a"), "image:id:" + digest("d")}, []string{"plain"}},
		{"an image that is known by its manifest alone", []string{"unix:uid:1", "image:manifest:" + digest("a")}, []string{"plain", "scanned", "both"}},
		{"the manifest of a good image beside a bad one", []string{"unix:uid:1", "image:id:" + digest("b"), "image:manifest:" + digest("a")}, []string{"plain", "failed"}},
		{"an image's name is not its identity", []string{"unix:uid:1", "docker:image_id:" + digest("a")}, []string{"plain"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, ids(v.Picture().Match(set(c.facts...)))); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("what is missing counts verdicts too", func(t *testing.T) {
		near := v.Picture().Nearest(set("unix:uid:1", "image:id:"+digest("c")), 1)
		if len(near) != 1 || near[0].Entry.ID != "both" || len(near[0].Missing) != 1 {
			t.Errorf("nearest %+v", near)
		}
	})
}

func TestVerdictsComeAndGo(t *testing.T) {
	v := view.New(nil)
	checked := func(u view.Update, held ...identity.HeldVerdict) view.Update {
		u.StoreID = "s"
		u.Checksum = identity.ChecksumVerdicts(identity.Checksum(nil, nil), held)
		return u
	}
	a1 := identity.HeldVerdict{Digest: digest("a"), Seq: 1}
	b2 := identity.HeldVerdict{Digest: digest("b"), Seq: 2}
	a3 := identity.HeldVerdict{Digest: digest("a"), Seq: 3}
	apply(t, v, checked(view.Update{Rev: 1, Full: true, Verdicts: []*identity.Verdict{verdict("a", 1)}}, a1))
	_, wake := v.Follow()
	apply(t, v, checked(view.Update{Rev: 2, Verdicts: []*identity.Verdict{verdict("b", 2)}}, a1, b2))
	if !closed(wake) {
		t.Error("nobody is woken")
	}
	apply(t, v, checked(view.Update{Rev: 3, Verdicts: []*identity.Verdict{verdict("a", 3)}}, a3, b2))
	apply(t, v, checked(view.Update{Rev: 4, RemovedVerdicts: []string{digest("b")}}, a3))
	t.Run("a verdict too many is drift", func(t *testing.T) {
		u := checked(view.Update{Rev: 5, Verdicts: []*identity.Verdict{verdict("c", 9)}}, a3)
		if err := v.Apply(u); !errors.Is(err, view.ErrDrift) {
			t.Error(err)
		}
	})
	t.Run("a full picture with the same ones wakes nobody", func(t *testing.T) {
		_, wake := v.Follow()
		apply(t, v, checked(view.Update{Rev: 6, Full: true, Verdicts: []*identity.Verdict{verdict("a", 3)}}, a3))
		if closed(wake) {
			t.Error("somebody is woken")
		}
		apply(t, v, checked(view.Update{Rev: 7, Full: true}))
		if !closed(wake) || len(v.Picture().Verdicts) != 0 {
			t.Error("one without them wakes nobody, or leaves some")
		}
	})
}

func TestVerdictsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := view.New(nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = v.Run(ctx) }()
		defer func() { cancel(); <-done }()
		ends := verdict("a", 1, "scan:policy:prod")
		ends.NotAfter = time.Now().Add(90 * time.Second)
		facts := set("image:id:" + digest("a"))
		held := []identity.HeldVerdict{{Digest: digest("a"), Seq: 1}}
		apply(t, v, view.Update{
			StoreID: "s", Rev: 1, Full: true, Entries: []*identity.Entry{entry("gated", 1, "scan:policy:prod")}, Verdicts: []*identity.Verdict{ends},
		})
		matches := func() int { return len(v.Picture().Match(facts)) }

		time.Sleep(89 * time.Second)
		synctest.Wait()
		p, wake := v.Follow()
		if matches() != 1 || closed(wake) {
			t.Fatal("it ended too early")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if matches() != 0 || !closed(wake) || v.Picture().Serial() == p.Serial() {
			t.Fatal("it has not ended, or nobody was told")
		}
		if len(v.Picture().Verdicts) != 1 {
			t.Error("it is not held any more: the server would not know")
		}
		// What is held is still what the server thinks.
		later := verdict("a", 2, "scan:policy:prod")
		later.NotAfter = time.Now().Add(time.Minute)
		held[0].Seq = 2
		apply(t, v, view.Update{
			StoreID: "s", Rev: 2, Verdicts: []*identity.Verdict{later},
			Checksum: identity.ChecksumVerdicts(identity.Checksum(v.Picture().Entries(), nil), held),
		})
		if matches() != 1 {
			t.Error("a later one does not count")
		}

		_, wake = v.Follow()
		v.Lapse(true)
		if matches() != 0 || !closed(wake) {
			t.Error("an agent that is cut off vouches for it, or nobody was told")
		}
		_, wake = v.Follow()
		apply(t, v, view.Update{StoreID: "s", Rev: 3})
		if matches() != 0 || closed(wake) {
			t.Error("a picture ends the lapse")
		}
		v.Lapse(false)
		if matches() != 1 || !closed(wake) {
			t.Error("it does not count again")
		}
	})
}
