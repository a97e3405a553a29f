# The configuration of assay-server, every key of it. A key that is commented out shows its default,
# or an example where there is none. Lengths of time are written with their unit: "90s", "5m", "1h30m".
#
#   assay-server validate -config server.hcl    says everything that is wrong with it
#   assay-server run -config server.hcl         starts it
#
# With -expandEnv, $NAME and ${NAME} are replaced by environment variables.

server {
  # The trust domain this server issues identities of. The data directory belongs to it for good.
  trust_domain = "example.org"

  # Where the server keeps its store, its keys and its audit log. It is made with mode 0700.
  data_dir = "/var/lib/assay/server"

  # How often a copy of the store goes into the folder "snapshots" in data_dir, if something was
  # committed since the last, and how many of them are kept. A server that finds its store damaged
  # does not start; it names the newest good snapshot and the command that goes back to it. "0s" makes
  # none. The signing keys are not in them.
  #snapshot_interval = "1h"
  #snapshot_keep     = 24

  # Where agents connect.
  bind_address = "0.0.0.0"
  bind_port    = 8081

  # The Unix socket of the command line and of other local administrators, mode 0770. Whoever may
  # open it may do everything.
  #socket_path = "/run/assay/server/api.sock"

  # "debug", "info", "warn" or "error"; "text" or "json"; a file, or standard error without one.
  # SIGHUP opens the file anew, for logrotate, and reads log_level again.
  log_level  = "info"
  #log_format = "text"
  #log_file   = "/var/log/assay/server.log"

  # Put the place in the code into every line of the log.
  #log_source_location = false

  # One line of JSON for each decision: who asked for what, what came of it and why. No line, no
  # certificate. The default is audit.log in data_dir; "-" is standard error.
  #audit_log_file = "/var/log/assay/audit.log"

  # The authorities that sign X509-SVIDs and JWT-SVIDs: how long each lives and which kind of key it
  # has, "ec-p256", "ec-p384", "rsa-2048" or "rsa-4096". The next one is made ahead of time. No
  # certificate outlives its authority, so keep ca_ttl at six times the longest SVID or more.
  #ca_ttl       = "24h"
  #ca_key_type  = "ec-p256"
  #jwt_key_type = "ec-p256"

  # A server whose authority's private key is gone from its key manager does not start, for a new
  # authority is one that nobody trusts yet who has not asked since. This is the consent to it.
  #new_authority_on_lost_key = false

  # The subject of the X.509 authority's certificate.
  #ca_subject {
    #country      = ["US"]
    #organization = ["SPIFFE"]
    #common_name  = "example.org"
  #}

  # How long SVIDs live whose entry does not say, and agents' own SVIDs.
  #default_x509_svid_ttl = "1h"
  #default_jwt_svid_ttl  = "5m"
  #agent_ttl             = "1h"

  # Forget agents whose SVID expired so long ago, as "agent purge" does: never by default, and those that are banned not
  # at all. Agents that cannot attest again are kept, since they are what keeps their evidence from being used again.
  #prune_attested_nodes_expired_for = "720h"
  #prune_tofu_nodes                 = false

  # The iss claim of JWT-SVIDs, none by default; or no JWT-SVIDs at all.
  #jwt_issuer        = "https://oidc.example.org"
  #disable_jwt_svids = false

  # WIT-SVIDs (IETF WIMSE): tokens that are worth something only to who proves that it has the key they name.
  # They are as old as X509-SVIDs get. SPIFFE has them as an experiment; SPIRE's agents do not serve them.
  #wit_svids  = false
  #wit_issuer = ""

  # Who may administer the server over the network, with an X509-SVID, beside those who have an
  # entry with admin set.
  #admin_ids = ["spiffe://example.org/admin"]

  # Refuse TLS callers that cannot do a post-quantum hybrid key exchange. Without it, such an
  # exchange is preferred.
  #require_pq_kem = false

  # Rates: attestations of each source address, signatures of each agent. A caller above them waits.
  # Local callers are exempt. For a fleet behind one address see server/README.md.
  #ratelimit {
    #attestation = true
    #signing     = true
  #}
  #limits {
    #attestations_per_second    = 1
    #signatures_per_second      = 500
    #max_connections            = 50000
    #max_connections_per_source = 10000
  #}

  # Exchanging bundles with other trust domains, so that workloads of both can verify each other. What
  # "assay-server federation create" makes needs nothing of this.
  #federation {
    # Where others fetch this server's bundle, at GET /, and how often they are told to look. The port is
    # required. The profile https_spiffe shows the server's own SVID; https_web a certificate that everybody
    # knows, from files that something else renews, or from an ACME authority, which must reach the
    # endpoint at port 443 of the domain.
    #bundle_endpoint {
      #address      = "0.0.0.0"
      #port         = 8443
      #refresh_hint = "5m"
      #profile "https_web" {
        #acme {
          #domain_name   = "bundle.example.org"
          #email         = "admin@example.org"
          #directory_url = "https://acme-v02.api.letsencrypt.org/directory"
          #tos_accepted  = true
        #}
        #serving_cert_file {
          #cert_file_path     = "/etc/assay/bundle-endpoint.pem"
          #key_file_path      = "/etc/assay/bundle-endpoint.key"
          #file_sync_interval = "1h"
        #}
      #}
    #}

    # Whose bundles this server fetches: twice within the refresh hint of each, but not more often than
    # min_refresh_interval. A block here wins over what was made with the command. With https_spiffe the
    # first bundle is put in by hand, with "assay-server bundle set".
    #min_refresh_interval = "1m"
    #federates_with "other.example.com" {
      #bundle_endpoint_url = "https://other.example.com:8443/"
      #bundle_endpoint_profile "https_spiffe" {
        #endpoint_spiffe_id = "spiffe://other.example.com/spire/server"
      #}
    #}
  #}
}

# How agents prove what node they run on: a block for each way this server accepts.

# A token that "assay-server token generate" prints, good for one agent, once.
node_attestor "join_token" {}

# A certificate that the node already has, from an authority you name.
#node_attestor "x509pop" {
  # The roots that nodes' certificates come from: one file, or several.
  #ca_bundle_path  = "/etc/assay/node-ca.pem"
  #ca_bundle_paths = ["/etc/assay/node-ca.pem", "/etc/assay/old-node-ca.pem"]
#}

# An SSH host certificate that the node already has, from an authority you name.
#node_attestor "sshpop" {
  # The authorities' keys, as lines of authorized_keys: here, in a file, or both.
  #cert_authorities      = ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHvkw0iqvmHsCVRzQRCuxvh6TXMkvNkAPAqmNmbVO0Gb"]
  #cert_authorities_path = "/etc/assay/ssh-cas.pub"
  # The domain that the host's name must be in, and another form of the agent's ID.
  #canonical_domain    = "example.org"
  #agent_path_template = "{{ .PluginName }}/{{ .Hostname }}"
#}

# The name that a node has in DNS: this server fetches a nonce from it over HTTP.
#node_attestor "http_challenge" {
  # Regular expressions, one of which a name must match as a whole.
  #allowed_dns_patterns = ["web[0-9]+\\.example\\.org"]
  # The port that is asked, and whether it may be one that any user of the host can listen on.
  #required_port        = 80
  #allow_non_root_ports = true
  # A name is believed once; it can be off only if the port is root's.
  #tofu = true
  # Where a name's address must be, in place of anywhere but on this machine and link-local; and a DNS
  # server in place of the system's resolver.
  #allowed_networks = ["10.0.0.0/8"]
  #dns_server       = "10.0.0.53:53"
#}

# OpenID Connect discovery, so that verifiers that know nothing of SPIFFE (cloud providers, OAuth servers)
# find the keys of JWT-SVIDs: /.well-known/openid-configuration and /keys. server.jwt_issuer must be the URL
# that they are below. Keys are SPIRE's oidc-discovery-provider's where the meaning is the same.
#oidc_discovery {
  # The names that the documents may be asked for by; another is refused.
  #domains = ["oidc.example.org"]

  # Where it listens, and with which certificate: from files, from an ACME authority, which must reach it at
  # port 443 of the domain, or none, behind a proxy that does TLS. A proxy can also be given a Unix socket.
  #bind_address = "0.0.0.0"
  #bind_port    = 443
  #acme {
    #domain_name   = "oidc.example.org"
    #email         = "admin@example.org"
    #directory_url = "https://acme-v02.api.letsencrypt.org/directory"
    #tos_accepted  = true
  #}
  #serving_cert_file {
    #cert_file_path     = "/etc/assay/oidc.pem"
    #key_file_path      = "/etc/assay/oidc.key"
    #file_sync_interval = "1h"
  #}
  #behind_proxy       = true
  #listen_socket_path = "/run/assay/server/oidc.sock"

  # What the documents say where it is not what it seems from here: the issuer, which is server.jwt_issuer,
  # where the keys are, and a path in front of both documents.
  #jwt_issuer         = "https://oidc.example.org"
  #jwks_uri           = "https://oidc.example.org/keys"
  #server_path_prefix = ""

  # Some verifiers insist on "use" in each key. http in place of https in the documents is for trials.
  #set_key_use           = false
  #allow_insecure_scheme = false
#}

# Other claims in JWT-SVIDs whose audiences are all of a list. The usual one is an OAuth authorization server
# that follows RFC 7523 to the letter, to which the token says who its client is: iss and sub are the client's
# ID, which is its SPIFFE ID, and jti is there. Agents of ours do not hold tokens with a jti; for a SPIRE agent
# set it in the entry as well (-jwtSVIDIncludeJTI), or it gives the same token twice. What is changed here is in
# new tokens; agents hold others for half of their life.
#jwt_profile "login" {
  #audiences = ["https://login.example.org"]
  # For whom: SPIFFE IDs, or all below a path; for all by default.
  #spiffe_ids = ["spiffe://example.org/shop", "spiffe://example.org/batch/*"]
  # "subject" is the SPIFFE ID itself; a URL is that URL; "" is server.jwt_issuer.
  #issuer = "subject"
  #jti    = true
  # A single audience as a text and not as a list of one.
  #audience_as_text = true
#}

# The service account token that the kubelet projects into the agent's pod, reviewed by the pod's cluster: a
# block for each cluster that nodes come from.
#node_attestor "k8s_psat" {
  #cluster "production" {
    # The service accounts that agents run under, as namespace:name, and whom their tokens are for.
    #service_account_allow_list = ["assay:assay-agent"]
    #audience                   = ["spire-server"]
    # How to reach the cluster's API server; without it, as a pod of the cluster.
    #kube_config_file = "/etc/assay/production.kubeconfig"
    # Labels that become selectors, and stay up to date.
    #allowed_node_label_keys = ["topology.kubernetes.io/zone"]
    #allowed_pod_label_keys  = ["app"]
    # Agents' IDs from their pods and not from their nodes.
    #use_pod_uid_for_agent_id = false
  #}
#}

# An instance of Amazon EC2, by its identity document and its role.
#node_attestor "aws_iid" {
  # Whose instances: accounts by number, and those of an organization, which AWS lists or a file.
  #account_ids = ["123456789012"]
  #verify_organization {
    #management_account_id     = "111111111111"
    #management_account_region = "us-east-1"
    #assume_org_role           = "assay-list-accounts"
    #org_account_map_ttl       = "3m"
    #account_list_file         = "/etc/assay/aws/accounts.json" # in place of asking: ["123456789012"]
    #organizations_endpoint    = "https://organizations.example.org"
  #}
  # Of which regions; by default all whose certificates come with Assay. Other certificates, or others for these:
  # the RSA-2048 ones, from the EC2 user guide.
  #regions             = ["us-east-1"]
  #region_certificates = { "us-east-1" = "/etc/assay/aws/us-east-1.pem" }
  # IAM roles by which an instance proves itself, and no others then. Without, a document is good once.
  #instance_roles = ["web"]
  #require_proof  = false
  # How the agent's ID is made of the document, with the functions of SPIRE's templates; the default is SPIRE's.
  #agent_path_template = "{{ .PluginName }}/{{ .AccountID }}/{{ .Region }}/{{ .InstanceID }}"
  # How old an instance may be that shows its document alone; any age by default.
  #max_instance_age = "10m"
  # Ask EC2 for state, tags and security groups, and IAM for the role.
  #lookup_instance = false
  # Leave IAM out, where it cannot be reached.
  #disable_instance_profile_selectors = false
  # Ask in the account of each instance, with a role of this name there; an account may have another, or none.
  #assume_role = "assay-lookup"
  #external_id = "of-assay"
  #account "210987654321" {
    #assume_role = "other-lookup"
    #external_id = "of-assay"
  #}
  # How often that is asked again, many instances at a time: selectors of agents follow, and the agent of an
  # instance that was terminated is evicted.
  #refresh_interval = "1m"
  # Credentials for that; by default those of the environment, then those of the server's own pod, task or instance.
  #access_key_id     = ""
  #secret_access_key = ""
  # Addresses in place of AWS's public ones, and of the server's own metadata service.
  #sts_endpoint          = "https://sts.example.org"
  #ec2_endpoint          = "https://ec2.example.org"
  #iam_endpoint          = "https://iam.example.org"
  #ec2_metadata_endpoint = "http://169.254.169.254"
#}

# A task of Amazon ECS, as a sidecar in Fargate is, by its role.
#node_attestor "ecs" {
  # Whose tasks, of which regions, and the IAM roles by which they prove themselves.
  #account_ids = ["123456789012"]
  #regions     = ["us-east-1"]
  #task_roles  = ["shop-task"]
  # Ask ECS for cluster, family, revision and service, and whether the task runs, again and again.
  #lookup_task      = false
  #clusters         = ["prod"]
  # Ask in the account of each task, with a role of this name there; an account may have another, or none.
  #assume_role = "assay-lookup"
  #external_id = "of-assay"
  #account "210987654321" {
    #assume_role = "other-lookup"
    #external_id = "of-assay"
  #}
  #refresh_interval = "1m"
  # Credentials for that; by default those of the environment, then those of the server's own pod, task or instance.
  #access_key_id     = ""
  #secret_access_key = ""
  # Addresses in place of AWS's public ones, and of the server's own metadata service.
  #sts_endpoint          = "https://sts.example.org"
  #ecs_endpoint          = "https://ecs.example.org"
  #ec2_metadata_endpoint = "http://169.254.169.254"
#}

# A virtual machine on VMware vSphere, by what vCenter writes into it.
#node_attestor "vsphere" {
  #vcenter_url   = "https://vcenter.example.org"
  #username      = "assay@vsphere.local"
  #password_file = "/etc/assay/vcenter-password"
  # The authorities of vCenter's certificate; by default those of the system.
  #ca_path = "/etc/assay/vcenter-ca.pem"
  # Which virtual machines: in these folders and those below ("/" is all), and if set in these clusters.
  #folders  = ["/Datacenter/vm/production"]
  #clusters = ["cluster-1"]
  # Refuse those in which any user can read guestinfo; otherwise they are believed once.
  #require_secure_rpc = false
  # The guest writes its answer into guestinfo, so that who may only look at it in vCenter cannot be it.
  #guest_answers = true
  # Tags as selectors, too, and how often they are asked for.
  #tags          = false
  #tags_interval = "1m"
  # In place of the keys above, several vCenters: a block for each, with the same keys.
  #vcenter "east" {
    #vcenter_url        = "https://vcenter-east.example.org"
    #username           = "assay@vsphere.local"
    #password_file      = "/etc/assay/vcenter-east-password"
    #ca_path            = "/etc/assay/vcenter-ca.pem"
    #folders            = ["/Datacenter/vm/production"]
    #clusters           = ["cluster-1"]
    #require_secure_rpc = false
    #guest_answers      = true
    #tags               = false
    #tags_interval      = "1m"
  #}
#}

# A machine by its TPM 2.0.
#node_attestor "tpm" {
  # Which TPMs: by the SHA-256 of their endorsement keys, by who certified them, or both.
  #ek_hashes  = ["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]
  #ek_ca_path = "/etc/assay/tpm-manufacturers.pem"
  # Registers of the SHA-256 bank that become selectors.
  #pcrs = [0, 2, 4, 7]
#}

# A device identity whose key is in the node's TPM 2.0: who issues them, and whose TPMs are accepted.
#node_attestor "tpm_devid" {
  #devid_ca_path       = "/etc/assay/devid-ca.pem"
  #endorsement_ca_path = "/etc/assay/tpm-manufacturers.pem"
#}

# Several of these together, each of which must be believed, about one machine: a block for each combination.
# What is proved alone is believed if there is a block for it above, and not for being a part here.
#node_attestor "all" {
  #combination "metal" {
    # Which part's path names the agent, the first by default.
    #id_from = "x509pop"
    # Selectors, without their values, that must have a value in common: here a certificate that names its TPM.
    #same = [["tpm:ek", "x509pop:san:ek"]]
    #part "x509pop" {
      #ca_bundle_path = "/etc/assay/node-ca.pem"
    #}
    #part "tpm" {
      #ek_ca_path = "/etc/assay/tpm-manufacturers.pem"
    #}
  #}
#}

# A plugin of SPIRE, a program of its own that is run unmodified; the name is the type of its evidence and
# selectors. There may be several. What runs is what has the checksum, and it gets no environment but
# plugin_env: NAME passes the server's own on, NAME=value sets one. See attestor/external/README.md.
#node_attestor "external" {
  #name            = "shared_secret"
  #plugin_cmd      = "/usr/libexec/assay/shared_secret"
  #plugin_args     = ["-v"]
  #plugin_checksum = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
  #plugin_env      = ["HTTPS_PROXY", "HOME=/tmp"]
  # It may ask for an identity of the server, with which it could pose as the server: for plugins that call others.
  #plugin_identity = false
  # Its configuration, in its own syntax.
  #plugin_data     = "secret = \"…\""
#}

# Where signing keys live: one of these.
key_manager "disk" {
  # The default is keys.json in data_dir.
  #keys_path = "/var/lib/assay/server/keys.json"

  # A file with a secret that seals the key file, so that the disk, a snapshot or a backup alone are of no
  # use to anybody: as systemd's LoadCredential hands one over, of 16 bytes at least. It is read at the start.
  # A key file that is not sealed yet is then; without the secret it is lost.
  #seal_credential_path = "/run/credentials/assay-server.service/keys"
}

# In memory: a restart begins with new authorities.
#key_manager "memory" {
#}

# In the transit engine of Vault or OpenBao.
#key_manager "hashicorp_vault" {
  #vault_addr          = "https://vault.example.org:8200"
  #namespace           = "admin"
  #ca_cert_path        = "/etc/assay/vault-ca.pem"
  #transit_engine_path = "transit"
  #key_prefix          = "assay-"
  # How to log in: one of these. A secret is better in a file than here. A renewable token is renewed as long
  # as Vault lets it; one in a file may be replaced at any time.
  #token_auth {
    #token_path = "/run/credentials/assay-server.service/vault-token"
    #token      = "hvs.…" # in place of the file
  #}
  #approle_auth {
    #approle_auth_mount_point = "approle"
    #approle_id               = "3b1f…"
    #approle_secret_id_path   = "/run/credentials/assay-server.service/vault-secret"
    #approle_secret_id        = "…" # in place of the file
  #}
  #cert_auth {
    #cert_auth_mount_point = "cert"
    #cert_auth_role_name   = "assay"
    #client_cert_path      = "/etc/assay/vault-client.pem"
    #client_key_path       = "/etc/assay/vault-client.key"
  #}
  #k8s_auth {
    #k8s_auth_mount_point = "kubernetes"
    #k8s_auth_role_name   = "assay"
    #token_path           = "/var/run/secrets/kubernetes.io/serviceaccount/token"
  #}
#}

# In AWS Key Management Service, with the credentials that the environment has unless they are here.
#key_manager "aws_kms" {
  #region            = "eu-central-1"
  #endpoint          = "https://kms.eu-central-1.amazonaws.com"
  #access_key_id     = "AKIA…"
  #secret_access_key = "…"
  # Aliases are alias/PREFIX-NAME: servers that share an account can have one each.
  #key_prefix      = "assay"
  #key_policy_file = "/etc/assay/kms-policy.json"
  # Put onto each key that is made; the server needs kms:TagResource for it.
  #key_tags = { "team" = "pki" }
#}

# In a hardware security module, by a helper that is built with "make pkcs11".
#key_manager "pkcs11" {
  #helper_path = "/usr/libexec/assay/assay-pkcs11"
  #module_path = "/usr/lib/softhsm/libsofthsm2.so"
  #token_label = "assay"
  #pin_path    = "/run/credentials/assay-server.service/pin"
  #key_prefix  = "assay-"
#}

# Keys in a key manager that is a plugin of SPIRE. Which key of it is which is in keys-NAME.json in data_dir,
# which must not be lost. The keys are those of node_attestor "external".
#key_manager "external" {
  #name            = "our_hsm"
  #plugin_cmd      = "/usr/libexec/assay/our_hsm"
  #plugin_args     = []
  #plugin_checksum = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
  #plugin_env      = []
  #plugin_identity = false
  #plugin_data     = ""
#}

# What signs this server's X.509 authority. Without such a block it is its own root, and its certificate is
# what everybody in the trust domain believes; with one, that is the root above. There can be one. A server
# that has an authority starts and serves with it while what is above is away.

# A signing certificate in files: the certificate and what leads to its root, its private key, and the roots
# (not needed if the certificate is self-signed). They are read anew for each authority that is signed.
#upstream_authority "disk" {
  #cert_file_path   = "/etc/assay/upstream.pem"
  #key_file_path    = "/etc/assay/upstream.key"
  #bundle_file_path = "/etc/assay/upstream-roots.pem"
#}

# A server of the same trust domain, ours or SPIRE's, that has an entry for this one with -downstream. This
# server has its SVID from an agent beside it that hangs on the server above.
#upstream_authority "spire" {
  #server_address      = "upper.example.org"
  #server_port         = 8081
  #workload_api_socket = "/run/assay/agent/api.sock"
#}

# The PKI engine of Vault or OpenBao.
#upstream_authority "vault" {
  #vault_addr      = "https://vault.example.org:8200"
  #namespace       = "admin"
  #ca_cert_path    = "/etc/assay/vault-ca.pem"
  #pki_mount_point = "pki"
  # How to log in: one of these. A secret is better in a file than here. A renewable token is renewed as long
  # as Vault lets it; one in a file may be replaced at any time.
  #token_auth {
    #token_path = "/run/credentials/assay-server.service/vault-token"
    #token      = "hvs.…" # in place of the file
  #}
  #approle_auth {
    #approle_auth_mount_point = "approle"
    #approle_id               = "3b1f…"
    #approle_secret_id_path   = "/run/credentials/assay-server.service/vault-secret"
    #approle_secret_id        = "…" # in place of the file
  #}
  #cert_auth {
    #cert_auth_mount_point = "cert"
    #cert_auth_role_name   = "assay"
    #client_cert_path      = "/etc/assay/vault-client.pem"
    #client_key_path       = "/etc/assay/vault-client.key"
  #}
  #k8s_auth {
    #k8s_auth_mount_point = "kubernetes"
    #k8s_auth_role_name   = "assay"
    #token_path           = "/var/run/secrets/kubernetes.io/serviceaccount/token"
  #}
#}

# A certificate authority of AWS Private CA, with the credentials that the environment has.
#upstream_authority "aws_pca" {
  #region                    = "eu-central-1"
  #certificate_authority_arn = "arn:aws:acm-pca:eu-central-1:123456789012:certificate-authority/…"
  #signing_algorithm         = "SHA256WITHECDSA"
  #ca_signing_template_arn   = "arn:aws:acm-pca:::template/SubordinateCACertificate_PathLen0/V1"
  #assume_role_arn           = "arn:aws:iam::123456789012:role/assay"
  #supplemental_bundle_path  = "/etc/assay/more-roots.pem"
  #endpoint                  = "https://acm-pca.eu-central-1.amazonaws.com"
#}

# An issuer of cert-manager. Without kube_config_file the server is a pod of the cluster. Its service account needs
# create, get, list and delete on certificaterequests of cert-manager.io in the issuer's namespace.
#upstream_authority "cert-manager" {
  #namespace        = "trust"
  #issuer_name      = "roots"
  #issuer_kind      = "Issuer"
  #issuer_group     = "cert-manager.io"
  # Without it, the service account of the server's pod. Credentials by a token, a tokenFile (read anew each
  # time) or a client certificate; programs that print credentials (exec) are not run.
  #kube_config_file = "/etc/assay/kubeconfig"
#}

# An upstream authority that is a plugin of SPIRE. The keys are those of node_attestor "external".
#upstream_authority "external" {
  #name            = "our_pki"
  #plugin_cmd      = "/usr/libexec/assay/our_pki"
  #plugin_args     = []
  #plugin_checksum = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
  #plugin_env      = []
  #plugin_identity = false
  #plugin_data     = ""
#}

# Some of what administrators may do, for somebody. Without any role it is all or nothing: admin_ids, entries
# with admin set, and everybody who can open socket_path. SIGHUP reads the blocks again.
#role "shop-registrar" {
  # "entry:read", "entry:write", "agent:read", "agent:write", "token:create", "svid:mint", "bundle:read",
  # "bundle:write", "federation:read", "federation:write", "authority:read", "authority:write",
  # "evidence:read", "evidence:write", and on the Unix socket "server:read" and "server:write"; or "*".
  #verbs = ["entry:read", "entry:write"]
  # The SPIFFE IDs that it may see and give away, in entries, with tokens and by minting: "/shop" is /shop
  # and all below it, "/" is all. None without it. Entries with admin or downstream set are in no role.
  #paths = ["/shop"]
  # The parents that its entries may have; any without it. At least one of these selectors must be in each
  # of its entries; any will do without it. And the DNS names it may give; none without it.
  #parents   = ["/node/shop"]
  #selectors = ["k8s:ns:shop"]
  #dns_names = ["*.shop.example.org"]
  # Who has it: by X.509-SVID, by a token in the call's metadata (authorization: Bearer …), or by user or
  # group of the caller of the Unix socket. As soon as one role has a unix block, every user of the socket
  # but root and the server's own has no more than roles give; it must be able to open the socket.
  #svid {
    #ids = ["spiffe://example.org/ci/registrar", "spiffe://example.org/team/shop/*"]
  #}
  #oidc {
    #issuer   = "https://login.example.org"
    #audience = "assay"
    # A text, a list of texts, or a regular expression for all of the value, from ^ to $; of a claim that is a
    # list, as groups are, one value must be that. What is in an object is "realm_access.roles". Commands send
    # a token with -tokenFile or ASSAY_ID_TOKEN_FILE.
    #claims   = { "email" = "^[^@]+@shop\\.example\\.org$" }
  #}
  #unix {
    #users  = ["root"]
    #groups = ["root"]
    #uids   = [1000]
    #gids   = [1000]
  #}
#}

# Image evidence: what scanners and CI systems say about images becomes a condition of identity. An entry
# that demands a verdict has selectors like scan:policy:prod or prov:policy:release; only workloads whose
# image has them at the moment get what it stands for. SIGHUP reads all of this again.

# What an image must be like. Every key of these blocks is in server/verdict/policy/sample.hcl.
#scan_policy "prod" {
  #sources   = ["scanner", "ci", "local"]
  #max_age   = "24h"
  #on_missing = "grace:15m"
  #on_fail    = "quarantine"
  #fail {
    #severity = "critical"
  #}
#}

# Whose signature counts, and for what.
#trust_policy "scanner" {
  #predicate_types = ["scan", "vex"]
  #key {
    #path = "/etc/assay/scanner.pub"
  #}
#}

# Who may push evidence over the network, beside administrators: a CI system by its own tokens, or a
# workload by its SVID. With allow_unsigned its word is enough.
#evidence_source "ci" {
  #repositories   = ["registry.example.org/shop/**"]
  #allow_unsigned = true
  #svid {
    #ids = ["spiffe://example.org/ci/*"]
  #}
  # Or nobody over the network: what vulnerability_reports of a kubernetes block brings in for this source.
  #kubernetes = true
#}

#evidence {
  # "signed" refuses entries whose only selectors are ones that anybody could have written, such as labels
  # and environment variables; otherwise there is a warning.
  #require_evidence = "any"

  # What the world says of vulnerabilities: CISA's catalogue of known exploited ones (JSON) and FIRST's EPSS
  # scores (CSV), as files that something else downloads. They are looked at every feed_refresh.
  #kev_file     = "/var/lib/assay/feeds/known_exploited_vulnerabilities.json"
  #epss_file    = "/var/lib/assay/feeds/epss_scores-current.csv.gz"
  #feed_refresh = "1m"

  # Images that nobody has run for so long, and nobody has pushed about, are forgotten with their documents,
  # in whole days or as other durations; "0" keeps them for ever. That newer evidence was known stays known.
  #keep_unused = "90d"

  # The lists of revoked certificates, one of each authority: a PEM file with all of them, as nginx and
  # PostgreSQL read it, and an address where GET /crl.pem answers with the same and GET /crl with the active
  # authority's in DER.
  #crl_file    = "/var/lib/assay/crl.pem"
  #crl_address = "0.0.0.0:8092"

  # Registries that may be asked for manifests, to prove which image the digest of a manifest or an index
  # leads to; without any, whoever pushes evidence brings the manifests. registry_hosts are others that they
  # may send on to (token services, blob stores), plain_registries those of all that speak no TLS. A name
  # that leads to a private address is refused unless that is allowed.
  #registries               = ["registry.example.org"]
  #registry_hosts           = ["auth.example.org"]
  #plain_registries         = ["localhost:5000"]
  #allow_private_registries = false
  # Credentials for them: a config.json as "docker login" and Kubernetes write it, for the server's user and its
  # group only, read for each fetch. Programs that print credentials (credsStore, credHelpers) are not run.
  #registry_credentials_path = "/etc/assay/registries.json"

  # Who is told: withdraw, restore, grace.start, grace.half, grace.ninety, guard.trip, guard.release,
  # feed.stale, evidence.rejected; all of it without events. Posts are signed with the key in key_file (see
  # the header Assay-Signature) and tried again until they are taken.
  #webhook "chat" {
    #url      = "https://hooks.example.org/assay"
    #key_file = "/etc/assay/webhook.key"
    #ca_file  = "/etc/assay/webhook-ca.pem"
    #events   = ["withdraw", "restore", "guard.trip"]
  #}
#}

# Entries from a Kubernetes cluster: for every pod that a ClusterSPIFFEID selects, and every
# ClusterStaticEntry and ClusterFederatedTrustDomain (the resources of spire-controller-manager). The label
# is the cluster's name, as the agents give it to k8s_psat.
#kubernetes "production" {
  # Without it the service account of the server's own pod is used.
  #kubeconfig = "/etc/assay/production.kubeconfig"

  # Ends the DNS names of services; "" leaves such names out.
  #cluster_domain = "cluster.local"

  # Resources of this class only, and with watch_classless also those that have none.
  #class_name      = "assay"
  #watch_classless = true

  # Regular expressions that match all of a name.
  #ignore_namespaces = ["kube-system", "kube-public", "spire-system"]

  # Templates, of the same values as those of a ClusterSPIFFEID: the parent of pods' entries, and a path
  # that the identities of a pod must be below, whatever a ClusterSPIFFEID says. Default: no fence.
  #parent_id_template = "spiffe://{{ .TrustDomain }}/spire/agent/k8s_psat/{{ .ClusterName }}/{{ .NodeMeta.UID }}"
  #path_fence         = "/ns/{{ .PodMeta.Namespace }}/"

  # How often everything is compared, in case somebody changed an entry by hand. Changes in the cluster
  # come by themselves.
  #resync_interval = "10m"

  # The name that policies have the VulnerabilityReports of Trivy Operator by, among their sources. Whoever
  # may write such objects speaks for it, unsigned. Default: they are not looked at.
  #vulnerability_reports = "trivy-operator"

  # One of several servers over one store keeps the entries: the holder of a Lease. The namespace is the
  # server's own by default.
  #leader_election {
    #namespace = "assay"
    #name      = "assay-registrar"
    #disabled  = false
  #}

  # The trust domain's bundle, written into the cluster and kept as it is here. "pem" has the X.509
  # authorities, "spiffe" all. Without labels every namespace gets one.
  #bundle_config_map "assay-bundle" {
    #key              = "bundle.pem"
    #format           = "pem"
    #namespace_labels = { "assay.id/bundle" = "true" }
  #}
  #cluster_trust_bundle "assay" {
    #signer_name = "example.org/assay"
  #}
#}

# GET /live and /ready, for probes. Nobody is asked who they are: keep it on loopback or behind
# something that asks. Without listener_enabled there is no listener.
#health_checks {
  #listener_enabled = true
  #bind_address     = "127.0.0.1"
  #bind_port        = 8080
  #live_path        = "/live"
  #ready_path       = "/ready"
#}

# GET /metrics, for Prometheus. The same holds for it. Without the block there is no listener.
#telemetry {
  #prometheus {
    #host = "127.0.0.1"
    #port = 9988
  #}
#}
