// Package cli is what the commands share: flags with one dash or two, the socket to talk to, output
// for people or as JSON, and one line on standard error with exit status 1 when something is wrong.
//
// Why it is so: operators' scripts were written for SPIRE's commands, so flags, texts and the shape of
// the JSON are theirs where the command is (flags have one dash, JSON is the response's own form with
// its field names, absent messages left out and everything else there). Help, suggestions and shell
// completion come from cobra.
package cli

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Main runs a command with the arguments of the process and returns its exit status. The error, if
// any, goes to standard error as one line.
func Main(root *cobra.Command) int {
	command, err := Execute(root, os.Args[1:])
	if err == nil {
		return 0
	}
	if silent, ok := errors.AsType[*Exit](err); ok {
		return silent.Status
	}
	fmt.Fprintln(command.ErrOrStderr(), "Error: "+err.Error()+advice(err))
	return 1
}

// advice is what to do about what the system refuses to any program, whoever of us asked for it.
func advice(err error) string {
	for _, known := range []struct {
		errno syscall.Errno
		do    string
	}{
		{syscall.EMFILE, "raise the number of files that this process may have open: ulimit -n, or LimitNOFILE in its unit"},
		{syscall.ENFILE, "the whole machine has as many files open as it may: see fs.file-max, and who holds them"},
		{syscall.ENOSPC, "the disk is full, of bytes or of files (df -h, df -i): make room on it"},
		{syscall.EDQUOT, "this user's share of the disk is full: make room, or enlarge it"},
		{syscall.EROFS, "mount it writable, or name a place that is"},
		{syscall.EADDRINUSE, "end the process that listens there (ss -ltnp shows it), or choose another address or port"},
		{syscall.EADDRNOTAVAIL, "no interface of this machine has that address (ip address shows those that have)"},
	} {
		if errors.Is(err, known.errno) && !strings.Contains(err.Error(), known.do) {
			return "; " + known.do
		}
	}
	return ""
}

// Execute runs a command line and returns the command that it was, and what was wrong.
func Execute(root *cobra.Command, args []string) (*cobra.Command, error) {
	root.SilenceUsage, root.SilenceErrors = true, true
	root.Version = VersionText() // for -version, beside the command of that name
	root.SetFlagErrorFunc(flagError)
	args = DoubleDashes(root, args)
	if len(args) > 0 && (args[0] == "--version" || args[0] == "-v") {
		// Alone on its line, as SPIRE's. cobra would need a template for that, and whoever uses templates may call
		// any method by its name: all of them stay in the binary then, which makes the agent's a third larger.
		_, err := fmt.Fprintln(root.OutOrStdout(), root.Version)
		return root, err
	}
	root.SetArgs(args)
	return root.ExecuteC()
}

// Exit is an error that has been told to the operator already, or is no more than a status.
type Exit struct{ Status int }

// Error returns the status in words.
func (e *Exit) Error() string { return fmt.Sprintf("exit status %d", e.Status) }

// Group returns a command that only holds others.
func Group(use, short string, subs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: unknown, RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(subs...)
	return c
}

// unknown refuses words that are no sub-command, with what may have been meant.
func unknown(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	text := fmt.Sprintf("unknown command %q for %q", args[0], c.CommandPath())
	if c.SuggestionsMinimumDistance <= 0 {
		c.SuggestionsMinimumDistance = 2
	}
	if near := c.SuggestionsFor(args[0]); len(near) > 0 {
		text += fmt.Sprintf(", did you mean %q?", near[0])
	}
	return fmt.Errorf("%s; run '%s --help' for what there is", text, c.CommandPath())
}

// flagError adds to a complaint about a flag what may have been meant and where to look.
func flagError(c *cobra.Command, err error) error {
	if errors.Is(err, pflag.ErrHelp) {
		return err
	}
	if unknown, ok := errors.AsType[*pflag.NotExistError](err); ok {
		text := "unknown flag -" + unknown.GetSpecifiedName()
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if strings.EqualFold(f.Name, unknown.GetSpecifiedName()) {
				text += ", did you mean -" + f.Name + "?"
			}
		})
		err = errors.New(text)
	}
	if wrong, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		err = fmt.Errorf("-%s cannot be %q: %s", wrong.GetFlag().Name, wrong.GetValue(), unsuitable(wrong))
	}
	if bare, ok := errors.AsType[*pflag.ValueRequiredError](err); ok {
		err = fmt.Errorf("-%s needs a value", bare.GetSpecifiedName())
	}
	return fmt.Errorf("%w; run '%s --help' for the flags", err, c.CommandPath())
}

// unsuitable says what a flag takes, in place of what Go's parsers say of the value.
func unsuitable(wrong *pflag.InvalidValueError) string {
	switch wrong.GetFlag().Value.Type() {
	case "int", "int32", "int64":
		if errors.Is(wrong, strconv.ErrRange) {
			return "the number is too large"
		}
		return "it takes a whole number"
	case "duration":
		return `it takes a duration, as in "90s", "5m" or "1h30m"`
	case "bool":
		return "it takes true or false, or nothing"
	}
	return wrong.Unwrap().Error()
}

// DoubleDashes returns the arguments with the single dash of long flags doubled, as in -socketPath:
// that is how SPIRE's commands and all that call them write flags. What belongs to a flag as its value
// is left alone, and so is everything after "--".
func DoubleDashes(root *cobra.Command, args []string) []string {
	out := make([]string, 0, len(args))
	command := root
	for i := 0; i < len(args); i++ {
		arg := args[i]
		switch {
		case arg == "--":
			return append(out, args[i:]...)
		case len(arg) > 2 && arg[0] == '-' && arg[1] != '-' && letter(arg[1]):
			arg = "-" + arg
			fallthrough
		case strings.HasPrefix(arg, "--"):
			out = append(out, arg)
			name, _, hasValue := strings.Cut(arg[2:], "=")
			if flag := lookup(command, name); flag != nil && flag.NoOptDefVal == "" && !hasValue && i+1 < len(args) {
				i++
				out = append(out, args[i])
			}
		default:
			out = append(out, arg)
			if sub := child(command, arg); sub != nil {
				command = sub
			}
		}
	}
	return out
}

func letter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }

func lookup(c *cobra.Command, name string) *pflag.Flag {
	for ; c != nil; c = c.Parent() {
		if f := c.Flags().Lookup(name); f != nil {
			return f
		}
		if f := c.PersistentFlags().Lookup(name); f != nil {
			return f
		}
	}
	return nil
}

func child(c *cobra.Command, name string) *cobra.Command {
	for _, sub := range c.Commands() {
		if sub.Name() == name || sub.HasAlias(name) {
			return sub
		}
	}
	return nil
}

// NoArgs refuses arguments that belong to no flag.
func NoArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument %q; run '%s --help' for what the command takes", args[0], c.CommandPath())
	}
	return nil
}

// Count returns "1 entry" or "2 entries".
func Count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
