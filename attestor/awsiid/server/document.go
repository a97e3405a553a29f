package server

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/smallstep/pkcs7"

	"github.com/assay-id/assay/attestor/awsiid"
)

// maxMessage is the largest PKCS #7 message in bytes; a real one has about 1,300.
const maxMessage = 16 << 10

// oidSHA256 is the digest that AWS uses with RSA-2048.
var oidSHA256 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}

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
	// Which certificate it takes is read off what is not verified yet; it is believed once that one signed it.
	document, err := awsiid.ParseDocument(message.Content)
	if err != nil {
		return none, err
	}
	cert, err := j.certificate(document.Region)
	if err != nil {
		return none, err
	}
	if !isSignedBy(message, cert) {
		for region, other := range j.certificates {
			if isSignedBy(message, other) {
				return none, fmt.Errorf("document of %s is signed with the key of %s", document.Region, region)
			}
		}
		return none, fmt.Errorf("signature is not by the certificate of %s; if AWS has another one by now, name its file in region_certificates", document.Region)
	}
	if e.Document != "" && !bytes.Equal(bytes.TrimSpace([]byte(e.Document)), bytes.TrimSpace(message.Content)) {
		return none, errors.New("document beside the signature is not the signed one")
	}
	return document, nil
}

// isSignedBy drops whatever certificates came along: the pinned one signed, or nobody did.
func isSignedBy(message *pkcs7.PKCS7, cert *x509.Certificate) bool {
	message.Certificates = []*x509.Certificate{cert}
	return message.Verify() == nil
}
