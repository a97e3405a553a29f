package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/cgroup"
)

const (
	// firstPause and maxPause bound the wait before the stream of events is opened again.
	firstPause, maxPause = 100 * time.Millisecond, 5 * time.Second
	// probeEvery is how often an engine that did not answer a question is tried, while the stream of
	// its events is open.
	probeEvery = time.Second
)

// Watch follows the engine's events. It names the processes of a container that something happened
// to, and everybody when the engine comes back: who asked while it was away got no docker selectors.
// It returns nil when ctx ends.
func (w *workload) Watch(ctx context.Context, changed func(pids ...int)) error {
	pause, since, missed := firstPause, "", false
	for ctx.Err() == nil {
		var opened *stream
		err := w.engine.probe(ctx)
		if err == nil {
			opened, err = w.engine.events(ctx, since)
		}
		if err == nil {
			pause = firstPause
			select {
			case <-w.engine.back: // found to be away, by others, before this
				missed = true
			default:
			}
			if missed {
				changed()
			}
			since, err = w.follow(ctx, opened, changed, since)
			opened.close()
		}
		if ctx.Err() != nil {
			break
		}
		missed = true
		w.log.WithError(err).WithField("pause", pause).Debug("no events from the container engine")
		attestor.Pause(ctx, pause)
		pause = min(2*pause, maxPause)
	}
	return nil //nolint:nilerr // the end of its context is how it ends, not a fault
}

// follow reads an open stream until it ends, and returns the moment to go on from.
func (w *workload) follow(ctx context.Context, s *stream, changed func(...int), since string) (string, error) {
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for {
		select {
		case event := <-s.Messages:
			since = momentOf(event, since)
			w.happened(event, changed)
		case err := <-s.Err:
			if err == nil || errors.Is(err, io.EOF) {
				err = errors.New("engine ended the stream of events")
			}
			return since, err
		case <-w.engine.back:
			changed()
		case <-tick.C:
			if w.engine.isAway() {
				_ = w.engine.probe(ctx) // what it finds comes through back
			}
		case <-ctx.Done():
			return since, ctx.Err()
		}
	}
}

// momentOf returns the event's time in the form the engine takes it back. The engine sends what it
// still has from then on, the event itself among it, which does no harm.
func momentOf(event events.Message, before string) string {
	if event.TimeNano <= 0 {
		return before
	}
	return fmt.Sprintf("%d.%09d", event.TimeNano/int64(time.Second), event.TimeNano%int64(time.Second))
}

// happened drops what is known of the container, or of every container of the image, that the event
// is about, and wakes its processes.
func (w *workload) happened(event events.Message, changed func(...int)) {
	id := event.Actor.ID
	var pids []int
	many := false
	w.mu.Lock()
	for name, k := range w.known {
		if name != id && (event.Type != events.ImageEventType || k.imageID == "" || k.imageID != normal(id)) {
			continue
		}
		for pid := range k.pids {
			pids = append(pids, pid)
		}
		many = many || k.many
		delete(w.known, name)
	}
	w.mu.Unlock()
	w.log.WithFields(logrus.Fields{"event": event.Action, "about": id, "processes": len(pids)}).Debug("container engine event")
	switch {
	case many:
		changed()
	case len(pids) > 0:
		slices.Sort(pids)
		changed(slices.Compact(pids)...)
	}
}

// normal gives an image ID its algorithm, which Podman leaves out.
func normal(id string) string {
	if cgroup.IsID(id) {
		return "sha256:" + id
	}
	return id
}
