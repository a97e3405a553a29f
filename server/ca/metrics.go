package ca

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	signed   *prometheus.CounterVec
	refused  *prometheus.CounterVec
	failures prometheus.Counter
	expires  *prometheus.GaugeVec
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
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.signed, m.refused, m.failures, m.expires} {
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

func (m *metrics) active(kind string, notAfter time.Time) {
	m.expires.WithLabelValues(kind).Set(float64(notAfter.Unix()))
}
