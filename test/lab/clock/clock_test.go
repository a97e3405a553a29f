package clock_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/clock"
)

// tellVariable makes the test binary a process that tells the time for each line it reads.
const tellVariable = "CLOCK_TELL"

func TestMain(m *testing.M) {
	if os.Getenv(tellVariable) == "" {
		os.Exit(m.Run())
	}
	began := time.Now()
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		now := time.Now()
		fmt.Println(now.UnixNano(), now.Sub(began).Nanoseconds())
	}
}

func TestClock(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), tellVariable+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(out)
	// tell returns how far ahead the process's clock is, in whole hours, and how long it says that it runs.
	tell := func() (ahead, ran time.Duration) {
		t.Helper()
		before := time.Now()
		if _, err := fmt.Fprintln(in); err != nil {
			t.Fatal(err)
		}
		var wall, mono int64
		line, err := answers.ReadString('\n')
		if err == nil {
			_, err = fmt.Sscan(strings.TrimSpace(line), &wall, &mono)
		}
		if err != nil {
			t.Fatal(err)
		}
		return time.Unix(0, wall).Sub(before).Round(time.Hour), time.Duration(mono)
	}
	if ahead, _ := tell(); ahead != 0 {
		t.Fatalf("it is %v ahead before anything was done", ahead)
	}
	c, err := clock.Of(cmd.Process.Pid)
	if err != nil {
		lab.Missing(t, "a clock of a process's own", err)
	}
	defer c.Close()
	_, last := tell()
	for _, want := range []time.Duration{0, 24 * time.Hour, -24 * time.Hour, 0} {
		if err := c.Set(want); err != nil {
			t.Fatal(err)
		}
		ahead, ran := tell()
		if ahead != want {
			t.Errorf("it is %v ahead, want %v", ahead, want)
		}
		if ran < last || ran > last+time.Hour {
			t.Errorf("what it measures with went from %v to %v", last, ran)
		}
		last = ran
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
