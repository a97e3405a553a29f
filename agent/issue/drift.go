package issue

import "time"

// minDrift is from what difference on a clock was set; a time server that lets it run faster or slower
// makes less of a difference in any time that matters.
const minDrift = time.Second

// drift notices that the wall clock was set, or that the machine slept. Moments that the issuer worked
// out are compared by the clock that nobody sets, as package time does; those in certificates are on the
// wall clock, and which of them have come is another question once it was set.
type drift struct {
	wall  time.Time // without a monotonic reading
	timer time.Time // the same moment, with one
}

// moved reports whether the wall clock went another way than time since it last said so.
func (d *drift) moved(wall time.Time) bool {
	wall = wall.Round(0)
	timer := time.Now()
	if d.wall.IsZero() {
		d.wall, d.timer = wall, timer
		return false
	}
	by := wall.Sub(d.wall) - timer.Sub(d.timer)
	if by.Abs() < minDrift {
		return false
	}
	d.wall, d.timer = wall, timer
	return true
}
