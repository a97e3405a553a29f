package upstream

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi/identity"
)

// leastLife is the shortest remaining life of an authority that is worth having.
const leastLife = 10 * time.Second

// Checked is an answer that was looked at.
type Checked struct {
	// Chain is the new authority first, and what leads to Root, without it.
	Chain []*x509.Certificate
	// Root is the one that the chain leads to, and Roots are all that came with it and are of use.
	Root  *x509.Certificate
	Roots []*x509.Certificate
	// NotAfter is when the first of all these ends.
	NotAfter time.Time
}

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrRefused, fmt.Errorf(format, args...))
}

// Check looks at what an upstream authority answered to a request for the key in the trust domain. The
// error wraps ErrRefused and says in one sentence what is wrong.
func Check(s *Signed, key crypto.Signer, td spiffeid.TrustDomain, now time.Time) (*Checked, error) {
	switch {
	case s == nil || len(s.Chain) == 0:
		return nil, refuse("it contains no certificate")
	case len(s.Roots) == 0:
		return nil, refuse("it contains no root certificate")
	case len(s.Chain) > MaxChain:
		return nil, refuse("its chain has %d certificates, the limit is %d", len(s.Chain), MaxChain)
	case len(s.Roots) > MaxRoots:
		return nil, refuse("it contains %d root certificates, the limit is %d", len(s.Roots), MaxRoots)
	}
	c := &Checked{Chain: dropRoot(s.Chain)}
	if err := checkSubject(c.Chain[0], key, td); err != nil {
		return nil, err
	}
	for i, cert := range c.Chain {
		if err := checkLink(i, cert, now); err != nil {
			return nil, err
		}
		if i > 0 {
			if err := c.Chain[i-1].CheckSignatureFrom(cert); err != nil {
				return nil, refuse("certificate %d of its chain, %q, did not sign the one before it: %w", i+1, clip(cert.Subject.String()), err)
			}
		}
	}
	var useless error
	for _, root := range s.Roots {
		if err := checkRoot(root, now); err != nil {
			useless = err // one that has expired is no reason to refuse the others
			continue
		}
		c.Roots = append(c.Roots, root)
	}
	if len(c.Roots) == 0 {
		return nil, refuse("none of its root certificates is of use: %w", useless)
	}
	top := c.Chain[len(c.Chain)-1]
	for _, root := range c.Roots {
		if top.CheckSignatureFrom(root) == nil {
			c.Root = root
			break
		}
	}
	if c.Root == nil {
		return nil, refuse("its chain, which ends with %q, leads to none of its root certificates", clip(top.Subject.String()))
	}
	c.NotAfter = c.Root.NotAfter
	for _, cert := range c.Chain {
		if cert.NotAfter.Before(c.NotAfter) {
			c.NotAfter = cert.NotAfter
		}
	}
	if c.NotAfter.Sub(now) < leastLife {
		return nil, refuse("what it signed ends at %s, which is too soon to be of use", c.NotAfter.UTC().Format(time.RFC3339))
	}
	if err := c.try(key, td, now); err != nil {
		return nil, err
	}
	return c, nil
}

// dropRoot returns the chain without a root at its end, which some send along.
func dropRoot(chain []*x509.Certificate) []*x509.Certificate {
	if n := len(chain); n > 1 && string(chain[n-1].RawSubject) == string(chain[n-1].RawIssuer) && chain[n-1].CheckSignatureFrom(chain[n-1]) == nil {
		return chain[:n-1]
	}
	return chain
}

// checkSubject says whether the certificate is the one that was asked for.
func checkSubject(cert *x509.Certificate, key crypto.Signer, td spiffeid.TrustDomain) error {
	ours, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case !ok || !ours.Equal(cert.PublicKey):
		return refuse("it signed another key than the one it was asked to sign")
	case len(cert.SubjectKeyId) == 0:
		return refuse("its certificate has no subject key identifier")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return refuse("its certificate must not sign certificates, by its key usage")
	case len(cert.URIs) > 1:
		return refuse("its certificate has %d URIs, and not the trust domain's alone", len(cert.URIs))
	case len(cert.URIs) == 1 && cert.URIs[0].String() != td.IDString():
		// One without any is in order (X509-SVID 4.2), for not every PKI puts them in.
		return refuse("its certificate is of %q, and this server is of %q", clip(cert.URIs[0].String()), td.IDString())
	}
	return nil
}

// checkLink says whether a certificate may be part of a chain.
func checkLink(i int, cert *x509.Certificate, now time.Time) error {
	which := "its certificate"
	if i > 0 {
		which = fmt.Sprintf("certificate %d of its chain, %q,", i+1, clip(cert.Subject.String()))
	}
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return refuse("%s is no CA certificate", which)
	case now.After(cert.NotAfter):
		return refuse("%s has expired at %s", which, cert.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(cert.NotBefore):
		return refuse("%s is not valid before %s: compare the clocks", which, cert.NotBefore.UTC().Format(time.RFC3339))
	}
	if err := identity.CheckCertificateKey(cert); err != nil {
		return refuse("%w", err)
	}
	return nil
}

func checkRoot(root *x509.Certificate, now time.Time) error {
	if err := identity.CheckAuthority(root); err != nil {
		return err
	}
	if now.After(root.NotAfter) {
		return fmt.Errorf("root %q has expired at %s", clip(root.Subject.String()), root.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// try signs an SVID with the new authority and verifies it the way that workloads do (X509-SVID 5.2): what
// constrains the authority to be of no use shows now, and not at the workloads.
func (c *Checked) try(key crypto.Signer, td spiffeid.TrustDomain, now time.Time) error {
	subject, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	id, err := spiffeid.FromPath(td, "/spire/server")
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(now.Unix()), Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
		NotBefore: now.Add(-10 * time.Second), NotAfter: now.Add(leastLife), URIs: []*url.URL{id.URL()},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, c.Chain[0], subject.Public(), key)
	if err != nil {
		return fmt.Errorf("sign for trial: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("sign for trial: %w", err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(c.Root)
	for _, cert := range c.Chain {
		between.AddCert(cert)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
		}); err != nil {
			return refuse("nobody would accept what its certificate signs: %w", err)
		}
	}
	return nil
}

// CheckBundle looks at what an upstream authority publishes, and returns what of it is of use.
func CheckBundle(b Bundle, now time.Time) (Bundle, error) {
	if n := max(len(b.X509), len(b.JWT), len(b.WIT)); n > identity.MaxAuthorities {
		return Bundle{}, refuse("its bundle has %d authorities, the limit is %d", n, identity.MaxAuthorities)
	}
	out := Bundle{Partial: b.Partial}
	var useless error
	for _, a := range b.X509 {
		if a.Certificate == nil {
			return Bundle{}, refuse("its bundle has an authority without certificate")
		}
		if err := checkRoot(a.Certificate, now); err != nil {
			useless = err
			continue
		}
		out.X509 = append(out.X509, a)
	}
	if len(out.X509) == 0 && (!b.Partial || useless != nil) {
		if useless == nil {
			useless = errors.New("there is none")
		}
		return Bundle{}, refuse("its bundle has no X.509 authority that is of use: %w", useless)
	}
	var err error
	if out.JWT, err = checkKeys("JWT", b.JWT, now); err != nil {
		return Bundle{}, err
	}
	if out.WIT, err = checkKeys("WIT", b.WIT, now); err != nil {
		return Bundle{}, err
	}
	return out, nil
}

// checkKeys returns those that have not expired.
func checkKeys(kind string, list []identity.JWTAuthority, now time.Time) ([]identity.JWTAuthority, error) {
	var out []identity.JWTAuthority
	seen := map[string]bool{}
	for _, k := range list {
		switch {
		case k.KeyID == "" || seen[k.KeyID]:
			return nil, refuse("its bundle has two %s keys of one ID, or one without", kind)
		case !k.ExpiresAt.IsZero() && now.After(k.ExpiresAt):
			continue
		}
		if err := identity.CheckKey(k.Key); err != nil {
			return nil, refuse("its bundle has a %s key that is refused: %w", kind, err)
		}
		seen[k.KeyID] = true
		out = append(out, k)
	}
	return out, nil
}

// clip keeps a stranger's text from filling a message.
func clip(s string) string {
	if len(s) > 120 {
		return s[:120] + "…"
	}
	return s
}
