package workload

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/assay-id/assay/attestor"
)

// firstPause and maxPause bound the wait before the bus is tried again.
const firstPause, maxPause = 100 * time.Millisecond, 5 * time.Second

// againEvery is how often those who could not be answered are woken to ask again.
const againEvery = time.Second

// Watch wakes everybody when the manager has read its units anew (daemon-reload), and when it is back
// after it could not be asked: who asked meanwhile got no systemd selectors. It returns nil when ctx
// ends.
func (w *workload) Watch(ctx context.Context, changed func(pids ...int)) error {
	pause, missed := firstPause, false
	for ctx.Err() == nil {
		err := w.follow(ctx, func() {
			pause = firstPause
			if missed {
				changed()
			}
		}, changed)
		if ctx.Err() != nil {
			break
		}
		missed = true
		w.log.WithError(err).WithField("pause", pause).Debug("no word from the system's manager")
		attestor.Pause(ctx, pause)
		pause = min(2*pause, maxPause)
	}
	return nil //nolint:nilerr // the end of its context is how it ends, not a fault
}

// follow listens on a connection of its own until that ends.
func (w *workload) follow(ctx context.Context, listening func(), changed func(...int)) error {
	greet, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	conn, err := dial(greet, w.address)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	heard := make(chan *dbus.Signal, 16)
	conn.Signal(heard)
	if err := conn.AddMatchSignalContext(greet, dbus.WithMatchSender(service), dbus.WithMatchObjectPath(managerAt),
		dbus.WithMatchInterface(service+".Manager"), dbus.WithMatchMember("Reloading")); err != nil {
		return fmt.Errorf("listen to the system's manager: %w", err)
	}
	if err := conn.Object(service, managerAt).CallWithContext(greet, service+".Manager.Subscribe", dbus.FlagNoAutoStart).Err; err != nil {
		return fmt.Errorf("subscribe to the system's manager: %w", err)
	}
	listening()
	tick := time.NewTicker(againEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if w.failed.Swap(false) {
				changed()
			}
		case signal, open := <-heard:
			if !open {
				return errors.New("the connection to the system's D-Bus ended")
			}
			// Its one argument is true when it begins and false when it is done.
			if begins, ok := first[bool](signal); ok && !begins && signal.Name == service+".Manager.Reloading" {
				changed()
			}
		case <-conn.Context().Done():
			return errors.New("the connection to the system's D-Bus ended")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// first returns the first argument of a signal.
func first[T any](signal *dbus.Signal) (T, bool) {
	var none T
	if signal == nil || len(signal.Body) == 0 {
		return none, false
	}
	value, ok := signal.Body[0].(T)
	return value, ok
}
