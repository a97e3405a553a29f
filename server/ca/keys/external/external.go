// Package external keeps the server's signing keys in a key manager that is a plugin of SPIRE.
//
// SPIRE's key managers know no end of a key: its server has two places for keys of each kind, and a new key is
// put over an old one. Here each authority's key has a name of its own and is deleted in the end. So the plugin
// is given places, "assay-0", "assay-1" and so on, and which name has which place is in a file of the data
// directory. A place whose key was deleted is used again, and what is in the plugin stays as little as what
// is in use.
//
// Why it is so: with a name for each key, a plugin before an HSM or a KMS would fill it with two keys a day
// that nobody could take away. The file says nothing secret, but it must not be lost: without it the keys are
// not found. A place is noted with its public key, and one that holds another key by now is not signed with.
package external

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	keymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/keymanager/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
	block "github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/attestor/plugin"
	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/store/durable"
)

// patience is how long a question may take; some HSMs need their time for RSA-4096 keys.
const patience = 60 * time.Second

// maxPlaces is how many keys there may be at a time. A server has a dozen.
const maxPlaces = 1000

// Manager keeps keys in a plugin.
type Manager struct {
	*plugin.Plugin
	path string // of the file with the places

	mu     sync.Mutex // held while a key is made, guards the rest
	places map[string]place
}

// place is where a key is.
type place struct {
	Place int `json:"place"`
	// Public is the public half in PKIX DER.
	Public []byte `json:"public"`
}

func (p place) id() string { return fmt.Sprintf("assay-%d", p.Place) }

var _ keys.Manager = (*Manager)(nil)

// Open starts the plugin. The file with the places is of the plugin's name, in the directory.
func Open(c *block.Config, directory string, needs attestor.Needs) (*Manager, error) {
	m := &Manager{path: filepath.Join(directory, "keys-"+c.Name+".json"), places: map[string]place{}}
	if err := m.read(); err != nil {
		return nil, fmt.Errorf("read which keys the plugin has: %w", err)
	}
	var err error
	m.Plugin, err = plugin.OpenBlock(c, "KeyManager", keymanagerv1.KeyManager_ServiceDesc.ServiceName, nil, needs)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// file is what is kept.
type file struct {
	Version int              `json:"version"`
	Keys    map[string]place `json:"keys"`
}

func (m *Manager) read() error {
	text, err := os.ReadFile(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	f := file{}
	if err := json.Unmarshal(text, &f); err != nil {
		return fmt.Errorf("%s: %w", m.path, err)
	}
	if f.Version != 1 {
		return fmt.Errorf("%s is of version %d, and this program knows version 1", m.path, f.Version)
	}
	taken := map[int]bool{}
	for name, p := range f.Keys {
		if err := keys.CheckName(name); err != nil || taken[p.Place] || p.Place < 0 || p.Place >= maxPlaces || len(p.Public) == 0 {
			return fmt.Errorf("%s is damaged at the key %q", m.path, name)
		}
		taken[p.Place] = true
	}
	if f.Keys != nil {
		m.places = f.Keys
	}
	return nil
}

// write puts the places on stable storage. mu is held.
func (m *Manager) write(places map[string]place) error {
	text, err := json.MarshalIndent(file{Version: 1, Keys: places}, "", "  ")
	if err != nil {
		return err
	}
	if err := durable.Replace(m.path, 0o600, append(text, '\n')); err != nil {
		return fmt.Errorf("write which keys the plugin has: %w", err)
	}
	m.places = places
	return nil
}

var kinds = map[keys.Kind]keymanagerv1.KeyType{
	keys.EC256: keymanagerv1.KeyType_EC_P256, keys.EC384: keymanagerv1.KeyType_EC_P384,
	keys.RSA2048: keymanagerv1.KeyType_RSA_2048, keys.RSA4096: keymanagerv1.KeyType_RSA_4096,
}

// Generate implements keys.Manager.
func (m *Manager) Generate(ctx context.Context, name string, kind keys.Kind) (crypto.Signer, error) {
	if err := errors.Join(keys.CheckName(name), ctx.Err()); err != nil {
		return nil, err
	}
	wanted, ok := kinds[kind]
	if !ok {
		_, err := keys.ParseKind(string(kind))
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, exists := m.places[name]; exists {
		return nil, fmt.Errorf("generate key %s: %w", name, keys.ErrExists)
	}
	p, err := m.free()
	if err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	var made *keymanagerv1.PublicKey
	err = m.do(ctx, func(ctx context.Context, c keymanagerv1.KeyManagerClient) error {
		out, err := c.GenerateKey(ctx, &keymanagerv1.GenerateKeyRequest{KeyId: p.id(), KeyType: wanted})
		made = out.GetPublicKey()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	p.Public = made.GetPkixData()
	signer, err := m.signer(name, p)
	if err == nil {
		err = keys.Fits(kind, signer.Public())
	}
	if err == nil {
		places := maps.Clone(m.places)
		places[name] = p
		err = m.write(places)
	}
	if err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	return signer, nil
}

// free returns a place without a key that is needed. mu is held.
func (m *Manager) free() (place, error) {
	taken := map[int]bool{}
	for _, p := range m.places {
		taken[p.Place] = true
	}
	for n := range maxPlaces {
		if !taken[n] {
			return place{Place: n}, nil
		}
	}
	return place{}, fmt.Errorf("there are %d keys already", maxPlaces)
}

func (m *Manager) do(ctx context.Context, fn func(context.Context, keymanagerv1.KeyManagerClient) error) error {
	return m.Do(ctx, patience, func(ctx context.Context, conn grpc.ClientConnInterface) error {
		return plugin.Explain(fn(ctx, keymanagerv1.NewKeyManagerClient(conn)))
	})
}

var hashes = map[crypto.Hash]keymanagerv1.HashAlgorithm{crypto.SHA256: keymanagerv1.HashAlgorithm_SHA256, crypto.SHA384: keymanagerv1.HashAlgorithm_SHA384}

func (m *Manager) signer(name string, p place) (crypto.Signer, error) {
	public, err := x509.ParsePKIXPublicKey(p.Public)
	if err != nil {
		return nil, fmt.Errorf("parse public key: %w", err)
	}
	return keys.Remote(name, public, func(ctx context.Context, digest []byte, hash crypto.Hash) ([]byte, error) {
		var out *keymanagerv1.SignDataResponse
		err := m.do(ctx, func(ctx context.Context, c keymanagerv1.KeyManagerClient) (err error) {
			out, err = c.SignData(ctx, &keymanagerv1.SignDataRequest{
				KeyId: p.id(), Data: digest, SignerOpts: &keymanagerv1.SignDataRequest_HashAlgorithm{HashAlgorithm: hashes[hash]},
			})
			return err
		})
		// Its fingerprint of the key may be another after each start; whose signature it is, is verified.
		return out.GetSignature(), err
	}), nil
}

// Get implements keys.Manager.
func (m *Manager) Get(ctx context.Context, name string) (crypto.Signer, error) {
	m.mu.Lock()
	p, ok := m.places[name]
	m.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("get key %s: %w", name, keys.ErrNotFound)
	}
	var out *keymanagerv1.GetPublicKeyResponse
	err := m.do(ctx, func(ctx context.Context, c keymanagerv1.KeyManagerClient) (err error) {
		out, err = c.GetPublicKey(ctx, &keymanagerv1.GetPublicKeyRequest{KeyId: p.id()})
		return err
	})
	var signer crypto.Signer
	switch {
	case status.Code(err) == codes.NotFound:
		err = fmt.Errorf("%w: the plugin has no key %s", keys.ErrNotFound, p.id())
	case err != nil:
	case !bytes.Equal(out.GetPublicKey().GetPkixData(), p.Public):
		err = fmt.Errorf("%w: the plugin's key %s is another", keys.ErrNotFound, p.id())
	default:
		signer, err = m.signer(name, p)
	}
	if err != nil {
		return nil, fmt.Errorf("get key %s: %w", name, err)
	}
	return signer, nil
}

// Delete implements keys.Manager. The plugin keeps the key until its place is used again.
func (m *Manager) Delete(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.places[name]; !ok {
		return nil
	}
	places := maps.Clone(m.places)
	delete(places, name)
	if err := m.write(places); err != nil {
		return fmt.Errorf("delete key %s: %w", name, err)
	}
	return nil
}

// List implements keys.Manager.
func (m *Manager) List(context.Context) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.places)), nil
}

// Persistent implements keys.Manager. Whether the plugin is, it does not say; a key that is gone was lost.
func (m *Manager) Persistent() bool { return true }
