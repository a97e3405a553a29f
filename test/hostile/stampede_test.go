package hostile

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/server/wire/later"
)

// fleet is many agents of one server, each with a certificate and nothing else yet. They are as an
// agent is that has lost its connection, and keeps no SVIDs, as stock ones do not.
type fleet struct {
	g       *ground
	certs   []*tls.Certificate
	entries []string // which all of them may hold
}

// newFleet enrolls agents, all of the same alias.
func newFleet(t *testing.T, g *ground, agents, entries int) *fleet {
	t.Helper()
	f := &fleet{g: g, certs: make([]*tls.Certificate, agents)}
	g.create(&types.Entry{
		SpiffeId: wireID("/fleet"), ParentId: wireID("/spire/server"), Selectors: []*types.Selector{{Type: "honest", Value: "node"}},
	})
	var lot []*types.Entry
	for i := range entries {
		lot = append(lot, &types.Entry{
			SpiffeId: wireID(fmt.Sprint("/w/", i)), ParentId: wireID("/fleet"), Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("uid:", i)}},
		})
	}
	f.entries = g.create(lot...)
	if failed := crowd(agents, func(i int) (err error) {
		_, f.certs[i], err = enroll(t.Context(), g.as["anyone"], fmt.Sprint("fleet-", i))
		return err
	}); failed > 0 {
		t.Fatalf("%d agents were not admitted", failed)
	}
	return f
}

// heeding makes a call until it is not sent away any more, coming back when it is told to. It returns
// how often it was made.
func heeding(ctx context.Context, call func() error) (attempts int, err error) {
	for {
		attempts++
		err = call()
		in, ok := later.Hint(err)
		if !ok {
			return attempts, err
		}
		timer := time.NewTimer(in)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return attempts, err
		}
	}
}

// follow opens the feed and returns when the whole picture is there and acknowledged.
func follow(ctx context.Context, conn *grpc.ClientConn) (feedv1.Feed_FollowClient, int, error) {
	stream, err := feedv1.NewFeedClient(conn).Follow(ctx)
	if err != nil {
		return nil, 0, err
	}
	if err := stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: &feedv1.Hello{}}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, 0, err
	}
	for entries := 0; ; {
		part, err := stream.Recv()
		if err != nil {
			return nil, 0, err
		}
		if entries += len(part.GetEntries()); !part.GetMore() {
			err := stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Ack{Ack: &feedv1.Ack{Revision: part.GetRevision()}}})
			return stream, entries, err
		}
	}
}

// sign asks for SVIDs of all the entries.
func (f *fleet) sign(ctx context.Context, conn *grpc.ClientConn, entries []string) (int, error) {
	req := &svidv1.BatchNewX509SVIDRequest{}
	for _, id := range entries {
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: aCSR})
	}
	resp, err := svidv1.NewSVIDClient(conn).BatchNewX509SVID(ctx, req)
	if err != nil {
		return 0, err
	}
	for _, r := range resp.GetResults() {
		if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
			return 0, status.Error(code, r.GetStatus().GetMessage())
		}
	}
	return len(resp.GetResults()), nil
}

// TestAStampede has all agents of a fleet come back at the same moment, as after a restart of the server:
// each does a handshake, posts its status, follows the feed, and has the SVIDs of its workloads signed;
// one in ten has to renew its own SVID just then. All the while one agent asks for as much as it can.
// Everybody is served, no renewal is missed, and the greedy one is not served first.
func TestAStampede(t *testing.T) {
	const perAgent = 5
	agents := scaled(300, 2000)
	g := newGround(t, func(c *server.Config) { c.Limits.SignPerSecond = 500; c.Limits.PostPerSecond = 10 })
	f := newFleet(t, g, agents+1, perAgent)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()

	// The greedy one has 500 entries and asks for all of them, on several connections, until it is stopped.
	greedyPath, greedyCert := g.enroll("greedy")
	var lot []*types.Entry
	for i := range 500 {
		lot = append(lot, &types.Entry{
			SpiffeId: wireID(fmt.Sprint("/greedy/", i)), ParentId: wireID(greedyPath), Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("gid:", i)}},
		})
	}
	bulk := g.create(lot...)
	greed, enough := context.WithCancel(ctx)
	var greedy atomic.Int64
	var asking sync.WaitGroup
	for range 8 {
		asking.Go(func() {
			conn := dialTCP(t, g.running.Address.String(), greedyCert)
			for greed.Err() == nil {
				n, err := f.sign(greed, conn, bulk)
				greedy.Add(int64(n))
				if err != nil && greed.Err() == nil && status.Code(err) != codes.ResourceExhausted {
					t.Errorf("the greedy one: %v", err)
					return
				}
			}
		})
	}

	var pictures, signed, renewed, attempts atomic.Int64
	failed := crowd2(agents, func(i int) error {
		conn := dialTCP(t, g.running.Address.String(), f.certs[i])
		n, err := heeding(ctx, func() error {
			_, err := agentv1.NewAgentClient(conn).PostStatus(ctx, &agentv1.PostStatusRequest{AgentVersion: "1"})
			return err
		})
		attempts.Add(int64(n))
		if err != nil {
			return fmt.Errorf("post status: %w", err)
		}
		_, entries, err := follow(ctx, conn)
		if err != nil || entries != perAgent {
			return fmt.Errorf("follow: %d entries, %w", entries, err)
		}
		pictures.Add(1)
		if i%10 == 0 {
			n, err := heeding(ctx, func() error {
				_, err := agentv1.NewAgentClient(conn).RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: aCSR}})
				return err
			})
			attempts.Add(int64(n))
			if err != nil {
				return fmt.Errorf("renew: %w", err)
			}
			renewed.Add(1)
		}
		n, err = heeding(ctx, func() error {
			n, err := f.sign(ctx, conn, f.entries)
			signed.Add(int64(n))
			return err
		})
		attempts.Add(int64(n))
		return err
	}, func(err error) { t.Error(err) })
	meanwhile := greedy.Load()
	eventually(t, "the greedy one's turn", func() bool { return greedy.Load() > 0 })
	enough()
	asking.Wait()

	if failed > 0 || pictures.Load() != int64(agents) || signed.Load() != int64(agents*perAgent) || renewed.Load() != int64((agents+9)/10) {
		t.Errorf("%d agents failed; %d pictures, %d SVIDs, %d renewals", failed, pictures.Load(), signed.Load(), renewed.Load())
	}
	// Eight calls at a time of one caller that never stops: without turns it would have most of what
	// was signed; with turns it has what nobody else was waiting for, and its one turn among many.
	if meanwhile > signed.Load() {
		t.Errorf("the greedy one had %d signatures, all others %d", meanwhile, signed.Load())
	}
	t.Logf("%d agents, %d SVIDs in %d calls; the greedy one had %d meanwhile", agents, signed.Load(), attempts.Load(), meanwhile)
	g.unharmed(t)
}

// crowd2 does something for each, all at the same time.
func crowd2(n int, do func(i int) error, complain func(error)) (failed int64) {
	var wg sync.WaitGroup
	var count atomic.Int64
	for i := range n {
		wg.Go(func() {
			if err := do(i); err != nil {
				if count.Add(1) <= 5 {
					complain(fmt.Errorf("agent %d: %w", i, err))
				}
			}
		})
	}
	wg.Wait()
	return count.Load()
}

// TestAFleetBehindOneAddress has all nodes of a fleet attest at the same moment from one address, which
// the server admits at a rate. Those it has no time for come back when they are told, each at its own
// moment: all are admitted, and few have to ask more than twice.
func TestAFleetBehindOneAddress(t *testing.T) {
	agents := scaled(150, 1000)
	g := newGround(t, func(c *server.Config) { c.Limits.AttestPerSecond, c.Limits.AttestBurst = 50, 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	conns := make([]*grpc.ClientConn, agents)
	for i := range conns {
		conns[i] = dialTCP(t, g.running.Address.String(), nil)
		if _, err := bundlev1.NewBundleClient(conns[i]).GetBundle(ctx, &bundlev1.GetBundleRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	var admitted, attempts, late atomic.Int64
	failed := crowd2(agents, func(i int) error {
		conn, name := conns[i], fmt.Sprint("nat-", i)
		n, err := heeding(ctx, func() error {
			// An agent does not wait for ever: those at the end of the line are sent away. A few who had their turn
			// and were not served in time, on a loaded machine, come again at once, with proof of their own: that of
			// before may have been taken by then.
			for {
				once, over := context.WithTimeout(ctx, 2*time.Second)
				_, _, err := enroll(once, conn, name)
				over()
				if status.Code(err) != codes.DeadlineExceeded || late.Add(1) > int64(agents/10) {
					return err
				}
				attempts.Add(1)
				name += "-again"
			}
		})
		attempts.Add(int64(n))
		if err == nil {
			admitted.Add(1)
		}
		return err
	}, func(err error) { t.Error(err) })
	t.Logf("%d of %d admitted in %d attempts", admitted.Load(), agents, attempts.Load())
	if failed > 0 || attempts.Load() > int64(3*agents) {
		t.Errorf("%d were not admitted, in %d attempts", failed, attempts.Load())
	}
	g.unharmed(t)
}

// TestWhatAnAgentCosts measures what the server holds for an agent that is connected and listens.
func TestWhatAnAgentCosts(t *testing.T) {
	v := newVictim(t)
	agents := scaled(200, 2000)
	certs := make([]*tls.Certificate, agents)
	anyone := dialTCP(t, v.is.Address, nil)
	if failed := crowd(agents, func(i int) (err error) {
		_, certs[i], err = enroll(t.Context(), anyone, fmt.Sprint("cost-", i))
		return err
	}); failed > 0 {
		t.Fatalf("%d agents were not admitted", failed)
	}
	_ = anyone.Close()
	was := v.settle(nil)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	if failed := crowd(agents, func(i int) error {
		_, _, err := follow(ctx, dialTCP(t, v.is.Address, certs[i]))
		return err
	}); failed > 0 {
		t.Errorf("%d agents cannot follow", failed)
	}
	is := v.size()
	each := (is.Heap - was.Heap) / int64(agents)
	stacks := float64(is.Goroutines-was.Goroutines) / float64(agents)
	t.Logf("%d agents: %d KiB of heap, %d KiB of RSS, %.1f goroutines, %.1f files each", agents, each>>10, (is.RSS-was.RSS)/int64(agents)>>10,
		stacks, float64(is.Files-was.Files)/float64(agents))
	if each > 80<<10 || stacks > 10 {
		t.Errorf("an agent costs %d KiB of heap and %.1f goroutines", each>>10, stacks)
	}
	// The sum in server/README.md stands on this.
	if rss := (is.RSS - was.RSS) / int64(agents); rss > 200<<10 {
		t.Errorf("an agent costs %d KiB of memory", rss>>10)
	}
}

// TestConnectionsAreBounded holds all the connections that one address may have, and that all may have.
func TestConnectionsAreBounded(t *testing.T) {
	g := newGround(t, func(c *server.Config) {
		c.Limits.MaxPerSource, c.Limits.MaxConnections = 100, 150
		c.Limits.Handshake = time.Hour // no stranger's place is free because the time for a preface is over
	})
	from := func(ip string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}, Timeout: patience}
		raw, err := d.Dial("tcp", g.running.Address.String())
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { _ = raw.Close() })
		conn := tls.Client(raw, clientTLS(nil))
		if err := conn.HandshakeContext(t.Context()); err != nil {
			return nil, err
		}
		// TLS 1.3: a client learns that it was shown the door when it reads.
		_ = conn.SetReadDeadline(time.Now().Add(patience)) // it reports below
		_, err = conn.Read(make([]byte, 1))
		return conn, err
	}
	stayed := map[string]int{}
	for _, ip := range []string{"127.0.0.1", "127.0.0.2", "127.0.0.3"} {
		for range 120 {
			if _, err := from(ip); err == nil {
				stayed[ip]++
			}
		}
	}
	// Of strangers: 64 of an address, since the limit is small, and as many in all.
	if stayed["127.0.0.1"] != 64 || stayed["127.0.0.2"]+stayed["127.0.0.3"] != 0 {
		t.Errorf("strangers have %v connections", stayed)
	}
	// Whom the server knows has room all the same.
	cert := g.mint("/w")
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.4")}}
	conn := dialTCP(t, g.running.Address.String(), cert, grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		return d.DialContext(ctx, "tcp", address)
	}))
	if _, err := agentv1.NewAgentClient(conn).CountAgents(g.context(), &agentv1.CountAgentsRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v", err)
	}
}
