package caller

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	agentID      = spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/t")
	adminID      = spiffeid.RequireFromString("spiffe://example.org/admin")
	configuredID = spiffeid.RequireFromString("spiffe://example.org/configured")
	downstreamID = spiffeid.RequireFromString("spiffe://example.org/downstream")
	workloadID   = spiffeid.RequireFromString("spiffe://example.org/workload")
)

// invoke calls a method with an empty request, as a stream or not.
func invoke(t *testing.T, conn *grpc.ClientConn, method string, streams bool) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if !streams {
		return conn.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{})
	}
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	if err := s.SendMsg(&emptypb.Empty{}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	return s.RecvMsg(&emptypb.Empty{})
}

// reason returns the reason in the details of a refusal.
func reason(err error) types.PermissionDeniedDetails_Reason {
	for _, d := range status.Convert(err).Details() {
		if d, ok := d.(*types.PermissionDeniedDetails); ok {
			return d.GetReason()
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}

func TestEveryMethodHasARow(t *testing.T) {
	w := newWorld(t)
	left := maps.Clone(table)
	for service, info := range w.services {
		for _, m := range info.Methods {
			full := "/" + service + "/" + m.Name
			if _, ok := table[full]; !ok {
				t.Errorf("%s has no row", full)
			}
			delete(left, full)
		}
	}
	for full := range left {
		t.Errorf("the row of %s is of no method", full)
	}
}

func TestEveryRowAndColumn(t *testing.T) {
	w := newWorld(t, configuredID)
	w.put(agentID, &records.Node{ID: agentID, Serial: "7"}, false)
	w.entries[adminID] = []*identity.Entry{{ID: "a", SPIFFEID: adminID, Admin: true}}
	w.entries[downstreamID] = []*identity.Entry{{ID: "d", SPIFFEID: downstreamID, Downstream: true}}
	w.entries[workloadID] = []*identity.Entry{{ID: "w", SPIFFEID: workloadID}}

	columns := []struct {
		name string
		conn *grpc.ClientConn
		kind Kind
	}{
		{"local", w.dialUnix(t), Local},
		{"admin by entry", w.dial(t, w.ca.leaf(t, 1, time.Hour, adminID.String())), Admin},
		{"admin by configuration", w.dial(t, w.ca.leaf(t, 2, time.Hour, configuredID.String())), Admin},
		{"agent", w.dial(t, w.ca.leaf(t, 7, time.Hour, agentID.String())), Agent},
		{"downstream server", w.dial(t, w.ca.leaf(t, 3, time.Hour, downstreamID.String())), Downstream},
		{"workload", w.dial(t, w.ca.leaf(t, 4, time.Hour, workloadID.String())), 0},
		{"caller without a certificate", w.dial(t, nil), 0},
	}
	for service, info := range w.services {
		for _, m := range info.Methods {
			full := "/" + service + "/" + m.Name
			for _, c := range columns {
				t.Run(fmt.Sprintf("%s calls %s", c.name, full), func(t *testing.T) {
					err := invoke(t, c.conn, full, m.IsClientStream || m.IsServerStream)
					row := table[full]
					if row&(c.kind|Anyone) != 0 {
						if status.Code(err) != codes.Unimplemented {
							t.Fatalf("got %v, want to be let in", err)
						}
						return
					}
					if got, want := status.Convert(err).Message(), "authorization denied for method "+full; status.Code(err) != codes.PermissionDenied || got != want {
						t.Fatalf("got %v, want PermissionDenied %q", err, want)
					}
					if r := reason(err); r != types.PermissionDeniedDetails_UNKNOWN {
						t.Errorf("got reason %s, want none", r)
					}
					if line := w.audit.last(); line.Method != full || line.Outcome != audit.Deny {
						t.Errorf("last audit line is %+v", line)
					}
				})
			}
		}
	}
}

func TestAMethodWithoutARowIsRefused(t *testing.T) {
	w := newWorld(t)
	const method = "/spire.api.server.agent.v1.Agent/CountAgents"
	row := table[method]
	delete(table, method)
	defer func() { table[method] = row }()
	if err := invoke(t, w.dialUnix(t), method, false); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v, want PermissionDenied", err)
	}
}

const renew = "/spire.api.server.agent.v1.Agent/RenewAgent"

func TestAgentStanding(t *testing.T) {
	life := func(serial, next string) *records.Node {
		return &records.Node{ID: agentID, Serial: serial, NewSerial: next}
	}
	none := types.PermissionDeniedDetails_UNKNOWN
	for _, c := range []struct {
		name   string
		shown  *records.Node
		stored *records.Node // if it is not what the view shows
		code   codes.Code
		reason types.PermissionDeniedDetails_Reason
	}{
		{"its current certificate is good", life("7", ""), nil, codes.Unimplemented, none},
		{"its current certificate is good while a new one waits", life("7", "8"), nil, codes.Unimplemented, none},
		{"its new certificate is good", life("6", "7"), nil, codes.Unimplemented, none},
		{"an old certificate is not active", life("8", ""), nil, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE},
		{"an evicted agent is not attested", nil, nil, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
		{"a banned agent is banned", &records.Node{ID: agentID, Banned: true}, nil, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_BANNED},
		{"an agent that attested a moment ago elsewhere is good", nil, life("7", ""), codes.Unimplemented, none},
		{"an agent that renewed a moment ago elsewhere is good", life("6", ""), life("6", "7"), codes.Unimplemented, none},
		{"no serial number is not an empty one", life("", ""), nil, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			if c.shown != nil {
				w.put(agentID, c.shown, false)
			}
			if c.stored != nil {
				w.put(agentID, c.stored, true)
			}
			err := invoke(t, w.dial(t, w.ca.leaf(t, 7, time.Hour, agentID.String())), renew, false)
			if status.Code(err) != c.code || reason(err) != c.reason {
				t.Errorf("got %v, reason %s", err, reason(err))
			}
			if c.code == codes.PermissionDenied {
				if line := w.audit.last(); line.Reason != c.reason.String() || line.Caller != agentID.String() {
					t.Errorf("audit line is %+v", line)
				}
			}
		})
	}
}

func TestTheFirstUseOfANewCertificateEndsTheOldOne(t *testing.T) {
	w := newWorld(t)
	w.put(agentID, &records.Node{ID: agentID, Serial: "7", NewSerial: "8", Key: attestor.KeyHash{7}, NewKey: attestor.KeyHash{8}}, false)
	before := w.dial(t, w.ca.leaf(t, 7, time.Hour, agentID.String()))
	after := w.dial(t, w.ca.leaf(t, 8, time.Hour, agentID.String()))
	if err := invoke(t, before, renew, false); status.Code(err) != codes.Unimplemented {
		t.Fatalf("the old one: got %v, want to be let in", err)
	}
	if err := invoke(t, after, renew, false); status.Code(err) != codes.Unimplemented {
		t.Fatalf("the new one: got %v, want to be let in", err)
	}
	if n, _ := w.Node(agentID); n.Serial != "8" || n.NewSerial != "" || n.Key != (attestor.KeyHash{8}) || n.NewKey != (attestor.KeyHash{}) || n.ExpiresAt.IsZero() || !n.NewExpiresAt.IsZero() {
		t.Errorf("node is %+v, want serial 8 only", n)
	}
	if err := invoke(t, before, renew, false); reason(err) != types.PermissionDeniedDetails_AGENT_NOT_ACTIVE {
		t.Errorf("the old one: got %v, want AGENT_NOT_ACTIVE", err)
	}
}

func TestAStoreThatIsAwayDeniesNobodyForGood(t *testing.T) {
	w := newWorld(t)
	w.broken = errors.New("disk on fire")
	err := invoke(t, w.dial(t, w.ca.leaf(t, 7, time.Hour, agentID.String())), renew, false)
	if status.Code(err) != codes.Unavailable || len(status.Convert(err).Details()) != 0 {
		t.Errorf("got %v, want Unavailable without details", err)
	}
}

func TestClientCertificates(t *testing.T) {
	elsewhere := spiffeid.RequireTrustDomainFromString("elsewhere.test")
	foreignAdmin := spiffeid.RequireFromString("spiffe://elsewhere.test/admin")
	w := newWorld(t, foreignAdmin)
	foreign := newIssuer(t, elsewhere)
	w.bundles[elsewhere] = foreign.bundle(elsewhere)
	stranger := newIssuer(t, td)
	w.put(agentID, &records.Node{ID: agentID, Serial: "7"}, false)
	const count = "/spire.api.server.agent.v1.Agent/CountAgents"
	for _, c := range []struct {
		name   string
		cert   *tls.Certificate
		method string
		code   codes.Code
	}{
		{"without a URI SAN is nobody", w.ca.leaf(t, 1, time.Hour), "/spire.api.server.bundle.v1.Bundle/GetBundle", codes.Unauthenticated},
		{"with two URI SANs is nobody", w.ca.leaf(t, 1, time.Hour, agentID.String(), adminID.String()), "/spire.api.server.bundle.v1.Bundle/GetBundle", codes.Unauthenticated},
		{"that expired does not connect", w.ca.leaf(t, 7, -time.Minute, agentID.String()), renew, codes.Unavailable},
		{"of an unknown authority does not connect", stranger.leaf(t, 7, time.Hour, agentID.String()), renew, codes.Unavailable},
		{"of a federated authority for our own ID does not connect", foreign.leaf(t, 7, time.Hour, agentID.String()), renew, codes.Unavailable},
		{"of our authority for a foreign ID does not connect", w.ca.leaf(t, 7, time.Hour, foreignAdmin.String()), count, codes.Unavailable},
		{"of a federated admin is let in", foreign.leaf(t, 1, time.Hour, foreignAdmin.String()), count, codes.Unimplemented},
		{"of a federated workload is refused", foreign.leaf(t, 1, time.Hour, "spiffe://elsewhere.test/x"), count, codes.PermissionDenied},
		{"of an unknown trust domain does not connect", stranger.leaf(t, 1, time.Hour, "spiffe://third.test/x"), count, codes.Unavailable},
	} {
		t.Run("a certificate "+c.name, func(t *testing.T) {
			if err := invoke(t, w.dial(t, c.cert), c.method, false); status.Code(err) != c.code {
				t.Errorf("got %v, want %s", err, c.code)
			}
		})
	}
}

func TestRightsEndWithTheirEntry(t *testing.T) {
	w := newWorld(t)
	const count = "/spire.api.server.agent.v1.Agent/CountAgents"
	conn := w.dial(t, w.ca.leaf(t, 1, time.Hour, adminID.String()))
	w.entries[adminID] = []*identity.Entry{{SPIFFEID: adminID, Admin: true, ExpiresAt: time.Now().Add(-time.Second)}}
	if err := invoke(t, conn, count, false); status.Code(err) != codes.PermissionDenied {
		t.Errorf("expired entry: got %v, want PermissionDenied", err)
	}
	w.mu.Lock()
	w.entries[adminID] = []*identity.Entry{{SPIFFEID: adminID, Admin: true}}
	w.mu.Unlock()
	if err := invoke(t, conn, count, false); status.Code(err) != codes.Unimplemented {
		t.Errorf("entry: got %v, want to be let in", err)
	}
}

func TestStreamsEndWithTheRightToThem(t *testing.T) {
	for _, c := range []struct {
		name   string
		life   time.Duration
		change func(w *world)
		code   codes.Code
		reason types.PermissionDeniedDetails_Reason
	}{
		{"a banned agent is cut off", time.Hour, func(w *world) { w.put(agentID, &records.Node{ID: agentID, Banned: true}, false) },
			codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_BANNED},
		{"an evicted agent is cut off", time.Hour, func(w *world) { w.put(agentID, nil, false) },
			codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
		{"an agent that uses its new SVID elsewhere is to come back with it", time.Hour, func(w *world) {
			w.put(agentID, &records.Node{ID: agentID, Serial: "8"}, false)
		}, codes.Unavailable, types.PermissionDeniedDetails_UNKNOWN},
		{"an agent whose SVID expires is cut off", 1500 * time.Millisecond, func(*world) {},
			codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_EXPIRED},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.feed.entered = make(chan struct{}, 1)
			w.put(agentID, &records.Node{ID: agentID, Serial: "7"}, false)
			var ended <-chan error
			for life, in := c.life, false; !in; life *= 2 { // too short a life ends before a loaded machine has let it in
				ended = open(t, w.dial(t, w.ca.leaf(t, 7, life, agentID.String())))
				select {
				case <-w.feed.entered:
					in = true
				case err := <-ended:
					if life > time.Minute {
						t.Fatal(err)
					}
				}
			}
			c.change(w)
			err := <-ended
			if status.Code(err) != c.code || reason(err) != c.reason {
				t.Errorf("got %v, reason %s", err, reason(err))
			}
			if line := w.audit.last(); line.Method != "/assay.feed.v1.Feed/Follow" || line.Outcome != audit.Deny {
				t.Errorf("audit line is %+v", line)
			}
		})
	}
}

// open opens a stream and returns what tells of its end.
func open(t *testing.T, conn *grpc.ClientConn) <-chan error {
	t.Helper()
	ended := make(chan error, 1)
	s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/assay.feed.v1.Feed/Follow")
	if err != nil {
		ended <- err
		return ended
	}
	go func() { ended <- s.RecvMsg(&emptypb.Empty{}) }()
	return ended
}

// counting is a stream that counts what goes through it.
type counting struct {
	grpc.ServerStream
	sent, received int
}

func (c *counting) SendMsg(any) error { c.sent++; return nil }
func (c *counting) RecvMsg(any) error { c.received++; return nil }

// TestNothingGoesThroughAStreamThatWasCut is about a service that does not look whether its caller is still let
// in, and goes on sending.
func TestNothingGoesThroughAStreamThatWasCut(t *testing.T) {
	ctx, end := context.WithCancelCause(t.Context())
	wire := &counting{}
	s := &stream{ServerStream: wire, ctx: ctx}
	if err := errors.Join(s.SendMsg(nil), s.RecvMsg(nil)); err != nil || wire.sent != 1 || wire.received != 1 {
		t.Fatalf("before: %v, %+v", err, wire)
	}
	end(ended{denied("/assay.feed.v1.Feed/Follow", types.PermissionDeniedDetails_AGENT_BANNED)})
	if err := s.SendMsg(nil); status.Code(err) != codes.PermissionDenied || wire.sent != 1 {
		t.Errorf("sent %d, %v", wire.sent, err)
	}
	if err := s.RecvMsg(nil); status.Code(err) != codes.PermissionDenied {
		t.Errorf("received, %v", err)
	}
}

func TestTheUnixSocketKnowsItsPeer(t *testing.T) {
	w := newWorld(t)
	// A method that nobody may call over the socket leaves an audit line that says who tried.
	if err := invoke(t, w.dialUnix(t), renew, false); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("got %v, want PermissionDenied", err)
	}
	want := fmt.Sprintf("uid=%d gid=%d pid=%d", os.Getuid(), os.Getgid(), os.Getpid())
	if line := w.audit.last(); line.Peer != want || line.Caller != "local" {
		t.Errorf("audit line is %+v, want peer %q", line, want)
	}
}

func TestKindsHaveNames(t *testing.T) {
	if got := (Local | Agent).String(); got != "local+agent" {
		t.Errorf("got %q", got)
	}
	if !slices.Contains([]string{""}, Kind(0).String()) {
		t.Errorf("no kind is %q", Kind(0))
	}
}

func TestSource(t *testing.T) {
	for _, c := range []struct{ addr, want string }{
		{"192.0.2.1:80", "192.0.2.1"},
		{"[::ffff:192.0.2.1]:80", "192.0.2.1"},
		{"[2001:db8:1:2:3:4:5:6]:80", "2001:db8:1:2::/64"},
		{"[fe80::1%eth0]:80", "fe80::/64"},
	} {
		ap := netip.MustParseAddrPort(c.addr)
		if got := Source(net.TCPAddrFromAddrPort(ap)); got != c.want {
			t.Errorf("%s: got %q, want %q", c.addr, got, c.want)
		}
	}
	local := &Caller{Kind: Local | Anyone, Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}}
	if local.Source() != "" {
		t.Error("a local caller has a rate")
	}
}

// Every method that administrators may call is something in a role, but for pushing evidence, which evidence
// sources decide on.
func TestEveryMethodOfAdministratorsHasAVerb(t *testing.T) {
	for method, row := range table {
		verb := Verb(method)
		if want := row&(Local|Admin) != 0 && method != "/assay.evidence.v1.Evidence/Push"; (verb != "") != want {
			t.Errorf("the verb of %s is %q", method, verb)
		}
	}
	for method := range verbs {
		if table[method] == 0 {
			t.Errorf("%s has a verb, and no row in the table", method)
		}
	}
}

// unixRoles are roles of users of the Unix socket.
type unixRoles map[uint32][]*Role

func (unixRoles) SVID(spiffeid.ID) []*Role { return nil }
func (unixRoles) Token(context.Context, string) (string, []*Role, error) {
	return "", nil, errors.New("no tokens here")
}
func (u unixRoles) Unix(uid, _ uint32) (roles []*Role, governed bool) { return u[uid], true }

func TestRolesOfUnixUsers(t *testing.T) {
	a := New(nil, nil, nil, Config{
		UID: 50, Now: time.Now, Log: logrus.New(), Roles: unixRoles{77: {{Name: "reader", Verbs: []string{"entry:read", "server:read"}}}},
	})
	const list, create = "/spire.api.server.entry.v1.Entry/ListEntries", "/spire.api.server.entry.v1.Entry/BatchCreateEntry"
	for _, c := range []struct {
		name, method string
		uid          uint32
		want         Kind
	}{
		{"root may do everything", create, 0, Local},
		{"so may the server's own user", create, 50, Local},
		{"a user may do what its role says", list, 77, Scoped},
		{"also what is for local callers only", "/spire.api.server.debug.v1.Debug/GetInfo", 77, Scoped},
		{"and nothing else", create, 77, 0},
		{"not even the rest of what is for local callers", "/spire.api.server.logger.v1.Logger/SetLogLevel", 77, 0},
		{"a user without a role may do nothing", list, 78, 0},
		{"but what everybody may", "/spire.api.server.bundle.v1.Bundle/GetBundle", 78, Anyone},
		{"and pushes no evidence as an administrator would", "/assay.evidence.v1.Evidence/Push", 77, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := a.allow(t.Context(), &Caller{Kind: Local, UnixPeer: true, UID: c.uid}, c.method, true)
			if got != c.want || (err != nil) != (c.want == 0) {
				t.Errorf("got %v, %v, want %v", got, err, c.want)
			}
		})
	}
	t.Run("without roles for users, all are as root", func(t *testing.T) {
		a.cfg.Roles = nil
		if got, err := a.allow(t.Context(), &Caller{Kind: Local, UnixPeer: true, UID: 78}, create, true); got != Local {
			t.Errorf("got %v, %v", got, err)
		}
	})
}
