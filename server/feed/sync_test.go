package feed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

func picture(storeID string, rev kv.Rev, entries ...*identity.Entry) *view.AgentPicture {
	return &view.AgentPicture{StoreID: storeID, Rev: rev, Entries: entries}
}

func pictureOf(n int) *view.AgentPicture {
	p := picture("store", 1)
	for i := range n {
		p.Entries = append(p.Entries, entry(fmt.Sprintf("e%04d", i), agentID(1), int64(i)))
	}
	return p
}

type entries struct {
	entryv1.UnimplementedEntryServer
	picture *view.AgentPicture
	sync    func(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse], p *view.AgentPicture) error
}

func (s *entries) SyncAuthorizedEntries(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse]) error {
	return s.sync(stream, s.picture)
}

type syncClient struct {
	t *testing.T
	grpc.BidiStreamingClient[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse]
}

func openSync(t *testing.T, s *entries) *syncClient {
	t.Helper()
	lis := bufconn.Listen(1 << 20)
	srv := grpc.NewServer()
	entryv1.RegisterEntryServer(srv, s)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	conn, err := grpc.NewClient("passthrough:///sync",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		srv.Stop()
		<-served
	})
	stream, err := entryv1.NewEntryClient(conn).SyncAuthorizedEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &syncClient{t: t, BidiStreamingClient: stream}
}

func (c *syncClient) ask(mask *types.EntryMask, ids ...string) {
	c.t.Helper()
	if err := c.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: mask, Ids: ids}); err != nil {
		c.t.Fatal(err)
	}
}

// answer returns the messages up to and with the one that has more unset.
func (c *syncClient) answer() []*entryv1.SyncAuthorizedEntriesResponse {
	c.t.Helper()
	var all []*entryv1.SyncAuthorizedEntriesResponse
	for {
		resp, err := c.Recv()
		if err != nil {
			c.t.Fatal(err)
		}
		if all = append(all, resp); !resp.GetMore() {
			return all
		}
	}
}

func (c *syncClient) ends(want codes.Code, text string) {
	c.t.Helper()
	_, err := c.Recv()
	if want == codes.OK {
		if !errors.Is(err, io.EOF) {
			c.t.Fatalf("ended with %v, want no error", err)
		}
		return
	}
	if status.Code(err) != want || status.Convert(err).Message() != text {
		c.t.Fatalf("ended with %v, want %v %q", err, want, text)
	}
}

func TestSync(t *testing.T) {
	paged := func(page, bytes int) func(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse], p *view.AgentPicture) error {
		return func(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse], p *view.AgentPicture) error {
			return syncPages(stream, p, page, bytes)
		}
	}
	mask := &types.EntryMask{SpiffeId: true, RevisionNumber: true}

	t.Run("500 entries come in one message and the call ends", func(t *testing.T) {
		c := openSync(t, &entries{picture: pictureOf(500), sync: Sync})
		c.ask(mask)
		got := c.answer()
		if len(got) != 1 || len(got[0].GetEntries()) != 500 || len(got[0].GetEntryRevisions()) != 0 {
			t.Errorf("got %d messages", len(got))
		}
		want := &types.Entry{Id: "e0007", SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/workload/xe0007"}, RevisionNumber: 7}
		if diff := cmp.Diff(want, got[0].GetEntries()[7], protocmp.Transform()); diff != "" {
			t.Errorf("masked entry (-want +got):\n%s", diff)
		}
		c.ends(codes.OK, "")
	})

	t.Run("no entries come in one empty message", func(t *testing.T) {
		c := openSync(t, &entries{picture: pictureOf(0), sync: Sync})
		c.ask(nil)
		if got := c.answer(); len(got) != 1 || len(got[0].GetEntries()) != 0 {
			t.Errorf("got %v", got)
		}
		c.ends(codes.OK, "")
	})

	t.Run("501 entries come as two pages of revisions, and in full as asked", func(t *testing.T) {
		c := openSync(t, &entries{picture: pictureOf(501), sync: Sync})
		c.ask(nil)
		got := c.answer()
		if len(got) != 2 || len(got[0].GetEntryRevisions()) != 500 || len(got[1].GetEntryRevisions()) != 1 || len(got[0].GetEntries()) != 0 {
			t.Fatalf("got %d messages", len(got))
		}
		want := &entryv1.EntryRevision{Id: "e0003", RevisionNumber: 3, CreatedAt: 1000}
		if diff := cmp.Diff(want, got[0].GetEntryRevisions()[3], protocmp.Transform()); diff != "" {
			t.Errorf("revision (-want +got):\n%s", diff)
		}
		c.ask(nil, "e0500", "e0001", "unknown", "e0001")
		got = c.answer()
		if len(got) != 1 || len(got[0].GetEntries()) != 2 || got[0].GetEntries()[0].GetId() != "e0001" {
			t.Errorf("got %v", got)
		}
		if err := c.CloseSend(); err != nil {
			t.Fatal(err)
		}
		c.ends(codes.OK, "")
	})

	t.Run("asked entries come in pages, the last with more unset", func(t *testing.T) {
		c := openSync(t, &entries{picture: pictureOf(10), sync: paged(4, 1<<20)})
		c.ask(mask)
		if got := c.answer(); len(got) != 3 || len(got[2].GetEntryRevisions()) != 2 {
			t.Fatalf("got %d pages of revisions", len(got))
		}
		for _, asked := range []struct{ entries, pages int }{{1, 1}, {4, 1}, {5, 2}, {8, 2}, {10, 3}} {
			var ids []string
			for _, e := range pictureOf(asked.entries).Entries {
				ids = append(ids, e.ID)
			}
			// The mask of the first message stays.
			c.ask(&types.EntryMask{Selectors: true, RevisionNumber: true}, ids...)
			got := c.answer()
			entries := 0
			for _, resp := range got {
				entries += len(resp.GetEntries())
			}
			if len(got) != asked.pages || entries != asked.entries {
				t.Errorf("asked for %d: got %d in %d pages, want %d pages", asked.entries, entries, len(got), asked.pages)
			}
			if e := got[0].GetEntries()[0]; e.GetSpiffeId() == nil || len(e.GetSelectors()) != 0 {
				t.Errorf("got %v, want the fields of the first mask", e)
			}
		}
		c.ask(nil, "unknown")
		if got := c.answer(); len(got) != 1 || len(got[0].GetEntries()) != 0 {
			t.Errorf("an unknown ID was answered with %v", got)
		}
		c.ask(nil)
		if got := c.answer(); len(got) != 1 || len(got[0].GetEntries()) != 0 {
			t.Errorf("no ID was answered with %v", got)
		}
	})

	t.Run("few but huge entries are paged as well", func(t *testing.T) {
		p := pictureOf(10)
		for _, e := range p.Entries {
			e.Hint = strings.Repeat("h", 1000)
		}
		c := openSync(t, &entries{picture: p, sync: paged(100, 5000)})
		c.ask(nil)
		if got := c.answer(); len(got) != 1 || len(got[0].GetEntryRevisions()) != 10 {
			t.Fatalf("got %v", got)
		}
		c.ask(nil, "e0000", "e0001", "e0002", "e0003", "e0004", "e0005", "e0006", "e0007", "e0008", "e0009")
		got := c.answer()
		for _, resp := range got {
			if n := proto.Size(resp); n > 5000 {
				t.Errorf("a page has %d bytes", n)
			}
		}
		if len(got) != 3 {
			t.Errorf("got %d pages", len(got))
		}
	})

	t.Run("IDs in the first message are refused", func(t *testing.T) {
		c := openSync(t, &entries{picture: pictureOf(1), sync: Sync})
		c.ask(nil, "e0000")
		c.ends(codes.InvalidArgument, "specifying IDs on initial request is not supported")
	})

	t.Run("a mask without revision is refused", func(t *testing.T) {
		c := openSync(t, &entries{picture: pictureOf(1), sync: Sync})
		c.ask(&types.EntryMask{SpiffeId: true})
		c.ends(codes.InvalidArgument, "revision number cannot be masked")
	})

	t.Run("a call without a message ends without an error", func(t *testing.T) {
		c := openSync(t, &entries{picture: pictureOf(1), sync: Sync})
		if err := c.CloseSend(); err != nil {
			t.Fatal(err)
		}
		c.ends(codes.OK, "")
	})
}

func TestAuthorized(t *testing.T) {
	e := entry("a", agentID(1), 3)
	e.X509SVIDTTL, e.JWTSVIDTTL = time.Hour, time.Minute
	e.FederatesWith = []spiffeid.TrustDomain{other}
	e.DNSNames, e.Hint = []string{"a.test"}, "hint"
	e.Admin, e.Downstream, e.StoreSVID, e.NoPrefetch, e.JTI = true, true, true, true, true
	e.ExpiresAt = time.Unix(5000, 0)
	p := picture("store", 1, e)

	t.Run("without a mask all fields are there", func(t *testing.T) {
		if diff := cmp.Diff([]*types.Entry{e.Wire()}, Authorized(p, nil), protocmp.Transform()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
	t.Run("an empty mask leaves the ID", func(t *testing.T) {
		if diff := cmp.Diff([]*types.Entry{{Id: "a"}}, Authorized(p, &types.EntryMask{}), protocmp.Transform()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
	t.Run("each field of the mask brings the field of its name and no other", func(t *testing.T) {
		all := e.Wire()
		fields := (&types.EntryMask{}).ProtoReflect().Descriptor().Fields()
		for i := range fields.Len() {
			mask := (&types.EntryMask{}).ProtoReflect()
			mask.Set(fields.Get(i), protoreflect.ValueOfBool(true))
			got := Authorized(p, mask.Interface().(*types.EntryMask))[0].ProtoReflect()
			field := got.Descriptor().Fields().ByName(fields.Get(i).Name())
			want := (&types.Entry{Id: "a"}).ProtoReflect()
			want.Set(field, all.ProtoReflect().Get(field))
			if diff := cmp.Diff(want.Interface(), got.Interface(), protocmp.Transform()); diff != "" {
				t.Errorf("mask %s (-want +got):\n%s", field.Name(), diff)
			}
		}
	})
}
