// Package server is the server's side of tpm: is this endorsement key one of ours, does the attestation
// key live in the same TPM, and what are its registers?
//
// Why it is so: an endorsement key cannot sign. So the server encrypts a secret to it together with the
// name of the attestation key, and a TPM decrypts that only if it holds both. The name covers the key's
// attributes; they are checked, for a key that was made elsewhere, or that signs anything it is given,
// would make the quote worthless.
package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/tpm"
	"github.com/assay-id/assay/attestor/tpmchip"
)

// hashForm is what the hash of an endorsement key looks like.
var hashForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Kind returns the server's side of tpm.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{Type: tpm.Type, Config: func() any { return new(tpm.ServerConfig) }, Open: open}
}

type judge struct {
	hashes      map[string]bool
	roots       *x509.CertPool // nil: no certificate is accepted
	pcrs        []int
	trustDomain string
	now         func() time.Time
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*tpm.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("tpm configuration is a %T", config)
	}
	j := &judge{hashes: map[string]bool{}, pcrs: c.PCRs, trustDomain: needs.TrustDomain.Name(), now: needs.Now}
	if j.now == nil {
		j.now = time.Now
	}
	if len(c.EKHashes) == 0 && c.EKCAPath == "" {
		return nil, errors.New("ek_hashes or ek_ca_path must be set: which TPMs are accepted")
	}
	for _, hash := range c.EKHashes {
		hash = strings.ToLower(hash)
		if !hashForm.MatchString(hash) {
			return nil, fmt.Errorf("ek_hashes: %q is no SHA-256 in hex", hash)
		}
		j.hashes[hash] = true
	}
	if err := tpmchip.CheckPCRs(c.PCRs); err != nil {
		return nil, fmt.Errorf("pcrs: %w", err)
	}
	if c.EKCAPath != "" {
		var err error
		if j.roots, err = tpmchip.ReadRoots(c.EKCAPath); err != nil {
			return nil, fmt.Errorf("ek_ca_path: %w", err)
		}
	}
	return j, nil
}

// Judge believes evidence that is for no key of the agent's.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	return j.JudgeFor(ctx, payload, attestor.KeyHash{}, ask)
}

// JudgeFor knows the endorsement key, challenges the TPM and describes it.
func (j *judge) JudgeFor(ctx context.Context, payload []byte, own attestor.KeyHash, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	if len(payload) > attestor.MaxEvidence {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is too large")
	}
	var evidence tpm.Evidence
	if err := attestor.Decode(payload, &evidence); err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	ek, hash, err := tpmchip.ReadEK(evidence.EK)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read endorsement key: %w", err)
	}
	ak, key, err := tpmchip.ReadAK(evidence.AK)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read attestation key: %w", err)
	}
	values := []string{"ek:" + hash}
	if !j.hashes[hash] {
		authorities, err := j.certified(evidence.EKCert, hash)
		if err != nil {
			return attestor.Proof{}, attestor.Refusef("endorsement key is not accepted: %w", err)
		}
		for _, fingerprint := range authorities {
			values = append(values, "ca:fingerprint:"+fingerprint)
		}
	}
	registers, err := j.challenge(ctx, ek, ak, key, own, ask)
	if err != nil {
		return attestor.Proof{}, err
	}
	for i, n := range j.pcrs {
		values = append(values, fmt.Sprintf("pcr:sha256:%d:%s", n, hex.EncodeToString(registers[i])))
	}
	var found []attestor.Selector
	for _, value := range values {
		if s := (attestor.Selector{Type: tpm.Type, Value: value}); s.Check() == nil {
			found = append(found, s)
		}
	}
	return attestor.Proof{Path: tpm.Type + "/" + hash, Selectors: attestor.NewSet(found...).All(), CanReattest: true}, nil
}

// certified returns the authorities of an endorsement key that is not listed.
func (j *judge) certified(der []byte, hash string) ([]string, error) {
	switch {
	case j.roots == nil:
		return nil, fmt.Errorf("its hash %s is not one of the server's ek_hashes", hash)
	case len(der) == 0:
		return nil, fmt.Errorf("it has no certificate, and its hash %s is not one of the server's ek_hashes", hash)
	}
	return tpmchip.Certified(der, hash, j.roots, j.now())
}

// challenge proves the keys to be in one TPM and returns its registers.
func (j *judge) challenge(ctx context.Context, ek tpm2.LabeledEncapsulationKey, name []byte, ak crypto.PublicKey, own attestor.KeyHash, ask attestor.Ask) ([][]byte, error) {
	secret, nonce := make([]byte, tpm.SecretSize), make([]byte, tpm.NonceSize)
	_, _ = rand.Read(secret)
	_, _ = rand.Read(nonce)
	credential, encrypted, err := tpm2.CreateCredential(rand.Reader, ek, name, secret)
	if err != nil {
		return nil, attestor.Refusef("encrypt to endorsement key: it cannot be used")
	}
	question := tpm.Challenge{Credential: credential, Secret: encrypted, Nonce: nonce, PCRs: j.pcrs}
	var response tpm.Response
	if err := attestor.Challenge(ctx, ask, question, &response); err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(response.Secret, secret) != 1 {
		return nil, attestor.Refusef("verify answer: the attestation key is not in the TPM of the endorsement key")
	}
	if err := j.checkQuote(response, nonce, ak, own); err != nil {
		return nil, attestor.Refusef("verify quote: %w", err)
	}
	return response.Values, nil
}

func (j *judge) checkQuote(r tpm.Response, nonce []byte, ak crypto.PublicKey, own attestor.KeyHash) error {
	if len(r.Quote) > tpmchip.MaxPublic || len(r.Values) != len(j.pcrs) {
		return errors.New("it is not of the registers that were asked for")
	}
	if err := tpmchip.Verify(ak, r.Quote, r.Signature); err != nil {
		return err
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](r.Quote)
	if err != nil || attest.Magic != tpm2.TPMGeneratedValue || attest.Type != tpm2.TPMSTAttestQuote {
		return errors.New("what is signed is no quote")
	}
	if subtle.ConstantTimeCompare(attest.ExtraData.Buffer, tpm.QualifyingData(nonce, j.trustDomain, own)) != 1 {
		return errors.New("it was made for another question")
	}
	quote, err := attest.Attested.Quote()
	if err != nil {
		return errors.New("what is signed is no quote")
	}
	if !bytes.Equal(tpm2.Marshal(quote.PCRSelect), tpm2.Marshal(tpmchip.Selection(j.pcrs))) {
		return errors.New("it is not of the registers that were asked for")
	}
	all := sha256.New()
	for _, value := range r.Values {
		if len(value) != tpm.DigestSize {
			return errors.New("a register is not of the SHA-256 bank")
		}
		all.Write(value)
	}
	if !bytes.Equal(all.Sum(nil), quote.PCRDigest.Buffer) {
		return errors.New("the registers are not those that were quoted")
	}
	return nil
}
