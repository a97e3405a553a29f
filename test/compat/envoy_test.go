package compat

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/envoy"
	"github.com/assay-id/assay/test/lab/site"
)

// envoyBinary returns the path of a real Envoy.
func envoyBinary(t *testing.T) string {
	t.Helper()
	binary, err := envoy.Install(t.Context(), bin)
	if err != nil {
		lab.Missing(t, "Envoy", err)
	}
	return binary
}

// envoyPath gives Envoy a second name in the file system.
func envoyPath(t *testing.T, name string) string {
	t.Helper()
	path, err := envoy.Named(envoyBinary(t), name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// proxy is a running Envoy.
type proxy struct{ *envoy.Proxy }

// startEnvoy starts an Envoy whose program has a path of its own, which is what the agent proves of it.
func startEnvoy(t *testing.T, s *site.Site, agent *site.Agent, o envoy.Options) *proxy {
	t.Helper()
	o.Dir, o.Agent, o.Program = s.Dir, agent.Socket, envoyPath(t, o.Name)
	p, err := envoy.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("end of %s's log:\n%s", o.Name, site.Tail(p.Log, 40))
		}
	})
	return &proxy{p}
}

// shows reports what Envoy itself says of its certificates, until good accepts it.
func (p *proxy) shows(t *testing.T, what string, good func(certificates string) bool) {
	t.Helper()
	err := p.WaitFor(patiently(t), p.Name+" to show "+what, func() error {
		all, err := p.Certificates(t.Context())
		if err == nil && !good(all) {
			err = errors.New(all)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// eventually makes requests until one does as wanted.
func (p *proxy) eventually(t *testing.T, what string, good func(body string, err error) bool) {
	t.Helper()
	begun := time.Now()
	err := p.WaitFor(patiently(t), what, func() error {
		body, err := envoy.Get(t.Context(), envoy.Over(p.Listener), "http://envoy/")
		if good(body, err) {
			return nil
		}
		return fmt.Errorf("got %q, %w", body, err)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: after %v", what, time.Since(begun).Round(time.Millisecond))
}

func served(_ string, err error) bool  { return err == nil }
func refused(_ string, err error) bool { return err != nil && strings.Contains(err.Error(), "503") }

// TestEnvoy runs two real Envoys that speak mTLS with what the agent's SDS gives them, the one by state
// of the world and with Envoy's SPIFFE validator, the other by delta and with plain authorities.
func TestEnvoy(t *testing.T) {
	envoyBinary(t)
	s := newSite(t, nil)
	agent := newAgent(t, s, "agent")
	client, parent := entries(t, s), onlyAgent(t, s)
	identify := func(path, name string) *types.Entry {
		e := newEntry(parent, path)
		e.Selectors = []*types.Selector{{Type: "unix", Value: "path:" + envoyPath(t, name)}}
		return createEntry(t, client, e)
	}
	change := func(e *types.Entry, how func(*types.Entry)) {
		t.Helper()
		how(e)
		resp, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}})
		if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
			t.Fatal(resp, err)
		}
	}
	front, back := identify("/front", "front"), identify("/back", "back")

	app := filepath.Join(s.Dir, "app.sock")
	l, err := net.Listen("unix", app)
	if err != nil {
		t.Fatal(err)
	}
	served200 := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "hello")
	})}
	var wg sync.WaitGroup
	wg.Go(func() { _ = served200.Serve(l) })
	t.Cleanup(func() { served200.Close(); wg.Wait() })
	behind := startEnvoy(t, s, agent, envoy.Options{
		Name: "back", To: app, In: &envoy.TLS{Server: true, API: "DELTA_GRPC", Peer: "spiffe://" + site.TrustDomain + "/front"},
		Metadata: "disable_spiffe_cert_validation: true",
	})
	before := startEnvoy(t, s, agent, envoy.Options{
		Name: "front", To: behind.Listener, Out: &envoy.TLS{API: "GRPC", Peer: "spiffe://" + site.TrustDomain + "/back"},
	})
	before.eventually(t, "a request through both", served)

	underLoad := func(t *testing.T, meanwhile func()) {
		t.Helper()
		ctx, stop := context.WithCancel(t.Context())
		var made, failed atomic.Int64
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for ctx.Err() == nil {
					if _, err := envoy.Get(ctx, envoy.Over(before.Listener), "http://envoy/"); err != nil && ctx.Err() == nil {
						failed.Add(1)
						t.Error(err)
						return
					}
					made.Add(1)
				}
			})
		}
		meanwhile()
		stop()
		wg.Wait()
		t.Logf("%d requests, %d failed", made.Load(), failed.Load())
		if made.Load() == 0 {
			t.Error("no request was made meanwhile")
		}
	}
	rotate := func(name string) {
		t.Helper()
		change(front, func(e *types.Entry) { e.DnsNames = []string{name} })
		change(back, func(e *types.Entry) { e.DnsNames = []string{name} })
		has := func(certificates string) bool { return strings.Contains(certificates, name) }
		before.shows(t, "the new certificate", has)
		behind.shows(t, "the new certificate", has)
	}
	t.Run("rotations fail no request", func(t *testing.T) {
		underLoad(t, func() {
			for n := range 20 {
				rotate(fmt.Sprintf("rotation-%d.example.org", n))
			}
		})
	})
	t.Run("a restart of the agent fails no request", func(t *testing.T) {
		underLoad(t, func() {
			if err := agent.Stop(15 * time.Second); err != nil {
				t.Error(err)
			}
			if err := agent.Start(patiently(t)); err != nil {
				t.Error(err)
			}
			rotate("restarted.example.org")
		})
	})
	t.Run("another identity is refused by the other Envoy", func(t *testing.T) {
		change(front, func(e *types.Entry) { e.SpiffeId.Path = "/intruder" })
		before.eventually(t, "refusal of another identity", refused)
		change(front, func(e *types.Entry) { e.SpiffeId.Path = "/front" })
		before.eventually(t, "service of the right identity", served)
	})
	t.Run("a deleted client is refused", func(t *testing.T) {
		deleteEntry(t, client, front.GetId())
		before.eventually(t, "refusal of a client without identity", refused)
		before.shows(t, "no identity", func(certificates string) bool { return !strings.Contains(certificates, "/front") })
		front = identify("/front", "front")
		before.eventually(t, "service of the client that has an identity again", served)
	})
	t.Run("a deleted server is refused", func(t *testing.T) {
		deleteEntry(t, client, back.GetId())
		before.eventually(t, "refusal of a server without identity", refused)
		behind.shows(t, "no identity", func(certificates string) bool { return !strings.Contains(certificates, "/back") })
		identify("/back", "back")
		before.eventually(t, "service of the server that has an identity again", served)
	})
}
