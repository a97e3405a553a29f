package roles

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/workloadapi/identity"
)

func decode(t *testing.T, text string) ([]*Holder, error) {
	t.Helper()
	named, err := conf.DecodeNamed("server.hcl", []byte(text), []conf.NamedKind{Kind()})
	return conf.NamedOf[*Holder](named, BlockType), err
}

func must(t *testing.T, text string) *Set {
	t.Helper()
	holders, err := decode(t, text)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSet(holders, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func names(roles []*caller.Role) string {
	var all []string
	for _, r := range roles {
		all = append(all, r.Name)
	}
	return strings.Join(all, " ")
}

func TestBlocks(t *testing.T) {
	for name, c := range map[string]struct{ block, want string }{
		"a role that may do nothing":       {`svid { ids = ["spiffe://example.org/a"] }`, "verbs: say what it may do: agent:read,"},
		"an unknown verb":                  {"verbs = [\"entry:eat\"]\n unix { uids = [1] }", `verbs: "entry:eat" is unknown`},
		"a role of nobody":                 {`verbs = ["*"]`, "svid: say who has it"},
		"a path without its slash":         {"verbs = [\"*\"]\n paths = [\"shop\"]\n unix { uids = [1] }", `paths: "shop" is no prefix of a path`},
		"a selector that is none":          {"verbs = [\"*\"]\n selectors = [\"x\"]\n unix { uids = [1] }", `selectors: "x"`},
		"a DNS name with a star in it":     {"verbs = [\"*\"]\n dns_names = [\"a.*.b\"]\n unix { uids = [1] }", `dns_names: "a.*.b" is no DNS name`},
		"a user whom nobody knows":         {"verbs = [\"*\"]\n unix { users = [\"nobody-of-that-name\"] }", `unix: there is no user "nobody-of-that-name" here`},
		"a unix block without anybody":     {"verbs = [\"*\"]\n unix {}", "unix: it names nobody"},
		"the user ID that is nobody's":     {"verbs = [\"*\"]\n unix { uids = [4294967295] }", "4294967295 is no number"},
		"a token rule for everybody":       {"verbs = [\"*\"]\n oidc {\n issuer = \"https://a.test\"\n audience = \"b\"\n }", "name at least one claim"},
		"an unknown key":                   {`verb = ["*"]`, `An argument named "verb" is not expected here`},
		"a pattern that is no SPIFFE ID's": {"verbs = [\"*\"]\n svid { ids = [\"*\"] }", "is no pattern for SPIFFE IDs"},
	} {
		t.Run(name+" is refused, with its place", func(t *testing.T) {
			_, err := decode(t, "role \"r\" {\n"+c.block+"\n}\n")
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "server.hcl:") {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// The sample's block, without the signs of comment.
func TestTheSampleIsARole(t *testing.T) {
	text, err := os.ReadFile("../../../conf/server.hcl")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), "#role \"shop-registrar\" {\n")
	block, _, _ := strings.Cut(rest, "\n#}\n")
	if !found {
		t.Fatal("there is none")
	}
	var lines []string
	for line := range strings.Lines(block) {
		if plain := strings.TrimSpace(line); !strings.HasPrefix(plain, "# ") {
			lines = append(lines, strings.Replace(line, "#", "", 1))
		}
	}
	holders, err := decode(t, "role \"shop-registrar\" {\n"+strings.Join(lines, "")+"\n}\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range caller.Verbs() {
		if !strings.Contains(block, `"`+verb+`"`) {
			t.Errorf("the sample does not name the verb %q", verb)
		}
	}
	if len(holders) != 1 || !slices.Equal(holders[0].role.Paths, []string{"/shop"}) || len(holders[0].uids) != 2 {
		t.Errorf("it is %+v", holders)
	}
}

func TestScope(t *testing.T) {
	r := &caller.Role{
		Paths: []string{"/shop", "/till/"}, Parents: []string{"/node"}, DNSNames: []string{"*.shop.test", "shop.test"},
		Selectors: []attestor.Selector{{Type: "k8s", Value: "ns:shop"}},
	}
	entry := func(change func(e *identity.Entry)) *identity.Entry {
		e := &identity.Entry{
			SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/shop/a"), ParentID: spiffeid.RequireFromString("spiffe://example.org/node/1"),
			Selectors: attestor.NewSet(attestor.Selector{Type: "k8s", Value: "ns:shop"}, attestor.Selector{Type: "k8s", Value: "sa:a"}),
		}
		change(e)
		return e
	}
	id := func(path string) spiffeid.ID { return spiffeid.RequireFromString("spiffe://example.org" + path) }
	for name, c := range map[string]struct {
		change func(e *identity.Entry)
		want   bool
	}{
		"an entry below the path":              {func(*identity.Entry) {}, true},
		"one of the path itself":               {func(e *identity.Entry) { e.SPIFFEID = id("/shop") }, true},
		"one of a path that ends with a slash": {func(e *identity.Entry) { e.SPIFFEID = id("/till/1") }, true},
		"one that only begins alike":           {func(e *identity.Entry) { e.SPIFFEID = id("/shopping") }, false},
		"one of another path":                  {func(e *identity.Entry) { e.SPIFFEID = id("/bank") }, false},
		"one of the trust domain itself":       {func(e *identity.Entry) { e.SPIFFEID = spiffeid.RequireFromString("spiffe://example.org") }, false},
		"one with another parent":              {func(e *identity.Entry) { e.ParentID = id("/spire/server") }, false},
		"one without the selector": {func(e *identity.Entry) {
			e.Selectors = attestor.NewSet(attestor.Selector{Type: "k8s", Value: "ns:bank"})
		}, false},
		"one that makes an administrator":             {func(e *identity.Entry) { e.Admin = true }, false},
		"one that makes a server":                     {func(e *identity.Entry) { e.Downstream = true }, false},
		"one with a DNS name of the role's":           {func(e *identity.Entry) { e.DNSNames = []string{"a.shop.test", "SHOP.test"} }, true},
		"one with a name two parts below":             {func(e *identity.Entry) { e.DNSNames = []string{"a.b.shop.test"} }, false},
		"one with a wildcard name":                    {func(e *identity.Entry) { e.DNSNames = []string{"*.shop.test"} }, false},
		"one with a name of the role's and a foreign": {func(e *identity.Entry) { e.DNSNames = []string{"shop.test", "bank.test"} }, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := r.Entry(entry(c.change)); got != c.want {
				t.Errorf("it is within: %v", got)
			}
		})
	}
	t.Run("a role without paths reaches nothing", func(t *testing.T) {
		if (&caller.Role{}).Entry(entry(func(e *identity.Entry) {})) {
			t.Error("it does")
		}
	})
}

func TestWhoHasARole(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	keys := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(keys, set, 0o600); err != nil {
		t.Fatal(err)
	}
	s := must(t, `
role "shop" {
  verbs = ["entry:read"]
  svid { ids = ["spiffe://example.org/team/shop/*"] }
  oidc {
    issuer    = "https://login.test"
    audience  = "assay"
    jwks_path = "`+keys+`"
    claims    = { "email" = "ann@shop.test" }
  }
}
role "local" {
  verbs = ["*"]
  unix { uids = [77, 4711] }
}
role "group" {
  verbs = ["agent:read"]
  unix { gids = [4712] }
}
`)
	t.Run("by SVID", func(t *testing.T) {
		for id, want := range map[string]string{"spiffe://example.org/team/shop/ann": "shop", "spiffe://example.org/team/bank/bob": "", "spiffe://example.org/team/shop/a/b": "", "spiffe://other.test/team/shop/ann": ""} {
			if got := names(s.SVID(spiffeid.RequireFromString(id))); got != want {
				t.Errorf("%s has %q, want %q", id, got, want)
			}
		}
	})
	t.Run("by Unix user and group", func(t *testing.T) {
		for _, c := range []struct {
			uid, gid uint32
			want     string
		}{{77, 1, "local"}, {78, 4712, "group"}, {4711, 4712, "local group"}, {79, 1, ""}} {
			got, governed := s.Unix(c.uid, c.gid)
			if names(got) != c.want || !governed {
				t.Errorf("%d:%d has %q, governed %v, want %q", c.uid, c.gid, names(got), governed, c.want)
			}
		}
	})
	token := func(change func(claims map[string]any)) string {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		claims := map[string]any{"iss": "https://login.test", "aud": "assay", "sub": "ann", "email": "ann@shop.test", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix()}
		change(claims)
		text, err := jwt.Signed(signer).Claims(claims).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	for name, c := range map[string]struct {
		change func(claims map[string]any)
		want   string
	}{
		"by a token":                        {func(map[string]any) {}, "shop"},
		"not by one of somebody else":       {func(c map[string]any) { c["email"] = "bob@bank.test" }, ""},
		"not by one for another audience":   {func(c map[string]any) { c["aud"] = "cloud" }, ""},
		"not by one that has expired":       {func(c map[string]any) { c["exp"] = time.Now().Add(-time.Hour).Unix() }, ""},
		"not by one of an unknown issuer":   {func(c map[string]any) { c["iss"] = "https://else.test" }, ""},
		"not by one without an expiry time": {func(c map[string]any) { delete(c, "exp") }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			who, roles, err := s.Token(t.Context(), token(c.change))
			if names(roles) != c.want || (c.want == "") != (err != nil) || c.want != "" && who != "https://login.test ann" {
				t.Errorf("%q has %q, error %v", who, names(roles), err)
			}
			if err != nil && strings.Contains(err.Error(), "evidence") {
				t.Errorf("the error of a role's token speaks of evidence: %v", err)
			}
		})
	}
	t.Run("nobody any more, once the roles are replaced", func(t *testing.T) {
		s.Replace(nil)
		if _, governed := s.Unix(4711, 1); governed || len(s.SVID(spiffeid.RequireFromString("spiffe://example.org/team/shop/ann"))) > 0 {
			t.Error("somebody has one")
		}
	})
}
