package records

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Checked is what Check found in a store.
type Checked struct {
	// TrustDomain that the store belongs to; zero if it does not say, which is a finding.
	TrustDomain spiffeid.TrustDomain
	Rev         kv.Rev
	// How many records of each kind can be read.
	Entries, Nodes, Bundles, Verdicts, Tokens int
	// Journal and Bundle are the authorities as server/ca wrote them down and as the own trust domain's
	// bundle names them; Bundle is nil if there is none.
	Journal []Journal
	Bundle  *identity.Bundle
	// Findings are what does not make sense, in the order of keys: records that cannot be read, and
	// keys that contradict each other. Empty: nothing.
	Findings []Finding
}

// Finding is one thing that is wrong with a store.
type Finding struct {
	Key  string
	What string
}

// String returns both for people.
func (f Finding) String() string { return fmt.Sprintf("%s: %s", f.Key, f.What) }

// Check reads every record of a store and compares the keys that go together (see the schema in
// keys.go). It writes nothing, and the store need not be one that Open would take. The error says that
// the store could not be read.
func Check(ctx context.Context, store kv.Store) (*Checked, error) {
	items, rev, err := store.Range(ctx, "", "", 0)
	if err != nil {
		return nil, fmt.Errorf("check records: %w", err)
	}
	c := &check{
		out: &Checked{Rev: rev}, keys: make(map[string][]byte, len(items)),
		expected: map[string][]byte{}, similar: similarKey,
	}
	for _, it := range items {
		c.keys[it.Key] = it.Value
	}
	c.schema()
	for _, it := range items {
		c.record(it.Key, it.Value)
	}
	c.indexes()
	slices.SortStableFunc(c.out.Findings, func(a, b Finding) int { return strings.Compare(a.Key, b.Key) })
	return c.out, nil
}

// check is one Check under way.
type check struct {
	out   *Checked
	words words
	keys  map[string][]byte // all there are
	// expected are the index keys that the records ask for.
	expected map[string][]byte
	// similar makes the i/s/ keys of the store's schema version.
	similar func(*identity.Entry) string
}

func (c *check) say(key, format string, args ...any) {
	c.out.Findings = append(c.out.Findings, Finding{Key: key, What: fmt.Sprintf(format, args...)})
}

func (c *check) schema() {
	value, found := c.keys[schemaKey]
	if !found {
		if len(c.keys) > 0 {
			c.say(schemaKey, "it is missing, so it is not known whose store this is")
		}
		return
	}
	var m stored.Schema
	if err := decode(value, &m); err != nil {
		c.say(schemaKey, "it cannot be read: %v", err)
		return
	}
	if m.GetVersion() > schemaVersion {
		c.say(schemaKey, "version %d was written by a newer assay-server; this one knows versions up to %d", m.GetVersion(), schemaVersion)
	}
	if m.GetVersion() < 2 {
		c.similar = similarKeyV1
	}
	td, err := spiffeid.TrustDomainFromString(m.GetTrustDomain())
	if err != nil {
		c.say(schemaKey, "its trust domain is none: %v", err)
		return
	}
	c.out.TrustDomain = td
}

// record reads one record and notes which index keys it asks for.
func (c *check) record(key string, value []byte) {
	kind, rest := split(key)
	var err error
	switch kind {
	case schemaKey, similarIndex, aliasIndex, partIndex, expiryPrefix:
		return // schema and indexes look at those
	case entryPrefix:
		err = c.entry(rest, value)
	case nodePrefix:
		err = c.node(rest, value)
	case bundlePrefix:
		err = c.bundle(rest, value)
	case verdictKeys:
		if _, err = c.words.decodeVerdict(rest, value); err == nil {
			c.out.Verdicts++
		}
	case federations:
		var td spiffeid.TrustDomain
		if td, err = spiffeid.TrustDomainFromString(rest); err == nil {
			_, err = decodeFederation(td, value)
		}
	case journalKeys:
		var j Journal
		if j, err = decodeJournal(rest, value); err == nil {
			c.out.Journal = append(c.out.Journal, j)
		}
	case tokenPrefix:
		var expires time.Time
		if expires, err = decodeToken(value); err == nil {
			c.out.Tokens++
			c.expected[expiryKey(expires.Add(tokenGrace), kindToken, rest)] = nil
		}
	default:
		var known bool
		if known, err = checkEvidence(key, value); !known {
			c.say(key, "no record of this version of assay-server has such a key")
			return
		}
	}
	if err != nil {
		c.say(key, "it cannot be read: %v", err)
	}
}

// split returns the part of the schema that a key belongs to, and what is behind it.
func split(key string) (kind, rest string) {
	if key == schemaKey {
		return schemaKey, ""
	}
	for _, prefix := range []string{entryPrefix, nodePrefix, bundlePrefix, verdictKeys, similarIndex, aliasIndex, partIndex, federations, journalKeys, tokenPrefix, expiryPrefix} {
		if rest, ok := strings.CutPrefix(key, prefix); ok {
			return prefix, rest
		}
	}
	return "", key
}

func (c *check) entry(id string, value []byte) error {
	e, err := c.words.decodeEntry(id, value)
	if err != nil {
		return err
	}
	c.out.Entries++
	for k, v := range indexKeys(e) {
		if k == similarKey(e) {
			k = c.similar(e)
		}
		if other, twice := c.expected[k]; twice {
			c.say(entryKey(id), "entry %s has the same SPIFFE ID, parent and selectors", other)
		}
		c.expected[k] = v
	}
	if td := c.out.TrustDomain; !td.IsZero() && e.SPIFFEID.TrustDomain() != td {
		c.say(entryKey(id), "its SPIFFE ID %q is of another trust domain", e.SPIFFEID)
	}
	return nil
}

func (c *check) node(path string, value []byte) error {
	td := c.out.TrustDomain
	if td.IsZero() {
		return errors.New("the trust domain is not known")
	}
	id, err := spiffeid.FromPath(td, "/"+path)
	if err != nil {
		return err
	}
	n, err := c.words.decodeNode(id, value)
	if err != nil {
		return err
	}
	for _, part := range n.Parts {
		if other, twice := c.expected[partKey(part)]; twice {
			c.say(nodePrefix+path, "its part %q is one of node %q, too", part, other)
		}
		c.expected[partKey(part)] = []byte(path)
	}
	c.out.Nodes++
	return nil
}

func (c *check) bundle(name string, value []byte) error {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return err
	}
	b, err := decodeBundle(td, value)
	if err != nil {
		return err
	}
	c.out.Bundles++
	if td == c.out.TrustDomain {
		c.out.Bundle = b
	}
	return nil
}

// indexes compares the index keys that there are with those that the records ask for.
func (c *check) indexes() {
	for _, key := range slices.Sorted(maps.Keys(c.expected)) {
		want := c.expected[key]
		switch have, found := c.keys[key]; {
		case !found:
			c.say(key, "this index key is missing%s", pointsTo(want))
		case string(have) != string(want):
			c.say(key, "this index key should point to %q and points to %q", want, have)
		}
	}
	for key := range c.keys {
		if _, asked := c.expected[key]; asked {
			continue
		}
		switch kind, _ := split(key); kind {
		case similarIndex:
			c.say(key, "this index key points to entry %q, which is not there or not like that", c.keys[key])
		case aliasIndex:
			c.say(key, "this index key points to an alias that is not there or none")
		case partIndex:
			c.say(key, "this index key points to node %q, which is not there or has other parts", c.keys[key])
		case expiryPrefix:
			// The expiry key of a used token stays until its time; all others belong to a record.
			if _, what, _, err := parseExpiryKey(key); err != nil {
				c.say(key, "this expiry key cannot be read")
			} else if what == kindEntry {
				c.say(key, "this expiry key belongs to an entry that is not there or expires at another time")
			}
		}
	}
}

func pointsTo(id []byte) string {
	if len(id) == 0 {
		return ""
	}
	return fmt.Sprintf(" (of %s)", id)
}
