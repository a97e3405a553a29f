server {
  trust_domain = "example.org"
  data_dir     = "/var/lib/assay/server"
  socket_path  = "/run/assay/server/api.sock"
  log_format   = "json"
  # Agents behind one address (a proxy, a NAT) attest together when a node pool starts.
  ratelimit {
    attestation = false
  }
  # Where other trust domains fetch this one's bundle. Whom it federates with is in ClusterFederatedTrustDomains.
  federation {
    bundle_endpoint {
      address = "0.0.0.0"
      port    = 8443
    }
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
