package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/cmd/cli"
)

func apiFetch() *cobra.Command {
	c := fetchX509("fetch")
	c.AddCommand(fetchX509("x509"), fetchJWT(), fetchWIT())
	return c
}

// fetchX509 is "api fetch" as well as "api fetch x509".
func fetchX509(use string) *cobra.Command {
	var write string
	var silent bool
	r := newWorkload(use, "Fetches X509-SVIDs", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		start := time.Now()
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			return denied(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			return denied(err)
		}
		took := time.Since(start)
		return r.output.Print(r.Command, func(w io.Writer) error {
			svids, err := parseX509(resp)
			if err != nil {
				return err
			}
			if !silent {
				printX509(w, svids, took)
			}
			if write != "" {
				return writeX509(w, write, svids)
			}
			return nil
		}, resp)
	})
	r.Flags().StringVar(&write, "write", "", "Directory for svid.N.pem, svid.N.key and bundle.N.pem (not with -output json)")
	r.Flags().BoolVar(&silent, "silent", false, "Do not print the SVIDs")
	return r.Command
}

// denied adds to a refusal where to learn its reason; the Workload API does not tell callers.
func denied(err error) error {
	if status.Code(err) == codes.PermissionDenied {
		return fmt.Errorf("%w; \"assay-agent explain -pid PID\" says why", err)
	}
	return err
}

// x509SVID is one SVID of an answer, parsed.
type x509SVID struct {
	id, hint  string
	chain     []*x509.Certificate
	key       []byte // PKCS #8
	bundle    []*x509.Certificate
	federated map[string][]*x509.Certificate // by trust domain ID
}

// parseX509 parses an answer and verifies each SVID against the bundle that came with it.
func parseX509(resp *workload.X509SVIDResponse) ([]x509SVID, error) {
	if len(resp.GetSvids()) == 0 {
		return nil, errors.New("workload response contains no svids")
	}
	federated := map[string][]*x509.Certificate{}
	for id, der := range resp.GetFederatedBundles() {
		certs, err := x509.ParseCertificates(der)
		if err != nil {
			return nil, fmt.Errorf("failed to parse bundle for federated domain %q: %w", id, err)
		}
		federated[id] = certs
	}
	svids := make([]x509SVID, len(resp.GetSvids()))
	for i, from := range resp.GetSvids() {
		s := x509SVID{id: from.GetSpiffeId(), hint: from.GetHint(), key: from.GetX509SvidKey(), federated: federated}
		var err error
		if s.chain, err = x509.ParseCertificates(from.GetX509Svid()); err != nil {
			return nil, fmt.Errorf("failed to parse svid entry %d for spiffe id %q: %w", i, s.id, err)
		}
		if s.bundle, err = x509.ParseCertificates(from.GetBundle()); err != nil {
			return nil, fmt.Errorf("failed to parse svid entry %d for spiffe id %q: failed to parse trust bundle: %w", i, s.id, err)
		}
		if len(s.chain) == 0 || len(s.bundle) == 0 {
			return nil, fmt.Errorf("failed to parse svid entry %d for spiffe id %q: no certificates found", i, s.id)
		}
		if _, err := x509.ParsePKCS8PrivateKey(s.key); err != nil {
			return nil, fmt.Errorf("failed to parse svid entry %d for spiffe id %q: failed to parse private key: %w", i, s.id, err)
		}
		id, err := spiffeid.FromString(s.id)
		if err != nil {
			return nil, err
		}
		if _, _, err := x509svid.Verify(s.chain, x509bundle.FromX509Authorities(id.TrustDomain(), s.bundle)); err != nil {
			return nil, fmt.Errorf("%q SVID failed verification against bundle: %w", s.id, err)
		}
		svids[i] = s
	}
	return svids, nil
}

// printX509 shows SVIDs in the lines that scripts look for.
func printX509(w io.Writer, svids []x509SVID, took time.Duration) {
	fmt.Fprintf(w, "Received %s after %s\n", cli.Count(len(svids), "svid", "svids"), took)
	period := func(name string, cert *x509.Certificate) {
		fmt.Fprintf(w, "%s Valid After:\t%v\n", name, cert.NotBefore)
		fmt.Fprintf(w, "%s Valid Until:\t%v\n", name, cert.NotAfter)
	}
	for _, s := range svids {
		fmt.Fprintf(w, "\nSPIFFE ID:\t\t%s\n", s.id)
		if s.hint != "" {
			fmt.Fprintf(w, "Hint:\t\t\t%s\n", s.hint)
		}
		period("SVID", s.chain[0])
		for i, cert := range s.chain[1:] {
			period(fmt.Sprintf("Intermediate #%d", i+1), cert)
		}
		for i, cert := range s.bundle {
			period(fmt.Sprintf("CA #%d", i+1), cert)
		}
		for _, id := range slices.Sorted(maps.Keys(s.federated)) {
			for i, cert := range s.federated[id] {
				period(fmt.Sprintf("[%s] CA #%d", id, i+1), cert)
			}
		}
	}
	fmt.Fprintln(w)
}

// writeX509 writes the SVIDs into a directory, keys for their owner only.
func writeX509(w io.Writer, dir string, svids []x509SVID) error {
	write := func(what, name string, text []byte, secret bool) error {
		path := filepath.Join(dir, name)
		fmt.Fprintf(w, "Writing %s to file %s.\n", what, path)
		return cli.WriteFile(path, text, secret)
	}
	for i, s := range svids {
		if err := write(fmt.Sprintf("SVID #%d", i), fmt.Sprintf("svid.%d.pem", i), certificates(s.chain), false); err != nil {
			return err
		}
		if err := write(fmt.Sprintf("key #%d", i), fmt.Sprintf("svid.%d.key", i), cli.KeyPEM(s.key), true); err != nil {
			return err
		}
		if err := write(fmt.Sprintf("bundle #%d", i), fmt.Sprintf("bundle.%d.pem", i), certificates(s.bundle), false); err != nil {
			return err
		}
		for j, id := range slices.Sorted(maps.Keys(s.federated)) {
			what := fmt.Sprintf("federated bundle #%d for trust domain %s", j, id)
			if err := write(what, fmt.Sprintf("federated_bundle.%d.%d.pem", i, j), certificates(s.federated[id]), false); err != nil {
				return err
			}
		}
	}
	return nil
}

func certificates(certs []*x509.Certificate) []byte {
	ders := make([][]byte, len(certs))
	for i, cert := range certs {
		ders[i] = cert.Raw
	}
	return cli.CertificatesPEM(ders...)
}

func fetchJWT() *cobra.Command {
	var audiences []string
	var spiffeID string
	r := newWorkload("jwt", "Fetches JWT-SVIDs", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		client := workload.NewSpiffeWorkloadAPIClient(conn)
		bundles, err := jwtBundles(ctx, client)
		if err != nil {
			return denied(err)
		}
		svids, err := client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: split(audiences), SpiffeId: spiffeID})
		if err != nil {
			return denied(err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			for _, s := range svids.GetSvids() {
				fmt.Fprintf(w, "token(%s):\n\t%s\n", s.GetSpiffeId(), s.GetSvid())
				if s.GetHint() != "" {
					fmt.Fprintf(w, "hint(%s):\n\t%s\n", s.GetSpiffeId(), s.GetHint())
				}
			}
			for _, id := range slices.Sorted(maps.Keys(bundles.GetBundles())) {
				fmt.Fprintf(w, "bundle(%s):\n\t%s\n", id, bundles.GetBundles()[id])
			}
			return nil
		}, svids, bundles)
	}).checked(func() error {
		if len(split(audiences)) == 0 {
			return errors.New("audience must be specified")
		}
		return nil
	})
	r.Flags().StringArrayVar(&audiences, "audience", nil, "Who the SVID is for; several are separated by commas")
	r.Flags().StringVar(&spiffeID, "spiffeID", "", "Only this SPIFFE ID; without it one SVID for each identity")
	format := *r.Flags().Lookup("output")
	format.Name, format.Usage = "format", "The same as -output, which SPIRE's scripts may still call so"
	r.Flags().AddFlag(&format)
	return r.Command
}

func fetchWIT() *cobra.Command {
	var spiffeID string
	r := newWorkload("wit", "Fetches WIT-SVIDs", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		client := workload.NewSpiffeWorkloadAPIClient(conn)
		stream, err := client.FetchWITSVID(ctx, &workload.WITSVIDRequest{SpiffeId: spiffeID})
		if err != nil {
			return denied(err)
		}
		svids, err := stream.Recv()
		if err != nil {
			return denied(err)
		}
		keys, err := client.FetchWITBundles(ctx, &workload.WITBundlesRequest{})
		if err != nil {
			return denied(err)
		}
		bundles, err := keys.Recv()
		if err != nil {
			return denied(err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			for _, s := range svids.GetSvids() {
				fmt.Fprintf(w, "token(%s):\n\t%s\n", s.GetSpiffeId(), s.GetWitSvid())
				if s.GetHint() != "" {
					fmt.Fprintf(w, "hint(%s):\n\t%s\n", s.GetSpiffeId(), s.GetHint())
				}
				fmt.Fprintf(w, "key(%s):\n\t%s\n", s.GetSpiffeId(), s.GetWitSvidKey())
			}
			for _, id := range slices.Sorted(maps.Keys(bundles.GetBundles())) {
				fmt.Fprintf(w, "bundle(%s):\n\t%s\n", id, bundles.GetBundles()[id])
			}
			return nil
		}, svids, bundles)
	})
	r.Flags().StringVar(&spiffeID, "spiffeID", "", "Only this SPIFFE ID; without it one SVID for each identity")
	return r.Command
}

// jwtBundles returns the first answer of the stream, and ends it.
func jwtBundles(ctx context.Context, client workload.SpiffeWorkloadAPIClient) (*workload.JWTBundlesResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	if err != nil {
		return nil, fmt.Errorf("failed to receive JWT bundles: %w", err)
	}
	return stream.Recv()
}

// split separates values at commas and drops empty ones.
func split(values []string) []string {
	var out []string
	for _, v := range values {
		for part := range strings.SplitSeq(v, ",") {
			if part != "" {
				out = append(out, part)
			}
		}
	}
	return out
}

func validateJWT() *cobra.Command {
	var audience, svid string
	r := newWorkload("jwt", "Validates a JWT-SVID", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := workload.NewSpiffeWorkloadAPIClient(conn).ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: svid})
		if err != nil {
			if s := status.Convert(err); s.Code() == codes.InvalidArgument {
				return fmt.Errorf("SVID is not valid: %s", s.Message())
			}
			return fmt.Errorf("unable to validate JWT SVID: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintln(w, "SVID is valid.")
			fmt.Fprintln(w, "SPIFFE ID :", resp.GetSpiffeId())
			fmt.Fprint(w, "Claims    : ")
			return cli.PrintProto(w, resp.GetClaims())
		}, resp)
	}).checked(func() error {
		switch {
		case audience == "":
			return errors.New("audience must be specified")
		case svid == "":
			return errors.New("svid must be specified")
		}
		return nil
	})
	r.Flags().StringVar(&audience, "audience", "", "Who the SVID must be for")
	r.Flags().StringVar(&svid, "svid", "", "The JWT-SVID")
	return r.Command
}
