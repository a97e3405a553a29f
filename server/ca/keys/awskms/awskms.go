// Package awskms keeps the server's signing keys in AWS Key Management Service: they are made there and do not
// leave, and every signature is a question, whose answer is verified. A key is found by its alias,
// alias/PREFIX-NAME; one that is deleted is gone after seven days, the least that AWS allows.
//
// What the server's role needs: kms:CreateKey, kms:CreateAlias, kms:DeleteAlias, kms:DescribeKey,
// kms:GetPublicKey, kms:ListAliases, kms:ScheduleKeyDeletion and kms:Sign; with tags kms:TagResource too.
package awskms

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/assay-id/assay/server/ca/aws"
	"github.com/assay-id/assay/server/ca/keys"
)

// Manager keeps keys in AWS KMS.
type Manager struct {
	kms    *aws.Client
	prefix string // of aliases
	policy string
	tags   []tag
	mu     sync.Mutex // held while a key is made, so that one that is not to be is not made either
}

var _ keys.Manager = (*Manager)(nil)

// Config says how keys are made.
type Config struct {
	// Prefix of aliases; empty: "assay". Policy of keys in JSON; empty: AWS's default.
	Prefix, Policy string
	// Tags are put onto each key that is made.
	Tags map[string]string
}

// tag is one, in KMS's words.
type tag struct {
	Key   string `json:"TagKey"`
	Value string `json:"TagValue"`
}

// New returns a manager.
func New(client *aws.Client, c Config) *Manager {
	if c.Prefix == "" {
		c.Prefix = "assay"
	}
	m := &Manager{kms: client, prefix: "alias/" + c.Prefix + "-", policy: c.Policy}
	for _, key := range slices.Sorted(maps.Keys(c.Tags)) {
		m.tags = append(m.tags, tag{key, c.Tags[key]})
	}
	return m
}

var specs = map[keys.Kind]string{
	keys.EC256: "ECC_NIST_P256", keys.EC384: "ECC_NIST_P384", keys.RSA2048: "RSA_2048", keys.RSA4096: "RSA_4096",
}

type metadata struct {
	KeyMetadata struct {
		KeyID   string `json:"KeyId"`
		Enabled bool   `json:"Enabled"`
	} `json:"KeyMetadata"`
}

// Generate implements keys.Manager.
func (m *Manager) Generate(ctx context.Context, name string, kind keys.Kind) (crypto.Signer, error) {
	if err := errors.Join(keys.CheckName(name), ctx.Err()); err != nil {
		return nil, err
	}
	if strings.ContainsRune(name, '.') {
		return nil, fmt.Errorf("key name %q: an alias of KMS has no dots", name)
	}
	spec, ok := specs[kind]
	if !ok {
		_, err := keys.ParseKind(string(kind))
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch _, err := m.describe(ctx, name); {
	case err == nil:
		return nil, fmt.Errorf("generate key %s: %w", name, keys.ErrExists)
	case !errors.Is(err, keys.ErrNotFound):
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	in := map[string]any{"KeySpec": spec, "KeyUsage": "SIGN_VERIFY", "Description": "Assay server signing key " + name}
	if m.policy != "" {
		in["Policy"] = m.policy
	}
	if len(m.tags) > 0 {
		in["Tags"] = m.tags
	}
	var made metadata
	if err := m.kms.Do(ctx, "CreateKey", in, &made); err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	id := made.KeyMetadata.KeyID
	err := m.kms.Do(ctx, "CreateAlias", map[string]any{"AliasName": m.prefix + name, "TargetKeyId": id}, nil)
	if err == nil {
		var signer crypto.Signer
		if signer, err = m.signer(ctx, name, id); err == nil {
			if err = keys.Fits(kind, signer.Public()); err == nil {
				return signer, nil
			}
		}
	}
	if aws.Is(err, "AlreadyExistsException") { // another server was faster
		err = keys.ErrExists
	}
	// Nobody would find it again, and it costs money.
	undo := m.kms.Do(context.WithoutCancel(ctx), "ScheduleKeyDeletion", map[string]any{"KeyId": id, "PendingWindowInDays": 7}, nil)
	return nil, fmt.Errorf("generate key %s: %w", name, errors.Join(err, undo))
}

// describe returns the ID of the key with the name.
func (m *Manager) describe(ctx context.Context, name string) (string, error) {
	var out metadata
	if err := m.kms.Do(ctx, "DescribeKey", map[string]any{"KeyId": m.prefix + name}, &out); err != nil {
		if aws.Is(err, "NotFoundException") {
			err = keys.ErrNotFound
		}
		return "", err
	}
	return out.KeyMetadata.KeyID, nil
}

func (m *Manager) signer(ctx context.Context, name, id string) (crypto.Signer, error) {
	var out struct {
		PublicKey []byte `json:"PublicKey"`
	}
	if err := m.kms.Do(ctx, "GetPublicKey", map[string]any{"KeyId": id}, &out); err != nil {
		return nil, err
	}
	public, err := x509.ParsePKIXPublicKey(out.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("parse public key: %w", err)
	}
	return keys.Remote(name, public, func(ctx context.Context, digest []byte, hash crypto.Hash) ([]byte, error) {
		algorithm := map[crypto.Hash]string{crypto.SHA256: "SHA_256", crypto.SHA384: "SHA_384"}[hash]
		if _, ec := public.(*ecdsa.PublicKey); ec {
			algorithm = "ECDSA_" + algorithm
		} else {
			algorithm = "RSASSA_PKCS1_V1_5_" + algorithm
		}
		var out struct {
			Signature []byte `json:"Signature"`
		}
		err := m.kms.Do(ctx, "Sign", map[string]any{"KeyId": id, "Message": digest, "MessageType": "DIGEST", "SigningAlgorithm": algorithm}, &out)
		return out.Signature, err
	}), nil
}

// Get implements keys.Manager.
func (m *Manager) Get(ctx context.Context, name string) (crypto.Signer, error) {
	id, err := m.describe(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("get key %s: %w", name, err)
	}
	signer, err := m.signer(ctx, name, id)
	if err != nil {
		return nil, fmt.Errorf("get key %s: %w", name, err)
	}
	return signer, nil
}

// Delete implements keys.Manager.
func (m *Manager) Delete(ctx context.Context, name string) error {
	id, err := m.describe(ctx, name)
	if errors.Is(err, keys.ErrNotFound) {
		return nil
	}
	if err == nil {
		err = m.kms.Do(ctx, "ScheduleKeyDeletion", map[string]any{"KeyId": id, "PendingWindowInDays": 7}, nil)
	}
	if err == nil || aws.Is(err, "KMSInvalidStateException") { // it was scheduled before
		err = m.kms.Do(ctx, "DeleteAlias", map[string]any{"AliasName": m.prefix + name}, nil)
	}
	if err != nil && !aws.Is(err, "NotFoundException") {
		return fmt.Errorf("delete key %s: %w", name, err)
	}
	return nil
}

// List implements keys.Manager.
func (m *Manager) List(ctx context.Context) ([]string, error) {
	var names []string
	in := map[string]any{"Limit": 100}
	for {
		var out struct {
			Aliases []struct {
				AliasName string `json:"AliasName"`
			} `json:"Aliases"`
			Truncated  bool   `json:"Truncated"`
			NextMarker string `json:"NextMarker"`
		}
		if err := m.kms.Do(ctx, "ListAliases", in, &out); err != nil {
			return nil, fmt.Errorf("list keys: %w", err)
		}
		for _, a := range out.Aliases {
			if name, ours := strings.CutPrefix(a.AliasName, m.prefix); ours {
				names = append(names, name)
			}
		}
		if !out.Truncated || out.NextMarker == "" || out.NextMarker == in["Marker"] {
			slices.Sort(names)
			return names, nil
		}
		in["Marker"] = out.NextMarker
	}
}

// Persistent implements keys.Manager: it is true.
func (m *Manager) Persistent() bool { return true }
