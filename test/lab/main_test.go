package lab_test

import (
	"os"
	"testing"

	"github.com/assay-id/assay/test/fake/vcenter"
)

// TestMain lets the test binary be vmtoolsd.
func TestMain(m *testing.M) {
	vcenter.Guest()
	os.Exit(m.Run())
}
