package uplink

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

const (
	// pollTimeout bounds one look at everything.
	pollTimeout = 30 * time.Second
	// bundleCalls is how many federated bundles are asked for at a time.
	bundleCalls = 10
)

// poll asks a SPIRE server every SyncInterval until something breaks, or it is time to see whether
// the server has learnt the feed.
func (u *Uplink) poll(ctx context.Context, conn *grpc.ClientConn, own *keep.Own) error {
	until := u.now().Add(probeFeed)
	ask := u.syncEntries
	for first := true; ; first = false {
		up, err := u.look(ctx, conn, ask)
		if codeOf(err) == codes.Unimplemented {
			ask = getEntries
			up, err = u.look(ctx, conn, ask)
		}
		if err != nil {
			return err
		}
		if up != nil {
			if err := u.sink.Apply(*up); err != nil {
				return fmt.Errorf("apply what the server said: %w", err)
			}
		} else {
			held := u.sink.Held()
			up = &view.Update{Rev: held.Rev}
		}
		u.synced(*up)
		if first {
			u.current(StatePolling, own, up.Rev)
		}
		if !u.now().Before(until) {
			return nil
		}
		timer := time.NewTimer(tenth(u.cfg.SyncInterval))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

// tenth returns d, give or take a tenth.
func tenth(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()*2-1)*0.1*float64(d)) //nolint:gosec // spreads load, hides nothing
}

// askFunc returns the entries that the server sent, and the IDs of held ones that it left unsent
// because they are the same.
type askFunc func(ctx context.Context, conn *grpc.ClientConn, held map[string]*identity.Entry) ([]*types.Entry, map[string]bool, error)

// look asks for everything and returns the picture if it differs from the one held, else nil. A SPIRE
// server has no revision; the pictures are numbered as they come.
func (u *Uplink) look(ctx context.Context, conn *grpc.ClientConn, ask askFunc) (*view.Update, error) {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	held := u.sink.Held()
	entries := make(map[string]*identity.Entry, len(held.Entries))
	for _, e := range held.Entries {
		entries[e.ID] = e
	}
	wires, same, err := ask(ctx, conn, entries)
	if err != nil {
		return nil, err
	}
	// Once with a full picture in place of a difference, always with one: view finds out by itself
	// what has changed, and a second way of saying it would be one more to get wrong.
	up := &view.Update{Full: true}
	differs := held.StoreID != "" || held.Bundles == nil
	for id := range same {
		up.Entries = append(up.Entries, entries[id])
	}
	for _, w := range wires {
		e, err := identity.EntryFromWire(w)
		if err != nil {
			u.log.WithError(err).WithField("entry_id", w.GetId()).Warn("entry from the server cannot be read; leaving it out")
			continue
		}
		if old := entries[e.ID]; old != nil && old.Revision == e.Revision && old.CreatedAt.Equal(e.CreatedAt) {
			e = old
		} else {
			differs = true
		}
		up.Entries = append(up.Entries, e)
	}
	differs = differs || len(up.Entries) != len(held.Entries)
	if up.Bundles, err = u.getBundles(ctx, conn, up.Entries); err != nil {
		return nil, err
	}
	if !differs && sameBundles(held.Bundles, up.Bundles) {
		return nil, nil // nothing new is not an error
	}
	up.Rev = held.Rev + 1
	if held.StoreID != "" { // it counted another server's commits
		up.Rev = 1
	}
	return up, nil
}

func sameBundles(a, b []*identity.Bundle) bool {
	key := func(bs []*identity.Bundle) map[spiffeid.TrustDomain]uint64 {
		m := make(map[spiffeid.TrustDomain]uint64, len(bs))
		for _, b := range bs {
			m[b.TrustDomain] = b.Sequence
		}
		return m
	}
	return maps.Equal(key(a), key(b))
}

// entryMask is what the agent asks of an entry; SPIRE's agents leave out the rest too.
func entryMask() *types.EntryMask {
	return &types.EntryMask{
		SpiffeId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true, RevisionNumber: true,
		StoreSvid: true, Hint: true, CreatedAt: true, AdditionalAttributes: true, ExpiresAt: true,
	}
}

// getEntries asks for all entries in one answer.
func getEntries(ctx context.Context, conn *grpc.ClientConn, _ map[string]*identity.Entry) ([]*types.Entry, map[string]bool, error) {
	resp, err := entryv1.NewEntryClient(conn).GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{OutputMask: entryMask()})
	if err != nil {
		return nil, nil, fmt.Errorf("get authorized entries: %w", err)
	}
	return resp.GetEntries(), nil, nil
}

// syncEntries asks for what differs from held. A server with few entries sends them all; one with
// many sends their revisions in pages, and then, in pages as large as the first of those, the entries
// that are asked for. It returns the entries that were sent, and the IDs of those held that stay.
func (u *Uplink) syncEntries(ctx context.Context, conn *grpc.ClientConn, held map[string]*identity.Entry) ([]*types.Entry, map[string]bool, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // lets the stream go
	stream, err := entryv1.NewEntryClient(conn).SyncAuthorizedEntries(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("sync authorized entries: %w", err)
	}
	fail := func(err error) error { return fmt.Errorf("sync authorized entries: %w", err) }
	// Send fails with io.EOF when the server has ended the stream; why, Recv says.
	_ = stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: entryMask()})
	resp, err := stream.Recv()
	if err != nil {
		return nil, nil, fail(err)
	}
	if len(resp.GetEntryRevisions()) == 0 {
		if resp.GetMore() {
			return nil, nil, fail(errors.New("server sent part of the entries where it must send all or none"))
		}
		_ = stream.CloseSend()
		return resp.GetEntries(), nil, nil
	}
	size := len(resp.GetEntryRevisions())
	same := map[string]bool{}
	need := map[string]bool{}
	for {
		for _, r := range resp.GetEntryRevisions() {
			old := held[r.GetId()]
			if old == nil || old.Revision != r.GetRevisionNumber() ||
				(r.GetCreatedAt() != 0 && old.CreatedAt.Unix() != r.GetCreatedAt()) {
				need[r.GetId()] = true
			} else {
				same[r.GetId()] = true
			}
		}
		if len(need)+len(same) > maxEntries {
			return nil, nil, fail(fmt.Errorf("server sent more than %d entries", maxEntries))
		}
		if !resp.GetMore() {
			break
		}
		if resp, err = stream.Recv(); err != nil {
			return nil, nil, fail(err)
		}
	}
	var entries []*types.Entry
	for ids := range slices.Chunk(slices.Sorted(maps.Keys(need)), size) {
		_ = stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids})
		for more := true; more; more = resp.GetMore() {
			if resp, err = stream.Recv(); err != nil {
				return nil, nil, fail(err)
			}
			entries = append(entries, resp.GetEntries()...)
			if len(entries) > maxEntries {
				return nil, nil, fail(fmt.Errorf("server sent more than %d entries", maxEntries))
			}
		}
	}
	_ = stream.CloseSend()
	return entries, same, nil
}

// getBundles asks for the own bundle and those that the entries federate with. A federated bundle
// that the server does not have is left out; any other failure fails the whole look, so that what is
// held is not taken for gone.
func (u *Uplink) getBundles(ctx context.Context, conn *grpc.ClientConn, entries []*identity.Entry) ([]*identity.Bundle, error) {
	client := bundlev1.NewBundleClient(conn)
	w, err := client.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, fmt.Errorf("get bundle: %w", err)
	}
	own, err := identity.BundleFromWire(w)
	if err != nil {
		return nil, fmt.Errorf("get bundle: %w", err)
	}
	if own.TrustDomain != u.cfg.TrustDomain {
		return nil, fmt.Errorf("get bundle: server's trust domain is %q, not %q", own.TrustDomain, u.cfg.TrustDomain)
	}
	tds := map[spiffeid.TrustDomain]bool{}
	for _, e := range entries {
		for _, td := range e.FederatesWith {
			tds[td] = true
		}
	}
	delete(tds, u.cfg.TrustDomain)
	bundles := []*identity.Bundle{own}
	var mu sync.Mutex // guards bundles
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(bundleCalls)
	for td := range tds {
		group.Go(func() error {
			w, err := client.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: td.Name()})
			if codeOf(err) == codes.NotFound {
				return nil
			}
			if err != nil {
				return fmt.Errorf("get bundle of %q: %w", td, err)
			}
			b, err := identity.BundleFromWire(w)
			if err != nil {
				return fmt.Errorf("get bundle of %q: %w", td, err)
			}
			if b.TrustDomain != td {
				return fmt.Errorf("get bundle of %q: server sent that of %q", td, b.TrustDomain)
			}
			mu.Lock()
			defer mu.Unlock()
			bundles = append(bundles, b)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return bundles, nil
}
