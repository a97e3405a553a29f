package keys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"time"
)

// RemotePatience is how long a signature of a key that is somewhere else may take.
const RemotePatience = 10 * time.Second

// SignFunc has a digest signed somewhere else: ECDSA in ASN.1, or RSA as PKCS #1 v1.5.
type SignFunc func(ctx context.Context, digest []byte, hash crypto.Hash) ([]byte, error)

// Remote is a key whose private half is somewhere else. What comes back is verified before anybody gets to
// see it, and so is what is asked for.
func Remote(name string, public crypto.PublicKey, sign SignFunc) crypto.Signer {
	return &remote{name: name, public: public, sign: sign}
}

type remote struct {
	name   string
	public crypto.PublicKey
	sign   SignFunc
}

func (r *remote) Public() crypto.PublicKey { return r.public }

func (r *remote) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	hash := opts.HashFunc()
	if _, pss := opts.(*rsa.PSSOptions); pss {
		return nil, errors.New("RSA-PSS is not supported")
	}
	if (hash != crypto.SHA256 && hash != crypto.SHA384) || len(digest) != hash.Size() {
		return nil, fmt.Errorf("sign with key %s: %d bytes are no digest of %s", r.name, len(digest), hash)
	}
	ctx, cancel := context.WithTimeout(context.Background(), RemotePatience)
	defer cancel()
	signature, err := r.sign(ctx, digest, hash)
	if err != nil {
		return nil, fmt.Errorf("sign with key %s: %w", r.name, err)
	}
	good := false
	switch key := r.public.(type) {
	case *ecdsa.PublicKey:
		good = ecdsa.VerifyASN1(key, digest, signature)
	case *rsa.PublicKey:
		good = rsa.VerifyPKCS1v15(key, hash, digest, signature) == nil
	}
	if !good {
		return nil, fmt.Errorf("sign with key %s: what came back is no signature by that key", r.name)
	}
	return signature, nil
}

// Format prints the key's name whatever the verb.
func (r *remote) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "private key "+r.name) }

// MarshalText keeps encoders from looking inside.
func (r *remote) MarshalText() ([]byte, error) { return []byte("private key " + r.name), nil }

// Fits says whether a public key is of the kind that was asked for.
func Fits(kind Kind, public crypto.PublicKey) error {
	var is string
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		switch is = key.Curve.Params().Name; is {
		case "P-256":
			is = string(EC256)
		case "P-384":
			is = string(EC384)
		}
	case *rsa.PublicKey:
		is = fmt.Sprintf("rsa-%d", key.N.BitLen())
	default:
		is = fmt.Sprintf("%T", public)
	}
	if is != string(kind) {
		return fmt.Errorf("asked for a key of kind %s, got one of kind %s", kind, is)
	}
	return nil
}

// CheckName says whether a name may be that of a key.
func CheckName(name string) error { return checkName(name) }
