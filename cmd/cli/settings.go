package cli

import (
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/assay-id/assay/conf"
)

// Settings are flags that take the place of keys in a configuration file.
type Settings struct {
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
	options := conf.Options{ExpandEnv: s.expandEnv}
	for _, f := range s.flags {
		if f.flag.Changed {
			options.Set = append(options.Set, conf.Setting{Key: f.key, Value: f.flag.Value.String(), Flag: "-" + f.flag.Name})
		}
	}
	return options
}

// Invalid returns what a command says of a file with mistakes: how many, and one on each line.
func Invalid(program string, err error) error {
	n := 1
	if m, ok := err.(conf.Mistakes); ok { //nolint:errorlint // that is what conf returns
		n = len(m)
	}
	return fmt.Errorf("%s configuration is invalid (%s):\n%w", program, Count(n, "mistake", "mistakes"), err)
}
