package swtpm

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor/tpmchip"
)

// DevIDAuthority issues device identities.
type DevIDAuthority struct {
	// Path is the file with its certificate.
	Path string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// DevID is a device identity in files, and its certificate.
type DevID struct {
	Cert, Priv, Pub string
	Leaf            *x509.Certificate
}

// NewDevIDAuthority makes an authority with its certificate in a folder.
func NewDevIDAuthority(dir, name string) (*DevIDAuthority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a := &DevIDAuthority{Path: filepath.Join(dir, name+".pem"), key: key}
	if a.cert, err = a.sign(template, template, &key.PublicKey); err != nil {
		return nil, err
	}
	return a, writePEM(a.Path, a.cert)
}

func (a *DevIDAuthority) sign(template, parent *x509.Certificate, key any) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, a.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func writePEM(path string, cert *x509.Certificate) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600)
}

// keyTemplate is that of a device identity's key (TPM 2.0 Keys for Device Identity and Attestation, 7.3.4.1).
func keyTemplate(kind tpm2.TPMAlgID) tpm2.TPMTPublic {
	t := tpm2.TPMTPublic{
		Type: kind, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, SignEncrypt: true},
	}
	if kind == tpm2.TPMAlgECC {
		t.Parameters = tpm2.NewTPMUPublicParms(kind, &tpm2.TPMSECCParms{
			Scheme:  tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
			CurveID: tpm2.TPMECCNistP256,
		})
		return t
	}
	t.Parameters = tpm2.NewTPMUPublicParms(kind, &tpm2.TPMSRSAParms{
		Scheme:  tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgRSASSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256})},
		KeyBits: 2048,
	})
	return t
}

// Provision makes a device identity in the TPM at a socket, as a manufacturing line would, and its files in a
// folder: dir/name.pem, .priv and .pub. Change, if any, changes the certificate before it is signed.
func (a *DevIDAuthority) Provision(ctx context.Context, socket, dir, name string, kind tpm2.TPMAlgID, password string, change func(*x509.Certificate)) (*DevID, error) {
	dev, err := tpmchip.Open(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer func() { _ = dev.Close() }()
	parent, err := tpm2.CreatePrimary{PrimaryHandle: tpmchip.Hierarchy(tpm2.TPMRHOwner, ""), InPublic: tpm2.New2B(tpmchip.StorageRoot(kind))}.Execute(dev)
	if err != nil {
		return nil, fmt.Errorf("make storage root key: %w", err)
	}
	defer tpmchip.Flush(dev, parent.ObjectHandle)
	made, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: parent.ObjectHandle, Name: parent.Name, Auth: tpm2.PasswordAuth(nil)},
		InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: []byte(password)}}},
		InPublic:     tpm2.New2B(keyTemplate(kind)),
	}.Execute(dev)
	if err != nil {
		return nil, fmt.Errorf("make device identity's key: %w", err)
	}
	public, err := made.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	key, err := tpmchip.PublicKey(public)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name, Organization: []string{"devices"}},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if change != nil {
		change(template)
	}
	d := &DevID{Cert: filepath.Join(dir, name+".pem"), Priv: filepath.Join(dir, name+".priv"), Pub: filepath.Join(dir, name+".pub")}
	if d.Leaf, err = a.sign(template, a.cert, key); err != nil {
		return nil, err
	}
	if err := writePEM(d.Cert, d.Leaf); err != nil {
		return nil, err
	}
	if err := os.WriteFile(d.Priv, made.OutPrivate.Buffer, 0o600); err != nil {
		return nil, err
	}
	return d, os.WriteFile(d.Pub, made.OutPublic.Bytes(), 0o600)
}

// Certify makes a certificate like a device identity's for another key.
func (a *DevIDAuthority) Certify(d *DevID, key any) (*x509.Certificate, error) {
	return a.sign(&x509.Certificate{
		SerialNumber: big.NewInt(8), Subject: d.Leaf.Subject, NotBefore: d.Leaf.NotBefore, NotAfter: d.Leaf.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
	}, a.cert, key)
}
