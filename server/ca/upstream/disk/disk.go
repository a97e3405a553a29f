// Package disk is an upstream authority whose key is in a file, as it is where a PKI hands out a signing
// certificate to be put onto the server.
//
// The files are read anew for each authority that is signed, so replacing them needs no signal and no
// restart: the next authority, at the latest when the present one ages, is signed by what is there then. A
// pair of files that do not fit, as in the middle of being replaced, fails the one attempt; there is
// another within seconds, and the present authority goes on.
package disk

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // RFC 5280 4.2.1.2 method 1 names it; it is an identifier, not a signature
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"syscall"
	"time"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Config says where the files are.
type Config struct {
	// CertPath is the signing certificate in PEM, and behind it what leads to its root, if it is none.
	CertPath string
	// KeyPath is its private key in PEM: PKCS #8, SEC 1 or PKCS #1.
	KeyPath string
	// BundlePath are the roots in PEM. It is empty if the certificate is its own root.
	BundlePath string
}

// Authority signs with a key that is in a file.
type Authority struct{ cfg Config }

var _ upstream.Authority = (*Authority)(nil)

// Open looks at the files, so that a mistake is found at the start.
func Open(cfg Config) (*Authority, error) {
	a := &Authority{cfg: cfg}
	if _, err := a.load(); err != nil {
		return nil, fmt.Errorf(`upstream_authority "disk": %w`, err)
	}
	return a, nil
}

type files struct {
	key    crypto.Signer
	cert   *x509.Certificate
	chain  []*x509.Certificate // what is above cert, without the root
	roots  []*x509.Certificate
	selfOK bool
}

// Sign implements upstream.Authority.
func (a *Authority) Sign(_ context.Context, r upstream.Request) (*upstream.Signed, error) {
	f, err := a.load()
	if err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(r.CSR)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("verify certificate request: %w", err)
	}
	serial := make([]byte, 16)
	_, _ = rand.Read(serial) // never fails
	serial[0] = serial[0]&0x7f | 0x40
	id, err := keyID(csr.RawSubjectPublicKeyInfo)
	if err != nil {
		return nil, err
	}
	notAfter := r.Now.Add(r.TTL)
	if f.cert.NotAfter.Before(notAfter) {
		notAfter = f.cert.NotAfter
	}
	// CreateCertificate verifies what it signed.
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), RawSubject: csr.RawSubject, URIs: csr.URIs,
		NotBefore: r.Now.Add(-10 * time.Second), NotAfter: notAfter,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
		SubjectKeyId: id,
	}, f.cert, csr.PublicKey, f.key)
	if err != nil {
		return nil, fmt.Errorf("sign with %s: %w", a.cfg.KeyPath, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	s := &upstream.Signed{Chain: []*x509.Certificate{cert}, Roots: f.roots}
	if !f.selfOK {
		s.Chain = append(append(s.Chain, f.cert), f.chain...)
	}
	return s, nil
}

// PublishJWT implements upstream.Authority: there is nobody to tell.
func (a *Authority) PublishJWT(context.Context, identity.JWTAuthority) error {
	return upstream.ErrNoJWT
}

// PublishWIT implements upstream.Authority, as PublishJWT does.
func (a *Authority) PublishWIT(ctx context.Context, key identity.JWTAuthority) error {
	return a.PublishJWT(ctx, key)
}

// Follow implements upstream.Authority.
func (a *Authority) Follow(context.Context, func(upstream.Bundle)) error { return upstream.ErrNoBundle }

// load reads the files and says what does not fit.
func (a *Authority) load() (*files, error) {
	certs, err := readCertificates(a.cfg.CertPath)
	if err != nil {
		return nil, err
	}
	f := &files{cert: certs[0], chain: certs[1:]}
	if f.key, err = readKey(a.cfg.KeyPath); err != nil {
		return nil, err
	}
	public, ok := f.key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(f.cert.PublicKey) {
		return nil, fmt.Errorf("the key in %s is not that of the certificate in %s", a.cfg.KeyPath, a.cfg.CertPath)
	}
	if err := identity.CheckAuthority(f.cert); err != nil {
		return nil, fmt.Errorf("%s: %w", a.cfg.CertPath, err)
	}
	self := bytes.Equal(f.cert.RawSubject, f.cert.RawIssuer) && f.cert.CheckSignatureFrom(f.cert) == nil
	if a.cfg.BundlePath == "" {
		if !self {
			return nil, fmt.Errorf("the certificate in %s is not self-signed: name the file with its root in bundle_file_path", a.cfg.CertPath)
		}
		f.roots, f.selfOK = []*x509.Certificate{f.cert}, true
		return f, nil
	}
	if f.roots, err = readCertificates(a.cfg.BundlePath); err != nil {
		return nil, err
	}
	for _, root := range f.roots {
		f.selfOK = f.selfOK || root.Equal(f.cert)
	}
	return f, nil
}

// maxFile is how long a file may be.
const maxFile = 1 << 20

func read(path string) ([]byte, error) {
	// O_NONBLOCK: a pipe in the file's place is an error, not a hang.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	if stat, err := f.Stat(); err != nil || !stat.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("%s is longer than %d bytes", path, maxFile)
	}
	return text, err
}

func readCertificates(path string) ([]*x509.Certificate, error) {
	text, err := read(path)
	if err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	certs, err := upstream.ParsePEM(text)
	if err != nil {
		return nil, fmt.Errorf("read certificates of %s: %w", path, err)
	}
	return certs, nil
}

// readKey never puts anything of the file into an error.
func readKey(path string) (crypto.Signer, error) {
	text, err := read(path)
	if err != nil {
		return nil, fmt.Errorf("read signing key: %w", err)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		var key any
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			return nil, fmt.Errorf("the key in %s is encrypted: a server that starts by itself has no passphrase to give", path)
		default:
			continue // EC PARAMETERS, for one
		}
		if err != nil {
			return nil, fmt.Errorf("the key in %s cannot be parsed as %q", path, block.Type)
		}
		if signer, ok := key.(crypto.Signer); ok {
			return signer, nil
		}
		return nil, fmt.Errorf("the key in %s cannot sign", path)
	}
	return nil, fmt.Errorf("%s holds no private key in PEM", path)
}

// keyID is the identifier of a key (RFC 5280 4.2.1.2 method 1).
func keyID(spki []byte) ([]byte, error) {
	in := cryptobyte.String(spki)
	var bits []byte
	if !in.ReadASN1(&in, casn1.SEQUENCE) || !in.SkipASN1(casn1.SEQUENCE) || !in.ReadASN1BitStringAsBytes(&bits) {
		return nil, errors.New("public key of the certificate request cannot be read")
	}
	sum := sha1.Sum(bits) //nolint:gosec // an identifier, see the import
	return sum[:], nil
}
