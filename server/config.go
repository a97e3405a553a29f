package server

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/kube"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/verdict"
)

// Config is everything a server needs to know. Start from Defaults and fill in TrustDomain, DataDir
// and Judges; the command does so from the HCL file.
type Config struct {
	// TrustDomain that the server issues identities of. Required; a data directory belongs to one.
	TrustDomain spiffeid.TrustDomain

	// BindAddress and BindPort are where agents and remote administrators connect. Port 0 takes a
	// free one, which Running tells.
	BindAddress string
	BindPort    int
	// SocketPath is the private Unix socket of local administrators. It is made with mode 0770 in a
	// directory that is made with mode 0750 if it does not exist. Whoever can open it may do
	// everything. Empty: no socket.
	SocketPath string
	// DataDir holds the store, and the keys of the disk key manager. It is made with mode 0700 if
	// it does not exist. Required.
	DataDir string

	// Judges are the node attestation types this server accepts.
	Judges []Judge

	// KeyManager is where signing keys live: KeysMemory or KeysDisk, or with Keys the name of something else.
	KeyManager string
	// Keys opens a key manager that is neither. Nil: it is one of the two.
	Keys func(context.Context, Needs) (keys.Manager, error)
	// KeysSeal is the file with the secret that seals KeysPath. Empty: it is not sealed.
	KeysSeal string
	// KeysPath is the file of the disk key manager. Empty: keys.json in DataDir.
	KeysPath string

	// Upstream opens the authority that signs this server's X.509 authorities. Nil: each is its own root.
	Upstream func(Needs) (upstream.Authority, error)

	// CA is what the server signs, and for how long.
	CA CA

	// Roles say who may do some of what administrators may. Nil: nobody.
	Roles caller.Roles
	// AdminIDs are SPIFFE IDs whose holders may administer the server over TCP, beside those that
	// have an entry with admin set. An ID of another trust domain is verified against the federated
	// bundle of that trust domain.
	AdminIDs []spiffeid.ID

	// PruneExpiredFor is how long after its SVID expired an agent is forgotten. 0: never. PruneOnce is for
	// those too that cannot attest again.
	PruneExpiredFor time.Duration
	PruneOnce       bool

	// RequirePQKEM refuses TLS clients that cannot do a post-quantum hybrid key exchange. Without
	// it, such an exchange is preferred.
	RequirePQKEM bool

	// RequireSigned refuses entries whose selectors are all claims that nobody proved: labels, environment
	// variables. Otherwise there is a warning.
	RequireSigned bool

	// Evidence is about image evidence. Nil: no images are judged, and entries that demand a verdict stay
	// closed.
	Evidence *Evidence

	// Federation is about other trust domains.
	Federation Federation
	// OIDC is where verifiers that speak OpenID Connect find the keys of JWT-SVIDs. Nil: nowhere.
	OIDC *OIDCDiscovery

	// Clusters are Kubernetes clusters whose resources say what entries there are. TrustDomain, Log and
	// Metrics of each are set from this configuration.
	Clusters []*kube.Config

	// Limits keep one caller from hurting the others.
	Limits Limits

	// SnapshotInterval is how often a copy of the store is put into the folder "snapshots" in DataDir,
	// if something was committed since the last. 0: never. SnapshotKeep is how many are kept, the
	// newest; 0: 24.
	SnapshotInterval time.Duration
	SnapshotKeep     int

	// AuditPath is the file that one line per decision is appended to. Empty: audit.log in DataDir;
	// "-": standard error.
	AuditPath string

	// Log is where the server says what an operator should know. Required.
	Log logrus.FieldLogger
	// Level lets local administrators read and set the level of the log. Nil: that of Log if it is
	// a *logrus.Logger or *logrus.Entry, else the logger API answers Unimplemented.
	Level Level
	// Metrics is where the parts register what they count. Nil: nowhere.
	Metrics prometheus.Registerer
	// Now is the clock for decisions. Nil: time.Now.
	Now func() time.Time

	// Ready, if not nil, is called once, when all listeners accept callers.
	Ready func(Running)
}

// Judge is one node attestation type with its configuration.
type Judge struct {
	Kind attestor.JudgeKind
	// Config is what Kind.Config returned, decoded. Nil: Kind.Config's defaults.
	Config any
}

// Needs are what the makers of parts get that the command chooses.
type Needs struct {
	TrustDomain spiffeid.TrustDomain
	Log         logrus.FieldLogger
	Now         func() time.Time
	// DataDir is where what belongs to the server may be kept.
	DataDir string
	// Audit takes a line for what a part decided or did by itself.
	Audit func(event, about string, err error)
	// Identity and Measure are what attestor.Needs says.
	Identity func(context.Context) (*attestor.ServerIdentity, error)
	Measure  func(attestor.Measurement) error
}

// CA is what the server signs, and for how long.
type CA struct {
	// TTL is the lifetime of an X.509 and of a JWT authority.
	TTL time.Duration
	// KeyType and JWTKeyType are "ec-p256", "ec-p384", "rsa-2048" or "rsa-4096". An empty
	// JWTKeyType is KeyType.
	KeyType    string
	JWTKeyType string
	// Subject of the X.509 authority. Zero: C=US, O=SPIFFE.
	Subject pkix.Name
	// X509SVIDTTL and JWTSVIDTTL are the lifetimes where an entry does not say.
	X509SVIDTTL time.Duration
	JWTSVIDTTL  time.Duration
	// AgentTTL is the lifetime of an agent's own SVID. 0: X509SVIDTTL.
	AgentTTL time.Duration
	// JWTIssuer is the iss claim of JWT-SVIDs. Empty: none.
	JWTIssuer string
	// WIT lets WIT-SVIDs be signed, with WITIssuer as iss claim, or none if it is empty.
	WIT       bool
	WITIssuer string
	// JWTProfiles give JWT-SVIDs for certain audiences other claims. The first that fits counts.
	JWTProfiles []ca.JWTProfile
	// NewAuthorityOnLostKey is the operator's consent to a new authority where the private key of
	// the active one is gone. Without it, such a server does not start.
	NewAuthorityOnLostKey bool
	// DisableJWT makes every JWT-SVID call answer Unimplemented.
	DisableJWT bool
}

// Limits keep one caller from hurting the others. A field that is 0 takes its value from Defaults.
type Limits struct {
	// MaxMessage is the largest request in bytes.
	MaxMessage int
	// MaxStreams is how many calls one connection may have open.
	MaxStreams uint32
	// MaxCalls is how many calls over TCP may be open at a time, the feed's not counted. One caller
	// may have as many as are free; see budget.
	MaxCalls int
	// MaxConnections is how many TCP connections may be open, MaxPerSource how many of them from
	// one address, MaxHalfOpen how many from one address that have not finished their handshake.
	// A connection over a limit is closed at once. Those without a certificate may have a tenth of
	// the first two.
	MaxConnections int
	MaxPerSource   int
	MaxHalfOpen    int
	// Handshake is the time a TCP caller has for TLS and the HTTP/2 preface.
	Handshake time.Duration
	// ConnectionAge is when a connection is asked to be made anew, so that callers spread over
	// servers and meet today's certificates. Calls that are open may end first, for five times as
	// long; the feed, which does not end, begins anew where it was.
	ConnectionAge time.Duration
	// ConnectionIdle is how long a connection may have no open call.
	ConnectionIdle time.Duration
	// Drain is how long open calls may go on when the server stops.
	Drain time.Duration
	// AttestPerSecond and AttestBurst limit node attestations per source address, SignPerSecond
	// signatures, PostPerSecond status posts. A caller over its rate waits. Local callers are
	// exempt. A negative rate is no limit.
	AttestPerSecond float64
	AttestBurst     int
	SignPerSecond   float64
	PostPerSecond   float64
	// AttestDuration is the time an attestation may take from its first message on.
	AttestDuration time.Duration
}

// The kinds of key manager.
const (
	KeysMemory = "memory"
	KeysDisk   = "disk"
)

// Level reads and sets the level of a log; *logrus.Logger is one.
type Level interface {
	GetLevel() logrus.Level
	SetLevel(logrus.Level)
}

// Running describes a server that accepts callers.
type Running struct {
	// Address is the TCP listener's.
	Address net.Addr
	// SocketPath is the Unix socket's, empty if there is none.
	SocketPath string
	// BundleEndpoint is where others fetch the bundle, nil if there is none.
	BundleEndpoint net.Addr
	// Live says what keeps the server from doing anything useful until it is started again, Ready
	// what keeps it from serving at the moment; nil if nothing. Both are cheap and safe for
	// concurrent use.
	Live, Ready func() error
	// Records are what the server stores, for what runs in one process with it.
	Records *records.Records
	// Reopen closes the audit log and opens its path anew, after it was renamed.
	Reopen func() error
	// CRL is where the list of revoked certificates is served; nil if it is not.
	CRL net.Addr
	// OIDC is where OIDC discovery is served; nil if it is not.
	OIDC net.Addr
	// SetRules puts other rules about evidence in force. Nil if Config.Evidence was.
	SetRules func(ctx context.Context, rules verdict.Rules) error
}

// Defaults returns a Config with everything filled in that has a default.
func Defaults() Config {
	return Config{
		BindAddress: "0.0.0.0",
		BindPort:    8081,
		SocketPath:  "/tmp/spire-server/private/api.sock",
		KeyManager:  KeysDisk,

		SnapshotInterval: time.Hour,
		SnapshotKeep:     24,
		CA: CA{
			TTL:         24 * time.Hour,
			KeyType:     "ec-p256",
			X509SVIDTTL: time.Hour,
			JWTSVIDTTL:  5 * time.Minute,
		},
		Limits: Limits{
			MaxMessage:      4 << 20,
			MaxStreams:      250,
			MaxCalls:        16_384,
			MaxConnections:  50_000,
			MaxPerSource:    10_000,
			MaxHalfOpen:     1000,
			Handshake:       10 * time.Second,
			ConnectionAge:   3 * time.Minute,
			ConnectionIdle:  2 * time.Minute,
			Drain:           10 * time.Second,
			AttestPerSecond: 1,
			AttestBurst:     1,
			SignPerSecond:   500,
			PostPerSecond:   10,
			AttestDuration:  30 * time.Second,
		},
	}
}

// Check says everything that is wrong with the configuration as far as can be told without touching
// the world, or nil.
func (c *Config) Check() error {
	var wrong []error
	say := func(bad bool, format string, args ...any) {
		if bad {
			wrong = append(wrong, fmt.Errorf(format, args...))
		}
	}
	say(c.TrustDomain.IsZero(), "trust domain is missing")
	say(c.DataDir == "", "data directory is missing")
	say(c.Log == nil, "log is missing")
	say(c.BindPort < 0 || c.BindPort > 65535, "bind port %d is out of range", c.BindPort)
	say(c.BindAddress != "" && net.ParseIP(c.BindAddress) == nil, "bind address %q is no IP address", c.BindAddress)
	say(c.Keys == nil && c.KeyManager != KeysMemory && c.KeyManager != KeysDisk,
		"key manager %q is unknown; there are %q and %q", c.KeyManager, KeysMemory, KeysDisk)
	say(len(c.SocketPath) > maxSocketPath, "socket path is %d bytes long, the limit is %d", len(c.SocketPath), maxSocketPath)
	for _, d := range []struct {
		name string
		ttl  time.Duration
	}{{"CA TTL", c.CA.TTL}, {"X509-SVID TTL", c.CA.X509SVIDTTL}, {"JWT-SVID TTL", c.CA.JWTSVIDTTL}} {
		say(d.ttl < time.Second, "%s must be at least one second", d.name)
	}
	say(c.CA.AgentTTL < 0, "agent TTL is negative")
	say(c.PruneExpiredFor < 0, "the time after which expired agents are forgotten is negative")
	say(c.SnapshotInterval < 0 || c.SnapshotKeep < 0, "snapshot interval and number must not be negative")
	for _, id := range c.AdminIDs {
		say(id.IsZero() || id.Path() == "", "admin ID %q has no path", id)
	}
	c.Federation.check(c.TrustDomain.Name(), say)
	c.OIDC.check(say)
	seen := map[string]bool{}
	for _, j := range c.Judges {
		kind := attestor.TypeOf(j.Kind.Type, j.Config)
		say(seen[kind], "node attestor %q is configured twice", kind)
		seen[kind] = true
	}
	return errors.Join(wrong...)
}

// maxSocketPath is what fits a sockaddr_un with its closing zero.
const maxSocketPath = 107

// filled returns c with zero limits and paths replaced by their defaults.
func (c *Config) filled() Config {
	f := *c
	d := Defaults()
	fill(&f.Limits.MaxMessage, d.Limits.MaxMessage)
	fill(&f.Limits.MaxStreams, d.Limits.MaxStreams)
	fill(&f.Limits.MaxCalls, d.Limits.MaxCalls)
	fill(&f.Limits.MaxConnections, d.Limits.MaxConnections)
	fill(&f.Limits.MaxPerSource, d.Limits.MaxPerSource)
	fill(&f.Limits.MaxHalfOpen, d.Limits.MaxHalfOpen)
	fill(&f.Limits.Handshake, d.Limits.Handshake)
	fill(&f.Limits.ConnectionAge, d.Limits.ConnectionAge)
	fill(&f.Limits.ConnectionIdle, d.Limits.ConnectionIdle)
	fill(&f.Limits.Drain, d.Limits.Drain)
	fill(&f.Limits.AttestPerSecond, d.Limits.AttestPerSecond)
	fill(&f.Limits.AttestBurst, d.Limits.AttestBurst)
	fill(&f.Limits.SignPerSecond, d.Limits.SignPerSecond)
	fill(&f.Limits.PostPerSecond, d.Limits.PostPerSecond)
	fill(&f.Limits.AttestDuration, d.Limits.AttestDuration)
	fill(&f.CA.KeyType, d.CA.KeyType)
	fill(&f.CA.JWTKeyType, f.CA.KeyType)
	fill(&f.CA.AgentTTL, f.CA.X509SVIDTTL)
	fill(&f.KeysPath, filepath.Join(f.DataDir, "keys.json"))
	fill(&f.AuditPath, filepath.Join(f.DataDir, "audit.log"))
	if f.Metrics == nil {
		f.Metrics = prometheus.NewRegistry()
	}
	if f.Now == nil {
		f.Now = time.Now
	}
	if f.Level == nil {
		switch log := f.Log.(type) {
		case *logrus.Logger:
			f.Level = log
		case *logrus.Entry:
			f.Level = log.Logger
		}
	}
	return f
}

// fill sets a zero value to its default.
func fill[T comparable](to *T, value T) {
	var zero T
	if *to == zero {
		*to = value
	}
}
