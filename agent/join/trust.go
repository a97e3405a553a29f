package join

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/workloadapi/identity"
)

// againAfter is Bootstrap.Again where it is not given.
const againAfter = 10 * time.Minute

// trust decides whether the other end is the server.
type trust struct {
	td       spiffeid.TrustDomain
	again    time.Duration // negative: never
	serverID spiffeid.ID
	now      func() time.Time
	log      logrus.FieldLogger
	// unknown is told when the server has become unknown to the bundle held.
	unknown func()
	// keyGone is told when the key of an SVID turns out to be lost.
	keyGone func(*keep.Own, error)

	// mu guards what follows.
	mu sync.Mutex
	// held is the own trust domain's bundle as the server last told it; nil before the first time.
	held *identity.Bundle
	// boot are the bootstrap's authorities, while they are believed.
	boot []*x509.Certificate
	// told says that the log has it that they are needed.
	told bool
	// insecure says that anybody with the server's ID is believed; only without a bundle.
	insecure bool
	// unknownSince is when the held bundle first failed to verify the server; zero: it does not.
	unknownSince time.Time
}

func newTrust(td spiffeid.TrustDomain, again time.Duration, now func() time.Time, log logrus.FieldLogger) (*trust, error) {
	id, err := spiffeid.FromPath(td, "/spire/server")
	if err != nil {
		return nil, fmt.Errorf("make server ID: %w", err)
	}
	if again == 0 {
		again = againAfter
	}
	return &trust{td: td, again: again, serverID: id, now: now, log: log, unknown: func() {}}, nil
}

// set replaces the held bundle, and ends all belief in the bootstrap. It reports whether the bundle
// differs from the one held.
func (t *trust) set(b *identity.Bundle) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	same := t.held != nil && t.held.Sequence == b.Sequence && len(t.held.X509) == len(b.X509) && len(t.held.JWT) == len(b.JWT)
	for i := 0; same && i < len(b.X509); i++ {
		same = t.held.X509[i].Tainted == b.X509[i].Tainted && t.held.X509[i].Certificate.Equal(b.X509[i].Certificate)
	}
	t.held, t.boot, t.told, t.insecure, t.unknownSince = b, nil, false, false, time.Time{}
	return !same
}

func (t *trust) bundle() *identity.Bundle {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.held
}

// need says whether the bootstrap source is to be read: there is no bundle, all of its authorities
// have expired (certain), or the server has been unknown to it for long. The operator may have forbidden
// to read it but for the first time.
func (t *trust) need() (need, certain bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.held == nil {
		return true, true
	}
	if t.again < 0 {
		return false, false
	}
	now := t.now()
	alive := false
	for _, a := range t.held.X509 {
		alive = alive || now.Before(a.Certificate.NotAfter)
	}
	if !alive {
		return true, true
	}
	return !t.unknownSince.IsZero() && now.Sub(t.unknownSince) >= t.again, false
}

// believe adds the bootstrap's authorities, or with insecure anybody who has the server's ID.
func (t *trust) believe(authorities []*x509.Certificate, insecure bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.boot, t.insecure = authorities, insecure
}

// verify is called for each handshake, whether it resumes a session or not.
func (t *trust) verify(cs tls.ConnectionState) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(cs.PeerCertificates) == 0 {
		return errors.New("verify server: no certificate")
	}
	var failed error
	if t.held != nil {
		err := t.verifyWith(cs.PeerCertificates, t.held.X509Bundle())
		if err == nil {
			t.unknownSince = time.Time{}
			return nil
		}
		failed = err
		if t.unknownSince.IsZero() {
			t.unknownSince = t.now()
			t.unknown()
		}
	}
	if len(t.boot) > 0 {
		err := t.verifyWith(cs.PeerCertificates, x509bundle.FromX509Authorities(t.td, t.boot))
		if err == nil {
			if t.held != nil && !t.told {
				t.told = true
				t.log.Warn("server is unknown to the held bundle but known to the bootstrap bundle; trusting it")
			}
			return nil
		}
		failed = err
	}
	if t.insecure {
		id, err := x509svid.IDFromCert(cs.PeerCertificates[0])
		switch {
		case err != nil:
			failed = err
		case id != t.serverID:
			failed = fmt.Errorf("it is %q, not %q", id, t.serverID)
		default:
			return nil
		}
	}
	if failed == nil {
		failed = errors.New("no bundle to verify it with")
	}
	if _, unknown := errors.AsType[x509.UnknownAuthorityError](failed); unknown {
		failed = fmt.Errorf("%w: it is another server, or the bundle that this agent knows it by is too old (\"assay-server bundle show\" prints the one of now)", failed)
	}
	return fmt.Errorf("verify server: %w", failed)
}

func (t *trust) verifyWith(certs []*x509.Certificate, source x509bundle.Source) error {
	id, _, err := x509svid.Verify(certs, source, x509svid.WithTime(t.now()))
	if err != nil {
		return err
	}
	if id != t.serverID {
		return fmt.Errorf("it is %q, not %q", id, t.serverID)
	}
	return nil
}

// tls returns the configuration to dial the server with, showing own if it is not nil. The server
// has no DNS name in its certificate: who it is, verify says by its SPIFFE ID alone.
func (t *trust) tls(own *keep.Own) *tls.Config {
	cfg := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		NextProtos:         []string{"h2"},
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection verifies by SPIFFE ID
		VerifyConnection:   t.verify,
	}
	if own != nil {
		cert := tls.Certificate{PrivateKey: watched{own.Key, func(err error) { t.keyGone(own, err) }}, Leaf: own.Chain[0]}
		for _, c := range own.Chain {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	}
	return cfg
}

// watched is a key that may be in a program of its own, which may lose it. Only a handshake notices.
type watched struct {
	crypto.Signer
	gone func(error)
}

// Sign signs.
func (w watched) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := w.Signer.Sign(random, digest, opts)
	if errors.Is(err, keep.ErrKeyGone) {
		w.gone(err)
	}
	return signature, err
}

func tlsForRoots(roots *x509.CertPool) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}
}

// tainted reports whether an authority signed the SVID that the bundle says is not to be relied on.
func tainted(own *keep.Own, b *identity.Bundle) bool {
	top := own.Chain[len(own.Chain)-1]
	return slices.ContainsFunc(b.X509, func(a identity.X509Authority) bool { return a.Tainted && signedBy(top, a) })
}

// signed reports whether one of the bundle's authorities signed the SVID.
func signed(own *keep.Own, b *identity.Bundle) bool {
	top := own.Chain[len(own.Chain)-1]
	return slices.ContainsFunc(b.X509, func(a identity.X509Authority) bool { return signedBy(top, a) })
}

// signedBy reports whether the certificate was signed by the authority.
func signedBy(cert *x509.Certificate, a identity.X509Authority) bool {
	return cert.CheckSignatureFrom(a.Certificate) == nil
}
