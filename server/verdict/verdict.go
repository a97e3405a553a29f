// Package verdict turns evidence about images into verdicts, and verdicts into what workloads may have.
//
// The way of a document:
//
//	Push      verify who vouches (trust), read it (report), refuse what is older than what is known,
//	          keep it: when Push goes on, it is on the disk
//	evaluate  ask every scan policy (policy) about each image that the document is about
//	guard     hold back what would hit too much at once
//	publish   write the verdict (records); from there it goes the road that all changes go
//
// The same evaluation runs when time alone changes an answer (one timer, on the earliest Until), when
// an agent runs an image that nobody ran before, when a feed file has changed, when policies are
// loaded anew, and when an operator makes an exception or lets the guard's captives go.
//
// Why it is so: the state is in memory, so that ten thousand images can be judged in a second, and every
// change of it is in the store before it counts. mu is held by who changes it, for as long as the
// change is written; readers of verdicts do not come here but ask the view. What was decided is compared
// with what was in force before, and that comparison is kept in the store too: after a restart nothing
// is alerted twice and nothing slips past the guard.
//
// The marks are kept a second time, in a file beside the store (marks.go). A store that is restored from
// a backup has forgotten the newest documents, and an old clean report could be pushed again; the
// file remembers.
package verdict

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/store/kv"
	proofs "github.com/assay-id/assay/server/verdict/image"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/trust"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Store keeps evidence and verdicts; *records.Records is one.
type Store interface {
	ReadEvidence(ctx context.Context) (*records.Evidence, error)
	WriteEvidence(ctx context.Context, c records.EvidenceChange) error
	PutBlob(ctx context.Context, content []byte) (*stored.EvidenceBlob, error)
	Blob(ctx context.Context, blob *stored.EvidenceBlob) ([]byte, error)
	Blobs(ctx context.Context) ([]string, error)
	DropBlobs(ctx context.Context, hashes ...string) error
	DeleteVerdict(ctx context.Context, digest string) (kv.Rev, error)
	UpdateVerdict(ctx context.Context, digest string, change func(*records.Verdict) error) (*records.Verdict, kv.Rev, error)
	Verdict(ctx context.Context, digest string) (*records.Verdict, error)
	PutSerials(ctx context.Context, serials ...records.Serial) error
	Serials(ctx context.Context, after time.Time) ([]records.Serial, error)
	SweepSerials(ctx context.Context, before time.Time) error
}

// View says who runs what; *view.View is one.
type View interface {
	Runners(digest string) []spiffeid.ID
	FollowDigests() ([]string, <-chan struct{})
	Wait(ctx context.Context, rev kv.Rev) error
	// Ready returns a channel that is closed once the view shows anything.
	Ready() <-chan struct{}
	Entry(id string) (*identity.Entry, bool)
	ListEntries(filter view.EntryFilter, after string, limit int) (entries []*identity.Entry, next string)
}

// Audit takes one line per decision; *audit.Log is one.
type Audit interface {
	Write(line audit.Line) error
}

// Rules are what an operator's file says. They are replaced as a whole.
type Rules struct {
	Policies []*policy.ScanPolicy // scan_policy blocks
	Trust    []*trust.Policy      // trust_policy blocks: whose signatures count
	Sources  []*trust.Source      // evidence_source blocks: who may push
	// KEVPath and EPSSPath are the feeds' files, empty for none. They are looked at every FeedEvery.
	KEVPath, EPSSPath string
	FeedEvery         time.Duration
	// KeepUnused is how long an image stays known that nobody runs and nobody pushes about. 0: for ever.
	KeepUnused time.Duration
	Webhooks   []Webhook
}

// Config is what a Service can do without.
type Config struct {
	// MarksPath is the file that remembers what a restored store forgets; empty: there is none.
	MarksPath string
	// Lease is how long an agent that hears nothing goes on with a verdict. 0: 15 minutes.
	Lease time.Duration
	// CRLPath is a file that holds the lists of revoked certificates as PEM; empty: none. CRLChanged, if
	// not nil, is called with the new lists as DER, nil if no policy revokes and nothing is revoked: nobody
	// needs to carry that.
	CRLPath    string
	CRLChanged func(ctx context.Context, lists [][]byte) error
	// Turned, if not nil, is told of every verdict that turned, beside the webhooks. It must not wait.
	Turned func(Turn)
	Log    logrus.FieldLogger
	// Metrics registers what is counted. Nil: nothing is registered.
	Metrics prometheus.Registerer
	// Now is the clock for decisions. Nil: time.Now.
	Now func() time.Time
}

// Parts are what a Service is made of.
type Parts struct {
	Store Store
	View  View
	Audit Audit
	// Signer signs the lists of revoked certificates. Nil: there are none.
	Signer Signer
	// Fetcher gets manifests from registries. Nil: only what pushers bring proves where a digest leads.
	Fetcher Fetcher
}

// Fetcher gets things from registries; *image.Fetcher is one. A repository is "registry/name", a digest "sha256:…".
type Fetcher interface {
	// Fetch returns the bytes of a manifest or an index, which hash to the digest.
	Fetch(ctx context.Context, repository, digest string) ([]byte, error)
	// Attached returns the wanted documents that are attached to what has the digest. With an error comes what could
	// be had.
	Attached(ctx context.Context, repository, digest string, wanted func(mediaType string) bool) ([]proofs.Attachment, error)
}

// Service holds the evidence. It is safe for concurrent use.
type Service struct {
	Parts
	cfg      Config
	m        *metrics
	verifier *trust.Verifier
	callers  *trust.Callers
	started  time.Time

	woken  chan struct{} // holds a token when Run should look at the time again
	posted chan struct{} // holds a token when there is an alert to send

	revokes atomic.Bool // some policy revokes
	// dueAt is when the next verdict's time comes, in Unix nanoseconds; 0: never. It stays in the past for as
	// long as what was due is not written.
	dueAt atomic.Int64

	// mu guards all below and is held while a change of it is written.
	mu    sync.Mutex
	rules Rules
	// replaced is how often the rules were.
	replaced uint64
	state    state
	crl      crl
	outbox   outbox
	feeds    feeds
	marks    *marksFile
	sweep    time.Time // when to look for images to forget again
	rev      kv.Rev    // of the last verdict written
	held     []waiting // reports for an operator, the oldest first
	// releasing is the policy whose guard lets everything go, while an operator releases it.
	releasing string
}

// state is everything known about images.
type state struct {
	documents map[string]*document            // by ID
	about     map[string]map[string]*document // by the digests they are about, then by ID
	general   map[string]*document            // VEX with statements about packages in whatever image
	images    map[string]*image               // by config digest
	leads     map[string]map[string]bool      // from manifest and index digests to config digests
	marks     map[string]*stored.EvidenceMark // by ID
	excepted  map[string]policy.Exception     // by ID
	guards    map[string]*stored.EvidenceGuard
	blobs     map[string]int // by hash, how many records name it
	words     words
}

// Open reads what is stored and judges everything by the rules. Verdicts that have changed since are
// written before it returns, so that nobody is served by yesterday's.
func Open(ctx context.Context, parts Parts, rules Rules, cfg Config) (*Service, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Lease <= 0 {
		cfg.Lease = 15 * time.Minute
	}
	if cfg.Log == nil {
		silent := logrus.New()
		silent.SetOutput(io.Discard)
		cfg.Log = silent
	}
	s := &Service{
		Parts: parts, cfg: cfg, started: cfg.Now(), rules: rules,
		woken: make(chan struct{}, 1), posted: make(chan struct{}, 1),
		state: state{
			documents: map[string]*document{}, about: map[string]map[string]*document{}, general: map[string]*document{},
			images: map[string]*image{}, leads: map[string]map[string]bool{}, marks: map[string]*stored.EvidenceMark{},
			excepted: map[string]policy.Exception{}, guards: map[string]*stored.EvidenceGuard{}, blobs: map[string]int{}, words: words{},
		},
	}
	s.m = newMetrics(cfg.Metrics, s.overdue)
	s.m.policies(rules.Policies)
	s.revokes.Store(slices.ContainsFunc(rules.Policies, revokes))
	var err error
	if s.verifier, err = trust.New(rules.Trust, trust.Config{Now: cfg.Now, Metrics: cfg.Metrics}); err != nil {
		return nil, fmt.Errorf("open verdicts: %w", err)
	}
	s.callers, err = trust.NewCallers(rules.Sources, trust.CallersConfig{Now: cfg.Now, Log: cfg.Log, Metrics: cfg.Metrics})
	if err != nil {
		return nil, fmt.Errorf("open verdicts: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.load(ctx); err != nil {
		return nil, fmt.Errorf("open verdicts: %w", err)
	}
	if err := s.verifyAgain(ctx); err != nil {
		return nil, fmt.Errorf("open verdicts: %w", err)
	}
	s.readFeeds()
	if err := s.evaluate(ctx, "start", s.all()); err != nil {
		return nil, fmt.Errorf("open verdicts: %w", err)
	}
	return s, nil
}

// Close gives back what Open took.
func (s *Service) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.marks.close()
}

// Run judges again whatever time, agents and files give reason to, and sends alerts, until ctx ends.
// What goes wrong is logged and tried again.
func (s *Service) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { s.watchTime(ctx); return nil })
	group.Go(func() error { s.watchAgents(ctx); return nil })
	group.Go(func() error { s.watchFeeds(ctx); return nil })
	group.Go(func() error { s.deliver(ctx); return nil })
	group.Go(func() error { s.keepCRL(ctx); return nil })
	return group.Wait()
}

// retryAfter is how long a part of Run waits after an error before it tries again.
const retryAfter = 5 * time.Second

// watchTime evaluates what is due, on one timer.
func (s *Service) watchTime(ctx context.Context) {
	for ctx.Err() == nil {
		next := s.due(ctx)
		timer := time.NewTimer(next)
		select {
		case <-timer.C:
		case <-s.woken:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// longest is how long watchTime sleeps at most: a wall clock that is set moves no timer.
const longest = time.Minute

// due evaluates the images whose time has come, renews leases, and returns how long there is nothing
// to do.
func (s *Service) due(ctx context.Context) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	var list []string
	for digest, i := range s.state.images {
		if !i.due.IsZero() && !i.due.After(now) {
			list = append(list, digest)
		}
	}
	s.noteDue()
	if len(list) > 0 {
		err := s.evaluate(ctx, "time", list)
		select {
		case <-s.woken: // that was ourselves: a store that fails is not to be asked without a pause
		default:
		}
		if err != nil && ctx.Err() == nil {
			s.cfg.Log.WithError(err).Error("cannot write verdicts whose time has come, will try again")
			return retryAfter
		}
	}
	if err := s.forgetUnused(ctx, now); err != nil && ctx.Err() == nil {
		s.cfg.Log.WithError(err).Warn("cannot forget images that nobody uses, will try again")
	}
	sleep := longest
	for _, i := range s.state.images {
		if !i.due.IsZero() {
			sleep = min(sleep, i.due.Sub(now))
		}
	}
	s.noteDue()
	return max(sleep, 0)
}

// noteDue notes when the next verdict's time comes. mu is held.
func (s *Service) noteDue() {
	var next time.Time
	for _, i := range s.state.images {
		if !i.due.IsZero() && (next.IsZero() || i.due.Before(next)) {
			next = i.due
		}
	}
	if next.IsZero() {
		s.dueAt.Store(0)
		return
	}
	s.dueAt.Store(next.UnixNano())
}

// overdue is for how long the next verdict should have been there. It waits for nobody: whoever asks wants to
// know it above all when everything stands still.
func (s *Service) overdue() time.Duration {
	at := s.dueAt.Load()
	if at == 0 {
		return 0
	}
	return max(s.cfg.Now().Sub(time.Unix(0, at)), 0)
}

// wake makes watchTime look again.
func (s *Service) wake() {
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

// watchAgents gives every image that an agent runs a verdict, if only that nothing is known of it.
func (s *Service) watchAgents(ctx context.Context) {
	for ctx.Err() == nil {
		running, another := s.View.FollowDigests()
		if err := s.seen(ctx, running); err != nil && ctx.Err() == nil {
			s.cfg.Log.WithError(err).Error("cannot write verdicts on images that are run, will try again")
			timer := time.NewTimer(retryAfter)
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
			timer.Stop()
			continue
		}
		select {
		case <-another:
		case <-ctx.Done():
		}
	}
}

// seen takes note of images that run.
func (s *Service) seen(ctx context.Context, running []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	var list []string
	for _, digest := range running {
		i := s.state.images[digest]
		if i == nil {
			i = s.newImage(digest)
		}
		i.usedAt = now
		if i.seenAt.IsZero() {
			i.seenAt = now
		} else if !i.lease.IsZero() && i.published != nil {
			continue
		}
		list = append(list, digest)
	}
	return s.evaluate(ctx, "running", list)
}

// all returns the digests of all images.
func (s *Service) all() []string {
	list := make([]string, 0, len(s.state.images))
	for digest := range s.state.images {
		list = append(list, digest)
	}
	slices.Sort(list)
	return list
}

// Replace puts other rules in force: everything signed is verified again, and everything judged.
func (s *Service) Replace(ctx context.Context, rules Rules) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rules = rules
	s.replaced++
	s.m.policies(rules.Policies)
	before := s.revokes.Swap(slices.ContainsFunc(rules.Policies, revokes))
	s.verifier.Replace(rules.Trust)
	s.callers.Replace(rules.Sources)
	s.held = nil // who was let in to push them may not be any more
	err := s.verifyAgain(ctx)
	s.readFeeds()
	err = errors.Join(err, s.evaluate(ctx, "rules", s.all()))
	if s.revokes.Load() != before {
		err = errors.Join(err, s.signCRL(ctx, s.cfg.Now()))
	}
	s.note(audit.Line{Event: "evidence.rules", Outcome: audit.Allow, Caller: "local"})
	if err != nil {
		return fmt.Errorf("apply rules: %w", err)
	}
	return nil
}

// PolicyNames returns the names of the scan policies and the trust policies in force, sorted.
func (s *Service) PolicyNames() (scan, trust []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.rules.Policies {
		scan = append(scan, p.Name)
	}
	for _, p := range s.rules.Trust {
		trust = append(trust, p.Name())
	}
	slices.Sort(scan)
	slices.Sort(trust)
	return scan, trust
}

func revokes(p *policy.ScanPolicy) bool { return p.OnFail == policy.Revoke }

// Callers knows who may push evidence.
func (s *Service) Callers() *trust.Callers { return s.callers }

// note writes an audit line about what is done already, or has to be done in any case.
func (s *Service) note(line audit.Line) {
	if err := s.Audit.Write(line); err != nil {
		s.cfg.Log.WithError(err).WithField("event", line.Event).Error("cannot write an audit line")
	}
}
