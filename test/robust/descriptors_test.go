package robust

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/assay-id/assay/test/lab/site"
)

// TestOutOfDescriptors takes their file descriptors from a server and an agent that run: whoever calls waits,
// the log says why in one line and not in one for each try, and when there are some again all is as before.
func TestOutOfDescriptors(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	h := newHistory()
	start(t, s)
	a := newAgent(t, s, "agent", site.AgentOptions{})
	h.mustCreate(t, dial(t, s), newEntry(onlyAgent(t, s), "/one"))
	newWorkload(t, a.Socket).has("/one")
	for _, c := range []struct {
		name, log, network, address string
		process                     *site.Process
		served                      func()
	}{
		{"server", s.ServerLog(), "tcp", fmt.Sprintf("127.0.0.1:%d", s.Port), s.Server(), func() { h.check(t, dial(t, s)) }},
		{"agent", a.Log, "unix", a.Socket, a.Process, func() { newWorkload(t, a.Socket).has("/one") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			const said, spare, callers = "LimitNOFILE", 6, 40
			if n := lines(t, c.log, said); n != 0 {
				t.Fatalf("%d lines before anything happened", n)
			}
			open, err := os.ReadDir(filepath.Join("/proc", fmt.Sprint(c.process.PID()), "fd"))
			if err != nil {
				t.Fatal(err)
			}
			var before unix.Rlimit
			limit := unix.Rlimit{Cur: uint64(len(open) + spare)}
			if err := unix.Prlimit(c.process.PID(), unix.RLIMIT_NOFILE, nil, &before); err != nil {
				t.Fatal(err)
			}
			limit.Max = before.Max
			if err := unix.Prlimit(c.process.PID(), unix.RLIMIT_NOFILE, &limit, nil); err != nil {
				t.Fatal(err)
			}
			for range callers {
				conn, err := net.Dial(c.network, c.address)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
			}
			eventually(t, "the log to say what is missing", func() error {
				if lines(t, c.log, said) == 0 {
					return fmt.Errorf("nothing is said in %s", site.Tail(c.log, 5))
				}
				return nil
			})
			if err := unix.Prlimit(c.process.PID(), unix.RLIMIT_NOFILE, &before, nil); err != nil {
				t.Fatal(err)
			}
			c.served()
			if n := lines(t, c.log, said); n > 3 {
				t.Errorf("the log says it %d times", n)
			}
		})
	}
}

// lines counts the lines of a file that contain a text.
func lines(t *testing.T, path, text string) int {
	t.Helper()
	all, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(all)) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}
