package view

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/view/viewtest"
	"github.com/assay-id/assay/workloadapi/identity"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// model is what a view must look like, worked out from nothing each time it is asked.
type model struct {
	entries map[string]*identity.Entry
	nodes   map[spiffeid.ID]*records.Node
	bundles map[spiffeid.TrustDomain]*identity.Bundle
	// verdicts are by digest; running is what agents report on their newest stream.
	verdicts map[string]*records.Verdict
	running  map[spiffeid.ID]map[string]bool
	now      time.Time
}

func newModel() *model {
	return &model{
		entries: map[string]*identity.Entry{},
		nodes:   map[spiffeid.ID]*records.Node{},
		bundles: map[spiffeid.TrustDomain]*identity.Bundle{}, verdicts: map[string]*records.Verdict{},
		running: map[spiffeid.ID]map[string]bool{},
		now:     time.Unix(1_000_000, 0),
	}
}

func (m *model) apply(c records.Change) {
	for _, e := range c.Entries {
		if delete(m.entries, e.ID); e.Entry != nil {
			m.entries[e.ID] = e.Entry
		}
	}
	for _, n := range c.Nodes {
		if delete(m.nodes, n.ID); n.Node != nil {
			m.nodes[n.ID] = n.Node
		}
	}
	for _, v := range c.Verdicts {
		if delete(m.verdicts, v.Digest); v.Verdict != nil {
			m.verdicts[v.Digest] = v.Verdict
		}
	}
	for _, b := range c.Bundles {
		if delete(m.bundles, b.TrustDomain); b.Bundle != nil {
			m.bundles[b.TrustDomain] = b.Bundle
		}
	}
}

// text describes an agent's picture: every entry with its revision, every bundle with its number.
func (m *model) text(id spiffeid.ID) string {
	server := spiffeid.RequireFromPath(td, "/spire/server")
	allowed := map[*identity.Entry]bool{}
	if node := m.nodes[id]; node != nil && !node.Banned {
		parents := map[spiffeid.ID]bool{id: true}
		for _, e := range m.entries {
			if e.ParentID == server && e.Selectors.Len() > 0 && e.Selectors.In(node.Selectors) && !e.Expired(m.now) &&
				!strings.HasPrefix(e.SPIFFEID.Path(), "/spire/") {
				parents[e.SPIFFEID] = true
			}
		}
		for grown := true; grown; {
			grown = false
			for _, e := range m.entries {
				if !allowed[e] && parents[e.ParentID] && !e.Expired(m.now) {
					allowed[e], grown = true, true
					if !strings.HasPrefix(e.SPIFFEID.Path(), "/spire/") {
						parents[e.SPIFFEID] = true
					}
				}
			}
		}
	}
	var lines []string
	named := map[spiffeid.TrustDomain]bool{td: true}
	for e := range allowed {
		lines = append(lines, line(e))
		for _, other := range e.FederatesWith {
			named[other] = true
		}
	}
	slices.Sort(lines)
	var tail []string
	for _, b := range m.bundles {
		if named[b.TrustDomain] && b.TrustDomain != td {
			tail = append(tail, fmt.Sprintf("bundle %s %d", b.TrustDomain, b.Sequence))
		}
	}
	slices.Sort(tail)
	if own := m.bundles[td]; own != nil {
		tail = slices.Insert(tail, 0, fmt.Sprintf("bundle %s %d", td, own.Sequence))
	}
	if node := m.nodes[id]; node != nil && !node.Banned {
		for _, digest := range slices.Sorted(maps.Keys(m.running[id])) {
			if v := m.verdicts[digest]; v != nil {
				tail = append(tail, verdictLine(v))
			}
		}
	}
	return strings.Join(append(lines, tail...), "\n")
}

func verdictLine(v *records.Verdict) string { return fmt.Sprintf("verdict %s %d", v.Digest, v.Seq) }

func line(e *identity.Entry) string {
	return fmt.Sprintf("entry %s r%d %s < %s", e.ID, e.Revision, e.SPIFFEID, e.ParentID)
}

func pictureText(p *AgentPicture) string {
	var lines []string
	for _, e := range p.Entries {
		lines = append(lines, line(e))
	}
	for _, b := range p.Bundles {
		lines = append(lines, fmt.Sprintf("bundle %s %d", b.TrustDomain, b.Sequence))
	}
	for _, v := range p.Verdicts {
		lines = append(lines, verdictLine(v))
	}
	return strings.Join(lines, "\n")
}

// world makes random changes out of few names, so that they meet often.
type world struct {
	draw func(n int) int
	rev  int64
	now  time.Time
	// stream counts the streams of agents.
	stream uint64
}

var (
	agentIDs = ids("/spire/agent/a", "/spire/agent/b", "/spire/agent/c", "/spire/agent/d")
	places   = ids("/p", "/q", "/r", "/s", "/t")
	parents  = append(append(ids("/spire/server", "/spire/server"), agentIDs...), places...)
	digests  = []string{"sha256:a", "sha256:b", "sha256:c", "sha256:d", "sha256:e"}
	others   = []spiffeid.TrustDomain{
		spiffeid.RequireTrustDomainFromString("one.test"), spiffeid.RequireTrustDomainFromString("two.test"),
	}
)

func ids(paths ...string) []spiffeid.ID {
	var ids []spiffeid.ID
	for _, p := range paths {
		ids = append(ids, spiffeid.RequireFromPath(td, p))
	}
	return ids
}

func (w *world) selectors() attestor.Set {
	var list []attestor.Selector
	for i := range 3 {
		if w.draw(2) == 0 {
			list = append(list, attestor.Selector{Type: "t", Value: fmt.Sprint(i)})
		}
	}
	if w.draw(8) == 0 {
		list = append(list, attestor.Selector{Type: "scan", Value: "policy:p"})
	}
	return attestor.NewSet(list...)
}

// report has an agent report what it runs, on a new stream or an old one, or leave.
func (w *world) report(v *View, m *model) {
	id := append(agentIDs, never)[w.draw(len(agentIDs)+1)]
	if w.draw(4) == 0 { // a stream that was replaced says something, which is nothing
		if m.running[id] != nil {
			v.SetRunning(id, 0, digests)
		}
		return
	}
	w.stream++
	runs := map[string]bool{}
	for _, d := range digests {
		if w.draw(3) == 0 {
			runs[d] = true
		}
	}
	m.running[id] = runs
	v.SetRunning(id, w.stream, slices.Collect(maps.Keys(runs)))
	if w.draw(5) == 0 {
		v.Leave(id, w.stream)
		if w.draw(2) == 0 {
			delete(m.running, id)
			v.forget(id, w.stream)
		}
	}
}

func (w *world) entry(id string) *identity.Entry {
	w.rev++
	e := &identity.Entry{
		ID:        id,
		ParentID:  parents[w.draw(len(parents))],
		SPIFFEID:  places[w.draw(len(places))],
		Selectors: w.selectors(),
		Revision:  w.rev,
	}
	switch w.draw(8) {
	case 0:
		e.SPIFFEID = e.ParentID
	case 1:
		e.ExpiresAt = w.now.Add(time.Duration(w.draw(20)-5) * time.Second)
	case 2:
		e.FederatesWith = others[:1+w.draw(2)]
	case 3:
		e.SPIFFEID = agentIDs[0] // which the API refuses
	}
	return e
}

func (w *world) change() records.Change {
	var c records.Change
	for range w.draw(4) {
		id := fmt.Sprintf("e%02d", w.draw(25))
		if slices.ContainsFunc(c.Entries, func(o records.EntryChange) bool { return o.ID == id }) {
			continue
		}
		if w.draw(3) == 0 {
			c.Entries = append(c.Entries, records.EntryChange{ID: id})
		} else {
			c.Entries = append(c.Entries, records.EntryChange{ID: id, Entry: w.entry(id)})
		}
	}
	if w.draw(3) == 0 {
		id := agentIDs[w.draw(len(agentIDs))]
		switch w.draw(5) {
		case 0:
			c.Nodes = append(c.Nodes, records.NodeChange{ID: id})
		default:
			c.Nodes = append(c.Nodes, records.NodeChange{ID: id, Node: &records.Node{
				ID: id, Selectors: w.selectors(), Banned: w.draw(6) == 0, AgentVersion: fmt.Sprint(w.draw(3)),
			}})
		}
	}
	if w.draw(6) == 0 {
		w.rev++
		name := append(others[:2:2], td)[w.draw(3)]
		change := records.BundleChange{TrustDomain: name}
		if w.draw(4) > 0 {
			change.Bundle = &identity.Bundle{TrustDomain: name, Sequence: uint64(w.rev)}
		}
		c.Bundles = append(c.Bundles, change)
	}
	if w.draw(3) == 0 {
		w.rev++
		digest := digests[w.draw(len(digests))]
		change := records.VerdictChange{Digest: digest}
		if w.draw(4) > 0 {
			change.Verdict = &records.Verdict{Digest: digest, Seq: uint64(w.rev)}
		}
		c.Verdicts = append(c.Verdicts, change)
	}
	return c
}

// follower holds a picture until it is told that another is in force.
type follower struct {
	picture *AgentPicture
	text    string
	wake    <-chan struct{}
}

var never = spiffeid.RequireFromPath(td, "/spire/agent/never")

// play makes changes as drawn and holds the view against the model after each.
func play(t *testing.T, steps int, draw func(n int) int) {
	t.Helper()
	m := newModel()
	v := New(viewtest.New("store"), td, Config{Now: func() time.Time { return m.now }})
	w := &world{draw: draw}
	followers := map[spiffeid.ID]*follower{}
	for step := range steps {
		w.now = m.now
		c := w.change()
		c.Rev = kv.Rev(step + 1)
		switch draw(6) {
		case 0: // time passes, or the clock is set back
			m.now = m.now.Add(time.Duration(draw(12)-3) * time.Second)
			w.now = m.now
		}
		m.apply(c)
		if draw(10) == 0 { // it is not told, but has to find out from a snapshot
			snap := &records.Snapshot{Rev: c.Rev}
			for _, e := range m.entries {
				snap.Entries = append(snap.Entries, e)
			}
			for _, n := range m.nodes {
				snap.Nodes = append(snap.Nodes, n)
			}
			for _, b := range m.bundles {
				snap.Bundles = append(snap.Bundles, b)
			}
			for _, verdict := range m.verdicts {
				snap.Verdicts = append(snap.Verdicts, verdict)
			}
			c = v.graph.difference(snap)
		}
		v.apply("store", c)
		for _, n := range c.Nodes {
			if n.Node == nil || n.Node.Banned {
				delete(m.running, n.ID) // it has to report anew
			}
		}
		if draw(3) == 0 {
			w.report(v, m)
		}
		for _, id := range append(agentIDs, never) {
			want := m.text(id)
			if f := followers[id]; f != nil {
				replaced := false
				select {
				case <-f.wake:
					replaced = true
				default:
				}
				if !replaced && f.text != want {
					t.Fatalf("step %d: %s was not woken\nhas:\n%s\nwant:\n%s", step, id, f.text, want)
				}
				if !replaced && m.nodes[id] != nil && v.Agent(id) != f.picture {
					t.Fatalf("step %d: the picture of %s was replaced without waking", step, id)
				}
			}
			if draw(3) == 0 {
				continue // somebody who does not look each time
			}
			p, wake := v.Follow(id)
			if diff := cmp.Diff(want, pictureText(p)); diff != "" {
				t.Fatalf("step %d: picture of %s (-want +got):\n%s", step, id, diff)
			}
			if f := followers[id]; f != nil && p.Rev < f.picture.Rev {
				t.Fatalf("step %d: revision of %s went back from %d to %d", step, id, f.picture.Rev, p.Rev)
			}
			checkSums(t, p)
			followers[id] = &follower{picture: p, text: want, wake: wake}
		}
		checkIndexes(t, v, m)
		checkRunners(t, v, m)
	}
	for _, id := range append(agentIDs, never) {
		v.SetRunning(id, w.stream+1, nil)
		v.Leave(id, w.stream+1)
		v.forget(id, w.stream+1)
	}
	for digest := range m.verdicts {
		v.apply("store", records.Change{Rev: v.Rev() + 1, Verdicts: []records.VerdictChange{{Digest: digest}}})
	}
	for id := range m.entries {
		v.apply("store", records.Change{Rev: v.Rev() + 1, Entries: []records.EntryChange{{ID: id}}})
	}
	for id := range m.nodes {
		v.apply("store", records.Change{Rev: v.Rev() + 1, Nodes: []records.NodeChange{{ID: id}}})
	}
	g := &v.graph
	if n := len(g.vertices) + len(g.postings) + len(g.aliases) + len(g.groups.of) + g.entries.size + g.nodes.size + g.expiring.size +
		len(g.images.verdicts) + len(g.images.reports) + len(g.images.runners); n != 0 {
		t.Fatalf("an emptied view still holds %d things: %d vertices, %d postings, %d aliases, %d groups", n,
			len(g.vertices), len(g.postings), len(g.aliases), len(g.groups.of))
	}
}

// checkSums holds a picture's checksum, and that of its plain form, against what an agent computes.
func checkSums(t *testing.T, p *AgentPicture) {
	t.Helper()
	var held []identity.HeldVerdict
	for _, v := range p.Verdicts {
		held = append(held, identity.HeldVerdict{Digest: v.Digest, Seq: v.Seq})
	}
	if string(p.Checksum()) != string(identity.ChecksumVerdicts(identity.Checksum(p.Entries, p.Bundles), held)) {
		t.Fatal("checksum is of another picture")
	}
	plain := p.Plain()
	if len(plain.Verdicts) != 0 || slices.ContainsFunc(plain.Entries, (*identity.Entry).Gated) {
		t.Fatal("the plain picture has verdicts or entries that demand some")
	}
	ungated := 0
	for _, e := range p.Entries {
		if !e.Gated() {
			ungated++
		}
	}
	if len(plain.Entries) != ungated || len(plain.Bundles) != len(p.Bundles) || plain.Rev != p.Rev || plain.StoreID != p.StoreID {
		t.Fatal("the plain picture lacks more than it should")
	}
	if string(plain.Checksum()) != string(identity.Checksum(plain.Entries, plain.Bundles)) {
		t.Fatal("checksum of the plain picture is of another one")
	}
}

func checkRunners(t *testing.T, v *View, m *model) {
	t.Helper()
	counts := maps.Collect(v.Digests())
	running, _ := v.FollowDigests()
	for _, digest := range digests {
		var want []spiffeid.ID
		for id, runs := range m.running {
			if runs[digest] {
				want = append(want, id)
			}
		}
		slices.SortFunc(want, compareIDs)
		if got := v.Runners(digest); !slices.Equal(got, want) || counts[digest] != len(want) || slices.Contains(running, digest) != (len(want) > 0) {
			t.Fatalf("%s is run by %v (%d), want %v", digest, got, counts[digest], want)
		}
		if got, _ := v.Verdict(digest); got != m.verdicts[digest] {
			t.Fatalf("verdict on %s is %v, want %v", digest, got, m.verdicts[digest])
		}
	}
}

func checkIndexes(t *testing.T, v *View, m *model) {
	t.Helper()
	if got := v.EntryCount(); got != len(m.entries) {
		t.Fatalf("%d entries, want %d", got, len(m.entries))
	}
	listed, next := v.ListEntries(EntryFilter{}, "", 0)
	if next != "" || !slices.IsSortedFunc(listed, byID) || len(listed) != len(m.entries) {
		t.Fatalf("list of %d entries (next %q) is not the %d sorted ones", len(listed), next, len(m.entries))
	}
	for _, e := range listed {
		if !sameEntry(e, m.entries[e.ID]) {
			t.Fatalf("entry %s differs", e.ID)
		}
	}
	for _, p := range places {
		want := 0
		for _, e := range m.entries {
			if e.SPIFFEID == p {
				want++
			}
		}
		if got := v.CountEntries(EntryFilter{SPIFFEID: &p}); got != want {
			t.Fatalf("%d entries with SPIFFE ID %s, want %d", got, p, want)
		}
	}
	if got := len(v.Nodes()); got != len(m.nodes) {
		t.Fatalf("%d nodes, want %d", got, len(m.nodes))
	}
}

func TestViewIsTheModel(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprintf("random changes %d", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			play(t, 120, r.IntN)
		})
	}
}

// FuzzView lets the fuzzer choose the changes.
func FuzzView(f *testing.F) {
	for seed := range uint64(4) {
		r := rand.New(rand.NewPCG(seed, 2))
		var b []byte
		for range 25 {
			b = binary.BigEndian.AppendUint64(b, r.Uint64())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1024 {
			return
		}
		steps := len(b) / 12
		play(t, steps, func(n int) int {
			if len(b) == 0 {
				return 0
			}
			d := int(b[0]) % n
			b = b[1:]
			return d
		})
	})
}
