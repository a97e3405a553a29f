{{/* The image of a part: (dict "root" $ "of" "server"). */}}
{{- define "assay.image" -}}
{{- $i := index .root.Values.images .of -}}
{{- if $i.digest -}}
{{ .root.Values.images.registry }}{{ $i.repository }}@{{ $i.digest }}
{{- else -}}
{{ .root.Values.images.registry }}{{ $i.repository }}:{{ $i.tag }}
{{- end -}}
{{- end -}}

{{/* A text as HCL has it: quoted, and nothing in it is a template of HCL's own. */}}
{{- define "assay.hcl" -}}
{{- . | toRawJson | replace "${" "$${" | replace "%{" "%%{" -}}
{{- end -}}

{{- define "assay.labels" -}}
app.kubernetes.io/part-of: assay
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* What every pod has of the values: secrets for its image. */}}
{{- define "assay.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* server.hcl */}}
{{- define "assay.server.hcl" -}}
{{- if .Values.server.config -}}
{{ .Values.server.config }}
{{- else -}}
server {
  trust_domain = {{ include "assay.hcl" .Values.trustDomain }}
  data_dir     = "/var/lib/assay/server"
  socket_path  = "/run/assay/server/api.sock"
  log_format   = "json"
  {{- if ne .Values.server.logLevel "info" }}
  log_level    = {{ include "assay.hcl" .Values.server.logLevel }}
  {{- end }}
  # Agents behind one address (a proxy, a NAT) attest together when a node pool starts.
  ratelimit {
    attestation = false
  }
  {{- with .Values.server.extraServerConfig }}
  {{- . | trim | nindent 2 }}
  {{- end }}
}

node_attestor "k8s_psat" {
  cluster {{ include "assay.hcl" .Values.clusterName }} {
    service_account_allow_list = [{{ include "assay.hcl" (printf "%s:%s-agent" .Release.Namespace .Values.name) }}]
  }
}

{{ if not (regexMatch `(?m)^\s*key_manager\s` .Values.server.extraConfig) -}}
key_manager "disk" {}

{{ end -}}
kubernetes {{ include "assay.hcl" .Values.clusterName }} {
  {{- with .Values.registrar }}
  {{- if ne $.Values.clusterDomain "cluster.local" }}
  cluster_domain = {{ include "assay.hcl" $.Values.clusterDomain }}
  {{- end }}
  {{- with .className }}
  class_name = {{ include "assay.hcl" . }}
  {{- end }}
  {{- if .watchClassless }}
  watch_classless = true
  {{- end }}
  {{- if kindIs "slice" .ignoreNamespaces }}
  ignore_namespaces = [{{ range $i, $n := .ignoreNamespaces }}{{ if $i }}, {{ end }}{{ include "assay.hcl" $n }}{{ end }}]
  {{- end }}
  {{- with .pathFence }}
  path_fence = {{ include "assay.hcl" . }}
  {{- end }}
  {{- with .vulnerabilityReports }}
  vulnerability_reports = {{ include "assay.hcl" . }}
  {{- end }}
  bundle_config_map {{ include "assay.hcl" (printf "%s-bundle" $.Values.name) }} {
    namespace_labels = { "kubernetes.io/metadata.name" = {{ include "assay.hcl" $.Release.Namespace }} }
  }
  {{- with .clusterTrustBundle }}
  cluster_trust_bundle {{ include "assay.hcl" . }} {}
  {{- end }}
  {{- end }}
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
{{- with .Values.server.extraConfig }}

{{ . | trim }}
{{- end }}
{{- end }}
{{ end -}}

{{/* agent.hcl */}}
{{- define "assay.agent.hcl" -}}
{{- if .Values.agent.config -}}
{{ .Values.agent.config }}
{{- else -}}
agent {
  trust_domain      = {{ include "assay.hcl" .Values.trustDomain }}
  data_dir          = "/var/lib/assay/agent"
  standby           = true # an update starts the next agent before the last one ends
  socket_path       = "/run/assay/agent/public/api.sock"
  admin_socket_path = "/run/assay/agent/private/admin.sock"
  server_address    = {{ include "assay.hcl" (printf "%s-server" .Values.name) }}
  server_port       = {{ .Values.server.service.port }}
  trust_bundle_config_map = {{ include "assay.hcl" (printf "%s-bundle" .Values.name) }} # the server writes it; the agent waits for it
  log_format        = "json"
  {{- if ne .Values.agent.logLevel "info" }}
  log_level         = {{ include "assay.hcl" .Values.agent.logLevel }}
  {{- end }}
  {{- with .Values.agent.extraAgentConfig }}
  {{- . | trim | nindent 2 }}
  {{- end }}
}

node_attestor "k8s_psat" {
  cluster = {{ include "assay.hcl" .Values.clusterName }}
}

{{ if not (regexMatch `(?m)^\s*key_manager\s` .Values.agent.extraConfig) -}}
key_manager "disk" {}

{{ end -}}
{{ if not (regexMatch `(?m)^\s*workload_attestor\s+"k8s"` .Values.agent.extraConfig) -}}
workload_attestor "k8s" {
  {{- with .Values.agent.runtime }}
  {{- if ne (printf "%s/%s" .dir .socket) "/run/containerd/containerd.sock" }}
  runtime_socket_path = {{ include "assay.hcl" (printf "%s/%s" .dir .socket) }}
  {{- end }}
  {{- end }}
}

{{ end -}}
{{ if not (regexMatch `(?m)^\s*workload_attestor\s+"unix"` .Values.agent.extraConfig) -}}
workload_attestor "unix" {}

{{ end -}}
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
{{- with .Values.agent.extraConfig }}

{{ . | trim }}
{{- end }}
{{- end }}
{{ end -}}
