package workloadapi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/peer"
)

// Times of attestation.
const (
	// fresh is how old facts may be that a new call still starts with.
	fresh = time.Second
	// renewAfterChange is how old facts must be to be renewed because something was sent.
	renewAfterChange = 10 * time.Second
	// retryFirst and retryMost bound the pause before attestors that failed are asked again.
	retryFirst = 500 * time.Millisecond
	retryMost  = 30 * time.Second
)

// Errors of attestation.
var (
	errAttestation = errors.New("every attestor failed")
	errDead        = errors.New("process has exited")
	errStopping    = errors.New("agent is shutting down") // or starting: calls of other sockets may come early
)

// attested is what is known about a process at one moment. It is immutable.
type attested struct {
	*proved       // never nil
	err     error // errAttestation, errDead or errStopping; there are no facts then
	// replaced is closed when newer facts, or an error, have taken this one's place.
	replaced chan struct{}
}

// caller is a connection's process and what is known of it. All calls on the connection share it.
type caller struct {
	server *Server
	peer   *peer.Peer

	mu      sync.Mutex         // guards the rest; no other lock is taken while it is held
	users   int                // calls that use it
	now     *attested          // nil until the first attestation is done
	at      time.Time          // when the facts were found, or confirmed
	running chan struct{}      // closed when the attestation under way is done; nil: there is none
	hurry   context.CancelFunc // makes a renewal that waits for its turn a matter of urgency
	dirty   bool               // an attestor spoke up while an attestation was under way
	words   []word             // each attestor's last word
	fails   int                // renewals in a row with a failing attestor
	timer   *time.Timer        // the next renewal
	due     time.Time          // when it is
	cancel  func()             // ends the subscription to attestors
}

// word is what an attestor last said, and when.
type word struct {
	attestor string
	said     *proved
	at       time.Time
}

// nothing is what is proved about a process that could not be attested.
var nothing = &proved{}

// unknown is what is known of such a process.
func unknown(why error) *attested { return &attested{proved: nothing, err: why} }

// enter returns the caller of a connection; leave must be called when the call is over.
func (s *Server) enter(p *peer.Peer) *caller {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.callers[p]
	if c == nil {
		c = &caller{server: s, peer: p}
		c.cancel = s.attest.subscribe(p.PID, c.spoken)
		s.callers[p] = c
	}
	c.mu.Lock()
	c.users++
	c.mu.Unlock()
	return c
}

func (c *caller) leave() {
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.users--; c.users > 0 {
		return
	}
	delete(s.callers, c.peer)
	c.cancel()
	if c.timer != nil {
		c.timer.Stop()
	}
}

// attested returns fresh facts for a call that begins.
func (c *caller) attested(ctx context.Context) (*attested, error) {
	c.mu.Lock()
	if c.now != nil && c.now.err == nil && c.server.now().Sub(c.at) < fresh {
		defer c.mu.Unlock()
		return c.now, nil
	}
	done := c.begin(c.server.first)
	if c.hurry != nil {
		c.hurry()
	}
	c.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now, c.now.err
}

// known returns the facts in force.
func (c *caller) known() (*attested, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now, c.now.err
}

// begin starts an attestation unless one is under way, and returns a channel that is closed when it
// is done. mu is held. The attestation is nobody's in particular: a call that gives up does not take
// it from the others that wait.
func (c *caller) begin(through *turnstile) <-chan struct{} {
	if c.running != nil {
		return c.running
	}
	done := make(chan struct{})
	c.running = done
	s := c.server
	// s.mu comes before c.mu, so whether the server still runs is asked inside the goroutine.
	go func() {
		now, complete := s.attestCaller(c, through)
		c.finish(now, complete, done)
	}()
	return done
}

// attestCaller asks the attestors; complete says that none of them failed.
func (s *Server) attestCaller(c *caller, through *turnstile) (now *attested, complete bool) {
	s.mu.Lock()
	if s.closed || s.lifetime == nil {
		s.mu.Unlock()
		return unknown(errStopping), true
	}
	s.work.Add(1)
	ctx := s.lifetime
	s.mu.Unlock()
	defer s.work.Done()
	through, err := c.queue(ctx, through)
	if err != nil {
		return unknown(errStopping), true
	}
	defer through.leave()
	if !c.peer.Alive() {
		return unknown(errDead), true
	}
	findings := s.attest.Attest(ctx, c.peer.Process)
	// Everything above was read by PID. The PID was this process's all the time only if the process
	// is still there now.
	if !c.peer.Alive() {
		return unknown(errDead), true
	}
	if ctx.Err() != nil {
		return unknown(errStopping), true
	}
	return c.weigh(findings)
}

// queue waits for a place and returns where it was had. A renewal waits behind other renewals until a
// call needs it.
func (c *caller) queue(ctx context.Context, through *turnstile) (*turnstile, error) {
	s := c.server
	if through == s.again {
		patient, hurry := context.WithCancel(ctx)
		defer hurry()
		c.mu.Lock()
		c.hurry = hurry
		c.mu.Unlock()
		err := through.enter(patient, c.peer.UID)
		c.mu.Lock()
		c.hurry = nil
		c.mu.Unlock()
		if err == nil {
			return through, nil
		}
	}
	return s.first, s.first.enter(ctx, c.peer.UID)
}

// weigh makes facts of findings. The union of what attestors prove counts; one that failed keeps its
// last word for a while; if all failed and none has a last word, nothing is known.
func (c *caller) weigh(findings []attestor.Finding) (now *attested, complete bool) {
	s := c.server
	at := s.now()
	words := make([]word, 0, len(findings))
	failed := 0
	c.mu.Lock()
	for _, f := range findings {
		if f.Err == nil {
			words = append(words, word{f.Attestor, s.prove(f.Selectors), at})
			continue
		}
		failed++
		last := slices.IndexFunc(c.words, func(w word) bool { return w.attestor == f.Attestor })
		if last >= 0 && at.Sub(c.words[last].at) < s.cfg.KeepFacts {
			words = append(words, c.words[last])
		}
	}
	c.words = words
	c.mu.Unlock()
	if failed > 0 && len(words) == 0 {
		return unknown(errAttestation), false
	}
	if len(words) == 1 {
		return &attested{proved: words[0].said}, failed == 0
	}
	sets := make([]attestor.Set, 0, len(words))
	for _, w := range words {
		sets = append(sets, w.said.facts)
	}
	return &attested{proved: s.prove(attestor.Union(sets...))}, failed == 0
}

// digest stands for facts in audit lines.
func digest(key string) string {
	sum := sha256.Sum256([]byte(key))
	return hex.EncodeToString(sum[:8])
}

// finish publishes what an attestation found and arranges for the next.
func (c *caller) finish(now *attested, complete bool, done chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.server.now()
	old := c.now
	if old == nil || old.key != now.key || !errors.Is(now.err, old.err) || (now.err == nil) != (old.err == nil) {
		now.replaced = make(chan struct{})
		c.now = now
		if old != nil {
			close(old.replaced)
		}
	}
	c.running = nil
	close(done)
	if c.users == 0 || errors.Is(now.err, errDead) || errors.Is(now.err, errStopping) {
		return
	}
	pause := jitter(c.server.cfg.Reattest)
	switch {
	case c.dirty:
		pause = 0
	case !complete:
		pause = jitter(min(retryFirst<<min(c.fails, 10), retryMost))
		c.fails++
	default:
		c.fails = 0
	}
	c.dirty = false
	c.schedule(pause)
}

// schedule sets the renewal timer. mu is held.
func (c *caller) schedule(pause time.Duration) {
	c.due = c.server.now().Add(pause)
	if c.timer == nil {
		c.timer = time.AfterFunc(pause, c.renew)
		return
	}
	c.timer.Reset(pause)
}

// renew is called by the timer.
func (c *caller) renew() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.users > 0 {
		c.begin(c.server.again)
	}
}

// spoken is called when an attestor says that its answer about this process may have changed.
func (c *caller) spoken() {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.users == 0 || c.now == nil && c.running == nil:
		return // nobody has asked yet, or nobody asks any more
	case c.running != nil:
		c.dirty = true // what is under way may have missed it
	default:
		c.begin(c.server.again)
	}
}

// changed is called after something new was sent to the workload: what it is should be looked at
// again before long.
func (c *caller) changed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.server
	now := s.now()
	pause := max(0, renewAfterChange-now.Sub(c.at)) + rand.N(2*time.Second) //nolint:gosec // spreads work, no secret
	if c.running == nil && c.timer != nil && now.Add(pause).Before(c.due) {
		c.schedule(pause)
	}
}

// jitter returns d, a tenth more or less.
func jitter(d time.Duration) time.Duration {
	if d < 10 {
		return d
	}
	return d - d/10 + rand.N(d/5) //nolint:gosec // spreads work, no secret
}
