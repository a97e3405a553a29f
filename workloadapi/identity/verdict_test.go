package identity

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/wire/feedv1"
)

func selectorsOf(t testing.TB, texts ...string) attestor.Set {
	t.Helper()
	var list []attestor.Selector
	for _, text := range texts {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, s)
	}
	return attestor.NewSet(list...)
}

var someDigest = "sha256:" + strings.Repeat("0a", 32)

func TestVerdictWire(t *testing.T) {
	v := &Verdict{
		Digest: someDigest, Seq: 1 << 60, Selectors: selectorsOf(t, "scan:policy:prod", "prov:source:https://example.org/x", "sig:policy:ci"),
		NotAfter: time.Unix(1_700_000_000, 0).UTC(), Policies: []PolicyVerdict{{Policy: "prod", Status: "grace", Summary: "until tomorrow"}},
	}
	got, err := VerdictFromWire(v.Wire())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(v, got, cmp.Comparer(attestor.Set.Equal)); diff != "" {
		t.Error(diff)
	}
	for name, change := range map[string]func(*feedv1.Verdict){
		"a short digest":                 func(w *feedv1.Verdict) { w.Digest = w.GetDigest()[:70] },
		"a digest in upper case":         func(w *feedv1.Verdict) { w.Digest = strings.ToUpper(w.GetDigest()) },
		"another algorithm":              func(w *feedv1.Verdict) { w.Digest = "sha512:" + strings.Repeat("0", 64) },
		"a fact that only attestors say": func(w *feedv1.Verdict) { w.Selectors = []*types.Selector{{Type: "unix", Value: "uid:0"}} },
		"an image of its own":            func(w *feedv1.Verdict) { w.Selectors = []*types.Selector{{Type: "image", Value: "id:x"}} },
		"an empty selector":              func(w *feedv1.Verdict) { w.Selectors = []*types.Selector{{Type: "scan"}} },
		"a negative end":                 func(w *feedv1.Verdict) { w.NotAfter = -1 },
		"an end far beyond time":         func(w *feedv1.Verdict) { w.NotAfter = 1 << 62 },
		"too many policies":              func(w *feedv1.Verdict) { w.Policies = make([]*feedv1.PolicyVerdict, 101) },
		"a novel":                        func(w *feedv1.Verdict) { w.Policies[0].Summary = strings.Repeat("x", 2000) },
	} {
		w := proto.CloneOf(v.Wire())
		change(w)
		if _, err := VerdictFromWire(w); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	if _, err := VerdictFromWire(nil); err == nil {
		t.Error("nothing is accepted")
	}
}

func TestGates(t *testing.T) {
	e := &Entry{Selectors: selectorsOf(t, "docker:label:app:shop", "image:id:"+someDigest, "scan:policy:prod", "prov:policy:ci", "sig:policy:ci")}
	if !e.Gated() || !e.Gates().Equal(selectorsOf(t, "scan:policy:prod", "prov:policy:ci", "sig:policy:ci")) {
		t.Errorf("gates %v", e.Gates())
	}
	if got := Ungated(e.Selectors); !got.Equal(selectorsOf(t, "docker:label:app:shop", "image:id:"+someDigest)) {
		t.Errorf("ungated %v", got)
	}
	if got := Digests(e.Selectors); len(got) != 1 || got[0] != someDigest {
		t.Errorf("digests %v", got)
	}
	plain := &Entry{Selectors: selectorsOf(t, "unix:uid:1", "scanner:policy:prod", "image:id:latest", "image:manifest:"+someDigest, "claim:image:id:"+someDigest)}
	if got := Running(plain.Selectors); len(got) != 1 || got[0] != someDigest {
		t.Errorf("an image that is known by its manifest alone runs as %v", got)
	}
	const other = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	if got := Running(selectorsOf(t, "image:manifest:"+other, "image:id:"+someDigest)); len(got) != 1 || got[0] != someDigest {
		t.Errorf("an image that is known by its config digest too runs as %v", got)
	}
	if plain.Gated() || plain.Gates().Len() != 0 || len(Digests(plain.Selectors)) != 0 || !Ungated(plain.Selectors).Equal(plain.Selectors) {
		t.Error("selectors of other types count as gates or images")
	}
}

func TestChecksumOfVerdicts(t *testing.T) {
	rest := Checksum(nil, nil)
	if !bytes.Equal(ChecksumVerdicts(rest, nil), rest) {
		t.Error("without verdicts it is another one")
	}
	seen := map[string]bool{string(rest): true}
	other := "sha256:" + strings.Repeat("0b", 32)
	for _, held := range [][]HeldVerdict{
		{{someDigest, 0}}, {{someDigest, 1}}, {{other, 1}}, {{someDigest, 1}, {other, 1}}, {{someDigest, 1}, {other, 2}},
	} {
		sum := ChecksumVerdicts(rest, held)
		if seen[string(sum)] {
			t.Errorf("%v has the checksum of others", held)
		}
		seen[string(sum)] = true
	}
}

// FuzzVerdictFromWire checks that what is accepted goes there and back.
func FuzzVerdictFromWire(f *testing.F) {
	seed, err := proto.Marshal((&Verdict{Digest: someDigest, Seq: 1, Selectors: selectorsOf(f, "scan:policy:prod")}).Wire())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, raw []byte) {
		var w feedv1.Verdict
		if proto.Unmarshal(raw, &w) != nil {
			return
		}
		v, err := VerdictFromWire(&w)
		if err != nil {
			return
		}
		again, err := VerdictFromWire(v.Wire())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(v, again, cmp.Comparer(attestor.Set.Equal)); diff != "" {
			t.Error(diff)
		}
	})
}
