package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/workloadapi/identity"
)

// The formats of a bundle on the command line.
const (
	formatPEM    = "pem"
	formatSPIFFE = "spiffe"
)

func checkFormat(format *string) func() error {
	return func() error {
		if *format != formatPEM && *format != formatSPIFFE {
			return fmt.Errorf("invalid format: %q; there are pem and spiffe", *format)
		}
		return nil
	}
}

func bundleShow() *cobra.Command {
	var format string
	r := newRemote("show", "Shows the server's own bundle", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		b, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error { return printBundle(w, b, format, false) }, b)
	}).checked(checkFormat(&format))
	r.Flags().StringVar(&format, "format", formatPEM, "pem: the X.509 authorities; spiffe: the bundle document")
	return r.Command
}

func bundleCount() *cobra.Command {
	return newRemote("count", "Counts bundles", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := bundlev1.NewBundleClient(conn).CountBundles(ctx, &bundlev1.CountBundlesRequest{})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, says(cli.Count(int(resp.GetCount()), "bundle", "bundles")), resp)
	}).Command
}

func bundleList() *cobra.Command {
	var format, id string
	r := newRemote("list", "Lists bundles of other trust domains", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		client := bundlev1.NewBundleClient(conn)
		if id != "" {
			b, err := client.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: id})
			if err != nil {
				return err
			}
			return r.output.Print(r.Command, func(w io.Writer) error { return printBundle(w, b, format, false) }, b)
		}
		all, err := client.ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			for i, b := range all.GetBundles() {
				if i > 0 {
					fmt.Fprintln(w)
				}
				if err := printBundle(w, b, format, true); err != nil {
					return err
				}
			}
			return nil
		}, all)
	}).checked(checkFormat(&format))
	r.Flags().StringVar(&format, "format", formatPEM, "pem: the X.509 authorities; spiffe: the bundle document")
	r.Flags().StringVar(&id, "id", "", "Only the bundle of this trust domain")
	return r.Command
}

func bundleSet() *cobra.Command {
	var format, id, path string
	r := newRemote("set", "Makes or replaces the bundle of another trust domain", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		if path == "" {
			path = "-"
		}
		text, err := readData(path, r.InOrStdin())
		if err != nil {
			return fmt.Errorf("unable to load bundle data: %w", err)
		}
		b, err := parseBundle(text, format, id)
		if err != nil {
			return err
		}
		resp, err := bundlev1.NewBundleClient(conn).BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b}})
		if err != nil {
			return fmt.Errorf("failed to set federated bundle: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			for _, result := range resp.GetResults() {
				if result.GetStatus().GetCode() != int32(codes.OK) {
					return fmt.Errorf("failed to set federated bundle: %s", result.GetStatus().GetMessage())
				}
			}
			return says("bundle set.")(w)
		}, resp)
	}).checked(func() error {
		if id == "" {
			return errors.New("id flag is required")
		}
		return checkFormat(&format)()
	})
	r.Flags().StringVar(&format, "format", formatPEM, "What the file is: pem or spiffe")
	r.Flags().StringVar(&id, "id", "", "The trust domain")
	r.Flags().StringVar(&path, "path", "", "File with the bundle; standard input without it")
	return r.Command
}

func bundleDelete() *cobra.Command {
	modes := map[string]bundlev1.BatchDeleteFederatedBundleRequest_Mode{
		"restrict":   bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT,
		"delete":     bundlev1.BatchDeleteFederatedBundleRequest_DELETE,
		"dissociate": bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE,
	}
	var id, mode string
	r := newRemote("delete", "Deletes the bundle of another trust domain", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := bundlev1.NewBundleClient(conn).BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{
			Mode: modes[mode], TrustDomains: []string{id},
		})
		if err != nil {
			return fmt.Errorf("failed to delete federated bundle: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			for _, result := range resp.GetResults() {
				if result.GetStatus().GetCode() != int32(codes.OK) {
					return fmt.Errorf("failed to delete federated bundle %q: %s", result.GetTrustDomain(), result.GetStatus().GetMessage())
				}
			}
			return says("bundle deleted.")(w)
		}, resp)
	}).checked(func() error {
		if id == "" {
			return errors.New("id is required")
		}
		if _, ok := modes[mode]; !ok {
			return fmt.Errorf("unsupported mode %q; there are restrict, delete and dissociate", mode)
		}
		return nil
	})
	r.Flags().StringVar(&id, "id", "", "The trust domain")
	r.Flags().StringVar(&mode, "mode", "restrict", "With entries that federate with it: restrict refuses, delete deletes them, dissociate ends their federation")
	return r.Command
}

// printBundle writes a bundle in a format, with its trust domain above it if titled.
func printBundle(w io.Writer, b *types.Bundle, format string, titled bool) error {
	if titled {
		const line = "****************************************\n"
		fmt.Fprintf(w, "%s* %s\n%s", line, b.GetTrustDomain(), line)
	}
	if format == formatPEM {
		for _, a := range b.GetX509Authorities() {
			certs, err := x509.ParseCertificates(a.GetAsn1())
			if err != nil {
				return fmt.Errorf("unable to parse certificates ASN.1 DER data: %w", err)
			}
			for _, cert := range certs {
				if err := pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}); err != nil {
					return err
				}
			}
		}
		return nil
	}
	parsed, err := identity.BundleFromWire(b)
	if err != nil {
		return err
	}
	document, err := parsed.SPIFFEBundle().Marshal()
	if err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	var indented bytes.Buffer
	if err := json.Indent(&indented, document, "", "    "); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	_, err = fmt.Fprintln(w, indented.String())
	return err
}

// parseBundle reads a bundle of the trust domain id.
func parseBundle(text []byte, format, id string) (*types.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(id)
	if err != nil {
		return nil, fmt.Errorf("trust domain %q: %w", id, err)
	}
	if format == formatSPIFFE {
		b, err := spiffebundle.Parse(td, text)
		if err != nil {
			return nil, fmt.Errorf("unable to parse to spiffe bundle: %w", err)
		}
		return bundleWire(b)
	}
	b := &types.Bundle{TrustDomain: td.Name()}
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("unable to parse bundle data: there is a %s among the certificates", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("unable to parse bundle data: %w", err)
		}
		b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: cert.Raw})
	}
	if len(b.X509Authorities) == 0 {
		return nil, errors.New("unable to parse bundle data: no PEM blocks")
	}
	return b, nil
}

func bundleWire(b *spiffebundle.Bundle) (*types.Bundle, error) {
	out := &types.Bundle{TrustDomain: b.TrustDomain().Name()}
	for _, cert := range b.X509Authorities() {
		out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: cert.Raw})
	}
	for id, key := range b.JWTAuthorities() {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return nil, fmt.Errorf("unable to parse to type bundle: key %q: %w", id, err)
		}
		out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{PublicKey: der, KeyId: id})
	}
	for id, key := range b.WITAuthorities() {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return nil, fmt.Errorf("unable to parse to type bundle: key %q: %w", id, err)
		}
		out.WitAuthorities = append(out.WitAuthorities, &types.WITKey{PublicKey: der, KeyId: id})
	}
	if hint, ok := b.RefreshHint(); ok {
		out.RefreshHint = int64(hint.Seconds())
	}
	if n, ok := b.SequenceNumber(); ok {
		out.SequenceNumber = n
	}
	return out, nil
}
