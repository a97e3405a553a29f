// Package node is the agent's side of tpm.
//
// Why it is so: the keys are made anew each time, out of the TPM's own seeds, which gives the same keys: so
// nothing is stored in the TPM and nothing beside it. The TPM is open only while it is used, for machines
// have one and others want it too.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/tpm"
)

const (
	// maxCertificate is the largest endorsement key certificate in bytes, piece how much is read at once.
	maxCertificate, piece = 8 << 10, 512
	// rsaCertificate and eccCertificate are where manufacturers store the certificates of their RSA-2048
	// and P-256 endorsement keys (TCG EK Credential Profile, section 2.2.1.4).
	rsaCertificate, eccCertificate = tpm2.TPMHandle(0x01c00002), tpm2.TPMHandle(0x01c0000a)
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
	template    tpm2.TPMTPublic
	certificate tpm2.TPMHandle
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
		n.template, n.certificate = tpm2.RSAEKTemplate, rsaCertificate
	case "ecc":
		n.template, n.certificate = tpm2.ECCEKTemplate, eccCertificate
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
	dev    *device
	ek, ak *tpm2.CreatePrimaryResponse
}

func (n *node) endorsement() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth([]byte(n.config.EndorsementPassword))}
}

// load opens the TPM and makes the keys; close must be called.
func (n *node) load(ctx context.Context) (*keys, error) {
	dev, err := openDevice(ctx, n.config.Path)
	if err != nil {
		return nil, err
	}
	k := &keys{dev: dev}
	make := func(template tpm2.TPMTPublic) (*tpm2.CreatePrimaryResponse, error) {
		return tpm2.CreatePrimary{PrimaryHandle: n.endorsement(), InPublic: tpm2.New2B(template)}.Execute(dev)
	}
	if k.ek, err = make(n.template); err == nil {
		k.ak, err = make(akTemplate)
	}
	if err != nil {
		k.close()
		return nil, fmt.Errorf("make keys in TPM: %w", err)
	}
	return k, nil
}

func (k *keys) close() {
	for _, key := range []*tpm2.CreatePrimaryResponse{k.ek, k.ak} {
		if key != nil {
			_, _ = tpm2.FlushContext{FlushHandle: key.ObjectHandle}.Execute(k.dev) // without it the TPM is full soon
		}
	}
	_ = k.dev.Close()
}

// Evidence shows both public keys, and the certificate if there is one.
func (n *node) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	k, err := n.load(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer k.close()
	ek, err := k.ek.OutPublic.Contents()
	if err != nil {
		return nil, nil, fmt.Errorf("read endorsement key: %w", err)
	}
	ak, err := k.ak.OutPublic.Contents()
	if err != nil {
		return nil, nil, fmt.Errorf("read attestation key: %w", err)
	}
	payload, err := json.Marshal(tpm.Evidence{EK: tpm2.Marshal(ek), AK: tpm2.Marshal(ak), EKCert: readCertificate(k.dev, n.certificate)})
	if err != nil {
		return nil, nil, err
	}
	return payload, n.answer, nil
}

// readCertificate reads the certificate at an index, nil if there is none.
func readCertificate(dev *device, index tpm2.TPMHandle) []byte {
	public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(dev)
	if err != nil {
		return nil
	}
	area, err := public.NVPublic.Contents()
	if err != nil || int(area.DataSize) > maxCertificate {
		return nil
	}
	var der []byte
	for len(der) < int(area.DataSize) {
		read, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: public.NVName, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: public.NVName},
			Size:       uint16(min(piece, int(area.DataSize)-len(der))), //nolint:gosec // within maxCertificate
			Offset:     uint16(len(der)),                                //nolint:gosec // likewise
		}.Execute(dev)
		if err != nil || len(read.Data.Buffer) == 0 {
			return nil
		}
		der = append(der, read.Data.Buffer...)
	}
	return der
}

// answer recovers the secret and quotes.
func (n *node) answer(ctx context.Context, challenge []byte) ([]byte, error) {
	var c tpm.Challenge
	if len(challenge) > attestor.MaxEvidence {
		return nil, errors.New("challenge is too large")
	}
	if err := tpm.Decode(challenge, &c); err != nil {
		return nil, fmt.Errorf("read challenge: %w", err)
	}
	if len(c.Nonce) != tpm.NonceSize || len(c.Credential) == 0 || len(c.Secret) == 0 {
		return nil, errors.New("read challenge: it has no nonce or no credential")
	}
	if err := tpm.CheckPCRs(c.PCRs); err != nil {
		return nil, fmt.Errorf("read challenge: %w", err)
	}
	k, err := n.load(ctx)
	if err != nil {
		return nil, err
	}
	defer k.close()
	activated, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.NamedHandle{Handle: k.ak.ObjectHandle, Name: k.ak.Name},
		KeyHandle: tpm2.AuthHandle{
			Handle: k.ek.ObjectHandle, Name: k.ek.Name,
			Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t tpmTransport, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
				_, err := tpm2.PolicySecret{AuthHandle: n.endorsement(), PolicySession: session, NonceTPM: nonce}.Execute(t)
				return err
			}),
		},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: c.Credential},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: c.Secret},
	}.Execute(k.dev)
	if err != nil {
		return nil, fmt.Errorf("activate credential: %w", err)
	}
	response := tpm.Response{Secret: activated.CertInfo.Buffer}
	// The quote covers a digest; the values beside it are read until both agree, as a register may be
	// extended in between.
	for range 3 {
		if response.Values, err = readPCRs(k.dev, c.PCRs); err != nil {
			return nil, err
		}
		before := response.Values
		quote, err := tpm2.Quote{
			SignHandle:     tpm2.AuthHandle{Handle: k.ak.ObjectHandle, Name: k.ak.Name, Auth: tpm2.PasswordAuth(nil)},
			QualifyingData: tpm2.TPM2BData{Buffer: tpm.QualifyingData(c.Nonce, n.trustDomain)},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			PCRSelect:      selection(c.PCRs),
		}.Execute(k.dev)
		if err != nil {
			return nil, fmt.Errorf("quote: %w", err)
		}
		response.Quote, response.Signature = quote.Quoted.Bytes(), tpm2.Marshal(quote.Signature)
		if response.Values, err = readPCRs(k.dev, c.PCRs); err != nil {
			return nil, err
		}
		if same(before, response.Values) {
			return json.Marshal(response) //nolint:gosec // the secret is the server's own, which it gets back
		}
	}
	return nil, errors.New("quote: the registers change faster than they can be read")
}
