// Package docker runs a private Docker engine: the real dockerd with a folder, a socket and containers
// of its own beside whatever the machine already has. Images are built FROM scratch around static Go
// programs, so that nothing is pulled. The attestor's tests, test/compat and the demo stand on it.
//
// It returns errors and never calls testing functions, so that a program can use it too.
package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// startTime is how long the engine may take to start; on a busy small machine it is slow.
const startTime = 90 * time.Second

// Engine is a private engine. Only one goroutine may start and stop it.
type Engine struct {
	dir    string
	binary string
	daemon *exec.Cmd
	exited chan struct{} // closed when daemon has ended
	client *client.Client
}

// Available says why there can be no private engine here, or nil.
func Available() error {
	if os.Geteuid() != 0 {
		return errors.New("a private Docker engine needs root")
	}
	_, err := find()
	return err
}

// find looks for dockerd where Debian has it, which is not on every path.
func find() (string, error) {
	if path, err := exec.LookPath("dockerd"); err == nil {
		return path, nil
	}
	const debian = "/usr/sbin/dockerd"
	if _, err := os.Stat(debian); err != nil {
		return "", errors.New("dockerd is not installed (Debian: apt-get install docker.io)")
	}
	return debian, nil
}

// Start starts an engine with everything it writes below a new folder in the system's temporary folder
// (sockets must have short paths). Close ends it and removes that folder.
func Start(ctx context.Context) (*Engine, error) {
	if err := Available(); err != nil {
		return nil, err
	}
	binary, err := find()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "assay-docker-")
	if err != nil {
		return nil, err
	}
	e := &Engine{dir: dir, binary: binary}
	e.client, err = client.New(client.WithHost("unix://" + e.Socket()))
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if err := e.Up(ctx); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

// Attach speaks with an engine that is already there, found as the docker command finds it
// (DOCKER_HOST, else the default socket). Close leaves it and what runs on it alone.
func Attach(ctx context.Context) (*Engine, error) {
	e := &Engine{}
	var err error
	if e.client, err = client.New(client.FromEnv); err != nil {
		return nil, err
	}
	if _, err := e.client.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
		return nil, errors.Join(err, e.client.Close())
	}
	return e, nil
}

// Host is the engine's address as a URL.
func (e *Engine) Host() string { return e.client.DaemonHost() }

// Socket is the path of the engine's Unix socket.
func (e *Engine) Socket() string { return filepath.Join(e.dir, "docker.sock") }

// PID is the process ID of a started engine that runs.
func (e *Engine) PID() int { return e.daemon.Process.Pid }

// Client speaks with the engine.
func (e *Engine) Client() *client.Client { return e.client }

// Up starts the engine after Down and waits until it answers. Containers that ran still do.
func (e *Engine) Up(ctx context.Context) error {
	log, err := os.OpenFile(filepath.Join(e.dir, "dockerd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	config := filepath.Join(e.dir, "daemon.json") // not the machine's own /etc/docker/daemon.json
	if err := os.WriteFile(config, []byte("{}"), 0o600); err != nil {
		return err
	}
	e.daemon = exec.CommandContext(context.Background(), e.binary,
		"--config-file", config,
		"--data-root", filepath.Join(e.dir, "data"),
		"--exec-root", filepath.Join(e.dir, "exec"),
		"--pidfile", filepath.Join(e.dir, "docker.pid"),
		"--host", "unix://"+e.Socket(),
		"--storage-driver", "vfs", // works on every file system, and the images are tiny
		"--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-masq=false",
		"--live-restore", // containers outlive the engine, as where identity must outlive it
		"--log-level", "warn",
	)
	e.daemon.Stdout, e.daemon.Stderr = log, log
	e.daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is ours to pass on
	e.daemon.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if err := e.daemon.Start(); err != nil {
		return fmt.Errorf("start dockerd: %w", err)
	}
	exited, daemon := make(chan struct{}), e.daemon
	e.exited = exited
	go func() {
		_ = daemon.Wait()
		close(exited)
	}()
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for {
		if _, err = e.client.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err == nil {
			return nil
		}
		select {
		case <-e.exited:
			return fmt.Errorf("dockerd ended while starting: %s", e.lastWords())
		case <-ctx.Done():
			return fmt.Errorf("dockerd does not answer: %w: %s", err, e.lastWords())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Down stops the engine; its containers keep running.
func (e *Engine) Down() error {
	if e.daemon == nil {
		return nil
	}
	_ = e.daemon.Process.Signal(syscall.SIGTERM)
	select {
	case <-e.exited:
	case <-time.After(startTime):
		_ = e.daemon.Process.Kill()
		<-e.exited
		return errors.New("dockerd did not stop and was killed")
	}
	e.daemon = nil
	return nil
}

// Close removes every container, stops the engine and removes what it wrote.
func (e *Engine) Close() error {
	if e.dir == "" { // attached
		return e.client.Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	var problems []error
	if e.daemon != nil {
		if all, err := e.client.ContainerList(ctx, client.ContainerListOptions{All: true}); err == nil {
			ended := make(chan error)
			for _, c := range all.Items {
				go func() {
					_, err := e.client.ContainerRemove(ctx, c.ID, client.ContainerRemoveOptions{Force: true})
					ended <- err
				}()
			}
			for range all.Items {
				problems = append(problems, <-ended)
			}
		}
	}
	problems = append(problems, e.Down(), e.client.Close(), e.unmount(), os.RemoveAll(e.dir))
	return errors.Join(problems...)
}

// unmount undoes what the engine left mounted below its folder, which it does when it was killed.
func (e *Engine) unmount() error {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var targets []string
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], e.dir+"/") {
			targets = append(targets, fields[4])
		}
	}
	slices.Reverse(targets)
	var problems []error
	for _, target := range targets {
		problems = append(problems, syscall.Unmount(target, syscall.MNT_DETACH))
	}
	return errors.Join(problems...)
}

// lastWords is the end of the engine's log.
func (e *Engine) lastWords() string {
	text, _ := os.ReadFile(filepath.Join(e.dir, "dockerd.log"))
	if len(text) > 2000 {
		text = text[len(text)-2000:]
	}
	return strings.TrimSpace(string(text))
}

// Idle builds the static program that waits for a signal into a folder and returns its path.
func Idle(ctx context.Context, dir string) (string, error) {
	return BuildStatic(ctx, dir, "github.com/assay-id/assay/test/lab/docker/idle")
}

// BuildStatic builds a package of this module as a static program into a folder, to be put into images.
func BuildStatic(ctx context.Context, dir, pkg string) (string, error) {
	out := filepath.Join(dir, filepath.Base(pkg))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w: %s", pkg, err, said)
	}
	return out, nil
}

// Image is what BuildScratch builds.
type Image struct {
	// Tag is the image's name, for example "app:latest".
	Tag string
	// Program is the path of a static program, which becomes /app, the entry point.
	Program string
	Labels  map[string]string
	// Env are variables in the form NAME=value.
	Env []string
}

// BuildScratch builds an image FROM scratch around a program and returns its ID.
func (e *Engine) BuildScratch(ctx context.Context, img Image) (string, error) {
	program, err := os.ReadFile(img.Program)
	if err != nil {
		return "", err
	}
	var recipe strings.Builder
	recipe.WriteString("FROM scratch\nCOPY app /app\n")
	for key, value := range img.Labels {
		fmt.Fprintf(&recipe, "LABEL %q=%q\n", key, value)
	}
	for _, variable := range img.Env {
		name, value, _ := strings.Cut(variable, "=")
		fmt.Fprintf(&recipe, "ENV %s=%q\n", name, value)
	}
	recipe.WriteString("ENTRYPOINT [\"/app\"]\n")
	var context bytes.Buffer
	archive := tar.NewWriter(&context)
	for _, file := range []struct {
		name string
		text []byte
		mode int64
	}{{"Dockerfile", []byte(recipe.String()), 0o644}, {"app", program, 0o755}} {
		if err := archive.WriteHeader(&tar.Header{Name: file.name, Size: int64(len(file.text)), Mode: file.mode}); err != nil {
			return "", err
		}
		if _, err := archive.Write(file.text); err != nil {
			return "", err
		}
	}
	if err := archive.Close(); err != nil {
		return "", err
	}
	built, err := e.client.ImageBuild(ctx, &context, client.ImageBuildOptions{Tags: []string{img.Tag}, Remove: true, NetworkMode: "none"})
	if err != nil {
		return "", fmt.Errorf("build image: %w", err)
	}
	defer built.Body.Close()
	if err := buildError(built.Body); err != nil {
		return "", err
	}
	inspected, err := e.client.ImageInspect(ctx, img.Tag)
	if err != nil {
		return "", fmt.Errorf("inspect built image: %w", err)
	}
	return inspected.ID, nil
}

// buildError reads the progress of a build to its end and returns what went wrong.
func buildError(progress io.Reader) error {
	lines := json.NewDecoder(progress)
	for {
		var line struct{ Error string }
		if err := lines.Decode(&line); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read build: %w", err)
		}
		if line.Error != "" {
			return errors.New("build image: " + line.Error)
		}
	}
}

// Container is what Run runs.
type Container struct {
	// Image is an image's name or ID.
	Image string
	// Name is the container's name; empty lets the engine choose.
	Name   string
	Labels map[string]string
	// Env are variables in the form NAME=value.
	Env []string
	// Cmd are the program's arguments.
	Cmd []string
	// User is the user in the container, as in "1000:1000"; empty is the image's.
	User string
	// Binds are folders or files of the host in the form host:container[:ro].
	Binds []string
	// CgroupParent is the cgroup that the container's is made in; empty is the engine's own.
	CgroupParent string
}

// Running is a container that runs.
type Running struct {
	// ID is the container's full ID.
	ID string
	// PID is its first process, seen from the host.
	PID int
}

// Run starts a container without a network.
func (e *Engine) Run(ctx context.Context, c Container) (Running, error) {
	created, err := e.client.ContainerCreate(ctx, client.ContainerCreateOptions{
		Name:       c.Name,
		Config:     &container.Config{Image: c.Image, Labels: c.Labels, Env: c.Env, Cmd: c.Cmd, User: c.User},
		HostConfig: &container.HostConfig{NetworkMode: "none", Binds: c.Binds, Resources: container.Resources{CgroupParent: c.CgroupParent}},
	})
	if err != nil {
		return Running{}, fmt.Errorf("create container: %w", err)
	}
	if _, err := e.client.ContainerStart(ctx, created.ID, client.ContainerStartOptions{}); err != nil {
		return Running{}, fmt.Errorf("start container: %w", err)
	}
	return e.running(ctx, created.ID)
}

func (e *Engine) running(ctx context.Context, id string) (Running, error) {
	inspected, err := e.client.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil {
		return Running{}, fmt.Errorf("inspect container: %w", err)
	}
	if inspected.Container.State == nil || inspected.Container.State.Pid == 0 {
		return Running{}, errors.New("container has ended: " + e.Output(ctx, id))
	}
	return Running{ID: id, PID: inspected.Container.State.Pid}, nil
}

// Restart stops a container and starts it again.
func (e *Engine) Restart(ctx context.Context, id string) (Running, error) {
	now := 0
	if _, err := e.client.ContainerRestart(ctx, id, client.ContainerRestartOptions{Timeout: &now}); err != nil {
		return Running{}, fmt.Errorf("restart container: %w", err)
	}
	return e.running(ctx, id)
}

// Stop stops a container at once.
func (e *Engine) Stop(ctx context.Context, id string) error {
	now := 0
	if _, err := e.client.ContainerStop(ctx, id, client.ContainerStopOptions{Timeout: &now}); err != nil {
		return fmt.Errorf("stop container: %w", err)
	}
	return nil
}

// Tag gives an image a name, taking it from the image that had it.
func (e *Engine) Tag(ctx context.Context, image, name string) error {
	if _, err := e.client.ImageTag(ctx, client.ImageTagOptions{Source: image, Target: name}); err != nil {
		return fmt.Errorf("tag image: %w", err)
	}
	return nil
}

// Output is what a container has written so far, empty if that cannot be had.
func (e *Engine) Output(ctx context.Context, id string) string {
	var text strings.Builder
	_ = e.logs(ctx, id, false, &text)
	return text.String()
}

// Follow writes what a container writes to w until the container or ctx ends.
func (e *Engine) Follow(ctx context.Context, id string, w io.Writer) error {
	return e.logs(ctx, id, true, w)
}

func (e *Engine) logs(ctx context.Context, id string, follow bool, w io.Writer) error {
	logs, err := e.client.ContainerLogs(ctx, id, client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true, Follow: follow})
	if err != nil {
		return fmt.Errorf("read container's output: %w", err)
	}
	defer logs.Close()
	for { // frames of an eight byte header, whose last four are the length, and the text
		var header [8]byte
		if _, err := io.ReadFull(logs, header[:]); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read container's output: %w", err)
		}
		size := int64(header[4])<<24 | int64(header[5])<<16 | int64(header[6])<<8 | int64(header[7])
		if _, err := io.CopyN(w, logs, size); err != nil {
			return fmt.Errorf("read container's output: %w", err)
		}
	}
}

// Remove ends a container and removes it.
func (e *Engine) Remove(ctx context.Context, id string) error {
	if _, err := e.client.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true}); err != nil {
		return fmt.Errorf("remove container: %w", err)
	}
	return nil
}

// RemoveImage removes an image that no container uses.
func (e *Engine) RemoveImage(ctx context.Context, id string) error {
	if _, err := e.client.ImageRemove(ctx, id, client.ImageRemoveOptions{Force: true}); err != nil {
		return fmt.Errorf("remove image: %w", err)
	}
	return nil
}
