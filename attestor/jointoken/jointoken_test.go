package jointoken_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/jointoken"
	"github.com/assay-id/assay/attestor/jointoken/node"
	"github.com/assay-id/assay/attestor/jointoken/server"
)

const token = "0f7ba2b4-5a6e-4f5e-8d33-2f54a3f2f8f1"

// burner is a fake of server/records: tokens in memory, each spent once.
type burner struct {
	mu      sync.Mutex
	tokens  map[string]bool // true: expired
	failing error
	burnt   int
}

func (b *burner) BurnToken(ctx context.Context, token string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failing != nil {
		return b.failing
	}
	expired, found := b.tokens[token]
	if !found {
		return attestor.Refusef("join token does not exist or has already been used")
	}
	delete(b.tokens, token)
	b.burnt++
	if expired {
		return attestor.Refusef("join token expired")
	}
	return nil
}

func TestSuite(t *testing.T) {
	attestortest.Run(t, attestortest.Pair{
		Node: node.Kind(), Judge: server.Kind(),
		Needs: func(*testing.T) attestor.Needs {
			return attestor.Needs{JoinToken: token, Tokens: &burner{tokens: map[string]bool{token: false}}}
		},
		Path:    "join_token/" + token,
		OneTime: true,
		Foreign: map[string][]byte{
			"unknown token":       []byte("0f7ba2b4-5a6e-4f5e-8d33-2f54a3f2f8f2"),
			"x509pop evidence":    []byte(`{"certificates":["MIIB"]}`),
			"token and a newline": []byte(token + "\n"),
			"upper case":          []byte(strings.ToUpper(token)),
		},
		README: "README.md",
	})
}

func TestJudge(t *testing.T) {
	open := func(t *testing.T, b attestor.TokenBurner) attestor.Judge {
		t.Helper()
		judge, err := server.Kind().Open(server.Kind().Config(), attestor.Needs{Tokens: b})
		if err != nil {
			t.Fatal(err)
		}
		return judge
	}
	t.Run("the texts are SPIRE's", func(t *testing.T) {
		judge := open(t, &burner{tokens: map[string]bool{"late": true}})
		for payload, want := range map[string]string{
			"unknown":                "join token does not exist or has already been used",
			"../../server":           "join token does not exist or has already been used",
			"late":                   "join token expired",
			"a/b":                    "join token does not exist or has already been used",
			".":                      "join token does not exist or has already been used",
			"..":                     "join token does not exist or has already been used",
			"a%2fb":                  "join token does not exist or has already been used",
			"tökén":                  "join token does not exist or has already been used",
			strings.Repeat("a", 256): "join token does not exist or has already been used",
		} {
			_, err := judge.Judge(t.Context(), []byte(payload), nil)
			if err == nil || err.Error() != want || !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("token %.20q: %v, want %s", payload, err, want)
			}
		}
	})
	t.Run("of 50 agents with one token one wins", func(t *testing.T) {
		tokens := &burner{tokens: map[string]bool{token: false}}
		judge := open(t, tokens)
		var all sync.WaitGroup
		won := make(chan string, 50)
		for range 50 {
			all.Go(func() {
				if proof, err := judge.Judge(t.Context(), []byte(token), nil); err == nil {
					won <- proof.Path
				}
			})
		}
		all.Wait()
		if len(won) != 1 || <-won != "join_token/"+token {
			t.Errorf("%d agents won", len(won)+1)
		}
	})
	t.Run("a store that fails is not the node's fault", func(t *testing.T) {
		failing := errors.New("disk full")
		_, err := open(t, &burner{failing: failing}).Judge(t.Context(), []byte(token), nil)
		if !errors.Is(err, failing) || errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("the token of a caller who hung up is not burnt", func(t *testing.T) {
		tokens := &burner{tokens: map[string]bool{token: false}}
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := open(t, tokens).Judge(gone, []byte(token), nil); err == nil || tokens.burnt != 0 {
			t.Errorf("error %v, %d burnt", err, tokens.burnt)
		}
	})
	t.Run("a server without a token store does not open", func(t *testing.T) {
		if _, err := server.Kind().Open(server.Kind().Config(), attestor.Needs{}); err == nil {
			t.Error("opened")
		}
	})
}

func TestNode(t *testing.T) {
	t.Run("a token that cannot be one is refused at start, without being shown", func(t *testing.T) {
		_, err := node.Kind().Open(node.Kind().Config(), attestor.Needs{JoinToken: "se/cret"})
		if err == nil || strings.Contains(err.Error(), "cret") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("the newline of a token file is not part of the token", func(t *testing.T) {
		n, err := node.Kind().Open(node.Kind().Config(), attestor.Needs{JoinToken: token + "\n"})
		if err != nil {
			t.Fatal(err)
		}
		if payload, _, err := n.Evidence(t.Context()); err != nil || string(payload) != token {
			t.Errorf("evidence %q, %v", payload, err)
		}
	})
	t.Run("no token is an error only when one is needed", func(t *testing.T) {
		n, err := node.Kind().Open(node.Kind().Config(), attestor.Needs{})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := n.Evidence(t.Context()); err == nil {
			t.Error("evidence without a token")
		}
	})
}

func FuzzCheck(f *testing.F) {
	for _, seed := range []string{"", ".", "..", "...", token, "a/b", "a\x00b", strings.Repeat("x", 256)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if jointoken.Check(s) == nil {
			checkSegment(t, s)
		}
	})
}
