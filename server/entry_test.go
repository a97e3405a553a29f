package server

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// shop is an entry that is as it should be.
func shop(change ...func(*types.Entry)) *types.Entry {
	e := &types.Entry{SpiffeId: id("/shop"), ParentId: id("/node"), Selectors: selectors("unix:uid:1000")}
	for _, f := range change {
		f(e)
	}
	return e
}

// createOne returns the result of creating one entry.
func (w *world) createOne(e *types.Entry) *entryv1.BatchCreateEntryResponse_Result {
	w.t.Helper()
	resp, err := w.entries().BatchCreateEntry(w.context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.GetResults()[0]
}

func TestEntriesThatAreRefused(t *testing.T) {
	w := start(t)
	spiffeID := func(td, path string) func(*types.Entry) {
		return func(e *types.Entry) { e.SpiffeId = &types.SPIFFEID{TrustDomain: td, Path: path} }
	}
	own := func(path string) func(*types.Entry) { return spiffeID("example.org", path) }
	for _, c := range []struct {
		name   string
		change func(*types.Entry)
	}{
		{"without a SPIFFE ID", func(e *types.Entry) { e.SpiffeId = nil }},
		{"without a trust domain", spiffeID("", "/x")},
		{"of a foreign trust domain", spiffeID("elsewhere.test", "/x")},
		{"of an upper-case trust domain", spiffeID("Example.org", "/x")},
		{"of a trust domain with a port", spiffeID("example.org:80", "/x")},
		{"of a trust domain with a user", spiffeID("me@example.org", "/x")},
		{"of a trust domain that is a whole ID", spiffeID("spiffe://example.org/y", "/x")},
		{"of a trust domain that is too long", spiffeID(strings.Repeat("a", 256), "/x")},
		{"of a trust domain with a percent sign", spiffeID("example%2eorg", "/x")},
		{"without a path", own("")},
		{"with the path /", own("/")},
		{"with a trailing slash", own("/x/")},
		{"with an empty segment", own("/x//y")},
		{"with a dot segment", own("/x/./y")},
		{"with a dot-dot segment", own("/x/../y")},
		{"without a leading slash", own("x")},
		{"with a space", own("/x y")},
		{"with a percent sign", own("/x%20y")},
		{"with a non-ASCII letter", own("/schön")},
		{"with a control character", own("/x\x00y")},
		{"with a query", own("/x?y")},
		{"with a fragment", own("/x#y")},
		{"with a colon", own("/x:y")},
		{"longer than 2048 bytes", own("/" + strings.Repeat("x", 2048))},
		{"under /spire", own("/spire/agent/x")},
		{"of the server", own("/spire/server")},
		{"of /spire itself", own("/spire")},
		{"without a parent", func(e *types.Entry) { e.ParentId = nil }},
		{"with a foreign parent", func(e *types.Entry) { e.ParentId = &types.SPIFFEID{TrustDomain: "elsewhere.test", Path: "/x"} }},
		{"with the trust domain for a parent", func(e *types.Entry) { e.ParentId = &types.SPIFFEID{TrustDomain: "example.org"} }},
		{"with a malformed parent", func(e *types.Entry) { e.ParentId = id("/x/") }},
		{"without selectors", func(e *types.Entry) { e.Selectors = nil }},
		{"with a selector without a type", func(e *types.Entry) { e.Selectors = selectors(":v") }},
		{"with a selector without a value", func(e *types.Entry) { e.Selectors = selectors("t:") }},
		{"with a colon in a selector's type", func(e *types.Entry) { e.Selectors = []*types.Selector{{Type: "a:b", Value: "c"}} }},
		{"with a control character in a selector", func(e *types.Entry) { e.Selectors = selectors("a:b\nc") }},
		{"with a negative X509-SVID TTL", func(e *types.Entry) { e.X509SvidTtl = -1 }},
		{"with a negative JWT-SVID TTL", func(e *types.Entry) { e.JwtSvidTtl = -1 }},
		{"with a negative expiry", func(e *types.Entry) { e.ExpiresAt = -1 }},
		{"with an expiry after the year 9999", func(e *types.Entry) { e.ExpiresAt = 1 << 62 }},
		{"with an empty DNS name", func(e *types.Entry) { e.DnsNames = []string{""} }},
		{"with a space in a DNS name", func(e *types.Entry) { e.DnsNames = []string{"a b"} }},
		{"with a DNS name that ends in a dot", func(e *types.Entry) { e.DnsNames = []string{"a."} }},
		{"with a long DNS label", func(e *types.Entry) { e.DnsNames = []string{strings.Repeat("a", 64)} }},
		{"with a wildcard in the middle", func(e *types.Entry) { e.DnsNames = []string{"a.*.org"} }},
		{"with a hint that is too long", func(e *types.Entry) { e.Hint = strings.Repeat("h", 1025) }},
		{"with a control character in its hint", func(e *types.Entry) { e.Hint = "a\x1b[2J" }},
		{"with an ID that is too long", func(e *types.Entry) { e.Id = strings.Repeat("i", 256) }},
		{"with a slash in its ID", func(e *types.Entry) { e.Id = "a/b" }},
		{"with a malformed federated trust domain", func(e *types.Entry) { e.FederatesWith = []string{"No"} }},
		{"that federates with its own trust domain", func(e *types.Entry) { e.FederatesWith = []string{"example.org"} }},
		{"stored, with selectors of two types", func(e *types.Entry) { e.StoreSvid, e.Selectors = true, selectors("a:1", "b:1") }},
		{"stored, but not fetched", func(e *types.Entry) {
			e.StoreSvid = true
			e.AdditionalAttributes = &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true}
		}},
	} {
		t.Run("one "+c.name, func(t *testing.T) {
			r := w.createOne(shop(c.change))
			if r.GetStatus().GetCode() != int32(codes.InvalidArgument) || !strings.HasPrefix(r.GetStatus().GetMessage(), "failed to convert entry: ") || r.GetEntry() != nil {
				t.Errorf("got %v", r)
			}
			if line := w.lastAudit("entry.create"); line["outcome"] != "deny" || line["reason"] == "" {
				t.Errorf("audit line %v", line)
			}
		})
	}
	t.Run("one that federates with a trust domain whose bundle is missing", func(t *testing.T) {
		r := w.createOne(shop(func(e *types.Entry) { e.FederatesWith = []string{"elsewhere.test"} }))
		if r.GetStatus().GetCode() != int32(codes.FailedPrecondition) || r.GetStatus().GetMessage() != `failed to create entry: unable to find federated bundle "elsewhere.test"` {
			t.Errorf("got %v", r)
		}
	})
	if resp, err := w.entries().CountEntries(w.context(), &entryv1.CountEntriesRequest{}); err != nil || resp.GetCount() != 0 {
		t.Errorf("entries were made: %v, %v", resp, err)
	}
	w.unharmed()
}

func TestEntriesThatAreTaken(t *testing.T) {
	w := start(t)
	t.Run("controller-manager's probe is, and comes back whole", func(t *testing.T) {
		probe := &types.Entry{
			ParentId: id("/spire-controller-manager/unsupported-fields-test"), SpiffeId: id("/spire-controller-manager/unsupported-fields-test"),
			Selectors: selectors("a:1"), X509SvidTtl: 60, JwtSvidTtl: 60, StoreSvid: true, Hint: "hint",
		}
		r := w.createOne(probe)
		if r.GetStatus().GetCode() != 0 || r.GetStatus().GetMessage() != "OK" {
			t.Fatalf("got %v", r)
		}
		want := proto.Clone(probe).(*types.Entry)
		want.Id, want.CreatedAt = r.GetEntry().GetId(), r.GetEntry().GetCreatedAt()
		if len(want.Id) != 36 || want.CreatedAt == 0 || !proto.Equal(want, r.GetEntry()) {
			t.Errorf("got %v, want %v", r.GetEntry(), want)
		}
		del, err := w.entries().BatchDeleteEntry(w.context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{want.Id}})
		if err != nil || del.GetResults()[0].GetStatus().GetCode() != 0 {
			t.Errorf("delete: %v, %v", del, err)
		}
	})
	t.Run("a similar one is answered with the one that exists", func(t *testing.T) {
		first := w.create(shop())
		r := w.createOne(shop(func(e *types.Entry) { e.Hint = "other" }))
		if r.GetStatus().GetCode() != int32(codes.AlreadyExists) || r.GetStatus().GetMessage() != "similar entry already exists" || !proto.Equal(r.GetEntry(), first) {
			t.Errorf("got %v", r)
		}
		if line := w.denied(t, "entry.create"); line["reason"] == "" {
			t.Errorf("audit line %v", line)
		}
	})
	t.Run("one bad item does not hurt the others", func(t *testing.T) {
		resp, err := w.entries().BatchCreateEntry(w.context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{
			shop(func(e *types.Entry) { e.SpiffeId = id("/a") }), shop(func(e *types.Entry) { e.Selectors = nil }), nil, shop(),
			shop(func(e *types.Entry) { e.SpiffeId = id("/b") }),
		}, OutputMask: &types.EntryMask{SpiffeId: true}})
		if err != nil {
			t.Fatal(err)
		}
		var got []int32
		for _, r := range resp.GetResults() {
			got = append(got, r.GetStatus().GetCode())
		}
		if want := []int32{0, 3, 3, 6, 0}; !slices.Equal(got, want) {
			t.Errorf("codes %v, want %v", got, want)
		}
		if e := resp.GetResults()[4].GetEntry(); e.GetId() == "" || e.GetSpiffeId().GetPath() != "/b" || e.GetParentId() != nil || e.GetCreatedAt() != 0 {
			t.Errorf("the mask was not kept: %v", e)
		}
	})
	t.Run("revision and creation time are not the caller's to say", func(t *testing.T) {
		e := w.create(shop(func(e *types.Entry) { e.SpiffeId, e.RevisionNumber, e.CreatedAt = id("/r"), 99, 1 }))
		if e.GetRevisionNumber() != 0 || e.GetCreatedAt() <= 1 {
			t.Errorf("got %v", e)
		}
	})
	t.Run("exactly one of many similar ones at once is", func(t *testing.T) {
		var wg sync.WaitGroup
		results := make([]int32, 20)
		for i := range results {
			wg.Go(func() {
				resp, err := w.entries().BatchCreateEntry(w.context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{
					shop(func(e *types.Entry) { e.SpiffeId = id("/race") }),
				}})
				results[i] = -1
				if err == nil {
					results[i] = resp.GetResults()[0].GetStatus().GetCode()
				}
			})
		}
		wg.Wait()
		made := 0
		for _, code := range results {
			switch code {
			case 0:
				made++
			case int32(codes.AlreadyExists):
			default:
				t.Errorf("got code %d", code)
			}
		}
		if made != 1 {
			t.Errorf("%d were made", made)
		}
	})
	w.unharmed()
}

func TestUpdateEntries(t *testing.T) {
	w := start(t)
	update := func(e *types.Entry, mask *types.EntryMask) *entryv1.BatchUpdateEntryResponse_Result {
		t.Helper()
		resp, err := w.entries().BatchUpdateEntry(w.context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetResults()[0]
	}
	first := w.create(shop(func(e *types.Entry) { e.Hint = "first" }))
	t.Run("each update is a new revision", func(t *testing.T) {
		changed := proto.Clone(first).(*types.Entry)
		changed.X509SvidTtl = 77
		r := update(changed, nil)
		if e := r.GetEntry(); r.GetStatus().GetCode() != 0 || e.GetRevisionNumber() != 1 || e.GetX509SvidTtl() != 77 || e.GetCreatedAt() != first.GetCreatedAt() {
			t.Errorf("got %v", r)
		}
		if got, err := w.entries().GetEntry(w.context(), &entryv1.GetEntryRequest{Id: first.GetId()}); err != nil || got.GetX509SvidTtl() != 77 {
			t.Errorf("read after write: %v, %v", got, err)
		}
	})
	t.Run("only what the mask names is changed", func(t *testing.T) {
		r := update(&types.Entry{Id: first.GetId(), Hint: "second"}, &types.EntryMask{Hint: true})
		if e := r.GetEntry(); e.GetHint() != "second" || e.GetSpiffeId().GetPath() != "/shop" || e.GetRevisionNumber() != 2 {
			t.Errorf("got %v", r)
		}
	})
	for _, c := range []struct {
		name string
		in   *types.Entry
		mask *types.EntryMask
		code codes.Code
	}{
		{"one without an ID is malformed", shop(), nil, codes.InvalidArgument},
		{"one that is missing is not found", shop(func(e *types.Entry) { e.Id = "nobody" }), nil, codes.NotFound},
		{"no selectors are malformed", &types.Entry{Id: first.GetId()}, &types.EntryMask{Selectors: true}, codes.InvalidArgument},
		{"a reserved ID is malformed", &types.Entry{Id: first.GetId(), SpiffeId: id("/spire/x")}, &types.EntryMask{SpiffeId: true}, codes.InvalidArgument},
		{"everything empty is malformed", &types.Entry{Id: first.GetId()}, nil, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := update(c.in, c.mask)
			if r.GetStatus().GetCode() != int32(c.code) || r.GetEntry() != nil {
				t.Errorf("got %v", r)
			}
			if line := w.lastAudit("entry.update"); line["outcome"] != "deny" {
				t.Errorf("audit line %v", line)
			}
		})
	}
	t.Run("one that would be similar to another is refused", func(t *testing.T) {
		other := w.create(shop(func(e *types.Entry) { e.SpiffeId = id("/other") }))
		if r := update(&types.Entry{Id: other.GetId(), SpiffeId: id("/shop")}, &types.EntryMask{SpiffeId: true}); r.GetStatus().GetCode() != int32(codes.AlreadyExists) {
			t.Errorf("got %v", r)
		}
	})
	w.unharmed()
}

func TestDeleteEntries(t *testing.T) {
	w := start(t)
	e := w.create(shop())
	resp, err := w.entries().BatchDeleteEntry(w.context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"", e.GetId(), "nobody"}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		code    codes.Code
		message string
		id      string
	}{{codes.InvalidArgument, "missing entry ID", ""}, {codes.OK, "OK", e.GetId()}, {codes.NotFound, "entry not found", "nobody"}} {
		if r := resp.GetResults()[i]; r.GetStatus().GetCode() != int32(want.code) || r.GetStatus().GetMessage() != want.message || r.GetId() != want.id {
			t.Errorf("item %d: got %v", i, r)
		}
	}
	_, err = w.entries().GetEntry(w.context(), &entryv1.GetEntryRequest{Id: e.GetId()})
	refused(t, err, codes.NotFound, "entry not found")
	_, err = w.entries().GetEntry(w.context(), &entryv1.GetEntryRequest{})
	refused(t, err, codes.InvalidArgument, "missing ID")
}

func TestListEntries(t *testing.T) {
	w := start(t)
	b, err := w.bundles().GetBundle(w.context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	b.TrustDomain = "elsewhere.test"
	if _, err := w.bundles().BatchSetFederatedBundle(w.context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b}}); err != nil {
		t.Fatal(err)
	}
	for i := range 7 {
		w.create(shop(func(e *types.Entry) { e.SpiffeId = id(fmt.Sprintf("/n%d", i)) }))
	}
	w.create(shop(func(e *types.Entry) {
		e.Selectors, e.FederatesWith, e.Hint, e.Downstream = selectors("unix:uid:1000", "unix:gid:5"), []string{"elsewhere.test"}, "h", true
	}))
	w.create(shop(func(e *types.Entry) { e.SpiffeId, e.ParentId, e.Selectors = id("/n0"), id("/other"), selectors("a:b") }))

	match := func(m types.SelectorMatch_MatchBehavior, texts ...string) *types.SelectorMatch {
		return &types.SelectorMatch{Match: m, Selectors: selectors(texts...)}
	}
	for _, c := range []struct {
		name   string
		filter *entryv1.ListEntriesRequest_Filter
		want   int32
	}{
		{"no filter", nil, 9},
		{"an empty filter", &entryv1.ListEntriesRequest_Filter{}, 9},
		{"by SPIFFE ID", &entryv1.ListEntriesRequest_Filter{BySpiffeId: id("/n0")}, 2},
		{"by parent", &entryv1.ListEntriesRequest_Filter{ByParentId: id("/other")}, 1},
		{"by both", &entryv1.ListEntriesRequest_Filter{BySpiffeId: id("/n0"), ByParentId: id("/node")}, 1},
		{"by exact selectors", &entryv1.ListEntriesRequest_Filter{BySelectors: match(types.SelectorMatch_MATCH_EXACT, "unix:gid:5", "unix:uid:1000")}, 1},
		{"by a subset", &entryv1.ListEntriesRequest_Filter{BySelectors: match(types.SelectorMatch_MATCH_SUBSET, "unix:uid:1000", "a:b")}, 8},
		{"by a superset", &entryv1.ListEntriesRequest_Filter{BySelectors: match(types.SelectorMatch_MATCH_SUPERSET, "unix:uid:1000")}, 8},
		{"by any", &entryv1.ListEntriesRequest_Filter{BySelectors: match(types.SelectorMatch_MATCH_ANY, "unix:gid:5", "a:b")}, 2},
		{"by federation", &entryv1.ListEntriesRequest_Filter{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{"elsewhere.test"}}}, 1},
		{"by hint", &entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("h")}, 1},
		{"by downstream", &entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(true)}, 1},
		{"by a false that is no filter, as with SPIRE", &entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(false)}, 9},
		{"by something nobody has", &entryv1.ListEntriesRequest_Filter{BySpiffeId: id("/nobody")}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp, err := w.entries().ListEntries(w.context(), &entryv1.ListEntriesRequest{Filter: c.filter})
			if err != nil || int32(len(resp.GetEntries())) != c.want || resp.GetNextPageToken() != "" {
				t.Errorf("got %d entries, token %q, %v", len(resp.GetEntries()), resp.GetNextPageToken(), err)
			}
			var f *entryv1.CountEntriesRequest_Filter
			if c.filter != nil {
				f = &entryv1.CountEntriesRequest_Filter{
					BySpiffeId: c.filter.BySpiffeId, ByParentId: c.filter.ByParentId, BySelectors: c.filter.BySelectors,
					ByFederatesWith: c.filter.ByFederatesWith, ByHint: c.filter.ByHint, ByDownstream: c.filter.ByDownstream,
				}
			}
			if n, err := w.entries().CountEntries(w.context(), &entryv1.CountEntriesRequest{Filter: f}); err != nil || n.GetCount() != c.want {
				t.Errorf("counted %v, %v", n, err)
			}
		})
	}
	t.Run("pages hold every entry once", func(t *testing.T) {
		seen, token := map[string]bool{}, ""
		for pages := 0; ; pages++ {
			resp, err := w.entries().ListEntries(w.context(), &entryv1.ListEntriesRequest{PageSize: 2, PageToken: token, OutputMask: &types.EntryMask{}})
			if err != nil || len(resp.GetEntries()) > 2 || pages > 9 {
				t.Fatalf("page %d: %v, %v", pages, resp, err)
			}
			for _, e := range resp.GetEntries() {
				if seen[e.GetId()] || e.GetSpiffeId() != nil {
					t.Errorf("entry %v", e)
				}
				seen[e.GetId()] = true
			}
			if token = resp.GetNextPageToken(); token == "" {
				break
			}
		}
		if len(seen) != 9 {
			t.Errorf("saw %d entries", len(seen))
		}
	})
	for _, c := range []struct {
		name string
		req  *entryv1.ListEntriesRequest
		part string
	}{
		{"a garbage page token", &entryv1.ListEntriesRequest{PageSize: 2, PageToken: "garbage"}, "could not parse page token"},
		{"a page token of bad base64", &entryv1.ListEntriesRequest{PageSize: 2, PageToken: "a1.!!"}, "could not parse page token"},
		{"a negative page size", &entryv1.ListEntriesRequest{PageSize: -1}, "page size"},
		{"an empty selector filter", &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{}}}, "empty selector set"},
		{"an unknown match", &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{BySelectors: match(9, "a:b")}}, "match behavior"},
		{"a malformed ID filter", &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: id("x")}}, "malformed SPIFFE ID filter"},
		{"a foreign parent filter", &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByParentId: &types.SPIFFEID{TrustDomain: "x.test", Path: "/a"}}}, "not a member"},
		{"an empty federation filter", &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByFederatesWith: &types.FederatesWithMatch{}}}, "empty trust domain set"},
	} {
		t.Run(c.name+" is malformed", func(t *testing.T) {
			_, err := w.entries().ListEntries(w.context(), c.req)
			refused(t, err, codes.InvalidArgument, c.part)
			w.denied(t, "entry.list")
		})
	}
	w.unharmed()
}

func TestSynchronizationsThatAreRefused(t *testing.T) {
	w := start(t)
	path, _, conn := w.agent("stock")
	w.create(shop(func(e *types.Entry) { e.ParentId = id(path) }))
	for _, c := range []struct {
		name string
		req  *entryv1.SyncAuthorizedEntriesRequest
		part string
	}{
		{"that asks for entries before it knows any", &entryv1.SyncAuthorizedEntriesRequest{Ids: []string{"x"}}, "specifying IDs on initial request is not supported"},
		{"whose mask leaves out the revision number", &entryv1.SyncAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true}}, "revision number cannot be masked"},
	} {
		t.Run("one "+c.name, func(t *testing.T) {
			stream, err := entryv1.NewEntryClient(conn).SyncAuthorizedEntries(w.context())
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(c.req); err != nil {
				t.Fatal(err)
			}
			_, err = stream.Recv()
			refused(t, err, codes.InvalidArgument, c.part)
			w.denied(t, "entry.sync")
		})
	}
	w.unharmed()
}

func TestAnEntryThatIsTwiceInOneUpdate(t *testing.T) {
	w := start(t)
	e := w.create(shop())
	first, second := proto.CloneOf(e), proto.CloneOf(e)
	first.Hint, second.Hint = "first", "second"
	resp, err := w.entries().BatchUpdateEntry(w.context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{first, second}})
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.GetResults()[0]; got.GetStatus().GetCode() != 0 || got.GetEntry().GetHint() != "first" {
		t.Errorf("the first got %v", got)
	}
	if got := resp.GetResults()[1].GetStatus(); got.GetCode() != int32(codes.InvalidArgument) || !strings.Contains(got.GetMessage(), "twice") {
		t.Errorf("the second got %v", got)
	}
}
