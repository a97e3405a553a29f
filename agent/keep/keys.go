package keep

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	keysFile    = "agent-keys.json"
	keysVersion = 1
	sealKeySize = 32 // AES-256
)

// Keys is the agent's key store: it has the key that everything else is sealed under.
type Keys struct {
	seal       []byte
	persistent bool
	tpm        *TPM // where the agent's own key lives; nil: with the rest, or
	elsewhere  *elsewhere
	lost       error // why the key from before could not be used; nil: it could, or there was none
}

// MemoryKeys returns a key store that ends with the process. Nothing sealed under it can be read by
// the next, so a Keep with such keys writes nothing.
func MemoryKeys() *Keys {
	k := &Keys{seal: make([]byte, sealKeySize)}
	_, _ = rand.Read(k.seal) // crypto/rand.Read never fails
	return k
}

type keysJSON struct {
	Version int    `json:"version"`
	Seal    []byte `json:"seal,omitempty"`
	TPM     *blob  `json:"tpm,omitempty"` // in place of Seal: it is sealed in the TPM
}

// DiskKeys opens the key store in dir, or makes one, with mode 0600. A store that is damaged is put
// aside under a name ending in ".bad" and replaced: what was sealed under its key is lost with it, and
// an agent that runs can get all of it again. Keep.Lost tells of it. A store that cannot be read, or
// that a newer agent wrote, is an error that names the file.
func DiskKeys(dir string) (*Keys, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make key directory: %w", err)
	}
	path := filepath.Join(dir, keysFile)
	raw, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return newDiskKeys(path)
	case err != nil:
		return nil, fmt.Errorf("read agent keys: %w", err)
	}
	var stored keysJSON
	err = json.Unmarshal(raw, &stored)
	switch {
	case err != nil:
		err = errors.New("not the JSON it was written as") // no part of it: it was a key
	case stored.Version > keysVersion:
		return nil, fmt.Errorf("read agent keys %s: version %d is not known to this agent", path, stored.Version)
	case stored.TPM != nil:
		return nil, fmt.Errorf("read agent keys %s: they are in the machine's TPM; configure key_manager \"tpm\", or remove the file and lose what is sealed", path)
	case len(stored.Seal) != sealKeySize:
		err = fmt.Errorf("key of %d bytes, want %d", len(stored.Seal), sealKeySize)
	default:
		return &Keys{seal: stored.Seal, persistent: true}, nil
	}
	if mv := os.Rename(path, path+".bad"); mv != nil {
		return nil, fmt.Errorf("read agent keys %s: %w; put it aside: %w", path, err, mv)
	}
	k, newErr := newDiskKeys(path)
	if newErr != nil {
		return nil, newErr
	}
	k.lost = fmt.Errorf("%s: %w", path, err)
	return k, nil
}

func newDiskKeys(path string) (*Keys, error) {
	k := MemoryKeys()
	k.persistent = true
	raw, err := json.Marshal(keysJSON{Version: keysVersion, Seal: k.seal})
	if err != nil {
		return nil, fmt.Errorf("marshal agent keys: %w", err)
	}
	if err := writeFile(path, raw); err != nil {
		return nil, fmt.Errorf("write agent keys: %w", err)
	}
	return k, nil
}

// NewKey makes a key for the agent itself, where the key store has them.
func (k *Keep) NewKey() (crypto.Signer, error) {
	switch {
	case k.keys.tpm != nil:
		return k.keys.tpm.newKey()
	case k.keys.elsewhere != nil:
		return k.keys.elsewhere.newKey()
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// writeFile replaces the file at path whole or not at all, with mode 0600, and returns when the
// result is on disk: a reader finds the old bytes or the new, whenever the power fails.
func writeFile(path string, content []byte) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = tmp.Close()
			_ = os.Remove(tmp.Name())
		}
	}()
	if _, err = tmp.Write(content); err != nil {
		return err
	}
	if err = tmp.Sync(); err != nil {
		return err
	}
	if err = tmp.Close(); err != nil {
		return err
	}
	if err = os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}
