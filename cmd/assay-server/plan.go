package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/assay-id/assay/cmd/cli"
)

// The verbs of a step.
const (
	stepCreate = "create"
	stepUpdate = "update"
	stepDelete = "delete"
)

// step is one thing that is to be changed.
type step struct {
	Verb string `json:"verb"`
	// Kind is "entry", "bundle", "federation" or "authorities".
	Kind string `json:"kind"`
	Name string `json:"name"`
	// Changes say what becomes different, or what is new.
	Changes []string `json:"changes"`
	Done    bool     `json:"done"`
	Error   string   `json:"error,omitempty"`

	entry      *types.Entry
	bundle     *types.Bundle
	federation *types.FederationRelationship
}

// plan is what is to be done, in this order.
type plan struct {
	Steps     []*step  `json:"steps"`
	Notes     []string `json:"notes"`
	Unchanged int      `json:"unchanged"`
}

func (p *plan) note(format string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(format, args...))
}

// print shows the plan in lines that begin with +, ~ and -.
func (p *plan) print(w io.Writer) {
	for _, s := range p.Steps {
		mark := map[string]string{stepCreate: "+", stepUpdate: "~", stepDelete: "-"}[s.Verb]
		fmt.Fprintf(w, "%s %s %s\n", mark, s.Kind, s.Name)
		for _, change := range s.Changes {
			fmt.Fprintf(w, "    %s\n", change)
		}
	}
	for _, note := range p.Notes {
		fmt.Fprintf(w, "# %s\n", note)
	}
	count, done := map[string]int{}, map[string]int{}
	for _, s := range p.Steps {
		count[s.Verb]++
		if s.Done {
			done[s.Verb]++
		}
	}
	if len(done) > 0 {
		fmt.Fprintf(w, "%d created, %d changed, %d deleted, %d as they should be\n", done[stepCreate], done[stepUpdate], done[stepDelete], p.Unchanged)
		return
	}
	fmt.Fprintf(w, "%d to create, %d to change, %d to delete, %d as they should be\n", count[stepCreate], count[stepUpdate], count[stepDelete], p.Unchanged)
}

// failed says what could not be done.
func (p *plan) failed() error {
	var lines []string
	for _, s := range p.Steps {
		if s.Error != "" {
			lines = append(lines, fmt.Sprintf("failed to %s %s %s: %s", s.Verb, s.Kind, s.Name, s.Error))
		}
	}
	if len(lines) == 0 {
		return nil
	}
	return fmt.Errorf("%s could not be done:\n%s", cli.Count(len(lines), "step", "steps"), strings.Join(lines, "\n"))
}

// entryNew says what a new entry is, for a plan.
func entryNew(e *types.Entry) []string { return entryChanges(&types.Entry{}, e) }

// entryChanges says what is different of two entries, field by field; what the server numbers and dates is
// left out.
func entryChanges(have, want *types.Entry) []string {
	have, want = plainEntry(have), plainEntry(want)
	var out []string
	fields := want.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		was, is := have.ProtoReflect().Get(f), want.ProtoReflect().Get(f)
		if was.Equal(is) || f.Message() != nil && !f.IsList() && proto.Equal(was.Message().Interface(), is.Message().Interface()) {
			continue
		}
		if text := fieldText(f, was); text != "" {
			out = append(out, fmt.Sprintf("%s: %s -> %s", f.Name(), text, orNone(fieldText(f, is))))
		} else {
			out = append(out, fmt.Sprintf("%s: %s", f.Name(), orNone(fieldText(f, is))))
		}
	}
	return out
}

func orNone(text string) string {
	if text == "" {
		return "none"
	}
	return text
}

// plainEntry is an entry without what its server says of it, in an order that means the same.
func plainEntry(e *types.Entry) *types.Entry {
	out := proto.CloneOf(e)
	out.Id, out.RevisionNumber, out.CreatedAt = "", 0, 0
	slices.SortFunc(out.Selectors, func(a, b *types.Selector) int {
		return strings.Compare(a.GetType()+":"+a.GetValue(), b.GetType()+":"+b.GetValue())
	})
	slices.Sort(out.FederatesWith)
	if a := out.GetAdditionalAttributes(); a != nil && proto.Equal(a, &types.Entry_AdditionalAttributes{}) {
		out.AdditionalAttributes = nil
	}
	return out
}

// fieldText is the value of a field as an operator would write it; empty for none.
func fieldText(f protoreflect.FieldDescriptor, v protoreflect.Value) string {
	if f.IsList() {
		var all []string
		for i := range v.List().Len() {
			all = append(all, valueText(v.List().Get(i)))
		}
		return strings.Join(all, " ")
	}
	if !v.IsValid() || v.Equal(f.Default()) {
		return ""
	}
	return valueText(v)
}

func valueText(v protoreflect.Value) string {
	m, ok := v.Interface().(protoreflect.Message)
	if !ok {
		return v.String()
	}
	if !m.IsValid() {
		return ""
	}
	switch x := m.Interface().(type) {
	case *types.SPIFFEID:
		return idText(x)
	case *types.Selector:
		return x.GetType() + ":" + x.GetValue()
	case *types.Entry_AdditionalAttributes:
		var on []string
		if x.GetDisableX509SvidPrefetch() {
			on = append(on, "disable_x509_svid_prefetch")
		}
		if x.GetJwtSvidIncludeJti() {
			on = append(on, "jwt_svid_include_jti")
		}
		return strings.Join(on, " ")
	}
	return fmt.Sprint(m.Interface())
}

// similarity is equal for entries that one server does not have twice.
func similarity(e *types.Entry) string {
	s := plainEntry(e)
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%s", idText(s.GetSpiffeId()), idText(s.GetParentId()))
	for _, one := range s.GetSelectors() {
		fmt.Fprintf(&b, "\n%s:%s", one.GetType(), one.GetValue())
	}
	return b.String()
}

// How many items go into one call, as other controllers do it.
const (
	writeBatch  = 50
	deleteBatch = 200
)

// do does the plan. What fails is noted at its step, and the rest is done.
func (p *plan) do(ctx context.Context, conn *grpc.ClientConn) error {
	p.order()
	for _, s := range p.Steps {
		if s.Kind != "entry" {
			s.finish(s.doBundle(ctx, conn))
		}
	}
	client := entryv1.NewEntryClient(conn)
	var all []*step
	for _, s := range p.Steps {
		if s.Kind == "entry" {
			all = append(all, s)
		}
	}
	for len(all) > 0 {
		verb, size := all[0].Verb, writeBatch
		if verb == stepDelete {
			size = deleteBatch
		}
		n := 1
		for n < len(all) && n < size && all[n].Verb == verb {
			n++
		}
		statuses, err := writeEntries(ctx, client, verb, all[:n])
		for i, s := range all[:n] {
			switch {
			case err != nil:
				s.finish(err)
			case i >= len(statuses):
				s.finish(fmt.Errorf("the server did not say what became of it"))
			case statuses[i].GetCode() != int32(codes.OK):
				s.finish(fmt.Errorf("%s (%s)", statuses[i].GetMessage(), cli.StatusText(statuses[i].GetCode())))
			default:
				s.finish(nil)
			}
		}
		all = all[n:]
	}
	return p.failed()
}

// order puts deletions last, but for those of entries that are in the way of new ones.
func (p *plan) order() {
	wanted := map[string]bool{}
	for _, s := range p.Steps {
		if s.Kind == "entry" && s.Verb != stepDelete {
			wanted[similarity(s.entry)] = true
		}
	}
	rank := func(s *step) int {
		switch {
		case s.Kind != "entry":
			return 0
		case s.Verb == stepDelete && wanted[similarity(s.entry)]:
			return 1
		case s.Verb == stepUpdate:
			return 2
		case s.Verb == stepCreate:
			return 3
		}
		return 4
	}
	slices.SortStableFunc(p.Steps, func(a, b *step) int { return rank(a) - rank(b) })
}

func (s *step) finish(err error) {
	s.Done = err == nil
	if err != nil {
		s.Error = err.Error()
	}
}

func writeEntries(ctx context.Context, client entryv1.EntryClient, verb string, steps []*step) ([]*types.Status, error) {
	entries := make([]*types.Entry, len(steps))
	ids := make([]string, len(steps))
	for i, s := range steps {
		entries[i], ids[i] = s.entry, s.entry.GetId()
	}
	var out []*types.Status
	switch verb {
	case stepCreate:
		resp, err := client.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: entries})
		if err != nil {
			return nil, err
		}
		for _, r := range resp.GetResults() {
			out = append(out, r.GetStatus())
		}
	case stepUpdate:
		resp, err := client.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: entries})
		if err != nil {
			return nil, err
		}
		for _, r := range resp.GetResults() {
			out = append(out, r.GetStatus())
		}
	default:
		resp, err := client.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: ids})
		if err != nil {
			return nil, err
		}
		for _, r := range resp.GetResults() {
			out = append(out, r.GetStatus())
		}
	}
	return out, nil
}

// doBundle does a step about bundles and federation.
func (s *step) doBundle(ctx context.Context, conn *grpc.ClientConn) error {
	var status *types.Status
	switch s.Kind {
	case "authorities":
		_, err := bundlev1.NewBundleClient(conn).AppendBundle(ctx, &bundlev1.AppendBundleRequest{
			X509Authorities: s.bundle.GetX509Authorities(), JwtAuthorities: s.bundle.GetJwtAuthorities(), WitAuthorities: s.bundle.GetWitAuthorities(),
		})
		return err
	case "bundle":
		resp, err := bundlev1.NewBundleClient(conn).BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{s.bundle}})
		if err != nil {
			return err
		}
		status = resp.GetResults()[0].GetStatus()
	default:
		client := trustdomainv1.NewTrustDomainClient(conn)
		list := []*types.FederationRelationship{s.federation}
		if s.Verb == stepCreate {
			resp, err := client.BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: list})
			if err != nil {
				return err
			}
			status = resp.GetResults()[0].GetStatus()
		} else {
			resp, err := client.BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{
				FederationRelationships: list, InputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true, BundleEndpointProfile: true},
			})
			if err != nil {
				return err
			}
			status = resp.GetResults()[0].GetStatus()
		}
	}
	if status.GetCode() != int32(codes.OK) {
		return fmt.Errorf("%s (%s)", status.GetMessage(), cli.StatusText(status.GetCode()))
	}
	return nil
}

// allEntries returns every entry that the server has.
func allEntries(ctx context.Context, conn *grpc.ClientConn) ([]*types.Entry, error) {
	var all []*types.Entry
	req := &entryv1.ListEntriesRequest{PageSize: entryPage}
	for {
		page, err := entryv1.NewEntryClient(conn).ListEntries(ctx, req)
		if err != nil {
			return nil, fmt.Errorf("list entries: %w", err)
		}
		all = append(all, page.GetEntries()...)
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			return all, nil
		}
	}
}

// ownDomain asks the server for the name of its trust domain, and its bundle.
func ownDomain(ctx context.Context, conn *grpc.ClientConn) (*types.Bundle, error) {
	b, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, fmt.Errorf("get the server's bundle: %w", err)
	}
	return b, nil
}
