// Package server is the server's side of sshpop: it verifies the host certificate against the configured
// authorities and challenges the host key.
//
// Why it is so: anybody may send evidence, so the certificate's size, kind and keys are looked at, and its
// authority is found among the configured ones, before a signature is computed. A host's certificate is a
// promise of its authority about a name; whatever in it is not understood is refused and not skipped.
package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/agentpath"
	"github.com/assay-id/assay/attestor/sshpop"
)

const (
	// maxAuthorities is the largest file of authorities in bytes.
	maxAuthorities = 1 << 20
	// defaultTemplate is SPIRE's.
	defaultTemplate = "{{ .PluginName }}/{{ .Fingerprint }}"
)

// Kind returns the server's side of sshpop.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{Type: sshpop.Type, Config: func() any { return new(sshpop.ServerConfig) }, Open: open}
}

type judge struct {
	checker *ssh.CertChecker
	domain  string // begins with a dot; empty: any
	path    *agentpath.Template
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*sshpop.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("sshpop configuration is a %T", config)
	}
	authorities, err := readAuthorities(c)
	if err != nil {
		return nil, err
	}
	text := c.AgentPathTemplate
	if text == "" {
		text = defaultTemplate
	}
	path, err := agentpath.Parse(text)
	if err != nil {
		return nil, err
	}
	now := needs.Now
	if now == nil {
		now = time.Now
	}
	j := &judge{path: path, checker: &ssh.CertChecker{
		Clock: now,
		IsHostAuthority: func(key ssh.PublicKey, _ string) bool {
			wire := key.Marshal()
			for _, one := range authorities {
				if bytes.Equal(one.Marshal(), wire) {
					return true
				}
			}
			return false
		},
	}}
	if c.CanonicalDomain != "" {
		j.domain = "." + strings.Trim(c.CanonicalDomain, ".")
	}
	return j, nil
}

// readAuthorities reads the keys of both sources.
func readAuthorities(c *sshpop.ServerConfig) ([]ssh.PublicKey, error) {
	var all []ssh.PublicKey
	for i, line := range c.CertAuthorities {
		key, rest, err := authority([]byte(line))
		if err == nil && len(bytes.TrimSpace(rest)) > 0 {
			err = errors.New("there is more than one line in it")
		}
		if err != nil {
			return nil, fmt.Errorf("cert_authorities: number %d: %w", i+1, err)
		}
		all = append(all, key)
	}
	if c.CertAuthoritiesPath != "" {
		text, err := attestor.ReadFile(c.CertAuthoritiesPath, maxAuthorities)
		if err != nil {
			return nil, fmt.Errorf("read cert_authorities_path: %w", err)
		}
		for i, line := range strings.Split(string(text), "\n") {
			if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			key, _, err := authority([]byte(line))
			if err != nil {
				return nil, fmt.Errorf("read cert_authorities_path: %s:%d: %w", c.CertAuthoritiesPath, i+1, err)
			}
			all = append(all, key)
		}
	}
	if len(all) == 0 {
		return nil, errors.New("cert_authorities or cert_authorities_path must name at least one key")
	}
	return all, nil
}

// authority reads a line as in authorized_keys. A certificate is no authority: its own authority is.
func authority(line []byte) (ssh.PublicKey, []byte, error) {
	key, _, options, rest, err := ssh.ParseAuthorizedKey(line)
	if err != nil {
		return nil, nil, errors.New(`it is no key as "ssh-ed25519 AAAA…"`)
	}
	if len(options) > 0 {
		return nil, nil, fmt.Errorf("it has options (%q…), which would not be obeyed", options[0])
	}
	if err := sshpop.CheckKey(key); err != nil {
		return nil, nil, err
	}
	return key, rest, nil
}

// Judge verifies the certificate, challenges the host key and describes the host.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	if len(payload) > attestor.MaxEvidence {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is too large")
	}
	var evidence sshpop.Evidence
	if err := attestor.Decode(payload, &evidence); err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	cert, err := sshpop.ParseCertificate(evidence.Certificate)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	host, err := j.verify(cert)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("verify certificate: %w", err)
	}
	path, err := j.path.Path(map[string]any{
		"PluginName": sshpop.Type, "Fingerprint": sshpop.Fingerprint(cert), "Hostname": host,
		"ValidPrincipals": cert.ValidPrincipals, "KeyId": cert.KeyId, "Serial": cert.Serial,
	})
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("%w", err)
	}
	if err := challenge(ctx, cert, ask); err != nil {
		return attestor.Proof{}, err
	}
	return attestor.Proof{Path: path, Selectors: selectors(cert, host), CanReattest: true}, nil
}

// verify checks the certificate and returns the host's name. Its errors are its own: the library's hold
// names out of the certificate.
func (j *judge) verify(cert *ssh.Certificate) (string, error) {
	if !j.checker.IsHostAuthority(cert.SignatureKey, "") {
		return "", errors.New("signed by an unknown authority")
	}
	// As OpenSSH does: collisions of SHA-1 are within reach, and a certificate is what one would forge.
	if cert.Signature == nil || cert.Signature.Format == ssh.KeyAlgoRSA {
		return "", errors.New("its authority signed it with SHA-1; have it signed again by an ssh-keygen of today")
	}
	name := cert.ValidPrincipals[0]
	if err := j.checker.CheckHostKey(name+":22", nil, cert); err != nil {
		now := j.checker.Clock().Unix()
		if now < 0 || uint64(now) < cert.ValidAfter || uint64(now) >= cert.ValidBefore {
			return "", errors.New("certificate is not valid now")
		}
		return "", errors.New("certificate is not valid")
	}
	host, inside := strings.CutSuffix(name, j.domain)
	if !inside || host == "" {
		return "", fmt.Errorf("the host's name is not in %s", j.domain)
	}
	return host, nil
}

// challenge has the node sign a fresh nonce with the host key.
func challenge(ctx context.Context, cert *ssh.Certificate, ask attestor.Ask) error {
	nonce := make([]byte, sshpop.NonceSize)
	_, _ = rand.Read(nonce)
	var response sshpop.Response
	if err := attestor.Challenge(ctx, ask, sshpop.Challenge{Nonce: nonce}, &response); err != nil {
		return err
	}
	digest, err := sshpop.Digest(nonce, response.Nonce)
	if err != nil {
		return attestor.Refusef("read answer: %w", err)
	}
	s := response.Signature
	if s == nil || len(s.Blob) == 0 || len(s.Blob) > sshpop.MaxSignature || len(s.Rest) > 0 {
		return attestor.Refusef("read answer: it has no signature that is one")
	}
	// A SPIRE agent signs with SHA-1 if the key is RSA. Over a digest that both sides made, nobody has
	// a collision to offer.
	if cert.Key.Verify(digest, s) != nil {
		return attestor.Refusef("verify answer: signature is wrong")
	}
	return nil
}

// selectors describes the host. SPIRE has none of them.
func selectors(cert *ssh.Certificate, host string) []attestor.Selector {
	values := []string{"hostname:" + host, "ca:fingerprint:" + ssh.FingerprintSHA256(cert.SignatureKey)}
	for _, name := range cert.ValidPrincipals {
		values = append(values, "principal:"+name)
	}
	if cert.KeyId != "" {
		values = append(values, "key-id:"+cert.KeyId)
	}
	var found []attestor.Selector
	for _, value := range values {
		if s := (attestor.Selector{Type: sshpop.Type, Value: value}); s.Check() == nil {
			found = append(found, s)
		}
	}
	return attestor.NewSet(found...).All()
}
