// Package node is the agent's side of tpm_devid.
//
// Why it is so: the attestation key is made anew each time out of the TPM's own seeds, which gives the same
// key, so that nothing of it is stored; the DevID's is loaded from its files. The TPM is open only while it is
// used, and has room for three keys, so the parent of the DevID's leaves at once.
package node

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync/atomic"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/tpmchip"
	"github.com/assay-id/assay/attestor/tpmdevid"
)

// maxFile is the largest file, in bytes, that is read.
const maxFile = 64 << 10

// Kind returns the agent's side of tpm_devid.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{Type: tpmdevid.Type, Config: func() any { return new(tpmdevid.AgentConfig) }, Open: open}
}

type node struct {
	config tpmdevid.AgentConfig
	// refused is the DevID's key whose password the TPM did not take. A TPM counts such tries and then, for hours, lets
	// nobody have what a password is for, the disk's key perhaps; and the agent tries for as long as it runs.
	refused atomic.Pointer[devID]
}

// open reads the files once, so that what is wrong with them is said at start. The TPM is another matter: it
// may be busy.
func open(config any, _ attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*tpmdevid.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("tpm_devid configuration is a %T", config)
	}
	n := &node{config: *c}
	if n.config.DevicePath == "" {
		path, err := tpmchip.Find("/dev")
		if err != nil {
			return nil, fmt.Errorf("%w (set tpm_device_path)", err)
		}
		n.config.DevicePath = path
	}
	if _, err := n.read(); err != nil {
		return nil, err
	}
	return n, nil
}

// devID is what the files hold.
type devID struct {
	chain   [][]byte
	public  *tpm2.TPMTPublic
	private []byte
}

func (n *node) read() (*devID, error) {
	d := &devID{}
	text, err := attestor.ReadFile(n.config.CertPath, maxFile)
	if err != nil {
		return nil, fmt.Errorf("read devid_cert_path: %w", err)
	}
	var leaf *x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("read devid_cert_path: %s: certificate %d: %w", n.config.CertPath, len(d.chain)+1, err)
		}
		if leaf == nil {
			leaf = cert
		}
		d.chain = append(d.chain, block.Bytes)
	}
	if leaf == nil {
		return nil, fmt.Errorf("read devid_cert_path: %s: no PEM certificate in it", n.config.CertPath)
	}
	public, err := attestor.ReadFile(n.config.PubPath, maxFile)
	if err != nil {
		return nil, fmt.Errorf("read devid_pub_path: %w", err)
	}
	if d.public, err = tpmchip.ReadPublic(sized(public)); err != nil {
		return nil, fmt.Errorf("read devid_pub_path: %s: %w", n.config.PubPath, err)
	}
	key, err := tpmchip.PublicKey(d.public)
	if err != nil {
		return nil, fmt.Errorf("read devid_pub_path: %s: %w", n.config.PubPath, err)
	}
	if err := signs(d.public); err != nil {
		return nil, fmt.Errorf("read devid_pub_path: %s: %w", n.config.PubPath, err)
	}
	here, err := tpmchip.KeyHash(key)
	if err != nil {
		return nil, err
	}
	if there, err := tpmchip.KeyHash(leaf.PublicKey); err != nil || there != here {
		return nil, fmt.Errorf("devid_pub_path %s does not belong to the certificate %s", n.config.PubPath, n.config.CertPath)
	}
	private, err := attestor.ReadFile(n.config.PrivPath, maxFile)
	if err != nil {
		return nil, fmt.Errorf("read devid_priv_path: %w", err)
	}
	if len(private) == 0 {
		return nil, fmt.Errorf("read devid_priv_path: %s: it is empty", n.config.PrivPath)
	}
	d.private = sized(private)
	return d, nil
}

// sized cuts off the size that tpm2_create writes in front of a structure.
func sized(raw []byte) []byte {
	if len(raw) > 2 && int(raw[0])<<8|int(raw[1]) == len(raw)-2 {
		return raw[2:]
	}
	return raw
}

// signs says why a key does not sign as servers expect it, or nil: by itself, with SHA-256.
func signs(public *tpm2.TPMTPublic) error {
	if !public.ObjectAttributes.SignEncrypt {
		return errors.New("the key does not sign")
	}
	switch public.Type {
	case tpm2.TPMAlgRSA:
		parms, err := public.Parameters.RSADetail()
		if err == nil && parms.Scheme.Scheme == tpm2.TPMAlgRSASSA {
			if scheme, err := parms.Scheme.Details.RSASSA(); err == nil && scheme.HashAlg == tpm2.TPMAlgSHA256 {
				return nil
			}
		}
	case tpm2.TPMAlgECC:
		parms, err := public.Parameters.ECCDetail()
		if err == nil && parms.Scheme.Scheme == tpm2.TPMAlgECDSA {
			if scheme, err := parms.Scheme.Details.ECDSA(); err == nil && scheme.HashAlg == tpm2.TPMAlgSHA256 {
				return nil
			}
		}
	}
	return errors.New("the key is not made for RSASSA or ECDSA with SHA-256")
}

// akTemplate is the attestation key: one that the TPM made, that never leaves it, and that signs nothing but
// what the TPM itself has said. It is RSA, for SPIRE's servers know no other.
var akTemplate = tpm2.TPMTPublic{
	Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, Restricted: true, SignEncrypt: true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
		Scheme:  tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgRSASSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256})},
		KeyBits: 2048,
	}),
}

// keys are the three keys, loaded.
type keys struct {
	dev           *tpmchip.Device
	devID, ak, ek tpm2.NamedHandle
	akPub, ekPub  []byte
	done          []func() // let go of them, from the last to the first
}

func (k *keys) close() {
	for _, done := range slices.Backward(k.done) {
		done()
	}
	_ = k.dev.Close()
}

func (k *keys) hold(handle tpm2.TPMHandle, name tpm2.TPM2BName) tpm2.NamedHandle {
	k.done = append(k.done, func() { tpmchip.Flush(k.dev, handle) })
	return tpm2.NamedHandle{Handle: handle, Name: name}
}

// load opens the TPM and loads or makes the keys; close must be called.
func (n *node) load(ctx context.Context, d *devID) (*keys, error) {
	dev, err := tpmchip.Open(ctx, n.config.DevicePath)
	if err != nil {
		return nil, err
	}
	k := &keys{dev: dev}
	if err := n.fill(k, d); err != nil {
		k.close()
		return nil, err
	}
	return k, nil
}

func (n *node) fill(k *keys, d *devID) error {
	parent, err := tpm2.CreatePrimary{
		PrimaryHandle: tpmchip.Hierarchy(tpm2.TPMRHOwner, n.config.OwnerPassword), InPublic: tpm2.New2B(tpmchip.StorageRoot(d.public.Type)),
	}.Execute(k.dev)
	if err != nil {
		return fmt.Errorf("make storage root key in TPM: %w", err)
	}
	loaded, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: parent.ObjectHandle, Name: parent.Name, Auth: tpm2.PasswordAuth(nil)},
		InPrivate:    tpm2.TPM2BPrivate{Buffer: d.private}, InPublic: tpm2.New2B(*d.public),
	}.Execute(k.dev)
	tpmchip.Flush(k.dev, parent.ObjectHandle) // a TPM has room for three keys
	if err != nil {
		return fmt.Errorf("load the DevID's key into the TPM (is it this TPM's?): %w", err)
	}
	k.devID = k.hold(loaded.ObjectHandle, loaded.Name)
	ak, err := tpm2.CreatePrimary{
		PrimaryHandle: tpmchip.Hierarchy(tpm2.TPMRHEndorsement, n.config.EndorsementPassword), InPublic: tpm2.New2B(akTemplate),
	}.Execute(k.dev)
	if err != nil {
		return fmt.Errorf("make attestation key in TPM: %w", err)
	}
	k.ak, k.akPub = k.hold(ak.ObjectHandle, ak.Name), ak.OutPublic.Bytes()
	var done func()
	if k.ek, k.ekPub, done, err = tpmchip.RSAEK.Load(k.dev, n.config.EndorsementPassword); err != nil {
		return err
	}
	k.done = append(k.done, done)
	return nil
}

// persistent is the first byte of the handles of keys that stay in the TPM.
const persistent = 0x81

// saved are the keys as the TPM gives them out for a while, encrypted: making RSA keys a second time takes
// hardware many seconds, which the server may not wait. Nil stands for one that stays.
type saved []*tpm2.TPMSContext

func (k *keys) save() saved {
	var all saved
	for _, key := range []tpm2.NamedHandle{k.devID, k.ak, k.ek} {
		if key.Handle>>24 == persistent {
			all = append(all, nil)
			continue
		}
		one, err := tpm2.ContextSave{SaveHandle: key.Handle}.Execute(k.dev)
		if err != nil {
			return nil
		}
		all = append(all, &one.Context)
	}
	return all
}

// again loads keys that were saved, or else makes them.
func (n *node) again(ctx context.Context, d *devID, was *keys, s saved) (*keys, error) {
	if s == nil {
		return n.load(ctx, d)
	}
	dev, err := tpmchip.Open(ctx, n.config.DevicePath)
	if err != nil {
		return nil, err
	}
	k := &keys{dev: dev}
	for i, key := range []*tpm2.NamedHandle{&k.devID, &k.ak, &k.ek} {
		*key = []tpm2.NamedHandle{was.devID, was.ak, was.ek}[i]
		if s[i] == nil {
			continue
		}
		loaded, err := tpm2.ContextLoad{Context: *s[i]}.Execute(dev)
		if err != nil {
			k.close()
			return n.load(ctx, d)
		}
		*key = k.hold(loaded.LoadedHandle, key.Name)
	}
	return k, nil
}

func (n *node) devIDHandle(k *keys) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: k.devID.Handle, Name: k.devID.Name, Auth: tpm2.PasswordAuth([]byte(n.config.Password))}
}

// errRefused says what to do about a password that is wrong.
var errRefused = errors.New("the TPM refuses devid_password; it is not tried again before the agent is started anew, " +
	"for with some more such tries the TPM locks its passwords up")

// Evidence shows the DevID and what the TPM says of its key.
func (n *node) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	d, err := n.read()
	if err != nil {
		return nil, nil, err
	}
	if was := n.refused.Load(); was != nil && bytes.Equal(was.private, d.private) {
		return nil, nil, fmt.Errorf("use the DevID's key: %w", errRefused)
	}
	k, err := n.load(ctx, d)
	if err != nil {
		return nil, nil, err
	}
	defer k.close()
	certified, err := tpm2.Certify{
		ObjectHandle: n.devIDHandle(k),
		SignHandle:   tpm2.AuthHandle{Handle: k.ak.Handle, Name: k.ak.Name, Auth: tpm2.PasswordAuth(nil)},
		InScheme:     tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(k.dev)
	if errors.Is(err, tpm2.TPMRCAuthFail) {
		n.refused.Store(d)
		return nil, nil, fmt.Errorf("certify the DevID's key: %w: %w", errRefused, err)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("certify the DevID's key: %w", err)
	}
	cert := tpmchip.ReadCertificate(k.dev, tpmchip.RSAEK.Certificate)
	if cert == nil {
		return nil, nil, errors.New("the TPM has no certificate of its RSA endorsement key")
	}
	var outer asn1.RawValue
	if rest, err := asn1.Unmarshal(cert, &outer); err == nil {
		cert = cert[:len(cert)-len(rest)] // what follows is padding, which SPIRE's servers do not take
	}
	payload, err := json.Marshal(tpmdevid.Evidence{
		DevIDCert: d.chain, DevIDPub: tpm2.Marshal(*d.public), EKCert: cert,
		EKPub: k.ekPub, AKPub: k.akPub,
		CertifiedDevID: certified.CertifyInfo.Bytes(), CertificationSignature: tpm2.Marshal(certified.Signature),
	})
	if err != nil {
		return nil, nil, err
	}
	contexts := k.save()
	return payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
		return n.answer(challenge, func() (*keys, error) { return n.again(ctx, d, k, contexts) })
	}, nil
}

// answer signs the nonce and recovers the secret.
func (n *node) answer(message []byte, load func() (*keys, error)) ([]byte, error) {
	var challenge tpmdevid.Challenge
	if len(message) > attestor.MaxEvidence {
		return nil, errors.New("challenge is too large")
	}
	if err := attestor.Decode(message, &challenge); err != nil {
		return nil, fmt.Errorf("read challenge: %w", err)
	}
	// The length keeps the DevID from signing something else: it signs whatever the server sends.
	if len(challenge.DevID) != tpmdevid.NonceSize || challenge.CredActivation == nil {
		return nil, errors.New("read challenge: it has no nonce that is one, or no credential")
	}
	k, err := load()
	if err != nil {
		return nil, err
	}
	defer k.close()
	var response tpmdevid.Response
	if response.DevID, err = n.sign(k, challenge.DevID); err != nil {
		return nil, err
	}
	c := challenge.CredActivation
	if response.CredActivation, err = tpmchip.Activate(k.dev, k.ek, k.ak, nil, n.config.EndorsementPassword, c.Credential, c.Secret); err != nil {
		return nil, err
	}
	return json.Marshal(response)
}

// sign has the TPM hash and sign the nonce: so restricted keys sign it too.
func (n *node) sign(k *keys, nonce []byte) ([]byte, error) {
	hashed, err := tpm2.Hash{Data: tpm2.TPM2BMaxBuffer{Buffer: nonce}, HashAlg: tpm2.TPMAlgSHA256, Hierarchy: tpm2.TPMRHOwner}.Execute(k.dev)
	if err != nil {
		return nil, fmt.Errorf("hash nonce: %w", err)
	}
	signed, err := tpm2.Sign{
		KeyHandle: n.devIDHandle(k), Digest: hashed.OutHash, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, Validation: hashed.Validation,
	}.Execute(k.dev)
	if err != nil {
		return nil, fmt.Errorf("sign nonce: %w", err)
	}
	if ssa, err := signed.Signature.Signature.RSASSA(); err == nil {
		return ssa.Sig.Buffer, nil
	}
	ecc, err := signed.Signature.Signature.ECDSA()
	if err != nil {
		return nil, errors.New("sign nonce: the signature is neither RSASSA nor ECDSA")
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(ecc.SignatureR.Buffer), new(big.Int).SetBytes(ecc.SignatureS.Buffer)})
}
