package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/site"
)

// scenes are run in this order, each on a fresh site.
var scenes = []scene{
	{"push", push, false},
	{"push among 100,000", pushAmongMany, false},
	{"first fetch", firstFetch, false},
	{"jwt", jwt, false},
	{"streams", streams, false},
	{"agent restart", agentRestart, false},
	{"rotation", tainted, true},
	{"federation", federated, false},
	{"Envoy", betweenEnvoys, true},
	{"host", hostScene, true},
	{"docker", inDocker, false},
	{"agents", agents, false},
	{"signing", signing, false},
	{"entries", entriesScene, false},
	{"at rest", atRest, false},
	{"evidence: condemn", condemn, true},
	{"evidence: large report", largeReport, true},
	{"evidence: fleet", fleetJudged, true},
	{"evidence: agent memory", trackedImages, true},
}

// settling is how long after a burst a process is taken to be idle.
const settling = 6 * time.Second

// push measures how long a change takes from the call to the workload's open stream.
func push(ctx context.Context, b *bench) error {
	return pushRounds(ctx, b, b.rounds(300), [4]figure{
		{"entry created → SVID on the stream, p50", "3,200–4,000 ms", 20, "ms"},
		{"entry created → SVID on the stream, p99", "6,500 ms", 100, "ms"},
		{"entry updated → stream, p50", "3,000–5,000 ms", 20, "ms"},
		{"entry deleted → stream, p50", "4,600–5,100 ms", 20, "ms"},
	})
}

func pushAmongMany(ctx context.Context, b *bench) error {
	if _, err := b.create(ctx, unrelated(b.n(100_000))); err != nil {
		return err
	}
	return pushRounds(ctx, b, b.rounds(300), [4]figure{
		{"the same with 100,000 entries: created, p50", "6,100 ms", 30, "ms"},
		{"the same with 100,000 entries: created, p99", "11,000 ms", 150, "ms"},
		{"the same with 100,000 entries: updated, p50", "", 30, "ms"},
		{"the same with 100,000 entries: deleted, p50", "", 30, "ms"},
	})
}

func pushRounds(ctx context.Context, b *bench, rounds int, figures [4]figure) error {
	if err := b.startAgent(ctx, ""); err != nil {
		return err
	}
	// With one identity that stays, the stream stays open while the other comes and goes.
	if _, err := b.create(ctx, []*types.Entry{b.mine("/stays")}); err != nil {
		return err
	}
	if err := b.served(ctx); err != nil {
		return err
	}
	s, _, err := open(ctx, b.agent.Socket)
	if err != nil {
		return err
	}
	defer s.close()
	var created, updated, deleted times
	timed := func(to *times, change func() error, good func(*workload.X509SVIDResponse) bool) error {
		start := time.Now()
		if err := change(); err != nil {
			return err
		}
		if err := s.until(good); err != nil {
			return err
		}
		*to = append(*to, time.Since(start))
		return nil
	}
	round := func(i int) error {
		e := b.mine(fmt.Sprintf("/comes-%d", i))
		err := timed(&created, func() error {
			made, err := b.create(ctx, []*types.Entry{e})
			if err == nil {
				e = made[0]
			}
			return err
		}, func(r *workload.X509SVIDResponse) bool { return len(r.GetSvids()) == 2 })
		if err != nil {
			return err
		}
		err = timed(&updated, func() error {
			e.Hint = "changed"
			resp, err := b.entries.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}})
			if err == nil && resp.GetResults()[0].GetStatus().GetCode() != 0 {
				err = errors.New(resp.GetResults()[0].GetStatus().GetMessage())
			}
			return err
		}, func(r *workload.X509SVIDResponse) bool {
			for _, svid := range r.GetSvids() {
				if svid.GetHint() == "changed" {
					return true
				}
			}
			return false
		})
		if err != nil {
			return err
		}
		return timed(&deleted, func() error { return b.remove(ctx, e) },
			func(r *workload.X509SVIDResponse) bool { return len(r.GetSvids()) == 1 })
	}
	used, err := cpuOf(func() error {
		for i := range rounds {
			if err := round(i); err != nil {
				return err
			}
		}
		return nil
	}, b.Server().PID(), b.agent.PID())
	if err != nil {
		return err
	}
	more := fmt.Sprintf("(%d rounds; CPU of server + agent %.0f µs a change)", rounds, micros(used, 3*rounds))
	b.report(figures[0], created.at(50), more)
	b.report(figures[1], created.at(99), "")
	b.report(figures[2], updated.at(50), fmt.Sprintf("(p99 %.1f ms)", updated.at(99)))
	b.report(figures[3], deleted.at(50), fmt.Sprintf("(p99 %.1f ms)", deleted.at(99)))
	return nil
}

// firstFetch measures what a new caller costs the agent.
func firstFetch(ctx context.Context, b *bench) error {
	if err := b.startAgent(ctx, ""); err != nil {
		return err
	}
	if _, err := b.create(ctx, []*types.Entry{b.mine("/w")}); err != nil {
		return err
	}
	if err := b.served(ctx); err != nil {
		return err
	}
	fetch := func(int) error {
		s, first, err := open(ctx, b.agent.Socket)
		if err != nil {
			return err
		}
		s.close()
		if n := len(first.GetSvids()); n != 1 {
			return fmt.Errorf("%d SVIDs, want 1", n)
		}
		return nil
	}
	if err := parallel(32, 100, fetch); err != nil { // warm
		return err
	}
	count := b.n(5000)
	start := time.Now()
	used, err := cpuOf(func() error { return parallel(32, count, fetch) }, b.agent.PID())
	if err != nil {
		return err
	}
	b.report(figure{"first FetchX509SVID on a new connection, 32 clients: agent CPU", "710 µs", 350, "µs"},
		micros(used, count), fmt.Sprintf("(%.0f /s)", float64(count)/time.Since(start).Seconds()))
	return nil
}

// jwt measures JWT-SVIDs through the Workload API.
func jwt(ctx context.Context, b *bench) error {
	if err := b.startAgent(ctx, ""); err != nil {
		return err
	}
	if _, err := b.create(ctx, []*types.Entry{b.mine("/w")}); err != nil {
		return err
	}
	if err := b.served(ctx); err != nil {
		return err
	}
	conn, err := dialWorkload(b.agent.Socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := workload.NewSpiffeWorkloadAPIClient(conn)
	fetch := func(audience string) error {
		resp, err := client.FetchJWTSVID(withHeader(ctx), &workload.JWTSVIDRequest{Audience: []string{audience}})
		if err == nil && len(resp.GetSvids()) != 1 {
			err = fmt.Errorf("%d JWT-SVIDs, want 1", len(resp.GetSvids()))
		}
		return err
	}
	if err := fetch("same"); err != nil {
		return err
	}
	count := b.n(3000)
	both := []int{b.agent.PID(), b.Server().PID()}
	cached, err := cpuOf(func() error {
		return parallel(8, count, func(int) error { return fetch("same") })
	}, both...)
	if err != nil {
		return err
	}
	b.report(figure{"FetchJWTSVID, cached: CPU of agent + server", "500 µs", 200, "µs"}, micros(cached, count), "")
	fresh, err := cpuOf(func() error {
		return parallel(8, count, func(i int) error { return fetch(fmt.Sprintf("audience-%d", i)) })
	}, both...)
	if err != nil {
		return err
	}
	b.report(figure{"FetchJWTSVID, not cached: CPU of agent + server", "1,240 µs", 450, "µs"}, micros(fresh, count), "")
	return nil
}

// streams measures what open streams cost the agent.
func streams(ctx context.Context, b *bench) error {
	if err := b.startAgent(ctx, ""); err != nil {
		return err
	}
	made, err := b.create(ctx, []*types.Entry{entryFor(b.node, "/w", heldBy())})
	if err != nil {
		return err
	}
	if b.SPIRE.Agent != "" { // which hears of both at the same time
		if _, err := b.create(ctx, []*types.Entry{b.mine("/sign")}); err != nil {
			return err
		}
		if err := b.served(ctx); err != nil {
			return err
		}
	}
	warm, err := b.startHolders(50)
	if err == nil {
		err = stopHolders(warm)
	}
	if err != nil {
		return err
	}
	before, err := rss(b.agent.PID())
	if err != nil {
		return err
	}
	count := min(b.n(5000), mostStreams())
	all, err := b.startHolders(count)
	if err != nil {
		return err
	}
	defer func() { _ = stopHolders(all) }()
	if !sleep(ctx, settling) {
		return ctx.Err()
	}
	after, err := rss(b.agent.PID())
	if err != nil {
		return err
	}
	more := fmt.Sprintf("(%d streams of %d processes)", count, holders)
	b.report(figure{"open stream: agent memory each, at 5,000", "42 KiB", 20, "KiB"}, (after-before)*1024/float64(count), more)

	entry := made[0]
	var spread []time.Duration
	rounds := 5
	used, err := cpuOf(func() error {
		for i := range rounds {
			took, err := b.updateAll(ctx, entry, fmt.Sprintf("w%d.example.org", i), all)
			if err != nil {
				return err
			}
			spread = append(spread, took)
		}
		return nil
	}, b.agent.PID())
	if err != nil {
		return err
	}
	b.report(figure{"one update to 5,000 streams: agent CPU each", "125–165 µs", 50, "µs"}, micros(used, rounds*count), fmt.Sprintf("(%d rounds)", rounds))
	b.report(figure{"one update to 5,000 streams: first to last", "1,000–2,600 ms", 300, "ms"}, times(spread).at(50), "")
	return nil
}

// updateAll changes an entry that all holders match and returns the time between the first stream that
// hears of it and the last.
func (b *bench) updateAll(ctx context.Context, entry *types.Entry, name string, all []*holder) (time.Duration, error) {
	entry.DnsNames = []string{name}
	resp, err := b.entries.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{entry}})
	if err == nil && resp.GetResults()[0].GetStatus().GetCode() != 0 {
		err = errors.New(resp.GetResults()[0].GetStatus().GetMessage())
	}
	if err != nil {
		return 0, fmt.Errorf("update entry: %w", err)
	}
	var first, last time.Time
	for _, h := range all {
		round, err := h.next()
		if err != nil {
			return 0, err
		}
		if first.IsZero() || round.First.Before(first) {
			first = round.First
		}
		if round.Last.After(last) {
			last = round.Last
		}
	}
	return last.Sub(first), nil
}

// agentRestart measures how soon workloads are back after the agent's restart.
func agentRestart(ctx context.Context, b *bench) error {
	if err := b.startAgent(ctx, ""); err != nil {
		return err
	}
	if _, err := b.create(ctx, []*types.Entry{b.mine("/w")}); err != nil {
		return err
	}
	if err := b.served(ctx); err != nil {
		return err
	}
	count := b.n(1000)
	all, err := openMany(ctx, b.agent.Socket, count)
	if err != nil {
		return err
	}
	if !sleep(ctx, settling) {
		return ctx.Err()
	}
	idle, err := rss(b.agent.PID())
	if err != nil {
		return err
	}
	b.report(figure{"agent with 1,000 idle streams: RSS", "98 MiB", 45, "MiB"}, idle, "")
	defer closeAll(all)
	_, first, err := open(ctx, b.agent.Socket)
	if err != nil {
		return err
	}
	if err := b.agent.Stop(15 * time.Second); err != nil {
		return err
	}
	start := time.Now()
	if err := b.agent.Launch(); err != nil {
		return err
	}
	resigned := 0
	var slowest time.Duration
	results := make([]*workload.X509SVIDResponse, count)
	took := make([]time.Duration, count)
	err = parallel(32, count, func(i int) error {
		for ctx.Err() == nil {
			s, resp, err := open(ctx, b.agent.Socket)
			if err != nil {
				if !sleep(ctx, 5*time.Millisecond) {
					return ctx.Err()
				}
				continue // the socket is not there yet
			}
			all[i].close()
			all[i], results[i], took[i] = s, resp, time.Since(start)
			return nil
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	used, err := cpu(b.agent.PID())
	if err != nil {
		return err
	}
	for i, r := range results {
		if string(r.GetSvids()[0].GetX509Svid()) != string(first.GetSvids()[0].GetX509Svid()) {
			resigned++
		}
		slowest = max(slowest, took[i])
	}
	b.report(figure{"agent restart under 1,000 streams: all identities back", "1,300–2,600 ms", 500, "ms"}, float64(slowest.Milliseconds()),
		fmt.Sprintf("(agent CPU %d ms, its start and %d first calls)", used.Milliseconds(), count))
	b.report(figure{"agent restart: SVIDs signed again", "all", 0, "of 1,000"}, float64(resigned), "(must be 0)")
	if resigned > 0 && b.SPIRE.Agent == "" {
		return fmt.Errorf("%d still valid SVIDs were signed again after the restart", resigned)
	}
	return nil
}

// atRest measures what doing nothing costs.
func atRest(ctx context.Context, b *bench) error {
	if err := b.startAgent(ctx, ""); err != nil {
		return err
	}
	if !sleep(ctx, 5*time.Second) {
		return ctx.Err()
	}
	server, err := rss(b.Server().PID())
	if err != nil {
		return err
	}
	agent, err := rss(b.agent.PID())
	if err != nil {
		return err
	}
	b.report(figure{"at rest: server RSS", "56 MiB", 40, "MiB"}, server, "")
	b.report(figure{"at rest: agent RSS", "33 MiB", 20, "MiB"}, agent, "")
	if b.SPIRE != (site.SPIRE{}) {
		return nil
	}
	for _, name := range []string{"assay-server", "assay-agent"} {
		info, err := os.Stat(filepath.Join(b.Bin, name))
		if err != nil {
			return err
		}
		b.report(figure{"binary: " + name, "", 0, "MiB"}, float64(info.Size())/(1<<20), "")
	}
	return nil
}

// sleep waits and reports whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
