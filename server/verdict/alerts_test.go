package verdict

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// listener is a webhook that takes everything.
type listener struct {
	*world
	events chan event
}

func newListener(t *testing.T, rules string, change func(*world)) *listener {
	t.Helper()
	l := &listener{events: make(chan event, 1000)}
	hook := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var e event
		if err = errors.Join(err, json.Unmarshal(body, &e)); err != nil {
			t.Error(err)
		}
		l.events <- e
	}))
	t.Cleanup(hook.Close)
	l.world = newWorld(t, rules, func(w *world) {
		w.rules.Webhooks = []Webhook{{Name: "chat", URL: hook.URL}}
		if change != nil {
			change(w)
		}
	})
	return l
}

// heard delivers what waits, and returns how many alerts of each type that was.
func (l *listener) heard() map[string]int {
	l.t.Helper()
	ctx, stop := context.WithCancel(l.t.Context())
	done := make(chan struct{})
	go func() { defer close(done); l.deliver(ctx) }()
	for _, m := l.first("chat"); m != nil; _, m = l.first("chat") {
		runtime.Gosched()
	}
	stop()
	<-done
	kinds := map[string]int{}
	for len(l.events) > 0 {
		kinds[(<-l.events).Type]++
	}
	return kinds
}

// want says which alerts there are since the last time, once each.
func (l *listener) want(kinds ...string) {
	l.t.Helper()
	got := l.heard()
	for _, kind := range kinds {
		if got[kind] != 1 {
			l.t.Errorf("%q was delivered %d times", kind, got[kind])
		}
		delete(got, kind)
	}
	if len(got) > 0 {
		l.t.Errorf("delivered as well: %v", got)
	}
}

// again lets everything happen that could tell of the same once more.
func (l *listener) again() {
	l.t.Helper()
	l.restart()
	l.pass(0)
	l.mu2(func() {
		l.staleFeeds(l.t.Context())
		if err := l.evaluate(l.t.Context(), "again", l.all()); err != nil {
			l.t.Error(err)
		}
	})
}

func TestEachAlertIsDeliveredOnce(t *testing.T) {
	l := newListener(t, strings.Replace(prod, "fail {", "grace {\n    severity = \"critical\"\n    for = \"10h\"\n  }\n  fail {", 1), nil)
	image := config(1)
	l.run(image, 1)
	l.want()
	l.mustPush(scan{image: image})
	l.want(eventRestore)
	l.pass(time.Minute)
	l.mustPush(scan{image: image, findings: []string{critical}})
	for _, step := range []struct {
		after time.Duration
		want  []string
	}{
		{0, []string{eventGraceStart}},
		{5*time.Hour - time.Minute, nil},
		{time.Minute, []string{eventGraceHalf}},
		{4*time.Hour - time.Minute, nil},
		{time.Minute, []string{eventGraceMost}},
		{time.Hour + time.Second, []string{eventWithdraw}},
	} {
		l.pass(step.after)
		l.again() // what was to be told before a restart is told after it
		l.want(step.want...)
		l.again()
		l.want()
	}
	l.mustPush(scan{image: image})
	l.again()
	l.want(eventRestore)
	t.Run("a report that is rejected", func(t *testing.T) {
		if _, err := l.send(image, []byte("nonsense")); !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
		l.again()
		l.want(eventRejected)
		l.again()
		l.want()
	})
}

func TestWhoAsksIsToldOfEachVerdictThatTurns(t *testing.T) {
	var turns []Turn
	w := newWorld(t, prod, func(w *world) { w.cfg.Turned = func(turn Turn) { turns = append(turns, turn) } })
	image := config(1)
	w.run(image, 1)
	w.mustPush(scan{image: image})
	w.pass(time.Minute)
	w.mustPush(scan{image: image, findings: []string{critical}})
	if len(turns) != 2 || !turns[0].Allowed || turns[1].Allowed {
		t.Fatalf("told of %+v", turns)
	}
	id, _, _ := strings.Cut(critical, " ")
	if last := turns[1]; last.Policy != "prod" || last.Digests[0] != image || last.Finding != id || last.Reason == "" || last.Report == "" {
		t.Errorf("told of %+v", last)
	}
}

func TestWhatSleptThroughAGraceTellsAllOfIt(t *testing.T) {
	l := newListener(t, strings.Replace(prod, "fail {", "grace {\n    severity = \"critical\"\n    for = \"10h\"\n  }\n  fail {", 1), nil)
	l.mustPush(scan{image: config(1), findings: []string{critical}})
	l.pass(9*time.Hour + 30*time.Minute)
	l.restart()
	l.want(eventGraceStart, eventGraceHalf, eventGraceMost)
}

func TestTheGuardAndTheFeedsAreToldOnce(t *testing.T) {
	const images = 40
	var write func(ids string)
	l := newListener(t, strings.Replace(prod, "fail {", "max_age = \"240h\"\n  feed_max_age = \"48h\"\n  blast_guard {\n    max_fraction = 0.2\n    window = \"5m\"\n  }\n  fail {\n    kev = true\n  }\n  fail {", 1), func(w *world) {
		w.rules.KEVPath = filepath.Join(w.dir, "kev.json")
		write = func(ids string) {
			t.Helper()
			text := fmt.Sprintf(`{"dateReleased":%q,"vulnerabilities":[%s]}`, w.now().Format(time.RFC3339), ids)
			if err := os.WriteFile(w.rules.KEVPath, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(w.rules.KEVPath, w.now(), w.now()); err != nil {
				t.Fatal(err)
			}
		}
		write(`{"cveID":"CVE-1999-1"}`)
	})
	for n := range images {
		l.run(config(n), 1)
		l.mustPush(scan{image: config(n), findings: []string{"CVE-2026-2 LOW"}})
	}
	if got := l.heard(); got[eventRestore] != images || len(got) != 1 {
		t.Fatalf("delivered %v", got)
	}
	l.again()
	l.want()
	feed := func() {
		l.mu2(func() {
			l.readFeeds()
			l.staleFeeds(t.Context())
			if err := l.evaluate(t.Context(), "feed", l.all()); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("a guard that holds everything", func(*testing.T) {
		l.pass(time.Hour)
		write(`{"cveID":"CVE-1999-1"},{"cveID":"CVE-2026-2"}`)
		feed()
		l.again()
		l.want(eventGuard)
		l.again()
		l.want()
	})
	t.Run("and that is let go", func(t *testing.T) {
		if list, err := l.Release(t.Context(), "prod", "alice"); err != nil || len(list) != images {
			t.Fatalf("%d, %v", len(list), err)
		}
		l.again()
		if got := l.heard(); got[eventRelease] != 1 || got[eventWithdraw] != images || len(got) != 2 {
			t.Errorf("delivered %v", got)
		}
		l.again()
		l.want()
	})
	t.Run("a feed that is too old, and again when it was fresh between", func(*testing.T) {
		for range 2 {
			l.pass(49 * time.Hour)
			feed()
			l.again()
			l.want(eventFeed)
			feed()
			l.again()
			l.want()
			write(`{"cveID":"CVE-2026-2"}`)
			feed()
			l.want()
		}
	})
}
