package trust_test

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/zclconf/go-cty/cty"

	"github.com/assay-id/assay/server/verdict/trust"
)

var makeSamples = flag.Bool("make-samples", false, "write the samples in testdata anew")

// Samples of a Sigstore that is no more: its bundles verify for ever, by the times in them.
const (
	sampleRoot   = "testdata/trusted_root.json"
	sampleBundle = "testdata/bundle.json"
	sampleDigest = "testdata/bundle-digest.json"
)

func TestSamples(t *testing.T) {
	if *makeSamples {
		s := newSigstore(t)
		who := signer{uri: acmeSigner, fields: everything()}
		root, err := os.ReadFile(s.rootFile)
		if err != nil {
			t.Fatal(err)
		}
		put(t, sampleRoot, root)
		put(t, sampleBundle, asJSON(s.bundle(t, who, inToto(slsa1, provenanceV1(), imageA), true)))
		put(t, sampleDigest, asJSON(s.digestBundle(t, who, imageA)))
	}
	none := 0
	block := trust.SigstoreBlock{TrustedRootPath: sampleRoot, Issuer: str(github), Identity: str(acmeSigner), MinLogEntries: &none}
	v := now(t, policy(t, trust.PolicyBlock{PredicateTypes: []string{"provenance", "signature"}, Sigstore: []trust.SigstoreBlock{block}}))
	for _, path := range []string{sampleBundle, sampleDigest} {
		proof, err := v.Verify(t.Context(), sample(t, path), about(imageA))
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if !slices.Equal(proof.TrustPolicies, []string{"ci"}) || proof.VerifiedAt.IsZero() {
			t.Errorf("%s: proof is %+v", path, proof)
		}
	}
}

func sample(t testing.TB, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// fixedKey is the same in all processes of a fuzz test, and so are its signatures.
func fixedKey(t testing.TB) key {
	t.Helper()
	return goKey(t, ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)), crypto.Hash(0))
}

// FuzzEnvelope looks for an envelope that is accepted with another payload than the one that was signed.
func FuzzEnvelope(f *testing.F) {
	k := fixedKey(f)
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
	k := fixedKey(f)
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
	none := 0
	blocks := []trust.SigstoreBlock{
		{TrustedRootPath: sampleRoot, Issuer: str(github), Identity: str(acmeSigner)},
		{TrustedRootPath: sampleRoot, Issuer: str(github), Identity: str(acmeSigner), MinLogEntries: &none},
	}
	accepted := [][]byte{inToto(slsa1, provenanceV1(), imageA), nil}
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
	f.Add(sample(f, sampleBundle))
	f.Add(sample(f, sampleDigest))
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

func FuzzToken(f *testing.F) {
	ed := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)) // the same in all processes of the fuzz test
	path := filepath.Join(f.TempDir(), "jwks.json")
	put(f, path, asJSON(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: ed.Public()}}}))
	s := source(f, "shop", trust.OIDCBlock{Issuer: "https://ci.example", Audience: cty.StringVal(audience), JWKSPath: path, Conditions: where(map[string]string{"sub": "x"})})
	c := callers(f, newClock(), s)
	good := token(f, ed, "", jose.EdDSA, map[string]any{"iss": "https://ci.example", "aud": audience, "sub": "x", "exp": received.Unix()})
	f.Add([]byte(good))
	f.Add([]byte("a.b.c"))
	f.Add([]byte("eyJhbGciOiJub25lIn0.eyJpc3MiOiJodHRwczovL2NpLmV4YW1wbGUifQ."))
	f.Fuzz(func(t *testing.T, text []byte) {
		if _, err := c.Token(t.Context(), string(text)); err == nil && !bytes.Equal(text, []byte(good)) {
			// The same token with other bits at the end of its base64 is the same token.
			if !strings.HasPrefix(good, string(text[:min(len(text), len(good)-1)])) {
				t.Fatalf("accepted %q", text)
			}
		}
	})
}
