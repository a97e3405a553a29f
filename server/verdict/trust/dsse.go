package trust

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// inTotoPayload is the only payload that is read: a statement, which names what it is about. Anything
// else could be signed and then shown for another image.
const inTotoPayload = "application/vnd.in-toto+json"

const (
	maxSignatures = 16
	maxSignature  = 2 << 10 // of RSA-16384
)

// envelope is a DSSE envelope
// (https://github.com/secure-systems-lab/dsse/blob/v1.0.2/envelope.md).
type envelope struct {
	payloadType string
	payload     []byte
	signatures  []signature
}

type signature struct {
	keyID string // a hint by whoever sent it, not signed
	sig   []byte
}

// parseEnvelope reads an envelope. Unknown members are ignored, as the format demands.
func parseEnvelope(m object) (*envelope, error) {
	const what = "the DSSE envelope"
	e := &envelope{}
	var err error
	if e.payloadType, err = m.text("payloadType", what); err != nil {
		return nil, err
	}
	payload, err := m.text("payload", what)
	if err != nil {
		return nil, err
	}
	if e.payload, err = decode64(payload); err != nil {
		return nil, refuse(ErrMalformed, "the payload of the DSSE envelope is not base64")
	}
	var signatures []json.RawMessage
	if err := json.Unmarshal(m["signatures"], &signatures); err != nil {
		return nil, refuse(ErrMalformed, "the DSSE envelope has no list of signatures")
	}
	switch {
	case e.payloadType == "":
		return nil, refuse(ErrMalformed, "the DSSE envelope has no payloadType")
	case len(e.payload) == 0:
		return nil, refuse(ErrMalformed, "the DSSE envelope has no payload")
	case len(signatures) == 0:
		return nil, refuse(ErrSignature, "the DSSE envelope has no signature")
	case len(signatures) > maxSignatures:
		return nil, refuse(ErrTooLarge, "the DSSE envelope has %d signatures, the limit is %d", len(signatures), maxSignatures)
	}
	for _, raw := range signatures {
		s, err := parseSignature(raw)
		if err != nil {
			return nil, err
		}
		e.signatures = append(e.signatures, s)
	}
	return e, nil
}

func parseSignature(raw json.RawMessage) (signature, error) {
	const what = "a signature of the DSSE envelope"
	m, err := objectOf(raw, what)
	if err != nil {
		return signature{}, err
	}
	var s signature
	if s.keyID, err = m.text("keyid", what); err != nil {
		return signature{}, err
	}
	encoded, err := m.text("sig", what)
	if err != nil {
		return signature{}, err
	}
	if s.sig, err = decode64(encoded); err != nil || len(s.sig) == 0 {
		return signature{}, refuse(ErrMalformed, "%s is empty or not base64", what)
	}
	if len(s.sig) > maxSignature {
		return signature{}, refuse(ErrTooLarge, "%s is %d bytes long, the limit is %d", what, len(s.sig), maxSignature)
	}
	return s, nil
}

// decode64 reads standard or URL-safe base64; the format says that readers accept both.
func decode64(s string) ([]byte, error) {
	if strings.ContainsAny(s, "-_") {
		return base64.URLEncoding.DecodeString(s)
	}
	return base64.StdEncoding.DecodeString(s)
}

// pae is what is signed: the type and the payload, each with its length, so that no two pairs give the
// same bytes (https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md).
func pae(payloadType string, payload []byte) []byte {
	var b bytes.Buffer
	b.Grow(len(payloadType) + len(payload) + 48)
	b.WriteString("DSSEv1 ")
	b.WriteString(strconv.Itoa(len(payloadType)))
	b.WriteByte(' ')
	b.WriteString(payloadType)
	b.WriteByte(' ')
	b.WriteString(strconv.Itoa(len(payload)))
	b.WriteByte(' ')
	b.Write(payload)
	return b.Bytes()
}

// verifyEnvelope returns the key of the policy that signed the envelope.
func (p *Policy) verifyEnvelope(ctx context.Context, doc *document, seen time.Time) (*publicKey, error) {
	if len(p.keys) == 0 {
		return nil, refuse(ErrUntrusted, "it lists no keys, and the document is signed with a key")
	}
	message := doc.message()
	var worse error // a signature that would count but for its key
	for _, s := range doc.envelope.signatures {
		for _, k := range p.keys {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			if !k.verify(message, s.sig) {
				continue
			}
			err := p.usable(k, seen)
			if err == nil {
				return k, nil
			}
			worse = err
		}
	}
	if worse != nil {
		return nil, worse
	}
	return nil, refuse(ErrSignature, "no signature of the envelope verifies with one of its %d keys", len(p.keys))
}

// usable says why a key that signed does not count.
func (p *Policy) usable(k *publicKey, seen time.Time) error {
	const layout = time.RFC3339
	switch {
	case p.revoked[k.fingerprint]:
		return refuse(ErrRevoked, "the document is signed with key %s, which is in revoked_keys", k.fingerprint)
	case !k.from.IsZero() && seen.Before(k.from):
		return refuse(ErrWindow, "the document is signed with key %s, which is valid from %s, and was received at %s",
			k.fingerprint, k.from.Format(layout), seen.UTC().Format(layout))
	case !k.until.IsZero() && !seen.Before(k.until):
		return refuse(ErrWindow, "the document is signed with key %s, which was valid until %s, and was received at %s",
			k.fingerprint, k.until.Format(layout), seen.UTC().Format(layout))
	}
	return nil
}
