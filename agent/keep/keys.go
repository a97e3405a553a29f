package keep

import (
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
	Seal    []byte `json:"seal"`
}

// DiskKeys opens the key store in dir, or makes one, with mode 0600. A store that is there and cannot
// be read is an error that names the file: replacing it would throw away all that was kept.
func DiskKeys(dir string) (*Keys, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make key directory: %w", err)
	}
	path := filepath.Join(dir, keysFile)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
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
	if err != nil {
		return nil, fmt.Errorf("read agent keys: %w", err)
	}
	var stored keysJSON
	if err := json.Unmarshal(raw, &stored); err != nil {
		return nil, fmt.Errorf("read agent keys %s: %w; remove the file to start afresh", path, err)
	}
	if stored.Version != keysVersion {
		return nil, fmt.Errorf("read agent keys %s: version %d is not known to this agent", path, stored.Version)
	}
	if len(stored.Seal) != sealKeySize {
		return nil, fmt.Errorf("read agent keys %s: key of %d bytes, want %d; remove the file to start afresh",
			path, len(stored.Seal), sealKeySize)
	}
	return &Keys{seal: stored.Seal, persistent: true}, nil
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
