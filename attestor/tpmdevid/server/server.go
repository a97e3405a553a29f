// Package server is the server's side of tpm_devid.
//
// Why it is so: four things must hang together, and each of the links is a place where parts of two machines
// could be mixed. The certificate is for the very key whose public area is shown; the attestation key says of
// that area, by its name, that it is in its TPM, and can say nothing that is not so, for it is restricted; the
// attestation key is in the TPM of the endorsement key, which alone recovers the secret; and a manufacturer
// has certified that one. Last, the DevID signs, so it is not merely lying there.
package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/tpmchip"
	"github.com/assay-id/assay/attestor/tpmdevid"
)

const (
	// maxNames bounds the alternative names of a certificate, maxComparisons the work on name constraints.
	maxNames, maxComparisons = 256, 50_000
	// maxSignature is the largest signature by a DevID in bytes.
	maxSignature = 1 << 10
)

// Kind returns the server's side of tpm_devid.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{Type: tpmdevid.Type, Config: func() any { return new(tpmdevid.ServerConfig) }, Open: open}
}

type judge struct {
	devIDs, makers *x509.CertPool
	now            func() time.Time
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*tpmdevid.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("tpm_devid configuration is a %T", config)
	}
	j := &judge{now: needs.Now}
	if j.now == nil {
		j.now = time.Now
	}
	var err error
	if j.devIDs, err = tpmchip.ReadRoots(c.DevIDCAPath); err != nil {
		return nil, fmt.Errorf("devid_ca_path: %w", err)
	}
	if j.makers, err = tpmchip.ReadRoots(c.EndorsementCAPath); err != nil {
		return nil, fmt.Errorf("endorsement_ca_path: %w", err)
	}
	return j, nil
}

// Judge verifies what is shown, challenges the TPM and the DevID's key, and describes the DevID.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	if len(payload) > attestor.MaxEvidence {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is too large")
	}
	var evidence tpmdevid.Evidence
	if err := attestor.Decode(payload, &evidence); err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	leaf, intermediates, err := readChain(evidence.DevIDCert)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read DevID: %w", err)
	}
	// Of the public areas first: these cost next to nothing, and signatures are for who has all of them.
	devID, err := readDevID(evidence.DevIDPub, leaf)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read DevID's key: %w", err)
	}
	ak, akKey, err := tpmchip.ReadAK(evidence.AKPub)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read attestation key: %w", err)
	}
	ek, hash, err := tpmchip.ReadEK(evidence.EKPub)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read endorsement key: %w", err)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: j.devIDs, Intermediates: intermediates, CurrentTime: j.now(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, MaxConstraintComparisions: maxComparisons,
	})
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("verify DevID: it is not by an accepted authority, or not valid now")
	}
	if _, err := tpmchip.Certified(evidence.EKCert, hash, j.makers, j.now()); err != nil {
		return attestor.Proof{}, attestor.Refusef("endorsement key is not accepted: %w", err)
	}
	if err := checkCertified(evidence, akKey, devID); err != nil {
		return attestor.Proof{}, attestor.Refusef("verify that the DevID's key is in the TPM: %w", err)
	}
	if err := challenge(ctx, leaf, ek, ak, ask); err != nil {
		return attestor.Proof{}, err
	}
	return attestor.Proof{
		Path:      tpmdevid.Type + "/" + tpmchip.Fingerprint(leaf),
		Selectors: selectors(leaf, chains, hash), CanReattest: true,
	}, nil
}

// readChain reads the certificates and refuses what would be costly to verify.
func readChain(ders [][]byte) (*x509.Certificate, *x509.CertPool, error) {
	switch n := len(ders); {
	case n == 0:
		return nil, nil, errors.New("no certificate")
	case n > 1+tpmdevid.MaxIntermediates:
		return nil, nil, fmt.Errorf("%d intermediate certificates, the limit is %d", n-1, tpmdevid.MaxIntermediates)
	}
	var leaf *x509.Certificate
	intermediates := x509.NewCertPool()
	for i, der := range ders {
		if len(der) > tpmdevid.MaxCertificate {
			return nil, nil, fmt.Errorf("certificate %d has %d bytes, the limit is %d", i+1, len(der), tpmdevid.MaxCertificate)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, fmt.Errorf("certificate %d cannot be read", i+1)
		}
		if len(cert.DNSNames)+len(cert.EmailAddresses)+len(cert.IPAddresses)+len(cert.URIs) > maxNames {
			return nil, nil, fmt.Errorf("certificate %d has more than %d alternative names", i+1, maxNames)
		}
		switch key := cert.PublicKey.(type) {
		case *rsa.PublicKey:
			if bits := key.N.BitLen(); bits < 2048 || bits > 8192 {
				return nil, nil, fmt.Errorf("certificate %d: RSA key of %d bits", i+1, bits)
			}
		case *ecdsa.PublicKey:
			if key.Curve.Params().BitSize < 256 {
				return nil, nil, fmt.Errorf("certificate %d: ECDSA key is too short", i+1)
			}
		default:
			return nil, nil, fmt.Errorf("certificate %d: key is neither RSA nor ECDSA", i+1)
		}
		if i == 0 {
			leaf = cert
			continue
		}
		intermediates.AddCert(cert)
	}
	switch {
	case leaf.IsCA:
		return nil, nil, errors.New("certificate is an authority's")
	case leaf.KeyUsage != 0 && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return nil, nil, errors.New("certificate is not for digital signatures")
	}
	return leaf, intermediates, nil
}

// readDevID reads the public area of the DevID's key, which must be the certificate's, and returns its name.
func readDevID(raw []byte, leaf *x509.Certificate) ([]byte, error) {
	public, err := tpmchip.ReadPublic(raw)
	if err != nil {
		return nil, err
	}
	a := public.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.SignEncrypt || a.Decrypt {
		return nil, errors.New("it must be made in its TPM, fixed there, and sign only")
	}
	key, err := tpmchip.PublicKey(public)
	if err != nil {
		return nil, err
	}
	if same, ok := key.(interface{ Equal(crypto.PublicKey) bool }); !ok || !same.Equal(leaf.PublicKey) {
		return nil, errors.New("the certificate is for another key")
	}
	if public.NameAlg != tpm2.TPMAlgSHA256 {
		return nil, errors.New("its name is not made with SHA-256")
	}
	name, err := tpm2.ObjectName(public)
	if err != nil {
		return nil, errors.New("it has no name")
	}
	return name.Buffer, nil
}

// checkCertified verifies what the attestation key says of the DevID's.
func checkCertified(e tpmdevid.Evidence, ak crypto.PublicKey, devID []byte) error {
	if len(e.CertifiedDevID) > tpmchip.MaxPublic {
		return errors.New("what is signed is too large")
	}
	if err := tpmchip.Verify(ak, e.CertifiedDevID, e.CertificationSignature); err != nil {
		return err
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.CertifiedDevID)
	if err != nil || attest.Magic != tpm2.TPMGeneratedValue || attest.Type != tpm2.TPMSTAttestCertify {
		return errors.New("what is signed certifies no key")
	}
	certify, err := attest.Attested.Certify()
	if err != nil {
		return errors.New("what is signed certifies no key")
	}
	if !bytes.Equal(certify.Name.Buffer, devID) {
		return errors.New("what is signed certifies another key")
	}
	return nil
}

// challenge proves both keys to be at hand.
func challenge(ctx context.Context, leaf *x509.Certificate, ek tpm2.LabeledEncapsulationKey, ak []byte, ask attestor.Ask) error {
	secret, nonce := make([]byte, tpmdevid.SecretSize), make([]byte, tpmdevid.NonceSize)
	_, _ = rand.Read(secret)
	_, _ = rand.Read(nonce)
	credential, encrypted, err := tpm2.CreateCredential(rand.Reader, ek, ak, secret)
	if err != nil {
		return attestor.Refusef("encrypt to endorsement key: it cannot be used")
	}
	question := tpmdevid.Challenge{DevID: nonce, CredActivation: &tpmdevid.Credential{Credential: credential, Secret: encrypted}}
	var response tpmdevid.Response
	if err := attestor.Challenge(ctx, ask, question, &response); err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(response.CredActivation, secret) != 1 {
		return attestor.Refusef("verify answer: the attestation key is not in the TPM of the endorsement key")
	}
	if !signedBy(leaf, nonce, response.DevID) {
		return attestor.Refusef("verify answer: the DevID's signature is wrong")
	}
	return nil
}

// signedBy verifies the DevID's signature, as SPIRE's agents make it.
func signedBy(leaf *x509.Certificate, nonce, signature []byte) bool {
	if len(signature) == 0 || len(signature) > maxSignature {
		return false
	}
	digest := sha256.Sum256(nonce)
	switch key := leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], signature) == nil
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, digest[:], signature)
	}
	return false
}

// selectors describes the DevID.
func selectors(leaf *x509.Certificate, chains [][]*x509.Certificate, hash string) []attestor.Selector {
	values := []string{"ek:" + hash}
	if cn := leaf.Subject.CommonName; cn != "" {
		values = append(values, "subject:cn:"+cn)
	}
	if cn := leaf.Issuer.CommonName; cn != "" {
		values = append(values, "issuer:cn:"+cn)
	}
	for _, chain := range chains {
		for _, authority := range chain[1:] {
			values = append(values, "ca:fingerprint:"+tpmchip.Fingerprint(authority))
		}
	}
	var found []attestor.Selector
	for _, value := range values {
		if s := (attestor.Selector{Type: tpmdevid.Type, Value: value}); s.Check() == nil {
			found = append(found, s)
		}
	}
	return attestor.NewSet(found...).All()
}
