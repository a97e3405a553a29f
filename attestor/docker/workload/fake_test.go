package workload_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/docker"
	"github.com/assay-id/assay/attestor/docker/workload"
	fake "github.com/assay-id/assay/test/fake/docker"
)

// fakeBench runs the suite on the fake.
type fakeBench struct{ *fake.Engine }

func newFake(t testing.TB) fakeBench {
	t.Helper()
	dir, err := os.MkdirTemp("", "fd") //nolint:usetesting // its folders are too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	e := fake.New(dir)
	if err := e.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Hang(false)
		e.Stop()
		os.RemoveAll(dir)
	})
	return fakeBench{e}
}

func (b fakeBench) socket() string { return b.Socket() }
func (b fakeBench) proc() string   { return b.Proc() }
func (b fakeBench) build(_ *testing.T, labels map[string]string, env ...string) string {
	return b.Build(labels, env...)
}
func (b fakeBench) tag(_ *testing.T, image, name string) { b.Tag(image, name) }
func (b fakeBench) run(t *testing.T, image string, labels map[string]string, env ...string) (string, int) {
	t.Helper()
	id, pid, err := b.Run(image, labels, env, fake.Cgroupfs)
	if err != nil {
		t.Fatal(err)
	}
	return id, pid
}
func (b fakeBench) restart(t *testing.T, id string) int {
	t.Helper()
	pid, err := b.Restart(id)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
func (b fakeBench) end(t *testing.T, id string) {
	t.Helper()
	if err := b.End(id); err != nil {
		t.Fatal(err)
	}
}
func (b fakeBench) rename(_ *testing.T, id, name string) { b.Rename(id, name) }
func (b fakeBench) down(*testing.T)                      { b.Stop() }
func (b fakeBench) up(t *testing.T) {
	t.Helper()
	if err := b.Start(); err != nil {
		t.Fatal(err)
	}
}

func TestSuiteOnFake(t *testing.T) { runSuite(t, newFake(t)) }

// runOne runs one container on a new fake.
func runOne(t *testing.T, b fakeBench, layout fake.Layout) (image, id string, pid int) {
	t.Helper()
	image = b.Build(map[string]string{"app": "shop"})
	b.Tag(image, "app:latest")
	id, pid, err := b.Run("app:latest", nil, []string{"SECRET=hunter2"}, layout)
	if err != nil {
		t.Fatal(err)
	}
	return image, id, pid
}

func config(b fakeBench) docker.Config { return docker.Config{SocketPath: b.Socket(), Timeout: "10s"} }

func TestCost(t *testing.T) {
	b := newFake(t)
	_, id, pid := runOne(t, b, fake.Systemd)
	second, err := b.Exec(id)
	if err != nil {
		t.Fatal(err)
	}
	w, _ := open(t, config(b))
	t.Run("a known container costs no call", func(t *testing.T) {
		attest(t, w, b.Proc(), pid)
		containers, images := b.Calls("containers"), b.Calls("images")
		if containers != 1 || images != 1 {
			t.Errorf("the first time cost %d and %d calls", containers, images)
		}
		for range 10 {
			attest(t, w, b.Proc(), pid)
			attest(t, w, b.Proc(), second)
		}
		if b.Calls("containers") != containers || b.Calls("images") != images {
			t.Errorf("%d and %d calls more", b.Calls("containers")-containers, b.Calls("images")-images)
		}
	})
	t.Run("many who ask at once cost one question", func(t *testing.T) {
		_, _, pid := runOne(t, b, fake.Systemd)
		before := b.Calls("containers")
		done := make(chan error)
		for range 30 {
			go func() {
				_, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: b.Proc()})
				done <- err
			}()
		}
		for range 30 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if n := b.Calls("containers") - before; n != 1 {
			t.Errorf("%d questions", n)
		}
	})
	t.Run("a process in no container costs no call", func(t *testing.T) {
		before := b.Calls("containers")
		if err := fake.WriteProcess(b.Proc(), 5, "0::/system.slice/nginx.service\n", ""); err != nil {
			t.Fatal(err)
		}
		if set := attest(t, w, b.Proc(), 5); set.Len() != 0 || b.Calls("containers") != before {
			t.Errorf("selectors %q, %d calls", set.Strings(), b.Calls("containers")-before)
		}
	})
}

func TestWhoIsInTheContainer(t *testing.T) {
	b := newFake(t)
	_, id, pid := runOne(t, b, fake.Systemd)
	w, _ := open(t, config(b))
	if err := fake.WriteProcess(b.Proc(), 66, "0::/user.slice/user-1000.slice/user@1000.service/docker-"+id+".scope\n", ""); err != nil {
		t.Fatal(err)
	}
	t.Run("a cgroup that a user named after a container is not in it", func(t *testing.T) {
		for range 3 {
			found, err := w.Attest(t.Context(), attestor.Process{PID: 66, Proc: b.Proc()})
			if err == nil || len(found) != 0 {
				t.Errorf("selectors %q, %v", found, err)
			}
			attest(t, w, b.Proc(), pid)
		}
		if n := b.Calls("containers"); n > 2 {
			t.Errorf("it cost the engine %d calls", n)
		}
	})
	t.Run("an engine inside a container does not name its containers to the host's", func(t *testing.T) {
		other := strings.Repeat("ab", 32)
		if err := fake.WriteProcess(b.Proc(), 67, "0::/system.slice/docker-"+id+".scope/docker/"+other+"\n", ""); err != nil {
			t.Fatal(err)
		}
		has(t, attest(t, w, b.Proc(), 67), "docker:image_id:app:latest")
	})
	t.Run("a container of another engine has no selectors and no error", func(t *testing.T) {
		if err := fake.WriteProcess(b.Proc(), 68, "0::/docker/"+strings.Repeat("cd", 32)+"\n", ""); err != nil {
			t.Fatal(err)
		}
		if set := attest(t, w, b.Proc(), 68); set.Len() != 0 {
			t.Errorf("selectors %q", set.Strings())
		}
	})
	t.Run("an agent in a container sees its own container's processes by their mounts", func(t *testing.T) {
		here := func(string) string { return "0::/\n" }
		image := b.Build(nil)
		id, first, err := b.Run(image, nil, nil, here)
		if err != nil {
			t.Fatal(err)
		}
		mounts := "41 30 8:1 /var/lib/docker/containers/" + id + "/hostname /etc/hostname rw - ext4 /dev/sda1 rw\n"
		if err := fake.WriteProcess(b.Proc(), first, "0::/\n", mounts); err != nil {
			t.Fatal(err)
		}
		has(t, attest(t, w, b.Proc(), first), "image:id:"+image)
		// Mounting a file of that name over /etc/hostname in a namespace of one's own does not help
		// a process elsewhere.
		if err := fake.WriteProcess(b.Proc(), 69, "0::/\n", strings.ReplaceAll(mounts, id, b.firstOf(t))); err != nil {
			t.Fatal(err)
		}
		if found, err := w.Attest(t.Context(), attestor.Process{PID: 69, Proc: b.Proc()}); err == nil || len(found) != 0 {
			t.Errorf("selectors %q, %v", found, err)
		}
	})
	t.Run("a container whose first process cannot be seen is an error", func(t *testing.T) {
		_, id, pid := runOne(t, b, fake.Systemd)
		if err := os.RemoveAll(fmt.Sprintf("%s/%d", b.Proc(), pid)); err != nil {
			t.Fatal(err)
		}
		if err := fake.WriteProcess(b.Proc(), 70, fake.Systemd(id), ""); err != nil {
			t.Fatal(err)
		}
		if found, err := w.Attest(t.Context(), attestor.Process{PID: 70, Proc: b.Proc()}); err == nil || len(found) != 0 {
			t.Errorf("selectors %q, %v", found, err)
		}
	})
}

// firstOf runs a container in its own cgroup and returns its ID.
func (b fakeBench) firstOf(t *testing.T) string {
	t.Helper()
	_, id, _ := runOne(t, b, fake.Systemd)
	return id
}

func TestSelectors(t *testing.T) {
	t.Run("variables can be kept out", func(t *testing.T) {
		b := newFake(t)
		_, _, pid := runOne(t, b, fake.Systemd)
		c := config(b)
		c.DisableEnv = true
		w, _ := open(t, c)
		set := attest(t, w, b.Proc(), pid)
		hasNone(t, set, "hunter2")
		has(t, set, "docker:label:app:shop")
		abstains := w.(attestor.Abstainer).Abstains
		if abstains(attestor.Selector{Type: "docker", Value: "env:A=b"}) == "" || abstains(attestor.Selector{Type: "docker", Value: "label:env:b"}) != "" {
			t.Error("it does not say that variables are turned off, or says more")
		}
	})
	t.Run("Podman's image IDs get their algorithm", func(t *testing.T) {
		b := newFake(t)
		b.Podman = true
		image, _, pid := runOne(t, b, fake.Systemd)
		w, _ := open(t, config(b))
		has(t, attest(t, w, b.Proc(), pid), "image:id:"+image, "docker:image_config_digest:"+image, "claim:image:app:shop")
	})
	t.Run("an image that is gone takes its claims with it", func(t *testing.T) {
		b := newFake(t)
		image, _, pid := runOne(t, b, fake.Systemd)
		b.Forget(image)
		w, _ := open(t, config(b))
		set := attest(t, w, b.Proc(), pid)
		has(t, set, "image:id:"+image, "docker:label:app:shop")
		hasNone(t, set, "claim:")
	})
	t.Run("a containerd store's digest is not called that of a configuration", func(t *testing.T) {
		b := newFake(t)
		b.ContainerdStore = true
		image, _, pid := runOne(t, b, fake.Systemd)
		w, _ := open(t, config(b))
		set := attest(t, w, b.Proc(), pid)
		hasNone(t, set, "image:id:")
		has(t, set, "docker:image_config_digest:"+image, "image:platform:linux/arm64/v8")
		if !strings.Contains(strings.Join(set.Strings(), " "), "image:manifest:sha256:") {
			t.Errorf("no manifest in %q", set.Strings())
		}
	})
	t.Run("what cannot be a selector is left out, and too many are refused", func(t *testing.T) {
		b := newFake(t)
		image := b.Build(nil)
		labels := map[string]string{"fine": "yes", "line": "a\nb", "escape": "\x1b[2J", "long": strings.Repeat("x", 5000)}
		_, pid, err := b.Run(image, labels, nil, fake.Systemd)
		if err != nil {
			t.Fatal(err)
		}
		w, _ := open(t, config(b))
		set := attest(t, w, b.Proc(), pid)
		has(t, set, "docker:label:fine:yes")
		for _, name := range []string{"line", "escape", "long"} {
			hasNone(t, set, ":"+name+":")
		}
		for i := range 3000 {
			labels[fmt.Sprint(i)] = "x"
		}
		if _, pid, err = b.Run(image, labels, nil, fake.Systemd); err != nil {
			t.Fatal(err)
		}
		if found, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: b.Proc()}); err == nil || len(found) != 0 {
			t.Errorf("%d selectors, %v", len(found), err)
		}
	})
}

func TestEngineTrouble(t *testing.T) {
	t.Run("a slow engine costs its deadline and no more", func(t *testing.T) {
		b := newFake(t)
		_, _, pid := runOne(t, b, fake.Systemd)
		c := config(b)
		c.Timeout = "50ms"
		w, log := open(t, c)
		b.Hang(true)
		begin := time.Now()
		for range 5 {
			_, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: b.Proc()})
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error is %v", err)
			}
		}
		if took := time.Since(begin); took > patience/2 {
			t.Errorf("five took %v", took)
		}
		b.Hang(false)
		c.Timeout = "10s"
		warned := 0
		for _, entry := range log.AllEntries() {
			if entry.Level <= logrus.WarnLevel {
				warned++
			}
		}
		if warned != 1 {
			t.Errorf("%d warnings, want 1", warned)
		}
		if after, _ := open(t, c); attest(t, after, b.Proc(), pid).Len() == 0 {
			t.Error("no selectors afterwards")
		}
	})
	t.Run("who hung up says nothing about the engine, and does not fail others", func(t *testing.T) {
		b := newFake(t)
		_, _, pid := runOne(t, b, fake.Systemd)
		w, log := open(t, config(b))
		arrived, release := make(chan struct{}, 100), make(chan struct{})
		b.Fail(func(string) int {
			arrived <- struct{}{}
			<-release
			return 0
		})
		ctx, cancel := context.WithCancel(t.Context())
		first, second := make(chan error, 1), make(chan error, 1)
		go func() {
			_, err := w.Attest(ctx, attestor.Process{PID: pid, Proc: b.Proc()})
			first <- err
		}()
		<-arrived
		go func() {
			_, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: b.Proc()})
			second <- err
		}()
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("error is %v", err)
		}
		close(release)
		if err := <-second; err != nil {
			t.Errorf("the other failed: %v", err)
		}
		for _, entry := range log.AllEntries() {
			if entry.Level <= logrus.WarnLevel {
				t.Errorf("logged: %s", entry.Message)
			}
		}
	})
	for why, fail := range map[string]func(string) int{
		"inspecting containers fails": func(path string) int { return when(strings.HasPrefix(path, "/containers"), 500) },
		"inspecting images fails":     func(path string) int { return when(strings.HasPrefix(path, "/images"), 503) },
		"everything is forbidden":     func(string) int { return http.StatusForbidden },
	} {
		t.Run(why+", then works again", func(t *testing.T) {
			b := newFake(t)
			_, _, pid := runOne(t, b, fake.Systemd)
			w, _ := open(t, config(b))
			heard := watch(t, w)
			b.Fail(fail)
			if found, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: b.Proc()}); err == nil {
				t.Errorf("no error; selectors %q", found)
			}
			b.Fail(nil)
			heard.until(t, "that it works again", func(_ map[int]int, all int) bool { return all > 0 })
			has(t, attest(t, w, b.Proc(), pid), "docker:label:app:shop")
		})
	}
	t.Run("an engine that comes back older or newer is spoken to as it wants", func(t *testing.T) {
		b := newFake(t)
		_, _, pid := runOne(t, b, fake.Systemd)
		w, _ := open(t, config(b))
		attest(t, w, b.Proc(), pid)
		for _, version := range []string{"1.40", "1.51"} {
			b.Stop()
			_, _, other := runOne(t, b, fake.Systemd)
			if _, err := w.Attest(t.Context(), attestor.Process{PID: other, Proc: b.Proc()}); err == nil {
				t.Error("an engine that is away answers")
			}
			b.APIVersion = version
			if err := b.Start(); err != nil {
				t.Fatal(err)
			}
			has(t, attest(t, w, b.Proc(), other), "docker:label:app:shop")
		}
	})
	t.Run("an engine that is too old is an error that says so", func(t *testing.T) {
		b := newFake(t)
		b.APIVersion = "1.24"
		_, _, pid := runOne(t, b, fake.Systemd)
		w, _ := open(t, config(b))
		_, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: b.Proc()})
		if err == nil || !strings.Contains(err.Error(), "1.24") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("an engine that starts after the agent is found", func(t *testing.T) {
		b := newFake(t)
		_, _, pid := runOne(t, b, fake.Systemd)
		b.Stop()
		w, _ := open(t, config(b))
		heard := watch(t, w)
		if _, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: b.Proc()}); err == nil {
			t.Error("no error")
		}
		if err := b.Start(); err != nil {
			t.Fatal(err)
		}
		heard.until(t, "the engine's coming", func(_ map[int]int, all int) bool { return all > 0 })
		has(t, attest(t, w, b.Proc(), pid), "docker:label:app:shop")
	})
}

func when(is bool, status int) int {
	if is {
		return status
	}
	return 0
}

func TestConfiguration(t *testing.T) {
	for why, c := range map[string]docker.Config{
		"both addresses":            {SocketPath: "/a", Host: "unix:///b"},
		"another machine's engine":  {Host: "tcp://192.0.2.1:2375"},
		"a name that may be remote": {Host: "tcp://docker:2375"},
		"a socket path on TCP":      {SocketPath: "tcp://127.0.0.1:2375"},
		"no port":                   {Host: "tcp://127.0.0.1"},
		"a relative path":           {SocketPath: "docker.sock"},
		"a version that is none":    {Version: "latest"},
		"a timeout that is none":    {Timeout: "soon"},
		"a timeout of nothing":      {Timeout: "0s"},
		"a matcher without an ID":   {CgroupMatchers: []string{"/docker"}},
	} {
		t.Run(why+" is refused", func(t *testing.T) {
			if _, err := workload.Kind().Open(&c, attestor.Needs{}); err == nil {
				t.Error("opened")
			}
		})
	}
	for why, c := range map[string]docker.Config{
		"nothing set":       {},
		"a path":            {SocketPath: "/run/user/1000/podman/podman.sock"},
		"a URL":             {SocketPath: "unix:///run/user/1000/docker.sock"},
		"a host on the way": {Host: "tcp://127.0.0.1:2375"},
		"IPv6":              {Host: "tcp://[::1]:2375", Version: "1.41"},
	} {
		t.Run(why+" is accepted", func(t *testing.T) {
			if _, err := workload.Kind().Open(&c, attestor.Needs{}); err != nil {
				t.Error(err)
			}
		})
	}
}

func BenchmarkAttest(b *testing.B) {
	f := newFake(b)
	image := f.Build(map[string]string{"app": "shop"})
	_, pid, err := f.Run(image, nil, nil, fake.Cgroupfs)
	if err != nil {
		b.Fatal(err)
	}
	w, _ := open(b, docker.Config{SocketPath: f.Socket()})
	p := attestor.Process{PID: pid, Proc: f.Proc()}
	for b.Loop() {
		if _, err := w.Attest(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
}
