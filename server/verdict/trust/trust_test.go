package trust_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/assay-id/assay/server/verdict/trust"
	"github.com/assay-id/assay/test/lab"
)

const (
	imageA    = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	imageB    = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	slsa1     = "https://slsa.dev/provenance/v1"
	vulnsV02  = "https://in-toto.io/attestation/vulns/v0.2"
	statement = "application/vnd.in-toto+json"
)

var received = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// pae is the test's own reading of the protocol.
func pae(kind string, payload []byte) []byte {
	return fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(kind), kind, len(payload), payload)
}

// inToto returns a statement of the given type about the digests.
func inToto(predicateType string, predicate any, digests ...string) []byte {
	subjects := make([]map[string]any, 0, len(digests))
	for _, d := range digests {
		algorithm, sum, _ := strings.Cut(d, ":")
		subjects = append(subjects, map[string]any{"name": "registry.example/shop", "digest": map[string]string{algorithm: sum}})
	}
	return asJSON(map[string]any{
		"_type": "https://in-toto.io/Statement/v1", "subject": subjects, "predicateType": predicateType, "predicate": predicate,
	})
}

func asJSON(v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return text
}

// dsse wraps a payload; every signer signs it.
func dsse(payload []byte, signers ...func(message []byte) []byte) []byte {
	return dsseAs(statement, payload, signers...)
}

func dsseAs(kind string, payload []byte, signers ...func(message []byte) []byte) []byte {
	signatures := []map[string]string{}
	for _, sign := range signers {
		signatures = append(signatures, map[string]string{"sig": base64.StdEncoding.EncodeToString(sign(pae(kind, payload)))})
	}
	return asJSON(map[string]any{
		"payloadType": kind, "payload": base64.StdEncoding.EncodeToString(payload), "signatures": signatures,
	})
}

// key is a signing key with its public half as PEM.
type key struct {
	pem         string
	fingerprint string
	sign        func(message []byte) []byte
}

func goKey(t testing.TB, signer crypto.Signer, opts crypto.SignerOpts) key {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key{
		pem:         string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
		fingerprint: fmt.Sprintf("sha256:%x", sha256.Sum256(der)),
		sign: func(message []byte) []byte {
			toSign := message
			if h := opts.HashFunc(); h != 0 {
				w := h.New()
				w.Write(message)
				toSign = w.Sum(nil)
			}
			sig, err := signer.Sign(rand.Reader, toSign, opts)
			if err != nil {
				t.Fatal(err)
			}
			return sig
		},
	}
}

func ecKey(t testing.TB) key {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return goKey(t, k, crypto.SHA256)
}

// policy compiles a block that must be right.
func policy(t testing.TB, b trust.PolicyBlock) *trust.Policy {
	t.Helper()
	if b.Name == "" {
		b.Name = "ci"
	}
	if b.PredicateTypes == nil {
		b.PredicateTypes = []string{"provenance", "scan"}
	}
	p, problems := trust.NewPolicy(b)
	if len(problems) > 0 {
		t.Fatalf("policy has problems: %v", problems)
	}
	return p
}

func verifier(t testing.TB, policies ...*trust.Policy) *trust.Verifier {
	t.Helper()
	v, err := trust.New(policies, trust.Config{Now: func() time.Time { return received }})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func about(digests ...string) trust.Want {
	return trust.Want{Digests: digests, Repository: "registry.example/shop"}
}

// refused demands a refusal for the reason whose text holds the words.
func refused(t *testing.T, err, why error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("accepted")
	}
	if !errors.Is(err, trust.ErrRefused) || !errors.Is(err, why) {
		t.Fatalf("refused for another reason than %v: %v", why, err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the refusal does not say %q: %v", w, err)
		}
	}
	if strings.ContainsAny(err.Error(), "\n\r\x00\x1b") {
		t.Errorf("the refusal has control characters: %q", err)
	}
	if len(err.Error()) > 1500 {
		t.Errorf("the refusal is %d bytes long", len(err.Error()))
	}
}

var vulns = map[string]any{"scanner": map[string]any{"uri": "pkg:x"}}

func TestKeysOfOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		lab.Missing(t, "openssl", err)
	}
	dir := t.TempDir()
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), openssl, args...).CombinedOutput(); err != nil {
			t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	for _, c := range []struct {
		name string
		make []string
		sign []string
	}{
		{"ECDSA P-256", []string{"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"}, []string{"dgst", "-sha256", "-sign"}},
		{"ECDSA P-384", []string{"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"}, []string{"dgst", "-sha384", "-sign"}},
		{"ECDSA P-384 with SHA-256, as cosign", []string{"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"}, []string{"dgst", "-sha256", "-sign"}},
		{"Ed25519", []string{"-algorithm", "ED25519"}, []string{"pkeyutl", "-sign", "-rawin", "-inkey"}},
		{"RSA PKCS #1 v1.5", []string{"-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"}, []string{"dgst", "-sha256", "-sign"}},
		{"RSA-PSS", []string{"-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"}, []string{"dgst", "-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest", "-sign"}},
		{"RSA-PSS with SHA-512 and the longest salt", []string{"-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"}, []string{"dgst", "-sha512", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:max", "-sign"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			private, public := filepath.Join(dir, "key.pem"), filepath.Join(dir, "pub.pem")
			in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
			run(append([]string{"genpkey", "-out", private}, c.make...)...)
			run("pkey", "-in", private, "-pubout", "-out", public)
			payload := inToto(vulnsV02, vulns, imageA)
			if err := os.WriteFile(in, pae(statement, payload), 0o600); err != nil {
				t.Fatal(err)
			}
			if c.sign[0] == "pkeyutl" {
				run(append(slices.Clone(c.sign), private, "-in", in, "-out", out)...)
			} else {
				run(append(slices.Clone(c.sign), private, "-out", out, in)...)
			}
			sig, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			v := verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{Path: public}}}))
			doc := dsse(payload, func([]byte) []byte { return sig })
			proof, err := v.Verify(t.Context(), doc, about(imageA))
			if err != nil {
				t.Fatal(err)
			}
			if proof.Kind != trust.DSSE || !slices.Equal(proof.TrustPolicies, []string{"ci"}) || !bytes.Equal(proof.Body, payload) {
				t.Errorf("proof is %+v", proof)
			}
			sig[len(sig)-1] ^= 1
			_, err = v.Verify(t.Context(), dsse(payload, func([]byte) []byte { return sig }), about(imageA))
			refused(t, err, trust.ErrSignature)
		})
	}
}

func TestDSSE(t *testing.T) {
	k, other := ecKey(t), ecKey(t)
	p := policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}})
	v := verifier(t, p)
	payload := inToto(vulnsV02, vulns, imageA)
	good := dsse(payload, k.sign)

	t.Run("a signed report is accepted", func(t *testing.T) {
		proof, err := v.Verify(t.Context(), good, about(imageB, imageA))
		if err != nil {
			t.Fatal(err)
		}
		if proof.Signer != k.fingerprint || proof.Issuer != "" || proof.PredicateType != vulnsV02 || !proof.VerifiedAt.Equal(received) {
			t.Errorf("proof is %+v", proof)
		}
		if !slices.Equal(proof.Subjects, []string{imageA}) || !slices.Equal(proof.Matched, []string{imageA}) {
			t.Errorf("subjects are %v, matched %v", proof.Subjects, proof.Matched)
		}
		got := proof.Selectors().Strings()
		if want := []string{"sig:policy:ci", "sig:signer:" + k.fingerprint}; !slices.Equal(got, want) {
			t.Errorf("selectors are %v, want %v", got, want)
		}
	})
	t.Run("URL-safe base64 is the same envelope", func(t *testing.T) {
		m := map[string]any{}
		if err := json.Unmarshal(good, &m); err != nil {
			t.Fatal(err)
		}
		m["payload"] = base64.URLEncoding.EncodeToString(payload)
		m["later"] = "fields that are added later are ignored"
		if _, err := v.Verify(t.Context(), asJSON(m), about(imageA)); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("one good signature among others suffices", func(t *testing.T) {
		if _, err := v.Verify(t.Context(), dsse(payload, other.sign, k.sign), about(imageA)); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("a bare report passes and proves nothing", func(t *testing.T) {
		bare := []byte(`{"SchemaVersion":2}`)
		proof, err := v.Verify(t.Context(), bare, about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		if proof.Kind != trust.Bare || proof.TrustPolicies != nil || proof.Selectors().Len() != 0 || !bytes.Equal(proof.Body, bare) {
			t.Errorf("proof is %+v", proof)
		}
	})
	t.Run("a bare statement proves nothing", func(t *testing.T) {
		proof, err := v.Verify(t.Context(), payload, about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		if proof.Kind != trust.Bare || proof.Selectors().Len() != 0 {
			t.Errorf("proof is %+v", proof)
		}
	})
	t.Run("every policy that vouches counts", func(t *testing.T) {
		second := policy(t, trust.PolicyBlock{Name: "second", Keys: []trust.KeyBlock{{PEM: k.pem}}})
		third := policy(t, trust.PolicyBlock{Name: "third", Keys: []trust.KeyBlock{{PEM: other.pem}}})
		proof, err := verifier(t, p, second, third).Verify(t.Context(), good, about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(proof.TrustPolicies, []string{"ci", "second"}) {
			t.Errorf("policies are %v", proof.TrustPolicies)
		}
	})
	t.Run("a context that ended is no refusal", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := v.Verify(ctx, good, about(imageA)); !errors.Is(err, context.Canceled) || errors.Is(err, trust.ErrRefused) {
			t.Errorf("got %v", err)
		}
	})
}

// TestThreatForgedReport: "flip byte, wrong key, expired key, other digest".
func TestThreatForgedReport(t *testing.T) {
	k, other := ecKey(t), ecKey(t)
	payload := inToto(vulnsV02, vulns, imageA)
	good := dsse(payload, k.sign)
	v := verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}}))

	t.Run("no flipped byte is accepted as another document", func(t *testing.T) {
		for i := range good {
			for _, bit := range []byte{1, 0x20} {
				bad := bytes.Clone(good)
				bad[i] ^= bit
				proof, err := v.Verify(t.Context(), bad, about(imageA))
				if err == nil && len(proof.TrustPolicies) > 0 && !bytes.Equal(proof.Body, payload) {
					t.Fatalf("byte %d flipped by %#x: accepted %q", i, bit, proof.Body)
				}
			}
		}
	})
	t.Run("a flipped byte of the payload is refused", func(t *testing.T) {
		forged := bytes.Replace(payload, []byte("pkg:x"), []byte("pkg:y"), 1)
		m := map[string]any{}
		if err := json.Unmarshal(good, &m); err != nil {
			t.Fatal(err)
		}
		m["payload"] = base64.StdEncoding.EncodeToString(forged)
		_, err := v.Verify(t.Context(), asJSON(m), about(imageA))
		refused(t, err, trust.ErrSignature, `trust policy "ci"`)
	})
	t.Run("the same payload under another type is refused", func(t *testing.T) {
		m := map[string]any{}
		if err := json.Unmarshal(good, &m); err != nil {
			t.Fatal(err)
		}
		m["payloadType"] = "application/json"
		_, err := v.Verify(t.Context(), asJSON(m), about(imageA))
		refused(t, err, trust.ErrSignature)
	})
	t.Run("a signature over the bare payload is refused", func(t *testing.T) {
		_, err := v.Verify(t.Context(), dsse(payload, func([]byte) []byte { return k.sign(payload) }), about(imageA))
		refused(t, err, trust.ErrSignature)
	})
	t.Run("a wrong key is refused", func(t *testing.T) {
		_, err := v.Verify(t.Context(), dsse(payload, other.sign), about(imageA))
		refused(t, err, trust.ErrSignature, "no signature of the envelope verifies")
	})
	t.Run("a key ID vouches for nothing", func(t *testing.T) {
		m := map[string]any{}
		if err := json.Unmarshal(dsse(payload, other.sign), &m); err != nil {
			t.Fatal(err)
		}
		m["signatures"].([]any)[0].(map[string]any)["keyid"] = k.fingerprint
		_, err := v.Verify(t.Context(), asJSON(m), about(imageA))
		refused(t, err, trust.ErrSignature)
	})
	t.Run("a report about another digest is refused", func(t *testing.T) {
		_, err := v.Verify(t.Context(), good, about(imageB))
		refused(t, err, trust.ErrDigest, imageA, imageB)
	})
	t.Run("nothing to compare with is refused", func(t *testing.T) {
		_, err := v.Verify(t.Context(), good, trust.Want{})
		refused(t, err, trust.ErrDigest)
	})
	t.Run("what is no digest is refused", func(t *testing.T) {
		for _, d := range []string{"", "sha256:", "sha256:AA", strings.ToUpper(imageA), imageA + "aa", "md5:" + strings.Repeat("a", 32), "sha256:" + strings.Repeat("g", 64)} {
			_, err := v.Verify(t.Context(), good, about(d))
			refused(t, err, trust.ErrDigest)
		}
	})
	t.Run("without policies no signature counts", func(t *testing.T) {
		_, err := verifier(t).Verify(t.Context(), good, about(imageA))
		refused(t, err, trust.ErrUntrusted)
	})
	t.Run("a kind of statement that the signer is not trusted with is refused", func(t *testing.T) {
		scans := verifier(t, policy(t, trust.PolicyBlock{PredicateTypes: []string{"scan"}, Keys: []trust.KeyBlock{{PEM: k.pem}}}))
		_, err := scans.Verify(t.Context(), dsse(inToto(slsa1, provenanceV1(), imageA), k.sign), about(imageA))
		refused(t, err, trust.ErrPredicate, slsa1)
	})
	t.Run("another repository is refused", func(t *testing.T) {
		scoped := verifier(t, policy(t, trust.PolicyBlock{Repositories: []string{"registry.example/team/*"}, Keys: []trust.KeyBlock{{PEM: k.pem}}}))
		_, err := scoped.Verify(t.Context(), good, about(imageA))
		refused(t, err, trust.ErrScope, "registry.example/shop", "registry.example/team/*")
		if _, err := scoped.Verify(t.Context(), good, trust.Want{Digests: []string{imageA}, Repository: "registry.example/team/shop"}); err != nil {
			t.Error(err)
		}
	})
}

// TestThreatKeyTheft: key windows, revoked keys, and stored evidence verified again.
func TestThreatKeyTheft(t *testing.T) {
	from, until := received.Add(-24*time.Hour), received.Add(24*time.Hour)
	k, next := ecKey(t), ecKey(t)
	doc := dsse(inToto(vulnsV02, vulns, imageA), k.sign)
	block := trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem, ValidFrom: from.Format(time.RFC3339), ValidUntil: until.Format(time.RFC3339)}, {PEM: next.pem}}}
	v := verifier(t, policy(t, block))

	t.Run("a key is good within its window", func(t *testing.T) {
		for _, seen := range []time.Time{from, received, until.Add(-time.Second)} {
			if _, err := v.VerifyAt(t.Context(), doc, about(imageA), seen); err != nil {
				t.Errorf("at %s: %v", seen, err)
			}
		}
	})
	t.Run("an expired key is refused", func(t *testing.T) {
		_, err := v.VerifyAt(t.Context(), doc, about(imageA), until)
		refused(t, err, trust.ErrWindow, k.fingerprint, "was valid until 2026-03-02T12:00:00Z")
	})
	t.Run("a key before its time is refused", func(t *testing.T) {
		_, err := v.VerifyAt(t.Context(), doc, about(imageA), from.Add(-time.Second))
		refused(t, err, trust.ErrWindow, "valid from")
	})
	t.Run("the next key has no bounds", func(t *testing.T) {
		if _, err := v.VerifyAt(t.Context(), dsse(inToto(vulnsV02, vulns, imageA), next.sign), about(imageA), until.Add(time.Hour)); err != nil {
			t.Error(err)
		}
	})
	t.Run("stored evidence falls when its key is revoked", func(t *testing.T) {
		v := verifier(t, policy(t, block))
		if _, err := v.VerifyAt(t.Context(), doc, about(imageA), received); err != nil {
			t.Fatal(err)
		}
		revoked := block
		revoked.RevokedKeys = []string{strings.ToUpper(strings.TrimPrefix(k.fingerprint, "sha256:"))}
		v.Replace([]*trust.Policy{policy(t, revoked)})
		_, err := v.VerifyAt(t.Context(), doc, about(imageA), received)
		refused(t, err, trust.ErrRevoked, k.fingerprint)
	})
	t.Run("stored evidence falls when its key is removed", func(t *testing.T) {
		v := verifier(t, policy(t, block))
		removed := block
		removed.Keys = removed.Keys[1:]
		v.Replace([]*trust.Policy{policy(t, removed)})
		_, err := v.VerifyAt(t.Context(), doc, about(imageA), received)
		refused(t, err, trust.ErrSignature)
	})
	t.Run("a good signature beside a revoked one counts", func(t *testing.T) {
		revoked := block
		revoked.RevokedKeys = []string{k.fingerprint}
		both := dsse(inToto(vulnsV02, vulns, imageA), k.sign, next.sign)
		proof, err := verifier(t, policy(t, revoked)).Verify(t.Context(), both, about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		if proof.Signer != next.fingerprint {
			t.Errorf("signer is %s", proof.Signer)
		}
	})
}

func TestBadDocuments(t *testing.T) {
	k := ecKey(t)
	registry := prometheus.NewRegistry()
	v, err := trust.New([]*trust.Policy{policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}})}, trust.Config{Metrics: registry})
	if err != nil {
		t.Fatal(err)
	}
	sub := `"subject":[{"digest":{"sha256":"` + strings.TrimPrefix(imageA, "sha256:") + `"}}]`
	const v1, typ = `"_type":"https://in-toto.io/Statement/v1"`, `"predicateType":"` + vulnsV02 + `"`
	signed := func(payload string) []byte { return dsse([]byte(payload), k.sign) }
	many := make([]func([]byte) []byte, 17)
	for i := range many {
		many[i] = func([]byte) []byte { return []byte("x") }
	}
	manySubjects := slices.Repeat([]string{imageA}, 1025)
	for _, c := range []struct {
		name string
		raw  []byte
		why  error
		says string
	}{
		{"an empty document", nil, trust.ErrMalformed, "unreadable JSON"},
		{"what is no JSON", []byte("-----BEGIN"), trust.ErrMalformed, "unreadable JSON"},
		{"two documents", []byte(`{} {}`), trust.ErrMalformed, "unreadable JSON"},
		{"bytes that are not UTF-8", []byte("{\"a\":\"\xff\"}"), trust.ErrMalformed, "UTF-8"},
		{"33 MiB", append(bytes.Repeat([]byte(" "), 33<<20), '{', '}'), trust.ErrTooLarge, "33554432"},
		{"JSON 10,000 deep", []byte(strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000)), trust.ErrMalformed, "nested deeper"},
		{"a key twice", []byte(`{"payload":"","payload":"","signatures":[]}`), trust.ErrMalformed, `"payload" is there twice`},
		{"a key twice in other spelling", []byte(`{"a":{"x":1,"\u0078":2}}`), trust.ErrMalformed, `"x" is there twice`},
		{"an envelope without signatures", dsse([]byte("{}")), trust.ErrSignature, "no signature"},
		{"an envelope whose signatures are no list", []byte(`{"payloadType":"x","payload":"e30=","signatures":{}}`), trust.ErrMalformed, "signatures"},
		{"an envelope without payload", []byte(`{"payloadType":"x","payload":"","signatures":[{"sig":"eA=="}]}`), trust.ErrMalformed, "no payload"},
		{"an envelope without type", []byte(`{"payload":"e30=","signatures":[{"sig":"eA=="}]}`), trust.ErrMalformed, "payloadType"},
		{"a payload that is no base64", []byte(`{"payloadType":"x","payload":"%","signatures":[{"sig":"eA=="}]}`), trust.ErrMalformed, "base64"},
		{"an empty signature", []byte(`{"payloadType":"x","payload":"e30=","signatures":[{"sig":""}]}`), trust.ErrMalformed, "signature"},
		{"a signature that is null", []byte(`{"payloadType":"x","payload":"e30=","signatures":[null]}`), trust.ErrMalformed, "signature"},
		{"17 signatures", dsse([]byte("{}"), many...), trust.ErrTooLarge, "17 signatures"},
		{"a signature of 3 KiB", dsse([]byte("{}"), func([]byte) []byte { return make([]byte, 3<<10) }), trust.ErrTooLarge, "3072"},
		{"a signed report that names no image", dsseAs("application/json", []byte(`{"SchemaVersion":2}`), k.sign), trust.ErrMalformed, "in-toto"},
		{"a statement that is no JSON", signed("x"), trust.ErrMalformed, "unreadable JSON"},
		{"a statement of an unknown version", signed(`{"_type":"https://in-toto.io/Statement/v9",` + sub + `,` + typ + `}`), trust.ErrMalformed, "v9"},
		{"a statement without type", signed(`{` + v1 + `,` + sub + `}`), trust.ErrMalformed, "predicateType"},
		{"a statement without subject", signed(`{` + v1 + `,` + typ + `}`), trust.ErrMalformed, "no subject"},
		{"a statement whose key has other case", signed(`{` + v1 + `,"Subject":[],` + typ + `}`), trust.ErrMalformed, "no subject"},
		{"a statement with a key twice", signed(`{` + v1 + `,` + sub + `,` + sub + `,` + typ + `}`), trust.ErrMalformed, `"subject" is there twice`},
		{"a subject without digest", signed(`{` + v1 + `,"subject":[{"name":"x"}],` + typ + `}`), trust.ErrMalformed, "no digest"},
		{"a digest of the wrong length", signed(`{` + v1 + `,"subject":[{"digest":{"sha256":"abcd"}}],` + typ + `}`), trust.ErrMalformed, "abcd"},
		{"a digest in capitals", signed(strings.ReplaceAll(`{`+v1+`,`+sub+`,`+typ+`}`, strings.TrimPrefix(imageA, "sha256:"), strings.Repeat("A", 64))), trust.ErrMalformed, "AAAA"},
		{"1,025 subjects", dsse(inToto(vulnsV02, vulns, manySubjects...), k.sign), trust.ErrTooLarge, "1025 subjects"},
		{"a bundle that is cut off", []byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{}}`), trust.ErrMalformed, "bundle"},
		{"a bundle of an unknown version", []byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v9+json","verificationMaterial":{"certificate":{"rawBytes":"eA=="}},"messageSignature":{}}`), trust.ErrMalformed, "v9"},
		{"an envelope that pretends to be a bundle", []byte(`{"dsseEnvelope":{"payload":"e30="}}`), trust.ErrMalformed, "bundle"},
	} {
		t.Run(c.name+" is refused", func(t *testing.T) {
			_, err := v.Verify(t.Context(), c.raw, about(imageA))
			refused(t, err, c.why, c.says)
		})
	}
	t.Run("each was counted", func(t *testing.T) {
		families, err := registry.Gather()
		if err != nil || len(families) != 1 || families[0].GetName() != "assay_server_evidence_verified_total" || len(families[0].GetMetric()) < 4 {
			t.Errorf("gathered %v, %v", families, err)
		}
	})
	t.Run("a second registration says so", func(t *testing.T) {
		if _, err := trust.New(nil, trust.Config{Metrics: registry}); err == nil {
			t.Error("no error")
		}
	})
}

func TestWeakKeys(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Skipf("this Go makes no weak keys: %v", err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(ed)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, pem, says string }{
		{"RSA of 1024 bits", goKey(t, weak, crypto.SHA256).pem, "1024 bits"},
		{"P-521", goKey(t, p521, crypto.SHA512).pem, "P-521"},
		{"a private key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})), "private key"},
		{"a certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "openssl x509 -pubkey"},
		{"something else", "-----BEGIN SPAM-----\nAAAA\n-----END SPAM-----\n", "SPAM"},
		{"nothing", "hello", "no public key"},
		{"rubbish", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no readable public key"},
	} {
		t.Run(c.name+" is no key to trust", func(t *testing.T) {
			_, problems := trust.NewPolicy(trust.PolicyBlock{Name: "p", PredicateTypes: []string{"scan"}, Keys: []trust.KeyBlock{{PEM: c.pem}}})
			if len(problems) != 1 || problems[0].Field != "key.pem" || problems[0].Nth != 1 || !strings.Contains(problems[0].Text, c.says) {
				t.Errorf("problems are %v, want one that says %q", problems, c.says)
			}
		})
	}
}
