package workloadapi

import (
	"context"
	"errors"

	"google.golang.org/grpc"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/peer"
)

// RegisterService makes the socket serve a further gRPC service by the rules of the Workload API's own:
// each user its share, garbled requests refused, no panic beyond a call. It must be called before Run.
// It implements grpc.ServiceRegistrar.
func (s *Server) RegisterService(desc *grpc.ServiceDesc, impl any) {
	s.further = append(s.further, further{desc, impl})
}

// further is a service that shares the socket.
type further struct {
	desc *grpc.ServiceDesc
	impl any
}

// Followed is a process and what is proved about it, kept up to date until Leave. It is used by one
// goroutine at a time.
type Followed struct {
	server *Server
	caller *caller
	facts  *attested
}

// Attend attests a process that some tracker has pinned, whose Run runs. Who called on this Server's
// socket is in the context of the call; other sockets of the agent have trackers of their own. Leave
// must be called unless there is an error.
func (s *Server) Attend(ctx context.Context, p *peer.Peer) (*Followed, error) {
	f := &Followed{server: s, caller: s.enter(p)}
	var err error
	if f.facts, err = f.caller.attested(ctx); err != nil {
		f.Leave()
		return nil, err
	}
	return f, nil
}

// Leave ends it.
func (f *Followed) Leave() { f.caller.leave() }

// Facts are what is proved at the moment.
func (f *Followed) Facts() attestor.Set { return f.facts.facts }

// Replaced is closed when Facts are not what is proved any more.
func (f *Followed) Replaced() <-chan struct{} { return f.facts.replaced }

// Renew takes the facts that are in force now. With an error nothing is proved.
func (f *Followed) Renew() error {
	facts, err := f.caller.known()
	if err == nil {
		f.facts = facts
	}
	return err
}

// Exited is closed when the process has exited.
func (f *Followed) Exited() <-chan struct{} { return f.caller.peer.Done() }

// PID is the process's number.
func (f *Followed) PID() int { return f.caller.peer.PID }

// Alive reports whether the process is still the one that was attested.
func (f *Followed) Alive() bool { return f.caller.peer.Alive() }

// Told says that something new was sent to the process, so that what it is is looked at again soon.
func (f *Followed) Told() { f.caller.changed() }

// Handed is what an answer gives to a process, for the audit line.
type Handed struct {
	// SPIFFEIDs and EntryIDs are those of the identities handed out.
	SPIFFEIDs, EntryIDs []string
	// Audience is a JWT-SVID's.
	Audience []string
	// By is the SPIFFE ID that the process acts for others with, if it does.
	By string
	// ForPID and ForFacts say for whom the process acts, if it does.
	ForPID   int
	ForFacts attestor.Set
	// Rev is the server's revision that the answer reflects.
	Rev uint64
}

// Audit writes the line of what was handed to the process, or of the error that stands in its place.
func (f *Followed) Audit(event string, h Handed, err error) {
	a := &answer{ids: h.SPIFFEIDs, entries: h.EntryIDs, rev: h.Rev, by: h.By, forPID: h.ForPID}
	if h.ForFacts.Len() > 0 {
		a.forFacts = digest(h.ForFacts.Key())
	}
	f.server.audit(event, f.caller, f.facts, a, h.Audience, err)
}

// X509Bundle returns a bundle as the Workload API sends it: concatenated DER.
func X509Bundle(b *identity.Bundle) []byte { return certificates(b) }

// JWTBundle returns a bundle as the Workload API sends it: a JWK set.
func JWTBundle(b *identity.Bundle) ([]byte, error) { return keySet(b) }

// Audiences returns the audiences of a request that are not empty, or what is wrong with them.
func Audiences(given []string) ([]string, error) { return audiences(given) }

// Stopping is closed when the Server is about to end.
func (s *Server) Stopping() <-chan struct{} { return s.stopping }

// Status turns an error of this package, of a Source or of sending into what a caller is told. Methods
// of services that RegisterService was given need not: it is done for them.
func (s *Server) Status(ctx context.Context, method string, err error) error {
	return s.toStatus(ctx, method, err)
}

// Denied returns an error that tells a caller only that it has no identity; the reason is for the audit
// line.
func Denied(reason string) error { return denied(reason) }

// Withdrawn reports whether an error says that a process has lost what it had been given.
func Withdrawn(err error) bool { return errors.Is(err, withdrawn) }

// Invalid returns an error that tells a caller what is wrong with its request.
func Invalid(text string) error { return invalid(text) }

// Stopped is the error of calls that end because the agent does.
func Stopped() error { return errStopping }

// Feed is one kind of answer to what is proved about a process, made once for all processes of which
// the same is proved.
type Feed struct {
	server *Server
	event  string
	hub    *hub
}

// NewFeed returns a Feed whose answers are what makes makes of the X.509 identities that facts entitle
// to. event names it in audit lines and metrics. Equal answers need not be the same.
func (s *Server) NewFeed(event string, makes func(identity.X509Context) (any, error)) *Feed {
	return &Feed{server: s, event: event, hub: newHub(s.now, func(ctx context.Context, facts attestor.Set) (*answer, error) {
		x, changed, err := s.src.X509(ctx, facts)
		if err != nil {
			return nil, err
		}
		a := &answer{rev: x.Rev, changed: changed}
		if len(x.SVIDs) == 0 {
			return a, nil
		}
		if x.Bundle == nil {
			return nil, errNoBundle
		}
		for _, svid := range x.SVIDs {
			a.expires(svid.NotAfter)
		}
		a.matched = true
		a.value, err = makes(x)
		return a, err
	})}
}

// Visit is one call of a process for a Feed: it gets the answer, and again when it changes, until it has
// no identity any more. It is used by one goroutine at a time.
type Visit struct {
	*Followed
	feed  *Feed
	topic *topic
	hold  *hold
	now   *answer // the last one; nil: none was had
	told  bool    // something was handed over
}

// Open begins a visit of the process that calls. End must be called unless there is an error.
func (f *Feed) Open(ctx context.Context) (*Visit, error) { return f.server.visit(ctx, f) }

func (s *Server) visit(ctx context.Context, f *Feed) (*Visit, error) {
	p, _ := peer.FromContext(ctx)
	v := &Visit{Followed: &Followed{server: s, caller: s.enter(p)}, feed: f}
	s.metrics.streams.WithLabelValues(f.event).Inc()
	var err error
	if v.facts, err = v.caller.attested(ctx); err != nil {
		v.End(ctx, err)
		return nil, err
	}
	v.topic = f.hub.join(v.facts)
	v.hold = newHold(s.cfg.Hold)
	return v, nil
}

// End ends the visit. err is why, for the audit line: nil if the process had what it came for.
func (v *Visit) End(ctx context.Context, err error) {
	s := v.server
	if v.topic != nil {
		v.topic.leave()
		v.hold.end()
	}
	s.metrics.streams.WithLabelValues(v.feed.event).Dec()
	if err != nil && ctx.Err() == nil && !errors.Is(err, errStopping) { // nobody was refused anything otherwise
		s.audit(v.feed.event, v.caller, v.facts, v.now, nil, err)
	}
	v.Leave()
}

// Next returns the answer of the moment. A process that matches nothing and has been given nothing is
// held for a moment, in which its entry may come; one that has been given something is refused at once.
func (v *Visit) Next(ctx context.Context) (any, error) {
	a, err := v.next(ctx)
	if err != nil {
		return nil, err
	}
	return a.value, nil
}

// Rev is the server's revision that the last answer reflects.
func (v *Visit) Rev() uint64 {
	if v.now == nil {
		return 0
	}
	return v.now.rev
}

func (v *Visit) next(ctx context.Context) (*answer, error) {
	for {
		a, err := v.topic.answer(ctx)
		if err != nil {
			v.now = nil
			return nil, err
		}
		v.now = a
		switch {
		case a.matched:
			v.hold.end()
			return a, nil
		case v.told:
			return nil, withdrawn
		case v.hold.over:
			return nil, noMatch
		}
		if _, err := v.Wait(ctx, nil); err != nil {
			return nil, err
		}
	}
}

// Tell hands an answer over with send, if the process is still there, and writes the audit line.
func (v *Visit) Tell(h Handed, send func() error) error {
	return v.tell(&answer{ids: h.SPIFFEIDs, entries: h.EntryIDs, rev: v.Rev()}, send)
}

func (v *Visit) tell(a *answer, send func() error) error {
	if !v.Alive() {
		return dead
	}
	v.server.audit(v.feed.event, v.caller, v.facts, a, nil, nil)
	if err := send(); err != nil {
		return err
	}
	if v.told {
		v.Told()
	}
	v.told = true
	return nil
}

// Wait sleeps until there may be another answer, or wake is closed or sent to, which it reports. An
// error says that the visit is over.
func (v *Visit) Wait(ctx context.Context, wake <-chan struct{}) (woken bool, err error) {
	s := v.server
	select {
	case <-wake:
		return true, nil
	case <-v.now.changed:
	case <-v.facts.replaced:
		if err := v.Renew(); err != nil {
			return false, err
		}
		old := v.topic
		v.topic = v.feed.hub.join(v.facts)
		old.leave()
	case <-v.hold.c():
		v.hold.end()
	case <-v.caller.peer.Done():
		return false, dead
	case <-s.stopping:
		return false, errStopping
	case <-ctx.Done():
		return false, ctx.Err()
	}
	return false, nil
}
