# The configuration of "assay-agent files", every key of it. It keeps an identity in files for a program
# that reads nothing else, and takes it from any SPIFFE Workload API. Keys are spiffe-helper's where the
# meaning is the same, so its files do too. A key that is commented out shows its default, or an example
# where there is none.
#
#   assay-agent files -config files.hcl -validate    says everything that is wrong with it
#   assay-agent files -config files.hcl              keeps the files until SIGTERM
#
# What the keys of the files mean is said beside those of the block files "NAME" in agent.hcl, with which
# the agent does the same by itself.

# Where the Workload API is. Without it $SPIFFE_ENDPOINT_SOCKET, and without that the agent's own default.
agent_address = "/run/assay/agent/public/api.sock"

# false: write everything once and end.
#daemon_mode = true

cert_dir              = "/etc/nginx/svid"
svid_file_name        = "svid.pem"
svid_key_file_name    = "svid_key.pem"
svid_bundle_file_name = "svid_bundle.pem"
#crl_file_name        = "crl.pem"

#jwt_svids            = [{ jwt_audience = "https://api.example.org", jwt_extra_audiences = [], jwt_svid_file_name = "api.token" }]
#jwt_bundle_file_name = "jwt_bundle.json"
#jwks_file_name       = "jwks.json"

#cert_file_mode       = "0644"
#key_file_mode        = "0600"
#jwt_svid_file_mode   = "0600"
#jwt_bundle_file_mode = "0600"
#file_owner           = "root"
#file_group           = "root"

#spiffe_id = "spiffe://example.org/web"
#hint      = ""

#add_intermediates_to_bundle = false
#include_federated_domains   = false
#omit_expired                = false

#on_withdrawal = "replace"

#pid_file_name         = "/run/nginx.pid"
#renew_signal          = "SIGHUP"
#renew_command         = ["/usr/sbin/nginx", "-s", "reload"]
#renew_command_timeout = "30s"

# A program that is started once the files are there, gets renew_signal when one has changed, is started
# again then if it has ended, and ends with this one. cmd_args is a list, or one text that is split at
# spaces outside of double quotes.
#cmd      = "/usr/local/bin/server"
#cmd_args = ["-tls", "/etc/nginx/svid"]

#log_level  = "info"
#log_format = "text"
#log_file   = "/var/log/assay/files.log"

# Live: the files can be written and the program be told. Ready: they are there, and the certificate has
# not expired or been withdrawn.
#health_checks {
  #listener_enabled = true
  #bind_address     = "127.0.0.1"
  #bind_port        = 8081
  #liveness_path    = "/live"
  #readiness_path   = "/ready"
#}
