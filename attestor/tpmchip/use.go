package tpmchip

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

const (
	// MaxCertificate is the largest endorsement key certificate in bytes, piece how much is read at once.
	MaxCertificate, piece = 8 << 10, 512
	// RSACertificate and ECCCertificate are where manufacturers store the certificates of their RSA-2048
	// and P-256 endorsement keys (TCG EK Credential Profile, section 2.2.1.4).
	RSACertificate, ECCCertificate = tpm2.TPMHandle(0x01c00002), tpm2.TPMHandle(0x01c0000a)
)

// deviceNames are how the kernel names TPMs: those that it shares between programs come first.
var deviceNames = []*regexp.Regexp{regexp.MustCompile(`^tpmrm[0-9]+$`), regexp.MustCompile(`^tpm[0-9]+$`)}

// Find returns the path of the one TPM in a directory of devices, as "/dev".
func Find(dir string) (string, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("find TPM: %w", err)
	}
	for _, name := range deviceNames {
		var found []string
		for _, file := range files {
			if name.MatchString(file.Name()) {
				found = append(found, filepath.Join(dir, file.Name()))
			}
		}
		switch len(found) {
		case 0:
		case 1:
			return found[0], nil
		default:
			return "", fmt.Errorf("find TPM: there are %s and %s; say which", found[0], found[1])
		}
	}
	return "", fmt.Errorf("find TPM: there is none in %s", dir)
}

// Hierarchy is a hierarchy with its password.
func Hierarchy(handle tpm2.TPMHandle, password string) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: handle, Auth: tpm2.PasswordAuth([]byte(password))}
}

// EndorsementKey is how an endorsement key is made, where its certificate is, and where the key itself is if
// somebody made it stay (TCG TPM v2.0 Provisioning Guidance, section 7.8).
type EndorsementKey struct {
	Template                tpm2.TPMTPublic
	Certificate, Persistent tpm2.TPMHandle
}

// RSAEK and ECCEK are the two that manufacturers certify.
var (
	RSAEK = EndorsementKey{tpm2.RSAEKTemplate, RSACertificate, 0x81010001}
	ECCEK = EndorsementKey{tpm2.ECCEKTemplate, ECCCertificate, 0x81010002}
)

// Load returns the endorsement key with its public area (TPMT_PUBLIC): the one that stays in the TPM, or else
// one that is made, which takes hardware seconds if it is RSA. Done lets go of it.
func (e EndorsementKey) Load(dev *Device, password string) (key tpm2.NamedHandle, public []byte, done func(), err error) {
	if read, err := (tpm2.ReadPublic{ObjectHandle: e.Persistent}).Execute(dev); err == nil && e.made(read.OutPublic) {
		return tpm2.NamedHandle{Handle: e.Persistent, Name: read.Name}, read.OutPublic.Bytes(), func() {}, nil
	}
	made, err := tpm2.CreatePrimary{PrimaryHandle: Hierarchy(tpm2.TPMRHEndorsement, password), InPublic: tpm2.New2B(e.Template)}.Execute(dev)
	if err != nil {
		return key, nil, nil, fmt.Errorf("make endorsement key in TPM: %w", err)
	}
	return tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}, made.OutPublic.Bytes(), func() { Flush(dev, made.ObjectHandle) }, nil
}

// made reports whether a key is of the template.
func (e EndorsementKey) made(area tpm2.TPM2BPublic) bool {
	public, err := area.Contents()
	if err != nil {
		return false
	}
	as := *public
	as.Unique = e.Template.Unique
	return bytes.Equal(tpm2.Marshal(as), tpm2.Marshal(e.Template))
}

// EK asks the TPM at a path for its endorsement key: the public key, and its certificate if there is one.
func EK(ctx context.Context, path, password string, kind EndorsementKey) (key any, certificate []byte, err error) {
	dev, err := Open(ctx, path)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = dev.Close() }()
	_, area, done, err := kind.Load(dev, password)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	public, err := ReadPublic(area)
	if err != nil {
		return nil, nil, fmt.Errorf("read endorsement key: %w", err)
	}
	if key, err = PublicKey(public); err != nil {
		return nil, nil, fmt.Errorf("read endorsement key: %w", err)
	}
	return key, ReadCertificate(dev, kind.Certificate), nil
}

// Flush takes an object out of the TPM: without it the TPM is full soon.
func Flush(dev *Device, handle tpm2.TPMHandle) {
	_, _ = tpm2.FlushContext{FlushHandle: handle}.Execute(dev)
}

// ReadCertificate reads the certificate at an index, nil if there is none. Padding may follow it.
func ReadCertificate(dev *Device, index tpm2.TPMHandle) []byte {
	public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(dev)
	if err != nil {
		return nil
	}
	area, err := public.NVPublic.Contents()
	if err != nil || int(area.DataSize) > MaxCertificate {
		return nil
	}
	var der []byte
	for len(der) < int(area.DataSize) {
		read, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: public.NVName, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: public.NVName},
			Size:       uint16(min(piece, int(area.DataSize)-len(der))), //nolint:gosec // within MaxCertificate
			Offset:     uint16(len(der)),                                //nolint:gosec // likewise
		}.Execute(dev)
		if err != nil || len(read.Data.Buffer) == 0 {
			return nil
		}
		der = append(der, read.Data.Buffer...)
	}
	return der
}

// Activate recovers the secret that was encrypted to the endorsement key together with the name of another
// key, whose password is auth.
func Activate(dev *Device, ek, key tpm2.NamedHandle, auth []byte, endorsementPassword string, credential, secret []byte) ([]byte, error) {
	if len(credential) == 0 || len(secret) == 0 {
		return nil, errors.New("activate credential: there is none")
	}
	activated, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: key.Handle, Name: key.Name, Auth: tpm2.PasswordAuth(auth)},
		KeyHandle: tpm2.AuthHandle{
			Handle: ek.Handle, Name: ek.Name,
			Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
				_, err := tpm2.PolicySecret{AuthHandle: Hierarchy(tpm2.TPMRHEndorsement, endorsementPassword), PolicySession: session, NonceTPM: nonce}.Execute(t)
				return err
			}),
		},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: credential},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: secret},
	}.Execute(dev)
	if err != nil {
		return nil, fmt.Errorf("activate credential: %w", err)
	}
	return activated.CertInfo.Buffer, nil
}

// StorageRoot is the template of the storage root key that keys of a kind are made under: TCG's high range
// ones (EK Credential Profile 2.3, H-1 and H-2), which SPIRE's provisioning uses, too.
func StorageRoot(kind tpm2.TPMAlgID) tpm2.TPMTPublic {
	if kind == tpm2.TPMAlgECC {
		template := tpm2.ECCSRKTemplate
		template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
		return template
	}
	template := tpm2.RSASRKTemplate
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
	return template
}
