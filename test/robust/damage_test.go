package robust

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/assay-id/assay/test/lab/site"
)

// restoreCommand is the command that a server which does not start, or a check, tells the operator to
// run.
var restoreCommand = regexp.MustCompile(`run "assay-server (restore -from \S+ -dataDir \S+ -force)"`)

// obey runs the command that was said.
func obey(t *testing.T, s *site.Site, said string) {
	t.Helper()
	found := restoreCommand.FindStringSubmatch(said)
	if found == nil {
		t.Fatalf("no command in what was said: %s", said)
	}
	if out, err := site.Run(patiently(t), nil, filepath.Join(s.Bin, "assay-server"), strings.Fields(found[1])...); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// overwrite puts random bytes in the place of whole pages.
func overwrite(t *testing.T, path string, pages ...int) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 4096)
	for _, page := range pages {
		_, _ = rand.Read(noise) // never fails
		_, writeErr := file.WriteAt(noise, int64(page)*4096)
		err = errors.Join(err, writeErr)
	}
	if err = errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestDamage damages the store of a stopped server in each way, and goes back as the server says.
func TestDamage(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	h := newHistory()
	start(t, s)
	conn := dial(t, s)
	a := newAgent(t, s, "agent", site.AgentOptions{})
	node := onlyAgent(t, s)
	for i := range 200 {
		h.mustCreate(t, conn, newEntry("/nobody", fmt.Sprintf("/bulk/%d", i)))
	}
	h.mustCreate(t, conn, newEntry(node, "/before"))
	w := newWorkload(t, a.Socket)
	w.has("/before")
	h.revision(t, conn)
	snapshot := h.copyOf() // what the newest snapshot has
	h.mustCreate(t, conn, newEntry(node, "/after"))
	w.has("/before", "/after")
	stop(t, s)
	mustCheck(t, s)
	path := filepath.Join(s.ServerData(), "store.db")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	pages := int(info.Size() / 4096)

	for _, c := range []struct {
		name   string
		damage func(t *testing.T)
	}{
		{"every page but the first ones overwritten", func(t *testing.T) {
			t.Helper()
			var all []int
			for page := 4; page < pages; page++ {
				all = append(all, page)
			}
			overwrite(t, path, all...)
		}},
		{"both meta pages overwritten", func(t *testing.T) { t.Helper(); overwrite(t, path, 0, 1) }},
		{"no bytes", func(t *testing.T) { t.Helper(); truncate(t, path, 0) }},
		{"one page", func(t *testing.T) { t.Helper(); truncate(t, path, 4096) }},
		{"a few pages", func(t *testing.T) { t.Helper(); truncate(t, path, 5*4096) }},
		{"a bit flipped in an entry", func(t *testing.T) {
			t.Helper()
			b := bytes.Clone(whole)
			at := bytes.LastIndex(b, []byte("a-bulk-77.example.org"))
			for next := at; next >= 0; next = bytes.LastIndex(b[:next], []byte("a-bulk-77.example.org")) {
				b[next] ^= 0x10
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"nothing there", func(t *testing.T) {
			t.Helper()
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run("with "+c.name+" the server does not start, and says what is wrong and what to do", func(t *testing.T) {
			if err := os.WriteFile(path, whole, 0o600); err != nil {
				t.Fatal(err)
			}
			c.damage(t)
			said := refused(t, s, "store is damaged", path, "the newest good snapshot was made")
			ok, checked := offline(t, s)
			if ok || !strings.Contains(checked, "DAMAGED") || !restoreCommand.MatchString(checked) {
				t.Errorf("assay-server check: %s", checked)
			}
			obey(t, s, said)
			mustCheck(t, s)
		})
	}
	if t.Failed() {
		return
	}

	start(t, s)
	t.Run("what the snapshot has is back, nothing else is, and agents and workloads follow by themselves", func(t *testing.T) {
		h = snapshot
		conn := dial(t, s)
		h.check(t, conn)
		w.has("/before")
		h.mustCreate(t, conn, newEntry(node, "/new"))
		w.has("/before", "/new")
	})
	t.Run("any page that is overwritten is found, or was free", func(t *testing.T) {
		stop(t, s)
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for page := 0; page < len(whole)/4096; page += 1 + page/8 {
			if err := os.WriteFile(path, whole, 0o600); err != nil {
				t.Fatal(err)
			}
			overwrite(t, path, page)
			out, err := site.Run(patiently(t), nil, filepath.Join(s.Bin, "assay-server"), "check", "-dataDir", s.ServerData())
			var exit *exec.ExitError
			switch {
			case errors.As(err, &exit) && strings.Contains(out, "DAMAGED"):
				found++
			case err != nil:
				t.Fatal(err)
			}
			// Otherwise it says that every record is there and fits: then it is.
		}
		if found < 3 {
			t.Errorf("damage was found %d times", found)
		}
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	})
}

func truncate(t *testing.T, path string, size int64) {
	t.Helper()
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

// TestAutomaticSnapshots lets a server make them by itself, kills it, and loses the store.
func TestAutomaticSnapshots(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.ServerExtra = "snapshot_interval = \"1s\"\n  snapshot_keep = 3"
	h := newHistory()
	start(t, s)
	conn := dial(t, s)
	for i := range 5 {
		h.mustCreate(t, conn, newEntry("/node", fmt.Sprintf("/%d", i)))
		eventually(t, "a snapshot of what was committed", func() error { return good(t, s, i+1) })
	}
	all, err := filepath.Glob(filepath.Join(s.ServerData(), "snapshots", "store-*.db"))
	if err != nil || len(all) > 3 {
		t.Errorf("%v are kept, %v", all, err)
	}
	s.Server().Kill()
	overwrite(t, filepath.Join(s.ServerData(), "store.db"), 2, 3, 4, 5, 6, 7, 8)
	obey(t, s, refused(t, s, "store is damaged"))
	start(t, s)
	h.check(t, dial(t, s))
}

// good reports whether the newest snapshot is whole and has so many entries.
func good(t *testing.T, s *site.Site, entries int) error {
	t.Helper()
	out, err := site.Run(patiently(t), nil, filepath.Join(s.Bin, "assay-server"), "snapshot", "list", "-dataDir", s.ServerData())
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	fields := strings.Fields(lines[min(1, len(lines)-1)])
	if len(fields) != 5 || fields[3] != "good" {
		return fmt.Errorf("no good snapshot: %s", out)
	}
	// Into a folder of its own, to look inside.
	dir := t.TempDir()
	out, err = site.Run(patiently(t), nil, filepath.Join(s.Bin, "assay-server"), "restore", "-from", fields[4], "-dataDir", dir)
	if err != nil {
		return err // it was pruned meanwhile
	}
	if want := fmt.Sprintf(": %d entr", entries); !strings.Contains(out, want) {
		return fmt.Errorf("the newest snapshot: %s", out)
	}
	return nil
}

// TestBackup copies the store of a running server while others write, and starts another from it.
func TestBackup(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	h := newHistory()
	start(t, s)
	conn := dial(t, s)
	for i := range 50 {
		h.mustCreate(t, conn, newEntry("/node", fmt.Sprintf("/before/%d", i)))
	}
	stopWriting := make(chan struct{})
	wrote := make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stopWriting:
				wrote <- nil
				return
			default:
			}
			if _, err := h.create(t.Context(), conn, newEntry("/node", fmt.Sprintf("/during/%d", i))); err != nil {
				wrote <- err
				return
			}
		}
	}()
	file := filepath.Join(s.Dir, "backup.db")
	before := h.copyOf()
	out, err := s.ServerCLI(patiently(t), "backup", "-path", file)
	if err != nil {
		t.Fatal(err)
	}
	close(stopWriting)
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	after := h.copyOf()
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: %s", info, err, out)
	}

	// The copy, with the keys, on another machine.
	second := newSite(t)
	if out, err := site.Run(patiently(t), nil, filepath.Join(s.Bin, "assay-server"), "restore", "-from", file, "-dataDir", second.ServerData()); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	keys, err := os.ReadFile(filepath.Join(s.ServerData(), "keys.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(second.ServerData(), "keys.json"), keys, 0o600); err != nil {
		t.Fatal(err)
	}
	mustCheck(t, second)
	start(t, second)
	all := stored(t, dial(t, second))
	for id := range before.held {
		if all[id] == nil {
			t.Errorf("entry %s was there before the backup and is not in it", id)
		}
	}
	for id := range all {
		if after.held[id] == nil {
			t.Errorf("entry %s is in the backup and never was in the store", id)
		}
	}
}
