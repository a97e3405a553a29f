package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/trust"
	"github.com/assay-id/assay/server/wire/evidencev1"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Evidence is who judges images; *verdict.Service is one.
type Evidence interface {
	Callers() *trust.Callers
	Push(ctx context.Context, who verdict.Pusher, d verdict.Document) (*verdict.Pushed, error)
	Summaries(digests []string) []verdict.Summary
	List(status string, running bool, after string, limit int) ([]verdict.Summary, string)
	Show(text string, see func(*identity.Entry) bool) (*verdict.Whole, error)
	Explain(text, policy string, see func(*identity.Entry) bool) (digest string, lines []string, err error)
	Simulate(ctx context.Context, policies []*policy.ScanPolicy, running bool) (int, []verdict.Difference, error)
	PutException(ctx context.Context, e policy.Exception, who string) (policy.Exception, error)
	Exceptions() []policy.Exception
	DeleteException(ctx context.Context, id, who string) error
	Release(ctx context.Context, policy, who string) ([]string, error)
	Accept(ctx context.Context, hash, image, reason, who string) (*verdict.Pushed, error)
	TooLarge(ctx context.Context, who verdict.Pusher, image string) error
	Collect(ctx context.Context, who verdict.Pusher, image string) ([]verdict.Collected, error)
	// Issued writes down certificates that rest on verdicts, before they are given out, and returns for each why it
	// must not be.
	Issued(ctx context.Context, serials ...records.Serial) []error
}

// Limits on pushes.
const (
	// pushTime is how long a push may take, all of it.
	pushTime = 2 * time.Minute
	// maxPushes is how many documents are held in memory at the same time; others wait.
	maxPushes = 8
	// pushPerSecond and pushBurst limit pushes per source address.
	pushPerSecond = 20
	pushBurst     = 200
)

// evidenceService is assay.evidence.v1.
type evidenceService struct {
	evidencev1.UnimplementedEvidenceServer
	api   *API
	slots chan struct{} // one for each push under way
}

var errNoEvidence = refusal(codes.Unimplemented, "this server judges no images: its configuration has no evidence block")

func (s *evidenceService) on() (Evidence, error) {
	if s.api.Evidence == nil {
		return nil, errNoEvidence
	}
	return s.api.Evidence, nil
}

// pusher finds out who pushes, before anything of the document is read.
func (s *evidenceService) pusher(ctx context.Context, judge Evidence) (verdict.Pusher, error) {
	who := caller.FromContext(ctx)
	token := ""
	if values := metadata.ValueFromIncomingContext(ctx, "authorization"); len(values) > 0 {
		scheme, rest, ok := strings.Cut(values[0], " ")
		if len(values) > 1 || !ok || !strings.EqualFold(scheme, "bearer") {
			return verdict.Pusher{}, refusal(codes.Unauthenticated, "the call's authorization must be one \"Bearer <token>\"")
		}
		token = strings.TrimSpace(rest)
	}
	var push *trust.Push
	var err error
	switch {
	case token != "":
		push, err = judge.Callers().Token(ctx, token)
	case who.Kind&(caller.Local|caller.Admin) != 0:
		return verdict.Pusher{Name: who.Name(), Admin: true}, nil
	case !who.ID.IsZero() && s.api.cfg.Now().Before(who.Cert.NotAfter):
		push, err = judge.Callers().SVID(who.ID)
	default:
		err = refusal(codes.Unauthenticated, "show who pushes: an OIDC token in the call's metadata (authorization: Bearer …), or an SVID")
	}
	switch {
	case errors.Is(err, trust.ErrRefused):
		return verdict.Pusher{}, refusal(codes.PermissionDenied, "the caller may not push evidence: "+err.Error())
	case errors.Is(err, trust.ErrUnavailable):
		return verdict.Pusher{}, refusal(codes.Unavailable, "the issuer's keys cannot be had at the moment: "+err.Error())
	case err != nil:
		return verdict.Pusher{}, fail("failed to authenticate", err)
	}
	ledgerOf(ctx).note(func(l *audit.Line) {
		l.Caller = push.Subject + " by " + push.Issuer
		for _, name := range slices.Sorted(maps.Keys(push.Fields)) {
			l.Facts = append(l.Facts, "token:"+name+":"+cut(push.Fields[name]))
		}
	})
	return verdict.Pusher{Name: push.Subject, Push: push}, nil
}

func (s *evidenceService) Push(stream grpc.ClientStreamingServer[evidencev1.PushRequest, evidencev1.PushResponse]) error {
	judge, err := s.on()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(stream.Context(), pushTime)
	defer cancel()
	if err := s.api.push.wait(ctx, caller.FromContext(ctx).Source(), 1); err != nil {
		return err
	}
	who, err := s.pusher(ctx, judge)
	if err != nil {
		return err
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return refusal(codes.ResourceExhausted, "too many documents are being pushed")
	}
	doc, err := receiveDocument(ctx, stream)
	if errors.Is(err, errTooLarge) {
		return fail("the document was not taken", judge.TooLarge(ctx, who, doc.Image))
	}
	if err != nil {
		return err
	}
	l := ledgerOf(ctx)
	l.note(func(line *audit.Line) { line.Verdicts = []string{cut(doc.Image)} })
	pushed, err := judge.Push(ctx, who, *doc)
	if err != nil {
		return fail("the document was not taken", err)
	}
	l.note(func(line *audit.Line) {
		line.Report = pushed.Hash
		line.Facts = append(line.Facts, "kind:"+pushed.Kind, "format:"+pushed.Format)
		for _, source := range pushed.Sources {
			line.Facts = append(line.Facts, "source:"+source)
		}
	})
	resp := s.taken(judge, who, pushed)
	// The line is written before the answer leaves, as with all calls.
	if err := l.write(nil); err != nil {
		return err
	}
	return stream.SendAndClose(resp)
}

// Collect is a push of documents that the server fetches itself, and as dear: it has the same limits.
func (s *evidenceService) Collect(ctx context.Context, req *evidencev1.CollectRequest) (*evidencev1.CollectResponse, error) {
	judge, err := s.on()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, pushTime)
	defer cancel()
	if err := s.api.push.wait(ctx, caller.FromContext(ctx).Source(), 1); err != nil {
		return nil, err
	}
	who, err := s.pusher(ctx, judge)
	if err != nil {
		return nil, err
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return nil, refusal(codes.ResourceExhausted, "too many documents are being pushed")
	}
	l := ledgerOf(ctx)
	l.note(func(line *audit.Line) { line.Verdicts = []string{cut(req.GetImage())} })
	list, err := judge.Collect(ctx, who, req.GetImage())
	if err != nil {
		return nil, fail("nothing was collected", err)
	}
	resp := &evidencev1.CollectResponse{}
	for _, one := range list {
		w := &evidencev1.Collected{Digest: one.Digest, MediaType: one.MediaType}
		if one.Refused != nil {
			w.Refused = one.Refused.Error()
		} else {
			w.Taken = s.taken(judge, who, one.Pushed)
			l.note(func(line *audit.Line) { line.Facts = append(line.Facts, "report:"+one.Pushed.Hash) })
		}
		resp.Documents = append(resp.Documents, w)
	}
	return resp, nil
}

// taken is what is told to whoever brought a document.
func (s *evidenceService) taken(judge Evidence, who verdict.Pusher, pushed *verdict.Pushed) *evidencev1.PushResponse {
	resp := pushedWire(pushed)
	for _, i := range judge.Summaries(pushed.Images) {
		w := imageWire(&i)
		if who.Push != nil {
			w.Agents = nil // who runs what is none of a pipeline's business
		}
		resp.Images = append(resp.Images, w)
	}
	return resp
}

func pushedWire(p *verdict.Pushed) *evidencev1.PushResponse {
	return &evidencev1.PushResponse{
		Format: p.Format, Kind: p.Kind, Hash: p.Hash, Sources: p.Sources, Duplicate: p.Duplicate,
		Findings: clampInt32(p.Findings), Notes: p.Notes,
	}
}

func cut(s string) string { return s[:min(len(s), 500)] }

var errTooLarge = errors.New("document too large")

// receiveDocument reads a document. The deadline of ctx holds although the stream has none.
func receiveDocument(ctx context.Context, stream grpc.ClientStreamingServer[evidencev1.PushRequest, evidencev1.PushResponse]) (*verdict.Document, error) {
	first, err := stream.Recv()
	if err != nil {
		return nil, fail("failed to read the document", err)
	}
	header := first.GetHeader()
	if header == nil {
		return nil, refusal(codes.InvalidArgument, "the first message must be the header")
	}
	doc := &verdict.Document{Image: header.GetImage(), Manifests: header.GetManifests(), Source: header.GetSource()}
	for {
		if err := ctx.Err(); err != nil {
			return nil, refusal(codes.DeadlineExceeded, "the document took too long")
		}
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return doc, nil
		}
		if err != nil {
			return nil, fail("failed to read the document", err)
		}
		if req.GetHeader() != nil {
			return nil, refusal(codes.InvalidArgument, "the header can be there once")
		}
		if len(doc.Content)+len(req.GetChunk()) > trust.MaxDocument {
			return doc, errTooLarge
		}
		doc.Content = append(doc.Content, req.GetChunk()...)
	}
}

const (
	defaultImages = 100
	maxImages     = 1000
	maxName       = 255 // bytes, of a policy or a file
)

// statuses are those that a verdict may have.
var statuses = []policy.Status{policy.Pass, policy.Grace, policy.Fail, policy.Stale, policy.Missing, policy.Error, policy.Exempt}

// tooLong refuses a name that nothing has.
func tooLong(what, name string) error {
	if len(name) > maxName {
		return refusal(codes.InvalidArgument, fmt.Sprintf("%s is %d bytes long, the limit is %d", what, len(name), maxName))
	}
	return nil
}

func (s *evidenceService) List(_ context.Context, req *evidencev1.ListRequest) (*evidencev1.ListResponse, error) {
	judge, err := s.on()
	if err != nil {
		return nil, err
	}
	page, err := pageFromWire(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, err
	}
	if page.size == 0 {
		page.size = defaultImages
	}
	if status := policy.Status(req.GetStatus()); status != "" && !slices.Contains(statuses, status) {
		return nil, refusal(codes.InvalidArgument, fmt.Sprintf("there is no such status; there are %q", statuses))
	}
	list, next := judge.List(req.GetStatus(), req.GetRunning(), page.after, min(page.size, maxImages))
	resp := &evidencev1.ListResponse{NextPageToken: pageToken(next)}
	for n := range list {
		resp.Images = append(resp.Images, imageWire(&list[n]))
	}
	return resp, nil
}

func (s *evidenceService) Show(ctx context.Context, req *evidencev1.ShowRequest) (*evidencev1.ShowResponse, error) {
	judge, err := s.on()
	if err != nil {
		return nil, err
	}
	w, err := judge.Show(req.GetImage(), reached(ctx))
	if err != nil {
		return nil, fail("failed to show the image", err)
	}
	return wholeWire(w), nil
}

func (s *evidenceService) Explain(ctx context.Context, req *evidencev1.ExplainRequest) (*evidencev1.ExplainResponse, error) {
	judge, err := s.on()
	if err != nil {
		return nil, err
	}
	if err := tooLong("policy", req.GetPolicy()); err != nil {
		return nil, err
	}
	digest, lines, err := judge.Explain(req.GetImage(), req.GetPolicy(), reached(ctx))
	if err != nil {
		return nil, fail("failed to explain the image", err)
	}
	return &evidencev1.ExplainResponse{Digest: digest, Lines: lines}, nil
}

func (s *evidenceService) Simulate(ctx context.Context, req *evidencev1.SimulateRequest) (*evidencev1.SimulateResponse, error) {
	judge, err := s.on()
	if err != nil {
		return nil, err
	}
	if err := tooLong("file name", req.GetFile()); err != nil {
		return nil, err
	}
	policies, err := s.api.ScanPolicies(req.GetFile(), []byte(req.GetConfig()))
	if err != nil {
		return nil, refusal(codes.InvalidArgument, err.Error())
	}
	images, list, err := judge.Simulate(ctx, policies, req.GetRunning())
	if err != nil {
		return nil, fail("failed to simulate", err)
	}
	resp := &evidencev1.SimulateResponse{Images: clampInt32(images)}
	for _, d := range list {
		w := &evidencev1.Difference{
			Digest: d.Digest, Policy: d.Policy, Before: string(d.Before), After: string(d.After),
			AllowedBefore: d.AllowedBefore, AllowedAfter: d.AllowedAfter, Reasons: reasonsWire(d.Reasons),
		}
		for _, id := range d.Agents {
			w.Agents = append(w.Agents, id.String())
		}
		resp.Differences = append(resp.Differences, w)
	}
	return resp, nil
}

func (s *evidenceService) PutException(ctx context.Context, req *evidencev1.PutExceptionRequest) (*evidencev1.Exception, error) {
	judge, err := s.on()
	if err != nil {
		return nil, err
	}
	who := caller.FromContext(ctx)
	w := req.GetException()
	if w == nil {
		return nil, refusal(codes.InvalidArgument, "missing exception")
	}
	if who.Kind&caller.Local == 0 {
		w.Approver = who.Name()
	}
	e, err := judge.PutException(ctx, policy.Exception{
		ID: w.GetId(), Policy: w.GetPolicy(), Digest: w.GetDigest(), Package: w.GetPackage(), Vulnerability: w.GetVulnerability(),
		Reason: w.GetReason(), Approver: w.GetApprover(), Expires: unixTime(w.GetExpiresAt()),
	}, who.Name()+" "+who.Peer())
	if err != nil {
		return nil, fail("failed to make the exception", err)
	}
	return exceptionWire(&e), nil
}

func (s *evidenceService) ListExceptions(context.Context, *evidencev1.ListExceptionsRequest) (*evidencev1.ListExceptionsResponse, error) {
	judge, err := s.on()
	if err != nil {
		return nil, err
	}
	resp := &evidencev1.ListExceptionsResponse{}
	for _, e := range judge.Exceptions() {
		resp.Exceptions = append(resp.Exceptions, exceptionWire(&e))
	}
	return resp, nil
}

func (s *evidenceService) DeleteException(ctx context.Context, req *evidencev1.DeleteExceptionRequest) (*evidencev1.DeleteExceptionResponse, error) {
	judge, err := s.on()
	if err != nil {
		return nil, err
	}
	who := caller.FromContext(ctx)
	if err := judge.DeleteException(ctx, req.GetId(), who.Name()+" "+who.Peer()); err != nil {
		return nil, fail("failed to delete the exception", err)
	}
	return &evidencev1.DeleteExceptionResponse{}, nil
}

func (s *evidenceService) Release(ctx context.Context, req *evidencev1.ReleaseRequest) (*evidencev1.ReleaseResponse, error) {
	judge, err := s.on()
	if err != nil {
		return nil, err
	}
	who := caller.FromContext(ctx)
	ledgerOf(ctx).note(func(l *audit.Line) { l.Policy = cut(req.GetPolicy()) })
	digests, err := judge.Release(ctx, req.GetPolicy(), who.Name()+" "+who.Peer())
	if err != nil {
		return nil, fail("failed to release", err)
	}
	return &evidencev1.ReleaseResponse{Digests: digests}, nil
}

func (s *evidenceService) Accept(ctx context.Context, req *evidencev1.AcceptRequest) (*evidencev1.PushResponse, error) {
	judge, err := s.on()
	if err != nil {
		return nil, err
	}
	who := caller.FromContext(ctx)
	ledgerOf(ctx).note(func(l *audit.Line) { l.Report, l.Reason = cut(req.GetReport()), cut(req.GetReason()) })
	pushed, err := judge.Accept(ctx, req.GetReport(), req.GetImage(), req.GetReason(), who.Name()+" "+who.Peer())
	switch {
	case errors.Is(err, verdict.ErrNotHeld):
		return nil, refusal(codes.NotFound, err.Error())
	case errors.Is(err, verdict.ErrReason):
		return nil, refusal(codes.InvalidArgument, err.Error())
	case err != nil:
		return nil, fail("the report was not accepted", err)
	}
	resp := pushedWire(pushed)
	for _, i := range judge.Summaries(pushed.Images) {
		resp.Images = append(resp.Images, imageWire(&i))
	}
	return resp, nil
}
