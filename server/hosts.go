package server

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/measures"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

// hosts is what programs may ask of the server that it runs. Key managers and the authority above are opened
// before there is an authority: until settle there is no identity.
type hosts struct {
	td       spiffeid.TrustDomain
	now      func() time.Time
	measures *measures.Measures

	mu        sync.Mutex // guards the rest; held while an identity is made
	authority *ca.CA
	pictures  *view.View
	key       crypto.Signer
	chain     []*x509.Certificate
}

func newHosts(cfg *Config) (*hosts, error) {
	m, err := measures.New(cfg.Metrics)
	if err != nil {
		return nil, err
	}
	return &hosts{td: cfg.TrustDomain, now: cfg.Now, measures: m}, nil
}

// settle says that there is an authority by now.
func (h *hosts) settle(authority *ca.CA, pictures *view.View) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.authority, h.pictures = authority, pictures
}

// identity gives out an SVID with the server's name and a key of its own: that of the listener stays here.
func (h *hosts) identity(ctx context.Context) (*attestor.ServerIdentity, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.authority == nil {
		return nil, attestor.ErrNoIdentity
	}
	bundle, ok := h.pictures.Bundle(h.td)
	if !ok {
		return nil, attestor.ErrNoIdentity
	}
	if !h.fresh(bundle) {
		key, err := keys.Generate(keys.EC256)
		if err != nil {
			return nil, fmt.Errorf("make an identity for plugins: %w", err)
		}
		chain, err := h.authority.SignServer(ctx, key.Public())
		if err != nil {
			return nil, fmt.Errorf("make an identity for plugins: %w", err)
		}
		h.key, h.chain = key, chain
	}
	given := &attestor.ServerIdentity{Chain: h.chain, Key: h.key, RefreshHint: bundle.RefreshHint, Sequence: bundle.Sequence}
	for _, a := range bundle.X509 {
		given.X509 = append(given.X509, attestor.ServerAuthority{DER: a.Certificate.Raw, Tainted: a.Tainted})
	}
	var err error
	if given.JWT, err = serverKeys(bundle.JWT); err == nil {
		given.WIT, err = serverKeys(bundle.WIT)
	}
	if err != nil {
		return nil, err
	}
	return given, nil
}

// fresh reports whether the identity that was given out last is good for another while. mu is held.
func (h *hosts) fresh(b *identity.Bundle) bool {
	if len(h.chain) == 0 {
		return false
	}
	leaf, top, now := h.chain[0], h.chain[len(h.chain)-1], h.now()
	if now.Before(leaf.NotBefore) || now.After(leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore)/2)) {
		return false
	}
	for _, a := range b.X509 {
		if top.CheckSignatureFrom(a.Certificate) == nil {
			return !a.Tainted
		}
	}
	return false // nobody believes it any more
}

func serverKeys(of []identity.JWTAuthority) (all []attestor.ServerKey, err error) {
	for _, k := range of {
		pkix, err := x509.MarshalPKIXPublicKey(k.Key)
		if err != nil {
			return nil, fmt.Errorf("encode key %s: %w", k.KeyID, err)
		}
		all = append(all, attestor.ServerKey{ID: k.KeyID, PKIX: pkix, ExpiresAt: k.ExpiresAt, Tainted: k.Tainted})
	}
	return all, nil
}
