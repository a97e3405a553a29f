package verdict

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/assay-id/assay/server/records/stored"
)

func FuzzFeeds(f *testing.F) {
	f.Add([]byte(`{"title":"CISA Catalog","catalogVersion":"2026.05.01","dateReleased":"2026-05-01T11:00:00.1Z","count":1,"vulnerabilities":[{"cveID":"CVE-2021-44228","vendorProject":"Apache"}]}`))
	f.Add([]byte("#model_version:v2025.03.14,score_date:2026-05-01T00:00:00+0000\ncve,epss,percentile\nCVE-1999-0001,0.01025,0.76\n"))
	f.Add([]byte("cve,epss,percentile\nCVE-1999-0001,NaN,0.76\n"))
	f.Add([]byte(`{"vulnerabilities":[{"cve":"CVE-2021-44228"}]}`)) // of another form
	f.Add([]byte(",0"))
	f.Fuzz(func(t *testing.T, content []byte) {
		if kev, _, err := parseKEV(content); err == nil && (len(kev) == 0 || kev[""]) {
			t.Error("a catalogue of nothing was read")
		}
		epss, _, err := parseEPSS(content)
		if err != nil {
			return
		}
		if len(epss) == 0 {
			t.Error("scores of nothing were read")
		}
		for id, score := range epss {
			if math.IsNaN(score) || score < 0 || score > 1 || id == "" {
				t.Errorf("%q has the probability %v", id, score)
			}
		}
	})
}

// FuzzMarks reads a file of marks that somebody has spoiled: what can be read counts, and no mark of the store is
// lowered by it.
func FuzzMarks(f *testing.F) {
	line, err := markLine("a", &stored.EvidenceMark{Time: 7})
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(line))
	f.Add([]byte("\n" + line[:len(line)/2]))
	f.Add([]byte(strings.Repeat("x", 4096)))
	f.Fuzz(func(t *testing.T, content []byte) {
		path := filepath.Join(t.TempDir(), "marks")
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := openMarks(path)
		if err != nil {
			t.Fatal(err)
		}
		marks := map[string]*stored.EvidenceMark{"a": {Time: 5}}
		if err := file.merge(marks); err == nil && marks["a"].GetTime() < 5 {
			t.Errorf("the mark is at %d", marks["a"].GetTime())
		}
		if err := file.close(); err != nil {
			t.Error(err)
		}
	})
}
