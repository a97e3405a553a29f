// Package records keeps what the server knows: entries, nodes, join tokens, bundles, verdicts on
// images and the journal of its authorities, each as one versioned protobuf message under one key of
// a kv.Store.
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
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	// ErrNotFound says that no record has the asked name.
	ErrNotFound = errors.New("record not found")
	// ErrExists says that a similar entry (same SPIFFE ID, parent and exact selectors), or another
	// record under the same name, exists.
	ErrExists = errors.New("similar record already exists")
	// ErrTaken says that a part belongs to another node.
	ErrTaken = errors.New("part of the evidence belongs to another node")
	// ErrConflict says that others kept changing the record until this change gave up.
	ErrConflict = errors.New("record is being changed by others")
	// ErrBundle says that an entry federates with a trust domain whose bundle is not stored. The
	// error that wraps it is a *MissingBundleError.
	ErrBundle = errors.New("federated bundle not found")
	// ErrDamaged says that a stored record cannot be read.
	ErrDamaged = errors.New("stored record is damaged")

	// ErrTokenUnknown says that a join token does not exist: it never did, or it was used. It is
	// attestor.ErrEvidence. Its text, as the next one's, is what SPIRE's clients know.
	ErrTokenUnknown = attestor.Refusef("join token does not exist or has already been used")
	// ErrTokenExpired says that a join token came too late. It is attestor.ErrEvidence.
	ErrTokenExpired = attestor.Refusef("join token expired")
)

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
	// Key and NewKey are what those certificates are for, NewKey until it is Key. They outlive them; zero: not
	// known.
	Key, NewKey  attestor.KeyHash
	Selectors    attestor.Set
	Banned       bool
	CanReattest  bool
	AgentVersion string
	AttestedAt   time.Time // whole seconds
	// Parts are what proved the node together, as paths of agents' IDs, if it was more than one thing. Each
	// belongs to one node at a time.
	Parts []string
}

// Clone returns a copy that can be changed without the original noticing.
func (n *Node) Clone() *Node {
	c := *n
	c.Parts = slices.Clone(n.Parts)
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

	// Of an X.509 authority that another one signed: the DER of what is above it, without the root, and
	// the root's key identifier in hexadecimal. The latter is empty if it is a root itself.
	Chain      [][]byte
	UpstreamID string
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
	// Verdicts are sorted by digest.
	Verdicts []*Verdict
}

// Change is one commit that concerns the picture. Its values are immutable.
type Change struct {
	Rev      kv.Rev
	Entries  []EntryChange
	Nodes    []NodeChange
	Bundles  []BundleChange
	Verdicts []VerdictChange
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
	Now     func() time.Time      // default: time.Now
	Log     logrus.FieldLogger    // default: nothing is logged
	Metrics prometheus.Registerer // default: nothing is registered
	// KeepRevisions and KeepFor bound the log of commits that readers can resume from: Run forgets
	// what is not among the last KeepRevisions (default 100,000), or older than KeepFor (default
	// one hour).
	KeepRevisions int
	KeepFor       time.Duration
}

func (c *Config) setDefaults() {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		silent := logrus.New()
		silent.SetOutput(io.Discard)
		c.Log = silent
	}
	if c.KeepRevisions <= 0 {
		c.KeepRevisions = 100_000
	}
	if c.KeepFor <= 0 {
		c.KeepFor = time.Hour
	}
}

// Records is safe for concurrent use.
type Records struct {
	store kv.Store
	td    spiffeid.TrustDomain
	cfg   Config
	words words
	swept *prometheus.CounterVec
}

// Open returns the records in the store, which it marks with the trust domain on first use. It
// refuses a store that belongs to another trust domain, or that a newer server has written to.
func Open(ctx context.Context, store kv.Store, td spiffeid.TrustDomain, cfg Config) (*Records, error) {
	cfg.setDefaults()
	r := &Records{store: store, td: td, cfg: cfg}
	r.swept = promauto.With(cfg.Metrics).NewCounterVec(prometheus.CounterOpts{
		Name: "assay_records_expired_total",
		Help: "Records deleted because their time was over.",
	}, []string{"kind"})
	err := r.retry(ctx, "schema", func() error { return r.claim(ctx) })
	if err != nil {
		return nil, fmt.Errorf("open records: %w", err)
	}
	return r, nil
}

// claim checks whose store it is, and takes one that is nobody's. Emptiness is asked before the schema: a store
// that another server takes between the two questions has one by the second.
func (r *Records) claim(ctx context.Context) error {
	items, _, err := r.store.Range(ctx, "", "", 1)
	if err != nil {
		return err
	}
	if len(items) == 0 {
		value, err := encodeSchema(r.td, schemaVersion)
		if err != nil {
			return err
		}
		_, err = r.store.Commit(ctx, kv.Txn{If: []kv.Cond{{Key: schemaKey}}, Ops: []kv.Op{kv.Put(schemaKey, value)}})
		return err
	}
	item, found, err := r.get(ctx, schemaKey)
	if err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("%w: it has keys but no %s", ErrDamaged, schemaKey)
	}
	var m stored.Schema
	if err := decode(item.Value, &m); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrDamaged, schemaKey, err)
	}
	if m.GetVersion() > schemaVersion {
		return fmt.Errorf("the store has schema version %d, written by a newer assay-server; this one knows versions up to %d", m.GetVersion(), schemaVersion)
	}
	if m.GetTrustDomain() != r.td.Name() {
		return fmt.Errorf("the store belongs to trust domain %q, this server is configured for %q: name another data_dir for it, or set trust_domain back", m.GetTrustDomain(), r.td.Name())
	}
	return r.upgrade(ctx, m.GetVersion(), item.Rev)
}

// StoreID returns the identity of the store, without which a revision means nothing.
func (r *Records) StoreID() string { return r.store.ID() }

// get returns the item under one key.
func (r *Records) get(ctx context.Context, key string) (item kv.Item, found bool, err error) {
	items, _, err := r.store.Range(ctx, key, key+"\x00", 1)
	if err != nil || len(items) == 0 {
		return kv.Item{}, false, err
	}
	return items[0], true, nil
}

// maxTries is how often a change is tried against others who change the same record. Each failed
// try means that another one got through.
const maxTries = 100

// retry calls try until its commit finds its conditions true.
func (r *Records) retry(ctx context.Context, what string, try func() error) error {
	for range maxTries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := try(); !errors.Is(err, kv.ErrConflict) {
			return err
		}
	}
	return fmt.Errorf("%w: %s", ErrConflict, what)
}

func damaged(key string, err error) error { return fmt.Errorf("%w: %s: %w", ErrDamaged, key, err) }
