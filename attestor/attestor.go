// Package attestor holds the words that every attestor and everybody who asks one shares: a
// selector, a set of them, the process to attest, and the three roles an attestor can have.
//
//   - A Node role runs in the agent and gathers evidence of where the agent runs.
//   - A Judge role runs in the server and decides what that evidence proves.
//   - A Workload role runs in the agent and says what it can prove of a process beside it.
//
// Each attestor lives in one folder of its own below this one and is linked in by one line in
// cmd/assay-agent/attestors.go and one in cmd/assay-server/attestors.go. There is no registry and
// no init function: what a binary can attest is what its list says.
package attestor

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxEvidence is the largest evidence or challenge, in bytes, that is looked at. The largest honest
// one, an x509pop chain of five RSA-8192 certificates, stays below a fifth of it.
const MaxEvidence = 64 << 10

// Errors that a Judge returns so that server/api can give callers the codes SPIRE's agents act on.
// Wrap them; the wrapped text goes to the audit line, and for ErrEvidence also to the caller.
var (
	// ErrEvidence marks evidence that is malformed or does not prove what it claims.
	ErrEvidence = errors.New("evidence refused")
	// ErrUsed marks evidence that was good once and has been used (trust on first use).
	ErrUsed = errors.New("evidence already used")
)

// Ask sends one challenge to the other end and returns its answer.
type Ask func(ctx context.Context, challenge []byte) ([]byte, error)

// Node gathers evidence on the agent's side of node attestation.
type Node interface {
	// Evidence returns the payload of the first message, and the function that answers each
	// challenge of the server (nil where the type knows none).
	Evidence(ctx context.Context) (payload []byte, answer Ask, err error)
}

// Judge decides on the server's side what evidence proves.
type Judge interface {
	// Judge looks at a non-empty payload of at most MaxEvidence bytes, asks challenges as its type
	// demands, and returns what is proved. It must return an error wrapping ErrEvidence or ErrUsed
	// for anything it does not believe; other errors mean that it could not decide.
	Judge(ctx context.Context, payload []byte, ask Ask) (Proof, error)
}

// KeyHash is the SHA-256 of a public key's DER (SubjectPublicKeyInfo): the key that an agent asks a
// certificate for. Both sides know it before the first message.
type KeyHash [sha256.Size]byte

// HashKey hashes a public key: RSA, ECDSA or Ed25519. The error is of a key that has no DER form.
func HashKey(key crypto.PublicKey) (KeyHash, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return KeyHash{}, fmt.Errorf("hash key: %w", err)
	}
	return sha256.Sum256(der), nil
}

// KeyNode is a Node whose evidence is for one key: nobody else's request can be answered with it.
type KeyNode interface {
	Node
	// EvidenceFor is Evidence for a key.
	EvidenceFor(ctx context.Context, key KeyHash) (payload []byte, answer Ask, err error)
}

// KeyJudge is a Judge that believes evidence only for the key that is asked for.
type KeyJudge interface {
	Judge
	// JudgeFor is Judge of a request for a key.
	JudgeFor(ctx context.Context, payload []byte, key KeyHash, ask Ask) (Proof, error)
}

// Gather gathers evidence for a key if the node can, or else evidence as such.
func Gather(ctx context.Context, n Node, key KeyHash) ([]byte, Ask, error) {
	if k, ok := n.(KeyNode); ok {
		return k.EvidenceFor(ctx, key)
	}
	return n.Evidence(ctx)
}

// Decide judges evidence for a key if the judge can, or else evidence as such.
func Decide(ctx context.Context, j Judge, payload []byte, key KeyHash, ask Ask) (Proof, error) {
	if k, ok := j.(KeyJudge); ok {
		return k.JudgeFor(ctx, payload, key, ask)
	}
	return j.Judge(ctx, payload, ask)
}

// Joined is a Judge that puts several proofs together: its selectors are of their types, too.
type Joined interface {
	Judge
	// SelectorTypes are the types of its selectors.
	SelectorTypes() []string
}

// Proof is what a Judge found proved about a node.
type Proof struct {
	// Path is the agent's SPIFFE ID path below /spire/agent/, beginning with the attestor's type,
	// for example "x509pop/1f…".
	Path string
	// Selectors are the node's selectors, all of the attestor's own type unless it is Joined.
	Selectors []Selector
	// Parts are the paths of what was proved together, if it was more than one thing, and binds the node: none
	// of them may be another node's, and a node that is known may have no others than before.
	Parts []string
	// CanReattest says that the node may prove itself again at any time, so that its agent
	// re-attests where others renew.
	CanReattest bool
}

// Follower is a Judge that learns by itself when what it proved of admitted nodes changes.
type Follower interface {
	// Follow keeps the selectors of the agents that its Judge admitted up to date. It returns when ctx ends.
	Follow(ctx context.Context, agents Admitted) error
}

// Admitted are the agents that a Judge admitted.
type Admitted interface {
	// Each yields their paths, as in Proof, and selectors, but not of agents that are banned.
	Each() iter.Seq2[string, Set]
	// Update gives an agent other selectors. One that is gone or banned by now is left alone.
	Update(ctx context.Context, path string, selectors []Selector) error
	// Evict forgets an agent whose node is no more: it is cut off, and a node of that name may attest
	// anew. One that is gone or banned by now is left alone.
	Evict(ctx context.Context, path string) error
}

// Process is a workload as an attestor sees it: pinned by its caller, who checks after attestation
// that the process that was attested is still the one at the other end of the socket.
type Process struct {
	// PID is the process ID in the agent's own PID namespace.
	PID int
	// UID and GID are the credentials that the kernel vouched for when the process connected.
	UID, GID uint32
	// Proc is where procfs is mounted, normally "/proc"; fixtures put their own there.
	Proc string
}

// Workload proves things about a process. Implementations are safe for concurrent use.
type Workload interface {
	// Attest returns what is proved about the process, in any order. A process the attestor has
	// nothing to say about (a plain process, for docker) has no selectors and no error; an error
	// means that selectors which may exist could not be found.
	Attest(ctx context.Context, p Process) ([]Selector, error)
}

// Watcher is a Workload that learns by itself when its answers change.
type Watcher interface {
	// Watch calls changed whenever what Attest says of the given processes may have changed, or
	// with no PID when it may have changed for any process. It returns when ctx ends.
	Watch(ctx context.Context, changed func(pids ...int)) error
}

// Abstainer is a Workload that can tell which selectors no process will ever show, as it is configured.
type Abstainer interface {
	// Abstains says why nobody shows the selector and what would change that, for an operator who misses
	// it; "" if somebody may.
	Abstains(want Selector) (why string)
}

// Needs is what the wiring hands to every attestor it opens.
type Needs struct {
	// TrustDomain is the trust domain of the agent or server.
	TrustDomain spiffeid.TrustDomain
	// Log has its component field set.
	Log logrus.FieldLogger
	// Now is the clock for decisions.
	Now func() time.Time
	// Tokens burns join tokens; set on the server only.
	Tokens TokenBurner
	// Agents knows the agents that were admitted; set on the server only.
	Agents Agents
	// Audit takes a line for something that an attestor decided or did by itself, as ending a program that
	// it runs; err says why it was refused. Nil: nobody does.
	Audit func(event, about string, err error)
	// Identity gives out an identity of the server's own, and wraps ErrNoIdentity while there is none; set on the
	// server only.
	Identity func(context.Context) (*ServerIdentity, error)
	// Measure takes what a program measured that the attestor runs; an error says why it does not. Nil: nobody does.
	Measure func(Measurement) error
	// Trial says that the attestor is opened to see whether it can be, and closed at once if it is an
	// io.Closer.
	Trial bool
	// JoinToken is the token the operator gave this agent on the command line, in its config or in
	// a file; set on the agent only, empty if none.
	JoinToken string
}

// Filled returns needs with a log and a clock where there is none: nothing is logged, and the time is the machine's.
func (n Needs) Filled() Needs {
	if n.Log == nil {
		quiet := logrus.New()
		quiet.SetOutput(io.Discard)
		n.Log = quiet
	}
	if n.Now == nil {
		n.Now = time.Now
	}
	return n
}

// TokenBurner spends a join token exactly once, however many ask at the same time.
type TokenBurner interface {
	// BurnToken deletes the token and returns nil if it existed and had not expired. It returns an
	// error wrapping ErrEvidence if it did not exist, was used before, or had expired; an expired
	// token is burnt all the same.
	BurnToken(ctx context.Context, token string) error
}

// Agents tells whether an agent was admitted before.
type Agents interface {
	// Admitted reports whether there is a record of the agent, banned or not.
	Admitted(ctx context.Context, id spiffeid.ID) (bool, error)
}

// Named is a configuration that says itself of what type the attestor is that it configures: that of a plugin, say,
// or of several attestors joined.
type Named interface {
	// AttestorType returns the type, as agents and selectors name it.
	AttestorType() string
}

// TypeOf returns the type of an attestor: that of its kind, unless its configuration names another.
func TypeOf(kind string, config any) string {
	if named, ok := config.(Named); ok {
		return named.AttestorType()
	}
	return kind
}

// NodeKind, JudgeKind and WorkloadKind are what an attestor's packages offer to the wiring: a type,
// the struct its configuration block is decoded into, and how to open it with that struct. What Open
// returns is closed in the end if it is an io.Closer.
type (
	NodeKind struct {
		// Type is the label of the attestor's block, and of its selectors unless it is Named.
		Type string
		// Config returns a pointer to a new struct with gohcl tags, defaults filled in.
		Config func() any
		// Open takes what Config returned, decoded. It may touch the world and says what is wrong.
		Open func(config any, needs Needs) (Node, error)
	}
	JudgeKind struct {
		Type   string
		Config func() any
		Open   func(config any, needs Needs) (Judge, error)
	}
	WorkloadKind struct {
		Type   string
		Config func() any
		Open   func(config any, needs Needs) (Workload, error)
	}
)
