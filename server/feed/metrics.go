package feed

import (
	"cmp"
	"maps"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

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
	gauge := func(name, help string, value func([]StreamStatus) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			return value(s.Status())
		})
	}
	reg.MustRegister(m.pictures, m.bytes, m.ended, m.acked,
		laggards{s, prometheus.NewDesc("assay_server_feed_lag_revisions",
			"Revisions that an agent has yet to put in force, of the 100 agents furthest behind. An agent that is not behind has no series.",
			[]string{"agent_id"}, nil)},
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

// maxLaggards keeps series few: all agents of a large fleet are behind for a moment at each change of the
// bundle.
const maxLaggards = 100

// laggards has a series for each agent that is behind, and none for the others: one for each agent would be
// as many as there are nodes, and nearly all of them 0.
type laggards struct {
	server *Server
	desc   *prometheus.Desc
}

// Describe implements prometheus.Collector.
func (l laggards) Describe(to chan<- *prometheus.Desc) { to <- l.desc }

// Collect implements prometheus.Collector.
func (l laggards) Collect(to chan<- prometheus.Metric) {
	lag := map[string]uint64{} // an agent may have several streams
	for _, st := range l.server.Status() {
		if behind := st.Lag(); behind > 0 {
			lag[st.Agent.String()] = max(lag[st.Agent.String()], behind)
		}
	}
	agents := slices.SortedFunc(maps.Keys(lag), func(a, b string) int { return cmp.Or(cmp.Compare(lag[b], lag[a]), cmp.Compare(a, b)) })
	for _, id := range agents[:min(len(agents), maxLaggards)] {
		to <- prometheus.MustNewConstMetric(l.desc, prometheus.GaugeValue, float64(lag[id]), id)
	}
}
