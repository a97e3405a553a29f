server {
  trust_domain = "example.org"
  data_dir     = "/var/lib/assay/server"
  socket_path  = "/run/assay/server/api.sock"
  log_format   = "json"
  # Callers that cannot do a post-quantum hybrid key exchange are refused.
  require_pq_kem = true
  # Short lives: what is lost is worth little, and not for long.
  default_x509_svid_ttl = "30m"
  default_jwt_svid_ttl  = "2m"
  agent_ttl             = "30m"
  ca_key_type           = "ec-p384"
  jwt_key_type          = "ec-p384"
  # Every node has an address of its own here, so each gets one attestation a second.
  ratelimit {
    attestation = true
    signing     = true
  }
}

node_attestor "k8s_psat" {
  cluster "quickstart" {
    service_account_allow_list = ["assay-agents:assay-agent"]
  }
}

key_manager "disk" {}

kubernetes "quickstart" {
  # Nothing is registered that names no class, so no manifest found somewhere gives anybody an identity.
  class_name = "assay"
  path_fence = "/ns/{{ .PodMeta.Namespace }}/"
  bundle_config_map "assay-bundle" {
    namespace_labels = { "kubernetes.io/metadata.name" = "assay-agents" }
  }
}

health_checks {
  listener_enabled = true
  bind_address     = "0.0.0.0"
  bind_port        = 8080
}

telemetry {
  prometheus {
    host = "0.0.0.0"
    port = 9988
  }
}

# Entries whose selectors anybody could have written (labels, environment) are refused.
evidence {
  require_evidence = "signed"
}
