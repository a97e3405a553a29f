package daemon

import (
	"runtime"
	"testing"
	"time"
)

func TestGiveBack(t *testing.T) {
	given := make(chan uint64, 1)
	giveBack(time.Millisecond, func() {
		select {
		case given <- unused():
		default: // the test is over, and this goes on
		}
		freeMemory()
	})
	wait := func() uint64 {
		t.Helper()
		select {
		case n := <-given:
			return n
		case <-time.After(time.Minute):
			t.Fatal("nothing was given back")
			return 0
		}
	}
	t.Run("after a burst what it left is given back", func(t *testing.T) {
		// What is counted here is counted a moment after it was decided on, so one burst may be too few.
		for {
			burst := make([][]byte, 64)
			for i := range burst {
				burst[i] = make([]byte, 1<<20)
				for at := 0; at < len(burst[i]); at += 4096 {
					burst[i][at] = 1
				}
			}
			runtime.KeepAlive(burst)
			runtime.GC() // as the next of its kind would have been
			if wait() >= worthIt {
				return
			}
		}
	})
	t.Run("and when there is nothing it rests", func(t *testing.T) {
		// Each giving is a collection, and sets the timer again: it must come to an end.
		tick, patience := time.NewTicker(20*time.Millisecond), time.After(time.Minute)
		defer tick.Stop()
		for unused() >= worthIt {
			select {
			case <-given:
			case <-tick.C:
				runtime.GC() // one that ended after the timer did was seen by nobody; a daemon's timer is no millisecond
			case <-patience:
				t.Fatalf("%d bytes are held for nothing", unused())
			}
		}
	})
}
