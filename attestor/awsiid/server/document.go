package server

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/smallstep/pkcs7"

	"github.com/assay-id/assay/attestor/awsiid"
)

const (
	// maxMessage is the largest PKCS #7 message in bytes; a real one has about 1,300.
	maxMessage = 16 << 10
	// maxCertificateFile is the largest certificate file in bytes.
	maxCertificateFile = 64 << 10
)

// oidSHA256 is the digest that AWS uses with RSA-2048.
var oidSHA256 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}

// readCertificate reads the one certificate of a region's file.
func readCertificate(path string) (*x509.Certificate, error) {
	stat, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if stat.Size() > maxCertificateFile {
		return nil, fmt.Errorf("%s: larger than %d bytes", path, maxCertificateFile)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s: no PEM certificate in it; AWS publishes those of its regions in the EC2 user guide, under \"verify the instance identity document\", RSA-2048", path)
	}
	if more, _ := pem.Decode(rest); more != nil {
		return nil, fmt.Errorf("%s: more than one PEM block in it", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cert, nil
}

// verify returns the document that the message holds and AWS signed. What the evidence says beside the
// message is not believed: SPIRE once verified the message and read the document from beside it, so that
// any instance could be any other (fixed in 1.14.6).
func (j *judge) verify(e awsiid.Evidence) (awsiid.Document, error) {
	none := awsiid.Document{}
	if e.RSA2048 == "" {
		return none, errors.New("no RSA-2048 signature; the others that AWS offers are not accepted")
	}
	if len(e.RSA2048) > maxMessage*4/3+1024 {
		return none, errors.New("signature is too large")
	}
	raw, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(e.RSA2048), ""))
	if err != nil {
		return none, errors.New("signature is not base64")
	}
	message, err := pkcs7.Parse(raw)
	if err != nil {
		return none, errors.New("signature is no PKCS #7 message")
	}
	switch {
	case len(message.Signers) != 1:
		return none, fmt.Errorf("signature has %d signers, want one", len(message.Signers))
	case !message.Signers[0].DigestAlgorithm.Algorithm.Equal(oidSHA256):
		return none, errors.New("signature is not made with SHA-256")
	case len(message.Content) == 0:
		return none, errors.New("signature does not hold what it signs")
	}
	for region, cert := range j.certificates {
		// Whatever certificates came along are dropped: the pinned one signed, or nobody did.
		message.Certificates = []*x509.Certificate{cert}
		if message.Verify() != nil {
			continue
		}
		document, err := awsiid.ParseDocument(message.Content)
		if err != nil {
			return none, err
		}
		if document.Region != region {
			return none, errors.New("document is of another region than the certificate that signed it")
		}
		if e.Document != "" && !bytes.Equal(bytes.TrimSpace([]byte(e.Document)), bytes.TrimSpace(message.Content)) {
			return none, errors.New("document beside the signature is not the signed one")
		}
		return document, nil
	}
	return none, errors.New("signature is not by the certificate of any configured region")
}
