// Package workloadapitest holds what tests of the Workload API share: Run, the suite that every
// server of the Workload API passes, and Source, a small correct stand-in for what issues SVIDs.
package workloadapitest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Authority is a trust domain's signing keys.
type Authority struct {
	TrustDomain spiffeid.TrustDomain
	Certificate *x509.Certificate
	KeyID       string
	key         *ecdsa.PrivateKey
}

// NewAuthority makes keys for a trust domain.
func NewAuthority(t testing.TB, td spiffeid.TrustDomain) *Authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: td.Name()},
		URIs:      []*url.URL{td.ID().URL()},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &Authority{TrustDomain: td, Certificate: cert, KeyID: rand.Text(), key: key}
}

// Bundle returns the trust domain's bundle.
func (a *Authority) Bundle() *identity.Bundle {
	return &identity.Bundle{
		TrustDomain: a.TrustDomain,
		X509:        []identity.X509Authority{{Certificate: a.Certificate}},
		JWT:         []identity.JWTAuthority{{KeyID: a.KeyID, Key: a.key.Public()}},
		Sequence:    1,
	}
}

// X509 signs a new X509-SVID with a new key.
func (a *Authority) X509(e *identity.Entry) (*identity.X509SVID, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{Organization: []string{"test"}},
		URIs:      []*url.URL{e.SPIFFEID.URL()},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.Certificate, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return &identity.X509SVID{
		EntryID: e.ID, ID: e.SPIFFEID, Chain: [][]byte{der}, Key: crypto.Signer(key), KeyDER: keyDER,
		NotBefore: template.NotBefore, NotAfter: template.NotAfter, Hint: e.Hint,
	}, nil
}

// Revoke returns a list of revoked certificates with this one on it, in DER.
func (a *Authority) Revoke(t testing.TB, cert *x509.Certificate) []byte {
	t.Helper()
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: cert.SerialNumber, RevocationTime: time.Now().Add(-time.Minute)}},
	}, a.Certificate, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// JWT signs any claims.
func (a *Authority) JWT(claims map[string]any) (string, error) { return a.token("JWT", claims) }

func (a *Authority) token(kind string, claims map[string]any) (string, error) {
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.key, KeyID: a.KeyID}},
		(&jose.SignerOptions{}).WithType(jose.ContentType(kind)))
	if err != nil {
		return "", err
	}
	return jwt.Signed(signer).Claims(claims).Serialize()
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // never fails
	}
	return n
}

// Source issues SVIDs for the entries it was given, and says so when anything changes. It
// implements what workloadapi asks for. It is safe for concurrent use.
type Source struct {
	Authority *Authority

	mu        sync.Mutex // guards the rest
	entries   []*identity.Entry
	federated map[spiffeid.TrustDomain]*identity.Bundle
	svids     map[string]*identity.X509SVID
	rev       uint64
	changed   chan struct{}
	err       error
	made      int
}

// NewSource returns a Source without entries.
func NewSource(t testing.TB, td spiffeid.TrustDomain) *Source {
	t.Helper()
	return &Source{
		Authority: NewAuthority(t, td), federated: map[spiffeid.TrustDomain]*identity.Bundle{},
		svids: map[string]*identity.X509SVID{}, changed: make(chan struct{}),
	}
}

// Put adds an entry, or replaces the one with its ID.
func (s *Source) Put(e *identity.Entry) {
	s.update(func() {
		s.drop(e.ID)
		s.entries = append(s.entries, e)
		slices.SortFunc(s.entries, identity.Older)
	})
}

// Delete removes an entry.
func (s *Source) Delete(id string) { s.update(func() { s.drop(id) }) }

func (s *Source) drop(id string) {
	s.entries = slices.DeleteFunc(s.entries, func(e *identity.Entry) bool { return e.ID == id })
	delete(s.svids, id)
}

// Federate makes a bundle known.
func (s *Source) Federate(b *identity.Bundle) {
	s.update(func() { s.federated[b.TrustDomain] = b })
}

// Rotate replaces all X509-SVIDs by new ones.
func (s *Source) Rotate() { s.update(func() { clear(s.svids) }) }

// Touch wakes everybody although nothing has changed.
func (s *Source) Touch() { s.update(func() {}) }

// Fail makes every call for SVIDs fail, until it is called with nil.
func (s *Source) Fail(err error) { s.update(func() { s.err = err }) }

// Quietly is Fail without waking anybody.
func (s *Source) Quietly(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// Made returns how often X509 was answered.
func (s *Source) Made() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.made
}

func (s *Source) update(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	s.rev++
	close(s.changed)
	s.changed = make(chan struct{})
}

// match returns the entries that facts match, one per hint. mu is held.
func (s *Source) match(facts attestor.Set) []*identity.Entry {
	var found []*identity.Entry
	hints := map[string]bool{}
	for _, e := range s.entries {
		if e.Selectors.Len() == 0 || !e.Selectors.In(facts) || e.Hint != "" && hints[e.Hint] {
			continue
		}
		hints[e.Hint] = true
		found = append(found, e)
	}
	return found
}

// X509 implements workloadapi.Source.
func (s *Source) X509(_ context.Context, facts attestor.Set) (identity.X509Context, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.made++
	out := identity.X509Context{Bundle: s.Authority.Bundle(), Rev: s.rev}
	found := s.match(facts)
	if s.err != nil && len(found) > 0 {
		return identity.X509Context{}, nil, s.err
	}
	for _, e := range found {
		svid := s.svids[e.ID]
		if svid == nil {
			var err error
			if svid, err = s.Authority.X509(e); err != nil {
				return identity.X509Context{}, nil, err
			}
			s.svids[e.ID] = svid
		}
		out.SVIDs = append(out.SVIDs, svid)
	}
	out.Federated = s.bundlesOf(found)
	return out, s.changed, nil
}

// bundlesOf returns the bundles that the entries federate with. mu is held.
func (s *Source) bundlesOf(entries []*identity.Entry) []*identity.Bundle {
	var out []*identity.Bundle
	for _, e := range entries {
		for _, td := range e.FederatesWith {
			if b := s.federated[td]; b != nil && !slices.Contains(out, b) {
				out = append(out, b)
			}
		}
	}
	return out
}

// Bundles implements workloadapi.Source.
func (s *Source) Bundles(facts attestor.Set) (identity.BundleSet, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := s.match(facts)
	return identity.BundleSet{
		Own: s.Authority.Bundle(), Federated: s.bundlesOf(found), Matched: len(found), Rev: s.rev,
	}, s.changed
}

// JWT implements workloadapi.Source.
func (s *Source) JWT(_ context.Context, facts attestor.Set, audience []string, id spiffeid.ID) ([]*identity.JWTSVID, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*identity.JWTSVID
	now := time.Now()
	for _, e := range s.match(facts) {
		if !id.IsZero() && e.SPIFFEID != id {
			continue
		}
		if s.err != nil {
			return nil, nil, s.err
		}
		svid := &identity.JWTSVID{EntryID: e.ID, ID: e.SPIFFEID, Hint: e.Hint, IssuedAt: now, ExpiresAt: now.Add(5 * time.Minute)}
		var err error
		svid.Token, err = s.Authority.JWT(map[string]any{
			"sub": e.SPIFFEID.String(), "aud": audience, "iat": now.Unix(), "exp": svid.ExpiresAt.Unix(),
		})
		if err != nil {
			return nil, nil, fmt.Errorf("sign token: %w", err)
		}
		out = append(out, svid)
	}
	return out, s.changed, nil
}

// WIT implements workloadapi.Source, with keys that JWT-SVIDs are verified with too.
func (s *Source) WIT(_ context.Context, facts attestor.Set, id spiffeid.ID) ([]*identity.WITSVID, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.changed, s.err
	}
	var out []*identity.WITSVID
	now := time.Now()
	for _, e := range s.match(facts) {
		if !id.IsZero() && e.SPIFFEID != id {
			continue
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, fmt.Errorf("make key: %w", err)
		}
		svid := &identity.WITSVID{Key: key, JWTSVID: identity.JWTSVID{EntryID: e.ID, ID: e.SPIFFEID, Hint: e.Hint, IssuedAt: now, ExpiresAt: now.Add(time.Hour)}}
		svid.Token, err = s.Authority.token("wit+jwt", map[string]any{
			"sub": e.SPIFFEID.String(), "iat": now.Unix(), "exp": svid.ExpiresAt.Unix(),
			"cnf": map[string]any{"jwk": jose.JSONWebKey{Key: key.Public(), Algorithm: "ES256"}},
		})
		if err != nil {
			return nil, nil, fmt.Errorf("sign token: %w", err)
		}
		out = append(out, svid)
	}
	return out, s.changed, nil
}
