package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/wire/evidencev1"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/test/lab/site"
	"github.com/assay-id/assay/workloadapi/identity"
)

// digestOf is the config digest of the nth image.
func digestOf(n int) string { return fmt.Sprintf("sha256:%064x", n+1) }

// restart starts the site's server anew with blocks about evidence.
func (b *bench) restart(ctx context.Context, blocks string) error {
	if err := b.Stop(); err != nil {
		return err
	}
	b.ServerBlocks = "node_attestor \"join_token\" {}\n" + blocks
	return b.StartServer(ctx)
}

// policies are five of every kind.
const policies = `
scan_policy "prod" {
  sources = ["local"]
  fail {
    severity = "critical"
  }
  fail {
    severity   = "high"
    only_fixed = true
  }
  grace {
    severity = "high"
    for      = "72h"
  }
}
scan_policy "dev" {
  sources = ["local"]
}
scan_policy "known" {
  sources = ["local"]
  fail {
    kev = true
  }
}
scan_policy "aged" {
  sources = ["local"]
  max_age = "24h"
  fail {
    severity = "critical"
  }
}
scan_policy "trial" {
  sources = ["local"]
  mode    = "audit"
  fail {
    severity = "medium"
  }
}
`

// scanOf is a report on an image as Trivy writes it, of at least size bytes, with the given number of
// low findings at least and the others.
func scanOf(image string, size, findings int, others ...string) []byte {
	var out bytes.Buffer
	head, _ := json.Marshal(map[string]any{"ImageID": image, "OS": map[string]any{"Family": "debian", "Name": "12.9"}})
	fmt.Fprintf(&out, `{"SchemaVersion":2,"CreatedAt":%q,"ArtifactName":"shop","ArtifactType":"container_image","Metadata":%s,`+
		`"Results":[{"Target":"shop","Class":"os-pkgs","Type":"debian","Packages":[{"Name":"lib","Version":"1"}],"Vulnerabilities":[`,
		time.Now().Format(time.RFC3339Nano), head)
	row := func(id, severity string, n int) {
		if n > 0 {
			out.WriteByte(',')
		}
		fmt.Fprintf(&out, `{"VulnerabilityID":%q,"PkgName":"package%d","PkgIdentifier":{"PURL":"pkg:deb/debian/package%d@1.2-1?arch=amd64\u0026distro=debian-12.9"},`+
			`"InstalledVersion":"1.2-1","FixedVersion":"1.2-2","Status":"fixed","SeveritySource":"nvd","PrimaryURL":"https://avd.example/nvd/%s",`+
			`"DataSource":{"ID":"debian","Name":"Debian Security Tracker","URL":"https://tracker.example"},"Title":"package%d: something is not checked",`+
			`"Description":%q,"Severity":%q,"CweIDs":["CWE-273"],"References":["https://packets.example/files/%d"]}`,
			id, n%500, n%500, id, n%500, strings.Repeat("By default, if it is run with its effective UID, it will drop privileges. ", 10), severity, n)
	}
	n := 0
	for _, id := range others {
		row(id, "CRITICAL", n)
		n++
	}
	for ; n < findings || out.Len() < size; n++ {
		row(fmt.Sprintf("CVE-2025-%d", n), "LOW", n)
	}
	out.WriteString("]}]}")
	return out.Bytes()
}

// push pushes a report as an administrator. When it returns without an error, the report is acknowledged.
func (b *bench) push(ctx context.Context, image string, report []byte) error {
	stream, err := evidencev1.NewEvidenceClient(b.conn).Push(ctx)
	if err != nil {
		return err
	}
	header := &evidencev1.PushHeader{Image: image}
	if err := stream.Send(&evidencev1.PushRequest{Step: &evidencev1.PushRequest_Header{Header: header}}); err == nil {
		for piece := range slices.Chunk(report, 512<<10) {
			if stream.Send(&evidencev1.PushRequest{Step: &evidencev1.PushRequest_Chunk{Chunk: piece}}) != nil {
				break // the answer says why
			}
		}
	}
	_, err = stream.CloseAndRecv()
	return err
}

// runner is an agent played by this process: it follows the feed and says that it runs images.
type runner struct {
	*site.Node
	stream feedv1.Feed_FollowClient
}

// runs joins agents that say that they run the images. They speak the feed and nothing else: what an
// agent does then, up to its workloads' streams, is measured by BenchmarkIngest in test/world.
func (b *bench) runs(ctx context.Context, agents int, digests ...string) ([]*runner, error) {
	j, err := newJoiner(ctx, b)
	if err != nil {
		return nil, err
	}
	nodes, err := j.joinMany(ctx, agents)
	if err != nil {
		return nil, err
	}
	var list []*runner
	for _, n := range nodes {
		b.later(func() { n.Conn.Close() })
		stream, err := feedv1.NewFeedClient(n.Conn).Follow(ctx)
		if err != nil {
			return nil, err
		}
		hello := &feedv1.Hello{Capabilities: []string{"verdicts"}, Running: digests}
		if err := stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: hello}}); err != nil {
			return nil, err
		}
		list = append(list, &runner{n, stream})
	}
	return list, nil
}

// until reads from the feed until there is a verdict on the image for which good says yes.
func (r *runner) until(digest string, good func(selectors []string) bool) error {
	for {
		resp, err := r.stream.Recv()
		if err != nil {
			return err
		}
		err = r.stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Ack{Ack: &feedv1.Ack{Revision: resp.GetRevision()}}})
		if err != nil {
			return err
		}
		for _, v := range resp.GetVerdicts() {
			var texts []string
			for _, s := range v.GetSelectors() {
				texts = append(texts, s.GetType()+":"+s.GetValue())
			}
			if v.GetDigest() == digest && good(texts) {
				return nil
			}
		}
	}
}

// opens and closes say which verdict is waited for.
func opens(gate string) func([]string) bool {
	return func(s []string) bool { return slices.Contains(s, gate) }
}

func closes(gate string) func([]string) bool {
	return func(s []string) bool { return !slices.Contains(s, gate) }
}

// condemn measures how long it takes from the answer to a push until the last of 50 agents that run the
// image has the verdict.
func condemn(ctx context.Context, b *bench) error {
	const gate = "scan:policy:prod"
	if err := b.restart(ctx, policies); err != nil {
		return err
	}
	image := digestOf(0)
	if err := b.push(ctx, image, scanOf(image, 0, 100)); err != nil {
		return err
	}
	agents, err := b.runs(ctx, 50, image)
	if err != nil {
		return err
	}
	all := func(good func([]string) bool) error {
		return parallel(len(agents), len(agents), func(i int) error { return agents[i].until(image, good) })
	}
	if err := all(opens(gate)); err != nil {
		return err
	}
	var acknowledged, whole times
	for range b.n(200) {
		for _, round := range []struct {
			others []string
			good   func([]string) bool
		}{{[]string{"CVE-2099-1"}, closes(gate)}, {nil, opens(gate)}} {
			report := scanOf(image, 0, 100, round.others...)
			last := make(chan error, 1)
			var at time.Time
			go func() {
				err := all(round.good)
				at = time.Now()
				last <- err
			}()
			asked := time.Now()
			if err := b.push(ctx, image, report); err != nil {
				return err
			}
			answered := time.Now()
			if err := <-last; err != nil {
				return err
			}
			// An agent may have it before the answer is here.
			acknowledged, whole = append(acknowledged, max(0, at.Sub(answered))), append(whole, at.Sub(asked))
		}
	}
	more := fmt.Sprintf("(agents played to the feed; from the call on: p50 %.1f ms, p99 %.1f ms)", whole.at(50), whole.at(99))
	b.report(figure{"push of a report acknowledged → last of 50 agents, p50", "", 100, "ms"}, acknowledged.at(50), more)
	b.report(figure{"push of a report acknowledged → last of 50 agents, p99", "", 1000, "ms"}, acknowledged.at(99), "")
	return nil
}

// largeReport measures what a report of 10 MiB costs the server.
func largeReport(ctx context.Context, b *bench) error {
	if err := b.restart(ctx, policies); err != nil {
		return err
	}
	size, rounds := 10<<20, b.n(10)
	reports := make([][]byte, rounds)
	for i := range reports {
		reports[i] = scanOf(digestOf(i), size, 0)
	}
	used, err := cpuOf(func() error {
		for i, report := range reports {
			if err := b.push(ctx, digestOf(i), report); err != nil {
				return err
			}
		}
		return nil
	}, b.Server().PID())
	if err != nil {
		return err
	}
	b.report(figure{"report of 10 MiB taken in: server CPU", "", 200, "ms"}, micros(used, rounds)/1000, "(with receiving, judging and storing it)")
	return nil
}

// fleetJudged measures what a change of a feed costs the server that knows 10,000 images.
func fleetJudged(ctx context.Context, b *bench) error {
	images, kev := b.n(10_000), filepath.Join(b.Dir, "kev.json")
	const known = "CVE-2099-7"
	catalogue := func(ids ...string) error {
		list := []map[string]string{{"cveID": "CVE-1999-1"}}
		for _, id := range ids {
			list = append(list, map[string]string{"cveID": id})
		}
		text, err := json.Marshal(map[string]any{"dateReleased": time.Now().UTC().Format(time.RFC3339), "vulnerabilities": list})
		if err != nil {
			return err
		}
		if err := os.WriteFile(kev+".new", text, 0o600); err != nil {
			return err
		}
		return os.Rename(kev+".new", kev)
	}
	if err := catalogue(); err != nil {
		return err
	}
	if err := b.restart(ctx, policies+fmt.Sprintf("evidence {\n  kev_file = %q\n  feed_refresh = \"1s\"\n}\n", kev)); err != nil {
		return err
	}
	err := parallel(8, images, func(i int) error {
		var others []string
		if i == 0 {
			others = []string{known}
		}
		return b.push(ctx, digestOf(i), scanOf(digestOf(i), 0, 50, others...))
	})
	if err != nil {
		return err
	}
	agents, err := b.runs(ctx, 1, digestOf(0))
	if err != nil {
		return err
	}
	if err := agents[0].until(digestOf(0), opens("scan:policy:known")); err != nil {
		return err
	}
	used, err := cpuOf(func() error {
		if err := catalogue(known); err != nil {
			return err
		}
		return agents[0].until(digestOf(0), closes("scan:policy:known"))
	}, b.Server().PID())
	if err != nil {
		return err
	}
	b.report(figure{"feed changed, 10,000 images × 5 policies judged: server CPU", "", 2000, "ms"}, float64(used.Microseconds())/1000, fmt.Sprintf("(%d images)", images))
	return nil
}

// trackedImages measures what an agent holds of an image that runs, with the agent's own code in this
// process: 10,000 containers of as many images would be too many for one machine.
func trackedImages(_ context.Context, b *bench) error {
	const images = 10_000
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	held, list := view.New(nil), make([]*identity.Verdict, 0, images)
	before := heap()
	for n := range images {
		// From the wire, as they come, so that no text is shared that an agent does not share.
		w := &feedv1.Verdict{Digest: digestOf(n), SequenceNumber: 1, NotAfter: time.Now().Add(time.Hour).Unix()}
		for _, text := range []string{
			"scan:policy:prod", "scan:status:prod:pass", "scan:max-age:24h", "scan:max-age:3d", "scan:no:critical", "scan:scanner:trivy",
			"prov:policy:ci", "prov:commit:" + digestOf(n)[30:70], "sig:policy:ci",
		} {
			kind, value, _ := strings.Cut(text, ":")
			w.Selectors = append(w.Selectors, identity.SelectorsWire(attestor.NewSet(attestor.Selector{Type: kind, Value: strings.Clone(value)}))...)
		}
		w.Policies = []*feedv1.PolicyVerdict{{Policy: strings.Clone("prod"), Status: strings.Clone("pass")}}
		v, err := identity.VerdictFromWire(w)
		if err != nil {
			return err
		}
		list = append(list, v)
	}
	if err := held.Apply(view.Update{StoreID: "s", Rev: 1, Full: true, Verdicts: list}); err != nil {
		return err
	}
	clear(list) // what is held is the view's
	after := heap()
	if len(held.Picture().Verdicts) != images {
		return errors.New("verdicts are missing")
	}
	b.report(figure{"agent memory per tracked image", "", 2048, "bytes"}, float64(after-before)/images, "(the agent's code in the driver, nine selectors each)")
	return nil
}
