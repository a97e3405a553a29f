package policy

import (
	"strings"
	"testing"
	"time"
)

func TestBlastGuard(t *testing.T) {
	guard := BlastGuard{MaxFraction: 0.2, Window: 5 * time.Minute, MinWorkloads: 10}
	ago := func(d time.Duration, workloads int) Withdrawal {
		return Withdrawal{At: week.Add(-d), Workloads: workloads}
	}
	for _, c := range []struct {
		name           string
		guard          BlastGuard
		past           []Withdrawal
		running, asked int
		goes           bool
		affected, of   int
	}{
		{"a handful goes, however few run", guard, nil, 10, 10, true, 10, 10},
		{"one more than the handful is held where few run", guard, nil, 20, 11, false, 11, 20},
		{"a fifth of the fleet goes", guard, nil, 1000, 200, true, 200, 1000},
		{"more than a fifth is held", guard, nil, 1000, 201, false, 201, 1000},
		{"a hundred images condemned by one feed are held", guard, nil, 100, 100, false, 100, 100},
		{"what went within the window counts, of those who were there", guard, []Withdrawal{ago(time.Minute, 150)}, 850, 50, true, 200, 1000},
		{"so that slices do not add up", guard, []Withdrawal{ago(time.Minute, 150)}, 850, 51, false, 201, 1000},
		{"what went before the window does not", guard, []Withdrawal{ago(5*time.Minute, 150)}, 850, 100, true, 100, 850},
		{"after the clock was set back it still counts", guard, []Withdrawal{ago(-time.Hour, 150)}, 850, 51, false, 201, 1000},
		{"nothing asked is nothing held", guard, []Withdrawal{ago(time.Minute, 900)}, 100, 0, true, 900, 1000},
		{"the zero guard holds nothing", BlastGuard{}, nil, 1000, 1000, true, 1000, 1000},
		{"a guard of the whole holds nothing", BlastGuard{MaxFraction: 1, Window: time.Minute}, nil, 1000, 1000, true, 1000, 1000},
		{"without a floor a single one of three is held", BlastGuard{MaxFraction: 0.2, Window: time.Minute}, nil, 3, 1, false, 1, 3},
		{"odd counts do no harm", guard, []Withdrawal{ago(0, -5)}, -3, -1, true, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := c.guard.Check(week, c.past, c.running, c.asked)
			if a.Go != c.goes || a.Affected != c.affected || a.Of != c.of {
				t.Errorf("the answer is %+v", a)
			}
			if a.Text == "" || strings.HasSuffix(a.Text, ".") {
				t.Errorf("it says %q", a.Text)
			}
		})
	}
}
