package api

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

const (
	maxAgentVersion = 255 // bytes
	maxToken        = 128 // bytes; it is a segment of the agent's SPIFFE ID
)

// agentService is agent.v1 but for AttestAgent and RenewAgent, which are in attest.go.
type agentService struct {
	agentv1.UnimplementedAgentServer
	api *API
}

// agentIDFromWire parses the SPIFFE ID of an agent of the own trust domain.
func (a *API) agentIDFromWire(w *types.SPIFFEID) (spiffeid.ID, error) {
	id, err := identity.IDFromWire(w)
	switch {
	case err != nil:
		return spiffeid.ID{}, err
	case !id.MemberOf(a.cfg.TrustDomain):
		return spiffeid.ID{}, fmt.Errorf("%q is not a member of trust domain %q", id, a.cfg.TrustDomain.Name())
	case !strings.HasPrefix(id.Path(), "/spire/agent/"):
		return spiffeid.ID{}, fmt.Errorf("%q is not an agent in trust domain %q; path is not in the agent namespace", id, a.cfg.TrustDomain.Name())
	}
	return id, nil
}

func (s *agentService) CountAgents(_ context.Context, req *agentv1.CountAgentsRequest) (*agentv1.CountAgentsResponse, error) {
	keep, err := agentFilter(req.GetFilter())
	if err != nil {
		return nil, err
	}
	nodes, _ := s.api.View.ListNodes(keep, "", 0)
	return &agentv1.CountAgentsResponse{Count: clampInt32(len(nodes))}, nil
}

func (s *agentService) ListAgents(_ context.Context, req *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	keep, err := agentFilter(req.GetFilter())
	if err != nil {
		return nil, err
	}
	page, err := pageFromWire(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, err
	}
	nodes, next := s.api.View.ListNodes(keep, page.after, page.size)
	resp := &agentv1.ListAgentsResponse{NextPageToken: pageToken(next)}
	for _, n := range nodes {
		resp.Agents = append(resp.Agents, agentWire(n, req.GetOutputMask()))
	}
	return resp, nil
}

func (s *agentService) GetAgent(ctx context.Context, req *agentv1.GetAgentRequest) (*types.Agent, error) {
	id, err := s.api.agentIDFromWire(req.GetId())
	if err != nil {
		return nil, malformed("invalid agent ID", err)
	}
	ledgerOf(ctx).note(func(l *audit.Line) { l.Agent = id.String() })
	n, ok := s.api.View.Node(id)
	if !ok {
		return nil, refusal(codes.NotFound, "agent not found")
	}
	return agentWire(n, req.GetOutputMask()), nil
}

func (s *agentService) DeleteAgent(ctx context.Context, req *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	id, err := s.api.agentIDFromWire(req.GetId())
	if err != nil {
		return nil, malformed("invalid agent ID", err)
	}
	ledgerOf(ctx).note(func(l *audit.Line) { l.Agent = id.String() })
	rev, err := s.api.Desk.Evict(ctx, id)
	if err != nil {
		if errors.Is(err, records.ErrNotFound) {
			return nil, refusal(codes.NotFound, "agent not found")
		}
		return nil, fail("failed to remove agent", err)
	}
	ledgerOf(ctx).note(func(l *audit.Line) { l.Rev = rev })
	s.api.settle(ctx, rev)
	return &emptypb.Empty{}, nil
}

func (s *agentService) BanAgent(ctx context.Context, req *agentv1.BanAgentRequest) (*emptypb.Empty, error) {
	id, err := s.api.agentIDFromWire(req.GetId())
	if err != nil {
		return nil, malformed("invalid agent ID", err)
	}
	ledgerOf(ctx).note(func(l *audit.Line) { l.Agent = id.String() })
	rev, err := s.api.Desk.Ban(ctx, id)
	if err != nil {
		if errors.Is(err, records.ErrNotFound) {
			return nil, refusal(codes.NotFound, "agent not found")
		}
		return nil, fail("failed to ban agent", err)
	}
	ledgerOf(ctx).note(func(l *audit.Line) { l.Rev = rev })
	s.api.settle(ctx, rev)
	return &emptypb.Empty{}, nil
}

// PostStatus keeps the version an agent says it has, for the operator's eyes. It writes only when
// the version changed, and nobody waits for it.
func (s *agentService) PostStatus(ctx context.Context, req *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	who := caller.FromContext(ctx)
	if err := s.api.post.wait(ctx, who.Share(), 1); err != nil {
		return nil, err
	}
	version := req.GetAgentVersion()
	switch {
	case len(version) > maxAgentVersion:
		return nil, refusal(codes.InvalidArgument, fmt.Sprintf("agent version is too long (max %d characters)", maxAgentVersion))
	case strings.ContainsFunc(version, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return nil, refusal(codes.InvalidArgument, "agent version contains a control character")
	}
	if n, ok := s.api.View.Node(who.ID); ok && n.AgentVersion == version {
		return &agentv1.PostStatusResponse{}, nil
	}
	_, _, err := s.api.Records.UpdateNode(ctx, who.ID, func(n *records.Node, exists bool) error {
		if !exists {
			return records.ErrNotFound
		}
		n.AgentVersion = version
		return nil
	})
	if err != nil {
		return nil, fail("failed to update agent status", err)
	}
	return &agentv1.PostStatusResponse{}, nil
}

func (s *agentService) CreateJoinToken(ctx context.Context, req *agentv1.CreateJoinTokenRequest) (*types.JoinToken, error) {
	if req.GetTtl() < 1 {
		return nil, refusal(codes.InvalidArgument, "ttl is required, you must provide one")
	}
	token := req.GetToken()
	if token == "" {
		token = newToken()
	}
	if len(token) > maxToken {
		return nil, refusal(codes.InvalidArgument, fmt.Sprintf("token is %d bytes long, the limit is %d", len(token), maxToken))
	}
	parent, err := spiffeid.FromSegments(s.api.cfg.TrustDomain, "spire", "agent", "join_token", token)
	if err != nil {
		return nil, malformed("invalid token", err)
	}
	var alias *identity.Entry
	if req.GetAgentId() != nil {
		id, err := s.api.workloadIDFromWire(req.GetAgentId())
		if err != nil {
			return nil, malformed("invalid agent ID", err)
		}
		if err := outsideID(ctx, id, nil); err != nil {
			return nil, err
		}
		alias = &identity.Entry{
			SPIFFEID: id, ParentID: parent,
			Selectors: attestor.NewSet(attestor.Selector{Type: "spiffe_id", Value: parent.String()}),
		}
		ledgerOf(ctx).note(func(l *audit.Line) { l.SPIFFEID = id.String() })
	}
	expires := s.api.cfg.Now().Add(time.Duration(req.GetTtl()) * time.Second).Truncate(time.Second)
	ledgerOf(ctx).note(func(l *audit.Line) { l.ExpiresAt = expires })
	if err := s.api.Records.CreateToken(ctx, token, expires); err != nil {
		if errors.Is(err, records.ErrExists) {
			return nil, refusal(codes.AlreadyExists, "failed to create token: it exists already")
		}
		return nil, fail("failed to create token", err)
	}
	if alias != nil {
		results, rev, err := s.api.Records.CreateEntries(ctx, []*identity.Entry{alias})
		if err == nil {
			err = results[0].Err
		}
		if err != nil && !errors.Is(err, records.ErrExists) {
			return nil, fail("failed to create join token registration entry", err)
		}
		ledgerOf(ctx).note(func(l *audit.Line) { l.EntryID, l.Rev = results[0].Entry.ID, rev })
		s.api.settle(ctx, rev)
	}
	return &types.JoinToken{Value: token, ExpiresAt: expires.Unix()}, nil
}

// newToken returns a random UUID (RFC 9562, version 4), as SPIRE's tokens are.
func newToken() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// agentWire returns the fields of a node that the mask names; a nil mask names all.
func agentWire(n *records.Node, mask *types.AgentMask) *types.Agent {
	all := mask == nil
	w := &types.Agent{Id: identity.IDWire(n.ID)}
	if all || mask.GetAttestationType() {
		w.AttestationType = n.Type
	}
	if all || mask.GetX509SvidSerialNumber() {
		w.X509SvidSerialNumber = n.Serial
	}
	if all || mask.GetX509SvidExpiresAt() {
		w.X509SvidExpiresAt = unixSeconds(n.ExpiresAt)
	}
	if all || mask.GetSelectors() {
		w.Selectors = identity.SelectorsWire(n.Selectors)
	}
	if all || mask.GetBanned() {
		w.Banned = n.Banned
	}
	if all || mask.GetCanReattest() {
		w.CanReattest = n.CanReattest
	}
	if all || mask.GetAgentVersion() {
		w.AgentVersion = n.AgentVersion
	}
	return w
}

func unixSeconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// parseCSR reads a certificate request and says what is wrong with it as an InvalidArgument.
func parseCSR(der []byte) (*x509.CertificateRequest, error) {
	if len(der) == 0 {
		return nil, refusal(codes.InvalidArgument, "missing CSR")
	}
	csr, err := ca.ParseCSR(der)
	if err != nil {
		return nil, refusal(codes.InvalidArgument, "malformed CSR: "+strings.TrimPrefix(err.Error(), ca.ErrCSR.Error()+": "))
	}
	return csr, nil
}
