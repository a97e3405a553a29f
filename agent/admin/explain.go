package admin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/admin/wire"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/peer"
)

// maxNear is how many entries that do not match are shown.
const maxNear = 10

// Explain attests a process and says which entries it matches, which it nearly does, and why not.
func (s *Server) Explain(ctx context.Context, req *wire.ExplainRequest) (*wire.ExplainResponse, error) {
	resp, err := s.explain(ctx, req)
	if err != nil {
		return nil, toStatus(err)
	}
	return resp, nil
}

func (s *Server) explain(ctx context.Context, req *wire.ExplainRequest) (*wire.ExplainResponse, error) {
	pid, siblings, err := s.target(req)
	if err != nil {
		return nil, err
	}
	p, err := s.tracker.Pin(pid)
	if errors.Is(err, peer.ErrDead) {
		return nil, fmt.Errorf("%w: PID %d (a PID of this agent's PID namespace is wanted, which for an agent in a container is not the host's)", errNoProcess, pid)
	}
	if err != nil {
		return nil, err
	}
	defer p.Release()
	about := describe(s.cfg.Proc, pid)
	about.Uid, about.Gid, about.Siblings = p.UID, p.GID, clamp(siblings)
	findings := s.attest.Attest(ctx, p.Process)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	about.Exited = !p.Alive()
	return s.answer(about, findings, s.held.Picture()), nil
}

// answer compares what was found with what is held.
func (s *Server) answer(about *wire.Process, findings []attestor.Finding, picture *view.Picture) *wire.ExplainResponse {
	now, st := s.now(), s.cfg.Status()
	entries := slices.DeleteFunc(slices.Clone(picture.Entries()), forNodes)
	x := weigh(findings, picture, entries, now)
	x.parent = parentFor(picture.Entries(), st.AgentID)
	for _, n := range x.near {
		for i := range n.missing {
			if why := s.attest.Abstains(n.missing[i].selector); why != "" {
				n.missing[i].reason, n.missing[i].never = why, true
			}
		}
	}
	if s.cfg.SVID != nil {
		for i := range x.matches {
			m := &x.matches[i]
			m.until, m.err = s.cfg.SVID(m.entry.ID)
		}
	}
	return respond(x, findings, about, st, picture.Rev, len(entries), now)
}

// parentFor is what an entry for a workload of this node should hang on: not the agent's own ID if the
// node has a name that stays when the agent is admitted anew under another ID.
func parentFor(all []*identity.Entry, agent spiffeid.ID) spiffeid.ID {
	for _, e := range all {
		if forNodes(e) {
			return e.SPIFFEID
		}
	}
	// Entries that arrive here hang on this node, by one of its names, or on each other.
	workloads := map[spiffeid.ID]bool{}
	for _, e := range all {
		workloads[e.SPIFFEID] = true
	}
	for _, e := range all {
		if !e.ParentID.IsZero() && e.ParentID != agent && !workloads[e.ParentID] {
			return e.ParentID
		}
	}
	return agent
}

// forNodes reports whether an entry is one that no workload is meant to match: the alias that a join
// token was given asks for the agent's own SPIFFE ID.
func forNodes(e *identity.Entry) bool {
	return !slices.ContainsFunc(e.Selectors.All(), func(s attestor.Selector) bool { return s.Type != "spiffe_id" })
}

// respond puts the answer together.
func respond(
	x explanation, findings []attestor.Finding, about *wire.Process, st Status, rev uint64, entries int, now time.Time,
) *wire.ExplainResponse {
	resp := &wire.ExplainResponse{Process: about, Entries: int64(entries), Agent: agentWire(st, rev)}
	for _, f := range findings {
		w := &wire.Finding{Attestor: f.Attestor, Selectors: selectorsWire(f.Selectors.All()), TookUs: f.Took.Microseconds()}
		if f.Err != nil {
			w.Error = f.Err.Error()
		}
		resp.Findings = append(resp.Findings, w)
	}
	for _, m := range x.matches {
		e := entryWire(m.entry)
		e.Shadowed, e.Withheld, e.SvidExpiresAt = m.shadowed, m.withheld(), millis(m.until)
		if m.err != nil {
			e.SvidError = plain(m.err)
		}
		resp.Matches = append(resp.Matches, e)
	}
	for _, n := range x.near {
		w := &wire.Near{Entry: entryWire(n.entry)}
		for _, m := range n.missing {
			w.Missing = append(w.Missing, &wire.Missing{
				Selector: selectorWire(m.selector), Similar: selectorsWire(m.similar), Reason: m.reason,
			})
		}
		resp.Nearest = append(resp.Nearest, w)
	}
	for _, im := range x.images {
		resp.Images = append(resp.Images, imageWire(im))
	}
	resp.Advice = advise(x, about, st, rev, entries, now)
	return resp
}

// target finds the process that is meant, and how many others are in its container.
func (s *Server) target(req *wire.ExplainRequest) (pid, siblings int, err error) {
	switch t := req.GetTarget().(type) {
	case *wire.ExplainRequest_Pid:
		if t.Pid <= 0 {
			return 0, 0, errNoTarget
		}
		return int(t.Pid), 0, nil
	case *wire.ExplainRequest_Container:
		id := strings.ToLower(strings.TrimSpace(t.Container))
		if _, after, ok := strings.Cut(id, "://"); ok { // as a pod's status has it: containerd://…
			id = after
		}
		if !askedContainer.MatchString(id) {
			return 0, 0, errContainerID
		}
		pids, err := inContainer(s.cfg.Proc, id)
		if err != nil {
			return 0, 0, err
		}
		if len(pids) == 0 {
			return 0, 0, fmt.Errorf("%w: %s", errNoContainer, id)
		}
		return pids[0], len(pids) - 1, nil
	}
	return 0, 0, errNoTarget
}

// explanation is what is known of a process, compared with the entries.
type explanation struct {
	facts   attestor.Set
	images  []image
	failed  []attestor.Finding
	matches []match
	near    []near
	// parent is what an entry of this node hangs on; zero: unknown.
	parent spiffeid.ID
}

// match is an entry whose selectors are all there.
type match struct {
	entry    *identity.Entry
	shadowed bool // an older entry has the hint
	// until is when the SVID ends that is held for it, zero: none is; err is why none could be signed.
	until time.Time
	err   error
}

// withheld says why the entry is not handed out, or nothing if it is.
func (m match) withheld() string {
	switch {
	case m.entry.StoreSVID:
		return "it is for a store of secrets, not for workloads"
	case m.shadowed:
		return "an older entry has its hint"
	}
	return ""
}

// over reports whether the SVID that is held for it has expired.
func (m match) over(now time.Time) bool { return !m.until.IsZero() && !m.until.After(now) }

// near is an entry with selectors that are not there.
type near struct {
	entry   *identity.Entry
	missing []missing
	another bool // it is another pod's
}

// missing is a selector an entry asks for and the process does not show.
type missing struct {
	selector attestor.Selector
	similar  []attestor.Selector
	reason   string
	never    bool // no process of this node can show it
}

// weigh compares findings with entries.
func weigh(findings []attestor.Finding, picture *view.Picture, entries []*identity.Entry, now time.Time) explanation {
	var x explanation
	sets := make([]attestor.Set, 0, len(findings))
	for _, f := range findings {
		if f.Err != nil {
			x.failed = append(x.failed, f)
			continue
		}
		sets = append(sets, f.Selectors)
	}
	x.facts = picture.Facts(attestor.Union(sets...))
	x.images = imagesOf(x.facts, picture)
	entries = slices.Clone(entries)
	slices.SortFunc(entries, identity.Older)
	hints := map[string]bool{}
	for _, e := range entries {
		if e.Expired(now) || e.Selectors.Len() == 0 {
			continue
		}
		if absent := e.Selectors.Missing(x.facts); len(absent) > 0 {
			n := near{entry: e}
			for _, sel := range absent {
				n.missing = append(n.missing, missing{selector: sel})
				n.another = n.another || ofAnotherPod(sel, x.facts)
			}
			x.near = append(x.near, n)
			continue
		}
		m := match{entry: e, shadowed: !e.StoreSVID && e.Hint != "" && hints[e.Hint]}
		x.matches = append(x.matches, m)
		hints[e.Hint] = hints[e.Hint] || !e.StoreSVID
	}
	// Those of other pods last, of which a node has many. Fewest missing first; then those of which more is there,
	// because one of one missing says less than one of three; then those where something close is there.
	slices.SortStableFunc(x.near, func(a, b near) int {
		return cmp.Or(last(a.another, b.another), cmp.Compare(len(a.missing), len(b.missing)), cmp.Compare(b.entry.Selectors.Len(), a.entry.Selectors.Len()),
			cmp.Compare(closeness(b, x.facts), closeness(a, x.facts)))
	})
	x.near = x.near[:min(len(x.near), maxNear)]
	for i := range x.near {
		for j := range x.near[i].missing {
			m := &x.near[i].missing[j]
			if !identity.Gating(m.selector) { // another verdict is nothing to change an entry to
				m.similar = similar(m.selector, x.facts)
			}
			m.reason = reason(m.selector, findings, x)
		}
	}
	return x
}

// last orders what is so behind what is not.
func last(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// closeness counts the missing selectors of which something similar is there.
func closeness(n near, facts attestor.Set) int {
	count := 0
	for _, m := range n.missing {
		if len(similar(m.selector, facts)) > 0 {
			count++
		}
	}
	return count
}

// reason says why a selector is missing, if it is not simply another value.
func reason(want attestor.Selector, findings []attestor.Finding, x explanation) string {
	if identity.Gating(want) {
		return x.ungranted()
	}
	for _, f := range findings {
		if f.Attestor != want.Type {
			continue
		}
		if f.Err != nil {
			return "the " + f.Attestor + " attestor failed, so nothing is known of it"
		}
		if f.Selectors.Len() == 0 {
			return "the " + f.Attestor + " attestor has nothing to say about this process" + outside(f.Attestor)
		}
		return ""
	}
	if slices.ContainsFunc(x.facts.All(), func(s attestor.Selector) bool { return s.Type == want.Type }) {
		return "" // a type that an attestor of another name proves
	}
	if len(x.failed) > 0 {
		return "perhaps because the " + x.failed[0].Attestor + " attestor failed"
	}
	if containerTypes[want.Type] {
		return "only a container's image vouches for it, and this process is in no container that an attestor of this agent knows"
	}
	if len(findings) == 0 {
		return "this agent has no workload attestor"
	}
	return fmt.Sprintf("this agent attests by %s and has no %s attestor; if it should, add workload_attestor %q to agent.hcl",
		attestors(findings), want.Type, want.Type)
}

// outside says what that usually means.
func outside(kind string) string {
	switch kind {
	case "docker":
		return ": it is in no container that the engine in agent.hcl runs"
	case "k8s":
		return ": it is in no pod of this node"
	}
	return ""
}

// containerTypes are selector types that attestors of containers prove beside their own.
var containerTypes = map[string]bool{"image": true, "claim": true}

// attestors names those that there are.
func attestors(findings []attestor.Finding) string {
	names := make([]string, len(findings))
	for i, f := range findings {
		names[i] = f.Attestor
	}
	if len(names) == 1 {
		return names[0]
	}
	return strings.Join(names[:len(names)-1], ", ") + " and " + names[len(names)-1]
}

func agentWire(st Status, held uint64) *wire.Agent {
	a := &wire.Agent{
		Version: st.Version, Server: st.Server, Uplink: st.Uplink, Connected: st.Connected,
		LastErrorAt: millis(st.ErrAt), LastHeard: millis(st.Heard), HeldRev: held,
		PictureAt: millis(st.PictureAt), ServerRev: max(st.ServerRev, held), Banned: st.Banned,
		StartedAt: millis(st.StartedAt),
	}
	if !st.AgentID.IsZero() {
		a.SpiffeId = st.AgentID.String()
	}
	if st.Err != nil {
		a.LastError = plain(st.Err)
	}
	if len(st.Chain) > 0 {
		a.SvidExpiresAt = millis(st.Chain[0].NotAfter)
	}
	return a
}

func entryWire(e *identity.Entry) *wire.Entry {
	return &wire.Entry{
		Id: e.ID, SpiffeId: e.SPIFFEID.String(), Hint: e.Hint, Selectors: selectorsWire(e.Selectors.All()),
		CreatedAt: millis(e.CreatedAt), ExpiresAt: millis(e.ExpiresAt),
	}
}

func selectorsWire(list []attestor.Selector) []*wire.Selector {
	out := make([]*wire.Selector, len(list))
	for i, s := range list {
		out[i] = selectorWire(s)
	}
	return out
}

func selectorWire(s attestor.Selector) *wire.Selector {
	return &wire.Selector{Type: s.Type, Value: s.Value}
}

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}
