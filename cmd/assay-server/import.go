package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/cmd/cli"
)

// importCommand copies what a SPIRE server, or another of ours, knows of a trust domain.
func importCommand() *cobra.Command {
	from := &cli.Socket{Program: "the server to import from", Flag: "from"}
	var path string
	var yes bool
	r := newRemote("import", "Copies entries, bundles and federation relationships from a SPIRE server", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		from.Default = path
		source, err := from.Dial()
		if err != nil {
			return err
		}
		defer func() { _ = source.Close() }()
		if source.Target() == conn.Target() {
			return errors.New("-from is the socket of the server that would be imported into; name the other server's")
		}
		p, err := importPlan(ctx, source, conn, time.Now())
		if err != nil {
			return err
		}
		var failed error
		if yes {
			failed = p.do(ctx, conn)
		}
		return errors.Join(failed, r.output.PrintValue(r.Command, func(w io.Writer) error {
			p.print(w)
			if !yes && len(p.Steps) > 0 {
				fmt.Fprintln(w, "Nothing is done yet: add -yes to do it.")
			}
			return nil
		}, p))
	}).checked(func() error {
		if path == "" {
			return errors.New("-from is required: the private socket of the server to import from, as /tmp/spire-server/private/api.sock")
		}
		return nil
	})
	r.Flags().StringVar(&path, "from", "", "Path of the private socket of the server to import from")
	r.Flags().BoolVar(&yes, "yes", false, "Do it; without it is only told what would be done")
	r.Long = `Copies entries, bundles of other trust domains and federation relationships from a running SPIRE server of the same
trust domain, through its own API, and makes its authorities trusted beside ours. It says what would be done, and does
it with -yes. It can be run again at any time: what is there already stays, what differs is changed, nothing is deleted.`
	r.Example = "  assay-server import -from /tmp/spire-server/private/api.sock\n  assay-server import -from /tmp/spire-server/private/api.sock -yes"
	return r.Command
}

// importPlan compares what two servers have.
func importPlan(ctx context.Context, from, to *grpc.ClientConn, now time.Time) (*plan, error) {
	p := &plan{Steps: []*step{}, Notes: []string{}}
	theirs, err := ownDomain(ctx, from)
	if err != nil {
		return nil, fmt.Errorf("ask the server to import from: %w", err)
	}
	ours, err := ownDomain(ctx, to)
	if err != nil {
		return nil, err
	}
	if theirs.GetTrustDomain() != ours.GetTrustDomain() {
		return nil, fmt.Errorf("the server to import from is of trust domain %q and this one of %q: SPIFFE IDs cannot move from one to the other", theirs.GetTrustDomain(), ours.GetTrustDomain())
	}
	p.authorities(theirs, ours, now)
	if err := p.bundles(ctx, from, to, now); err != nil {
		return nil, err
	}
	if err := p.federations(ctx, from, to); err != nil {
		return nil, err
	}
	if err := p.entries(ctx, from, to, now); err != nil {
		return nil, err
	}
	return p, nil
}

// authorities makes what the other server has signed be trusted here.
func (p *plan) authorities(theirs, ours *types.Bundle, now time.Time) {
	more := lacking(ours, theirs, now)
	if n := len(more.GetWitAuthorities()); n > 0 && len(ours.GetWitAuthorities()) == 0 {
		p.note("%s of WIT-SVIDs: left out, since this server signs none; wit_svids in its configuration lets it", cli.Count(n, "authority", "authorities"))
		more.WitAuthorities = nil
	}
	if authorityCount(more) == 0 {
		p.Unchanged++
		return
	}
	p.Steps = append(p.Steps, &step{Verb: stepUpdate, Kind: "authorities", Name: ours.GetTrustDomain(), Changes: bundleText(more), bundle: more})
}

// lacking returns the authorities of want that have does not hold and that are still good.
func lacking(have, want *types.Bundle, now time.Time) *types.Bundle {
	out := &types.Bundle{TrustDomain: want.GetTrustDomain()}
	for _, a := range want.GetX509Authorities() {
		cert, err := x509.ParseCertificate(a.GetAsn1())
		known := slices.ContainsFunc(have.GetX509Authorities(), func(h *types.X509Certificate) bool { return bytes.Equal(h.GetAsn1(), a.GetAsn1()) })
		if err == nil && !known && !a.GetTainted() && now.Before(cert.NotAfter) {
			out.X509Authorities = append(out.X509Authorities, a)
		}
	}
	for _, k := range want.GetJwtAuthorities() {
		known := slices.ContainsFunc(have.GetJwtAuthorities(), func(h *types.JWTKey) bool { return h.GetKeyId() == k.GetKeyId() })
		if !known && !k.GetTainted() && (k.GetExpiresAt() == 0 || now.Unix() < k.GetExpiresAt()) {
			out.JwtAuthorities = append(out.JwtAuthorities, k)
		}
	}
	for _, k := range want.GetWitAuthorities() {
		known := slices.ContainsFunc(have.GetWitAuthorities(), func(h *types.WITKey) bool { return h.GetKeyId() == k.GetKeyId() })
		if !known && !k.GetTainted() && (k.GetExpiresAt() == 0 || now.Unix() < k.GetExpiresAt()) {
			out.WitAuthorities = append(out.WitAuthorities, k)
		}
	}
	return out
}

func authorityCount(b *types.Bundle) int {
	return len(b.GetX509Authorities()) + len(b.GetJwtAuthorities()) + len(b.GetWitAuthorities())
}

func bundleText(b *types.Bundle) []string {
	var out []string
	for _, a := range b.GetX509Authorities() {
		if cert, err := x509.ParseCertificate(a.GetAsn1()); err == nil {
			out = append(out, fmt.Sprintf("x509_authority: %s, until %s", cert.Subject, cert.NotAfter.UTC().Format(time.RFC3339)))
		}
	}
	for _, k := range b.GetJwtAuthorities() {
		out = append(out, "jwt_authority: "+k.GetKeyId())
	}
	for _, k := range b.GetWitAuthorities() {
		out = append(out, "wit_authority: "+k.GetKeyId())
	}
	return out
}

// bundles copies bundles of other trust domains. One that is fetched here is left alone: it may be newer.
func (p *plan) bundles(ctx context.Context, from, to *grpc.ClientConn, now time.Time) error {
	theirs, err := federatedBundles(ctx, from)
	if err != nil {
		return fmt.Errorf("list bundles of the server to import from: %w", err)
	}
	ours, err := federatedBundles(ctx, to)
	if err != nil {
		return fmt.Errorf("list bundles: %w", err)
	}
	fetched, err := relationships(ctx, to)
	if err != nil {
		return fmt.Errorf("list federation relationships: %w", err)
	}
	for _, b := range theirs {
		b.SequenceNumber = 0
		at := slices.IndexFunc(ours, func(o *types.Bundle) bool { return o.GetTrustDomain() == b.GetTrustDomain() })
		switch {
		case at < 0:
			p.Steps = append(p.Steps, &step{Verb: stepCreate, Kind: "bundle", Name: b.GetTrustDomain(), Changes: bundleText(b), bundle: b})
		case authorityCount(lacking(ours[at], b, now)) == 0:
			p.Unchanged++
		case slices.ContainsFunc(fetched, func(f *types.FederationRelationship) bool { return f.GetTrustDomain() == b.GetTrustDomain() }):
			p.note("bundle %s differs, and is fetched here: it is left alone", b.GetTrustDomain())
		default:
			p.Steps = append(p.Steps, &step{Verb: stepUpdate, Kind: "bundle", Name: b.GetTrustDomain(), Changes: bundleText(lacking(ours[at], b, now)), bundle: b})
		}
	}
	return nil
}

func federatedBundles(ctx context.Context, conn *grpc.ClientConn) ([]*types.Bundle, error) {
	var all []*types.Bundle
	req := &bundlev1.ListFederatedBundlesRequest{PageSize: entryPage}
	for {
		page, err := bundlev1.NewBundleClient(conn).ListFederatedBundles(ctx, req)
		if err != nil {
			return nil, err
		}
		all = append(all, page.GetBundles()...)
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			return all, nil
		}
	}
}

func relationships(ctx context.Context, conn *grpc.ClientConn) ([]*types.FederationRelationship, error) {
	var all []*types.FederationRelationship
	req := &trustdomainv1.ListFederationRelationshipsRequest{PageSize: entryPage}
	for {
		page, err := trustdomainv1.NewTrustDomainClient(conn).ListFederationRelationships(ctx, req)
		if err != nil {
			return nil, err
		}
		all = append(all, page.GetFederationRelationships()...)
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			return all, nil
		}
	}
}

// federations copies where bundles are fetched.
func (p *plan) federations(ctx context.Context, from, to *grpc.ClientConn) error {
	theirs, err := relationships(ctx, from)
	if err != nil {
		return fmt.Errorf("list federation relationships of the server to import from: %w", err)
	}
	ours, err := relationships(ctx, to)
	if err != nil {
		return fmt.Errorf("list federation relationships: %w", err)
	}
	for _, f := range theirs {
		want := relationshipText(f)
		at := slices.IndexFunc(ours, func(o *types.FederationRelationship) bool { return o.GetTrustDomain() == f.GetTrustDomain() })
		s := &step{Kind: "federation", Name: f.GetTrustDomain(), federation: f}
		switch {
		case at < 0:
			s.Verb, s.Changes = stepCreate, []string{want}
		case relationshipText(ours[at]) != want:
			s.Verb, s.Changes = stepUpdate, []string{relationshipText(ours[at]) + " -> " + want}
		default:
			p.Unchanged++
			continue
		}
		f.TrustDomainBundle = nil // goes by itself
		p.Steps = append(p.Steps, s)
	}
	return nil
}

func relationshipText(f *types.FederationRelationship) string {
	text := f.GetBundleEndpointUrl() + " " + profileWeb
	if s := f.GetHttpsSpiffe(); s != nil {
		text = f.GetBundleEndpointUrl() + " " + profileSPIFFE + " " + s.GetEndpointSpiffeId()
	}
	return text
}

// entries copies entries under their own IDs, the oldest first: which one counts of those with the same
// hint is decided by age.
func (p *plan) entries(ctx context.Context, from, to *grpc.ClientConn, now time.Time) error {
	theirs, err := allEntries(ctx, from)
	if err != nil {
		return fmt.Errorf("ask the server to import from: %w", err)
	}
	ours, err := allEntries(ctx, to)
	if err != nil {
		return err
	}
	byID, bySimilarity := map[string]*types.Entry{}, map[string]*types.Entry{}
	for _, e := range ours {
		byID[e.GetId()], bySimilarity[similarity(e)] = e, e
	}
	slices.SortStableFunc(theirs, func(a, b *types.Entry) int {
		return cmp.Or(cmp.Compare(a.GetCreatedAt(), b.GetCreatedAt()), strings.Compare(a.GetId(), b.GetId()))
	})
	left := 0
	for _, e := range theirs {
		switch {
		case e.GetExpiresAt() != 0 && e.GetExpiresAt() <= now.Unix(), tokenAlias(e):
			left++
			continue
		}
		have := byID[e.GetId()]
		if have == nil {
			have = bySimilarity[similarity(e)]
		}
		if have == nil {
			p.Steps = append(p.Steps, &step{Verb: stepCreate, Kind: "entry", Name: e.GetId(), Changes: entryNew(e), entry: e})
			continue
		}
		changes := entryChanges(have, e)
		if len(changes) == 0 {
			p.Unchanged++
			continue
		}
		e.Id = have.GetId()
		p.Steps = append(p.Steps, &step{Verb: stepUpdate, Kind: "entry", Name: e.GetId(), Changes: changes, entry: e})
	}
	if left > 0 {
		p.note("%s left out: they have expired, or were made with a join token for an agent that has to attest anew", cli.Count(left, "entry is", "entries are"))
	}
	return nil
}

// tokenAlias reports whether an entry was made by "token generate": its parent is an agent that there is
// only once.
func tokenAlias(e *types.Entry) bool {
	return strings.HasPrefix(e.GetParentId().GetPath(), "/spire/agent/join_token/") &&
		len(e.GetSelectors()) == 1 && e.GetSelectors()[0].GetType() == "spiffe_id"
}
