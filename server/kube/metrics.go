package kube

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are what is counted of one cluster.
type metrics struct {
	writes  *prometheus.CounterVec
	trouble *prometheus.CounterVec
	rounds  prometheus.Observer
	rules   prometheus.Gauge
	sight   prometheus.Gauge
}

func newMetrics(r prometheus.Registerer, cluster string) (*metrics, error) {
	writes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "assay_server_kube_entries_total", Help: "Entries written for Kubernetes resources, by what became of them.",
	}, []string{"cluster", "result"})
	trouble := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "assay_server_kube_watch_errors_total", Help: "Watches of Kubernetes resources that failed and were begun anew.",
	}, []string{"cluster", "resource"})
	rounds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "assay_server_kube_reconcile_seconds", Help: "Time from taking up a batch of changes to having its entries written.",
		Buckets: prometheus.ExponentialBuckets(0.001, 2, 12),
	}, []string{"cluster"})
	rules := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "assay_server_kube_rules", Help: "ClusterSPIFFEID resources of this registrar.",
	}, []string{"cluster"})
	sight := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "assay_server_kube_in_sight",
		Help: "1 while this registrar has the lease of the cluster and sees it. Of several servers one has; if none has, nobody keeps the entries.",
	}, []string{"cluster"})
	for _, c := range []prometheus.Collector{writes, trouble, rounds, rules, sight} {
		// Registrars of several clusters share one set.
		var there prometheus.AlreadyRegisteredError
		if err := r.Register(c); errors.As(err, &there) {
			switch c {
			case prometheus.Collector(writes):
				writes = there.ExistingCollector.(*prometheus.CounterVec)
			case prometheus.Collector(trouble):
				trouble = there.ExistingCollector.(*prometheus.CounterVec)
			case prometheus.Collector(rounds):
				rounds = there.ExistingCollector.(*prometheus.HistogramVec)
			case prometheus.Collector(sight):
				sight = there.ExistingCollector.(*prometheus.GaugeVec)
			default:
				rules = there.ExistingCollector.(*prometheus.GaugeVec)
			}
		} else if err != nil {
			return nil, err
		}
	}
	label := prometheus.Labels{"cluster": cluster}
	for _, result := range []string{"created", "updated", "deleted", "masked", "failed"} {
		writes.MustCurryWith(label).WithLabelValues(result) // alerts are about increases, and there is none from nothing to one
	}
	return &metrics{
		writes: writes.MustCurryWith(label), trouble: trouble.MustCurryWith(label),
		rounds: rounds.With(label), rules: rules.With(label), sight: sight.With(label),
	}, nil
}
