package robust

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/lab/site"
)

// fill writes until the disk has not a byte left.
func fill(t *testing.T, path string) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for size := 1 << 20; size > 0; {
		if _, err := file.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
}

// TestFullDisk fills the disk under the data folder of a running server, and makes room again.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	root(t, "a disk of one's own")
	s := newSite(t)
	mount(t, s, "160m")
	health, metrics := freePort(t), freePort(t)
	s.ServerBlocks = fmt.Sprintf("node_attestor \"join_token\" {}\n"+
		"health_checks {\n  listener_enabled = true\n  bind_port = %d\n}\ntelemetry {\n  prometheus {\n    port = %d\n  }\n}", health, metrics)
	ready := func(code int, text string) func() error {
		return func() error {
			got, body, err := fetch(t, fmt.Sprintf("http://127.0.0.1:%d/ready", health))
			if err == nil && (got != code || !strings.Contains(body, text)) {
				err = fmt.Errorf("/ready says %d: %s", got, body)
			}
			return err
		}
	}
	gauge := func(want string) func() error {
		return func() error {
			_, body, err := fetch(t, fmt.Sprintf("http://127.0.0.1:%d/metrics", metrics))
			if err == nil && !strings.Contains(body, "\nassay_store_full "+want+"\n") {
				err = errors.New("assay_store_full is not " + want)
			}
			return err
		}
	}
	h := newHistory()
	start(t, s)
	conn := dial(t, s)
	a := newAgent(t, s, "agent", site.AgentOptions{})
	node := onlyAgent(t, s)
	h.mustCreate(t, conn, newEntry(node, "/one"))
	w := newWorkload(t, a.Socket)
	w.has("/one")
	eventually(t, "readiness", ready(http.StatusOK, "ok"))

	for round := range 2 {
		ballast := filepath.Join(s.DataDir, "ballast")
		fill(t, ballast)
		t.Run(fmt.Sprintf("round %d: changes are refused as ResourceExhausted, and nothing else is", round), func(t *testing.T) {
			exhaust(t, s, h, round)
			h.check(t, conn) // reads go on, and all that was acknowledged is there
			// Signing goes on: each of these the agent must ask the server for.
			for i := range 50 {
				if err := signed(t, a.Socket, fmt.Sprintf("full-%d-%d", round, i)); err != nil {
					t.Fatal(err)
				}
			}
			w.until("what it had", hasPath("/one"))
			if _, err := s.ServerCLI(patiently(t), "x509", "mint", "-spiffeID", "spiffe://"+site.TrustDomain+"/minted"); err != nil {
				t.Error(err)
			}
		})
		t.Run(fmt.Sprintf("round %d: readiness and a metric say so", round), func(t *testing.T) {
			eventually(t, "unreadiness", ready(http.StatusServiceUnavailable, "no space left"))
			eventually(t, "the metric", gauge("1"))
			if code, _, err := fetch(t, fmt.Sprintf("http://127.0.0.1:%d/live", health)); code != http.StatusOK || err != nil {
				t.Errorf("/live says %d, %v", code, err) // to start it again would help nobody
			}
		})
		t.Run(fmt.Sprintf("round %d: with room again everything goes on by itself", round), func(t *testing.T) {
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			eventually(t, "readiness", ready(http.StatusOK, "ok")) // though nobody has written since
			eventually(t, "the metric", gauge("0"))
			h.mustCreate(t, conn, newEntry(node, fmt.Sprintf("/after/%d", round)))
			h.check(t, conn)
			w.until("the new entry", hasPath(fmt.Sprintf("/after/%d", round)))
			h.revision(t, conn)
		})
	}
	t.Run("a server on a full disk starts, and serves what it has", func(t *testing.T) {
		fill(t, filepath.Join(s.DataDir, "ballast"))
		s.Server().Kill()
		start(t, s)
		h.check(t, dial(t, s))
		eventually(t, "a signature", func() error { return signed(t, a.Socket, "restarted") })
		if err := os.Remove(filepath.Join(s.DataDir, "ballast")); err != nil {
			t.Fatal(err)
		}
		h.mustCreate(t, dial(t, s), newEntry("/node", "/last"))
	})
	s.Server().Kill()
	mustCheck(t, s)
}

// exhaust creates entries until the server says that there is no room, several times.
func exhaust(t *testing.T, s *site.Site, h *history, round int) {
	t.Helper()
	conn := dial(t, s)
	refusals := 0
	for i := 0; refusals < 5; i++ {
		_, err := h.create(patiently(t), conn, newEntry("/node", fmt.Sprintf("/full/%d/%d", round, i)))
		switch {
		case err == nil && i < 100_000: // a page that was free
		case status.Code(err) == codes.ResourceExhausted:
			refusals++
		default:
			t.Fatalf("creation %d on a full disk: %v", i, err)
		}
	}
}
