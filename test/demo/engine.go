package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/assay-id/assay/test/lab/docker"
)

// imageTag names the demo's image on an engine that is not ours alone.
const imageTag = "assay-demo:latest"

// engine is where the container runs.
type engine struct{ *docker.Engine }

// findEngine takes the engine that is there; as root on Debian without one it installs docker.io and
// starts a private one. Without either it says what is missing, and the demo goes on without it.
func (d *demo) findEngine(ctx context.Context) error {
	if attached, err := docker.Attach(ctx); err == nil {
		d.engine = &engine{attached}
		d.later(func() { report(attached.Close()) })
		d.say("using the Docker engine that is there: %s", attached.Host())
		return nil
	}
	if os.Geteuid() != 0 {
		d.say("no Docker engine answers, and only root can start one: showing the Unix part, with a second process in place of the container")
		return nil
	}
	if docker.Available() != nil {
		if _, err := exec.LookPath("apt-get"); err != nil {
			d.say("no Docker engine answers, and this is no Debian to install one on: showing the Unix part")
			return nil //nolint:nilerr // that there is no apt-get is an answer
		}
		d.say("no Docker engine is there: installing docker.io…")
		if err := installDocker(ctx); err != nil {
			return err
		}
	}
	private, err := docker.Start(ctx)
	if err != nil {
		return err
	}
	d.engine = &engine{private}
	d.later(func() { report(private.Close()) })
	d.say("no Docker engine was running: started a private one for the demo")
	return nil
}

func installDocker(ctx context.Context) error {
	for _, args := range [][]string{
		{"update", "-qq"},
		{"install", "-y", "-qq", "--no-install-recommends", "docker.io", "containerd", "runc", "iptables"},
	} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("install docker.io: %w: %s", err, out)
		}
	}
	return nil
}

func (e *engine) host() string { return e.Host() }

// build makes the image FROM scratch around the program and returns its ID, which is its config digest.
func (e *engine) build(ctx context.Context, program string) (string, error) {
	return e.BuildScratch(ctx, docker.Image{Tag: imageTag, Program: program})
}

// shopContainer is the running container; Kill removes it.
type shopContainer struct {
	engine *engine
	id     string
	stop   context.CancelFunc
	done   chan struct{}
}

// run starts the container with the label that the entry asks for, its output going to out.
func (e *engine) run(ctx context.Context, out *seen, image, socketDir, shared string, args ...string) (*shopContainer, error) {
	running, err := e.Run(ctx, docker.Container{
		Image:  image,
		Labels: map[string]string{"app": "shop"},
		Env:    []string{"SPIFFE_ENDPOINT_SOCKET=unix:///assay/api.sock"},
		Cmd:    args,
		Binds:  []string{socketDir + ":/assay:ro", shared + ":/shared"},
	})
	if err != nil {
		return nil, err
	}
	// The container outlives the step that started it.
	follow, stop := context.WithCancel(context.WithoutCancel(ctx))
	c := &shopContainer{engine: e, id: running.ID, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		if err := e.Follow(follow, running.ID, out); err != nil && follow.Err() == nil {
			report(err)
		}
	}()
	return c, nil
}

// Kill ends and removes the container.
func (c *shopContainer) Kill() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c.stop()
	<-c.done
	report(c.engine.Remove(ctx, c.id))
}
