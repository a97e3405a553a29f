package workloadapi

import (
	"errors"
	"io"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
)

// metrics are the numbers of one Server.
type metrics struct {
	connections prometheus.Gauge
	streams     *prometheus.GaugeVec   // by event
	answers     *prometheus.CounterVec // by event and outcome
	refused     prometheus.Counter
	panics      prometheus.Counter
}

func newMetrics(to prometheus.Registerer) *metrics {
	return &metrics{
		connections: register(to, prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "assay_workloadapi_connections",
			Help: "Open connections to the Workload API.",
		})),
		streams: register(to, prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "assay_workloadapi_streams",
			Help: "Open streams and calls of the Workload API.",
		}, []string{"event"})),
		answers: register(to, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_workloadapi_answers_total",
			Help: "What was handed to workloads (allow), refused to them (deny) or could not be said (error).",
		}, []string{"event", "outcome"})),
		refused: register(to, prometheus.NewCounter(prometheus.CounterOpts{
			Name: "assay_workloadapi_refused_calls_total",
			Help: "Calls refused because their user had its share of streams.",
		})),
		panics: register(to, prometheus.NewCounter(prometheus.CounterOpts{
			Name: "assay_workloadapi_panics_total",
			Help: "Calls that panicked. Each is a bug.",
		})),
	}
}

// register adds a collector, or returns the one that is already there under its name. Without a
// registerer the numbers are kept and nobody sees them.
func register[C prometheus.Collector](to prometheus.Registerer, c C) C {
	if to == nil {
		return c
	}
	if again, ok := errors.AsType[prometheus.AlreadyRegisteredError](to.Register(c)); ok {
		if known, ok := again.ExistingCollector.(C); ok {
			return known
		}
	}
	return c
}

// orDiscard returns log, or one that says nothing.
func orDiscard(log logrus.FieldLogger) logrus.FieldLogger {
	if log != nil {
		return log
	}
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	return quiet
}
