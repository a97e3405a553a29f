package fakeserver

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/server/wire/later"
)

func (s *Server) countUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := s.count(info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (s *Server) countStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := s.count(info.FullMethod); err != nil {
		return err
	}
	return next(srv, stream)
}

// count counts a call, and sends it away if the server is busy.
func (s *Server) count(method string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	method = path.Base(method)
	s.calls[method]++
	if busy := s.busy[method]; len(busy) > 0 {
		s.busy[method] = busy[1:]
		return later.Status("too much to do", busy[0]).Err()
	}
	return nil
}

func denied(reason types.PermissionDeniedDetails_Reason) error {
	st, err := status.New(codes.PermissionDenied, "authorization denied").
		WithDetails(&types.PermissionDeniedDetails{Reason: reason})
	if err != nil {
		return err
	}
	return st.Err()
}

// admit checks that the caller is an agent in good standing, and promotes its next serial at its
// first use.
func (s *Server) admit(ctx context.Context) error {
	cert, err := caller(ctx)
	if err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.agents[cert.URIs[0].String()]
	serial := cert.SerialNumber.String()
	switch {
	case time.Now().After(cert.NotAfter):
		return denied(types.PermissionDeniedDetails_AGENT_EXPIRED)
	case a == nil:
		return denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	case a.banned:
		return denied(types.PermissionDeniedDetails_AGENT_BANNED)
	case a.serial == serial:
		return nil
	case a.next == serial:
		a.serial, a.next = serial, ""
		return nil
	}
	return denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
}

type agentService struct {
	agentv1.UnimplementedAgentServer
	s *Server
}

func (a *agentService) PostStatus(ctx context.Context, _ *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	if a.s.cfg.Knows == Get {
		return a.UnimplementedAgentServer.PostStatus(ctx, nil)
	}
	return &agentv1.PostStatusResponse{}, a.s.admit(ctx)
}

func (a *agentService) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	params := req.GetParams()
	kind, payload := params.GetData().GetType(), string(params.GetData().GetPayload())
	if payload == "" {
		return status.Error(codes.InvalidArgument, "malformed param: missing attestation data payload")
	}
	id, err := spiffeid.FromSegments(TrustDomain, "spire", "agent", kind, "node")
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if kind == "join_token" {
		a.s.mu.Lock()
		known := a.s.tokens[payload]
		delete(a.s.tokens, payload)
		a.s.mu.Unlock()
		if !known {
			return status.Error(codes.InvalidArgument, "failed to attest: join token does not exist or has already been used")
		}
	}
	if a.s.cfg.Challenge != "" {
		if err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: []byte(a.s.cfg.Challenge)}}); err != nil {
			return err
		}
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		if string(req.GetChallengeResponse()) != a.s.cfg.Challenge+"!" {
			return status.Error(codes.InvalidArgument, "failed to attest: wrong answer")
		}
	}
	svid, cert, err := a.sign(params.GetParams().GetCsr(), id)
	if err != nil {
		return err
	}
	a.s.mu.Lock()
	old := a.s.agents[id.String()]
	banned := old != nil && old.banned
	if !banned {
		a.s.agents[id.String()] = &agent{serial: cert.SerialNumber.String()}
	}
	a.s.mu.Unlock()
	if banned {
		return status.Error(codes.PermissionDenied, "failed to attest: agent is banned")
	}
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: svid, Reattestable: a.s.cfg.Reattestable},
	}})
}

func (a *agentService) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	if err := a.s.admit(ctx); err != nil {
		return nil, err
	}
	if a.s.cfg.Reattestable {
		return nil, denied(types.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	}
	was, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	id, err := spiffeid.FromURI(was.URIs[0])
	if err != nil {
		return nil, err
	}
	svid, cert, err := a.sign(req.GetParams().GetCsr(), id)
	if err != nil {
		return nil, err
	}
	a.s.mu.Lock()
	defer a.s.mu.Unlock()
	if known := a.s.agents[id.String()]; known != nil {
		known.next = cert.SerialNumber.String()
	}
	return &agentv1.RenewAgentResponse{Svid: svid}, nil
}

func (a *agentService) sign(der []byte, id spiffeid.ID) (*types.X509SVID, *x509.Certificate, error) {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil || len(csr.URIs) != 0 {
		return nil, nil, status.Error(codes.InvalidArgument, "malformed CSR")
	}
	a.s.mu.Lock()
	defer a.s.mu.Unlock()
	cert, err := a.s.ca.issue(id, csr.PublicKey, nil, a.s.cfg.AgentTTL)
	if err != nil {
		return nil, nil, status.Error(codes.Internal, err.Error())
	}
	return &types.X509SVID{
		Id: idWire(id), CertChain: [][]byte{cert.Raw}, ExpiresAt: cert.NotAfter.Unix(),
	}, cert, nil
}

func idWire(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

type bundleService struct {
	bundlev1.UnimplementedBundleServer
	s *Server
}

func (b *bundleService) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	return b.s.bundle(), nil
}

func (b *bundleService) GetFederatedBundle(ctx context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	if err := b.s.admit(ctx); err != nil {
		return nil, err
	}
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	if other := b.s.others[req.GetTrustDomain()]; other != nil {
		return other, nil
	}
	return nil, status.Error(codes.NotFound, "bundle not found")
}

type entryService struct {
	entryv1.UnimplementedEntryServer
	s *Server
}

func (e *entryService) GetAuthorizedEntries(ctx context.Context, _ *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	if err := e.s.admit(ctx); err != nil {
		return nil, err
	}
	e.s.mu.Lock()
	defer e.s.mu.Unlock()
	resp := &entryv1.GetAuthorizedEntriesResponse{}
	for _, id := range slices.Sorted(maps.Keys(e.s.entries)) {
		resp.Entries = append(resp.Entries, e.s.entries[id])
	}
	return resp, nil
}

func (e *entryService) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	if e.s.cfg.Knows == Get {
		return e.UnimplementedEntryServer.SyncAuthorizedEntries(stream)
	}
	if err := e.s.admit(stream.Context()); err != nil {
		return err
	}
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(req.GetIds()) > 0 || req.GetOutputMask() != nil && !req.GetOutputMask().GetRevisionNumber() {
		return status.Error(codes.InvalidArgument, "specifying IDs on initial request is not supported")
	}
	e.s.mu.Lock()
	entries := maps.Clone(e.s.entries)
	e.s.mu.Unlock()
	ids := slices.Sorted(maps.Keys(entries))
	page := e.s.cfg.SyncPage
	if len(ids) <= page {
		resp := &entryv1.SyncAuthorizedEntriesResponse{}
		for _, id := range ids {
			resp.Entries = append(resp.Entries, entries[id])
		}
		return stream.Send(resp)
	}
	for at := 0; at < len(ids); at += page {
		resp := &entryv1.SyncAuthorizedEntriesResponse{More: at+page < len(ids)}
		for _, id := range ids[at:min(at+page, len(ids))] {
			resp.EntryRevisions = append(resp.EntryRevisions, &entryv1.EntryRevision{
				Id: id, RevisionNumber: entries[id].GetRevisionNumber(), CreatedAt: entries[id].GetCreatedAt(),
			})
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if !slices.IsSorted(req.GetIds()) || len(req.GetIds()) > page {
			return status.Error(codes.InvalidArgument, "IDs must be sorted and fit a page")
		}
		// Two messages where one would do: an agent must read on while there is more.
		half := len(req.GetIds()) / 2
		for n, part := range [][]string{req.GetIds()[:half], req.GetIds()[half:]} {
			resp := &entryv1.SyncAuthorizedEntriesResponse{More: n == 0}
			for _, id := range part {
				resp.Entries = append(resp.Entries, entries[id])
			}
			if err := stream.Send(resp); err != nil {
				return err
			}
		}
	}
}

type svidService struct {
	svidv1.UnimplementedSVIDServer
	s *Server
}

// wait holds signing back while the test wants it.
func (v *svidService) wait(ctx context.Context) error {
	v.s.mu.Lock()
	block := v.s.block
	v.s.mu.Unlock()
	if block == nil {
		return nil
	}
	select {
	case <-block:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

func (v *svidService) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	if err := v.s.admit(ctx); err != nil {
		return nil, err
	}
	if err := v.wait(ctx); err != nil {
		return nil, err
	}
	if len(req.GetParams()) > v.s.cfg.MaxBatch {
		return nil, status.Error(codes.ResourceExhausted, "too many at once")
	}
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	resp := &svidv1.BatchNewX509SVIDResponse{}
	for _, p := range req.GetParams() {
		svid, err := v.x509(p)
		resp.Results = append(resp.Results, &svidv1.BatchNewX509SVIDResponse_Result{
			Status: &types.Status{Code: int32(status.Code(err)), Message: status.Convert(err).Message()},
			Svid:   svid,
		})
	}
	return resp, nil
}

// x509 signs one. mu is held.
func (v *svidService) x509(p *svidv1.NewX509SVIDParams) (*types.X509SVID, error) {
	e := v.s.entries[p.GetEntryId()]
	if e == nil || v.s.unknown[p.GetEntryId()] {
		return nil, status.Error(codes.NotFound, "entry not found or not authorized")
	}
	csr, err := x509.ParseCertificateRequest(p.GetCsr())
	if err != nil || csr.CheckSignature() != nil {
		return nil, status.Error(codes.InvalidArgument, "malformed CSR")
	}
	id, err := spiffeid.FromPath(TrustDomain, e.GetSpiffeId().GetPath())
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	ttl := v.s.cfg.X509TTL
	if e.GetX509SvidTtl() > 0 {
		ttl = time.Duration(e.GetX509SvidTtl()) * time.Second
	}
	cert, err := v.s.ca.issue(id, csr.PublicKey, e.GetDnsNames(), ttl)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	v.s.calls["x509:"+e.GetId()]++
	return &types.X509SVID{Id: e.GetSpiffeId(), CertChain: [][]byte{cert.Raw}, ExpiresAt: cert.NotAfter.Unix()}, nil
}

func (v *svidService) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	if err := v.s.admit(ctx); err != nil {
		return nil, err
	}
	if err := v.wait(ctx); err != nil {
		return nil, err
	}
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	e := v.s.entries[req.GetEntryId()]
	if e == nil || v.s.unknown[req.GetEntryId()] {
		return nil, status.Error(codes.NotFound, "entry not found or not authorized")
	}
	signer, err := jose.NewSigner(jose.SigningKey{
		Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: v.s.jwtKeys[v.s.jwtID], KeyID: v.s.jwtID},
	}, new(jose.SignerOptions).WithType("JWT"))
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	now := time.Now()
	expires := now.Add(v.s.cfg.JWTTTL)
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Subject:  "spiffe://" + TrustDomain.Name() + e.GetSpiffeId().GetPath(),
		Audience: req.GetAudience(), IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(expires),
	}).Serialize()
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{
		Token: token, Id: e.GetSpiffeId(), IssuedAt: now.Unix(), ExpiresAt: expires.Unix(),
	}}, nil
}

type feedService struct {
	feedv1.UnimplementedFeedServer
	s *Server
}

func (f *feedService) Follow(stream feedv1.Feed_FollowServer) error {
	if err := f.s.admit(stream.Context()); err != nil {
		return err
	}
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := req.GetHello()
	if hello == nil {
		return status.Error(codes.InvalidArgument, "first message must be hello")
	}
	f.s.mu.Lock()
	f.s.hello = hello
	f.s.mu.Unlock()
	go func() { // ends with the stream
		for {
			req, err := stream.Recv()
			if err != nil {
				return
			}
			f.s.mu.Lock()
			if running := req.GetRunning(); running != nil {
				f.s.reports = append(f.s.reports, running)
			} else {
				f.s.acked = req.GetAck().GetRevision()
			}
			f.s.mu.Unlock()
		}
	}()
	sent := held(hello)
	for first := true; ; first = false {
		if err := f.s.admit(stream.Context()); err != nil {
			return err
		}
		f.s.mu.Lock()
		changed := f.s.changed
		parts, now, err := f.difference(hello, sent, first)
		f.s.mu.Unlock()
		if err != nil {
			return err
		}
		sent = now
		for _, part := range parts {
			if err := stream.Send(part); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// holding is what an agent holds, as far as its server knows.
type holding struct {
	entries map[string][2]int64 // revision and creation
	bundles map[string]uint64
}

func held(h *feedv1.Hello) holding {
	out := holding{entries: map[string][2]int64{}, bundles: map[string]uint64{}}
	for _, e := range h.GetEntries() {
		out.entries[e.GetId()] = [2]int64{e.GetRevisionNumber(), e.GetCreatedAt()}
	}
	for _, b := range h.GetBundles() {
		out.bundles[b.GetTrustDomain()] = b.GetSequenceNumber()
	}
	return out
}

// difference returns the next picture in two parts. mu is held.
func (f *feedService) difference(hello *feedv1.Hello, was holding, first bool) ([]*feedv1.FollowResponse, holding, error) {
	entries, bundles := f.s.picture()
	full := first && hello.GetStoreId() != f.s.storeID
	if full {
		was = held(&feedv1.Hello{})
	}
	one := &feedv1.FollowResponse{StoreId: f.s.storeID, Revision: f.s.rev, Full: full, More: true}
	two := proto.CloneOf(one)
	two.More = false
	two.MadeAt = time.Now().UnixNano()
	if first {
		one.Capabilities = f.s.capabilities
	}
	now := held(&feedv1.Hello{})
	for id, e := range entries {
		now.entries[id] = [2]int64{e.GetRevisionNumber(), e.GetCreatedAt()}
		if was.entries[id] != now.entries[id] || full {
			one.Entries = append(one.Entries, e)
		}
	}
	for id := range was.entries {
		if entries[id] == nil {
			two.RemovedEntryIds = append(two.RemovedEntryIds, id)
		}
	}
	for td, b := range bundles {
		now.bundles[td] = b.GetSequenceNumber()
		if seq, ok := was.bundles[td]; !ok || seq != b.GetSequenceNumber() {
			two.Bundles = append(two.Bundles, b)
		}
	}
	for td := range was.bundles {
		if bundles[td] == nil {
			two.RemovedTrustDomains = append(two.RemovedTrustDomains, td)
		}
	}
	// An entry that the agent cannot read is left out there, so the server cannot know the checksum.
	sum, err := checksum(entries, bundles)
	if err == nil {
		two.Checksum = sum
	}
	if f.s.drift > 0 {
		f.s.drift--
		two.Checksum = bytes.Repeat([]byte{7}, 32)
	}
	return []*feedv1.FollowResponse{one, two}, now, nil
}

// Entry returns an entry of the trust domain with the selectors, given as "type:value".
func Entry(id, path string, selectors ...string) *types.Entry {
	e := &types.Entry{
		Id: id, SpiffeId: &types.SPIFFEID{TrustDomain: TrustDomain.Name(), Path: path}, CreatedAt: 1_700_000_000,
	}
	for _, s := range selectors {
		kind, value, ok := strings.Cut(s, ":")
		if !ok {
			panic(fmt.Sprintf("selector %q without a colon", s))
		}
		e.Selectors = append(e.Selectors, &types.Selector{Type: kind, Value: value})
	}
	return e
}
