// Package admit decides which nodes belong to the trust domain: it puts the evidence of a new agent
// before the judge of its type, gives it its first SVID, renews that, and shows agents the door.
//
// An agent's standing is one record: the serial number of the certificate it uses, and of the one it
// was given and has not used yet. Renewing is done in two phases, because an answer can get lost on
// the way: the old certificate stays good until the new one is used for the first time (see
// server/api/caller, which promotes it). Attesting anew replaces both at once.
//
// Evidence that is good once is good again for the agent that can sign with the key of the SVID it had before,
// though that may have expired: a machine that was off for a week is no stranger. So the record keeps the hashes
// of these keys, for longer than the certificates last. Evicting an agent forgets them, and so does a ban.
//
// Why it is so: what a judge proves is written, and the ban checked, in one atomic change of that
// record, so that a ban which arrives while a node is being judged is not overwritten.
package admit

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	// ErrUnknownType says that no judge for this type of evidence is configured. The error that
	// wraps it is an *UnknownTypeError.
	ErrUnknownType = errors.New("node attestor type is not configured")
	// ErrBanned says that the agent may not come back.
	ErrBanned = errors.New("agent is banned")
	// ErrNotActive says that the agent's certificate is not the one it was last given.
	ErrNotActive = errors.New("agent SVID is not active")
	// ErrMustReattest says that the agent has to prove itself again where others may renew.
	ErrMustReattest = errors.New("agent must reattest instead of renew")
	// ErrTooMuch says that an answer to a challenge is over attestor.MaxEvidence, or that a judge
	// asked more challenges than any honest attestation needs.
	ErrTooMuch = errors.New("attestation exceeds its limits")
)

// UnknownTypeError names the type that has no judge. It is ErrUnknownType.
type UnknownTypeError struct{ Type string }

// Error returns the text that SPIRE's agents know.
func (e *UnknownTypeError) Error() string {
	return fmt.Sprintf("could not find node attestor type %q", clip(e.Type))
}

// Unwrap returns ErrUnknownType.
func (e *UnknownTypeError) Unwrap() error { return ErrUnknownType }

// clip keeps a caller's string from filling a message.
func clip(s string) string {
	if len(s) > attestor.MaxTypeLength {
		return s[:attestor.MaxTypeLength] + "…"
	}
	return s
}

// maxChallenges is how often a judge may ask. Every type known asks once.
const maxChallenges = 16

// Records is where the standing of agents is kept; *records.Records is one.
type Records interface {
	UpdateNode(ctx context.Context, id spiffeid.ID, change func(n *records.Node, exists bool) error) (*records.Node, kv.Rev, error)
	DeleteNode(ctx context.Context, id spiffeid.ID) (kv.Rev, error)
	DeleteNodeIf(ctx context.Context, id spiffeid.ID, still func(*records.Node) bool) (kv.Rev, error)
}

// Signer signs an agent's own SVID; *ca.CA is one.
type Signer interface {
	SignAgent(ctx context.Context, pub crypto.PublicKey, id spiffeid.ID) ([]*x509.Certificate, error)
}

// Config is what a Desk needs beside its parts.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Duration is the time one attestation may take. 0: 30 seconds.
	Duration time.Duration
	Log      logrus.FieldLogger
	// Metrics registers the count of attestations by type and result. Nil: it is not registered.
	Metrics prometheus.Registerer
	// Now is the clock. Nil: time.Now.
	Now func() time.Time
}

// Desk admits agents. It is safe for concurrent use.
type Desk struct {
	records Records
	signer  Signer
	judges  map[string]attestor.Judge
	cfg     Config

	results *prometheus.CounterVec
}

// New returns a Desk with a judge per attestation type.
func New(rec Records, signer Signer, judges map[string]attestor.Judge, cfg Config) *Desk {
	if cfg.Duration == 0 {
		cfg.Duration = 30 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	d := &Desk{
		records: rec, signer: signer, judges: judges, cfg: cfg,
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_attestations_total",
			Help: "Node attestations by attestor type and result.",
		}, []string{"type", "result"}),
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(d.results)
	}
	return d
}

// Request is an agent's wish to be admitted.
type Request struct {
	Type    string
	Payload []byte
	// PublicKey is what the SVID will be for, with its strength and possession proved.
	PublicKey crypto.PublicKey
	// Ask carries challenges to the agent.
	Ask attestor.Ask
	// Previous says that the agent can prove the key of the SVID it had before.
	Previous bool
}

// Admitted is what an agent gets.
type Admitted struct {
	ID spiffeid.ID
	// Chain is leaf first, without the root.
	Chain       []*x509.Certificate
	CanReattest bool
	// Previous says that the agent was admitted again by the key of the SVID it had before.
	Previous  bool
	Selectors attestor.Set
	// Rev is the commit that admitted the agent. The SVID is of use once the view has reached it.
	Rev kv.Rev
}

// Attest judges evidence and admits the node it comes from. Errors wrap ErrUnknownType, ErrBanned,
// ErrTooMuch, attestor.ErrEvidence, attestor.ErrUsed or a context's error; all others mean that it
// could not be decided. Where it is known which agent is meant, Admitted says so even then.
func (d *Desk) Attest(ctx context.Context, r Request) (*Admitted, error) {
	judge, ok := d.judges[r.Type]
	if !ok {
		d.results.WithLabelValues("unknown", "refused").Inc() // the type is the caller's text: no label
		return &Admitted{}, &UnknownTypeError{Type: r.Type}
	}
	out, err := d.attest(ctx, judge, r)
	result := "admitted"
	switch {
	case err == nil:
	case errors.Is(err, ErrBanned):
		result = "banned"
	case errors.Is(err, attestor.ErrEvidence), errors.Is(err, attestor.ErrUsed), errors.Is(err, ErrTooMuch):
		result = "refused"
	default:
		result = "error"
	}
	d.results.WithLabelValues(r.Type, result).Inc()
	return out, err
}

func (d *Desk) attest(ctx context.Context, judge attestor.Judge, r Request) (*Admitted, error) {
	out := &Admitted{}
	if len(r.Payload) > attestor.MaxEvidence {
		return out, fmt.Errorf("%w: payload is %d bytes long, the limit is %d", ErrTooMuch, len(r.Payload), attestor.MaxEvidence)
	}
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Duration)
	defer cancel()

	key, err := attestor.HashKey(r.PublicKey)
	if err != nil {
		return out, err
	}
	ask := limited(r.Ask)
	proof, err := attestor.Decide(ctx, judge, r.Payload, key, ask)
	switch {
	case err == nil:
	case errors.Is(err, attestor.ErrEvidence), errors.Is(err, attestor.ErrUsed):
		return out, err // as it is: its text reaches the agent
	case ctx.Err() != nil:
		return out, fmt.Errorf("judge evidence: %w: %w", ctx.Err(), err)
	default:
		return out, fmt.Errorf("judge evidence: %w", err)
	}
	if out.ID, err = d.agentID(r.Type, proof.Path); err != nil {
		return out, err
	}
	if out.Selectors, err = d.selectors(r.Type, proof.Selectors); err != nil {
		return out, err
	}
	out.CanReattest = proof.CanReattest
	if out.Chain, err = d.signer.SignAgent(ctx, r.PublicKey, out.ID); err != nil {
		return out, fmt.Errorf("sign agent SVID: %w", err)
	}
	out.Rev, err = d.record(ctx, r.Type, key, proof, out, attestor.KeyHash{})
	if errors.Is(err, errOnce) && r.Previous {
		// What is good once is good again for who has the key that it was good for.
		previous, failed := attestor.AskPrevious(ctx, d.cfg.TrustDomain.Name(), key, ask)
		if failed != nil {
			return &Admitted{ID: out.ID, Selectors: out.Selectors}, fmt.Errorf("admit agent: %w: %w", err, failed)
		}
		out.Previous = true
		out.Rev, err = d.record(ctx, r.Type, key, proof, out, previous)
	}
	if err != nil {
		out.Chain = nil
		if errors.Is(err, records.ErrTaken) {
			err = fmt.Errorf("%w: %w", attestor.ErrUsed, err)
		}
		return out, fmt.Errorf("admit agent: %w", err)
	}
	d.cfg.Log.WithFields(logrus.Fields{
		"agent_id": out.ID.String(), "attestor": r.Type, "rev": uint64(out.Rev),
	}).Info("agent admitted")
	return out, nil
}

// errOnce says that evidence which is good once was used before.
var errOnce = fmt.Errorf("%w: node has attested before", attestor.ErrUsed)

// record writes down who was admitted. previous is the key of an SVID that the agent was proved to have had;
// zero is none.
func (d *Desk) record(ctx context.Context, kind string, key attestor.KeyHash, proof attestor.Proof, out *Admitted, previous attestor.KeyHash) (kv.Rev, error) {
	_, rev, err := d.records.UpdateNode(ctx, out.ID, func(n *records.Node, exists bool) error {
		same := previous != attestor.KeyHash{} && (previous == n.Key || previous == n.NewKey)
		switch {
		case exists && n.Banned:
			return ErrBanned
		case exists && n.Type != "" && n.Type != kind:
			// Operators can give agents paths outside of their attestor's own: nobody takes another's place by it.
			return fmt.Errorf("%w: agent %s was admitted by another attestor", attestor.ErrUsed, out.ID)
		case exists && !proof.CanReattest && !same:
			return fmt.Errorf("%w: %s", errOnce, out.ID)
		case exists && !within(proof.Parts, n.Parts):
			return fmt.Errorf("%w: node %s has attested with other parts than %v", attestor.ErrUsed, out.ID, proof.Parts)
		}
		n.Parts = proof.Parts
		n.ID, n.Type = out.ID, kind
		n.Serial, n.ExpiresAt = out.Chain[0].SerialNumber.String(), out.Chain[0].NotAfter
		n.NewSerial, n.NewExpiresAt = "", time.Time{}
		n.Key, n.NewKey = key, attestor.KeyHash{}
		n.Selectors, n.CanReattest = out.Selectors, proof.CanReattest
		n.AttestedAt = d.cfg.Now().Truncate(time.Second)
		return nil
	})
	return rev, err
}

// within reports whether all of the parts are among those that a node has. Which parts bind a node is its
// judge's to say, as the operator configured it, and they may have become fewer.
func within(parts, has []string) bool {
	return !slices.ContainsFunc(parts, func(p string) bool { return !slices.Contains(has, p) })
}

// limited refuses answers and rounds that no honest attestation needs.
func limited(ask attestor.Ask) attestor.Ask {
	rounds := 0
	return func(ctx context.Context, challenge []byte) ([]byte, error) {
		if rounds++; rounds > maxChallenges {
			return nil, fmt.Errorf("%w: more than %d challenges", ErrTooMuch, maxChallenges)
		}
		if len(challenge) > attestor.MaxEvidence {
			return nil, fmt.Errorf("%w: challenge is %d bytes long", ErrTooMuch, len(challenge))
		}
		answer, err := ask(ctx, challenge)
		if err != nil {
			return nil, err
		}
		if len(answer) > attestor.MaxEvidence {
			return nil, fmt.Errorf("%w: answer is %d bytes long, the limit is %d", ErrTooMuch, len(answer), attestor.MaxEvidence)
		}
		return answer, nil
	}
}

// agentID makes the agent's SPIFFE ID. Part of the path comes from evidence, so it is checked here
// whatever the judge did: it stays out of other types' places and within the standard's limits.
func (d *Desk) agentID(kind, path string) (spiffeid.ID, error) {
	// An operator's template may leave a judge's own place, but not for that of another.
	if own, _, deeper := strings.Cut(path, "/"); own != kind && (!deeper || d.judges[own] != nil) {
		return spiffeid.ID{}, fmt.Errorf("make agent ID: judge %q answered a path outside its own", kind)
	}
	id, err := spiffeid.FromPath(d.cfg.TrustDomain, "/spire/agent/"+path)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("%w: make agent ID: %w", attestor.ErrEvidence, err)
	}
	if len(id.String()) > identity.MaxSPIFFEID {
		return spiffeid.ID{}, fmt.Errorf("%w: make agent ID: it is %d bytes long, the limit is %d",
			attestor.ErrEvidence, len(id.String()), identity.MaxSPIFFEID)
	}
	return id, nil
}

// selectors checks what the judge proved.
func (d *Desk) selectors(kind string, list []attestor.Selector) (attestor.Set, error) {
	if len(list) > identity.MaxSelectors {
		return attestor.Set{}, fmt.Errorf("%w: %d selectors, the limit is %d", attestor.ErrEvidence, len(list), identity.MaxSelectors)
	}
	types := []string{kind}
	if joined, ok := d.judges[kind].(attestor.Joined); ok {
		types = joined.SelectorTypes()
	}
	for _, s := range list {
		if !slices.Contains(types, s.Type) {
			return attestor.Set{}, fmt.Errorf("check selectors: judge %q answered one of type %q", kind, clip(s.Type))
		}
		if err := s.Check(); err != nil {
			return attestor.Set{}, fmt.Errorf("%w: %w", attestor.ErrEvidence, err)
		}
	}
	return attestor.NewSet(list...), nil
}

// Renew gives an agent a new SVID. serial is the decimal serial number of the certificate it called
// with; the new one becomes current when it is first used. Errors wrap ErrBanned, ErrNotActive,
// ErrMustReattest or records.ErrNotFound; others mean that it cannot be done at the moment.
func (d *Desk) Renew(ctx context.Context, id spiffeid.ID, serial string, key crypto.PublicKey) ([]*x509.Certificate, kv.Rev, error) {
	hash, err := attestor.HashKey(key)
	if err != nil {
		return nil, 0, err
	}
	chain, err := d.signer.SignAgent(ctx, key, id)
	if err != nil {
		return nil, 0, fmt.Errorf("sign agent SVID: %w", err)
	}
	_, rev, err := d.records.UpdateNode(ctx, id, func(n *records.Node, exists bool) error {
		switch {
		case !exists:
			return records.ErrNotFound
		case n.Banned:
			return ErrBanned
		case n.CanReattest:
			return ErrMustReattest
		case n.Serial != serial:
			return ErrNotActive
		}
		n.NewSerial, n.NewExpiresAt = chain[0].SerialNumber.String(), chain[0].NotAfter
		n.NewKey = hash
		return nil
	})
	if err != nil {
		return nil, 0, fmt.Errorf("renew agent: %w", err)
	}
	return chain, rev, nil
}

// Ban refuses an agent from now on, and its node until it is evicted. It returns
// records.ErrNotFound for an agent that is not known.
func (d *Desk) Ban(ctx context.Context, id spiffeid.ID) (kv.Rev, error) {
	_, rev, err := d.records.UpdateNode(ctx, id, func(n *records.Node, exists bool) error {
		if !exists {
			return records.ErrNotFound
		}
		n.Banned = true
		n.Serial, n.NewSerial = "", ""
		n.Key, n.NewKey = attestor.KeyHash{}, attestor.KeyHash{}
		if n.NewExpiresAt.After(n.ExpiresAt) { // what was issued is told still
			n.ExpiresAt = n.NewExpiresAt
		}
		n.NewExpiresAt = time.Time{}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("ban agent: %w", err)
	}
	d.cfg.Log.WithFields(logrus.Fields{"agent_id": id.String(), "rev": uint64(rev)}).Info("agent banned")
	return rev, nil
}

// Evict forgets an agent, banned or not; its node may attest again. It returns records.ErrNotFound
// for an agent that is not known.
func (d *Desk) Evict(ctx context.Context, id spiffeid.ID) (kv.Rev, error) {
	rev, err := d.records.DeleteNode(ctx, id)
	if err != nil {
		return 0, fmt.Errorf("evict agent: %w", err)
	}
	d.cfg.Log.WithFields(logrus.Fields{"agent_id": id.String(), "rev": uint64(rev)}).Info("agent evicted")
	return rev, nil
}

// Prune forgets an agent if its record is as due says, and returns records.ErrNotFound if not.
func (d *Desk) Prune(ctx context.Context, id spiffeid.ID, due func(*records.Node) bool) (kv.Rev, error) {
	rev, err := d.records.DeleteNodeIf(ctx, id, due)
	if err != nil {
		return 0, fmt.Errorf("prune agent: %w", err)
	}
	d.cfg.Log.WithFields(logrus.Fields{"agent_id": id.String(), "rev": uint64(rev)}).Info("agent pruned")
	return rev, nil
}

// Refresh gives an admitted agent the selectors that its judge finds now. An agent that is gone or banned is
// left alone: it is not admitted by this. It returns the revision of the commit, 0 if nothing changed.
func (d *Desk) Refresh(ctx context.Context, kind, path string, list []attestor.Selector) (kv.Rev, error) {
	id, err := d.agentID(kind, path)
	if err != nil {
		return 0, err
	}
	selectors, err := d.selectors(kind, list)
	if err != nil {
		return 0, err
	}
	changed := false
	_, rev, err := d.records.UpdateNode(ctx, id, func(n *records.Node, exists bool) error {
		switch {
		case !exists || n.Type != kind:
			return records.ErrNotFound
		case n.Banned:
			return ErrBanned
		}
		changed = !n.Selectors.Equal(selectors)
		n.Selectors = selectors
		return nil
	})
	switch {
	case errors.Is(err, records.ErrNotFound), errors.Is(err, ErrBanned):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("refresh selectors of agent: %w", err)
	case changed:
		d.cfg.Log.WithFields(logrus.Fields{
			"agent_id": id.String(), "attestor": kind, "rev": uint64(rev),
		}).Info("selectors of agent changed")
		return rev, nil
	}
	return 0, nil
}

// Types returns the configured attestation types, sorted.
func (d *Desk) Types() []string {
	types := make([]string, 0, len(d.judges))
	for t := range d.judges {
		types = append(types, t)
	}
	slices.Sort(types)
	return types
}
