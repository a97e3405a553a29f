package main

import (
	"bytes"
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

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
)

// connectTime is how long the server may take to answer the test of the connection.
const connectTime = 10 * time.Second

// found is what setup says when it is done.
type found struct {
	Config    string `json:"config"`
	Node      way    `json:"node_attestor"`
	Workloads []way  `json:"workload_attestors"`
	Server    string `json:"server"`
	Reached   bool   `json:"reached"`
	Problem   string `json:"problem,omitempty"`
	// Unproved says why this machine cannot show now what proves it.
	Unproved string `json:"unproved,omitempty"`
	// Unit is what the package's unit does not let the agent have.
	Unit []string `json:"unit,omitempty"`
	// Missed is what would prove the machine if something were not missing.
	Missed string `json:"missed,omitempty"`

	replaced bool // there was a file before, so an agent may run with it
}

type setupFlags struct {
	config, root, trustDomain, address, bundle, token, node, dataDir, cluster string

	port                    int
	force, offline, askNone bool
}

func setup() *cobra.Command {
	f := new(setupFlags)
	var output cli.Output
	c := &cobra.Command{
		Use: "setup", Short: "Finds out where it runs and writes the configuration", Args: cli.NoArgs,
		Long: `Finds out where it runs (EC2, ECS, vSphere, Kubernetes, a machine with a certificate or a TPM), writes a
configuration that proves that, gathers what is to prove it, and tests the connection to the server. What it cannot
find out it takes from flags, or asks if it runs at a terminal. A file that is there is replaced only with -force, or
when the answer is yes. It ends with status 1 if there is nothing to show, or no server; the file is written then, too,
and the agent tries both again by itself. Status 1 is also what it ends with if the package's unit would hide from the
agent what the file names.`,
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
	flags.StringVar(&f.cluster, "cluster", "", "In Kubernetes: the name that the server has for the cluster")
	flags.BoolVar(&f.askNone, "noQuestions", false, "Ask nothing, even at a terminal")
	flags.BoolVar(&f.force, "force", false, "Replace the file if there is one; it is kept aside")
	flags.BoolVar(&f.offline, "offline", false, "Do not test the connection")
	flags.StringVar(&f.root, "root", "/", "Look for what is here below another directory")
	output.AddTo(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		var a *asker
		if !f.askNone {
			a = newAsker(c)
		}
		result, err := f.run(c, a)
		if err != nil {
			return err
		}
		if err := output.PrintValue(c, func(w io.Writer) error { return result.print(w) }, result); err != nil {
			return err
		}
		if result.Problem != "" || result.Unproved != "" || len(result.Unit) > 0 {
			return &cli.Exit{Status: 1}
		}
		return nil
	}
	return c
}

func (f *setupFlags) run(c *cobra.Command, a *asker) (*found, error) {
	h := host{f.root, os.Getenv}
	ways := h.nodeWays(f.cluster)
	if a != nil {
		if err := f.fill(c, a, ways); err != nil {
			return nil, err
		}
		ways = h.nodeWays(f.cluster)
	}
	if err := f.absolute(); err != nil {
		return nil, err
	}
	if f.trustDomain == "" || f.address == "" {
		return nil, errors.New("-trustDomain and -serverAddress are required: they cannot be found out here")
	}
	node, err := f.choose(ways, h.missed())
	if err != nil {
		return nil, err
	}
	result := &found{
		Config: f.config, Node: node, Workloads: h.workloadWays(), Server: net.JoinHostPort(f.address, strconv.Itoa(f.port)),
		Unit: f.unit(h), Missed: h.missed(),
	}
	written, err := f.write(result, a)
	if err != nil {
		return nil, err
	}
	if f.offline {
		return result, nil
	}
	if f.root == "/" {
		if err := gather(c.Context(), written); err != nil {
			result.Unproved = err.Error()
		}
	}
	if err := f.connect(c.Context()); err != nil {
		result.Problem = err.Error()
	} else {
		result.Reached = true
	}
	return result, nil
}

// choose chooses how to prove the node: what was asked for, then the best of what was found.
func (f *setupFlags) choose(ways []way, missed string) (way, error) {
	if f.token != "" && (f.node == "" || f.node == "join_token") {
		return nodeWay("join_token", "a join token was given"), nil
	}
	if f.node == "" {
		if len(ways) == 0 {
			if missed != "" {
				missed = " (" + missed + ")"
			}
			return way{}, errors.New(nothingSeen + missed + `; give it a join token ("assay-server token generate") in a file and name it with -joinTokenFile`)
		}
		f.node = ways[0].Type
	}
	if f.node == "k8s_psat" && f.cluster == "" {
		return way{}, errors.New("-cluster is required: which name the server has for this cluster cannot be found out here")
	}
	for _, w := range ways {
		if w.Type == f.node {
			return w, nil
		}
	}
	const why = "it was asked for by -nodeAttestor"
	if f.node == "k8s_psat" { // for a pod elsewhere
		return nodeWay(f.node, why, "cluster = "+quote(f.cluster)), nil
	}
	return nodeWay(f.node, why), nil
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
	block := func(role string, w way) {
		if len(w.Body) == 0 {
			line("%s %s {}", role, quote(w.Type))
			return
		}
		line("%s %s {\n  %s\n}", role, quote(w.Type), strings.Join(w.Body, "\n  "))
	}
	block("node_attestor", result.Node)
	for _, w := range result.Workloads {
		line("")
		line("# %s", w.Why)
		block("workload_attestor", w)
	}
	return b.String()
}

// quote writes a string of HCL.
func quote(text string) string {
	return strings.NewReplacer("${", "$${", "%{", "%%{").Replace(strconv.Quote(text))
}

// write puts the configuration in place, once it is known to be right.
func (f *setupFlags) write(result *found, a *asker) (*conf.Agent, error) {
	_, err := os.Lstat(f.config)
	result.replaced = err == nil
	if result.replaced && !f.force {
		replace := false
		if a != nil {
			kept, _, err := aside(f.config)
			if err != nil {
				return nil, err
			}
			if replace, err = a.confirm(f.config + " is there already. Replace it, and keep it as " + kept + "?"); err != nil {
				return nil, err
			}
		}
		if !replace {
			return nil, fmt.Errorf("%s is there already; -force replaces it and keeps it aside", f.config)
		}
	}
	if err := os.MkdirAll(filepath.Dir(f.config), 0o755); err != nil { //nolint:gosec // /etc/assay is for everybody to read
		return nil, err
	}
	written := f.config + ".new"
	if err := os.WriteFile(written, []byte(f.text(result)), 0o600); err != nil {
		return nil, err
	}
	// As "validate" does; attestors of a machine below another root cannot be opened here.
	options := conf.Options{Try: f.root == "/", TryBundle: tryBundle, Set: f.settings()}
	agent, err := conf.LoadAgent(written, nodes(), workloads(), options)
	if err != nil {
		_ = os.Remove(written)
		return nil, fmt.Errorf("no configuration can be made of it: %w", f.told(err, written, result.Node.Type))
	}
	if result.replaced {
		kept, there, err := aside(f.config)
		if err == nil && !there {
			err = os.Rename(f.config, kept)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return agent, os.Rename(written, f.config)
}

// maxAside is how many files are kept aside at most.
const maxAside = 1000

// aside returns under which name a file is to be kept that is replaced: one that nothing else has, for what was kept
// first is what somebody may want back, or the one under which the same is kept there already.
func aside(path string) (name string, there bool, err error) {
	now, unread := os.ReadFile(path)
	for n := 1; n <= maxAside; n++ {
		name = path + ".old"
		if n > 1 {
			name += "." + strconv.Itoa(n)
		}
		if _, err := os.Lstat(name); errors.Is(err, os.ErrNotExist) {
			return name, false, nil
		}
		if kept, err := os.ReadFile(name); err == nil && unread == nil && bytes.Equal(kept, now) {
			return name, true, nil
		}
	}
	return "", false, fmt.Errorf("%s cannot be kept aside: there are %d files already from %s.old on; remove those that nobody needs", path, maxAside, path)
}

// gather does what the agent will do next: it gathers what proves this machine, and shows it to nobody.
func gather(ctx context.Context, from *conf.Agent) error {
	ctx, cancel := context.WithTimeout(ctx, connectTime)
	defer cancel()
	log := logrus.New()
	log.SetOutput(io.Discard)
	node, err := from.Node.Kind.Open(from.Node.Config, attestor.Needs{
		TrustDomain: from.TrustDomain, Log: log, Now: time.Now, JoinToken: from.JoinToken,
	})
	if err != nil {
		return err
	}
	_, _, err = node.Evidence(ctx)
	return err
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
	config := tlsconfig.TLSClientConfig(only{bundle}, tlsconfig.AuthorizeID(id))
	config.MinVersion, config.NextProtos = tls.VersionTLS12, []string{"h2"}
	conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", net.JoinHostPort(f.address, strconv.Itoa(f.port)))
	if err != nil {
		return fmt.Errorf("reach the server and know it by %s: %w", f.bundle, err)
	}
	return conn.Close()
}

// only is the bundle of one trust domain; whoever says to be of another is told apart.
type only struct{ bundle *x509bundle.Bundle }

func (o only) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if want := o.bundle.TrustDomain(); td != want {
		return nil, fmt.Errorf("it says that it is of trust domain %s, and %s was given", td, want)
	}
	return o.bundle, nil
}

// next is how the agent comes to run with the file. One that runs already does not read it by itself.
func (r *found) next() string {
	if r.replaced {
		return "systemctl enable assay-agent; systemctl restart assay-agent"
	}
	return "systemctl enable --now assay-agent"
}

func (r *found) print(w io.Writer) error {
	_, err := fmt.Fprintf(w, "Written      %s\nThe node     %s: %s\nIt proves    %s\n", r.Config, r.Node.Type, r.Node.Why, r.Node.Proves)
	if err == nil && r.Unproved != "" {
		_, err = fmt.Fprintf(w, "             NOT shown now: %s\n", r.Unproved)
	}
	if err == nil && r.Missed != "" {
		_, err = fmt.Fprintf(w, "Not used     %s\n", r.Missed)
	}
	for _, way := range r.Workloads {
		if err == nil {
			_, err = fmt.Fprintf(w, "Workloads    %s: %s\n", way.Type, way.Why)
		}
	}
	for _, problem := range r.Unit {
		if err == nil {
			_, err = fmt.Fprintf(w, "The unit     will NOT run with it: %s\n", problem)
		}
	}
	if err != nil {
		return err
	}
	switch {
	case r.Problem != "":
		_, err = fmt.Fprintf(w, "The server   %s: NOT reached: %s\n", r.Server, r.Problem)
	case r.Reached:
		_, err = fmt.Fprintf(w, "The server   %s: reached, and it is the one of the bundle\n", r.Server)
		if err == nil && r.Unproved == "" && len(r.Unit) == 0 {
			_, err = fmt.Fprintln(w, "Next         "+r.next())
		}
	default:
		_, err = fmt.Fprintf(w, "The server   %s: not tried\n", r.Server)
	}
	return err
}
