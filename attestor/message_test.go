package attestor_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/assay-id/assay/attestor"
)

func TestChallenge(t *testing.T) {
	type message struct {
		Nonce string `json:"nonce"`
	}
	broken := errors.New("stream was lost")
	for _, c := range []struct {
		name, says string
		err        error
		want       error  // nil: the answer is taken
		text       string // of the error
	}{
		{"an answer", `{"nonce":"b"}`, nil, nil, ""},
		{"one that is no JSON", `nonce=secret`, nil, attestor.ErrEvidence, "read answer: message is not the JSON it should be"},
		{"one with more behind it", `{"nonce":"b"}{}`, nil, attestor.ErrEvidence, "read answer: message is not the JSON it should be"},
		{"one that is too large", `"` + strings.Repeat("x", attestor.MaxEvidence) + `"`, nil, attestor.ErrEvidence, "read answer: it is too large"},
		{"none", "", broken, broken, "ask challenge: stream was lost"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var answer message
			err := attestor.Challenge(t.Context(), func(_ context.Context, challenge []byte) ([]byte, error) {
				if string(challenge) != `{"nonce":"a"}` {
					t.Errorf("asked %s", challenge)
				}
				return []byte(c.says), c.err
			}, message{"a"}, &answer)
			switch {
			case c.want == nil:
				if err != nil || answer.Nonce != "b" {
					t.Errorf("%+v, %v", answer, err)
				}
			case !errors.Is(err, c.want) || err.Error() != c.text:
				t.Errorf("%v, want %q", err, c.text)
			}
			if c.err != nil && errors.Is(err, attestor.ErrEvidence) {
				t.Error("a lost stream is called forged evidence")
			}
		})
	}
}

func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		attestor.Pause(t.Context(), time.Minute)
		if took := time.Since(began); took < 30*time.Second || took > 90*time.Second {
			t.Errorf("it took %s", took)
		}
		ended, end := context.WithCancel(t.Context())
		end()
		began = time.Now()
		attestor.Pause(ended, time.Hour)
		if took := time.Since(began); took != 0 {
			t.Errorf("it outlived its context by %s", took)
		}
	})
}
