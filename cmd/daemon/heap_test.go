package daemon

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"
)

func TestGarbagePercent(t *testing.T) {
	const mib = 1 << 20
	for _, test := range []struct {
		what       string
		live, room uint64
		want       int
	}{
		{"nothing is known to live yet", 0, 24 * mib, mostPercent},
		{"next to nothing lives", mib, 24 * mib, mostPercent},
		{"a little lives", 6 * mib, 24 * mib, 400},
		{"half the room lives", 12 * mib, 24 * mib, 200},
		{"what is between two steps is rounded down", 12*mib + 1000, 24 * mib, 175},
		{"as much as the room lives", 24 * mib, 24 * mib, leastPercent},
		{"much more lives", 500 * mib, 24 * mib, leastPercent},
	} {
		t.Run(test.what, func(t *testing.T) {
			if got := garbagePercent(test.live, test.room); got != test.want {
				t.Errorf("got %d, want %d", got, test.want)
			}
		})
	}
}

func TestAllowGarbage(t *testing.T) {
	percent := func() int {
		sample := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(sample)
		return int(sample[0].Value.Uint64())
	}
	t.Run("GOGC in the environment has precedence", func(t *testing.T) {
		t.Setenv("GOGC", "70")
		before := percent()
		allowGarbage(1 << 40)
		if got := percent(); got != before {
			t.Errorf("GOGC is %d, want %d", got, before)
		}
	})

	t.Run("GOGC follows what lives", func(t *testing.T) {
		t.Setenv("GOGC", "")
		defer debug.SetGCPercent(debug.SetGCPercent(100))
		const room = 256 << 20
		allowGarbage(room)
		if got := percent(); got <= leastPercent {
			t.Errorf("with nearly nothing alive GOGC is %d", got)
		}
		live := make([]byte, 2*room)
		deadline := time.Now().Add(10 * time.Second)
		for percent() != leastPercent {
			if time.Now().After(deadline) {
				t.Fatalf("with more alive than the room, GOGC is %d", percent())
			}
			runtime.GC()
		}
		runtime.KeepAlive(live)
	})
}
