// Package keys holds the private keys that the server signs with: in memory, or in one file.
//
// A key has a name and is used through crypto.Signer; no part of the server sees the private half.
// Whoever names the keys (server/ca, in its journal) decides what they are for and when they go.
//
// Why it is so: an authority whose certificate is published but whose key is gone cannot be told
// from one that was stolen, so a Manager that writes to disk returns from Generate only after the
// key would survive a power cut, and never gives away a key that it could not write.
package keys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
)

var (
	// ErrNotFound says that there is no key of that name.
	ErrNotFound = errors.New("key not found")
	// ErrExists says that there is a key of that name already; it was not touched.
	ErrExists = errors.New("key exists")
)

// MaxName is the longest name of a key in bytes.
const MaxName = 255

// Manager keeps private keys by name. Implementations are safe for concurrent use.
type Manager interface {
	// Generate makes a key of the given kind, or returns an error wrapping ErrExists. Once it
	// returns, a persistent Manager has the key on stable storage.
	Generate(ctx context.Context, name string, kind Kind) (crypto.Signer, error)
	// Get returns the key, or an error wrapping ErrNotFound. Any other error means that the key may
	// well exist.
	Get(ctx context.Context, name string) (crypto.Signer, error)
	// Delete forgets the key. A key that does not exist is no error.
	Delete(ctx context.Context, name string) error
	// List returns the names in order.
	List(ctx context.Context) ([]string, error)
	// Persistent reports whether keys survive a restart, so that one which is gone was lost.
	Persistent() bool
}

// Kind is the algorithm and size of a key, spelt as in SPIRE's ca_key_type.
type Kind string

// The kinds there are.
const (
	EC256   Kind = "ec-p256"
	EC384   Kind = "ec-p384"
	RSA2048 Kind = "rsa-2048"
	RSA4096 Kind = "rsa-4096"
)

// ParseKind reads what an operator wrote in a config file.
func ParseKind(text string) (Kind, error) {
	switch k := Kind(text); k {
	case EC256, EC384, RSA2048, RSA4096:
		return k, nil
	}
	return "", fmt.Errorf("unknown key type %q: want ec-p256, ec-p384, rsa-2048 or rsa-4096", text)
}

// Generate makes a key of the given kind that lives in memory only.
func Generate(kind Kind) (crypto.Signer, error) {
	switch kind {
	case EC256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case EC384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	case RSA4096:
		return rsa.GenerateKey(rand.Reader, 4096)
	}
	_, err := ParseKind(string(kind))
	return nil, err
}

// signer hides a private key from everything that prints values: loggers, %+v and encoders see a
// name. It does nothing else.
type signer struct {
	name string
	key  crypto.Signer
}

var _ crypto.Signer = (*signer)(nil)

func (s *signer) Public() crypto.PublicKey { return s.key.Public() }

func (s *signer) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return s.key.Sign(random, digest, opts)
}

// Format prints the key's name whatever the verb.
func (s *signer) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "private key "+s.name) }

// MarshalText keeps encoders from looking inside.
func (s *signer) MarshalText() ([]byte, error) { return []byte("private key " + s.name), nil }

// InProcess reports whether the key is held in this process's memory and signs with Go's own code, as
// those of the Managers here do. What any other signer returns has crossed a border and is to be
// verified.
func InProcess(key crypto.Signer) bool {
	_, ours := key.(*signer)
	return ours
}

func checkName(name string) error {
	if name == "" {
		return errors.New("key without a name")
	}
	if len(name) > MaxName {
		return fmt.Errorf("key name is %d bytes long, the limit is %d", len(name), MaxName)
	}
	for i := range len(name) {
		switch c := name[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		default:
			return fmt.Errorf("key name %q: want letters, digits, '-', '_' and '.'", name)
		}
	}
	return nil
}
