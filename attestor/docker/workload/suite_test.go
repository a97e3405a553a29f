package workload_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/docker"
	"github.com/assay-id/assay/attestor/docker/workload"
)

// bench is an engine that the suite runs on: the fake and the real one.
type bench interface {
	socket() string
	proc() string
	// build makes an image and returns its ID; no two are alike.
	build(t *testing.T, labels map[string]string, env ...string) string
	tag(t *testing.T, image, name string)
	run(t *testing.T, image string, labels map[string]string, env ...string) (id string, pid int)
	restart(t *testing.T, id string) (pid int)
	end(t *testing.T, id string)
	rename(t *testing.T, id, name string)
	down(t *testing.T)
	up(t *testing.T)
}

// patience is how long anything may take on a busy machine before it counts as not happening.
const patience = 60 * time.Second

func open(t testing.TB, c docker.Config) (attestor.Workload, *test.Hook) {
	t.Helper()
	log, hook := test.NewNullLogger()
	log.SetLevel(logrus.DebugLevel)
	w, err := workload.Kind().Open(&c, attestor.Needs{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return w, hook
}

func attest(t *testing.T, w attestor.Workload, proc string, pid int) attestor.Set {
	t.Helper()
	found, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: proc})
	if err != nil {
		t.Fatal(err)
	}
	return attestor.NewSet(found...)
}

func has(t *testing.T, set attestor.Set, want ...string) {
	t.Helper()
	for _, text := range want {
		if !slices.Contains(set.Strings(), text) {
			t.Errorf("no %s in\n%s", text, strings.Join(set.Strings(), "\n"))
		}
	}
}

func hasNone(t *testing.T, set attestor.Set, part string) {
	t.Helper()
	for _, s := range set.Strings() {
		if strings.Contains(s, part) {
			t.Errorf("there is a %s", s)
		}
	}
}

// wakes collects what a watcher says.
type wakes struct {
	mu   sync.Mutex
	pids map[int]int
	all  int
	news chan struct{}
}

// watch runs the watcher until the test ends.
func watch(t *testing.T, w attestor.Workload) *wakes {
	t.Helper()
	heard := &wakes{pids: make(map[int]int), news: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.(attestor.Watcher).Watch(ctx, heard.changed) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("watch: %v", err)
			}
		case <-time.After(patience):
			t.Error("watch does not end")
		}
	})
	return heard
}

func (h *wakes) changed(pids ...int) {
	h.mu.Lock()
	if len(pids) == 0 {
		h.all++
	}
	for _, pid := range pids {
		h.pids[pid]++
	}
	h.mu.Unlock()
	select {
	case h.news <- struct{}{}:
	default:
	}
}

// until waits for something heard.
func (h *wakes) until(t *testing.T, what string, is func(pids map[int]int, all int) bool) {
	t.Helper()
	late := time.After(patience)
	for {
		h.mu.Lock()
		ok := is(h.pids, h.all)
		h.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-h.news:
		case <-late:
			t.Fatalf("never heard: %s", what)
		}
	}
}

// woken provokes until the watcher names the process: the stream of events may not be open yet.
func (h *wakes) woken(t *testing.T, pid int, provoke func(try int)) {
	t.Helper()
	h.mu.Lock()
	before := h.pids[pid]
	h.mu.Unlock()
	late := time.After(patience)
	for try := 0; ; try++ {
		provoke(try)
		again := time.After(250 * time.Millisecond)
		for waiting := true; waiting; {
			h.mu.Lock()
			now := h.pids[pid]
			h.mu.Unlock()
			if now > before {
				return
			}
			select {
			case <-h.news:
			case <-again:
				waiting = false
			case <-late:
				t.Fatalf("process %d was not woken", pid)
			}
		}
	}
}

// runSuite is what holds on every engine.
func runSuite(t *testing.T, b bench) {
	const gone = 1 << 22
	config := fmt.Sprintf("docker_socket_path = %q\nclaim_env = [\"COMPONENT\"]\nengine_timeout = \"20s\"\n", b.socket())
	plain := docker.Config{SocketPath: b.socket(), ClaimEnv: []string{"COMPONENT"}, Timeout: "20s"}

	labels := map[string]string{"app": "shop", "org.opencontainers.image.revision": "4f1c2d"}
	imageA := b.build(t, labels, "COMPONENT=cart", "PATH=/bin")
	imageB := b.build(t, map[string]string{"app": "other", "org.opencontainers.image.revision": "badbad"})
	b.tag(t, imageA, "app:latest")
	id, pid := b.run(t, "app:latest", map[string]string{"team": "a:b", "org.opencontainers.image.revision": "SPOOF"}, "MODE=fast")
	want := []string{
		"claim:env:COMPONENT:cart",
		"claim:image:app:shop", "claim:image:org.opencontainers.image.revision:4f1c2d",
		"claim:runtime:org.opencontainers.image.revision:SPOOF", "claim:runtime:team:a:b",
		"docker:env:COMPONENT=cart", "docker:env:MODE=fast", "docker:env:PATH=/bin",
		"docker:image_config_digest:" + imageA, "docker:image_id:app:latest",
		"docker:label:app:shop", "docker:label:org.opencontainers.image.revision:SPOOF", "docker:label:team:a:b",
		"image:id:" + imageA, "image:platform:linux/amd64",
	}
	attestortest.RunWorkload(t, attestortest.Workload{
		Kind: workload.Kind(), Config: config,
		Types:  []string{docker.Type, docker.ImageType, docker.ClaimType},
		Cases:  map[string]attestortest.Case{"a container with labels and variables": {Process: attestor.Process{PID: pid, Proc: b.proc()}, Want: want}},
		Gone:   attestor.Process{PID: gone, Proc: b.proc()},
		README: "../README.md",
	})

	t.Run("labels of the command line do not pass for the image's", func(t *testing.T) {
		w, _ := open(t, plain)
		set := attest(t, w, b.proc(), pid)
		has(t, set, "claim:image:org.opencontainers.image.revision:4f1c2d", "claim:runtime:org.opencontainers.image.revision:SPOOF")
		hasNone(t, set, "claim:image:org.opencontainers.image.revision:SPOOF")
		hasNone(t, set, "claim:runtime:app:")
	})

	t.Run("the tag moves, the selectors do not", func(t *testing.T) {
		known, _ := open(t, plain)
		heard := watch(t, known)
		before := attest(t, known, b.proc(), pid)
		heard.woken(t, pid, func(try int) {
			b.tag(t, imageB, "app:latest")
			b.tag(t, imageA, fmt.Sprintf("app:try%d", try)) // the image that runs is tagged as well
			attest(t, known, b.proc(), pid)
		})
		fresh, _ := open(t, plain)
		for _, w := range []attestor.Workload{known, fresh} {
			if after := attest(t, w, b.proc(), pid); !after.Equal(before) {
				t.Errorf("selectors moved from\n%q to\n%q", before.Strings(), after.Strings())
			}
			hasNone(t, attest(t, w, b.proc(), pid), imageB)
		}
		_, other := b.run(t, "app:latest", nil)
		set := attest(t, known, b.proc(), other)
		has(t, set, "docker:image_id:app:latest", "image:id:"+imageB, "docker:image_config_digest:"+imageB)
		hasNone(t, set, imageA)
	})

	t.Run("a rename, a restart and the end wake the container's processes", func(t *testing.T) {
		w, _ := open(t, plain)
		heard := watch(t, w)
		mine, pid := b.run(t, imageA, nil)
		heard.woken(t, pid, func(try int) {
			attest(t, w, b.proc(), pid)
			b.rename(t, mine, fmt.Sprintf("renamed%d-%s", try, mine[:8]))
		})
		attest(t, w, b.proc(), pid)
		next := b.restart(t, mine)
		heard.until(t, "the restart", func(pids map[int]int, _ int) bool { return pids[pid] >= 2 })
		has(t, attest(t, w, b.proc(), next), "image:id:"+imageA)
		b.end(t, mine)
		heard.until(t, "the end", func(pids map[int]int, _ int) bool { return pids[next] >= 1 })
		if found, err := w.Attest(t.Context(), attestor.Process{PID: next, Proc: b.proc()}); err == nil && len(found) > 0 {
			t.Errorf("an ended process has %q", found)
		}
	})

	t.Run("an engine that restarts costs new containers their selectors, and says so once", func(t *testing.T) {
		quick := plain
		w, log := open(t, quick)
		heard := watch(t, w)
		heard.woken(t, pid, func(int) { // so that the stream is open
			attest(t, w, b.proc(), pid)
			b.rename(t, id, fmt.Sprintf("n%d", time.Now().UnixNano()))
		})
		before := attest(t, w, b.proc(), pid)
		_, stranger := b.run(t, imageB, nil)
		log.Reset()
		b.down(t)
		if after := attest(t, w, b.proc(), pid); !after.Equal(before) {
			t.Errorf("a container known before has\n%q", after.Strings())
		}
		for range 20 {
			if found, err := w.Attest(t.Context(), attestor.Process{PID: stranger, Proc: b.proc()}); err == nil {
				t.Fatalf("no error; selectors %q", found)
			}
		}
		b.up(t)
		heard.until(t, "the engine's return", func(_ map[int]int, all int) bool { return all > 0 })
		has(t, attest(t, w, b.proc(), stranger), "image:id:"+imageB)
		has(t, attest(t, w, b.proc(), pid), "image:id:"+imageA)
		warned, back := 0, 0
		for _, entry := range log.AllEntries() {
			switch {
			case entry.Level <= logrus.WarnLevel:
				warned++
			case entry.Level == logrus.InfoLevel:
				back++
			}
		}
		if warned != 1 || back != 1 {
			t.Errorf("%d warnings, %d times back; want one of each", warned, back)
		}
		heard.woken(t, pid, func(int) { // the stream goes on
			attest(t, w, b.proc(), pid)
			b.rename(t, id, fmt.Sprintf("n%d", time.Now().UnixNano()))
		})
	})
}
