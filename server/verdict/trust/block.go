package trust

import (
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/zclconf/go-cty/cty"

	"github.com/assay-id/assay/conf"
)

// PolicyBlock is trust_policy "name" { … } as it stands in the file. The tags are gohcl's.
type PolicyBlock struct {
	Name            string          `hcl:"name,label"`
	PredicateTypes  []string        `hcl:"predicate_types,optional"`
	ProvenanceTypes []string        `hcl:"provenance_types,optional"`
	Builders        cty.Value       `hcl:"builders,optional"`
	Repositories    []string        `hcl:"repositories,optional"`
	RevokedKeys     []string        `hcl:"revoked_keys,optional"`
	Keys            []KeyBlock      `hcl:"key,block"`
	Sigstore        []SigstoreBlock `hcl:"sigstore,block"`
	Map             *MapBlock       `hcl:"map,block"`
}

// KeyBlock is key { … }: one or several PEM public keys, by path or in place, and when they are used.
type KeyBlock struct {
	Path       string `hcl:"path,optional"`
	PEM        string `hcl:"pem,optional"`
	ValidFrom  string `hcl:"valid_from,optional"`
	ValidUntil string `hcl:"valid_until,optional"`
}

// SigstoreBlock is sigstore { … }: a trusted root and who may sign under it. Issuer and Identity are a
// text, a list of texts, or regular expressions from ^ to $.
type SigstoreBlock struct {
	TrustedRootPath          string           `hcl:"trusted_root_path,optional"`
	Issuer                   cty.Value        `hcl:"issuer,optional"`
	Identity                 cty.Value        `hcl:"identity,optional"`
	MinLogEntries            *int             `hcl:"min_log_entries,optional"`
	MinTimestamps            *int             `hcl:"min_timestamps,optional"`
	MinCertificateTimestamps *int             `hcl:"min_certificate_timestamps,optional"`
	Extensions               *ConditionsBlock `hcl:"extensions,block"`
}

// ConditionsBlock holds name = value, name = [values] or name = "^regular expression$".
type ConditionsBlock struct {
	Conditions map[string]cty.Value `hcl:",remain"`
}

// MapBlock is map { field = "predicate.path" }.
type MapBlock struct {
	Paths map[string]string `hcl:",remain"`
}

// Policy says whose word on an image counts, and on what. It does not change.
type Policy struct {
	name       string
	accepts    []string // predicate types; one ending in / is a beginning
	speaksMade []string // those of them that say how an image was made
	builders   *pattern // nil is any
	scope      scope
	revoked    map[string]bool
	keys       []*publicKey
	signers    []*signers
	mapped     []mapping
}

// Name returns the policy's name.
func (p *Policy) Name() string { return p.name }

// signers are those who may sign under one Sigstore.
type signers struct {
	terms    sigstoreTerms
	issuer   *pattern
	identity *pattern // nil is any, if the conditions say enough
	where    conditions
}

// condition is what one field must be.
type condition struct {
	field string
	is    *pattern
	among bool // a list will do, if one value of it is that
}

type conditions []condition

// predicateGroups are short names for predicate types.
var predicateGroups = map[string][]string{
	"provenance": {"https://slsa.dev/provenance/v1", "https://slsa.dev/provenance/v0.2"},
	"scan": {
		"https://cosign.sigstore.dev/attestation/vuln/v1", "https://in-toto.io/attestation/vulns/v0.1", "https://in-toto.io/attestation/vulns/v0.2",
	},
	"vex":       {"https://openvex.dev/ns", "https://openvex.dev/ns/"},
	"cyclonedx": {"https://cyclonedx.org/bom", "https://cyclonedx.org/bom/"},
	"signature": {SignaturePredicate},
}

var groupNames = []string{"provenance", "scan", "vex", "cyclonedx", "signature"}

const (
	maxKeys     = 32
	maxKeyFile  = 64 << 10
	maxRootFile = 4 << 20
	maxSigners  = 32
	maxRevoked  = 4096
)

// nameForm is what a policy and a source may be called: the name is part of selectors and of metrics.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

const nameRule = "use 1 to 64 letters, digits, dots, dashes and underscores, beginning with a letter or a digit"

// complaints collects problems and goes on.
type complaints struct {
	prefix   string
	nth      int
	problems []conf.KeyProblem
}

func (c *complaints) say(field, format string, args ...any) {
	c.problems = append(c.problems, conf.KeyProblem{Field: strings.TrimSuffix(c.prefix+field, "."), Nth: c.nth, Text: fmt.Sprintf(format, args...)})
}

// in runs do for a block, in whose name it complains.
func (c *complaints) in(block string, nth int, do func()) {
	prefix, before := c.prefix, c.nth
	c.prefix += block + "."
	if prefix == "" {
		c.nth = nth
	}
	do()
	c.prefix, c.nth = prefix, before
}

// NewPolicy checks a block, reads the files it names and returns the policy, or every problem found.
func NewPolicy(b PolicyBlock) (*Policy, []conf.KeyProblem) {
	c := &complaints{}
	p := &Policy{name: b.Name, scope: b.Repositories, revoked: map[string]bool{}}
	if !nameForm.MatchString(b.Name) {
		c.say("name", "%q cannot be a policy's name: %s.", clip(b.Name), nameRule)
	}
	p.accepts = c.predicates("predicate_types", b.PredicateTypes)
	if len(b.PredicateTypes) == 0 {
		c.say("predicate_types", "say what its signers are trusted with: %s, or predicate types by their URIs.", orList(groupNames))
	}
	p.speaksMade = predicateGroups["provenance"]
	if b.ProvenanceTypes != nil {
		p.speaksMade = c.predicates("provenance_types", b.ProvenanceTypes)
		for _, t := range p.speaksMade {
			if !slices.Contains(p.accepts, t) {
				c.say("provenance_types", "%q is not among predicate_types, and would never be seen.", t)
			}
		}
	}
	if b.Builders != cty.NilVal {
		p.builders = c.pattern("builders", b.Builders)
	}
	if err := checkScope(b.Repositories); err != nil {
		c.say("repositories", "%s.", err)
	}
	c.revoked(p, b.RevokedKeys)
	for i, k := range b.Keys {
		c.in("key", i+1, func() { c.key(p, k) })
	}
	if len(p.keys) > maxKeys {
		c.say("key", "there are %d keys, the limit is %d.", len(p.keys), maxKeys)
	}
	for i, s := range b.Sigstore {
		c.in("sigstore", i+1, func() { c.sigstore(p, s) })
	}
	if len(b.Sigstore) > maxSigners {
		c.say("sigstore", "there are %d blocks, the limit is %d.", len(b.Sigstore), maxSigners)
	}
	if len(b.Keys) == 0 && len(b.Sigstore) == 0 {
		c.say("key", "say who is trusted: key { path = … } for a public key, or sigstore { trusted_root_path = …, issuer = …, identity = … }.")
	}
	if b.Map != nil {
		c.in("map", 0, func() { c.mapping(p, b.Map) })
	}
	if len(c.problems) > 0 {
		return nil, c.problems
	}
	return p, nil
}

// predicates reads short names and URIs.
func (c *complaints) predicates(field string, given []string) []string {
	var types []string
	if len(given) > maxPatterns {
		c.say(field, "there are %d types, the limit is %d.", len(given), maxPatterns)
		return nil
	}
	for _, t := range given {
		group, known := predicateGroups[t]
		switch {
		case known:
			types = append(types, group...)
		case strings.Contains(t, "://") && len(t) <= maxPattern && !strings.HasSuffix(t, "/"):
			types = append(types, t)
		default:
			c.say(field, "%q is no predicate type: write %s, or a URI.", clip(t), orList(groupNames))
		}
	}
	return sortedUnique(types)
}

func (c *complaints) pattern(field string, v cty.Value) *pattern {
	p, err := newPattern(v)
	if err != nil {
		c.say(field, "%s.", err)
		return nil
	}
	return p
}

func (c *complaints) revoked(p *Policy, prints []string) {
	if len(prints) > maxRevoked {
		c.say("revoked_keys", "there are %d keys, the limit is %d.", len(prints), maxRevoked)
		return
	}
	for _, text := range prints {
		print := "sha256:" + strings.ReplaceAll(strings.TrimPrefix(strings.ToLower(text), "sha256:"), ":", "")
		if !isDigest(print) {
			c.say("revoked_keys", "%q is no fingerprint: write sha256: and the 64 hex digits of openssl pkey -pubin -in key.pem -outform DER | sha256sum.", clip(text))
			continue
		}
		p.revoked[print] = true
	}
}

func (c *complaints) key(p *Policy, b KeyBlock) {
	from, until := c.time("valid_from", b.ValidFrom), c.time("valid_until", b.ValidUntil)
	if !from.IsZero() && !until.IsZero() && !from.Before(until) {
		c.say("valid_until", "it is not after valid_from, so that the key would never be valid.")
	}
	var text []byte
	field := "path"
	switch {
	case b.Path != "" && b.PEM != "":
		c.say("pem", "give either path or pem.")
		return
	case b.PEM != "":
		field, text = "pem", []byte(b.PEM)
	case b.Path != "":
		var err error
		if text, err = readFile(b.Path, maxKeyFile); err != nil {
			c.say("path", "%s.", err)
			return
		}
	default:
		c.say("path", "name the file of a public key.")
		return
	}
	keys, err := parseKeys(text)
	if err != nil {
		c.say(field, "%s%s.", ifPath(b.Path), err)
		return
	}
	for _, k := range keys {
		if slices.ContainsFunc(p.keys, func(o *publicKey) bool { return o.fingerprint == k.fingerprint }) {
			c.say(field, "%skey %s is there twice; keep it once.", ifPath(b.Path), k.fingerprint)
			continue
		}
		k.from, k.until = from, until
		p.keys = append(p.keys, k)
	}
}

func ifPath(path string) string {
	if path == "" {
		return ""
	}
	return path + ": "
}

func (c *complaints) time(field, text string) time.Time {
	if text == "" {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		c.say(field, "%q is no time: write it as in \"2026-01-31T00:00:00Z\".", clip(text))
	}
	return t.UTC()
}

func (c *complaints) sigstore(p *Policy, b SigstoreBlock) {
	s := &signers{}
	if b.Extensions != nil {
		c.in("extensions", 0, func() { s.where = c.conditions(b.Extensions.Conditions, fieldNames) })
	}
	if b.Issuer == cty.NilVal {
		c.say("issuer", "name the OIDC issuer that authenticates the signer, for example \"https://token.actions.githubusercontent.com\".")
	} else if s.issuer = c.pattern("issuer", b.Issuer); s.issuer != nil && s.issuer.anybody() {
		c.say("issuer", "it matches issuers that anybody can run; name the one you trust.")
	}
	anchored := slices.ContainsFunc(s.where, func(w condition) bool { return anchors[w.field] && !w.is.anybody() })
	switch {
	case b.Identity != cty.NilVal:
		s.identity = c.pattern("identity", b.Identity)
		if s.identity != nil && s.identity.anybody() && !anchored {
			c.say("identity", "it matches everybody who has an account at the issuer; name the workflow or person you trust.")
		}
	case !anchored:
		c.say("identity", "name the workflow or person that signs, as the certificate's subject alternative name has it, or a condition on source_repo_id, source_repo_owner_id or another field in extensions that says whose it is.")
	}
	if s.terms.root = c.root(b.TrustedRootPath); s.terms.root != nil {
		c.terms(&s.terms, b)
	}
	p.signers = append(p.signers, s)
}

func (c *complaints) root(path string) *sigstoreRoot {
	if path == "" {
		c.say("trusted_root_path", "name the file of the trusted root (trusted_root.json) of your Sigstore.")
		return nil
	}
	file, err := readFile(path, maxRootFile)
	if err != nil {
		c.say("trusted_root_path", "%s.", err)
		return nil
	}
	root, err := loadRoot(file)
	if err != nil {
		c.say("trusted_root_path", "%s: %s.", path, err)
		return nil
	}
	return root
}

// terms fills in how much proof of the time of signing is asked for. The default is one of everything
// that the root can verify.
func (c *complaints) terms(t *sigstoreTerms, b SigstoreBlock) {
	r := t.root
	t.entries = c.number("min_log_entries", b.MinLogEntries, min(1, r.logs()), 0, r.logs(), "transparency log")
	t.stamps = c.number("min_timestamps", b.MinTimestamps, 1, 1, r.logs()+r.stamps(), "log or timestamp authority")
	t.certs = c.number("min_certificate_timestamps", b.MinCertificateTimestamps, min(1, r.certificateLogs()), 0, r.certificateLogs(), "certificate log")
	if r.stamps() == 0 && t.entries == 0 {
		c.say("min_log_entries", "the trusted root has no timestamp authority, so that only a log entry can tell when something was signed; ask for 1.")
	}
}

func (c *complaints) number(field string, given *int, byDefault, low, most int, of string) int {
	if given == nil {
		return byDefault
	}
	switch {
	case *given < low:
		c.say(field, "%d is too few: it must be at least %d.", *given, low)
	case *given > most:
		c.say(field, "%d can never be reached: the trusted root knows %d %s(s).", *given, most, of)
	}
	return *given
}

// conditions reads the conditions of a block in the order of their names. known are the names there are,
// nil for any.
func (c *complaints) conditions(given map[string]cty.Value, known []string) conditions {
	var all conditions
	for _, name := range sortedKeys(given) {
		if known != nil && !slices.Contains(known, name) {
			c.say(name, "there is no such field; there are %s.", orList(known))
			continue
		}
		if p := c.pattern(name, given[name]); p != nil {
			all = append(all, condition{field: name, is: p})
		}
	}
	return all
}

// fieldNames are the fields of a certificate that conditions can name, in the order of their OIDs.
var fieldNames = []string{
	FieldBuildSignerURI, FieldBuildSignerDigest, FieldRunnerEnvironment, FieldSourceURI, FieldSourceDigest, FieldSourceRef,
	FieldSourceID, FieldSourceOwnerURI, FieldSourceOwnerID, FieldBuildConfigURI, FieldBuildConfigDigest, FieldBuildTrigger,
	FieldRunInvocationURI, FieldSourceVisibility, FieldDeploymentEnvironment, FieldTokenSubject,
}

// anchors are the fields that say whose workflow it is, so that a condition on one can stand for identity.
var anchors = map[string]bool{
	FieldBuildSignerURI: true, FieldSourceURI: true, FieldSourceID: true, FieldSourceOwnerURI: true, FieldSourceOwnerID: true,
	FieldBuildConfigURI: true, FieldTokenSubject: true,
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// readFile reads a file that must not be larger than most. The error names the file and has no verb.
func readFile(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		if p, ok := errors.AsType[*os.PathError](err); ok {
			err = p.Err
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		if p, ok := errors.AsType[*os.PathError](err); ok {
			err = p.Err
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if int64(len(text)) > most {
		return nil, fmt.Errorf("%s: it is larger than %d bytes", path, most)
	}
	return text, nil
}
