package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	_ "crypto/sha512" // crypto.SHA384 and crypto.SHA512
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	minRSABits = 2048
	maxRSABits = 8192 // beyond it one verification costs milliseconds
)

// publicKey is a key of a policy and the time in which its signatures count: from (inclusive) and until
// (exclusive), zero for no bound.
type publicKey struct {
	key         crypto.PublicKey
	fingerprint string // "sha256:" and the hash of the SubjectPublicKeyInfo
	from, until time.Time
}

// message is what was signed, hashed once for all keys.
type message struct {
	bytes []byte
	sums  map[crypto.Hash][]byte
}

func (m *message) sum(h crypto.Hash) []byte {
	if m.sums == nil {
		m.sums = map[crypto.Hash][]byte{}
	}
	if m.sums[h] == nil {
		w := h.New()
		w.Write(m.bytes)
		m.sums[h] = w.Sum(nil)
	}
	return m.sums[h]
}

// verify reports whether the signature is by the key over the message. ECDSA P-384 is tried with SHA-256
// too, which cosign uses for all curves; RSA is PSS or PKCS #1 v1.5.
func (k *publicKey) verify(m *message, sig []byte) bool {
	switch key := k.key.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(key, m.bytes, sig)
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P384() && ecdsa.VerifyASN1(key, m.sum(crypto.SHA384), sig) {
			return true
		}
		return ecdsa.VerifyASN1(key, m.sum(crypto.SHA256), sig)
	case *rsa.PublicKey:
		if len(sig) != key.Size() {
			return false
		}
		for _, h := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
			if rsa.VerifyPSS(key, h, m.sum(h), sig, nil) == nil || rsa.VerifyPKCS1v15(key, h, m.sum(h), sig) == nil {
				return true
			}
		}
	}
	return false
}

// parseKeys reads every public key of a PEM text.
func parseKeys(text []byte) ([]*publicKey, error) {
	var keys []*publicKey
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		key, err := parseKey(block)
		if err != nil {
			return nil, err
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, errors.New(`there is no public key in it; write one as "-----BEGIN PUBLIC KEY-----", as openssl pkey -pubout does`)
	}
	return keys, nil
}

func parseKey(block *pem.Block) (*publicKey, error) {
	var key crypto.PublicKey
	var err error
	switch {
	case block.Type == "PUBLIC KEY":
		key, err = x509.ParsePKIXPublicKey(block.Bytes)
	case block.Type == "RSA PUBLIC KEY":
		key, err = x509.ParsePKCS1PublicKey(block.Bytes)
	case strings.HasSuffix(block.Type, "PRIVATE KEY"):
		return nil, errors.New("it holds a private key, which has no business here; keep it where evidence is signed and give the public half, as openssl pkey -pubout writes it")
	case block.Type == "CERTIFICATE":
		return nil, errors.New("it holds a certificate; give the key alone, as openssl x509 -pubkey -noout writes it, with valid_from and valid_until")
	default:
		return nil, fmt.Errorf("it holds a %q where a \"PUBLIC KEY\" belongs", clip(block.Type))
	}
	if err != nil {
		return nil, fmt.Errorf("it holds no readable public key: %w", err)
	}
	if err := checkKey(key); err != nil {
		return nil, err
	}
	print, err := fingerprint(key)
	if err != nil {
		return nil, err
	}
	return &publicKey{key: key, fingerprint: print}, nil
}

// checkKey refuses keys that are too weak, too slow, or of a kind that is not known.
func checkKey(key crypto.PublicKey) error {
	switch key := key.(type) {
	case ed25519.PublicKey:
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() && key.Curve != elliptic.P384() {
			return fmt.Errorf("its curve is %s; there are P-256 and P-384", key.Curve.Params().Name)
		}
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return fmt.Errorf("it is an RSA key of %d bits; the least is %d, the most %d", bits, minRSABits, maxRSABits)
		}
	default:
		return fmt.Errorf("it is a key of type %T; there are ECDSA P-256 and P-384, Ed25519 and RSA", key)
	}
	return nil
}

// fingerprint names a key: "sha256:" and the hash of its SubjectPublicKeyInfo (RFC 5280 section 4.1), as
// openssl pkey -pubin -outform DER | sha256sum shows it.
func fingerprint(key crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("encode public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

// strongEnough reports whether an issuer's key may verify tokens.
func strongEnough(k jose.JSONWebKey) bool {
	switch key := k.Key.(type) {
	case *rsa.PublicKey:
		return key.N.BitLen() >= minRSABits && key.N.BitLen() <= maxRSABits
	case *ecdsa.PublicKey, ed25519.PublicKey:
		return true
	}
	return false
}
