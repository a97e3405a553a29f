package all_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/all"
	"github.com/assay-id/assay/attestor/all/node"
	"github.com/assay-id/assay/attestor/all/server"
	"github.com/assay-id/assay/attestor/attestortest"
	jointokennode "github.com/assay-id/assay/attestor/jointoken/node"
	jointokenserver "github.com/assay-id/assay/attestor/jointoken/server"
	x509popnode "github.com/assay-id/assay/attestor/x509pop/node"
	x509popserver "github.com/assay-id/assay/attestor/x509pop/server"
)

// sealed is an attestor of the test's own: the agent shows a name and answers with the key that it was told to
// attest for, so that what reaches the parts can be seen.
type sealed struct{ kind, name string }

type sealedConfig struct {
	Name string `hcl:"name,optional"`
}

func (s sealed) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	return s.EvidenceFor(ctx, attestor.KeyHash{})
}

func (s sealed) EvidenceFor(ctx context.Context, key attestor.KeyHash) ([]byte, attestor.Ask, error) {
	return []byte(s.name), func(_ context.Context, challenge []byte) ([]byte, error) {
		if len(challenge) != 16 {
			return nil, errors.New("no challenge")
		}
		return append(challenge, key[:]...), nil
	}, ctx.Err()
}

func (s sealed) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	return s.JudgeFor(ctx, payload, attestor.KeyHash{}, ask)
}

var challenges byte

func (s sealed) JudgeFor(ctx context.Context, payload []byte, key attestor.KeyHash, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	name, ok := strings.CutPrefix(string(payload), "name=")
	if !ok || strings.ContainsAny(name, " {}[]\"") {
		return attestor.Proof{}, attestor.Refusef("no name")
	}
	challenges++
	challenge := slices.Repeat([]byte{challenges}, 16)
	said, err := ask(ctx, challenge)
	if err != nil {
		return attestor.Proof{}, err
	}
	if string(said) != string(challenge)+string(key[:]) {
		return attestor.Proof{}, attestor.Refusef("it is for another key")
	}
	return attestor.Proof{
		Path: s.kind + "/" + name, CanReattest: true,
		Selectors: []attestor.Selector{{Type: s.kind, Value: "serial:" + name}},
	}, nil
}

func (s sealed) Follow(ctx context.Context, agents attestor.Admitted) error {
	for path := range agents.Each() {
		switch path {
		case s.kind + "/moves":
			if err := agents.Update(ctx, path, []attestor.Selector{{Type: s.kind, Value: "serial:moved"}}); err != nil {
				return err
			}
		case s.kind + "/gone":
			if err := agents.Evict(ctx, path); err != nil {
				return err
			}
		}
	}
	return nil
}

func sealedNode(kind string) attestor.NodeKind {
	return attestor.NodeKind{Type: kind, Config: func() any { return new(sealedConfig) }, Open: func(config any, _ attestor.Needs) (attestor.Node, error) {
		return sealed{kind, "name=" + config.(*sealedConfig).Name}, nil
	}}
}

func sealedJudge(kind string) attestor.JudgeKind {
	return attestor.JudgeKind{Type: kind, Config: func() any { return new(sealedConfig) }, Open: func(any, attestor.Needs) (attestor.Judge, error) {
		return sealed{kind, ""}, nil
	}}
}

var (
	nodeKind  = node.Kind([]attestor.NodeKind{x509popnode.Kind(), jointokennode.Kind(), sealedNode("red"), sealedNode("blue")})
	judgeKind = server.Kind([]attestor.JudgeKind{x509popserver.Kind(), jointokenserver.Kind(), sealedJudge("red"), sealedJudge("blue")})
)

const (
	x509popNode = `
		part "x509pop" {
			private_key_path   = "../x509pop/testdata/real-ecdsa.key"
			certificate_path   = "../x509pop/testdata/real-ecdsa.pem"
			intermediates_path = "../x509pop/testdata/real-intermediate.pem"
		}
	`
	x509popServer = `
		part "x509pop" {
			ca_bundle_path = "../x509pop/testdata/real-root.pem"
		}
	`
)

func openNode(t testing.TB, body string, needs attestor.Needs) attestor.Node {
	t.Helper()
	return attestortest.OpenNode(t, nodeKind, body, needs)
}

func openJudge(t testing.TB, body string, needs attestor.Needs) attestor.Judge {
	t.Helper()
	return attestortest.OpenJudge(t, judgeKind, body, needs)
}

func TestSuite(t *testing.T) {
	nodeConfig := "combination = \"metal\"\n" + x509popNode + "part \"red\" {\nname = \"one\"\n}\n"
	judgeConfig := "combination \"metal\" {\nid_from = \"red\"\n" + x509popServer + "part \"red\" {}\n}\n"
	proof := prove(t, nodeConfig, judgeConfig)
	var selectors []string
	for _, s := range proof.Selectors {
		selectors = append(selectors, s.String())
	}
	for _, want := range []string{"all:combination:metal", "all:part:red/one", "red:serial:one", "x509pop:subject:cn:web1"} {
		if !slices.Contains(selectors, want) {
			t.Errorf("no %s in %q", want, selectors)
		}
	}
	foreign := map[string][]byte{
		"a part alone":        []byte(`{"certificates":["MIIB"]}`),
		"another combination": []byte(`{"combination":"other","parts":[{"type":"red","payload":"bmFtZT1vbmU="},{"type":"x509pop","payload":"e30="}]}`),
		"no part":             []byte(`{"combination":"metal","parts":[]}`),
		"a part is missing":   []byte(`{"combination":"metal","parts":[{"type":"red","payload":"bmFtZT1vbmU="}]}`),
		"a part is empty":     []byte(`{"combination":"metal","parts":[{"type":"red","payload":"bmFtZT1vbmU="},{"type":"x509pop","payload":""}]}`),
		"a part twice":        []byte(`{"combination":"metal","parts":[{"type":"red","payload":"bmFtZT1vbmU="},{"type":"red","payload":"bmFtZT1vbmU="}]}`),
		"a part too much":     []byte(`{"combination":"metal","parts":[{"type":"red","payload":"bmFtZT1vbmU="},{"type":"x509pop","payload":"e30="},{"type":"blue","payload":"bmFtZT1vbmU="}]}`),
	}
	attestortest.Run(t, attestortest.Pair{
		Node: nodeKind, Judge: judgeKind, NodeConfig: nodeConfig, JudgeConfig: judgeConfig,
		Path: "all/metal/red/one", Selectors: selectors, Types: []string{"x509pop", "red"},
		CanReattest: true, Foreign: foreign, README: "README.md",
	})
}

// prove attests and returns the proof.
func prove(t testing.TB, nodeConfig, judgeConfig string) attestor.Proof {
	t.Helper()
	payload, answer, err := openNode(t, nodeConfig, attestor.Needs{}).Evidence(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	proof, err := openJudge(t, judgeConfig, attestor.Needs{}).Judge(t.Context(), payload, answer)
	if err != nil {
		t.Fatal(err)
	}
	return proof
}

const (
	twoNodes  = "combination = \"two\"\npart \"red\" {\nname = %q\n}\npart \"blue\" {\nname = %q\n}\n"
	twoJudges = "combination \"two\" {\n%s\npart \"red\" {}\npart \"blue\" {}\n}\n"
)

func TestPartsAreForOneKey(t *testing.T) {
	n, ok := openNode(t, fmt.Sprintf(twoNodes, "a", "a"), attestor.Needs{}).(attestor.KeyNode)
	if !ok {
		t.Fatal("the node takes no key")
	}
	j, ok := openJudge(t, fmt.Sprintf(twoJudges, ""), attestor.Needs{}).(attestor.KeyJudge)
	if !ok {
		t.Fatal("the judge takes no key")
	}
	mine, another := attestor.KeyHash{1}, attestor.KeyHash{2}
	payload, answer, err := n.EvidenceFor(t.Context(), mine)
	if err != nil {
		t.Fatal(err)
	}
	proof, err := j.JudgeFor(t.Context(), payload, mine, answer)
	if err != nil || !slices.Equal(proof.Parts, []string{"red/a", "blue/a"}) {
		t.Errorf("%+v, %v", proof, err)
	}
	if _, err := j.JudgeFor(t.Context(), payload, another, answer); !errors.Is(err, attestor.ErrEvidence) {
		t.Errorf("evidence for another key: %v", err)
	}
	t.Run("parts of two conversations, each for a key of its own", func(t *testing.T) {
		_, byOther, err := n.EvidenceFor(t.Context(), another)
		if err != nil {
			t.Fatal(err)
		}
		mixed := func(ctx context.Context, challenge []byte) ([]byte, error) {
			var c all.Challenge
			if err := json.Unmarshal(challenge, &c); err != nil {
				return nil, err
			}
			if c.Type == "blue" {
				return byOther(ctx, challenge)
			}
			return answer(ctx, challenge)
		}
		if _, err := j.JudgeFor(t.Context(), payload, mine, mixed); !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("one part's answer in another's name", func(t *testing.T) {
		swapped := func(ctx context.Context, challenge []byte) ([]byte, error) {
			said, err := answer(ctx, challenge)
			return []byte(strings.Replace(string(said), `"type":"red"`, `"type":"blue"`, 1)), err
		}
		if _, err := j.JudgeFor(t.Context(), payload, mine, swapped); !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
	})
}

func TestPartsMustHaveAValueInCommon(t *testing.T) {
	judge := openJudge(t, fmt.Sprintf(twoJudges, `same = [["red:serial", "blue:serial"]]`), attestor.Needs{})
	for name, ok := range map[string]bool{"a": true, "b": false} {
		payload, answer, err := openNode(t, fmt.Sprintf(twoNodes, "a", name), attestor.Needs{}).Evidence(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		proof, err := judge.Judge(t.Context(), payload, answer)
		if (err == nil) != ok || err != nil && !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("red a, blue %s: %v", name, err)
		}
		if len(proof.Parts) != 0 {
			t.Errorf("parts that name each other are bound to the node, so none can be renewed: %q", proof.Parts)
		}
	}
	t.Run("and what no value holds to the rest is bound", func(t *testing.T) {
		body := "combination = \"metal\"\n" + x509popNode + "part \"red\" {\nname = \"a\"\n}\npart \"blue\" {\nname = \"a\"\n}\n"
		config := "combination \"metal\" {\nid_from = \"red\"\nsame = [[\"blue:serial\", \"red:serial\"]]\n" + x509popServer + "part \"red\" {}\npart \"blue\" {}\n}\n"
		proof := prove(t, body, config)
		if len(proof.Parts) != 2 || !strings.HasPrefix(proof.Parts[0], "x509pop/") || proof.Parts[1] != "red/a" {
			t.Errorf("bound are %q", proof.Parts)
		}
	})
}

// tokens burns one token.
type tokens struct{ left map[string]bool }

func (k *tokens) BurnToken(_ context.Context, token string) error {
	if !k.left[token] {
		return attestor.Refusef("join token does not exist or has already been used")
	}
	delete(k.left, token)
	return nil
}

func TestJoinTokenIsSpentWhenAllElseIsProved(t *testing.T) {
	const token = "0f7ba2b4-5a6e-4f5e-8d33-2f54a3f2f8f1"
	burner := &tokens{map[string]bool{token: true}}
	judge := openJudge(t, "combination \"handed-out\" {\nid_from = \"x509pop\"\npart \"join_token\" {}\n"+x509popServer+"}\n", attestor.Needs{Tokens: burner})
	payload, answer, err := openNode(t, "combination = \"handed-out\"\npart \"join_token\" {}\n"+x509popNode, attestor.Needs{JoinToken: token}).Evidence(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	silent := func(context.Context, []byte) ([]byte, error) {
		return []byte(`{"type":"x509pop","answer":"e30="}`), nil
	}
	if _, err := judge.Judge(t.Context(), payload, silent); !errors.Is(err, attestor.ErrEvidence) {
		t.Errorf("error is %v", err)
	}
	if !burner.left[token] {
		t.Fatal("a certificate that was not proved cost the token")
	}
	proof, err := judge.Judge(t.Context(), payload, answer)
	if err != nil || proof.CanReattest || !strings.HasPrefix(proof.Path, "all/handed-out/x509pop/") {
		t.Errorf("%+v, %v", proof, err)
	}
	if _, err := judge.Judge(t.Context(), payload, answer); !errors.Is(err, attestor.ErrEvidence) {
		t.Errorf("the token is good twice: %v", err)
	}
}

// fleet is what a server has admitted.
type fleet struct {
	nodes map[string]attestor.Set // only read

	mu      sync.Mutex // guards what follows: parts tell of changes side by side
	updated map[string][]attestor.Selector
	evicted []string
}

func (f *fleet) Each() iter.Seq2[string, attestor.Set] {
	return func(yield func(string, attestor.Set) bool) {
		for path, set := range f.nodes {
			if !yield(path, set) {
				return
			}
		}
	}
}

func (f *fleet) Update(_ context.Context, path string, selectors []attestor.Selector) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.updated[path] = selectors
	return nil
}

func (f *fleet) Evict(_ context.Context, path string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.evicted = append(f.evicted, path)
	return nil
}

func TestFollow(t *testing.T) {
	set := func(red, blue string) attestor.Set {
		return attestor.NewSet(
			attestor.Selector{Type: "all", Value: "combination:two"}, attestor.Selector{Type: "all", Value: "part:red/" + red},
			attestor.Selector{Type: "all", Value: "part:blue/" + blue}, attestor.Selector{Type: "red", Value: "serial:x"},
			attestor.Selector{Type: "blue", Value: "serial:x"})
	}
	follow := func(t *testing.T, extra string) *fleet {
		t.Helper()
		f := &fleet{updated: map[string][]attestor.Selector{}, nodes: map[string]attestor.Set{
			"all/two/red/stays": set("stays", "stays"), "all/two/red/moves": set("moves", "stays"),
			"all/two/red/gone": set("stays", "gone"), "all/other/red/moves": set("moves", "gone"),
		}}
		j, ok := openJudge(t, fmt.Sprintf(twoJudges, extra), attestor.Needs{}).(attestor.Follower)
		if !ok {
			t.Fatal("it follows nobody")
		}
		if err := j.Follow(t.Context(), f); err != nil {
			t.Fatal(err)
		}
		return f
	}
	t.Run("a part's changes are the node's", func(t *testing.T) {
		f := follow(t, "")
		want := []string{"all:combination:two", "all:part:blue/stays", "all:part:red/moves", "blue:serial:x", "red:serial:moved"}
		if got := attestor.NewSet(f.updated["all/two/red/moves"]...).Strings(); !slices.Equal(got, want) || len(f.updated) != 1 {
			t.Errorf("updated %q", f.updated)
		}
		if !slices.Equal(f.evicted, []string{"all/two/red/gone"}) {
			t.Errorf("evicted %q", f.evicted)
		}
	})
	t.Run("a node whose parts do not belong together any more is evicted", func(t *testing.T) {
		f := follow(t, `same = [["red:serial", "blue:serial"]]`)
		slices.Sort(f.evicted)
		if len(f.updated) != 0 || !slices.Equal(f.evicted, []string{"all/two/red/gone", "all/two/red/moves"}) {
			t.Errorf("updated %q, evicted %q", f.updated, f.evicted)
		}
	})
}

func TestConfigurationIsRefused(t *testing.T) {
	red, blue := "part \"red\" {}\n", "part \"blue\" {}\n"
	for body, says := range map[string]string{
		"":                                  "no combination block",
		"combination \"a\" {\n" + red + "}": "there are 1 part blocks",
		"combination \"A B\" {\n" + red + blue + "}":                                              "its name must be",
		"combination \"a\" {\n" + red + red + "}":                                                 "Duplicate part",
		"combination \"a\" {\n" + red + "part \"all\" {}\n}":                                      "no node attestor \"all\" that can be a part",
		"combination \"a\" {\nid_from = \"x509pop\"\n" + red + blue + "}":                         "id_from",
		"combination \"a\" {\nsame = [[\"red:serial\"]]\n" + red + blue + "}":                     "needs two selectors",
		"combination \"a\" {\nsame = [[\"red:serial\", \"green:serial\"]]\n" + red + blue + "}":   "same: \"green:serial\"",
		"combination \"a\" {\n" + red + blue + "}\ncombination \"a\" {\n" + red + blue + "}":      "there twice",
		"combination \"a\" {\n" + red + "part \"blue\" {\ncolour = 1\n}\n}":                       "Unsupported argument",
		"combination \"a\" {\n" + red + "part \"x509pop\" {\nca_bundle_path = \"/nowhere\"\n}\n}": "part \"x509pop\": read CA bundle",
	} {
		config, diags := attestortest.Decode(judgeKind.Config, body)
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		if _, err := judgeKind.Open(config, attestor.Needs{}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", body, err, says)
		}
	}
	for body, says := range map[string]string{
		"combination = \"a\"\n" + red:        "there are 1 part blocks",
		"combination = \"/\"\n" + red + blue: "combination",
		"combination = \"a\"\n" + red + "part \"x509pop\" {\nprivate_key_path = \"/nowhere\"\ncertificate_path = \"/nowhere\"\n}\n": "part \"x509pop\"",
	} {
		config, diags := attestortest.Decode(nodeKind.Config, body)
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		if _, err := nodeKind.Open(config, attestor.Needs{}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", body, err, says)
		}
	}
}

func FuzzEvidence(f *testing.F) {
	f.Add([]byte(`{"combination":"two","parts":[{"type":"red","payload":"bmFtZT1h"},{"type":"blue","payload":"bmFtZT1h"}]}`))
	judge := openJudge(f, fmt.Sprintf(twoJudges, ""), attestor.Needs{})
	f.Fuzz(func(t *testing.T, payload []byte) {
		_, err := judge.Judge(t.Context(), payload, func(context.Context, []byte) ([]byte, error) { return nil, os.ErrClosed })
		if !errors.Is(err, attestor.ErrEvidence) && !errors.Is(err, os.ErrClosed) {
			t.Fatal(err)
		}
	})
}
