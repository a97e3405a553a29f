package external

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	upstreamauthorityv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/upstreamauthority/v1"
	"github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/types"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/attestor"
	block "github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/server/ca/upstream/upstreamtest"
	"github.com/assay-id/assay/test/fake/spireplugin"
)

// hasty is a stream whose answers are all there at once.
type hasty struct {
	grpc.ClientStream
	answers []string
	each    func() // before each answer
}

func (h *hasty) Recv() (*string, error) {
	h.each()
	if len(h.answers) == 0 {
		return nil, io.EOF
	}
	it := h.answers[0]
	h.answers = h.answers[1:]
	return &it, nil
}

func TestAnswersAreHeardInTheirOrder(t *testing.T) {
	path, sum := spireplugin.Self(t)
	log := logrus.New()
	log.SetOutput(io.Discard)
	a, err := Open(&block.Config{
		Name: "corporate", Cmd: path, Args: spireplugin.Args(spireplugin.Upstream), Env: spireplugin.Env(), Checksum: fmt.Sprintf("%x", sum),
		Data: fmt.Sprintf("mode = \"bundle\"\ndirectory = %q", t.TempDir()),
	}, attestor.Needs{TrustDomain: upstreamtest.TD, Log: log, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	given, heard := 0, []string{}
	stream := &hasty{answers: []string{"first", "second", "third"}}
	stream.each = func() {
		if len(heard) != given {
			t.Errorf("%d answers came, and only %q are heard", given, heard)
		}
		given++
	}
	first, err := conversation(t.Context(), a,
		func(context.Context, upstreamauthorityv1.UpstreamAuthorityClient) (grpc.ServerStreamingClient[string], error) {
			return stream, nil
		},
		func(it *string, first bool) error {
			if first != (len(heard) == 0) {
				t.Errorf("%q is the first answer: %t", *it, first)
			}
			heard = append(heard, *it)
			return nil
		})
	if err != nil || *first != "first" {
		t.Errorf("got %v, %v", first, err)
	}
	if err := a.Close(); err != nil { // waits for who listens
		t.Error(err)
	}
	if want := []string{"first", "second", "third"}; !slices.Equal(heard, want) {
		t.Errorf("heard %q, want %q", heard, want)
	}
}

func TestTheQuestionAnsweredLastIsTheOneThatCounts(t *testing.T) {
	a := &Authority{changed: make(chan struct{})}
	keys := func(ids ...string) (wire []*types.JWTKey) {
		for _, id := range ids {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.MarshalPKIXPublicKey(key.Public())
			if err != nil {
				t.Fatal(err)
			}
			wire = append(wire, &types.JWTKey{KeyId: id, PublicKey: der})
		}
		return wire
	}
	one, two, late := new(voice), new(voice), &voice{over: true}
	for n, c := range []struct {
		who   *voice
		first bool
		ids   []string
		err   error
		want  []string
	}{
		{one, true, []string{"a"}, nil, []string{"a"}},
		{one, false, []string{"a", "x"}, nil, []string{"a", "x"}},
		{two, true, []string{"a", "b"}, nil, []string{"a", "b"}},
		{one, false, []string{"a"}, errOvertaken, []string{"a", "b"}},
		{late, true, []string{"c"}, errOvertaken, []string{"a", "b"}},
		{two, false, []string{"b"}, nil, []string{"b"}},
	} {
		if err := a.keys(c.who, c.first, keys(c.ids...)); !errors.Is(err, c.err) {
			t.Errorf("answer %d: %v, want %v", n, err, c.err)
		}
		var got []string
		for _, k := range a.jwt {
			got = append(got, k.KeyID)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("after answer %d keys are %q, want %q", n, got, c.want)
		}
	}
}
