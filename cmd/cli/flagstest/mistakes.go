package flagstest

import (
	"bytes"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/assay-id/assay/cmd/cli"
)

// nobody is a socket that hangs up on everybody: a command that asks somebody there has missed its mistake.
func nobody(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "flags") //nolint:usetesting // a socket's path may have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	listener, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = listener.Close()
		<-done
	})
	return listener.Addr().String()
}

// Mistakes types every command of the tree wrong, in every way that follows from what it takes: flags that are
// not there, without their value, with a value of another kind, an output that is none, words that belong to no
// flag. What follows from what a command means is in the list: lines "command and flags => what is said of it"
// for what is missing and what contradicts itself, or "command: why nothing can be missing". A command that has
// flags of its own and is not in the list fails the test.
func Mistakes(t *testing.T, newRoot func() *cobra.Command, list string) {
	t.Helper()
	rows, fine := mistakes(t, list)
	socket := nobody(t)
	for _, path := range leaves(newRoot()) {
		name := strings.Join(path, " ")
		t.Run(name, func(t *testing.T) {
			c, _, err := newRoot().Find(path)
			if err != nil {
				t.Fatal(err)
			}
			wrong := func(want string, args ...string) {
				t.Helper()
				if said := try(newRoot, slices.Concat(path, args)); !strings.Contains(said, want) {
					t.Errorf("%s %s\nsays %q\nwant %q", name, strings.Join(args, " "), said, want)
				}
			}
			wrong("unknown flag -no-such-flag", "-no-such-flag")
			if c.Args != nil && c.Args(c, []string{"stray", "stray"}) != nil {
				if said := try(newRoot, append(slices.Clone(path), "stray", "stray")); said == "" {
					t.Errorf("%s takes words that belong to no flag", name)
				}
			}
			own := 0
			c.Flags().VisitAll(func(f *pflag.Flag) {
				if !slices.Contains(common, f.Name) {
					own++
				}
				if f.NoOptDefVal == "" {
					wrong("-"+f.Name+" needs a value", "-"+f.Name)
				}
				switch f.Value.Type() {
				case "int", "int32", "int64", "uint", "uint32", "duration", "bool":
					wrong("-"+f.Name+` cannot be "rubbish"`, "-"+f.Name+"=rubbish")
				}
				if f.Name == "output" {
					wrong(`-output cannot be "rubbish": there are pretty and json`, "-output", "rubbish")
				}
			})
			if own > 0 && len(rows[name]) == 0 && fine[name] == "" {
				t.Errorf("%s is not in %s: say what is said when its flags are missing or contradict each other", name, list)
			}
			for _, row := range rows[name] {
				args := row.args
				if c.Flags().Lookup("socketPath") != nil {
					args = append(slices.Clone(args), "-socketPath", socket)
				}
				wrong(row.want, args...)
			}
			delete(rows, name)
			delete(fine, name)
		})
	}
	for name := range rows {
		t.Errorf("%s: there is no command %q", list, name)
	}
	for name := range fine {
		t.Errorf("%s: there is no command %q", list, name)
	}
}

// common are the flags that most commands share.
var common = []string{"help", "socketPath", "instance", "output", "server", "tokenFile", "trustBundle", "workloadAPI"}

// mistake is one line of a list.
type mistake struct {
	args []string
	want string
}

// mistakes reads a list. The command of a line is all before its first flag or argument in angle brackets.
func mistakes(t *testing.T, list string) (rows map[string][]mistake, fine map[string]string) {
	t.Helper()
	text, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	rows, fine = map[string][]mistake{}, map[string]string{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		typed, want, wrong := strings.Cut(line, " => ")
		if !wrong {
			name, why, ok := strings.Cut(line, ": ")
			if !ok {
				t.Fatalf("%s: neither => nor : in %q", list, line)
			}
			fine[name] = why
			continue
		}
		words := strings.Fields(typed)
		at := slices.IndexFunc(words, func(w string) bool { return w[0] == '-' })
		if at < 0 {
			at = len(words)
		}
		name := strings.Join(words[:at], " ")
		rows[name] = append(rows[name], mistake{args: words[at:], want: want})
	}
	return rows, fine
}

// leaves are the commands that do something, as they are typed.
func leaves(root *cobra.Command) (paths [][]string) {
	var walk func(c *cobra.Command, path []string)
	walk = func(c *cobra.Command, path []string) {
		for _, sub := range c.Commands() {
			walk(sub, append(slices.Clone(path), sub.Name()))
		}
		if len(path) > 0 && c.Flags().HasFlags() && !strings.HasPrefix(c.Name(), "completion") {
			paths = append(paths, path)
		}
	}
	walk(root, nil)
	return paths
}

// try runs a command line and returns what it says is wrong, nothing if it goes well.
func try(newRoot func() *cobra.Command, args []string) string {
	root := newRoot()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetIn(io.LimitReader(nil, 0))
	_, err := cli.Execute(root, args)
	if err == nil {
		return ""
	}
	return err.Error() + "\n" + out.String()
}
