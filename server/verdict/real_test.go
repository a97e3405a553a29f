package verdict

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// realScan reads a report that nobody of this project wrote, beside the repository or where
// ASSAY_SHARED_DATA says, and lets it be made at the given time, of a system that is still supported.
func realScan(t *testing.T, name string, at time.Time) (image string, content []byte) {
	t.Helper()
	dir := os.Getenv("ASSAY_SHARED_DATA")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "shared", "data")
	}
	text, err := os.ReadFile(filepath.Join(dir, "scan-reports", name))
	if errors.Is(err, os.ErrNotExist) {
		t.Skipf("REAL SAMPLES WERE NOT READ: %v; set ASSAY_SHARED_DATA to a folder that has them", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	var whole map[string]any
	if err := json.Unmarshal(text, &whole); err != nil {
		t.Fatal(err)
	}
	whole["CreatedAt"] = at.Format(time.RFC3339Nano)
	metadata, _ := whole["Metadata"].(map[string]any)
	if system, ok := metadata["OS"].(map[string]any); ok {
		delete(system, "EOSL")
	}
	if content, err = json.Marshal(whole); err != nil {
		t.Fatal(err)
	}
	image, _ = metadata["ImageID"].(string)
	return image, content
}

// TestAFilteredCopyOfARealScanClearsNothing: Trivy's own sample of alpine 3.9 has four medium findings and
// two critical ones, and its sample with "--severity HIGH,CRITICAL" of the same image the two alone; the
// one of buster with "--ignore-unfixed" leaves out what has no fix. Nothing in either says so.
func TestAFilteredCopyOfARealScanClearsNothing(t *testing.T) {
	for _, c := range []struct{ full, filtered string }{
		{"trivy-alpine-39.json", "trivy-alpine-39-high-critical.json"},
		{"trivy-debian-buster.json", "trivy-debian-buster-ignore-unfixed.json"},
	} {
		t.Run(c.filtered, func(t *testing.T) {
			w := newWorld(t, prod)
			image, full := realScan(t, c.full, w.now())
			same, filtered := realScan(t, c.filtered, w.now())
			if same != image || bytes.Equal(full, filtered) {
				t.Fatalf("they are of %s and %s", image, same)
			}
			if _, err := w.send(image, full); err != nil {
				t.Fatal(err)
			}
			before, err := w.Show(image, nil)
			if err != nil {
				t.Fatal(err)
			}
			w.pass(time.Hour)
			if _, err := w.send(image, filtered); !errors.Is(err, ErrStale) {
				t.Errorf("the filtered copy of the same scan is answered with %v", err)
			}
			after, err := w.Show(image, nil)
			if err != nil {
				t.Fatal(err)
			}
			if len(before.Documents) != 1 || len(after.Documents) != 1 || after.Documents[0].Hash != before.Documents[0].Hash || after.Documents[0].Findings != before.Documents[0].Findings {
				t.Errorf("it was %+v and is %+v", before.Documents, after.Documents)
			}
			if len(after.Findings) != len(before.Findings) || after.Verdicts[0].Allowed != before.Verdicts[0].Allowed {
				t.Errorf("the verdict changed from %+v to %+v", before.Verdicts, after.Verdicts)
			}
		})
	}
}
