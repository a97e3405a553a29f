package verdict

import (
	"encoding/hex"
	"flag"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/report"
)

var writeBodies = flag.Bool("write-bodies", false, "write the stored bodies in testdata anew")

var storedReport = &report.Report{
	Format: report.Trivy, Scanner: "trivy", Version: "0.56.2",
	Subject: report.Subject{
		Config: "sha256:" + strings.Repeat("1a", 32), Manifests: []string{"sha256:" + strings.Repeat("2b", 32)},
		Platform: "linux/arm64/v8", Name: "registry.example.org/shop/app:1.2",
	},
	ScannedAt: time.Date(2026, 5, 1, 12, 0, 0, 123456789, time.UTC), DBAt: time.Date(2026, 5, 1, 6, 0, 0, 0, time.UTC),
	Findings: []report.Finding{
		{ID: "CVE-2026-1", Aliases: []string{"GHSA-AAAA-BBBB-CCCC"}, Package: "pkg:deb/debian/lib@1", Severity: report.Critical, Fixed: true, KEV: true, EPSS: 0.97},
		{ID: "CVE-2026-2", Package: "lib@2", Severity: report.Unknown, EPSS: -1, Suppressed: "not_affected: component_not_present"},
	},
	Packages: 214, Flaws: []report.Flaw{report.FlawEOSL, report.FlawFiltered},
}

var storedVEX = &report.VEX{
	Format: report.OpenVEX, ID: "https://example.org/vex/1", Author: "Security team", Timestamp: time.Date(2026, 5, 2, 8, 30, 0, 0, time.UTC), Version: 3,
	Statements: []report.Statement{
		{Vulnerability: "CVE-2026-1", Aliases: []string{"GHSA-AAAA-BBBB-CCCC"}, Product: "sha256:" + strings.Repeat("1a", 32), Package: "pkg:deb/debian/lib@1",
			Status: "not_affected", Justification: "vulnerable_code_not_present", Timestamp: time.Date(2026, 5, 2, 8, 0, 0, 0, time.UTC)},
		{Vulnerability: "CVE-2026-2", Package: "pkg:golang/example.org/lib", Status: "under_investigation"},
	},
}

var storedFirst = &stored.EvidenceFirstSeen{At: map[string]int64{"CVE-2026-1": 1777636800, "CVE-2026-2": 1777640400}}

// body returns what a file in testdata/bodies holds. These files are what servers have on their disks: one
// that cannot be read any more is an upgrade that loses evidence. They are written anew only when a field
// was added, and then beside the old ones.
func body(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "bodies", name+".hex"))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := hex.DecodeString(strings.Join(strings.Fields(string(text)), ""))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestStoredBodies(t *testing.T) {
	must := func(b []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	fresh := map[string][]byte{
		"report-1": must(encodeReport(storedReport)), "vex-1": must(encodeVEX(storedVEX)), "first-seen-1": must(encodeBody(storedFirst)),
	}
	for name, b := range fresh {
		if *writeBodies {
			var lines []string
			for part := range slices.Chunk([]byte(hex.EncodeToString(b)), 100) {
				lines = append(lines, string(part))
			}
			path := filepath.Join("testdata", "bodies", name+".hex")
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if kept := body(t, name); hex.EncodeToString(kept) != hex.EncodeToString(b) {
			t.Errorf("%s is written in another way than it was", name)
		}
	}
	t.Run("are read as what they were", func(t *testing.T) {
		r, err := words{}.decodeReport(body(t, "report-1"))
		if diff := cmp.Diff(storedReport, r); diff != "" || err != nil {
			t.Error(err, diff)
		}
		v, err := words{}.decodeVEX(body(t, "vex-1"))
		if diff := cmp.Diff(storedVEX, v); diff != "" || err != nil {
			t.Error(err, diff)
		}
		var first stored.EvidenceFirstSeen
		if err := decodeBody(body(t, "first-seen-1"), &first); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(storedFirst, &first, protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("of a newer server, cut off or of no kind are refused", func(t *testing.T) {
		good := body(t, "report-1")
		worse := &stored.EvidenceReport{Findings: []*stored.EvidenceFinding{{Id: "CVE-2026-1", Severity: int32(report.Critical) + 1}}}
		for name, b := range map[string][]byte{
			"nothing": nil, "a newer version": append([]byte{bodyVersion + 1}, good[1:]...), "half of one": good[:len(good)/2],
			"a severity that is none": must(encodeBody(worse)), "text": []byte("\x01hello"),
		} {
			if r, err := (words{}).decodeReport(b); err == nil {
				t.Errorf("%s is read as %+v", name, r)
			}
		}
	})
}

func TestStoredTimes(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 0, 5, time.UTC)
	for _, c := range []struct{ at, want time.Time }{
		{time.Time{}, time.Time{}},
		{now, now},
		{time.Unix(0, 0), time.Unix(0, 1).UTC()},
		{time.Date(1066, 10, 14, 9, 0, 0, 0, time.UTC), time.Unix(0, 1).UTC()},
		{now.AddDate(-584, 0, -186), time.Unix(0, 1).UTC()}, // nanoseconds come round after 584 years and a half
		{time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), time.Unix(0, math.MaxInt64).UTC()},
	} {
		if got := timeOf(nanos(c.at)); !got.Equal(c.want) {
			t.Errorf("%s is stored as %s, want %s", c.at, got, c.want)
		}
	}
}

// FuzzBodies: whatever is on the disk is read or refused, and what was read is written and read again as
// the same.
func FuzzBodies(f *testing.F) {
	for _, name := range []string{"report-1", "vex-1", "first-seen-1"} {
		f.Add(body(f, name))
	}
	f.Add([]byte{})
	f.Add([]byte{bodyVersion})
	equal := []cmp.Option{cmpopts.EquateNaNs(), cmpopts.EquateEmpty()}
	f.Fuzz(func(t *testing.T, data []byte) {
		// Writing cuts long texts and far times: what was read from what was written stays.
		if r, err := (words{}).decodeReport(data); err == nil {
			for range 2 {
				before := r
				b, err := encodeReport(r)
				if err != nil {
					t.Fatal(err)
				}
				if r, err = (words{}).decodeReport(b); err != nil {
					t.Fatal(err)
				}
				if len(before.Findings) != len(r.Findings) {
					t.Fatalf("%d findings became %d", len(before.Findings), len(r.Findings))
				}
				data = b
			}
			again, err := encodeReport(r)
			if err != nil || string(again) != string(data) {
				t.Fatalf("the same is written in two ways: %v", err)
			}
		}
		if v, err := (words{}).decodeVEX(data); err == nil {
			b, err := encodeVEX(v)
			if err != nil {
				t.Fatal(err)
			}
			first, err := words{}.decodeVEX(b)
			if err != nil {
				t.Fatal(err)
			}
			if b, err = encodeVEX(first); err != nil {
				t.Fatal(err)
			}
			second, err := words{}.decodeVEX(b)
			if diff := cmp.Diff(first, second, equal...); diff != "" || err != nil {
				t.Fatal(err, diff)
			}
		}
		var first, second stored.EvidenceFirstSeen
		if decodeBody(data, &first) == nil {
			b, err := encodeBody(&first)
			if err != nil {
				t.Fatal(err)
			}
			if err := decodeBody(b, &second); err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(&first, &second) {
				t.Fatal("it is read as something else")
			}
		}
	})
}
