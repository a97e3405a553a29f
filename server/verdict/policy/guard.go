package policy

import (
	"fmt"
	"time"
)

// BlastGuard holds back a withdrawal that would hit too much at once: a poisoned feed or a scanner gone
// wrong condemns the whole fleet within minutes, the truth hardly ever does. It is only a rule over
// counts; who asks keeps the counts, durably, and keeps what was held until an operator admits it.
// The zero value holds nothing back.
type BlastGuard struct {
	// MaxFraction of the workloads may be withdrawn within Window.
	MaxFraction float64
	Window      time.Duration
	// MinWorkloads may be withdrawn in any case, however few run.
	MinWorkloads int
}

// Withdrawal is a withdrawal that took place: when, and from how many workloads.
type Withdrawal struct {
	At        time.Time
	Workloads int
}

// GuardAnswer is what the guard says.
type GuardAnswer struct {
	// Go says that the withdrawal may take place; else it is to be held.
	Go bool
	// Affected is how many workloads would have been withdrawn within the window, of Of that had an
	// identity at its beginning; Limit is how many may be.
	Affected, Of, Limit int
	// Text says it in a sentence without its full stop.
	Text string
}

// Check says whether a withdrawal from asked workloads may take place. past are the withdrawals so far,
// in any order; running is how many workloads now have what would be withdrawn, those asked for among
// them. All that is withdrawn by one cause, a feed for example, is to be asked for at once, or the first
// images of it are gone before the limit is reached.
func (g BlastGuard) Check(now time.Time, past []Withdrawal, running, asked int) GuardAnswer {
	if g.MaxFraction <= 0 || g.MaxFraction >= 1 {
		return GuardAnswer{Go: true, Affected: asked, Of: max(running, asked), Limit: max(running, asked), Text: "nothing is held back"}
	}
	running, asked = max(running, asked, 0), max(asked, 0)
	gone := 0
	for _, w := range past {
		// A time yet to come is a clock that was set back since: it counts.
		if w.At.After(now.Add(-g.Window)) && w.Workloads > 0 {
			gone += w.Workloads
		}
	}
	a := GuardAnswer{Affected: gone + asked, Of: gone + running}
	a.Limit = max(g.MinWorkloads, int(g.MaxFraction*float64(a.Of)))
	a.Go = asked == 0 || a.Affected <= a.Limit
	verb := "held"
	if a.Go {
		verb = "let go"
	}
	a.Text = fmt.Sprintf("%s: %d of %d workloads within %s, of which %d may be", verb, a.Affected, a.Of, length(g.Window), a.Limit)
	return a
}
