package main

import (
	"testing"

	"github.com/assay-id/assay/cmd/cli/flagstest"
)

func TestEveryCommandAndFlagOfSPIREIsThere(t *testing.T) {
	flagstest.Run(t, root(), "testdata/spire-flags.txt")
}

func TestEveryCommandLineThatIsWrong(t *testing.T) {
	flagstest.Mistakes(t, root, "testdata/mistakes.txt")
}
