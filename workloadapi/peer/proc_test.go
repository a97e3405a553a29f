package peer

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseStat(t *testing.T) {
	const rest = " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21"
	for _, c := range []struct {
		name, line string
		want       stat
		bad        bool
	}{
		{name: "plain", line: "12 (sh)" + rest, want: stat{state: 'S', start: 4711}},
		{name: "a program that calls itself ) Z 1", line: "12 (sh) Z 1)" + rest, want: stat{state: 'S', start: 4711}},
		{name: "empty", line: "", bad: true},
		{name: "cut off", line: "12 (sh) S 1 2", bad: true},
		{name: "no name", line: "12 S 1 2 3", bad: true},
		{name: "no number", line: "12 (sh) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x 20", bad: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseStat([]byte(c.line))
			if (err != nil) != c.bad || got != c.want {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (sh) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21"))
	f.Add([]byte(") "))
	f.Fuzz(func(_ *testing.T, line []byte) { _, _ = parseStat(line) })
}

func TestOwnStat(t *testing.T) {
	dir, err := os.Open("/proc/self")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	st, err := statOf(int(dir.Fd()))
	if err != nil || !st.running() || st.start == 0 {
		t.Errorf("got %+v, %v", st, err)
	}
	if _, err := statOf(-1); err != unix.EBADF && err != unix.ENOENT { //nolint:errorlint // straight from the kernel
		t.Logf("a bad directory says %v", err)
	}
}
