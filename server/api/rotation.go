package api

import (
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/feed"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/wire/adminv1"
)

// Feed is what the API asks of the agents' streams; *feed.Server is one.
type Feed interface {
	// Status returns all streams, each agent's oldest first.
	Status() []feed.StreamStatus
	// Returning returns the agents without a stream that are expected back any moment.
	Returning() map[spiffeid.ID]bool
}

// agentsPerMessage keeps messages far below what gRPC takes.
const agentsPerMessage = 500

// RotationStatus says what authorities there are and which agents have yet to follow.
func (s *adminService) RotationStatus(req *adminv1.RotationStatusRequest, stream grpc.ServerStreamingServer[adminv1.RotationStatusResponse]) error {
	if s.api.Authorities == nil || s.api.Feed == nil {
		return refusal(codes.Unimplemented, "this server's authorities are not its own")
	}
	if kindNames[req.GetKind()] == "" {
		return refusal(codes.InvalidArgument, `kind must be "x509", "jwt" or "wit"`)
	}
	first, agents := s.rotation(req.GetKind(), req.GetAll())
	if err := stream.Send(first); err != nil {
		return err
	}
	for some := range slices.Chunk(agents, agentsPerMessage) {
		if err := stream.Send(&adminv1.RotationStatusResponse{Agents: some}); err != nil {
			return err
		}
	}
	return nil
}

func (s *adminService) rotation(kind string, all bool) (*adminv1.RotationStatusResponse, []*adminv1.RotatingAgent) {
	lines := slices.DeleteFunc(s.api.Authorities.Authorities(), func(a records.Journal) bool { return a.Kind != kind })
	slices.SortFunc(lines, func(a, b records.Journal) int {
		if a.CreatedAt.Equal(b.CreatedAt) {
			return a.ActivatedAt.Compare(b.ActivatedAt)
		}
		return a.CreatedAt.Compare(b.CreatedAt)
	})
	active := ""
	known := map[string]bool{}
	first := &adminv1.RotationStatusResponse{Counts: &adminv1.RotationCounts{}}
	for _, a := range lines {
		known[a.AuthorityID] = true
		if a.State == ca.StateActive {
			active = a.AuthorityID
		}
		w := &adminv1.RotatingAuthority{
			AuthorityId: a.AuthorityID, State: a.State, CreatedAt: a.CreatedAt.Unix(), ExpiresAt: a.NotAfter.Unix(),
		}
		if !a.ActivatedAt.IsZero() {
			w.ActivatedAt = a.ActivatedAt.Unix()
		}
		first.Authorities = append(first.Authorities, w)
	}
	streams := map[spiffeid.ID]feed.StreamStatus{}
	for _, st := range s.api.Feed.Status() {
		streams[st.Agent] = st // the newest is the last
	}
	returning := s.api.Feed.Returning()
	now, published := s.api.cfg.Now(), s.api.Authorities.Published()
	nodes, _ := s.api.View.ListNodes(func(n *records.Node) bool { return !n.Banned && now.Before(n.ExpiresAt) }, "", 0)
	var agents []*adminv1.RotatingAgent
	for _, n := range nodes {
		st, connected := streams[n.ID]
		a := &adminv1.RotatingAgent{SpiffeId: n.ID.String(), Connected: connected, Returning: returning[n.ID] && !connected, ExpiresAt: n.ExpiresAt.Unix()}
		if connected {
			following(a, st, kind, active, known, published)
		}
		if count(first.GetCounts(), a) || all {
			agents = append(agents, a)
		}
	}
	return first, agents
}

// following fills in what is known of an agent that has a stream.
func following(a *adminv1.RotatingAgent, st feed.StreamStatus, kind, active string, known map[string]bool, published kv.Rev) {
	a.Current, a.Reports = st.HasAcked(published), st.Reports
	if kind == ca.KindX509 && st.Authority != active {
		a.OwnAuthorityId = st.Authority
	}
	for _, h := range st.Held {
		n := h.X509
		if kind != ca.KindX509 {
			n = h.JWT
		}
		// Authorities that nobody here knows are downstream servers'.
		if n > 0 && h.ID != active && known[h.ID] {
			a.Held = append(a.Held, &adminv1.HeldByAgent{AuthorityId: h.ID, Svids: uint32(n)}) //nolint:gosec // came as one
		}
	}
}

// count counts an agent, and reports whether it has anything left to do.
func count(c *adminv1.RotationCounts, a *adminv1.RotatingAgent) bool {
	c.Agents++
	switch {
	case a.GetReturning():
		c.Behind++
	case !a.GetConnected():
	case a.GetCurrent():
		c.Current++
	default:
		c.Behind++
	}
	holding := a.GetOwnAuthorityId() != "" || len(a.GetHeld()) > 0
	if holding {
		c.Holding++
	}
	unknown := !a.GetReturning() && (!a.GetConnected() || !a.GetReports())
	if unknown {
		c.Unknown++
	}
	return holding || unknown || !a.GetCurrent()
}
