package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/wire/evidencev1"
)

func evidenceCommands() *cobra.Command {
	return cli.Group("evidence", "Tells a server about images, from a pipeline", evidencePush())
}

// push are the flags of "evidence push".
type push struct {
	what   cli.Evidence
	output cli.Output
	local  *cli.Socket

	server, bundlePath         string
	token, tokenFile, audience string
	source, workloadAPI        string
	patience                   time.Duration
}

func evidencePush() *cobra.Command {
	p := &push{local: cli.ServerSocket(conf.DefaultServerSocket)}
	c := &cobra.Command{
		Use: "push", Short: "Hands scan reports, VEX documents and signed statements about an image to a server", Args: cli.NoArgs,
		Long: `Hands documents about an image to a server, and prints what it makes of the image.

Who pushes is proved in one of three ways:

  an OIDC token of the CI system   -token, -tokenFile or the environment's ASSAY_ID_TOKEN; in a GitHub workflow
                                   with "id-token: write" it is fetched, for the audience that -audience names
  an SVID                          from the Workload API, where -workloadAPI or SPIFFE_ENDPOINT_SOCKET says
  nothing                          without -server: over the private socket of a server on this machine

The server is verified with the trust bundle: the one in -trustBundle, or the Workload API's.`,
		Example: "  assay evidence push -server assay.example.org:8081 -trustBundle bundle.pem \\\n" +
			"    -image registry.example.org/shop@sha256:… -scan trivy.json",
		PreRunE: func(*cobra.Command, []string) error { return p.check() },
		RunE:    func(c *cobra.Command, _ []string) error { return p.run(c) },
	}
	p.what.AddTo(c)
	f := c.Flags()
	f.StringVar(&p.server, "server", "", "The server, as host:port")
	f.StringVar(&p.bundlePath, "trustBundle", "", "PEM file with the server's trust bundle (assay-server bundle show)")
	f.StringVar(&p.token, "token", "", "OIDC token of the CI system; others on the machine may see a command's flags, so rather use -tokenFile or ASSAY_ID_TOKEN")
	f.StringVar(&p.tokenFile, "tokenFile", "", "File that holds the OIDC token")
	f.StringVar(&p.audience, "audience", "assay", "Audience to ask for where the token is fetched")
	f.StringVar(&p.workloadAPI, "workloadAPI", "", "Address of the Workload API, as unix:///path (default: SPIFFE_ENDPOINT_SOCKET)")
	f.StringVar(&p.source, "source", "", "Push on behalf of this source; for administrators")
	f.DurationVar(&p.patience, "timeout", time.Minute, "How long to wait for the server")
	p.local.AddTo(c)
	p.output.AddTo(c)
	return c
}

func (p *push) check() error {
	if err := p.what.Check(); err != nil {
		return err
	}
	if p.server != "" && !strings.Contains(p.server, ":") {
		return fmt.Errorf("-server %s has no port; write host:port, as in assay.example.org:8081", p.server)
	}
	if p.token != "" && p.tokenFile != "" {
		return errors.New("-token and -tokenFile are two ways to say the same; use one")
	}
	return nil
}

func (p *push) run(c *cobra.Command) error {
	ctx, cancel := context.WithTimeout(c.Context(), p.patience)
	defer cancel()
	send := func(ctx context.Context, conn *grpc.ClientConn) error {
		names, answers, err := p.what.PushAll(ctx, c, conn, p.source)
		if len(answers) == 0 {
			return err
		}
		messages := make([]proto.Message, len(answers))
		for n, a := range answers {
			messages[n] = a
		}
		return errors.Join(err, p.output.Print(c, func(w io.Writer) error { return printAll(w, names, answers) }, messages...))
	}
	if p.server == "" {
		return p.local.With(c, send)
	}
	token, err := p.findToken(ctx)
	if err != nil {
		return err
	}
	conn, done, err := p.dial(ctx, token != "")
	if err != nil {
		return err
	}
	defer done()
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	waited := cli.Patience(c.ErrOrStderr(), "waiting for "+p.server)
	defer waited()
	return send(ctx, conn)
}

func printAll(w io.Writer, names []string, answers []*evidencev1.PushResponse) error {
	for n, a := range answers {
		if err := cli.PrintPushed(w, names[n], a); err != nil {
			return err
		}
	}
	return nil
}

// findToken returns the token that the flags or the CI system's environment give, or nothing.
func (p *push) findToken(ctx context.Context) (string, error) {
	switch {
	case p.token != "":
		return p.token, nil
	case p.tokenFile != "":
		text, err := os.ReadFile(p.tokenFile)
		if err != nil {
			return "", fmt.Errorf("read token: %w", err)
		}
		return strings.TrimSpace(string(text)), nil
	}
	if token := os.Getenv("ASSAY_ID_TOKEN"); token != "" {
		return token, nil
	}
	if at := os.Getenv("ACTIONS_ID_TOKEN_REQUEST_URL"); at != "" {
		return fetchToken(ctx, at, os.Getenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN"), p.audience)
	}
	return "", nil
}

// fetchToken asks the runner of a GitHub workflow for a token.
func fetchToken(ctx context.Context, at, secret, audience string) (string, error) {
	u, err := url.Parse(at)
	if err != nil {
		return "", errors.New("read ACTIONS_ID_TOKEN_REQUEST_URL: it is no URL")
	}
	query := u.Query()
	query.Set("audience", audience)
	u.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil) //nolint:gosec // the runner's own address, from its environment
	if err != nil {
		return "", fmt.Errorf("fetch token: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+secret)
	resp, err := http.DefaultClient.Do(req) //nolint:gosec // likewise
	if err != nil {
		return "", fmt.Errorf("fetch token: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("fetch token: the runner answers %s", resp.Status)
	}
	var answer struct {
		Value string `json:"value"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&answer); err != nil || answer.Value == "" {
		return "", errors.New("fetch token: the runner's answer holds none")
	}
	return answer.Value, nil
}

// dial connects to the server over TLS. With a token no SVID is needed.
func (p *push) dial(ctx context.Context, token bool) (*grpc.ClientConn, func(), error) {
	var roots x509bundle.Source
	var own x509svid.Source
	done := func() {}
	if p.bundlePath != "" {
		pem, err := os.ReadFile(p.bundlePath)
		if err != nil {
			return nil, nil, fmt.Errorf("read trust bundle: %w", err)
		}
		pool, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString("unknown"), pem)
		if err != nil {
			return nil, nil, fmt.Errorf("read trust bundle %s: %w", p.bundlePath, err)
		}
		roots = anyDomain{pool}
	}
	if !token || roots == nil {
		address := p.workloadAPI
		if address == "" {
			address = os.Getenv("SPIFFE_ENDPOINT_SOCKET")
		}
		if address == "" {
			if !token {
				return nil, nil, errors.New("who pushes? Give a token (-tokenFile, ASSAY_ID_TOKEN), or an SVID (-workloadAPI, SPIFFE_ENDPOINT_SOCKET)")
			}
			return nil, nil, errors.New("how is the server to be verified? Name its trust bundle with -trustBundle, or the Workload API with -workloadAPI")
		}
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(address)))
		if err != nil {
			return nil, nil, fmt.Errorf("get an SVID from %s: %w", address, err)
		}
		done = func() { _ = source.Close() }
		own = source
		if roots == nil {
			roots = source
		}
	}
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
	conn, err := grpc.NewClient("dns:///"+p.server, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		done()
		return nil, nil, fmt.Errorf("connect to %s: %w", p.server, err)
	}
	return conn, func() { _ = conn.Close(); done() }, nil
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
		if err != nil {
			return fmt.Errorf("verify the server: %w", err)
		}
		if id.Path() != serverPath {
			return fmt.Errorf("verify the server: it is %s, which is no server", id)
		}
		return nil
	}
}
