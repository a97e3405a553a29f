package identity_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/assay-id/assay/workloadapi/identity"
)

// fullEntry has every field of the public message set, so that a conversion which forgets one fails.
func fullEntry() *types.Entry {
	return &types.Entry{
		Id:             "e1",
		SpiffeId:       &types.SPIFFEID{TrustDomain: "example.org", Path: "/shop"},
		ParentId:       &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent/join_token/x"},
		Selectors:      []*types.Selector{{Type: "docker", Value: "label:a:b"}, {Type: "unix", Value: "uid:1"}},
		X509SvidTtl:    60,
		JwtSvidTtl:     30,
		FederatesWith:  []string{"a.example", "b.example"},
		Admin:          true,
		Downstream:     true,
		ExpiresAt:      1900000000,
		DnsNames:       []string{"shop.example.org", "a.example.org"},
		RevisionNumber: 7,
		StoreSvid:      true,
		Hint:           "internal",
		CreatedAt:      1800000000,
		AdditionalAttributes: &types.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: true,
			JwtSvidIncludeJti:       true,
		},
	}
}

func TestEntry(t *testing.T) {
	t.Run("every public field is in the sample", func(t *testing.T) {
		m := fullEntry().ProtoReflect()
		for i := range m.Descriptor().Fields().Len() {
			if f := m.Descriptor().Fields().Get(i); !m.Has(f) {
				t.Errorf("the sample lacks %s: a new field of the API needs its place in identity.Entry", f.Name())
			}
		}
	})
	t.Run("comes back from the wire as it was", func(t *testing.T) {
		e, err := identity.EntryFromWire(fullEntry())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(fullEntry(), e.Wire(), protocmp.Transform()); diff != "" {
			t.Fatal(diff)
		}
	})
	for name, change := range map[string]func(*types.Entry){
		"no SPIFFE ID":                func(e *types.Entry) { e.SpiffeId = nil },
		"no trust domain":             func(e *types.Entry) { e.SpiffeId.TrustDomain = "" },
		"an upper-case trust domain":  func(e *types.Entry) { e.SpiffeId.TrustDomain = "Example.org" },
		"a trust domain with a port":  func(e *types.Entry) { e.SpiffeId.TrustDomain = "example.org:80" },
		"an ID in place of a domain":  func(e *types.Entry) { e.SpiffeId.TrustDomain = "spiffe://example.org/x" },
		"a path without a slash":      func(e *types.Entry) { e.SpiffeId.Path = "shop" },
		"a trailing slash":            func(e *types.Entry) { e.SpiffeId.Path = "/shop/" },
		"an empty segment":            func(e *types.Entry) { e.SpiffeId.Path = "/a//b" },
		"a dot segment":               func(e *types.Entry) { e.SpiffeId.Path = "/a/./b" },
		"a double dot segment":        func(e *types.Entry) { e.SpiffeId.Path = "/a/../b" },
		"a percent sign":              func(e *types.Entry) { e.SpiffeId.Path = "/a%2fb" },
		"a character beyond ASCII":    func(e *types.Entry) { e.SpiffeId.Path = "/ä" },
		"an ID over 2048 bytes":       func(e *types.Entry) { e.SpiffeId.Path = "/" + strings.Repeat("a", 2048) },
		"a bad parent":                func(e *types.Entry) { e.ParentId.Path = "x" },
		"a selector without a value":  func(e *types.Entry) { e.Selectors[0].Value = "" },
		"too many selectors":          func(e *types.Entry) { e.Selectors = make([]*types.Selector, identity.MaxSelectors+1) },
		"a negative X509 TTL":         func(e *types.Entry) { e.X509SvidTtl = -1 },
		"a negative JWT TTL":          func(e *types.Entry) { e.JwtSvidTtl = -1 },
		"a bad federated domain":      func(e *types.Entry) { e.FederatesWith[0] = "a b" },
		"a negative expiry":           func(e *types.Entry) { e.ExpiresAt = -1 },
		"an expiry after year 9999":   func(e *types.Entry) { e.ExpiresAt = 1 << 60 },
		"a negative creation time":    func(e *types.Entry) { e.CreatedAt = -1 },
		"a negative revision":         func(e *types.Entry) { e.RevisionNumber = -1 },
		"a hint too long":             func(e *types.Entry) { e.Hint = strings.Repeat("h", identity.MaxHint+1) },
		"an entry ID too long":        func(e *types.Entry) { e.Id = strings.Repeat("i", identity.MaxEntryID+1) },
		"too many DNS names":          func(e *types.Entry) { e.DnsNames = make([]string, identity.MaxDNSNames+1) },
		"too many federated domains":  func(e *types.Entry) { e.FederatesWith = make([]string, identity.MaxFederates+1) },
		"a null selector among them":  func(e *types.Entry) { e.Selectors[0] = nil },
		"a newline inside a selector": func(e *types.Entry) { e.Selectors[0].Value = "a\nb" },
	} {
		t.Run("refuses "+name, func(t *testing.T) {
			w := fullEntry()
			change(w)
			if e, err := identity.EntryFromWire(w); err == nil {
				t.Fatalf("accepted %+v", e)
			}
		})
	}
	t.Run("expires at its second, not after", func(t *testing.T) {
		e := &identity.Entry{ExpiresAt: time.Unix(100, 0)}
		if e.Expired(time.Unix(99, 999)) || !e.Expired(time.Unix(100, 0)) {
			t.Fatal("wrong boundary")
		}
		if (&identity.Entry{}).Expired(time.Unix(1<<40, 0)) {
			t.Fatal("an entry without expiry expired")
		}
	})
	t.Run("the default identity is the oldest, then the smallest ID", func(t *testing.T) {
		old, young := &identity.Entry{ID: "z", CreatedAt: time.Unix(1, 0)}, &identity.Entry{ID: "a", CreatedAt: time.Unix(2, 0)}
		twin := &identity.Entry{ID: "b", CreatedAt: time.Unix(2, 0)}
		if identity.Older(old, young) >= 0 || identity.Older(young, twin) >= 0 || identity.Older(twin, young) <= 0 || identity.Older(old, old) != 0 {
			t.Fatal("wrong order")
		}
	})
}

func authority(t testing.TB, isCA bool) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		NotAfter: time.Now().Add(time.Hour), IsCA: isCA, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func fullBundle(t testing.TB) *types.Bundle {
	t.Helper()
	cert, key := authority(t, true)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &types.Bundle{
		TrustDomain:     "example.org",
		X509Authorities: []*types.X509Certificate{{Asn1: cert.Raw, Tainted: true}},
		JwtAuthorities:  []*types.JWTKey{{PublicKey: spki, KeyId: "k1", ExpiresAt: 1900000000, Tainted: true}},
		RefreshHint:     60,
		SequenceNumber:  4,
	}
}

func TestBundle(t *testing.T) {
	good := fullBundle(t)
	t.Run("comes back from the wire as it was", func(t *testing.T) {
		b, err := identity.BundleFromWire(good)
		if err != nil {
			t.Fatal(err)
		}
		again, err := b.Wire()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(good, again, protocmp.Transform()); diff != "" {
			t.Fatal(diff)
		}
		if !b.X509Bundle().HasX509Authority(b.X509[0].Certificate) {
			t.Error("the go-spiffe X.509 bundle lacks the authority")
		}
		if _, found := b.JWTBundle().FindJWTAuthority("k1"); !found {
			t.Error("the go-spiffe JWT bundle lacks the key")
		}
		if n, found := b.SPIFFEBundle().SequenceNumber(); !found || n != 4 {
			t.Error("the SPIFFE bundle lacks the sequence number")
		}
	})
	t.Run("a clone can be changed without the original noticing", func(t *testing.T) {
		b, _ := identity.BundleFromWire(good)
		c := b.Clone()
		c.X509[0].Tainted, c.JWT[0].KeyID = false, "other"
		if !b.X509[0].Tainted || b.JWT[0].KeyID != "k1" {
			t.Fatal("the original changed")
		}
	})
	t.Run("the same certificate twice is one authority", func(t *testing.T) {
		w := proto.Clone(good).(*types.Bundle)
		w.X509Authorities = append(w.X509Authorities, w.X509Authorities[0])
		b, err := identity.BundleFromWire(w)
		if err != nil || len(b.X509) != 1 {
			t.Fatalf("got %v, %v", b, err)
		}
	})
	leaf, _ := authority(t, false)
	for name, change := range map[string]func(*types.Bundle){
		"a bad trust domain":              func(b *types.Bundle) { b.TrustDomain = "A" },
		"no trust domain":                 func(b *types.Bundle) { b.TrustDomain = "" },
		"a leaf as authority":             func(b *types.Bundle) { b.X509Authorities[0].Asn1 = leaf.Raw },
		"a truncated certificate":         func(b *types.Bundle) { b.X509Authorities[0].Asn1 = leaf.Raw[:40] },
		"bytes after the certificate":     func(b *types.Bundle) { b.X509Authorities[0].Asn1 = append(bytes.Clone(leaf.Raw), 0) },
		"an empty key":                    func(b *types.Bundle) { b.JwtAuthorities[0].PublicKey = nil },
		"a key without an ID":             func(b *types.Bundle) { b.JwtAuthorities[0].KeyId = "" },
		"a key ID too long":               func(b *types.Bundle) { b.JwtAuthorities[0].KeyId = strings.Repeat("k", identity.MaxKeyID+1) },
		"two keys with one ID":            func(b *types.Bundle) { b.JwtAuthorities = append(b.JwtAuthorities, b.JwtAuthorities[0]) },
		"a negative key expiry":           func(b *types.Bundle) { b.JwtAuthorities[0].ExpiresAt = -1 },
		"a negative refresh hint":         func(b *types.Bundle) { b.RefreshHint = -1 },
		"more authorities than the limit": func(b *types.Bundle) { b.X509Authorities = make([]*types.X509Certificate, identity.MaxAuthorities+1) },
	} {
		t.Run("refuses "+name, func(t *testing.T) {
			w := proto.Clone(good).(*types.Bundle)
			change(w)
			if b, err := identity.BundleFromWire(w); err == nil {
				t.Fatalf("accepted %+v", b)
			}
		})
	}
}

func TestChecksum(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	e1, e2 := &identity.Entry{ID: "1"}, &identity.Entry{ID: "2"}
	b := &identity.Bundle{TrustDomain: td, Sequence: 1}
	base := identity.Checksum([]*identity.Entry{e1, e2}, []*identity.Bundle{b})
	if !bytes.Equal(base, identity.Checksum([]*identity.Entry{e2, e1}, []*identity.Bundle{b})) {
		t.Error("the order of entries matters")
	}
	for name, other := range map[string][]byte{
		"an entry missing":      identity.Checksum([]*identity.Entry{e1}, []*identity.Bundle{b}),
		"another revision":      identity.Checksum([]*identity.Entry{e1, {ID: "2", Revision: 1}}, []*identity.Bundle{b}),
		"another creation time": identity.Checksum([]*identity.Entry{e1, {ID: "2", CreatedAt: time.Unix(9, 0)}}, []*identity.Bundle{b}),
		"another sequence":      identity.Checksum([]*identity.Entry{e1, e2}, []*identity.Bundle{{TrustDomain: td, Sequence: 2}}),
		"a bundle missing":      identity.Checksum([]*identity.Entry{e1, e2}, nil),
		"IDs cut elsewhere":     identity.Checksum([]*identity.Entry{{ID: "12"}}, []*identity.Bundle{b}),
	} {
		if bytes.Equal(base, other) {
			t.Errorf("%s is not noticed", name)
		}
	}
}

func FuzzEntryFromWire(f *testing.F) {
	seed, err := proto.Marshal(fullEntry())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, data []byte) {
		w := &types.Entry{}
		if proto.Unmarshal(data, w) != nil {
			return
		}
		e, err := identity.EntryFromWire(w)
		if err != nil {
			return
		}
		again, err := identity.EntryFromWire(e.Wire())
		if err != nil {
			t.Fatalf("own wire form refused: %v", err)
		}
		if diff := cmp.Diff(e.Wire(), again.Wire(), protocmp.Transform()); diff != "" {
			t.Fatal(diff)
		}
	})
}

func FuzzBundleFromWire(f *testing.F) {
	seed, err := proto.Marshal(fullBundle(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, data []byte) {
		w := &types.Bundle{}
		if proto.Unmarshal(data, w) != nil {
			return
		}
		b, err := identity.BundleFromWire(w)
		if err != nil {
			return
		}
		again, err := b.Wire()
		if err != nil {
			t.Fatalf("own bundle has no wire form: %v", err)
		}
		if _, err := identity.BundleFromWire(again); err != nil {
			t.Fatalf("own wire form refused: %v", err)
		}
	})
}
