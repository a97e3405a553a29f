package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
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
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/assay-id/assay/test/lab/site"
)

const (
	quarantine = domain + "/quarantine/shop"
	issuer     = "https://ci.example.org"
	repository = "registry.example.org/shop/app"
	cve        = "CVE-2099-0001"
	hookKey    = "a key that only the demo knows"
)

// proved are the steps that show image evidence.
func proved(d *demo) []func(context.Context) error {
	p := &pipeline{demo: d}
	return []func(context.Context) error{
		p.prepare, d.startServer, d.startAgent, p.startPeer, p.startContainer, p.clear, p.condemn, p.explain, p.vex,
	}
}

// pipeline is a CI system with its own tokens, a security team with its own key, a webhook, and two workloads.
type pipeline struct {
	*demo
	ci, team  *ecdsa.PrivateKey
	alerts    *seen
	server    *seen // the peer's events
	container *seen
	shared    string
	program   string
	image     string
	serial    string // of the identity that is withdrawn
}

// prepare makes keys, the webhook and the server's configuration.
func (p *pipeline) prepare(context.Context) error {
	if p.engine == nil {
		return errors.New("this demo needs a Docker engine, or root on Debian to start one")
	}
	var err error
	for _, key := range []**ecdsa.PrivateKey{&p.ci, &p.team} {
		if *key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return err
		}
	}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: p.ci.Public(), KeyID: "ci", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(p.team.Public())
	if err != nil {
		return err
	}
	for name, text := range map[string][]byte{
		"jwks.json": jwks, "team.pub": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), "hook.key": []byte(hookKey),
	} {
		if err := os.WriteFile(filepath.Join(p.Dir, name), text, 0o600); err != nil {
			return err
		}
	}
	hook, err := p.listen()
	if err != nil {
		return err
	}
	p.ServerBlocks = fmt.Sprintf(`node_attestor "join_token" {}
scan_policy "prod" {
  sources = ["ci"]
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
trust_policy "security-team" {
  predicate_types = ["vex"]
  key {
    path = %q
  }
}
evidence_source "ci" {
  repositories   = [%q]
  allow_unsigned = true
  oidc {
    issuer    = %q
    audience  = "assay"
    jwks_path = %q
    conditions {
      project = "shop/app"
    }
  }
}
evidence {
  webhook "chat" {
    url      = %q
    key_file = %q
  }
}
`, filepath.Join(p.Dir, "team.pub"), repository, issuer, filepath.Join(p.Dir, "jwks.json"), hook, filepath.Join(p.Dir, "hook.key"))
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

// startContainer starts the workload whose identity depends on what is known of its image.
func (p *pipeline) startContainer(ctx context.Context) error {
	var err error
	if p.image, err = p.engine.build(ctx, p.program); err != nil {
		return err
	}
	if err := p.create(ctx, shop, "docker:label:app:shop", "scan:policy:prod"); err != nil {
		return err
	}
	if err := p.create(ctx, quarantine, "docker:label:app:shop", "scan:status:prod:fail"); err != nil {
		return err
	}
	p.say("entries created: label app=shop and scan:policy:prod is %s; with scan:status:prod:fail it is %s", shop, quarantine)
	p.container = newSeen()
	running, err := p.engine.run(ctx, p.container, p.image, filepath.Dir(p.agent.Socket), p.shared, "-peer", billing, "-dial", "/shared/mtls.sock", "-again")
	if err != nil {
		return err
	}
	p.later(running.Kill)
	gone, err := p.container.next(ctx, "denied", nil)
	if err != nil {
		return fmt.Errorf("wait for the container to be refused: %w", err)
	}
	if !strings.Contains(gone.Error, "PermissionDenied") {
		return fmt.Errorf("the container was refused, but not with PermissionDenied: %s", gone.Error)
	}
	p.say("the container runs image %s, of which nothing is known: it has no identity", p.image[:19])
	return nil
}

// clear pushes a clean report as a CI job does.
func (p *pipeline) clear(ctx context.Context) error {
	if _, err := p.push(ctx, "-scan", p.scan("clean.json")); err != nil {
		return err
	}
	svid, err := p.container.next(ctx, "svid", nil)
	if err != nil {
		return fmt.Errorf("wait for the identity: %w", err)
	}
	if svid.ID != shop {
		return fmt.Errorf("the container got %s, want %s", svid.ID, shop)
	}
	p.serial = svid.Serial
	if _, err := p.server.next(ctx, "served", nil); err != nil {
		return err
	}
	p.say("CI pushed a clean report with nothing but its own OIDC token: the container is %s, and the peer serves it", svid.ID)
	return nil
}

// condemn pushes a report with a critical finding, and watches the identity go.
func (p *pipeline) condemn(ctx context.Context) error {
	asked, err := p.push(ctx, "-scan", p.scan("condemned.json", cve))
	if err != nil {
		return err
	}
	svid, err := p.container.next(ctx, "svid", func(e event) bool { return e.ID == quarantine })
	if err != nil {
		return fmt.Errorf("wait for the quarantine identity: %w", err)
	}
	took := ms(svid.At - asked.UnixNano())
	p.say("CI pushed %s, critical: %.0f ms after the command was started the container is %s", cve, took, svid.ID)
	refused, err := p.server.next(ctx, "refused", nil)
	if err != nil {
		return fmt.Errorf("wait for the peer to refuse: %w", err)
	}
	p.say("the peer refuses it after %.0f ms: %s", ms(refused.At-asked.UnixNano()), refused.Error)
	alert, err := p.alerts.next(ctx, "withdraw", nil)
	if err != nil {
		return fmt.Errorf("wait for the webhook: %w", err)
	}
	if alert.ID != cve {
		return fmt.Errorf("the webhook tells of %q, want %s", alert.ID, cve)
	}
	p.say("the webhook fired after %.0f ms, signed: %s", ms(alert.At-asked.UnixNano()), alert.Error)
	line, err := p.audit("verdict.change", cve)
	if err != nil {
		return err
	}
	p.say("the audit log says so: %s", line)
	return nil
}

// explain asks the server and the agent for the whole story.
func (p *pipeline) explain(ctx context.Context) error {
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
	return nil
}

// vex pushes a signed statement that the finding does not matter here, and watches the identity return.
func (p *pipeline) vex(ctx context.Context) error {
	document, err := p.statement()
	if err != nil {
		return err
	}
	asked, err := p.push(ctx, "-bundle", document)
	if err != nil {
		return err
	}
	svid, err := p.container.next(ctx, "svid", func(e event) bool { return e.ID == shop })
	if err != nil {
		return fmt.Errorf("wait for the identity to be back: %w", err)
	}
	p.say("the security team signed a VEX statement: %.0f ms after the command was started the container is %s again, without a restart",
		ms(svid.At-asked.UnixNano()), svid.ID)
	if _, err := p.server.next(ctx, "served", nil); err != nil {
		return err
	}
	if _, err := p.alerts.next(ctx, "restore", nil); err != nil {
		return fmt.Errorf("wait for the webhook: %w", err)
	}
	p.say("the peer serves it again, and the webhook told of the return")
	return nil
}

// push runs "assay evidence push" with a fresh token of the CI system, and returns when it was started.
func (p *pipeline) push(ctx context.Context, args ...string) (time.Time, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: p.ci}, (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", "ci"))
	if err != nil {
		return time.Time{}, err
	}
	now := time.Now()
	token, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": issuer, "sub": "project:shop/app:ref:main", "aud": "assay", "iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(),
		"project": "shop/app",
	}).Serialize()
	if err != nil {
		return time.Time{}, err
	}
	file := filepath.Join(p.Dir, "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		return time.Time{}, err
	}
	bundle, err := p.WriteBundle(ctx)
	if err != nil {
		return time.Time{}, err
	}
	asked := time.Now()
	_, err = site.Run(ctx, nil, filepath.Join(p.Bin, "assay"), append([]string{
		"evidence", "push", "-server", fmt.Sprintf("127.0.0.1:%d", p.Port), "-trustBundle", bundle, "-tokenFile", file, "-image", repository + "@" + p.image,
	}, args...)...)
	return asked, err
}

// scan writes a report of the image as Trivy writes it, and returns its path.
func (p *pipeline) scan(name string, critical ...string) string {
	found := []map[string]any{}
	for _, id := range critical {
		found = append(found, map[string]any{
			"VulnerabilityID": id, "PkgName": "libshop", "InstalledVersion": "1.0", "FixedVersion": "1.1", "Severity": "CRITICAL", "Status": "fixed",
			"PkgIdentifier": map[string]any{"PURL": "pkg:golang/example.org/libshop@1.0"},
		})
	}
	text, err := json.Marshal(map[string]any{
		"SchemaVersion": 2, "CreatedAt": time.Now().Format(time.RFC3339Nano), "ArtifactName": repository, "ArtifactType": "container_image",
		"Metadata": map[string]any{"ImageID": p.image},
		"Results": []any{map[string]any{
			"Target": "app", "Class": "lang-pkgs", "Type": "gobinary",
			"Packages":        []any{map[string]any{"Name": "libshop", "Version": "1.0"}},
			"Vulnerabilities": found,
		}},
	})
	path := filepath.Join(p.Dir, name)
	if err == nil {
		err = os.WriteFile(path, text, 0o600)
	}
	report(err)
	return path
}

// statement writes an OpenVEX statement about the image, signed in a DSSE envelope, and returns its path.
func (p *pipeline) statement() (string, error) {
	now := time.Now().UTC().Format(time.RFC3339)
	payload, err := json.Marshal(map[string]any{
		"_type": "https://in-toto.io/Statement/v1", "predicateType": "https://openvex.dev/ns/v0.2.0",
		"subject": []any{map[string]any{"name": repository, "digest": map[string]any{"sha256": strings.TrimPrefix(p.image, "sha256:")}}},
		"predicate": map[string]any{
			"@context": "https://openvex.dev/ns/v0.2.0", "@id": "https://example.org/vex/1", "author": "Security team", "timestamp": now, "version": 1,
			"statements": []any{map[string]any{
				"vulnerability": map[string]any{"name": cve},
				"products": []any{map[string]any{
					"@id": "pkg:oci/app@" + p.image, "subcomponents": []any{map[string]any{"@id": "pkg:golang/example.org/libshop@1.0"}},
				}},
				"status": "not_affected", "justification": "vulnerable_code_not_in_execute_path", "timestamp": now,
			}},
		},
	})
	if err != nil {
		return "", err
	}
	const kind = "application/vnd.in-toto+json"
	sum := sha256.Sum256(fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(kind), kind, len(payload), payload))
	signature, err := ecdsa.SignASN1(rand.Reader, p.team, sum[:])
	if err != nil {
		return "", err
	}
	envelope, err := json.Marshal(map[string]any{
		"payload": base64.StdEncoding.EncodeToString(payload), "payloadType": kind,
		"signatures": []any{map[string]any{"sig": base64.StdEncoding.EncodeToString(signature)}},
	})
	if err != nil {
		return "", err
	}
	path := filepath.Join(p.Dir, "vex.dsse.json")
	return path, os.WriteFile(path, envelope, 0o600)
}

// audit finds a line of the server's audit log.
func (p *pipeline) audit(kind, part string) (string, error) {
	text, err := os.ReadFile(filepath.Join(p.ServerData(), "audit.log"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, `"event":"`+kind+`"`) && strings.Contains(line, part) {
			return strings.TrimSpace(line), nil
		}
	}
	return "", fmt.Errorf("the audit log has no %s about %s", kind, part)
}
