package records

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// The schema. Every key of the store is one of these, and only this package writes them.
//
//	m/schema                        Schema: version of this tree, trust domain the store belongs to
//	p/                              the picture: all that server/view is made of
//	├── b/<trust domain>            Bundle
//	├── e/<entry ID>                Entry
//	├── n/<path>                    Node; its SPIFFE ID's path, without the first slash
//	└── v/<digest>                  Verdict; the image's config digest, "sha256:" and 64 hex digits
//	i/                              indexes
//	├── s/<path>:<half hash>        ID of the one entry with this SPIFFE ID, parent and selectors; the
//	│                               path is the SPIFFE ID's, without the first slash, cut at 48 bytes
//	├── a/<token hash>/<entry ID>   (empty) an alias: an entry that a join token's node was given
//	└── p/<part hash>               path of the one node that this part of evidence proves
//	f/<trust domain>                Federation
//	j/<authority ID>                Journal
//	t/<token hash>                  Token; the token itself is nowhere
//	v/                              what is known about images; see evidence.go
//	x/<unix time>/<kind>/<id>       (empty) something expires: kind e, an entry by its ID; kind t,
//	                                a token by its hash
//
// A hash is the unpadded base64url of a SHA-256. A Unix time is zero padded to 12 digits, so that
// keys lie in the order of time. Entry IDs and trust domains contain no slash; paths do, and end
// their key or come before a colon, which they cannot contain.
//
// Which keys go together, always in one transaction:
//
//	entry   p/e, i/s; i/a if it is an alias; x/…/e if it expires
//	node    p/n, and i/p for each of its parts
//	token   t, x/…/t. The x key outlives a used token, and then is when a token's aliases are
//	        deleted for which no node came to be
const (
	schemaKey    = "m/schema"
	picture      = "p/"
	bundlePrefix = "p/b/"
	entryPrefix  = "p/e/"
	nodePrefix   = "p/n/"
	verdictKeys  = "p/v/"
	similarIndex = "i/s/"
	aliasIndex   = "i/a/"
	partIndex    = "i/p/"
	federations  = "f/"
	journalKeys  = "j/"
	tokenPrefix  = "t/"
	expiryPrefix = "x/"

	kindEntry = "e"
	kindToken = "t"
)

// schemaVersion is raised when an older server must not touch the tree any more; upgrade.go has the way
// from each version to the next. 2: i/s/ keys begin with the path.
const schemaVersion = 2

// joinTokenPath is where SPIRE puts the agents that were admitted by a join token; what follows is
// the token.
const joinTokenPath = "/spire/agent/join_token/" //nolint:gosec // a path, no token

func entryKey(id string) string { return entryPrefix + id }

func bundleKey(td spiffeid.TrustDomain) string { return bundlePrefix + td.Name() }

func federationKey(td spiffeid.TrustDomain) string { return federations + td.Name() }

func nodeKey(id spiffeid.ID) string { return nodePrefix + strings.TrimPrefix(id.Path(), "/") }

// partKey is the index key of a part of a node's evidence: by its hash, for paths end a key.
func partKey(part string) string {
	sum := sha256.Sum256([]byte(part))
	return partIndex + base64.RawURLEncoding.EncodeToString(sum[:])
}

func verdictKey(digest string) string { return verdictKeys + digest }

func journalKey(authorityID string) string { return journalKeys + authorityID }

func tokenKey(hash string) string { return tokenPrefix + hash }

func hashToken(token string) string {
	sum := sha256.Sum256([]byte(token))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// pathInKey is how much of a SPIFFE ID's path stands in an i/s/ key.
const pathInKey = 48

// similarKey returns the index key of entries that are similar to e. The path stands before the hash
// because entries that are made together mostly have names that lie together, and their index keys do so
// too then: a batch of 100 writes some pages of the store and not 100, which is half the price of
// creating an entry. Half the SHA-256 is enough: whoever finds two entries with one hash (2^64 tries)
// has kept himself from creating the second.
func similarKey(e *identity.Entry) string {
	path := strings.TrimPrefix(e.SPIFFEID.Path(), "/")
	path = path[:min(len(path), pathInKey)]
	sum := similarity(e)
	key := make([]byte, 0, len(similarIndex)+len(path)+1+22)
	key = append(append(append(key, similarIndex...), path...), ':')
	return string(base64.RawURLEncoding.AppendEncode(key, sum[:16]))
}

// similarity is the same for entries that are similar. Each part goes in after its length, so that no two
// different triples look the same.
func similarity(e *identity.Entry) [sha256.Size]byte {
	b := make([]byte, 0, 512)
	part := func(s string) {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	part(e.SPIFFEID.String())
	part(e.ParentID.String())
	for _, s := range e.Selectors.All() {
		part(s.Type)
		part(s.Value)
	}
	return sha256.Sum256(b)
}

// tokenOf returns the hash of the join token that the agent with this ID was admitted by.
func tokenOf(id spiffeid.ID) (hash string, ok bool) {
	token, ok := strings.CutPrefix(id.Path(), joinTokenPath)
	if !ok || token == "" {
		return "", false
	}
	return hashToken(token), true
}

func aliasPrefix(tokenHash string) string { return aliasIndex + tokenHash + "/" }

// aliasKey returns the index key of an alias entry, "" for other entries. An alias gives the one
// node that a join token admits a second name: its parent is that node, and its only selector says
// so too.
func aliasKey(e *identity.Entry) string {
	hash, ok := tokenOf(e.ParentID)
	if !ok {
		return ""
	}
	only := attestor.Selector{Type: "spiffe_id", Value: e.ParentID.String()}
	if e.Selectors.Len() != 1 || !e.Selectors.Has(only) {
		return ""
	}
	return aliasPrefix(hash) + e.ID
}

// entryExpiryKey returns the key under which an entry waits for its end, "" for one without.
func entryExpiryKey(e *identity.Entry) string {
	if e.ExpiresAt.IsZero() {
		return ""
	}
	return expiryKey(e.ExpiresAt, kindEntry, e.ID)
}

func expiryKey(at time.Time, kind, id string) string {
	return expiryBefore(at.Unix()) + kind + "/" + id
}

// expiryBefore returns the end of the range of what expired before a Unix time.
func expiryBefore(unix int64) string { return fmt.Sprintf("%s%012d/", expiryPrefix, max(unix, 0)) }

// parseExpiryKey is the reverse of expiryKey.
func parseExpiryKey(key string) (unix int64, kind, id string, err error) {
	parts := strings.SplitN(strings.TrimPrefix(key, expiryPrefix), "/", 3)
	if len(parts) != 3 {
		return 0, "", "", fmt.Errorf("%w: key %q", ErrDamaged, key)
	}
	unix, err = strconv.ParseInt(parts[0], 10, 64)
	if err != nil {
		return 0, "", "", fmt.Errorf("%w: key %q", ErrDamaged, key)
	}
	return unix, parts[1], parts[2], nil
}

// indexKeys returns the keys that point to an entry, each with its value.
func indexKeys(e *identity.Entry) map[string][]byte {
	keys := map[string][]byte{similarKey(e): []byte(e.ID)}
	if k := aliasKey(e); k != "" {
		keys[k] = nil
	}
	if k := entryExpiryKey(e); k != "" {
		keys[k] = nil
	}
	return keys
}
