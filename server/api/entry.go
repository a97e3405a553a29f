package api

import (
	"context"
	"errors"
	"slices"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/feed"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

// entryService is entry.v1.
type entryService struct {
	entryv1.UnimplementedEntryServer
	api *API
}

func (s *entryService) CountEntries(ctx context.Context, req *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	filter, err := s.api.entryFilter(req.GetFilter())
	if err != nil {
		return nil, err
	}
	filter.Keep = reached(ctx)
	return &entryv1.CountEntriesResponse{Count: clampInt32(s.api.View.CountEntries(filter))}, nil
}

func (s *entryService) ListEntries(ctx context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	page, err := pageFromWire(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, err
	}
	filter, err := s.api.entryFilter(req.GetFilter())
	if err != nil {
		return nil, err
	}
	filter.Keep = reached(ctx)
	entries, next := s.api.View.ListEntries(filter, page.after, page.size)
	resp := &entryv1.ListEntriesResponse{NextPageToken: pageToken(next)}
	for _, e := range entries {
		resp.Entries = append(resp.Entries, maskEntry(e.Wire(), req.GetOutputMask()))
	}
	return resp, nil
}

func (s *entryService) GetEntry(ctx context.Context, req *entryv1.GetEntryRequest) (*types.Entry, error) {
	if req.GetId() == "" {
		return nil, refusal(codes.InvalidArgument, "missing ID")
	}
	ledgerOf(ctx).note(func(l *audit.Line) { l.EntryID = req.GetId() })
	e, ok := s.api.View.Entry(req.GetId())
	if !ok || !reaches(ctx, e) {
		return nil, refusal(codes.NotFound, "entry not found")
	}
	return maskEntry(e.Wire(), req.GetOutputMask()), nil
}

// entryLine is the audit line of a change of an entry.
func entryLine(e *identity.Entry, rev kv.Rev) audit.Line {
	return audit.Line{EntryID: e.ID, SPIFFEID: e.SPIFFEID.String(), Facts: e.Selectors.Strings(), Rev: rev}
}

// claimedLine is the audit line of an entry that could not be read: what its sender says it is.
func claimedLine(w *types.Entry) audit.Line {
	line := audit.Line{EntryID: w.GetId()}
	if id := w.GetSpiffeId(); id != nil {
		line.SPIFFEID = "spiffe://" + id.GetTrustDomain() + id.GetPath()
	}
	return line
}

func (s *entryService) BatchCreateEntry(ctx context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	results := make([]*entryv1.BatchCreateEntryResponse_Result, len(req.GetEntries()))
	l := ledgerOf(ctx)
	var good []*identity.Entry
	var at []int // of good, in the request
	for i, w := range req.GetEntries() {
		e, err := s.api.entryFromWire(w)
		if err != nil {
			err = malformed("failed to convert entry", err)
		} else {
			err = outside(ctx, e)
		}
		if err != nil {
			l.item(claimedLine(w), err)
			results[i] = &entryv1.BatchCreateEntryResponse_Result{Status: itemFailed(err)}
			continue
		}
		good, at = append(good, e), append(at, i)
	}
	if len(good) > 0 {
		made, rev, err := s.api.Records.CreateEntries(ctx, good)
		if err != nil {
			return nil, fail("failed to create entries", err)
		}
		s.api.settle(ctx, rev)
		for j, m := range made {
			results[at[j]] = createResult(ctx, good[j], m, rev, req.GetOutputMask())
		}
	}
	return &entryv1.BatchCreateEntryResponse{Results: results}, nil
}

func createResult(ctx context.Context, asked *identity.Entry, m records.EntryResult, rev kv.Rev, mask *types.EntryMask) *entryv1.BatchCreateEntryResponse_Result {
	r := &entryv1.BatchCreateEntryResponse_Result{Status: itemOK()}
	line := entryLine(asked, 0)
	if m.Entry != nil {
		line.EntryID = m.Entry.ID
		if reaches(ctx, m.Entry) { // one that is in the way may be another's
			r.Entry = maskEntry(m.Entry.Wire(), mask)
		}
	}
	var err error
	switch {
	case m.Err == nil:
		line.Rev = rev
	case errors.Is(m.Err, records.ErrExists) && !similar(asked, m.Entry):
		r.Entry = nil // the asker would take it for what was asked for
		err = refusal(codes.AlreadyExists, "failed to create entry: another entry has the ID")
	case errors.Is(m.Err, records.ErrExists):
		err = refusal(codes.AlreadyExists, "similar entry already exists")
	default:
		err = fail("failed to create entry", m.Err)
	}
	if err != nil {
		r.Status = itemFailed(err)
	}
	ledgerOf(ctx).item(line, err)
	return r
}

// similar reports whether two entries give the same identity to the same workloads.
func similar(a, b *identity.Entry) bool {
	return b != nil && a.SPIFFEID == b.SPIFFEID && a.ParentID == b.ParentID && a.Selectors.Equal(b.Selectors)
}

// maxUpdates is how many entries of one batch are updated at the same time; they share one write to
// the disk.
const maxUpdates = 16

// errTwice refuses what is in a batch for the second time: which of the two would be in force
// afterwards is nobody's guess.
var errTwice = malformed("failed to update entry", errors.New("it is in the batch twice"))

func (s *entryService) BatchUpdateEntry(ctx context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	type outcome struct {
		entry *identity.Entry
		rev   kv.Rev
		err   error
	}
	outcomes := make([]outcome, len(req.GetEntries()))
	seen := make(map[string]bool, len(outcomes))
	for i, w := range req.GetEntries() {
		if id := w.GetId(); id != "" && seen[id] {
			outcomes[i].err = errTwice
		}
		seen[w.GetId()] = true
	}
	inParallel(maxUpdates, len(outcomes), func(i int) {
		if o := &outcomes[i]; o.err == nil {
			o.entry, o.rev, o.err = s.update(ctx, req.GetEntries()[i], req.GetInputMask())
		}
	})
	resp := &entryv1.BatchUpdateEntryResponse{}
	l := ledgerOf(ctx)
	var last kv.Rev
	for i, o := range outcomes {
		r := &entryv1.BatchUpdateEntryResponse_Result{Status: itemOK()}
		line := claimedLine(req.GetEntries()[i])
		if o.err == nil {
			line, last = entryLine(o.entry, o.rev), max(last, o.rev)
			r.Entry = maskEntry(o.entry.Wire(), req.GetOutputMask())
		} else {
			r.Status = itemFailed(o.err)
		}
		l.item(line, o.err)
		resp.Results = append(resp.Results, r)
	}
	s.api.settle(ctx, last)
	return resp, nil
}

// update changes the fields of one entry that the mask names.
func (s *entryService) update(ctx context.Context, w *types.Entry, mask *types.EntryMask) (*identity.Entry, kv.Rev, error) {
	if w.GetId() == "" {
		return nil, 0, malformed("failed to convert entry", errors.New("missing entry ID"))
	}
	if mask == nil { // everything is given: say what is wrong with it whether or not it exists
		if _, err := s.api.entryFromWire(w); err != nil {
			return nil, 0, malformed("failed to convert entry", err)
		}
	}
	e, rev, err := s.api.Records.UpdateEntry(ctx, w.GetId(), func(e *identity.Entry) error {
		if err := outside(ctx, e); err != nil {
			return &failure{st: status.New(codes.NotFound, "failed to update entry"), cause: err}
		}
		merged := mergeEntry(e.Wire(), w, mask)
		changed, err := s.api.entryFromWire(merged)
		if err != nil {
			return malformed("failed to convert entry", err)
		}
		if err := outside(ctx, changed); err != nil {
			return err
		}
		changed.ID, changed.CreatedAt, changed.Revision = e.ID, e.CreatedAt, e.Revision
		*e = *changed
		return nil
	})
	switch {
	case errors.Is(err, records.ErrNotFound):
		return nil, 0, refusal(codes.NotFound, "failed to update entry")
	case errors.Is(err, records.ErrExists):
		return nil, 0, refusal(codes.AlreadyExists, "failed to update entry: similar entry already exists")
	case err != nil:
		return nil, 0, fail("failed to update entry", err)
	}
	return e, rev, nil
}

func (s *entryService) BatchDeleteEntry(ctx context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	resp := &entryv1.BatchDeleteEntryResponse{}
	if len(req.GetIds()) == 0 {
		return resp, nil
	}
	l := ledgerOf(ctx)
	var ids []string
	for _, id := range req.GetIds() {
		if id != "" {
			ids = append(ids, id)
		}
	}
	lines := make(map[string]audit.Line, len(ids))
	_, limited := caller.FromContext(ctx).Scope()
	hidden := make(map[string]bool)
	for _, id := range ids {
		lines[id] = audit.Line{EntryID: id}
		e, ok := s.api.View.Entry(id)
		if ok {
			lines[id] = entryLine(e, 0)
		}
		hidden[id] = limited && (!ok || !reaches(ctx, e))
	}
	ids = slices.DeleteFunc(ids, func(id string) bool { return hidden[id] })
	// The view may be behind what is deleted: what has left the caller's reach meanwhile is not theirs to delete.
	errs, rev, err := s.api.Records.DeleteEntriesIf(ctx, ids, func(e *identity.Entry) bool { return reaches(ctx, e) })
	if err != nil {
		return nil, fail("failed to delete entries", err)
	}
	s.api.settle(ctx, rev)
	next := 0
	for _, id := range req.GetIds() {
		var err error
		line := lines[id]
		switch {
		case id == "":
			err = refusal(codes.InvalidArgument, "missing entry ID")
		case hidden[id]:
			err = refusal(codes.NotFound, "entry not found")
		default:
			switch e := errs[next]; {
			case e == nil:
				line.Rev = rev
			case errors.Is(e, records.ErrNotFound):
				err = refusal(codes.NotFound, "entry not found")
			default:
				err = fail("failed to delete entry", e)
			}
			next++
		}
		r := &entryv1.BatchDeleteEntryResponse_Result{Id: id, Status: itemOK()}
		if err != nil {
			r.Status = itemFailed(err)
		}
		l.item(line, err)
		resp.Results = append(resp.Results, r)
	}
	return resp, nil
}

func (s *entryService) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	picture := s.api.unexpired(s.api.View.Agent(caller.FromContext(ctx).ID))
	return &entryv1.GetAuthorizedEntriesResponse{Entries: feed.Authorized(picture, req.GetOutputMask())}, nil
}

func (s *entryService) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	return feed.Sync(stream, s.api.unexpired(s.api.View.Agent(caller.FromContext(stream.Context()).ID)))
}

// unexpired returns the picture without entries that have expired. The view takes them out when its
// timer says so, which a clock that was set may have made late.
func (a *API) unexpired(p *view.AgentPicture) *view.AgentPicture {
	now := a.cfg.Now()
	expired := func(e *identity.Entry) bool { return e.Expired(now) }
	if !slices.ContainsFunc(p.Entries, expired) {
		return p
	}
	return &view.AgentPicture{
		StoreID: p.StoreID, Rev: p.Rev, Entries: slices.DeleteFunc(slices.Clone(p.Entries), expired), Bundles: p.Bundles, Verdicts: p.Verdicts,
	}
}
