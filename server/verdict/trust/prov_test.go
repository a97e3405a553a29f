package trust_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/zclconf/go-cty/cty"

	"github.com/assay-id/assay/server/verdict/trust"
)

const commit = "dae8bd8eb433a4147b4655c00fe73e0f22bc0fb1"

func provenanceV1() map[string]any {
	return map[string]any{
		"buildDefinition": map[string]any{
			"buildType": "https://actions.github.io/buildtypes/workflow/v1",
			"externalParameters": map[string]any{
				"workflow":  map[string]any{"ref": "refs/heads/main", "repository": "https://github.com/acme/shop", "path": ".github/workflows/build.yml"},
				"component": "mongo",
				"tier":      1,
				"big":       float64(1 << 60),
				"teams":     []string{"red", "blue"},
				"a.b":       true,
				"nested":    map[string]any{"x": 1},
				"esc":       "a\x1bb",
			},
			"resolvedDependencies": []any{map[string]any{"uri": "git+https://github.com/acme/shop@refs/heads/main", "digest": map[string]any{"gitCommit": commit}}},
		},
		"runDetails": map[string]any{"builder": map[string]any{"id": "https://builder.example/v1"}, "metadata": map[string]any{"invocationId": "1"}},
	}
}

func TestProvenance(t *testing.T) {
	k := ecKey(t)
	doc := dsse(inToto(slsa1, provenanceV1(), imageA), k.sign)
	const ext = "predicate.buildDefinition.externalParameters"

	t.Run("a key's signature yields what the statement says", func(t *testing.T) {
		v := verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}, Map: &trust.MapBlock{Paths: map[string]string{
			"component": ext + ".component", "tier": ext + ".tier", "team": ext + ".teams", "ab": ext + `["a.b"]`,
			"first": ext + ".teams[0]", "dep": "predicate.buildDefinition.resolvedDependencies.0.uri",
			"nested": ext + ".nested", "absent": ext + ".nowhere.at.all", "esc": ext + ".esc", "beyond": ext + ".teams[9]",
		}}}))
		proof, err := v.Verify(t.Context(), doc, about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		want := []string{
			"prov:builder:https://builder.example/v1", "prov:commit:" + commit, "prov:component:mongo", "prov:policy:ci",
			"prov:pred.ab:true", "prov:pred.dep:git+https://github.com/acme/shop@refs/heads/main", "prov:pred.first:red",
			"prov:pred.team:blue", "prov:pred.team:red", "prov:pred.tier:1",
			"prov:ref:refs/heads/main", "prov:source:https://github.com/acme/shop", "prov:type:slsa-v1",
			"sig:policy:ci", "sig:signer:" + k.fingerprint,
		}
		if got := proof.Selectors().Strings(); !slices.Equal(got, want) {
			t.Errorf("selectors are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	})
	t.Run("a policy for scans gives no provenance, whatever is signed", func(t *testing.T) {
		v := verifier(t,
			policy(t, trust.PolicyBlock{Name: "scans", PredicateTypes: []string{"scan"}, Keys: []trust.KeyBlock{{PEM: k.pem}}}),
			policy(t, trust.PolicyBlock{Name: "any", PredicateTypes: []string{"scan", "provenance"}, ProvenanceTypes: []string{}, Keys: []trust.KeyBlock{{PEM: k.pem}}}))
		proof, err := v.Verify(t.Context(), doc, about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := proof.Selectors().Strings(), []string{"sig:policy:any", "sig:signer:" + k.fingerprint}; !slices.Equal(got, want) {
			t.Errorf("selectors are %v, want %v", got, want)
		}
	})
	t.Run("a scan gives no provenance", func(t *testing.T) {
		v := verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}, Map: &trust.MapBlock{Paths: map[string]string{"uri": "predicate.scanner.uri"}}}))
		proof, err := v.Verify(t.Context(), dsse(inToto(vulnsV02, vulns, imageA), k.sign), about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range proof.Selectors().All() {
			if s.Type != "sig" {
				t.Errorf("got %s", s)
			}
		}
	})
	t.Run("a type of one's own can say how an image was made", func(t *testing.T) {
		const own = "https://acme.example/build/v1"
		v := verifier(t, policy(t, trust.PolicyBlock{
			PredicateTypes: []string{own}, ProvenanceTypes: []string{own}, Keys: []trust.KeyBlock{{PEM: k.pem}},
			Map: &trust.MapBlock{Paths: map[string]string{"component": "predicate.kind"}},
		}))
		proof, err := v.Verify(t.Context(), dsse(inToto(own, map[string]any{"kind": "redis"}, imageA), k.sign), about(imageA))
		if err != nil {
			t.Fatal(err)
		}
		got := proof.Selectors().Strings()
		want := []string{"prov:component:redis", "prov:policy:ci", "sig:policy:ci", "sig:signer:" + k.fingerprint}
		if !slices.Equal(got, want) {
			t.Errorf("selectors are %v, want %v", got, want)
		}
	})
	t.Run("a builder that is not named is refused", func(t *testing.T) {
		v := verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}, Builders: cty.StringVal("https://builder.example/v2")}))
		_, err := v.Verify(t.Context(), doc, about(imageA))
		refused(t, err, trust.ErrIdentity, "https://builder.example/v1", "https://builder.example/v2")
		v = verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}, Builders: cty.StringVal("^https://builder\\.example/v[12]$")}))
		if _, err := v.Verify(t.Context(), doc, about(imageA)); err != nil {
			t.Error(err)
		}
	})
	t.Run("a regular expression is about the whole value, however it is written", func(t *testing.T) {
		v := verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}, Builders: cty.StringVal("^https://builder|example/v1$")}))
		_, err := v.Verify(t.Context(), doc, about(imageA))
		refused(t, err, trust.ErrIdentity)
	})
	t.Run("provenance that cannot be read is refused", func(t *testing.T) {
		v := verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}}))
		_, err := v.Verify(t.Context(), dsse(inToto(slsa1, map[string]any{"buildDefinition": 1}, imageA), k.sign), about(imageA))
		refused(t, err, trust.ErrMalformed, "provenance")
	})
	t.Run("a value that was cut or changed for printing is left out", func(t *testing.T) {
		v := verifier(t, policy(t, trust.PolicyBlock{Keys: []trust.KeyBlock{{PEM: k.pem}}}))
		for _, id := range []string{"https://builder.example/" + strings.Repeat("a", 2000), "https://builder.example/\x07v1"} {
			p := provenanceV1()
			p["runDetails"] = map[string]any{"builder": map[string]any{"id": id}}
			proof, err := v.Verify(t.Context(), dsse(inToto(slsa1, p, imageA), k.sign), about(imageA))
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range proof.Selectors().Strings() {
				if strings.HasPrefix(s, "prov:builder:") {
					t.Errorf("got %.80q", s)
				}
			}
		}
	})
}
