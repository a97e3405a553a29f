package join

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// FuzzBootstrap feeds foreign bytes to the readers of trust bundles: what they give is CA
// certificates, or an error.
func FuzzBootstrap(f *testing.F) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"), false)
	f.Add([]byte(`{"keys":[{"use":"x509-svid","kty":"EC","x5c":["MAA="]}]}`), true)
	f.Add([]byte(`{"keys":null}`), true)
	f.Fuzz(func(t *testing.T, raw []byte, spiffe bool) {
		certs, err := Bootstrap{SPIFFE: spiffe}.parse(td, raw)
		if err == nil && len(certs) == 0 {
			t.Error("nothing, and no error")
		}
		for _, c := range certs {
			if !c.IsCA {
				t.Errorf("%q is no CA", c.Subject)
			}
		}
	})
}
