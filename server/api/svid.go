package api

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/turn"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/server/wire/terms"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Limits on the audience of a token.
const (
	maxAudiences = 100
	maxAudience  = 1024 // bytes
)

// svidService is svid.v1. What is not here answers Unimplemented.
type svidService struct {
	svidv1.UnimplementedSVIDServer
	api *API
}

// errNotAuthorized does not tell an entry that is missing from one that is another agent's.
var errNotAuthorized = refusal(codes.NotFound, "entry not found or not authorized")

// BatchNewX509SVID signs for entries that the calling agent may hold at this moment. Of a request it
// takes the public key and nothing else: what is signed comes from the entry.
func (s *svidService) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	n := len(req.GetParams())
	b, err := s.batch(ctx, n)
	if err != nil {
		return nil, err
	}
	results := make([]*svidv1.BatchNewX509SVIDResponse_Result, n)
	lines, errs := make([]audit.Line, n), make([]error, n)
	items, serials := make([]*permitted, n), make([]records.Serial, n)
	inParallel(runtime.GOMAXPROCS(0), n, func(i int) {
		p := req.GetParams()[i]
		lines[i] = audit.Line{EntryID: p.GetEntryId()}
		var item *permitted
		var chain []*x509.Certificate
		err := s.api.inTurn(ctx, b.rank, b.who, func() (err error) {
			item, chain, err = s.newX509(ctx, b.picture, p, b.terms(i))
			return err
		})
		if items[i] = item; item != nil {
			lines[i] = entryLine(item.entry, b.picture.Rev)
			lines[i].Verdicts = item.grant.Names()
		}
		if errs[i] = err; err != nil {
			results[i] = &svidv1.BatchNewX509SVIDResponse_Result{Status: itemFailed(err)}
			return
		}
		lines[i].Serial, lines[i].ExpiresAt = chain[0].SerialNumber.String(), chain[0].NotAfter
		serials[i] = item.serial(b.who.ID, chain[0], s.api.cfg.Now())
		results[i] = &svidv1.BatchNewX509SVIDResponse_Result{Status: itemOK(), Svid: svidWire(chain, item.entry)}
	})
	noted := s.noteSerials(ctx, serials)
	now := s.api.View.Agent(b.who.ID)
	signed := 0
	for i, line := range lines {
		if errs[i] == nil && noted[i] != nil {
			errs[i] = noted[i]
			results[i] = &svidv1.BatchNewX509SVIDResponse_Result{Status: itemFailed(noted[i])}
		}
		if errs[i] == nil {
			if errs[i] = s.still(b.picture, now, items[i]); errs[i] != nil {
				results[i] = &svidv1.BatchNewX509SVIDResponse_Result{Status: itemFailed(errs[i])}
			}
		}
		b.ledger.item(line, errs[i])
		if errs[i] == nil {
			signed++
		}
	}
	s.api.issued.WithLabelValues("x509").Add(float64(signed))
	return &svidv1.BatchNewX509SVIDResponse{Results: results}, nil
}

// batch is a call of an agent for SVIDs: who asks for them, and what it is decided by.
type batch struct {
	who     *caller.Caller
	by      []terms.Item // nil: the agent does not say
	picture *view.AgentPicture
	rank    turn.Rank
	ledger  *ledger
}

// batch lets a call for n SVIDs in, when it is its caller's turn.
func (s *svidService) batch(ctx context.Context, n int) (*batch, error) {
	switch {
	case n == 0:
		return nil, refusal(codes.InvalidArgument, "missing parameters")
	case n > maxBatch:
		return nil, refusal(codes.ResourceExhausted, fmt.Sprintf("batch of %d requests, the limit is %d", n, maxBatch))
	}
	b := &batch{who: caller.FromContext(ctx), rank: turn.Usual, ledger: ledgerOf(ctx)}
	if n > small {
		b.rank = turn.Bulk
	}
	if err := s.api.sign.wait(ctx, b.who.Share(), n); err != nil {
		return nil, err
	}
	var err error
	if b.by, err = terms.Of(ctx, n); err != nil {
		return nil, malformed("invalid request", err)
	}
	b.picture = s.api.View.Agent(b.who.ID)
	b.ledger.note(func(line *audit.Line) { line.Rev = b.picture.Rev })
	return b, nil
}

// terms are those that SVID number i is asked for by; nil: the agent does not say.
func (b *batch) terms(i int) *terms.Item {
	if b.by == nil {
		return nil
	}
	return &b.by[i]
}

// inParallel calls f(0) to f(n-1) on at most width goroutines, the caller's own among them: a goroutine
// for each item would grow its stack anew each time, and the usual batch has one item. A panic of f
// comes out in the caller's goroutine, where the interceptors turn it into an error; anywhere else it
// would end the server.
func inParallel(width, n int, f func(i int)) {
	var next atomic.Int64
	work := func() {
		for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
			f(i)
		}
	}
	var group sync.WaitGroup
	var panicked atomic.Pointer[any]
	for range min(n, width) - 1 {
		group.Go(func() {
			defer func() {
				if p := recover(); p != nil {
					panicked.Store(&p)
				}
			}()
			work()
		})
	}
	func() {
		defer group.Wait()
		work()
	}()
	if p := panicked.Load(); p != nil {
		panic(*p)
	}
}

func (s *svidService) newX509(ctx context.Context, picture *view.AgentPicture, p *svidv1.NewX509SVIDParams, by *terms.Item) (*permitted, []*x509.Certificate, error) {
	if p.GetEntryId() == "" {
		return nil, nil, refusal(codes.InvalidArgument, "missing entry ID")
	}
	item, err := s.permit(picture, p.GetEntryId())
	if err != nil {
		return item, nil, err
	}
	if err := item.agrees(picture, by); err != nil {
		return item, nil, err
	}
	csr, err := parseCSR(p.GetCsr())
	if err != nil {
		return item, nil, err
	}
	e := item.entry
	chain, err := s.api.CA.SignWorkload(ctx, ca.WorkloadParams{
		PublicKey: csr.PublicKey, ID: e.SPIFFEID, DNSNames: e.DNSNames, TTL: e.X509SVIDTTL, MaxTTL: item.most(item.grant.X509, s.api.cfg.Now()),
	})
	if err != nil {
		return item, nil, fail("failed to sign X509-SVID", err)
	}
	return item, chain, nil
}

// serial is what is to be known of a certificate to revoke it; without a number if it rests on no verdict.
func (p *permitted) serial(agent spiffeid.ID, cert *x509.Certificate, now time.Time) records.Serial {
	if len(p.grant.By) == 0 {
		return records.Serial{}
	}
	m := &stored.EvidenceSerial{
		AuthorityId: hex.EncodeToString(cert.AuthorityKeyId),
		EntryId:     p.entry.ID, Agent: agent.String(), SpiffeId: p.entry.SPIFFEID.String(), IssuedAt: now.Unix(), ExpiresAt: cert.NotAfter.Unix(),
	}
	for _, v := range p.grant.By {
		m.Digests = append(m.Digests, v.Digest)
	}
	return records.Serial{Number: cert.SerialNumber.String(), EvidenceSerial: m}
}

// noteSerials writes down what may have to be revoked, and returns for each why it must not be given out.
func (s *svidService) noteSerials(ctx context.Context, serials []records.Serial) []error {
	errs := make([]error, len(serials))
	var list []records.Serial
	var at []int // where those of list are among all
	for i, one := range serials {
		if one.Number != "" {
			list, at = append(list, one), append(at, i)
		}
	}
	if len(list) == 0 || s.api.Evidence == nil {
		return errs
	}
	for n, err := range s.api.Evidence.Issued(ctx, list...) {
		switch {
		case errors.Is(err, verdict.ErrTurned):
			errs[at[n]] = errChanged
		case err != nil:
			errs[at[n]] = fail("failed to note the serial number", err)
		}
	}
	return errs
}

// permitted is an entry that may be signed for, and what the verdicts say to it.
type permitted struct {
	entry *identity.Entry
	grant view.Grant
}

// most is how long something that is signed for the entry may live: no longer than the verdicts say, and
// not beyond the entry's own expiry, from which on nobody is authorized by it. 0 is no limit.
func (p *permitted) most(grant time.Duration, now time.Time) time.Duration {
	if p.entry.ExpiresAt.IsZero() {
		return grant
	}
	left := p.entry.ExpiresAt.Sub(now)
	if grant > 0 {
		return min(grant, left)
	}
	return left
}

// permit returns the entry if the picture's agent may have it signed for. With the error of an entry that
// the agent may hold, but that no image of its own allows, comes the entry too.
func (s *svidService) permit(picture *view.AgentPicture, id string) (*permitted, error) {
	e, ok := s.authorized(picture, id)
	if !ok {
		return nil, errNotAuthorized
	}
	grant, err := picture.Permit(e, s.api.cfg.Now())
	switch {
	case err == nil:
		return &permitted{entry: e, grant: grant}, nil
	case len(picture.Verdicts) == 0:
		// To an agent that reports no images, entries that demand verdicts do not exist.
		return &permitted{entry: e}, &failure{st: status.Convert(errNotAuthorized), cause: err}
	}
	return &permitted{entry: e}, refusal(codes.FailedPrecondition, err.Error())
}

// agrees refuses what an agent asks for by an entry, or by a verdict on an image, that is another one by now:
// the agent has decided who is to have it by what was, and is about to hear what is. An agent that does not say
// what it goes by is SPIRE's own, and holds no entry that demands a verdict.
func (p *permitted) agrees(picture *view.AgentPicture, by *terms.Item) error {
	if by == nil {
		return nil
	}
	if by.Revision != p.entry.Revision {
		return refusal(codes.FailedPrecondition, fmt.Sprintf("the entry is at revision %d, and was asked for by revision %d", p.entry.Revision, by.Revision))
	}
	for _, v := range by.Verdicts {
		at := slices.IndexFunc(picture.Verdicts, func(now *records.Verdict) bool { return now.Digest == v.Digest })
		if at < 0 || picture.Verdicts[at].Seq != v.Seq {
			return refusal(codes.FailedPrecondition, fmt.Sprintf("there is another verdict on image %s than number %d, by which it was asked for", v.Digest, v.Seq))
		}
	}
	return nil
}

// errChanged is what a request loses to that was under way while the entry, or the verdict on the image,
// was changed.
var errChanged = refusal(codes.FailedPrecondition, "the entry or the verdict on the image was changed while this was signed")

// still refuses what was signed on the strength of a picture that has been replaced since, unless nothing
// in it that counts is different: what was changed before the answer leaves is not given out any more.
func (s *svidService) still(was, now *view.AgentPicture, item *permitted) error {
	if was == now {
		return nil
	}
	again, err := s.permit(now, item.entry.ID)
	if err != nil {
		return err
	}
	if again.entry.Revision != item.entry.Revision || !again.entry.CreatedAt.Equal(item.entry.CreatedAt) ||
		again.grant.X509 != item.grant.X509 || again.grant.JWT != item.grant.JWT {
		return errChanged
	}
	return nil
}

// authorized returns an entry of the picture. The picture leaves expired ones out when its timer
// says so; the certificate is refused at the very second.
func (s *svidService) authorized(picture *view.AgentPicture, id string) (*identity.Entry, bool) {
	e, ok := picture.Entry(id)
	// One that has less than a second left could have nothing signed that lives so short.
	if !ok || e.Expired(s.api.cfg.Now().Add(time.Second)) {
		return nil, false
	}
	return e, true
}

// NewJWTSVID signs for an entry that the calling agent may hold at this moment, and for the audience that it asks for.
func (s *svidService) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	if err := s.jwtOn(); err != nil {
		return nil, err
	}
	l := ledgerOf(ctx)
	if req.GetEntryId() == "" {
		return nil, refusal(codes.InvalidArgument, "missing entry ID")
	}
	l.note(func(line *audit.Line) { line.EntryID = req.GetEntryId() })
	audience, err := audience(req.GetAudience())
	if err != nil {
		return nil, err
	}
	b, err := s.batch(ctx, 1)
	if err != nil {
		return nil, err
	}
	item, err := s.permit(b.picture, req.GetEntryId())
	if item != nil {
		l.note(func(line *audit.Line) {
			line.SPIFFEID, line.Facts = item.entry.SPIFFEID.String(), item.entry.Selectors.Strings()
			line.Verdicts = item.grant.Names()
		})
	}
	if err == nil {
		err = item.agrees(b.picture, b.terms(0))
	}
	if err != nil {
		return nil, err
	}
	e := item.entry
	var svid *identity.JWTSVID
	err = s.api.inTurn(ctx, b.rank, b.who, func() (err error) {
		svid, err = s.api.CA.SignJWT(ctx, ca.JWTParams{ID: e.SPIFFEID, Audience: audience, TTL: e.JWTSVIDTTL, MaxTTL: item.most(item.grant.JWT, s.api.cfg.Now()), JTI: e.JTI})
		return err
	})
	if err != nil {
		return nil, fail("failed to sign JWT-SVID", err)
	}
	if err := s.still(b.picture, s.api.View.Agent(b.who.ID), item); err != nil {
		return nil, err
	}
	l.note(func(line *audit.Line) { line.ExpiresAt = svid.ExpiresAt })
	s.api.issued.WithLabelValues("jwt").Inc()
	w := jwtWire(svid)
	w.Hint = e.Hint
	return &svidv1.NewJWTSVIDResponse{Svid: w}, nil
}

// MintX509SVID signs what an administrator asks for, without an entry.
func (s *svidService) MintX509SVID(ctx context.Context, req *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	if err := s.api.sign.wait(ctx, caller.FromContext(ctx).Share(), 1); err != nil {
		return nil, err
	}
	csr, err := parseCSR(req.GetCsr())
	if err != nil {
		return nil, err
	}
	ttl, err := mintTTL(req.GetTtl())
	if err != nil {
		return nil, err
	}
	switch {
	case len(csr.URIs) == 0:
		return nil, refusal(codes.InvalidArgument, "CSR URI SAN is required")
	case len(csr.URIs) > 1:
		return nil, refusal(codes.InvalidArgument, "only one URI SAN is expected")
	}
	id, err := spiffeid.FromURI(csr.URIs[0])
	if err == nil {
		err = s.api.checkWorkloadID(id)
	}
	if err == nil {
		err = identity.CheckID(id)
	}
	if err != nil {
		return nil, malformed("CSR URI SAN is invalid", err)
	}
	l := ledgerOf(ctx)
	l.note(func(line *audit.Line) { line.SPIFFEID = id.String() })
	if len(csr.DNSNames) > identity.MaxDNSNames {
		return nil, malformed("CSR DNS SANs are invalid", fmt.Errorf("%d of them, the limit is %d", len(csr.DNSNames), identity.MaxDNSNames))
	}
	for _, name := range csr.DNSNames {
		if err := ca.ValidDNSName(name); err != nil {
			return nil, malformed("CSR DNS name is invalid", err)
		}
	}
	names := csr.DNSNames
	if csr.Subject.CommonName != "" { // which some take for a name, too
		names = append(slices.Clone(names), csr.Subject.CommonName)
	}
	if err := outsideID(ctx, id, names); err != nil {
		return nil, err
	}
	chain, err := s.api.CA.SignMint(ctx, ca.MintParams{
		PublicKey: csr.PublicKey, ID: id, DNSNames: csr.DNSNames, Subject: csr.Subject, TTL: ttl,
	})
	if err != nil {
		return nil, fail("failed to sign X509-SVID", err)
	}
	l.note(func(line *audit.Line) {
		line.Serial, line.ExpiresAt = chain[0].SerialNumber.String(), chain[0].NotAfter
	})
	s.api.issued.WithLabelValues("mint_x509").Inc()
	return &svidv1.MintX509SVIDResponse{Svid: svidWire(chain, &identity.Entry{SPIFFEID: id})}, nil
}

// MintJWTSVID signs what an administrator asks for, without an entry.
func (s *svidService) MintJWTSVID(ctx context.Context, req *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	if err := s.jwtOn(); err != nil {
		return nil, err
	}
	if err := s.api.sign.wait(ctx, caller.FromContext(ctx).Share(), 1); err != nil {
		return nil, err
	}
	id, err := s.api.workloadIDFromWire(req.GetId())
	if err != nil {
		return nil, malformed("invalid SPIFFE ID", err)
	}
	l := ledgerOf(ctx)
	l.note(func(line *audit.Line) { line.SPIFFEID = id.String() })
	audience, err := audience(req.GetAudience())
	if err != nil {
		return nil, err
	}
	ttl, err := mintTTL(req.GetTtl())
	if err != nil {
		return nil, err
	}
	if err := outsideID(ctx, id, nil); err != nil {
		return nil, err
	}
	svid, err := s.api.CA.SignJWT(ctx, ca.JWTParams{ID: id, Audience: audience, TTL: ttl})
	if err != nil {
		return nil, fail("failed to sign JWT-SVID", err)
	}
	l.note(func(line *audit.Line) { line.ExpiresAt = svid.ExpiresAt })
	s.api.issued.WithLabelValues("mint_jwt").Inc()
	return &svidv1.MintJWTSVIDResponse{Svid: jwtWire(svid)}, nil
}

func (s *svidService) jwtOn() error {
	if s.api.cfg.DisableJWT {
		return refusal(codes.Unimplemented, "JWT functionality is disabled")
	}
	return nil
}

func mintTTL(seconds int32) (time.Duration, error) {
	if seconds < 0 {
		return 0, malformed("invalid TTL", errors.New("negative"))
	}
	return time.Duration(seconds) * time.Second, nil
}

// audience drops empty names and checks that one is left: a token without an audience is good for
// everybody (JWT-SVID section 3.2).
func audience(names []string) ([]string, error) {
	if len(names) > maxAudiences {
		return nil, malformed("invalid audience", fmt.Errorf("%d of them, the limit is %d", len(names), maxAudiences))
	}
	var kept []string
	for _, name := range names {
		if len(name) > maxAudience {
			return nil, malformed("invalid audience", fmt.Errorf("%d bytes long, the limit is %d", len(name), maxAudience))
		}
		if name != "" {
			kept = append(kept, name)
		}
	}
	if len(kept) == 0 {
		return nil, refusal(codes.InvalidArgument, "at least one audience is required")
	}
	return kept, nil
}

func jwtWire(svid *identity.JWTSVID) *types.JWTSVID {
	return &types.JWTSVID{
		Token: svid.Token, Id: identity.IDWire(svid.ID),
		ExpiresAt: svid.ExpiresAt.Unix(), IssuedAt: svid.IssuedAt.Unix(),
	}
}
