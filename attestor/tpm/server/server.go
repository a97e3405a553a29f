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
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // an identifier, as openssl and SPIRE print it, not a signature
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/tpm"
)

const (
	// maxPublic is the largest public area in bytes, maxCertificate the largest certificate.
	maxPublic, maxCertificate = 1 << 10, 8 << 10
	// maxBundle is the largest file of authorities in bytes.
	maxBundle = 8 << 20
)

// hashForm is what the hash of an endorsement key looks like.
var hashForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// subjectAltName is an extension that endorsement certificates mark critical and that holds names of
// hardware, of which the standard library knows nothing.
var subjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

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
	if err := tpm.CheckPCRs(c.PCRs); err != nil {
		return nil, fmt.Errorf("pcrs: %w", err)
	}
	if c.EKCAPath != "" {
		var err error
		if j.roots, err = readRoots(c.EKCAPath); err != nil {
			return nil, fmt.Errorf("ek_ca_path: %w", err)
		}
	}
	return j, nil
}

func readRoots(path string) (*x509.CertPool, error) {
	stat, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if stat.Size() > maxBundle {
		return nil, fmt.Errorf("%s: larger than %d bytes", path, maxBundle)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	roots, found := x509.NewCertPool(), 0
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", path, found+1, err)
		}
		if !cert.IsCA {
			return nil, fmt.Errorf("%s: certificate %d (%s) is not an authority's", path, found+1, cert.Subject)
		}
		roots.AddCert(cert)
		found++
	}
	if found == 0 {
		return nil, fmt.Errorf("%s: no PEM certificate in it", path)
	}
	return roots, nil
}

// Judge knows the endorsement key, challenges the TPM and describes it.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	if len(payload) > attestor.MaxEvidence {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is too large")
	}
	var evidence tpm.Evidence
	if err := tpm.Decode(payload, &evidence); err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	ek, hash, err := readEK(evidence.EK)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read endorsement key: %w", err)
	}
	ak, key, err := readAK(evidence.AK)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read attestation key: %w", err)
	}
	values := []string{"ek:" + hash}
	if !j.hashes[hash] {
		authorities, err := j.certified(evidence.EKCert, hash)
		if err != nil {
			return attestor.Proof{}, attestor.Refusef("endorsement key is not accepted: %w", err)
		}
		values = append(values, authorities...)
	}
	registers, err := j.challenge(ctx, ek, ak, key, ask)
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

// readPublic reads a public area and nothing after it.
func readPublic(raw []byte) (*tpm2.TPMTPublic, error) {
	if len(raw) == 0 || len(raw) > maxPublic {
		return nil, fmt.Errorf("it has %d bytes", len(raw))
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](raw)
	if err != nil || !bytes.Equal(tpm2.Marshal(public), raw) {
		return nil, errors.New("it is no public area of a TPM")
	}
	return public, nil
}

func readEK(raw []byte) (tpm2.LabeledEncapsulationKey, string, error) {
	public, err := readPublic(raw)
	if err != nil {
		return nil, "", err
	}
	a := public.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.Restricted || !a.Decrypt || a.SignEncrypt {
		return nil, "", errors.New("it is no endorsement key: it must be fixed in its TPM, restricted, and decrypt only")
	}
	key, err := publicKey(public)
	if err != nil {
		return nil, "", err
	}
	hash, err := tpm.KeyHash(key)
	if err != nil {
		return nil, "", errors.New("it is no key")
	}
	encapsulation, err := tpm2.ImportEncapsulationKey(public)
	if err != nil {
		return nil, "", errors.New("it is of a kind that is not supported")
	}
	return encapsulation, hash, nil
}

// publicKey returns the key in a public area, of a size that is safe and bounded.
func publicKey(public *tpm2.TPMTPublic) (any, error) {
	switch public.Type {
	case tpm2.TPMAlgRSA:
		parms, err := public.Parameters.RSADetail()
		if err != nil {
			return nil, errors.New("it is no RSA key")
		}
		unique, err := public.Unique.RSA()
		if err != nil {
			return nil, errors.New("it is no RSA key")
		}
		key, err := tpm2.RSAPub(parms, unique)
		if err != nil || key.N.BitLen() < 2048 || key.N.BitLen() > 4096 || key.E < 65537 {
			return nil, errors.New("it is no RSA key of 2048 to 4096 bits")
		}
		return key, nil
	case tpm2.TPMAlgECC:
		parms, err := public.Parameters.ECCDetail()
		if err != nil {
			return nil, errors.New("it is no ECC key")
		}
		if parms.CurveID != tpm2.TPMECCNistP256 && parms.CurveID != tpm2.TPMECCNistP384 {
			return nil, errors.New("it is no ECC key on P-256 or P-384")
		}
		unique, err := public.Unique.ECC()
		if err != nil {
			return nil, errors.New("it is no ECC key")
		}
		key, err := tpm2.ECDSAPub(parms, unique)
		if err != nil {
			return nil, errors.New("it is no ECC key")
		}
		if _, err := key.ECDH(); err != nil {
			return nil, errors.New("it is no point on its curve")
		}
		return key, nil
	}
	return nil, errors.New("it is neither RSA nor ECC")
}

// readAK returns the name of the attestation key, which covers all of it, and the key.
func readAK(raw []byte) (name []byte, key *ecdsa.PublicKey, err error) {
	public, err := readPublic(raw)
	if err != nil {
		return nil, nil, err
	}
	a := public.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.Restricted || !a.SignEncrypt || a.Decrypt {
		return nil, nil, errors.New("it is no attestation key: it must be made in its TPM, fixed there, restricted, and sign only")
	}
	if public.NameAlg != tpm2.TPMAlgSHA256 {
		return nil, nil, errors.New("its name is not made with SHA-256")
	}
	found, err := publicKey(public)
	if err != nil {
		return nil, nil, err
	}
	key, ok := found.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, nil, errors.New("it is no ECDSA key on P-256")
	}
	named, err := tpm2.ObjectName(public)
	if err != nil {
		return nil, nil, errors.New("it has no name")
	}
	return named.Buffer, key, nil
}

// certified verifies the certificate of the endorsement key and describes its authorities.
func (j *judge) certified(der []byte, hash string) ([]string, error) {
	switch {
	case j.roots == nil:
		return nil, fmt.Errorf("its hash %s is not one of the server's ek_hashes", hash)
	case len(der) == 0:
		return nil, fmt.Errorf("it has no certificate, and its hash %s is not one of the server's ek_hashes", hash)
	case len(der) > maxCertificate:
		return nil, errors.New("its certificate is too large")
	}
	// The store of a TPM is larger than what is in it: what follows the certificate is padding.
	var outer asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &outer); err == nil {
		der = der[:len(der)-len(rest)]
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, errors.New("its certificate cannot be read")
	}
	switch cert.PublicKey.(type) {
	case *rsa.PublicKey, *ecdsa.PublicKey:
	default:
		return nil, errors.New("its certificate is for another kind of key")
	}
	if certified, err := tpm.KeyHash(cert.PublicKey); err != nil || certified != hash {
		return nil, errors.New("its certificate is for another key")
	}
	cert.UnhandledCriticalExtensions = slices.DeleteFunc(cert.UnhandledCriticalExtensions, subjectAltName.Equal)
	chains, err := cert.Verify(x509.VerifyOptions{Roots: j.roots, CurrentTime: j.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, errors.New("its certificate is not by an accepted authority, or not valid now")
	}
	var values []string
	for _, chain := range chains {
		for _, authority := range chain[1:] {
			sum := sha1.Sum(authority.Raw) //nolint:gosec // see the import
			values = append(values, "ca:fingerprint:"+hex.EncodeToString(sum[:]))
		}
	}
	return values, nil
}

// challenge proves the keys to be in one TPM and returns its registers.
func (j *judge) challenge(ctx context.Context, ek tpm2.LabeledEncapsulationKey, name []byte, ak *ecdsa.PublicKey, ask attestor.Ask) ([][]byte, error) {
	secret, nonce := make([]byte, tpm.SecretSize), make([]byte, tpm.NonceSize)
	_, _ = rand.Read(secret)
	_, _ = rand.Read(nonce)
	credential, encrypted, err := tpm2.CreateCredential(rand.Reader, ek, name, secret)
	if err != nil {
		return nil, attestor.Refusef("encrypt to endorsement key: it cannot be used")
	}
	question, err := json.Marshal(tpm.Challenge{Credential: credential, Secret: encrypted, Nonce: nonce, PCRs: j.pcrs}) //nolint:gosec // it is encrypted
	if err != nil {
		return nil, err
	}
	said, err := ask(ctx, question)
	if err != nil {
		return nil, fmt.Errorf("ask challenge: %w", err)
	}
	if len(said) > attestor.MaxEvidence {
		return nil, attestor.Refusef("read answer: it is too large")
	}
	var response tpm.Response
	if err := tpm.Decode(said, &response); err != nil {
		return nil, attestor.Refusef("read answer: %w", err)
	}
	if subtle.ConstantTimeCompare(response.Secret, secret) != 1 {
		return nil, attestor.Refusef("verify answer: the attestation key is not in the TPM of the endorsement key")
	}
	if err := j.checkQuote(response, nonce, ak); err != nil {
		return nil, attestor.Refusef("verify quote: %w", err)
	}
	return response.Values, nil
}

func (j *judge) checkQuote(r tpm.Response, nonce []byte, ak *ecdsa.PublicKey) error {
	if len(r.Quote) > maxPublic || len(r.Signature) > maxPublic || len(r.Values) != len(j.pcrs) {
		return errors.New("it is not of the registers that were asked for")
	}
	signature, err := tpm2.Unmarshal[tpm2.TPMTSignature](r.Signature)
	if err != nil {
		return errors.New("its signature cannot be read")
	}
	ecc, err := signature.Signature.ECDSA()
	if err != nil || signature.SigAlg != tpm2.TPMAlgECDSA || ecc.Hash != tpm2.TPMAlgSHA256 {
		return errors.New("its signature is not ECDSA with SHA-256")
	}
	size := (ak.Curve.Params().BitSize + 7) / 8
	if len(ecc.SignatureR.Buffer) > size || len(ecc.SignatureS.Buffer) > size {
		return errors.New("its signature is too large")
	}
	digest := sha256.Sum256(r.Quote)
	if !ecdsa.Verify(ak, digest[:], new(big.Int).SetBytes(ecc.SignatureR.Buffer), new(big.Int).SetBytes(ecc.SignatureS.Buffer)) {
		return errors.New("its signature is wrong")
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](r.Quote)
	if err != nil || attest.Magic != tpm2.TPMGeneratedValue || attest.Type != tpm2.TPMSTAttestQuote {
		return errors.New("what is signed is no quote")
	}
	if subtle.ConstantTimeCompare(attest.ExtraData.Buffer, tpm.QualifyingData(nonce, j.trustDomain)) != 1 {
		return errors.New("it was made for another question")
	}
	quote, err := attest.Attested.Quote()
	if err != nil {
		return errors.New("what is signed is no quote")
	}
	if !bytes.Equal(tpm2.Marshal(quote.PCRSelect), tpm2.Marshal(selection(j.pcrs))) {
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

// selection names registers of the SHA-256 bank.
func selection(pcrs []int) tpm2.TPMLPCRSelection {
	numbers := make([]uint, len(pcrs))
	for i, n := range pcrs {
		numbers[i] = uint(n)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(numbers...),
	}}}
}
