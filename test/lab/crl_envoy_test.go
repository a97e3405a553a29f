package lab_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/envoy"
	"github.com/assay-id/assay/test/lab/site"
)

// byPath has an agent prove the path of the programs beside it, which is how Envoys have their identity.
const byPath = "workload_attestor \"unix\" {\n  discover_workload_path = true\n}\n"

// gate is an Envoy that asks for certificates of the trust domain. All it knows, it has from the agent.
type gate struct {
	*envoy.Proxy
	how string
}

// startGates starts an Envoy for each way to verify others.
func startGates(n *node) []*gate {
	n.t.Helper()
	binary, err := envoy.Install(n.ctx, "../../bin")
	if err != nil {
		lab.Missing(n.t, "Envoy", err)
	}
	var gates []*gate
	for _, way := range []struct{ how, name, trust, metadata string }{
		{"Envoy with its SPIFFE validator", "gate-spiffe", "ROOTCA", ""},
		{"Envoy with all bundles", "gate-all", "ALL", ""},
		{"Envoy with plain authorities", "gate-plain", "ROOTCA", "disable_spiffe_cert_validation: true"},
	} {
		program, err := envoy.Named(binary, way.name)
		n.must(err)
		_, err = n.ServerCLI(n.ctx, "entry", "create", "-spiffeID", "spiffe://"+site.TrustDomain+"/"+way.name, "-parentID", n.parent, "-selector", "unix:path:"+program)
		n.must(err)
		proxy, err := envoy.Start(envoy.Options{
			Name: way.name, Dir: n.Dir, Program: program, Agent: n.agent.Socket, Metadata: way.metadata,
			In: &envoy.TLS{Server: true, API: "DELTA_GRPC", Trust: way.trust},
		})
		n.must(err)
		n.t.Cleanup(func() {
			proxy.Kill()
			if n.t.Failed() {
				n.t.Logf("end of %s's log:\n%s", way.name, site.Tail(proxy.Log, 20))
			}
		})
		gates = append(gates, &gate{proxy, way.how})
	}
	return gates
}

// admits says whether the Envoy answers who comes with a certificate.
func (g *gate) admits(ctx context.Context, svid tls.Certificate) error {
	transport := &http.Transport{DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", g.Listener)
		if err != nil {
			return nil, err
		}
		return tls.Client(conn, &tls.Config{
			InsecureSkipVerify:   true, // it is the Envoy that verifies
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &svid, nil },
		}), nil
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://envoy/", http.NoBody)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("it answers %d", resp.StatusCode)
	}
	return nil
}

// refuses says whether the Envoy refuses who comes with a certificate, and that it is for the certificate.
func (g *gate) refuses(ctx context.Context, svid tls.Certificate) error {
	err := g.admits(ctx, svid)
	var said *net.OpError
	switch {
	case err == nil:
		return errors.New("it is admitted")
	case errors.As(err, &said) && said.Op == "remote error": // as crypto/tls has it: an alert
		return nil
	}
	return fmt.Errorf("it is not refused for its certificate: %w", err)
}

// all waits until what is said holds at each Envoy.
func all(t *testing.T, n *node, gates []*gate, what string, holds func(*gate) error) {
	t.Helper()
	for _, g := range gates {
		begun := time.Now()
		if err := g.WaitFor(n.ctx, g.how+": "+what, func() error { return holds(g) }); err != nil {
			t.Error(err)
		}
		t.Logf("%s: %s: after %v", g.how, what, time.Since(begun).Round(time.Millisecond))
	}
}

// never watches in the background that no Envoy admits who comes with the certificate, until the result is
// called.
func never(t *testing.T, n *node, gates []*gate, svid tls.Certificate) (end func()) {
	t.Helper()
	ctx, stop := context.WithCancel(n.ctx)
	done := make(chan int)
	go func() {
		tries := 0
		for ; ctx.Err() == nil; tries++ {
			for _, g := range gates {
				if g.admits(ctx, svid) == nil {
					t.Errorf("%s admits what was withdrawn", g.how)
				}
			}
		}
		done <- tries
	}()
	return func() {
		t.Helper()
		stop()
		t.Logf("the withdrawn one was tried %d times meanwhile", <-done)
	}
}
