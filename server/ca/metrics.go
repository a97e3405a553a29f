package ca

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	signed   *prometheus.CounterVec
	refused  *prometheus.CounterVec
	failures prometheus.Counter
	expires  *prometheus.GaugeVec
	due      *prometheus.GaugeVec
	above    *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		signed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_ca_signed_total",
			Help: "SVIDs that were signed, by profile.",
		}, []string{"profile"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_ca_refused_total",
			Help: "SVIDs that were asked for and not signed, by profile.",
		}, []string{"profile"}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "assay_server_ca_rotation_failures_total",
			Help: "Attempts to prepare, publish, activate or prune authorities that failed.",
		}),
		expires: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "assay_server_ca_authority_expires_seconds",
			Help: "When the active authority expires, in Unix seconds, by kind.",
		}, []string{"kind"}),
		due: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "assay_server_ca_authority_due_seconds",
			Help: "When the successor of the active authority is to take over, in Unix seconds, by kind. In the past: it does not come.",
		}, []string{"kind"}),
		above: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_ca_upstream_failures_total",
			Help: "Questions to the upstream authority that got no answer to go by, by what was asked for: sign, bundle.",
		}, []string{"what"}),
	}
	// Alerts are about increases, and there is none from nothing to one.
	for _, profile := range []string{profileWorkload, profileAgent, profileJWT} {
		m.signed.WithLabelValues(profile)
		m.refused.WithLabelValues(profile)
	}
	for _, what := range []string{"sign", "bundle"} {
		m.above.WithLabelValues(what)
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.signed, m.refused, m.failures, m.expires, m.due, m.above} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register CA metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) count(profile string, err error) {
	if err != nil {
		m.refused.WithLabelValues(profile).Inc()
		return
	}
	m.signed.WithLabelValues(profile).Inc()
}

func (m *metrics) active(kind string, a *authority) {
	m.expires.WithLabelValues(kind).Set(float64(a.line.NotAfter.Unix()))
	m.due.WithLabelValues(kind).Set(float64(a.activateAt().Unix()))
}
