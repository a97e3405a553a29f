package conf

import (
	"crypto/x509/pkix"
	"errors"
	"io/fs"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
)

// DefaultServerSocket is where the server's administrators find it unless told otherwise.
const DefaultServerSocket = "/run/assay/server/api.sock"

// Server is what a server's file says, with defaults filled in, checked.
type Server struct {
	TrustDomain spiffeid.TrustDomain
	BindAddress string
	BindPort    int
	SocketPath  string
	DataDir     string
	AuditFile   string // empty: audit.log in DataDir; "-": standard error

	SnapshotInterval time.Duration // 0: never
	SnapshotKeep     int

	CATTL       time.Duration
	CAKeyType   string
	CASubject   pkix.Name // zero: the server's default
	JWTKeyType  string    // empty: as CAKeyType
	JWTIssuer   string
	X509SVIDTTL time.Duration
	JWTSVIDTTL  time.Duration
	AgentTTL    time.Duration // 0: as X509SVIDTTL
	DisableJWT  bool
	// PruneExpiredFor is how long after their SVID expired agents are forgotten, 0 never, and PruneOnce whether
	// those are too that cannot attest again.
	PruneExpiredFor time.Duration
	PruneOnce       bool
	// NewAuthorityOnLostKey lets the server begin with a new authority if the key of the old is gone.
	NewAuthorityOnLostKey bool

	AdminIDs     []spiffeid.ID
	RequirePQKEM bool
	Limits       Limits

	KeyManager string // "disk", "memory", or what Keys has the configuration of
	KeysPath   string // of "disk"; empty: keys.json in DataDir
	KeysSeal   string // of "disk": the file with the secret that seals it; empty: it is not sealed
	Keys       Chosen
	Judges     []Judge

	// Upstream signs this server's authorities.
	Upstream Chosen

	Federation Federation

	OIDC        *OIDCDiscovery // nil: none
	JWTProfiles []JWTProfile

	WIT       bool
	WITIssuer string

	Evidence Evidence
	// Named are the blocks that Options.Named decoded, by type in the order of the file.
	Named []Named

	Log     Log
	Health  Health
	Metrics string // host:port; empty: no listener
}

// Limits are the operator's say about one caller hurting the others; 0 is the server's default.
type Limits struct {
	MaxConnections, MaxPerSource int
	// AttestPerSecond and SignPerSecond are rates per source address; negative is no limit.
	AttestPerSecond, SignPerSecond float64
}

// serverFile is the file's shape. Pointers tell 0 from "not given".
type serverFile struct {
	Server        *serverBlock    `hcl:"server,block"`
	NodeAttestors []typeBlock     `hcl:"node_attestor,block"`
	KeyManagers   []typeBlock     `hcl:"key_manager,block"`
	Upstreams     []typeBlock     `hcl:"upstream_authority,block"`
	Roles         []typeBlock     `hcl:"role,block"`
	Scans         []typeBlock     `hcl:"scan_policy,block"`
	Trusts        []typeBlock     `hcl:"trust_policy,block"`
	Sources       []typeBlock     `hcl:"evidence_source,block"`
	Clusters      []typeBlock     `hcl:"kubernetes,block"`
	Evidence      *evidenceBlock  `hcl:"evidence,block"`
	Health        *healthBlock    `hcl:"health_checks,block"`
	Telemetry     *telemetryBlock `hcl:"telemetry,block"`

	OIDC     *oidcBlock        `hcl:"oidc_discovery,block"`
	Profiles []jwtProfileBlock `hcl:"jwt_profile,block"`
}

type serverBlock struct {
	TrustDomain string `hcl:"trust_domain,optional"`
	BindAddress string `hcl:"bind_address,optional"`
	BindPort    *int   `hcl:"bind_port,optional"`
	SocketPath  string `hcl:"socket_path,optional"`
	DataDir     string `hcl:"data_dir,optional"`
	AuditFile   string `hcl:"audit_log_file,optional"`

	SnapshotInterval string `hcl:"snapshot_interval,optional"`
	SnapshotKeep     *int   `hcl:"snapshot_keep,optional"`

	LogLevel  string `hcl:"log_level,optional"`
	LogFormat string `hcl:"log_format,optional"`
	LogFile   string `hcl:"log_file,optional"`
	LogSource bool   `hcl:"log_source_location,optional"`

	CATTL       string        `hcl:"ca_ttl,optional"`
	CAKeyType   string        `hcl:"ca_key_type,optional"`
	CASubject   *subjectBlock `hcl:"ca_subject,block"`
	JWTKeyType  string        `hcl:"jwt_key_type,optional"`
	JWTIssuer   string        `hcl:"jwt_issuer,optional"`
	X509SVIDTTL string        `hcl:"default_x509_svid_ttl,optional"`
	JWTSVIDTTL  string        `hcl:"default_jwt_svid_ttl,optional"`
	AgentTTL    string        `hcl:"agent_ttl,optional"`
	PruneFor    string        `hcl:"prune_attested_nodes_expired_for,optional"`
	PruneOnce   bool          `hcl:"prune_tofu_nodes,optional"`
	DisableJWT  bool          `hcl:"disable_jwt_svids,optional"`
	WIT         bool          `hcl:"wit_svids,optional"`
	WITIssuer   string        `hcl:"wit_issuer,optional"`
	NewOnLost   bool          `hcl:"new_authority_on_lost_key,optional"`

	AdminIDs     []string        `hcl:"admin_ids,optional"`
	RequirePQKEM bool            `hcl:"require_pq_kem,optional"`
	RateLimit    *rateLimitBlock `hcl:"ratelimit,block"`
	Limits       *limitsBlock    `hcl:"limits,block"`

	Federation *federationBlock `hcl:"federation,block"`
}

type subjectBlock struct {
	Country      []string `hcl:"country,optional"`
	Organization []string `hcl:"organization,optional"`
	CommonName   string   `hcl:"common_name,optional"`
}

type rateLimitBlock struct {
	Attestation *bool `hcl:"attestation,optional"`
	Signing     *bool `hcl:"signing,optional"`
}

type limitsBlock struct {
	MaxConnections *int `hcl:"max_connections,optional"`
	MaxPerSource   *int `hcl:"max_connections_per_source,optional"`
	Attestations   *int `hcl:"attestations_per_second,optional"`
	Signatures     *int `hcl:"signatures_per_second,optional"`
}

// diskKeys is key_manager "disk" of the server.
type diskKeys struct {
	KeysPath string `hcl:"keys_path,optional"`
	SealPath string `hcl:"seal_credential_path,optional"`
}

// LoadServer reads a server's file and checks all of it. judges are the node attestors that the
// program has. The error is a Mistakes with everything that is wrong.
func LoadServer(path string, judges []attestor.JudgeKind, options Options) (*Server, error) {
	l, err := open(path, options, fileKind{"-config", `conf/server.hcl; "assay-server migrate" makes one of SPIRE's`})
	if err != nil {
		return nil, err
	}
	var f serverFile
	l.decode(&f)
	s := new(Server)
	if f.Server != nil {
		s = l.server(f.Server)
	} else {
		l.noBlock("server", "The file needs server { trust_domain = …, data_dir = … }.")
	}
	l.judges(s, f.NodeAttestors, judges)
	s.Keys = l.keys(f.KeyManagers)
	s.KeyManager = s.Keys.Kind
	if disk, ok := s.Keys.Config.(*diskKeys); ok {
		s.KeysPath = l.inFile("key_manager.disk.keys_path", disk.KeysPath)
		if s.KeysSeal = absolute(disk.SealPath); s.KeysSeal != "" && l.options.Try && l.options.TrySecret != nil {
			if err := l.options.TrySecret(s.KeysSeal); err != nil && !errors.Is(err, fs.ErrNotExist) {
				l.say("key_manager.disk.seal_credential_path", "Unusable secret", "%s", sentence(err))
			}
		}
	}
	s.Upstream = l.upstream(f.Upstreams)
	s.Evidence = l.evidence(f.Evidence)
	s.Named = slices.Concat(l.named("scan_policy", f.Scans), l.named("trust_policy", f.Trusts), l.named("evidence_source", f.Sources))
	s.Evidence.On = s.Evidence.On || len(s.Named) > 0
	s.Named = append(s.Named, l.named("kubernetes", f.Clusters)...)
	s.Named = append(s.Named, l.named("role", f.Roles)...)
	if l.options.CheckNamed != nil && len(l.wrong) == 0 {
		for _, p := range l.options.CheckNamed(s.Named) {
			for _, n := range s.Named {
				if n.Block == p.Block && n.Name == p.Name {
					l.problem(n, p.KeyProblem)
				}
			}
		}
	}
	s.OIDC = l.oidc(f.OIDC, s.JWTIssuer)
	s.JWTProfiles = l.jwtProfiles(f.Profiles, s.TrustDomain)
	s.Health = l.health(f.Health, serverHealthPort)
	s.Metrics = l.metrics(f.Telemetry, serverMetricsPort)
	if err := l.mistakes(); err != nil {
		return nil, err
	}
	return s, nil
}

// server checks the server block; this is where the defaults are.
func (l *loader) server(b *serverBlock) *Server {
	s := &Server{
		TrustDomain: l.trustDomain("server.trust_domain", b.TrustDomain),
		BindAddress: l.ip("server.bind_address", b.BindAddress, "0.0.0.0"),
		BindPort:    l.port("server.bind_port", b.BindPort, 8081, 0),
		SocketPath:  l.socket("server.socket_path", b.SocketPath, DefaultServerSocket),
		DataDir:     l.directory("server.data_dir", b.DataDir, "it names the directory for the server's store and keys"),
		AuditFile:   l.inFile("server.audit_log_file", b.AuditFile),
		Log:         l.log("server", b.LogLevel, b.LogFormat, b.LogFile, b.LogSource),
		CATTL:       l.duration("server.ca_ttl", b.CATTL, 24*time.Hour, time.Minute),
		CAKeyType:   l.oneOf("server.ca_key_type", b.CAKeyType, keyTypes...),
		JWTIssuer:   b.JWTIssuer,
		X509SVIDTTL: l.duration("server.default_x509_svid_ttl", b.X509SVIDTTL, time.Hour, time.Second),
		JWTSVIDTTL:  l.duration("server.default_jwt_svid_ttl", b.JWTSVIDTTL, 5*time.Minute, time.Second),
		AgentTTL:    l.duration("server.agent_ttl", b.AgentTTL, 0, time.Second),

		PruneExpiredFor: l.duration("server.prune_attested_nodes_expired_for", b.PruneFor, 0, time.Second),
		DisableJWT:      b.DisableJWT,
		PruneOnce:       b.PruneOnce,
		WIT:             b.WIT,
		WITIssuer:       b.WITIssuer,
		AdminIDs:        l.ids("server.admin_ids", b.AdminIDs),
		RequirePQKEM:    b.RequirePQKEM,

		NewAuthorityOnLostKey: b.NewOnLost,

		SnapshotInterval: l.duration("server.snapshot_interval", b.SnapshotInterval, time.Hour, 0),
		SnapshotKeep:     l.number("server.snapshot_keep", b.SnapshotKeep, 24, 1, 1000),
	}
	if b.JWTKeyType != "" {
		s.JWTKeyType = l.oneOf("server.jwt_key_type", b.JWTKeyType, keyTypes...)
	}
	if c := b.CASubject; c != nil {
		s.CASubject = pkix.Name{Country: c.Country, Organization: c.Organization, CommonName: c.CommonName}
	}
	if s.X509SVIDTTL > s.CATTL && b.X509SVIDTTL != "" {
		l.say("server.default_x509_svid_ttl", "Invalid duration",
			"%q is longer than the authority's ca_ttl of %s, which would cut it short; lengthen ca_ttl to at least %s.",
			b.X509SVIDTTL, s.CATTL, 6*s.X509SVIDTTL)
	}
	s.Limits = l.limits(b)
	s.Federation = l.federation(b.Federation, s.TrustDomain)
	return s
}

// keyTypes of authorities, the default first.
var keyTypes = []string{"ec-p256", "ec-p384", "rsa-2048", "rsa-4096"}

func (l *loader) limits(b *serverBlock) Limits {
	var out Limits
	if n := b.Limits; n != nil {
		const key, many = "server.limits.", 1 << 24
		out.MaxConnections = l.number(key+"max_connections", n.MaxConnections, 0, 1, many)
		out.MaxPerSource = l.number(key+"max_connections_per_source", n.MaxPerSource, 0, 1, many)
		out.AttestPerSecond = float64(l.number(key+"attestations_per_second", n.Attestations, 0, 1, many))
		out.SignPerSecond = float64(l.number(key+"signatures_per_second", n.Signatures, 0, 1, many))
	}
	if r := b.RateLimit; r != nil {
		if r.Attestation != nil && !*r.Attestation {
			out.AttestPerSecond = -1
		}
		if r.Signing != nil && !*r.Signing {
			out.SignPerSecond = -1
		}
	}
	return out
}

func (l *loader) judges(s *Server, blocks []typeBlock, have []attestor.JudgeKind) {
	k := kinds{role: "node attestor"}
	byType := map[string]attestor.JudgeKind{}
	for _, kind := range have {
		k.tried(kind.Type, kind.Config, func(config any) error {
			return tryOut(kind.Open(config, l.needs(s.TrustDomain, "")))
		})
		byType[kind.Type] = kind
	}
	l.decodeTypes(blocks, k, func(t string, config any) {
		s.Judges = append(s.Judges, Judge{Kind: byType[t], Config: config})
	})
	if len(blocks) == 0 {
		l.say("node_attestor", "Missing node_attestor block",
			"Without one no agent can be admitted; add node_attestor \"join_token\" {} for a start.")
	}
}
