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
  # Trivy Operator's VulnerabilityReports, under this name. Whoever may write such objects speaks for it: keep
  # the right to aquasecurity.github.io/vulnerabilityreports with the operator.
  vulnerability_reports = "trivy-operator"
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

# What an image must be like: nothing critical, and nothing high that a fix is known for. An image that nobody has
# looked at has a quarter of an hour, one that nobody has looked at again a day.
scan_policy "prod" {
  sources    = ["trivy-operator"]
  max_age    = "26h" # the operator scans daily
  on_missing = "grace:15m"
  on_stale   = "grace:24h"
  fail {
    severity = "critical"
  }
  fail {
    severity   = "high"
    only_fixed = true
  }
  grace {
    severity = "high"
    for      = "72h"
  }
  blast_guard {
    max_fraction  = 0.2
    window        = "5m"
    min_workloads = 10
  }
}

# Who builds: what cosign signed with this key, pushed by a pipeline (assay evidence push).
#   kubectl -n assay create secret generic assay-trust --from-file=key.pub=cosign.pub
trust_policy "builds" {
  predicate_types = ["provenance"]
  key {
    path = "/etc/assay-trust/key.pub"
  }
}
