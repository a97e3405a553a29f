package site

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// Node is an agent as the server sees one, played by this process: it can do what an agent that is out of
// hand would.
type Node struct {
	ID   spiffeid.ID
	Conn *grpc.ClientConn
	// Dial returns another connection, which the caller closes.
	Dial func() (*grpc.ClientConn, error)
}

// Joiner makes nodes. All have one key.
type Joiner struct {
	// CSR is a request for a certificate of the nodes' key.
	CSR []byte

	site   *Site
	bundle *x509bundle.Bundle
	key    *ecdsa.PrivateKey
}

// NewJoiner returns a Joiner for the site's server, which must be running.
func (s *Site) NewJoiner(ctx context.Context) (*Joiner, error) {
	path, err := s.WriteBundle(ctx)
	if err != nil {
		return nil, err
	}
	j := &Joiner{site: s}
	if j.bundle, err = x509bundle.Load(spiffeid.RequireTrustDomainFromString(TrustDomain), path); err != nil {
		return nil, err
	}
	if j.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	j.CSR, err = x509.CreateCertificateRequest(rand.Reader,
		&x509.CertificateRequest{Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}}, j.key)
	return j, err
}

func (j *Joiner) dial(config *tls.Config) (*grpc.ClientConn, error) {
	return grpc.NewClient(fmt.Sprintf("127.0.0.1:%d", j.site.Port), grpc.WithTransportCredentials(credentials.NewTLS(config)))
}

// Join attests with a join token over a connection of its own, as an agent does, and returns the node with
// its connection by its own certificate. The caller closes that.
func (j *Joiner) Join(ctx context.Context, token string) (*Node, error) {
	server := tlsconfig.AuthorizeID(spiffeid.RequireFromPath(j.bundle.TrustDomain(), "/spire/server"))
	conn, err := j.dial(tlsconfig.TLSClientConfig(j.bundle, server))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "join_token", Payload: []byte(token)},
		Params: &agentv1.AgentX509SVIDParams{Csr: j.CSR},
	}}})
	if err != nil && !errors.Is(err, io.EOF) { // EOF: the answer says why
		return nil, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	svid := &x509svid.SVID{PrivateKey: j.key, ID: spiffeid.RequireFromPath(j.bundle.TrustDomain(), resp.GetResult().GetSvid().GetId().GetPath())}
	for _, der := range resp.GetResult().GetSvid().GetCertChain() {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		svid.Certificates = append(svid.Certificates, cert)
	}
	n := &Node{ID: svid.ID, Dial: func() (*grpc.ClientConn, error) {
		return j.dial(tlsconfig.MTLSClientConfig(svid, j.bundle, server))
	}}
	n.Conn, err = n.Dial()
	return n, err
}
