package cli

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/assay-id/assay/conf"
)

// Settings are flags that take the place of keys in a configuration file.
type Settings struct {
	// try has what the file names opened, and forgotten again; see conf.Options.
	try       bool
	config    string
	expandEnv bool
	flags     []setting
}

type setting struct {
	flag *pflag.Flag
	key  string
}

// AddTo adds -config and -expandEnv to a command.
func (s *Settings) AddTo(c *cobra.Command, byDefault string) {
	c.Flags().StringVar(&s.config, "config", byDefault, "Path of the configuration file")
	c.Flags().BoolVar(&s.expandEnv, "expandEnv", false, "Replace $NAME and ${NAME} in the file by environment variables")
}

// Key adds a flag that takes the place of a key.
func (s *Settings) Key(c *cobra.Command, flag, key, usage string) {
	c.Flags().String(flag, "", fmt.Sprintf("%s (%s)", usage, key))
	s.flags = append(s.flags, setting{flag: c.Flags().Lookup(flag), key: key})
}

// Switch adds a flag without a value that takes the place of a key that is true or false.
func (s *Settings) Switch(c *cobra.Command, flag, key, usage string) {
	c.Flags().Bool(flag, false, fmt.Sprintf("%s (%s)", usage, key))
	s.flags = append(s.flags, setting{flag: c.Flags().Lookup(flag), key: key})
}

// Path returns the path of the file.
func (s *Settings) Path() string { return s.config }

// Options returns what the flags say about loading the file.
func (s *Settings) Options() conf.Options {
	options := conf.Options{ExpandEnv: s.expandEnv, Try: s.try}
	for _, f := range s.flags {
		if f.flag.Changed {
			options.Set = append(options.Set, conf.Setting{Key: f.key, Value: f.flag.Value.String(), Flag: "-" + f.flag.Name})
		}
	}
	return options
}

// ValidateCommand says everything that is wrong with the file of a program, as in "Assay server". settings
// adds the flags, and load reads the file and returns what Invalid makes of its mistakes.
func ValidateCommand(program string, settings func(*cobra.Command) *Settings, load func(*Settings) error) *cobra.Command {
	c := &cobra.Command{
		Use: "validate", Short: "Says everything that is wrong with a configuration file", Args: NoArgs,
		Long: `Says everything that is wrong with a configuration file: unknown and missing keys, unsuitable values, and
files that it names and that cannot be used. Nothing is started or changed. The exit status is 1 if there
is a mistake.`,
	}
	s := settings(c)
	s.try = true
	var output Output
	output.AddTo(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		err := load(s)
		if !output.JSON() {
			if err == nil {
				_, err = fmt.Fprintf(c.OutOrStdout(), "%s configuration file is valid.\n", program)
			}
			return err
		}
		if printed := json.NewEncoder(c.OutOrStdout()).Encode(findings(err)); printed != nil {
			return printed
		}
		if err != nil {
			return &Exit{Status: 1}
		}
		return nil
	}
	return c
}

// validity is what "validate -output json" prints.
type validity struct {
	Valid    bool      `json:"valid"`
	Mistakes []mistake `json:"mistakes"`
}

type mistake struct {
	// Where is "file:line,column-column", or a flag, or the file.
	Where   string `json:"where"`
	Summary string `json:"summary"`
	Detail  string `json:"detail"`
}

func findings(err error) validity {
	v := validity{Valid: err == nil, Mistakes: []mistake{}}
	wrong, ok := errors.AsType[conf.Mistakes](err)
	for _, m := range wrong {
		v.Mistakes = append(v.Mistakes, mistake{Where: m.Where, Summary: m.Summary, Detail: m.Detail})
	}
	if err != nil && !ok {
		v.Mistakes = append(v.Mistakes, mistake{Detail: err.Error()})
	}
	return v
}

// Invalid returns what a command says of a file with mistakes: how many, and one on each line.
func Invalid(what string, err error) error {
	n := 1
	if m, ok := errors.AsType[conf.Mistakes](err); ok {
		n = len(m)
	}
	return fmt.Errorf("%s is invalid (%s):\n%w", what, Count(n, "mistake", "mistakes"), err)
}
