package world_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/wire/evidencev1"
	"github.com/assay-id/assay/test/world"
)

// BenchmarkVerdict measures what a verdict takes from its commit until the last of 1,000 streams, on 50
// agents that run the image, has the reduced set of identities.
func BenchmarkVerdict(b *testing.B) {
	w := world.New(b)
	digest := world.Digest("a")
	withdrawals(b, w, digest, func(selectors string) time.Time {
		began := time.Now()
		w.Verdict(digest, selectors)
		return began
	})
}

// BenchmarkIngest measures what it takes from the answer to a push of a report until the last of 1,000
// streams, on 50 agents that run the image, has the reduced set of identities. All of it is the real
// thing over real sockets, in one process: the server with its evidence service and its store on disk, the
// agents, the workloads' streams.
func BenchmarkIngest(b *testing.B) {
	scan, problems := policy.New(policy.Block{Name: "prod", Sources: []string{verdict.Local}, Fail: []policy.Fails{{Severity: "critical"}}})
	if len(problems) > 0 {
		b.Fatal(problems)
	}
	w := world.New(b, func(c *server.Config) {
		c.Evidence = &server.Evidence{Rules: verdict.Rules{Policies: []*policy.ScanPolicy{scan}}}
	})
	digest := world.Digest("a")
	withdrawals(b, w, digest, func(selectors string) time.Time {
		findings := "[]"
		if selectors == fails {
			findings = `[{"VulnerabilityID":"CVE-2099-1","PkgName":"lib","InstalledVersion":"1","Severity":"CRITICAL","PkgIdentifier":{"PURL":"pkg:deb/debian/lib@1"}}]`
		}
		stream, err := evidencev1.NewEvidenceClient(w.Local).Push(w.Context())
		if err != nil {
			b.Fatal(err)
		}
		for _, m := range []*evidencev1.PushRequest{
			{Step: &evidencev1.PushRequest_Header{Header: &evidencev1.PushHeader{Image: digest}}},
			{Step: &evidencev1.PushRequest_Chunk{Chunk: fmt.Appendf(nil, `{"SchemaVersion":2,"CreatedAt":%q,"ArtifactName":"shop",
"ArtifactType":"container_image","Metadata":{"ImageID":%q,"OS":{"Family":"debian","Name":"12.9"}},"Results":[{"Target":"shop","Class":"os-pkgs",
"Type":"debian","Packages":[{"Name":"lib"}],"Vulnerabilities":%s}]}`, time.Now().Format(time.RFC3339Nano), digest, findings)}},
		} {
			if err := stream.Send(m); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := stream.CloseAndRecv(); err != nil {
			b.Fatal(err)
		}
		return time.Now()
	})
}

// withdrawals has a verdict withdrawn and restored, again and again, for 1,000 streams on 50 agents. decide
// brings a verdict about and returns from when on time counts.
func withdrawals(b *testing.B, w *world.World, digest string, decide func(selectors string) time.Time) {
	const agents, each = 50, 20
	decide(passes)
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
		began := decide(fails)
		all("q")
		withdrawn = append(withdrawn, time.Since(began))
		began = decide(passes)
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
