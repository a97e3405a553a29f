package agent

import (
	"crypto/tls"

	"github.com/assay-id/assay/agent/broker"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// openBroker makes what serves brokers, if any may call.
func (a *agent) openBroker() {
	b := a.cfg.Broker
	if b.SocketPath == "" && b.Address == "" {
		return
	}
	a.broker = broker.New(broker.Config{
		SocketPath: b.SocketPath, Address: b.Address, Grants: b.Grants,
		Attest: a.serve,
		Pods:   a.cfg.pods(),
		Source: a.issue.Delegated(),
		Bundles: func() ([]*identity.Bundle, <-chan struct{}) {
			picture, changed := a.view.Follow()
			return picture.BundleList(), changed
		},
		Own: func() (*tls.Certificate, error) {
			own, _ := a.join.Own()
			if own == nil {
				return nil, errNoSVID
			}
			cert := &tls.Certificate{PrivateKey: own.Key, Leaf: own.Chain[0]}
			for _, link := range own.Chain {
				cert.Certificate = append(cert.Certificate, link.Raw)
			}
			return cert, nil
		},
		Audit: a.cfg.Audit, Log: a.cfg.Log.WithField("component", "broker"), Metrics: a.cfg.Metrics, Now: a.cfg.Now,
	})
}

// pods is the attestor that knows the pods of this node, nil if there is none.
func (c Config) pods() attestor.Pods {
	for _, w := range c.WorkloadAttestors {
		if pods, ok := w.Workload.(attestor.Pods); ok {
			return pods
		}
	}
	return nil
}
