// Package pkcs11 holds the PKCS #11 helper to the suite of key managers, with SoftHSM as the module.
package pkcs11

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/keys/keystest"
	"github.com/assay-id/assay/server/ca/keys/pkcs11"
	"github.com/assay-id/assay/test/lab"
)

const pin = "471147"

// module is where Debian and others put SoftHSM.
func module(t *testing.T) string {
	t.Helper()
	for _, path := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so", "/usr/lib64/libsofthsm2.so"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	lab.Missing(t, "SoftHSM (Debian: softhsm2)", os.ErrNotExist)
	return ""
}

// softHSM makes a folder of tokens the one that modules of this process's children use.
func softHSM(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"softhsm2-util", "gcc"} {
		if _, err := exec.LookPath(tool); err != nil {
			lab.Missing(t, tool+" (Debian: softhsm2, gcc)", err)
		}
	}
	dir := t.TempDir()
	tokens := filepath.Join(dir, "tokens")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.WriteFile(conf, []byte("directories.tokendir = "+tokens+"\nobjectstore.backend = file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
}

func newToken(t *testing.T, label string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", "0000").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// build builds the helper as "make pkcs11" does.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "assay-pkcs11")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", path, "github.com/assay-id/assay/cmd/assay-pkcs11")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

func TestSoftHSM(t *testing.T) {
	softHSM(t)
	log := logrus.New()
	log.SetOutput(io.Discard)
	cfg := pkcs11.Config{Helper: build(t), Module: module(t), PIN: pin, Log: log}
	open := func(t *testing.T, label string) (*pkcs11.Manager, error) {
		c := cfg
		c.TokenLabel = label
		m, err := pkcs11.Open(t.Context(), c)
		if err == nil {
			t.Cleanup(func() { _ = m.Close() })
		}
		return m, err
	}
	labels, n := map[keys.Manager]string{}, 0
	keystest.Run(t, keystest.Options{
		Open: func(t *testing.T) keys.Manager {
			t.Helper()
			n++
			label := fmt.Sprintf("token-%d", n)
			newToken(t, label)
			m, err := open(t, label)
			if err != nil {
				t.Fatal(err)
			}
			labels[m] = label
			return m
		},
		Reopen: func(t *testing.T, m keys.Manager) keys.Manager {
			t.Helper()
			if err := m.(*pkcs11.Manager).Close(); err != nil {
				t.Fatal(err)
			}
			again, err := open(t, labels[m])
			if err != nil {
				t.Fatal(err)
			}
			return again
		},
	})
	newToken(t, "strict")
	t.Run("what is wrong with the token is said", func(t *testing.T) {
		if _, err := open(t, "nobody's"); err == nil || !strings.Contains(err.Error(), `there is no token "nobody's"`) || !strings.Contains(err.Error(), `"strict"`) {
			t.Errorf("got %v", err)
		}
		c := cfg
		c.TokenLabel, c.PIN = "strict", "000000"
		if _, err := pkcs11.Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), "CKR_PIN_INCORRECT") {
			t.Errorf("got %v", err)
		}
		c.Module = "/nowhere/module.so"
		if _, err := pkcs11.Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), "/nowhere/module.so") {
			t.Errorf("got %v", err)
		}
	})
}
