package trust_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclparse"

	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/verdict/trust"
)

type file struct {
	Policies []trust.PolicyBlock `hcl:"trust_policy,block"`
	Sources  []trust.SourceBlock `hcl:"evidence_source,block"`
}

// parse reads HCL as conf does; DIR in it is dir.
func parse(t *testing.T, dir, text string) file {
	t.Helper()
	parsed, diags := hclparse.NewParser().ParseHCL([]byte(strings.ReplaceAll(text, "DIR", dir)), "server.hcl")
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	var f file
	if diags := gohcl.DecodeBody(parsed.Body, nil, &f); diags.HasErrors() {
		t.Fatal(diags)
	}
	return f
}

func put(t testing.TB, path string, text []byte) {
	t.Helper()
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestBlocks(t *testing.T) {
	dir := t.TempDir()
	k, other := ecKey(t), ecKey(t)
	put(t, filepath.Join(dir, "both.pem"), []byte(k.pem+other.pem))
	s := newSigstore(t)
	root, err := os.ReadFile(s.rootFile)
	if err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "root.json"), root)
	put(t, filepath.Join(dir, "jwks.json"), []byte(`{"keys":[{"kty":"EC","crv":"P-256","kid":"1","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}`))

	t.Run("the language of the documentation compiles", func(t *testing.T) {
		f := parse(t, dir, `
trust_policy "ci" {
  predicate_types = ["provenance", "scan", "https://acme.example/build/v1"]
  provenance_types = ["provenance", "https://acme.example/build/v1"]
  builders        = ["https://github.com/actions/runner", "^https://github\\.com/acme/.*$"]
  repositories    = ["registry.example/shop", "registry.example:5000/team/**"]
  revoked_keys    = ["sha256:`+strings.Repeat("0", 64)+`"]

  key {
    path        = "DIR/both.pem"
    valid_from  = "2026-01-01T00:00:00Z"
    valid_until = "2027-01-01T00:00:00Z"
  }
  sigstore {
    trusted_root_path = "DIR/root.json"
    issuer            = "https://token.actions.githubusercontent.com"
    identity          = ["https://github.com/acme/shop/.github/workflows/build.yml@refs/heads/main", "^https://github\\.com/acme/.+$"]
    min_log_entries   = 1
    min_timestamps    = 2
    extensions {
      source_repo_uri      = "^https://github\\.com/acme/[a-z]+$"
      source_repo_owner_id = 71096353
      runner_environment   = "github-hosted"
      build_signer_uri     = ["a", "b"]
    }
  }
  map {
    component = "predicate.buildDefinition.externalParameters.component"
    tier      = "predicate.labels[\"org.example/tier\"]"
  }
}
evidence_source "github" {
  repositories   = ["registry.example/shop"]
  allow_unsigned = true
  oidc {
    issuer     = "https://token.actions.githubusercontent.com"
    audience   = "https://assay.example"
    algorithms = ["RS256", "ES256"]
    claims     = { "oidc.example/project-id" = ["1", 2] }
    conditions {
      repository_owner_id = 71096353
      ref                 = ["refs/heads/main", "^refs/tags/v[0-9.]+$"]
    }
  }
  oidc {
    issuer    = "https://ci.example"
    audience  = ["a", "b"]
    jwks_path = "DIR/jwks.json"
    conditions {
      sub = "^build-[0-9]+$"
    }
  }
  svid {
    ids = ["spiffe://example.org/ci/scanner", "spiffe://example.org/ci/*", "spiffe://example.org/**"]
  }
}`)
		p, problems := trust.NewPolicy(f.Policies[0])
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		if p.Name() != "ci" {
			t.Errorf("name is %q", p.Name())
		}
		source, problems := trust.NewSource(f.Sources[0])
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		if source.Name() != "github" || !source.AllowUnsigned() || !source.Allows("registry.example/shop") || source.Allows("registry.example/other") {
			t.Errorf("source is %+v", source)
		}
	})

	t.Run("all mistakes of a policy are said at once", func(t *testing.T) {
		f := parse(t, dir, `
trust_policy "a:b" {
  predicate_types  = ["provenanse"]
  provenance_types = ["scan"]
  builders         = "^x"
  repositories     = ["registry.example/shop:latest"]
  revoked_keys     = ["abc"]
  key {
    path = "DIR/missing.pem"
  }
  key {
    path        = "DIR/both.pem"
    valid_from  = "yesterday"
  }
  key {
    path        = "DIR/both.pem"
    pem         = "x"
  }
  key {
    valid_from  = "2027-01-01T00:00:00Z"
    valid_until = "2026-01-01T00:00:00Z"
  }
  sigstore {
    trusted_root_path = "DIR/both.pem"
    issuer            = "^https://.*$"
    identity          = "^.*$"
  }
  sigstore {
    trusted_root_path = "DIR/root.json"
    min_log_entries   = 3
    min_timestamps    = 0
    min_certificate_timestamps = 1
    extensions {
      source_repo_url = "x"
      runner_environment = "github-hosted"
    }
  }
  map {
    component = "buildDefinition.x"
    c--d = "x"
  }
}`)
		_, problems := trust.NewPolicy(f.Policies[0])
		compare(t, problems, []string{
			`name: "a:b" cannot be a policy's name`,
			`predicate_types: "provenanse" is no predicate type`,
			`provenance_types: "https://cosign.sigstore.dev/attestation/vuln/v1" is not among`,
			`provenance_types: "https://in-toto.io/attestation/vulns/v0.1" is not among`,
			`provenance_types: "https://in-toto.io/attestation/vulns/v0.2" is not among`,
			`builders: "^x" begins with ^`,
			`repositories: "registry.example/shop:latest" is no repository`,
			`revoked_keys: "abc" is no fingerprint`,
			`key[1].path: ` + dir + `/missing.pem: no such file`,
			`key[2].valid_from: "yesterday" is no time`,
			`key[3].pem: give either path or pem`,
			`key[4].valid_until: it is not after valid_from`,
			`key[4].path: name the file of a public key`,
			`sigstore[1].issuer: it matches issuers that anybody can run`,
			`sigstore[1].identity: it matches everybody`,
			`sigstore[1].trusted_root_path: ` + dir + `/both.pem: `,
			`sigstore[2].extensions.source_repo_url: there is no such field; there are "build_signer_uri"`,
			`sigstore[2].issuer: name the OIDC issuer`,
			`sigstore[2].identity: name the workflow or person`,
			`sigstore[2].min_log_entries: 3 can never be reached`,
			`sigstore[2].min_timestamps: 0 is too few`,
			`sigstore[2].min_certificate_timestamps: 1 can never be reached`,
			`map.c--d: "x" is no path`,
			`map.component: "buildDefinition.x" is no path`,
		})
	})

	t.Run("an empty policy says what it needs", func(t *testing.T) {
		f := parse(t, dir, `trust_policy "p" {}`)
		_, problems := trust.NewPolicy(f.Policies[0])
		compare(t, problems, []string{"predicate_types: say what its signers are trusted with", "key: say who is trusted"})
	})

	t.Run("a root without timestamps needs a log entry", func(t *testing.T) {
		put(t, filepath.Join(dir, "nostamps.json"), []byte(cutMember(t, string(root), "timestampAuthorities")))
		f := parse(t, dir, `
trust_policy "p" {
  predicate_types = ["scan"]
  sigstore {
    trusted_root_path = "DIR/nostamps.json"
    issuer            = "https://ci.example"
    identity          = "x"
    min_log_entries   = 0
  }
}`)
		_, problems := trust.NewPolicy(f.Policies[0])
		compare(t, problems, []string{"sigstore[1].min_log_entries: the trusted root has no timestamp authority"})
	})

	t.Run("a key twice is said", func(t *testing.T) {
		f := parse(t, dir, `
trust_policy "p" {
  predicate_types = ["scan"]
  key {
    path = "DIR/both.pem"
  }
  key {
    path = "DIR/both.pem"
  }
}`)
		_, problems := trust.NewPolicy(f.Policies[0])
		compare(t, problems, []string{"key[2].path: " + dir + "/both.pem: key " + k.fingerprint, "key[2].path: " + dir + "/both.pem: key " + other.fingerprint})
	})

	t.Run("a source that clusters speak for needs nobody who pushes", func(t *testing.T) {
		for block, sound := range map[string]bool{"kubernetes = true": true, "": false} {
			f := parse(t, dir, "evidence_source \"operator\" {\n  repositories = [\"**\"]\n  "+block+"\n}")
			if _, problems := trust.NewSource(f.Sources[0]); (len(problems) == 0) != sound {
				t.Errorf("with %q: %v", block, problems)
			}
		}
	})

	t.Run("all mistakes of a source are said at once", func(t *testing.T) {
		f := parse(t, dir, `
evidence_source "" {
  oidc {
    issuer     = "http://ci.example"
    algorithms = ["none", "HS256"]
    jwks_path  = "DIR/root.json"
    ca_path    = "DIR/both.pem"
  }
  oidc {
    issuer   = "https://token.actions.githubusercontent.com"
    audience = "x"
    ca_path  = "DIR/root.json"
    conditions {
      ref = "refs/heads/main"
    }
  }
  svid {
    ids = ["example.org", "spiffe://example.org", "spiffe://*/ci"]
  }
  svid {}
}`)
		_, problems := trust.NewSource(f.Sources[0])
		compare(t, problems, []string{
			`name: "" cannot be a source's name`,
			`repositories: name the repositories`,
			`oidc[1].issuer: "http://ci.example" is no issuer`,
			`oidc[1].audience: name the audience`,
			`oidc[1].algorithms: "none" is not allowed`,
			`oidc[1].algorithms: "HS256" is not allowed`,
			`oidc[1].jwks_path: ` + dir + `/root.json: `,
			`oidc[1].ca_path: it has no use`,
			`oidc[1].conditions: name at least one claim`,
			`oidc[2].ca_path: ` + dir + `/root.json: there is no PEM certificate`,
			`oidc[2].conditions: anybody can have a token of this issuer`,
			`svid[1].ids: "example.org" is no pattern`,
			`svid[1].ids: "spiffe://example.org" is no pattern`,
			`svid[1].ids: "spiffe://*/ci" is no pattern`,
			`svid[2].ids: name the SPIFFE IDs`,
		})
	})
	t.Run("values that are no texts are said", func(t *testing.T) {
		f := parse(t, dir, `
evidence_source "s" {
  repositories = ["**"]
  oidc {
    issuer   = "https://ci.example"
    audience = []
    claims   = "x"
    conditions {
      a = { b = 1 }
      c = [[1]]
      d = ""
      e = "^($"
      f = null
      g = "^(a|b)$"
    }
  }
}`)
		_, problems := trust.NewSource(f.Sources[0])
		compare(t, problems, []string{
			"oidc[1].audience: an empty list", `oidc[1].conditions.a: write a text or a list`, `oidc[1].conditions.c: the list holds`,
			"oidc[1].conditions.d: an empty text", `oidc[1].conditions.e: "^($" is no regular expression`, "oidc[1].conditions.f: a value is missing",
			`oidc[1].claims: write`,
		})
	})
}

// cutMember empties a list in the JSON of a trusted root.
func cutMember(t *testing.T, text, name string) string {
	t.Helper()
	start := strings.Index(text, `"`+name+`"`)
	if start < 0 {
		t.Fatalf("there is no %s", name)
	}
	open := start + strings.IndexByte(text[start:], '[')
	depth := 0
	for i := open; i < len(text); i++ {
		switch text[i] {
		case '[':
			depth++
		case ']':
			if depth--; depth == 0 {
				return text[:open+1] + text[i:]
			}
		}
	}
	t.Fatal("the list does not end")
	return ""
}

// compare demands these problems, in this order, each beginning so.
func compare(t *testing.T, problems []conf.KeyProblem, want []string) {
	t.Helper()
	got := make([]string, 0, len(problems))
	for i, p := range problems {
		text := p.String()
		if i < len(want) && strings.HasPrefix(text, want[i]) {
			text = want[i]
		}
		if !strings.HasSuffix(p.Text, ".") {
			t.Errorf("%q is no sentence", p.Text)
		}
		got = append(got, text)
	}
	if !slices.Equal(got, want) {
		t.Errorf("problems differ (-want +got):\n%s", cmp.Diff(want, got))
	}
}
