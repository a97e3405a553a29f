package verdict

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/assay-id/assay/server/verdict/policy"
)

type metrics struct {
	ingested, rejected, verdicts, events, guards, posts *prometheus.CounterVec
	lost, unwritten                                     prometheus.Counter
	took                                                prometheus.Histogram
	feedAge                                             *prometheus.GaugeVec
}

// newMetrics registers what is counted. Overdue is for how long the verdict that is waited for longest should
// have been there.
func newMetrics(r prometheus.Registerer, overdue func() time.Duration) *metrics {
	f := promauto.With(r)
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return f.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "assay_server_verdict_overdue_seconds",
		Help: "For how long a verdict whose time has come is being waited for: a grace that ended, evidence that became too old. 0: for none.",
	}, func() float64 { return overdue().Seconds() })
	m := &metrics{
		ingested: counter("assay_server_evidence_documents_total", "Documents of evidence that were taken in, by format and result (taken, duplicate).", "format", "result"),
		rejected: counter("assay_server_evidence_rejected_total", "Documents of evidence that were refused, by reason.", "reason"),
		verdicts: counter("assay_server_verdict_changes_total", "Changes of verdicts on images, by policy and new status.", "policy", "status"),
		events:   counter("assay_server_verdict_events_total", "What webhooks are told, by type; counted whether there is a webhook or not.", "type"),
		guards:   counter("assay_server_verdict_guard_trips_total", "Times that the blast guard held withdrawals back, by policy.", "policy"),
		posts:    counter("assay_server_webhook_posts_total", "Attempts to deliver alerts, by result (delivered, failed).", "result"),
		lost: f.NewCounter(prometheus.CounterOpts{
			Name: "assay_server_webhook_dropped_total", Help: "Alerts that were dropped because too many were waiting.",
		}),
		feedAge: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "assay_server_vulnerability_feed_timestamp_seconds", Help: "When the content of a vulnerability feed was made, Unix time.",
		}, []string{"feed"}),
		took: f.NewHistogram(prometheus.HistogramOpts{
			Name: "assay_server_verdict_evaluate_seconds", Help: "Time to judge all images that one cause concerns, and to write what came of it.",
			Buckets: prometheus.ExponentialBuckets(0.001, 3, 10),
		}),
		unwritten: f.NewCounter(prometheus.CounterOpts{
			Name: "assay_server_verdict_failures_total", Help: "Times that verdicts could not be written; they are tried again.",
		}),
	}
	// Alerts are about increases, and there is none from nothing to one.
	for _, word := range []string{"image", "not-newer", "other-image", "unreadable", "untrusted", "held", "too-many", "too-large", "trust", "other"} {
		m.rejected.WithLabelValues(word)
	}
	m.posts.WithLabelValues("delivered")
	m.posts.WithLabelValues("failed")
	return m
}

// policies begins to count what policies do: alerts are about increases, and there is none from nothing to one.
func (m *metrics) policies(all []*policy.ScanPolicy) {
	for _, p := range all {
		m.guards.WithLabelValues(p.Name)
	}
}
