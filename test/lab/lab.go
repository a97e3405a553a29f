// Package lab is the home of tests against real systems. A test that cannot have its real part says so
// loudly; with REQUIRE_REAL=1 in the environment, as CI sets it, that is a failure.
package lab

import (
	"os"
	"testing"
)

// Missing ends the test because a real system cannot be had: it skips, or fails if REQUIRE_REAL is 1.
func Missing(t testing.TB, what string, why error) {
	t.Helper()
	if os.Getenv("REQUIRE_REAL") == "1" {
		t.Fatalf("%s is required and cannot be had: %v", what, why)
	}
	t.Skipf("SKIPPED: %s cannot be had: %v", what, why)
}
