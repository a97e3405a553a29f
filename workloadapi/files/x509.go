package files

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/big"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// x509 brings certificate, key, bundle and list up to date; nil: there is no identity.
func (k *Keeper) x509(resp *workload.X509SVIDResponse) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var chosen *workload.X509SVID
	if resp != nil {
		if chosen = k.choose(resp.GetSvids()); chosen == nil {
			k.log.WithField("spiffe_ids", idsOf(resp.GetSvids())).
				Warn("none of the identities is the one that spiffe_id and hint name; for the files it is as if there were none")
		}
	}
	if chosen == nil {
		return k.withdraw()
	}
	list, leaf, err := k.x509Files(resp, chosen)
	if err != nil {
		// What is on disk is better than what makes no sense.
		return fmt.Errorf("read answer of the API: %w", err)
	}
	if id, err := spiffeid.FromString(chosen.GetSpiffeId()); err == nil {
		k.domain = id.TrustDomain().IDString()
	}
	back := k.withdrawn || !k.known
	k.withdrawn, k.known = false, true
	changed, err := k.put(list)
	k.wrote(groupX509, err)
	if err != nil {
		return err
	}
	k.expires = leaf.NotAfter
	if changed {
		k.log.WithFields(map[string]any{"spiffe_id": chosen.GetSpiffeId(), "expires_at": leaf.NotAfter.UTC().Format(time.RFC3339)}).Info("files written")
		if k.cfg.Changed != nil {
			k.cfg.Changed([]string{chosen.GetSpiffeId()})
		}
	}
	if changed || back {
		// Tokens were refused while there was no identity.
		k.poke()
	}
	k.tell.renewed(changed, k.complete())
	return nil
}

// choose returns the identity that the configuration means, or nil.
func (k *Keeper) choose(svids []*workload.X509SVID) *workload.X509SVID {
	for _, s := range svids {
		if (k.cfg.SPIFFEID == "" || s.GetSpiffeId() == k.cfg.SPIFFEID) && (k.cfg.Hint == "" || s.GetHint() == k.cfg.Hint) {
			return s
		}
	}
	return nil
}

func idsOf(svids []*workload.X509SVID) []string {
	ids := make([]string, len(svids))
	for n, s := range svids {
		ids[n] = s.GetSpiffeId()
	}
	return ids
}

// x509Files returns the files in the order in which they are to be written: what verifies others first,
// so that a new authority is known before a certificate of it is shown, and the key before its certificate.
func (k *Keeper) x509Files(resp *workload.X509SVIDResponse, s *workload.X509SVID) ([]file, *x509.Certificate, error) {
	chain, err := x509.ParseCertificates(s.GetX509Svid())
	if err != nil || len(chain) == 0 {
		return nil, nil, fmt.Errorf("certificate of %s: %w", s.GetSpiffeId(), orEmpty(err))
	}
	if err := fits(chain[0], s.GetX509SvidKey()); err != nil {
		return nil, nil, fmt.Errorf("key of %s: %w", s.GetSpiffeId(), err)
	}
	bundle, err := x509.ParseCertificates(s.GetBundle())
	if err != nil || len(bundle) == 0 {
		return nil, nil, fmt.Errorf("bundle of %s: %w", s.GetSpiffeId(), orEmpty(err))
	}
	shown, further := chain, []*x509.Certificate(nil)
	if k.cfg.IntermediatesInBundle {
		shown, further = chain[:1], chain[1:]
	}
	bundle = append(bundle, further...)
	if k.cfg.Federated {
		for _, id := range slices.Sorted(maps.Keys(resp.GetFederatedBundles())) {
			more, err := x509.ParseCertificates(resp.GetFederatedBundles()[id])
			if err != nil {
				return nil, nil, fmt.Errorf("bundle of %s: %w", id, err)
			}
			bundle = append(bundle, more...)
		}
	}
	if k.cfg.OmitExpired {
		now := k.now()
		bundle = slices.DeleteFunc(bundle, func(c *x509.Certificate) bool { return !now.Before(c.NotAfter) })
	}
	var list []file
	add := func(name string, content []byte, mode fs.FileMode) {
		if name != "" {
			list = append(list, file{name, content, mode})
		}
	}
	add(k.cfg.Bundle, certificates(bundle), k.cfg.CertMode)
	if missing := k.cfg.CRL != "" && len(resp.GetCrl()) == 0; missing != k.unlisted {
		if k.unlisted = missing; missing {
			k.log.WithField("file", k.cfg.CRL).Warn("the server gives out no lists of revoked certificates, which it does when a policy has on_fail = \"withdraw+revoke\"; " +
				"whoever reads them refuses to start without, and refuses everybody when those that are there are out of date")
		}
	}
	if k.cfg.CRL != "" && len(resp.GetCrl()) > 0 {
		crl, err := lists(resp.GetCrl())
		if err != nil {
			return nil, nil, err
		}
		add(k.cfg.CRL, crl, k.cfg.CertMode)
	}
	add(k.cfg.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: s.GetX509SvidKey()}), k.cfg.KeyMode)
	add(k.cfg.Cert, certificates(shown), k.cfg.CertMode)
	return list, chain[0], nil
}

// fits checks that the key is the certificate's: a pair that is none would stop its reader at the next
// start.
func fits(cert *x509.Certificate, pkcs8 []byte) error {
	key, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return fmt.Errorf("a %T signs nothing", key)
	}
	public, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(cert.PublicKey) {
		return errors.New("it is not the certificate's")
	}
	return nil
}

func orEmpty(err error) error {
	if err == nil {
		return errors.New("it is empty")
	}
	return err
}

func certificates(certs []*x509.Certificate) []byte {
	var out bytes.Buffer
	seen := map[string]bool{}
	for _, c := range certs {
		if !seen[string(c.Raw)] {
			seen[string(c.Raw)] = true
			_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a buffer never fails
		}
	}
	return out.Bytes()
}

// lists returns lists of revoked certificates as PEM. One element may hold several.
func lists(ders [][]byte) ([]byte, error) {
	var out bytes.Buffer
	for _, der := range ders {
		one, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, fmt.Errorf("list of revoked certificates: %w", err)
		}
		_ = pem.Encode(&out, &pem.Block{Type: "X509 CRL", Bytes: one.Raw})
	}
	return out.Bytes(), nil
}

// withdraw does to the files what is to be done when there is no identity. mu is held.
func (k *Keeper) withdraw() error {
	first := !k.withdrawn || !k.known
	k.withdrawn, k.known = true, true
	if first {
		k.poke() // tokens are fetched anew, that is, refused
	}
	if k.cfg.Withdrawn == Keep {
		if first {
			k.log.Warn("the identity is withdrawn; its files stay, as they are told to")
		}
		return nil
	}
	changed, err := k.withdrawX509()
	for _, j := range k.cfg.JWTs {
		gone, failed := k.remove(j.File)
		changed, err = changed || gone, errors.Join(err, failed)
	}
	s := k.states[groupX509]
	if s.err = err; err == nil {
		s.told = ""
	}
	k.states[groupX509] = s
	if changed {
		k.log.WithField("how", k.cfg.Withdrawn).Warn("the identity is withdrawn, and with it its files")
		if k.cfg.Changed != nil {
			k.cfg.Changed(nil)
		}
		k.tell.withdrawn()
	}
	return err
}

// withdrawX509 replaces or removes certificate and key if they are there, of this run or of one before.
func (k *Keeper) withdrawX509() (changed bool, err error) {
	if k.cfg.Withdrawn == Remove {
		return k.remove(k.cfg.Cert, k.cfg.Key)
	}
	if !k.there(k.cfg.Cert, k.cfg.Key) || k.isReplaced() {
		return false, nil
	}
	cert, key, err := nobody()
	if err != nil {
		return false, err
	}
	var list []file
	if k.cfg.Key != "" {
		list = append(list, file{k.cfg.Key, key, k.cfg.KeyMode})
	}
	if k.cfg.Cert != "" {
		list = append(list, file{k.cfg.Cert, cert, k.cfg.CertMode})
	}
	return k.put(list)
}

// nobodyName is the subject of what takes the place of a withdrawn certificate.
const nobodyName = "identity withdrawn"

// isReplaced reports whether a run before has replaced the certificate already.
func (k *Keeper) isReplaced() bool {
	if k.cfg.Cert == "" {
		return false
	}
	cert, ok := k.onDisk(k.cfg.Cert)
	return ok && cert.Subject.CommonName == nobodyName && cert.Issuer.CommonName == nobodyName
}

// nobody returns a pair that expired long ago, names nobody and is signed by nobody but itself.
func nobody() (cert, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	from := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: nobodyName},
		NotBefore: from, NotAfter: from.Add(time.Second), KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
}
