agent {
  trust_domain      = "example.org"
  data_dir          = "/var/lib/assay/agent"
  standby           = true # an update starts the next agent before the last one ends
  socket_path       = "/run/assay/agent/public/api.sock"
  admin_socket_path = "/run/assay/agent/private/admin.sock"
  server_address    = "assay-server"
  server_port       = 8081
  trust_bundle_config_map = "assay-bundle" # the server writes it; the agent waits for it
  log_format        = "json"
}

node_attestor "k8s_psat" {
  cluster = "quickstart"
}

key_manager "disk" {}

workload_attestor "k8s" {
  enable_namespace_labels = true
}

workload_attestor "unix" {}

health_checks {
  listener_enabled = true
  bind_address     = "0.0.0.0"
  bind_port        = 8082
}

telemetry {
  prometheus {
    host = "0.0.0.0"
    port = 9989
  }
}
