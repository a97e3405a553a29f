package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/workloadapi/identity"
)

// serverIDPath is the path of the server's own SPIFFE ID, the parent of entries for nodes.
const serverIDPath = "/spire/server"

// entryFlags are the flags that describe an entry.
type entryFlags struct {
	entryID, parentID, spiffeID, data, hint string
	selectors, federatesWith, dns           []string
	x509TTL, jwtTTL                         int
	entryExpiry                             int64
	node, admin, downstream, storeSVID      bool
	noPrefetch, jti                         bool
}

func (f *entryFlags) addTo(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.entryID, "entryID", "", "ID of the entry; made by the server if a new one has none")
	flags.StringVar(&f.parentID, "parentID", "", "SPIFFE ID of the entry's parent: an agent, a node alias or another entry")
	flags.StringVar(&f.spiffeID, "spiffeID", "", "SPIFFE ID that the entry gives")
	flags.StringArrayVar(&f.selectors, "selector", nil, "Selector as type:value; all of them must be proved. Can be used more than once")
	flags.StringArrayVar(&f.federatesWith, "federatesWith", nil, "Trust domain to federate with. Can be used more than once")
	flags.StringArrayVar(&f.dns, "dns", nil, "DNS name for the X509-SVID. Can be used more than once")
	flags.IntVar(&f.x509TTL, "x509SVIDTTL", 0, "Lifetime of X509-SVIDs in seconds; 0 is the server's default")
	flags.IntVar(&f.jwtTTL, "jwtSVIDTTL", 0, "Lifetime of JWT-SVIDs in seconds; 0 is the server's default")
	flags.Int64Var(&f.entryExpiry, "entryExpiry", 0, "When the entry expires, in seconds since 1970; 0 is never")
	flags.StringVar(&f.hint, "hint", "", "Hint that tells the workload its identities apart")
	flags.BoolVar(&f.admin, "admin", false, "Let the SPIFFE ID administer the server")
	flags.BoolVar(&f.downstream, "downstream", false, "The entry describes a downstream server")
	flags.BoolVar(&f.storeSVID, "storeSVID", false, "The SVID is to be kept in a store outside")
	flags.BoolVar(&f.noPrefetch, "disableX509SVIDPrefetch", false, "Do not sign the X509-SVID before it is asked for")
	flags.BoolVar(&f.jti, "jwtSVIDIncludeJTI", false, "Put a new jti claim into every JWT-SVID, none of which is cached then")
	flags.StringVar(&f.data, "data", "", "File with entries as JSON, in place of the other flags; - is standard input")
}

// unused tells of flags that another one leaves no room for. They are no error: SPIRE's commands take them in silence,
// and so do scripts that call them.
func (f *entryFlags) unused(r *remote) {
	switch {
	case f.data != "":
		r.unused("-data", "parentID", "spiffeID", "selector", "federatesWith", "dns", "x509SVIDTTL", "jwtSVIDTTL", "entryExpiry", "hint",
			"admin", "downstream", "storeSVID", "disableX509SVIDPrefetch", "jwtSVIDIncludeJTI", "node", "entryID")
	case f.node:
		r.unused("-node", "parentID")
	}
}

// check looks at the flags that need no server to be told wrong.
func (f *entryFlags) check() error {
	if f.data != "" {
		return nil
	}
	switch {
	case len(f.selectors) == 0:
		return errors.New("at least one selector is required")
	case f.node && len(f.federatesWith) > 0:
		return errors.New("node entries can not federate")
	case f.spiffeID == "":
		return errors.New("a SPIFFE ID is required")
	case f.x509TTL < 0:
		return errors.New("a positive x509-SVID TTL is required")
	case f.jwtTTL < 0:
		return errors.New("a positive JWT-SVID TTL is required")
	case f.x509TTL > math.MaxInt32 || f.jwtTTL > math.MaxInt32:
		return fmt.Errorf("a TTL is at most %d seconds", math.MaxInt32)
	}
	return nil
}

// entries returns the entries that the flags or the file describe.
func (f *entryFlags) entries(stdin io.Reader) ([]*types.Entry, error) {
	if f.data != "" {
		return readEntries(f.data, stdin)
	}
	id, err := parseID(f.spiffeID)
	if err != nil {
		return nil, fmt.Errorf("SPIFFE ID %q: %w", f.spiffeID, err)
	}
	parent := &types.SPIFFEID{TrustDomain: id.TrustDomain, Path: serverIDPath}
	if !f.node {
		if parent, err = parseID(f.parentID); err != nil {
			return nil, fmt.Errorf("parent ID %q: %w", f.parentID, err)
		}
	}
	selectors, err := parseSelectors(f.selectors)
	if err != nil {
		return nil, err
	}
	e := &types.Entry{
		Id: f.entryID, SpiffeId: id, ParentId: parent, Selectors: selectors,
		X509SvidTtl: int32(f.x509TTL), JwtSvidTtl: int32(f.jwtTTL), //nolint:gosec // check keeps them in range
		FederatesWith: f.federatesWith, DnsNames: f.dns, Hint: f.hint, ExpiresAt: f.entryExpiry,
		Admin: f.admin, Downstream: f.downstream, StoreSvid: f.storeSVID,
	}
	if f.noPrefetch || f.jti {
		e.AdditionalAttributes = &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: f.noPrefetch, JwtSvidIncludeJti: f.jti}
	}
	return []*types.Entry{e}, nil
}

// parseID reads a SPIFFE ID into its public form.
func parseID(text string) (*types.SPIFFEID, error) {
	id, err := spiffeid.FromString(text)
	if err != nil {
		return nil, err
	}
	return identity.IDWire(id), nil
}

// parseSelectors reads selectors of the form type:value.
func parseSelectors(texts []string) ([]*types.Selector, error) {
	selectors := make([]*types.Selector, 0, len(texts))
	for _, text := range texts {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			return nil, err
		}
		selectors = append(selectors, &types.Selector{Type: s.Type, Value: s.Value})
	}
	return selectors, nil
}

func entryCreate() *cobra.Command {
	var f entryFlags
	r := newRemote("create", "Creates entries", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		f.unused(r)
		entries, err := f.entries(r.InOrStdin())
		if err != nil {
			return err
		}
		client, resp := entryv1.NewEntryClient(conn), new(entryv1.BatchCreateEntryResponse)
		unsent := inParts(entries, entrySize, func(part []*types.Entry) error {
			r, err := client.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: part})
			resp.Results = append(resp.Results, r.GetResults()...)
			return err
		})
		if unsent != nil && len(resp.Results) == 0 {
			return unsent
		}
		results := make([]entryResult, len(resp.Results))
		for i, result := range resp.Results {
			// An entry that was refused is shown as it was given, but for one that exists already.
			if result.Status.GetCode() != int32(codes.OK) && result.Entry == nil && i < len(entries) {
				result.Entry = entries[i]
			}
			results[i] = entryResult{result.Status, result.Entry}
		}
		err = r.output.Print(r.Command, func(w io.Writer) error { return printResults(w, r.ErrOrStderr(), "create", results) }, resp)
		return errors.Join(err, notAll(len(results), len(entries), unsent))
	}).checked(func() error {
		if f.data == "" && f.parentID == "" && !f.node && len(f.selectors) > 0 {
			return errors.New("a parent ID is required if the node flag is not set")
		}
		return f.check()
	})
	f.addTo(r.Command)
	r.Flags().BoolVar(&f.node, "node", false, "The entry is for nodes that match, not for workloads: its parent is the server")
	r.Example = `  assay-server entry create -parentID spiffe://example.org/node -spiffeID spiffe://example.org/shop -selector unix:uid:1000
  assay-server entry create -node -spiffeID spiffe://example.org/node -selector x509pop:subject:cn:node1
  assay-server entry create -data entries.json`
	return r.Command
}

func entryUpdate() *cobra.Command {
	var f entryFlags
	r := newRemote("update", "Replaces what entries say", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		f.unused(r)
		entries, err := f.entries(r.InOrStdin())
		if err != nil {
			return err
		}
		client := entryv1.NewEntryClient(conn)
		prefetch, jti := r.Flags().Changed("disableX509SVIDPrefetch"), r.Flags().Changed("jwtSVIDIncludeJTI")
		if f.data == "" && (prefetch || jti) {
			// The wire has one message for both and no mask within it: one that the flags do not
			// name must be sent as it is, or it would be lost.
			old, err := client.GetEntry(ctx, &entryv1.GetEntryRequest{Id: f.entryID})
			if err != nil {
				return fmt.Errorf("failed to fetch existing entry to merge additional attributes: %w", err)
			}
			was := old.GetAdditionalAttributes()
			merged := &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: was.GetDisableX509SvidPrefetch(), JwtSvidIncludeJti: was.GetJwtSvidIncludeJti()}
			if prefetch {
				merged.DisableX509SvidPrefetch = f.noPrefetch
			}
			if jti {
				merged.JwtSvidIncludeJti = f.jti
			}
			entries[0].AdditionalAttributes = merged
		}
		resp := new(entryv1.BatchUpdateEntryResponse)
		unsent := inParts(entries, entrySize, func(part []*types.Entry) error {
			r, err := client.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: part})
			resp.Results = append(resp.Results, r.GetResults()...)
			return err
		})
		if unsent != nil && len(resp.Results) == 0 {
			return unsent
		}
		results := make([]entryResult, len(resp.Results))
		for i, result := range resp.Results {
			if result.Status.GetCode() != int32(codes.OK) && i < len(entries) {
				result.Entry = entries[i]
			}
			results[i] = entryResult{result.Status, result.Entry}
		}
		err = r.output.Print(r.Command, func(w io.Writer) error { return printResults(w, r.ErrOrStderr(), "update", results) }, resp)
		return errors.Join(err, notAll(len(results), len(entries), unsent))
	}).checked(func() error {
		switch {
		case f.data == "" && f.entryID == "":
			return errors.New("entry ID is required")
		case f.data == "" && len(f.selectors) > 0 && f.parentID == "":
			return errors.New("a parent ID is required")
		}
		return f.check()
	})
	f.addTo(r.Command)
	r.Long = "Replaces what entries say. The flags describe the whole entry: one that is left out takes its default."
	return r.Command
}

// entryResult is what came of one entry of a batch.
type entryResult struct {
	status *types.Status
	entry  *types.Entry
}

// printResults shows the entries a batch was about, first those that went well.
func printResults(out, errOut io.Writer, verb string, results []entryResult) error {
	failed := 0
	for _, r := range results {
		if r.status.GetCode() == int32(codes.OK) {
			printEntry(out, r.entry)
		}
	}
	for _, r := range results {
		if code := r.status.GetCode(); code != int32(codes.OK) {
			failed++
			fmt.Fprintf(errOut, "Failed to %s the following entry (code: %s, msg: %q):\n", verb, cli.StatusText(code), r.status.GetMessage())
			printEntry(errOut, r.entry)
		}
	}
	if failed > 0 {
		return fmt.Errorf("failed to %s one or more entries", verb)
	}
	return nil
}

// printEntry shows an entry in the lines that scripts look for, and an empty one after it.
func printEntry(w io.Writer, e *types.Entry) {
	line := func(name string, value any) { fmt.Fprintf(w, "%-24s: %v\n", name, value) }
	ttl := func(seconds int32) any {
		if seconds == 0 {
			return "default"
		}
		return seconds
	}
	flag := func(name string, on bool) {
		if on {
			line(name, on)
		}
	}
	id := e.GetId()
	if id == "" {
		id = "(none)"
	}
	line("Entry ID", id)
	line("SPIFFE ID", idText(e.GetSpiffeId()))
	line("Parent ID", idText(e.GetParentId()))
	line("Revision", e.GetRevisionNumber())
	flag("Downstream", e.GetDownstream())
	line("X509-SVID TTL", ttl(e.GetX509SvidTtl()))
	line("JWT-SVID TTL", ttl(e.GetJwtSvidTtl()))
	if at := e.GetExpiresAt(); at != 0 {
		over := ""
		if at <= time.Now().Unix() {
			over = " (over: no agent is given this entry)"
		}
		line("Expiration time", time.Unix(at, 0).UTC().String()+over)
	}
	for _, s := range e.GetSelectors() {
		line("Selector", s.GetType()+":"+s.GetValue())
	}
	for _, td := range e.GetFederatesWith() {
		line("FederatesWith", td)
	}
	for _, name := range e.GetDnsNames() {
		line("DNS name", name)
	}
	flag("Admin", e.GetAdmin())
	flag("StoreSvid", e.GetStoreSvid())
	if e.GetHint() != "" {
		line("Hint", e.GetHint())
	}
	flag("DisableX509SvidPrefetch", e.GetAdditionalAttributes().GetDisableX509SvidPrefetch())
	flag("JwtSvidIncludeJti", e.GetAdditionalAttributes().GetJwtSvidIncludeJti())
	fmt.Fprintln(w)
}

// idText returns a SPIFFE ID as text, empty for none.
func idText(id *types.SPIFFEID) string {
	if id == nil {
		return ""
	}
	return "spiffe://" + id.GetTrustDomain() + id.GetPath()
}
