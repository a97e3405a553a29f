package jointoken_test

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor/attestortest"
)

// checkSegment fails the test unless s is exactly one segment of a SPIFFE ID.
func checkSegment(t *testing.T, s string) {
	t.Helper()
	id, err := spiffeid.FromSegments(attestortest.TrustDomain, "spire", "agent", "join_token", s)
	if err != nil {
		t.Fatalf("an accepted token makes no SPIFFE ID: %v", err)
	}
	if want := "/spire/agent/join_token/" + s; id.Path() != want {
		t.Fatalf("path is %q, want %q", id.Path(), want)
	}
}
