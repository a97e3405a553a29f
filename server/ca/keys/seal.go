package keys

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"

	"golang.org/x/crypto/argon2"
)

// A sealed key file holds the same text as one that is not, encrypted with a key that is derived from the
// operator's secret: a passphrase, or better the random content of a file that is not on the same disk, as
// systemd's LoadCredentialEncrypted hands one over. Whoever has a backup, a snapshot or the disk without
// the secret has nothing.
//
// Why it is so: a secret beside the file it seals is for show, so there is none by default, and where one is
// configured and wrong the server does not start, rather than take the file for damaged.

// sealed is the stored form.
type sealed struct {
	Version int    `json:"version"`
	Salt    []byte `json:"salt"`
	// Check tells another secret from a damaged file.
	Check []byte `json:"check"`
	Nonce []byte `json:"nonce"`
	Text  []byte `json:"sealed"`
}

const sealedVersion = 2

// The cost of the derivation, which is done once when a server starts (RFC 9106 section 4, second choice).
const (
	argonTime    = 3
	argonMemory  = 64 << 10 // KiB
	argonThreads = 4
)

// otherSealError says that the file is sealed, and not with this secret.
type otherSealError struct{ text string }

func (e *otherSealError) Error() string { return e.text }

// ReadSecret reads the secret of a sealed key file; none for an empty path. One line break at its end is not
// part of it.
func ReadSecret(path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	text, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the secret that seals the keys: %w", err)
	}
	text = bytes.TrimSuffix(bytes.TrimSuffix(text, []byte("\n")), []byte("\r"))
	if len(text) < minSecret {
		return nil, fmt.Errorf("the secret in %s that seals the keys is %d bytes long: it must have %d at least, as \"head -c 32 /dev/urandom | base64\" prints", path, len(text), minSecret)
	}
	return text, nil
}

// minSecret is the shortest secret.
const minSecret = 16

// seal seals with a secret. One without a secret leaves texts as they are.
type seal struct {
	secret []byte
	salt   []byte
	key    []byte // derived from both; nil until it was needed
}

func newSeal(secret []byte) *seal { return &seal{secret: bytes.Clone(secret)} }

func (s *seal) there() bool { return len(s.secret) > 0 }

func (s *seal) derive(salt []byte) []byte {
	if s.key == nil || !bytes.Equal(s.salt, salt) {
		s.salt = salt
		s.key = argon2.IDKey(s.secret, salt, argonTime, argonMemory, argonThreads, 32)
	}
	return s.key
}

func check(key []byte) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("assay key file"))
	return mac.Sum(nil)[:16]
}

func gcm(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// close returns the text as it is to be stored.
func (s *seal) close(text []byte) ([]byte, error) {
	if !s.there() {
		return text, nil
	}
	if s.salt == nil {
		salt := make([]byte, 16)
		_, _ = rand.Read(salt) // never fails
		s.derive(salt)
	}
	aead, err := gcm(s.key)
	if err != nil {
		return nil, fmt.Errorf("seal keys: %w", err)
	}
	f := sealed{Version: sealedVersion, Salt: s.salt, Check: check(s.key), Nonce: make([]byte, aead.NonceSize())}
	_, _ = rand.Read(f.Nonce) // never fails; a file is written some times a day, far from where nonces meet
	f.Text = aead.Seal(nil, f.Nonce, text, nil)
	out, err := json.MarshalIndent(&f, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("seal keys: %w", err)
	}
	return append(out, '\n'), nil
}

// open returns the text of a file, and whether it was not sealed.
func (s *seal) open(text []byte) ([]byte, bool, error) {
	var f sealed
	if err := json.Unmarshal(text, &f); err != nil {
		return nil, false, errors.New("not the JSON it was written as")
	}
	if f.Version != sealedVersion || len(f.Text) == 0 {
		return text, true, nil // decode says what is wrong with it, if anything is
	}
	if !s.there() {
		return nil, false, &otherSealError{"is sealed: name the file with its secret in seal_credential_path"}
	}
	if len(f.Salt) != 16 || len(f.Nonce) != 12 {
		return nil, false, errors.New("its seal is malformed")
	}
	key := s.derive(f.Salt)
	if !hmac.Equal(f.Check, check(key)) {
		return nil, false, &otherSealError{"is sealed with another secret than the one in seal_credential_path"}
	}
	aead, err := gcm(key)
	if err != nil {
		return nil, false, err
	}
	plain, err := aead.Open(nil, f.Nonce, f.Text, nil)
	if err != nil {
		return nil, false, errors.New("what is sealed was changed")
	}
	return plain, false, nil
}
