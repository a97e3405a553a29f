package conf

import (
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
)

// Where workloads and administrators find the agent unless told otherwise. They are in different
// directories because the first is often handed to containers as a whole.
const (
	DefaultAgentSocket = "/run/assay/agent/public/api.sock"
	DefaultAdminSocket = "/run/assay/agent/private/admin.sock"
)

// Agent is what an agent's file says, with defaults filled in, checked.
type Agent struct {
	TrustDomain   spiffeid.TrustDomain
	ServerAddress string
	ServerPort    int

	DataDir         string
	SocketPath      string
	AdminSocketPath string // empty: off
	// Broker is where brokers call; the zero value is nowhere.
	Broker Broker
	// AuthorizedDelegates may have the identities of others; none: nobody.
	AuthorizedDelegates []spiffeid.ID

	// Exactly one of the next four is set.
	TrustBundlePath string
	TrustBundleURL  string
	// TrustBundleConfigMap is "name" or "namespace/name".
	TrustBundleConfigMap string
	InsecureBootstrap    bool
	TrustBundleFormat    string // "pem" or "spiffe"
	// Rebootstrap is how long the server must be unknown to the bundle before the source above is believed
	// again; negative is never.
	Rebootstrap time.Duration

	// JoinToken is empty if the operator gave none, or the text of join_token_file.
	JoinToken string

	WorkloadKeyType               string
	X509CacheSize, JWTCacheSize   int
	SyncInterval                  time.Duration
	WorkloadHold                  time.Duration // negative: none
	VerdictLease                  time.Duration
	Standby                       bool
	AllowUnauthenticatedVerifiers bool
	AllowedForeignJWTClaims       []string
	LogSelectors                  []string
	AuditFile                     string // empty: no audit log; "-": standard error

	// DisableWorkloadAPI and DisableSDSAPI leave one of the two out of the socket.
	DisableWorkloadAPI, DisableSDSAPI bool
	SDS                               SDS

	KeyManager string           // "disk", "memory", "tpm" or "external"
	KeysDir    string           // of "disk" and "tpm"; empty: DataDir
	KeysPlugin *external.Config // of "external"
	// TPMPath, the one in /dev if it is empty, and TPMOwnerPassword are those of "tpm".
	TPMPath, TPMOwnerPassword string
	// TPMPCRs are the registers that "tpm" seals to, in order.
	TPMPCRs   []int
	Node      Node
	Workloads []Workload
	Files     []Files

	Log     Log
	Health  Health
	Metrics string // host:port; empty: no listener
}

// SDS is how Envoy and Istio ask for secrets.
type SDS struct {
	DefaultSVIDName, DefaultBundleName, DefaultAllBundlesName string
	DisableSPIFFEValidation, KeepWithdrawn                    bool
	CRL                                                       string // "auto", "always" or "never"
}

// agentFile is the file's shape. Pointers tell 0 from "not given".
type agentFile struct {
	Agent             *agentBlock     `hcl:"agent,block"`
	NodeAttestors     []typeBlock     `hcl:"node_attestor,block"`
	WorkloadAttestors []typeBlock     `hcl:"workload_attestor,block"`
	KeyManagers       []typeBlock     `hcl:"key_manager,block"`
	Files             []filesBlock    `hcl:"files,block"`
	Health            *healthBlock    `hcl:"health_checks,block"`
	Telemetry         *telemetryBlock `hcl:"telemetry,block"`
}

type agentBlock struct {
	TrustDomain   string `hcl:"trust_domain,optional"`
	ServerAddress string `hcl:"server_address,optional"`
	ServerPort    *int   `hcl:"server_port,optional"`

	DataDir     string  `hcl:"data_dir,optional"`
	SocketPath  string  `hcl:"socket_path,optional"`
	AdminSocket *string `hcl:"admin_socket_path,optional"`

	AuthorizedDelegates []string     `hcl:"authorized_delegates,optional"`
	Broker              *brokerBlock `hcl:"broker,block"`

	LogLevel  string `hcl:"log_level,optional"`
	LogFormat string `hcl:"log_format,optional"`
	LogFile   string `hcl:"log_file,optional"`
	LogSource bool   `hcl:"log_source_location,optional"`

	TrustBundlePath      string `hcl:"trust_bundle_path,optional"`
	TrustBundleURL       string `hcl:"trust_bundle_url,optional"`
	TrustBundleConfigMap string `hcl:"trust_bundle_config_map,optional"`
	TrustBundleFormat    string `hcl:"trust_bundle_format,optional"`
	InsecureBootstrap    bool   `hcl:"insecure_bootstrap,optional"`
	RebootstrapMode      string `hcl:"rebootstrap_mode,optional"`
	RebootstrapDelay     string `hcl:"rebootstrap_delay,optional"`

	JoinToken     string `hcl:"join_token,optional"`
	JoinTokenFile string `hcl:"join_token_file,optional"`

	WorkloadKeyType               string   `hcl:"workload_x509_svid_key_type,optional"`
	X509CacheSize                 *int     `hcl:"x509_svid_cache_max_size,optional"`
	JWTCacheSize                  *int     `hcl:"jwt_svid_cache_max_size,optional"`
	SyncInterval                  string   `hcl:"sync_interval,optional"`
	WorkloadHold                  string   `hcl:"workload_hold,optional"`
	VerdictLease                  string   `hcl:"verdict_lease,optional"`
	Standby                       bool     `hcl:"standby,optional"`
	AllowUnauthenticatedVerifiers bool     `hcl:"allow_unauthenticated_verifiers,optional"`
	AllowedForeignJWTClaims       []string `hcl:"allowed_foreign_jwt_claims,optional"`
	LogSelectors                  []string `hcl:"log_selectors,optional"`
	AuditFile                     string   `hcl:"audit_log_file,optional"`

	DisableWorkloadAPI bool      `hcl:"disable_workload_api,optional"`
	DisableSDSAPI      bool      `hcl:"disable_sds_api,optional"`
	SDS                *sdsBlock `hcl:"sds,block"`
}

// sdsBlock is agent.sds.
type sdsBlock struct {
	DefaultSVIDName         string `hcl:"default_svid_name,optional"`
	DefaultBundleName       string `hcl:"default_bundle_name,optional"`
	DefaultAllBundlesName   string `hcl:"default_all_bundles_name,optional"`
	DisableSPIFFEValidation bool   `hcl:"disable_spiffe_cert_validation,optional"`
	KeepWithdrawn           bool   `hcl:"keep_withdrawn,optional"`
	CRL                     string `hcl:"crl,optional"`
}

// diskDirectory is key_manager "disk" of the agent.
type diskDirectory struct {
	Directory string `hcl:"directory,optional"`
}

// tpmKeys is key_manager "tpm".
type tpmKeys struct {
	Path          string `hcl:"tpm_path,optional"`
	OwnerPassword string `hcl:"owner_hierarchy_password,optional"`
	Directory     string `hcl:"directory,optional"`
	PCRs          []int  `hcl:"pcrs,optional"`
}

// pcrs are the registers to seal to. Two of them any program may set back, so they bind nothing.
func (l *loader) pcrs(named []int) []int {
	for _, n := range named {
		switch {
		case n < 0 || n > 23:
			l.say("key_manager.tpm.pcrs", "Invalid register", "%d is no register of a TPM, which are 0 to 23.", n)
		case n == 16 || n == 23:
			l.say("key_manager.tpm.pcrs", "Invalid register", "Any program can set register %d back; seal to others, as 0, 2, 4 and 7.", n)
		}
	}
	return slices.Compact(slices.Sorted(slices.Values(named)))
}

// LoadAgent reads an agent's file and checks all of it. nodes and workloads are the attestors that
// the program has. The error is a Mistakes with everything that is wrong.
func LoadAgent(path string, nodes []attestor.NodeKind, workloads []attestor.WorkloadKind, options Options) (*Agent, error) {
	l, err := open(path, options, fileKind{"-config", `conf/agent.hcl; "assay-agent migrate" makes one of SPIRE's`})
	if err != nil {
		return nil, err
	}
	var f agentFile
	l.decode(&f)
	a := new(Agent)
	if f.Agent != nil {
		a = l.agent(f.Agent)
		l.bootstrap(a, f.Agent)
		l.joinToken(a, f.Agent)
	} else {
		l.noBlock("agent", "The file needs agent { trust_domain = …, server_address = …, data_dir = … }.")
	}
	l.node(a, f.NodeAttestors, nodes)
	l.workloads(a, f.WorkloadAttestors, workloads)
	keys := l.keyManager(f.KeyManagers, AgentKeyManagers())
	a.KeyManager = keys.Kind
	switch c := keys.Config.(type) {
	case *diskDirectory:
		if c.Directory != "" {
			a.KeysDir = l.directory("key_manager.disk.directory", c.Directory, "")
		}
	case *tpmKeys:
		if c.Directory != "" {
			a.KeysDir = l.directory("key_manager.tpm.directory", c.Directory, "")
		}
		if c.Path != "" && !filepath.IsAbs(c.Path) {
			l.say("key_manager.tpm.tpm_path", "Invalid path", "%q is no absolute path of a device.", c.Path)
		}
		a.TPMPath, a.TPMOwnerPassword, a.TPMPCRs = c.Path, c.OwnerPassword, l.pcrs(c.PCRs)
	case *external.Config:
		a.KeysPlugin = c
	}
	l.noIdentity(a)
	a.Files = l.filesBlocks(f.Files)
	a.Health = l.health(f.Health, agentHealthPort)
	a.Metrics = l.metrics(f.Telemetry, agentMetricsPort)
	if err := l.mistakes(); err != nil {
		return nil, err
	}
	return a, nil
}

// noIdentity refuses what only a server can give to plugins.
func (l *loader) noIdentity(a *Agent) {
	for _, block := range []struct {
		role   string
		config any
	}{{"node_attestor", a.Node.Config}, {"key_manager", a.KeysPlugin}} {
		l.withoutIdentity(block.role, block.config)
	}
	for _, w := range a.Workloads {
		l.withoutIdentity("workload_attestor", w.Config)
	}
}

func (l *loader) withoutIdentity(role string, config any) {
	if c, ok := config.(*external.Config); ok && c != nil && c.Identity {
		l.say(role+"."+external.Type+".plugin_identity", "No identity to give", "Agents have no identity to give to plugins; the key is for plugins of the server.")
	}
}

// agent checks the agent block; this is where the defaults are.
func (l *loader) agent(b *agentBlock) *Agent {
	const many = 1 << 24
	a := &Agent{
		TrustDomain:   l.trustDomain("agent.trust_domain", b.TrustDomain),
		ServerAddress: l.host("agent.server_address", b.ServerAddress),
		ServerPort:    l.port("agent.server_port", b.ServerPort, 8081, 1),
		DataDir:       l.directory("agent.data_dir", b.DataDir, "it names the directory for what the agent keeps over a restart"),
		SocketPath:    l.socket("agent.socket_path", b.SocketPath, DefaultAgentSocket),
		Log:           l.log("agent", b.LogLevel, b.LogFormat, b.LogFile, b.LogSource),

		WorkloadKeyType:               l.oneOf("agent.workload_x509_svid_key_type", b.WorkloadKeyType, "ec-p256", "ec-p384", "rsa-2048"),
		X509CacheSize:                 l.number("agent.x509_svid_cache_max_size", b.X509CacheSize, 1000, 1, many),
		JWTCacheSize:                  l.number("agent.jwt_svid_cache_max_size", b.JWTCacheSize, 1000, 1, many),
		SyncInterval:                  l.duration("agent.sync_interval", b.SyncInterval, 5*time.Second, time.Second),
		WorkloadHold:                  l.duration("agent.workload_hold", b.WorkloadHold, 3*time.Second, 0),
		VerdictLease:                  l.duration("agent.verdict_lease", b.VerdictLease, 15*time.Minute, time.Second),
		Standby:                       b.Standby,
		AllowUnauthenticatedVerifiers: b.AllowUnauthenticatedVerifiers,
		AllowedForeignJWTClaims:       b.AllowedForeignJWTClaims,
		LogSelectors:                  b.LogSelectors,
		AuditFile:                     l.inFile("agent.audit_log_file", b.AuditFile),

		DisableWorkloadAPI: b.DisableWorkloadAPI,
		DisableSDSAPI:      b.DisableSDSAPI,
		SDS:                l.sds(b.SDS),
	}
	if a.WorkloadHold == 0 {
		a.WorkloadHold = -1
	}
	switch {
	case b.AdminSocket == nil:
		a.AdminSocketPath = DefaultAdminSocket
	case *b.AdminSocket != "":
		a.AdminSocketPath = l.socket("agent.admin_socket_path", *b.AdminSocket, "")
	}
	if a.AdminSocketPath != "" && within(a.AdminSocketPath, filepath.Dir(a.SocketPath)) {
		l.say("agent.admin_socket_path", "Invalid socket path",
			"%q is in the directory of the Workload API's socket or below it, which is handed to workloads; choose another directory, or \"\" for no admin socket.", a.AdminSocketPath)
	}
	a.AuthorizedDelegates = l.delegates(b.AuthorizedDelegates, a.AdminSocketPath)
	a.Broker = l.broker(b.Broker, a.SocketPath)
	return a
}

// delegates checks who may have the identities of others.
func (l *loader) delegates(texts []string, socket string) []spiffeid.ID {
	const key = "agent.authorized_delegates"
	var ids []spiffeid.ID
	for _, text := range texts {
		id, err := spiffeid.FromString(text)
		if err != nil {
			l.say(key, "Invalid SPIFFE ID", "%q is no SPIFFE ID: %s.", text, err)
			continue
		}
		ids = append(ids, id)
	}
	if len(texts) > 0 && socket == "" {
		l.say(key, "Missing admin socket", "Delegates are served at admin_socket_path, which is off.")
	}
	return ids
}

// sds checks the names by which clients ask; each must mean one thing.
func (l *loader) sds(b *sdsBlock) SDS {
	if b == nil {
		b = new(sdsBlock)
	}
	s := SDS{
		DefaultSVIDName: b.DefaultSVIDName, DefaultBundleName: b.DefaultBundleName, DefaultAllBundlesName: b.DefaultAllBundlesName,
		DisableSPIFFEValidation: b.DisableSPIFFEValidation, KeepWithdrawn: b.KeepWithdrawn,
		CRL: l.oneOf("agent.sds.crl", b.CRL, "auto", "always", "never"),
	}
	seen := map[string]string{}
	for _, n := range []struct {
		key, without string
		name         *string
	}{
		{"default_svid_name", "default", &s.DefaultSVIDName},
		{"default_bundle_name", "ROOTCA", &s.DefaultBundleName},
		{"default_all_bundles_name", "ALL", &s.DefaultAllBundlesName},
	} {
		if *n.name == "" {
			*n.name = n.without
		}
		if first := seen[*n.name]; first != "" {
			l.say("agent.sds."+n.key, "Conflicting names", "%q is what %s is asked for by; choose another name for one of them.", *n.name, first)
		}
		seen[*n.name] = n.key
	}
	return s
}

// within reports whether the file is in the directory or below it.
func within(file, directory string) bool {
	rel, err := filepath.Rel(directory, file)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

func (l *loader) host(key, text string) string {
	switch {
	case text == "":
		l.required(key, text, "it names the server's host or IP address")
	case strings.Contains(text, "/"), strings.ContainsAny(text, " @"):
		l.say(key, "Invalid address", "%q is no host name or IP address; write only that, without scheme or path.", text)
	case net.ParseIP(text) == nil && strings.Contains(text, ":"):
		l.say(key, "Invalid address", "%q has a port in it; write the port as server_port.", text)
	}
	return text
}

// configMapName is a name as Kubernetes has them, with that of a namespace before it or without.
var configMapName = regexp.MustCompile(`^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/)?[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$`)

// bootstrap checks how the agent comes to trust the server at first.
func (l *loader) bootstrap(a *Agent, b *agentBlock) {
	// A flag takes the place of whichever source the file names.
	if l.flags["agent.trust_bundle_path"] != "" || l.flags["agent.trust_bundle_url"] != "" || l.flags["agent.trust_bundle_config_map"] != "" ||
		l.flags["agent.insecure_bootstrap"] != "" {
		l.unlessFlag("agent.trust_bundle_path", func() { b.TrustBundlePath = "" })
		l.unlessFlag("agent.trust_bundle_url", func() { b.TrustBundleURL = "" })
		l.unlessFlag("agent.trust_bundle_config_map", func() { b.TrustBundleConfigMap = "" })
		l.unlessFlag("agent.insecure_bootstrap", func() { b.InsecureBootstrap = false })
	}
	a.TrustBundleFormat = l.oneOf("agent.trust_bundle_format", b.TrustBundleFormat, "pem", "spiffe")
	a.InsecureBootstrap = b.InsecureBootstrap
	a.Rebootstrap = l.rebootstrap(b)
	if b.TrustBundlePath != "" {
		const key, next = "agent.trust_bundle_path", `"assay-server bundle show" prints what belongs into it`
		before := len(l.wrong)
		a.TrustBundlePath = l.existing(key, b.TrustBundlePath, next)
		if l.options.Try && l.options.TryBundle != nil && len(l.wrong) == before {
			if err := l.options.TryBundle(a.TrustDomain, a.TrustBundlePath, a.TrustBundleFormat); err != nil {
				l.say(key, "Unusable trust bundle", "%s; %s.", oneLine(err.Error()), next)
			}
		}
	}
	if b.TrustBundleURL != "" {
		a.TrustBundleURL = b.TrustBundleURL
		if u, err := url.Parse(b.TrustBundleURL); err != nil || u.Scheme != "https" || u.Host == "" {
			l.say("agent.trust_bundle_url", "Invalid URL", "%q is no https URL; without https anybody on the way could take the server's place.", b.TrustBundleURL)
		}
	}
	if a.TrustBundleConfigMap = b.TrustBundleConfigMap; a.TrustBundleConfigMap != "" && !configMapName.MatchString(a.TrustBundleConfigMap) {
		l.say("agent.trust_bundle_config_map", "Invalid name", "%q is no name of a ConfigMap; write NAME, for one in the agent's own namespace, or NAMESPACE/NAME.", a.TrustBundleConfigMap)
	}
	var set []string
	for _, source := range []struct {
		key string
		on  bool
	}{
		{"trust_bundle_path", b.TrustBundlePath != ""},
		{"trust_bundle_url", b.TrustBundleURL != ""},
		{"trust_bundle_config_map", b.TrustBundleConfigMap != ""},
		{"insecure_bootstrap", b.InsecureBootstrap},
	} {
		if source.on {
			set = append(set, source.key)
		}
	}
	switch len(set) {
	case 0:
		l.say("agent.trust_bundle_path", "Missing bootstrap trust",
			"One of trust_bundle_path, trust_bundle_url, trust_bundle_config_map and insecure_bootstrap is required: it is how the agent knows the server at first.")
	case 1:
	default:
		l.say("agent."+set[1], "Conflicting bootstrap trust", "Only one of trust_bundle_path, trust_bundle_url, trust_bundle_config_map and insecure_bootstrap can be set; there are %s.", quoted(set))
	}
}

// rebootstrap reads when the bootstrap source is believed again. A ConfigMap is believed at once: it is what the
// server wrote last, and who could write another could start agents with it too.
func (l *loader) rebootstrap(b *agentBlock) time.Duration {
	delay := l.duration("agent.rebootstrap_delay", b.RebootstrapDelay, 10*time.Minute, 0)
	if b.RebootstrapMode == "" && b.RebootstrapDelay == "" && b.TrustBundleConfigMap != "" {
		b.RebootstrapMode = "always"
	}
	switch l.oneOf("agent.rebootstrap_mode", b.RebootstrapMode, "auto", "always", "never") {
	case "always":
		return time.Nanosecond // none, as far as anybody can tell; 0 would be the default
	case "never":
		return -1
	}
	return max(delay, time.Nanosecond)
}

// maxToken is far more than a join token has, in bytes.
const maxToken = 4096

func (l *loader) joinToken(a *Agent, b *agentBlock) {
	if l.flags["agent.join_token"] != "" || l.flags["agent.join_token_file"] != "" {
		l.unlessFlag("agent.join_token", func() { b.JoinToken = "" })
		l.unlessFlag("agent.join_token_file", func() { b.JoinTokenFile = "" })
	}
	a.JoinToken = b.JoinToken
	if b.JoinTokenFile == "" {
		return
	}
	const key = "agent.join_token_file"
	if b.JoinToken != "" {
		l.say(key, "Conflicting join tokens", "Only one of join_token and join_token_file can be set.")
		return
	}
	path := absolute(b.JoinTokenFile)
	text, err := os.ReadFile(path)
	switch {
	case err != nil:
		l.say(key, "Unreadable file", "%s: %s; \"assay-server token generate\" prints what belongs into it.", path, reason(err))
	case len(text) > maxToken:
		l.say(key, "Invalid join token", "%s is %d bytes large; a join token is much shorter.", path, len(text))
	case strings.TrimSpace(string(text)) == "":
		l.say(key, "Invalid join token", "%s is empty; \"assay-server token generate\" prints what belongs into it.", path)
	}
	a.JoinToken = strings.TrimSpace(string(text))
}

func (l *loader) node(a *Agent, blocks []typeBlock, have []attestor.NodeKind) {
	l.one(blocks, "node attestor", "an agent proves its node in one way")
	k := kinds{role: "node attestor"}
	byType := map[string]attestor.NodeKind{}
	for _, kind := range have {
		k.tried(kind.Type, kind.Config, func(config any) error {
			return tryOut(kind.Open(config, l.needs(a.TrustDomain, a.JoinToken)))
		})
		byType[kind.Type] = kind
	}
	l.decodeTypes(blocks, k, func(t string, config any) { a.Node = Node{Kind: byType[t], Config: config} })
	if len(blocks) == 0 {
		l.say("node_attestor", "Missing node_attestor block", "The agent needs one to be admitted; add node_attestor \"join_token\" {} for a start.")
	}
}

func (l *loader) workloads(a *Agent, blocks []typeBlock, have []attestor.WorkloadKind) {
	k := kinds{role: "workload attestor"}
	byType := map[string]attestor.WorkloadKind{}
	for _, kind := range have {
		k.tried(kind.Type, kind.Config, func(config any) error {
			return tryOut(kind.Open(config, l.needs(a.TrustDomain, a.JoinToken)))
		})
		byType[kind.Type] = kind
	}
	l.decodeTypes(blocks, k, func(t string, config any) {
		a.Workloads = append(a.Workloads, Workload{Kind: byType[t], Config: config})
	})
	if len(blocks) == 0 {
		l.say("workload_attestor", "Missing workload_attestor block", "Without one no workload can prove anything; add workload_attestor \"unix\" {} for a start.")
	}
}
