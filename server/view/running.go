package view

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// linger is how long an agent whose stream has ended still counts as running what it reported last.
// An agent that lost its connection comes back within seconds.
const linger = 2 * time.Minute

// images is what is known of images: the verdicts, and which agents run which. View.mu guards it.
//
// Why it is so: a verdict concerns the agents that run its image and nobody else, so there is an index
// from digest to agents. What an agent runs is known by its report alone and is in no store: it is
// true as long as the agent's stream lasts, and is reported anew with the next one.
type images struct {
	verdicts map[string]*records.Verdict // by digest
	reports  map[spiffeid.ID]*report
	runners  map[string]map[spiffeid.ID]struct{} // by digest

	mu    sync.Mutex    // guards fresh among readers
	fresh chan struct{} // closed when an image runs that nobody ran before; nil while nobody follows
}

// report is what one agent said that it runs.
type report struct {
	// stream is the number of the stream that said so. Of several streams of one agent the newest
	// counts.
	stream  uint64
	digests []string // sorted
	left    bool     // the stream has ended
}

func newImages() images {
	return images{
		verdicts: map[string]*records.Verdict{},
		reports:  map[spiffeid.ID]*report{},
		runners:  map[string]map[spiffeid.ID]struct{}{},
	}
}

// verdictsOf returns the verdicts on what an agent runs, sorted by digest.
func (i *images) verdictsOf(id spiffeid.ID) []*records.Verdict {
	r := i.reports[id]
	if r == nil {
		return nil
	}
	var list []*records.Verdict
	for _, digest := range r.digests {
		if v := i.verdicts[digest]; v != nil {
			list = append(list, v)
		}
	}
	return list
}

// report takes in what an agent runs by now, nil for nothing, and says whether that changes its
// verdicts.
func (i *images) report(id spiffeid.ID, now *report) (concerned bool) {
	var before, after []string
	if old := i.reports[id]; old != nil {
		before = old.digests
	}
	if now == nil {
		delete(i.reports, id)
	} else {
		i.reports[id] = now
		after = now.digests
	}
	fresh := false
	for len(before) > 0 || len(after) > 0 {
		switch {
		case len(before) > 0 && len(after) > 0 && before[0] == after[0]:
			before, after = before[1:], after[1:]
		case len(after) == 0 || len(before) > 0 && before[0] < after[0]:
			digest := before[0]
			before = before[1:]
			delete(i.runners[digest], id)
			if len(i.runners[digest]) == 0 {
				delete(i.runners, digest)
			}
			concerned = concerned || i.verdicts[digest] != nil
		default:
			digest := after[0]
			after = after[1:]
			if i.runners[digest] == nil {
				i.runners[digest] = map[spiffeid.ID]struct{}{}
				fresh = true
			}
			i.runners[digest][id] = struct{}{}
			concerned = concerned || i.verdicts[digest] != nil
		}
	}
	if fresh && i.fresh != nil {
		close(i.fresh)
		i.fresh = nil
	}
	return concerned
}

// applyVerdict takes in a verdict and returns how many agents it concerns: those that run the image.
func (g *graph) applyVerdict(c records.VerdictChange, rev kv.Rev) int {
	if c.Verdict == nil {
		delete(g.images.verdicts, c.Digest)
	} else {
		g.images.verdicts[c.Digest] = c.Verdict
	}
	touched := 0
	for id := range g.images.runners[c.Digest] {
		if a := g.agent(id); a != nil {
			g.outdate(a, rev)
			touched++
		}
	}
	return touched
}

// SetRunning takes in which images an agent runs, by their config digests: all of them, as said on the
// stream with the number. Numbers grow with time; what an older stream than the last heard of says is
// nothing. The agent's picture has the verdicts on these images from now on.
func (v *View) SetRunning(agent spiffeid.ID, stream uint64, digests []string) {
	digests = slices.Clone(digests)
	slices.Sort(digests)
	digests = slices.Compact(digests)
	v.mu.Lock()
	defer v.mu.Unlock()
	if old := v.graph.images.reports[agent]; old != nil && old.stream > stream {
		return
	}
	if v.graph.images.report(agent, &report{stream: stream, digests: digests}) {
		v.renewVerdicts(agent)
	}
}

// Leave says that a stream has ended. What it reported stays in force for a while, since the agent is
// expected back; a newer stream's report takes its place at once.
func (v *View) Leave(agent spiffeid.ID, stream uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.graph.images.reports[agent]
	if r == nil || r.stream != stream || r.left {
		return
	}
	r.left = true
	time.AfterFunc(linger, func() { v.forget(agent, stream) })
}

// forget drops the report of a stream that has ended, unless another has taken its place.
func (v *View) forget(agent spiffeid.ID, stream uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if r := v.graph.images.reports[agent]; r != nil && r.stream == stream && r.left && v.graph.images.report(agent, nil) {
		v.renewVerdicts(agent)
	}
}

// renewVerdicts makes an agent's picture have the verdicts on what it runs. mu is held for writing.
func (v *View) renewVerdicts(id spiffeid.ID) {
	if a := v.graph.agent(id); a != nil {
		v.graph.outdate(a, v.graph.rev)
		v.m.touched.Inc()
	}
}

// Verdict returns the verdict on the image with the config digest.
func (v *View) Verdict(digest string) (*records.Verdict, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	found, ok := v.graph.images.verdicts[digest]
	return found, ok
}

// Verdicts returns all verdicts, sorted by digest.
func (v *View) Verdicts() []*records.Verdict {
	v.mu.RLock()
	list := slices.Collect(maps.Values(v.graph.images.verdicts))
	v.mu.RUnlock()
	slices.SortFunc(list, byDigest)
	return list
}

func byDigest(a, b *records.Verdict) int { return strings.Compare(a.Digest, b.Digest) }

// Runners returns the agents that run the image, sorted by ID.
func (v *View) Runners(digest string) []spiffeid.ID {
	v.mu.RLock()
	list := slices.Collect(maps.Keys(v.graph.images.runners[digest]))
	v.mu.RUnlock()
	slices.SortFunc(list, compareIDs)
	return list
}

// Digests yields the config digests of the images that run anywhere, each with how many agents run it,
// in no order. What changes meanwhile may or may not be among them.
func (v *View) Digests() iter.Seq2[string, int] {
	v.mu.RLock()
	counts := make(map[string]int, len(v.graph.images.runners))
	for digest, agents := range v.graph.images.runners {
		counts[digest] = len(agents)
	}
	v.mu.RUnlock()
	return maps.All(counts)
}

// FollowDigests returns the config digests of the images that run anywhere, sorted, and a channel that
// is closed when another one runs. That one has stopped to run closes nothing.
func (v *View) FollowDigests() ([]string, <-chan struct{}) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	i := &v.graph.images
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.fresh == nil {
		i.fresh = make(chan struct{})
	}
	return slices.Sorted(maps.Keys(i.runners)), i.fresh
}

// ErrEvidence says that an entry demands of an image what no verdict grants. What wraps it says why.
var ErrEvidence = errors.New("image evidence does not allow it")

// Grant is what verdicts have to say to what is signed for an entry.
type Grant struct {
	// X509 and JWT cap the lifetimes; 0: no cap.
	X509, JWT time.Duration
	// By are the verdicts that grant the entry; none for an entry that demands none.
	By []*records.Verdict
}

// Names returns the verdicts for an audit line: digest, "@", sequence number.
func (g Grant) Names() []string {
	var names []string
	for _, v := range g.By {
		names = append(names, v.Digest+"@"+strconv.FormatUint(v.Seq, 10))
	}
	return names
}

// Permit says whether the agent may be given what the entry stands for as far as images are concerned:
// an entry without a demand on them always. For others one of the images that the agent has reported
// must have a verdict that grants all that the entry demands, and be the image that the entry names,
// if it names one. The error wraps ErrEvidence.
//
// Which of the agent's workloads asks is not known here, so if several images fit, the strictest caps
// of them hold.
func (p *AgentPicture) Permit(e *identity.Entry, now time.Time) (Grant, error) {
	if !e.Gated() {
		return Grant{}, nil
	}
	gates, named := e.Gates(), identity.Digests(e.Selectors)
	var g Grant
	var nearest *records.Verdict
	for _, v := range p.Verdicts {
		if slices.ContainsFunc(named, func(digest string) bool { return digest != v.Digest }) {
			continue
		}
		if v.Expired(now) || !gates.In(v.Selectors) {
			if nearest == nil || len(gates.Missing(v.Selectors)) < len(gates.Missing(nearest.Selectors)) {
				nearest = v
			}
			continue
		}
		g.By = append(g.By, v)
		g.X509, g.JWT = stricter(g.X509, v.TTL), stricter(g.JWT, v.JWTTTL)
	}
	if len(g.By) > 0 {
		return g, nil
	}
	return Grant{}, refuse(gates.Strings(), named, nearest, now)
}

// refuse says what is missing.
func refuse(gates, named []string, nearest *records.Verdict, now time.Time) error {
	of := "any image that the agent reported"
	if len(named) > 0 {
		of = "image " + strings.Join(named, " and ") + " as run by the agent"
	}
	if nearest == nil {
		return fmt.Errorf("%w: there is no verdict on %s that could grant %s", ErrEvidence, of, strings.Join(gates, ", "))
	}
	if nearest.Expired(now) {
		return fmt.Errorf("%w: the verdict %d on image %s ended at %s", ErrEvidence, nearest.Seq, nearest.Digest, nearest.NotAfter.Format(time.RFC3339))
	}
	var said []string
	for _, p := range nearest.Policies {
		text := p.Policy + " says " + p.Status
		if p.Summary != "" {
			text += " (" + p.Summary + ")"
		}
		said = append(said, text)
	}
	text := fmt.Sprintf("verdict %d on image %s does not grant %s", nearest.Seq, nearest.Digest, strings.Join(missing(gates, nearest), ", "))
	if len(said) > 0 {
		text += ": policy " + strings.Join(said, "; policy ")
	}
	return fmt.Errorf("%w: %s", ErrEvidence, text)
}

func missing(gates []string, v *records.Verdict) []string {
	has := v.Selectors.Strings()
	return slices.DeleteFunc(slices.Clone(gates), func(g string) bool { return slices.Contains(has, g) })
}

// stricter returns the smaller of two caps, of which 0 is none.
func stricter(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}
