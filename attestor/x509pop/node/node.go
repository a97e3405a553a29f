// Package node is the agent's side of x509pop: it shows the machine's certificate and signs the
// server's challenge with its key.
package node

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/x509pop"
)

// maxFile is the largest key or certificate file, in bytes, that is read.
const maxFile = 1 << 20

// Kind returns the agent's side of x509pop.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{
		Type:   x509pop.Type,
		Config: func() any { return new(x509pop.AgentConfig) },
		Open:   open,
	}
}

type prover struct{ config x509pop.AgentConfig }

// open reads the files once, so that what is wrong with them is said at start.
func open(config any, _ attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*x509pop.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("x509pop configuration is a %T", config)
	}
	p := prover{*c}
	if _, _, err := p.load(); err != nil {
		return nil, err
	}
	return p, nil
}

// Evidence shows the chain. The files are read anew each time: certificates of machines are renewed
// in place, and an agent that re-attests must show the current one.
func (p prover) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	chain, key, err := p.load()
	if err != nil {
		return nil, nil, err
	}
	var evidence x509pop.Evidence
	for _, cert := range chain {
		evidence.Certificates = append(evidence.Certificates, cert.Raw)
	}
	payload, err := json.Marshal(evidence)
	if err != nil {
		return nil, nil, fmt.Errorf("encode evidence: %w", err)
	}
	return payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		return answer(key, challenge)
	}, nil
}

// answer signs the challenge. The agent's own nonce is part of what is signed, so a hostile server
// cannot have something of its choice signed.
func answer(key crypto.Signer, message []byte) ([]byte, error) {
	if len(message) > attestor.MaxEvidence {
		return nil, errors.New("challenge is too large")
	}
	var challenge x509pop.Challenge
	if err := attestor.Decode(message, &challenge); err != nil {
		return nil, fmt.Errorf("decode challenge: %w", err)
	}
	nonce := make([]byte, x509pop.NonceSize)
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("make nonce: %w", err)
	}
	var response x509pop.Response
	switch key := key.(type) {
	case *rsa.PrivateKey:
		digest, err := digestOf(challenge.RSA, nonce)
		if err != nil {
			return nil, err
		}
		signature, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		if err != nil {
			return nil, fmt.Errorf("sign challenge: %w", err)
		}
		response.RSA = &x509pop.RSASignature{Nonce: nonce, Signature: signature}
	case *ecdsa.PrivateKey:
		digest, err := digestOf(challenge.ECDSA, nonce)
		if err != nil {
			return nil, err
		}
		r, s, err := ecdsa.Sign(rand.Reader, key, digest)
		if err != nil {
			return nil, fmt.Errorf("sign challenge: %w", err)
		}
		response.ECDSA = &x509pop.ECDSASignature{Nonce: nonce, R: r.Bytes(), S: s.Bytes()}
	default:
		return nil, fmt.Errorf("private key is a %T, want RSA or ECDSA", key)
	}
	return json.Marshal(response)
}

func digestOf(asked *x509pop.Nonce, nonce []byte) ([]byte, error) {
	if asked == nil {
		return nil, errors.New("challenge is not for this kind of key")
	}
	digest, err := x509pop.Digest(asked.Nonce, nonce)
	if err != nil {
		return nil, fmt.Errorf("read challenge: %w", err)
	}
	return digest, nil
}

// load reads the key and the chain and says in one sentence what is wrong with them.
func (p prover) load() ([]*x509.Certificate, crypto.Signer, error) {
	chain, err := readCertificates(p.config.CertificatePath)
	if err != nil {
		return nil, nil, fmt.Errorf("read certificate: %w", err)
	}
	if p.config.IntermediatesPath != "" {
		more, err := readCertificates(p.config.IntermediatesPath)
		if err != nil {
			return nil, nil, fmt.Errorf("read intermediates: %w", err)
		}
		chain = append(chain, more...)
	}
	if err := x509pop.CheckLeaf(chain[0]); err != nil {
		return nil, nil, fmt.Errorf("read certificate %s: %w", p.config.CertificatePath, err)
	}
	if len(chain) > 1+x509pop.MaxIntermediates {
		return nil, nil, fmt.Errorf("%d intermediate certificates, the limit is %d", len(chain)-1, x509pop.MaxIntermediates)
	}
	key, err := readKey(p.config.PrivateKeyPath)
	if err != nil {
		return nil, nil, fmt.Errorf("read private key: %w", err)
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(chain[0].PublicKey) {
		return nil, nil, fmt.Errorf("private key %s does not belong to certificate %s", p.config.PrivateKeyPath, p.config.CertificatePath)
	}
	return chain, key, nil
}

func readCertificates(path string) ([]*x509.Certificate, error) {
	text, err := attestor.ReadFile(path, maxFile)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", path, len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%s: no PEM certificate in it", path)
	}
	return certs, nil
}

func readKey(path string) (crypto.Signer, error) {
	text, err := attestor.ReadFile(path, maxFile)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		var key any
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		default:
			continue // EC PARAMETERS, or the certificate in the same file
		}
		if err != nil {
			return nil, fmt.Errorf("%s: not a readable key (an encrypted one is not supported): %w", path, err)
		}
		switch key := key.(type) {
		case *rsa.PrivateKey:
			return key, nil
		case *ecdsa.PrivateKey:
			return key, nil
		}
		return nil, fmt.Errorf("%s: key is a %T, want RSA or ECDSA", path, key)
	}
	return nil, fmt.Errorf("%s: no PEM private key in it", path)
}
