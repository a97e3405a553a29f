package main

import (
	"testing"

	"github.com/assay-id/assay/cmd/cli/flagstest"
)

func TestEveryCommandAndFlagOfSPIREIsThere(t *testing.T) {
	flagstest.Run(t, root(), "testdata/spire-flags.txt")
}
