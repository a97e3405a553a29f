package migrate

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/assay-id/assay/cmd/cli"
)

// Command is "migrate" of a program: do makes our file of SPIRE's, check reads ours as "validate" does.
func Command(program string, shape Shape, do func(path string, shape Shape) (*Result, error), check func(path string, expandEnv bool) error) *cobra.Command {
	var write string
	var force, expandEnv bool
	var output cli.Output
	c := &cobra.Command{
		Use:   "migrate FILE",
		Short: "Makes a configuration file of SPIRE's one",
		Long: `Reads a configuration file of SPIRE, in HCL or JSON, and writes ours to standard output, or with -write to a file.
Every key that has no counterpart, and every one that means something else here, is told on standard error with its
line. What comes out is read as "validate" reads it: what is still wrong with it is told, and the exit status is 1.`,
		Example: "  " + program + " migrate /etc/spire/" + strings.TrimPrefix(program, "assay-") + ".conf -write /etc/assay/" + strings.TrimPrefix(program, "assay-") + ".hcl",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("name the one file of SPIRE's to read; run '%s --help'", c.CommandPath())
			}
			return nil
		},
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		if write != "" && !force && exists(write) {
			return fmt.Errorf("%s exists already; write to another file, or add -force", write)
		}
		shape.ExpandEnv = expandEnv
		result, err := do(args[0], shape)
		if err != nil {
			return err
		}
		wrong := tryOut(result.Config, write, func(path string) error { return check(path, expandEnv) })
		if write != "" {
			// It may hold a join token.
			if err := cli.WriteFile(write, result.Config, true); err != nil {
				return err
			}
		}
		err = output.PrintValue(c, func(w io.Writer) error {
			for _, r := range result.Remarks {
				fmt.Fprintln(c.ErrOrStderr(), r.line(args[0]))
			}
			if write != "" {
				_, err := fmt.Fprintf(w, "Written to %s.\n", write)
				return err
			}
			_, err := w.Write(result.Config)
			return err
		}, answer(result, args[0], wrong))
		if err != nil {
			return err
		}
		if wrong != nil {
			return fmt.Errorf("what came out is not a valid configuration yet:\n%w", wrong)
		}
		return nil
	}
	c.Flags().StringVar(&write, "write", "", "File to write; standard output without it")
	c.Flags().BoolVar(&force, "force", false, "Replace the file if it exists")
	c.Flags().BoolVar(&expandEnv, "expandEnv", false, "Leave $NAME and ${NAME} as they are: the file is used with -expandEnv, as SPIRE's was")
	output.AddTo(c)
	return c
}

// line is the remark with its place.
func (r Remark) line(path string) string {
	where := path
	if r.Line > 0 {
		where = fmt.Sprintf("%s:%d,%d", path, r.Line, r.Column)
	}
	word := "note"
	if r.Dropped {
		word = "left out"
	}
	return fmt.Sprintf("%s: %s %s; %s", where, word, r.Key, r.Text)
}

// answered is the result as JSON.
type answered struct {
	File    string   `json:"file"`
	Config  string   `json:"config"`
	Remarks []Remark `json:"remarks"`
	Invalid []string `json:"invalid"`
}

func answer(r *Result, path string, wrong error) answered {
	a := answered{File: path, Config: string(r.Config), Remarks: r.Remarks, Invalid: []string{}}
	if a.Remarks == nil {
		a.Remarks = []Remark{}
	}
	if wrong != nil {
		a.Invalid = strings.Split(wrong.Error(), "\n")
	}
	return a
}

// tryOut reads what came out as the daemon would.
func tryOut(config []byte, write string, check func(path string) error) error {
	dir, err := os.MkdirTemp("", "assay-migrate")
	if err != nil {
		return fmt.Errorf("try the result out: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path := filepath.Join(dir, "migrated.hcl")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		return fmt.Errorf("try the result out: %w", err)
	}
	err = check(path)
	if err == nil {
		return nil
	}
	name := write
	if name == "" {
		name = "the result"
	}
	return errors.New(string(bytes.ReplaceAll([]byte(err.Error()), []byte(path), []byte(name))))
}
