package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spf13/cobra"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/cmd/cli"
)

// mintedWIT is what "wit mint" prints as JSON.
type mintedWIT struct {
	Token      string          `json:"token"`
	PrivateKey json.RawMessage `json:"private_key"` // a JWK
}

// witKeys are the kinds of key by name, each with the algorithm that it signs with unless another is asked for.
var witKeys = map[string]struct {
	make      func() (crypto.Signer, error)
	algorithm string
}{
	"ec-p256":  {func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }, "ES256"},
	"ec-p384":  {func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P384(), rand.Reader) }, "ES384"},
	"rsa-2048": {func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) }, "RS256"},
	"rsa-4096": {func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 4096) }, "RS256"},
}

func witMint() *cobra.Command {
	var spiffeID, write, keyType, algorithm string
	var ttl time.Duration
	r := newRemote("mint", "Signs a WIT-SVID for a new key", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		id, err := parseID(spiffeID)
		if err != nil {
			return fmt.Errorf("SPIFFE ID %q: %w", spiffeID, err)
		}
		kind := witKeys[keyType]
		key, err := kind.make()
		if err != nil {
			return fmt.Errorf("unable to generate key: %w", err)
		}
		public, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return fmt.Errorf("unable to generate key: %w", err)
		}
		if algorithm == "" {
			algorithm = kind.algorithm
		}
		asked := time.Now()
		resp, err := svidv1.NewSVIDClient(conn).MintWITSVID(ctx, &svidv1.MintWITSVIDRequest{
			Id: id, PublicKey: public, SigningAlgorithm: algorithm, Ttl: wholeSeconds(ttl),
		})
		if err != nil {
			return fmt.Errorf("unable to mint SVID: %w", err)
		}
		token := resp.GetSvid().GetToken()
		if token == "" {
			return errors.New("server response missing token")
		}
		tellCapped(r.ErrOrStderr(), "WIT-SVID", asked, time.Unix(resp.Svid.GetExpiresAt(), 0), ttl)
		jwk, err := json.Marshal(jose.JSONWebKey{Key: key, Algorithm: algorithm})
		if err != nil {
			return fmt.Errorf("unable to encode key: %w", err)
		}
		if write != "" {
			return writeMintedWIT(r.OutOrStdout(), write, token, jwk)
		}
		return r.output.PrintValue(r.Command, func(w io.Writer) error {
			fmt.Fprintf(w, "WIT-SVID:\n%s\n\nPrivate key:\n%s\n", token, jwk)
			return nil
		}, &mintedWIT{Token: token, PrivateKey: jwk})
	}).checked(func() error {
		switch {
		case spiffeID == "":
			return errors.New("spiffeID must be specified")
		case witKeys[keyType].make == nil:
			return fmt.Errorf("key type %q is unknown; there are ec-p256, ec-p384, rsa-2048 and rsa-4096", keyType)
		}
		return checkTTL(ttl)
	})
	r.Flags().StringVar(&spiffeID, "spiffeID", "", "SPIFFE ID of the SVID")
	r.Flags().StringVar(&keyType, "keyType", "ec-p256", "Kind of the new key: ec-p256, ec-p384, rsa-2048 or rsa-4096")
	r.Flags().StringVar(&algorithm, "signingAlgorithm", "", "What the key will sign with, as ES256 or PS256; the usual of its kind without it")
	r.Flags().DurationVar(&ttl, "ttl", 0, "Lifetime of the SVID; 0s is the server's default")
	r.Flags().StringVar(&write, "write", "", "Directory for wit.jwt and key.jwk; standard output without it")
	return r.Command
}

func writeMintedWIT(out io.Writer, dir, token string, key []byte) error {
	for _, f := range []struct {
		name, what string
		text       []byte
	}{{"wit.jwt", "WIT-SVID", []byte(token)}, {"key.jwk", "Private key", key}} {
		path := filepath.Join(dir, f.name)
		if err := cli.WriteFile(path, f.text, true); err != nil {
			return fmt.Errorf("unable to write %s: %w", f.what, err)
		}
		fmt.Fprintf(out, "%s written to %s\n", f.what, path)
	}
	return nil
}
