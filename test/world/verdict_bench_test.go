package world_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/world"
)

// BenchmarkVerdict measures what a verdict takes from its commit until the last of 1,000 streams, on 50
// agents that run the image, has the reduced set of identities.
func BenchmarkVerdict(b *testing.B) {
	const agents, each = 50, 20
	w := world.New(b)
	digest := world.Digest("a")
	w.Verdict(digest, passes)
	arrived := make(chan string, 4*agents*each)
	var work sync.WaitGroup
	for i := range agents {
		a := w.Agent(fmt.Sprint(i), world.In(world.Running(digest))).Start()
		w.Entry(a.ID, fmt.Sprintf("/shop/%d", i), world.Mine, gate)
		w.Entry(a.ID, fmt.Sprintf("/quarantine/%d", i), []*types.Selector{world.Mine, quarantine}...)
		ctx, client := a.Workload()
		for range each {
			stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err != nil {
				b.Fatal(err)
			}
			work.Go(func() {
				for {
					resp, err := stream.Recv()
					if err != nil {
						return
					}
					if len(resp.GetSvids()) == 1 {
						arrived <- resp.GetSvids()[0].GetSpiffeId()[len("spiffe://example.org/"):][:1]
					}
				}
			})
		}
	}
	all := func(which string) {
		for n := 0; n < agents*each; {
			if <-arrived == which {
				n++
			}
		}
	}
	all("s")
	var withdrawn, restored []time.Duration
	for b.Loop() {
		began := time.Now()
		w.Verdict(digest, fails)
		all("q")
		withdrawn = append(withdrawn, time.Since(began))
		began = time.Now()
		w.Verdict(digest, passes)
		all("s")
		restored = append(restored, time.Since(began))
	}
	for name, took := range map[string][]time.Duration{"withdraw": withdrawn, "restore": restored} {
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, name+"-p50-ms")
		b.ReportMetric(float64(took[min(len(took)-1, len(took)*99/100)].Microseconds())/1000, name+"-p99-ms")
	}
	b.Cleanup(work.Wait)
}
