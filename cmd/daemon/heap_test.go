package daemon

import (
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"syscall"
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
		deadline := time.Now().Add(time.Minute)
		for percent() != leastPercent {
			if time.Now().After(deadline) {
				t.Fatalf("with more alive than the room, GOGC is %d", percent())
			}
			runtime.GC()
		}
		runtime.KeepAlive(live)
	})
}

func TestForgetProgram(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "assay agent") // with a space, and others whose names end alike
	maps := `00400000-00bd1000 r-xp 00000000 fe:00 10010677                           ` + program + `
00bd1000-0150c000 r--p 007d1000 fe:00 10010677                           ` + program + `
0150c000-015b3000 rw-p 0110c000 fe:00 10010677                           ` + program + `
015b3000-015b4000 r-xs 00000000 fe:00 10010677                           ` + program + `
1302e2800000-1302e3400000 rw-p 00000000 00:00 0
7f1fd478c000-7f1fd4a00000 r--p 00000000 fe:00 10010678                   /lib` + program + `
7f1fd4a00000-7f1fd4a01000 r--p 00000000 fe:00 10010679                   ` + program + ` (deleted)
7fff2d5c4000-7fff2d5c6000 r-xp 00000000 00:00 0                          [vdso]
`
	write := func(t *testing.T, text string) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "maps")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link := filepath.Join(dir, "exe")
	if err := os.Symlink(program, link); err != nil {
		t.Fatal(err)
	}
	t.Run("only what is the program's and cannot be written is forgotten", func(t *testing.T) {
		var got [][2]uintptr
		forgetProgram(write(t, maps), link, func(from, to uintptr) error {
			got = append(got, [2]uintptr{from, to})
			return nil
		})
		want := [][2]uintptr{{0x400000, 0xbd1000}, {0xbd1000, 0x150c000}}
		if !slices.Equal(got, want) {
			t.Errorf("got %x, want %x", got, want)
		}
	})

	t.Run("it ends with the first error", func(t *testing.T) {
		calls := 0
		forgetProgram(write(t, maps), link, func(uintptr, uintptr) error { calls++; return syscall.EINVAL })
		if calls != 1 {
			t.Errorf("%d calls", calls)
		}
	})

	t.Run("nonsense is left alone", func(t *testing.T) {
		for _, text := range []string{"", "x", "zz-yy r-xp 0 0 0 " + program, "2000-1000 r-xp 0 0 0 " + program} {
			forgetProgram(write(t, text), link, func(from, to uintptr) error { t.Errorf("%q: %x-%x", text, from, to); return nil })
		}
		forgetProgram(filepath.Join(dir, "none"), link, nil)
		forgetProgram(write(t, maps), filepath.Join(dir, "none"), nil)
	})

	t.Run("a process goes on as if nothing had happened", func(*testing.T) {
		forgetStart()
		forgetStart()
	})
}
