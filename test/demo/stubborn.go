package main

import (
	"context"
	"errors"
	"fmt"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"

	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/test/lab/site"
)

// stubborn is a node out of hand: it says which image it runs, and asks for a certificate whatever it is told.
type stubborn struct {
	*site.Node
	csr   []byte
	entry string
}

// playStubborn joins, says that the image runs, and has the certificate signed once.
func (p *pipeline) playStubborn(ctx context.Context) (*stubborn, error) {
	joiner, err := p.NewJoiner(ctx)
	if err != nil {
		return nil, err
	}
	token, err := p.Token(ctx, "-spiffeID", domain+fleet)
	if err != nil {
		return nil, err
	}
	node, err := joiner.Join(ctx, token)
	if err != nil {
		return nil, err
	}
	p.later(func() { node.Conn.Close() })
	entry, err := p.entry(ctx, shop)
	if err != nil {
		return nil, err
	}
	s := &stubborn{Node: node, csr: joiner.CSR, entry: entry.GetId()}
	// The stream outlives the step that began it, and ends with the connection.
	stream, err := feedv1.NewFeedClient(node.Conn).Follow(context.WithoutCancel(ctx))
	if err != nil {
		return nil, err
	}
	hello := &feedv1.Hello{Capabilities: []string{"verdicts"}, Running: []string{p.image}}
	if err := stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: hello}}); err != nil {
		return nil, err
	}
	if _, err := stream.Recv(); err != nil {
		return nil, err
	}
	if why, err := s.ask(ctx); err != nil || why != "" {
		return nil, errors.Join(fmt.Errorf("the third node is refused while all is well: %s", why), err)
	}
	return s, nil
}

// ask asks for a certificate, and returns why it is refused, or nothing if it is signed.
func (s *stubborn) ask(ctx context.Context) (string, error) {
	resp, err := svidv1.NewSVIDClient(s.Conn).BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{
		Params: []*svidv1.NewX509SVIDParams{{EntryId: s.entry, Csr: s.csr}},
	})
	if err != nil {
		return "", err
	}
	if st := resp.GetResults()[0].GetStatus(); st.GetCode() != 0 {
		return st.GetMessage(), nil
	}
	return "", nil
}
