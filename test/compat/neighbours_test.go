package compat

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/site"
)

// The programs that stand beside SPIRE, unchanged.
const (
	oidcProviderPackage = "github.com/spiffe/spire/support/oidc-discovery-provider"
	helperPackage       = "github.com/spiffe/spiffe-helper/cmd/spiffe-helper"
	controllerPackage   = "github.com/spiffe/spire-controller-manager/cmd"
)

// controller builds the spire-controller-manager, whose module is its own.
func controller(t *testing.T) string {
	t.Helper()
	out, err := filepath.Abs(filepath.Join(bin, "peers", "spire-controller-manager"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", out, controllerPackage)
	cmd.Dir = filepath.Join("peers", "controller")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", controllerPackage, err, text)
	}
	return out
}

// started runs a neighbour until the test ends.
func started(t *testing.T, log, bin string, args ...string) *site.Process {
	t.Helper()
	p, err := site.Start(log, nil, bin, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("end of %s:\n%s", log, site.Tail(log, 40))
		}
	})
	return p
}

// waitFor waits until ready says nil, or the process ends.
func waitFor(t *testing.T, p *site.Process, what string, ready func() error) {
	t.Helper()
	if err := p.WaitFor(patiently(t), what, ready); err != nil {
		t.Fatal(err)
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// overUnix is a client that finds every host at a Unix socket.
func overUnix(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
}

func fetch(t *testing.T, client *http.Client, url string) ([]byte, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return body, err
}

func TestOIDCDiscoveryProvider(t *testing.T) {
	provider := peer(t, oidcProviderPackage)
	s := newSite(t, func(s *site.Site) { s.ServerExtra = `jwt_issuer = "https://oidc.example.org"` })
	a := newAgent(t, s, "agent")
	createEntry(t, entries(t, s), newEntry(onlyAgent(t, s), "/shop"))
	var token string
	waitFor(t, a.Process, "a JWT-SVID", func() error {
		out, err := a.CLI(t.Context(), "api", "fetch", "jwt", "-audience", "cloud", "-socketPath", a.Socket, "-output", "json")
		if err != nil {
			return err
		}
		var answers []struct {
			SVIDs []struct {
				SVID string `json:"svid"`
			} `json:"svids"`
		}
		unmarshal(t, out, &answers)
		token = answers[0].SVIDs[0].SVID
		return nil
	})
	for name, source := range map[string]string{
		"through the server's socket": fmt.Sprintf("server_api {\n  address = \"unix://%s\"\n  poll_interval = \"1s\"\n}", s.ServerSocket()),
		"through the Workload API":    fmt.Sprintf("workload_api {\n  socket_path = %q\n  trust_domain = %q\n  poll_interval = \"1s\"\n}", a.Socket, site.TrustDomain),
	} {
		t.Run("it publishes the keys that verify our tokens, "+name, func(t *testing.T) {
			dir, err := os.MkdirTemp(s.Dir, "oidc") //nolint:usetesting // a socket goes there, whose path must be short
			if err != nil {
				t.Fatal(err)
			}
			socket := filepath.Join(dir, "oidc.sock")
			writeFile(t, filepath.Join(dir, "oidc.conf"), fmt.Sprintf("domains = [\"oidc.example.org\"]\nlisten_socket_path = %q\nlog_level = \"debug\"\n%s\n", socket, source))
			p := started(t, filepath.Join(dir, "oidc.log"), provider, "-config", filepath.Join(dir, "oidc.conf"))
			client := overUnix(socket)
			var set jose.JSONWebKeySet
			waitFor(t, p, "the key set", func() error {
				body, err := fetch(t, client, "http://oidc.example.org/keys")
				if err != nil {
					return err
				}
				return json.Unmarshal(body, &set)
			})
			body, err := fetch(t, client, "http://oidc.example.org/.well-known/openid-configuration")
			if err != nil {
				t.Fatal(err)
			}
			var document struct {
				Issuer string `json:"issuer"`
				Keys   string `json:"jwks_uri"`
			}
			unmarshal(t, string(body), &document)
			if document.Issuer != "https://oidc.example.org" || document.Keys != "https://oidc.example.org/keys" {
				t.Errorf("the document is %s", body)
			}
			parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
			if err != nil {
				t.Fatal(err)
			}
			keys := set.Key(parsed.Headers[0].KeyID)
			if len(keys) != 1 {
				t.Fatalf("%d keys have the token's key ID %q", len(keys), parsed.Headers[0].KeyID)
			}
			var claims jwt.Claims
			if err := parsed.Claims(keys[0].Key, &claims); err != nil {
				t.Fatal(err)
			}
			if err := claims.Validate(jwt.Expected{Issuer: document.Issuer, Subject: "spiffe://example.org/shop", AnyAudience: jwt.Audience{"cloud"}, Time: time.Now()}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSPIFFEHelper(t *testing.T) {
	helper := peer(t, helperPackage)
	s := newSite(t, nil)
	a := newAgent(t, s, "agent")
	client := entries(t, s)
	entry := createEntry(t, client, newEntry(onlyAgent(t, s), "/shop"))
	dir := filepath.Join(s.Dir, "helper")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "helper.conf"), fmt.Sprintf(`agent_address = %q
cert_dir = %q
svid_file_name = "svid.pem"
svid_key_file_name = "svid.key"
svid_bundle_file_name = "bundle.pem"
jwt_bundle_file_name = "jwt_bundle.json"
jwt_svids = [{ jwt_audience = "cloud", jwt_svid_file_name = "jwt.token" }]
daemon_mode = true
`, a.Socket, dir))
	p := started(t, filepath.Join(s.Dir, "helper.log"), helper, "-config", filepath.Join(dir, "helper.conf"))
	leaf := func() (*x509.Certificate, error) {
		text, err := os.ReadFile(filepath.Join(dir, "svid.pem"))
		if err != nil {
			return nil, err
		}
		block, _ := pem.Decode(text)
		if block == nil {
			return nil, fmt.Errorf("%d bytes without a certificate", len(text))
		}
		return x509.ParseCertificate(block.Bytes)
	}
	var first *x509.Certificate
	waitFor(t, p, "the files", func() (err error) {
		for _, name := range []string{"svid.key", "bundle.pem", "jwt_bundle.json", "jwt.token"} {
			if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
		first, err = leaf()
		return err
	})
	t.Run("it writes what verifies", func(t *testing.T) {
		text, err := os.ReadFile(filepath.Join(dir, "bundle.pem"))
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(text) {
			t.Fatal("no certificate in the bundle")
		}
		if _, err := first.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Error(err)
		}
		if got := first.URIs[0].String(); got != "spiffe://example.org/shop" {
			t.Errorf("the certificate is of %s", got)
		}
	})
	t.Run("it follows an entry that changes", func(t *testing.T) {
		entry.DnsNames = []string{"shop.example.org"}
		resp, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{entry}})
		if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
			t.Fatal(resp, err)
		}
		waitFor(t, p, "the new certificate", func() error {
			now, err := leaf()
			if err == nil && !slices.Contains(now.DNSNames, "shop.example.org") {
				err = fmt.Errorf("it has the names %v", now.DNSNames)
			}
			return err
		})
	})
}

const manifest = `apiVersion: spire.spiffe.io/v1alpha1
kind: ClusterStaticEntry
metadata:
  name: %s
spec:
  className: assay
  spiffeID: spiffe://example.org/%s
  parentID: spiffe://example.org/node
  selectors: ["unix:uid:%d"]
  x509SVIDTTL: %s
  hint: %s
  dnsNames: ["%s.example.org"]
`

func TestControllerManagerWithStaticManifests(t *testing.T) {
	manager := controller(t)
	s := newSite(t, nil)
	client := entries(t, s)
	foreign := createEntry(t, client, &types.Entry{
		SpiffeId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: "/foreign"},
		ParentId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: "/node"},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}},
	})
	dir := filepath.Join(s.Dir, "controller")
	manifests := filepath.Join(dir, "manifests")
	if err := os.MkdirAll(manifests, 0o700); err != nil {
		t.Fatal(err)
	}
	shop := filepath.Join(manifests, "shop.yaml")
	writeFile(t, shop, fmt.Sprintf(manifest, "shop", "shop", 1000, "1h", "outer", "shop"))
	writeFile(t, filepath.Join(manifests, "till.yaml"), fmt.Sprintf(manifest, "till", "till", 1001, "2h", "inner", "till"))
	writeFile(t, filepath.Join(manifests, "other.yaml"), `apiVersion: spire.spiffe.io/v1alpha1
kind: ClusterFederatedTrustDomain
metadata:
  name: other
spec:
  className: assay
  trustDomain: other.test
  bundleEndpointURL: https://127.0.0.1:1/bundle
  bundleEndpointProfile:
    type: https_web
`)
	writeFile(t, filepath.Join(dir, "config.yaml"), fmt.Sprintf(`apiVersion: spire.spiffe.io/v1alpha1
kind: ControllerManagerConfig
clusterName: test
clusterDomain: cluster.local
trustDomain: %s
className: assay
entryIDPrefix: scm
gcInterval: 500000000
spireServerSocketPath: %q
staticManifestPath: %q
metrics:
  bindAddress: "0"
health:
  healthProbeBindAddress: "127.0.0.1:0"
`, site.TrustDomain, s.ServerSocket(), manifests))
	p := started(t, filepath.Join(s.Dir, "controller.log"), manager, "-config", filepath.Join(dir, "config.yaml"))
	list := func() map[string]*types.Entry {
		resp, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		byPath := map[string]*types.Entry{}
		for _, e := range resp.GetEntries() {
			byPath[e.GetSpiffeId().GetPath()] = e
		}
		return byPath
	}
	waitFor(t, p, "the entries of the manifests", func() error {
		if have := list(); have["/shop"] == nil || have["/till"] == nil {
			return fmt.Errorf("there are %v", have)
		}
		return nil
	})
	t.Run("the entries are as the manifests say", func(t *testing.T) {
		e := list()["/shop"]
		if e.GetX509SvidTtl() != 3600 || e.GetHint() != "outer" || !slices.Equal(e.GetDnsNames(), []string{"shop.example.org"}) || !strings.HasPrefix(e.GetId(), "scm.") {
			t.Errorf("the entry is %v", e)
		}
	})
	t.Run("the federation relationship is there", func(t *testing.T) {
		waitFor(t, p, "the relationship", func() error {
			out, err := s.ServerCLI(t.Context(), "federation", "list")
			if err == nil && !strings.Contains(out, "other.test") {
				err = fmt.Errorf("there is: %s", out)
			}
			return err
		})
	})
	t.Run("a manifest that changes changes its entry", func(t *testing.T) {
		writeFile(t, shop, fmt.Sprintf(manifest, "shop", "shop", 1000, "30m", "outer", "shop"))
		waitFor(t, p, "the change", func() error {
			if e := list()["/shop"]; e.GetX509SvidTtl() != 1800 {
				return fmt.Errorf("the entry is %v", e)
			}
			return nil
		})
	})
	t.Run("a manifest that is removed takes its entry along, and nobody else's", func(t *testing.T) {
		if err := os.Remove(shop); err != nil {
			t.Fatal(err)
		}
		waitFor(t, p, "the removal", func() error {
			if e := list()["/shop"]; e != nil {
				return fmt.Errorf("the entry is %v", e)
			}
			return nil
		})
		have := list()
		if have["/till"] == nil || have["/foreign"].GetId() != foreign.GetId() {
			t.Errorf("what is left is %v", have)
		}
	})
	t.Run("what it tried out at its start is gone again", func(t *testing.T) {
		for path := range list() {
			if strings.Contains(path, "unsupported-fields-test") {
				t.Errorf("%s is there", path)
			}
		}
	})
}
