package compat

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/port"
	"github.com/assay-id/assay/test/lab/site"
)

// realm is one trust domain of two: a server with a bundle endpoint, an agent and a workload.
type realm struct {
	*site.Site
	td     spiffeid.TrustDomain
	far    spiffeid.TrustDomain
	url    string
	local  localauthorityv1.LocalAuthorityClient
	source *workloadapi.X509Source
}

// newRealm starts a server whose bundle endpoint has the profile.
func newRealm(t *testing.T, domain, far, profile string) *realm {
	t.Helper()
	free, err := port.Free()
	if err != nil {
		t.Fatal(err)
	}
	r := &realm{
		td: spiffeid.RequireTrustDomainFromString(domain), far: spiffeid.RequireTrustDomainFromString(far),
		url: fmt.Sprintf("https://127.0.0.1:%d/", free),
	}
	r.Site = newSite(t, func(s *site.Site) {
		s.Domain = domain
		s.ServerExtra = fmt.Sprintf(`federation {
    min_refresh_interval = "1s"
    bundle_endpoint {
      address      = "127.0.0.1"
      port         = %d
      refresh_hint = "2s"
      %s
    }
  }`, free, profile)
	})
	conn, err := r.DialServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	r.local = localauthorityv1.NewLocalAuthorityClient(conn)
	return r
}

// federate makes the federation with the other realm.
func (r *realm) federate(t *testing.T, args ...string) {
	t.Helper()
	if out, err := r.ServerCLI(t.Context(), append([]string{"federation", "create", "-trustDomain", r.far.Name()}, args...)...); err != nil {
		t.Fatal(err, out)
	}
	if out, err := r.ServerCLI(t.Context(), "federation", "refresh", "-id", r.far.Name()); err != nil {
		t.Fatal(err, out)
	}
}

// work starts an agent and a workload that federates.
func (r *realm) work(t *testing.T) {
	t.Helper()
	agent := newAgent(t, r.Site, "agent")
	createEntry(t, entries(t, r.Site), &types.Entry{
		SpiffeId:      &types.SPIFFEID{TrustDomain: r.td.Name(), Path: "/work"},
		ParentId:      &types.SPIFFEID{TrustDomain: r.td.Name(), Path: onlyAgent(t, r.Site)},
		Selectors:     []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}},
		FederatesWith: []string{r.far.Name()},
	})
	var err error
	if r.source, err = workloadapi.NewX509Source(patiently(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+agent.Socket))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.source.Close() })
	r.until(t, "the bundle from abroad", r.believes(1))
}

// until waits for what the workload has.
func (r *realm) until(t *testing.T, what string, good func() bool) {
	t.Helper()
	ctx := patiently(t)
	for !good() {
		if err := r.source.WaitUntilUpdated(ctx); err != nil {
			t.Fatalf("%s: no %s: %v", r.td, what, err)
		}
	}
}

// believes says whether the workload has so many authorities of the other trust domain.
func (r *realm) believes(n int) func() bool {
	return func() bool {
		b, err := r.source.GetX509BundleForTrustDomain(r.far)
		return err == nil && len(b.X509Authorities()) == n
	}
}

// shows says whether the workload's SVID is by the authority.
func (r *realm) shows(authority string) func() bool {
	return func() bool {
		svid, err := r.source.GetX509SVID()
		return err == nil && hex.EncodeToString(svid.Certificates[0].AuthorityKeyId) == authority
	}
}

// greet does mTLS between the workloads of two realms.
func greet(ctx context.Context, server, client *realm) error {
	return greetBetween(ctx, server.source, spiffeid.RequireFromPath(server.td, "/work"), client.source, spiffeid.RequireFromPath(client.td, "/work"))
}

// greetBetween does mTLS between two workloads, each of which wants just the other.
func greetBetween(ctx context.Context, server *workloadapi.X509Source, serverID spiffeid.ID, client *workloadapi.X509Source, clientID spiffeid.ID) error {
	listener, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(server, server, tlsconfig.AuthorizeID(clientID)))
	if err != nil {
		return err
	}
	defer listener.Close()
	served := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			served <- err
			return
		}
		defer conn.Close()
		_, err = fmt.Fprintln(conn, "hello")
		served <- err
	}()
	dialer := &tls.Dialer{Config: tlsconfig.MTLSClientConfig(client, client, tlsconfig.AuthorizeID(serverID))}
	conn, err := dialer.DialContext(ctx, "tcp", listener.Addr().String())
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := bufio.NewReader(conn).ReadString('\n'); err != nil {
		return err
	}
	return <-served
}

// rotate replaces the X.509 authority of one realm while the other looks on.
func rotate(t *testing.T, r, other *realm) {
	t.Helper()
	ctx := patiently(t)
	meet := func(when string) {
		t.Helper()
		for _, pair := range [][2]*realm{{r, other}, {other, r}} {
			if err := greet(ctx, pair[0], pair[1]); err != nil {
				t.Fatalf("%s: %s serves %s: %v", when, pair[0].td, pair[1].td, err)
			}
		}
	}
	meet("before")
	prepared, err := r.local.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := prepared.GetPreparedAuthority().GetAuthorityId()
	other.until(t, "second authority from abroad", other.believes(2))
	state, err := r.local.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	old := state.GetActive().GetAuthorityId()
	if _, err := r.local.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: next}); err != nil {
		t.Fatal(err)
	}
	meet("activated")
	if _, err := r.local.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	r.until(t, "SVID by the new authority", r.shows(next))
	meet("tainted")
	if _, err := r.local.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	other.until(t, "new authority alone", other.believes(1))
	meet("revoked")
}

// TestFederation has two trust domains, one with each profile of bundle endpoint, through a rotation of
// either's authority.
func TestFederation(t *testing.T) {
	dir := t.TempDir()
	cert, key := webCertificate(t, dir)
	t.Setenv("SSL_CERT_FILE", cert) // what the servers take for the web's authorities
	spiffe := newRealm(t, "spiffe.test", "web.test", `profile "https_spiffe" {}`)
	web := newRealm(t, "web.test", "spiffe.test", fmt.Sprintf(`profile "https_web" {
        serving_cert_file {
          cert_file_path = %q
          key_file_path  = %q
        }
      }`, cert, key))
	bundle, err := spiffe.WriteBundle(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	spiffe.federate(t, "-bundleEndpointURL", web.url, "-bundleEndpointProfile", "https_web")
	web.federate(t, "-bundleEndpointURL", spiffe.url, "-bundleEndpointProfile", "https_spiffe",
		"-endpointSpiffeID", "spiffe://spiffe.test/spire/server", "-trustDomainBundlePath", bundle)
	spiffe.work(t)
	web.work(t)
	t.Run("the authority behind https_spiffe rotates", func(t *testing.T) { rotate(t, spiffe, web) })
	t.Run("the authority behind https_web rotates", func(t *testing.T) { rotate(t, web, spiffe) })
}

// TestFederatedBundleIsPushed measures how long a bundle takes from the server's store to a workload.
func TestFederatedBundleIsPushed(t *testing.T) {
	r := &realm{td: spiffeid.RequireTrustDomainFromString(site.TrustDomain), far: spiffeid.RequireTrustDomainFromString("far.test"), Site: newSite(t, nil)}
	conn, err := r.DialServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	b := &types.Bundle{TrustDomain: r.far.Name()}
	set := func() {
		t.Helper()
		path, _ := webCertificate(t, t.TempDir())
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: block.Bytes})
		resp, err := bundlev1.NewBundleClient(conn).BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b}})
		if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
			t.Fatal(resp, err)
		}
	}
	set()
	r.work(t)
	var waits []time.Duration
	for n := 2; n <= 6; n++ {
		begin := time.Now()
		set()
		r.until(t, "new bundle", r.believes(n))
		waits = append(waits, time.Since(begin))
	}
	slices.Sort(waits)
	t.Logf("from the call to the workload: %v", waits)
	if median := waits[len(waits)/2]; median > time.Second {
		t.Errorf("a bundle takes %s to a workload: it is not pushed", median)
	}
}

// webCertificate makes a certificate for 127.0.0.1 that signs itself.
func webCertificate(t *testing.T, dir string) (certPath, keyPath string) {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "web"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPath, keyPath = filepath.Join(dir, "web.pem"), filepath.Join(dir, "web.key")
	for path, block := range map[string]*pem.Block{
		certPath: {Type: "CERTIFICATE", Bytes: der}, keyPath: {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certPath, keyPath
}
