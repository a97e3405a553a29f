package lab_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/docker"
	"github.com/assay-id/assay/test/lab/site"
)

// TestWithdrawnSVIDIsRefused shows what the list of revoked certificates is for: nginx, PostgreSQL, Envoy and OpenSSL,
// which know nothing of verdicts, refuse an SVID that was withdrawn, is still in its time and that its owner
// has kept. nginx reads the server's file, PostgreSQL the agent's; Envoys have the list from their agent.
func TestWithdrawnSVIDIsRefused(t *testing.T) {
	needDocker(t)
	nginx, err := site.Tool("nginx")
	if err != nil {
		lab.Missing(t, "nginx", err)
	}
	openssl, err := site.Tool("openssl")
	if err != nil {
		lab.Missing(t, "openssl", err)
	}
	n := newNode(t, `
scan_policy "prod" {
  sources     = ["local"]
  allow_empty = true # the image is FROM scratch
  on_fail     = "withdraw+revoke"
  fail {
    severity = "critical"
  }
}
evidence {
  crl_file = "DIR/crl.pem"
}
`, byPath, postgresFiles)
	list := filepath.Join(n.Dir, "crl.pem")
	n.must(n.agent.WaitFor(n.ctx, "the list", func() error { _, err := os.Stat(list); return err }))
	peer := startNginx(n, nginx, list)
	gates := startGates(n)
	store := startVault(n)

	n.entry("/shop", "scan:policy:prod")
	image, err := n.engine.BuildScratch(n.ctx, docker.Image{Tag: "shop:latest", Program: n.program})
	n.must(err)
	n.push("shop@"+image, scan{config: image})
	running := n.run("shop:latest", "-write", "/shared", "-key")
	withdrawn := n.taken(nil)
	minted := filepath.Join(n.Dir, "minted")
	n.must(os.Mkdir(minted, 0o700))
	_, err = n.ServerCLI(n.ctx, "x509", "mint", "-spiffeID", "spiffe://"+site.TrustDomain+"/other", "-write", minted)
	n.must(err)
	other, err := tls.LoadX509KeyPair(filepath.Join(minted, "svid.pem"), filepath.Join(minted, "key.pem"))
	n.must(err)
	for name, svid := range map[string]tls.Certificate{"the shop": withdrawn, "the other": other} {
		if status, err := peer.call(n.ctx, svid); err != nil || status != http.StatusOK {
			t.Fatalf("%s is answered with %d, %v", name, status, err)
		}
		all(t, n, gates, name+" is admitted", func(g *gate) error { return g.admits(n.ctx, svid) })
		store.until(name+" is admitted", func() error { return store.admits(svid) })
	}

	n.push("shop@"+image, scan{config: image, critical: cve})
	t.Run("when the push is answered, the file has the serial number", func(t *testing.T) {
		text, err := os.ReadFile(list)
		n.must(err)
		block, _ := pem.Decode(text)
		if block == nil || block.Type != "X509 CRL" {
			t.Fatalf("it is no list:\n%s", text)
		}
		crl, err := x509.ParseRevocationList(block.Bytes)
		n.must(err)
		serials := slices.Collect(func(yield func(string) bool) {
			for _, e := range crl.RevokedCertificateEntries {
				if !yield(e.SerialNumber.String()) {
					return
				}
			}
		})
		if !slices.Contains(serials, withdrawn.Leaf.SerialNumber.String()) {
			t.Errorf("it has %v, not %s", serials, withdrawn.Leaf.SerialNumber)
		}
		if slices.Contains(serials, other.Leaf.SerialNumber.String()) {
			t.Error("it has what nobody withdrew")
		}
	})
	n.until(running, "")
	if !time.Now().Before(withdrawn.Leaf.NotAfter) {
		t.Fatal("the SVID has expired by itself, so that nothing is shown")
	}
	t.Run("nginx refuses it after a reload", func(t *testing.T) {
		n.must(peer.Signal(syscall.SIGHUP))
		n.must(peer.WaitFor(n.ctx, "nginx to refuse", func() error {
			status, err := peer.call(n.ctx, withdrawn)
			if err != nil || status == http.StatusBadRequest { // nginx's answer to a bad certificate
				return err
			}
			return fmt.Errorf("it answers %d", status)
		}))
		if status, err := peer.call(n.ctx, other); err != nil || status != http.StatusOK {
			t.Errorf("another identity is answered with %d, %v", status, err)
		}
	})
	t.Run("Envoys refuse it, told by nobody but their agent", func(t *testing.T) {
		all(t, n, gates, "the withdrawn one is refused", func(g *gate) error { return g.refuses(n.ctx, withdrawn) })
		all(t, n, gates, "another identity is admitted", func(g *gate) error { return g.admits(n.ctx, other) })
	})
	t.Run("PostgreSQL refuses it, told by nobody but the agent", func(*testing.T) {
		store.until("the withdrawn one is refused", func() error { return store.refuses(withdrawn) })
		store.until("another identity is admitted", func() error { return store.admits(other) })
	})
	t.Run("openssl says that it is revoked, and nothing of another", func(t *testing.T) {
		svid := filepath.Join(n.Dir, "withdrawn.pem")
		n.must(os.WriteFile(svid, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: withdrawn.Certificate[0]}), 0o600))
		verify := func(path string) (string, error) {
			return site.Run(n.ctx, nil, openssl, "verify", "-crl_check", "-CRLfile", list, "-CAfile", peer.bundle, path)
		}
		if _, err := verify(svid); err == nil || !strings.Contains(err.Error(), "certificate revoked") {
			t.Errorf("the withdrawn one: %v", err)
		}
		if _, err := verify(filepath.Join(minted, "svid.pem")); err != nil {
			t.Errorf("the other one: %v", err)
		}
	})
	t.Run("after the authority was replaced, what the old one signed is accepted and refused as before", func(t *testing.T) {
		defer never(t, n, gates, withdrawn)()
		out, err := n.ServerCLI(n.ctx, "localauthority", "x509", "prepare", "-output", "json")
		n.must(err)
		var prepared struct {
			PreparedAuthority struct {
				AuthorityID string `json:"authority_id"`
			} `json:"prepared_authority"`
		}
		n.must(json.Unmarshal([]byte(out), &prepared))
		_, err = n.ServerCLI(n.ctx, "localauthority", "x509", "activate", "-authorityID", prepared.PreparedAuthority.AuthorityID)
		n.must(err)
		n.must(n.agent.WaitFor(n.ctx, "the list of the new authority", func() error {
			text, err := os.ReadFile(list)
			if err == nil && bytes.Count(text, []byte("BEGIN X509 CRL")) != 2 {
				return errors.New("it is not there yet")
			}
			return err
		}))
		fresh := filepath.Join(n.Dir, "minted by the new one")
		n.must(os.Mkdir(fresh, 0o700))
		_, err = n.ServerCLI(n.ctx, "x509", "mint", "-spiffeID", "spiffe://"+site.TrustDomain+"/fresh", "-write", fresh)
		n.must(err)
		signed, err := tls.LoadX509KeyPair(filepath.Join(fresh, "svid.pem"), filepath.Join(fresh, "key.pem"))
		n.must(err)
		if bytes.Equal(signed.Leaf.AuthorityKeyId, other.Leaf.AuthorityKeyId) {
			t.Fatal("the old authority has signed it")
		}
		_, err = n.WriteBundle(n.ctx)
		n.must(err)
		n.must(peer.Signal(syscall.SIGHUP))
		n.must(peer.WaitFor(n.ctx, "nginx to know the new authority", func() error {
			status, err := peer.call(n.ctx, signed)
			if err == nil && status != http.StatusOK {
				return fmt.Errorf("it answers %d", status)
			}
			return err
		}))
		if status, err := peer.call(n.ctx, other); err != nil || status != http.StatusOK {
			t.Errorf("what the old one signed is answered with %d, %v", status, err)
		}
		if status, err := peer.call(n.ctx, withdrawn); err != nil || status != http.StatusBadRequest {
			t.Errorf("what was withdrawn is answered with %d, %v", status, err)
		}
		all(t, n, gates, "what the new one signed is admitted", func(g *gate) error { return g.admits(n.ctx, signed) })
		all(t, n, gates, "what the old one signed is admitted", func(g *gate) error { return g.admits(n.ctx, other) })
		store.until("what the new one signed is admitted", func() error { return store.admits(signed) })
		store.until("what the old one signed is admitted", func() error { return store.admits(other) })
		store.until("the withdrawn one is refused", func() error { return store.refuses(withdrawn) })
	})
	t.Run("what is issued after a clean report is welcome", func(t *testing.T) {
		n.push("shop@"+image, scan{config: image})
		again := n.taken(withdrawn.Leaf.SerialNumber)
		n.must(peer.WaitFor(n.ctx, "nginx to accept", func() error {
			status, err := peer.call(n.ctx, again)
			if err == nil && status != http.StatusOK {
				return fmt.Errorf("it answers %d", status)
			}
			return err
		}))
		all(t, n, gates, "the new one is admitted", func(g *gate) error { return g.admits(n.ctx, again) })
		all(t, n, gates, "the withdrawn one is refused", func(g *gate) error { return g.refuses(n.ctx, withdrawn) })
	})
}

// taken is the SVID that the container has written with its key, as soon as it is not the one before.
func (n *node) taken(before *big.Int) (svid tls.Certificate) {
	n.t.Helper()
	n.must(n.agent.WaitFor(n.ctx, "the container's SVID", func() error {
		var err error
		// Between the two files there is a moment in which they do not fit each other.
		svid, err = tls.LoadX509KeyPair(filepath.Join(n.shared(), "svid.pem"), filepath.Join(n.shared(), "key.pem"))
		if err == nil && before != nil && svid.Leaf.SerialNumber.Cmp(before) == 0 {
			return errors.New("it is the one before")
		}
		return err
	}))
	return svid
}

// front is nginx, which asks for certificates of the trust domain.
type front struct {
	*site.Process
	address, bundle string
	roots           *x509.CertPool // of nginx's own certificate
}

func startNginx(n *node, program, crl string) *front {
	n.t.Helper()
	f := &front{roots: x509.NewCertPool()}
	f.address = freeAddress(n.t)
	var err error
	f.bundle, err = n.WriteBundle(n.ctx)
	n.must(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	n.must(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	n.must(err)
	own, err := x509.ParseCertificate(der)
	n.must(err)
	f.roots.AddCert(own)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	n.must(err)
	dir := filepath.Join(n.Dir, "nginx")
	n.must(os.Mkdir(dir, 0o755))
	config := filepath.Join(dir, "nginx.conf")
	for path, text := range map[string]string{
		filepath.Join(dir, "own.pem"): string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		filepath.Join(dir, "own.key"): string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})),
		config: fmt.Sprintf(`daemon off;
user root;
worker_processes 1;
pid %[1]s/nginx.pid;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s/body;
  proxy_temp_path %[1]s/proxy;
  fastcgi_temp_path %[1]s/fastcgi;
  uwsgi_temp_path %[1]s/uwsgi;
  scgi_temp_path %[1]s/scgi;
  server {
    listen %[2]s ssl;
    ssl_certificate %[1]s/own.pem;
    ssl_certificate_key %[1]s/own.key;
    ssl_session_cache off;
    ssl_verify_client on;
    ssl_client_certificate %[3]s;
    ssl_crl %[4]s;
    return 200 "welcome";
  }
}
`, dir, f.address, f.bundle, crl),
	} {
		n.must(os.WriteFile(path, []byte(text), 0o600))
	}
	f.Process, err = site.Start(filepath.Join(n.Dir, "nginx.log"), nil, program, "-p", dir, "-c", config, "-e", "stderr")
	n.must(err)
	n.t.Cleanup(func() { _ = f.Stop(15 * time.Second) })
	n.must(f.WaitFor(n.ctx, "nginx to listen", func() error {
		conn, err := (&net.Dialer{}).DialContext(n.ctx, "tcp", f.address)
		if err != nil {
			return err
		}
		return conn.Close()
	}))
	return f
}

// call asks nginx for its page with a certificate and returns the status.
func (f *front) call(ctx context.Context, svid tls.Certificate) (int, error) {
	transport := &http.Transport{TLSClientConfig: &tls.Config{
		MinVersion: tls.VersionTLS12, RootCAs: f.roots,
		// Whatever nginx says of whom it accepts.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &svid, nil },
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+f.address+"/", http.NoBody)
	if err != nil {
		return 0, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}
