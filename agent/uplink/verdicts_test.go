package uplink_test

import (
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/agent/uplink"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/test/fake/fakeserver"
)

// images are what a test says that runs.
type images struct {
	mu      sync.Mutex
	digests []string
	changed chan struct{}
}

func (i *images) running() ([]string, <-chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.digests), i.changed
}

func (i *images) set(digests ...string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.digests = digests
	close(i.changed)
	i.changed = make(chan struct{})
}

func digest(digit string) string { return "sha256:" + strings.Repeat(digit, 64) }

func TestReportingImages(t *testing.T) {
	t.Run("what runs is in the hello, and what changes of it is told", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Speak("verdicts")
		i := &images{digests: []string{digest("a"), digest("b")}, changed: make(chan struct{})}
		n := start(t, server, func(c *uplink.Config) { c.Running = i.running })
		n.until("the first picture", func(*view.Picture) bool { return true })
		hello, _ := server.Hello()
		if diff := cmp.Diff([]string{digest("a"), digest("b")}, hello.GetRunning()); diff != "" || !slices.Equal(hello.GetCapabilities(), []string{"verdicts"}) {
			t.Error(diff, hello.GetCapabilities())
		}
		i.set(digest("b"), digest("c"))
		wait(t, "the report", func() bool { return len(server.Reports()) == 1 })
		r := server.Reports()[0]
		if r.GetFull() || !slices.Equal(r.GetDigests(), []string{digest("c")}) || !slices.Equal(r.GetRemovedDigests(), []string{digest("a")}) {
			t.Errorf("reported %v", r)
		}
		i.set(digest("b"), digest("c")) // nothing is different
		i.set(digest("b"))
		wait(t, "the next report", func() bool { return len(server.Reports()) == 2 })
		if r := server.Reports()[1]; len(r.GetDigests()) != 0 || !slices.Equal(r.GetRemovedDigests(), []string{digest("c")}) {
			t.Errorf("reported %v", r)
		}
	})
	t.Run("a server that knows no verdicts is told nothing on the stream", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		i := &images{digests: []string{digest("a")}, changed: make(chan struct{})}
		n := start(t, server, func(c *uplink.Config) { c.Running = i.running })
		n.until("the first picture", func(*view.Picture) bool { return true })
		i.set(digest("b"))
		rev := server.Put(fakeserver.Entry("later", "/later", "unix:uid:1"))
		n.until("the next picture", has("later"))
		wait(t, "its acknowledgement, which is sent behind", func() bool { _, acked := server.Hello(); return acked == rev })
		if r := server.Reports(); len(r) != 0 {
			t.Errorf("it was told %v", r)
		}
	})
}
