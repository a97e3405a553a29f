package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// How many entries go into one call. The server commits each for itself, and many share one sync.
const (
	maxPuts    = 100
	maxRemoves = 200
	listPage   = 1000
)

// What is to be done with an item of which something failed.
const (
	retry = 1 + iota // soon, and ever later
	later            // in a while
)

// difference is what has to be written for a batch of items.
type difference struct {
	d       *desk
	creates []change
	updates []change
	removes []change
	again   map[item]int
}

type change struct {
	of    item
	id    string
	entry *types.Entry // nil: remove
}

func newDifference(d *desk) *difference { return &difference{d: d, again: map[item]int{}} }

// put asks for an entry to be as given. d.mu is held.
func (t *difference) put(of item, e *types.Entry) {
	stored := t.d.have[e.GetId()]
	switch {
	case stored == nil:
		t.creates = append(t.creates, change{of, e.GetId(), e})
	case !same(stored, e):
		t.updates = append(t.updates, change{of, e.GetId(), e})
	}
}

// remove asks for an entry not to be. d.mu is held.
func (t *difference) remove(of item, id string) {
	t.removes = append(t.removes, change{of: of, id: id})
}

// write writes what was asked for: what goes first, so that what is similar to it can come.
func (t *difference) write(ctx context.Context) {
	for some := range slices.Chunk(t.removes, maxRemoves) {
		t.writeRemoves(ctx, some)
	}
	for some := range slices.Chunk(t.creates, maxPuts) {
		t.writeCreates(ctx, some)
	}
	for some := range slices.Chunk(t.updates, maxPuts) {
		t.writeUpdates(ctx, some)
	}
}

func (t *difference) writeRemoves(ctx context.Context, some []change) {
	req := &entryv1.BatchDeleteEntryRequest{}
	for _, c := range some {
		req.Ids = append(req.Ids, c.id)
	}
	resp, err := t.d.api.Entries.BatchDeleteEntry(ctx, req)
	for i, c := range some {
		var st *types.Status
		if err == nil && i < len(resp.GetResults()) {
			st = resp.GetResults()[i].GetStatus()
		}
		if isNotFound(st) {
			st = nil
		}
		t.done(c, "deleted", nil, statusError(st, err))
	}
}

func (t *difference) writeCreates(ctx context.Context, some []change) {
	req := &entryv1.BatchCreateEntryRequest{}
	for _, c := range some {
		req.Entries = append(req.Entries, c.entry)
	}
	resp, err := t.d.api.Entries.BatchCreateEntry(ctx, req)
	for i, c := range some {
		var st *types.Status
		stored := c.entry
		if err == nil && i < len(resp.GetResults()) {
			st = resp.GetResults()[i].GetStatus()
			if codes.Code(st.GetCode()) == codes.AlreadyExists { //nolint:gosec // codes are small
				if stored = resp.GetResults()[i].GetEntry(); stored.GetId() != c.id {
					t.maskedBy(c, stored.GetId())
					continue
				}
				// It is there but not as we knew it: compare again.
				st = nil
				t.again[c.of] = retry
			}
		}
		t.done(c, "created", stored, statusError(st, err))
	}
}

func (t *difference) writeUpdates(ctx context.Context, some []change) {
	req := &entryv1.BatchUpdateEntryRequest{}
	for _, c := range some {
		req.Entries = append(req.Entries, c.entry)
	}
	resp, err := t.d.api.Entries.BatchUpdateEntry(ctx, req)
	var outdated []change
	for i, c := range some {
		var st *types.Status
		stored := c.entry
		if err == nil && i < len(resp.GetResults()) {
			st = resp.GetResults()[i].GetStatus()
			if isNotFound(st) {
				// Somebody deleted it: make it anew.
				st, stored = nil, nil
				t.again[c.of] = retry
			}
		}
		wrong := statusError(st, err)
		t.done(c, "updated", stored, wrong)
		if hopeless(wrong) {
			outdated = append(outdated, change{of: c.of, id: c.id})
		}
	}
	// What the resource said before is not what it says now.
	if len(outdated) > 0 {
		t.writeRemoves(ctx, outdated)
	}
}

// statusError is why one item of a call failed.
func statusError(st *types.Status, err error) error {
	switch {
	case err != nil:
		return err
	case st != nil && codes.Code(st.GetCode()) != codes.OK: //nolint:gosec // codes are small
		return &refusal{codes.Code(st.GetCode()), st.GetMessage()} //nolint:gosec // codes are small
	}
	return nil
}

// refusal is what the server says of one item.
type refusal struct {
	code codes.Code
	text string
}

func (r *refusal) Error() string { return r.code.String() + ": " + r.text }

// hopeless reports whether the same would be refused again: a name beyond the limits, say. What has become of
// it is looked at anew when the pod or the rule changes, and when everything is compared.
func hopeless(err error) bool {
	r, ok := errors.AsType[*refusal](err)
	return ok && r.code == codes.InvalidArgument
}

func isNotFound(st *types.Status) bool {
	return codes.Code(st.GetCode()) == codes.NotFound //nolint:gosec // codes are small
}

// done notes what became of a change; stored is what the entry is now.
func (t *difference) done(c change, what string, stored *types.Entry, err error) {
	d := t.d
	d.mu.Lock()
	defer d.mu.Unlock()
	log := d.log.WithFields(logrus.Fields{"entry_id": c.id, "for": c.of.kind + " " + c.of.name})
	switch {
	case hopeless(err):
		d.m.writes.WithLabelValues("failed").Inc()
		log.WithError(err).Warn("an entry cannot be what the resource makes of it; there is none until that changes")
	case err != nil:
		t.again[c.of] = retry
		d.m.writes.WithLabelValues("failed").Inc()
		log.WithError(err).Warn("an entry could not be written; trying again")
	default:
		d.m.writes.WithLabelValues(what).Inc()
		log.Debug("entry " + what)
		if stored == nil {
			delete(d.have, c.id)
		} else {
			d.have[c.id] = stored
		}
	}
	h := d.holders[c.of]
	if h == nil {
		return
	}
	if c.entry == nil && err == nil {
		delete(h.ids, c.id)
		if len(h.ids) == 0 && len(h.outcomes) == 0 {
			delete(d.holders, c.of)
		}
	}
	if c.entry != nil || err != nil {
		t.outcome(h, c, func(o *outcome) { o.failed = err })
	}
}

// maskedBy notes that somebody else has an entry that is similar.
func (t *difference) maskedBy(c change, other string) {
	d := t.d
	d.mu.Lock()
	defer d.mu.Unlock()
	t.again[c.of] = max(t.again[c.of], later)
	d.m.writes.WithLabelValues("masked").Inc()
	d.log.WithFields(logrus.Fields{"entry_id": c.id, "for": c.of.kind + " " + c.of.name, "other": other}).
		Warn("somebody else made a similar entry, which stays in force; delete it and this one takes its place")
	if h := d.holders[c.of]; h != nil {
		delete(h.ids, c.id)
		t.outcome(h, c, func(o *outcome) { o.masked, o.failed = true, nil })
	}
}

// outcome changes the outcome that a change is of.
func (t *difference) outcome(h *holder, c change, set func(*outcome)) {
	for name, o := range h.outcomes {
		if o.id == c.id {
			set(o)
			t.d.dueStatus(c.of, name)
		}
	}
}

// note marks an item that failed.
func (t *difference) note(of item, err error) {
	if err == nil {
		return
	}
	t.again[of] = retry
	t.d.log.WithError(err).Warn("federations could not be brought to what they should be; trying again")
}

// listEntries returns the stored entries of this cluster by ID.
func (d *desk) listEntries(ctx context.Context) (map[string]*types.Entry, error) {
	all := map[string]*types.Entry{}
	for token := ""; ; {
		resp, err := d.api.Entries.ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: listPage, PageToken: token})
		if err != nil {
			return nil, fmt.Errorf("list entries: %w", err)
		}
		for _, e := range resp.GetEntries() {
			if strings.HasPrefix(e.GetId(), d.cfg.prefix()) {
				all[e.GetId()] = e
			}
		}
		if token = resp.GetNextPageToken(); token == "" {
			return all, nil
		}
	}
}

// same reports whether a stored entry is as it should be, in what a resource can say.
func same(stored, want *types.Entry) bool {
	return proto.Equal(plain(stored), plain(want))
}

// plain returns what a resource can say of an entry, in one order.
func plain(e *types.Entry) *types.Entry {
	p := &types.Entry{
		SpiffeId: e.GetSpiffeId(), ParentId: e.GetParentId(), X509SvidTtl: e.GetX509SvidTtl(), JwtSvidTtl: e.GetJwtSvidTtl(),
		Admin: e.GetAdmin(), Downstream: e.GetDownstream(), StoreSvid: e.GetStoreSvid(), Hint: e.GetHint(),
		DnsNames: e.GetDnsNames(), FederatesWith: slices.Sorted(slices.Values(e.GetFederatesWith())),
		Selectors: slices.Clone(e.GetSelectors()),
	}
	sortSelectors(p)
	return p
}
