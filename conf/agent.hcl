# The configuration of assay-agent, every key of it. A key that is commented out shows its default,
# or an example where there is none. Lengths of time are written with their unit: "90s", "5m", "1h30m".
#
#   assay-agent validate -config agent.hcl    says everything that is wrong with it
#   assay-agent run -config agent.hcl         starts it
#
# With -expandEnv, $NAME and ${NAME} are replaced by environment variables.

agent {
  # The trust domain of the server and of everything this agent serves.
  trust_domain = "example.org"

  # Where the server is. A name may have several addresses; they are used in turn.
  server_address = "localhost"
  server_port    = 8081

  # Where the agent keeps, sealed, what lets it serve after a restart while the server is away. It is
  # made with mode 0700.
  data_dir = "/var/lib/assay/agent"

  # Where another agent has data_dir: true waits for its end, and says all the while that it is ready, for the
  # node is served. It is for updates that start the next agent before the last one ends, as in deploy/k8s.
  #standby = false

  # How the agent knows the server before it has a bundle of its own: a file, an https URL, for an agent that is a
  # pod a ConfigMap (NAME or NAMESPACE/NAME, with the key bundle.pem, which the agent waits for), or, for
  # trials only, trust in whoever answers first. Exactly one of the four.
  # "assay-server bundle show > /etc/assay/bundle.pem" makes the file; "-format spiffe" there and
  # trust_bundle_format = "spiffe" here is the other format.
  trust_bundle_path = "/etc/assay/bundle.pem"
  #trust_bundle_url    = "https://bundle.example.org/bundle.pem"
  #trust_bundle_config_map = "assay-bundle"
  #insecure_bootstrap  = false
  #trust_bundle_format = "pem"

  # When the server has become unknown to the bundle that it gave this agent, which a rotation that the agent
  # slept through does, and a server that was made anew, the source above is believed again: "auto", after
  # rebootstrap_delay; "always", at once, which is the default with a ConfigMap; or "never", and the agent stays
  # out until its data_dir is emptied.
  #rebootstrap_mode  = "auto"
  #rebootstrap_delay = "10m"

  # The token of node_attestor "join_token". Better than here: in a file that only the agent can
  # read, or as -joinToken on the command line of the first start.
  #join_token      = ""
  #join_token_file = "/etc/assay/join-token"

  # The Workload API's Unix socket, open to every process of the node; what a process gets is decided
  # by what is proved about it. Containers can be handed its directory.
  #socket_path = "/run/assay/agent/public/api.sock"

  # The socket of "assay-agent explain", "debug" and "logger", for the agent's own user only. It must
  # not be in the directory of the one above. "" turns it off.
  #admin_socket_path = "/run/assay/agent/private/admin.sock"

  # SPIFFE IDs of processes that may have the identities of others: SPIRE's delegated identity API, at
  # admin_socket_path, which they must be able to open, so they run as root or as the agent's user. They
  # are believed what they say of others; admin and downstream identities they never get.
  #authorized_delegates = ["spiffe://example.org/node-proxy"]

  # Infrastructure that gets the identities of workloads that it refers to: SPIFFE's Broker API (spiffe.broker).
  # It speaks mutual TLS with its own X509-SVID, at a Unix socket outside of socket_path's directory, over TCP, or
  # both. Which process it means, is its word; what is proved of the process, is this agent's. Admin and
  # downstream identities it never gets. With the k8s attestor it may also mean a pod of this node, by name, UID or both
  # (".KubernetesObjectReference", pods of the group "core"): what is proved of a pod has nothing of its containers.
  # Whoever is not let in is in the audit log.
  #broker {
    #socket_path  = "/run/assay/agent/broker/broker.sock"
    #bind_address = "0.0.0.0:8443"
    # Who may call (also of other trust domains that this agent has the bundle of), by which kinds of
    # reference at the socket, and by which over TCP too: a process ID means something on this node only.
    #allow "spiffe://example.org/mesh" {
      #reference_types          = ["type.googleapis.com/spiffe.broker.WorkloadPIDReference"]
      #reference_types_over_tcp = []
    #}
  #}

  # "debug", "info", "warn" or "error"; "text" or "json"; a file, or standard error without one.
  # SIGHUP opens the file anew, for logrotate, and reads log_level again.
  log_level  = "info"
  #log_format = "text"
  #log_file   = "/var/log/assay/agent.log"

  # Put the place in the code into every line of the log.
  #log_source_location = false

  # Selector types whose values may appear in the log. Values can hold secrets (docker:env), so there
  # are none by default.
  #log_selectors = ["unix"]

  # One line of JSON for each answer of the Workload API: which process, what was proved about it, what
  # it got. There is none by default, for somebody has to rotate it; SIGHUP opens it anew. "-" is
  # standard error.
  #audit_log_file = "/var/log/assay/agent-audit.log"

  # The kind of key that workloads get: "ec-p256", "ec-p384" or "rsa-2048".
  #workload_x509_svid_key_type = "ec-p256"

  # How many SVIDs are held. X509-SVIDs that workloads show at the moment are held beyond it.
  #x509_svid_cache_max_size = 1000
  #jwt_svid_cache_max_size  = 1000

  # How long a workload that matches no entry is held for its entry to arrive before it is refused,
  # so that a container that starts a moment before its entry does not fail. "0s" is not at all.
  #workload_hold = "3s"

  # How long the server's verdicts on images count without word from the server. After that, entries
  # that demand one (scan, sig and prov selectors) match nobody until it is back; all others are served
  # on.
  #verdict_lease = "15m"

  # How often a SPIRE server is asked for changes. An Assay server pushes them.
  #sync_interval = "5s"

  # Let processes without an identity fetch bundles. They may have JWT-SVIDs of the own trust domain validated anyway.
  #allow_unauthenticated_verifiers = false

  # Claims of JWT-SVIDs of other trust domains that are handed to workloads that validate them.
  #allowed_foreign_jwt_claims = []

  # Leave one of the two out of socket_path: SPIFFE's Workload API, or Envoy's below.
  #disable_workload_api = false
  #disable_sds_api      = false

  # Envoy's secret discovery service (SDS v3, state of the world and delta) on socket_path, for Envoy and
  # Istio. Istio looks for its socket at /var/run/secrets/workload-spiffe-uds/socket: write a socket_path
  # that ends in "/socket" and mount its directory there; the names below are Istio's already.
  #sds {
    # What is asked for to get the default identity, the own trust domain's bundle, and all bundles.
    #default_svid_name        = "default"
    #default_bundle_name      = "ROOTCA"
    #default_all_bundles_name = "ALL"
    # Bundles as plain trusted_ca in place of Envoy's SPIFFE validator. A node can ask for it for itself,
    # by disable_spiffe_cert_validation in its metadata.
    #disable_spiffe_cert_validation = false
    # Envoy has no word for "withdrawn" and uses what it has until it expires. So its certificate is
    # replaced by one that nobody trusts; true leaves it, as SPIRE does.
    #keep_withdrawn = false
    # Lists of revoked certificates in the bundles, while there is anything on them ("withdraw+revoke" in
    # server.hcl). Given one, Envoy refuses what it has no list for: "auto" leaves them out unless every
    # authority of the trust domain has one, "always" does not, "never" does. See workloadapi/sds/README.md.
    #crl = "auto"
  #}
}

# How the agent proves to the server what node it runs on: exactly one block.
node_attestor "join_token" {}

#node_attestor "x509pop" {
  #private_key_path = "/etc/assay/node.key"
  #certificate_path = "/etc/assay/node.pem"
  # Intermediates that are not in certificate_path.
  #intermediates_path = "/etc/assay/node-ca.pem"
#}

# The SSH host certificate that the machine already has, and the host key.
#node_attestor "sshpop" {
  #host_key_path  = "/etc/ssh/ssh_host_rsa_key"
  #host_cert_path = "/etc/ssh/ssh_host_rsa_key-cert.pub"
#}

# The name that this host has in DNS: the server fetches a nonce from it over HTTP.
#node_attestor "http_challenge" {
  # The name, this machine's by default, and what tells agents behind one name apart.
  #hostname  = "web1.example.org"
  #agentname = "default"
  # Where the agent listens while it attests, any free port by default, and the port that leads there.
  #port            = 80
  #advertised_port = 80
#}

# The token that Kubernetes projects into the agent's pod, in the cluster that the server has this name for.
#node_attestor "k8s_psat" {
  #cluster    = "production"
  #token_path = "/var/run/secrets/tokens/spire-agent"
#}

# The instance identity document of Amazon EC2, and the instance's role.
#node_attestor "aws_iid" {
  # Where the instance metadata service is, if not at its usual address.
  #ec2_metadata_endpoint = "http://169.254.169.254"
  # Show the document alone, which the server believes once.
  #disable_proof = false
#}

# The task of Amazon ECS that the agent is a container of, and the task's role.
#node_attestor "ecs" {
  # Where the task metadata service and the role's credentials are, if not where the environment says.
  #metadata_uri    = "http://169.254.170.2/v4/0123456789abcdef"
  #credentials_uri = "http://169.254.170.2/v2/credentials/0123456789abcdef"
#}

# The virtual machine on VMware vSphere that the agent runs in.
#node_attestor "vsphere" {
  # The program of open-vm-tools, and where the kernel shows the machine's UUID.
  #vmtoolsd_path = "/usr/bin/vmtoolsd"
  #dmi_path      = "/sys/class/dmi/id"
  # The server's name for the vCenter that the machine is in, where it knows several.
  #vcenter = "east"
#}

# The machine's TPM 2.0.
#node_attestor "tpm" {
  # The device, or the Unix socket of a software TPM; which endorsement key, "rsa" or "ecc"; and the
  # password of the endorsement hierarchy, if it has one.
  #tpm_path                       = "/dev/tpmrm0"
  #endorsement_key                = "rsa"
  #endorsement_hierarchy_password = ""
#}

# A device identity whose key is in the machine's TPM 2.0.
#node_attestor "tpm_devid" {
  # Its certificate, and the key as the TPM gave it out when it was made.
  #devid_cert_path = "/etc/assay/devid.pem"
  #devid_priv_path = "/etc/assay/devid.priv"
  #devid_pub_path  = "/etc/assay/devid.pub"
  # The device, by default the one TPM in /dev, and passwords where there are any.
  #tpm_device_path                = "/dev/tpmrm0"
  #devid_password                 = ""
  #owner_hierarchy_password       = ""
  #endorsement_hierarchy_password = ""
#}

# Several of these together, each of which the server must believe.
#node_attestor "all" {
  # The server's name for these parts together, and their blocks, with the keys that they have alone.
  #combination = "metal"
  #part "x509pop" {
    #private_key_path = "/etc/assay/node.key"
    #certificate_path = "/etc/assay/node.pem"
  #}
  #part "tpm" {
    #tpm_path = "/dev/tpmrm0"
  #}
#}

# A plugin of SPIRE, a program of its own that is run unmodified; the server has one of the same name. What runs
# is what has the checksum, and it gets no environment but plugin_env: NAME passes the agent's own on,
# NAME=value sets one. See attestor/external/README.md.
#node_attestor "external" {
  #name            = "shared_secret"
  #plugin_cmd      = "/usr/libexec/assay/shared_secret"
  #plugin_args     = ["-v"]
  #plugin_checksum = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
  #plugin_env      = ["HTTPS_PROXY", "HOME=/tmp"]
  # For plugins of the server alone: agents have no identity to give.
  #plugin_identity = false
  # Its configuration, in its own syntax.
  #plugin_data     = "secret = \"…\""
#}

# What the agent can prove about the processes that call it: a block for each way.

# User, group, and the program's path and hash.
workload_attestor "unix" {
  # The selectors unix:path and unix:sha256, for which the agent must be root or the workload's user,
  # and the largest program in bytes that is hashed; 0 is any.
  #discover_workload_path = false
  #workload_size_limit    = 0
}

# Labels, environment and image of the process's container, asked of the Docker Engine.
#workload_attestor "docker" {
  # Where the engine listens. Podman: "/run/podman/podman.sock"; rootless: "/run/user/1000/docker.sock".
  #docker_socket_path = "unix:///var/run/docker.sock"
  # In place of it an address on the loopback interface, and an API version in place of the newest that
  # both know.
  #docker_host    = "tcp://127.0.0.1:2375"
  #docker_version = "1.41"
  # How long one answer of the engine may take.
  #engine_timeout = "2s"
  # Variables often hold secrets: no docker:env selectors; and variables that become claim:env.
  #disable_env_selectors = false
  #claim_env             = ["SERVICE"]
  # Cgroup paths in which one part is <id> and * is any one part, in place of the known layouts.
  #container_id_cgroup_matchers = ["/custom/*/<id>"]
  # Attest containers of Kubernetes pods as well.
  #kubernetes_pods = false
#}

# The systemd unit the process runs in, asked of the system's manager.
#workload_attestor "systemd" {
  # Units in these slices and in those below count; slices that users fill cannot be named.
  #slices = ["system.slice"]
  # In place of the system bus where it usually is.
  #bus_address = "unix:path=/run/dbus/system_bus_socket"
#}

# Pod, container and image of a process in Kubernetes: attestor/k8s/README.md says what the agent's pod needs.
#workload_attestor "k8s" {
  # The container runtime's CRI socket; the first that is there of containerd's, CRI-O's and others' if it is
  # not set. "none" asks the kubelet alone. And how long one answer may take.
  #runtime_socket_path = "/run/containerd/containerd.sock"
  #runtime_timeout     = "2s"
  # The node's name; without it the variable of this name holds it.
  #node_name     = "node-1"
  #node_name_env = "MY_NODE_NAME"
  # The API server, which tells of changes of pods; in a pod it is found. "none" asks the kubelet every five
  # seconds instead.
  #api_server         = "https://kubernetes.default.svc"
  #api_server_ca_path = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
  # Selectors k8s:ns-label.
  #enable_namespace_labels = false
  # The kubelet: at the node's name, or 127.0.0.1 if that is not known. The read-only port is without TLS and
  # excludes the other; a kubelet that is not verified is believed, and gets the agent's token.
  #kubelet_address           = "10.0.0.7"
  #kubelet_secure_port       = 10250
  #kubelet_read_only_port    = 10255
  #kubelet_ca_path           = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
  #skip_kubelet_verification = false
  #disable_kubelet_client    = false
  # What the agent shows to both: the token of its service account, or a client certificate, or nothing.
  #token_path                   = "/var/run/secrets/kubernetes.io/serviceaccount/token"
  #certificate_path             = "/etc/assay/kubelet-client.pem"
  #private_key_path             = "/etc/assay/kubelet-client.key"
  #use_anonymous_authentication = false
  # Selectors of the pod only, not of the container.
  #disable_container_selectors = false
#}

# Containers of tasks of Amazon ECS, confirmed by the host's ECS agent; or, as a sidecar in Fargate, by the task
# metadata service.
#workload_attestor "ecs" {
  # Where the ECS agent listens, and how long one answer may take.
  #introspection_endpoint = "http://127.0.0.1:51678"
  #timeout                = "2s"
  # The agent is a container of the task itself; and where to ask, if not where the environment says.
  #sidecar      = false
  #metadata_uri = "http://169.254.170.2/v4/0123456789abcdef"
#}

# Processes attested by plugins of SPIRE: as node_attestor "external". There may be several, each with a name of
# its own, which is the type of its selectors.
#workload_attestor "external" {
  #name            = "slurm"
  #plugin_cmd      = "/usr/libexec/assay/slurm"
  #plugin_args     = []
  #plugin_checksum = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
  #plugin_env      = []
  #plugin_identity = false
  #plugin_data     = ""
#}

# Where the agent's own key lives: "disk", "tpm", or "memory", with which nothing survives a restart.
key_manager "disk" {
  # The default is data_dir.
  #directory = "/var/lib/assay/agent"
}

# In place of it: the agent's own key is made in the machine's TPM 2.0 and never leaves it, and what is kept on
# disk is sealed for this TPM, so that a copied disk is of no use. Workloads' own keys are in that, not in the TPM.
#key_manager "tpm" {
  # The device, the one in /dev by default, the password of the owner hierarchy if it has one, and where
  # what the TPM sealed is kept: in data_dir by default.
  #tpm_path                 = "/dev/tpmrm0"
  #owner_hierarchy_password = ""
  #directory                = "/var/lib/assay/agent"
  # Seal to what was booted, too: with one of these registers (of the SHA-256 bank) changed the TPM does not open
  # what is kept, and the agent does not start before an operator has said so. Before an update of firmware or boot
  # loader set pcrs = [] and restart the agent; set it again after the update.
  #pcrs                     = [0, 2, 4, 7]
#}

# In place of it: the agent's own key is in a key manager that is a plugin of SPIRE, as that of SPIRE's agent, in
# the places "agent-svid-A" and "agent-svid-B". A plugin signs and keeps nothing else: what is kept in data_dir is
# sealed as with "disk". The keys are those of node_attestor "external".
#key_manager "external" {
  #name            = "our_hsm"
  #plugin_cmd      = "/usr/libexec/assay/our_hsm"
  #plugin_args     = []
  #plugin_checksum = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
  #plugin_env      = []
  #plugin_identity = false
  #plugin_data     = ""
#}

# GET /live and /ready, for probes. A liveness probe belongs to /live: an agent whose server is away or that was banned is
# alive, and restarting it would help nobody. "assay-agent healthcheck" asks the socket: it is content once there has been
# something to serve, and from then on. Nobody is asked who they are: keep it on loopback or behind
# something that asks. Without listener_enabled there is no listener.
#health_checks {
  #listener_enabled = true
  #bind_address     = "127.0.0.1"
  #bind_port        = 8082
  #live_path        = "/live"
  #ready_path       = "/ready"
#}

# GET /metrics, for Prometheus. The same holds for it. Without the block there is no listener.
#telemetry {
  #prometheus {
    #host = "127.0.0.1"
    #port = 9989
  #}
#}

# An identity in files, for a program of this node that reads nothing else: a block for each. The block
# stands for the selector files:name:NAME, which nothing else shows, so the identity is that of
#   assay-server entry create … -selector files:name:nginx
# A file is replaced whole or not at all, and the program is told afterwards. The same keys, and a few more,
# are in the file of "assay-agent files", a client of any SPIFFE Workload API: see files.hcl.
#files "nginx" {
  # The directory, and the names of the files in it. A file without a name is not written.
  #cert_dir              = "/etc/nginx/svid"
  #svid_file_name        = "svid.pem"
  #svid_key_file_name    = "svid_key.pem"
  #svid_bundle_file_name = "svid_bundle.pem"
  # Certificates that were withdrawn before they expire: there are lists of them when a policy of the server
  # has on_fail = "withdraw+revoke". They are signed anew every 20 minutes, and the program is told each time.
  #crl_file_name         = "crl.pem"
  # Tokens, each with its audience; and the keys that verify others': as spiffe-helper writes them, and as
  # the plain JWK set of the own trust domain.
  #jwt_svids            = [{ jwt_audience = "https://api.example.org", jwt_extra_audiences = [], jwt_svid_file_name = "api.token" }]
  #jwt_bundle_file_name = "jwt_bundle.json"
  #jwks_file_name       = "jwks.json"

  # Modes, owner and group of the files. Certificate, bundle and list have cert_file_mode.
  #cert_file_mode       = "0644"
  #key_file_mode        = "0600"
  #jwt_svid_file_mode   = "0600"
  #jwt_bundle_file_mode = "0600"
  #file_owner           = "root"
  #file_group           = "root"

  # Which of several identities; without them the oldest entry's.
  #spiffe_id = "spiffe://example.org/web"
  #hint      = ""

  # Intermediates in the bundle instead of behind the certificate; the bundles of federated trust domains
  # too; authorities that have expired left out.
  #add_intermediates_to_bundle = false
  #include_federated_domains   = false
  #omit_expired                = false

  # What becomes of certificate and key when the identity is withdrawn: "replace" them by a pair that
  # nobody trusts, "remove" them (a server that cannot read its key on a reload goes on with the old one),
  # or "keep" them. Tokens are removed unless it is "keep".
  #on_withdrawal = "replace"

  # How the program is told: a signal to the process in a file, or a command, or both. The command finds
  # ASSAY_FILES_EVENT, "renewed" or "withdrawn", in its environment. What fails is tried again.
  #pid_file_name         = "/run/nginx.pid"
  #renew_signal          = "SIGHUP"
  #renew_command         = ["/usr/sbin/nginx", "-s", "reload"]
  #renew_command_timeout = "30s"
#}
