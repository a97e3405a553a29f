package caller

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// View is the picture that callers are looked up in; *view.View is one.
type View interface {
	Node(id spiffeid.ID) (*records.Node, bool)
	FollowNode(id spiffeid.ID) (*records.Node, <-chan struct{})
	EntriesBySPIFFEID(id spiffeid.ID) []*identity.Entry
	Wait(ctx context.Context, rev kv.Rev) error
}

// Nodes is the truth behind the picture, asked before an agent is refused, because the picture of
// this server may be behind what the agent was told by another; *records.Records is one.
type Nodes interface {
	Node(ctx context.Context, id spiffeid.ID) (*records.Node, error)
	UpdateNode(ctx context.Context, id spiffeid.ID, change func(n *records.Node, exists bool) error) (*records.Node, kv.Rev, error)
}

// Audit takes one line per decision; *audit.Log is one.
type Audit interface {
	Write(line audit.Line) error
}

// Config is what an Authorizer needs beside its parts.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// AdminIDs are admins without an entry.
	AdminIDs []spiffeid.ID
	// Roles say who may do some of what administrators may. Nil: nobody.
	Roles Roles
	// UID is the user that the server runs as, who may do everything over the Unix socket, as root may.
	UID uint32
	Log logrus.FieldLogger
	// Now is the clock. Nil: time.Now.
	Now func() time.Time
}

// Authorizer lets calls in or refuses them, and ends the streams of callers that lost their right.
type Authorizer struct {
	view  View
	nodes Nodes
	audit Audit
	cfg   Config
}

// New returns an Authorizer.
func New(view View, nodes Nodes, log Audit, cfg Config) *Authorizer {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Authorizer{view: view, nodes: nodes, audit: log, cfg: cfg}
}

// Unary is the interceptor for calls with one request and one response.
func (a *Authorizer) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	c, err := a.admit(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return handle(context.WithValue(ctx, contextKey{}, c), req)
}

// Stream is the interceptor for all other calls.
func (a *Authorizer) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	c, err := a.admit(ss.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	ctx := context.WithValue(ss.Context(), contextKey{}, c)
	if c.caller.Kind&Agent == 0 {
		return handle(srv, &stream{ServerStream: ss, ctx: ctx})
	}
	ctx, end := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { end(ended{a.watch(ctx, c, info.FullMethod)}) })
	defer watching.Wait()
	defer end(nil)
	err = handle(srv, &stream{ServerStream: ss, ctx: ctx})
	if why := cut(ctx); why != nil {
		return a.refuse(c.caller, info.FullMethod, why, "")
	}
	return err
}

// watch looks at an agent again whenever its node changes, and when its certificate expires, until
// its stream ends or it has lost the right to it. It returns why.
func (a *Authorizer) watch(ctx context.Context, c *call, method string) error {
	expiry := time.NewTimer(c.caller.Cert.NotAfter.Sub(a.cfg.Now()))
	defer expiry.Stop()
	for {
		_, changed := a.view.FollowNode(c.caller.ID)
		if err := c.again(ctx); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-expiry.C:
			return denied(method, types.PermissionDeniedDetails_AGENT_EXPIRED)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ended is the cause of a stream's end when we ended it.
type ended struct{ error }

func (e ended) Unwrap() error { return e.error }

// cut returns the gRPC error that the stream was ended with, if it was ended by us.
func cut(ctx context.Context) error {
	var why ended
	if errors.As(context.Cause(ctx), &why) && !errors.Is(why.error, context.Canceled) && !errors.Is(why.error, context.DeadlineExceeded) {
		return why.error
	}
	return nil
}

// stream carries the caller, and neither takes nor gives once its caller has lost the right to it.
type stream struct {
	grpc.ServerStream
	ctx context.Context // what grpc.ServerStream is about
}

func (s *stream) Context() context.Context { return s.ctx }

func (s *stream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return cut(s.ctx)
}

func (s *stream) SendMsg(m any) error {
	if err := cut(s.ctx); err != nil {
		return err
	}
	return s.ServerStream.SendMsg(m)
}

// admit decides on a call and writes the audit line of a refusal.
func (a *Authorizer) admit(ctx context.Context, method string) (*call, error) {
	who, err := fromPeer(ctx)
	if err != nil {
		if who == nil {
			who = &Caller{}
		}
		a.note(who, method, err.Error())
		return nil, status.Error(codes.Unauthenticated, "client certificate is not an X509-SVID")
	}
	kind, err := a.allow(ctx, who, method, true)
	if err != nil {
		shown, why := a.shown(ctx, who)
		return nil, a.refuse(shown, method, err, why)
	}
	let := *who
	let.Kind = kind
	if kind&Scoped != 0 {
		if let.Roles = a.scoped(ctx, who, method); len(let.Roles) == 0 { // taken away this instant
			return nil, a.refuse(who, method, denied(method, types.PermissionDeniedDetails_UNKNOWN), "")
		}
		if !who.UnixPeer && who.ID.IsZero() {
			let.Subject, _, _ = a.bearer(ctx)
		}
	}
	if kind&(Admin|Downstream) != 0 {
		let.Entries = a.rights(who.ID, kind)
	}
	again := func(ctx context.Context) error {
		_, err := a.allow(ctx, who, method, false)
		return err
	}
	return &call{caller: &let, again: again}, nil
}

// refuse writes the line of a refusal, with what more is known of its reason, and returns the caller's error. A
// refusal stands whether or not its line can be written.
func (a *Authorizer) refuse(who *Caller, method string, err error, more string) error {
	reason := err.Error()
	var d denial
	if errors.As(err, &d) && d.reason != types.PermissionDeniedDetails_UNKNOWN {
		reason = d.reason.String()
	}
	if more != "" {
		reason += "; " + more
	}
	a.note(who, method, reason)
	return err
}

func (a *Authorizer) note(who *Caller, method, reason string) {
	line := audit.Line{
		Time: a.cfg.Now(), Event: "call.refuse", Method: method, Caller: who.Name(), Peer: who.Peer(),
		Outcome: audit.Deny, Reason: reason,
	}
	if err := a.audit.Write(line); err != nil {
		a.cfg.Log.WithError(err).WithField("method", method).Error("cannot write the audit line of a refused call")
	}
}

// allow returns what lets the caller in, or the gRPC error to refuse it with. When it is first asked
// it may promote an agent's new SVID.
func (a *Authorizer) allow(ctx context.Context, who *Caller, method string, first bool) (Kind, error) {
	row, ok := table[method]
	switch {
	case !ok:
		return 0, denied(method, types.PermissionDeniedDetails_UNKNOWN)
	case who.Kind&Local != 0 && a.governed(who):
		if row&Local != 0 && len(a.scoped(ctx, who, method)) > 0 {
			return Scoped, nil
		}
		if row&Anyone != 0 && row&Local == 0 {
			return Anyone, nil
		}
		return 0, denied(method, types.PermissionDeniedDetails_UNKNOWN)
	case row&Local != 0 && who.Kind&Local != 0:
		return Local, nil
	case who.Kind&Local == 0 && !who.ID.IsZero():
		for _, kind := range []Kind{Admin, Downstream} {
			if row&kind != 0 && a.is(who, kind) {
				return kind, nil
			}
		}
		if row&Admin != 0 && row&Anyone == 0 && len(a.scoped(ctx, who, method)) > 0 {
			return Scoped, nil
		}
		if row&Agent != 0 && row&Anyone == 0 && isAgent(who.ID, a.cfg.TrustDomain) {
			return a.agent(ctx, who, method, first)
		}
	}
	if who.Kind&Local == 0 && who.ID.IsZero() && row&Admin != 0 && row&Anyone == 0 && len(a.scoped(ctx, who, method)) > 0 {
		return Scoped, nil
	}
	if row&Anyone != 0 {
		return Anyone | who.Kind&Local, nil
	}
	return 0, denied(method, types.PermissionDeniedDetails_UNKNOWN)
}

// is reports whether the holder of an SVID is an admin, or a downstream server. The certificate may
// have expired while its connection stayed open.
func (a *Authorizer) is(who *Caller, kind Kind) bool {
	if a.cfg.Now().After(who.Cert.NotAfter) {
		return false
	}
	if kind == Admin && slices.Contains(a.cfg.AdminIDs, who.ID) {
		return true
	}
	return len(a.rights(who.ID, kind)) > 0
}

// rights returns the entries that make an ID an admin or downstream. Only the own trust domain's
// IDs have entries.
func (a *Authorizer) rights(id spiffeid.ID, kind Kind) []*identity.Entry {
	if !id.MemberOf(a.cfg.TrustDomain) {
		return nil
	}
	now := a.cfg.Now()
	return slices.DeleteFunc(slices.Clone(a.view.EntriesBySPIFFEID(id)), func(e *identity.Entry) bool {
		right := kind&Admin != 0 && e.Admin || kind&Downstream != 0 && e.Downstream
		return !right || e.Expired(now)
	})
}
