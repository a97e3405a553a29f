package ca

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/assay-id/assay/server/ca/keys"
)

func TestServerCertificate(t *testing.T) {
	serverID := spiffeid.RequireFromPath(testTD, serverPath)

	t.Run("an agent that expects the server's ID accepts it", func(t *testing.T) {
		c, store := open(t, Config{Now: time.Now})
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			server := tls.Server(conn, &tls.Config{GetCertificate: c.ServerCertificate(), MinVersion: tls.VersionTLS12})
			_, _ = io.WriteString(server, "hello")
			_ = server.Close()
		})
		source := x509bundle.NewSet(store.held().X509Bundle())
		conn, err := tls.Dial("tcp", listener.Addr().String(), tlsconfig.TLSClientConfig(source, tlsconfig.AuthorizeID(serverID)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if text, err := io.ReadAll(conn); err != nil || string(text) != "hello" {
			t.Errorf("%q, %v", text, err)
		}
		if n := len(conn.ConnectionState().PeerCertificates); n != 1 {
			t.Errorf("%d certificates were sent, the root among them?", n)
		}
	})

	t.Run("it is renewed at half-life with another key, and always valid", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, store := open(t, Config{Now: time.Now})
			get, start := c.ServerCertificate(), time.Now()
			seen := map[string]time.Duration{}
			for time.Since(start) < 3*time.Hour {
				cert, err := get(nil)
				if err != nil {
					t.Fatal(err)
				}
				if err := verify(store.held(), []*x509.Certificate{cert.Leaf}, time.Now()); err != nil {
					t.Fatal(err)
				}
				key := string(cert.Leaf.SubjectKeyId)
				if _, found := seen[key]; !found {
					seen[key] = time.Since(start)
				}
				<-time.After(time.Minute)
			}
			if len(seen) != 6 {
				t.Errorf("renewed after %v", seen)
			}
		})
	})

	t.Run("the held one serves while no other can be had", func(t *testing.T) {
		now := &clock{now: epoch}
		c, _ := open(t, Config{Now: now.Now, CATTL: time.Hour, X509SVIDTTL: 50 * time.Minute})
		first, err := c.ServerCertificate()(nil)
		if err != nil {
			t.Fatal(err)
		}
		good := c.x509.Load()
		c.x509.Store(nil)
		now.pass(40 * time.Minute)
		if held, err := c.ServerCertificate()(nil); err != nil || held != first {
			t.Errorf("got %v", err)
		}
		now.pass(20 * time.Minute)
		if _, err := c.ServerCertificate()(nil); !errors.Is(err, ErrNoAuthority) {
			t.Errorf("an expired certificate was served: %v", err)
		}
		c.x509.Store(good)
		now.pass(-30 * time.Minute)
		if held, err := c.ServerCertificate()(nil); err != nil || held == first {
			t.Errorf("did not recover: %v", err)
		}
	})

	t.Run("a clock that was set back gets a certificate that is valid now", func(t *testing.T) {
		now := &clock{now: epoch}
		c, _ := open(t, Config{Now: now.Now})
		now.pass(-time.Hour)
		if err := c.step(t.Context()); err != nil { // an authority that is valid now, too
			t.Fatal(err)
		}
		cert, err := c.ServerCertificate()(nil)
		if err != nil {
			t.Fatal(err)
		}
		if cert.Leaf.NotBefore.After(now.Now()) {
			t.Errorf("valid from %s, it is %s", cert.Leaf.NotBefore, now.Now())
		}
	})
}

func TestConcurrency(t *testing.T) {
	t.Run("many sign while authorities change", func(t *testing.T) {
		now := &clock{now: epoch}
		reg := prometheus.NewRegistry()
		c, store := open(t, Config{Now: now.Now, Metrics: reg})
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				key := newKey(t)
				for {
					select {
					case <-stop:
						return
					default:
					}
					if _, err := c.SignWorkload(t.Context(), WorkloadParams{PublicKey: key.Public(), ID: workload}); err != nil {
						t.Error(err)
						return
					}
					if _, err := c.SignJWT(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}}); err != nil {
						t.Error(err)
						return
					}
					if _, err := c.ServerCertificate()(nil); err != nil {
						t.Error(err)
						return
					}
					_ = c.Authorities()
				}
			})
		}
		for range 20 {
			now.pass(time.Hour)
			if err := c.step(t.Context()); err != nil {
				t.Error(err)
			}
			issueChecked(t, c, store, now.Now())
		}
		close(stop)
		wg.Wait()
		if len(store.held().X509) < 2 {
			t.Error("no authority changed")
		}
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		signed := 0.0
		for _, f := range families {
			if f.GetName() == "assay_server_ca_signed_total" {
				for _, m := range f.GetMetric() {
					signed += m.GetCounter().GetValue()
				}
			}
		}
		if signed < 40 {
			t.Errorf("counted %v signatures", signed)
		}
		if _, err := Open(t.Context(), keys.Memory(), newStore(), testTD, Config{Metrics: reg}); err == nil {
			t.Error("two CAs count in one registry")
		}
	})
}
