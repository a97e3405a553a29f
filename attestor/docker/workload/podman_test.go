package workload_test

import (
	"os"
	"strconv"
	"testing"

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
	w, _ := open(t, config)
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
		attest(t, w, "/proc", stopped)
		done := false
		heard.woken(t, stopped, func(int) {
			if !done {
				p.do("stop", "--time", "0", "short")
				done = true
			}
		})
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
