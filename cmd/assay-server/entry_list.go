package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/assay-id/assay/cmd/cli"
)

// entryPage is how many entries are asked for at a time, so that an answer stays below gRPC's limits.
const entryPage = 500

// entryFilter are the flags that choose entries.
type entryFilter struct {
	parentID, spiffeID, hint           string
	selectors, federatesWith           []string
	matchSelectorsOn, matchFederatesOn string
	downstream                         bool
}

func (f *entryFilter) addTo(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.parentID, "parentID", "", "Only entries with this parent")
	flags.StringVar(&f.spiffeID, "spiffeID", "", "Only entries that give this SPIFFE ID")
	flags.StringArrayVar(&f.selectors, "selector", nil, "Only entries with this selector, as type:value. Can be used more than once")
	flags.StringVar(&f.matchSelectorsOn, "matchSelectorsOn", "superset", "How -selector is matched: exact, any, superset or subset")
	flags.StringArrayVar(&f.federatesWith, "federatesWith", nil, "Only entries that federate with this trust domain. Can be used more than once")
	flags.StringVar(&f.matchFederatesOn, "matchFederatesWithOn", "superset", "How -federatesWith is matched: exact, any, superset or subset")
	flags.BoolVar(&f.downstream, "downstream", false, "Only entries of downstream servers")
	flags.StringVar(&f.hint, "hint", "", "Only entries with this hint")
}

// parsed returns the filter in its public form.
func (f *entryFilter) parsed() (*entryv1.ListEntriesRequest_Filter, error) {
	var out entryv1.ListEntriesRequest_Filter
	var err error
	if f.parentID != "" {
		if out.ByParentId, err = parseID(f.parentID); err != nil {
			return nil, fmt.Errorf("error parsing parent ID %q: %w", f.parentID, err)
		}
	}
	if f.spiffeID != "" {
		if out.BySpiffeId, err = parseID(f.spiffeID); err != nil {
			return nil, fmt.Errorf("error parsing SPIFFE ID %q: %w", f.spiffeID, err)
		}
	}
	// They are looked at also where nothing is matched: whoever wrote one meant something by it.
	for _, on := range []string{f.matchSelectorsOn, f.matchFederatesOn} {
		if err := knownMatch(on); err != nil {
			return nil, err
		}
	}
	if len(f.selectors) > 0 {
		if out.BySelectors, err = selectorMatch(f.selectors, f.matchSelectorsOn); err != nil {
			return nil, err
		}
	}
	if len(f.federatesWith) > 0 {
		match := types.FederatesWithMatch_MatchBehavior_value[matchNames[f.matchFederatesOn]]
		out.ByFederatesWith = &types.FederatesWithMatch{TrustDomains: f.federatesWith, Match: types.FederatesWithMatch_MatchBehavior(match)}
	}
	if f.hint != "" {
		out.ByHint = wrapperspb.String(f.hint)
	}
	if f.downstream {
		out.ByDownstream = wrapperspb.Bool(true)
	}
	return &out, nil
}

// matchNames are the ways of matching by what operators type.
var matchNames = map[string]string{"exact": "MATCH_EXACT", "any": "MATCH_ANY", "superset": "MATCH_SUPERSET", "subset": "MATCH_SUBSET"}

// knownMatch refuses a way of matching that there is not.
func knownMatch(on string) error {
	if matchNames[on] == "" {
		return fmt.Errorf("match behavior %q unknown; there are exact, any, superset and subset", on)
	}
	return nil
}

func selectorMatch(texts []string, on string) (*types.SelectorMatch, error) {
	if err := knownMatch(on); err != nil {
		return nil, err
	}
	match := types.SelectorMatch_MatchBehavior_value[matchNames[on]]
	selectors, err := parseSelectors(texts)
	if err != nil {
		return nil, fmt.Errorf("error parsing selectors: %w", err)
	}
	return &types.SelectorMatch{Selectors: selectors, Match: types.SelectorMatch_MatchBehavior(match)}, nil
}

func entryShow() *cobra.Command {
	var f entryFilter
	var entryID string
	r := newRemote("show", "Shows entries", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := listEntries(ctx, entryv1.NewEntryClient(conn), entryID, &f)
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintln(w, "Found "+cli.Count(len(resp.Entries), "entry", "entries"))
			for _, e := range resp.Entries {
				printEntry(w, e)
			}
			return nil
		}, resp)
	}).checked(func() error {
		if entryID != "" && (f.parentID != "" || f.spiffeID != "" || f.hint != "" || f.downstream || len(f.selectors)+len(f.federatesWith) > 0) {
			return errors.New("the -entryID flag can't be combined with others")
		}
		return nil
	})
	r.Flags().StringVar(&entryID, "entryID", "", "Only the entry with this ID")
	f.addTo(r.Command)
	return r.Command
}

// listEntries returns all entries that were asked for, ordered by SPIFFE ID, parent and selectors.
func listEntries(ctx context.Context, client entryv1.EntryClient, entryID string, f *entryFilter) (*entryv1.ListEntriesResponse, error) {
	all := new(entryv1.ListEntriesResponse)
	if entryID != "" {
		e, err := client.GetEntry(ctx, &entryv1.GetEntryRequest{Id: entryID})
		if err != nil {
			return nil, fmt.Errorf("error fetching entry ID %s: %w", entryID, err)
		}
		all.Entries = append(all.Entries, e)
		return all, nil
	}
	filter, err := f.parsed()
	if err != nil {
		return nil, err
	}
	for token := ""; ; {
		page, err := client.ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: filter, PageSize: entryPage, PageToken: token})
		if err != nil {
			return nil, fmt.Errorf("error fetching entries: %w", err)
		}
		all.Entries = append(all.Entries, page.GetEntries()...)
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	slices.SortStableFunc(all.Entries, func(a, b *types.Entry) int {
		return cmp.Or(
			cmp.Compare(idText(a.GetSpiffeId()), idText(b.GetSpiffeId())),
			cmp.Compare(idText(a.GetParentId()), idText(b.GetParentId())),
			slices.CompareFunc(a.GetSelectors(), b.GetSelectors(), func(x, y *types.Selector) int {
				return cmp.Or(cmp.Compare(x.GetType(), y.GetType()), cmp.Compare(x.GetValue(), y.GetValue()))
			}),
			cmp.Compare(a.GetId(), b.GetId()),
		)
	})
	return all, nil
}

func entryCount() *cobra.Command {
	var f entryFilter
	r := newRemote("count", "Counts entries", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		p, err := f.parsed()
		if err != nil {
			return err
		}
		resp, err := entryv1.NewEntryClient(conn).CountEntries(ctx, &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
			ByParentId: p.ByParentId, BySpiffeId: p.BySpiffeId, BySelectors: p.BySelectors,
			ByFederatesWith: p.ByFederatesWith, ByHint: p.ByHint, ByDownstream: p.ByDownstream,
		}})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			_, err := fmt.Fprintln(w, cli.Count(int(resp.GetCount()), "registration entry", "registration entries"))
			return err
		}, resp)
	})
	f.addTo(r.Command)
	return r.Command
}

func entryDelete() *cobra.Command {
	var entryID, file string
	r := newRemote("delete", "Deletes entries", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		ids := []string{entryID}
		if file != "" {
			r.unused("-file", "entryID")
			var err error
			if ids, err = readIDs(file, r.InOrStdin()); err != nil {
				return err
			}
		}
		client, resp := entryv1.NewEntryClient(conn), new(entryv1.BatchDeleteEntryResponse)
		unsent := inParts(ids, func(id string) int { return len(id) }, func(part []string) error {
			r, err := client.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: part})
			resp.Results = append(resp.Results, r.GetResults()...)
			return err
		})
		if unsent != nil && len(resp.Results) == 0 {
			return unsent
		}
		err := r.output.Print(r.Command, func(w io.Writer) error { return printDeleted(w, r.ErrOrStderr(), resp) }, resp)
		return errors.Join(err, notAll(len(resp.Results), len(ids), unsent))
	}).checked(func() error {
		if file == "" && entryID == "" {
			return errors.New("an entry ID is required")
		}
		return nil
	})
	r.Flags().StringVar(&entryID, "entryID", "", "ID of the entry to delete")
	r.Flags().StringVar(&file, "file", "", `File with the IDs to delete as JSON, {"ids": ["…"]}; - is standard input`)
	return r.Command
}

func printDeleted(out, errOut io.Writer, resp *entryv1.BatchDeleteEntryResponse) error {
	deleted, failed := 0, 0
	for _, r := range resp.GetResults() {
		if r.GetStatus().GetCode() == int32(codes.OK) {
			deleted++
			fmt.Fprintf(out, "Deleted entry with ID: %s\n", r.GetId())
		}
	}
	if deleted > 0 {
		fmt.Fprint(out, "\n\n")
	}
	for _, r := range resp.GetResults() {
		if code := r.GetStatus().GetCode(); code != int32(codes.OK) {
			failed++
			fmt.Fprintf(errOut, "Failed to delete entry with ID %s (code: %s, msg: %q)\n", r.GetId(), cli.StatusText(code), r.GetStatus().GetMessage())
		}
	}
	switch {
	case failed == 0:
		fmt.Fprintf(out, "Deleted %d entries successfully\n", deleted)
		return nil
	case deleted == 0:
		fmt.Fprintf(out, "Failed to delete %d entries\n", failed)
	default:
		fmt.Fprintf(out, "Deleted %d entries successfully, but failed to delete %d entries\n", deleted, failed)
	}
	return errors.New("failed to delete one or more entries")
}
