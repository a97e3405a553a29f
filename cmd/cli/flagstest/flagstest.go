// Package flagstest holds a command to the list of SPIRE's commands and flags that its users' scripts
// rely on: the two daemons' commands share it in their tests.
package flagstest

import (
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Run checks that every command of the list is there, with every flag, and says what it is for. The list
// has one "command: flag flag" per line.
func Run(t *testing.T, root *cobra.Command, list string) {
	t.Helper()
	text, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		n++
		name, flags, _ := strings.Cut(line, ":")
		t.Run(name, func(t *testing.T) {
			c, rest, err := root.Find(strings.Fields(name))
			if err != nil || len(rest) > 0 {
				t.Fatalf("there is no such command: %v", err)
			}
			if c.Short == "" {
				t.Error("the command does not say what it is for")
			}
			for flag := range strings.FieldsSeq(flags) {
				if f := c.Flags().Lookup(flag); f == nil {
					t.Errorf("there is no flag -%s", flag)
				} else if f.Usage == "" {
					t.Errorf("flag -%s does not say what it is for", flag)
				}
			}
		})
	}
	if n == 0 {
		t.Fatalf("%s lists no command", list)
	}
}
