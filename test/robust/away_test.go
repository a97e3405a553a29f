package robust

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/lab/site"
)

// machine makes the certificate of a node and returns the blocks of a server that accepts it and of an
// agent that has it.
func machine(t *testing.T, s *site.Site) (server, agent string) {
	t.Helper()
	ca, caKey := certificate(t, nil, nil, "machines", func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign
	})
	leaf, key := certificate(t, ca, caKey, "node 7", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name, kind string, der []byte) string {
		path := filepath.Join(s.Dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return fmt.Sprintf("node_attestor \"x509pop\" {\n  ca_bundle_path = %q\n}\n", file("machines.pem", "CERTIFICATE", ca.Raw)),
		fmt.Sprintf("node_attestor \"x509pop\" {\n  private_key_path = %q\n  certificate_path = %q\n}\nworkload_attestor \"unix\" {}\n",
			file("node.key", "PRIVATE KEY", der), file("node.pem", "CERTIFICATE", leaf.Raw))
}

func certificate(t *testing.T, parent *x509.Certificate, signer *ecdsa.PrivateKey, name string, change func(*x509.Certificate)) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	change(template)
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// publish serves the site's bundle of the moment by https, as an operator's web server does, and returns
// the line of an agent's configuration that trusts it and the environment that knows the web server.
func publish(t *testing.T, s *site.Site) (trust, env string) {
	t.Helper()
	web := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		out, err := s.ServerCLI(r.Context(), "bundle", "show")
		if err != nil {
			http.Error(w, "not now", http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte(out))
	}))
	t.Cleanup(web.Close)
	path := filepath.Join(s.Dir, "web.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: web.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("trust_bundle_url = %q", web.URL+"/bundle.pem"), "SSL_CERT_FILE=" + path
}

// TestAwayPastEveryTTL takes the server away until every SVID, the agents' own and every authority have
// expired, and brings it back.
func TestAwayPastEveryTTL(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.ServerExtra = `ca_ttl = "1m"
  default_x509_svid_ttl = "9s"
  default_jwt_svid_ttl = "9s"
  agent_ttl = "20s"`
	server, agent := machine(t, s)
	s.ServerBlocks = server + `node_attestor "join_token" {}`
	h := newHistory()
	start(t, s)
	trust, env := publish(t, s)
	ports := []int{freePort(t), freePort(t)}
	attested := newAgent(t, s, "attested", site.AgentOptions{Blocks: agent + probes(ports[0]), Trust: trust, Env: []string{env}})
	h.mustCreate(t, dial(t, s), newEntry(onlyAgent(t, s), "/attested"))
	joined := newAgent(t, s, "joined", site.AgentOptions{Blocks: unixOnly + probes(ports[1]), Token: token(t, s), Trust: trust, Env: []string{env}})
	joinedNode := ""
	eventually(t, "the second agent", func() error {
		for _, path := range agents(t, s) {
			if strings.Contains(path, "/join_token/") {
				joinedNode = path
				return nil
			}
		}
		return errors.New("it is not admitted")
	})
	h.mustCreate(t, dial(t, s), newEntry(joinedNode, "/joined"))
	all := []*site.Agent{attested, joined}
	workloads := []*workload{newWorkload(t, attested.Socket), newWorkload(t, joined.Socket)}
	workloads[0].has("/attested")
	workloads[1].has("/joined")
	for _, a := range all {
		if err := signed(t, a.Socket, "cached"); err != nil {
			t.Fatal(err)
		}
		defer watchSocket(t, a.Socket)()
	}

	before := map[string]int{}
	for _, a := range all {
		before[a.Log] = len(spoken(t, a.Log))
	}
	s.Server().Kill()
	for i, a := range all {
		t.Run("while the server is away "+filepath.Base(a.Dir)+" serves what is valid, and Unavailable for what is not", func(t *testing.T) {
			// What was valid when it was served, or that there is nothing; never anything else.
			eventually(t, "the end of the SVID", func() error {
				_, err := client(t, a.Socket).FetchX509SVID(patiently(t))
				switch {
				case err == nil:
					return errors.New("it is still served")
				case status.Code(err) != codes.Unavailable:
					t.Fatalf("want Unavailable, got %v", err)
				}
				return nil
			})
			workloads[i].until("Unavailable on the stream", func(_ *workloadapi.X509Context, err error) bool {
				return status.Code(err) == codes.Unavailable
			})
			eventually(t, "the end of the JWT-SVID", func() error {
				_, err := client(t, a.Socket).FetchJWTSVID(patiently(t), jwtsvid.Params{Audience: "cached"})
				switch {
				case err == nil:
					return errors.New("it is still served")
				case status.Code(err) != codes.Unavailable:
					t.Fatalf("want Unavailable, got %v", err)
				}
				return nil
			})
			bundles, err := client(t, a.Socket).FetchX509Bundles(patiently(t))
			if err != nil || bundles.Len() == 0 {
				t.Errorf("bundles: %v", err)
			}
		})
	}
	old := waitForTheEnd(t, attested.Socket)
	for i, a := range all {
		select {
		case <-a.Done():
			t.Fatalf("%s ended: %s", a.Dir, site.Tail(a.Log, 10))
		default:
		}
		if _, err := client(t, a.Socket).FetchX509Bundles(patiently(t)); err != nil {
			t.Errorf("bundles: %v", err)
		}
		if code, body, err := fetch(t, fmt.Sprintf("http://127.0.0.1:%d/live", ports[i])); code != http.StatusOK || err != nil {
			t.Errorf("/live of %s says %d: %s, %v", a.Dir, code, body, err)
		}
		if code, body, err := fetch(t, fmt.Sprintf("http://127.0.0.1:%d/ready", ports[i])); code != http.StatusServiceUnavailable || err != nil {
			t.Errorf("/ready of %s says %d: %s, %v", a.Dir, code, body, err)
		}
	}

	t.Run("and their logs say so, and are not filled with it", func(t *testing.T) {
		for _, a := range all {
			said := spoken(t, a.Log)[before[a.Log]:]
			if len(said) == 0 || len(said) > 12 {
				t.Errorf("%d lines for an operator while the server was away:\n%s", len(said), strings.Join(said, ""))
			}
		}
	})
	if err := s.StartServer(patiently(t)); err != nil {
		t.Fatal(err)
	}
	process := s.Server()
	t.Cleanup(process.Kill)
	t.Run("when it is back, everything heals without a hand where the node can attest again", func(t *testing.T) {
		// The workload checks at each update that the SVID verifies with the bundle beside it.
		got := workloads[0].until("/attested again", func(c *workloadapi.X509Context, err error) bool {
			return err == nil && hasPath("/attested")(c, err)
		})
		bundle, _ := got.Bundles.Get(spiffeid.RequireTrustDomainFromString(site.TrustDomain))
		fresh := 0
		for _, authority := range bundle.X509Authorities() {
			if !old[string(authority.Raw)] {
				fresh++
			}
		}
		if fresh == 0 {
			t.Error("the bundle has no new authority")
		}
		eventually(t, "a JWT-SVID", func() error { return signed(t, attested.Socket, "after") })
		eventually(t, "readiness", func() error {
			code, body, err := fetch(t, fmt.Sprintf("http://127.0.0.1:%d/ready", ports[0]))
			if err == nil && code != http.StatusOK {
				err = errors.New(body)
			}
			return err
		})
		h.check(t, dial(t, s))
	})
	t.Run("where a token is needed the agent says so, and is healed by one", func(t *testing.T) {
		eventually(t, "the advice", func() error {
			_, body, err := fetch(t, fmt.Sprintf("http://127.0.0.1:%d/ready", ports[1]))
			if err == nil && !strings.Contains(body, "assay-server token generate") {
				err = errors.New(body)
			}
			return err
		})
		joined.Kill()
		again, err := s.NewAgent(patiently(t), "joined", site.AgentOptions{
			Blocks: unixOnly + probes(ports[1]), Token: token(t, s), Trust: trust, Env: []string{env},
		})
		if err != nil {
			t.Fatal(err)
		}
		startAgent(t, again)
		eventually(t, "the new agent", func() error {
			for _, path := range agents(t, s) {
				if path != joinedNode && strings.Contains(path, "/join_token/") {
					joinedNode = path
					return nil
				}
			}
			return errors.New("it is not admitted")
		})
		h.mustCreate(t, dial(t, s), newEntry(joinedNode, "/rejoined"))
		workloads[1].until("/rejoined", hasPath("/rejoined"))
	})
}

// waitForTheEnd waits until every authority that a workload knows has expired, and returns them.
func waitForTheEnd(t *testing.T, socket string) map[string]bool {
	t.Helper()
	bundles, err := client(t, socket).FetchX509Bundles(patiently(t))
	if err != nil {
		t.Fatal(err)
	}
	bundle, ok := bundles.Get(spiffeid.RequireTrustDomainFromString(site.TrustDomain))
	if !ok {
		t.Fatal("no bundle of its own")
	}
	known := map[string]bool{}
	var last time.Time
	for _, authority := range bundle.X509Authorities() {
		known[string(authority.Raw)] = true
		if authority.NotAfter.After(last) {
			last = authority.NotAfter
		}
	}
	if until := time.Until(last); until > 2*time.Minute {
		t.Fatalf("the last authority lives until %s", last)
	}
	select {
	case <-time.After(time.Until(last) + time.Second):
	case <-t.Context().Done():
	}
	return known
}

// spoken returns the lines of a log that an operator sees.
func spoken(t *testing.T, path string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(slices.Collect(strings.Lines(string(text))), func(line string) bool {
		return strings.Contains(line, "level=debug") || strings.Contains(line, "level=trace")
	})
}
