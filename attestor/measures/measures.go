// Package measures gives the operator what programs measured that attestors run: plugins of SPIRE, whose Metrics service
// it is behind.
//
// Why it is so: names and labels are a stranger's, and each makes the scrape longer and takes memory for as long as we
// run. So there is a limit on how many there are, what they may be called is what Prometheus takes, and
// all begin with "assay_plugin_" and say of which program they are, so that none passes for one of ours.
package measures

import (
	"cmp"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/assay-id/assay/attestor"
)

// Limits on what programs may have measured.
const (
	maxSeries = 1000 // of all programs
	maxOf     = 250  // of one
	maxLabels = 16
	maxName   = 200 // bytes of a name
	maxValue  = 200 // and of a label's value
)

// prefix is what all names begin with.
const prefix = "assay_plugin_"

// source is the label that names the program.
const source = "plugin"

var outside = regexp.MustCompile(`[^A-Za-z0-9_]`)

// Measures is a collector of what is measured. It is safe for concurrent use.
type Measures struct {
	mu     sync.Mutex // guards the rest
	series map[string]prometheus.Metric
	kinds  map[string]attestor.MeasureKind // by name: one name is of one kind
	count  map[string]int                  // by program
}

// New returns a collector that was made known to the registerer.
func New(to prometheus.Registerer) (*Measures, error) {
	m := &Measures{series: map[string]prometheus.Metric{}, kinds: map[string]attestor.MeasureKind{}, count: map[string]int{}}
	if err := to.Register(m); err != nil {
		return nil, fmt.Errorf("register metrics of plugins: %w", err)
	}
	return m, nil
}

// Describe says nothing: what there will be is not known.
func (m *Measures) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m *Measures) Collect(to chan<- prometheus.Metric) {
	m.mu.Lock()
	all := make([]prometheus.Metric, 0, len(m.series))
	for _, one := range m.series {
		all = append(all, one)
	}
	m.mu.Unlock()
	for _, one := range all {
		to <- one
	}
}

// Take takes a measurement. Its error says what is wrong with it.
func (m *Measures) Take(of attestor.Measurement) error {
	name, labels, err := name(of)
	if err != nil {
		return err
	}
	if math.IsNaN(of.Value) || math.IsInf(of.Value, 0) {
		return fmt.Errorf("%v is no number", of.Value)
	}
	if of.Kind == attestor.Counter && of.Value < 0 {
		return fmt.Errorf("a counter cannot grow by %v", of.Value)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if kind, known := m.kinds[name]; known && kind != of.Kind {
		return fmt.Errorf("%s is measured in another way already", name)
	}
	parts := []string{name}
	for _, label := range labels {
		parts = append(parts, label.Name, label.Value)
	}
	key := strings.Join(parts, "\x00")
	metric := m.series[key]
	if metric == nil {
		if len(m.series) >= maxSeries || m.count[of.Source] >= maxOf {
			return fmt.Errorf("no more is measured: there are %d series of plugin %q, %d in all, and the limits are %d and %d", m.count[of.Source], of.Source, len(m.series), maxOf, maxSeries)
		}
		metric = newSeries(of.Kind, name, labels)
		m.series[key] = metric
		m.kinds[name] = of.Kind
		m.count[of.Source]++
	}
	switch series := metric.(type) {
	case prometheus.Summary:
		series.Observe(of.Value)
	case prometheus.Gauge:
		series.Set(of.Value)
	case prometheus.Counter:
		series.Add(of.Value)
	}
	return nil
}

func newSeries(kind attestor.MeasureKind, name string, labels []attestor.Label) prometheus.Metric {
	constant := prometheus.Labels{}
	for _, label := range labels {
		constant[label.Name] = label.Value
	}
	const help = "Measured by a plugin."
	switch kind {
	case attestor.Counter:
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help, ConstLabels: constant})
	case attestor.Sample:
		return prometheus.NewSummary(prometheus.SummaryOpts{
			Name: name, Help: help, ConstLabels: constant, Objectives: map[float64]float64{0.5: 0.05, 0.9: 0.01, 0.99: 0.001},
		})
	}
	return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: constant})
}

// name makes of the key a name, and of the labels such as may be there, sorted, with that of the program.
func name(of attestor.Measurement) (string, []attestor.Label, error) {
	name := prefix + outside.ReplaceAllString(strings.Join(of.Key, "_"), "_")
	switch {
	case len(name) > maxName:
		return "", nil, fmt.Errorf("name of %d bytes, the limit is %d", len(name), maxName)
	case strings.Trim(name[len(prefix):], "_") == "":
		return "", nil, fmt.Errorf("there is no name")
	case len(of.Labels) > maxLabels:
		return "", nil, fmt.Errorf("%d labels, the limit is %d", len(of.Labels), maxLabels)
	}
	labels := []attestor.Label{{Name: source, Value: of.Source}}
	for _, label := range of.Labels {
		called := outside.ReplaceAllString(label.Name, "_")
		if called == "" || len(called) > maxName {
			return "", nil, fmt.Errorf("label with a name of %d bytes", len(called))
		}
		if called[0] >= '0' && called[0] <= '9' || strings.HasPrefix(called, "__") || called == "quantile" {
			called = "label_" + called
		}
		value := strings.ToValidUTF8(label.Value, "�")
		if len(value) > maxValue {
			value = strings.ToValidUTF8(value[:maxValue], "") + "…"
		}
		labels = append(labels, attestor.Label{Name: called, Value: value})
	}
	slices.SortFunc(labels, func(a, b attestor.Label) int { return cmp.Compare(a.Name, b.Name) })
	for i := 1; i < len(labels); i++ {
		if labels[i].Name == labels[i-1].Name {
			return "", nil, fmt.Errorf("two labels are called %s", labels[i].Name)
		}
	}
	return name, labels, nil
}
