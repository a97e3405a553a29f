server {
  trust_domain = "example.org"
  data_dir     = "/var/lib/assay/server"
  socket_path  = "/run/assay/server/api.sock"
  log_format   = "json"
  # Agents behind one address (a proxy, a NAT) attest together when a node pool starts.
  ratelimit {
    attestation = false
  }
}

node_attestor "k8s_psat" {
  cluster "quickstart" {
    service_account_allow_list = ["assay:assay-agent"]
  }
}

key_manager "disk" {}

kubernetes "quickstart" {
  path_fence = "/ns/{{ .PodMeta.Namespace }}/"
  bundle_config_map "assay-bundle" {
    namespace_labels = { "kubernetes.io/metadata.name" = "assay" }
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

# The authority of this cluster is signed by one that several share: its certificate, what leads to the root, and
# its key. They are read anew for each authority that is signed.
#   kubectl -n assay create secret generic assay-upstream --from-file=ca.pem --from-file=ca.key
upstream_authority "disk" {
  cert_file_path = "/etc/assay-upstream/ca.pem"
  key_file_path  = "/etc/assay-upstream/ca.key"
}
