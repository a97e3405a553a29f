package keep

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor/tpmchip"
)

// tpmTime is how long the TPM may take for one use of a key.
const tpmTime = time.Minute

// TPM is where keys live that do not leave it.
type TPM struct {
	// Path is the device, or the Unix socket of a software TPM.
	Path string
	// OwnerPassword is that of the TPM's owner hierarchy, if it has one.
	OwnerPassword string
	// PCRs are the registers that must be what they were, in order, for what is sealed to open.
	PCRs []int

	mu sync.Mutex // one use at a time: some TPMs are shared by nobody
}

// blob is a key as the TPM gives it out: of use only in this very TPM.
type blob struct {
	Public  []byte `json:"public"`  // TPMT_PUBLIC
	Private []byte `json:"private"` // TPM2B_PRIVATE, without its size
	// PCRs are the registers that it opens with; none: it opens whatever they are.
	PCRs []register `json:"pcrs,omitempty"`
}

// sealTemplate is what holds the seal key, keyTemplate the agent's own key. Both are fixed in their TPM.
var (
	sealTemplate = tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true, NoDA: true},
	}
	keyTemplate = tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme:  tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
			CurveID: tpm2.TPMECCNistP256,
		}),
	}
)

// under opens the TPM and makes its storage root key, out of the TPM's own seed, for the time of one use.
func (t *TPM) under(use func(dev *tpmchip.Device, root tpm2.AuthHandle) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), tpmTime)
	defer cancel()
	dev, err := tpmchip.Open(ctx, t.Path)
	if err != nil {
		return err
	}
	defer func() { _ = dev.Close() }()
	root, err := tpm2.CreatePrimary{
		PrimaryHandle: tpmchip.Hierarchy(tpm2.TPMRHOwner, t.OwnerPassword), InPublic: tpm2.New2B(tpmchip.StorageRoot(tpm2.TPMAlgECC)),
	}.Execute(dev)
	if err != nil {
		return fmt.Errorf("make storage root key in TPM: %w", err)
	}
	defer tpmchip.Flush(dev, root.ObjectHandle)
	return use(dev, tpm2.AuthHandle{Handle: root.ObjectHandle, Name: root.Name, Auth: tpm2.PasswordAuth(nil)})
}

// create makes an object; secret is what it holds, if it is not the TPM's to make, and with registers it opens
// only while they are what they are now.
func (t *TPM) create(template tpm2.TPMTPublic, secret []byte, pcrs []int) (*blob, error) {
	var out *blob
	err := t.under(func(dev *tpmchip.Device, root tpm2.AuthHandle) error {
		sensitive := &tpm2.TPMSSensitiveCreate{}
		if secret != nil {
			sensitive.Data = tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret})
		}
		var registers []register
		if len(pcrs) > 0 {
			digest, values, err := policy(dev, pcrs)
			if err != nil {
				return err
			}
			template.AuthPolicy, template.ObjectAttributes.UserWithAuth, registers = tpm2.TPM2BDigest{Buffer: digest}, false, values
		}
		made, err := tpm2.Create{ParentHandle: root, InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: sensitive}, InPublic: tpm2.New2B(template)}.Execute(dev)
		if err != nil {
			return err
		}
		out = &blob{Public: made.OutPublic.Bytes(), Private: made.OutPrivate.Buffer, PCRs: registers}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("make key in TPM: %w", err)
	}
	return out, nil
}

// errForeign says that a key is of another TPM, or of this one before it was cleared.
var errForeign = errors.New("it is not of this TPM, or the TPM was cleared")

// loaded loads an object for the time of one use.
func (t *TPM) loaded(b *blob, use func(dev *tpmchip.Device, key tpm2.AuthHandle) error) error {
	public, err := tpmchip.ReadPublic(b.Public)
	if err != nil {
		return err
	}
	return t.under(func(dev *tpmchip.Device, root tpm2.AuthHandle) error {
		key, err := tpm2.Load{ParentHandle: root, InPrivate: tpm2.TPM2BPrivate{Buffer: b.Private}, InPublic: tpm2.New2B(*public)}.Execute(dev)
		// Who asks for it with a parameter that is not this TPM's gets one of these; all else may pass.
		if errors.Is(err, tpm2.TPMRCIntegrity) || errors.Is(err, tpm2.TPMRCSize) || errors.Is(err, tpm2.TPMRCValue) {
			return fmt.Errorf("%w: %w", errForeign, err)
		}
		if err != nil {
			return fmt.Errorf("load key into TPM: %w", err)
		}
		defer tpmchip.Flush(dev, key.ObjectHandle)
		auth := tpm2.PasswordAuth(nil)
		if len(b.PCRs) > 0 {
			auth = tpm2.Policy(tpm2.TPMAlgSHA256, nonceSize, inPolicy(numbers(b.PCRs)))
		}
		return use(dev, tpm2.AuthHandle{Handle: key.ObjectHandle, Name: key.Name, Auth: auth})
	})
}

func (t *TPM) unseal(b *blob) ([]byte, error) {
	var secret []byte
	err := t.loaded(b, func(dev *tpmchip.Device, key tpm2.AuthHandle) error {
		out, err := tpm2.Unseal{ItemHandle: key}.Execute(dev)
		if errors.Is(err, tpm2.TPMRCPolicyFail) {
			return fmt.Errorf("%w: %s", ErrRegisters, changed(dev, b.PCRs))
		}
		if err != nil {
			return fmt.Errorf("unseal in TPM: %w", err)
		}
		secret = out.OutData.Buffer
		return nil
	})
	return secret, err
}

// TPMKeys opens the key store in dir whose key is in a TPM, or makes one: what is sealed on disk can be read
// with this TPM only, and the agent's own key is made in it and stays there. A store that DiskKeys made is
// taken over; one of another TPM is put aside as a damaged one is. A TPM that cannot be used is an error, and so is
// one whose registers are not what they were. A store that is sealed to other registers than are wanted now, and
// opens, is sealed anew.
func TPMKeys(dir string, t *TPM) (*Keys, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make key directory: %w", err)
	}
	path := filepath.Join(dir, keysFile)
	raw, err := os.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return newTPMKeys(path, t, nil)
	case err != nil:
		return nil, fmt.Errorf("read agent keys: %w", err)
	}
	var stored keysJSON
	err = json.Unmarshal(raw, &stored)
	switch {
	case err != nil:
		err = errors.New("not the JSON it was written as") // no part of it: it was a key
	case stored.Version > keysVersion:
		return nil, fmt.Errorf("read agent keys %s: version %d is not known to this agent", path, stored.Version)
	case stored.TPM != nil:
		var seal []byte
		if seal, err = t.unseal(stored.TPM); err == nil && len(seal) == sealKeySize {
			if !t.asConfigured(stored.TPM) {
				return newTPMKeys(path, t, seal)
			}
			return &Keys{seal: seal, persistent: true, tpm: t}, nil
		}
		if errors.Is(err, ErrRegisters) {
			return nil, fmt.Errorf("open agent keys %s: %w; if that is as it should be, remove this file: the agent attests anew then, and what it kept is lost", path, err)
		}
		if err == nil {
			err = fmt.Errorf("key of %d bytes, want %d", len(seal), sealKeySize)
		} else if !errors.Is(err, errForeign) {
			return nil, fmt.Errorf("read agent keys %s: %w", path, err)
		}
	case len(stored.Seal) == sealKeySize:
		return newTPMKeys(path, t, stored.Seal)
	default:
		err = fmt.Errorf("key of %d bytes, want %d", len(stored.Seal), sealKeySize)
	}
	if mv := os.Rename(path, path+".bad"); mv != nil {
		return nil, fmt.Errorf("read agent keys %s: %w; put it aside: %w", path, err, mv)
	}
	k, newErr := newTPMKeys(path, t, nil)
	if newErr != nil {
		return nil, newErr
	}
	k.lost = fmt.Errorf("%s: %w", path, err)
	return k, nil
}

// newTPMKeys seals a key, a new one unless it is given, and writes the file.
func newTPMKeys(path string, t *TPM, seal []byte) (*Keys, error) {
	k := MemoryKeys()
	k.persistent, k.tpm = true, t
	if seal != nil {
		k.seal = seal
	}
	sealed, err := t.create(sealTemplate, k.seal, t.PCRs)
	if err != nil {
		return nil, fmt.Errorf("seal agent keys: %w", err)
	}
	raw, err := json.Marshal(keysJSON{Version: keysVersion, TPM: sealed})
	if err != nil {
		return nil, fmt.Errorf("marshal agent keys: %w", err)
	}
	if err := writeFile(path, raw); err != nil {
		return nil, fmt.Errorf("write agent keys: %w", err)
	}
	return k, nil
}

// tpmKey is a key that lives in the TPM.
type tpmKey struct {
	tpm    *TPM
	blob   *blob
	public *ecdsa.PublicKey
}

func (t *TPM) newKey() (*tpmKey, error) {
	b, err := t.create(keyTemplate, nil, nil)
	if err != nil {
		return nil, err
	}
	return t.key(b)
}

// key is the key of a blob. Whether it is this TPM's shows when it signs.
func (t *TPM) key(b *blob) (*tpmKey, error) {
	area, err := tpmchip.ReadPublic(b.Public)
	if err != nil {
		return nil, fmt.Errorf("read key of TPM: %w", err)
	}
	public, err := tpmchip.PublicKey(area)
	if err != nil {
		return nil, fmt.Errorf("read key of TPM: %w", err)
	}
	key, ok := public.(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("read key of TPM: it is not ECDSA")
	}
	return &tpmKey{t, b, key}, nil
}

// Public returns the public key.
func (k *tpmKey) Public() crypto.PublicKey { return k.public }

// Sign has the TPM sign a SHA-256.
func (k *tpmKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, errors.New("sign in TPM: the agent's key signs SHA-256 only")
	}
	var r, s []byte
	err := k.tpm.loaded(k.blob, func(dev *tpmchip.Device, key tpm2.AuthHandle) error {
		signed, err := tpm2.Sign{
			KeyHandle: key, Digest: tpm2.TPM2BDigest{Buffer: digest}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(dev)
		if err != nil {
			return err
		}
		ecc, err := signed.Signature.Signature.ECDSA()
		if err != nil {
			return err
		}
		r, s = ecc.SignatureR.Buffer, ecc.SignatureS.Buffer
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("sign in TPM: %w", err)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(r), new(big.Int).SetBytes(s)})
}
