package records

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// writerVariable makes the test binary a server that is going to be killed.
const writerVariable = "ASSAY_TEST_WRITER"

func TestMain(m *testing.M) {
	if path := os.Getenv(writerVariable); path != "" {
		write(path)
		return
	}
	os.Exit(m.Run())
}

// write creates, changes and deletes entries from many goroutines until it is killed, and prints
// what was acknowledged: "+ id" or "- id". A deletion is announced before as "? id": if the kill
// comes in between, the entry may be there or not.
func write(path string) {
	store, err := boltkv.Open(path, boltkv.Config{})
	if err != nil {
		fmt.Println("error", err)
		return
	}
	r, err := Open(context.Background(), store, domain, Config{})
	if err != nil {
		fmt.Println("error", err)
		return
	}
	var mu sync.Mutex
	say := func(what, id string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(what, id)
	}
	var group sync.WaitGroup
	for w := range 8 {
		group.Go(func() {
			for i := 0; ; i++ {
				var batch []*identity.Entry
				for j := range 1 + i%3 {
					batch = append(batch, entry(fmt.Sprintf("p%d/%d/%d/%d", os.Getpid(), w, i, j), "a:1"))
				}
				results, _, err := r.CreateEntries(context.Background(), batch)
				if err != nil {
					say("error", err.Error())
					return
				}
				for _, res := range results {
					say("+", res.Entry.ID)
				}
				id := results[0].Entry.ID
				change := func(e *identity.Entry) error { e.Selectors = sel("b:1"); return nil }
				if _, _, err := r.UpdateEntry(context.Background(), id, change); err != nil {
					say("error", err.Error())
				}
				if i%4 == 0 {
					say("?", id)
					if errs, _, err := r.DeleteEntries(context.Background(), []string{id}); err != nil || errs[0] != nil {
						say("error", fmt.Sprint(err, errs))
					}
					say("-", id)
				}
			}
		})
	}
	group.Wait()
}

func TestKill(t *testing.T) {
	t.Run("a server killed in the middle of its work loses nothing it acknowledged", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		have := map[string]bool{}  // must be there
		maybe := map[string]bool{} // may be there
		for round := range 4 {
			runAndKill(t, path, 200+rand.IntN(300), have, maybe)
			store, err := boltkv.Open(path, boltkv.Config{})
			if err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			r, err := Open(t.Context(), store, domain, Config{})
			if err != nil {
				t.Fatal(err)
			}
			checkTree(t, store)
			s, err := r.Snapshot(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			there := map[string]bool{}
			for _, e := range s.Entries {
				there[e.ID] = true
			}
			for id := range have {
				if !there[id] {
					t.Errorf("round %d: entry %s was acknowledged and is lost", round, id)
				}
			}
			// What was written and not acknowledged any more may be there, once; a deleted entry
			// must not.
			extra := 0
			for id := range there {
				if !have[id] && !maybe[id] {
					extra++
				}
			}
			if extra > 8*3 {
				t.Errorf("round %d: %d entries nobody was told of", round, extra)
			}
			have, maybe = there, map[string]bool{}
			if err := store.Close(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// runAndKill lets a writer acknowledge n lines and kills it, and keeps account.
func runAndKill(t *testing.T, path string, n int, have, maybe map[string]bool) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^$")
	cmd.Env = append(os.Environ(), writerVariable+"="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(out)
	before := maps.Clone(have)
	for i := 0; ; i++ {
		if i == n {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		line, err := reader.ReadString('\n')
		if err != nil { // killed; half a line does not count
			break
		}
		what, id, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch what {
		case "+":
			have[id] = true
		case "?":
			delete(have, id)
			maybe[id] = true
		case "-":
			delete(maybe, id)
			if before[id] {
				t.Errorf("deleted an entry of an earlier round: %s", id)
			}
		default:
			t.Errorf("writer says %q", line)
		}
	}
	if err := cmd.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Errorf("writer ended with %v", err)
	}
}
