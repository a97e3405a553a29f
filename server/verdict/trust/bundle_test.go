package trust_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/zclconf/go-cty/cty"

	"github.com/assay-id/assay/server/verdict/trust"
)

const (
	sharedBundle = "../../../../shared/data/sigstore-bundle-provenance.json"
	sharedRoot   = "../../../../shared/data/sigstore-trusted-root-public-good.json"

	npmDigest = "sha512:76176ffa33808b54602c7c35de5c6e9a4deb96066dba6533f50ac234f4f1f4c6b3527515dc17c06fbe2860030f410eee69ea20079bd3a2c6f3dcf3b329b10751"
	npmSigner = "https://github.com/sigstore/sigstore-js/.github/workflows/release.yml@refs/heads/main"
	github    = "https://token.actions.githubusercontent.com"
)

// shared returns a sample that nobody on this project wrote.
func shared(t testing.TB, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		t.Skipf("the shared samples are not here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func str(s string) cty.Value { return cty.StringVal(s) }

func where(conditions map[string]string) *trust.ConditionsBlock {
	b := &trust.ConditionsBlock{Conditions: map[string]cty.Value{}}
	for k, v := range conditions {
		b.Conditions[k] = str(v)
	}
	return b
}

func TestPublicBundle(t *testing.T) {
	raw := shared(t, sharedBundle)
	block := trust.SigstoreBlock{TrustedRootPath: sharedRoot, Issuer: str(github), Identity: str(npmSigner)}
	of := func(change func(*trust.SigstoreBlock)) *trust.Verifier {
		b := block
		change(&b)
		return verifier(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{b}}))
	}
	v := of(func(*trust.SigstoreBlock) {})

	t.Run("the right digest and identity are accepted offline", func(t *testing.T) {
		proof, err := v.Verify(t.Context(), raw, about(imageA, npmDigest))
		if err != nil {
			t.Fatal(err)
		}
		if proof.Kind != trust.Bundle || proof.Signer != npmSigner || proof.Issuer != github || !slices.Equal(proof.Matched, []string{npmDigest}) {
			t.Errorf("proof is %+v", proof)
		}
		if want := time.Date(2023, 4, 18, 17, 45, 12, 0, time.UTC); !proof.VerifiedAt.Equal(want) {
			t.Errorf("verified at %s, want %s", proof.VerifiedAt, want)
		}
		fields := map[string]string{
			"issuer": github, "build_signer_uri": npmSigner, "build_signer_digest": commit, "runner_environment": "github-hosted",
			"source_repo_uri": "https://github.com/sigstore/sigstore-js", "source_repo_digest": commit, "source_repo_ref": "refs/heads/main",
			"source_repo_id": "495574555", "source_repo_owner_uri": "https://github.com/sigstore", "source_repo_owner_id": "71096353",
			"build_config_uri": npmSigner, "build_config_digest": commit, "build_trigger": "push",
			"run_invocation_uri": "https://github.com/sigstore/sigstore-js/actions/runs/4735384265/attempts/1",
		}
		if !maps.Equal(proof.Fields, fields) {
			t.Errorf("fields are %v", proof.Fields)
		}
		want := []string{
			"prov:builder:https://github.com/actions/runner", "prov:commit:" + commit, "prov:owner-id:71096353", "prov:policy:ci",
			"prov:ref:refs/heads/main", "prov:runner:github-hosted", "prov:signer:" + npmSigner, "prov:source-id:495574555",
			"prov:source:https://github.com/sigstore/sigstore-js", "prov:trigger:push", "prov:type:slsa-v0.2",
			"sig:issuer:" + github, "sig:policy:ci", "sig:signer:" + npmSigner,
		}
		if got := proof.Selectors().Strings(); !slices.Equal(got, want) {
			t.Errorf("selectors are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	})
	t.Run("many at once get the same answer while policies change", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if _, err := v.Verify(t.Context(), raw, about(npmDigest)); err != nil {
					t.Error(err)
				}
				v.Replace(v.Policies())
			})
		}
		wg.Wait()
	})
	t.Run("conditions on extensions hold", func(t *testing.T) {
		v := of(func(b *trust.SigstoreBlock) {
			b.Identity = cty.NilVal
			b.Extensions = where(map[string]string{
				"source_repo_owner_id": "71096353", "runner_environment": "github-hosted", "source_repo_uri": "^https://github\\.com/sigstore/[a-z-]+$",
			})
		})
		if _, err := v.Verify(t.Context(), raw, about(npmDigest)); err != nil {
			t.Error(err)
		}
	})
	t.Run("a wrong subject attestation is refused", func(t *testing.T) {
		_, err := v.Verify(t.Context(), raw, about(imageA, strings.Replace(npmDigest, "7617", "7618", 1)))
		refused(t, err, trust.ErrDigest)
	})
	for name, c := range map[string]struct {
		change func(*trust.SigstoreBlock)
		says   string
	}{
		"another workflow":       {func(b *trust.SigstoreBlock) { b.Identity = str(strings.Replace(npmSigner, "main", "evil", 1)) }, "refs/heads/evil"},
		"a part of the identity": {func(b *trust.SigstoreBlock) { b.Identity = str("^https://github\\.com/sigstore$") }, "sigstore$"},
		"another issuer":         {func(b *trust.SigstoreBlock) { b.Issuer = str("https://accounts.google.com") }, "accounts.google.com"},
		"another owner":          {func(b *trust.SigstoreBlock) { b.Extensions = where(map[string]string{"source_repo_owner_id": "1"}) }, `source_repo_owner_id is "71096353"`},
		"a field that is not stated": {func(b *trust.SigstoreBlock) {
			b.Extensions = where(map[string]string{"source_repo_visibility": "public"})
		}, "source_repo_visibility is not stated"},
		"one condition of two failing": {func(b *trust.SigstoreBlock) {
			b.Extensions = where(map[string]string{"source_repo_owner_id": "71096353", "build_trigger": "pull_request"})
		}, "build_trigger"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			_, err := of(c.change).Verify(t.Context(), raw, about(npmDigest))
			refused(t, err, trust.ErrIdentity, c.says)
		})
	}
	t.Run("more timestamps than it has are refused", func(t *testing.T) {
		two := 2
		_, err := of(func(b *trust.SigstoreBlock) { b.MinTimestamps = &two }).Verify(t.Context(), raw, about(npmDigest))
		refused(t, err, trust.ErrSignature, "threshold")
	})
	t.Run("another Sigstore's root does not vouch for it", func(t *testing.T) {
		s := newSigstore(t)
		_, err := of(func(b *trust.SigstoreBlock) { b.TrustedRootPath = s.rootFile }).Verify(t.Context(), raw, about(npmDigest))
		refused(t, err, trust.ErrSignature)
	})
	t.Run("received before it was signed is refused", func(t *testing.T) {
		_, err := v.VerifyAt(t.Context(), raw, about(npmDigest), time.Date(2023, 4, 18, 17, 0, 0, 0, time.UTC))
		refused(t, err, trust.ErrTime, "2023-04-18T17:45:12Z")
	})
	t.Run("a policy of keys does not vouch for it", func(t *testing.T) {
		_, err := verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: ecKey(t).pem}}})).Verify(t.Context(), raw, about(npmDigest))
		refused(t, err, trust.ErrUntrusted)
	})
	t.Run("its envelope alone is refused", func(t *testing.T) {
		var m map[string]json.RawMessage
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		_, err := v.Verify(t.Context(), m["dsseEnvelope"], about(npmDigest))
		refused(t, err, trust.ErrUntrusted)
	})
}

// TestThreatForgedBundle flips bytes of the real bundle and cuts it off.
func TestThreatForgedBundle(t *testing.T) {
	raw := shared(t, sharedBundle)
	v := verifier(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{{TrustedRootPath: sharedRoot, Issuer: str(github), Identity: str(npmSigner)}}}))
	t.Run("a flipped byte never yields another statement", func(t *testing.T) {
		payload := payloadOf(t, raw)
		const step = 83 // a prime, so that all kinds of places are hit; the fuzz test goes on
		for i := 0; i < len(raw); i += step {
			bad := bytes.Clone(raw)
			bad[i] ^= 1
			proof, err := v.Verify(t.Context(), bad, about(npmDigest))
			if err == nil && len(proof.TrustPolicies) > 0 && !bytes.Equal(proof.Body, payload) {
				t.Fatalf("byte %d flipped: accepted", i)
			}
		}
	})
	t.Run("a truncated bundle is refused", func(t *testing.T) {
		for _, n := range []int{1, 100, len(raw) / 2, len(raw) - 2} {
			_, err := v.Verify(t.Context(), raw[:n], about(npmDigest))
			refused(t, err, trust.ErrMalformed)
		}
	})
	edit := func(t *testing.T, change func(bundle, material, envelope map[string]any)) error {
		t.Helper()
		m := map[string]any{}
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		change(m, m["verificationMaterial"].(map[string]any), m["dsseEnvelope"].(map[string]any))
		_, err := v.Verify(t.Context(), asJSON(m), about(npmDigest, imageA))
		return err
	}
	t.Run("another payload is refused", func(t *testing.T) {
		refused(t, edit(t, func(_, _, e map[string]any) {
			e["payload"] = base64.StdEncoding.EncodeToString(inToto(slsa1, provenanceV1(), imageA))
		}), trust.ErrSignature)
	})
	t.Run("a bundle without log entry is refused", func(t *testing.T) {
		refused(t, edit(t, func(_, m, _ map[string]any) { delete(m, "tlogEntries") }), trust.ErrSignature)
	})
	t.Run("the same log entry twice is refused", func(t *testing.T) {
		refused(t, edit(t, func(_, m, _ map[string]any) {
			m["tlogEntries"] = append(m["tlogEntries"].([]any), m["tlogEntries"].([]any)...)
		}), trust.ErrSignature, "duplicate")
	})
	t.Run("an earlier log time is refused", func(t *testing.T) {
		refused(t, edit(t, func(_, m, _ map[string]any) {
			m["tlogEntries"].([]any)[0].(map[string]any)["integratedTime"] = "1681839911"
		}), trust.ErrSignature)
	})
	t.Run("a second signature is refused", func(t *testing.T) {
		refused(t, edit(t, func(_, _, e map[string]any) {
			e["signatures"] = append(e["signatures"].([]any), map[string]any{"sig": "eA=="})
		}), trust.ErrSignature, "2 signatures")
	})
	t.Run("a certificate of another bundle is refused", func(t *testing.T) {
		s := newSigstore(t)
		other := s.bundle(t, signer{uri: npmSigner, fields: map[int]string{8: github}}, inToto(slsa1, provenanceV1(), imageA), true)
		refused(t, edit(t, func(b, _, _ map[string]any) { b["verificationMaterial"] = other["verificationMaterial"] }), trust.ErrSignature)
	})
}

func payloadOf(t *testing.T, raw []byte) []byte {
	t.Helper()
	var m struct {
		Envelope struct {
			Payload []byte `json:"payload"`
		} `json:"dsseEnvelope"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	return m.Envelope.Payload
}

// everything are all the extensions, each with a value of its own.
func everything() map[int]string {
	return map[int]string{
		8: github, 9: "https://github.com/acme/ci/.github/workflows/build.yml@refs/tags/v1", 10: "0a", 11: "self-hosted",
		12: "https://github.com/acme/shop", 13: commit, 14: "refs/heads/main", 15: "15", 16: "https://github.com/acme", 17: "17",
		18: "https://github.com/acme/shop/.github/workflows/ci.yml@refs/heads/main", 19: "19", 20: "push",
		21: "https://github.com/acme/shop/actions/runs/21/attempts/1", 22: "private", 23: "production", 24: "repo:acme/shop:environment:production",
	}
}

const acmeSigner = "https://github.com/acme/ci/.github/workflows/build.yml@refs/tags/v1"

func TestExtensions(t *testing.T) {
	s := newSigstore(t)
	acme := trust.SigstoreBlock{TrustedRootPath: s.rootFile, Issuer: str(github), Identity: str(acmeSigner)}
	v := now(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{acme}}))
	payload := inToto(slsa1, provenanceV1(), imageA)
	verify := func(t *testing.T, v *trust.Verifier, who signer) (*trust.Proof, error) {
		t.Helper()
		return v.Verify(t.Context(), asJSON(s.bundle(t, who, payload, true)), about(imageA))
	}

	t.Run("all of 8 to 24 are read", func(t *testing.T) {
		proof, err := verify(t, v, signer{uri: acmeSigner, fields: everything()})
		if err != nil {
			t.Fatal(err)
		}
		values := slices.Sorted(maps.Values(proof.Fields))
		if want := slices.Sorted(maps.Values(everything())); !slices.Equal(values, want) {
			t.Errorf("values are %v, want %v", values, want)
		}
		if proof.Fields["deployment_environment"] != "production" || proof.Fields["token_subject"] != "repo:acme/shop:environment:production" {
			t.Errorf("fields are %v", proof.Fields)
		}
		for _, want := range []string{
			"prov:env:production", "prov:visibility:private", "prov:runner:self-hosted", "prov:source-id:15", "prov:owner-id:17",
			"prov:source:https://github.com/acme/shop", "prov:signer:" + acmeSigner, "prov:trigger:push",
		} {
			if !slices.Contains(proof.Selectors().Strings(), want) {
				t.Errorf("there is no %s", want)
			}
		}
	})
	t.Run("1 to 6 count only where the newer are absent", func(t *testing.T) {
		old := map[int][]byte{1: []byte("https://old.example"), 2: []byte("schedule"), 3: []byte("0123"), 4: []byte("name"), 5: []byte("old/repo"), 6: []byte("refs/heads/old")}
		proof, err := verify(t, v, signer{uri: acmeSigner, fields: everything(), raw: old})
		if err != nil {
			t.Fatal(err)
		}
		if proof.Issuer != github || proof.Fields["source_repo_digest"] != commit || proof.Fields["source_repo_uri"] != "https://github.com/acme/shop" {
			t.Errorf("fields are %v", proof.Fields)
		}
		old[1] = []byte(github)
		proof, err = verify(t, v, signer{uri: acmeSigner, raw: old})
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]string{
			"issuer": github, "build_trigger": "schedule", "source_repo_digest": "0123", "source_repo_ref": "refs/heads/old",
			"source_repo_uri": "https://github.com/old/repo",
		}
		if !maps.Equal(proof.Fields, want) {
			t.Errorf("fields are %v, want %v", proof.Fields, want)
		}
	})
	t.Run("an old repository of another host is not GitHub's", func(t *testing.T) {
		other := acme
		other.Issuer = str("https://gitlab.example")
		v := now(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{other}}))
		proof, err := verify(t, v, signer{uri: acmeSigner, raw: map[int][]byte{1: []byte("https://gitlab.example"), 5: []byte("acme/shop")}})
		if err != nil {
			t.Fatal(err)
		}
		if uri, ok := proof.Fields["source_repo_uri"]; ok {
			t.Errorf("source is %q", uri)
		}
	})
	t.Run("the source is the certificate's, never mixed with the statement's", func(t *testing.T) {
		fields := everything()
		fields[12] = "https://github.com/acme/other"
		delete(fields, 13)
		delete(fields, 14)
		proof, err := verify(t, v, signer{uri: acmeSigner, fields: fields})
		if err != nil {
			t.Fatal(err)
		}
		for _, got := range proof.Selectors().Strings() {
			if strings.HasPrefix(got, "prov:commit:") || strings.HasPrefix(got, "prov:ref:") || got == "prov:source:https://github.com/acme/shop" {
				t.Errorf("got %s", got)
			}
		}
	})
	t.Run("the certificate of a scan says nothing of the image's making", func(t *testing.T) {
		raw := asJSON(s.bundle(t, signer{uri: acmeSigner, fields: everything()}, inToto(vulnsV02, vulns, imageA), true))
		proof, err := v.Verify(t.Context(), raw, about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		want := []string{"sig:issuer:" + github, "sig:policy:ci", "sig:signer:" + acmeSigner}
		if got := proof.Selectors().Strings(); !slices.Equal(got, want) {
			t.Errorf("selectors are %v, want %v", got, want)
		}
	})
	t.Run("an extension that is no UTF8String is refused", func(t *testing.T) {
		_, err := verify(t, v, signer{uri: acmeSigner, fields: map[int]string{8: github}, raw: map[int][]byte{23: []byte("production")}})
		refused(t, err, trust.ErrMalformed)
	})
	t.Run("a job that somebody can log in to is refused, unless the policy names it", func(t *testing.T) {
		fields := everything()
		fields[11] = "ssh-rerun"
		_, err := verify(t, v, signer{uri: acmeSigner, fields: fields})
		refused(t, err, trust.ErrIdentity, "ssh-rerun")
		named := acme
		named.Extensions = where(map[string]string{"runner_environment": "ssh-rerun"})
		if _, err := verify(t, now(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{named}})), signer{uri: acmeSigner, fields: fields}); err != nil {
			t.Error(err)
		}
	})
	t.Run("every form of name is compared", func(t *testing.T) {
		for name, who := range map[string]signer{"dev@acme.example": {email: "dev@acme.example"}, "dev!acme.example": {user: "dev!acme.example"}} {
			who.fields = map[int]string{8: github}
			b := acme
			b.Identity = str(name)
			proof, err := verify(t, now(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{b}})), who)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			} else if proof.Signer != name {
				t.Errorf("signer is %q", proof.Signer)
			}
			_, err = verify(t, v, who)
			refused(t, err, trust.ErrIdentity)
		}
	})
	t.Run("a certificate with two names is refused", func(t *testing.T) {
		_, err := verify(t, v, signer{uri: acmeSigner + " https://github.com/evil/x", fields: everything()})
		refused(t, err, trust.ErrIdentity, "2 subject alternative names")
	})
	t.Run("several sigstore blocks are alternatives", func(t *testing.T) {
		other := acme
		other.Identity = str("https://github.com/acme/other/.github/workflows/x.yml@refs/heads/main")
		v := now(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{other, acme}}))
		if _, err := verify(t, v, signer{uri: acmeSigner, fields: everything()}); err != nil {
			t.Error(err)
		}
	})
	t.Run("a revoked key is refused under a certificate too", func(t *testing.T) {
		cert, leaf := s.certify(t, signer{uri: acmeSigner, fields: everything()})
		_ = cert
		print := goKey(t, leaf, nil).fingerprint
		v := now(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{acme}, RevokedKeys: []string{print}}))
		_, err := verify(t, v, signer{uri: acmeSigner, fields: everything(), pub: leaf})
		refused(t, err, trust.ErrRevoked, print)
	})
	t.Run("a certificate that had expired when it signed is refused", func(t *testing.T) {
		_, err := verify(t, v, signer{uri: acmeSigner, fields: everything(), notBefore: time.Now().Add(-30 * time.Minute)})
		refused(t, err, trust.ErrSignature)
	})
}

func TestTimestampsAlone(t *testing.T) {
	s := newSigstore(t)
	block := trust.SigstoreBlock{TrustedRootPath: s.noLog, Issuer: str(github), Identity: str(acmeSigner)}
	payload := inToto(slsa1, provenanceV1(), imageA)
	who := signer{uri: acmeSigner, fields: everything()}

	t.Run("a root without log is content with a timestamp", func(t *testing.T) {
		proof, err := now(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{block}})).
			Verify(t.Context(), asJSON(s.bundle(t, who, payload, false)), about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		if age := time.Since(proof.VerifiedAt); age < 0 || age > time.Minute {
			t.Errorf("verified at %s", proof.VerifiedAt)
		}
	})
	t.Run("a root with log demands an entry", func(t *testing.T) {
		logged := block
		logged.TrustedRootPath = s.rootFile
		_, err := now(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{logged}})).
			Verify(t.Context(), asJSON(s.bundle(t, who, payload, false)), about(imageA))
		refused(t, err, trust.ErrSignature, "log")
	})
	t.Run("a bundle without any time is refused", func(t *testing.T) {
		b := s.bundle(t, who, payload, false)
		delete(b["verificationMaterial"].(map[string]any), "timestampVerificationData")
		_, err := now(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{block}})).Verify(t.Context(), asJSON(b), about(imageA))
		refused(t, err, trust.ErrSignature, "timestamps")
	})
	t.Run("a signature over a bare digest is a signature and no provenance", func(t *testing.T) {
		v := now(t, policy(t, trust.PolicyBlock{PredicateTypes: []string{"signature"}, Sigstore: []trust.SigstoreBlock{block}}))
		raw := asJSON(s.digestBundle(t, who, imageA))
		proof, err := v.Verify(t.Context(), raw, about(imageB, imageA))
		if err != nil {
			t.Fatal(err)
		}
		if proof.PredicateType != trust.SignaturePredicate || proof.Body != nil || !slices.Equal(proof.Matched, []string{imageA}) {
			t.Errorf("proof is %+v", proof)
		}
		if got, want := proof.Selectors().Strings(), []string{"sig:issuer:" + github, "sig:policy:ci", "sig:signer:" + acmeSigner}; !slices.Equal(got, want) {
			t.Errorf("selectors are %v, want %v", got, want)
		}
		_, err = v.Verify(t.Context(), raw, about(imageB))
		refused(t, err, trust.ErrDigest)
		_, err = now(t, policy(t, trust.PolicyBlock{Sigstore: []trust.SigstoreBlock{block}})).Verify(t.Context(), raw, about(imageA))
		refused(t, err, trust.ErrPredicate)
		swapped := bytes.Replace(raw, []byte(base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xaa}, 32))), []byte(base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xbb}, 32))), 1)
		_, err = v.Verify(t.Context(), swapped, about(imageB))
		refused(t, err, trust.ErrSignature)
	})
	t.Run("a policy can take signatures for provenance", func(t *testing.T) {
		v := now(t, policy(t, trust.PolicyBlock{PredicateTypes: []string{"signature"}, ProvenanceTypes: []string{"signature"}, Sigstore: []trust.SigstoreBlock{block}}))
		proof, err := v.Verify(t.Context(), asJSON(s.digestBundle(t, who, imageA)), about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		if got := proof.Selectors().Strings(); !slices.Contains(got, "prov:commit:"+commit) || !slices.Contains(got, "prov:policy:ci") {
			t.Errorf("selectors are %v", got)
		}
	})
}

// TestBundleByKey: cosign wraps the signatures of its keys in bundles too.
func TestBundleByKey(t *testing.T) {
	k := ecKey(t)
	payload := inToto(vulnsV02, vulns, imageA)
	raw := fmt.Appendf(nil, `{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"publicKey":{"hint":"x"}},"dsseEnvelope":%s}`, dsse(payload, k.sign))
	v := verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem, ValidUntil: received.Add(time.Hour).Format(time.RFC3339)}}}))
	proof, err := v.Verify(t.Context(), raw, about(imageA))
	if err != nil {
		t.Fatal(err)
	}
	if proof.Kind != trust.Bundle || proof.Signer != k.fingerprint || !bytes.Equal(proof.Body, payload) {
		t.Errorf("proof is %+v", proof)
	}
	_, err = v.VerifyAt(t.Context(), raw, about(imageA), received.Add(2*time.Hour))
	refused(t, err, trust.ErrWindow)
	_, err = v.Verify(t.Context(), raw, about(imageB))
	refused(t, err, trust.ErrDigest)
	_, err = verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: ecKey(t).pem}}})).Verify(t.Context(), raw, about(imageA))
	refused(t, err, trust.ErrSignature)
	digest := []byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"publicKey":{"hint":"x"}},"messageSignature":{"messageDigest":{"algorithm":"SHA2_256","digest":"` +
		base64.StdEncoding.EncodeToString(make([]byte, 32)) + `"},"signature":"eA=="}}`)
	_, err = v.Verify(t.Context(), digest, about("sha256:"+strings.Repeat("0", 64)))
	refused(t, err, trust.ErrMalformed, "bare digest")
}
