package workload_test

import (
	"bufio"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/unix"
)

// A process keeps its PID, and whoever holds it keeps it, when it goes on as another program.
func TestAProgramThatTakesAnothersPlace(t *testing.T) {
	paths := map[string]string{}
	for _, name := range []string{"sh", "cat"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Skipf("SKIPPED: %v", err)
		}
		if paths[name], err = filepath.EvalSymlinks(path); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), paths["sh"], "-c", "echo shell; read line; exec "+paths["cat"])
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	said := bufio.NewReader(out)
	expect := func(line string) {
		t.Helper()
		if got, err := said.ReadString('\n'); err != nil || got != line+"\n" {
			t.Fatalf("it said %q, %v", got, err)
		}
	}
	w := open(t, unix.Config{DiscoverWorkloadPath: true})
	process := attestor.Process{PID: cmd.Process.Pid, Proc: "/proc"}
	expect("shell")
	before := attest(t, w, process)
	has(t, before, "unix:path:"+paths["sh"], "unix:sha256:"+hashOf(t, paths["sh"]))
	if _, err := in.Write([]byte("go on\nas another\n")); err != nil {
		t.Fatal(err)
	}
	expect("as another") // cat says it
	after := attest(t, w, process)
	has(t, after, "unix:path:"+paths["cat"], "unix:sha256:"+hashOf(t, paths["cat"]))
	hasNone(t, after, "unix:path:"+paths["sh"])
	hasNone(t, after, "unix:sha256:"+hashOf(t, paths["sh"]))
}
