package trust_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"testing"

	"github.com/assay-id/assay/server/verdict/trust"
)

// FuzzEnvelope looks for an envelope that is accepted with another payload than the one that was signed.
func FuzzEnvelope(f *testing.F) {
	k := ecKey(f)
	payload := inToto(slsa1, provenanceV1(), imageA)
	good := dsse(payload, k.sign)
	v := verifier(f, policy(f, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}, Map: &trust.MapBlock{Paths: map[string]string{"c": "predicate.a.b"}}}))
	f.Add(good)
	f.Add(bytes.Replace(good, []byte("payload"), []byte(`p\u0061yload`), 1))
	f.Add([]byte(`{"payloadType":"x","payload":"e30=","signatures":[{"sig":"eA=="}]}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		proof, err := v.Verify(t.Context(), raw, about(imageA))
		if err != nil {
			if !errors.Is(err, trust.ErrRefused) {
				t.Fatalf("an error that is no refusal: %v", err)
			}
			return
		}
		if !json.Valid(raw) {
			t.Fatal("accepted what is no JSON")
		}
		if len(proof.TrustPolicies) > 0 && !bytes.Equal(proof.Body, payload) {
			t.Fatalf("accepted %q", proof.Body)
		}
		if len(proof.TrustPolicies) == 0 && proof.Selectors().Len() != 0 {
			t.Fatalf("selectors of a bare document: %v", proof.Selectors())
		}
	})
}

// FuzzStatement signs whatever it is given.
func FuzzStatement(f *testing.F) {
	k := ecKey(f)
	v := verifier(f, policy(f, trust.PolicyBlock{
		PredicateTypes: []string{"provenance", "scan", "https://x.example/a"}, ProvenanceTypes: []string{"provenance", "https://x.example/a"},
		Keys: []trust.KeyBlock{{PEM: k.pem}}, Map: &trust.MapBlock{Paths: map[string]string{"c": "predicate.a[0].b", "component": "predicate.runDetails.builder.id"}},
	}))
	f.Add(inToto(slsa1, provenanceV1(), imageA))
	f.Add(inToto("https://slsa.dev/provenance/v0.2", map[string]any{"builder": map[string]any{"id": "b"}, "buildType": "t"}, imageA))
	f.Add(inToto(vulnsV02, vulns, imageA))
	f.Add(inToto("https://x.example/a", map[string]any{"a": []any{map[string]any{"b": []any{1, true, "x"}}}}, imageA))
	f.Fuzz(func(t *testing.T, payload []byte) {
		proof, err := v.Verify(t.Context(), dsse(payload, k.sign), about(imageA))
		if err != nil {
			if !errors.Is(err, trust.ErrRefused) {
				t.Fatalf("an error that is no refusal: %v", err)
			}
			return
		}
		if !bytes.Contains(payload, []byte("aaaaaaaa")) && !bytes.Contains(payload, []byte(`\u`)) {
			t.Fatalf("accepted a statement that does not name the image: %q", payload)
		}
		for _, s := range proof.Selectors().All() {
			if err := s.Check(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzBundle looks for a bundle that is accepted with another payload than the one that was signed, and
// for one that ends the process.
func FuzzBundle(f *testing.F) {
	s := newSigstore(f)
	payload := inToto(slsa1, provenanceV1(), imageA)
	good := asJSON(s.bundle(f, signer{uri: acmeSigner, fields: everything()}, payload, true))
	digest := asJSON(s.digestBundle(f, signer{uri: acmeSigner, fields: everything()}, imageA))
	blocks := []trust.SigstoreBlock{
		{TrustedRootPath: s.rootFile, Issuer: str(github), Identity: str(acmeSigner)},
		{TrustedRootPath: s.noLog, Issuer: str(github), Identity: str(acmeSigner)},
	}
	accepted := [][]byte{payload, nil}
	if raw, err := os.ReadFile(sharedBundle); err == nil {
		f.Add(raw)
		blocks = append(blocks, trust.SigstoreBlock{TrustedRootPath: sharedRoot, Issuer: str(github), Identity: str(npmSigner)})
		var m struct {
			Envelope struct {
				Payload []byte `json:"payload"`
			} `json:"dsseEnvelope"`
		}
		if err := json.Unmarshal(raw, &m); err != nil {
			f.Fatal(err)
		}
		accepted = append(accepted, m.Envelope.Payload)
	}
	v := now(f, policy(f, trust.PolicyBlock{PredicateTypes: []string{"provenance", "signature"}, Sigstore: blocks}))
	f.Add(good)
	f.Add(digest)
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"publicKey":{}},"dsseEnvelope":{}}`))
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle+json;version=0.1","verificationMaterial":{"x509CertificateChain":{},"tlogEntries":[{"logId":{"keyId":"eA=="},"kindVersion":{},"canonicalizedBody":"e30="}]},"dsseEnvelope":{"signatures":[{}]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		proof, err := v.Verify(t.Context(), raw, about(imageA, npmDigest))
		if err != nil {
			if !errors.Is(err, trust.ErrRefused) {
				t.Fatalf("an error that is no refusal: %v", err)
			}
			return
		}
		if len(proof.TrustPolicies) == 0 {
			return
		}
		for _, a := range accepted {
			if bytes.Equal(proof.Body, a) {
				return
			}
		}
		t.Fatalf("accepted %q", proof.Body)
	})
}
