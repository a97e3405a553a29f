package trust_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/assay-id/assay/server/verdict/trust"
)

// BenchmarkVerify: what trust adds to the parsing of a report of 10 MiB, and what a bundle costs.
func BenchmarkVerify(b *testing.B) {
	var findings bytes.Buffer
	for i := 0; findings.Len() < 10<<20; i++ {
		fmt.Fprintf(&findings, `{"VulnerabilityID":"CVE-2026-%d","PkgName":"openssl","InstalledVersion":"1.1.1","Severity":"HIGH","Description":"an example of the usual length, which is some sentences of text about what is wrong","CVSS":{"nvd":{"V3Score":7.5}}},`, i)
	}
	bare := fmt.Appendf(nil, `{"SchemaVersion":2,"Results":[{"Vulnerabilities":[%s]}]}`, bytes.TrimSuffix(findings.Bytes(), []byte(",")))
	k := ecKey(b)
	signed := dsse(inToto(vulnsV02, map[string]any{"scanner": map[string]any{"result": rawJSON(bare)}}, imageA), k.sign)
	keys := verifier(b, policy(b, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}}))
	run := func(name string, v *trust.Verifier, raw []byte, want trust.Want) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(raw)))
			for b.Loop() {
				if _, err := v.Verify(b.Context(), raw, want); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	run("bare 10 MiB", keys, bare, about(imageA))
	run("DSSE of 10 MiB", keys, signed, about(imageA))
	s := newSigstore(b)
	bundle := asJSON(s.bundle(b, signer{uri: acmeSigner, fields: everything()}, inToto(slsa1, provenanceV1(), imageA), true))
	run("bundle", now(b, policy(b, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{{TrustedRootPath: s.rootFile, Issuer: str(github), Identity: str(acmeSigner)}}})), bundle, about(imageA))
}
