package view

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	snapshots prometheus.Counter
	computed  prometheus.Counter
	touched   prometheus.Counter
	apply     prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer, v *View) *metrics {
	m := &metrics{
		snapshots: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "assay_server_view_snapshots_total",
			Help: "Full snapshots taken: one at the start, and one each time the log of commits could not be followed.",
		}),
		computed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "assay_server_view_pictures_computed_total",
			Help: "Pictures of agents that were computed because somebody asked.",
		}),
		touched: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "assay_server_view_agents_concerned_total",
			Help: "Agents that changes concerned, summed over the changes.",
		}),
		apply: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "assay_server_view_apply_seconds",
			Help:    "Time to take one commit into the view.",
			Buckets: prometheus.ExponentialBuckets(10e-6, 4, 10),
		}),
	}
	gauge := func(name, help string, value func(g *graph) int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			v.mu.RLock()
			defer v.mu.RUnlock()
			return float64(value(&v.graph))
		})
	}
	reg.MustRegister(m.snapshots, m.computed, m.touched, m.apply,
		gauge("assay_server_view_entries", "Entries in the view.", func(g *graph) int { return g.entries.size }),
		gauge("assay_server_view_nodes", "Nodes in the view, banned ones included.", func(g *graph) int { return g.nodes.size }),
		gauge("assay_server_view_bundles", "Bundles in the view.", func(g *graph) int { return len(g.bundles) }),
		gauge("assay_server_view_verdicts", "Verdicts on images in the view.", func(g *graph) int { return len(g.images.verdicts) }),
		gauge("assay_server_view_images", "Images that agents report to run.", func(g *graph) int { return len(g.images.runners) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "assay_server_view_revision",
			Help: "Revision of the last commit that the view has taken in.",
		}, func() float64 { return float64(v.Rev()) }),
	)
	return m
}
