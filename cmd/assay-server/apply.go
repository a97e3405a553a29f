package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
)

// applyCommand makes the server's entries be what a file says.
//
// Whose an entry is, its ID says: OWNER.NAME. An ID is chosen when an entry is made, never changes, and is
// in every list, of SPIRE's API too. A hint would not do: it is handed to workloads, who choose by it.
func applyCommand() *cobra.Command {
	var file, owner string
	var planOnly, prune, expandEnv bool
	var declared *conf.Entries
	r := newRemote("apply", "Makes entries be what a file says", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		own, err := ownDomain(ctx, conn)
		if err != nil {
			return err
		}
		have, err := allEntries(ctx, conn)
		if err != nil {
			return err
		}
		p, err := applyPlan(declared, own.GetTrustDomain(), have, prune)
		if err != nil {
			return err
		}
		var failed error
		if !planOnly {
			failed = p.do(ctx, conn)
		}
		return errors.Join(failed, r.output.PrintValue(r.Command, func(w io.Writer) error { p.print(w); return nil }, p))
	}).checked(func() error {
		if file == "" {
			return errors.New("-f is required: the file with the entries; conf/entries.hcl is a sample")
		}
		var err error
		if declared, err = conf.LoadEntries(file, conf.Options{ExpandEnv: expandEnv}); err != nil {
			return cli.Invalid("File of entries", err)
		}
		if owner != "" {
			declared.Owner = owner
			return conf.OwnerError(owner)
		}
		if declared.Owner == "" {
			return fmt.Errorf("whose entries are they? Write owner = \"…\" into %s, or add -owner", file)
		}
		return nil
	})
	f := r.Flags()
	f.StringVarP(&file, "file", "f", "", "File with entry blocks")
	f.StringVar(&owner, "owner", "", "Whose entries they are, in place of what the file says")
	f.BoolVar(&planOnly, "plan", false, "Only say what would be done")
	f.BoolVar(&prune, "prune", false, "Delete the owner's entries that are not in the file")
	f.BoolVar(&expandEnv, "expandEnv", false, "Replace $NAME and ${NAME} in the file by environment variables")
	r.Long = `Makes entries be what a file says: what is missing is created, what differs is changed, and with -prune what the
file no longer has is deleted. The ID of an entry is OWNER.NAME; entries of others are never touched.`
	r.Example = "  assay-server apply -f entries.hcl -plan\n  assay-server apply -f entries.hcl -prune"
	return r.Command
}

// applyPlan says what is to be done for a file to be true.
func applyPlan(declared *conf.Entries, td string, have []*types.Entry, prune bool) (*plan, error) {
	p := &plan{Steps: []*step{}, Notes: []string{}}
	prefix := declared.Owner + "."
	byID, bySimilarity := map[string]*types.Entry{}, map[string]*types.Entry{}
	for _, e := range have {
		byID[e.GetId()] = e
		bySimilarity[similarity(e)] = e
	}
	wanted := map[string]bool{}
	for _, d := range declared.Entries {
		want, err := declaredEntry(d, prefix, td)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", d.Where, err)
		}
		wanted[want.Id] = true
		old := byID[want.Id]
		if twin := bySimilarity[similarity(want)]; twin != nil && twin.GetId() != want.Id && !strings.HasPrefix(twin.GetId(), prefix) {
			return nil, fmt.Errorf("%s: entry %s, which is not %s's, gives the same SPIFFE ID to the same selectors; delete it first, or leave this one out", d.Where, twin.GetId(), declared.Owner)
		}
		if old == nil {
			p.Steps = append(p.Steps, &step{Verb: stepCreate, Kind: "entry", Name: want.Id, Changes: entryNew(want), entry: want})
		} else if changes := entryChanges(old, want); len(changes) > 0 {
			p.Steps = append(p.Steps, &step{Verb: stepUpdate, Kind: "entry", Name: want.Id, Changes: changes, entry: want})
		} else {
			p.Unchanged++
		}
	}
	for _, e := range have {
		if !strings.HasPrefix(e.GetId(), prefix) || wanted[e.GetId()] {
			continue
		}
		if prune {
			p.Steps = append(p.Steps, &step{Verb: stepDelete, Kind: "entry", Name: e.GetId(), Changes: []string{"spiffe_id: " + idText(e.GetSpiffeId())}, entry: e})
		} else {
			p.note("entry %s is %s's and not in the file; -prune deletes it", e.GetId(), declared.Owner)
		}
	}
	p.order()
	return p, nil
}

// declaredEntry is what a block asks for.
func declaredEntry(d conf.DeclaredEntry, prefix, td string) (*types.Entry, error) {
	full := func(text string) (*types.SPIFFEID, error) {
		if strings.HasPrefix(text, "/") {
			text = "spiffe://" + td + text
		}
		return parseID(text)
	}
	id, err := full(d.SPIFFEID)
	if err != nil {
		return nil, err
	}
	parent, err := full(d.ParentID)
	if err != nil {
		return nil, err
	}
	e := &types.Entry{
		Id: prefix + d.Name, SpiffeId: id, ParentId: parent, FederatesWith: d.FederatesWith, DnsNames: d.DNSNames, Hint: d.Hint,
		X509SvidTtl: int32(d.X509SVIDTTL / time.Second), JwtSvidTtl: int32(d.JWTSVIDTTL / time.Second), //nolint:gosec // conf keeps them in range
		Admin: d.Admin, Downstream: d.Downstream, StoreSvid: d.StoreSVID,
	}
	if !d.ExpiresAt.IsZero() {
		e.ExpiresAt = d.ExpiresAt.Unix()
	}
	for _, s := range d.Selectors {
		e.Selectors = append(e.Selectors, &types.Selector{Type: s.Type, Value: s.Value})
	}
	if d.NoPrefetch || d.JTI {
		e.AdditionalAttributes = &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: d.NoPrefetch, JwtSvidIncludeJti: d.JTI}
	}
	return e, nil
}
