package external_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/attestor/external/node"
	"github.com/assay-id/assay/attestor/external/server"
	"github.com/assay-id/assay/attestor/external/workload"
	"github.com/assay-id/assay/test/fake/spireplugin"
)

func TestMain(m *testing.M) {
	spireplugin.RunIfAsked()
	os.Exit(m.Run())
}

// block is a configuration of the test itself as a plugin.
func block(t *testing.T, kind, mode string) string {
	t.Helper()
	path, sum := spireplugin.Self(t)
	args := spireplugin.Args(kind)
	data := fmt.Sprintf("mode = %q\nsecret = %q", mode, "open sesame")
	return fmt.Sprintf("name = %q\nplugin_cmd = %q\nplugin_args = [%q, %q]\nplugin_env = [%q]\nplugin_checksum = \"%x\"\nplugin_data = %q", spireplugin.Type, path, args[0], args[1], spireplugin.Env()[0], sum, data)
}

func config(t *testing.T, kind, mode string) any {
	t.Helper()
	c, diags := attestortest.Decode(func() any { return new(external.Config) }, block(t, kind, mode))
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	return c
}

func needs(t *testing.T) attestor.Needs {
	log := logrus.New()
	log.SetOutput(t.Output())
	return attestor.Needs{TrustDomain: attestortest.TrustDomain, Log: log, Now: time.Now}
}

// closing ends what was opened when the test ends.
func closing(t *testing.T, part any) {
	t.Helper()
	closer, ok := part.(io.Closer)
	if !ok {
		t.Fatalf("%T cannot be closed", part)
	}
	t.Cleanup(func() { _ = closer.Close() })
}

func openJudge(t *testing.T, mode string, n attestor.Needs) attestor.Judge {
	t.Helper()
	judge, err := server.Kind().Open(config(t, spireplugin.NodeServer, mode), n)
	if err != nil {
		t.Fatal(err)
	}
	closing(t, judge)
	return judge
}

func openNode(t *testing.T, mode string) attestor.Node {
	t.Helper()
	n, err := node.Kind().Open(config(t, spireplugin.NodeAgent, mode), needs(t))
	if err != nil {
		t.Fatal(err)
	}
	closing(t, n)
	return n
}

func TestNode(t *testing.T) {
	ours, theirs := node.Kind(), server.Kind()
	ours.Type, theirs.Type = spireplugin.Type, spireplugin.Type // as the wiring has it
	attestortest.Run(t, attestortest.Pair{
		Node: ours, Judge: theirs,
		NodeConfig: block(t, spireplugin.NodeAgent, ""), JudgeConfig: block(t, spireplugin.NodeServer, ""),
		Path: spireplugin.Type + "/node-one", Selectors: []string{spireplugin.Type + ":node:node-one"}, CanReattest: true,
		Foreign: map[string][]byte{"a node nobody knows": []byte("node-three")},
		README:  "README.md",
	})
}

func TestWorkload(t *testing.T) {
	kind := workload.Kind()
	kind.Type = spireplugin.Type
	pid := os.Getpid()
	attestortest.RunWorkload(t, attestortest.Workload{
		Kind: kind, Config: block(t, spireplugin.Workload, ""), README: "README.md",
		Cases: map[string]attestortest.Case{"what the plugin says is of its type": {
			Process: attestor.Process{PID: pid, Proc: "/proc"},
			Want:    []string{spireplugin.Type + ":seen:true", fmt.Sprintf("%s:pid:%d", spireplugin.Type, pid)},
		}},
		Gone: attestor.Process{PID: 1 << 29, Proc: "/proc"},
	})
	for _, c := range []struct{ name, mode, want, wrong string }{
		{"nothing to say is no error", "nothing", "", ""},
		{"a value that looks like a selector of another type is of its own", "other-type", spireplugin.Type + ":docker:label:app:shop " + spireplugin.Type + ":unix:uid:0", ""},
		{"too many selectors are refused", "many", "", "answered 2001 selectors, the limit is 1000"},
		{"an empty one is refused", "empty", "", "without a value"},
		{"one with a control character is refused", "control", "", "contains a control character"},
		{"a huge answer is refused", "big", "", "ResourceExhausted"},
		{"its error is told", "error", "", "it went wrong in"},
		{"its end is told", "crash", "", "plugin has ended"},
	} {
		t.Run(c.name, func(t *testing.T) {
			opened, err := workload.Kind().Open(config(t, spireplugin.Workload, c.mode), needs(t))
			if err != nil {
				t.Fatal(err)
			}
			closing(t, opened)
			got, err := opened.Attest(t.Context(), attestor.Process{PID: pid})
			if c.wrong != "" {
				if err == nil || !strings.Contains(err.Error(), c.wrong) || len(got) != 0 {
					t.Errorf("got %v, %v, want %q", got, err, c.wrong)
				}
				return
			}
			if err != nil || strings.Join(attestor.NewSet(got...).Strings(), " ") != c.want {
				t.Errorf("got %v, %v, want %q", got, err, c.want)
			}
		})
	}
}

func answering(secret string) attestor.Ask {
	return func(_ context.Context, challenge []byte) ([]byte, error) {
		return spireplugin.Proof(secret, challenge), nil
	}
}

func TestLyingJudge(t *testing.T) {
	for _, c := range []struct{ name, mode, want string }{
		{"an agent of another trust domain", "foreign", "answered the ID spiffe://elsewhere.test/spire/agent/shared_secret/node-one, which is not below spiffe://example.org/spire/agent/shared_secret/"},
		{"a workload", "workload", "which is not below"},
		{"the server", "server", "which is not below"},
		{"an agent of another attestor", "neighbour", "which is not below"},
		{"no SPIFFE ID", "no-id", "answered no SPIFFE ID"},
		{"too many selectors", "many", "answered 2001 selectors, the limit is 1000"},
		{"no selector", "control", "contains a control character"},
		{"no decision", "silent", "it ended the conversation without a decision"},
		{"too much", "big", "ResourceExhausted"},
		{"nothing but its end", "crash", "plugin has ended"},
		{"an error", "error", "it went wrong in"},
	} {
		t.Run(c.name, func(t *testing.T) {
			proof, err := openJudge(t, c.mode, needs(t)).Judge(t.Context(), []byte("node-one"), answering("open sesame"))
			if err == nil || !strings.Contains(err.Error(), c.want) || proof.Path != "" {
				t.Fatalf("got %+v, %v, want %q", proof, err, c.want)
			}
			if errors.Is(err, attestor.ErrEvidence) || errors.Is(err, attestor.ErrUsed) {
				t.Errorf("the node is blamed for it: %v", err)
			}
		})
	}
	t.Run("a node that cannot prove itself is refused in the plugin's words", func(t *testing.T) {
		_, err := openJudge(t, "", needs(t)).Judge(t.Context(), []byte("node-one"), answering("open barley"))
		if !errors.Is(err, attestor.ErrEvidence) || err.Error() != `plugin "shared_secret": the node does not know the secret` {
			t.Errorf("got %v", err)
		}
	})
	t.Run("challenges without an end are ended by whoever asks them", func(t *testing.T) {
		rounds := 0
		enough := errors.New("enough")
		_, err := openJudge(t, "endless", needs(t)).Judge(t.Context(), []byte("node-one"), func(context.Context, []byte) ([]byte, error) {
			if rounds++; rounds > 16 {
				return nil, enough
			}
			return []byte("x"), nil
		})
		if !errors.Is(err, enough) {
			t.Errorf("got %v", err)
		}
	})
}

// store knows agents.
type store map[string]bool

func (s store) Admitted(_ context.Context, id spiffeid.ID) (bool, error) { return s[id.Path()], nil }

func TestTrustOnFirstUse(t *testing.T) {
	n := needs(t)
	n.Agents = store{"/spire/agent/shared_secret/node-two": true}
	judge := openJudge(t, "once", n)
	proof, err := judge.Judge(t.Context(), []byte("node-one"), answering("open sesame"))
	if err != nil || proof.CanReattest {
		t.Errorf("a new node: got %+v, %v", proof, err)
	}
	if _, err := judge.Judge(t.Context(), []byte("node-two"), answering("open sesame")); !errors.Is(err, attestor.ErrUsed) {
		t.Errorf("a known node: got %v", err)
	}
}

func TestLyingNode(t *testing.T) {
	for _, c := range []struct{ name, mode, want string }{
		{"no evidence", "empty", "evidence of 0 bytes"},
		{"too much evidence", "huge", "evidence of 800000 bytes"},
		{"an answer before the question", "wrong-message", "its first answer is no evidence"},
		{"nothing", "silent", "it ended the conversation before it answered evidence"},
		{"nothing but its end", "crash", "plugin has ended"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := openNode(t, c.mode).Evidence(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	t.Run("one that answers no challenges says so", func(t *testing.T) {
		payload, answer, err := openNode(t, "no-answer").Evidence(t.Context())
		if err != nil || string(payload) != "node-one" {
			t.Fatalf("got %q, %v", payload, err)
		}
		for range 2 {
			if _, err := answer(t.Context(), []byte("x")); err == nil || !strings.Contains(err.Error(), "it ended the conversation before it answered the challenge") {
				t.Errorf("got %v", err)
			}
		}
	})
}

func TestCheck(t *testing.T) {
	path, sum := spireplugin.Self(t)
	good := func() *external.Config {
		return &external.Config{Name: "x", Cmd: path, Checksum: fmt.Sprintf("%x", sum)}
	}
	complain := func(key, summary, detail string) {
		t.Errorf("complaint about a good block: %s: %s; %s", key, summary, detail)
	}
	good().Check(complain)
	good().Probe(complain)
	for _, c := range []struct {
		name   string
		change func(c *external.Config)
		key    string
		want   string
	}{
		{"no name", func(c *external.Config) { c.Name = "" }, "name", "cannot be the type of a selector"},
		{"a colon", func(c *external.Config) { c.Name = "a:b" }, "name", "cannot be the type of a selector"},
		{"a slash", func(c *external.Config) { c.Name = "../x509pop" }, "name", "cannot be the type of a selector"},
		{"a long name", func(c *external.Config) { c.Name = strings.Repeat("a", 65) }, "name", "cannot be the type of a selector"},
		{"a name that verdicts have", func(c *external.Config) { c.Name = "scan" }, "name", "not a plugin's to give"},
		{"no checksum", func(c *external.Config) { c.Checksum = "" }, "plugin_checksum", "sha256sum prints it"},
		{"another checksum", func(c *external.Config) { c.Checksum = strings.Repeat("00", 32) }, "plugin_checksum", "plugin_checksum demands"},
		{"no program", func(c *external.Config) { c.Cmd = "/nowhere" }, "plugin_cmd", "There is no file /nowhere."},
		{"a directory", func(c *external.Config) { c.Cmd = "/" }, "plugin_cmd", "is not a regular file"},
		{"no variable", func(c *external.Config) { c.Env = []string{"A B=secret"} }, "plugin_env", `"A B" is neither NAME nor NAME=value`},
	} {
		t.Run(c.name, func(t *testing.T) {
			block := good()
			c.change(block)
			var said []string
			say := func(key, _, detail string) { said = append(said, key+": "+detail) }
			block.Check(say)
			block.Probe(say)
			if len(said) != 1 || !strings.HasPrefix(said[0], c.key+": ") || !strings.Contains(said[0], c.want) || strings.Contains(said[0], "secret") {
				t.Errorf("said %q, want %s: %s", said, c.key, c.want)
			}
		})
	}
}
