package verdict

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/verdict/policy"
)

// inputOf is everything that policies are told of an image. mu is held, for as long as the input is used.
func (s *Service) inputOf(i *image, now time.Time) policy.Input {
	of := s.whole(i)
	in := policy.Input{
		Digest: of.digest, Now: now, SeenAt: i.seenAt, Feeds: s.feeds.now,
		Linked: slices.Sorted(maps.Keys(of.links)),
		FirstSeen: func(id string) time.Time {
			at, own := of.firstSeen[id], i.firstSeen[id]
			if at.IsZero() || !own.IsZero() && own.Before(at) {
				return own
			}
			return at
		},
	}
	for _, d := range s.evidenceOf(i) {
		if d.GetVoid() != "" || s.forgotten(d) {
			continue
		}
		switch {
		case d.report != nil:
			if r := s.sourced(d, i); r.Match != "" {
				in.Reports = append(in.Reports, r)
			}
		case d.vex != nil:
			in.VEX = append(in.VEX, policy.TrustedVEX{
				TrustPolicy: d.GetSource(), VEX: d.vex, Index: d.vexIndex,
				ReceivedAt: timeOf(d.GetReceivedAt()), VerifiedAt: timeOf(d.GetVerifiedAt()),
			})
		}
	}
	for _, id := range slices.Sorted(maps.Keys(s.state.excepted)) {
		e := s.state.excepted[id]
		if of.links[e.Digest].kind == linkManifest {
			e.Digest = of.digest
		}
		in.Exceptions = append(in.Exceptions, e)
	}
	return in
}

// forgotten reports whether something newer than the document was known once: then the store was
// restored, and what it holds of that source is no ground to stand on.
func (s *Service) forgotten(d *document) bool {
	m := s.state.marks[d.id]
	if m == nil || d.report == nil {
		return false
	}
	at := evidenceTime(policy.SourcedReport{Report: d.report, ReceivedAt: timeOf(d.GetReceivedAt()), VerifiedAt: timeOf(d.GetVerifiedAt())})
	return nanos(at) < m.GetTime()
}

// judge asks every policy about one image.
func (s *Service) judge(policies []*policy.ScanPolicy, i *image, now time.Time) []policy.Verdict {
	previous := make([]*policy.Verdict, len(policies))
	for n, p := range policies {
		if v, ok := i.verdicts[p.Name]; ok {
			previous[n] = &v
		} else if m := i.force[p.Name]; m != nil {
			previous[n] = &policy.Verdict{
				Policy: p.Name, Digest: i.digest, Status: policy.Status(m.GetStatus()), Evidence: policy.Status(m.GetEvidence()),
				EvidenceSince: timeOf(m.GetEvidenceSince()), Allowed: m.GetAllowed(), WouldAllow: m.GetWouldAllow(),
				GraceSince: timeOf(m.GetGraceSince()), GraceUntil: timeOf(m.GetGraceUntil()),
			}
		}
	}
	return policy.DecideEach(policies, previous, s.inputOf(i, now))
}

// evaluate judges images, all for one cause, and puts what comes of it in force. mu is held.
func (s *Service) evaluate(ctx context.Context, cause string, digests []string) error {
	if len(digests) == 0 {
		return nil
	}
	defer func(began time.Time) { s.m.took.Observe(time.Since(began).Seconds()) }(time.Now())
	now := s.cfg.Now()
	images := make([]*image, len(digests))
	verdicts := make([][]policy.Verdict, len(digests))
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	const stride = 64
	for from := 0; from < len(digests); from += stride {
		group.Go(func() error {
			for n := from; n < min(from+stride, len(digests)); n++ {
				images[n] = s.state.images[digests[n]]
				verdicts[n] = s.judge(s.rules.Policies, images[n], now)
			}
			return nil
		})
	}
	_ = group.Wait() // none returns an error
	held := s.guard(now, images, verdicts)
	change := records.EvidenceChange{Images: map[string]*stored.EvidenceImage{}, Guards: held.guards, Alerts: map[uint64]*stored.EvidenceAlert{}}
	s.outbox.again(&change)
	var errs []error
	flush := func() {
		if err := s.Store.WriteEvidence(ctx, change); err != nil {
			errs = append(errs, err)
			s.keepUnwritten(&change, now)
		}
		change = records.EvidenceChange{Images: map[string]*stored.EvidenceImage{}, Alerts: map[uint64]*stored.EvidenceAlert{}}
	}
	var changed []*image
	for n, i := range images {
		fresh, events := s.enforce(i, verdicts[n], held, now)
		for _, e := range events {
			s.alert(&change, e, cause, now)
		}
		if fresh || len(events) > 0 {
			i.updatedAt = now
			changed = append(changed, i)
		}
		if fresh || len(events) > 0 || i.unwritten {
			i.unwritten = false
			change.Images[i.digest] = i.stored()
		}
		if change.Full() {
			flush()
		}
	}
	for _, e := range held.events {
		s.alert(&change, e, cause, now)
	}
	flush()
	errs = append(errs, s.publish(ctx, images, now))
	s.tell(changed)
	s.wake()
	err := errors.Join(errs...)
	if err != nil {
		s.m.unwritten.Inc()
	}
	return err
}

// keepUnwritten notes what the store did not take, so that the next evaluation writes it: after a restart
// nothing is to be alerted twice, and nothing lost.
func (s *Service) keepUnwritten(change *records.EvidenceChange, now time.Time) {
	for digest := range change.Images {
		i := s.state.images[digest]
		i.unwritten, i.due = true, now
	}
	for number := range change.Alerts {
		s.outbox.unwritten = append(s.outbox.unwritten, number)
	}
}

// enforce compares the verdicts on an image with what is in force, and puts them in force unless the
// guard holds them. It returns whether anything changed that is to be stored, and what is to be told.
func (s *Service) enforce(i *image, verdicts []policy.Verdict, held held, now time.Time) (changed bool, events []event) {
	known := map[string]bool{}
	i.due = time.Time{}
	for _, v := range verdicts {
		known[v.Policy] = true
		before := i.force[v.Policy]
		after := &stored.EvidenceVerdict{
			Policy: v.Policy, Status: string(v.Status), Allowed: v.Allowed, WouldAllow: v.WouldAllow,
			Evidence: string(v.Evidence), EvidenceSince: nanos(v.EvidenceSince),
			GraceSince: nanos(v.GraceSince), GraceUntil: nanos(v.GraceUntil),
		}
		if held.holds(i, v.Policy) {
			after.Held, after.Allowed, after.Selectors = true, true, before.GetSelectors()
			if len(after.GetSelectors()) == 0 { // the first time it is held
				after.Selectors = storedSelectors(i.verdicts[v.Policy].Selectors)
			}
		} else if v.Allowed {
			after.Selectors = storedSelectors(v.Selectors) // for when it is to be held after a restart
		}
		told := s.graceAlerts(i, before, after, &v, now)
		events = append(events, told...)
		events = append(events, changes(i, before, after, &v)...)
		for _, t := range []time.Time{v.Until, graceMark(after, now)} {
			if !t.IsZero() && (i.due.IsZero() || t.Before(i.due)) {
				i.due = t
			}
		}
		if !equalVerdict(before, after) {
			changed = true
		}
		i.force[v.Policy], i.verdicts[v.Policy] = after, v
	}
	for name := range i.force {
		if !known[name] {
			delete(i.force, name)
			delete(i.verdicts, name)
			changed = true
		}
	}
	return changed, events
}

func equalVerdict(a, b *stored.EvidenceVerdict) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.GetStatus() == b.GetStatus() && a.GetAllowed() == b.GetAllowed() && a.GetHeld() == b.GetHeld() &&
		a.GetEvidence() == b.GetEvidence() && a.GetEvidenceSince() == b.GetEvidenceSince() &&
		a.GetGraceSince() == b.GetGraceSince() && a.GetGraceUntil() == b.GetGraceUntil() && a.GetAlerts() == b.GetAlerts() &&
		slices.Equal(selectorsOf(a.GetSelectors()), selectorsOf(b.GetSelectors()))
}

// effective returns the verdicts on an image as they are in force, with what the guard holds back.
func (i *image) effective() []policy.Verdict {
	list := make([]policy.Verdict, 0, len(i.verdicts))
	for _, name := range slices.Sorted(maps.Keys(i.verdicts)) {
		v := i.verdicts[name]
		if m := i.force[name]; m.GetHeld() {
			v.Allowed, v.Quarantine, v.Revoke = true, false, false
			v.Selectors = selectorsOf(m.GetSelectors())
			if v.Evidence == policy.Missing {
				v.Evidence = policy.Pass
			}
		}
		list = append(list, v)
	}
	return list
}

// record fills in what agents and the signing of SVIDs go by.
func (s *Service) record(i *image, r *records.Verdict) {
	verdicts := i.effective()
	all := policy.Facts(verdicts).All()
	if proved := s.provenance(i); len(proved) > 0 {
		all = append(slices.Clone(all), proved...)
	}
	r.Selectors = attestor.NewSet(all...)
	// Where no scan policy judges, signed provenance may be what opens a gate: it can be taken back too.
	r.TTL, r.JWTTTL, r.Revoke, r.Policies = 0, 0, false, nil
	for _, v := range verdicts {
		r.TTL, r.JWTTTL = stricter(r.TTL, v.TTLMax), stricter(r.JWTTTL, v.JWTTTLMax)
		r.Revoke = r.Revoke || v.Revoke
		summary := ""
		if len(v.Reasons) > 0 {
			summary = v.Reasons[0].Text
		}
		if i.force[v.Policy].GetHeld() {
			summary = "held back by the blast guard: " + summary
		}
		r.Policies = append(r.Policies, records.PolicyVerdict{
			Policy: v.Policy, Status: string(v.Status), Mode: string(v.Mode), Until: v.Until, Summary: strings.ToValidUTF8(summary, ""),
		})
	}
	r.TTL, r.JWTTTL = cmp.Or(r.TTL, policy.DefaultSVIDTTL), cmp.Or(r.JWTTTL, policy.DefaultJWTTTL)
}

// provenance returns the selectors of signed statements about the image.
func (s *Service) provenance(i *image) []attestor.Selector {
	var all []attestor.Selector
	for _, d := range s.evidenceOf(i) {
		if d.GetVoid() == "" && len(d.selectors) > 0 && s.match(d, i) != "" {
			all = append(all, d.selectors...)
		}
	}
	return attestor.NewSet(all...).All()
}

// stricter returns the smaller of two caps, of which 0 is none.
func stricter(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// publishers is how many verdicts are written at the same time: they share the disk's syncs.
const publishers = 32

// publish writes what the agents get, where it has changed or its lease runs out.
func (s *Service) publish(ctx context.Context, images []*image, now time.Time) error {
	var group errgroup.Group
	group.SetLimit(publishers)
	revs := make([]kv.Rev, len(images))
	for n, i := range images {
		runs := len(s.View.Runners(i.digest)) > 0
		if !runs {
			i.lease = time.Time{}
		}
		end := now.Add(s.cfg.Lease).Truncate(time.Second)
		renew := i.lease.IsZero() || !i.lease.After(now)
		if runs {
			if renew {
				i.lease = now.Add(s.cfg.Lease / 2)
			}
			if i.due.IsZero() || i.lease.Before(i.due) {
				i.due = i.lease
			}
		}
		group.Go(func() error {
			before := i.published
			var want records.Verdict
			s.record(i, &want)
			i.owed = i.owed && want.Revoke
			if before != nil && same(before, &want) && (!runs || !renew) {
				return nil
			}
			after, rev, err := s.Store.UpdateVerdict(ctx, i.digest, func(r *records.Verdict) error {
				r.Selectors, r.TTL, r.JWTTTL, r.Revoke, r.Policies = want.Selectors, want.TTL, want.JWTTTL, want.Revoke, want.Policies
				r.NotAfter = end
				return nil
			})
			if err != nil {
				i.due, i.lease = now, time.Time{} // try again
				return fmt.Errorf("write verdict on %s: %w", i.digest, err)
			}
			i.owed = i.owed || want.Revoke && (before == nil || !before.Revoke || !before.Selectors.Equal(want.Selectors))
			i.published, revs[n] = after, rev
			return nil
		})
	}
	err := errors.Join(group.Wait(), s.revoke(ctx, images, now))
	s.rev = max(s.rev, slices.Max(revs))
	return err
}

// settle waits until the view shows what was written so far. mu is not held.
func (s *Service) settle(ctx context.Context) {
	s.mu.Lock()
	rev := s.rev
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	if err := s.View.Wait(ctx, rev); errors.Is(err, context.DeadlineExceeded) {
		s.cfg.Log.WithField("rev", uint64(rev)).Warn("the view is behind the store")
	}
}

// settleTime is how long is waited for the view to show what was written.
const settleTime = 5 * time.Second

// same reports whether two verdicts say the same, whenever they were made.
func same(a, b *records.Verdict) bool {
	return a.Selectors.Equal(b.Selectors) && a.TTL == b.TTL && a.JWTTTL == b.JWTTTL && a.Revoke == b.Revoke &&
		slices.EqualFunc(a.Policies, b.Policies, func(x, y records.PolicyVerdict) bool {
			return x.Policy == y.Policy && x.Status == y.Status && x.Mode == y.Mode && x.Until.Truncate(time.Second).Equal(y.Until.Truncate(time.Second)) &&
				x.Summary == y.Summary
		})
}

// tell writes the audit lines of what changed.
func (s *Service) tell(changed []*image) {
	for _, i := range changed {
		for name, m := range i.force {
			v := i.verdicts[name]
			was := i.told[name]
			now := said{status: v.Status, allowed: m.GetAllowed(), held: m.GetHeld()}
			if was == now {
				continue
			}
			if i.told == nil {
				i.told = map[string]said{}
			}
			i.told[name] = now
			line := audit.Line{
				Event: "verdict.change", Outcome: audit.Allow, Caller: "policy", Policy: name,
				Facts: attestor.NewSet(v.Selectors...).Strings(),
			}
			if !m.GetAllowed() {
				line.Outcome = audit.Deny
			}
			line.Verdicts = []string{i.name()}
			if len(v.Reasons) > 0 {
				line.Reason, line.Finding, line.Report = v.Reasons[0].Text, v.Reasons[0].Finding, v.Reasons[0].Report
			}
			if m.GetHeld() {
				line.Event = "verdict.hold"
			}
			s.note(line)
			s.m.verdicts.WithLabelValues(name, string(v.Status)).Inc()
		}
	}
}

// said is what the last audit line of an image and a policy said.
type said struct {
	status        policy.Status
	allowed, held bool
}
