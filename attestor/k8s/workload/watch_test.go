package workload

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
)

func TestAnAPIServerThatDoesNotTakeTheWatchIsNotBack(t *testing.T) {
	var watches atomic.Int32
	hangs, over := make(chan struct{}), make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("watch") == "" {
			_, _ = w.Write([]byte(`{"metadata":{"resourceVersion":"7"},"items":[]}`)) // what is lost of it fails the list
			return
		}
		switch watches.Add(1) {
		case 1: // is taken, and breaks
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		case 2: // nobody answers
			close(hangs)
		}
		<-over
	}))
	defer s.Close()
	defer close(over)

	var mu sync.Mutex // guards the two below
	var live []bool
	var seen []error
	k := keeper{
		replace: func() (func(json.RawMessage) error, func()) {
			return func(json.RawMessage) error { return nil }, func() {}
		},
		event: func(string, json.RawMessage) error { return nil },
		live: func(is bool) {
			mu.Lock()
			defer mu.Unlock()
			live = append(live, is)
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	var kept sync.WaitGroup
	kept.Go(func() {
		(&table{api: &rest{name: "API server", base: s.URL}, path: "/api/v1/pods"}).keep(ctx, k, func(err error) {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, err)
		})
	})
	<-hangs
	mu.Lock()
	if len(live) != 2 || !live[0] || live[1] {
		t.Errorf("changes arrive: %v; want true once, and false from then on", live)
	}
	if len(seen) != 2 || seen[0] != nil || seen[1] == nil {
		t.Errorf("the API server was seen as %v; want it there once, and away from then on", seen)
	}
	mu.Unlock()
	cancel()
	kept.Wait()
}
