package migrate

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/zclconf/go-cty/cty"
)

var serverSide = side{
	block: "server",
	roles: map[string]string{"NodeAttestor": "node_attestor", "KeyManager": "key_manager", "UpstreamAuthority": "upstream_authority"},
	advice: map[string]string{ //nolint:gosec // names of keys, no credentials
		"server.audit_log_enabled":                                      "The audit log is always on here; audit_log_file says where it goes.",
		"server.profiling_enabled":                                      "There is no profiling port; the metrics tell of memory and CPU.",
		"server.profiling_port":                                         "There is no profiling port.",
		"server.profiling_freq":                                         "There is no profiling port.",
		"server.profiling_names":                                        "There is no profiling port.",
		"server.named_pipe_name":                                        "There is no Windows version.",
		"server.max_attested_node_info_staleness":                       "Whether an agent may call is known from memory and always fresh.",
		"server.prune_attested_nodes_batch_size":                        "There are no batches: all agents that are due are forgotten, one by one.",
		"server.experimental.cache_reload_interval":                     "Changes are pushed; there is nothing to reload.",
		"server.experimental.events_based_cache":                        "Changes are pushed; there is nothing to choose.",
		"server.experimental.full_cache_reload_interval":                "Changes are pushed; there is nothing to reload.",
		"server.experimental.prune_events_older_than":                   "The store trims its own log.",
		"server.experimental.event_timeout":                             "Every change has its number; none can be skipped.",
		"server.experimental.sql_transaction_timeout":                   "There is no SQL.",
		"server.experimental.auth_opa_policy_engine":                    "Who may do what is said with role blocks; see the sample.",
		"server.experimental.feature_flags":                             "There are no feature flags.",
		"server.experimental.agent_spiffe_id_as_selector":               "Make the agent itself the parent of an entry.",
		"plugins.DataStore":                                             "The store is a file in data_dir and needs no configuration; \"assay-server import\" takes entries, bundles and federation relationships over.",
		"plugins.BundlePublisher":                                       "There is no counterpart; \"assay-server bundle show\" prints what is to be published.",
		"plugins.Notifier":                                              "There is no counterpart; \"assay-server bundle show\" prints what is to be published.",
		"plugins.CredentialComposer":                                    "There is no counterpart: what is in an SVID is the entry's to say.",
		"telemetry.Statsd":                                              "There is no counterpart; Prometheus has the numbers.",
		"telemetry.DogStatsd":                                           "There is no counterpart; Prometheus has the numbers.",
		"telemetry.M3":                                                  "There is no counterpart; Prometheus has the numbers.",
		"+plugins.NodeAttestor.aws_iid":                                 "Add account_ids, or verify_organization, which say whose instances are accepted: SPIRE accepts those of every account that it can look up, and here one is accepted that is named.",
		"+plugins.NodeAttestor.http_challenge":                          "A pattern must match the whole name, where SPIRE's match anywhere in it, and there must be one: [\".*\"] is what SPIRE does without.",
		"plugins.NodeAttestor.aws_iid.account_ids_for_local_validation": "Name those accounts in account_ids.",
		"plugins.NodeAttestor.aws_iid.partition":                        "The partition is that of the region.",
		"plugins.NodeAttestor.aws_iid.validate_eks_cluster_membership":  "Put the tag that EKS gives to instances of a cluster into entries: aws_iid:tag:aws:eks:cluster-name:NAME.",
		"plugins.NodeAttestor.aws_iid.skip_block_device":                "An instance's disks are not looked at: with instance_roles it proves itself, whatever its disk was in before.",
		"telemetry.InMem":                                               "There is no counterpart; Prometheus has the numbers.",
	},
	changes: map[string]change{
		"server.log_level": lower,
		"plugins.KeyManager.disk.keys_path": func(v cty.Value) (cty.Value, string) {
			path := besides(v, "assay-keys.json")
			return path, "SPIRE's keys are in a form of SPIRE's; ours go beside them. The server begins with authorities of its own: \"assay-server import\" makes SPIRE's trusted besides."
		},
	},
	turnedOn: map[string]string{"plugins.NodeAttestor.aws_iid": "lookup_instance"},
	missing: []missing{
		{"socket_path", "/tmp/spire-server/private/api.sock", "commands and controllers look for it there"},
		{"bind_address", "0.0.0.0", "agents call from elsewhere"},
		{"data_dir", ".", "SPIRE keeps what it has where it was started; better name a directory"},
	},
}

var agentSide = side{
	block:   "agent",
	roles:   map[string]string{"NodeAttestor": "node_attestor", "KeyManager": "key_manager", "WorkloadAttestor": "workload_attestor"},
	aliases: map[string]string{},
	advice: map[string]string{
		"agent.profiling_enabled":                                        "There is no profiling port; the metrics tell of memory and CPU.",
		"agent.profiling_port":                                           "There is no profiling port.",
		"agent.profiling_freq":                                           "There is no profiling port.",
		"agent.profiling_names":                                          "There is no profiling port.",
		"agent.named_pipe_name":                                          "There is no Windows version.",
		"agent.admin_named_pipe_name":                                    "There is no Windows version.",
		"agent.availability_target":                                      "What is valid is served while the server is away, also after a restart; a longer TTL in the entry makes it last.",
		"agent.trust_bundle_unix_socket":                                 "Use trust_bundle_path or an https trust_bundle_url.",
		"agent.trust_bundle_spiffe_workload_api":                         "Use trust_bundle_path or an https trust_bundle_url.",
		"agent.experimental.use_sync_authorized_entries":                 "The agent chooses the newest protocol that the server speaks.",
		"agent.experimental.jwt_svid_cache_hit_timeout":                  "A JWT-SVID that is held is served at once.",
		"agent.experimental.ratelimit":                                   "Callers share the socket fairly, by user.",
		"agent.experimental.feature_flags":                               "There are no feature flags.",
		"agent.experimental.require_pq_kem":                              "The server demands it for both: require_pq_kem of server.hcl.",
		"plugins.SVIDStore":                                              "There is no counterpart.",
		"telemetry.Statsd":                                               "There is no counterpart; Prometheus has the numbers.",
		"telemetry.DogStatsd":                                            "There is no counterpart; Prometheus has the numbers.",
		"telemetry.M3":                                                   "There is no counterpart; Prometheus has the numbers.",
		"telemetry.InMem":                                                "There is no counterpart; Prometheus has the numbers.",
		"plugins.WorkloadAttestor.docker.use_new_container_locator":      "There is one way to find the container, and it is not guessing.",
		"plugins.WorkloadAttestor.docker.verbose_container_locator_logs": "\"assay-agent explain\" tells how a container was found.",
		"plugins.WorkloadAttestor.k8s.experimental":                      "Brokers may refer to pods of this node without it; other objects and pods elsewhere are not known to the agent, and no access review is made: allow in agent.broker says who may refer.",
		"plugins.WorkloadAttestor.k8s.use_new_container_locator":         "There is one way to find the container, and it is not guessing.",
		"plugins.WorkloadAttestor.k8s.verbose_container_locator_logs":    "\"assay-agent explain\" tells how a container was found.",
		"+plugins.NodeAttestor.join_token":                               "The agent attests anew, and SPIRE's token is spent: make one with \"assay-server token generate\".",
	},
	changes: map[string]change{"agent.log_level": lower},
	missing: []missing{
		{"socket_path", "/tmp/spire-agent/public/api.sock", "workloads look for it there"},
		{"data_dir", ".", "SPIRE keeps what it has where it was started; better name a directory"},
	},
}

// older writes keys as SPIRE has them now where it takes what they were before: a bundle endpoint without a profile
// that has acme shows a certificate of the web, not the server's SVID.
func older(block string, kids []*node) []*node {
	if block != "server.federation.bundle_endpoint" || slices.ContainsFunc(kids, func(n *node) bool { return n.key == "profile" }) {
		return kids
	}
	now := slices.Clone(kids)
	for i, n := range now {
		if n.key == "acme" && n.leaf == nil {
			web := &node{key: "https_web", at: n.at, kids: []*node{n}}
			now[i] = &node{key: "profile", at: n.at, kids: []*node{web}}
		}
	}
	return now
}

// lower: SPIRE takes DEBUG for debug.
func lower(v cty.Value) (cty.Value, string) {
	if v.Type() != cty.String {
		return v, ""
	}
	return cty.StringVal(strings.ToLower(v.AsString())), ""
}

// besides names a file in the directory of another.
func besides(v cty.Value, name string) cty.Value {
	if v.Type() != cty.String {
		return v
	}
	return cty.StringVal(filepath.Join(filepath.Dir(v.AsString()), name))
}
