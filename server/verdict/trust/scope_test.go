package trust_test

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/verdict/trust"
)

func TestSVID(t *testing.T) {
	make := func(name string, ids ...string) *trust.Source {
		s, problems := trust.NewSource(trust.SourceBlock{Name: name, Repositories: []string{"**"}, SVID: []trust.SVIDBlock{{IDs: ids}}})
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		return s
	}
	c := callers(t, newClock(), make("one", "spiffe://example.org/ci/scanner"), make("level", "spiffe://example.org/ci/*"), make("tree", "spiffe://example.org/ci/**"))
	for id, want := range map[string]string{
		"spiffe://example.org/ci/scanner":     "level one tree",
		"spiffe://example.org/ci/builder":     "level tree",
		"spiffe://example.org/ci/a/b":         "tree",
		"spiffe://example.org/ci":             "",
		"spiffe://example.org/cia/scanner":    "",
		"spiffe://example.com/ci/scanner":     "",
		"spiffe://example.org/x/ci/scanner":   "",
		"spiffe://example.org/ci/scanner/..x": "tree",
	} {
		t.Run(id, func(t *testing.T) {
			p, err := c.SVID(spiffeid.RequireFromString(id))
			if want == "" {
				refused(t, err, trust.ErrIdentity, id)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, s := range p.For("any/where") {
				names = append(names, s.Name())
			}
			if strings.Join(names, " ") != want || p.Kind != "svid" || p.Subject != id {
				t.Errorf("sources are %v, want %s", names, want)
			}
		})
	}
}

func TestScopes(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"registry.example/shop", "registry.example/shop", true},
		{"registry.example/shop", "registry.example/shop/web", false},
		{"registry.example/shop", "registry.example/shop2", false},
		{"registry.example/*", "registry.example/shop", true},
		{"registry.example/*", "registry.example/shop/web", false},
		{"registry.example/*", "registry.example", false},
		{"registry.example/**", "registry.example/shop/web", true},
		{"registry.example/**", "registry.example.evil/shop", false},
		{"registry.example:5000/**", "registry.example:5000/shop", true},
		{"**", "anything/at/all", true},
		{"**", "", false},
	} {
		s, problems := trust.NewSource(trust.SourceBlock{Name: "s", Repositories: []string{c.pattern}, SVID: []trust.SVIDBlock{{IDs: []string{"spiffe://a.example/b"}}}})
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		if got := s.Allows(c.name); got != c.want {
			t.Errorf("%s allows %q: %v", c.pattern, c.name, got)
		}
	}
	for _, bad := range []string{"", "*", "a/*/b", "/a", "a/", "a//b", "https://a/b", "a/b:tag", "b:tag", "a@sha256:x", "a b"} {
		_, problems := trust.NewSource(trust.SourceBlock{Name: "s", Repositories: []string{bad}, SVID: []trust.SVIDBlock{{IDs: []string{"spiffe://a.example/b"}}}})
		if len(problems) != 1 {
			t.Errorf("%q: problems are %v", bad, problems)
		}
	}
}
