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
    allowed_node_label_keys    = ["zone"]
  }
}

key_manager "disk" {}

kubernetes "quickstart" {
  vulnerability_reports = "trivy-operator"
  cluster_trust_bundle "workloads" {
    signer_name = "assay.example.org/workloads"
  }
  path_fence            = "/ns/{{ .PodMeta.Namespace }}/"
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

scan_policy "prod" {
  sources        = ["trivy-operator", "security-team"]
  allow_unsigned = true
  max_age        = "24h"
  allow_empty    = true # the image is FROM scratch
  fail {
    severity = "critical"
  }
  vex {
    trust = ["security-team"]
  }
}

evidence_source "trivy-operator" {
  repositories   = ["**"]
  allow_unsigned = true
  kubernetes     = true
}

evidence_source "security-team" {
  repositories   = ["**"]
  allow_unsigned = true
  svid {
    ids = ["spiffe://example.org/ns/security/sa/scanner"]
  }
}
