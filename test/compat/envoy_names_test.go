package compat

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/envoy"
	"github.com/assay-id/assay/test/lab/site"
)

// TestEnvoyAbroad runs two real Envoys of two trust domains, each with a server and an agent, that ask for
// secrets by SPIFFE IDs, by trust domains and for all bundles.
func TestEnvoyAbroad(t *testing.T) {
	envoyBinary(t)
	home, away := newSite(t, nil), newSite(t, func(s *site.Site) { s.Domain = "other.test" })
	exchange := func(from, to *site.Site, domain string) {
		t.Helper()
		text, err := from.ServerCLI(t.Context(), "bundle", "show", "-format", "spiffe")
		if err != nil {
			t.Fatal(err)
		}
		setBundle(t, to, domain, "spiffe", text)
	}
	exchange(home, away, site.TrustDomain)
	exchange(away, home, "other.test")
	forger := newForger(t, "forger.test")
	setBundle(t, home, "forger.test", "pem", forger.bundle())

	inside := envoyEntry(t, home, newAgent(t, home, "agent"), "/home", "home", "other.test", "forger.test")
	outside := envoyEntry(t, away, newAgent(t, away, "agent"), "/abroad", "abroad", site.TrustDomain)
	in := startEnvoy(t, home, inside.agent, envoy.Options{
		Name: "home", In: &envoy.TLS{Server: true, API: "GRPC", Certificate: "spiffe://" + site.TrustDomain + "/home", Trust: "ALL"},
	})
	out := startEnvoy(t, away, outside.agent, envoy.Options{
		Name: "abroad", To: in.Listener,
		Out: &envoy.TLS{
			API: "DELTA_GRPC", Certificate: "spiffe://other.test/abroad", Trust: "spiffe://" + site.TrustDomain, Peer: "spiffe://" + site.TrustDomain + "/home",
		},
	})
	out.eventually(t, "a request from abroad", served)

	t.Run("an authority counts for its own trust domain only", func(t *testing.T) {
		in.until(t, "the forger as who it is", func() error { return in.call(t.Context(), forger.sign(t, "spiffe://forger.test/any")) })
		for _, id := range []string{"spiffe://" + site.TrustDomain + "/home", "spiffe://other.test/abroad", "spiffe://third.test/any"} {
			in.until(t, "refusal of "+id+" by the authority of forger.test", func() error {
				err := in.call(t.Context(), forger.sign(t, id))
				switch {
				case err == nil:
					t.Errorf("%s by the authority of forger.test is let in", id)
				case !strings.Contains(err.Error(), "remote error"): // the alert may come after the end of the connection
					return err
				}
				return nil
			})
		}
	})
	t.Run("the other trust domain rotates its authority", func(t *testing.T) {
		var old, fresh string
		authority := func(step string, args ...string) string {
			t.Helper()
			text, err := away.ServerCLI(t.Context(), append([]string{"localauthority", "x509", step}, args...)...)
			if err != nil {
				t.Fatal(err)
			}
			for field := range strings.FieldsSeq(text) {
				if len(field) == 40 && strings.Trim(field, "0123456789abcdef") == "" {
					return field
				}
			}
			return ""
		}
		old, fresh = authority("show"), authority("prepare")
		if old == "" || fresh == "" || old == fresh {
			t.Fatalf("authorities %q and %q", old, fresh)
		}
		exchange(away, home, "other.test")
		in.until(t, "both authorities", func() error { return authoritiesAt(t, in, "other.test", 2) })
		authority("activate", "-authorityID", fresh)
		before, err := out.Certificates(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		authority("taint", "-authorityID", old)
		out.shows(t, "a certificate of the new authority", func(certificates string) bool { return certificates != before })
		out.eventually(t, "a request with it", served)
		authority("revoke", "-authorityID", old)
		exchange(away, home, "other.test")
		in.until(t, "the new authority alone", func() error { return authoritiesAt(t, in, "other.test", 1) })
		out.eventually(t, "a request with the new authority alone", served)
	})
	for who, i := range map[string]*identified{"/home": inside, "/abroad": outside} {
		t.Run("a certificate that was asked for by its ID is replaced in quarantine: "+who, func(t *testing.T) {
			p := map[string]*proxy{"/home": in, "/abroad": out}[who]
			i.change(t, func(e *types.Entry) { e.SpiffeId.Path = "/quarantine" + who })
			out.eventually(t, "refusal", refused)
			p.shows(t, "neither", func(certificates string) bool { return !strings.Contains(certificates, who) })
			i.change(t, func(e *types.Entry) { e.SpiffeId.Path = who })
			out.eventually(t, "a request after it", served)
		})
	}
	t.Run("who is federated with no more is refused", func(t *testing.T) {
		inside.change(t, func(e *types.Entry) { e.FederatesWith = []string{"forger.test"} })
		out.eventually(t, "refusal of who is abroad", refused)
	})
}

// istioSocket is where Istio's proxies look for their identity.
const istioSocket = "/var/run/secrets/workload-spiffe-uds/socket"

// TestIstiosProxies runs two real Envoys that are configured as Istio configures its own, each in a mount
// namespace in which the agent's directory is where Istio has it mounted.
func TestIstiosProxies(t *testing.T) {
	envoyBinary(t)
	if os.Getuid() != 0 {
		lab.Missing(t, "root", errors.New("it mounts the agent's directory"))
	}
	s := newSite(t, nil)
	ctx := patiently(t)
	token, err := s.Token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.Dir, "istio")
	agent, err := s.NewAgent(ctx, "agent", site.AgentOptions{Token: token, Socket: filepath.Join(dir, "socket")})
	if err == nil {
		err = agent.Start(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agent.Stop(15 * time.Second) })
	inItsPlace := []string{
		"unshare", "--mount", "--propagation", "private", "sh", "-c",
		`set -e; mount -t tmpfs none /run; mkdir -p "$(dirname "$1")"; mount --bind "$0" "$(dirname "$1")"; shift; exec "$@"`, dir, istioSocket,
	}
	mesh := func(name, account, to string) *proxy {
		t.Helper()
		e := envoyEntry(t, s, agent, "/ns/shop/sa/"+account, name)
		verify := fmt.Sprintf("match_typed_subject_alt_names: [{san_type: URI, matcher: {prefix: \"spiffe://%s/ns/shop/\"}}]", site.TrustDomain)
		o := envoy.Options{
			Name: name, Dir: s.Dir, Program: e.program, Within: inItsPlace, Agent: istioSocket, To: to,
			Metadata: fmt.Sprintf("ISTIO_VERSION: 1.27.0, NAMESPACE: shop, SERVICE_ACCOUNT: %s, CLUSTER_ID: Kubernetes", account),
		}
		if to == "" {
			o.In = &envoy.TLS{Server: true, API: "GRPC", Istio: true, Validation: verify}
		} else {
			o.Out = &envoy.TLS{API: "GRPC", Istio: true, Validation: verify}
		}
		p, err := envoy.Start(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			p.Kill()
			if t.Failed() {
				t.Logf("end of %s's log:\n%s", name, site.Tail(p.Log, 40))
			}
		})
		return &proxy{p}
	}
	server := mesh("istio-server", "server", "")
	client := mesh("istio-client", "client", server.Listener)
	client.eventually(t, "a request between two proxies", served)
	for name, p := range map[string]*proxy{"server": server, "client": client} {
		p.shows(t, "the identity of its account", func(certificates string) bool {
			return strings.Contains(certificates, "spiffe://"+site.TrustDomain+"/ns/shop/sa/"+name)
		})
	}
}

// identified is an Envoy's entry with what it takes to change it.
type identified struct {
	agent   *site.Agent
	client  entryv1.EntryClient
	entry   *types.Entry
	program string
}

// envoyEntry makes the entry of an Envoy that runs under the name.
func envoyEntry(t *testing.T, s *site.Site, agent *site.Agent, path, name string, federated ...string) *identified {
	t.Helper()
	i := &identified{agent: agent, client: entries(t, s), program: envoyPath(t, name)}
	e := newEntry(onlyAgent(t, s), path)
	if s.Domain != "" {
		e.SpiffeId.TrustDomain, e.ParentId.TrustDomain = s.Domain, s.Domain
	}
	e.Selectors = []*types.Selector{{Type: "unix", Value: "path:" + i.program}}
	e.FederatesWith = federated
	i.entry = createEntry(t, i.client, e)
	return i
}

// change changes the entry.
func (i *identified) change(t *testing.T, how func(*types.Entry)) {
	t.Helper()
	how(i.entry)
	resp, err := i.client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{i.entry}})
	if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
		t.Fatal(resp, err)
	}
}

// setBundle sets the bundle of another trust domain.
func setBundle(t *testing.T, s *site.Site, domain, format, text string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bundle")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ServerCLI(t.Context(), "bundle", "set", "-id", "spiffe://"+domain, "-format", format, "-path", path); err != nil {
		t.Fatal(err)
	}
}

// until waits for what is said of the Envoy.
func (p *proxy) until(t *testing.T, what string, good func() error) {
	t.Helper()
	if err := p.WaitFor(patiently(t), what, good); err != nil {
		t.Fatal(err)
	}
}

// authoritiesAt says whether an Envoy has so many authorities of a trust domain.
func authoritiesAt(t *testing.T, p *proxy, domain string, want int) error {
	t.Helper()
	text, err := envoy.Get(t.Context(), envoy.Over(p.Admin), "http://envoy/certs")
	if err != nil {
		return err
	}
	if n := strings.Count(text, `"uri": "spiffe://`+domain+`"`); n != want {
		return fmt.Errorf("it has %d authorities of %s, not %d: %s", n, domain, want, text)
	}
	return nil
}

// call connects to an Envoy's listener with a certificate and makes a request.
func (p *proxy) call(ctx context.Context, svid tls.Certificate) error {
	transport := &http.Transport{DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", p.Listener)
		if err != nil {
			return nil, err
		}
		return tls.Client(conn, &tls.Config{
			InsecureSkipVerify:   true, // it is the Envoy that verifies
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &svid, nil },
		}), nil
	}}
	defer transport.CloseIdleConnections()
	_, err := envoy.Get(ctx, &http.Client{Transport: transport, Timeout: patience}, "https://envoy/")
	return err
}

// forger is an authority that signs whatever it is asked to.
type forger struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newForger(t *testing.T, domain string) *forger {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{{Scheme: "spiffe", Host: domain}},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &forger{cert, key}
}

func (f *forger) bundle() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.cert.Raw}))
}

func (f *forger) sign(t *testing.T, id string) tls.Certificate {
	t.Helper()
	name, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), URIs: []*url.URL{name}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, f.cert, f.key.Public(), f.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: f.key}
}
