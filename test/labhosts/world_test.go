package labhosts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/test/fake/aws"
	"github.com/assay-id/assay/test/fake/vcenter"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/hosts"
	"github.com/assay-id/assay/test/lab/machine"
	"github.com/assay-id/assay/test/lab/podman"
	"github.com/assay-id/assay/test/lab/site"
	"github.com/assay-id/assay/test/lab/swtpm"
)

const (
	domain = "spiffe://" + site.TrustDomain
	// patience is how long one thing may take at most.
	patience = 2 * time.Minute
	// mtls is where every workload serves, control where it is asked, metrics and probes where an agent's are.
	mtls, control, metrics, probes = ":7000", "127.0.0.1:7001", "127.0.0.1:9989", "127.0.0.1:8082"
)

// world is the data center.
type world struct {
	t       *testing.T
	bin     string
	app     string // the workload's program
	network *hosts.Network
	server  *hosts.Host
	site    *site.Site
	bundle  string // the file that agents know the server by

	center   *vcenter.Center
	password string // the file with the server's password for it
	cloud    *aws.Cloud
	tpms     *swtpm.Maker

	nodes []*node
}

// node is a host with an agent and a workload.
type node struct {
	name string
	host *hosts.Host
	// kind is the attestor, and path what the agent's ID begins with.
	kind string
	// id is the agent's ID, proved what some of its selectors must be.
	id     string
	proved []string
	// workload is the ID of the workload, and selectors what it takes.
	workload  string
	selectors []string

	agent *site.Agent // nil for the machine
	// up brings the host up, and down ends all that runs on it but the network.
	up, down func(ctx context.Context) error
	// start starts the workload.
	start func(ctx context.Context) error
}

// state is what a workload tells.
type state struct {
	IDs     []string  `json:"ids"`
	Serials []string  `json:"serials"`
	Since   time.Time `json:"since"`
	Code    string    `json:"code"`
	Why     string    `json:"why"`
	CodeAt  time.Time `json:"code_at"`
}

// serial is that of the SVID for an ID, empty if there is none.
func (s state) serial(id string) string {
	if i := slices.Index(s.IDs, id); i >= 0 {
		return s.Serials[i]
	}
	return ""
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// cleanup has what close returns be an error of the test.
func cleanup(t *testing.T, what func() error) {
	t.Cleanup(func() {
		if err := what(); err != nil {
			t.Error(err)
		}
	})
}

// eventually asks until there is no error.
func eventually(t *testing.T, what string, ask func() error) {
	t.Helper()
	err := until(t.Context(), what, ask)
	if err != nil {
		t.Fatal(err)
	}
}

func until(ctx context.Context, what string, ask func() error) error {
	end := time.After(patience)
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-end:
			return fmt.Errorf("not within %v: %s: %w", patience, what, err)
		case <-ctx.Done():
			return fmt.Errorf("%s: %w: %w", what, ctx.Err(), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// newWorld has everything but agents.
func newWorld(t *testing.T) *world {
	t.Helper()
	for what, available := range map[string]func() error{
		"hosts of their own": hosts.Available, "a real systemd": machine.Available, "Podman": podman.Available, "a software TPM": swtpm.Available,
	} {
		if err := available(); err != nil {
			lab.Missing(t, what, err)
		}
	}
	w := &world{t: t, bin: filepath.Join("..", "..", "bin")}
	// Not t.TempDir, into which other users cannot look.
	dir, err := os.MkdirTemp("", "labhosts") //nolint:usetesting // as said
	must(t, err)
	cleanup(t, func() error { return os.RemoveAll(dir) })
	s, err := site.New(dir, w.bin)
	must(t, err)
	w.site = s
	// Where other users can run it.
	w.app = filepath.Join(dir, "app")
	text, err := os.ReadFile(filepath.Join(w.bin, "labhosts", "app"))
	must(t, err)
	must(t, os.WriteFile(w.app, text, 0o755))
	w.network, err = hosts.New()
	if err != nil {
		lab.Missing(t, "hosts of their own", err)
	}
	cleanup(t, w.network.Close)
	w.server = w.host("server")
	s.Address, s.Netns, s.LogLevel = w.server.Addr, w.server.Netns(), "info"
	return w
}

func (w *world) host(name string) *hosts.Host {
	w.t.Helper()
	h, err := w.network.Host(name)
	must(w.t, err)
	return h
}

// startServer starts the server with a judge for each kind of node.
func (w *world) startServer(guests []*guest) {
	w.t.Helper()
	roots, err := w.tpms.Roots()
	must(w.t, err)
	region, err := filepath.Abs("../../attestor/awsiid/testdata/us-east-1.pem")
	must(w.t, err)
	machines, err := filepath.Abs("../../attestor/x509pop/testdata/real-root.pem")
	must(w.t, err)
	w.site.ServerBlocks = fmt.Sprintf(`
node_attestor "join_token" {}
node_attestor "x509pop" {
  ca_bundle_path = %q
}
node_attestor "tpm" {
  ek_ca_path = %q
  pcrs       = [0, 7]
}
node_attestor "vsphere" {
%s}
node_attestor "aws_iid" {
  account_ids         = ["123456789012"]
  region_certificates = { "us-east-1" = %q }
  instance_roles      = ["web"]
  require_proof       = true
  lookup_instance     = true
  assume_role         = "assay-lookup"
  external_id         = "of-assay"
  access_key_id       = "AKIASERVER"
  secret_access_key   = "s3cret"
  sts_endpoint        = "http://127.0.0.1:8100"
  ec2_endpoint        = "http://127.0.0.1:8100"
  iam_endpoint        = "http://127.0.0.1:8100"
}
telemetry {
  prometheus {
    port = 9989
  }
}
`, machines, roots, w.vCenterBlock(), region)
	for _, g := range guests {
		w.site.ServerBlocks += g.judge
	}
	must(w.t, w.site.StartServer(w.t.Context()))
	cleanup(w.t, w.site.Stop)
	w.bundle, err = w.site.WriteBundle(w.t.Context())
	must(w.t, err)
}

// vCenterBlock is how the server knows the vCenter.
func (w *world) vCenterBlock() string {
	return fmt.Sprintf(`  vcenter_url        = "https://%s"
  username           = %q
  password_file      = %q
  ca_path            = %q
  folders            = ["/DC0/vm"]
  require_secure_rpc = true
`, w.center.URL.Host, vcenter.Username, w.password, w.center.CA)
}

// cli runs a command of the server.
func (w *world) cli(t *testing.T, args ...string) string {
	t.Helper()
	out, err := w.site.ServerCLI(t.Context(), args...)
	must(t, err)
	return out
}

// entry makes an entry for a node's workload.
func (w *world) entry(t *testing.T, n *node, id string, more ...string) {
	t.Helper()
	args := []string{"entry", "create", "-parentID", n.id, "-spiffeID", id}
	for _, s := range n.selectors {
		args = append(args, "-selector", s)
	}
	w.cli(t, append(args, more...)...)
}

// joined waits for the node's agent and learns its ID and selectors.
func (w *world) joined(ctx context.Context, n *node) error {
	return until(ctx, n.name+" has joined", func() error {
		out, err := w.site.ServerCLI(ctx, "agent", "list", "-output", "json")
		if err != nil {
			return err
		}
		var list struct {
			Agents []struct {
				ID        struct{ Path string }
				Selectors []struct{ Type, Value string }
			}
		}
		if err := json.Unmarshal([]byte(out), &list); err != nil {
			return err
		}
		for _, a := range list.Agents {
			if !strings.HasPrefix(a.ID.Path, "/spire/agent/"+n.kind+"/") {
				continue
			}
			n.id = domain + a.ID.Path
			for _, s := range a.Selectors {
				n.proved = append(n.proved, s.Type+":"+s.Value)
			}
			return nil
		}
		return errors.New("it is not among " + out)
	})
}

// demands has the agent's selectors hold one that begins so.
func (n *node) demands(t *testing.T, prefix string) {
	t.Helper()
	if prefix != "" && !slices.ContainsFunc(n.proved, func(s string) bool { return strings.HasPrefix(s, prefix) }) {
		t.Errorf("%s has the selectors %q", n.id, n.proved)
	}
}

// ask asks a workload.
func (n *node) ask(path string, into any) error {
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: n.host.Dial, DisableKeepAlives: true}}
	resp, err := client.Get("http://" + control + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return json.NewDecoder(resp.Body).Decode(into)
}

// until waits for what the workload is to say at path.
func (n *node) until(t *testing.T, path, what string, good func(state) bool) state {
	t.Helper()
	var s state
	eventually(t, n.name+": "+what, func() error {
		s = state{}
		if err := n.ask(path, &s); err != nil {
			return err
		}
		if !good(s) {
			return fmt.Errorf("it says %+v", s)
		}
		return nil
	})
	return s
}

// has waits until the workload has an identity.
func (n *node) has(t *testing.T, id string) state {
	t.Helper()
	return n.until(t, "/state", "have "+id, func(s state) bool { return s.serial(id) != "" })
}

// call has the workload call another's.
func (n *node) call(other *node) error {
	var said struct{ Peer, Heard, Error string }
	if err := n.ask("/call?addr="+url.QueryEscape(other.host.Addr+mtls), &said); err != nil {
		return err
	}
	if said.Error != "" || said.Peer != other.workload || said.Heard != "hello "+n.workload {
		return fmt.Errorf("from %s to %s: %+v", n.name, other.name, said)
	}
	return nil
}

// ready asks the agent as a probe does; the error is what it answers if it is not.
func (n *node) ready() error {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: n.host.Dial, DisableKeepAlives: true}}
	resp, err := client.Get("http://" + probes + "/ready")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, text)
	}
	return err
}

// metric reads one number of the metrics of whoever runs on the host.
func metric(h *hosts.Host, name string) (float64, error) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: h.Dial, DisableKeepAlives: true}}
	resp, err := client.Get("http://" + metrics + "/metrics")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			var n float64
			_, err := fmt.Sscan(rest, &n)
			return n, err
		}
	}
	return 0, fmt.Errorf("there is no %s", name)
}

// connected waits until the agent says whether it hears the server.
func (n *node) connected(t *testing.T, want float64) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s: assay_agent_connected is %v", n.name, want), func() error {
		got, err := metric(n.host, "assay_agent_connected")
		if err == nil && got != want {
			err = fmt.Errorf("it is %v", got)
		}
		return err
	})
}

// telemetry is the blocks of an agent whose metrics and probes are at their places.
const telemetry = "\ntelemetry {\n  prometheus {\n    host = \"127.0.0.1\"\n    port = 9989\n  }\n}\nhealth_checks {\n  listener_enabled = true\n  bind_address = \"127.0.0.1\"\n  bind_port = 8082\n}\n"

// unixByPath attests plain processes.
const unixByPath = "\nworkload_attestor \"unix\" {\n  discover_workload_path = true\n}\n"

// plainHost gives a node an agent of the site, and a workload that is a process of a user of its own.
func (w *world) plainHost(n *node, o site.AgentOptions, uid uint32) error {
	o.Netns, o.Trust = n.host.Netns(), w.trust()
	o.Blocks += telemetry
	a, err := w.site.NewAgent(w.t.Context(), n.name, o)
	if err != nil {
		return err
	}
	n.agent = a
	n.selectors = []string{fmt.Sprintf("unix:uid:%d", uid), "unix:path:" + w.app}
	var running *exec.Cmd
	n.start = func(context.Context) error {
		running = n.host.Command(context.Background(), w.app, "-stdin", "-control", control, "-listen", mtls)
		running.Args = slices.Insert(running.Args, 2, "--setuid", fmt.Sprint(uid), "--setgid", fmt.Sprint(uid))
		running.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+a.Socket)
		running.Stderr = os.Stderr
		if _, err := running.StdinPipe(); err != nil { // which ends with this process
			return err
		}
		return running.Start()
	}
	n.down = func(context.Context) error {
		if running != nil {
			_ = running.Process.Kill()
			_ = running.Wait()
			running = nil
		}
		return w.killAgent(n)
	}
	n.up = n.agent.Start
	return nil
}

// logs shows the ends of all logs if the test has failed.
func (w *world) logs() {
	if !w.t.Failed() {
		return
	}
	w.t.Logf("server:\n%s", site.Tail(w.site.ServerLog(), 30))
	for _, n := range w.nodes {
		if n.agent != nil {
			w.t.Logf("%s:\n%s", n.name, site.Tail(n.agent.Log, 30))
		}
	}
}

func (w *world) trust() string { return fmt.Sprintf("trust_bundle_path = %q", w.bundle) }

// killAgent ends an agent as a power cut does, and empties what a boot empties.
func (w *world) killAgent(n *node) error {
	if n.agent.Process == nil {
		return nil
	}
	n.agent.Kill()
	return errors.Join(os.RemoveAll(filepath.Dir(n.agent.Socket)), os.RemoveAll(filepath.Dir(n.agent.Admin)))
}

// serve serves HTTP on a host until the test ends.
func serve(t *testing.T, h *hosts.Host, address string, handler http.Handler) error {
	l, err := h.Listen("tcp", address)
	if err != nil {
		return err
	}
	s := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	go func() { _ = s.Serve(l) }() // until Close
	cleanup(t, s.Close)
	return nil
}
