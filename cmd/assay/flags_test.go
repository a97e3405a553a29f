package main

import (
	"testing"

	"github.com/assay-id/assay/cmd/cli/flagstest"
)

func TestEveryCommandLineThatIsWrong(t *testing.T) {
	flagstest.Mistakes(t, root, "testdata/mistakes.txt")
}
