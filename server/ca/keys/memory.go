package keys

import (
	"context"
	"crypto"
	"fmt"
	"maps"
	"slices"
	"sync"
)

// InMemory is a Manager whose keys end with the process. Every restart makes new authorities, and
// the old ones stay in the bundle until they expire.
type InMemory struct {
	mu   sync.Mutex
	keys map[string]*signer // guarded by mu
}

var _ Manager = (*InMemory)(nil)

// Memory returns an empty InMemory.
func Memory() *InMemory { return &InMemory{keys: map[string]*signer{}} }

// Generate implements Manager.
func (m *InMemory) Generate(ctx context.Context, name string, kind Kind) (crypto.Signer, error) {
	made, err := newSigner(ctx, name, kind)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, found := m.keys[name]; found {
		return nil, fmt.Errorf("generate key %s: %w", name, ErrExists)
	}
	m.keys[name] = made
	return made, nil
}

// Get implements Manager.
func (m *InMemory) Get(_ context.Context, name string) (crypto.Signer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s, found := m.keys[name]; found {
		return s, nil
	}
	return nil, fmt.Errorf("get key %s: %w", name, ErrNotFound)
}

// Delete implements Manager.
func (m *InMemory) Delete(_ context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.keys, name)
	return nil
}

// List implements Manager.
func (m *InMemory) List(context.Context) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.keys)), nil
}

// Persistent implements Manager: it is false.
func (m *InMemory) Persistent() bool { return false }

// newSigner generates outside of any lock: an RSA-4096 key can take seconds.
func newSigner(ctx context.Context, name string, kind Kind) (*signer, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	key, err := Generate(kind)
	if err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	return &signer{name: name, key: key}, nil
}
