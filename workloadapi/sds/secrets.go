package sds

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"
	"strconv"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
)

// material is what secrets are made of: the identities and bundles that some facts entitle to. It is
// immutable.
type material struct {
	certificates []certificate // the default one first, one for each SPIFFE ID
	bundles      []bundle      // the own one first
}

type certificate struct {
	id, entry  string
	chain, key []byte // PEM
}

type bundle struct {
	name, id    string // of the trust domain
	authorities []byte // PEM
	revoked     revocations
}

// newMaterial is the maker of the service's feed.
func (r *reader) newMaterial(x identity.X509Context) (any, error) {
	m := &material{}
	for _, svid := range x.SVIDs {
		id := svid.ID.String()
		if slices.ContainsFunc(m.certificates, func(c certificate) bool { return c.id == id }) {
			continue // an older entry grants it too
		}
		key := svid.KeyDER
		if len(key) == 0 {
			var err error
			if key, err = x509.MarshalPKCS8PrivateKey(svid.Key); err != nil {
				return nil, fmt.Errorf("encode key of %s: %w", id, err)
			}
		}
		c := certificate{id: id, entry: svid.EntryID, key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})}
		for _, der := range svid.Chain {
			c.chain = append(c.chain, certificatePEM(der)...)
		}
		m.certificates = append(m.certificates, c)
	}
	for _, b := range append([]*identity.Bundle{x.Bundle}, x.Federated...) {
		one := bundle{name: b.TrustDomain.Name(), id: b.TrustDomain.IDString(), revoked: r.of(b, time.Now())}
		for _, a := range b.X509 {
			one.authorities = append(one.authorities, certificatePEM(a.Certificate.Raw)...)
		}
		m.bundles = append(m.bundles, one)
	}
	return m, nil
}

func certificatePEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// resource is a secret under the name it was asked for.
type resource struct {
	name, version string
	body          *anypb.Any
	from          *certificate // nil: it is a bundle
}

// errPlain is for clients that ask for what would trust everybody for every name.
var errPlain = workloadapi.Invalid("all bundles can only be had with Envoy's SPIFFE validator (Envoy 1.18 and later, not disabled)")

// find returns the secret of a name, or nil if there is none. The error is for the client.
func (m *material) find(cfg *Config, name string, plain bool) (*resource, error) {
	switch name {
	case cfg.DefaultSVIDName:
		return m.certificates[0].resource(name)
	case cfg.DefaultBundleName:
		return trust(cfg, name, m.bundles[:1], plain)
	case cfg.DefaultAllBundlesName:
		if plain {
			return nil, errPlain
		}
		return trust(cfg, name, m.bundles, plain)
	}
	for i := range m.certificates {
		if m.certificates[i].id == name {
			return m.certificates[i].resource(name)
		}
	}
	for i := range m.bundles {
		if m.bundles[i].id == name {
			return trust(cfg, name, m.bundles[i:i+1], plain)
		}
	}
	return nil, nil
}

// names returns what there is, for clients that ask for everything.
func (m *material) names() []string {
	var names []string
	for _, c := range m.certificates {
		names = append(names, c.id)
	}
	for _, b := range m.bundles {
		names = append(names, b.id)
	}
	return names
}

func (c *certificate) resource(name string) (*resource, error) {
	return newResource(name, c, &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(c.chain), PrivateKey: inline(c.key),
	}}})
}

// trust makes a validation context: plain authorities of one trust domain, or configuration of Envoy's
// SPIFFE validator. Lists of revoked certificates come with it.
func trust(cfg *Config, name string, bundles []bundle, plain bool) (*resource, error) {
	var how *tlsv3.CertificateValidationContext
	if plain {
		how = &tlsv3.CertificateValidationContext{TrustedCa: inline(bundles[0].authorities)}
		if lists := bundles[0].revoked.given(cfg.CRL, true); len(lists) > 0 {
			how.Crl = inline(lists)
			// Who signed our authorities keeps lists of its own, if any.
			how.OnlyVerifyLeafCertCrl = !bundles[0].revoked.whole
		}
	} else {
		v := &tlsv3.SPIFFECertValidatorConfig{}
		for _, b := range bundles {
			v.TrustDomains = append(v.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
				Name: b.name, TrustBundle: inline(withLists(b.authorities, b.revoked.given(cfg.CRL, false))),
			})
		}
		body, err := pack(v)
		if err != nil {
			return nil, err
		}
		how = &tlsv3.CertificateValidationContext{CustomValidatorConfig: &corev3.TypedExtensionConfig{
			Name: "envoy.tls.cert_validator.spiffe", TypedConfig: body,
		}}
	}
	return newResource(name, nil, &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: how}})
}

// newResource makes a resource whose version is a digest of it.
func newResource(name string, from *certificate, secret *tlsv3.Secret) (*resource, error) {
	body, err := pack(secret)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(body.GetValue())
	return &resource{name: name, version: hex.EncodeToString(sum[:16]), body: body, from: from}, nil
}

// pack is anypb.New with equal bytes for equal messages.
func pack(m proto.Message) (*anypb.Any, error) {
	body := new(anypb.Any)
	if err := anypb.MarshalFrom(body, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, fmt.Errorf("serialize secret: %w", err)
	}
	return body, nil
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// clip keeps a stranger's text from filling a message.
func clip(s string) string {
	if len(s) > 300 {
		return s[:300] + "…"
	}
	return s
}

// quote is clip for text that stands in a message.
func quote(s string) string { return strconv.Quote(clip(s)) }
