package issue

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// KeyType is a kind of workload key, by SPIRE's names.
type KeyType string

// The kinds of workload key there are.
const (
	KeyEC256   KeyType = "ec-p256"
	KeyEC384   KeyType = "ec-p384"
	KeyRSA2048 KeyType = "rsa-2048"
)

// pool makes keys ahead, so that who waits for an SVID does not wait for a key. An RSA key takes a
// hundred times as long as one on a curve, so there are fewer.
type pool struct {
	make  func() (crypto.Signer, error)
	ready chan crypto.Signer
}

func newPool(kind KeyType) (*pool, error) {
	switch kind {
	case KeyEC256:
		return &pool{make: ec(elliptic.P256()), ready: make(chan crypto.Signer, 64)}, nil
	case KeyEC384:
		return &pool{make: ec(elliptic.P384()), ready: make(chan crypto.Signer, 32)}, nil
	case KeyRSA2048:
		return &pool{
			make:  func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) },
			ready: make(chan crypto.Signer, 8),
		}, nil
	}
	return nil, fmt.Errorf("workload key type %q is unknown", kind)
}

func ec(curve elliptic.Curve) func() (crypto.Signer, error) {
	return func() (crypto.Signer, error) { return ecdsa.GenerateKey(curve, rand.Reader) }
}

// run keeps the pool full until ctx ends.
func (p *pool) run(ctx context.Context) {
	for {
		key, err := p.make()
		if err != nil {
			return // take makes them, and has somebody to tell
		}
		select {
		case p.ready <- key:
		case <-ctx.Done():
			return
		}
	}
}

// take returns a key that nobody else has.
func (p *pool) take() (crypto.Signer, error) {
	select {
	case key := <-p.ready:
		return key, nil
	default:
		return p.make()
	}
}

type metrics struct {
	signed   *prometheus.CounterVec
	latency  *prometheus.HistogramVec
	held     *prometheus.GaugeVec
	missing  prometheus.Gauge
	subjects prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		signed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_agent_svids_total", Help: "Requests to sign a workload's SVID, by kind (x509, jwt) and result (ok, failed).",
		}, []string{"kind", "result"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "assay_agent_sign_seconds", Help: "How long the server took to sign, a batch counted once.",
			Buckets: []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30},
		}, []string{"kind"}),
		held: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "assay_agent_svids_held", Help: "SVIDs of workloads that are held, by kind.",
		}, []string{"kind"}),
		missing: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "assay_agent_svids_missing",
			Help: "X509-SVIDs that workloads want at the moment and do not have: the last one expired, or the server signs none.",
		}),
		subjects: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "assay_agent_subjects", Help: "Sets of facts that workloads are known by.",
		}),
	}
	// Alerts are about increases, and there is none from nothing to one.
	for _, kind := range []string{"x509", "jwt"} {
		m.signed.WithLabelValues(kind, "ok")
		m.signed.WithLabelValues(kind, "failed")
	}
	for _, c := range []prometheus.Collector{m.signed, m.latency, m.held, m.missing, m.subjects} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) count(kind string, err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	m.signed.WithLabelValues(kind, result).Inc()
}
