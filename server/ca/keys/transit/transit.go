// Package transit keeps the server's signing keys in the transit engine of Vault or OpenBao: they are made
// there, are not exportable, and every signature is a question, whose answer is verified.
//
// The policy that the server's token needs, with the mount transit and the prefix assay-:
//
//	path "transit/keys/assay-*"        { capabilities = ["create", "read", "update", "delete"] }
//	path "transit/keys"                { capabilities = ["list"] }
//	path "transit/sign/assay-*"        { capabilities = ["update"] }
package transit

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/vault"
)

// Manager keeps keys in Vault.
type Manager struct {
	vault         *vault.Client
	mount, prefix string
	// mu is held while a key is made: Vault takes a second request for the same name for the first.
	mu sync.Mutex
}

var _ keys.Manager = (*Manager)(nil)

// New returns a manager. The mount is "transit" if it is empty, the prefix of names in Vault "assay-".
func New(client *vault.Client, mount, prefix string) *Manager {
	if mount == "" {
		mount = "transit"
	}
	if prefix == "" {
		prefix = "assay-"
	}
	return &Manager{vault: client, mount: strings.Trim(mount, "/"), prefix: prefix}
}

var types = map[keys.Kind]string{
	keys.EC256: "ecdsa-p256", keys.EC384: "ecdsa-p384", keys.RSA2048: "rsa-2048", keys.RSA4096: "rsa-4096",
}

// key is what Vault tells of a key.
type key struct {
	Type     string          `json:"type"`
	Latest   int             `json:"latest_version"`
	Versions map[string]part `json:"keys"`
}

type part struct {
	Public string `json:"public_key"`
}

func (m *Manager) path(name string) string { return m.mount + "/keys/" + m.prefix + name }

// Generate implements keys.Manager.
func (m *Manager) Generate(ctx context.Context, name string, kind keys.Kind) (crypto.Signer, error) {
	if err := errors.Join(keys.CheckName(name), ctx.Err()); err != nil {
		return nil, err
	}
	t, ok := types[kind]
	if !ok {
		_, err := keys.ParseKind(string(kind))
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch _, err := m.Get(ctx, name); {
	case err == nil:
		return nil, fmt.Errorf("generate key %s: %w", name, keys.ErrExists)
	case !errors.Is(err, keys.ErrNotFound):
		return nil, err
	}
	in := map[string]any{"type": t, "exportable": false, "allow_plaintext_backup": false}
	if err := m.vault.Do(ctx, http.MethodPost, m.path(name), in, nil); err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	made, err := m.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := keys.Fits(kind, made.Public()); err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	return made, nil
}

// Get implements keys.Manager.
func (m *Manager) Get(ctx context.Context, name string) (crypto.Signer, error) {
	var k key
	if err := m.vault.Do(ctx, http.MethodGet, m.path(name), nil, &k); err != nil {
		if errors.Is(err, vault.ErrNotFound) {
			err = keys.ErrNotFound
		}
		return nil, fmt.Errorf("get key %s: %w", name, err)
	}
	// Somebody who rotates the key in Vault changes nothing here: the first version is the key.
	block, _ := pem.Decode([]byte(k.Versions["1"].Public))
	if block == nil {
		return nil, fmt.Errorf("get key %s: Vault has no first version of it", name)
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("get key %s: %w", name, err)
	}
	return keys.Remote(name, public, func(ctx context.Context, digest []byte, hash crypto.Hash) ([]byte, error) {
		return m.sign(ctx, name, digest, hash)
	}), nil
}

var hashes = map[crypto.Hash]string{crypto.SHA256: "sha2-256", crypto.SHA384: "sha2-384"}

func (m *Manager) sign(ctx context.Context, name string, digest []byte, hash crypto.Hash) ([]byte, error) {
	var out struct {
		Signature string `json:"signature"`
	}
	in := map[string]any{
		"input": base64.StdEncoding.EncodeToString(digest), "prehashed": true, "key_version": 1,
		"signature_algorithm": "pkcs1v15", "marshaling_algorithm": "asn1",
	}
	if err := m.vault.Do(ctx, http.MethodPost, m.mount+"/sign/"+m.prefix+name+"/"+hashes[hash], in, &out); err != nil {
		return nil, err
	}
	text, ok := strings.CutPrefix(out.Signature, "vault:v1:")
	if !ok {
		return nil, errors.New("vault's signature is not of the first version of the key")
	}
	return base64.StdEncoding.DecodeString(text)
}

// Delete implements keys.Manager.
func (m *Manager) Delete(ctx context.Context, name string) error {
	err := m.vault.Do(ctx, http.MethodPost, m.path(name)+"/config", map[string]any{"deletion_allowed": true}, nil)
	if err == nil {
		err = m.vault.Do(ctx, http.MethodDelete, m.path(name), nil, nil)
	}
	if err != nil {
		// Vault answers 400 to a change of what does not exist.
		if _, found := m.Get(ctx, name); errors.Is(found, keys.ErrNotFound) {
			return nil
		}
		return fmt.Errorf("delete key %s: %w", name, err)
	}
	return nil
}

// List implements keys.Manager.
func (m *Manager) List(ctx context.Context) ([]string, error) {
	var out struct {
		Keys []string `json:"keys"`
	}
	if err := m.vault.Do(ctx, http.MethodGet, m.mount+"/keys?list=true", nil, &out); err != nil && !errors.Is(err, vault.ErrNotFound) {
		return nil, fmt.Errorf("list keys: %w", err)
	}
	var names []string
	for _, name := range out.Keys {
		if name, ours := strings.CutPrefix(name, m.prefix); ours {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Keep renews the token that the server was given, until ctx ends.
func (m *Manager) Keep(ctx context.Context, log logrus.FieldLogger) { m.vault.Keep(ctx, log) }

// Persistent implements keys.Manager: it is true.
func (m *Manager) Persistent() bool { return true }
