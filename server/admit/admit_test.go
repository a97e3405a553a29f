package admit

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
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
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	agent = spiffeid.RequireFromString("spiffe://example.org/spire/agent/test/one")
)

// book is Records in memory.
type book struct {
	mu    sync.Mutex
	nodes map[spiffeid.ID]*records.Node
	rev   kv.Rev
	fail  error // of the commit
}

func (b *book) UpdateNode(_ context.Context, id spiffeid.ID, change func(*records.Node, bool) error) (*records.Node, kv.Rev, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, ok := b.nodes[id]
	if !ok {
		n = &records.Node{}
	}
	n = n.Clone()
	if err := change(n, ok); err != nil {
		return nil, 0, err
	}
	if b.fail != nil {
		return nil, 0, b.fail
	}
	b.nodes[id] = n
	b.rev++
	return n, b.rev, nil
}

func (b *book) DeleteNode(ctx context.Context, id spiffeid.ID) (kv.Rev, error) {
	return b.DeleteNodeIf(ctx, id, func(*records.Node) bool { return true })
}

func (b *book) DeleteNodeIf(_ context.Context, id spiffeid.ID, still func(*records.Node) bool) (kv.Rev, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n, ok := b.nodes[id]; !ok || !still(n) {
		return 0, records.ErrNotFound
	}
	delete(b.nodes, id)
	b.rev++
	return b.rev, nil
}

// counter signs by counting.
type counter struct {
	n   int64
	err error
}

func (c *counter) SignAgent(context.Context, crypto.PublicKey, spiffeid.ID) ([]*x509.Certificate, error) {
	if c.err != nil {
		return nil, c.err
	}
	c.n++
	return []*x509.Certificate{{SerialNumber: big.NewInt(c.n), NotAfter: time.Unix(10_000, 0)}}, nil
}

// judge answers what it is told to.
type judge func(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error)

func (j judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	return j(ctx, payload, ask)
}

func says(p attestor.Proof) judge {
	return func(context.Context, []byte, attestor.Ask) (attestor.Proof, error) { return p, nil }
}

func newDesk(j judge) (*Desk, *book, *counter) {
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	b, c := &book{nodes: map[spiffeid.ID]*records.Node{}}, &counter{}
	return New(b, c, map[string]attestor.Judge{"test": j, "another": says(attestor.Proof{})}, Config{
		TrustDomain: td, Log: silent, Metrics: prometheus.NewRegistry(), Now: func() time.Time { return time.Unix(100, 0) },
	}), b, c
}

var request = Request{Type: "test", PublicKey: ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)), Payload: []byte("evidence"), Ask: func(context.Context, []byte) ([]byte, error) { return []byte("answer"), nil }}

func TestAttest(t *testing.T) {
	t.Run("what is proved becomes the node", func(t *testing.T) {
		sel := attestor.Selector{Type: "test", Value: "a"}
		d, b, _ := newDesk(says(attestor.Proof{Path: "test/one", CanReattest: true, Selectors: []attestor.Selector{sel, sel}}))
		out, err := d.Attest(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		n := b.nodes[agent]
		if out.ID != agent || !out.CanReattest || out.Rev != 1 || n.Serial != "1" || n.Type != "test" || n.Selectors.Len() != 1 || n.AttestedAt.Unix() != 100 {
			t.Errorf("admitted %+v, node %+v", out, n)
		}
	})
	t.Run("attesting again replaces serial numbers and selectors, and keeps the version", func(t *testing.T) {
		d, b, _ := newDesk(says(attestor.Proof{Path: "test/one", CanReattest: true}))
		b.nodes[agent] = &records.Node{
			ID: agent, Serial: "77", NewSerial: "78", AgentVersion: "1.2.3",
			Selectors: attestor.NewSet(attestor.Selector{Type: "test", Value: "old"}),
		}
		if _, err := d.Attest(t.Context(), request); err != nil {
			t.Fatal(err)
		}
		if n := b.nodes[agent]; n.Serial != "1" || n.NewSerial != "" || n.Selectors.Len() != 0 || n.AgentVersion != "1.2.3" {
			t.Errorf("node %+v", n)
		}
	})
}

func TestPathOfATemplate(t *testing.T) {
	d, b, _ := newDesk(says(attestor.Proof{Path: "static/one", CanReattest: true}))
	for range 2 {
		out, err := d.Attest(t.Context(), request)
		if err != nil || out.ID.Path() != "/spire/agent/static/one" || b.nodes[out.ID].Type != "test" {
			t.Fatalf("%+v, %v", out, err)
		}
	}
}

func TestAttestRefuses(t *testing.T) {
	good := attestor.Proof{Path: "test/one", CanReattest: true}
	many := make([]attestor.Selector, identity.MaxSelectors+1)
	for i := range many {
		many[i] = attestor.Selector{Type: "test", Value: fmt.Sprint(i)}
	}
	for _, c := range []struct {
		name  string
		judge judge
		node  *records.Node
		req   func(*Request)
		want  error
	}{
		{"a type that is not configured", says(good), nil, func(r *Request) { r.Type = "other" }, ErrUnknownType},
		{"a payload over the limit", says(good), nil, func(r *Request) { r.Payload = make([]byte, attestor.MaxEvidence+1) }, ErrTooMuch},
		{"what the judge does not believe", func(context.Context, []byte, attestor.Ask) (attestor.Proof, error) {
			return attestor.Proof{}, attestor.ErrEvidence
		}, nil, nil, attestor.ErrEvidence},
		{"a banned node", says(good), &records.Node{Banned: true}, nil, ErrBanned},
		{"a banned node of a type that attests once", says(attestor.Proof{Path: "test/one"}), &records.Node{Banned: true}, nil, ErrBanned},
		{"a node that attested and may do so once", says(attestor.Proof{Path: "test/one"}), &records.Node{}, nil, attestor.ErrUsed},
		{"a path of another type", says(attestor.Proof{Path: "another/one"}), nil, nil, nil},
		{"a path without a place", says(attestor.Proof{Path: "one"}), nil, nil, nil},
		{"the agent of another type at a path that an operator's template made", says(attestor.Proof{Path: "static/one", CanReattest: true}),
			&records.Node{ID: spiffeid.RequireFromPath(td, "/spire/agent/static/one"), Type: "another"}, nil, attestor.ErrUsed},
		{"a path that climbs out", says(attestor.Proof{Path: "test/../../server"}), nil, nil, attestor.ErrEvidence},
		{"a path with an empty segment", says(attestor.Proof{Path: "test//one"}), nil, nil, attestor.ErrEvidence},
		{"a path with a character that SPIFFE IDs do not have", says(attestor.Proof{Path: "test/a b"}), nil, nil, attestor.ErrEvidence},
		{"a path over the length of a SPIFFE ID", says(attestor.Proof{Path: "test/" + strings.Repeat("x", 2048)}), nil, nil, attestor.ErrEvidence},
		{"selectors of another type", says(attestor.Proof{Path: "test/one", Selectors: []attestor.Selector{{Type: "unix", Value: "uid:0"}}}), nil, nil, nil},
		{"more selectors than a node may have", says(attestor.Proof{Path: "test/one", Selectors: many}), nil, nil, attestor.ErrEvidence},
		{"a selector with a control character", says(attestor.Proof{Path: "test/one", Selectors: []attestor.Selector{{Type: "test", Value: "a\n"}}}), nil, nil, attestor.ErrEvidence},
		{"an answer over the limit", func(ctx context.Context, _ []byte, ask attestor.Ask) (attestor.Proof, error) {
			_, err := ask(ctx, nil)
			return attestor.Proof{}, err
		}, nil, func(r *Request) {
			r.Ask = func(context.Context, []byte) ([]byte, error) { return make([]byte, attestor.MaxEvidence+1), nil }
		}, ErrTooMuch},
		{"an endless conversation", func(ctx context.Context, _ []byte, ask attestor.Ask) (attestor.Proof, error) {
			for {
				if _, err := ask(ctx, nil); err != nil {
					return attestor.Proof{}, err
				}
			}
		}, nil, nil, ErrTooMuch},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, b, _ := newDesk(c.judge)
			if c.node != nil {
				b.nodes[cmp.Or(c.node.ID, agent)] = c.node
			}
			r := request
			if c.req != nil {
				c.req(&r)
			}
			out, err := d.Attest(t.Context(), r)
			if err == nil || (c.want != nil && !errors.Is(err, c.want)) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if out == nil || out.Chain != nil {
				t.Errorf("refused with a certificate: %+v", out)
			}
			if b.rev != 0 {
				t.Error("the records were changed")
			}
		})
	}
}

func TestAttestHasADeadline(t *testing.T) {
	d, _, _ := newDesk(func(ctx context.Context, _ []byte, _ attestor.Ask) (attestor.Proof, error) {
		<-ctx.Done()
		return attestor.Proof{}, errors.New("the cloud did not answer")
	})
	d.cfg.Duration = time.Millisecond
	if _, err := d.Attest(t.Context(), request); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want a deadline's end", err)
	}
}

func TestABanDuringJudgementStands(t *testing.T) {
	var d *Desk
	d, b, _ := newDesk(func(ctx context.Context, _ []byte, _ attestor.Ask) (attestor.Proof, error) {
		_, err := d.Ban(ctx, agent)
		return attestor.Proof{Path: "test/one", CanReattest: true}, err
	})
	b.nodes[agent] = &records.Node{ID: agent, Serial: "1"}
	if _, err := d.Attest(t.Context(), request); !errors.Is(err, ErrBanned) {
		t.Errorf("got %v, want ErrBanned", err)
	}
	if !b.nodes[agent].Banned {
		t.Error("the ban was overwritten")
	}
}

// TestPreviousKey: evidence that is good once is good again for the same agent, and for nobody else.
func TestPreviousKey(t *testing.T) {
	newKey := func() (*ecdsa.PrivateKey, attestor.KeyHash) {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		hash, err := attestor.HashKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		return key, hash
	}
	old, oldHash := newKey()
	next, nextHash := newKey()
	stranger, _ := newKey()
	again := func(by *ecdsa.PrivateKey) Request {
		r := request
		r.PublicKey, r.Previous = next.Public(), true
		r.Ask = attestor.AnswerPrevious(td.Name(), by, nextHash, nil)
		return r
	}
	known := func(n records.Node) (*Desk, *book) {
		d, b, _ := newDesk(says(attestor.Proof{Path: "test/one"}))
		n.ID, n.Type = agent, "test"
		b.nodes[agent] = &n
		return d, b
	}
	t.Run("the key in use, or one given and not used yet", func(t *testing.T) {
		for _, n := range []records.Node{{Serial: "7", Key: oldHash}, {Serial: "7", NewSerial: "8", NewKey: oldHash}} {
			d, b := known(n)
			out, err := d.Attest(t.Context(), again(old))
			if err != nil || !out.Previous {
				t.Fatalf("%+v, %v", out, err)
			}
			if now := b.nodes[agent]; now.Serial != "1" || now.NewSerial != "" || now.Key != nextHash || now.NewKey != (attestor.KeyHash{}) {
				t.Errorf("node %+v", now)
			}
		}
	})
	for why, c := range map[string]struct {
		node records.Node
		r    Request
		want error
	}{
		"another key":                       {records.Node{Serial: "7", Key: oldHash}, again(stranger), attestor.ErrUsed},
		"no key":                            {records.Node{Serial: "7", Key: oldHash}, request, attestor.ErrUsed},
		"a node whose key nobody knows":     {records.Node{Serial: "7"}, again(old), attestor.ErrUsed},
		"a banned agent":                    {records.Node{Banned: true, Key: oldHash}, again(old), ErrBanned},
		"the key that was replaced by then": {records.Node{Serial: "9", Key: nextHash}, again(old), attestor.ErrUsed},
	} {
		t.Run("refused: "+why, func(t *testing.T) {
			d, b := known(c.node)
			out, err := d.Attest(t.Context(), c.r)
			if !errors.Is(err, c.want) || out.Chain != nil || b.rev != 0 {
				t.Errorf("%+v, %v at %d", out, err, b.rev)
			}
		})
	}
	t.Run("an answer that is none is refused as evidence used before", func(t *testing.T) {
		d, _ := known(records.Node{Serial: "7", Key: oldHash})
		r := again(old)
		r.Ask = func(context.Context, []byte) ([]byte, error) { return []byte("no"), nil }
		if out, err := d.Attest(t.Context(), r); !errors.Is(err, attestor.ErrUsed) || out.Chain != nil {
			t.Errorf("%+v, %v", out, err)
		}
	})
	t.Run("nobody is asked who need not be", func(t *testing.T) {
		r := again(old)
		r.Ask = func(context.Context, []byte) ([]byte, error) { t.Error("asked"); return nil, nil }
		d, b, _ := newDesk(says(attestor.Proof{Path: "test/one"}))
		if out, err := d.Attest(t.Context(), r); err != nil || out.Previous || b.nodes[agent].Key != nextHash {
			t.Errorf("%+v, %v", out, err)
		}
	})
	t.Run("a ban forgets the keys", func(t *testing.T) {
		d, b := known(records.Node{Serial: "7", Key: oldHash, NewKey: nextHash})
		if _, err := d.Ban(t.Context(), agent); err != nil || b.nodes[agent].Key != (attestor.KeyHash{}) || b.nodes[agent].NewKey != (attestor.KeyHash{}) {
			t.Errorf("%+v, %v", b.nodes[agent], err)
		}
	})
}

func TestRenew(t *testing.T) {
	for _, c := range []struct {
		name string
		node *records.Node
		want error
	}{
		{"gives a second serial number", &records.Node{Serial: "7"}, nil},
		{"replaces a second serial number that was never used", &records.Node{Serial: "7", NewSerial: "6"}, nil},
		{"refuses an unknown agent", nil, records.ErrNotFound},
		{"refuses a banned agent", &records.Node{Banned: true}, ErrBanned},
		{"refuses an agent that has to attest", &records.Node{Serial: "7", CanReattest: true}, ErrMustReattest},
		{"refuses an old certificate", &records.Node{Serial: "8"}, ErrNotActive},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, b, _ := newDesk(nil)
			if c.node != nil {
				b.nodes[cmp.Or(c.node.ID, agent)] = c.node
			}
			chain, rev, err := d.Renew(t.Context(), agent, "7", request.PublicKey)
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if c.want != nil {
				if chain != nil || b.rev != 0 {
					t.Error("refused with a certificate or a change")
				}
				return
			}
			if n := b.nodes[agent]; rev != 1 || n.Serial != "7" || n.NewSerial != chain[0].SerialNumber.String() || n.NewKey == (attestor.KeyHash{}) || !n.NewExpiresAt.Equal(chain[0].NotAfter) {
				t.Errorf("node %+v", n)
			}
		})
	}
}

func TestBanAndEvict(t *testing.T) {
	d, b, _ := newDesk(nil)
	if _, err := d.Ban(t.Context(), agent); !errors.Is(err, records.ErrNotFound) {
		t.Errorf("ban of a stranger: got %v", err)
	}
	if _, err := d.Evict(t.Context(), agent); !errors.Is(err, records.ErrNotFound) {
		t.Errorf("eviction of a stranger: got %v", err)
	}
	b.nodes[agent] = &records.Node{Serial: "1", NewSerial: "2", ExpiresAt: time.Unix(1, 0)}
	if _, err := d.Ban(t.Context(), agent); err != nil {
		t.Fatal(err)
	}
	if n := b.nodes[agent]; !n.Banned || n.Serial != "" || n.NewSerial != "" || !n.ExpiresAt.Equal(time.Unix(1, 0)) {
		t.Errorf("banned node is %+v", n)
	}
	if _, err := d.Evict(t.Context(), agent); err != nil || len(b.nodes) != 0 {
		t.Errorf("eviction: %v, %v", err, b.nodes)
	}
}

func TestASignerThatFailsAdmitsNobody(t *testing.T) {
	d, b, c := newDesk(says(attestor.Proof{Path: "test/one"}))
	c.err = errors.New("no authority")
	if _, err := d.Attest(t.Context(), request); !errors.Is(err, c.err) || b.rev != 0 {
		t.Errorf("got %v, revision %d", err, b.rev)
	}
}

func TestPartsOfANode(t *testing.T) {
	proof := attestor.Proof{Path: "test/one", CanReattest: true, Parts: []string{"a/1", "b/1"}}
	d, b, _ := newDesk(func(context.Context, []byte, attestor.Ask) (attestor.Proof, error) { return proof, nil })
	for range 2 {
		if _, err := d.Attest(t.Context(), request); err != nil {
			t.Fatal(err)
		}
		slices.Reverse(proof.Parts) // in whichever order
	}
	rev := b.rev
	for why, parts := range map[string][]string{
		"another part": {"a/1", "b/2"}, "one part more": {"a/1", "b/1", "c/1"}, "others alone": {"a/2"},
	} {
		proof.Parts = parts
		if out, err := d.Attest(t.Context(), request); !errors.Is(err, attestor.ErrUsed) || out.Chain != nil || b.rev != rev {
			t.Errorf("a node that is known attests with %s: %v", why, err)
		}
	}
	t.Run("fewer parts bind it when its judge says so, and not more again", func(t *testing.T) {
		proof.Parts = []string{"b/1"}
		if out, err := d.Attest(t.Context(), request); err != nil || len(b.nodes[out.ID].Parts) != 1 {
			t.Errorf("%+v, %v", out, err)
		}
		proof.Parts = []string{"a/1", "b/1"}
		if _, err := d.Attest(t.Context(), request); !errors.Is(err, attestor.ErrUsed) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("a part of another node", func(t *testing.T) {
		d, b, _ := newDesk(says(proof))
		b.fail = fmt.Errorf("update node: %w", records.ErrTaken)
		if out, err := d.Attest(t.Context(), request); !errors.Is(err, attestor.ErrUsed) || out.Chain != nil {
			t.Errorf("error is %v", err)
		}
	})
}

func TestSelectorsOfParts(t *testing.T) {
	proof := attestor.Proof{Path: "test/one", CanReattest: true, Selectors: []attestor.Selector{{Type: "part", Value: "a"}}}
	d, _, _ := newDesk(says(proof))
	if _, err := d.Attest(t.Context(), request); err == nil {
		t.Error("a judge of one type answers selectors of another")
	}
	d.judges["test"] = joined{says(proof)}
	if out, err := d.Attest(t.Context(), request); err != nil || out.Selectors.Len() != 1 {
		t.Errorf("%+v, %v", out, err)
	}
}

type joined struct{ judge }

func (joined) SelectorTypes() []string { return []string{"test", "part"} }
