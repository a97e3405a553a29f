package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/assay-id/assay/test/lab/site"
)

const (
	quarantine = domain + "/quarantine/shop"
	issuer     = "https://ci.example.org"
	repository = "registry.example.org/shop/app"
	commit     = "5f0d3cb8a1e94d8ab8d1f6b7f3f2f8c0f9a6e2d1"
	cve        = "CVE-2099-0001"
	hookKey    = "a key that only the demo knows"
	// fleet is the ID that all nodes of the demo share, so that one entry is for each of them.
	fleet = "/fleet"
)

// proved are the steps that show image evidence.
func proved(d *demo) []func(context.Context) error {
	p := &pipeline{demo: d}
	return []func(context.Context) error{
		p.prepare, d.startServer, p.startNodes, p.startPeer, p.createEntries, p.startContainers, p.vouch, p.condemn, p.renew, p.explain, p.vex,
	}
}

// pipeline is a CI system with its own tokens and its own key, a security team with another, a webhook, and the
// workloads.
type pipeline struct {
	*demo
	ci, signer, team *ecdsa.PrivateKey // of tokens, of provenance, of VEX statements
	alerts           *seen
	server           *seen // the peer's events
	containers       []*container
	shared           string
	program          string
	image            string
	stubborn         *stubborn
}

// container is one that runs the image, on a node of its own.
type container struct {
	*seen
	node  string
	agent *site.Agent
	id    string
}

// chapter begins a part of the story.
func chapter(text string) { fmt.Printf("\n%s\n", text) }

// after prints what has happened so long after something was asked for.
func (p *pipeline) after(asked time.Time, at int64, format string, args ...any) {
	fmt.Printf("%9.0f ms  %s\n", ms(at-asked.UnixNano()), fmt.Sprintf(format, args...))
}

// since is for events that came after something was asked for.
func since(asked time.Time) func(event) bool {
	return func(e event) bool { return e.At > asked.UnixNano() }
}

// prepare makes keys, the webhook and the server's configuration.
func (p *pipeline) prepare(context.Context) error {
	if p.engine == nil {
		return errors.New("this demo needs a Docker engine, or root on Debian to start one")
	}
	var err error
	for _, key := range []**ecdsa.PrivateKey{&p.ci, &p.signer, &p.team} {
		if *key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return err
		}
	}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: p.ci.Public(), KeyID: "ci", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		return err
	}
	files := map[string][]byte{"jwks.json": jwks, "hook.key": []byte(hookKey)}
	for name, key := range map[string]*ecdsa.PrivateKey{"ci.pub": p.signer, "team.pub": p.team} {
		public, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return err
		}
		files[name] = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(p.Dir, name), text, 0o600); err != nil {
			return err
		}
	}
	hook, err := p.listen()
	if err != nil {
		return err
	}
	p.ServerBlocks = strings.NewReplacer("DIR", p.Dir, "REPOSITORY", repository, "ISSUER", issuer, "HOOK", hook).Replace(`node_attestor "join_token" {}
scan_policy "prod" {
  sources = ["pipeline"]
  max_age = "24h"
  on_fail = "quarantine"
  allow_empty = true # the image is FROM scratch: it has no operating system to recognise
  fail {
    severity = "critical"
  }
  vex {
    trust = ["security-team"]
  }
}
trust_policy "ci" {
  predicate_types = ["provenance"]
  key {
    path = "DIR/ci.pub"
  }
}
trust_policy "security-team" {
  predicate_types = ["vex"]
  key {
    path = "DIR/team.pub"
  }
}
evidence_source "pipeline" {
  repositories   = ["REPOSITORY"]
  allow_unsigned = true
  oidc {
    issuer    = "ISSUER"
    audience  = "assay"
    jwks_path = "DIR/jwks.json"
    conditions {
      project = "shop/app"
    }
  }
}
evidence {
  webhook "chat" {
    url      = "HOOK"
    key_file = "DIR/hook.key"
  }
}
`)
	return nil
}

// listen starts the webhook's receiver and returns its URL. What is not signed with the key is an error.
func (p *pipeline) listen() (string, error) {
	p.alerts = newSeen()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	s := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return
		}
		at, sum, _ := strings.Cut(strings.TrimPrefix(r.Header.Get("Assay-Signature"), "t="), ",v1=")
		mac := hmac.New(sha256.New, []byte(hookKey))
		mac.Write([]byte(at + "." + string(body)))
		if !hmac.Equal([]byte(hex.EncodeToString(mac.Sum(nil))), []byte(sum)) {
			p.alerts.add(event{Event: "error", Error: "an alert came with a wrong signature"})
			return
		}
		var alert struct{ Type, Policy, Finding, Reason string }
		if json.Unmarshal(body, &alert) == nil {
			p.alerts.add(event{Event: alert.Type, Error: alert.Reason, ID: alert.Finding, At: time.Now().UnixNano()})
		}
		w.WriteHeader(http.StatusNoContent)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	p.later(func() { _ = s.Close(); <-done })
	return "http://" + l.Addr().String() + "/alerts", nil
}

// startNodes starts the agents of two nodes, and a third that will not do as it is told.
func (p *pipeline) startNodes(ctx context.Context) error {
	for _, name := range []string{"one", "two"} {
		agent, _, err := p.join(ctx, name, domain+fleet)
		if err != nil {
			return err
		}
		p.containers = append(p.containers, &container{seen: newSeen(), node: name, agent: agent})
	}
	p.agent, p.node = p.containers[0].agent, fleet
	p.say("two nodes joined with tokens that are now spent, each with an agent that serves the Workload API")
	return nil
}

// startPeer starts the TLS peer: a plain process that accepts the shop and nobody else.
func (p *pipeline) startPeer(ctx context.Context) error {
	var err error
	if p.program, p.shared, err = p.place(); err != nil {
		return err
	}
	user, as := os.Getuid(), (*syscall.Credential)(nil)
	if user == 0 {
		user, as = nobody, &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	if err := p.create(ctx, billing, fmt.Sprintf("unix:uid:%d", user), "unix:path:"+p.program); err != nil {
		return err
	}
	p.server = newSeen()
	process, err := site.StartTo(p.server, "its output", as, p.environment(),
		p.program, "-peer", shop, "-listen", filepath.Join(p.shared, "mtls.sock"), "-write", p.shared)
	if err != nil {
		return err
	}
	p.later(process.Kill)
	if _, err := p.server.next(ctx, "listening", nil); err != nil {
		return err
	}
	p.say("the peer %s listens with mTLS and accepts %s, nobody else", billing, shop)
	return nil
}

// createEntries says who is the shop: on every node, a container with the label whose image CI vouches for.
func (p *pipeline) createEntries(ctx context.Context) error {
	if err := p.create(ctx, shop, "docker:label:app:shop", "scan:policy:prod", "prov:policy:ci"); err != nil {
		return err
	}
	if err := p.create(ctx, quarantine, "docker:label:app:shop", "scan:status:prod:fail"); err != nil {
		return err
	}
	p.say("the operator created two entries for containers labelled app=shop, on any node:")
	fmt.Printf("            %-38s if scan:policy:prod and prov:policy:ci hold of the image it runs\n", shop)
	fmt.Printf("            %-38s if scan policy prod says fail\n", quarantine)
	return nil
}

// startContainers starts a workload on each node whose identity depends on what is known of its image.
func (p *pipeline) startContainers(ctx context.Context) error {
	chapter("1. Nothing is known of the image")
	var err error
	if p.image, err = p.engine.build(ctx, p.program); err != nil {
		return err
	}
	p.later(func() { report(p.engine.RemoveImage(context.WithoutCancel(ctx), p.image)) })
	for _, c := range p.containers {
		running, err := p.engine.run(ctx, c.seen, p.image, filepath.Dir(c.agent.Socket), p.shared, "-peer", billing, "-dial", "/shared/mtls.sock", "-again")
		if err != nil {
			return err
		}
		c.id = running.id
		p.later(running.Kill)
	}
	for _, c := range p.containers {
		gone, err := c.next(ctx, "denied", nil)
		if err != nil {
			return fmt.Errorf("wait for the container on node %s to be refused: %w", c.node, err)
		}
		if !strings.Contains(gone.Error, "PermissionDenied") {
			return fmt.Errorf("the container was refused, but not with PermissionDenied: %s", gone.Error)
		}
	}
	p.say("a container on each node runs image %s…: neither has an identity", p.image[:19])
	return nil
}

// vouch pushes a clean report and signed provenance, as a CI job does.
func (p *pipeline) vouch(ctx context.Context) error {
	chapter("2. CI vouches for it: with its own OIDC token, no secret of ours")
	if _, err := p.push(ctx, "-scan", p.scan("clean.json")); err != nil {
		return err
	}
	p.say("assay evidence push -image %s@%s… -scan trivy.json", repository, p.image[:19])
	told, err := p.ServerCLI(ctx, "evidence", "explain", "-image", p.image)
	if err != nil {
		return err
	}
	if !strings.Contains(told, "missing prov:policy:ci") {
		return fmt.Errorf("the provenance is not missed:\n%s", told)
	}
	p.say("that is half of it: the entry is still closed, it misses prov:policy:ci")
	statement, err := p.provenance()
	if err != nil {
		return err
	}
	asked, err := p.push(ctx, "-bundle", statement)
	if err != nil {
		return err
	}
	p.say("assay evidence push -image %s@%s… -bundle provenance.dsse.json", repository, p.image[:19])
	fmt.Println("            (who was told that there is no identity asks again after a pause of its own)")
	if err := p.become(ctx, asked, shop); err != nil {
		return err
	}
	if _, err := p.server.next(ctx, "served", nil); err != nil {
		return err
	}
	p.say("the peer serves them: mTLS, both sides verified")
	if p.stubborn, err = p.playStubborn(ctx); err != nil {
		return err
	}
	p.say("a third node runs the image too and got its certificate; it will not do as it is told")
	return nil
}

// become waits until every container has another identity, and says when.
func (p *pipeline) become(ctx context.Context, asked time.Time, id string) error {
	for _, c := range p.containers {
		svid, err := c.next(ctx, "svid", func(e event) bool { return e.ID == id })
		if err != nil {
			return fmt.Errorf("wait for the container on node %s to be %s: %w", c.node, id, err)
		}
		p.after(asked, svid.At, "the container on node %s is %s", c.node, svid.ID)
	}
	return nil
}

// condemn pushes a report with a critical finding, and watches the identity go.
func (p *pipeline) condemn(ctx context.Context) error {
	chapter("3. A critical vulnerability is found in the running image")
	asked, err := p.push(ctx, "-scan", p.scan("condemned.json", cve))
	if err != nil {
		return err
	}
	p.say("assay evidence push … -scan trivy.json, now with %s; from the start of that command it took", cve)
	if err := p.become(ctx, asked, quarantine); err != nil {
		return err
	}
	refused, err := p.server.next(ctx, "refused", since(asked))
	if err != nil {
		return fmt.Errorf("wait for the peer to refuse: %w", err)
	}
	p.after(asked, refused.At, "the peer refuses: %s", refused.Error)
	alert, err := p.alerts.next(ctx, "withdraw", since(asked))
	if err != nil {
		return fmt.Errorf("wait for the webhook: %w", err)
	}
	if alert.ID != cve {
		return fmt.Errorf("the webhook tells of %q, want %s", alert.ID, cve)
	}
	p.after(asked, alert.At, "the webhook has it, signed: %s", alert.Error)
	return nil
}

// renew has the third node ask for the certificate again.
func (p *pipeline) renew(ctx context.Context) error {
	why, err := p.stubborn.ask(ctx)
	if err != nil {
		return err
	}
	if why == "" {
		return errors.New("the server has signed for a node whose image is condemned")
	}
	p.say("the third node asks the server to renew: refused")
	fmt.Printf("            %s\n", why)
	return nil
}

// explain asks the server for the whole story.
func (p *pipeline) explain(ctx context.Context) error {
	chapter("4. Who, what and why: for whoever asks later")
	line, err := p.audit("verdict.change", cve)
	if err != nil {
		return err
	}
	p.say("the audit log, each line chained to the one before:")
	fmt.Printf("            event %s, outcome %s, policy %s, finding %s\n            report %s…, verdict %s, prev %s…\n",
		line.Event, line.Outcome, line.Policy, line.Finding, line.Report[:19], shorten(line.Verdicts), line.Prev[:12])
	verified, err := site.Run(ctx, nil, filepath.Join(p.Bin, "assay-server"), "audit", "verify", filepath.Join(p.ServerData(), "audit.log"))
	if err != nil {
		return err
	}
	verified, _, _ = strings.Cut(strings.TrimSpace(verified), "\n")
	_, verified, _ = strings.Cut(verified, ": ")
	p.say("assay-server audit verify audit.log: %s", verified)
	told, err := p.ServerCLI(ctx, "evidence", "explain", "-image", p.image)
	if err != nil {
		return err
	}
	p.say("assay-server evidence explain -image %s…", p.image[:19])
	for line := range strings.Lines(told) {
		fmt.Print("            ", line)
	}
	if !strings.Contains(told, "closed to its workloads: missing scan:policy:prod") {
		return errors.New("it does not say that the entry is closed")
	}
	c := p.containers[0]
	if told, err = c.agent.CLI(ctx, "explain", "-container", c.id, "-socketPath", c.agent.Admin); err != nil {
		return err
	}
	first, _, _ := strings.Cut(told, "\n")
	_, nearest, found := strings.Cut(told, "Nearest entries that do not match\n")
	if !found || !strings.Contains(first, quarantine) {
		return fmt.Errorf("the agent does not say what it misses:\n%s", told)
	}
	nearest, _, _ = strings.Cut(nearest, "  "+billing)
	p.say("assay-agent explain -container %s… on node %s, the beginning and what is missed:", c.id[:12], c.node)
	fmt.Printf("            %s\n", first)
	for line := range strings.Lines(nearest) {
		fmt.Print("          ", line)
	}
	return nil
}

// shorten writes verdicts with the beginnings of their digests.
func shorten(verdicts []string) string {
	var list []string
	for _, v := range verdicts {
		digest, seq, _ := strings.Cut(v, "@")
		list = append(list, digest[:min(19, len(digest))]+"…@"+seq)
	}
	return strings.Join(list, ", ")
}

// vex pushes a signed statement that the finding does not matter here, and watches the identity return.
func (p *pipeline) vex(ctx context.Context) error {
	chapter("5. The security team looked: the vulnerable code is never executed")
	document, err := p.vexStatement()
	if err != nil {
		return err
	}
	asked, err := p.push(ctx, "-bundle", document)
	if err != nil {
		return err
	}
	p.say("assay evidence push … -bundle vex.dsse.json, signed by the team; nothing was restarted:")
	if err := p.become(ctx, asked, shop); err != nil {
		return err
	}
	served, err := p.server.next(ctx, "served", since(asked))
	if err != nil {
		return err
	}
	p.after(asked, served.At, "the peer serves them again")
	alert, err := p.alerts.next(ctx, "restore", since(asked))
	if err != nil {
		return fmt.Errorf("wait for the webhook: %w", err)
	}
	p.after(asked, alert.At, "the webhook has told of the return")
	return nil
}

// line is what the demo shows of a line of the audit log.
type line struct {
	Event, Outcome, Policy, Finding, Report, Prev string
	Verdicts                                      []string
}

// audit finds a line of the server's audit log.
func (p *pipeline) audit(kind, finding string) (*line, error) {
	text, err := os.ReadFile(filepath.Join(p.ServerData(), "audit.log"))
	if err != nil {
		return nil, err
	}
	for raw := range strings.Lines(string(text)) {
		var l line
		if json.Unmarshal([]byte(raw), &l) == nil && l.Event == kind && l.Finding == finding && len(l.Report) > 19 && len(l.Prev) > 12 {
			return &l, nil
		}
	}
	return nil, fmt.Errorf("the audit log has no %s about %s", kind, finding)
}
