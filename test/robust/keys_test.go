package robust

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/assay-id/assay/test/lab/site"
)

// TestServerKeys loses the server's key file in each way.
func TestServerKeys(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	h := newHistory()
	start(t, s)
	a := newAgent(t, s, "agent", site.AgentOptions{})
	node := onlyAgent(t, s)
	h.mustCreate(t, dial(t, s), newEntry(node, "/one"))
	w := newWorkload(t, a.Socket)
	had := w.has("/one")
	bundle := shown(t, s)
	keys := filepath.Join(s.ServerData(), "keys.json")
	stop(t, s)

	for _, c := range []struct {
		name string
		harm func(t *testing.T)
		said string
	}{
		{"truncated", func(t *testing.T) { t.Helper(); truncate(t, keys, 100) }, "damaged"},
		{"emptied", func(t *testing.T) { t.Helper(); truncate(t, keys, 0) }, "damaged"},
		{"removed", func(t *testing.T) { t.Helper(); remove(t, keys) }, "missing"},
	} {
		t.Run("a key file that is "+c.name+" is replaced by the previous generation, loudly, and the same authorities go on", func(t *testing.T) {
			truncate(t, s.ServerLog(), 0)
			c.harm(t)
			if ok, said := offline(t, s); ok || !strings.Contains(said, "takes its place at the next start") {
				t.Errorf("assay-server check: %s", said)
			}
			start(t, s)
			if log := site.Tail(s.ServerLog(), 1000); !strings.Contains(log, "level=error") || !strings.Contains(log, c.said+": the copy in .prev took its place") {
				t.Errorf("the log does not say so: %s", log)
			}
			if now := shown(t, s); now != bundle {
				t.Error("the bundle changed")
			}
			eventually(t, "a signature", func() error { return signed(t, a.Socket, c.name) })
			h.check(t, dial(t, s))
			stop(t, s)
			mustCheck(t, s)
		})
	}
	t.Run("a key file that others can read is refused", func(t *testing.T) {
		chmod(t, keys, 0o644)
		refused(t, s, keys, "can be read or written by others")
		chmod(t, keys, 0o600)
	})
	t.Run("a key file that the server may not read is refused", func(t *testing.T) {
		root(t, "another user")
		other := newSite(t)
		other.ServerAs = &syscall.Credential{Uid: 65534, Gid: 65534}
		other.DataDir = filepath.Join(other.Dir, "data")
		copyDir(t, s.ServerData(), other.DataDir, 65534)
		if err := os.Chown(other.Dir, 65534, 65534); err != nil { // for the socket's folder
			t.Fatal(err)
		}
		theirs := filepath.Join(other.DataDir, "keys.json")
		if err := errors.Join(os.Chown(theirs, 0, 0), os.Chown(theirs+".prev", 0, 0)); err != nil {
			t.Fatal(err)
		}
		refused(t, other, theirs, "permission denied")
	})
	t.Run("lost keys make no new authority without the operator's consent", func(t *testing.T) {
		remove(t, keys)
		remove(t, keys+".prev")
		refused(t, s, "has no key", "new_authority_on_lost_key")
		if ok, said := offline(t, s); ok || !strings.Contains(said, "new_authority_on_lost_key") {
			t.Errorf("assay-server check: %s", said)
		}
		if _, err := os.Stat(keys); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("keys were made: %v", err)
		}
	})
	t.Run("with it there is one beside the lost one, whose SVIDs stay valid", func(t *testing.T) {
		s.ServerExtra = "new_authority_on_lost_key = true"
		start(t, s)
		now := shown(t, s)
		if now == bundle || !strings.Contains(now, bundle) {
			t.Errorf("the bundle was\n%s\nand is\n%s", bundle, now)
		}
		h.check(t, dial(t, s))
		// The workload has what it had.
		w.until("what it had", func(c *workloadapi.X509Context, _ error) bool {
			return c != nil && c.DefaultSVID().Certificates[0].Equal(had.DefaultSVID().Certificates[0])
		})
		stop(t, s)
		mustCheck(t, s)
		s.ServerExtra = "" // once is enough
		start(t, s)
		if again := shown(t, s); again != now {
			t.Error("the bundle changed again")
		}
		stop(t, s)
	})
}

// shown returns the server's bundle.
func shown(t *testing.T, s *site.Site) string {
	t.Helper()
	out, err := s.ServerCLI(patiently(t), "bundle", "show")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func chmod(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// copyDir copies the files of a folder, without folders in it, for another user.
func copyDir(t *testing.T, from, to string, uid int) {
	t.Helper()
	if err := os.Mkdir(to, 0o700); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !f.Type().IsRegular() {
			continue
		}
		b, err := os.ReadFile(filepath.Join(from, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(to, f.Name())
		if err := errors.Join(os.WriteFile(path, b, 0o600), os.Chown(path, uid, uid)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(to, uid, uid); err != nil {
		t.Fatal(err)
	}
}
