package conf

import (
	"fmt"
	"math"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
)

// Entries is what a file of declared entries says, checked.
type Entries struct {
	// Owner begins the ID of every entry of the file, and says whose they are.
	Owner   string
	Entries []DeclaredEntry
}

// DeclaredEntry is entry "name" { … }.
type DeclaredEntry struct {
	Name string
	// SPIFFEID and ParentID may be paths, which are the server's trust domain's.
	SPIFFEID, ParentID                       string
	Selectors                                []attestor.Selector
	FederatesWith, DNSNames                  []string
	X509SVIDTTL, JWTSVIDTTL                  time.Duration // 0: the server's default
	Hint                                     string
	Admin, Downstream, StoreSVID, NoPrefetch bool
	JTI                                      bool
	ExpiresAt                                time.Time // zero: never
	Where                                    string    // the block's place
}

type entriesFile struct {
	Owner   string       `hcl:"owner,optional"`
	Entries []entryBlock `hcl:"entry,block"`
}

type entryBlock struct {
	Name          string    `hcl:"name,label"`
	Where         hcl.Range `hcl:",def_range"`
	SPIFFEID      string    `hcl:"spiffe_id,optional"`
	ParentID      string    `hcl:"parent_id,optional"`
	Node          bool      `hcl:"node,optional"`
	Selectors     []string  `hcl:"selectors,optional"`
	FederatesWith []string  `hcl:"federates_with,optional"`
	DNSNames      []string  `hcl:"dns_names,optional"`
	X509SVIDTTL   string    `hcl:"x509_svid_ttl,optional"`
	JWTSVIDTTL    string    `hcl:"jwt_svid_ttl,optional"`
	Hint          string    `hcl:"hint,optional"`
	Admin         bool      `hcl:"admin,optional"`
	Downstream    bool      `hcl:"downstream,optional"`
	StoreSVID     bool      `hcl:"store_svid,optional"`
	NoPrefetch    bool      `hcl:"disable_x509_svid_prefetch,optional"`
	JTI           bool      `hcl:"jwt_svid_include_jti,optional"`
	ExpiresAt     string    `hcl:"expires_at,optional"`
}

// ServerIDPath is the path of the server's own SPIFFE ID, the parent of entries for nodes.
const ServerIDPath = "/spire/server"

// entryWord is what an owner and an entry's name may be: together they are the ID of an entry. A dot is what
// is between them, so an owner has none.
var (
	ownerWord = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)
	entryWord = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)
)

// OwnerError says what an owner must be like, or nil.
func OwnerError(owner string) error {
	if !ownerWord.MatchString(owner) {
		return fmt.Errorf("%q is no owner: it is 1 to 64 letters, digits, dashes and underscores", owner)
	}
	return nil
}

// LoadEntries reads a file of declared entries and checks all of it that needs no server. The error is a
// Mistakes with everything that is wrong.
func LoadEntries(path string, options Options) (*Entries, error) {
	l, err := open(path, options, fileKind{"-f", "conf/entries.hcl"})
	if err != nil {
		return nil, err
	}
	var f entriesFile
	l.decode(&f)
	out := &Entries{Owner: f.Owner}
	if f.Owner != "" && OwnerError(f.Owner) != nil {
		l.say("owner", "Invalid owner", "%s.", OwnerError(f.Owner))
	}
	seen := map[string]bool{}
	for _, b := range f.Entries {
		switch {
		case !entryWord.MatchString(b.Name):
			l.at(b.Where, "Invalid name", fmt.Sprintf("%q is no name of an entry: it is 1 to 128 letters, digits, dots, dashes and underscores.", b.Name))
		case seen[b.Name]:
			l.at(b.Where, "Duplicate entry", fmt.Sprintf("%q is there twice; the name must be its own.", b.Name))
		}
		seen[b.Name] = true
		out.Entries = append(out.Entries, l.entry(b))
	}
	if err := l.mistakes(); err != nil {
		return nil, err
	}
	return out, nil
}

// entry checks one block.
func (l *loader) entry(b entryBlock) DeclaredEntry {
	key := "entry." + b.Name + "."
	e := DeclaredEntry{
		Name: b.Name, Where: b.Where.String(),
		SPIFFEID: l.idOrPath(b.Where, key+"spiffe_id", b.SPIFFEID), FederatesWith: b.FederatesWith, DNSNames: b.DNSNames,
		X509SVIDTTL: l.ttl(key+"x509_svid_ttl", b.X509SVIDTTL), JWTSVIDTTL: l.ttl(key+"jwt_svid_ttl", b.JWTSVIDTTL),
		Hint: b.Hint, Admin: b.Admin, Downstream: b.Downstream, StoreSVID: b.StoreSVID, NoPrefetch: b.NoPrefetch, JTI: b.JTI,
	}
	switch {
	case b.Node && b.ParentID != "":
		l.say(key+"parent_id", "Conflicting arguments", "With node the parent is the server; leave one of the two out.")
	case b.Node:
		e.ParentID = ServerIDPath
	default:
		e.ParentID = l.idOrPath(b.Where, key+"parent_id", b.ParentID)
	}
	if len(b.Selectors) == 0 {
		l.at(b.Where, "Missing selectors", `An entry needs at least one selector, as in selectors = ["unix:uid:1000"].`)
	}
	for _, text := range b.Selectors {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			l.say(key+"selectors", "Invalid selector", "%s.", err)
			continue
		}
		e.Selectors = append(e.Selectors, s)
	}
	for _, name := range b.FederatesWith {
		if _, err := spiffeid.TrustDomainFromString(name); err != nil {
			l.say(key+"federates_with", "Invalid trust domain", "%q: %s; write one as in \"example.org\".", name, err)
		}
	}
	if b.ExpiresAt != "" {
		var err error
		if e.ExpiresAt, err = time.Parse(time.RFC3339, b.ExpiresAt); err != nil {
			l.say(key+"expires_at", "Invalid time", "%q is no time as in \"2030-12-31T00:00:00Z\".", b.ExpiresAt)
		}
	}
	return e
}

// ttl is a duration in whole seconds.
func (l *loader) ttl(key, text string) time.Duration {
	d := l.duration(key, text, 0, time.Second)
	if d%time.Second != 0 || d > math.MaxInt32*time.Second {
		l.say(key, "Invalid duration", "%q is no number of whole seconds below 68 years.", text)
	}
	return d
}

// idOrPath checks a SPIFFE ID, or a path that is to be one.
func (l *loader) idOrPath(block hcl.Range, key, text string) string {
	name := key[strings.LastIndexByte(key, '.')+1:]
	if text == "" {
		l.at(block, "Missing required argument", fmt.Sprintf("The argument %q is required: a SPIFFE ID, or its path.", name))
		return ""
	}
	var err error
	if strings.HasPrefix(text, "/") {
		err = spiffeid.ValidatePath(text)
	} else {
		_, err = spiffeid.FromString(text)
	}
	if err != nil {
		l.say(key, "Invalid SPIFFE ID", "%q: %s; write it as in \"spiffe://example.org/shop\" or \"/shop\".", text, err)
	}
	return text
}
