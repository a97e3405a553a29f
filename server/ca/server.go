package ca

import (
	"context"
	"crypto/tls"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/assay-id/assay/server/ca/keys"
)

// serverSVID is the server's own X509-SVID. Its key never leaves memory and is never used twice:
// every renewal makes another one.
type serverSVID struct {
	now atomic.Pointer[servedCertificate]
	mu  sync.Mutex // held while renewing
}

type servedCertificate struct {
	certificate *tls.Certificate
	renewAt     time.Time // half-life
}

// fresh is false also where the clock was set back to before the certificate.
func (s *servedCertificate) fresh(now time.Time) bool {
	return s != nil && now.Before(s.renewAt) && !now.Before(s.certificate.Leaf.NotBefore)
}

// ServerCertificate returns what tls.Config.GetCertificate wants: the server's own X509-SVID,
// renewed at half-life by Run. A handshake that comes upon one past its half-life renews it, and is
// given the held one where that fails while it is still valid.
func (c *CA) ServerCertificate() func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		held, err := c.server.get(c)
		if err == nil {
			return held, nil
		}
		if s := c.server.now.Load(); s != nil && c.cfg.Now().Before(s.certificate.Leaf.NotAfter) {
			return s.certificate, nil // Run says in the log what is wrong
		}
		return nil, err
	}
}

// get returns the held certificate, or a new one if it is time.
func (s *serverSVID) get(c *CA) (*tls.Certificate, error) {
	if held := s.now.Load(); held.fresh(c.cfg.Now()) {
		return held.certificate, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if held := s.now.Load(); held.fresh(c.cfg.Now()) {
		return held.certificate, nil
	}
	return s.make(c)
}

// renew makes a new certificate, however fresh the held one is.
func (s *serverSVID) renew(c *CA) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.make(c)
}

// make makes a new certificate and holds it. mu is held.
func (s *serverSVID) make(c *CA) (*tls.Certificate, error) {
	key, err := keys.Generate(keys.EC256)
	if err != nil {
		return nil, fmt.Errorf("renew the server's SVID: %w", err)
	}
	now := c.cfg.Now()
	chain, err := c.SignServer(context.Background(), key.Public())
	if err != nil {
		return nil, fmt.Errorf("renew the server's SVID: %w", err)
	}
	made := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, cert := range chain {
		made.Certificate = append(made.Certificate, cert.Raw)
	}
	s.now.Store(&servedCertificate{certificate: made, renewAt: now.Add(chain[0].NotAfter.Sub(now) / 2)})
	return made, nil
}
