package agent

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/broker"
	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/files"
	"github.com/assay-id/assay/workloadapi/sds"
)

// Where an agent looks and listens unless told otherwise. The paths and the port are SPIRE's, so
// that workloads and scripts find what they expect.
const (
	DefaultServerPort   = 8081
	DefaultSocketPath   = "/tmp/spire-agent/public/api.sock"
	DefaultSyncInterval = 5 * time.Second
	DefaultWorkloadHold = 3 * time.Second
	DefaultVerdictLease = 15 * time.Minute
	DefaultX509Cache    = 1000
	DefaultJWTCache     = 1000
)

// Kinds of agent key store for Config.KeyManager.
const (
	KeysMemory = "memory"
	KeysDisk   = "disk"
	KeysTPM    = "tpm"
	// KeysExternal: the agent's own key is in a program of its own.
	KeysExternal = "external"
)

// Kinds of workload key for Config.WorkloadKeyType.
const (
	KeyTypeECP256  = "ec-p256"
	KeyTypeECP384  = "ec-p384"
	KeyTypeRSA2048 = "rsa-2048"
)

// Bundle formats for Config.TrustBundleFormat.
const (
	BundlePEM    = "pem"
	BundleSPIFFE = "spiffe"
)

// Config is what an agent needs to know. TrustDomain, ServerAddress, DataDir, NodeAttestor and one
// source of trust are required; the zero value of everything else has the meaning Defaults gives it.
type Config struct {
	// TrustDomain is the trust domain of the server and of all this agent serves.
	TrustDomain spiffeid.TrustDomain

	// ServerAddress is a host name or IP address; all addresses a name resolves to are used in turn.
	ServerAddress string
	// ServerPort is the server's TCP port; 0 means DefaultServerPort.
	ServerPort int

	// DataDir holds what survives a restart, sealed, with mode 0700. It is made if missing.
	DataDir string
	// Standby has the agent wait, ready, for another that has DataDir to end; without it that is an error.
	Standby bool
	// KeyManager says where the agent's own key and the key that seals DataDir live: KeysDisk (the
	// default) or KeysMemory, with which nothing survives a restart.
	KeyManager string
	// KeyDir is where KeysDisk keeps its keys, KeysTPM what its TPM sealed, and KeysExternal the key that DataDir is
	// sealed under; empty means DataDir.
	KeyDir string
	// TPM is where KeysTPM has its keys.
	TPM *keep.TPM
	// Elsewhere opens what KeysExternal has the agent's own key in, once the node is this agent's. One that is
	// an io.Closer is closed when the agent ends.
	Elsewhere func() (keep.Elsewhere, error)

	// SocketPath is the Workload API's Unix socket, made with mode 0777; empty means
	// DefaultSocketPath.
	SocketPath string
	// AdminSocketPath is the Unix socket for explain, debug and logger, made with mode 0700 for its
	// owner; empty turns it off.
	AdminSocketPath string

	// AuthorizedDelegates are the SPIFFE IDs of processes that may have the identities of others, by the
	// delegated identity API on AdminSocketPath. None: nobody may.
	AuthorizedDelegates []spiffeid.ID

	// Broker is where infrastructure gets the identities of workloads that it refers to. Without a socket and
	// an address: nowhere.
	Broker Broker

	// The bootstrap trust: how the agent knows the server before it has a bundle of its own. Exactly
	// one of the five is set. Once attested, the agent trusts the bundle it was sent.
	//
	// TrustBundle is used as it is.
	TrustBundle []*x509.Certificate
	// TrustBundlePath names a file, read again at each attestation.
	TrustBundlePath string
	// TrustBundleURL is an https URL, asked again at each attestation; the host's certificate is
	// verified with the system's roots.
	TrustBundleURL string
	// TrustBundleConfigMap names a ConfigMap of the cluster that the agent is a pod of, which is waited for.
	TrustBundleConfigMap string
	// InsecureBootstrap trusts whoever answers first with the server's SPIFFE ID. It is for trials.
	InsecureBootstrap bool
	// Rebootstrap is how long the server must have been unknown to the bundle that it gave before the source
	// above is believed again; 0 means 10 minutes, negative is never.
	Rebootstrap time.Duration
	// TrustBundleFormat is BundlePEM (the default) or BundleSPIFFE, for path, URL and ConfigMap.
	TrustBundleFormat string

	// NodeAttestor proves to the server where the agent runs.
	NodeAttestor NodeAttestor
	// WorkloadAttestors prove what calls the Workload API.
	WorkloadAttestors []WorkloadAttestor

	// WorkloadKeyType is the kind of key that workloads get: KeyTypeECP256 (the default),
	// KeyTypeECP384 or KeyTypeRSA2048.
	WorkloadKeyType string
	// X509CacheSize is how many X509-SVIDs are held; those that streams show at the moment are held
	// even beyond it. 0 means DefaultX509Cache.
	X509CacheSize int
	// JWTCacheSize is how many JWT-SVIDs are held at most; 0 means DefaultJWTCache.
	JWTCacheSize int
	// SyncInterval is how often a server that knows no feed (a SPIRE server) is asked; 0 means
	// DefaultSyncInterval.
	SyncInterval time.Duration

	// VerdictLease is how long the server's verdicts on images count without word from the server: then
	// entries that demand one match nobody until it is back. 0 means DefaultVerdictLease.
	VerdictLease time.Duration

	// WorkloadHold is how long a caller that matches nothing yet waits for its entry before it is
	// refused; 0 means DefaultWorkloadHold, negative means not at all.
	WorkloadHold time.Duration
	// AllowUnauthenticatedVerifiers lets callers without an identity fetch bundles and validate
	// JWT-SVIDs.
	AllowUnauthenticatedVerifiers bool
	// AllowedForeignJWTClaims are the claims of JWT-SVIDs of other trust domains that
	// ValidateJWTSVID returns.
	AllowedForeignJWTClaims []string
	// DisableWorkloadAPI and DisableSDSAPI leave one of the two out of the socket.
	DisableWorkloadAPI, DisableSDSAPI bool
	// SDS is how Envoy and Istio ask for secrets on the same socket; its Log is not used.
	SDS sds.Config
	// LogSelectors are the selector types whose values may appear in logs; values can hold secrets.
	LogSelectors []string
	// Files are identities that the agent keeps in files.
	Files []Files
	// Audit gets a line for each answer of the Workload API; nil means that nobody does.
	Audit workloadapi.Auditor

	// Log gets everything the agent has to say; nil means the standard logger of logrus. If it is a
	// *logrus.Logger or an entry of one, the admin socket can change its level.
	Log logrus.FieldLogger
	// Metrics gets the agent's metrics; nil means that nobody reads them.
	Metrics prometheus.Registerer
	// Version is told to the server, for the operator's eyes.
	Version string
	// Now is the clock for decisions; nil means time.Now.
	Now func() time.Time

	// Ready is called once, when the Workload API accepts callers; nil is fine. It must not block. The
	// server may still be away: whether there is something to serve, Health says.
	Ready func()
	// StandingBy is called if the agent has to wait for another one's end; nil is fine. It must not block.
	StandingBy func()
	// Health, if set, says at any time how the agent is.
	Health *Health
}

// Files are files that hold the identity of whoever shows Selectors, which the agent's own configuration
// stands for. Their Log, Now and Changed are not used.
type Files struct {
	Selectors attestor.Set
	files.Config
}

// Broker says where SPIFFE's Broker API is served, and to whom.
type Broker struct {
	// SocketPath is a Unix socket, Address host:port; either may be empty.
	SocketPath, Address string
	Grants              []broker.Grant
}

// NodeAttestor is an opened node role under its type's name. One that is an io.Closer is closed when the agent
// ends, and so is a WorkloadAttestor's.
type NodeAttestor struct {
	Type string
	Node attestor.Node
}

// WorkloadAttestor is an opened workload role under its type's name.
type WorkloadAttestor struct {
	Type     string
	Workload attestor.Workload
}

// Defaults returns a Config with every default filled in that is not a required field.
func Defaults() Config {
	return Config{
		ServerPort:        DefaultServerPort,
		KeyManager:        KeysDisk,
		SocketPath:        DefaultSocketPath,
		TrustBundleFormat: BundlePEM,
		WorkloadKeyType:   KeyTypeECP256,
		X509CacheSize:     DefaultX509Cache,
		JWTCacheSize:      DefaultJWTCache,
		SyncInterval:      DefaultSyncInterval,
		VerdictLease:      DefaultVerdictLease,
		WorkloadHold:      DefaultWorkloadHold,
		Log:               logrus.StandardLogger(),
		Now:               time.Now,
	}
}

// filled returns c with the zero values replaced by Defaults.
func (c Config) filled() Config {
	d := Defaults()
	if c.ServerPort == 0 {
		c.ServerPort = d.ServerPort
	}
	if c.KeyManager == "" {
		c.KeyManager = d.KeyManager
	}
	if c.KeyDir == "" {
		c.KeyDir = c.DataDir
	}
	if c.SocketPath == "" {
		c.SocketPath = d.SocketPath
	}
	if c.TrustBundleFormat == "" {
		c.TrustBundleFormat = d.TrustBundleFormat
	}
	if c.WorkloadKeyType == "" {
		c.WorkloadKeyType = d.WorkloadKeyType
	}
	if c.X509CacheSize == 0 {
		c.X509CacheSize = d.X509CacheSize
	}
	if c.JWTCacheSize == 0 {
		c.JWTCacheSize = d.JWTCacheSize
	}
	if c.SyncInterval == 0 {
		c.SyncInterval = d.SyncInterval
	}
	if c.VerdictLease == 0 {
		c.VerdictLease = d.VerdictLease
	}
	if c.WorkloadHold == 0 {
		c.WorkloadHold = d.WorkloadHold
	}
	if c.Log == nil {
		c.Log = d.Log
	}
	if c.Metrics == nil {
		c.Metrics = prometheus.NewRegistry()
	}
	if c.Now == nil {
		c.Now = d.Now
	}
	if c.Health == nil {
		c.Health = new(Health)
	}
	return c
}

// Check returns every mistake in the configuration at once (errors.Join), or nil. Run calls it.
func (c Config) Check() error {
	c = c.filled()
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.TrustDomain.IsZero() {
		wrong("trust domain is missing")
	}
	if c.ServerAddress == "" {
		wrong("server address is missing")
	}
	if c.ServerPort < 1 || c.ServerPort > 65535 {
		wrong("server port %d is none", c.ServerPort)
	}
	if c.DataDir == "" {
		wrong("data directory is missing")
	}
	switch {
	case c.KeyManager != KeysDisk && c.KeyManager != KeysMemory && c.KeyManager != KeysTPM && c.KeyManager != KeysExternal:
		wrong("key manager %q is unknown; there are %q, %q, %q and %q", c.KeyManager, KeysDisk, KeysMemory, KeysTPM, KeysExternal)
	case c.KeyManager == KeysExternal && c.Elsewhere == nil:
		wrong("key manager %q needs a program", KeysExternal)
	case c.KeyManager == KeysTPM && c.TPM == nil:
		wrong("key manager %q needs a TPM", KeysTPM)
	}
	if c.TrustBundleFormat != BundlePEM && c.TrustBundleFormat != BundleSPIFFE {
		wrong("trust bundle format %q is unknown; there are %q and %q", c.TrustBundleFormat, BundlePEM, BundleSPIFFE)
	}
	switch c.WorkloadKeyType {
	case KeyTypeECP256, KeyTypeECP384, KeyTypeRSA2048:
	default:
		wrong("workload key type %q is unknown; there are %q, %q and %q",
			c.WorkloadKeyType, KeyTypeECP256, KeyTypeECP384, KeyTypeRSA2048)
	}
	sources := 0
	for _, set := range []bool{len(c.TrustBundle) > 0, c.TrustBundlePath != "", c.TrustBundleURL != "", c.TrustBundleConfigMap != "", c.InsecureBootstrap} {
		if set {
			sources++
		}
	}
	if sources != 1 {
		wrong("set exactly one of trust bundle path, trust bundle URL, trust bundle ConfigMap and insecure bootstrap; %d are set", sources)
	}
	if c.NodeAttestor.Node == nil || c.NodeAttestor.Type == "" {
		wrong("node attestor is missing")
	}
	if len(c.AuthorizedDelegates) > 0 && c.AdminSocketPath == "" {
		wrong("authorized delegates need an admin socket")
	}
	if c.X509CacheSize < 0 || c.JWTCacheSize < 0 || c.SyncInterval < 0 {
		wrong("cache sizes and sync interval must not be negative")
	}
	return errors.Join(errs...)
}

// serverTarget is what the connection dials: host and port.
func (c Config) serverTarget() string {
	return net.JoinHostPort(c.ServerAddress, strconv.Itoa(c.ServerPort))
}
