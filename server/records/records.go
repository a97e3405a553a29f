// Package records keeps what the server knows: entries, nodes, join tokens, bundles and the journal
// of its authorities, each as one versioned protobuf message under one key of a kv.Store.
//
// It is the only writer of keys: whatever changes the state of the server is a method here, so that
// the rules which hold between keys (no two similar entries, a token burnt once, no alias without
// its node) are kept in one place and by the conditions of one transaction, never by a lock that a
// second server would not see. The schema is drawn in keys.go.
//
// Everything that a picture of the trust domain consists of lies below one prefix, so that one Range
// is one consistent Snapshot and one Watch follows it.
package records

import (
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	// ErrNotFound says that no record has the asked name.
	ErrNotFound = errors.New("record not found")
	// ErrExists says that a similar entry (same SPIFFE ID, parent and exact selectors), or another
	// record under the same name, exists.
	ErrExists = errors.New("similar record already exists")
	// ErrConflict says that others kept changing the record until this change gave up.
	ErrConflict = errors.New("record is being changed by others")
	// ErrBundle says that an entry federates with a trust domain whose bundle is not stored. The
	// error that wraps it is a *MissingBundleError.
	ErrBundle = errors.New("federated bundle not found")
	// ErrDamaged says that a stored record cannot be read.
	ErrDamaged = errors.New("stored record is damaged")

	// ErrTokenUnknown says that a join token does not exist: it never did, or it was used. It wraps
	// attestor.ErrEvidence.
	ErrTokenUnknown error = tokenError("join token does not exist or has already been used")
	// ErrTokenExpired says that a join token came too late. It wraps attestor.ErrEvidence.
	ErrTokenExpired error = tokenError("join token expired")
)

// tokenError keeps the texts that SPIRE's clients know free of the text of what they wrap.
type tokenError string

func (e tokenError) Error() string { return string(e) }
func (e tokenError) Unwrap() error { return attestor.ErrEvidence }

// MissingBundleError names the trust domain whose bundle an entry needs. It is ErrBundle.
type MissingBundleError struct {
	TrustDomain spiffeid.TrustDomain
}

// Error returns the text that SPIRE's clients know.
func (e *MissingBundleError) Error() string {
	return fmt.Sprintf("unable to find federated bundle %q", e.TrustDomain.Name())
}

// Unwrap returns ErrBundle.
func (e *MissingBundleError) Unwrap() error { return ErrBundle }

// Node is an agent that was admitted. Values handed out are shared: Clone to change one.
type Node struct {
	ID   spiffeid.ID
	Type string // of the attestor, for example "x509pop"
	// Serial is the serial number, in decimal, of the certificate the agent uses; NewSerial that of
	// one it was given and has not used yet. Empty: none.
	Serial, NewSerial       string
	ExpiresAt, NewExpiresAt time.Time // of those certificates, whole seconds; zero: none
	Selectors               attestor.Set
	Banned                  bool
	CanReattest             bool
	AgentVersion            string
	AttestedAt              time.Time // whole seconds
}

// Clone returns a copy that can be changed without the original noticing.
func (n *Node) Clone() *Node {
	c := *n
	return &c
}

// Journal is one authority of the server's CA, as server/ca writes it down.
type Journal struct {
	Kind        string // "x509" or "jwt"
	AuthorityID string
	State       string // server/ca's word: prepared, active, old, …
	KeyID       string // under which server/ca/keys has the private key
	Certificate []byte // DER; X.509 authorities only
	PublicKey   []byte // PKIX
	// Times are whole seconds; zero: not yet.
	NotBefore, NotAfter, CreatedAt, ActivatedAt time.Time
}

// EntryResult is what became of one entry of CreateEntries.
type EntryResult struct {
	// Entry is the created entry, or with ErrExists the one that exists already.
	Entry *identity.Entry
	// Err is nil for a created entry.
	Err error
}

// Snapshot is everything a picture is made of, at one revision. Its values are immutable.
type Snapshot struct {
	Rev     kv.Rev
	Entries []*identity.Entry // sorted by ID
	Nodes   []*Node           // sorted by ID
	Bundles []*identity.Bundle
}

// Change is one commit that concerns the picture. Its values are immutable.
type Change struct {
	Rev     kv.Rev
	Entries []EntryChange
	Nodes   []NodeChange
	Bundles []BundleChange
}

// EntryChange says what an entry is now; Entry is nil if it was deleted.
type EntryChange struct {
	ID    string
	Entry *identity.Entry
}

// NodeChange says what a node is now; Node is nil if it was deleted.
type NodeChange struct {
	ID   spiffeid.ID
	Node *Node
}

// BundleChange says what a bundle is now; Bundle is nil if it was deleted.
type BundleChange struct {
	TrustDomain spiffeid.TrustDomain
	Bundle      *identity.Bundle
}

// Config is what Records can do without.
type Config struct {
	Now     func() time.Time      // default time.Now
	Log     logrus.FieldLogger    // default: nothing is logged
	Metrics prometheus.Registerer // default: nothing is registered
	// KeepRevisions and KeepFor bound the log that readers can resume from: Run forgets commits
	// that are both beyond the last KeepRevisions (default 100,000) or older than KeepFor (default
	// one hour).
	KeepRevisions int
	KeepFor       time.Duration
}

// Records is safe for concurrent use.
type Records struct {
	store kv.Store
	td    spiffeid.TrustDomain
	cfg   Config
}
