package attestor_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor"
)

func newKey(t *testing.T) (*ecdsa.PrivateKey, attestor.KeyHash) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	hash, err := attestor.HashKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key, hash
}

func TestPreviousKey(t *testing.T) {
	old, oldHash := newKey(t)
	_, next := newKey(t)
	_, another := newKey(t)
	honest := attestor.AnswerPrevious("example.org", old, next, nil)
	t.Run("it is proved by a signature", func(t *testing.T) {
		got, err := attestor.AskPrevious(t.Context(), "example.org", next, honest)
		if err != nil || got != oldHash {
			t.Errorf("%x, %v", got, err)
		}
	})
	var recorded []byte
	_, err := attestor.AskPrevious(t.Context(), "example.org", next, func(ctx context.Context, challenge []byte) (answer []byte, err error) {
		recorded, err = honest(ctx, challenge)
		return recorded, err
	})
	if err != nil {
		t.Fatal(err)
	}
	for why, ask := range map[string]attestor.Ask{
		"an answer made for another trust domain's server": attestor.AnswerPrevious("other.org", old, next, nil),
		"an answer made for another new key":               attestor.AnswerPrevious("example.org", old, another, nil),
		"an answer of before":                              func(context.Context, []byte) ([]byte, error) { return recorded, nil },
		"no answer":                                        func(context.Context, []byte) ([]byte, error) { return nil, nil },
		"no key":                                           func(context.Context, []byte) ([]byte, error) { return []byte(`{"signature":"AAAA"}`), nil },
	} {
		t.Run("refused: "+why, func(t *testing.T) {
			if got, err := attestor.AskPrevious(t.Context(), "example.org", next, ask); !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("%x, %v", got, err)
			}
		})
	}
	t.Run("other challenges are the attestor's", func(t *testing.T) {
		ask := attestor.AnswerPrevious("example.org", old, next, func(_ context.Context, c []byte) ([]byte, error) { return append(c, '!'), nil })
		for _, challenge := range []string{"who?", "{}", `{"assay_previous_key":"AAAA"}`} {
			if got, err := ask(t.Context(), []byte(challenge)); err != nil || string(got) != challenge+"!" {
				t.Errorf("%s: %s, %v", challenge, got, err)
			}
		}
		if _, err := honest(t.Context(), []byte("who?")); err == nil || !strings.Contains(err.Error(), "knows none") {
			t.Errorf("error is %v", err)
		}
	})
}
