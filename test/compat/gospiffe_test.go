package compat

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
)

func TestGoSPIFFE(t *testing.T) {
	s := newSite(t, nil)
	agent := newAgent(t, s, "agent")
	client := entries(t, s)
	entry := createEntry(t, client, newEntry(onlyAgent(t, s), "/shop"))
	w := watch(t, agent.Socket)
	first := w.until(t, "X509-SVID", hasID("/shop"))

	t.Run("JWTSource fetches, and its bundle verifies", func(t *testing.T) {
		checkJWT(t, agent.Socket, "/shop")
	})

	ctx := patiently(t)
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+agent.Socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })

	t.Run("mTLS between two X509Sources", func(t *testing.T) {
		me := spiffeid.RequireFromString("spiffe://" + site.TrustDomain + "/shop")
		if err := handshake(ctx, source, tlsconfig.AuthorizeID(me)); err != nil {
			t.Fatal(err)
		}
		stranger := spiffeid.RequireFromString("spiffe://" + site.TrustDomain + "/stranger")
		if err := handshake(ctx, source, tlsconfig.AuthorizeID(stranger)); err == nil {
			t.Fatal("a peer with another ID was accepted")
		}
	})

	t.Run("openssl verifies the chain", func(t *testing.T) {
		openssl, err := site.Tool("openssl")
		if err != nil {
			lab.Missing(t, "openssl", err)
		}
		svid := first.x509.DefaultSVID()
		bundle, _ := first.x509.Bundles.Get(svid.ID.TrustDomain())
		dir := t.TempDir()
		leaf, root := filepath.Join(dir, "leaf.pem"), filepath.Join(dir, "root.pem")
		for path, der := range map[string][]byte{leaf: svid.Certificates[0].Raw, root: bundle.X509Authorities()[0].Raw} {
			if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for _, purpose := range []string{"sslserver", "sslclient"} {
			if _, err := site.Run(ctx, nil, openssl, "verify", "-x509_strict", "-purpose", purpose, "-CAfile", root, leaf); err != nil {
				t.Error(err)
			}
		}
	})

	t.Run("an update is pushed", func(t *testing.T) {
		entry.DnsNames = []string{"shop.example.org"}
		resp, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{entry}})
		if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
			t.Fatal(resp, err)
		}
		w.until(t, "SVID with the DNS name", func(got sight) bool {
			return got.x509 != nil && len(got.x509.DefaultSVID().Certificates[0].DNSNames) == 1
		})
	})
	t.Run("a younger entry does not take the default's place", func(t *testing.T) {
		createEntry(t, client, newEntry(onlyAgent(t, s), "/another"))
		got := w.until(t, "second SVID", func(got sight) bool { return got.x509 != nil && len(got.x509.SVIDs) == 2 })
		if got.x509.DefaultSVID().ID.Path() != "/shop" {
			t.Fatalf("the default is now %s", got.x509.DefaultSVID().ID)
		}
	})
	t.Run("a delete is pushed", func(t *testing.T) {
		deleteEntry(t, client, entry.GetId())
		w.until(t, "context without /shop", hasID("/another"))
	})
}

// handshake does mTLS over a real socket, both sides with the source, and the client authorizing
// the server with the given function.
func handshake(ctx context.Context, source *workloadapi.X509Source, authorize tlsconfig.Authorizer) error {
	listener, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))
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
	dialer := &tls.Dialer{NetDialer: &net.Dialer{}, Config: tlsconfig.MTLSClientConfig(source, source, authorize)}
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
