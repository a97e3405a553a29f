package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/test/lab/site"
)

// joiner makes nodes.
type joiner struct {
	*site.Joiner
	tokens agentv1.AgentClient
}

func newJoiner(ctx context.Context, b *bench) (*joiner, error) {
	j, err := b.NewJoiner(ctx)
	return &joiner{j, agentv1.NewAgentClient(b.conn)}, err
}

func (j *joiner) token(ctx context.Context) (string, error) {
	t, err := j.tokens.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 600})
	return t.GetValue(), err
}

// joinMany joins agents some at a time.
func (j *joiner) joinMany(ctx context.Context, count int) ([]*site.Node, error) {
	nodes := make([]*site.Node, count)
	err := parallel(8, count, func(i int) error {
		token, err := j.token(ctx)
		if err != nil {
			return err
		}
		nodes[i], err = j.Join(ctx, token)
		return err
	})
	return nodes, err
}

// agents measures attestation and what connected agents cost.
func agents(ctx context.Context, b *bench) error {
	j, err := newJoiner(ctx, b)
	if err != nil {
		return err
	}
	count := b.n(500)
	tokens := make([]string, count)
	for i := range tokens {
		if tokens[i], err = j.token(ctx); err != nil {
			return err
		}
	}
	nodes := make([]*site.Node, count)
	used, err := cpuOf(func() error {
		return parallel(8, count, func(i int) error {
			var err error
			nodes[i], err = j.Join(ctx, tokens[i])
			return err
		})
	}, b.Server().PID())
	if err != nil {
		return err
	}
	b.report(figure{"agent attested by join token: server CPU", "2,750 µs", 1300, "µs"}, micros(used, count), "")

	follow := min(200, count)
	if b.SPIRE.Server == "" { // which has no feed
		if err := idleAgents(ctx, b, nodes[:follow]); err != nil {
			return err
		}
	}

	polls := b.n(2000)
	polled, err := cpuOf(func() error {
		return parallel(8, polls, func(i int) error {
			_, err := entryv1.NewEntryClient(nodes[i%follow].Conn).GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
			return err
		})
	}, b.Server().PID())
	if err != nil {
		return err
	}
	b.report(figure{"one poll of a stock agent: server CPU", "", 400, "µs"}, micros(polled, polls), "")
	for _, n := range nodes {
		n.Conn.Close()
	}
	return nil
}

// idleAgents measures what agents cost that follow the feed while nothing happens.
func idleAgents(ctx context.Context, b *bench, nodes []*site.Node) error {
	for _, n := range nodes {
		stream, err := feedv1.NewFeedClient(n.Conn).Follow(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: &feedv1.Hello{}}}); err != nil {
			return err
		}
		picture, err := stream.Recv()
		if err != nil {
			return err
		}
		err = stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Ack{Ack: &feedv1.Ack{Revision: picture.GetRevision()}}})
		if err != nil {
			return err
		}
	}
	window := 30 * time.Second
	if b.short {
		window = 2 * time.Second
	}
	if !sleep(ctx, settling) {
		return ctx.Err()
	}
	idle, err := cpuOf(func() error {
		if !sleep(ctx, window) {
			return ctx.Err()
		}
		return nil
	}, b.Server().PID())
	if err != nil {
		return err
	}
	b.report(figure{"200 agents connected and idle, feed held: server CPU", "7.5–15 %", 0.3, "% of a core"},
		100*idle.Seconds()/window.Seconds(), "")
	return nil
}

// signing measures what an agent's requests cost the server.
func signing(ctx context.Context, b *bench) error {
	j, err := newJoiner(ctx, b)
	if err != nil {
		return err
	}
	nodes, err := j.joinMany(ctx, 1)
	if err != nil {
		return err
	}
	agent := nodes[0]
	defer agent.Conn.Close()
	made, err := b.create(ctx, []*types.Entry{entryFor(agent.ID.Path(), "/w", "uid:1")})
	if err != nil {
		return err
	}
	client := svidv1.NewSVIDClient(agent.Conn)
	sign := func(batch int) error {
		params := make([]*svidv1.NewX509SVIDParams, batch)
		for i := range params {
			params[i] = &svidv1.NewX509SVIDParams{EntryId: made[0].GetId(), Csr: j.CSR}
		}
		resp, err := client.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: params})
		if err != nil {
			return err
		}
		for _, r := range resp.GetResults() {
			if r.GetStatus().GetCode() != 0 {
				return fmt.Errorf("sign: %s", r.GetStatus().GetMessage())
			}
		}
		return nil
	}
	for err := sign(1); err != nil; err = sign(1) {
		// A spire-server looks for new entries every few seconds.
		if b.SPIRE.Server == "" || !sleep(ctx, 100*time.Millisecond) {
			return err
		}
	}
	for _, c := range []struct {
		batch, calls int
		figure
	}{
		{1, 3000, figure{"X509-SVID signed, batch of 1: server CPU each", "768 µs", 320, "µs"}},
		{50, 100, figure{"X509-SVID signed, batch of 50: server CPU each", "339 µs", 230, "µs"}},
	} {
		calls := b.n(c.calls)
		used, err := cpuOf(func() error {
			return parallel(4, calls, func(int) error { return sign(c.batch) })
		}, b.Server().PID())
		if err != nil {
			return err
		}
		b.report(c.figure, micros(used, calls*c.batch), "")
	}
	calls := b.n(3000)
	used, err := cpuOf(func() error {
		return parallel(4, calls, func(i int) error {
			_, err := client.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: made[0].GetId(), Audience: []string{fmt.Sprint(i)}})
			return err
		})
	}, b.Server().PID())
	if err != nil {
		return err
	}
	b.report(figure{"NewJWTSVID: server CPU", "565 µs", 150, "µs"}, micros(used, calls), "")
	return nil
}

// entriesScene measures writing and reading entries, and starting with many.
func entriesScene(ctx context.Context, b *bench) error {
	server := func() int { return b.Server().PID() }
	j, err := newJoiner(ctx, b)
	if err != nil {
		return err
	}
	nodes, err := j.joinMany(ctx, 1)
	if err != nil {
		return err
	}
	agent := nodes[0]
	agent.Conn.Close()
	if _, err := b.create(ctx, []*types.Entry{entryFor(agent.ID.Path(), "/w", "uid:1")}); err != nil {
		return err
	}

	singles, stored := b.n(8000), 1
	start := time.Now()
	used, err := cpuOf(func() error {
		return parallel(8, singles, func(i int) error {
			_, err := b.create(ctx, []*types.Entry{entryFor("/spire/agent/join_token/absent", fmt.Sprintf("/single/%d", i), "uid:1")})
			return err
		})
	}, server())
	if err != nil {
		return err
	}
	stored += singles
	rate := float64(singles) / time.Since(start).Seconds()
	// The bar is a rate, so the time for one is what is compared.
	b.report(figure{"single creates, 8 clients, synced: each", "5,600–8,900 µs (not synced)", 1e6 / 1500, "µs"}, 1e6/rate,
		fmt.Sprintf("(%.0f /s, bar 1,500 /s; server CPU %.0f µs each)", rate, micros(used, singles)))

	list := unrelated(b.n(100_000))
	few := b.n(10_000)
	if _, err := b.create(ctx, list[:few-min(few, stored)]); err != nil {
		return err
	}
	list = list[few-min(few, stored):]
	if err := startWithMany(ctx, b, agent, figure{"server start → first full answer to an agent, 10,000 entries", "1,000 ms", 300, "ms"}); err != nil {
		return err
	}

	list = list[:len(list)-min(len(list), max(few, stored)-few)]
	used, err = cpuOf(func() error {
		_, err := b.create(ctx, list)
		return err
	}, server())
	if err != nil {
		return err
	}
	stored = max(few, stored) + len(list)
	b.report(figure{"entry create, batches of 100, on disk: server CPU each", "1,700–3,000 µs (not synced)", 60, "µs"}, micros(used, len(list)), "")
	if err := listAll(ctx, b, stored); err != nil {
		return err
	}
	if err := startWithMany(ctx, b, agent, figure{"server start → first full answer to an agent, 100,000 entries", "12,700 ms", 1500, "ms"}); err != nil {
		return err
	}

	window := 30 * time.Second
	if b.short {
		window = 2 * time.Second
	}
	if !sleep(ctx, settling) {
		return ctx.Err()
	}
	idle, err := cpuOf(func() error { sleep(ctx, window); return ctx.Err() }, server())
	if err != nil {
		return err
	}
	b.report(figure{"100,000 entries at rest: server CPU", "28 %", 0.2, "% of a core"}, 100*idle.Seconds()/window.Seconds(), "")
	memory, err := rss(server())
	if err != nil {
		return err
	}
	b.report(figure{"100,000 entries at rest: server RSS", "400–460 MiB", 200, "MiB"}, memory, "")
	return nil
}

// listAll measures reading all entries there are.
func listAll(ctx context.Context, b *bench, stored int) error {
	listed := 0
	start := time.Now()
	used, err := cpuOf(func() error {
		token := ""
		for {
			resp, err := b.entries.ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: 1000, PageToken: token})
			if err != nil {
				return err
			}
			listed += len(resp.GetEntries())
			if token = resp.GetNextPageToken(); token == "" {
				return nil
			}
		}
	}, b.Server().PID())
	if err != nil {
		return err
	}
	if listed != stored {
		return fmt.Errorf("listed %d entries of %d", listed, stored)
	}
	b.report(figure{"list 100,000 in pages of 1,000: wall time", "12,900 ms", 1500, "ms"}, float64(time.Since(start).Milliseconds()), "")
	b.report(figure{"list 100,000 in pages of 1,000: server CPU each", "64 µs", 12, "µs"}, micros(used, listed), "")
	return nil
}

// startWithMany restarts the server and measures how soon an agent that it knows has all its entries.
func startWithMany(ctx context.Context, b *bench, agent *site.Node, f figure) error {
	if err := b.Stop(); err != nil {
		return err
	}
	start := time.Now()
	if err := b.LaunchServer(); err != nil {
		return err
	}
	for {
		// A connection of its own for each try: one that has failed waits a second before the next.
		conn, err := agent.Dial()
		if err != nil {
			return err
		}
		resp, err := entryv1.NewEntryClient(conn).GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
		conn.Close()
		if err == nil && len(resp.GetEntries()) == 1 {
			break
		}
		select {
		case <-b.Server().Done():
			return fmt.Errorf("the server ended: %s", site.Tail(b.ServerLog(), 5))
		default:
		}
		if !sleep(ctx, 5*time.Millisecond) {
			return fmt.Errorf("wait for the first answer: %w", errors.Join(ctx.Err(), err))
		}
	}
	took := time.Since(start)
	used, err := cpu(b.Server().PID())
	if err != nil {
		return err
	}
	b.report(f, float64(took.Milliseconds()), fmt.Sprintf("(server CPU %d ms)", used.Milliseconds()))
	return nil
}
