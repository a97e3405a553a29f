package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/workloadapi/identity"
)

// startTime is how long the parts may take to be up; a laptop under load is slow.
const startTime = time.Minute

// developer is one run of "assay dev".
type developer struct {
	dir   string // everything is below it
	kept  bool   // the operator chose dir, so it stays
	td    spiffeid.TrustDomain
	log   *logrus.Logger
	out   io.Writer
	me    spiffeid.ID // the caller's identity
	uid   int
	ready struct{ server, agent chan struct{} }
	tcp   net.Addr // valid once ready.server is closed
}

func dev() *cobra.Command {
	var dataDir, trustDomain, logLevel string
	c := &cobra.Command{
		Use: "dev", Short: "Runs a server, an agent and your own processes as workloads, until Ctrl-C", Args: cli.NoArgs,
		Long: `Runs a server and an agent in one process, without root and without Docker, and registers the
processes of your user as a workload. Any SPIFFE client finds its Workload API through the
environment variable that it prints. Everything is in a new folder that goes away at the end, or
stays in the one that -dataDir names.`,
		RunE: func(c *cobra.Command, _ []string) error {
			d, err := newDeveloper(c, dataDir, trustDomain, logLevel)
			if err != nil {
				return err
			}
			if !d.kept {
				defer d.remove()
			}
			ctx, stop := signal.NotifyContext(c.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return d.run(ctx, stop)
		},
	}
	c.Flags().StringVar(&dataDir, "dataDir", "", "Folder to keep everything in over runs; a temporary one without it")
	c.Flags().StringVar(&trustDomain, "trustDomain", "dev.assay", "Trust domain")
	c.Flags().StringVar(&logLevel, "logLevel", "warn", "debug, info, warn or error")
	return c
}

func newDeveloper(c *cobra.Command, dataDir, trustDomain, logLevel string) (*developer, error) {
	syscall.Umask(0o077)
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return nil, fmt.Errorf("-trustDomain %q: %w", trustDomain, err)
	}
	level, err := logrus.ParseLevel(logLevel)
	if err != nil {
		return nil, fmt.Errorf("-logLevel %q is unknown; there are debug, info, warn and error", logLevel)
	}
	d := &developer{td: td, log: logrus.New(), out: c.OutOrStdout(), uid: os.Getuid(), kept: dataDir != ""}
	d.log.SetLevel(level)
	d.log.SetOutput(c.ErrOrStderr())
	d.ready.server, d.ready.agent = make(chan struct{}), make(chan struct{})
	if d.me, err = spiffeid.FromSegments(td, "user", userName(d.uid)); err != nil {
		return nil, fmt.Errorf("name the caller's identity: %w", err)
	}
	if d.kept {
		if d.dir, err = filepath.Abs(dataDir); err == nil {
			err = os.MkdirAll(d.dir, 0o700)
		}
	} else {
		d.dir, err = os.MkdirTemp("", "assay-dev-")
	}
	if err != nil {
		return nil, fmt.Errorf("make the folder: %w", err)
	}
	return d, nil
}

var notInPath = regexp.MustCompile(`[^A-Za-z0-9._-]`)

// userName returns the caller's name as it can be in a SPIFFE ID, or the uid in digits.
func userName(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		if name := notInPath.ReplaceAllString(u.Username, "-"); strings.Trim(name, ".") != "" {
			return name
		}
	}
	return strconv.Itoa(uid)
}

func (d *developer) serverSocket() string { return filepath.Join(d.dir, "server", "api.sock") }
func (d *developer) agentSocket() string  { return filepath.Join(d.dir, "agent", "public", "api.sock") }
func (d *developer) adminSocket() string {
	return filepath.Join(d.dir, "agent", "private", "admin.sock")
}

// run starts the parts one after the other and stays until ctx ends.
func (d *developer) run(ctx context.Context, stop func()) error {
	group, inner := errgroup.WithContext(ctx)
	group.Go(func() error { return named("server", server.Run(inner, d.serverConfig())) })
	group.Go(func() error {
		start, cancel := context.WithTimeout(inner, startTime)
		defer cancel()
		config, err := d.prepare(start)
		if err != nil {
			return d.unless(inner, err)
		}
		group.Go(func() error { return named("agent", agent.Run(inner, config)) })
		svid, err := d.fetch(start)
		if err != nil {
			return d.unless(inner, err)
		}
		d.tell(svid)
		<-inner.Done()
		stop() // a second Ctrl-C ends it at once
		return nil
	})
	err := group.Wait()
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		fmt.Fprintln(d.out, "Stopped.")
		return nil
	}
	return err
}

// unless returns err, or nil if it is only that the whole is being stopped.
func (d *developer) unless(ctx context.Context, err error) error {
	if stopped := ctx.Err(); stopped == nil {
		return err
	}
	return nil
}

// remove removes the temporary folder.
func (d *developer) remove() {
	if err := os.RemoveAll(d.dir); err != nil {
		d.log.WithError(err).Warn("cannot remove the folder")
	}
}

func named(part string, err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return nil
	}
	return fmt.Errorf("%s: %w", part, err)
}

func (d *developer) serverConfig() server.Config {
	c := server.Defaults()
	c.TrustDomain = d.td
	c.BindAddress, c.BindPort = "127.0.0.1", 0
	c.SocketPath, c.DataDir = d.serverSocket(), filepath.Join(d.dir, "server", "data")
	kind := judgeKind()
	c.Judges = []server.Judge{{Kind: kind, Config: kind.Config()}}
	c.Log = d.log.WithField("part", "server")
	c.Ready = func(r server.Running) {
		d.tcp = r.Address
		close(d.ready.server)
	}
	return c
}

// prepare waits for the server, registers the caller and returns what the agent needs.
func (d *developer) prepare(ctx context.Context) (agent.Config, error) {
	c := agent.Defaults()
	if err := wait(ctx, d.ready.server, "the server to start"); err != nil {
		return c, err
	}
	conn, err := grpc.NewClient("unix://"+d.serverSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return c, err
	}
	defer func() { _ = conn.Close() }()
	node := &types.SPIFFEID{TrustDomain: d.td.Name(), Path: "/node"}
	token, err := agentv1.NewAgentClient(conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 600, AgentId: node})
	if err != nil {
		return c, fmt.Errorf("make join token: %w", err)
	}
	made, err := entryv1.NewEntryClient(conn).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		SpiffeId: identity.IDWire(d.me), ParentId: node,
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:" + strconv.Itoa(d.uid)}},
		DnsNames:  []string{"localhost"},
	}}})
	if err != nil {
		return c, fmt.Errorf("make entry: %w", err)
	}
	for _, r := range made.GetResults() {
		if code := codes.Code(uint32(r.GetStatus().GetCode())); code != codes.OK && code != codes.AlreadyExists { //nolint:gosec // codes are small
			return c, fmt.Errorf("make entry: %s", r.GetStatus().GetMessage())
		}
	}
	bundle, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return c, fmt.Errorf("read bundle: %w", err)
	}
	for _, a := range bundle.GetX509Authorities() {
		cert, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			return c, fmt.Errorf("read bundle: %w", err)
		}
		c.TrustBundle = append(c.TrustBundle, cert)
	}
	return d.agentConfig(c, token.GetValue())
}

func (d *developer) agentConfig(c agent.Config, token string) (agent.Config, error) {
	c.TrustDomain = d.td
	host, port, err := net.SplitHostPort(d.tcp.String())
	if err != nil {
		return c, fmt.Errorf("find the server's port: %w", err)
	}
	c.ServerAddress = host
	if c.ServerPort, err = strconv.Atoi(port); err != nil {
		return c, fmt.Errorf("find the server's port: %w", err)
	}
	c.DataDir = filepath.Join(d.dir, "agent", "data")
	c.SocketPath, c.AdminSocketPath = d.agentSocket(), d.adminSocket()
	log := d.log.WithField("part", "agent")
	needs := attestor.Needs{TrustDomain: d.td, Log: log, Now: time.Now, JoinToken: token}
	node := nodeKind()
	c.NodeAttestor.Type = node.Type
	if c.NodeAttestor.Node, err = node.Open(node.Config(), needs); err != nil {
		return c, fmt.Errorf("open node attestor: %w", err)
	}
	kind := workloadKind()
	w, err := kind.Open(kind.Config(), needs)
	if err != nil {
		return c, fmt.Errorf("open workload attestor: %w", err)
	}
	c.WorkloadAttestors = []agent.WorkloadAttestor{{Type: kind.Type, Workload: w}}
	c.Log, c.Version = log, cli.VersionText()
	c.Ready = func() { close(d.ready.agent) }
	return c, nil
}

// fetch gets the caller's identity as any of the caller's processes would, so that what is printed is
// what was tried.
func (d *developer) fetch(ctx context.Context) (*x509svid.SVID, error) {
	if err := wait(ctx, d.ready.agent, "the agent to start"); err != nil {
		return nil, err
	}
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+d.agentSocket()))
	if err != nil {
		return nil, fmt.Errorf("fetch own identity: %w", err)
	}
	return svid, nil
}

// wait waits until a part is up, and says so when it takes long.
func wait(ctx context.Context, up <-chan struct{}, what string) error {
	done := cli.Patience(os.Stderr, "waiting for "+what)
	defer done()
	select {
	case <-up:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for %s: %w", what, ctx.Err())
	}
}

func (d *developer) tell(svid *x509svid.SVID) {
	fmt.Fprintf(d.out, `assay dev is up, trust domain %s
  server at %s, agent on this machine
  your processes (unix:uid:%d) are %s
  one was fetched just now, valid until %s

Tell your programs, and the two commands below, where to look:

export SPIFFE_ENDPOINT_SOCKET=unix://%s
export ASSAY_SERVER_PRIVATE_SOCKET=%s
export ASSAY_AGENT_ADMIN_SOCKET=%s

Then try:
`, d.td, d.tcp, d.uid, svid.ID, svid.Certificates[0].NotAfter.Local().Format(time.TimeOnly),
		d.agentSocket(), d.serverSocket(), d.adminSocket())
	folder := besideUs()
	for _, command := range []string{
		"assay-agent api fetch x509", "assay-agent api fetch jwt -audience test", "assay-agent api watch", "assay-agent explain -pid $$",
		"assay-server entry show",
		fmt.Sprintf("assay-server entry create -parentID spiffe://%s/node -spiffeID spiffe://%s/other -selector unix:uid:%d", d.td, d.td, d.uid),
	} {
		fmt.Fprintf(d.out, "  %s%s\n", folder, command)
	}
	fmt.Fprintln(d.out)
	if d.kept {
		fmt.Fprintf(d.out, "Ctrl-C ends it; %s stays.\n", d.dir)
	} else {
		fmt.Fprintf(d.out, "Ctrl-C ends it and removes %s.\n", d.dir)
	}
}

// besideUs is the folder that was typed before this command's name, with its slash, if the other commands
// are there too, as after "make"; else they are on the PATH or have to be found.
func besideUs() string {
	folder, _ := filepath.Split(os.Args[0])
	if _, err := os.Stat(filepath.Join(folder, "assay-agent")); folder == "" || err != nil { //nolint:gosec // it is only looked at
		return ""
	}
	return folder
}
