// Package api serves SPIRE's public server API (agent.v1, entry.v1, svid.v1, bundle.v1,
// localauthority.v1, debug.v1, logger.v1) with the codes and messages that SPIRE's agents, command
// line and controller manager act on, and admin.v1, which is ours.
//
// A method here reads the request into the house's own nouns, asks the part that does the thing,
// and turns what came of it into the public form. Who may call is package caller's business. What
// was decided is written to the audit log before the answer leaves, by the interceptors in
// ledger.go; a method only notes what the line should say.
//
// Why it is so: gRPC codes exist in this layer only, and there is one function that makes them from
// errors (code, in errors.go), so that an error nobody thought of is Internal and tells a caller
// nothing.
package api

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/server/admit"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/turn"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/server/wire/adminv1"
	"github.com/assay-id/assay/server/wire/downstreamv1"
	"github.com/assay-id/assay/server/wire/evidencev1"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Records is what the API writes; *records.Records is one.
type Records interface {
	CreateEntries(ctx context.Context, entries []*identity.Entry) ([]records.EntryResult, kv.Rev, error)
	UpdateEntry(ctx context.Context, id string, change func(*identity.Entry) error) (*identity.Entry, kv.Rev, error)
	DeleteEntriesIf(ctx context.Context, ids []string, still func(*identity.Entry) bool) ([]error, kv.Rev, error)
	UpdateNode(ctx context.Context, id spiffeid.ID, change func(n *records.Node, exists bool) error) (*records.Node, kv.Rev, error)
	CreateToken(ctx context.Context, token string, expires time.Time) error
	UpdateBundle(ctx context.Context, td spiffeid.TrustDomain, change func(*identity.Bundle) error) (*identity.Bundle, kv.Rev, error)
	DeleteBundle(ctx context.Context, td spiffeid.TrustDomain) (kv.Rev, error)
}

// View is what the API reads; *view.View is one.
type View interface {
	Rev() kv.Rev
	Wait(ctx context.Context, rev kv.Rev) error
	Agent(id spiffeid.ID) *view.AgentPicture
	Node(id spiffeid.ID) (*records.Node, bool)
	NodeCount() int
	ListNodes(keep func(*records.Node) bool, after string, limit int) ([]*records.Node, string)
	Entry(id string) (*identity.Entry, bool)
	EntryCount() int
	CountEntries(filter view.EntryFilter) int
	ListEntries(filter view.EntryFilter, after string, limit int) ([]*identity.Entry, string)
	Bundle(td spiffeid.TrustDomain) (*identity.Bundle, bool)
	Bundles() []*identity.Bundle
}

// CA is what the API has signed; *ca.CA is one.
type CA interface {
	SignWorkload(ctx context.Context, p ca.WorkloadParams) ([]*x509.Certificate, error)
	SignMint(ctx context.Context, p ca.MintParams) ([]*x509.Certificate, error)
	SignJWT(ctx context.Context, p ca.JWTParams) (*identity.JWTSVID, error)
	SignWIT(ctx context.Context, p ca.WITParams) (*identity.WITSVID, error)
	SignDownstream(ctx context.Context, key crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error)
}

// Audit takes one line per decision; *audit.Log is one.
type Audit interface {
	Write(line audit.Line) error
}

// Level reads and sets the level of the server's log; *logrus.Logger is one.
type Level interface {
	GetLevel() logrus.Level
	SetLevel(logrus.Level)
}

// Parts are what the API is made of. All are required but those that say so.
type Parts struct {
	Records Records
	View    View
	CA      CA
	Desk    *admit.Desk
	Audit   Audit
	// Signing says whose turn it is to have something signed. Nil: nobody waits but for his own.
	Signing *turn.Stile
	// Chain returns the server's own SVID, for debug.v1.
	Chain func() []*x509.Certificate
	// Evidence judges images. Nil: evidence.v1 answers Unimplemented. ScanPolicies reads scan_policy
	// blocks for it.
	Evidence     Evidence
	ScanPolicies func(file string, text []byte) ([]*policy.ScanPolicy, error)
	// Level is the log's. Nil: logger.v1 answers Unimplemented.
	Level Level
	// Federations and Refresher are about federation. Nil: trustdomain.v1 answers Unimplemented.
	Federations Federations
	Refresher   Refresher
	// Snapshots copies the store. Nil: admin.v1 answers Unimplemented.
	Snapshots Snapshots
	// Authorities are what localauthority.v1 and downstream servers deal with, and Feed says how far
	// agents have followed. Nil: what needs them answers Unimplemented.
	Authorities Authorities
	Feed        Feed
}

// Config is what an API needs beside its parts.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// RequireSigned refuses entries whose selectors are all claims that nobody proved.
	RequireSigned bool
	// DisableJWT makes every JWT-SVID call answer Unimplemented.
	DisableJWT bool
	// WIT lets WIT-SVIDs be signed.
	WIT bool
	// AttestPerSecond and AttestBurst limit AttestAgent, SignPerSecond what signs (a batch counts
	// as many), PostPerSecond PostStatus, each per source address. 0 or less: no limit.
	AttestPerSecond float64
	AttestBurst     int
	SignPerSecond   float64
	PostPerSecond   float64
	// AttestDuration is the time an attestation may take from its first message on. 0: 30 seconds.
	AttestDuration time.Duration
	Log            logrus.FieldLogger
	// Metrics registers what was issued and how calls went. Nil: nothing is registered.
	Metrics prometheus.Registerer
	// Now is the clock for decisions. Nil: time.Now.
	Now func() time.Time
}

// API serves the services. It is safe for concurrent use.
type API struct {
	Parts
	cfg     Config
	started time.Time
	launch  logrus.Level
	ledgers *Ledgers

	attest, sign, post, push *rates
	evidence                 *evidenceService
	below                    *downstreamService
	issued                   *prometheus.CounterVec
}

// New returns an API. Its Ledgers' interceptors must be installed behind those of a
// caller.Authorizer.
func New(parts Parts, cfg Config) *API {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	a := &API{
		Parts: parts, cfg: cfg, started: cfg.Now(),
		ledgers: newLedgers(parts.Audit, cfg.Log, cfg.Now),
		attest:  newRates(cfg.AttestPerSecond, cfg.AttestBurst),
		sign:    newRates(cfg.SignPerSecond, maxBatch),
		post:    newRates(cfg.PostPerSecond, 10),
		push:    newRates(pushPerSecond, pushBurst),
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_svids_issued_total",
			Help: "SVIDs signed and given out, by kind: x509, jwt, agent, mint_x509, mint_jwt, downstream.",
		}, []string{"kind"}),
	}
	a.below = &downstreamService{api: a, open: map[string]int{}}
	a.evidence = &evidenceService{api: a, slots: make(chan struct{}, maxPushes)}
	if parts.Level != nil {
		a.launch = parts.Level.GetLevel()
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(a.issued)
	}
	return a
}

// Ledgers returns the interceptors that write the audit lines of calls.
func (a *API) Ledgers() *Ledgers { return a.ledgers }

// Register puts the services that agents and remote administrators use on a gRPC server. What of
// SPIRE's surface is not served yet answers Unimplemented, behind the same authorization.
func (a *API) Register(s grpc.ServiceRegistrar) {
	agentv1.RegisterAgentServer(s, &agentService{api: a})
	bundlev1.RegisterBundleServer(s, &bundleService{api: a})
	entryv1.RegisterEntryServer(s, &entryService{api: a})
	svidv1.RegisterSVIDServer(s, &svidService{api: a})
	evidencev1.RegisterEvidenceServer(s, a.evidence)
	if a.Federations != nil && a.Refresher != nil {
		trustdomainv1.RegisterTrustDomainServer(s, &trustDomainService{api: a})
	} else {
		trustdomainv1.RegisterTrustDomainServer(s, trustdomainv1.UnimplementedTrustDomainServer{})
	}
	localauthorityv1.RegisterLocalAuthorityServer(s, &authorityService{api: a})
	downstreamv1.RegisterDownstreamServer(s, a.below)
}

// RegisterRemote puts what callers over the network are served of our own administration on a gRPC server, beside
// the services of Register: how far a rotation has come, for who may rotate. What leads to the store is not there at
// all, whatever the table of callers says.
func (a *API) RegisterRemote(s grpc.ServiceRegistrar) {
	some := adminv1.Admin_ServiceDesc
	some.Methods = nil
	some.Streams = slices.DeleteFunc(slices.Clone(some.Streams), func(d grpc.StreamDesc) bool { return d.StreamName != "RotationStatus" })
	s.RegisterService(&some, &adminService{api: a})
}

// RegisterLocal puts the services that only local administrators use on a gRPC server, beside those
// of Register.
func (a *API) RegisterLocal(s grpc.ServiceRegistrar) {
	debugv1.RegisterDebugServer(s, &debugService{api: a})
	loggerv1.RegisterLoggerServer(s, &loggerService{api: a})
	adminv1.RegisterAdminServer(s, &adminService{api: a})
}

// settleTime is how long an answer is held back for the view to show what was written.
const settleTime = 5 * time.Second

// settle waits until the view shows a commit, so that a caller who reads after writing finds what
// was written. What is written is written: if the view lags for long, the answer goes out without.
func (a *API) settle(ctx context.Context, rev kv.Rev) {
	if rev == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	if err := a.View.Wait(ctx, rev); err != nil && errors.Is(err, context.DeadlineExceeded) {
		a.cfg.Log.WithField("rev", uint64(rev)).Warn("The view is behind the store: an answer was given before it caught up")
	}
}
