package measures

import (
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"github.com/assay-id/assay/attestor"
)

func open(t *testing.T) (*Measures, *prometheus.Registry) {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	m, err := New(registry)
	if err != nil {
		t.Fatal(err)
	}
	return m, registry
}

func TestWhatIsMeasuredIsShown(t *testing.T) {
	m, registry := open(t)
	label := []attestor.Label{{Name: "tag.name", Value: "x\xff"}}
	for _, of := range []attestor.Measurement{
		{Source: "hsm", Kind: attestor.Gauge, Key: []string{"slots", "free"}, Value: 3},
		{Source: "hsm", Kind: attestor.Gauge, Key: []string{"slots", "free"}, Value: 2},
		{Source: "hsm", Kind: attestor.Counter, Key: []string{"calls"}, Value: 1, Labels: label},
		{Source: "hsm", Kind: attestor.Counter, Key: []string{"calls"}, Value: 2, Labels: label},
		{Source: "other", Kind: attestor.Counter, Key: []string{"calls"}, Value: 4},
		{Source: "hsm", Kind: attestor.Sample, Key: []string{"took", "ms"}, Value: 10},
		{Source: "hsm", Kind: attestor.Sample, Key: []string{"took", "ms"}, Value: 30, Labels: nil},
	} {
		if err := m.Take(of); err != nil {
			t.Fatal(err)
		}
	}
	want := `
# HELP assay_plugin_calls Measured by a plugin.
# TYPE assay_plugin_calls counter
assay_plugin_calls{plugin="other"} 4
assay_plugin_calls{plugin="hsm",tag_name="x�"} 3
# HELP assay_plugin_slots_free Measured by a plugin.
# TYPE assay_plugin_slots_free gauge
assay_plugin_slots_free{plugin="hsm"} 2
# HELP assay_plugin_took_ms Measured by a plugin.
# TYPE assay_plugin_took_ms summary
assay_plugin_took_ms{plugin="hsm",quantile="0.5"} 10
assay_plugin_took_ms{plugin="hsm",quantile="0.9"} 30
assay_plugin_took_ms{plugin="hsm",quantile="0.99"} 30
assay_plugin_took_ms_sum{plugin="hsm"} 40
assay_plugin_took_ms_count{plugin="hsm"} 2
`
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, family := range families {
		if _, err := expfmt.MetricFamilyToText(&got, family); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(strings.TrimSpace(want), strings.TrimSpace(got.String())); diff != "" {
		t.Error(diff)
	}
}

func TestWhatIsRefused(t *testing.T) {
	m, registry := open(t)
	if err := m.Take(attestor.Measurement{Source: "a", Kind: attestor.Gauge, Key: []string{"known"}}); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		of   attestor.Measurement
		want string
	}{
		"no name":                        {attestor.Measurement{}, "there is no name"},
		"a name of nothing":              {attestor.Measurement{Key: []string{"", "."}}, "there is no name"},
		"a long name":                    {attestor.Measurement{Key: []string{strings.Repeat("x", 500)}}, "name of 513 bytes"},
		"no number":                      {attestor.Measurement{Key: []string{"x"}, Value: math.NaN()}, "NaN is no number"},
		"an endless number":              {attestor.Measurement{Key: []string{"x"}, Value: math.Inf(1)}, "+Inf is no number"},
		"a counter that goes back":       {attestor.Measurement{Kind: attestor.Counter, Key: []string{"x"}, Value: -1}, "a counter cannot grow by -1"},
		"one name for two kinds":         {attestor.Measurement{Kind: attestor.Counter, Key: []string{"known"}, Value: 1}, "measured in another way already"},
		"a label twice":                  {attestor.Measurement{Key: []string{"x"}, Labels: []attestor.Label{{Name: "a.b"}, {Name: "a-b"}}}, "two labels are called a_b"},
		"another's name":                 {attestor.Measurement{Key: []string{"x"}, Labels: []attestor.Label{{Name: "plugin", Value: "other"}}}, "two labels are called plugin"},
		"a label without a name":         {attestor.Measurement{Key: []string{"x"}, Labels: []attestor.Label{{}}}, "label with a name of 0 bytes"},
		"many labels":                    {attestor.Measurement{Key: []string{"x"}, Labels: make([]attestor.Label, 17)}, "17 labels, the limit is 16"},
		"a name that breaks the listing": {attestor.Measurement{Key: []string{"\n"}}, "there is no name"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := m.Take(c.of); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	t.Run("labels that Prometheus would refuse have another name", func(t *testing.T) {
		for _, name := range []string{"__name__", "quantile", "0", "le", "ä"} {
			if err := m.Take(attestor.Measurement{Source: name, Kind: attestor.Sample, Key: []string{"s"}, Labels: []attestor.Label{{Name: name, Value: strings.Repeat("ä", 500)}}}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	t.Run("more than there is room for", func(t *testing.T) {
		var refused error
		for n := range 2 * maxSeries {
			refused = m.Take(attestor.Measurement{Source: fmt.Sprint("p", n%8), Kind: attestor.Gauge, Key: []string{fmt.Sprint("n", n)}, Value: 1})
		}
		if refused == nil || !strings.Contains(refused.Error(), "no more is measured") {
			t.Errorf("got %v", refused)
		}
		if err := m.Take(attestor.Measurement{Source: "a", Kind: attestor.Gauge, Key: []string{"known"}, Value: 7}); err != nil {
			t.Errorf("what is known already: %v", err)
		}
	})
	t.Run("everything can be scraped", func(t *testing.T) {
		families, err := registry.Gather()
		n := 0
		for _, family := range families {
			n += len(family.GetMetric())
		}
		if err != nil || n != maxSeries {
			t.Errorf("%d series, %v", n, err)
		}
	})
}

func FuzzTake(f *testing.F) {
	f.Add("a", "b", "c", "d", uint8(0), 1.0)
	f.Add("", "\x00", "__x", "\xff", uint8(2), -1.0)
	f.Fuzz(func(t *testing.T, source, key, name, value string, kind uint8, number float64) {
		registry := prometheus.NewPedanticRegistry()
		m, err := New(registry)
		if err != nil {
			t.Fatal(err)
		}
		_ = m.Take(attestor.Measurement{Source: "p", Kind: attestor.MeasureKind(kind % 3), Key: []string{source, key}, Labels: []attestor.Label{{Name: name, Value: value}}, Value: number})
		if _, err := registry.Gather(); err != nil {
			t.Error(err)
		}
	})
}
