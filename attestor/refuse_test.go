package attestor_test

import (
	"errors"
	"io"
	"testing"

	"github.com/assay-id/assay/attestor"
)

func TestRefusef(t *testing.T) {
	err := attestor.Refusef("read evidence: %w", io.ErrUnexpectedEOF)
	if got, want := err.Error(), "read evidence: unexpected EOF"; got != want {
		t.Errorf("text is %q, want %q", got, want)
	}
	for _, is := range []error{attestor.ErrEvidence, io.ErrUnexpectedEOF} {
		if !errors.Is(err, is) {
			t.Errorf("refusal is not %v", is)
		}
	}
	if errors.Is(err, attestor.ErrUsed) {
		t.Error("refusal is ErrUsed")
	}
}
