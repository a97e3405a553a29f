package workload_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"github.com/assay-id/assay/attestor/docker"
	"github.com/assay-id/assay/test/lab"
	real "github.com/assay-id/assay/test/lab/docker"
)

// podman is a real Podman with a storage, and a service that speaks Docker's API, of its own.
type podman struct {
	t       *testing.T
	dir     string
	service *exec.Cmd
}

func newPodman(t *testing.T) *podman {
	t.Helper()
	if os.Geteuid() != 0 {
		lab.Missing(t, "Podman", errors.New("a private Podman needs root"))
	}
	for _, tool := range []string{"podman", "runc"} {
		if _, err := exec.LookPath(tool); err != nil {
			lab.Missing(t, "Podman", fmt.Errorf("%s is not installed (Debian: apt-get install podman runc)", tool))
		}
	}
	// Not t.TempDir: sockets and storage must have short paths.
	dir, err := os.MkdirTemp("", "podman") //nolint:usetesting // as above
	if err != nil {
		t.Fatal(err)
	}
	p := &podman{t: t, dir: dir}
	t.Cleanup(func() {
		p.do("rm", "--force", "--time", "0", "--all")
		p.down()
		// What Podman started to tidy up after its containers may still be at it.
		err := os.RemoveAll(dir)
		for end := time.Now().Add(patience); err != nil && time.Now().Before(end); err = os.RemoveAll(dir) {
			<-time.After(50 * time.Millisecond)
		}
		if err != nil {
			t.Error(err)
		}
	})
	p.up()
	return p
}

func (p *podman) socket() string { return filepath.Join(p.dir, "podman.sock") }

// command is podman on the private storage. runc, because crun refuses hosts with both kinds of cgroups.
func (p *podman) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "podman", append([]string{
		"--root", filepath.Join(p.dir, "root"), "--runroot", filepath.Join(p.dir, "run"), "--tmpdir", filepath.Join(p.dir, "tmp"),
		"--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc",
	}, args...)...)
}

// do runs a command and returns what it prints.
func (p *podman) do(args ...string) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := p.command(ctx, args...)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		p.t.Fatalf("podman %s: %v: %s", strings.Join(args, " "), err, said.String())
	}
	return strings.TrimSpace(string(out))
}

// up starts the service and waits until it answers.
func (p *podman) up() {
	p.t.Helper()
	p.service = p.command(context.Background(), "system", "service", "--time", "0", "unix://"+p.socket())
	p.service.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.service.Start(); err != nil {
		p.t.Fatal(err)
	}
	c, err := client.New(client.WithHost("unix://" + p.socket()))
	if err != nil {
		p.t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	for {
		_, err := c.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true})
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			p.t.Fatalf("the service does not answer: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// down ends the service; containers run on.
func (p *podman) down() {
	_ = p.service.Process.Kill()
	_ = p.service.Wait()
}

// build makes an image FROM scratch and returns its ID.
func (p *podman) build(program, app string) string {
	p.t.Helper()
	folder := p.t.TempDir()
	text, err := os.ReadFile(program)
	if err != nil {
		p.t.Fatal(err)
	}
	recipe := fmt.Sprintf("FROM scratch\nCOPY app /app\nLABEL app=%s\nENTRYPOINT [\"/app\"]\n", app)
	for name, content := range map[string][]byte{"Dockerfile": []byte(recipe), "app": text} {
		if err := os.WriteFile(filepath.Join(folder, name), content, 0o755); err != nil {
			p.t.Fatal(err)
		}
	}
	return "sha256:" + strings.TrimPrefix(p.do("build", "--quiet", "--isolation", "chroot", folder), "sha256:")
}

// run starts a container and returns its first process.
func (p *podman) run(image string, args ...string) int {
	p.t.Helper()
	// Podman raises limits that not every machine lets it raise.
	args = append([]string{"run", "--detach", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"}, args...)
	return p.pid(p.do(append(args, image)...))
}

func (p *podman) pid(container string) int {
	p.t.Helper()
	var inspected []struct{ State struct{ Pid int } }
	text := p.do("inspect", container)
	if err := json.Unmarshal([]byte(text), &inspected); err != nil || len(inspected) != 1 || inspected[0].State.Pid == 0 {
		p.t.Fatalf("inspect %s: %v: %s", container, err, text)
	}
	return inspected[0].State.Pid
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
	config := docker.Config{SocketPath: "unix://" + p.socket(), Timeout: "20s"}
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
		p.down()
		if after := attest(t, w, "/proc", pid); !after.Equal(before) {
			t.Errorf("selectors changed to\n%q", after.Strings())
		}
		p.up()
		has(t, attest(t, w, "/proc", p.run(image)), "image:id:"+image)
	})
}
