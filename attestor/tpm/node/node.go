// Package node is the agent's side of tpm.
//
// Why it is so: the keys are made anew each time, out of the TPM's own seeds, which gives the same keys: so
// nothing is stored in the TPM and nothing beside it. The TPM is open only while it is used, for machines
// have one and others want it too.
package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/tpm"
	"github.com/assay-id/assay/attestor/tpmchip"
)

// Kind returns the agent's side of tpm.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{
		Type:   tpm.Type,
		Config: func() any { return &tpm.AgentConfig{Path: "/dev/tpmrm0", EK: "rsa"} },
		Open:   open,
	}
}

type node struct {
	config      tpm.AgentConfig
	ek          tpmchip.EndorsementKey
	trustDomain string
}

func open(config any, needs attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*tpm.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("tpm configuration is a %T", config)
	}
	n := &node{config: *c, trustDomain: needs.TrustDomain.Name()}
	switch c.EK {
	case "rsa":
		n.ek = tpmchip.RSAEK
	case "ecc":
		n.ek = tpmchip.ECCEK
	default:
		return nil, fmt.Errorf("endorsement_key: %q is neither \"rsa\" nor \"ecc\"", c.EK)
	}
	return n, nil
}

// akTemplate is the attestation key: one that the TPM made, that never leaves it, and that signs nothing
// but what the TPM itself has said.
var akTemplate = tpm2.TPMTPublic{
	Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, Restricted: true, SignEncrypt: true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Scheme:  tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
		CurveID: tpm2.TPMECCNistP256,
	}),
}

// keys are both keys, loaded.
type keys struct {
	dev   *tpmchip.Device
	ek    tpm2.NamedHandle
	ekPub []byte
	done  func() // lets go of ek; nil: there is none
	ak    *tpm2.CreatePrimaryResponse
}

// load opens the TPM and makes the keys; close must be called.
func (n *node) load(ctx context.Context) (*keys, error) {
	dev, err := tpmchip.Open(ctx, n.config.Path)
	if err != nil {
		return nil, err
	}
	k := &keys{dev: dev}
	if k.ek, k.ekPub, k.done, err = n.ek.Load(dev, n.config.EndorsementPassword); err == nil {
		k.ak, err = tpm2.CreatePrimary{
			PrimaryHandle: tpmchip.Hierarchy(tpm2.TPMRHEndorsement, n.config.EndorsementPassword), InPublic: tpm2.New2B(akTemplate),
		}.Execute(dev)
	}
	if err != nil {
		k.close()
		return nil, fmt.Errorf("make keys in TPM: %w", err)
	}
	return k, nil
}

func (k *keys) close() {
	if k.done != nil {
		k.done()
	}
	if k.ak != nil {
		tpmchip.Flush(k.dev, k.ak.ObjectHandle)
	}
	_ = k.dev.Close()
}

// Evidence shows both public keys, and the certificate if there is one, for no key of the agent's.
func (n *node) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	return n.EvidenceFor(ctx, attestor.KeyHash{})
}

// EvidenceFor shows them for the agent's own key.
func (n *node) EvidenceFor(ctx context.Context, own attestor.KeyHash) ([]byte, attestor.Ask, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	k, err := n.load(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer k.close()
	payload, err := json.Marshal(tpm.Evidence{EK: k.ekPub, AK: k.ak.OutPublic.Bytes(), EKCert: tpmchip.ReadCertificate(k.dev, n.ek.Certificate)})
	if err != nil {
		return nil, nil, err
	}
	return payload, func(ctx context.Context, challenge []byte) ([]byte, error) { return n.answer(ctx, own, challenge) }, nil
}

// answer recovers the secret and quotes.
func (n *node) answer(ctx context.Context, own attestor.KeyHash, challenge []byte) ([]byte, error) {
	var c tpm.Challenge
	if len(challenge) > attestor.MaxEvidence {
		return nil, errors.New("challenge is too large")
	}
	if err := attestor.Decode(challenge, &c); err != nil {
		return nil, fmt.Errorf("read challenge: %w", err)
	}
	if len(c.Nonce) != tpm.NonceSize || len(c.Credential) == 0 || len(c.Secret) == 0 {
		return nil, errors.New("read challenge: it has no nonce or no credential")
	}
	if err := tpmchip.CheckPCRs(c.PCRs); err != nil {
		return nil, fmt.Errorf("read challenge: %w", err)
	}
	k, err := n.load(ctx)
	if err != nil {
		return nil, err
	}
	defer k.close()
	secret, err := tpmchip.Activate(k.dev, k.ek, tpm2.NamedHandle{Handle: k.ak.ObjectHandle, Name: k.ak.Name}, nil, n.config.EndorsementPassword, c.Credential, c.Secret)
	if err != nil {
		return nil, err
	}
	response := tpm.Response{Secret: secret}
	// The quote covers a digest; the values beside it are read until both agree, as a register may be
	// extended in between.
	for range 3 {
		if response.Values, err = tpmchip.ReadPCRs(k.dev, c.PCRs); err != nil {
			return nil, err
		}
		before := response.Values
		quote, err := tpm2.Quote{
			SignHandle:     tpm2.AuthHandle{Handle: k.ak.ObjectHandle, Name: k.ak.Name, Auth: tpm2.PasswordAuth(nil)},
			QualifyingData: tpm2.TPM2BData{Buffer: tpm.QualifyingData(c.Nonce, n.trustDomain, own)},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			PCRSelect:      tpmchip.Selection(c.PCRs),
		}.Execute(k.dev)
		if err != nil {
			return nil, fmt.Errorf("quote: %w", err)
		}
		response.Quote, response.Signature = quote.Quoted.Bytes(), tpm2.Marshal(quote.Signature)
		if response.Values, err = tpmchip.ReadPCRs(k.dev, c.PCRs); err != nil {
			return nil, err
		}
		if same(before, response.Values) {
			return json.Marshal(response) //nolint:gosec // the secret is the server's own, which it gets back
		}
	}
	return nil, errors.New("quote: the registers change faster than they can be read")
}

func same(a, b [][]byte) bool { return slices.EqualFunc(a, b, bytes.Equal) }
