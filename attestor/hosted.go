package attestor

import (
	"crypto"
	"crypto/x509"
	"errors"
	"time"
)

// ServerIdentity is an identity of the server, with what those of its trust domain are verified with. Whoever has it
// can pose as the server.
type ServerIdentity struct {
	// Chain is the leaf and the intermediates.
	Chain []*x509.Certificate
	Key   crypto.Signer

	X509     []ServerAuthority
	JWT, WIT []ServerKey
	// RefreshHint is whole seconds, Sequence the bundle's.
	RefreshHint time.Duration
	Sequence    uint64
}

// ServerAuthority is a CA certificate of the trust domain.
type ServerAuthority struct {
	DER     []byte
	Tainted bool
}

// ServerKey is a public key of the trust domain, PKIX.
type ServerKey struct {
	ID        string
	PKIX      []byte
	ExpiresAt time.Time // zero: unknown
	Tainted   bool
}

// ErrNoIdentity says that the server has no identity yet: attestors and keys are opened before its authority.
var ErrNoIdentity = errors.New("the server has no identity yet")

// MeasureKind is what a measurement is.
type MeasureKind int

// Kinds of measurements.
const (
	Gauge   MeasureKind = iota // Value is what it is now
	Counter                    // Value is added
	Sample                     // Value is one of many
)

// Measurement is what a program measured that an attestor runs.
type Measurement struct {
	// Source is the program.
	Source string
	Kind   MeasureKind
	Key    []string
	Labels []Label
	Value  float64
}

// Label is a name and a value.
type Label struct{ Name, Value string }
