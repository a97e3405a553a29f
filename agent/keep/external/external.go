// Package external has the agent's own key in a key manager that is a plugin of SPIRE.
//
// Why it is so: a plugin is not believed. What it says that it made must be the kind of key that was asked for, and what
// it signed is verified before anybody sees it. One that has another key in the place by now, or none, has lost
// it: that is told apart from one that does not answer, since the first takes another attestation and the second
// takes patience.
package external

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"time"

	keymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/keymanager/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/attestor"
	block "github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/attestor/plugin"
)

// How long a plugin may take. A signature is waited for in the middle of a TLS handshake.
const (
	makeTime = 30 * time.Second
	signTime = 15 * time.Second
)

// Keys are the keys of a plugin.
type Keys struct {
	*plugin.Plugin
	name string
}

var _ keep.Elsewhere = (*Keys)(nil)

// Open starts the plugin.
func Open(c *block.Config, needs attestor.Needs) (*Keys, error) {
	p, err := plugin.OpenBlock(c, "KeyManager", keymanagerv1.KeyManager_ServiceDesc.ServiceName, nil, needs)
	if err != nil {
		return nil, err
	}
	return &Keys{Plugin: p, name: c.Name}, nil
}

// Name implements keep.Elsewhere.
func (k *Keys) Name() string { return k.name }

func (k *Keys) do(ctx context.Context, patience time.Duration, fn func(context.Context, keymanagerv1.KeyManagerClient) error) error {
	return k.Do(ctx, patience, func(ctx context.Context, conn grpc.ClientConnInterface) error {
		return plugin.Explain(fn(ctx, keymanagerv1.NewKeyManagerClient(conn)))
	})
}

// Generate implements keep.Elsewhere.
func (k *Keys) Generate(ctx context.Context, place string) (crypto.Signer, error) {
	var made *keymanagerv1.PublicKey
	err := k.do(ctx, makeTime, func(ctx context.Context, c keymanagerv1.KeyManagerClient) error {
		out, err := c.GenerateKey(ctx, &keymanagerv1.GenerateKeyRequest{KeyId: place, KeyType: keymanagerv1.KeyType_EC_P256})
		made = out.GetPublicKey()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("generate key %s: %w", place, err)
	}
	public, err := x509.ParsePKIXPublicKey(made.GetPkixData())
	if err != nil {
		return nil, fmt.Errorf("generate key %s: plugin %q answered no public key: %w", place, k.name, err)
	}
	return k.Key(place, public)
}

// Key implements keep.Elsewhere.
func (k *Keys) Key(place string, public crypto.PublicKey) (crypto.Signer, error) {
	p256, ok := public.(*ecdsa.PublicKey)
	if !ok || p256.Curve != elliptic.P256() {
		return nil, fmt.Errorf("key %s of plugin %q is no key of the kind ec-p256, but %T", place, k.name, public)
	}
	return &key{keys: k, place: place, public: p256}, nil
}

// Has implements keep.Elsewhere.
func (k *Keys) Has(ctx context.Context, place string, public crypto.PublicKey) error {
	want, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return err
	}
	var out *keymanagerv1.GetPublicKeyResponse
	err = k.do(ctx, signTime, func(ctx context.Context, c keymanagerv1.KeyManagerClient) (err error) {
		out, err = c.GetPublicKey(ctx, &keymanagerv1.GetPublicKeyRequest{KeyId: place})
		return err
	})
	switch {
	case status.Code(err) == codes.NotFound || err == nil && out.GetPublicKey() == nil:
		return fmt.Errorf("%w: plugin %q has no key %s", keep.ErrKeyGone, k.name, place)
	case err != nil:
		return fmt.Errorf("ask for key %s: %w", place, err)
	case !bytes.Equal(out.GetPublicKey().GetPkixData(), want):
		return fmt.Errorf("%w: the key %s of plugin %q is another", keep.ErrKeyGone, place, k.name)
	}
	return nil
}

// key is a key whose private half is in the plugin.
type key struct {
	keys   *Keys
	place  string
	public *ecdsa.PublicKey
}

// Public returns the public key.
func (k *key) Public() crypto.PublicKey { return k.public }

// Sign has the plugin sign a SHA-256.
func (k *key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, fmt.Errorf("sign with key %s: the agent's key signs SHA-256 only", k.place)
	}
	ctx, cancel := context.WithTimeout(context.Background(), signTime)
	defer cancel()
	var signature []byte
	err := k.keys.do(ctx, signTime, func(ctx context.Context, c keymanagerv1.KeyManagerClient) error {
		out, err := c.SignData(ctx, &keymanagerv1.SignDataRequest{
			KeyId: k.place, Data: digest, SignerOpts: &keymanagerv1.SignDataRequest_HashAlgorithm{HashAlgorithm: keymanagerv1.HashAlgorithm_SHA256},
		})
		signature = out.GetSignature()
		return err
	})
	switch {
	case status.Code(err) == codes.NotFound:
		return nil, fmt.Errorf("sign with key %s: %w: %w", k.place, keep.ErrKeyGone, err)
	case err != nil:
		return nil, fmt.Errorf("sign with key %s: %w", k.place, err)
	case ecdsa.VerifyASN1(k.public, digest, signature):
		return signature, nil
	}
	err = k.keys.Has(ctx, k.place, k.public) // the key may be another by now, or the plugin lies
	if err == nil {
		err = errors.New("the plugin says that it has the key")
	}
	return nil, fmt.Errorf("sign with key %s: what plugin %q answered is no signature by that key: %w", k.place, k.keys.name, err)
}

// Format prints the key's name whatever the verb.
func (k *key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "private key "+k.place) }
