package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/assay-id/assay/cmd/cli"
)

// The profiles of bundle endpoints on the command line.
const (
	profileWeb    = "https_web"
	profileSPIFFE = "https_spiffe"
)

// relationship is one federation as flags or a file say it; the names in JSON are SPIRE's.
type relationship struct {
	TrustDomain  string          `json:"trustDomain"`
	URL          string          `json:"bundleEndpointURL"`
	Profile      string          `json:"bundleEndpointProfile"`
	EndpointID   string          `json:"endpointSPIFFEID"`
	Bundle       json.RawMessage `json:"trustDomainBundle"`
	BundleFormat string          `json:"trustDomainBundleFormat"`
}

// wire parses what was said. bundle is the bundle's text, if any.
func (r relationship) wire(bundle []byte) (*types.FederationRelationship, error) {
	switch {
	case r.TrustDomain == "":
		return nil, errors.New("trust domain is required")
	case r.URL == "":
		return nil, errors.New("bundle endpoint URL is required")
	case r.Profile == "":
		return nil, errors.New("bundle endpoint profile is required")
	case r.Profile == profileSPIFFE && r.EndpointID == "":
		return nil, errors.New("endpoint SPIFFE ID is required if 'https_spiffe' endpoint profile is set")
	case r.Profile == profileWeb && r.EndpointID != "":
		return nil, fmt.Errorf("the %q profile has no endpoint SPIFFE ID", profileWeb)
	}
	td, err := spiffeid.TrustDomainFromString(r.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("cannot parse trust domain: %w", err)
	}
	w := &types.FederationRelationship{TrustDomain: td.Name(), BundleEndpointUrl: r.URL}
	switch r.Profile {
	case profileWeb:
		w.BundleEndpointProfile = &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
	case profileSPIFFE:
		id, err := spiffeid.FromString(r.EndpointID)
		if err != nil {
			return nil, fmt.Errorf("cannot parse bundle endpoint SPIFFE ID: %w", err)
		}
		w.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: id.String()}}
	default:
		return nil, fmt.Errorf("unknown bundle endpoint profile type: %q", r.Profile)
	}
	if len(bundle) > 0 {
		if w.TrustDomainBundle, err = parseBundle(bundle, r.BundleFormat, td.Name()); err != nil {
			return nil, fmt.Errorf("cannot parse bundle: %w", err)
		}
	}
	return w, nil
}

// readRelationships reads {"federationRelationships": […]} as SPIRE's command takes it, or
// {"federation_relationships": […]} as "federation list -output json" prints it.
func readRelationships(name string, stdin io.Reader) ([]*types.FederationRelationship, error) {
	text, err := readData(name, stdin)
	if err != nil {
		return nil, err
	}
	var file struct {
		Written []json.RawMessage `json:"federationRelationships"`
		Listed  []json.RawMessage `json:"federation_relationships"`
		Next    any               `json:"next_page_token"`
	}
	if err := strict(text, &file); err != nil {
		return nil, fmt.Errorf("read federation relationships from %s: %w; it must be {\"federationRelationships\": [{…}]}", name, err)
	}
	var list []*types.FederationRelationship
	for i, raw := range file.Written {
		var r relationship
		if err := strict(raw, &r); err != nil {
			return nil, fmt.Errorf("could not parse item %d: %w", i, err)
		}
		w, err := r.wire(r.text())
		if err != nil {
			return nil, fmt.Errorf("could not parse item %d: %w", i, err)
		}
		list = append(list, w)
	}
	for i, raw := range file.Listed {
		w := new(types.FederationRelationship)
		if err := protojson.Unmarshal(raw, w); err != nil {
			return nil, fmt.Errorf("could not parse item %d: %w", i, err)
		}
		list = append(list, w)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("read federation relationships from %s: there are none; it must be {\"federationRelationships\": [{…}]}", name)
	}
	return list, nil
}

// text returns the bundle in a file's relationship: a JSON text that holds PEM or a document, or the document
// as it is. Without a format it is what it looks like.
func (r *relationship) text() []byte {
	var quoted string
	text := []byte(r.Bundle)
	if json.Unmarshal(r.Bundle, &quoted) == nil {
		text = []byte(quoted)
	}
	if r.BundleFormat == "" {
		r.BundleFormat = formatPEM
		if bytes.HasPrefix(bytes.TrimSpace(text), []byte("{")) {
			r.BundleFormat = formatSPIFFE
		}
	}
	return text
}

// outcome is what became of one relationship.
type outcome struct {
	status *types.Status
	made   *types.FederationRelationship
}

// federationWrite is the command that creates or updates.
func federationWrite(verb, short string, do func(ctx context.Context, r *remote, conn *grpc.ClientConn, list []*types.FederationRelationship) ([]outcome, error)) *cobra.Command {
	var given relationship
	var data, path string
	r := newRemote(verb, short, func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		var list []*types.FederationRelationship
		var err error
		if data != "" {
			list, err = readRelationships(data, r.InOrStdin())
		} else {
			var bundle []byte
			if path != "" {
				if bundle, err = readData(path, r.InOrStdin()); err != nil {
					return fmt.Errorf("cannot read bundle file: %w", err)
				}
			}
			list = make([]*types.FederationRelationship, 1)
			list[0], err = given.wire(bundle)
		}
		if err != nil {
			return err
		}
		outcomes, err := do(ctx, r, conn, list)
		if err != nil || r.output.JSON() {
			return err
		}
		return printOutcomes(r, verb, list, outcomes)
	})
	r.checked(func() error {
		flags := []string{"trustDomain", "bundleEndpointURL", "bundleEndpointProfile", "endpointSpiffeID", "trustDomainBundlePath", "trustDomainBundleFormat"}
		for _, name := range flags {
			if data != "" && r.Flags().Changed(name) {
				return errors.New("cannot use other flags to specify relationship fields when 'data' flag is set")
			}
		}
		return checkFormat(&given.BundleFormat)()
	})
	f := r.Flags()
	f.StringVar(&data, "data", "", "JSON file with federation relationships; - is standard input. No other flag about them may be set then")
	f.StringVar(&given.TrustDomain, "trustDomain", "", "The trust domain to federate with")
	f.StringVar(&given.URL, "bundleEndpointURL", "", "The URL of its bundle endpoint, https only")
	f.StringVar(&given.Profile, "bundleEndpointProfile", "", "How the endpoint proves itself: https_web or https_spiffe")
	f.StringVar(&given.EndpointID, "endpointSpiffeID", "", "The endpoint's SPIFFE ID, with https_spiffe")
	f.StringVar(&path, "trustDomainBundlePath", "", "File with the trust domain's bundle; - is standard input")
	f.StringVar(&given.BundleFormat, "trustDomainBundleFormat", formatPEM, "What that file is: pem or spiffe")
	return r.Command
}

func printOutcomes(r *remote, verb string, list []*types.FederationRelationship, outcomes []outcome) error {
	out, errOut := r.OutOrStdout(), r.ErrOrStderr()
	failed := false
	for i, o := range outcomes {
		if code := codes.Code(o.status.GetCode()); code != codes.OK { //nolint:gosec // codes are small
			failed = true
			fmt.Fprintf(errOut, "Failed to %s the following federation relationship (code: %s, msg: %q):\n", verb, code, o.status.GetMessage())
			printRelationship(errOut, list[min(i, len(list)-1)])
			continue
		}
		fmt.Fprintln(out)
		printRelationship(out, o.made)
	}
	if failed {
		return fmt.Errorf("failed to %s one or more federation relationships", verb)
	}
	return nil
}

func printRelationship(w io.Writer, f *types.FederationRelationship) {
	fmt.Fprintf(w, "Trust domain              : %s\n", f.GetTrustDomain())
	fmt.Fprintf(w, "Bundle endpoint URL       : %s\n", f.GetBundleEndpointUrl())
	switch profile := f.GetBundleEndpointProfile().(type) {
	case *types.FederationRelationship_HttpsWeb:
		fmt.Fprintf(w, "Bundle endpoint profile   : %s\n", profileWeb)
	case *types.FederationRelationship_HttpsSpiffe:
		fmt.Fprintf(w, "Bundle endpoint profile   : %s\n", profileSPIFFE)
		fmt.Fprintf(w, "Endpoint SPIFFE ID        : %s\n", profile.HttpsSpiffe.GetEndpointSpiffeId())
	}
}

func federationCreate() *cobra.Command {
	return federationWrite("create", "Begins to fetch the bundle of another trust domain",
		func(ctx context.Context, r *remote, conn *grpc.ClientConn, list []*types.FederationRelationship) ([]outcome, error) {
			resp, err := trustdomainv1.NewTrustDomainClient(conn).BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: list})
			if err != nil {
				return nil, fmt.Errorf("request failed: %w", err)
			}
			var outcomes []outcome
			for _, result := range resp.GetResults() {
				outcomes = append(outcomes, outcome{result.GetStatus(), result.GetFederationRelationship()})
			}
			return outcomes, r.output.Print(r.Command, func(io.Writer) error { return nil }, resp)
		})
}

func federationUpdate() *cobra.Command {
	return federationWrite("update", "Changes where the bundle of another trust domain is fetched",
		func(ctx context.Context, r *remote, conn *grpc.ClientConn, list []*types.FederationRelationship) ([]outcome, error) {
			resp, err := trustdomainv1.NewTrustDomainClient(conn).BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{FederationRelationships: list})
			if err != nil {
				return nil, fmt.Errorf("request failed: %w", err)
			}
			var outcomes []outcome
			for _, result := range resp.GetResults() {
				outcomes = append(outcomes, outcome{result.GetStatus(), result.GetFederationRelationship()})
			}
			return outcomes, r.output.Print(r.Command, func(io.Writer) error { return nil }, resp)
		})
}

func federationDelete() *cobra.Command {
	var id string
	r := newRemote("delete", "Ends to fetch the bundle of another trust domain, and keeps the bundle", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := trustdomainv1.NewTrustDomainClient(conn).BatchDeleteFederationRelationship(ctx, &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{id}})
		if err != nil {
			return fmt.Errorf("failed to delete federation relationship: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			for _, result := range resp.GetResults() {
				if result.GetStatus().GetCode() != int32(codes.OK) {
					return fmt.Errorf("failed to delete federation relationship %q: %s", result.GetTrustDomain(), result.GetStatus().GetMessage())
				}
			}
			return says("federation relationship deleted.")(w)
		}, resp)
	}).checked(required(&id, "id is required"))
	r.Flags().StringVar(&id, "id", "", "The trust domain")
	return r.Command
}

func federationList() *cobra.Command {
	return newRemote("list", "Lists trust domains whose bundles are fetched, but for those in the configuration file", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := trustdomainv1.NewTrustDomainClient(conn).ListFederationRelationships(ctx, &trustdomainv1.ListFederationRelationshipsRequest{})
		if err != nil {
			return fmt.Errorf("error listing federation relationship: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			list := resp.GetFederationRelationships()
			fmt.Fprintf(w, "Found %s\n", cli.Count(len(list), "federation relationship", "federation relationships"))
			for _, f := range list {
				fmt.Fprintln(w)
				printRelationship(w, f)
			}
			return nil
		}, resp)
	}).Command
}

func federationShow() *cobra.Command {
	var td string
	r := newRemote("show", "Shows where the bundle of another trust domain is fetched", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		f, err := trustdomainv1.NewTrustDomainClient(conn).GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: td})
		if err != nil {
			return fmt.Errorf("error showing federation relationship: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintf(w, "Found a federation relationship with trust domain %s:\n\n", f.GetTrustDomain())
			printRelationship(w, f)
			return nil
		}, f)
	}).checked(required(&td, "a trust domain name is required"))
	r.Flags().StringVar(&td, "trustDomain", "", "The trust domain")
	return r.Command
}

func federationRefresh() *cobra.Command {
	var id string
	r := newRemote("refresh", "Fetches the bundle of another trust domain now", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		_, err := trustdomainv1.NewTrustDomainClient(conn).RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: id})
		switch status.Code(err) {
		case codes.OK:
			return r.output.Print(r.Command, says("Bundle refreshed"), &types.Status{Message: codes.OK.String()})
		case codes.NotFound:
			return fmt.Errorf("there is no federation relationship with trust domain %q", id)
		default:
			return fmt.Errorf("failed to refresh bundle: %w", err)
		}
	}).checked(required(&id, "id is required"))
	r.Flags().StringVar(&id, "id", "", "The trust domain")
	return r.Command
}

// required refuses an empty flag.
func required(value *string, complaint string) func() error {
	return func() error {
		if *value == "" {
			return errors.New(complaint)
		}
		return nil
	}
}
