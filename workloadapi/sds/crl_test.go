package sds

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi/identity"
)

// lister is an authority with its list.
type lister struct {
	cert *x509.Certificate
	list []byte
}

func newLister(t *testing.T, name string, until time.Time, revoked ...int64) lister {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: until.Add(-48 * time.Hour), NotAfter: until,
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
	var entries []x509.RevocationListEntry
	for _, serial := range revoked {
		entries = append(entries, x509.RevocationListEntry{SerialNumber: big.NewInt(serial), RevocationTime: time.Now()})
	}
	list, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour), RevokedCertificateEntries: entries,
	}, cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return lister{cert, list}
}

func TestListsOfRevokedCertificates(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	later := time.Now().Add(time.Hour)
	one, two, gone := newLister(t, "one", later, 7), newLister(t, "two", later), newLister(t, "gone", time.Now().Add(-time.Hour))
	lists := func(all ...lister) (ders [][]byte) {
		for _, l := range all {
			ders = append(ders, l.list)
		}
		return ders
	}
	bundle := func(crls [][]byte, nested bool, all ...lister) *identity.Bundle {
		b := &identity.Bundle{TrustDomain: td, CRLs: crls, Nested: nested}
		for _, l := range all {
			b.X509 = append(b.X509, identity.X509Authority{Certificate: l.cert})
		}
		return b
	}
	for _, c := range []struct {
		name   string
		bundle *identity.Bundle
		how    string
		lists  int  // how many are given
		plain  int  // how many besides with plain authorities
		leaf   bool // only of whoever signed the certificate itself
	}{
		{"there are none", bundle(nil, false, one), CRLAlways, 0, 0, false},
		{"nothing is revoked", bundle(lists(two), false, two), CRLAlways, 0, 0, false},
		{"one authority", bundle(lists(one), false, one), CRLAuto, 1, 0, false},
		{"two authorities", bundle(lists(one, two), false, one, two), "", 2, 0, false},
		{"and one that expired", bundle(lists(one), false, one, gone), CRLAuto, 1, 0, false},
		{"one authority has none", bundle(lists(one), false, one, two), CRLAuto, 0, 0, false},
		{"one authority has none, and that is known", bundle(lists(one), false, one, two), CRLAlways, 0, 1, true},
		{"an authority above has none", bundle(lists(two, one), false, gone, newLister(t, "above", later)), CRLAuto, 0, 0, false},
		{"an authority above has none, and that is known", bundle(lists(two, one), false, gone, newLister(t, "above", later)), CRLAlways, 0, 2, true},
		{"servers below have none", bundle(lists(one), true, one), CRLAuto, 0, 0, false},
		{"servers below have none, and that is known", bundle(lists(one), true, one), CRLAlways, 1, 0, true},
		{"they are not wanted", bundle(lists(one), false, one), CRLNever, 0, 0, false},
		{"one is no list", bundle([][]byte{one.list, []byte("list")}, false, one), CRLAlways, 0, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, err := new(reader).newMaterial(identity.X509Context{Bundle: c.bundle})
			if err != nil {
				t.Fatal(err)
			}
			cfg := &Config{DefaultBundleName: DefaultBundleName, DefaultAllBundlesName: DefaultAllBundlesName, CRL: c.how}
			context := func(name string, plain bool) *tlsv3.CertificateValidationContext {
				t.Helper()
				r, err := m.(*material).find(cfg, name, plain)
				if err != nil {
					t.Fatal(err)
				}
				var secret tlsv3.Secret
				if err := r.body.UnmarshalTo(&secret); err != nil {
					t.Fatal(err)
				}
				return secret.GetValidationContext()
			}
			plain := context("ROOTCA", true)
			if got := blocks(t, plain.GetCrl().GetInlineBytes()); got != strings.Repeat("X509 CRL,", c.lists+c.plain) {
				t.Errorf("plain: the lists are %q", got)
			}
			if plain.GetOnlyVerifyLeafCertCrl() != c.leaf || (plain.GetCrl() == nil) != (c.lists+c.plain == 0) {
				t.Errorf("plain: of leaves only %v, lists %v", plain.GetOnlyVerifyLeafCertCrl(), plain.GetCrl())
			}
			authorities := strings.Repeat("CERTIFICATE,", len(c.bundle.X509))
			if got := blocks(t, plain.GetTrustedCa().GetInlineBytes()); got != authorities {
				t.Errorf("plain: the authorities are %q", got)
			}
			for _, name := range []string{"ROOTCA", "ALL"} {
				var config tlsv3.SPIFFECertValidatorConfig
				if err := context(name, false).GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(&config); err != nil {
					t.Fatal(err)
				}
				if got := blocks(t, config.GetTrustDomains()[0].GetTrustBundle().GetInlineBytes()); got != authorities+strings.Repeat("X509 CRL,", c.lists) {
					t.Errorf("%s: the SPIFFE validator is given %q", name, got)
				}
			}
		})
	}
}

// blocks are the types of PEM blocks.
func blocks(t *testing.T, text []byte) string {
	t.Helper()
	var all strings.Builder
	for len(text) > 0 {
		block, rest := pem.Decode(text)
		if block == nil {
			t.Fatalf("%q is no PEM", text)
		}
		all.WriteString(block.Type + ",")
		text = rest
	}
	return all.String()
}
