package feed

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	pictures *prometheus.CounterVec
	bytes    prometheus.Counter
	ended    *prometheus.CounterVec
	acked    prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer, s *Server) *metrics {
	m := &metrics{
		pictures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_feed_pictures_total",
			Help: "Pictures sent to agents, by kind: full or delta.",
		}, []string{"kind"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "assay_server_feed_bytes_total",
			Help: "Bytes of pictures sent to agents, before transport.",
		}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_feed_streams_ended_total",
			Help: "Agent streams that have ended, by gRPC code.",
		}, []string{"code"}),
		acked: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "assay_server_feed_ack_seconds",
			Help:    "Time from the moment a picture was made to the agent's word that it is in force.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 16),
		}),
	}
	// Per agent the lag is in Status: one series per agent would be as many as there are nodes.
	gauge := func(name, help string, value func([]StreamStatus) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			return value(s.Status())
		})
	}
	reg.MustRegister(m.pictures, m.bytes, m.ended, m.acked,
		gauge("assay_server_feed_streams", "Agent streams that are open.",
			func(all []StreamStatus) float64 { return float64(len(all)) }),
		gauge("assay_server_feed_lag_revisions_max", "Revisions that the agent furthest behind has yet to put in force.",
			func(all []StreamStatus) float64 {
				var most uint64
				for _, st := range all {
					most = max(most, st.Lag())
				}
				return float64(most)
			}),
		gauge("assay_server_feed_lagging_streams", "Agent streams that have a picture yet to put in force.",
			func(all []StreamStatus) float64 {
				lagging := 0
				for _, st := range all {
					if st.Lag() > 0 {
						lagging++
					}
				}
				return float64(lagging)
			}),
	)
	return m
}
