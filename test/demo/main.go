// Command demo shows the main job on the built binaries, as an operator would do it by hand: a
// server, an agent, a container and a plain process that get their identities, use them, and lose
// them. Every step it prints, it has checked; it leaves nothing running and no file behind.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/site"
)

const (
	domain  = "spiffe://" + site.TrustDomain
	shop    = domain + "/shop"
	billing = domain + "/billing"
	// stepTime is the most one step may take before the demo gives up.
	stepTime = time.Minute
	// nobody is the user that the plain process runs as when the demo runs as root.
	nobody = 65534
)

func main() {
	bin := flag.String("bin", "bin", "folder with the built binaries")
	evidence := flag.Bool("evidence", false, "show image evidence instead: identity follows what is known of an image")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	steps, more := plain, plainMore
	if *evidence {
		steps, more = proved, provedMore
	}
	err := run(ctx, *bin, steps, more)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// demo is the state that the steps share.
type demo struct {
	*site.Site
	agent   *site.Agent
	node    string // the agent's SPIFFE ID path
	engine  *engine
	entries entryv1.EntryClient
	start   time.Time
	// cleanup is run in reverse order.
	cleanup []func()
}

const (
	plainMore = `  bin/assay dev                                  a server, an agent and your own processes, until Ctrl-C
  bin/assay-server run -config conf/server.hcl   the server, from its commented sample configuration
  bin/assay-agent explain -pid PID               why a process gets the identities it gets
  make demo-evidence                             identity follows what is known of an image
`
	provedMore = `  server/verdict/README.md                       how to set this up, what may be pushed, and what stands against whom
  server/verdict/policy/sample.hcl               every key of a scan policy; conf/server.hcl has the rest
  bin/assay-server evidence simulate -policy F   what another policy would do to what runs now, without doing it
`
)

// plain are the steps of the main job.
func plain(d *demo) []func(context.Context) error {
	return []func(context.Context) error{d.startServer, d.startAgent, d.runWorkloads}
}

func run(ctx context.Context, bin string, steps func(*demo) []func(context.Context) error, more string) (err error) {
	dir, err := os.MkdirTemp("", "assay-demo-")
	if err != nil {
		return err
	}
	d := &demo{start: time.Now()}
	d.later(func() { os.RemoveAll(dir) })
	defer func() {
		for _, undo := range slices.Backward(d.cleanup) {
			undo()
		}
	}()
	if d.Site, err = site.New(dir, bin); err != nil {
		return err
	}
	if err := d.findEngine(ctx); err != nil {
		return err
	}
	for _, step := range steps(d) {
		stepCtx, cancel := context.WithTimeout(ctx, stepTime)
		err := step(stepCtx)
		cancel()
		if err != nil {
			return err
		}
	}
	fmt.Printf("\nDone in %.0f s; nothing is left running. To go on:\n%s", time.Since(d.start).Seconds(), more)
	return nil
}

func (d *demo) later(f func()) { d.cleanup = append(d.cleanup, f) }

// say prints one finished step.
func (d *demo) say(format string, args ...any) {
	fmt.Printf("%6.2f s  %s\n", time.Since(d.start).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) startServer(ctx context.Context) error {
	if err := d.StartServer(ctx); err != nil {
		return err
	}
	d.later(func() { report(d.Stop()) })
	conn, err := d.DialServer()
	if err != nil {
		return err
	}
	d.later(func() { conn.Close() })
	d.entries = entryv1.NewEntryClient(conn)
	d.say("assay-server is healthy: trust domain %s, port %d", site.TrustDomain, d.Port)
	return nil
}

func (d *demo) startAgent(ctx context.Context) (err error) {
	if d.agent, d.node, err = d.join(ctx, "agent", ""); err != nil {
		return err
	}
	d.say("assay-agent joined with a token that is now spent, and serves the Workload API")
	return nil
}

// join starts an agent with a token of its own, under another ID beside its own if one is given.
func (d *demo) join(ctx context.Context, name, alias string) (agent *site.Agent, node string, err error) {
	var args []string
	if alias != "" {
		args = []string{"-spiffeID", alias}
	}
	token, err := d.Token(ctx, args...)
	if err != nil {
		return nil, "", err
	}
	blocks := "node_attestor \"join_token\" {}\nworkload_attestor \"unix\" {\n  discover_workload_path = true\n}\n"
	if d.engine != nil {
		blocks += fmt.Sprintf("workload_attestor \"docker\" {\n  docker_socket_path = %q\n}\n", d.engine.host())
	}
	if agent, err = d.NewAgent(ctx, name, site.AgentOptions{Token: token, Blocks: blocks}); err != nil {
		return nil, "", err
	}
	if err := agent.Start(ctx); err != nil {
		return nil, "", err
	}
	d.later(func() { report(agent.Stop(15 * time.Second)) })
	return agent, "/spire/agent/join_token/" + token, nil
}

func report(err error) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "demo: clean up: %v\n", err)
	}
}

// runWorkloads is the main job: identities given, used, changed and taken away.
func (d *demo) runWorkloads(ctx context.Context) error {
	program, shared, err := d.place()
	if err != nil {
		return err
	}

	user, as := os.Getuid(), (*syscall.Credential)(nil)
	if user == 0 {
		user, as = nobody, &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	if err := d.create(ctx, billing, fmt.Sprintf("unix:uid:%d", user), "unix:path:"+program); err != nil {
		return err
	}
	d.say("entry created: a process of uid %d that runs %s is %s", user, program, billing)
	server := newSeen()
	billingProcess, err := site.StartTo(server, "its output", as, d.environment(),
		program, "-peer", shop, "-listen", filepath.Join(shared, "mtls.sock"), "-audience", "demo", "-write", shared)
	if err != nil {
		return err
	}
	d.later(billingProcess.Kill)
	if err := d.fetched(ctx, "the plain process", server, billing); err != nil {
		return err
	}
	if _, err := server.next(ctx, "listening", nil); err != nil {
		return err
	}

	client := newSeen()
	shopEntry, err := d.startShop(ctx, client, program, shared, as)
	if err != nil {
		return err
	}
	if err := d.mutualTLS(ctx, client, server); err != nil {
		return err
	}
	if err := d.verify(ctx, shared); err != nil {
		return err
	}
	return d.changeAndDelete(ctx, shopEntry, client)
}

// startShop starts the second workload: a container if there is an engine, else another process.
func (d *demo) startShop(ctx context.Context, client *seen, program, shared string, as *syscall.Credential) (*types.Entry, error) {
	args := []string{"-peer", billing, "-audience", "demo", "-dial"}
	if d.engine == nil {
		other := filepath.Join(d.Dir, "shop")
		if err := os.Link(program, other); err != nil {
			return nil, err
		}
		if err := d.create(ctx, shop, "unix:path:"+other); err != nil {
			return nil, err
		}
		d.say("entry created: a process that runs %s is %s", other, shop)
		process, err := site.StartTo(client, "its output", as, d.environment(), other, append(args, filepath.Join(shared, "mtls.sock"))...)
		if err != nil {
			return nil, err
		}
		d.later(process.Kill)
		if err := d.fetched(ctx, "the second process", client, shop); err != nil {
			return nil, err
		}
		return d.entry(ctx, shop)
	}
	image, err := d.engine.build(ctx, program)
	if err != nil {
		return nil, err
	}
	d.later(func() { report(d.engine.RemoveImage(context.WithoutCancel(ctx), image)) })
	d.say("image built FROM scratch: %s", image)
	if err := d.create(ctx, shop, "docker:label:app:shop", "docker:image_config_digest:"+image); err != nil {
		return nil, err
	}
	d.say("entry created: a container with label app=shop that runs this very image is %s", shop)
	process, err := d.engine.run(ctx, client, image, filepath.Dir(d.agent.Socket), shared, append(args, "/shared/mtls.sock")...)
	if err != nil {
		return nil, err
	}
	d.later(process.Kill)
	if err := d.fetched(ctx, "the container", client, shop); err != nil {
		return nil, err
	}
	return d.entry(ctx, shop)
}

// place puts the workloads' program, and a folder that they share, where they can reach them.
func (d *demo) place() (program, shared string, err error) {
	program, shared = filepath.Join(d.Dir, "workload"), filepath.Join(d.Dir, "shared")
	if err := copyProgram(filepath.Join(d.Bin, "demo", "workload"), program); err != nil {
		return "", "", err
	}
	if err := os.MkdirAll(shared, 0o777); err != nil {
		return "", "", err
	}
	return program, shared, os.Chmod(shared, 0o777)
}

func (d *demo) environment() []string {
	return []string{"SPIFFE_ENDPOINT_SOCKET=unix://" + d.agent.Socket}
}

// create makes an entry with the command line.
func (d *demo) create(ctx context.Context, id string, selectors ...string) error {
	args := []string{"entry", "create", "-spiffeID", id, "-parentID", domain + d.node}
	for _, s := range selectors {
		args = append(args, "-selector", s)
	}
	_, err := d.ServerCLI(ctx, args...)
	return err
}

// entry finds the one entry with a SPIFFE ID.
func (d *demo) entry(ctx context.Context, id string) (*types.Entry, error) {
	resp, err := d.entries.ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{
		BySpiffeId: &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: strings.TrimPrefix(id, domain)}}})
	if err != nil {
		return nil, err
	}
	if n := len(resp.GetEntries()); n != 1 {
		return nil, fmt.Errorf("find the entry of %s: there are %d", id, n)
	}
	return resp.GetEntries()[0], nil
}

// fetched checks that a workload has both its identities.
func (d *demo) fetched(ctx context.Context, who string, s *seen, id string) error {
	svid, err := s.next(ctx, "svid", nil)
	if err != nil {
		return fmt.Errorf("wait for the X509-SVID of %s: %w", who, err)
	}
	if svid.ID != id {
		return fmt.Errorf("%s got an X509-SVID for %s, want %s", who, svid.ID, id)
	}
	d.say("%s has its X509-SVID: %s, serial %s", who, svid.ID, svid.Serial)
	token, err := s.next(ctx, "jwt", nil)
	if err != nil {
		return fmt.Errorf("wait for the JWT-SVID of %s: %w", who, err)
	}
	if token.ID != id {
		return fmt.Errorf("%s got a JWT-SVID for %s, want %s", who, token.ID, id)
	}
	d.say("%s has its JWT-SVID for audience %q, and the agent validated it", who, token.Audience)
	return nil
}

func (d *demo) mutualTLS(ctx context.Context, client, server *seen) error {
	called, err := client.next(ctx, "called", nil)
	if err != nil {
		return fmt.Errorf("mTLS, client's side: %w", err)
	}
	served, err := server.next(ctx, "served", nil)
	if err != nil {
		return fmt.Errorf("mTLS, server's side: %w", err)
	}
	if called.Peer != billing || served.Peer != shop || called.ID != shop {
		return fmt.Errorf("mTLS between the wrong ones: client saw %s, server saw %s", called.Peer, served.Peer)
	}
	d.say("mTLS between them: %s saw %s, and the other way round", shop, billing)
	return nil
}

func (d *demo) verify(ctx context.Context, shared string) error {
	openssl, err := site.Tool("openssl")
	if errors.Is(err, site.ErrNoTool) {
		d.say("openssl is not installed: the chain is not checked with it")
		return nil
	} else if err != nil {
		return err
	}
	_, err = site.Run(ctx, nil, openssl, "verify", "-x509_strict", "-purpose", "sslserver",
		"-CAfile", filepath.Join(shared, "bundle.pem"), filepath.Join(shared, "svid.pem"))
	if err != nil {
		return err
	}
	d.say("openssl verifies the plain process's certificate against its bundle")
	return nil
}

func (d *demo) changeAndDelete(ctx context.Context, e *types.Entry, client *seen) error {
	e.DnsNames = []string{"shop.example.org"}
	asked := time.Now()
	updated, err := d.entries.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		return err
	}
	if s := updated.GetResults()[0].GetStatus(); s.GetCode() != 0 {
		return fmt.Errorf("update the entry: %s", s.GetMessage())
	}
	changed, err := client.next(ctx, "svid", func(e event) bool { return e.DNS == "shop.example.org" })
	if err != nil {
		return fmt.Errorf("wait for the changed SVID: %w", err)
	}
	d.say("entry changed: %.1f ms after the call was made the workload has the new SVID, with DNS name %s",
		ms(changed.At-asked.UnixNano()), changed.DNS)

	asked = time.Now()
	deleted, err := d.entries.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{e.GetId()}})
	if err != nil {
		return err
	}
	if s := deleted.GetResults()[0].GetStatus(); s.GetCode() != 0 {
		return fmt.Errorf("delete the entry: %s", s.GetMessage())
	}
	gone, err := client.next(ctx, "denied", nil)
	if err != nil {
		return fmt.Errorf("wait for the identity to be gone: %w", err)
	}
	if !strings.Contains(gone.Error, "PermissionDenied") {
		return fmt.Errorf("the stream ended, but not with PermissionDenied: %s", gone.Error)
	}
	d.say("entry deleted: %.1f ms after the call was made the workload is told that it has no identity", ms(gone.At-asked.UnixNano()))
	return nil
}

func ms(nanoseconds int64) float64 { return float64(nanoseconds) / 1e6 }

// copyProgram copies the application that knows nothing but a socket to where both workloads may run
// it: the folder it was built in may be closed to other users.
func copyProgram(from, to string) error {
	text, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("find the demo's workload: %w (make demo builds it)", err)
	}
	return os.WriteFile(to, text, 0o755)
}

// event is what the workload prints; see test/demo/workload.
type event struct {
	Event    string `json:"event"`
	At       int64  `json:"at"`
	ID       string `json:"id"`
	Serial   string `json:"serial"`
	DNS      string `json:"dns"`
	Peer     string `json:"peer"`
	Audience string `json:"audience"`
	Error    string `json:"error"`
}

// seen collects a workload's events from its standard output.
type seen struct {
	mu     sync.Mutex
	rest   []byte        // of an unfinished line
	events []event       // not yet taken
	wake   chan struct{} // closed and replaced when events grows
}

func newSeen() *seen { return &seen{wake: make(chan struct{})} }

var _ io.Writer = (*seen)(nil)

func (s *seen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rest = append(s.rest, p...)
	for {
		line, rest, found := bytes.Cut(s.rest, []byte("\n"))
		if !found {
			break
		}
		s.rest = rest
		var e event
		if json.Unmarshal(line, &e) != nil {
			e = event{Event: "error", Error: "unexpected output: " + string(line)}
		}
		s.events = append(s.events, e)
	}
	close(s.wake)
	s.wake = make(chan struct{})
	return len(p), nil
}

// add takes an event that is none of a workload's.
func (s *seen) add(e event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
	close(s.wake)
	s.wake = make(chan struct{})
}

// next takes the first event of a kind that is good, and those before it of the same kind.
func (s *seen) next(ctx context.Context, kind string, good func(event) bool) (event, error) {
	for {
		s.mu.Lock()
		for i := 0; i < len(s.events); i++ {
			e := s.events[i]
			if e.Event == "error" {
				s.mu.Unlock()
				return event{}, errors.New(e.Error)
			}
			if e.Event != kind {
				continue
			}
			s.events = append(s.events[:i], s.events[i+1:]...)
			if good == nil || good(e) {
				s.mu.Unlock()
				return e, nil
			}
			i--
		}
		wake := s.wake
		s.mu.Unlock()
		select {
		case <-wake:
		case <-ctx.Done():
			s.mu.Lock()
			defer s.mu.Unlock()
			return event{}, fmt.Errorf("no %q from the workload: %w; it said %+v", kind, ctx.Err(), s.events)
		}
	}
}
