package keep_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/attestor/tpmchip"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/swtpm"
)

func openTPM(t *testing.T, dir string, tpm *keep.TPM) (*keep.Keep, *keep.Keys) {
	t.Helper()
	keys, err := keep.TPMKeys(dir, tpm)
	if err != nil {
		t.Fatal(err)
	}
	log, _ := logtest.NewNullLogger()
	k, err := keep.Open(dir, keys, log)
	if err != nil {
		t.Fatal(err)
	}
	return k, keys
}

// certified is an SVID for a key that only signs.
func certified(t *testing.T, key crypto.Signer) *keep.Own {
	t.Helper()
	template := &x509.Certificate{
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/spire/agent/x"}}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &keep.Own{Chain: []*x509.Certificate{cert}, Key: key, Reattestable: true}
}

func TestKeysInTheTPM(t *testing.T) {
	if err := swtpm.Available(); err != nil {
		lab.Missing(t, "a software TPM", err)
	}
	maker, err := swtpm.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = maker.Close() })
	chips := map[string]*keep.TPM{}
	for _, name := range []string{"one", "two"} {
		socket, err := maker.Make(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		chips[name] = &keep.TPM{Path: socket}
	}
	dir := t.TempDir()
	k, _ := openTPM(t, dir, chips["one"])
	key, err := k.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	own := certified(t, key) // signs
	if err := k.SaveOwn(own); err != nil {
		t.Fatal(err)
	}
	t.Run("after a restart the same key signs", func(t *testing.T) {
		k, _ := openTPM(t, dir, chips["one"])
		got := k.Own()
		if got == nil || !got.Reattestable || !got.Chain[0].Equal(own.Chain[0]) {
			t.Fatalf("own SVID is %+v, lost %v", got, k.Lost())
		}
		digest := sha256.Sum256([]byte("hello"))
		signature, err := got.Key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil || !ecdsa.VerifyASN1(own.Key.Public().(*ecdsa.PublicKey), digest[:], signature) {
			t.Errorf("signature is wrong: %v", err)
		}
		long := sha512.Sum512([]byte("hello"))
		if _, err := got.Key.Sign(rand.Reader, long[:], crypto.SHA512); err == nil {
			t.Error("it signs SHA-512")
		}
	})
	t.Run("no private key can be marshaled or is on disk in the clear", func(t *testing.T) {
		if _, err := x509.MarshalPKCS8PrivateKey(key); err == nil {
			t.Error("the key leaves the TPM")
		}
		text, err := os.ReadFile(filepath.Join(dir, "agent-keys.json"))
		if err != nil || bytes.Contains(text, []byte(`"seal"`)) || !bytes.Contains(text, []byte(`"tpm"`)) {
			t.Errorf("%s, %v", text, err)
		}
	})
	copied := func(t *testing.T) string {
		t.Helper()
		to := t.TempDir()
		if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		return to
	}
	t.Run("a disk that was copied to another machine is of no use there", func(t *testing.T) {
		to := copied(t)
		k, _ := openTPM(t, to, chips["two"])
		if got := k.Own(); got != nil {
			t.Errorf("own SVID is %+v", got)
		}
		if lost := k.Lost(); lost == nil || !strings.Contains(lost.Error(), "not of this TPM") {
			t.Errorf("lost %v", lost)
		}
		if _, err := os.Stat(filepath.Join(to, "agent-keys.json.bad")); err != nil {
			t.Error(err)
		}
	})
	t.Run("nor is it to an agent with its keys on disk, which touches nothing", func(t *testing.T) {
		to := copied(t)
		if _, err := keep.DiskKeys(to); err == nil || !strings.Contains(err.Error(), "they are in the machine's TPM") {
			t.Errorf("error is %v", err)
		}
		if _, err := os.Stat(filepath.Join(to, "agent-keys.json")); err != nil {
			t.Error(err)
		}
	})
	t.Run("a TPM that cannot be used is an error and loses nothing", func(t *testing.T) {
		to := copied(t)
		if _, err := keep.TPMKeys(to, &keep.TPM{Path: "/nowhere/tpm0"}); err == nil || !strings.Contains(err.Error(), "/nowhere/tpm0") {
			t.Errorf("error is %v", err)
		}
		if _, err := os.Stat(filepath.Join(to, "agent-keys.json")); err != nil {
			t.Error(err)
		}
	})
	t.Run("a store with its key on disk is taken over", func(t *testing.T) {
		to := t.TempDir()
		k, _ := open(t, to)
		soft, err := k.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		if err := k.SaveOwn(certified(t, soft)); err != nil {
			t.Fatal(err)
		}
		moved, _ := openTPM(t, to, chips["one"])
		if got := moved.Own(); got == nil || !got.Key.(*ecdsa.PrivateKey).Equal(soft) {
			t.Errorf("own SVID is %+v, lost %v", got, moved.Lost())
		}
		text, err := os.ReadFile(filepath.Join(to, "agent-keys.json"))
		if err != nil || bytes.Contains(text, []byte(`"seal"`)) {
			t.Errorf("the key is on disk still: %v", err)
		}
	})
	t.Run("keys that stay behind would fill the TPM", func(t *testing.T) {
		digest := sha256.Sum256([]byte("hello"))
		for range 8 {
			if _, err := key.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// extend changes a register of a TPM as booting something does.
func extend(t *testing.T, socket string, register uint32) {
	t.Helper()
	dev, err := tpmchip.Open(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	digest := sha256.Sum256([]byte("another kernel"))
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(register), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]}}},
	}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
}

func TestStateSealedToWhatWasBooted(t *testing.T) {
	if err := swtpm.Available(); err != nil {
		lab.Missing(t, "a software TPM", err)
	}
	maker, err := swtpm.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = maker.Close() })
	socket, err := maker.Make(t.Context(), "one")
	if err != nil {
		t.Fatal(err)
	}
	to := func(pcrs ...int) *keep.TPM { return &keep.TPM{Path: socket, PCRs: pcrs} }
	sealed := func(t *testing.T, pcrs ...int) string {
		t.Helper()
		dir := t.TempDir()
		k, _ := openTPM(t, dir, to(pcrs...))
		key, err := k.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		if err := k.SaveOwn(certified(t, key)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	opens := func(t *testing.T, dir string, pcrs ...int) {
		t.Helper()
		if k, _ := openTPM(t, dir, to(pcrs...)); k.Own() == nil {
			t.Errorf("own SVID is gone, lost %v", k.Lost())
		}
	}
	// stays checks that nothing of a folder is other than before, and returns the check.
	stays := func(t *testing.T, dir string) func() {
		t.Helper()
		read := func() map[string]string {
			all := map[string]string{}
			files, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				text, err := os.ReadFile(filepath.Join(dir, f.Name()))
				if err != nil {
					t.Fatal(err)
				}
				all[f.Name()] = string(text)
			}
			return all
		}
		before := read()
		return func() {
			t.Helper()
			if !maps.Equal(read(), before) {
				t.Error("something was changed on disk")
			}
		}
	}
	t.Run("it opens as long as nothing changed, in the registers that were chosen", func(t *testing.T) {
		dir := sealed(t, 0, 7)
		opens(t, dir, 0, 7)
		extend(t, socket, 9)
		opens(t, dir, 0, 7)
	})
	t.Run("a changed register is an error that says which and what to do, and no new identity", func(t *testing.T) {
		dir := sealed(t, 0, 2, 8)
		check := stays(t, dir)
		extend(t, socket, 8)
		for range 2 {
			_, err := keep.TPMKeys(dir, to(0, 2, 8))
			if !errors.Is(err, keep.ErrRegisters) || !strings.Contains(err.Error(), "register 8 was 0") || strings.Contains(err.Error(), "register 2") ||
				!strings.Contains(err.Error(), "remove this file") || !strings.Contains(err.Error(), dir) {
				t.Errorf("error is %v", err)
			}
			check()
		}
		if err := os.Remove(filepath.Join(dir, "agent-keys.json")); err != nil {
			t.Fatal(err)
		}
		k, _ := openTPM(t, dir, to(0, 2, 8))
		if own := k.Own(); own != nil || k.Lost() == nil {
			t.Errorf("own SVID is %+v, lost %v", own, k.Lost())
		}
	})
	t.Run("nor does it open when the configuration forgets the registers", func(t *testing.T) {
		dir := sealed(t, 10)
		check := stays(t, dir)
		extend(t, socket, 10)
		if _, err := keep.TPMKeys(dir, to()); !errors.Is(err, keep.ErrRegisters) {
			t.Errorf("error is %v", err)
		}
		check()
	})
	t.Run("nor when the file does", func(t *testing.T) {
		dir := sealed(t, 11)
		extend(t, socket, 11)
		path := filepath.Join(dir, "agent-keys.json")
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for why, change := range map[string]func(string) string{
			"without registers":   func(s string) string { return regexp.MustCompile(`,"pcrs":\[.*\]`).ReplaceAllString(s, "") },
			"with another number": func(s string) string { return strings.Replace(s, `"number":11`, `"number":12`, 1) },
		} {
			forged := change(string(text))
			if forged == string(text) {
				t.Fatalf("%s: nothing is changed in %s", why, text)
			}
			if err := os.WriteFile(path, []byte(forged), 0o600); err != nil {
				t.Fatal(err)
			}
			check := stays(t, dir)
			if _, err := keep.TPMKeys(dir, to(11)); err == nil {
				t.Errorf("%s: it opens", why)
			}
			check()
		}
	})
	t.Run("other registers are sealed to from the next start on, so that an update can be told before", func(t *testing.T) {
		dir := sealed(t, 12)
		opens(t, dir) // pcrs = []
		extend(t, socket, 12)
		opens(t, dir)
		opens(t, dir, 12)
		extend(t, socket, 12)
		if _, err := keep.TPMKeys(dir, to(12)); !errors.Is(err, keep.ErrRegisters) {
			t.Errorf("error is %v", err)
		}
	})
}
