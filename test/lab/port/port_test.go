package port_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/assay-id/assay/test/lab/port"
)

func TestMain(m *testing.M) {
	if os.Getenv("GIVE_PORTS") != "" { // the test below in another process, which goes on until its input ends
		for range 50 {
			n, err := port.Free()
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			fmt.Println(n)
		}
		fmt.Println("done")
		_, _ = os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestNoTwoGetTheSamePort(t *testing.T) {
	seen := map[int]bool{}
	note := func(n int) {
		t.Helper()
		if seen[n] {
			t.Errorf("port %d was given twice", n)
		}
		seen[n] = true
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	other := exec.CommandContext(t.Context(), program)
	other.Env = append(os.Environ(), "GIVE_PORTS=1")
	in, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for buf := make([]byte, 4096); !strings.HasSuffix(text.String(), "done\n"); {
		n, err := out.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, text.String())
		}
		text.Write(buf[:n])
	}
	for word := range strings.FieldsSeq(strings.TrimSuffix(text.String(), "done\n")) {
		n, err := strconv.Atoi(word)
		if err != nil {
			t.Fatal(err)
		}
		note(n)
	}
	for range 50 {
		n, err := port.Free()
		if err != nil {
			t.Fatal(err)
		}
		note(n)
		l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(n))
		if err != nil {
			t.Fatalf("nobody can listen there: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(seen) != 100 {
		t.Errorf("%d ports, not 100", len(seen))
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := other.Wait(); err != nil {
		t.Error(err)
	}
}
