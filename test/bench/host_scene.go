package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/port"
	"github.com/assay-id/assay/test/lab/site"
)

// hostScene is a plain host: fifty workloads of systemd or none, path and hash of their programs asked for. It
// measures what the agent takes while nothing happens, and what an attestation takes of a program that is known.
func hostScene(ctx context.Context, b *bench) error {
	free, err := port.Free()
	if err != nil {
		return err
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(free))
	token, err := b.Token(ctx)
	if err != nil {
		return err
	}
	b.node = "/spire/agent/join_token/" + token
	blocks := fmt.Sprintf(`node_attestor "join_token" {}
workload_attestor "unix" {
  discover_workload_path = true
}
telemetry {
  prometheus {
    host = "127.0.0.1"
    port = %d
  }
}`, free)
	if b.agent, err = b.NewAgent(ctx, "agent", site.AgentOptions{Token: token, Blocks: blocks}); err != nil {
		return err
	}
	b.later(func() {
		if b.agent.Process != nil {
			_ = b.agent.Stop(15 * time.Second)
		}
	})
	if err := b.agent.Start(ctx); err != nil {
		return err
	}
	if _, err := b.create(ctx, []*types.Entry{b.mine("/w")}); err != nil {
		return err
	}
	if err := b.served(ctx); err != nil {
		return err
	}
	all, err := openMany(ctx, b.agent.Socket, 50)
	if err != nil {
		return err
	}
	defer closeAll(all)
	window := 30 * time.Second
	if b.short {
		window = 2 * time.Second
	}
	if !sleep(ctx, settling) {
		return ctx.Err()
	}
	idle, err := cpuOf(func() error { sleep(ctx, window); return ctx.Err() }, b.agent.PID())
	if err != nil {
		return err
	}
	memory, err := rss(b.agent.PID())
	if err != nil {
		return err
	}
	b.report(figure{"host with 50 workloads, nothing happens: agent CPU", "", 0.1, "% of a core"}, 100*idle.Seconds()/window.Seconds(), "")
	b.report(figure{"host with 50 workloads, nothing happens: agent RSS", "", 25, "MiB"}, memory, "")
	return b.attestations(ctx, address)
}

// attestations has one caller after the other attested, and reads from the agent's own metrics what that took.
func (b *bench) attestations(ctx context.Context, address string) error {
	before, err := attested(ctx, address)
	if err != nil {
		return err
	}
	count := b.n(2000)
	for range count {
		s, _, err := open(ctx, b.agent.Socket)
		if err != nil {
			return err
		}
		s.close()
	}
	after, err := attested(ctx, address)
	if err != nil {
		return err
	}
	took := after.since(before)
	if took.count < float64(count) {
		return fmt.Errorf("%.0f attestations are counted, and %d were made", took.count, count)
	}
	b.report(figure{"unix workload attested, its program known: p50", "", 1, "ms"}, took.median()*1000,
		fmt.Sprintf("(mean %.3f ms of %.0f, by the agent's own histogram)", 1000*took.sum/took.count, took.count))
	return nil
}

// histogram is one of Prometheus, its buckets cumulative.
type histogram struct {
	limits, counts []float64
	sum, count     float64
}

// attested reads how long the unix attestor took.
func attested(ctx context.Context, address string) (histogram, error) {
	var h histogram
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return h, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return h, err
	}
	defer resp.Body.Close()
	return readHistogram(resp.Body)
}

func readHistogram(text io.Reader) (histogram, error) {
	const name = "assay_workload_attestation_seconds"
	var h histogram
	lines := bufio.NewScanner(text)
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), name)
		if !ok || !strings.Contains(rest, `attestor="unix"`) {
			continue
		}
		fields := strings.Fields(rest)
		value, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err != nil {
			return h, err
		}
		switch {
		case strings.HasPrefix(rest, "_sum"):
			h.sum = value
		case strings.HasPrefix(rest, "_count"):
			h.count = value
		case strings.HasPrefix(rest, "_bucket"):
			_, le, _ := strings.Cut(rest, `le="`)
			le, _, _ = strings.Cut(le, `"`)
			limit, err := strconv.ParseFloat(le, 64)
			if err != nil {
				return h, err
			}
			h.limits, h.counts = append(h.limits, limit), append(h.counts, value)
		}
	}
	if lines.Err() == nil && len(h.limits) == 0 {
		return h, fmt.Errorf("the agent has no %s", name)
	}
	return h, lines.Err()
}

// since is what has come since an earlier reading.
func (h histogram) since(earlier histogram) histogram {
	d := histogram{limits: h.limits, sum: h.sum - earlier.sum, count: h.count - earlier.count}
	for i, count := range h.counts {
		if i < len(earlier.counts) {
			count -= earlier.counts[i]
		}
		d.counts = append(d.counts, count)
	}
	return d
}

// median is where half of all are, as if those in a bucket were spread evenly.
func (h histogram) median() float64 {
	var from, below float64
	for i, limit := range h.limits {
		if half := h.count / 2; h.counts[i] >= half {
			return from + (limit-from)*(half-below)/(h.counts[i]-below)
		}
		from, below = limit, h.counts[i]
	}
	return from
}
