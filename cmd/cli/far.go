package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
)

// Environment variables that stand in for the flags of Far.
const (
	EnvServer      = "ASSAY_SERVER"
	EnvTrustBundle = "ASSAY_TRUST_BUNDLE"
	EnvTokenFile   = "ASSAY_ID_TOKEN_FILE" //nolint:gosec // the name of a variable
	EnvToken       = "ASSAY_ID_TOKEN"      //nolint:gosec // likewise
	envWorkloadAPI = "SPIFFE_ENDPOINT_SOCKET"
)

// Far is a server that is spoken to over TCP: the flags that say where it is, how it is verified, and who calls: by
// an OIDC token, or by an SVID of the Workload API.
type Far struct {
	// Server is host:port; empty: none.
	Server string
	// BundlePath, TokenPath and WorkloadAPI are the other flags.
	BundlePath, TokenPath, WorkloadAPI string
	// Fetch returns a token if neither flags nor environment have one. Nil: there is none then.
	Fetch func(ctx context.Context) (string, error)

	quiet bool            // as Socket.Quiet
	own   x509svid.Source // what it is called with, if that is an SVID; set by Dial
}

// AddTo adds the flags to a command.
func (f *Far) AddTo(c *cobra.Command) {
	c.Flags().StringVar(&f.Server, "server", "", "The server over TCP, as host:port (or "+EnvServer+")")
	c.Flags().StringVar(&f.BundlePath, "trustBundle", "", "PEM file with that server's trust bundle (or "+EnvTrustBundle+")")
	c.Flags().StringVar(&f.TokenPath, "tokenFile", "", "File with the OIDC token to call it with (or "+EnvTokenFile+", or the token itself in "+EnvToken+")")
	c.Flags().StringVar(&f.WorkloadAPI, "workloadAPI", "", "Address of the Workload API to have an SVID from, as unix:///path (or "+envWorkloadAPI+")")
}

// Check says what is wrong with the flags.
func (f *Far) Check() error {
	if f.Server != "" && !strings.Contains(f.Server, ":") {
		return fmt.Errorf("-server %s has no port; write host:port, as in assay.example.org:8081", f.Server)
	}
	return nil
}

// AddFar adds the flags to a command that has the socket's, and returns which of both is meant once they are read.
func AddFar(c *cobra.Command, socket *Socket) func() (*Far, error) {
	far := new(Far)
	far.AddTo(c)
	return func() (*Far, error) {
		local := c.Flags().Changed("socketPath") || c.Flags().Changed("instance")
		switch {
		case far.Server != "" && local:
			return nil, errors.New("-server is a server over TCP, -socketPath and -instance are one on this machine; use one of them")
		case far.Server == "" && !local:
			far.Server = os.Getenv(EnvServer)
		}
		if far.Server == "" {
			for _, name := range []string{"trustBundle", "tokenFile", "workloadAPI"} {
				if c.Flags().Changed(name) {
					return nil, fmt.Errorf("-%s is for a server over TCP; name it with -server, or leave -%s out", name, name)
				}
			}
			return nil, nil // the socket is meant
		}
		far.quiet = socket.Quiet
		return far, far.Check()
	}
}

// With dials, calls do and hangs up.
func (f *Far) With(c *cobra.Command, do func(ctx context.Context, conn *grpc.ClientConn) error) error {
	ctx := c.Context()
	token, err := f.Token(ctx)
	if err != nil {
		return err
	}
	conn, done, err := f.Dial(ctx, token)
	if err != nil {
		return err
	}
	defer done()
	if !f.quiet {
		waited := Patience(c.ErrOrStderr(), "waiting for "+f.Server)
		defer waited()
	}
	err = do(ctx, conn)
	switch {
	case status.Code(err) == codes.PermissionDenied && f.own != nil:
		if svid, failed := f.own.GetX509SVID(); failed == nil {
			return fmt.Errorf("%w; it was called as %s, the first identity that the Workload API gives to this process", err, svid.ID)
		}
	case status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "rror while dialing"):
		return fmt.Errorf("%w; is %s the server's bind_address and bind_port, and does it run?", err, f.Server)
	case status.Code(err) == codes.Unimplemented && strings.Contains(err.Error(), "HTTP status"), unknownService(err):
		return fmt.Errorf("%w; something else than a server answers at %s: name the port that agents connect to, its bind_port", err, f.Server)
	}
	return err
}

// maxToken is far more than an OIDC token has, in bytes.
const maxToken = 64 << 10

// Token returns the OIDC token to call with, or nothing: then it is an SVID.
func (f *Far) Token(ctx context.Context) (string, error) {
	path := f.TokenPath
	if path == "" {
		if token := os.Getenv(EnvToken); token != "" {
			return token, nil
		}
		path = os.Getenv(EnvTokenFile)
	}
	if path != "" {
		return readToken(path)
	}
	if f.Fetch != nil {
		return f.Fetch(ctx)
	}
	return "", nil
}

func readToken(path string) (string, error) {
	text, err := attestor.ReadFile(path, maxToken)
	token := strings.TrimSpace(string(text))
	switch {
	case err != nil:
		return "", fmt.Errorf("read token: %w", err)
	case token == "":
		return "", fmt.Errorf("read token: %s is empty", path)
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
		return "", fmt.Errorf("read token: %s holds more than a token", path)
	}
	return token, nil
}

// bearer puts the token onto every call, and only over TLS.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (bearer) RequireTransportSecurity() bool { return true }

// Dial connects to the server over TLS. With a token no SVID is needed.
func (f *Far) Dial(ctx context.Context, token string) (*grpc.ClientConn, func(), error) {
	roots, err := f.roots()
	if err != nil {
		return nil, nil, err
	}
	var own x509svid.Source
	done := func() {}
	if token == "" || roots == nil {
		address := f.WorkloadAPI
		if address == "" {
			address = os.Getenv(envWorkloadAPI)
		}
		switch {
		case address == "" && token == "":
			return nil, nil, fmt.Errorf("who calls? Give a token (-tokenFile, %s, %s), or an SVID (-workloadAPI, %s)", EnvTokenFile, EnvToken, envWorkloadAPI)
		case address == "":
			return nil, nil, fmt.Errorf("how is the server to be verified? Name its trust bundle with -trustBundle or %s, or the Workload API with -workloadAPI", EnvTrustBundle)
		}
		waited := Patience(os.Stderr, "waiting for an SVID from "+address)
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(address)))
		waited()
		if err != nil {
			return nil, nil, fmt.Errorf("get an SVID from %s: %w", address, err)
		}
		done = func() { _ = source.Close() }
		if token == "" {
			own, f.own = source, source
		}
		if roots == nil {
			roots = source
		}
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(clientTLS(roots, own))),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64 << 20)),
	}
	if token != "" {
		options = append(options, grpc.WithPerRPCCredentials(bearer(token)))
	}
	conn, err := grpc.NewClient("dns:///"+f.Server, options...)
	if err != nil {
		done()
		return nil, nil, fmt.Errorf("connect to %s: %w", f.Server, err)
	}
	return conn, func() { _ = conn.Close(); done() }, nil
}

// roots are what the server is verified with, if a file has them.
func (f *Far) roots() (x509bundle.Source, error) {
	path := f.BundlePath
	if path == "" {
		path = os.Getenv(EnvTrustBundle)
	}
	if path == "" {
		return nil, nil // the Workload API has them
	}
	pem, err := os.ReadFile(path) //nolint:gosec // whoever runs the command names it
	if err != nil {
		return nil, fmt.Errorf("read trust bundle: %w", err)
	}
	pool, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString("unknown"), pem)
	if err != nil {
		return nil, fmt.Errorf("read trust bundle %s: %w", path, err)
	}
	return anyDomain{pool}, nil
}

func clientTLS(roots x509bundle.Source, own x509svid.Source) *tls.Config {
	config := &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"},
		InsecureSkipVerify: true, //nolint:gosec // SPIFFE verifies IDs, not names of hosts; see VerifyConnection
		VerifyConnection:   verifyServer(roots),
	}
	if own != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			svid, err := own.GetX509SVID()
			if err != nil {
				return nil, err
			}
			cert := &tls.Certificate{PrivateKey: svid.PrivateKey}
			for _, c := range svid.Certificates {
				cert.Certificate = append(cert.Certificate, c.Raw)
			}
			return cert, nil
		}
	}
	return config
}

// anyDomain is a bundle from a file that does not say whose it is.
type anyDomain struct{ bundle *x509bundle.Bundle }

func (a anyDomain) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return a.bundle, nil
}

// serverPath is the path of every server's SPIFFE ID.
const serverPath = "/spire/server"

// verifyServer accepts a server of the trust domain whose bundle is known.
func verifyServer(roots x509bundle.Source) func(tls.ConnectionState) error {
	return func(state tls.ConnectionState) error {
		id, _, err := x509svid.Verify(state.PeerCertificates, roots)
		if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); unknown {
			return fmt.Errorf("verify the server: %w: it is another server, or its trust bundle is a newer one", err)
		}
		if err != nil {
			return fmt.Errorf("verify the server: %w", err)
		}
		if id.Path() != serverPath {
			return fmt.Errorf("verify the server: it is %s, which is no server", id)
		}
		return nil
	}
}
