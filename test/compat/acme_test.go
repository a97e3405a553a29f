package compat

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/test/lab/site"
)

const pebblePackage = "github.com/letsencrypt/pebble/v2/cmd/pebble"

// pebble is Let's Encrypt's own ACME server for tests, strict, with the DNS server that it asks: every name is
// at 127.0.0.1.
type pebble struct {
	directory string
	root      string // of its own HTTPS, in a file
	issuing   *x509.CertPool
}

// newPebble starts it. It validates at the port.
func newPebble(t *testing.T, validate string) *pebble {
	t.Helper()
	built, err := filepath.Abs(filepath.Join(bin, "peers"))
	if err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", built+"/", pebblePackage, pebblePackage+"-challtestsrv")
	build.Dir = filepath.Join("peers", "pebble")
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pebblePackage, err, text)
	}
	dir := t.TempDir()
	cert, key := webCertificate(t, dir)
	ports := freePorts(t, 4)
	config, err := json.Marshal(map[string]any{"pebble": map[string]any{
		"listenAddress": "127.0.0.1:" + ports[0], "managementListenAddress": "127.0.0.1:" + ports[1],
		"certificate": cert, "privateKey": key, "httpPort": 1, "tlsPort": json.Number(validate),
	}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "pebble.json")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	dns := "127.0.0.1:" + ports[2]
	started(t, filepath.Join(dir, "dns.log"), filepath.Join(built, "pebble-challtestsrv"),
		"-dnsserver", dns, "-management", "127.0.0.1:"+ports[3], "-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", "", "-defaultIPv6", "")
	server := started(t, filepath.Join(dir, "pebble.log"), filepath.Join(built, "pebble"), "-config", path, "-dnsserver", dns, "-strict")

	p := &pebble{directory: "https://127.0.0.1:" + ports[0] + "/dir", root: cert, issuing: x509.NewCertPool()}
	own := x509.NewCertPool()
	text, err := os.ReadFile(cert)
	if err != nil || !own.AppendCertsFromPEM(text) {
		t.Fatalf("read %s: %v", cert, err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: own}}}
	err = server.WaitFor(patiently(t), "pebble", func() error {
		resp, err := client.Get("https://127.0.0.1:" + ports[1] + "/roots/0")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		root, err := io.ReadAll(resp.Body)
		if err == nil && !p.issuing.AppendCertsFromPEM(root) {
			err = errors.New("it has no root")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestACME has the certificate of an https_web bundle endpoint issued by a real ACME server, which looks for the
// proof at the endpoint itself, and finds it kept after a restart.
func TestACME(t *testing.T) {
	port := freePorts(t, 1)[0]
	ca := newPebble(t, port)
	t.Setenv("SSL_CERT_FILE", ca.root) // how the server knows the ACME server
	const name = "bundle.example.org"
	s := newSite(t, func(s *site.Site) {
		s.ServerExtra = fmt.Sprintf(`federation {
    bundle_endpoint {
      address = "127.0.0.1"
      port    = %s
      profile "https_web" {
        acme {
          domain_name   = %q
          email         = "admin@example.org"
          directory_url = %q
          tos_accepted  = true
        }
      }
    }
  }`, port, name, ca.directory)
	})
	fetch := func(name string) (*tls.ConnectionState, []byte, error) {
		client := &http.Client{Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: ca.issuing},
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, "127.0.0.1:"+port)
			},
		}}
		defer client.CloseIdleConnections()
		resp, err := client.Get("https://" + name + "/")
		if err != nil {
			return nil, nil, err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return resp.TLS, text, err
	}
	var shown *x509.Certificate
	look := func() error {
		state, text, err := fetch(name)
		if err != nil {
			return err
		}
		shown = state.PeerCertificates[0]
		b, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString(site.TrustDomain), text)
		if err == nil && len(b.X509Authorities()) != 1 {
			err = fmt.Errorf("it has %d authorities", len(b.X509Authorities()))
		}
		return err
	}
	if err := s.Server().WaitFor(patiently(t), "a certificate by ACME", look); err != nil {
		t.Fatal(err)
	}
	if err := shown.VerifyHostname(name); err != nil || time.Until(shown.NotAfter) < time.Hour {
		t.Errorf("the certificate is for %v until %s: %v", shown.DNSNames, shown.NotAfter, err)
	}
	if _, _, err := fetch("other.example.org"); err == nil {
		t.Error("another name is served, too")
	}
	first := shown.SerialNumber
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := s.StartServer(patiently(t)); err != nil {
		t.Fatal(err)
	}
	if err := s.Server().WaitFor(patiently(t), "the endpoint", look); err != nil {
		t.Fatal(err)
	}
	if shown.SerialNumber.Cmp(first) != 0 {
		t.Errorf("a restart asked for another certificate: %s, before %s", shown.SerialNumber, first)
	}
	keys, err := filepath.Glob(filepath.Join(s.ServerData(), "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range keys {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(path, "acme") && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s may be read by others: %s", path, info.Mode())
		}
	}
}
