package policy

import (
	"fmt"
	"math/rand"
	"syscall"
	"testing"
	"time"

	"github.com/assay-id/assay/server/verdict/report"
)

// fleet is as many images as asked for, each with the given number of findings in reports of two
// scanners, and feeds of the size of the real ones.
func fleet(images, findings, scored int) []Input {
	random := rand.New(rand.NewSource(3))
	feeds := Feeds{KEV: map[string]bool{}, KEVAt: week, EPSS: map[string]float64{}, EPSSAt: week}
	for i := range scored {
		feeds.EPSS[fmt.Sprintf("CVE-2026-%d", i)] = random.Float64() * random.Float64()
		if i%200 == 0 {
			feeds.KEV[fmt.Sprintf("CVE-2026-%d", i)] = true
		}
	}
	inputs := make([]Input, images)
	for i := range inputs {
		in := &inputs[i]
		*in = Input{Digest: fmt.Sprintf("sha256:%064x", i), Now: week.Add(time.Hour), SeenAt: week, Feeds: feeds}
		all := make([]report.Finding, findings)
		for n := range all {
			all[n] = report.Finding{
				ID: fmt.Sprintf("CVE-2026-%d", random.Intn(scored)), Package: fmt.Sprintf("pkg:deb/debian/package%d@1.%d?arch=amd64&distro=debian-12", random.Intn(findings/2), i%7),
				Severity: report.Severity(1 + random.Intn(4)), Fixed: random.Intn(3) == 0, EPSS: -1,
			}
		}
		if i%10 == 0 {
			all[0].Severity = report.Critical
		}
		for s, scanner := range []string{"trivy", "grype"} {
			r := &report.Report{Scanner: scanner, ScannedAt: week, DBAt: week, Findings: all[s*findings/2 : (s+1)*findings/2], Packages: findings}
			in.Reports = append(in.Reports, SourcedReport{Source: scanner, TrustPolicy: scanner, Report: r, ReceivedAt: week, Match: Strong, Hash: fmt.Sprint(scanner, i), Index: NewIndex(r)})
		}
		in.FirstSeen = func(string) time.Time { return week }
	}
	return inputs
}

// fivePolicies are of every kind, with different sources.
func fivePolicies(tb testing.TB) []*ScanPolicy {
	var all []*ScanPolicy
	for _, text := range []string{
		`scan_policy "prod" {
			sources = ["trivy", "grype"]
			min_sources = 2
			fail { severity = "critical" }
			fail {
				severity   = "high"
				only_fixed = true
			}
			fail { kev = true }
			fail { epss = 0.9 }
			grace {
				severity = "high"
				for      = "72h"
			}
		}`,
		`scan_policy "dev" { sources = ["trivy", "grype"] }`,
		`scan_policy "trivy" { sources = ["trivy"] }`,
		`scan_policy "grype" {
			sources = ["grype"]
			fail { kev = true }
		}`,
		`scan_policy "trial" {
			sources = ["trivy", "grype"]
			mode    = "audit"
			fail { severity = "medium" }
		}`,
	} {
		all = append(all, compile(tb, text))
	}
	return all
}

// cpu is what the process has used, in user and system mode: other work on the machine does not count.
func cpu(tb testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkFleet judges 10,000 images by 5 policies, as after a change of a feed.
func BenchmarkFleet(b *testing.B) {
	inputs, policies := fleet(10_000, 100, 250_000), fivePolicies(b)
	for b.Loop() {
		start := cpu(b)
		failed := 0
		for i := range inputs {
			for _, v := range DecideAll(policies, inputs[i]) {
				if !v.Allowed {
					failed++
				}
			}
		}
		b.ReportMetric((cpu(b) - start).Seconds(), "cpu-s/fleet")
		b.ReportMetric(float64(failed), "closed")
	}
}

func BenchmarkIndex(b *testing.B) {
	in := fleet(1, 1000, 1000)[0]
	for b.Loop() {
		NewIndex(in.Reports[0].Report)
	}
}
