package main

import (
	"math"
	"strings"
	"testing"
)

func TestHistogram(t *testing.T) {
	read := func(text string) histogram {
		t.Helper()
		h, err := readHistogram(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	const name = "assay_workload_attestation_seconds"
	text := func(a, b, all, sum string) string {
		return "# HELP " + name + " How long\n" + name + `_bucket{attestor="docker",le="0.001"} 999` + "\n" +
			name + `_bucket{attestor="unix",le="0.001"} ` + a + "\n" + name + `_bucket{attestor="unix",le="0.005"} ` + b + "\n" +
			name + `_bucket{attestor="unix",le="+Inf"} ` + all + "\n" + name + `_sum{attestor="unix"} ` + sum + "\n" + name + `_count{attestor="unix"} ` + all + "\n"
	}
	took := read(text("30", "110", "110", "0.3")).since(read(text("10", "10", "10", "0.1")))
	if took.count != 100 || math.Abs(took.sum-0.2) > 1e-9 {
		t.Errorf("%+v", took)
	}
	// Twenty are below 1 ms, eighty between 1 and 5: the fiftieth is 30/80 of the way.
	if got := took.median(); math.Abs(got-0.0025) > 1e-9 {
		t.Errorf("the median is %v", got)
	}
	if _, err := readHistogram(strings.NewReader("else 1\n")); err == nil {
		t.Error("no error where there is none")
	}
}
