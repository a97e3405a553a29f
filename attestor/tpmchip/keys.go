package tpmchip

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // an identifier, as openssl and SPIRE print it, not a signature
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor"
)

const (
	// MaxPublic is the largest public area in bytes, and the largest of other structures of a TPM.
	MaxPublic = 1 << 10
	// maxBundle is the largest file of authorities in bytes.
	maxBundle = 8 << 20
)

// subjectAltName is an extension that endorsement certificates mark critical and that holds names of
// hardware, of which the standard library knows nothing.
var subjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// KeyHash names a public key: the SHA-256 of its DER in hex.
func KeyHash(public any) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// Fingerprint is the SHA-1 of a certificate's DER in lower-case hex.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha1.Sum(cert.Raw) //nolint:gosec // see the import
	return hex.EncodeToString(sum[:])
}

// ReadRoots reads a file of authorities: PEM.
func ReadRoots(path string) (*x509.CertPool, error) {
	text, err := attestor.ReadFile(path, maxBundle)
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

// ReadPublic reads a public area and nothing after it.
func ReadPublic(raw []byte) (*tpm2.TPMTPublic, error) {
	if len(raw) == 0 || len(raw) > MaxPublic {
		return nil, fmt.Errorf("it has %d bytes", len(raw))
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](raw)
	if err != nil || !bytes.Equal(tpm2.Marshal(public), raw) {
		return nil, errors.New("it is no public area of a TPM")
	}
	return public, nil
}

// ReadEK reads the public area of an endorsement key: how to encrypt to it, and its hash.
func ReadEK(raw []byte) (tpm2.LabeledEncapsulationKey, string, error) {
	public, err := ReadPublic(raw)
	if err != nil {
		return nil, "", err
	}
	a := public.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.Restricted || !a.Decrypt || a.SignEncrypt {
		return nil, "", errors.New("it is no endorsement key: it must be fixed in its TPM, restricted, and decrypt only")
	}
	key, err := PublicKey(public)
	if err != nil {
		return nil, "", err
	}
	hash, err := KeyHash(key)
	if err != nil {
		return nil, "", errors.New("it is no key")
	}
	encapsulation, err := tpm2.ImportEncapsulationKey(public)
	if err != nil {
		return nil, "", errors.New("it is of a kind that is not supported")
	}
	return encapsulation, hash, nil
}

// PublicKey returns the key in a public area, of a size that is safe and bounded.
func PublicKey(public *tpm2.TPMTPublic) (any, error) {
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

// Certified verifies the certificate of the endorsement key of a hash and returns the fingerprints of its
// authorities.
func Certified(der []byte, hash string, roots *x509.CertPool, now time.Time) ([]string, error) {
	switch {
	case len(der) == 0:
		return nil, errors.New("it has no certificate")
	case len(der) > MaxCertificate:
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
	if certified, err := KeyHash(cert.PublicKey); err != nil || certified != hash {
		return nil, errors.New("its certificate is for another key")
	}
	cert.UnhandledCriticalExtensions = slices.DeleteFunc(cert.UnhandledCriticalExtensions, subjectAltName.Equal)
	chains, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, errors.New("its certificate is not by an accepted authority, or not valid now")
	}
	var values []string
	for _, chain := range chains {
		for _, authority := range chain[1:] {
			values = append(values, Fingerprint(authority))
		}
	}
	return values, nil
}

// ReadAK reads the public area of an attestation key: its name, which covers all of it, and the key. A key
// that was made elsewhere, or that signs anything it is given, would make what it says worthless.
func ReadAK(raw []byte) (name []byte, key crypto.PublicKey, err error) {
	public, err := ReadPublic(raw)
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
	if key, err = PublicKey(public); err != nil {
		return nil, nil, err
	}
	if ecc, ok := key.(*ecdsa.PublicKey); ok && ecc.Curve != elliptic.P256() {
		return nil, nil, errors.New("it is no ECDSA key on P-256")
	}
	named, err := tpm2.ObjectName(public)
	if err != nil {
		return nil, nil, errors.New("it has no name")
	}
	return named.Buffer, key, nil
}

// Verify verifies a signature (TPMT_SIGNATURE) with SHA-256 by ECDSA or RSASSA.
func Verify(key crypto.PublicKey, signed, raw []byte) error {
	if len(raw) > MaxPublic {
		return errors.New("its signature is too large")
	}
	signature, err := tpm2.Unmarshal[tpm2.TPMTSignature](raw)
	if err != nil {
		return errors.New("its signature cannot be read")
	}
	digest := sha256.Sum256(signed)
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		ecc, err := signature.Signature.ECDSA()
		if err != nil || signature.SigAlg != tpm2.TPMAlgECDSA || ecc.Hash != tpm2.TPMAlgSHA256 {
			return errors.New("its signature is not ECDSA with SHA-256")
		}
		size := (key.Curve.Params().BitSize + 7) / 8
		if len(ecc.SignatureR.Buffer) > size || len(ecc.SignatureS.Buffer) > size {
			return errors.New("its signature is too large")
		}
		if !ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(ecc.SignatureR.Buffer), new(big.Int).SetBytes(ecc.SignatureS.Buffer)) {
			return errors.New("its signature is wrong")
		}
		return nil
	case *rsa.PublicKey:
		ssa, err := signature.Signature.RSASSA()
		if err != nil || signature.SigAlg != tpm2.TPMAlgRSASSA || ssa.Hash != tpm2.TPMAlgSHA256 {
			return errors.New("its signature is not RSASSA with SHA-256")
		}
		if rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], ssa.Sig.Buffer) != nil {
			return errors.New("its signature is wrong")
		}
		return nil
	}
	return errors.New("its key is neither RSA nor ECDSA")
}
