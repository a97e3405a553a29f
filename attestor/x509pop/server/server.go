// Package server is the server's side of x509pop: it verifies the chain against the configured roots
// and challenges the leaf's key.
//
// Why it is so: anybody may send evidence, so everything before the challenge is answered is work
// for strangers. The size, the number and the keys of certificates are bounded before a signature is
// looked at, and what the answer is checked against is the very leaf that the chain was verified
// for.
package server

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/x509pop"
)

const (
	// maxBundle is the largest bundle file in bytes.
	maxBundle = 8 << 20
	// maxNames bounds the subject alternative names of a leaf: name constraints cost their product.
	maxNames = 256
	// maxComparisons bounds the work on name constraints in one verification.
	maxComparisons = 50_000
)

// Kind returns the server's side of x509pop.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{
		Type:   x509pop.Type,
		Config: func() any { return new(x509pop.ServerConfig) },
		Open:   open,
	}
}

type judge struct {
	trustDomain spiffeid.TrustDomain
	roots       *x509.CertPool
	now         func() time.Time
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*x509pop.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("x509pop configuration is a %T", config)
	}
	paths := c.CABundlePaths
	switch {
	case c.CABundlePath != "" && len(paths) > 0:
		return nil, errors.New("set ca_bundle_path or ca_bundle_paths, not both")
	case c.CABundlePath != "":
		paths = []string{c.CABundlePath}
	case len(paths) == 0:
		return nil, errors.New("ca_bundle_path or ca_bundle_paths must be set")
	}
	roots := x509.NewCertPool()
	for _, path := range paths {
		if err := addRoots(roots, path); err != nil {
			return nil, fmt.Errorf("read CA bundle: %w", err)
		}
	}
	now := needs.Now
	if now == nil {
		now = time.Now
	}
	return &judge{needs.TrustDomain, roots, now}, nil
}

// addRoots adds the certificates of a PEM file. A certificate that is no authority is refused: the
// verifier would take it for its own root, and its key alone would then be a node.
func addRoots(roots *x509.CertPool, path string) error {
	text, err := attestor.ReadFile(path, maxBundle)
	if err != nil {
		return err
	}
	found := 0
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		found++
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fmt.Errorf("%s: certificate %d: %w", path, found, err)
		}
		if !cert.IsCA {
			return fmt.Errorf("%s: certificate %d (%s) is not an authority's", path, found, cert.Subject)
		}
		roots.AddCert(cert)
	}
	if found == 0 {
		return fmt.Errorf("%s: no PEM certificate in it", path)
	}
	return nil
}

// Judge verifies the chain, challenges the leaf's key and describes the leaf.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	leaf, intermediates, err := parse(payload)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	chains, err := j.verify(leaf, intermediates)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("verify certificate: %w", why(leaf, err))
	}
	if err := challenge(ctx, leaf, ask); err != nil {
		return attestor.Proof{}, err
	}
	return attestor.Proof{
		Path:        x509pop.Type + "/" + x509pop.Fingerprint(leaf),
		Selectors:   j.selectors(leaf, chains),
		CanReattest: true,
	}, nil
}

// parse reads the payload and refuses what would be costly to verify.
func parse(payload []byte) (*x509.Certificate, *x509.CertPool, error) {
	if len(payload) > attestor.MaxEvidence {
		return nil, nil, errors.New("evidence is too large")
	}
	var evidence x509pop.Evidence
	if err := attestor.Decode(payload, &evidence); err != nil {
		return nil, nil, err
	}
	switch n := len(evidence.Certificates); {
	case n == 0:
		return nil, nil, errors.New("no certificate")
	case n > 1+x509pop.MaxIntermediates:
		return nil, nil, fmt.Errorf("%d intermediate certificates, the limit is %d", n-1, x509pop.MaxIntermediates)
	}
	var leaf *x509.Certificate
	intermediates := x509.NewCertPool()
	for i, der := range evidence.Certificates {
		if len(der) > x509pop.MaxCertificate {
			return nil, nil, fmt.Errorf("certificate %d has %d bytes, the limit is %d", i+1, len(der), x509pop.MaxCertificate)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, fmt.Errorf("certificate %d cannot be read", i+1)
		}
		if len(cert.DNSNames)+len(cert.EmailAddresses)+len(cert.IPAddresses)+len(cert.URIs) > maxNames {
			return nil, nil, fmt.Errorf("certificate %d has more than %d alternative names", i+1, maxNames)
		}
		if i == 0 {
			leaf = cert
			if err := x509pop.CheckLeaf(leaf); err != nil {
				return nil, nil, err
			}
			continue
		}
		if err := x509pop.CheckKey(cert); err != nil {
			return nil, nil, fmt.Errorf("intermediate certificate %d: %w", i, err)
		}
		intermediates.AddCert(cert)
	}
	return leaf, intermediates, nil
}

// verify finds the chains to the roots. The number of signatures it checks is bounded by the standard
// library (at most 100) and, with at most four intermediates and a pool that drops repeated ones, far
// below that for any chain worth the name.
func (j *judge) verify(leaf *x509.Certificate, intermediates *x509.CertPool) ([][]*x509.Certificate, error) {
	return leaf.Verify(x509.VerifyOptions{
		Roots:         j.roots,
		Intermediates: intermediates,
		CurrentTime:   j.now(),
		// The certificate is the machine's, made for whatever the machine does.
		KeyUsages:                 []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		MaxConstraintComparisions: maxComparisons,
	})
}

// why says what the caller may know of a failed verification. The standard library's own texts hold
// names out of the evidence, of any length, and out of the configured roots.
func why(leaf *x509.Certificate, err error) error {
	if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); unknown {
		return errors.New("signed by an unknown authority")
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return fmt.Errorf("not valid now; the leaf is from %s to %s",
			leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return errors.New("chain is not valid")
}

// challenge has the node sign a fresh nonce with the leaf's key.
func challenge(ctx context.Context, leaf *x509.Certificate, ask attestor.Ask) error {
	nonce := make([]byte, x509pop.NonceSize)
	if _, err := rand.Read(nonce); err != nil {
		return fmt.Errorf("make nonce: %w", err)
	}
	var question x509pop.Challenge
	switch leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		question.RSA = &x509pop.Nonce{Nonce: nonce}
	default:
		question.ECDSA = &x509pop.Nonce{Nonce: nonce}
	}
	var response x509pop.Response
	if err := attestor.Challenge(ctx, ask, question, &response); err != nil {
		return err
	}
	if err := checkSignature(leaf, nonce, response); err != nil {
		return attestor.Refusef("verify answer: %w", err)
	}
	return nil
}

func checkSignature(leaf *x509.Certificate, nonce []byte, response x509pop.Response) error {
	switch key := leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		if response.RSA == nil || response.ECDSA != nil {
			return errors.New("answer is not for an RSA key")
		}
		digest, err := x509pop.Digest(nonce, response.RSA.Nonce)
		if err != nil {
			return err
		}
		if rsa.VerifyPSS(key, crypto.SHA256, digest, response.RSA.Signature, nil) != nil {
			return errors.New("signature is wrong")
		}
		return nil
	case *ecdsa.PublicKey:
		if response.ECDSA == nil || response.RSA != nil {
			return errors.New("answer is not for an ECDSA key")
		}
		digest, err := x509pop.Digest(nonce, response.ECDSA.Nonce)
		if err != nil {
			return err
		}
		// Verify refuses zero and anything not below the group's order (CVE-2022-21449's class);
		// the length is checked first because big numbers are not free.
		size := (key.Curve.Params().BitSize + 7) / 8
		if len(response.ECDSA.R) > size || len(response.ECDSA.S) > size {
			return errors.New("signature is too large")
		}
		r, s := new(big.Int).SetBytes(response.ECDSA.R), new(big.Int).SetBytes(response.ECDSA.S)
		if !ecdsa.Verify(key, digest, r, s) {
			return errors.New("signature is wrong")
		}
		return nil
	}
	return errors.New("key is neither RSA nor ECDSA")
}

// selectors describes the leaf and the authorities above it, sorted. Names that cannot be a selector
// (control characters, no text, too long) are left out: a name is no reason to refuse a proved key.
func (j *judge) selectors(leaf *x509.Certificate, chains [][]*x509.Certificate) []attestor.Selector {
	values := []string{"serialnumber:" + x509pop.SerialNumber(leaf.SerialNumber)}
	if cn := leaf.Subject.CommonName; cn != "" {
		values = append(values, "subject:cn:"+cn)
	}
	for _, chain := range chains {
		for _, authority := range chain[1:] {
			values = append(values, "ca:fingerprint:"+x509pop.Fingerprint(authority))
		}
	}
	for _, uri := range leaf.URIs {
		if uri.Scheme != x509pop.Type || uri.Host != j.trustDomain.Name() {
			continue
		}
		key, value, found := strings.Cut(strings.Trim(uri.Path, "/"), "/")
		if found && key != "" && value != "" && !strings.Contains(key, ":") {
			values = append(values, "san:"+key+":"+value)
		}
	}
	var selectors []attestor.Selector
	for _, value := range values {
		if s := (attestor.Selector{Type: x509pop.Type, Value: value}); s.Check() == nil {
			selectors = append(selectors, s)
		}
	}
	return attestor.NewSet(selectors...).All()
}
