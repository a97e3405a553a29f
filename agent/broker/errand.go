package broker

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/peer"
)

// Events in audit lines.
const (
	eventConnect     = "broker_connect"
	eventX509        = "broker_x509_svid"
	eventX509Bundles = "broker_x509_bundles"
	eventJWT         = "broker_jwt_svid"
	eventJWTBundles  = "broker_jwt_bundles"
)

// Errors of an errand, with what the broker is told.
var (
	errHeader    = status.Error(codes.InvalidArgument, "security header missing from request")
	errReference = status.Error(codes.InvalidArgument, "workload reference must be provided")
	errMalformed = status.Error(codes.InvalidArgument, "workload reference is malformed")
	errPID       = status.Error(codes.InvalidArgument, "workload reference must have a positive process ID")
	errNoProcess = status.Error(codes.NotFound, "there is no such process")
	errExited    = status.Error(codes.NotFound, "process has exited")
	errCaller    = status.Error(codes.Unauthenticated, "unable to determine caller identity")
	errNobody    = status.Error(codes.PermissionDenied, "no identity issued")
	errBroken    = status.Error(codes.Internal, "internal error")
)

// demand refuses calls without the header that no redirected request has (as the Workload API's).
func demand(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if values := md.Get("broker.spiffe.io"); len(values) != 1 || values[0] != "true" {
		return errHeader
	}
	return nil
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	defer s.rescue(info.FullMethod, &err)
	if err := demand(ctx); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (s *Server) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer s.rescue(info.FullMethod, &err)
	if err := demand(stream.Context()); err != nil {
		return err
	}
	return next(srv, stream)
}

// rescue keeps a panic within its call.
func (s *Server) rescue(method string, err *error) {
	if r := recover(); r != nil {
		s.cfg.Log.WithField("method", method).WithField("stack", string(debug.Stack())).Errorf("call panicked: %v", r)
		*err = errBroken
	}
}

// errand is one call of a broker. One goroutine uses it.
type errand struct {
	*Server
	event    string
	audience []string
	id       spiffeid.ID
	chain    []*x509.Certificate
	of       subject         // what it refers to
	pid      int             // the process that is, 0: it is none
	object   string          // the object of Kubernetes that it is
	bundles  <-chan struct{} // closed when the broker's own roots may be others
}

// errand runs a call for the process that the reference means.
func (s *Server) errand(ctx context.Context, event string, ref *brokerapi.WorkloadReference, audience []string, run func(*errand) error) error {
	e := &errand{Server: s, event: event, audience: audience}
	err := e.caller(ctx)
	if err == nil {
		err = e.attend(ctx, ref, run)
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, workloadapi.Stopped()) {
		e.audit(workloadapi.Handed{}, err)
	}
	return s.status(ctx, err)
}

// status turns an error into what a broker is told.
func (s *Server) status(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	method, _ := grpc.Method(ctx)
	return s.cfg.Attest.Status(ctx, method, err)
}

// caller takes who calls from the connection.
func (e *errand) caller(ctx context.Context) error {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return errCaller
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return errCaller
	}
	e.chain = info.State.PeerCertificates
	return e.authorize()
}

// authorize asks whether the caller is a broker, now.
func (e *errand) authorize() error {
	_, e.bundles = e.cfg.Bundles()
	id, err := e.verify(e.chain)
	if err != nil {
		return status.Error(codes.Unauthenticated, "the broker's SVID is no longer accepted")
	}
	e.id = id
	return nil
}

// permitted says whether this broker may refer so, here.
func (e *errand) permitted(ctx context.Context, url string) error {
	grant := e.grants[e.id]
	overTCP, ok := grant.Types[url]
	if !ok {
		overTCP, ok = grant.Types["*"]
	}
	if !ok {
		return status.Errorf(codes.PermissionDenied, "broker %q is not allowed to use reference type %q", e.id, clip(url))
	}
	if p, known := grpcpeer.FromContext(ctx); !overTCP && (!known || !isUnix(p.Addr)) {
		return status.Errorf(codes.PermissionDenied, "reference type %q is not allowed over TCP for broker %q", clip(url), e.id)
	}
	return nil
}

// clip keeps a caller's text from filling a message.
func clip(text string) string {
	if len(text) > 200 {
		return text[:200] + "…"
	}
	return text
}

// attend finds and attests what is meant, and runs the call.
func (e *errand) attend(ctx context.Context, ref *brokerapi.WorkloadReference, run func(*errand) error) error {
	url := ref.GetReference().GetTypeUrl()
	if url == "" {
		return errReference
	}
	if err := e.permitted(ctx, url); err != nil {
		return err
	}
	switch {
	case url == PIDReference:
		return e.process(ctx, ref.GetReference().GetValue(), run)
	case url == ObjectReference && e.cfg.Pods != nil:
		return e.pod(ctx, ref.GetReference().GetValue(), run)
	}
	return status.Errorf(codes.InvalidArgument, "reference type %q is not supported by this agent", clip(url))
}

// process pins and attests the process that is meant.
func (e *errand) process(ctx context.Context, raw []byte, run func(*errand) error) error {
	var by brokerapi.WorkloadPIDReference
	if err := proto.Unmarshal(raw, &by); err != nil {
		return errMalformed
	}
	if by.GetPid() <= 0 {
		return errPID
	}
	e.pid = int(by.GetPid())
	pinned, err := e.tracker.Pin(e.pid)
	if errors.Is(err, peer.ErrDead) {
		return errNoProcess
	}
	if err != nil {
		return fmt.Errorf("pin process: %w", err)
	}
	defer pinned.Release()
	of, err := e.cfg.Attest.Attend(ctx, pinned)
	if err != nil {
		return err
	}
	defer of.Leave()
	e.of = process{of}
	return run(e)
}

func (e *errand) facts() attestor.Set { return e.of.Facts() }

// stale reports whether something has to be asked again before an answer may be sent.
func (e *errand) stale() bool {
	select {
	case <-e.bundles:
	case <-e.of.Replaced():
	default:
		return false
	}
	return true
}

// wait sleeps until there may be something else to say, or an error ends the call.
func (e *errand) wait(ctx context.Context, changed <-chan struct{}) error {
	expiry := time.NewTimer(e.chain[0].NotAfter.Sub(e.cfg.Now()))
	defer expiry.Stop()
	again, stop := e.of.Again()
	defer stop()
	select {
	case <-again:
		return e.of.Renew()
	case <-changed:
	case <-e.bundles:
	case <-expiry.C: // authorize says so
	case <-e.of.Replaced():
		return e.of.Renew()
	case <-e.of.Exited():
		return e.of.Gone()
	case <-e.cfg.Attest.Stopping():
		return workloadapi.Stopped()
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// follow sends what compose returns, and again whenever it says something else, until the broker leaves or is none
// any more, or the process has ended.
func follow[M proto.Message](ctx context.Context, e *errand, send func(M) error, compose func() (M, workloadapi.Handed, <-chan struct{}, error)) error {
	var sent M
	first := true
	for {
		if err := e.authorize(); err != nil {
			return err
		}
		resp, handed, changed, err := compose()
		if err != nil {
			return err
		}
		if !e.stale() && (first || !proto.Equal(resp, sent)) {
			if !e.of.Alive() {
				return e.of.Gone()
			}
			e.audit(handed, nil)
			if err := send(resp); err != nil {
				return err
			}
			if !first {
				e.of.Told()
			}
			sent, first = resp, false
		}
		if err := e.wait(ctx, changed); err != nil {
			return err
		}
	}
}

// audit writes the line of an answer, or of the error in its place.
func (e *errand) audit(h workloadapi.Handed, err error) {
	l := workloadapi.Line{
		Time: e.cfg.Now().UTC(), Event: e.event, ForPID: e.pid, ForObject: e.object, Audience: e.audience, Rev: h.Rev, Outcome: "allow",
		SPIFFEIDs: h.SPIFFEIDs, EntryIDs: h.EntryIDs,
	}
	if !e.id.IsZero() {
		l.By = e.id.String()
	}
	if err != nil {
		l.Outcome, l.Reason = "error", err.Error()
		switch status.Code(e.status(context.Background(), err)) {
		case codes.PermissionDenied, codes.InvalidArgument, codes.NotFound, codes.Unauthenticated:
			l.Outcome = "deny"
		}
	}
	e.answers.WithLabelValues(e.event, l.Outcome).Inc()
	if e.cfg.Audit != nil {
		e.cfg.Audit.Audit(l)
	}
}
