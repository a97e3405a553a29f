package feed

import (
	"errors"
	"io"
	"slices"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

const (
	// syncPage is how many entries a SPIRE agent is sent at most in one message, and up to how many
	// it gets all at once.
	syncPage = 500
	// syncBytes keeps a page below the 4 MiB that gRPC clients accept, with room to spare. SPIRE
	// counts entries only; its agents take pages of any length.
	syncBytes = 3 << 20
)

// Authorized returns the entries of a picture as GetAuthorizedEntries sends them, without those that
// demand a verdict: who asks so knows nothing of verdicts. A nil mask means all fields.
func Authorized(p *view.AgentPicture, mask *types.EntryMask) []*types.Entry {
	p = p.Plain()
	entries := make([]*types.Entry, len(p.Entries))
	for i, e := range p.Entries {
		entries[i] = masked(e, mask)
	}
	return entries
}

// Sync answers one SyncAuthorizedEntries call from a picture, which stays the same for the whole
// call: up to 500 entries at once, more as revisions from which the agent chooses.
// Its errors are gRPC statuses with the texts of SPIRE.
func Sync(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse], p *view.AgentPicture) error {
	return syncPages(stream, p.Plain(), syncPage, syncBytes)
}

func syncPages(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse], p *view.AgentPicture, page, bytes int) error {
	req, err := stream.Recv()
	if err != nil {
		return ended(err)
	}
	mask := req.GetOutputMask() // later messages cannot change it
	switch {
	case len(req.GetIds()) > 0:
		return status.Error(codes.InvalidArgument, "specifying IDs on initial request is not supported")
	case mask != nil && !mask.GetRevisionNumber():
		// Without it the agent could not tell a changed entry from the one it has.
		return status.Error(codes.InvalidArgument, "revision number cannot be masked")
	}
	if len(p.Entries) <= page {
		all := Authorized(p, mask)
		resp := &entryv1.SyncAuthorizedEntriesResponse{Entries: all}
		if proto.Size(resp) <= bytes {
			return stream.Send(resp)
		}
	}
	if err := sendRevisions(stream, p.Entries, page); err != nil {
		return err
	}
	for {
		req, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF), status.Code(err) == codes.Canceled:
			return nil // the agent has what it wants
		case err != nil:
			return err
		}
		if err := sendAsked(stream, p, req.GetIds(), mask, page, bytes); err != nil {
			return err
		}
	}
}

type syncSender interface {
	Send(resp *entryv1.SyncAuthorizedEntriesResponse) error
}

func sendRevisions(stream syncSender, entries []*identity.Entry, page int) error {
	for len(entries) > 0 {
		some := entries[:min(page, len(entries))]
		entries = entries[len(some):]
		resp := &entryv1.SyncAuthorizedEntriesResponse{More: len(entries) > 0}
		for _, e := range some {
			revision := &entryv1.EntryRevision{Id: e.ID, RevisionNumber: e.Revision}
			if !e.CreatedAt.IsZero() {
				revision.CreatedAt = e.CreatedAt.Unix()
			}
			resp.EntryRevisions = append(resp.EntryRevisions, revision)
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
	return nil
}

// sendAsked sends the asked entries in full, each once, sorted by ID. IDs that the agent is not
// authorized for are skipped: the answer does not tell whether they exist. The last message, maybe
// an empty one, has more unset.
func sendAsked(stream syncSender, p *view.AgentPicture, ids []string, mask *types.EntryMask, page, bytes int) error {
	slices.Sort(ids)
	resp, size := &entryv1.SyncAuthorizedEntriesResponse{}, 0
	for _, id := range slices.Compact(ids) {
		e, found := p.Entry(id)
		if !found {
			continue
		}
		w := masked(e, mask)
		n := proto.Size(w) + overhead
		if len(resp.GetEntries()) == page || len(resp.GetEntries()) > 0 && size+n > bytes {
			resp.More = true
			if err := stream.Send(resp); err != nil {
				return err
			}
			resp, size = &entryv1.SyncAuthorizedEntriesResponse{}, 0
		}
		resp.Entries = append(resp.Entries, w)
		size += n
	}
	return stream.Send(resp)
}

// masked returns the public form of an entry with only the fields the mask has; the ID always is. A
// nil mask has all.
func masked(e *identity.Entry, mask *types.EntryMask) *types.Entry {
	w := e.Wire()
	if mask == nil {
		return w
	}
	out := &types.Entry{Id: w.GetId()}
	if mask.GetSpiffeId() {
		out.SpiffeId = w.GetSpiffeId()
	}
	if mask.GetParentId() {
		out.ParentId = w.GetParentId()
	}
	if mask.GetSelectors() {
		out.Selectors = w.GetSelectors()
	}
	if mask.GetX509SvidTtl() {
		out.X509SvidTtl = w.GetX509SvidTtl()
	}
	if mask.GetJwtSvidTtl() {
		out.JwtSvidTtl = w.GetJwtSvidTtl()
	}
	if mask.GetFederatesWith() {
		out.FederatesWith = w.GetFederatesWith()
	}
	if mask.GetAdmin() {
		out.Admin = w.GetAdmin()
	}
	if mask.GetDownstream() {
		out.Downstream = w.GetDownstream()
	}
	if mask.GetExpiresAt() {
		out.ExpiresAt = w.GetExpiresAt()
	}
	if mask.GetDnsNames() {
		out.DnsNames = w.GetDnsNames()
	}
	if mask.GetRevisionNumber() {
		out.RevisionNumber = w.GetRevisionNumber()
	}
	if mask.GetStoreSvid() {
		out.StoreSvid = w.GetStoreSvid()
	}
	if mask.GetHint() {
		out.Hint = w.GetHint()
	}
	if mask.GetCreatedAt() {
		out.CreatedAt = w.GetCreatedAt()
	}
	if mask.GetAdditionalAttributes() {
		out.AdditionalAttributes = w.GetAdditionalAttributes()
	}
	return out
}
