package feed

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

type wire = grpc.BidiStreamingServer[feedv1.FollowRequest, feedv1.FollowResponse]

// stream is one agent's Follow call. What has no other owner written beside it belongs to the
// goroutine of the call.
type stream struct {
	s        *Server
	wire     wire
	agent    spiffeid.ID
	log      logrus.FieldLogger
	replaced chan struct{} // closed by Server.add when the agent has too many streams
	incoming chan received
	over     chan struct{} // closed when the call returns

	number uint64 // counts all streams; set by Server.add
	// verdicts says that the agent understands verdicts; running is what images it has reported.
	verdicts bool
	running  map[string]struct{}

	status StreamStatus // guarded by Server.mu

	held    *held              // what the Hello said; nil once the first picture was made
	resume  kv.Rev             // revision of the Hello, below which the stream does not go; 0: none
	picture *view.AgentPicture // the last that was sent or found to be the same; nil at first

	// flight is the update on its way, nil if none is; with it, what has happened to it.
	flight         *update
	written, acked bool
	events         chan sent
}

// received is what came in: a message or the error that ended the receiving.
type received struct {
	msg *feedv1.FollowRequest
	err error
}

// sent reports one part on its way out.
type sent struct {
	bytes int
	last  bool
	err   error
}

// Follow implements feedv1.FeedServer.
func (s *Server) Follow(w wire) error {
	err := s.follow(w)
	s.m.ended.WithLabelValues(status.Code(err).String()).Inc()
	return err
}

func (s *Server) follow(w wire) error {
	ctx := w.Context()
	agent, ok := s.cfg.Caller(ctx)
	if !ok {
		return status.Error(codes.PermissionDenied, "authorization denied for method "+feedv1.Feed_Follow_FullMethodName)
	}
	st := &stream{
		s: s, wire: w, agent: agent,
		log:      s.cfg.Log.WithField("agent_id", agent.String()),
		replaced: make(chan struct{}),
		incoming: make(chan received),
		over:     make(chan struct{}),
		events:   make(chan sent),
		status:   StreamStatus{Agent: agent, Since: s.cfg.Now()},
	}
	if s.cfg.Authority != nil {
		st.status.Authority = s.cfg.Authority(ctx)
	}
	// From before it is asked whether the agent may, so that no change of the answer is missed.
	_, recordChanged := s.view.FollowNode(agent)
	if err := st.authorize(ctx); err != nil {
		return err
	}
	s.add(st)
	defer s.remove(st)
	// gRPC lets nobody interrupt Recv and Send but by returning from the call. So both run beside
	// it, and both end because the call has.
	defer close(st.over)
	go st.receive()

	err := st.greet(ctx)
	if st.verdicts {
		defer s.view.Leave(agent, st.number)
	}
	if err != nil {
		return err
	}
	return st.run(ctx, recordChanged)
}

// receive hands incoming messages on, one at a time.
func (st *stream) receive() {
	for {
		msg, err := st.wire.Recv()
		select {
		case st.incoming <- received{msg, err}:
		case <-st.over:
			return
		}
		if err != nil {
			return
		}
	}
}

// greet waits for the Hello and for the view to have reached what the agent has.
func (st *stream) greet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, st.s.cfg.HelloTimeout)
	defer cancel()
	var in received
	select {
	case in = <-st.incoming:
	case <-st.replaced:
		return errReplaced
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return status.Error(codes.DeadlineExceeded, "no hello in time")
		}
		return status.FromContextError(ctx.Err()).Err()
	}
	if in.err != nil {
		return ended(in.err)
	}
	hello := in.msg.GetHello()
	if hello == nil {
		return status.Error(codes.InvalidArgument, "the first message must be hello")
	}
	var err error
	if st.held, err = fromHello(hello); err != nil {
		return err
	}
	st.resume = kv.Rev(hello.GetRevision())
	st.s.mu.Lock()
	st.status.Version = hello.GetAgentVersion()
	st.s.mu.Unlock()

	select {
	case <-st.s.view.Ready():
	case <-ctx.Done():
		return status.Error(codes.Unavailable, "server is initializing")
	}
	if slices.Contains(hello.GetCapabilities(), verdicts) {
		st.verdicts = true
		st.running = make(map[string]struct{}, len(hello.GetRunning()))
		for _, digest := range hello.GetRunning() {
			st.running[digest] = struct{}{}
		}
		// Before its picture is looked at, which then has all verdicts that the agent needs.
		st.s.view.SetRunning(st.agent, st.number, slices.Collect(maps.Keys(st.running)))
	}

	// The agent may come from a server that is ahead of this one: an agent never goes back. If it
	// takes too long, the store has gone back itself, and the agent gets a full picture.
	if picture, _ := st.s.view.Follow(st.agent); picture.StoreID == st.held.storeID {
		if err := st.s.view.Wait(ctx, st.resume); err != nil {
			st.log.WithFields(logrus.Fields{"held_rev": st.resume, "rev": st.s.view.Rev()}).
				Warn("Agent holds a revision that this store has not reached")
		}
	}
	return nil
}

var errReplaced = status.Error(codes.Aborted, "too many streams of this agent; this was the oldest")

// run sends pictures until something ends the stream.
func (st *stream) run(ctx context.Context, recordChanged <-chan struct{}) error {
	cfg := &st.s.cfg
	recheck := time.NewTicker(cfg.Recheck)
	defer recheck.Stop()
	patience := time.NewTimer(cfg.AckTimeout) // runs while a picture is on its way
	defer patience.Stop()
	var outdated <-chan struct{} // of the picture the agent has; nil while one is on its way
	for {
		if st.flight == nil && outdated == nil {
			picture, wake := st.s.view.Follow(st.agent)
			if !st.verdicts {
				picture = picture.Plain()
			}
			if u := st.next(picture); u != nil {
				// An agent that was evicted or banned meanwhile is told so, and acts on it. It must not
				// take the empty picture it has now for entries that were deleted.
				if err := st.authorize(ctx); err != nil {
					return err
				}
				st.launch(u)
				patience.Reset(cfg.AckTimeout)
			} else {
				outdated = wake
				patience.Stop()
			}
		}
		select {
		case <-outdated:
			outdated = nil
		case e := <-st.events:
			patience.Reset(cfg.AckTimeout)
			if err := st.wrote(e); err != nil {
				return err
			}
		case in := <-st.incoming:
			if in.err != nil {
				return ended(in.err)
			}
			if err := st.take(in.msg); err != nil {
				return err
			}
		case <-patience.C:
			return status.Error(codes.DeadlineExceeded, "picture was not acknowledged in time")
		case <-recordChanged:
			_, recordChanged = st.s.view.FollowNode(st.agent)
			if err := st.authorize(ctx); err != nil {
				return err
			}
		case <-recheck.C:
			if err := st.authorize(ctx); err != nil {
				return err
			}
		case <-st.replaced:
			return errReplaced
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// next returns what to tell the agent now that this picture is in force, or nil if it knows.
func (st *stream) next(p *view.AgentPicture) *update {
	var u *update
	switch {
	case st.picture == nil:
		if st.held.storeID == p.StoreID && st.resume > 0 && st.resume <= st.s.view.Rev() {
			u = st.held.since(p)
		} else {
			u = everything(p)
			st.resume = 0
		}
		st.held = nil
		u.capabilities = []string{verdicts, authorities}
	case st.picture == p:
		return nil
	case st.picture.StoreID != p.StoreID:
		u = everything(p)
		st.resume = 0
	default:
		u = between(st.picture, p)
		// Without a word of what changed, the agent is only told of a new revision.
		if u.empty() && p.Rev == st.picture.Rev {
			st.picture = p
			return nil
		}
	}
	// A server that was restarted counts an agent's picture as changed at the revision it started
	// at; one that was not may have it at an earlier one.
	u.rev = max(p.Rev, st.resume)
	u.madeAt = st.s.cfg.Now()
	st.picture = p
	return u
}

// launch starts to send an update.
func (st *stream) launch(u *update) {
	st.flight, st.written, st.acked = u, false, false
	st.s.mu.Lock()
	st.status.Sent = u.rev
	st.status.Pictures++
	st.s.mu.Unlock()
	kind := "delta"
	if u.full {
		kind = "full"
	}
	st.s.m.pictures.WithLabelValues(kind).Inc()
	st.log.WithFields(logrus.Fields{
		"rev": u.rev, "kind": kind, "entries": len(u.entries), "removed": len(u.removedEntries),
		"bundles": len(u.bundles), "verdicts": len(u.verdicts),
	}).Debug("Sending picture")
	go st.send(u)
}

// send writes an update part by part and reports each. It ends with the update or the call.
func (st *stream) send(u *update) {
	report := func(e sent) bool {
		select {
		case st.events <- e:
			return true
		case <-st.over:
			return false
		}
	}
	err := u.parts(st.s.cfg.PartSize, func(part *feedv1.FollowResponse, size int) error {
		if err := st.wire.Send(part); err != nil {
			return err
		}
		if !report(sent{bytes: size, last: !part.GetMore()}) {
			return errOver
		}
		return nil
	})
	if err != nil && !errors.Is(err, errOver) {
		report(sent{err: err})
	}
}

var errOver = errors.New("stream is over")

func (st *stream) wrote(e sent) error {
	if e.err != nil {
		if _, is := status.FromError(e.err); is || errors.Is(e.err, io.EOF) {
			return ended(e.err)
		}
		st.log.WithError(e.err).Error("Picture cannot be sent")
		return status.Error(codes.Internal, "picture cannot be sent")
	}
	st.s.m.bytes.Add(float64(e.bytes))
	st.s.mu.Lock()
	st.status.Bytes += uint64(max(0, e.bytes))
	st.s.mu.Unlock()
	if e.last {
		st.written = true
		st.land()
	}
	return nil
}

// take handles a message after the Hello: the acknowledgement of what is on its way, or what the agent
// runs by now.
func (st *stream) take(msg *feedv1.FollowRequest) error {
	if running := msg.GetRunning(); running != nil {
		return st.report(running)
	}
	if holding := msg.GetHolding(); holding != nil {
		return st.holding(holding)
	}
	ack := msg.GetAck()
	switch {
	case ack == nil:
		return status.Error(codes.InvalidArgument, "only acknowledgements and reports may follow hello")
	case st.flight == nil || st.acked:
		return status.Error(codes.InvalidArgument, "nothing is to be acknowledged")
	case kv.Rev(ack.GetRevision()) != st.flight.rev:
		return status.Errorf(codes.InvalidArgument, "acknowledged revision %d, sent was %d", ack.GetRevision(), st.flight.rev)
	}
	st.acked = true
	st.land()
	return nil
}

// report takes in what the agent runs by now.
func (st *stream) report(r *feedv1.Running) error {
	if !st.verdicts {
		return status.Error(codes.InvalidArgument, "hello did not say that the agent understands verdicts")
	}
	// A message that is far too long is not looked at, so that its work is bounded too.
	if n := len(r.GetDigests()) + len(r.GetRemovedDigests()); n > 2*maxRunning {
		return status.Errorf(codes.InvalidArgument, "invalid report: %d images, the limit is %d", n, maxRunning)
	}
	if r.GetFull() {
		clear(st.running)
	}
	for _, digest := range r.GetRemovedDigests() {
		delete(st.running, digest)
	}
	for _, digest := range r.GetDigests() {
		if !identity.ValidDigest(digest) {
			return errDigest("report")
		}
		st.running[digest] = struct{}{}
	}
	if n := len(st.running); n > maxRunning {
		return status.Errorf(codes.InvalidArgument, "invalid report: %d images, the limit is %d", n, maxRunning)
	}
	st.s.view.SetRunning(st.agent, st.number, slices.Collect(maps.Keys(st.running)))
	return nil
}

// land makes way for the next update when this one was written whole and acknowledged. The answer to
// the last part may overtake the report that it was written.
func (st *stream) land() {
	if !st.written || !st.acked {
		return
	}
	now := st.s.cfg.Now()
	st.s.m.acked.Observe(now.Sub(st.flight.madeAt).Seconds())
	st.s.mu.Lock()
	st.status.Acked = st.flight.rev
	st.status.AckedAt = now
	st.s.mu.Unlock()
	st.flight = nil
}

// authorize asks whether the stream may go on.
func (st *stream) authorize(ctx context.Context) error {
	err := st.s.cfg.Authorize(ctx)
	if err == nil {
		return nil
	}
	if _, is := status.FromError(err); is {
		return err
	}
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	st.log.WithError(err).Error("Cannot tell whether the agent may follow its picture")
	return status.Error(codes.Internal, "authorization cannot be checked")
}

// ended turns the error of a stream that the other end has closed or lost into that of the call.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	if _, is := status.FromError(err); is {
		return err
	}
	return status.Error(codes.Unavailable, "stream was lost")
}
