package daemon

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// A burst, as of a thousand workloads that connect at once, leaves garbage that nothing collects while
// nothing is allocated, and free pages that Go gives back little by little over minutes. A daemon that is
// idle on every node holds memory for nobody: some time after a collection that no other followed, what
// is not used is given back.

const (
	// calmAfter is how long after the last collection a burst is taken to be over.
	calmAfter = 2 * time.Second
	// worthIt is how much there must be to give back: a collection costs as much as it finds alive.
	worthIt = 6 << 20
)

// calm gives memory back when a burst is over.
type calm struct {
	timer *time.Timer
	give  func()
}

// giveBack makes memory that is not used be given back whenever a burst is over, for the rest of the
// process's life. It costs nothing while no garbage is collected.
func giveBack(after time.Duration, give func()) {
	c := &calm{give: give}
	c.timer = time.AfterFunc(after, c.over)
	c.watch(after)
}

// watch puts the timer off at each collection: a sentinel that nothing points to is found dead by it.
func (c *calm) watch(after time.Duration) {
	runtime.AddCleanup(new(sentinel), func(c *calm) {
		c.timer.Reset(after)
		c.watch(after)
	}, c)
}

// over is called when no collection followed another. What it starts is a collection too, after which
// there is nothing to give back.
func (c *calm) over() {
	if unused() >= worthIt {
		c.give()
	}
}

// unused is about how many bytes the process has of the system and does not need.
func unused() uint64 {
	samples := []metrics.Sample{
		{Name: "/memory/classes/heap/free:bytes"},    // pages that nothing is in
		{Name: "/memory/classes/heap/objects:bytes"}, // what lives, and what is garbage by now
		{Name: "/gc/heap/live:bytes"},                // what lived at the last collection
	}
	metrics.Read(samples)
	free, objects, live := samples[0].Value.Uint64(), samples[1].Value.Uint64(), samples[2].Value.Uint64()
	return free + max(objects, live) - live
}

// freeMemory is what a daemon gives back.
func freeMemory() { debug.FreeOSMemory() }
