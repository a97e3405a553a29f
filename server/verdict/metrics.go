package verdict

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	ingested, rejected, verdicts, events, guards, posts *prometheus.CounterVec
	lost                                                prometheus.Counter
	feedAge                                             *prometheus.GaugeVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	f := promauto.With(r)
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return f.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	return &metrics{
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
	}
}
