package attestor

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
)

// PreviousHeader is the metadata with which an agent that attests says that it has the key of the SVID it had
// before, and can prove it. Servers that do not know it, as SPIRE's, take no notice.
const PreviousHeader = "assay-previous-key"

// previousNonce is the size in bytes of the server's nonce.
const previousNonce = 32

// A previous key makes evidence that is good once good for the same agent again: a machine that was off for
// longer than its SVID lived is no stranger. What is signed cannot be used for anything else: it begins with
// words of its own, and has the trust domain and the new key in it.
type (
	// previousChallenge asks for a signature of the previous key. Challenges of attestors have no such field.
	previousChallenge struct {
		Nonce []byte `json:"assay_previous_key"`
	}
	previousResponse struct {
		PublicKey []byte `json:"public_key"` // PKIX
		Signature []byte `json:"signature"`
	}
)

func previousDigest(trustDomain string, nonce []byte, next KeyHash) []byte {
	h := sha256.New()
	fmt.Fprintf(h, "assay previous key of an agent\x00%s\x00%x\x00%x", trustDomain, nonce, next)
	return h.Sum(nil)
}

// AnswerPrevious returns an Ask that answers challenges about the previous key, and passes all others on to
// answer, which may be nil. next is the key that the agent wants an SVID for now.
func AnswerPrevious(trustDomain string, previous crypto.Signer, next KeyHash, answer Ask) Ask {
	return func(ctx context.Context, challenge []byte) ([]byte, error) {
		var c previousChallenge
		if json.Unmarshal(challenge, &c) != nil || len(c.Nonce) != previousNonce {
			if answer == nil {
				return nil, errors.New("server sent a challenge, and the attestor knows none")
			}
			return answer(ctx, challenge)
		}
		public, err := x509.MarshalPKIXPublicKey(previous.Public())
		if err != nil {
			return nil, fmt.Errorf("prove previous key: %w", err)
		}
		signature, err := previous.Sign(rand.Reader, previousDigest(trustDomain, c.Nonce, next), crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("prove previous key: %w", err)
		}
		return json.Marshal(previousResponse{PublicKey: public, Signature: signature})
	}
}

// AskPrevious has an agent prove which key it had before, and returns its hash. Whose it was is the caller's to
// know.
func AskPrevious(ctx context.Context, trustDomain string, next KeyHash, ask Ask) (KeyHash, error) {
	nonce := make([]byte, previousNonce)
	_, _ = rand.Read(nonce)
	question, err := json.Marshal(previousChallenge{Nonce: nonce})
	if err != nil {
		return KeyHash{}, err
	}
	said, err := ask(ctx, question)
	if err != nil {
		return KeyHash{}, fmt.Errorf("ask for previous key: %w", err)
	}
	var r previousResponse
	if json.Unmarshal(said, &r) != nil {
		return KeyHash{}, Refusef("read proof of previous key: it is not the JSON it should be")
	}
	parsed, err := x509.ParsePKIXPublicKey(r.PublicKey)
	if err != nil {
		return KeyHash{}, Refusef("read proof of previous key: it has no public key")
	}
	public, ok := parsed.(*ecdsa.PublicKey) // what agents' keys are
	if !ok || !ecdsa.VerifyASN1(public, previousDigest(trustDomain, nonce, next), r.Signature) {
		return KeyHash{}, Refusef("verify proof of previous key: the signature is wrong")
	}
	return HashKey(public)
}
