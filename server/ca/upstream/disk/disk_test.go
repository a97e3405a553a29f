package disk

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/upstream/upstreamtest"
)

func writeCerts(t *testing.T, path string, certs ...*x509.Certificate) string {
	t.Helper()
	var text []byte
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return write(t, path, text)
}

func writeKey(t *testing.T, path string, key crypto.Signer) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func write(t *testing.T, path string, text []byte) string {
	t.Helper()
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSuite(t *testing.T) {
	dir := t.TempDir()
	root, rootKey := upstreamtest.Root(t, "root", 24*time.Hour)
	t.Run("self-signed", func(t *testing.T) {
		a, err := Open(Config{CertPath: writeCerts(t, filepath.Join(dir, "root.pem"), root), KeyPath: writeKey(t, filepath.Join(dir, "root.key"), rootKey)})
		if err != nil {
			t.Fatal(err)
		}
		upstreamtest.Run(t, a, upstreamtest.Options{})
	})
	t.Run("below a root", func(t *testing.T) {
		_, oneKey := upstreamtest.Root(t, "unused", time.Hour)
		middle := upstreamtest.Issue(t, "middle", oneKey.Public(), 12*time.Hour, root, rootKey, nil)
		a, err := Open(Config{
			CertPath: writeCerts(t, filepath.Join(dir, "middle.pem"), middle), KeyPath: writeKey(t, filepath.Join(dir, "middle.key"), oneKey),
			BundlePath: writeCerts(t, filepath.Join(dir, "roots.pem"), root),
		})
		if err != nil {
			t.Fatal(err)
		}
		upstreamtest.Run(t, a, upstreamtest.Options{})
	})
}

func TestReload(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
	first, firstKey := upstreamtest.Root(t, "first", time.Hour)
	second, secondKey := upstreamtest.Root(t, "second", time.Hour)
	writeCerts(t, cert, first)
	writeKey(t, key, firstKey)
	a, err := Open(Config{CertPath: cert, KeyPath: key})
	if err != nil {
		t.Fatal(err)
	}
	sign := func() (*upstream.Signed, error) {
		return a.Sign(t.Context(), upstream.Request{CSR: upstreamtest.CSR(t, secondKey), TTL: time.Minute, Now: time.Now()})
	}
	if s, err := sign(); err != nil || !s.Roots[0].Equal(first) {
		t.Fatalf("%v, %v", s, err)
	}
	long, err := a.Sign(t.Context(), upstream.Request{CSR: upstreamtest.CSR(t, secondKey), TTL: 48 * time.Hour, Now: time.Now()})
	if err != nil || !long.Chain[0].NotAfter.Equal(first.NotAfter) {
		t.Errorf("what is asked for until after the signer's end: %v, %v", long, err)
	}
	writeCerts(t, cert, second)
	if _, err := sign(); err == nil || !strings.Contains(err.Error(), "is not that of the certificate") {
		t.Errorf("in the middle of a replacement: %v", err)
	}
	writeKey(t, key, secondKey)
	if s, err := sign(); err != nil || !s.Roots[0].Equal(second) {
		t.Errorf("%v, %v", s, err)
	}
}

func TestBadFiles(t *testing.T) {
	dir := t.TempDir()
	root, rootKey := upstreamtest.Root(t, "root", time.Hour)
	_, otherKey := upstreamtest.Root(t, "other", time.Hour)
	middle := upstreamtest.Issue(t, "middle", otherKey.Public(), time.Hour, root, rootKey, nil)
	leaf := upstreamtest.Issue(t, "leaf", rootKey.Public(), time.Hour, nil, rootKey, func(c *x509.Certificate) { c.IsCA = false })
	at := func(name string) string { return filepath.Join(dir, name) }
	rootPEM, rootKeyPEM := writeCerts(t, at("root.pem"), root), writeKey(t, at("root.key"), rootKey)
	otherKeyPEM := writeKey(t, at("other.key"), otherKey)
	rootKeyText, err := os.ReadFile(rootKeyPEM)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		cfg  Config
		want string
	}{
		"no certificate file":           {Config{CertPath: at("none"), KeyPath: rootKeyPEM}, "no such file"},
		"no key file":                   {Config{CertPath: rootPEM, KeyPath: at("none")}, "no such file"},
		"another's key":                 {Config{CertPath: rootPEM, KeyPath: otherKeyPEM}, "is not that of the certificate"},
		"a key for certificates":        {Config{CertPath: rootKeyPEM, KeyPath: rootKeyPEM}, `a PEM block of type "PRIVATE KEY"`},
		"certificates for a key":        {Config{CertPath: rootPEM, KeyPath: rootPEM}, "holds no private key"},
		"a key that is sealed":          {Config{CertPath: rootPEM, KeyPath: write(t, at("sealed"), pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY"}))}, "is encrypted"},
		"a damaged key":                 {Config{CertPath: rootPEM, KeyPath: write(t, at("damaged"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("secret")}))}, "cannot be parsed"},
		"no root for another's":         {Config{CertPath: writeCerts(t, at("middle.pem"), middle), KeyPath: otherKeyPEM}, "name the file with its root"},
		"a certificate that is no CA's": {Config{CertPath: writeCerts(t, at("leaf.pem"), leaf), KeyPath: rootKeyPEM}, "is no CA certificate"},
		"an empty bundle":               {Config{CertPath: rootPEM, KeyPath: rootKeyPEM, BundlePath: write(t, at("empty"), nil)}, "no certificate in PEM"},
		"a folder":                      {Config{CertPath: dir, KeyPath: rootKeyPEM}, "is not a regular file"},
		"a key with much after it":      {Config{CertPath: rootPEM, KeyPath: write(t, at("huge"), append(rootKeyText, make([]byte, maxFile)...))}, "is longer than"},
		"a device":                      {Config{CertPath: "/dev/zero", KeyPath: rootKeyPEM}, "is not a regular file"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			_, err := Open(c.cfg)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Error("it tells the key")
			}
		})
	}
}
