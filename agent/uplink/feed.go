package uplink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

// maxEntries bounds the picture that is gathered from parts.
const maxEntries = 1_000_000

var (
	// errDrift says that what is held is not what the server means.
	errDrift = errors.New("picture drifted from the server's")
	// errEnded says that the server ended the feed in good order.
	errEnded = errors.New("server ended the feed")
)

// follow follows the feed until it breaks. A picture that does not fit what is held is asked for in
// full once, on the same connection.
func (u *Uplink) follow(ctx context.Context, conn *grpc.ClientConn, own *keep.Own) error {
	err := u.followFrom(ctx, conn, own, u.sink.Held())
	if errors.Is(err, errDrift) {
		u.breaks.WithLabelValues("drift").Inc()
		u.log.WithError(err).Warn("asking the server for a full picture")
		err = u.followFrom(ctx, conn, own, Held{})
	}
	return err
}

func (u *Uplink) followFrom(ctx context.Context, conn *grpc.ClientConn, own *keep.Own, held Held) error {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel() // lets the stream go
	stream, err := feedv1.NewFeedClient(conn).Follow(ctx)
	if err != nil {
		return feedError(err)
	}
	w := &sender{stream: stream}
	hello := hello(held, u.cfg.Version)
	var running []string
	var changed <-chan struct{}
	if u.cfg.Running != nil {
		running, changed = u.cfg.Running()
		hello.Capabilities, hello.Running = []string{verdicts}, running
	}
	if err := w.send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: hello}}); err != nil {
		return err
	}
	first := true
	for {
		up, capabilities, err := u.receive(stream)
		if err != nil {
			return err
		}
		if err := u.sink.Apply(up); err != nil {
			return fmt.Errorf("%w: %w", errDrift, err)
		}
		u.synced(up)
		if !up.MadeAt.IsZero() && !first {
			// The first picture may have been made long before the agent asked.
			u.lag.Observe(max(0, u.now().Sub(up.MadeAt).Seconds()))
		}
		ack := &feedv1.FollowRequest{Message: &feedv1.FollowRequest_Ack{Ack: &feedv1.Ack{Revision: up.Rev}}}
		if err := w.send(ack); err != nil {
			return err
		}
		if first {
			first = false
			u.current(StateFeed, own, up.Rev)
			if changed != nil && slices.Contains(capabilities, verdicts) {
				work.Go(func() { u.report(ctx, w, running, changed) })
			}
			if u.cfg.Holding != nil && slices.Contains(capabilities, authorities) {
				work.Go(func() { u.reportHolding(ctx, w) })
			}
		}
	}
}

// verdicts is the capability of agents and servers that know of verdicts on images.
const verdicts = "verdicts"

// sender lets acknowledgements and reports share a stream.
type sender struct {
	mu     sync.Mutex // serializes Send
	stream feedv1.Feed_FollowClient
}

// send returns no error for a stream that the server has ended: why it has, Recv says.
func (w *sender) send(m *feedv1.FollowRequest) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.stream.Send(m); err != nil && !errors.Is(err, io.EOF) {
		return feedError(err)
	}
	return nil
}

// report tells the server what runs here whenever that has changed from what it was told.
func (u *Uplink) report(ctx context.Context, w *sender, told []string, changed <-chan struct{}) {
	for {
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
		var now []string
		now, changed = u.cfg.Running()
		r := &feedv1.Running{
			Digests:        slices.DeleteFunc(slices.Clone(now), func(d string) bool { return contains(told, d) }),
			RemovedDigests: slices.DeleteFunc(slices.Clone(told), func(d string) bool { return contains(now, d) }),
		}
		if len(r.GetDigests())+len(r.GetRemovedDigests()) == 0 {
			continue
		}
		if err := w.send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Running{Running: r}}); err != nil {
			return // Recv says it too
		}
		told = now
	}
}

// contains looks in an ordered list.
func contains(list []string, text string) bool {
	_, found := slices.BinarySearch(list, text)
	return found
}

func hello(held Held, version string) *feedv1.Hello {
	h := &feedv1.Hello{AgentVersion: version}
	if held.StoreID == "" {
		return h
	}
	h.StoreId, h.Revision = held.StoreID, held.Rev
	for _, e := range held.Entries {
		created := int64(0)
		if !e.CreatedAt.IsZero() {
			created = e.CreatedAt.Unix()
		}
		h.Entries = append(h.Entries, &feedv1.HeldEntry{Id: e.ID, RevisionNumber: e.Revision, CreatedAt: created})
	}
	for _, b := range held.Bundles {
		h.Bundles = append(h.Bundles, &feedv1.HeldBundle{TrustDomain: b.TrustDomain.Name(), SequenceNumber: b.Sequence})
	}
	for _, v := range held.Verdicts {
		h.Verdicts = append(h.Verdicts, &feedv1.HeldVerdict{Digest: v.Digest, SequenceNumber: v.Seq})
	}
	return h
}

// receive gathers the parts of one picture.
func (u *Uplink) receive(stream feedv1.Feed_FollowClient) (up view.Update, capabilities []string, err error) {
	complete := true // every part could be read
	for part := 0; ; part++ {
		msg, err := stream.Recv()
		if err != nil {
			return view.Update{}, nil, feedError(err)
		}
		capabilities = append(capabilities, msg.GetCapabilities()...)
		if part > 0 && (msg.GetStoreId() != up.StoreID || msg.GetRevision() != up.Rev) {
			return view.Update{}, nil, fmt.Errorf("%w: parts of different pictures", errDrift)
		}
		up.StoreID, up.Rev = msg.GetStoreId(), msg.GetRevision()
		up.Full = up.Full || msg.GetFull()
		for _, w := range msg.GetEntries() {
			e, err := identity.EntryFromWire(w)
			if err != nil {
				// One entry that this agent cannot read must not cost the workloads all others.
				u.log.WithError(err).WithField("entry_id", w.GetId()).Warn("entry from the server cannot be read; leaving it out")
				up.RemovedEntries = append(up.RemovedEntries, w.GetId())
				complete = false
				continue
			}
			up.Entries = append(up.Entries, e)
		}
		up.RemovedEntries = append(up.RemovedEntries, msg.GetRemovedEntryIds()...)
		if complete, err = u.bundles(&up, msg.GetBundles(), complete); err != nil {
			return view.Update{}, nil, err
		}
		for _, l := range msg.GetCrls() {
			for _, b := range up.Bundles {
				if b.TrustDomain.Name() == l.GetTrustDomain() {
					b.CRLs = append(b.CRLs, l.GetDer())
					b.Nested = b.Nested || l.GetNested()
				}
			}
		}
		for _, name := range msg.GetRemovedTrustDomains() {
			td, err := identity.ParseTrustDomain(name)
			if err != nil {
				return view.Update{}, nil, fmt.Errorf("%w: removed trust domain: %w", errDrift, err)
			}
			up.RemovedBundles = append(up.RemovedBundles, td)
		}
		if err := verdictsOf(&up, msg); err != nil {
			return view.Update{}, nil, err
		}
		if len(up.Entries)+len(up.RemovedEntries) > maxEntries {
			return view.Update{}, nil, fmt.Errorf("server sent more than %d entries", maxEntries)
		}
		if msg.GetMore() {
			continue
		}
		if complete {
			up.Checksum = msg.GetChecksum()
		}
		if ns := msg.GetMadeAt(); ns > 0 {
			up.MadeAt = time.Unix(0, ns)
		}
		return up, capabilities, nil
	}
}

// verdictsOf adds those of one part. One that cannot be read is an error: it may be what takes an
// identity away.
func verdictsOf(up *view.Update, msg *feedv1.FollowResponse) error {
	for _, w := range msg.GetVerdicts() {
		v, err := identity.VerdictFromWire(w)
		if err != nil {
			return fmt.Errorf("read verdict from the server: %w", err)
		}
		up.Verdicts = append(up.Verdicts, v)
	}
	up.RemovedVerdicts = append(up.RemovedVerdicts, msg.GetRemovedDigests()...)
	return nil
}

// bundles adds those of one part. Another trust domain's bundle that cannot be read is left out; the
// own one is what everything hangs on, so that one that cannot be read is an error.
func (u *Uplink) bundles(up *view.Update, ws []*types.Bundle, complete bool) (bool, error) {
	for _, w := range ws {
		b, err := identity.BundleFromWire(w)
		if err == nil {
			up.Bundles = append(up.Bundles, b)
			continue
		}
		if w.GetTrustDomain() == u.cfg.TrustDomain.Name() {
			return false, fmt.Errorf("read bundle from the server: %w", err)
		}
		complete = false
		u.log.WithError(err).WithField("trust_domain", w.GetTrustDomain()).Warn("bundle from the server cannot be read; leaving it out")
		if td, err := identity.ParseTrustDomain(w.GetTrustDomain()); err == nil {
			up.RemovedBundles = append(up.RemovedBundles, td)
		}
	}
	return complete, nil
}

func feedError(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		return errEnded
	case codeOf(err) == codes.Unimplemented:
		return errNoFeed
	}
	return fmt.Errorf("follow the feed: %w", err)
}
