// Package node is the agent's side of sshpop: it shows the host's certificate and signs the server's
// challenge with the host key.
package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"

	"golang.org/x/crypto/ssh"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/sshpop"
)

// maxFile is the largest key or certificate file, in bytes, that is read.
const maxFile = 64 << 10

// Kind returns the agent's side of sshpop.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{
		Type: sshpop.Type,
		Config: func() any {
			return &sshpop.AgentConfig{
				HostKeyPath:  "/etc/ssh/ssh_host_rsa_key",
				HostCertPath: "/etc/ssh/ssh_host_rsa_key-cert.pub",
			}
		},
		Open: open,
	}
}

type prover struct{ config sshpop.AgentConfig }

// open reads the files once, so that what is wrong with them is said at start.
func open(config any, _ attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*sshpop.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("sshpop configuration is a %T", config)
	}
	p := prover{*c}
	if _, _, err := p.load(); err != nil {
		return nil, err
	}
	return p, nil
}

// Evidence shows the certificate. The files are read anew each time: certificates of hosts are renewed in place.
func (p prover) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	cert, signer, err := p.load()
	if err != nil {
		return nil, nil, err
	}
	payload, err := json.Marshal(sshpop.Evidence{Certificate: cert.Marshal()})
	if err != nil {
		return nil, nil, err
	}
	return payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		return answer(signer, challenge)
	}, nil
}

// answer signs the challenge.
func answer(signer ssh.Signer, message []byte) ([]byte, error) {
	if len(message) > attestor.MaxEvidence {
		return nil, errors.New("challenge is too large")
	}
	var challenge sshpop.Challenge
	if err := attestor.Decode(message, &challenge); err != nil {
		return nil, fmt.Errorf("decode challenge: %w", err)
	}
	nonce := make([]byte, sshpop.NonceSize)
	_, _ = rand.Read(nonce)
	digest, err := sshpop.Digest(challenge.Nonce, nonce)
	if err != nil {
		return nil, fmt.Errorf("read challenge: %w", err)
	}
	signature, err := sign(signer, digest)
	if err != nil {
		return nil, fmt.Errorf("sign challenge: %w", err)
	}
	return json.Marshal(sshpop.Response{Nonce: nonce, Signature: signature})
}

// sign signs with SHA-2 where the key leaves a choice: RSA keys sign with SHA-1 unless told otherwise.
func sign(signer ssh.Signer, digest []byte) (*ssh.Signature, error) {
	if signer.PublicKey().Type() != ssh.KeyAlgoRSA {
		return signer.Sign(rand.Reader, digest)
	}
	chooser, ok := signer.(ssh.AlgorithmSigner)
	if !ok {
		return nil, errors.New("the RSA key cannot sign with SHA-256")
	}
	return chooser.SignWithAlgorithm(rand.Reader, digest, ssh.KeyAlgoRSASHA256)
}

// load reads the key and the certificate and says in one sentence what is wrong with them.
func (p prover) load() (*ssh.Certificate, ssh.Signer, error) {
	text, err := attestor.ReadFile(p.config.HostCertPath, maxFile)
	if err != nil {
		return nil, nil, fmt.Errorf("read host certificate: %w", err)
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return nil, nil, fmt.Errorf("read host certificate %s: it is not in OpenSSH's form: %w", p.config.HostCertPath, err)
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, nil, fmt.Errorf("read host certificate %s: it is a key without a certificate; \"ssh-keygen -s CA -h -I ID -n NAME KEY.pub\" makes one", p.config.HostCertPath)
	}
	if err := sshpop.Check(cert); err != nil {
		return nil, nil, fmt.Errorf("read host certificate %s: %w", p.config.HostCertPath, err)
	}
	text, err = attestor.ReadFile(p.config.HostKeyPath, maxFile)
	if err != nil {
		return nil, nil, fmt.Errorf("read host key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(text)
	if err != nil {
		// Which of its texts it is tells nothing of the key.
		if _, locked := errors.AsType[*ssh.PassphraseMissingError](err); locked {
			return nil, nil, fmt.Errorf("read host key %s: it is encrypted, which is not supported", p.config.HostKeyPath)
		}
		return nil, nil, fmt.Errorf("read host key %s: it is no private key in OpenSSH's or PEM form", p.config.HostKeyPath)
	}
	if !bytes.Equal(signer.PublicKey().Marshal(), cert.Key.Marshal()) {
		return nil, nil, fmt.Errorf("host key %s does not belong to certificate %s", p.config.HostKeyPath, p.config.HostCertPath)
	}
	return cert, signer, nil
}
