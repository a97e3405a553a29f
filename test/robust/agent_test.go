package robust

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/assay-id/assay/test/lab/site"
)

// probes returns the block that gives an agent probes at the port.
func probes(port int) string {
	return fmt.Sprintf("health_checks {\n  listener_enabled = true\n  bind_port = %d\n}", port)
}

// unixOnly are the blocks of an agent that joins by token.
const unixOnly = "node_attestor \"join_token\" {}\nworkload_attestor \"unix\" {}\n"

// TestAgentRestart kills and restarts an agent while its server is away. Its socket is there at every
// moment, and what is still valid is served from what it kept.
func TestAgentRestart(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	h := newHistory()
	start(t, s)
	a := newAgent(t, s, "agent", site.AgentOptions{})
	h.mustCreate(t, dial(t, s), newEntry(onlyAgent(t, s), "/one"))
	w := newWorkload(t, a.Socket)
	had := w.has("/one").DefaultSVID().Certificates[0]
	eventually(t, "the SVID on disk", func() error {
		_, err := os.Stat(filepath.Join(a.Data(), "svids.sealed"))
		return err
	})
	socketThere := watchSocket(t, a.Socket)
	defer socketThere()
	s.Server().Kill()

	for _, c := range []struct {
		name string
		end  func() error
	}{
		{"killed", func() error { a.Kill(); return nil }},
		{"stopped", func() error { return a.Stop(15 * time.Second) }},
		{"killed again", func() error { a.Kill(); return nil }},
	} {
		t.Run("an agent that was "+c.name+" while its server is away serves what is valid", func(t *testing.T) {
			if err := c.end(); err != nil {
				t.Fatal(err)
			}
			// Half a write of one that was killed is no reason to stop either.
			if err := os.WriteFile(filepath.Join(a.Data(), ".own.sealed.123"), []byte("half"), 0o600); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if err := a.Launch(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the SVID", func() error {
				got, err := client(t, a.Socket).FetchX509SVID(patiently(t))
				if err == nil && !got.Certificates[0].Equal(had) {
					err = fmt.Errorf("another one, of %s", got.ID)
				}
				return err
			})
			t.Logf("served %v after the start", time.Since(began).Round(time.Millisecond))
			w.has("/one") // and who was there before is back
		})
	}
	process := a.Process
	t.Cleanup(process.Kill)
	t.Run("when the server is back the agent follows it again", func(t *testing.T) {
		if err := s.StartServer(patiently(t)); err != nil {
			t.Fatal(err)
		}
		h.check(t, dial(t, s))
		h.mustCreate(t, dial(t, s), newEntry(onlyAgent(t, s), "/two"))
		w.has("/one", "/two")
	})
	s.Server().Kill()
	socketThere()
}

// TestAgentLost loses the state of an agent that joined with a token, which is spent.
func TestAgentLost(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	h := newHistory()
	start(t, s)
	port := freePort(t)
	a := newAgent(t, s, "agent", site.AgentOptions{Blocks: unixOnly + probes(port), Token: token(t, s)})
	node := onlyAgent(t, s)
	h.mustCreate(t, dial(t, s), newEntry(node, "/one"))
	newWorkload(t, a.Socket).has("/one")
	ready := func(code int, text ...string) {
		t.Helper()
		eventually(t, "readiness", func() error {
			got, body, err := fetch(t, fmt.Sprintf("http://127.0.0.1:%d/ready", port))
			for _, part := range text {
				if err == nil && (got != code || !strings.Contains(body, part)) {
					err = fmt.Errorf("/ready says %d: %s, and not %q", got, body, part)
				}
			}
			return err
		})
	}
	ready(http.StatusOK, "ok")
	// Everything that was kept is there before it is lost.
	eventually(t, "the kept files", func() error {
		for _, name := range []string{"own.sealed", "bundle.sealed", "picture.sealed", "svids.sealed", "agent-keys.json"} {
			if _, err := os.Stat(filepath.Join(a.Data(), name)); err != nil {
				return err
			}
		}
		return nil
	})
	for _, c := range []struct {
		name string
		lose func(t *testing.T)
		said []string
	}{
		{"its own SVID overwritten", func(t *testing.T) {
			t.Helper()
			damage(t, filepath.Join(a.Data(), "own.sealed"))
		}, []string{"no valid SVID of its own", "assay-server token generate", "own.sealed"}},
		{"its key cut short", func(t *testing.T) {
			t.Helper()
			truncate(t, filepath.Join(a.Data(), "agent-keys.json"), 20)
		}, []string{"no picture from the server yet", "assay-server token generate", "agent-keys.json"}},
		{"its folder removed", func(t *testing.T) {
			t.Helper()
			if err := os.RemoveAll(a.Data()); err != nil {
				t.Fatal(err)
			}
		}, []string{"no picture from the server yet", "assay-server token generate"}},
	} {
		t.Run("with "+c.name+" it stays, says what is lost and which token is needed", func(t *testing.T) {
			a.Kill()
			c.lose(t)
			launchAgent(t, a)
			ready(http.StatusServiceUnavailable, c.said...)
			if code, body, err := fetch(t, fmt.Sprintf("http://127.0.0.1:%d/live", port)); code != http.StatusOK || err != nil {
				t.Errorf("/live says %d: %s, %v", code, body, err)
			}
			a.Kill()
			// The token that was asked for.
			again, err := s.NewAgent(patiently(t), "agent", site.AgentOptions{Blocks: unixOnly + probes(port), Token: token(t, s)})
			if err != nil {
				t.Fatal(err)
			}
			*a = *again
			startAgent(t, a)
			ready(http.StatusOK, "ok")
			h.mustCreate(t, dial(t, s), newEntry(newest(t, s, &node), "/again/"+strings.ReplaceAll(c.name, " ", "-")))
			newWorkload(t, a.Socket).has("/again/" + strings.ReplaceAll(c.name, " ", "-"))
		})
	}
}

// TestAgentLostAttests loses the state of an agent that can attest as often as it likes.
func TestAgentLostAttests(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server, agent := machine(t, s)
	s.ServerBlocks = server
	h := newHistory()
	start(t, s)
	a := newAgent(t, s, "agent", site.AgentOptions{Blocks: agent})
	node := onlyAgent(t, s)
	h.mustCreate(t, dial(t, s), newEntry(node, "/one"))
	w := newWorkload(t, a.Socket)
	w.has("/one")
	eventually(t, "the kept files", func() error {
		_, err := os.Stat(filepath.Join(a.Data(), "own.sealed"))
		return err
	})
	for _, c := range []struct {
		name string
		lose func(t *testing.T)
	}{
		{"its key overwritten", func(t *testing.T) { t.Helper(); damage(t, filepath.Join(a.Data(), "agent-keys.json")) }},
		{"its own SVID removed", func(t *testing.T) { t.Helper(); remove(t, filepath.Join(a.Data(), "own.sealed")) }},
		{"its folder removed", func(t *testing.T) {
			t.Helper()
			if err := os.RemoveAll(a.Data()); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run("with "+c.name+" it attests again, and is who it was", func(t *testing.T) {
			a.Kill()
			c.lose(t)
			startAgent(t, a)
			again := "/again/" + strings.ReplaceAll(c.name, " ", "-")
			h.mustCreate(t, dial(t, s), newEntry(node, again))
			w.until("what it had and what is new", func(c *workloadapi.X509Context, err error) bool {
				return hasPath("/one")(c, err) && hasPath(again)(c, err)
			})
			if now := onlyAgent(t, s); now != node {
				t.Errorf("the agent was %s and is %s", node, now)
			}
			eventually(t, "the kept files", func() error {
				_, err := os.Stat(filepath.Join(a.Data(), "own.sealed"))
				return err
			})
		})
	}
}

// token makes a join token.
func token(t *testing.T, s *site.Site) string {
	t.Helper()
	text, err := s.Token(patiently(t))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// newest evicts the agent that was there before and returns the one that came.
func newest(t *testing.T, s *site.Site, before *string) string {
	t.Helper()
	if _, err := s.ServerCLI(patiently(t), "agent", "evict", "-spiffeID", "spiffe://"+site.TrustDomain+*before); err != nil {
		t.Fatal(err)
	}
	*before = onlyAgent(t, s)
	return *before
}

// damage overwrites the middle of a file.
func damage(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := len(b) / 3; at < len(b)/3+8; at++ {
		b[at] ^= 0xff
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
