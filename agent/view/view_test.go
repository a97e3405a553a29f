package view_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func entry(id string, age int, selectors ...string) *identity.Entry {
	return &identity.Entry{
		ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id), Selectors: set(selectors...),
		CreatedAt: time.Unix(int64(1000-age), 0),
	}
}

func set(selectors ...string) attestor.Set {
	var all []attestor.Selector
	for _, text := range selectors {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			panic(err)
		}
		all = append(all, s)
	}
	return attestor.NewSet(all...)
}

func ids(entries []*identity.Entry) []string {
	out := []string{}
	for _, e := range entries {
		out = append(out, e.ID)
	}
	return out
}

func apply(t *testing.T, v *view.View, u view.Update) {
	t.Helper()
	if err := v.Apply(u); err != nil {
		t.Fatal(err)
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestMatch(t *testing.T) {
	v := view.New(nil)
	apply(t, v, view.Update{Rev: 1, Full: true, Entries: []*identity.Entry{
		entry("young", 1, "unix:uid:1"),
		entry("old", 9, "unix:uid:1", "unix:gid:1"),
		entry("other", 5, "unix:uid:1", "docker:label:app:shop"),
		entry("nobody", 5),
	}})
	for name, c := range map[string]struct {
		facts attestor.Set
		want  []string
	}{
		"all selectors of an entry must be there": {set("unix:uid:1"), []string{"young"}},
		"the oldest entry comes first":            {set("unix:uid:1", "unix:gid:1", "unix:user:x"), []string{"old", "young"}},
		"an entry without selectors is nobody's":  {set(), []string{}},
		"unknown facts match nothing":             {set("unix:uid:2"), []string{}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, ids(v.Picture().Match(c.facts))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestMatchAgreesWithLookingAtEveryEntry(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	v := view.New(nil)
	model := map[string]*identity.Entry{}
	random := func(n int) []string {
		var out []string
		for range n {
			out = append(out, fmt.Sprintf("t:%d", rnd.IntN(12)))
		}
		return out
	}
	for step := range 400 {
		u := view.Update{Rev: uint64(step + 1), Full: step%97 == 0}
		if u.Full {
			clear(model)
		}
		for range rnd.IntN(4) {
			e := entry(fmt.Sprint(rnd.IntN(40)), rnd.IntN(50), random(1+rnd.IntN(4))...)
			e.Revision = int64(step)
			if slices.ContainsFunc(u.Entries, func(o *identity.Entry) bool { return o.ID == e.ID }) {
				continue
			}
			u.Entries = append(u.Entries, e)
		}
		if id := fmt.Sprint(rnd.IntN(40)); !slices.ContainsFunc(u.Entries, func(o *identity.Entry) bool { return o.ID == id }) {
			u.RemovedEntries = append(u.RemovedEntries, id)
			delete(model, id)
		}
		for _, e := range u.Entries {
			model[e.ID] = e
		}
		var all []*identity.Entry
		for _, e := range model {
			all = append(all, e)
		}
		u.Checksum = identity.Checksum(all, nil)
		before := v.Picture()
		beforeIDs := ids(before.Entries())
		apply(t, v, u)
		facts := set(random(6)...)
		var want []*identity.Entry
		for _, e := range all {
			if e.Selectors.In(facts) {
				want = append(want, e)
			}
		}
		slices.SortFunc(want, identity.Older)
		if diff := cmp.Diff(ids(want), ids(v.Picture().Match(facts))); diff != "" {
			t.Fatalf("step %d: %s", step, diff)
		}
		if diff := cmp.Diff(beforeIDs, ids(before.Entries())); diff != "" {
			t.Fatalf("step %d: the old picture has changed: %s", step, diff)
		}
	}
}

func TestApply(t *testing.T) {
	one := entry("one", 1, "a:b")
	bundle := &identity.Bundle{TrustDomain: td, Sequence: 3}
	start := view.Update{
		StoreID: "s", Rev: 5, Full: true, Entries: []*identity.Entry{one}, Bundles: []*identity.Bundle{bundle},
		Checksum: identity.Checksum([]*identity.Entry{one}, []*identity.Bundle{bundle}),
	}
	t.Run("a change wakes whoever follows", func(t *testing.T) {
		v := view.New(nil)
		_, next := v.Follow()
		apply(t, v, start)
		if !closed(next) || v.Rev() != 5 || !v.Picture().Held() {
			t.Fatal("nobody was woken")
		}
	})
	t.Run("a revision that changes nothing wakes nobody", func(t *testing.T) {
		v := view.New(nil)
		apply(t, v, start)
		p, next := v.Follow()
		apply(t, v, view.Update{StoreID: "s", Rev: 6, Checksum: start.Checksum})
		again := start
		again.Rev = 7
		apply(t, v, again)
		if closed(next) {
			t.Error("somebody was woken for nothing")
		}
		if v.Rev() != 7 || v.Picture().Serial() != p.Serial() {
			t.Errorf("revision %d, serial %d", v.Rev(), v.Picture().Serial())
		}
	})
	t.Run("a taint without another sequence number is a change", func(t *testing.T) {
		v := view.New(nil)
		apply(t, v, start)
		p := v.Picture()
		tainted := start
		b := bundle.Clone()
		b.JWT = []identity.JWTAuthority{{KeyID: "k", Tainted: true}}
		tainted.Bundles = []*identity.Bundle{b}
		apply(t, v, tainted)
		if v.Picture().Serial() == p.Serial() {
			t.Error("not noticed")
		}
	})
	for name, u := range map[string]view.Update{
		"a wrong checksum":           {StoreID: "s", Rev: 6, Entries: []*identity.Entry{entry("two", 1, "a:b")}, Checksum: start.Checksum},
		"a difference for a store":   {StoreID: "t", Rev: 6, Entries: []*identity.Entry{entry("two", 1, "a:b")}},
		"a wrong checksum when full": {StoreID: "t", Rev: 1, Full: true, Checksum: []byte{1}},
	} {
		t.Run(name+" is drift and changes nothing", func(t *testing.T) {
			v := view.New(nil)
			apply(t, v, start)
			p, next := v.Follow()
			if err := v.Apply(u); !errors.Is(err, view.ErrDrift) {
				t.Fatalf("got %v", err)
			}
			if v.Picture() != p || closed(next) {
				t.Error("the picture was touched")
			}
		})
	}
	t.Run("bundles come and go", func(t *testing.T) {
		v := view.New(nil)
		apply(t, v, start)
		other := spiffeid.RequireTrustDomainFromString("other.org")
		apply(t, v, view.Update{StoreID: "s", Rev: 6, Bundles: []*identity.Bundle{{TrustDomain: other}}})
		if len(v.Picture().BundleList()) != 2 {
			t.Fatal("not there")
		}
		apply(t, v, view.Update{StoreID: "s", Rev: 7, RemovedBundles: []spiffeid.TrustDomain{other}, Checksum: start.Checksum})
	})
}

func TestNearest(t *testing.T) {
	v := view.New(nil)
	apply(t, v, view.Update{Rev: 1, Full: true, Entries: []*identity.Entry{
		entry("far", 1, "a:1", "a:2", "a:3"),
		entry("near", 1, "a:1", "b:1", "b:2"),
		entry("nearest", 1, "b:1", "b:2", "b:3", "a:1"),
		entry("match", 1, "b:1"),
	}})
	near := v.Picture().Nearest(set("b:1", "b:2", "b:3"), 2)
	if len(near) != 2 || near[0].Entry.ID != "nearest" || near[1].Entry.ID != "near" || near[0].Missing[0].String() != "a:1" {
		t.Errorf("got %+v", near)
	}
}

func TestWait(t *testing.T) {
	t.Run("ends with the first picture", func(t *testing.T) {
		v := view.New(nil)
		done := make(chan error, 1)
		go func() { done <- v.Wait(t.Context()) }()
		apply(t, v, view.Update{Rev: 1, Full: true})
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

// many returns 10,000 entries, each with one selector of its own and three that hundreds share.
func many() []*identity.Entry {
	var entries []*identity.Entry
	for n := range 10000 {
		entries = append(entries, entry(fmt.Sprintf("e%05d", n), n%1000,
			"k8s:cluster:one", fmt.Sprintf("k8s:ns:n%d", n%30), fmt.Sprintf("k8s:sa:s%d", n), fmt.Sprintf("unix:uid:%d", n%100)))
	}
	return entries
}

func BenchmarkMatch10000(b *testing.B) {
	v := view.New(nil)
	if err := v.Apply(view.Update{Rev: 1, Full: true, Entries: many()}); err != nil {
		b.Fatal(err)
	}
	facts := []string{"k8s:cluster:one", "k8s:ns:n17", "k8s:sa:s4217", "unix:uid:17", "unix:path:/bin/x"}
	for n := range 30 {
		facts = append(facts, fmt.Sprintf("k8s:pod-label:l%d:v", n))
	}
	s := set(facts...)
	if len(v.Picture().Match(s)) != 1 {
		b.Fatalf("matches %d", len(v.Picture().Match(s)))
	}
	for b.Loop() {
		v.Picture().Match(s)
	}
}

func BenchmarkApplyOneOf10000(b *testing.B) {
	v := view.New(nil)
	if err := v.Apply(view.Update{Rev: 1, Full: true, Entries: many()}); err != nil {
		b.Fatal(err)
	}
	rev := int64(1)
	for b.Loop() {
		rev++
		e := entry("e00042", 1, "k8s:cluster:one", "k8s:sa:s42")
		e.Revision = rev
		if err := v.Apply(view.Update{Rev: uint64(rev), Entries: []*identity.Entry{e}}); err != nil {
			b.Fatal(err)
		}
	}
}
