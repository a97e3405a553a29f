package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/server/audit"
)

func auditCommands() *cobra.Command {
	return cli.Group("audit", "Looks at the audit log", auditVerify())
}

func auditVerify() *cobra.Command {
	var after string
	var output cli.Output
	c := &cobra.Command{
		Use: "verify FILE...", Short: "Says whether anything in audit logs was changed, taken out or put in",
		Long: `Checks that each line bears the hash of the line before it. Several files are those of one log after
rotations, the oldest first; - is standard input.

That the end of the log was cut off, or that all of it was written anew, shows in its last hash only. The
server says it in its own log whenever it opens the file: keep that elsewhere.`,
		Args: func(c *cobra.Command, files []string) error {
			if len(files) == 0 {
				return fmt.Errorf("name the files of the audit log, the oldest first; run '%s --help'", c.CommandPath())
			}
			return nil
		},
		Example: "  assay-server audit verify /var/lib/assay/server/audit.log\n" +
			"  assay-server audit verify audit.log.2 audit.log.1 audit.log",
		RunE: func(c *cobra.Command, files []string) error {
			broken := 0
			var all []*audit.Verified
			for _, name := range files {
				v, err := verifyFile(name, after, c.InOrStdin())
				if err != nil {
					return err
				}
				if v.Chained == 0 && len(v.Torn) > 0 {
					return fmt.Errorf("%s: no line of it is one of an audit log; is it the right file?", name)
				}
				all = append(all, v)
				broken += len(v.Broken)
				if v.Lines > 0 {
					after = v.Last
				}
			}
			err := output.PrintValue(c, func(w io.Writer) error { printVerified(w, files, all); return nil }, all)
			if err != nil {
				return err
			}
			if broken > 0 {
				return fmt.Errorf("the audit log is not what was written, in %s", cli.Count(broken, "place", "places"))
			}
			return nil
		},
	}
	c.Flags().StringVar(&after, "after", "", "Hash that the first line must come after: the last one of the file before, or \"none\"")
	output.AddTo(c)
	return c
}

func verifyFile(name, after string, stdin io.Reader) (*audit.Verified, error) {
	if name == "-" {
		return audit.Verify(stdin, after)
	}
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	v, err := audit.Verify(file, after)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return v, nil
}

func printVerified(w io.Writer, files []string, all []*audit.Verified) {
	for n, v := range all {
		state := "whole"
		if len(v.Broken) > 0 {
			state = "BROKEN"
		}
		fmt.Fprintf(w, "%s: %s, %s, %d in the chain\n", files[n], state, cli.Count(v.Lines, "line", "lines"), v.Chained)
		for _, b := range v.Broken {
			fmt.Fprintf(w, "  line %d: %s\n", b.Line, b.Text)
		}
		for _, line := range v.Torn {
			fmt.Fprintf(w, "  line %d is half a line, which a crash leaves\n", line)
		}
		if v.Lines > 0 {
			fmt.Fprintf(w, "  first line comes after: %s\n  last hash: %s\n", v.First, v.Last)
		}
	}
}
