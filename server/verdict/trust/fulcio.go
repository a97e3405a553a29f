package trust

import (
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"unicode/utf8"
)

// Names of the fields that certificates of Fulcio state about who signed
// (https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md), 1.3.6.1.4.1.57264.1.8 to .24, and that
// the tokens of CI systems are translated to.
const (
	FieldIssuer                = "issuer"
	FieldBuildSignerURI        = "build_signer_uri"
	FieldBuildSignerDigest     = "build_signer_digest"
	FieldRunnerEnvironment     = "runner_environment"
	FieldSourceURI             = "source_repo_uri"
	FieldSourceDigest          = "source_repo_digest"
	FieldSourceRef             = "source_repo_ref"
	FieldSourceID              = "source_repo_id"
	FieldSourceOwnerURI        = "source_repo_owner_uri"
	FieldSourceOwnerID         = "source_repo_owner_id"
	FieldBuildConfigURI        = "build_config_uri"
	FieldBuildConfigDigest     = "build_config_digest"
	FieldBuildTrigger          = "build_trigger"
	FieldRunInvocationURI      = "run_invocation_uri"
	FieldSourceVisibility      = "source_repo_visibility"
	FieldDeploymentEnvironment = "deployment_environment"
	FieldTokenSubject          = "token_subject"
)

// fulcioArc is 1.3.6.1.4.1.57264.1.
var fulcioArc = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1}

// extensionNames are the extensions whose value is a DER UTF8String, by the last number of their OID.
// 7 is the type of an otherName in the subject alternative name.
var extensionNames = map[int]string{
	8:  FieldIssuer,
	9:  FieldBuildSignerURI,
	10: FieldBuildSignerDigest,
	11: FieldRunnerEnvironment,
	12: FieldSourceURI,
	13: FieldSourceDigest,
	14: FieldSourceRef,
	15: FieldSourceID,
	16: FieldSourceOwnerURI,
	17: FieldSourceOwnerID,
	18: FieldBuildConfigURI,
	19: FieldBuildConfigDigest,
	20: FieldBuildTrigger,
	21: FieldRunInvocationURI,
	22: FieldSourceVisibility,
	23: FieldDeploymentEnvironment,
	24: FieldTokenSubject,
}

// deprecatedNames are the extensions whose value is the bare text. Each counts only if the one that took
// its place is absent. 4, the workflow's name, has none.
var deprecatedNames = map[int]string{
	1: FieldIssuer,
	2: FieldBuildTrigger,
	3: FieldSourceDigest,
	5: FieldSourceURI, // "owner/name", of GitHub only
	6: FieldSourceRef,
}

const (
	githubIssuer = "https://token.actions.githubusercontent.com"
	maxField     = 4096
)

// extensions returns the fields that a certificate states. The certificate must have been verified.
func extensions(cert *x509.Certificate) (map[string]string, error) {
	fields, old := map[string]string{}, map[string]string{}
	for _, e := range cert.Extensions {
		if len(e.Id) != len(fulcioArc)+1 || !e.Id[:len(fulcioArc)].Equal(fulcioArc) {
			continue
		}
		n := e.Id[len(fulcioArc)]
		if len(e.Value) > maxField {
			return nil, refuse(ErrMalformed, "extension %s of the certificate is %d bytes long, the limit is %d", e.Id, len(e.Value), maxField)
		}
		if name, ok := deprecatedNames[n]; ok {
			if !utf8.Valid(e.Value) {
				return nil, refuse(ErrMalformed, "extension %s of the certificate is no text", e.Id)
			}
			old[name] = string(e.Value)
			continue
		}
		name, ok := extensionNames[n]
		if !ok {
			continue
		}
		value, err := utf8String(e.Value)
		if err != nil {
			return nil, refuse(ErrMalformed, "extension %s of the certificate (%s) %w", e.Id, name, err)
		}
		if value != "" {
			fields[name] = value
		}
	}
	for name, value := range old {
		if _, newer := fields[name]; newer || value == "" {
			continue
		}
		fields[name] = value
	}
	// The old extension has no host; only GitHub's tokens filled it.
	if uri, ok := old[FieldSourceURI]; ok && uri != "" && fields[FieldSourceURI] == uri {
		delete(fields, FieldSourceURI)
		if fields[FieldIssuer] == githubIssuer {
			fields[FieldSourceURI] = "https://github.com/" + uri
		}
	}
	return fields, nil
}

func utf8String(der []byte) (string, error) {
	var v asn1.RawValue
	rest, err := asn1.Unmarshal(der, &v)
	if err != nil || len(rest) != 0 || v.Class != asn1.ClassUniversal || v.Tag != asn1.TagUTF8String || v.IsCompound || !utf8.Valid(v.Bytes) {
		return "", fmt.Errorf("is no UTF8String")
	}
	return string(v.Bytes), nil
}

var (
	oidSAN       = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidOtherName = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, 7}
)

// Tags of GeneralName (RFC 5280 section 4.2.1.6).
const (
	tagOtherName = 0
	tagEmail     = 1
	tagURI       = 6
)

// signerName returns the one subject alternative name of a certificate as it is written there: an e-mail
// address, a URI, or Fulcio's otherName. A certificate with several could be shown for whichever suits.
func signerName(cert *x509.Certificate) (string, error) {
	for _, e := range cert.Extensions {
		if !e.Id.Equal(oidSAN) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &names); err != nil || len(rest) != 0 {
			return "", refuse(ErrMalformed, "the subject alternative name of the certificate is unreadable")
		}
		if len(names) != 1 {
			return "", refuse(ErrIdentity, "the certificate has %d subject alternative names, and must have one", len(names))
		}
		name, err := generalName(names[0])
		if err != nil {
			return "", err
		}
		if name == "" || len(name) > maxField || !utf8.ValidString(name) {
			return "", refuse(ErrMalformed, "the subject alternative name of the certificate is unreadable")
		}
		return name, nil
	}
	return "", refuse(ErrIdentity, "the certificate has no subject alternative name")
}

func generalName(n asn1.RawValue) (string, error) {
	if n.Class == asn1.ClassContextSpecific {
		switch n.Tag {
		case tagEmail, tagURI:
			return string(n.Bytes), nil
		case tagOtherName:
			var oid asn1.ObjectIdentifier
			rest, err := asn1.Unmarshal(n.Bytes, &oid)
			if err != nil || !oid.Equal(oidOtherName) {
				break
			}
			var explicit asn1.RawValue
			if rest, err = asn1.Unmarshal(rest, &explicit); err != nil || len(rest) != 0 || explicit.Class != asn1.ClassContextSpecific || explicit.Tag != 0 {
				break
			}
			if name, err := utf8String(explicit.Bytes); err == nil {
				return name, nil
			}
		}
	}
	return "", refuse(ErrIdentity, "the subject alternative name of the certificate is neither e-mail address nor URI nor Fulcio's user name")
}
