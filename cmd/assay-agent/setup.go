package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
)

// connectTime is how long the server may take to answer the test of the connection.
const connectTime = 10 * time.Second

// host is what setup looks at: paths below a root, which tests put elsewhere.
type host struct{ root string }

func (h host) exists(path string) bool {
	_, err := os.Stat(filepath.Join(h.root, path))
	return err == nil
}

// vendor is who the firmware says made the machine.
func (h host) vendor() string {
	text, err := os.ReadFile(filepath.Join(h.root, "sys/class/dmi/id/sys_vendor"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// way is a way to prove something, and why it was chosen.
type way struct {
	Type string `json:"type"`
	Why  string `json:"why"`
}

// nodeWay finds how this machine can best prove what it is: what it was told first, then the strongest.
func (h host) nodeWay(token bool) (way, bool) {
	switch vendor := h.vendor(); {
	case token:
		return way{"join_token", "a join token was given"}, true
	case vendor == "Amazon EC2":
		return way{"aws_iid", "the firmware says Amazon EC2: its identity document and its role"}, true
	case strings.HasPrefix(vendor, "VMware") && h.exists("usr/bin/vmtoolsd"):
		return way{"vsphere", "the firmware says VMware and open-vm-tools are installed: a nonce through guestinfo"}, true
	case h.exists("etc/assay/node.pem") && h.exists("etc/assay/node.key"):
		return way{"x509pop", "/etc/assay/node.pem and node.key are there: the machine's own certificate"}, true
	case h.exists("dev/tpmrm0"):
		return way{"tpm", "/dev/tpmrm0 is there: the TPM's endorsement key, and what was booted"}, true
	}
	return way{}, false
}

// workloadWays finds what can be proved about processes here.
func (h host) workloadWays() []way {
	ways := []way{{"unix", "user, group and program of a process"}}
	if h.exists("run/systemd/system") {
		ways = append(ways, way{"systemd", "systemd runs here: the unit of a process"})
	}
	if h.exists("var/run/docker.sock") {
		ways = append(ways, way{"docker", "a Docker Engine listens at /var/run/docker.sock: image, labels and environment"})
	}
	return ways
}

// found is what setup says when it is done.
type found struct {
	Config    string `json:"config"`
	Node      way    `json:"node_attestor"`
	Workloads []way  `json:"workload_attestors"`
	Server    string `json:"server"`
	Reached   bool   `json:"reached"`
	Problem   string `json:"problem,omitempty"`
}

type setupFlags struct {
	config, root, trustDomain, address, bundle, token, node, dataDir string
	port                                                             int
	force, offline                                                   bool
}

func setup() *cobra.Command {
	f := new(setupFlags)
	var output cli.Output
	c := &cobra.Command{
		Use: "setup", Short: "Finds out where it runs and writes the configuration", Args: cli.NoArgs,
		Long: `Finds out where it runs (EC2, vSphere, a machine with a certificate or a TPM), writes a configuration that
proves that, and tests the connection to the server. What it cannot find out it takes from flags.`,
		Example: `  assay-agent setup -trustDomain example.org -serverAddress assay.example.org -trustBundle /etc/assay/bundle.pem`,
	}
	flags := c.Flags()
	flags.StringVar(&f.config, "config", defaultConfig, "File to write")
	flags.StringVar(&f.trustDomain, "trustDomain", "", "Trust domain of the server")
	flags.StringVar(&f.address, "serverAddress", "", "Host name or IP address of the server")
	flags.IntVar(&f.port, "serverPort", 8081, "TCP port of the server")
	flags.StringVar(&f.bundle, "trustBundle", "/etc/assay/bundle.pem", `File with the server's bundle, as "assay-server bundle show" prints it`)
	flags.StringVar(&f.token, "joinTokenFile", "", "File with a join token: prove the node by that")
	flags.StringVar(&f.node, "nodeAttestor", "", "How to prove the node, in place of what is found")
	flags.StringVar(&f.dataDir, "dataDir", "/var/lib/assay/agent", "Directory for what is kept over a restart")
	flags.BoolVar(&f.force, "force", false, "Replace the file if there is one; it is kept aside")
	flags.BoolVar(&f.offline, "offline", false, "Do not test the connection")
	flags.StringVar(&f.root, "root", "/", "Look for what is here below another directory")
	output.AddTo(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		result, err := f.run(c.Context())
		if err != nil {
			return err
		}
		if err := output.PrintValue(c, func(w io.Writer) error { return result.print(w) }, result); err != nil {
			return err
		}
		if result.Problem != "" {
			return &cli.Exit{Status: 1}
		}
		return nil
	}
	return c
}

func (f *setupFlags) run(ctx context.Context) (*found, error) {
	if f.trustDomain == "" || f.address == "" {
		return nil, errors.New("-trustDomain and -serverAddress are required: they cannot be found out here")
	}
	h := host{f.root}
	node, ok := h.nodeWay(f.token != "")
	if f.node != "" {
		node, ok = way{f.node, "it was asked for by -nodeAttestor"}, true
	}
	if !ok {
		return nil, errors.New("nothing here proves what this machine is: no EC2, no vSphere, no certificate, no TPM; " +
			`give it a join token ("assay-server token generate") in a file and name it with -joinTokenFile`)
	}
	result := &found{Config: f.config, Node: node, Workloads: h.workloadWays(), Server: net.JoinHostPort(f.address, strconv.Itoa(f.port))}
	if err := f.write(result); err != nil {
		return nil, err
	}
	if f.offline {
		return result, nil
	}
	if err := f.connect(ctx); err != nil {
		result.Problem = err.Error()
	} else {
		result.Reached = true
	}
	return result, nil
}

// text is the configuration.
func (f *setupFlags) text(result *found) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# Written by assay-agent setup. Every key there is: /usr/share/doc/assay-agent/agent.hcl.")
	line("agent {")
	line("  trust_domain      = %s", quote(f.trustDomain))
	line("  server_address    = %s", quote(f.address))
	line("  server_port       = %d", f.port)
	line("  data_dir          = %s", quote(f.dataDir))
	line("  trust_bundle_path = %s", quote(f.bundle))
	if f.token != "" {
		line("  join_token_file   = %s", quote(f.token))
	}
	line("}")
	line("")
	line("# %s", result.Node.Why)
	if result.Node.Type == "x509pop" {
		line("node_attestor \"x509pop\" {\n  private_key_path = \"/etc/assay/node.key\"\n  certificate_path = \"/etc/assay/node.pem\"\n}")
	} else {
		line("node_attestor %s {}", quote(result.Node.Type))
	}
	for _, w := range result.Workloads {
		line("")
		line("# %s", w.Why)
		line("workload_attestor %s {}", quote(w.Type))
	}
	return b.String()
}

// quote writes a string of HCL.
func quote(text string) string {
	return strings.NewReplacer("${", "$${", "%{", "%%{").Replace(strconv.Quote(text))
}

// write puts the configuration in place, once it is known to be right.
func (f *setupFlags) write(result *found) error {
	if _, err := os.Lstat(f.config); err == nil && !f.force {
		return fmt.Errorf("%s is there already; -force replaces it and keeps it aside", f.config)
	}
	if err := os.MkdirAll(filepath.Dir(f.config), 0o755); err != nil { //nolint:gosec // /etc/assay is for everybody to read
		return err
	}
	written := f.config + ".new"
	if err := os.WriteFile(written, []byte(f.text(result)), 0o600); err != nil {
		return err
	}
	if _, err := conf.LoadAgent(written, nodes(), workloads(), conf.Options{}); err != nil {
		_ = os.Remove(written)
		return fmt.Errorf("what was found makes no configuration: %w", err)
	}
	if err := os.Rename(f.config, f.config+".old"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Rename(written, f.config)
}

// connect does what the agent will do first: it reaches the server and knows it by its bundle.
func (f *setupFlags) connect(ctx context.Context) error {
	td, err := spiffeid.TrustDomainFromString(f.trustDomain)
	if err != nil {
		return err
	}
	bundle, err := x509bundle.Load(td, f.bundle)
	if err != nil {
		return fmt.Errorf("read %s: %w", f.bundle, err)
	}
	id, err := spiffeid.FromPath(td, "/spire/server")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, connectTime)
	defer cancel()
	config := tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(id))
	config.MinVersion, config.NextProtos = tls.VersionTLS12, []string{"h2"}
	conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", net.JoinHostPort(f.address, strconv.Itoa(f.port)))
	if err != nil {
		return fmt.Errorf("reach the server and know it by %s: %w", f.bundle, err)
	}
	return conn.Close()
}

func (r *found) print(w io.Writer) error {
	_, err := fmt.Fprintf(w, "Written      %s\nThe node     %s: %s\n", r.Config, r.Node.Type, r.Node.Why)
	for _, way := range r.Workloads {
		if err == nil {
			_, err = fmt.Fprintf(w, "Workloads    %s: %s\n", way.Type, way.Why)
		}
	}
	if err != nil {
		return err
	}
	switch {
	case r.Problem != "":
		_, err = fmt.Fprintf(w, "The server   %s: NOT reached: %s\n", r.Server, r.Problem)
	case r.Reached:
		_, err = fmt.Fprintf(w, "The server   %s: reached, and it is the one of the bundle\nNext         systemctl enable --now assay-agent\n", r.Server)
	default:
		_, err = fmt.Fprintf(w, "The server   %s: not tried\n", r.Server)
	}
	return err
}
