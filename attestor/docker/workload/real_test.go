package workload_test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/moby/moby/client"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/docker"
	"github.com/assay-id/assay/test/lab"
	real "github.com/assay-id/assay/test/lab/docker"
)

// realBench runs the suite on a private dockerd.
type realBench struct {
	*real.Engine
	program string
	images  *atomic.Int64
}

func newReal(t *testing.T) realBench {
	t.Helper()
	if err := real.Available(); err != nil {
		lab.Missing(t, "a Docker engine", err)
	}
	program, err := real.Idle(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	engine, err := real.Start(t.Context())
	if err != nil {
		lab.Missing(t, "a Docker engine", err)
	}
	t.Cleanup(func() {
		if err := engine.Close(); err != nil {
			t.Errorf("close engine: %v", err)
		}
	})
	return realBench{engine, program, new(atomic.Int64)}
}

func (b realBench) socket() string { return b.Socket() }
func (b realBench) proc() string   { return "/proc" }
func (b realBench) build(t *testing.T, labels map[string]string, env ...string) string {
	t.Helper()
	id, err := b.BuildScratch(t.Context(), real.Image{
		Tag: fmt.Sprintf("built:%d", b.images.Add(1)), Program: b.program, Labels: labels, Env: env,
	})
	if err != nil {
		t.Fatal(err)
	}
	return id
}
func (b realBench) tag(t *testing.T, image, name string) {
	t.Helper()
	if err := b.Tag(t.Context(), image, name); err != nil {
		t.Fatal(err)
	}
}
func (b realBench) run(t *testing.T, image string, labels map[string]string, env ...string) (string, int) {
	t.Helper()
	running, err := b.Run(t.Context(), real.Container{Image: image, Labels: labels, Env: env})
	if err != nil {
		t.Fatal(err)
	}
	return running.ID, running.PID
}
func (b realBench) restart(t *testing.T, id string) int {
	t.Helper()
	running, err := b.Restart(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return running.PID
}
func (b realBench) end(t *testing.T, id string) {
	t.Helper()
	if err := b.Stop(t.Context(), id); err != nil {
		t.Fatal(err)
	}
}
func (b realBench) rename(t *testing.T, id, name string) {
	t.Helper()
	if _, err := b.Client().ContainerRename(t.Context(), id, client.ContainerRenameOptions{NewName: name}); err != nil {
		t.Fatal(err)
	}
}
func (b realBench) down(t *testing.T) {
	t.Helper()
	if err := b.Down(); err != nil {
		t.Fatal(err)
	}
}
func (b realBench) up(t *testing.T) {
	t.Helper()
	if err := b.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestSuiteOnRealDocker(t *testing.T) {
	b := newReal(t)
	t.Run("the suite", func(t *testing.T) { runSuite(t, b) })
	t.Run("this process is in no container", func(t *testing.T) {
		w, _ := open(t, docker.Config{SocketPath: b.Socket()})
		if set := attest(t, w, "/proc", os.Getpid()); set.Len() != 0 {
			t.Errorf("selectors %q", set.Strings())
		}
	})
	t.Run("a process in a cgroup named after a container is not in it", func(t *testing.T) {
		id, _ := b.run(t, b.build(t, map[string]string{"victim": "yes"}), nil)
		cgroup := "0::/user.slice/" + id + "\n"
		proc := t.TempDir()
		dir := filepath.Join(proc, "66")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup"), []byte(cgroup), 0o600); err != nil {
			t.Fatal(err)
		}
		w, _ := open(t, docker.Config{SocketPath: b.Socket()})
		if found, err := w.Attest(t.Context(), attestor.Process{PID: 66, Proc: proc}); err == nil || len(found) != 0 {
			t.Errorf("selectors %q, %v", found, err)
		}
	})
}
