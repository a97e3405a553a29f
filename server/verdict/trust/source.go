package trust

import (
	"crypto/x509"
	"fmt"
	"net/url"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/zclconf/go-cty/cty"

	"github.com/assay-id/assay/conf"
)

// SourceBlock is evidence_source "name" { … } as it stands in the file: who may push evidence, for which
// repositories. The tags are gohcl's.
type SourceBlock struct {
	Name          string   `hcl:"name,label"`
	Repositories  []string `hcl:"repositories,optional"`
	AllowUnsigned bool     `hcl:"allow_unsigned,optional"`
	// Kubernetes says that what comes from it is what clusters report (vulnerability_reports): without oidc and
	// svid nobody else may push.
	Kubernetes bool        `hcl:"kubernetes,optional"`
	OIDC       []OIDCBlock `hcl:"oidc,block"`
	SVID       []SVIDBlock `hcl:"svid,block"`
}

// OIDCBlock is oidc { … }: the tokens of a CI system. Keys come from jwks_path or, without it, from the
// issuer's discovery document. Conditions are on claims; claims = { "a/b" = … } is for those whose name
// cannot be a key in the file.
type OIDCBlock struct {
	Issuer     string           `hcl:"issuer,optional"`
	Audience   cty.Value        `hcl:"audience,optional"`
	JWKSPath   string           `hcl:"jwks_path,optional"`
	CAPath     string           `hcl:"ca_path,optional"`
	Algorithms []string         `hcl:"algorithms,optional"`
	Claims     cty.Value        `hcl:"claims,optional"`
	Conditions *ConditionsBlock `hcl:"conditions,block"`
}

// SVIDBlock is svid { … }: SPIFFE IDs that may push with their X.509-SVID. A pattern is an ID, or one that
// ends with /* for one more part of the path or /** for any number.
type SVIDBlock struct {
	IDs []string `hcl:"ids,optional"`
}

// Source is somebody who may push evidence. It does not change.
type Source struct {
	name          string
	scope         scope
	allowUnsigned bool
	tokens        []*tokenRule
	ids           []string
}

// Name returns the source's name.
func (s *Source) Name() string { return s.name }

// AllowUnsigned says that bare documents from this source may count.
func (s *Source) AllowUnsigned() bool { return s.allowUnsigned }

// Allows reports whether the source may push evidence for the repository (without tag and digest).
func (s *Source) Allows(repository string) bool { return s.scope.has(repository) }

// tokenRule is an oidc block.
type tokenRule struct {
	issuer     string
	audiences  map[string]bool
	algorithms []jose.SignatureAlgorithm
	keys       []jose.JSONWebKey // of jwks_path; nil to discover them
	roots      *x509.CertPool    // nil for the system's
	where      conditions
}

// signingAlgorithms are those that a token may be signed with. HMAC is not among them, for whoever can
// verify it can forge it, and "none" is no signature.
var signingAlgorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

const maxRules = 32

// NewSource checks a block, reads the files it names and returns the source, or every problem found.
func NewSource(b SourceBlock) (*Source, []conf.KeyProblem) {
	c := &complaints{}
	s := &Source{name: b.Name, scope: b.Repositories, allowUnsigned: b.AllowUnsigned}
	if !nameForm.MatchString(b.Name) {
		c.say("name", "%q cannot be a source's name: %s.", clip(b.Name), nameRule)
	}
	if len(b.Repositories) == 0 {
		c.say("repositories", "name the repositories it may push evidence for, as registry/name, registry/team/* or registry/team/**; ** is all.")
	} else if err := checkScope(b.Repositories); err != nil {
		c.say("repositories", "%s.", err)
	}
	for i, o := range b.OIDC {
		c.in("oidc", i+1, func() { s.tokens = append(s.tokens, c.tokens(o)) })
	}
	for i, v := range b.SVID {
		c.in("svid", i+1, func() { s.ids = append(s.ids, c.ids(v.IDs)...) })
	}
	switch {
	case len(b.OIDC)+len(b.SVID) == 0 && !b.Kubernetes:
		c.say("oidc", "say who may push: oidc { issuer = …, audience = … } for tokens of a CI system, svid { ids = … }, or kubernetes = true for what a cluster's vulnerability_reports say.")
	case len(b.OIDC) > maxRules || len(b.SVID) > maxRules:
		c.say("oidc", "there are more than %d blocks.", maxRules)
	}
	if len(c.problems) > 0 {
		return nil, c.problems
	}
	return s, nil
}

func (c *complaints) tokens(b OIDCBlock) *tokenRule {
	r := &tokenRule{issuer: b.Issuer, audiences: map[string]bool{}}
	if err := checkIssuer(b.Issuer); err != nil {
		c.say("issuer", "%s.", err)
	}
	if b.Audience == cty.NilVal {
		c.say("audience", "name the audience that tokens are made for, so that one made for another service does not count here.")
	} else if list, err := texts(b.Audience); err != nil {
		c.say("audience", "%s.", err)
	} else {
		for _, a := range list {
			if a == "" {
				c.say("audience", "an empty text is no audience.")
			}
			r.audiences[a] = true
		}
	}
	c.algorithms(r, b.Algorithms)
	c.keySet(r, b)
	said := len(c.problems)
	if b.Conditions != nil {
		c.in("conditions", 0, func() { r.where = c.conditions(b.Conditions.Conditions, nil) })
	}
	if b.Claims != cty.NilVal {
		c.in("claims", 0, func() { r.where = append(r.where, c.claims(b.Claims)...) })
	}
	if len(c.problems) == said { // else the one that was meant may be among those
		c.anchored(r)
	}
	return r
}

// sharedIssuers make tokens for everybody who has an account, so that only some claims say whose a token
// is: a ref, for example, anybody can have.
var sharedIssuers = map[string][]string{
	githubIssuer: {
		"sub", "repository_owner_id", "repository_id", "repository", "repository_owner", "job_workflow_ref", "workflow_ref", "enterprise_id", "enterprise",
	},
	"https://gitlab.com": {"sub", "namespace_id", "project_id", "project_path", "namespace_path", "ci_config_ref_uri"},
}

// anchored complains if the conditions let strangers in.
func (c *complaints) anchored(r *tokenRule) {
	names, shared := sharedIssuers[r.issuer]
	for _, w := range r.where {
		if (!shared || slices.Contains(names, w.field)) && !w.is.anybody() {
			return
		}
	}
	if shared {
		c.say("conditions", "anybody can have a token of this issuer; name what %s must be.", orList(names))
		return
	}
	c.say("conditions", "name at least one claim and what it must be, so that not every token of the issuer counts.")
}

// checkIssuer says what is wrong with an issuer (OpenID Connect Core section 2, iss).
func checkIssuer(issuer string) error {
	u, err := url.Parse(issuer)
	switch {
	case issuer == "":
		return fmt.Errorf("name the issuer of the tokens, for example \"https://token.actions.githubusercontent.com\"")
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" || len(issuer) > maxPattern:
		return fmt.Errorf("%q is no issuer: write an https URL without user, query and fragment", clip(issuer))
	}
	return nil
}

func (c *complaints) algorithms(r *tokenRule, given []string) {
	r.algorithms = signingAlgorithms
	if len(given) == 0 {
		return
	}
	r.algorithms = nil
	for _, a := range given {
		if !slices.Contains(signingAlgorithms, jose.SignatureAlgorithm(a)) {
			words := make([]string, len(signingAlgorithms))
			for i, s := range signingAlgorithms {
				words[i] = string(s)
			}
			c.say("algorithms", "%q is not allowed; there are %s.", clip(a), orList(words))
			continue
		}
		r.algorithms = append(r.algorithms, jose.SignatureAlgorithm(a))
	}
}

func (c *complaints) keySet(r *tokenRule, b OIDCBlock) {
	if b.JWKSPath != "" {
		file, err := readFile(b.JWKSPath, maxFetched)
		if err == nil {
			r.keys, err = parseKeySet(file)
			if err != nil {
				err = fmt.Errorf("%s: %w", b.JWKSPath, err)
			}
		}
		if err != nil {
			c.say("jwks_path", "%s.", err)
		}
		if b.CAPath != "" {
			c.say("ca_path", "it has no use beside jwks_path: nothing is fetched.")
		}
		return
	}
	if b.CAPath == "" {
		return
	}
	file, err := readFile(b.CAPath, maxFetched)
	if err != nil {
		c.say("ca_path", "%s.", err)
		return
	}
	r.roots = x509.NewCertPool()
	if !r.roots.AppendCertsFromPEM(file) {
		c.say("ca_path", "%s: there is no PEM certificate in it.", b.CAPath)
	}
}

// claims reads claims = { "name" = value }: of any issuer, whose groups and roles are lists. Those that have a key of
// their own are of CI systems, who make none.
func (c *complaints) claims(v cty.Value) conditions {
	if t := v.Type(); v.IsNull() || !t.IsObjectType() && !t.IsMapType() {
		c.say("", "write { \"claim\" = value }.")
		return nil
	}
	all := c.conditions(v.AsValueMap(), nil)
	for i := range all {
		all[i].among = true
	}
	return all
}

func (c *complaints) ids(patterns []string) []string {
	if len(patterns) == 0 {
		c.say("ids", "name the SPIFFE IDs that may push, as spiffe://example.org/ci/* or in full.")
	}
	for _, p := range patterns {
		base, _, _ := cutStars(p)
		if id, err := spiffeid.FromString(base); err != nil || base == p && id.Path() == "" {
			c.say("ids", "%q is no pattern for SPIFFE IDs: write spiffe://example.org/ci/scanner, spiffe://example.org/ci/* for one more part, or spiffe://example.org/ci/** for any number.", clip(p))
		}
	}
	return patterns
}
