package keys

import (
	"crypto"
	"crypto/rsa"
	"io"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
)

func quiet() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

func openDisk(t *testing.T, path string) *OnDisk {
	t.Helper()
	d, err := OpenDisk(path, quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func equal(a, b crypto.PublicKey) bool {
	return a.(interface{ Equal(crypto.PublicKey) bool }).Equal(b)
}

func TestGenerate(t *testing.T) {
	t.Run("the largest kind of key is as large as it says", func(t *testing.T) {
		key, err := Generate(RSA4096)
		if err != nil {
			t.Fatal(err)
		}
		if n := key.Public().(*rsa.PublicKey).N.BitLen(); n != 4096 {
			t.Errorf("%d bits", n)
		}
	})
}

func TestParseKind(t *testing.T) {
	t.Run("SPIRE's spellings are known and others named", func(t *testing.T) {
		if k, err := ParseKind("rsa-4096"); err != nil || k != RSA4096 {
			t.Errorf("got %q, %v", k, err)
		}
		if _, err := ParseKind("EC-P256"); err == nil || !strings.Contains(err.Error(), "ec-p256") {
			t.Errorf("got %v", err)
		}
	})
}
