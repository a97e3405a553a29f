package keys_test

import (
	"io"
	"path/filepath"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/keys/keystest"
)

// TestManagers is what every Manager must do.
func TestManagers(t *testing.T) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	open := func(t *testing.T, path, secret string) keys.Manager {
		t.Helper()
		d, err := keys.OpenSealed(path, []byte(secret), log)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = d.Close() })
		return d
	}
	onDisk := func(secret string) keystest.Options {
		paths := map[keys.Manager]string{}
		return keystest.Options{
			InProcess: true,
			Open: func(t *testing.T) keys.Manager {
				path := filepath.Join(t.TempDir(), "keys.json")
				m := open(t, path, secret)
				paths[m] = path
				return m
			},
			Reopen: func(t *testing.T, m keys.Manager) keys.Manager {
				if err := m.(io.Closer).Close(); err != nil {
					t.Fatal(err)
				}
				return open(t, paths[m], secret)
			},
		}
	}
	t.Run("memory", func(t *testing.T) {
		keystest.Run(t, keystest.Options{InProcess: true, Open: func(*testing.T) keys.Manager { return keys.Memory() }})
	})
	t.Run("disk", func(t *testing.T) { keystest.Run(t, onDisk("")) })
	t.Run("disk, sealed", func(t *testing.T) { keystest.Run(t, onDisk("correct horse battery staple")) })
}
