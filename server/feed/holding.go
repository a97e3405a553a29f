package feed

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

// authorities is the capability of agents and servers that speak of who signed what is held.
const authorities = "authorities"

// maxHolding is of how many authorities an agent may say that it holds something. Each lives for a
// multiple of what it signs, so there are two or three.
const maxHolding = 100

// HeldAuthority is what is held at an agent for its workloads that the authority signed.
type HeldAuthority struct {
	ID        string
	X509, JWT int // SVIDs
}

// holding takes in what the agent says it holds.
func (st *stream) holding(h *feedv1.Holding) error {
	if n := len(h.GetAuthorities()); n > maxHolding {
		return status.Errorf(codes.InvalidArgument, "invalid report: %d authorities, the limit is %d", n, maxHolding)
	}
	held := make([]HeldAuthority, 0, len(h.GetAuthorities()))
	for _, a := range h.GetAuthorities() {
		if n := len(a.GetAuthorityId()); n == 0 || n > identity.MaxKeyID {
			return status.Errorf(codes.InvalidArgument, "invalid report: authority ID is %d bytes long, the limit is %d", n, identity.MaxKeyID)
		}
		held = append(held, HeldAuthority{ID: a.GetAuthorityId(), X509: int(a.GetX509Svids()), JWT: int(a.GetJwtSvids())})
	}
	slices.SortFunc(held, func(a, b HeldAuthority) int { return strings.Compare(a.ID, b.ID) })
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	st.status.Reports, st.status.Held = true, held
	return nil
}

// HasAcked reports whether the agent has put in force what the store held at the revision. Revision 0
// stands for any from before this server was started: whoever has a picture of this server has that.
func (s StreamStatus) HasAcked(rev kv.Rev) bool { return s.Acked >= max(rev, 1) }

// departure is when an agent's last stream ended, and what the agent had put in force by then.
type departure struct {
	at    time.Time
	acked kv.Rev
}

// Returning returns the agents that have no stream and are expected back, because their last one ended
// no longer ago than Config.Returning.
func (s *Server) Returning() map[spiffeid.ID]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgetAway()
	agents := make(map[spiffeid.ID]bool, len(s.left))
	for id := range s.left {
		agents[id] = true
	}
	return agents
}

// forgetAway drops from s.left those who are not expected any more. s.mu is held.
func (s *Server) forgetAway() {
	now := s.cfg.Now()
	s.forgot = now
	maps.DeleteFunc(s.left, func(_ spiffeid.ID, d departure) bool { return now.Sub(d.at) > s.cfg.Returning })
}

// Behind counts the agents that have streams, or are expected back, and have put in force on none of them
// what the store held at the revision.
func (s *Server) Behind(rev kv.Rev) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, streams := range s.streams {
		if !slices.ContainsFunc(streams, func(st *stream) bool { return st.status.HasAcked(rev) }) {
			n++
		}
	}
	s.forgetAway()
	for _, d := range s.left {
		if d.acked < max(rev, 1) {
			n++
		}
	}
	return n
}
