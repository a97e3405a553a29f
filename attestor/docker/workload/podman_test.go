package workload_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/docker"
	"github.com/assay-id/assay/test/lab"
	real "github.com/assay-id/assay/test/lab/docker"
	private "github.com/assay-id/assay/test/lab/podman"
)

// podman is a real Podman of the test's own, whose errors end it.
type podman struct {
	*private.Engine
	t *testing.T
}

func newPodman(t *testing.T) *podman {
	t.Helper()
	if err := private.Available(); err != nil {
		lab.Missing(t, "Podman", err)
	}
	e, err := private.Start(t.Context(), private.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return &podman{e, t}
}

func (p *podman) do(args ...string) string {
	p.t.Helper()
	out, err := p.Do(args...)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

func (p *podman) up() {
	p.t.Helper()
	if err := p.Up(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
}

func (p *podman) build(program, app string) string {
	p.t.Helper()
	id, err := p.Build(program, app)
	if err != nil {
		p.t.Fatal(err)
	}
	return id
}

func (p *podman) run(image string, args ...string) int {
	p.t.Helper()
	pid, err := p.Run(append(args, image)...)
	if err != nil {
		p.t.Fatal(err)
	}
	return pid
}

// heardOf waits until the attestor's log has an event of a container.
func heardOf(t *testing.T, hook *test.Hook, event, id string) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for !slices.ContainsFunc(hook.AllEntries(), func(e *logrus.Entry) bool {
		return fmt.Sprint(e.Data["event"]) == event && e.Data["about"] == id
	}) {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("never heard: %s of %s", event, id)
		}
	}
}

func TestRealPodman(t *testing.T) {
	p := newPodman(t)
	program, err := real.Idle(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	image, other := p.build(program, "shop"), p.build(program, "other")
	p.do("tag", image, "app:latest")
	pid := p.run("app:latest", "--name", "first", "--label", "team=red", "--env", "MODE=fast")
	config := docker.Config{SocketPath: "unix://" + p.Socket(), Timeout: "20s"}
	w, hook := open(t, config)
	heard := watch(t, w)

	t.Run("a container is attested by its image and its labels", func(t *testing.T) {
		has(t, attest(t, w, "/proc", pid), "docker:label:app:shop", "docker:label:team:red", "docker:env:MODE=fast", "docker:image_id:localhost/app:latest",
			"image:id:"+image, "docker:image_config_digest:"+image, "image:platform:linux/amd64", "claim:image:app:shop", "claim:runtime:team:red")
	})
	t.Run("this process is in none", func(t *testing.T) {
		if set := attest(t, w, "/proc", os.Getpid()); set.Len() != 0 {
			t.Errorf("selectors %q", set.Strings())
		}
	})
	t.Run("a tag that moves takes nothing with it", func(t *testing.T) {
		before := attest(t, w, "/proc", pid)
		p.do("tag", other, "app:latest")
		fresh, _ := open(t, config)
		if after := attest(t, fresh, "/proc", pid); !after.Equal(before) {
			t.Errorf("selectors moved from\n%q to\n%q", before.Strings(), after.Strings())
		}
		has(t, attest(t, fresh, "/proc", p.run("app:latest")), "image:id:"+other)
	})
	t.Run("a new name is heard of", func(t *testing.T) {
		heard.woken(t, pid, func(try int) {
			attest(t, w, "/proc", pid)
			p.do("rename", "first", "first"+strconv.Itoa(try))
			p.do("rename", "first"+strconv.Itoa(try), "first")
		})
	})
	t.Run("a container that is stopped is heard of", func(t *testing.T) {
		stopped := p.run(image, "--name", "short")
		id, err := p.Do("inspect", "--format", "{{.Id}}", "short")
		if err != nil {
			t.Fatal(err)
		}
		// Podman tells of its events some time after, and its start would be a reason to wake it too.
		heardOf(t, hook, "start", strings.TrimSpace(id))
		attest(t, w, "/proc", stopped)
		heard.mu.Lock()
		before := heard.pids[stopped]
		heard.mu.Unlock()
		p.do("stop", "--time", "0", "short")
		heard.until(t, "the container's end", func(pids map[int]int, _ int) bool { return pids[stopped] > before })
	})
	t.Run("a service that is away costs a known container nothing, and is found again", func(t *testing.T) {
		before := attest(t, w, "/proc", pid)
		p.Down()
		if after := attest(t, w, "/proc", pid); !after.Equal(before) {
			t.Errorf("selectors changed to\n%q", after.Strings())
		}
		p.up()
		has(t, attest(t, w, "/proc", p.run(image)), "image:id:"+image)
	})
}

// TestRealRootlessPodman attests containers of a user who is not root, by that user's own Podman.
func TestRealRootlessPodman(t *testing.T) {
	const uid = 24001
	if err := private.RootlessAvailable(); err != nil {
		lab.Missing(t, "rootless Podman", err)
	}
	e, err := private.Start(t.Context(), private.Config{UID: uid})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	p := &podman{e, t}
	program, err := real.Idle(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	image := p.build(program, "shop")
	pid := p.run(image, "--label", "team=red", "--env", "MODE=fast")
	w, _ := open(t, docker.Config{SocketPath: "unix://" + p.Socket(), Timeout: "20s"})

	t.Run("a container is attested by its image and its labels", func(t *testing.T) {
		has(t, attest(t, w, "/proc", pid), "docker:label:app:shop", "docker:label:team:red", "docker:env:MODE=fast",
			"image:id:"+image, "docker:image_config_digest:"+image, "claim:image:app:shop", "claim:runtime:team:red")
	})
	t.Run("it is that user's: root in the container is the user outside", func(t *testing.T) {
		stat, err := os.Stat("/proc/" + strconv.Itoa(pid))
		if err != nil {
			t.Fatal(err)
		}
		if owner := stat.Sys().(*syscall.Stat_t).Uid; owner != uid { // it is Linux
			t.Errorf("the process is user %d's", owner)
		}
	})
	t.Run("this process is in none", func(t *testing.T) {
		if set := attest(t, w, "/proc", os.Getpid()); set.Len() != 0 {
			t.Errorf("selectors %q", set.Strings())
		}
	})
	t.Run("a cgroup that the user calls like the container is not the container", func(t *testing.T) {
		impostor, err := p.Impostor(t.Context(), pid)
		if err != nil {
			t.Fatal(err)
		}
		set, err := w.Attest(t.Context(), attestor.Process{PID: impostor, Proc: "/proc"})
		if err == nil || len(set) != 0 {
			t.Errorf("selectors %v, %v", set, err)
		}
	})
	t.Run("root's Podman does not know it", func(t *testing.T) {
		theirs := newPodman(t)
		other, _ := open(t, docker.Config{SocketPath: "unix://" + theirs.Socket(), Timeout: "20s"})
		if set := attest(t, other, "/proc", pid); set.Len() != 0 {
			t.Errorf("selectors %q", set.Strings())
		}
	})
}
