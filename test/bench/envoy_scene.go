package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/envoy"
	"github.com/assay-id/assay/test/lab/port"
	"github.com/assay-id/assay/test/lab/site"
)

// envoyPatience is what the scene may take: far above what it does.
const envoyPatience = 5 * time.Minute

// betweenEnvoys puts load on two real Envoys that speak mTLS, with a handshake for each request, while the
// authority of both is replaced again and again, and counts what failed.
func betweenEnvoys(ctx context.Context, b *bench) error {
	binary, err := envoy.Install(ctx, b.Bin)
	var wrk string
	if err == nil {
		wrk, err = site.Tool("wrk")
	}
	if err != nil {
		if os.Getenv("REQUIRE_REAL") == "1" {
			return err
		}
		fmt.Fprintln(os.Stderr, "bench:   left out:", err)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, envoyPatience)
	defer cancel()
	if err := b.startAgent(ctx, ""); err != nil {
		return err
	}
	pair, err := b.startPair(ctx, binary)
	if err != nil {
		return err
	}
	load, err := pair.load(b, wrk)
	if err != nil {
		return err
	}
	defer load.Kill()
	rotations := max(3, b.n(2000)/100)
	begun := time.Now()
	authorities := localauthorityv1.NewLocalAuthorityClient(b.conn)
	for i := range rotations {
		if err := pair.rotate(ctx, b, authorities); err != nil {
			return fmt.Errorf("rotation %d: %w", i+1, err)
		}
	}
	took := time.Since(begun)
	// Before wrk leaves in the middle of handshakes.
	shook, bad, err := pair.handshakes(ctx)
	if err != nil {
		return err
	}
	if err := load.Signal(syscall.SIGINT); err != nil {
		return err
	}
	<-load.Done()
	c, err := counted(filepath.Join(b.Dir, "wrk.log"))
	if err != nil {
		return err
	}
	b.report(figure{"Envoy pair under load through 20 rotations: requests failed", "", 0, fmt.Sprintf("of %d", c.requests)}, float64(c.failed+bad),
		fmt.Sprintf("(must be 0; %d rotations, %.1f s each; %d handshakes, %.0f requests/s)", rotations, took.Seconds()/float64(rotations), shook, float64(c.requests)/took.Seconds()))
	if c.failed+bad > 0 || c.requests == 0 {
		return fmt.Errorf("%d requests, %d failed, %d handshakes failed: wrk says\n%s", c.requests, c.failed, bad, site.Tail(filepath.Join(b.Dir, "wrk.log"), 20))
	}
	return nil
}

// pair are two Envoys: front takes plain requests at a port and passes them to back over mTLS.
type pair struct {
	front, back *envoy.Proxy
	port        int
}

func (b *bench) startPair(ctx context.Context, binary string) (*pair, error) {
	p := &pair{}
	var err error
	if p.port, err = port.Free(); err != nil {
		return nil, err
	}
	begin := func(o envoy.Options) (*envoy.Proxy, error) {
		o.Dir, o.Agent = b.Dir, b.agent.Socket
		if o.Program, err = envoy.Named(binary, o.Name); err != nil {
			return nil, err
		}
		if _, err := b.create(ctx, []*types.Entry{entryFor(b.node, "/"+o.Name, "path:"+o.Program)}); err != nil {
			return nil, err
		}
		proxy, err := envoy.Start(o)
		if err == nil {
			b.later(proxy.Kill)
		}
		return proxy, err
	}
	id := "spiffe://" + site.TrustDomain
	if p.back, err = begin(envoy.Options{Name: "bench-back", In: &envoy.TLS{Server: true, API: "DELTA_GRPC", Peer: id + "/bench-front"}}); err != nil {
		return nil, err
	}
	p.front, err = begin(envoy.Options{Name: "bench-front", Port: p.port, To: p.back.Listener, Out: &envoy.TLS{API: "GRPC", Peer: id + "/bench-back"}})
	if err != nil {
		return nil, err
	}
	return p, p.front.WaitFor(ctx, "the first request", func() error { return p.ask(ctx) })
}

func (p *pair) ask(ctx context.Context) error {
	_, err := envoy.Get(ctx, http.DefaultClient, fmt.Sprintf("http://127.0.0.1:%d/", p.port))
	return err
}

// rotate replaces the authority as an operator is told to: nothing is signed by a new one before every agent
// has it in its bundle, and an old one is taken away when nobody holds anything of it.
func (p *pair) rotate(ctx context.Context, b *bench, authorities localauthorityv1.LocalAuthorityClient) error {
	before, err := p.certificates(ctx)
	if err != nil {
		return err
	}
	settled := func() error {
		_, err := b.ServerCLI(ctx, "localauthority", "x509", "status", "-wait", "1m")
		return err
	}
	return rotateX509(ctx, authorities, func(step string) error {
		switch step {
		case "prepare":
			return settled()
		case "taint":
			return settled()
		case "revoke":
			return p.front.WaitFor(ctx, "both to have other certificates", func() error {
				now, err := p.certificates(ctx)
				if err == nil && (now[0] == before[0] || now[1] == before[1]) {
					err = errors.New("one has the certificate from before")
				}
				return err
			})
		}
		return nil
	})
}

// certificates are what both have.
func (p *pair) certificates(ctx context.Context) (both [2]string, err error) {
	for i, one := range []*envoy.Proxy{p.front, p.back} {
		var failed error
		both[i], failed = one.Certificates(ctx)
		err = errors.Join(err, failed)
	}
	return both, err
}

// handshakes returns how many the two have made with each other, and how many of them failed.
func (p *pair) handshakes(ctx context.Context) (made, failed int64, err error) {
	front, err := p.front.Stats(ctx, "cluster.out.ssl.")
	if err != nil {
		return 0, 0, err
	}
	back, err := p.back.Stats(ctx, "listener.")
	if err != nil {
		return 0, 0, err
	}
	for _, stats := range []map[string]int64{front, back} {
		for name, n := range stats {
			if strings.HasSuffix(name, ".ssl.connection_error") || strings.Contains(name, ".ssl.fail_verify") {
				failed += n
			}
		}
	}
	if made = front["cluster.out.ssl.handshake"]; made == 0 {
		err = errors.New("the Envoys have made no handshake with each other")
	}
	return made, failed, err
}

// load starts wrk, which goes on until it is interrupted.
func (p *pair) load(b *bench, wrk string) (*site.Process, error) {
	script := filepath.Join(b.Dir, "wrk.lua")
	if err := os.WriteFile(script, []byte(wrkScript), 0o600); err != nil {
		return nil, err
	}
	return site.Start(filepath.Join(b.Dir, "wrk.log"), nil, wrk, "-t1", "-c8", "-d1h", "--timeout", "30s", "-s", script,
		fmt.Sprintf("http://127.0.0.1:%d/", p.port))
}

// wrkScript has wrk say in words for a program what it counted.
const wrkScript = `function done(summary)
  local e = summary.errors
  io.write(string.format("\ncounted %d %d %d %d %d %d\n", summary.requests, e.connect, e.read, e.write, e.status, e.timeout))
end
`

// counts are what wrk says of its requests.
type counts struct{ requests, failed int64 }

func counted(log string) (c counts, err error) {
	text, err := os.ReadFile(log)
	if err != nil {
		return c, err
	}
	_, line, found := strings.Cut(string(text), "\ncounted ")
	var connect, read, write, status, timeout int64
	if _, err := fmt.Sscan(line, &c.requests, &connect, &read, &write, &status, &timeout); err != nil || !found {
		return c, fmt.Errorf("read what wrk says: %w: %s", err, text)
	}
	c.failed = connect + read + write + status + timeout
	return c, nil
}
