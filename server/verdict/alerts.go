package verdict

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/policy"
)

// The types of event, as webhooks get them.
const (
	eventWithdraw   = "withdraw"
	eventRestore    = "restore"
	eventGraceStart = "grace.start"
	eventGraceHalf  = "grace.half"
	eventGraceMost  = "grace.ninety"
	eventGuard      = "guard.trip"
	eventRelease    = "guard.release"
	eventFeed       = "feed.stale"
	eventRejected   = "evidence.rejected"
)

// EventTypes are those that a webhook can ask for.
var EventTypes = []string{
	eventWithdraw, eventRestore, eventGraceStart, eventGraceHalf, eventGraceMost, eventGuard, eventRelease, eventFeed, eventRejected,
}

// event is what a webhook is told.
type event struct {
	ID      string   `json:"id"`
	Type    string   `json:"type"`
	Time    string   `json:"time"`
	Policy  string   `json:"policy,omitempty"`
	Digest  string   `json:"digest,omitempty"`
	Status  string   `json:"status,omitempty"`
	Was     string   `json:"was,omitempty"`
	Finding string   `json:"finding,omitempty"`
	Report  string   `json:"report,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	Until   string   `json:"until,omitempty"`
	Cause   string   `json:"cause,omitempty"`
	Names   []string `json:"names,omitempty"`
	Agents  []string `json:"agents,omitempty"`
	Digests []string `json:"digests,omitempty"`
	Count   int      `json:"count,omitempty"`
}

// Webhook is somebody to be told.
type Webhook struct {
	// Name is under which its alerts wait.
	Name string
	// URL is posted to.
	URL string
	// Key signs what is posted.
	Key []byte
	// Events are the types it wants; empty: all.
	Events []string
	// Client posts; nil: one of our own that verifies as the system does.
	Client *http.Client
}

func (w *Webhook) wants(kind string) bool {
	return len(w.Events) == 0 || slices.Contains(w.Events, kind)
}

// outbox holds what is not delivered yet. Service.mu guards it.
type outbox struct {
	next      uint64
	waiting   map[uint64]*stored.EvidenceAlert
	unwritten []uint64 // those that the store has not taken, or not forgotten, yet
}

// again puts into a change what the store has refused before.
func (o *outbox) again(change *records.EvidenceChange) {
	for _, number := range o.unwritten {
		change.Alerts[number] = o.waiting[number] // nil if it was delivered since
	}
	o.unwritten = nil
}

// maxWaiting is how many alerts may wait; beyond it the oldest is dropped, counted and logged.
const maxWaiting = 10_000

func (o *outbox) load(all map[uint64]*stored.EvidenceAlert) {
	o.waiting = all
	for n := range all {
		o.next = max(o.next, n+1)
	}
}

// Turn is a verdict on an image that is another than before.
type Turn struct {
	// Allowed says that identities which demand the policy are given again; otherwise they were withdrawn.
	Allowed bool
	Policy  string
	// Digests are those that the image is known by, its configuration's first.
	Digests []string
	// Reason says why in a sentence; Finding and Report are what decided, if that was one.
	Reason, Finding, Report string
}

// turned tells of a verdict that turned. mu is held.
func (s *Service) turned(i *image, e *event) {
	if s.cfg.Turned == nil || e.Type != eventWithdraw && e.Type != eventRestore {
		return
	}
	s.cfg.Turned(Turn{
		Allowed: e.Type == eventRestore, Policy: e.Policy,
		Digests: append([]string{i.digest}, slices.Sorted(maps.Keys(i.links))...),
		Reason:  e.Reason, Finding: e.Finding, Report: e.Report,
	})
}

// alert puts an event for every webhook that wants it into the change. mu is held.
func (s *Service) alert(change *records.EvidenceChange, e event, cause string, now time.Time) {
	e.Cause, e.Time = cause, now.UTC().Format(time.RFC3339Nano)
	s.m.events.WithLabelValues(e.Type).Inc()
	if e.Digest != "" {
		for n, agent := range s.View.Runners(e.Digest) {
			if n < 100 {
				e.Agents = append(e.Agents, agent.String())
			}
			e.Count++
		}
		if i := s.state.images[e.Digest]; i != nil {
			e.Names = i.names
			s.turned(i, &e)
		}
	}
	for n := range s.rules.Webhooks {
		hook := &s.rules.Webhooks[n]
		if !hook.wants(e.Type) {
			continue
		}
		number := s.outbox.next
		s.outbox.next++
		e.ID = strconv.FormatUint(number, 10)
		body, err := json.Marshal(e)
		if err != nil {
			s.cfg.Log.WithError(err).Error("cannot encode an alert")
			continue
		}
		if len(s.outbox.waiting) >= maxWaiting {
			oldest := slices.Min(slices.Collect(maps.Keys(s.outbox.waiting)))
			delete(s.outbox.waiting, oldest)
			if change.Alerts == nil {
				change.Alerts = map[uint64]*stored.EvidenceAlert{}
			}
			change.Alerts[oldest] = nil
			s.m.lost.Inc()
			s.cfg.Log.Error("too many alerts wait to be delivered: the oldest is dropped")
		}
		m := &stored.EvidenceAlert{Body: body, CreatedAt: nanos(now), Hook: hook.Name}
		s.outbox.waiting[number] = m
		if change.Alerts == nil {
			change.Alerts = map[uint64]*stored.EvidenceAlert{}
		}
		change.Alerts[number] = m
		select {
		case s.posted <- struct{}{}:
		default:
		}
	}
}

// alertNow writes an event that belongs to no other change. mu is held.
func (s *Service) alertNow(ctx context.Context, e event, cause string, now time.Time) error {
	var change records.EvidenceChange
	s.alert(&change, e, cause, now)
	return s.Store.WriteEvidence(ctx, change)
}

// rejected tells of a document that was refused.
func (s *Service) rejected(ctx context.Context, who Pusher, d Document, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := event{Type: eventRejected, Reason: clip(why.Error()), Names: []string{clip(d.Image)}}
	if len(d.Content) > 0 {
		e.Report = digestOf(d.Content)
	}
	if err := s.alertNow(ctx, e, "push by "+clip(who.Name), s.cfg.Now()); err != nil && ctx.Err() == nil {
		s.cfg.Log.WithError(err).Error("cannot keep an alert")
	}
}

// changes returns what is to be told of the step from one verdict to the next.
func changes(i *image, before, after *stored.EvidenceVerdict, v *policy.Verdict) []event {
	if before == nil || before.GetAllowed() == after.GetAllowed() {
		return nil
	}
	e := event{Type: eventWithdraw, Policy: v.Policy, Digest: i.digest, Status: string(v.Status), Was: before.GetStatus()}
	if after.GetAllowed() {
		e.Type = eventRestore
	}
	e.because(v)
	return []event{e}
}

func (e *event) because(v *policy.Verdict) {
	if len(v.Reasons) > 0 {
		e.Reason, e.Finding, e.Report = v.Reasons[0].Text, v.Reasons[0].Finding, v.Reasons[0].Report
	}
	if !v.GraceUntil.IsZero() {
		e.Until = v.GraceUntil.UTC().Format(time.RFC3339)
	}
}

// Bits of EvidenceVerdict.alerts.
const (
	toldStart = 1 << iota
	toldHalf
	toldMost
)

// graceAlerts tells of a grace that began, is half over and is nearly over, once each.
func (s *Service) graceAlerts(i *image, before, after *stored.EvidenceVerdict, v *policy.Verdict, now time.Time) []event {
	if v.Status != policy.Grace || v.GraceSince.IsZero() || v.GraceUntil.IsZero() {
		return nil
	}
	if before.GetGraceUntil() == after.GetGraceUntil() {
		after.Alerts = before.GetAlerts()
	}
	var events []event
	for _, step := range []struct {
		bit  uint32
		at   time.Time
		kind string
	}{
		{toldStart, v.GraceSince, eventGraceStart},
		{toldHalf, part(v.GraceSince, v.GraceUntil, 50), eventGraceHalf},
		{toldMost, part(v.GraceSince, v.GraceUntil, 90), eventGraceMost},
	} {
		if after.GetAlerts()&step.bit != 0 || now.Before(step.at) {
			continue
		}
		after.Alerts |= step.bit
		e := event{Type: step.kind, Policy: v.Policy, Digest: i.digest, Status: string(v.Status), Was: before.GetStatus()}
		e.because(v)
		events = append(events, e)
	}
	return events
}

// part returns the instant when so many percent of a time are over.
func part(from, to time.Time, percent int64) time.Time {
	return from.Add(to.Sub(from) / 100 * time.Duration(percent))
}

// graceMark returns when the next alert of a grace is due, or zero.
func graceMark(m *stored.EvidenceVerdict, now time.Time) time.Time {
	if m.GetStatus() != string(policy.Grace) || m.GetGraceUntil() == 0 {
		return time.Time{}
	}
	for _, percent := range []int64{50, 90} {
		if t := part(timeOf(m.GetGraceSince()), timeOf(m.GetGraceUntil()), percent); t.After(now) {
			return t
		}
	}
	return time.Time{}
}

// Pauses between attempts at a webhook that does not answer.
const (
	firstPause = time.Second
	lastPause  = 5 * time.Minute
	postTime   = 10 * time.Second
)

// deliver sends what waits, for each webhook in order, until ctx ends. An alert is forgotten once its
// webhook has taken it, and not before.
func (s *Service) deliver(ctx context.Context) {
	pause := map[string]time.Duration{}
	next := map[string]time.Time{}
	for ctx.Err() == nil {
		wait := time.Hour
		for _, hook := range s.hooks() {
			if left := time.Until(next[hook.Name]); left > 0 {
				wait = min(wait, left)
				continue
			}
			for {
				number, m := s.first(hook.Name)
				if m == nil {
					pause[hook.Name] = 0
					break
				}
				if err := post(ctx, &hook, m.GetBody(), s.cfg.Now()); err != nil {
					if ctx.Err() != nil {
						return
					}
					p := min(max(pause[hook.Name]*2, firstPause), lastPause)
					pause[hook.Name] = p
					p = p/2 + rand.N(p/2+1) //nolint:gosec // spreads attempts
					next[hook.Name] = time.Now().Add(p)
					wait = min(wait, p)
					s.m.posts.WithLabelValues("failed").Inc()
					s.cfg.Log.WithError(err).WithField("webhook", hook.Name).WithField("again_in", p.Round(time.Millisecond).String()).Warn("cannot deliver an alert, will try again")
					break
				}
				s.m.posts.WithLabelValues("delivered").Inc()
				s.delivered(ctx, number)
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-s.posted:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

func (s *Service) hooks() []Webhook {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.rules.Webhooks)
}

// first returns the alert that is next for a webhook.
func (s *Service) first(hook string) (uint64, *stored.EvidenceAlert) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var number uint64
	var found *stored.EvidenceAlert
	for n, m := range s.outbox.waiting {
		if m.GetHook() == hook && (found == nil || n < number) {
			number, found = n, m
		}
	}
	return number, found
}

func (s *Service) delivered(ctx context.Context, number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.outbox.waiting, number)
	// If this cannot be written the alert is sent once more after a restart: its id tells.
	if err := s.Store.WriteEvidence(ctx, records.EvidenceChange{Alerts: map[uint64]*stored.EvidenceAlert{number: nil}}); err != nil && ctx.Err() == nil {
		s.cfg.Log.WithError(err).Error("cannot forget a delivered alert")
	}
}

// SignatureHeader holds "t=<Unix time>,v1=<hex of HMAC-SHA256 over the time, a dot and the body>".
const SignatureHeader = "Assay-Signature"

// Sign returns the value of SignatureHeader.
func Sign(key, body []byte, at time.Time) string {
	t := strconv.FormatInt(at.Unix(), 10)
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(t + "."))
	mac.Write(body)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac.Sum(nil))
}

var plainClient = &http.Client{
	Timeout: postTime,
	// A redirect would carry the alert to where nobody configured it to go.
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

func post(ctx context.Context, hook *Webhook, body []byte, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, postTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, hook.URL, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("post alert: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "assay-server")
	if len(hook.Key) > 0 {
		req.Header.Set(SignatureHeader, Sign(hook.Key, body, now))
	}
	resp, err := cmp.Or(hook.Client, plainClient).Do(req)
	if err != nil {
		return fmt.Errorf("post alert: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection can be used again
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return fmt.Errorf("post alert: the answer is %s", resp.Status)
	}
	return nil
}
