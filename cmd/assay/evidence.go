package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
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

	far             cli.Far
	token, audience string
	source          string
	patience        time.Duration
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
	p.far.AddTo(c)
	f := c.Flags()
	f.StringVar(&p.token, "token", "", "OIDC token of the CI system; others on the machine may see a command's flags, so rather use -tokenFile or ASSAY_ID_TOKEN")
	f.StringVar(&p.audience, "audience", "assay", "Audience to ask for where the token is fetched")
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
	if err := p.far.Check(); err != nil {
		return err
	}
	if p.token != "" && p.far.TokenPath != "" {
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
	if p.far.Server == "" {
		p.far.Server = os.Getenv(cli.EnvServer)
	}
	if p.far.Server == "" {
		return p.local.With(c, send)
	}
	token, err := p.findToken(ctx)
	if err != nil {
		return err
	}
	conn, done, err := p.far.Dial(ctx, token)
	if err != nil {
		return err
	}
	defer done()
	waited := cli.Patience(c.ErrOrStderr(), "waiting for "+p.far.Server)
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
	if p.token != "" {
		return p.token, nil
	}
	if token, err := p.far.Token(ctx); token != "" || err != nil {
		return token, err
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
