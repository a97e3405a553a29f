package api

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
)

// events names what a method decides, for the audit log. A method that is not here is called by the
// name of its service and method, which is how those come out that are not served yet.
var events = map[string]string{
	"/spire.api.server.agent.v1.Agent/AttestAgent":                  "agent.attest",
	"/spire.api.server.agent.v1.Agent/RenewAgent":                   "agent.renew",
	"/spire.api.server.agent.v1.Agent/BanAgent":                     "agent.ban",
	"/spire.api.server.agent.v1.Agent/DeleteAgent":                  "agent.evict",
	"/spire.api.server.agent.v1.Agent/CreateJoinToken":              "token.create",
	"/spire.api.server.agent.v1.Agent/PostStatus":                   "agent.status",
	"/spire.api.server.agent.v1.Agent/CountAgents":                  "agent.count",
	"/spire.api.server.agent.v1.Agent/ListAgents":                   "agent.list",
	"/spire.api.server.agent.v1.Agent/GetAgent":                     "agent.get",
	"/spire.api.server.entry.v1.Entry/CountEntries":                 "entry.count",
	"/spire.api.server.entry.v1.Entry/ListEntries":                  "entry.list",
	"/spire.api.server.entry.v1.Entry/GetEntry":                     "entry.get",
	"/spire.api.server.entry.v1.Entry/GetAuthorizedEntries":         "entry.authorized",
	"/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries":        "entry.sync",
	"/assay.feed.v1.Feed/Follow":                                    "feed.follow",
	"/assay.downstream.v1.Downstream/FollowBundle":                  "bundle.follow",
	"/spire.api.server.entry.v1.Entry/BatchCreateEntry":             "entry.create",
	"/spire.api.server.entry.v1.Entry/BatchUpdateEntry":             "entry.update",
	"/spire.api.server.entry.v1.Entry/BatchDeleteEntry":             "entry.delete",
	"/spire.api.server.svid.v1.SVID/BatchNewX509SVID":               "svid.x509.new",
	"/spire.api.server.svid.v1.SVID/NewJWTSVID":                     "svid.jwt.new",
	"/spire.api.server.svid.v1.SVID/BatchNewWITSVID":                "svid.wit.new",
	"/spire.api.server.svid.v1.SVID/MintX509SVID":                   "svid.x509.mint",
	"/spire.api.server.svid.v1.SVID/MintWITSVID":                    "svid.wit.mint",
	"/spire.api.server.svid.v1.SVID/MintJWTSVID":                    "svid.jwt.mint",
	"/spire.api.server.svid.v1.SVID/NewDownstreamX509CA":            "svid.downstream.new",
	"/spire.api.server.bundle.v1.Bundle/PublishJWTAuthority":        "bundle.publish",
	"/spire.api.server.bundle.v1.Bundle/PublishWITAuthority":        "bundle.publish",
	"/spire.api.server.bundle.v1.Bundle/CountBundles":               "bundle.count",
	"/spire.api.server.bundle.v1.Bundle/GetBundle":                  "bundle.get",
	"/spire.api.server.bundle.v1.Bundle/GetFederatedBundle":         "bundle.get",
	"/spire.api.server.bundle.v1.Bundle/ListFederatedBundles":       "bundle.list",
	"/spire.api.server.bundle.v1.Bundle/AppendBundle":               "bundle.append",
	"/spire.api.server.bundle.v1.Bundle/BatchCreateFederatedBundle": "bundle.create",
	"/spire.api.server.bundle.v1.Bundle/BatchUpdateFederatedBundle": "bundle.update",
	"/spire.api.server.bundle.v1.Bundle/BatchSetFederatedBundle":    "bundle.set",
	"/spire.api.server.bundle.v1.Bundle/BatchDeleteFederatedBundle": "bundle.delete",
	"/assay.admin.v1.Admin/Backup":                                  "store.backup",
	"/assay.admin.v1.Admin/TakeSnapshot":                            "store.snapshot",
	"/assay.admin.v1.Admin/RotationStatus":                          "authority.status",

	"/spire.api.server.localauthority.v1.LocalAuthority/GetX509AuthorityState":       "authority.x509.get",
	"/spire.api.server.localauthority.v1.LocalAuthority/PrepareX509Authority":        "authority.x509.prepare",
	"/spire.api.server.localauthority.v1.LocalAuthority/ActivateX509Authority":       "authority.x509.activate",
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintX509Authority":          "authority.x509.taint",
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeX509Authority":         "authority.x509.revoke",
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintX509UpstreamAuthority":  "authority.upstream.taint",
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeX509UpstreamAuthority": "authority.upstream.revoke",
	"/spire.api.server.localauthority.v1.LocalAuthority/GetJWTAuthorityState":        "authority.jwt.get",
	"/spire.api.server.localauthority.v1.LocalAuthority/PrepareJWTAuthority":         "authority.jwt.prepare",
	"/spire.api.server.localauthority.v1.LocalAuthority/ActivateJWTAuthority":        "authority.jwt.activate",
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintJWTAuthority":           "authority.jwt.taint",
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeJWTAuthority":          "authority.jwt.revoke",
	"/spire.api.server.localauthority.v1.LocalAuthority/GetWITAuthorityState":        "authority.wit.get",
	"/spire.api.server.localauthority.v1.LocalAuthority/PrepareWITAuthority":         "authority.wit.prepare",
	"/spire.api.server.localauthority.v1.LocalAuthority/ActivateWITAuthority":        "authority.wit.activate",
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintWITAuthority":           "authority.wit.taint",
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeWITAuthority":          "authority.wit.revoke",

	"/spire.api.server.debug.v1.Debug/GetInfo":         "debug.get",
	"/spire.api.server.logger.v1.Logger/GetLogger":     "log.get",
	"/assay.evidence.v1.Evidence/Push":                 "evidence.push",
	"/spire.api.server.logger.v1.Logger/SetLogLevel":   "log.level",
	"/spire.api.server.logger.v1.Logger/ResetLogLevel": "log.level",

	"/spire.api.server.trustdomain.v1.TrustDomain/ListFederationRelationships":       "federation.list",
	"/spire.api.server.trustdomain.v1.TrustDomain/GetFederationRelationship":         "federation.get",
	"/spire.api.server.trustdomain.v1.TrustDomain/BatchCreateFederationRelationship": "federation.create",
	"/spire.api.server.trustdomain.v1.TrustDomain/BatchUpdateFederationRelationship": "federation.update",
	"/spire.api.server.trustdomain.v1.TrustDomain/BatchDeleteFederationRelationship": "federation.delete",
	"/spire.api.server.trustdomain.v1.TrustDomain/RefreshBundle":                     "federation.refresh",
}

// silent are the methods that write no line when they go well: every agent calls them all day, they
// give out what its certificate entitles it to by itself, and nothing is decided or signed.
var silent = map[string]bool{
	"/spire.api.server.agent.v1.Agent/PostStatus":            true,
	"/spire.api.server.bundle.v1.Bundle/GetBundle":           true,
	"/spire.api.server.bundle.v1.Bundle/GetFederatedBundle":  true,
	"/spire.api.server.entry.v1.Entry/GetAuthorizedEntries":  true,
	"/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries": true,
	"/grpc.health.v1.Health/Check":                           true,
	"/grpc.health.v1.Health/List":                            true,
	"/grpc.health.v1.Health/Watch":                           true,
	"/assay.feed.v1.Feed/Follow":                             true,
	"/assay.downstream.v1.Downstream/FollowBundle":           true,
}

// Ledgers writes the audit lines of calls before their answers leave. No line, no certificate: an
// answer whose lines cannot be written is replaced by Unavailable.
type Ledgers struct {
	audit Audit
	log   logrus.FieldLogger
	now   func() time.Time
	// broken is set while lines cannot be written. Then a call is refused before it does anything,
	// unless a line can be written again, so that at most the calls under way when the log broke
	// changed something that has no line.
	broken atomic.Bool
}

func newLedgers(log Audit, logger logrus.FieldLogger, now func() time.Time) *Ledgers {
	return &Ledgers{audit: log, log: logger, now: now}
}

// errAudit is what callers get while no lines can be written.
var errAudit = status.Error(codes.Unavailable, "the audit log cannot be written")

// ledger collects what the lines of one call say.
type ledger struct {
	owner  *Ledgers
	base   audit.Line
	silent bool

	mu      sync.Mutex   // guards the rest
	lines   []audit.Line // of items
	written bool
}

type ledgerKey struct{}

// ledgerOf returns the ledger of the call; beside gRPC one that goes nowhere.
func ledgerOf(ctx context.Context) *ledger {
	if l, ok := ctx.Value(ledgerKey{}).(*ledger); ok {
		return l
	}
	return &ledger{}
}

// note changes what the call's own line says.
func (l *ledger) note(change func(*audit.Line)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(&l.base)
}

// item adds a line for one item of a batch, whose error, if any, says how it ended. A call with
// items has no line of its own if it goes well.
func (l *ledger) item(line audit.Line, err error) {
	line.Outcome, line.Reason = outcome(err)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
}

// outcome says how something ended, for an audit line.
func outcome(err error) (string, string) {
	if err == nil {
		return audit.Allow, ""
	}
	reason := err.Error()
	switch status.Code(err) {
	case codes.Internal, codes.Unknown, codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded,
		codes.Canceled, codes.Aborted, codes.DataLoss:
		return audit.Error, reason
	default:
		return audit.Deny, reason
	}
}

// write writes the lines of a call that ended with err, once.
func (l *ledger) write(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.written || l.owner == nil || (l.silent && err == nil) || errors.Is(err, errAudit) {
		return nil
	}
	l.written = true
	if err != nil || len(l.lines) == 0 {
		line := l.base
		line.Outcome, line.Reason = outcome(err)
		l.lines = append(l.lines, line)
	}
	for _, line := range l.lines {
		line.Time, line.Event, line.Method = l.owner.now(), l.base.Event, l.base.Method
		line.Caller, line.Peer = l.base.Caller, l.base.Peer
		if line.Agent == "" {
			line.Agent = l.base.Agent
		}
		if line.Rev == 0 {
			line.Rev = l.base.Rev
		}
		if err := l.owner.audit.Write(line); err != nil {
			if !l.owner.broken.Swap(true) {
				l.owner.log.WithError(err).Error("The audit log cannot be written: calls are refused until it can")
			}
			return errAudit
		}
	}
	return nil
}

// open starts the ledger of a call.
func (o *Ledgers) open(ctx context.Context, method string) (*ledger, error) {
	if o.broken.Load() && !silent[method] {
		line := audit.Line{Time: o.now(), Event: "audit.resume", Method: method, Outcome: audit.Allow}
		if err := o.audit.Write(line); err != nil {
			return nil, errAudit
		}
		if o.broken.Swap(false) {
			o.log.Info("The audit log can be written again")
		}
	}
	who := caller.FromContext(ctx)
	event, ok := events[method]
	if !ok {
		event = method[strings.LastIndexByte(method, '.')+1:] // Service/Method
		event = strings.ToLower(strings.Replace(event, "/", ".", 1))
	}
	base := audit.Line{Event: event, Method: method, Caller: who.Name(), Peer: who.Peer()}
	if who.Kind&caller.Agent != 0 {
		base.Agent = who.ID.String()
	}
	return &ledger{owner: o, base: base, silent: silent[method]}, nil
}

// Unary is the interceptor for calls with one request and one response.
func (o *Ledgers) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	l, err := o.open(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	resp, err := handle(context.WithValue(ctx, ledgerKey{}, l), req)
	if failed := l.write(err); failed != nil {
		return nil, failed
	}
	return resp, err
}

// Stream is the interceptor for all other calls. One that gives out a certificate writes its ledger
// itself before it sends.
func (o *Ledgers) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	l, err := o.open(ss.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	err = handle(srv, &ledgerStream{ServerStream: ss, ctx: context.WithValue(ss.Context(), ledgerKey{}, l)})
	if l.silent && (status.Code(err) == codes.Canceled || errors.Is(err, context.Canceled)) {
		return err // the caller hung up
	}
	if failed := l.write(err); failed != nil {
		return failed
	}
	return err
}

type ledgerStream struct {
	grpc.ServerStream
	ctx context.Context // what grpc.ServerStream is about
}

func (s *ledgerStream) Context() context.Context { return s.ctx }

// Err says that the audit log cannot be written, as far as is known without trying.
func (o *Ledgers) Err() error {
	if o.broken.Load() {
		return errors.New("the audit log cannot be written")
	}
	return nil
}
