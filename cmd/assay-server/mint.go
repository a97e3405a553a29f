package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	"net/url"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/cmd/cli"
)

// minted is what "x509 mint" prints as JSON: DER in base64.
type minted struct {
	X509SVID   [][]byte `json:"x509_svid"`
	PrivateKey []byte   `json:"private_key"`
	RootCAs    [][]byte `json:"root_cas"`
}

func x509Mint() *cobra.Command {
	var spiffeID, write string
	var dns []string
	var ttl time.Duration
	r := newRemote("mint", "Signs an X509-SVID for a new key", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		id, err := spiffeid.FromString(spiffeID)
		if err != nil {
			return fmt.Errorf("SPIFFE ID %q: %w", spiffeID, err)
		}
		asked := time.Now()
		m, expires, err := mint(ctx, conn, id, dns, ttl)
		if err != nil {
			return err
		}
		tellCapped(r.ErrOrStderr(), "X509-SVID", asked, expires, ttl)
		if write != "" {
			return writeMinted(r.OutOrStdout(), write, m)
		}
		return r.output.PrintValue(r.Command, func(w io.Writer) error {
			fmt.Fprintf(w, "X509-SVID:\n%s\n", cli.CertificatesPEM(m.X509SVID...))
			fmt.Fprintf(w, "Private key:\n%s\n", cli.KeyPEM(m.PrivateKey))
			fmt.Fprintf(w, "Root CAs:\n%s\n", cli.CertificatesPEM(m.RootCAs...))
			return nil
		}, m)
	}).checked(func() error {
		if spiffeID == "" {
			return errors.New("spiffeID must be specified")
		}
		return checkTTL(ttl)
	})
	r.Flags().StringVar(&spiffeID, "spiffeID", "", "SPIFFE ID of the SVID")
	r.Flags().DurationVar(&ttl, "ttl", 0, "Lifetime of the SVID; 0s is the server's default")
	r.Flags().StringArrayVar(&dns, "dns", nil, "DNS name for the SVID. Can be used more than once")
	r.Flags().StringVar(&write, "write", "", "Directory for svid.pem, key.pem and bundle.pem; standard output without it")
	return r.Command
}

func mint(ctx context.Context, conn *grpc.ClientConn, id spiffeid.ID, dns []string, ttl time.Duration) (*minted, time.Time, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("unable to generate key: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("unable to generate key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URL()}, DNSNames: dns}, key)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("unable to generate CSR: %w", err)
	}
	resp, err := svidv1.NewSVIDClient(conn).MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: wholeSeconds(ttl)})
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("unable to mint SVID: %w", err)
	}
	if len(resp.GetSvid().GetCertChain()) == 0 {
		return nil, time.Time{}, errors.New("server response missing SVID chain")
	}
	bundle, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("unable to get bundle: %w", err)
	}
	if len(bundle.GetX509Authorities()) == 0 {
		return nil, time.Time{}, errors.New("server response missing X509 Authorities")
	}
	m := &minted{X509SVID: resp.Svid.CertChain, PrivateKey: keyDER}
	for _, a := range bundle.X509Authorities {
		m.RootCAs = append(m.RootCAs, a.GetAsn1())
	}
	return m, time.Unix(resp.Svid.GetExpiresAt(), 0), nil
}

func writeMinted(out io.Writer, dir string, m *minted) error {
	for _, f := range []struct {
		name, what string
		text       []byte
		secret     bool
	}{
		{"svid.pem", "X509-SVID", cli.CertificatesPEM(m.X509SVID...), false},
		{"key.pem", "Private key", cli.KeyPEM(m.PrivateKey), true},
		{"bundle.pem", "Root CAs", cli.CertificatesPEM(m.RootCAs...), false},
	} {
		path := filepath.Join(dir, f.name)
		if err := cli.WriteFile(path, f.text, f.secret); err != nil {
			return fmt.Errorf("unable to write %s: %w", f.what, err)
		}
		fmt.Fprintf(out, "%s written to %s\n", f.what, path)
	}
	return nil
}

func jwtMint() *cobra.Command {
	var spiffeID, write string
	var audience []string
	var ttl time.Duration
	r := newRemote("mint", "Signs a JWT-SVID", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		id, err := parseID(spiffeID)
		if err != nil {
			return fmt.Errorf("SPIFFE ID %q: %w", spiffeID, err)
		}
		asked := time.Now()
		resp, err := svidv1.NewSVIDClient(conn).MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: id, Audience: audience, Ttl: wholeSeconds(ttl)})
		if err != nil {
			return fmt.Errorf("unable to mint SVID: %w", err)
		}
		token := resp.GetSvid().GetToken()
		if token == "" {
			return errors.New("server response missing token")
		}
		tellCapped(r.ErrOrStderr(), "JWT-SVID", asked, time.Unix(resp.Svid.GetExpiresAt(), 0), ttl)
		if write != "" {
			if err := cli.WriteFile(write, []byte(token), true); err != nil {
				return fmt.Errorf("unable to write token: %w", err)
			}
			fmt.Fprintf(r.OutOrStdout(), "JWT-SVID written to %s\n", write)
			return nil
		}
		return r.output.Print(r.Command, says(token), resp)
	}).checked(func() error {
		switch {
		case spiffeID == "":
			return errors.New("spiffeID must be specified")
		case len(audience) == 0:
			return errors.New("at least one audience must be specified")
		}
		return checkTTL(ttl)
	})
	r.Flags().StringVar(&spiffeID, "spiffeID", "", "SPIFFE ID of the SVID")
	r.Flags().StringArrayVar(&audience, "audience", nil, "Who the SVID is for. Can be used more than once")
	r.Flags().DurationVar(&ttl, "ttl", 0, "Lifetime of the SVID; 0s is the server's default")
	r.Flags().StringVar(&write, "write", "", "File for the token; standard output without it")
	return r.Command
}

// cappedBy is what a lifetime must be short of what was asked for to be worth a word: the server's clock is not
// this one's, and an expiry has no fraction of a second.
const cappedBy = 5 * time.Second

// tellCapped says that an SVID does not live as long as it was asked for.
func tellCapped(w io.Writer, what string, asked, expires time.Time, ttl time.Duration) {
	if expires.Before(asked.Add(ttl - cappedBy)) {
		fmt.Fprintf(w, "%s lifetime was capped shorter than specified ttl; expires %q\n", what, expires.UTC().Format(time.RFC3339))
	}
}

func checkTTL(ttl time.Duration) error {
	if ttl < 0 || ttl > math.MaxInt32*time.Second {
		return fmt.Errorf("invalid value for TTL: %s is out of range", ttl)
	}
	return nil
}

// wholeSeconds rounds up, so that a short lifetime does not become the default one.
func wholeSeconds(ttl time.Duration) int32 {
	return int32((ttl + time.Second - 1) / time.Second) //nolint:gosec // checkTTL keeps it in range
}
