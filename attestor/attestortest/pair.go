// Package attestortest holds the suites that every attestor passes: Run for a node attestor's two
// sides together, RunWorkload for a workload attestor. An attestor that passes refuses empty,
// truncated, oversized, replayed and foreign evidence, obeys its context, refuses unknown
// configuration keys and says nothing its README does not explain.
package attestortest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
)

// TrustDomain is the trust domain that attestors under test belong to.
var TrustDomain = spiffeid.RequireTrustDomainFromString("example.org")

// patience is how long anything may take that should not wait at all.
const patience = 20 * time.Second

// Pair is a node attestor under test: both sides and a configuration that makes them agree.
type Pair struct {
	Node  attestor.NodeKind
	Judge attestor.JudgeKind
	// NodeConfig and JudgeConfig are the bodies of the two configuration blocks, in HCL.
	NodeConfig, JudgeConfig string
	// Needs makes what the wiring would hand over, for one case; TrustDomain, Log and Now are filled
	// in where they are empty.
	Needs func(t *testing.T) attestor.Needs
	// Path is the agent ID path that the honest node gets; empty if it differs each time.
	Path string
	// Selectors are what the honest node gets, in text form and in order.
	Selectors []string
	// CanReattest is what the honest node's Proof must say.
	CanReattest bool
	// OneTime says that the same evidence must be refused a second time.
	OneTime bool
	// Bearer says that whoever has the evidence may use it until it expires, as somebody else decided who
	// made it: nothing in it is the server's to use up.
	Bearer bool
	// Foreign is well formed evidence that proves nothing here, by the reason why.
	Foreign map[string][]byte
	// Types are the selector types it may answer; empty means its own.
	Types []string
	// README is the path of the attestor's README.md.
	README string
}

// Run checks both sides of a node attestor.
func Run(t *testing.T, p Pair) {
	if p.Node.Type != p.Judge.Type {
		t.Fatalf("the two sides are called %q and %q", p.Node.Type, p.Judge.Type)
	}
	checkConfig(t, "the agent's configuration", p.Node.Config, p.NodeConfig)
	checkConfig(t, "the server's configuration", p.Judge.Config, p.JudgeConfig)
	t.Run("the honest node is believed", p.honest)
	t.Run("the README names the type, the path and every selector", func(t *testing.T) {
		readme := readREADME(t, p.README)
		if !strings.Contains(readme, p.Node.Type+"/<") {
			t.Errorf("%s does not show the agent ID path %s/<…>", p.README, p.Node.Type)
		}
		checkDocumented(t, readme, slices.DeleteFunc(slices.Clone(p.Selectors), func(s string) bool {
			kind, _, _ := strings.Cut(s, ":")
			return slices.Contains(p.Types, kind) // documented where they come from
		}))
	})
	t.Run("evidence that is not what it should be is refused", p.badPayloads)
	t.Run("answers that are not what they should be are refused", p.badAnswers)
	t.Run("evidence is not good twice", p.replay)
	t.Run("a canceled context is obeyed", p.canceled)
	t.Run("a broken stream is not the node's fault", p.broken)
}

func (p Pair) open(t *testing.T) (attestor.Node, attestor.Judge) {
	t.Helper()
	needs := attestor.Needs{}
	if p.Needs != nil {
		needs = p.Needs(t)
	}
	return OpenNode(t, p.Node, p.NodeConfig, needs), OpenJudge(t, p.Judge, p.JudgeConfig, needs)
}

// OpenNode opens the agent's side of an attestor by the body of its configuration block, and closes it when the test
// ends. Trust domain, log and clock are filled in where needs leaves them out. What cannot be opened ends the test.
func OpenNode(t testing.TB, kind attestor.NodeKind, body string, needs attestor.Needs) attestor.Node {
	t.Helper()
	node, err := kind.Open(mustDecode(t, kind.Config, body), fill(t, needs))
	if err != nil {
		t.Fatalf("open the agent's side: %v", err)
	}
	closeAtEnd(t, node)
	return node
}

// OpenJudge is OpenNode of the server's side.
func OpenJudge(t testing.TB, kind attestor.JudgeKind, body string, needs attestor.Needs) attestor.Judge {
	t.Helper()
	judge, err := kind.Open(mustDecode(t, kind.Config, body), fill(t, needs))
	if err != nil {
		t.Fatalf("open the server's side: %v", err)
	}
	closeAtEnd(t, judge)
	return judge
}

// closeAtEnd ends what an attestor runs by itself, as agents and servers do when they end.
func closeAtEnd(t testing.TB, part any) {
	t.Helper()
	if closer, ok := part.(io.Closer); ok {
		t.Cleanup(func() {
			if err := closer.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		})
	}
}

func evidence(t *testing.T, node attestor.Node) ([]byte, attestor.Ask) {
	t.Helper()
	payload, answer, err := node.Evidence(t.Context())
	if err != nil {
		t.Fatalf("gather evidence: %v", err)
	}
	if len(payload) == 0 || len(payload) > attestor.MaxEvidence {
		t.Fatalf("evidence has %d bytes", len(payload))
	}
	return payload, answer
}

func (p Pair) honest(t *testing.T) {
	node, judge := p.open(t)
	payload, answer := evidence(t, node)
	proof, err := judge.Judge(t.Context(), payload, ask(answer))
	if err != nil {
		t.Fatalf("the honest node is refused: %v", err)
	}
	if p.Path != "" && proof.Path != p.Path {
		t.Errorf("path is %q, want %q", proof.Path, p.Path)
	}
	if !strings.HasPrefix(proof.Path, p.Judge.Type+"/") {
		t.Errorf("path %q does not begin with the type %q", proof.Path, p.Judge.Type)
	}
	if _, err := spiffeid.FromPath(TrustDomain, "/spire/agent/"+proof.Path); err != nil {
		t.Errorf("path %q makes no SPIFFE ID: %v", proof.Path, err)
	}
	if proof.CanReattest != p.CanReattest {
		t.Errorf("CanReattest is %v, want %v", proof.CanReattest, p.CanReattest)
	}
	checkSelectors(t, proof.Selectors, append(p.Types, p.Judge.Type)...)
	if !slices.IsSortedFunc(proof.Selectors, attestor.Selector.Compare) {
		t.Errorf("selectors are not sorted: %v", proof.Selectors)
	}
	if got := texts(proof.Selectors); !slices.Equal(got, p.Selectors) {
		t.Errorf("selectors are %q, want %q", got, p.Selectors)
	}
}

func (p Pair) badPayloads(t *testing.T) {
	node, judge := p.open(t)
	good, answer := evidence(t, node)
	bad := map[string][]byte{
		"empty":             {},
		"absent":            nil,
		"one zero byte":     {0},
		"spaces":            []byte("   "),
		"not UTF-8":         {0xff, 0xfe, 0xfd},
		"an empty object":   []byte("{}"),
		"null":              []byte("null"),
		"a list":            []byte("[]"),
		"deep nesting":      bytes.Repeat([]byte("["), attestor.MaxEvidence),
		"oversized zeros":   make([]byte, attestor.MaxEvidence+1),
		"10 MiB":            bytes.Repeat([]byte("a"), 10<<20),
		"oversized padding": append(slices.Clone(good), bytes.Repeat([]byte(" "), attestor.MaxEvidence)...),
		"sent twice":        append(slices.Clone(good), good...),
	}
	for why, payload := range p.Foreign {
		bad["foreign: "+why] = payload
	}
	for cut := range 16 {
		n := len(good) * cut / 16
		bad[fmt.Sprintf("cut to %d sixteenths", cut)] = good[:n]
	}
	bad["one byte short"] = good[:len(good)-1]
	for why, payload := range bad {
		t.Run(why, func(t *testing.T) {
			refused(t, judge, payload, ask(answer))
		})
	}
	t.Run("and the honest node is still believed", func(t *testing.T) {
		if _, err := judge.Judge(t.Context(), good, ask(answer)); err != nil {
			t.Errorf("refused: %v", err)
		}
	})
}

func (p Pair) badAnswers(t *testing.T) {
	node, judge := p.open(t)
	payload, answer := evidence(t, node)
	if answer == nil {
		t.Log(p.Node.Type + " knows no challenge")
		return
	}
	spoil := func(f func(good []byte) []byte) attestor.Ask {
		return func(ctx context.Context, challenge []byte) ([]byte, error) {
			good, err := answer(ctx, challenge)
			if err != nil {
				return nil, err
			}
			return f(good), nil
		}
	}
	cases := map[string]func([]byte) []byte{
		"empty":           func([]byte) []byte { return nil },
		"null":            func([]byte) []byte { return []byte("null") },
		"an empty object": func([]byte) []byte { return []byte("{}") },
		"half":            func(good []byte) []byte { return good[:len(good)/2] },
		"one byte short":  func(good []byte) []byte { return good[:len(good)-1] },
		"10 MiB":          func([]byte) []byte { return make([]byte, 10<<20) },
		"padded":          func(good []byte) []byte { return append(good, bytes.Repeat([]byte(" "), attestor.MaxEvidence)...) },
		"sent twice":      func(good []byte) []byte { return append(slices.Clone(good), good...) },
		"the payload":     func([]byte) []byte { return payload },
	}
	for why, f := range cases {
		t.Run(why, func(t *testing.T) { refused(t, judge, payload, spoil(f)) })
	}
	t.Run("the challenge itself", func(t *testing.T) {
		refused(t, judge, payload, func(_ context.Context, challenge []byte) ([]byte, error) { return challenge, nil })
	})
	t.Run("the node refuses challenges that are none", func(t *testing.T) {
		for _, challenge := range [][]byte{nil, {}, []byte("null"), []byte("{}"), {0xff}, make([]byte, attestor.MaxEvidence+1)} {
			if _, err := answer(t.Context(), challenge); err == nil {
				t.Errorf("a challenge of %d bytes was answered", len(challenge))
			}
		}
	})
}

func (p Pair) replay(t *testing.T) {
	node, judge := p.open(t)
	payload, answer := evidence(t, node)
	var heard [][]byte
	_, err := judge.Judge(t.Context(), payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
		said, err := ask(answer)(ctx, challenge)
		heard = append(heard, said)
		return said, err
	})
	if err != nil {
		t.Fatalf("the honest node is refused: %v", err)
	}
	if p.Bearer {
		if answer != nil || p.OneTime {
			t.Fatal("evidence that is used up, or answers challenges, is no bearer's")
		}
		if _, err := judge.Judge(t.Context(), payload, ask(answer)); err != nil {
			t.Errorf("the honest node's second attestation: %v", err)
		}
		return
	}
	if answer == nil && !p.OneTime {
		t.Fatal("evidence without a challenge must be good only once")
	}
	if answer != nil && len(heard) == 0 {
		t.Fatal("the server asked nothing, so evidence can be replayed")
	}
	refused(t, judge, payload, func(context.Context, []byte) ([]byte, error) {
		if len(heard) == 0 {
			return nil, errors.New("no more answers")
		}
		said := heard[0]
		heard = heard[1:]
		return said, nil
	})
	if answer == nil {
		return
	}
	if _, err := judge.Judge(t.Context(), payload, ask(answer)); (err == nil) == p.OneTime {
		t.Errorf("the honest node's second attestation: %v", err)
	}
}

func (p Pair) canceled(t *testing.T) {
	node, judge := p.open(t)
	payload, answer := evidence(t, node)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := node.Evidence(gone); !errors.Is(err, context.Canceled) {
		t.Errorf("the node's evidence under a canceled context: %v", err)
	}
	_, err := within(t, func() (attestor.Proof, error) { return judge.Judge(gone, payload, ask(answer)) })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the judge under a canceled context: %v", err)
	}
	if answer == nil {
		return
	}
	waiting, cancel := context.WithCancel(t.Context())
	_, err = within(t, func() (attestor.Proof, error) {
		return judge.Judge(waiting, payload, func(ctx context.Context, _ []byte) ([]byte, error) {
			cancel()
			<-ctx.Done()
			return nil, ctx.Err()
		})
	})
	if !errors.Is(err, context.Canceled) || errors.Is(err, attestor.ErrEvidence) {
		t.Errorf("the judge whose question is canceled: %v", err)
	}
}

func (p Pair) broken(t *testing.T) {
	node, judge := p.open(t)
	payload, answer := evidence(t, node)
	if answer == nil {
		return
	}
	cut := errors.New("stream cut")
	_, err := judge.Judge(t.Context(), payload, func(context.Context, []byte) ([]byte, error) { return nil, cut })
	if !errors.Is(err, cut) || errors.Is(err, attestor.ErrEvidence) {
		t.Errorf("the judge's error is %v, want the stream's", err)
	}
}

// refused fails the test unless the judge refuses the payload as not believed.
func refused(t *testing.T, judge attestor.Judge, payload []byte, ask attestor.Ask) {
	t.Helper()
	proof, err := within(t, func() (attestor.Proof, error) { return judge.Judge(t.Context(), payload, ask) })
	switch {
	case err == nil:
		t.Errorf("believed, as %q", proof.Path)
	case !errors.Is(err, attestor.ErrEvidence) && !errors.Is(err, attestor.ErrUsed):
		t.Errorf("error %q is neither ErrEvidence nor ErrUsed", err)
	case proof.Path != "" || len(proof.Selectors) != 0:
		t.Errorf("a proof came with the refusal: %+v", proof)
	case len(err.Error()) > 1024:
		t.Errorf("the refusal is %d bytes long", len(err.Error()))
	}
}

// ask lets a type without challenges fail loudly when it is asked one.
func ask(answer attestor.Ask) attestor.Ask {
	return func(ctx context.Context, challenge []byte) ([]byte, error) {
		if answer == nil {
			return nil, errors.New("a challenge for a type that knows none")
		}
		if len(challenge) == 0 || len(challenge) > attestor.MaxEvidence {
			return nil, errors.New("challenge is empty or too large")
		}
		return answer(ctx, challenge)
	}
}
