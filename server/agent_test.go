package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/wire/feedv1"
)

func TestAttestationsThatAreRefused(t *testing.T) {
	w := start(t, func(c *Config) { c.Limits.AttestDuration = 5 * time.Second })
	key := newKey(t)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	broken := csr(t, key)
	broken[len(broken)-1] ^= 1
	if _, _, err := w.attest("honest", []byte("once"), ""); err != nil {
		t.Fatal(err)
	}
	path, _, _ := w.agent("outlaw")
	if _, err := w.agents().BanAgent(w.context(), &agentv1.BanAgentRequest{Id: id(path)}); err != nil {
		t.Fatal(err)
	}
	good := func() *agentv1.AttestAgentRequest_Params {
		return &agentv1.AttestAgentRequest_Params{
			Data:   &types.AttestationData{Type: "honest", Payload: []byte("fine")},
			Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, key)},
		}
	}
	for _, c := range []struct {
		name   string
		change func(*agentv1.AttestAgentRequest_Params)
		answer string
		code   codes.Code
		part   string
		reason types.PermissionDeniedDetails_Reason
	}{
		{"without data", func(p *agentv1.AttestAgentRequest_Params) { p.Data = nil }, "", codes.InvalidArgument, "malformed param: missing attestation data", 0},
		{"without a type", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Type = "" }, "", codes.InvalidArgument, "malformed param: missing attestation data type", 0},
		{"with an empty payload", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = nil }, "", codes.InvalidArgument, "malformed param: missing attestation data payload", 0},
		{"without parameters", func(p *agentv1.AttestAgentRequest_Params) { p.Params = nil }, "", codes.InvalidArgument, "malformed param: missing X509-SVID parameters", 0},
		{"without a CSR", func(p *agentv1.AttestAgentRequest_Params) { p.Params.Csr = nil }, "", codes.InvalidArgument, "malformed param: missing CSR", 0},
		{"with a truncated CSR", func(p *agentv1.AttestAgentRequest_Params) { p.Params.Csr = p.Params.Csr[:20] }, "", codes.InvalidArgument, "malformed CSR", 0},
		{"with a CSR that its key did not sign", func(p *agentv1.AttestAgentRequest_Params) { p.Params.Csr = broken }, "", codes.InvalidArgument, "malformed CSR", 0},
		{"with an RSA-1024 key", func(p *agentv1.AttestAgentRequest_Params) { p.Params.Csr = csr(t, weak) }, "", codes.InvalidArgument, "1024 bits", 0},
		{"of an unknown type", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Type = "x" }, "", codes.FailedPrecondition, `error getting node attestor: could not find node attestor type "x"`, 0},
		{"with a payload over the limit", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = make([]byte, attestor.MaxEvidence+1) }, "", codes.InvalidArgument, "exceeds its limits", 0},
		{"with a payload of 10 MiB", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = make([]byte, 10<<20) }, "", codes.ResourceExhausted, "", 0},
		{"that the judge does not believe", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = []byte("liar") }, "", codes.InvalidArgument, "failed to attest: evidence refused: a liar", 0},
		{"whose judge cannot decide", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = []byte("broken") }, "", codes.Internal, "failed to attest", 0},
		{"whose judge panics", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = []byte("panic") }, "", codes.Internal, "internal error", 0},
		{"with a wrong answer", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = []byte("asked") }, "no", codes.InvalidArgument, "wrong answer", 0},
		{"with an answer over the limit", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = []byte("asked") }, strings.Repeat("x", attestor.MaxEvidence+1), codes.InvalidArgument, "exceeds its limits", 0},
		{"a second time where once is all", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = []byte("once") }, "", codes.PermissionDenied, "attestation data has already been used to attest an agent", 0},
		{"of a banned node", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = []byte("outlaw") }, "", codes.PermissionDenied, "failed to attest: agent is banned", types.PermissionDeniedDetails_AGENT_BANNED},
		{"with a path out of its place", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = []byte("../../server") }, "", codes.InvalidArgument, "agent ID", 0},
		{"with a token that never was", func(p *agentv1.AttestAgentRequest_Params) { p.Data.Type, p.Data.Payload = "join_token", []byte("x") }, "", codes.InvalidArgument, "failed to attest: join token does not exist or has already been used", 0},
		{"with another type's payload", func(p *agentv1.AttestAgentRequest_Params) {
			p.Data.Type, p.Data.Payload = "join_token", bytes.Repeat([]byte{0}, 100)
		}, "", codes.InvalidArgument, "failed to attest: join token does not exist", 0},
	} {
		t.Run("one "+c.name, func(t *testing.T) {
			p := good()
			c.change(p)
			before := len(w.audit())
			_, _, err := w.attestWith(w.dial(nil), key, p, c.answer)
			refused(t, err, c.code, c.part)
			if reason(err) != c.reason {
				t.Errorf("got reason %s, want %s", reason(err), c.reason)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Error("the caller is told what is not theirs to know")
			}
			eventually(t, func() error { // gRPC tells of a message that is too large before the call has ended
				lines := w.audit()
				if len(lines) == before || lines[len(lines)-1]["event"] != "agent.attest" || lines[len(lines)-1]["outcome"] == "allow" {
					return fmt.Errorf("audit lines %v", lines[before:])
				}
				return nil
			})
		})
	}
	t.Run("one that begins with an answer", func(t *testing.T) {
		stream, err := agentv1.NewAgentClient(w.dial(nil)).AttestAgent(w.context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: []byte("because")}}); err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		refused(t, err, codes.InvalidArgument, "malformed param: missing params")
	})
	t.Run("one that says nothing", func(t *testing.T) {
		stream, err := agentv1.NewAgentClient(w.dial(nil)).AttestAgent(w.context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		refused(t, err, codes.InvalidArgument, "EOF")
	})
	t.Run("one that goes silent is given up", func(t *testing.T) {
		w := start(t, func(c *Config) { c.Limits.AttestDuration = 50 * time.Millisecond })
		stream, err := agentv1.NewAgentClient(w.dial(nil)).AttestAgent(w.context())
		if err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		refused(t, err, codes.DeadlineExceeded, "too long")
	})
	w.unharmed()
}

func TestJoinTokens(t *testing.T) {
	w := start(t)
	token := func(ttl int32) string {
		t.Helper()
		resp, err := w.agents().CreateJoinToken(w.context(), &agentv1.CreateJoinTokenRequest{Ttl: ttl})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetValue()
	}
	t.Run("one of 50 clients with the same token wins", func(t *testing.T) {
		value := []byte(token(60))
		before := len(w.audit())
		var wg sync.WaitGroup
		errs := make([]error, 50)
		for i := range errs {
			wg.Go(func() { _, _, errs[i] = w.attest("join_token", value, "") })
		}
		wg.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
				continue
			}
			refused(t, err, codes.InvalidArgument, "join token does not exist or has already been used")
		}
		if won != 1 {
			t.Errorf("%d won", won)
		}
		outcomes := map[any]int{}
		for _, line := range w.audit()[before:] {
			if line["event"] == "agent.attest" {
				outcomes[line["outcome"]]++
			}
		}
		if outcomes["allow"] != 1 || outcomes["deny"] != 49 || len(outcomes) != 2 {
			t.Errorf("audit lines %v, want one that allows and 49 that deny", outcomes)
		}
	})
	t.Run("an expired one is refused, and burnt", func(t *testing.T) {
		late := time.Now().Add(time.Hour)
		var mu sync.Mutex
		now := time.Now()
		w := start(t, func(c *Config) {
			c.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
		})
		resp, err := w.agents().CreateJoinToken(w.context(), &agentv1.CreateJoinTokenRequest{Ttl: 1})
		if err != nil {
			t.Fatal(err)
		}
		conn := w.dial(nil) // the server's own certificate is checked against the true time
		if _, _, err := w.attestWith(conn, newKey(t), &agentv1.AttestAgentRequest_Params{Data: &types.AttestationData{Type: "x", Payload: []byte("x")}}, ""); err == nil {
			t.Fatal("nonsense was admitted")
		}
		mu.Lock()
		now = late
		mu.Unlock()
		key := newKey(t)
		params := &agentv1.AttestAgentRequest_Params{
			Data:   &types.AttestationData{Type: "join_token", Payload: []byte(resp.GetValue())},
			Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, key)},
		}
		_, _, err = w.attestWith(conn, key, params, "")
		refused(t, err, codes.InvalidArgument, "failed to attest: join token expired")
		if line := w.lastAudit("agent.attest"); line["outcome"] != "deny" || !strings.Contains(fmt.Sprint(line["reason"]), "expired") {
			t.Errorf("audit line %v", line)
		}
		_, _, err = w.attestWith(conn, key, params, "")
		refused(t, err, codes.InvalidArgument, "failed to attest: join token does not exist")
	})
	for _, c := range []struct {
		name string
		req  *agentv1.CreateJoinTokenRequest
		code codes.Code
		part string
	}{
		{"without a TTL", &agentv1.CreateJoinTokenRequest{}, codes.InvalidArgument, "ttl is required"},
		{"with a negative TTL", &agentv1.CreateJoinTokenRequest{Ttl: -5}, codes.InvalidArgument, "ttl is required"},
		{"with a slash", &agentv1.CreateJoinTokenRequest{Ttl: 1, Token: "a/b"}, codes.InvalidArgument, "invalid token"},
		{"that is dots", &agentv1.CreateJoinTokenRequest{Ttl: 1, Token: ".."}, codes.InvalidArgument, "invalid token"},
		{"that is too long", &agentv1.CreateJoinTokenRequest{Ttl: 1, Token: strings.Repeat("a", 129)}, codes.InvalidArgument, "token is 129 bytes long"},
		{"for a reserved ID", &agentv1.CreateJoinTokenRequest{Ttl: 1, AgentId: id("/spire/server")}, codes.InvalidArgument, "invalid agent ID"},
		{"for a foreign ID", &agentv1.CreateJoinTokenRequest{Ttl: 1, AgentId: &types.SPIFFEID{TrustDomain: "x.test", Path: "/a"}}, codes.InvalidArgument, "invalid agent ID"},
	} {
		t.Run("one "+c.name+" is not made", func(t *testing.T) {
			_, err := w.agents().CreateJoinToken(w.context(), c.req)
			refused(t, err, c.code, c.part)
			w.denied(t, "token.create")
		})
	}
	t.Run("one is not made twice", func(t *testing.T) {
		req := &agentv1.CreateJoinTokenRequest{Ttl: 60, Token: "mine"}
		if _, err := w.agents().CreateJoinToken(w.context(), req); err != nil {
			t.Fatal(err)
		}
		_, err := w.agents().CreateJoinToken(w.context(), req)
		refused(t, err, codes.AlreadyExists, "")
		w.denied(t, "token.create")
	})
	t.Run("none is in the audit log before it is used", func(t *testing.T) {
		value := token(60)
		for _, line := range w.audit() {
			for key, field := range line {
				if text, ok := field.(string); ok && strings.Contains(text, value) {
					t.Errorf("the token is in %s: %v", key, line)
				}
			}
		}
	})
	w.unharmed()
}

func renewed(t *testing.T, conn *grpc.ClientConn, key *ecdsa.PrivateKey) (*tls.Certificate, error) {
	t.Helper()
	resp, err := agentv1.NewAgentClient(conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, key)}})
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: resp.GetSvid().GetCertChain(), PrivateKey: key}, nil
}

func ping(conn *grpc.ClientConn, ctx context.Context) error { // reads better at its callers
	_, err := entryv1.NewEntryClient(conn).GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
	return err
}

func TestRenewAgent(t *testing.T) {
	w := start(t)
	ctx := w.context()
	cert, _, err := w.attest("honest", []byte("once-renewing"), "")
	if err != nil {
		t.Fatal(err)
	}
	old := w.dial(cert)
	next, err := renewed(t, old, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := ping(old, ctx); err != nil {
		t.Errorf("the old SVID before the new one is used: %v", err)
	}
	fresh := w.dial(next)
	if err := ping(fresh, ctx); err != nil {
		t.Errorf("the new SVID: %v", err)
	}
	if err := ping(old, ctx); reason(err) != types.PermissionDeniedDetails_AGENT_NOT_ACTIVE {
		t.Errorf("the old SVID after the new one was used: %v", err)
	}
	t.Run("an agent that has to attest is told so", func(t *testing.T) {
		_, _, conn := w.agent("again")
		_, err := renewed(t, conn, newKey(t))
		refused(t, err, codes.PermissionDenied, "agent must reattest instead of renew")
		if reason(err) != types.PermissionDeniedDetails_AGENT_MUST_REATTEST {
			t.Errorf("got reason %s", reason(err))
		}
	})
	t.Run("parameters and CSR are required", func(t *testing.T) {
		_, err := agentv1.NewAgentClient(fresh).RenewAgent(ctx, &agentv1.RenewAgentRequest{})
		refused(t, err, codes.InvalidArgument, "params cannot be nil")
		_, err = agentv1.NewAgentClient(fresh).RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{}})
		refused(t, err, codes.InvalidArgument, "missing CSR")
	})
	t.Run("attesting anew ends the SVID before", func(t *testing.T) {
		_, _, before := w.agent("twice")
		_, _, after := w.agent("twice")
		if err := ping(after, ctx); err != nil {
			t.Error(err)
		}
		if err := ping(before, ctx); reason(err) != types.PermissionDeniedDetails_AGENT_NOT_ACTIVE {
			t.Errorf("got %v", err)
		}
	})
}

func TestBannedAndEvictedAgents(t *testing.T) {
	w := start(t)
	ctx := w.context()
	follow := func(conn *grpc.ClientConn) feedv1.Feed_FollowClient {
		t.Helper()
		stream, err := feedv1.NewFeedClient(conn).Follow(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: &feedv1.Hello{}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		return stream
	}
	for _, c := range []struct {
		name   string
		end    func(*types.SPIFFEID) error
		reason types.PermissionDeniedDetails_Reason
		again  codes.Code // of attesting afterwards
	}{
		{"banned", func(id *types.SPIFFEID) error {
			_, err := w.agents().BanAgent(ctx, &agentv1.BanAgentRequest{Id: id})
			return err
		}, types.PermissionDeniedDetails_AGENT_BANNED, codes.PermissionDenied},
		{"evicted", func(id *types.SPIFFEID) error {
			_, err := w.agents().DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: id})
			return err
		}, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, codes.OK},
	} {
		// cutOff returns how long it takes until everything of an agent has ended.
		cutOff := func(t *testing.T, name string) time.Duration {
			t.Helper()
			path, _, conn := w.agent(name)
			stream := follow(conn)
			began := time.Now()
			if err := c.end(id(path)); err != nil {
				t.Fatal(err)
			}
			err := ping(conn, ctx)
			refused(t, err, codes.PermissionDenied, "authorization denied for method /spire.api.server.entry.v1.Entry/GetAuthorizedEntries")
			if reason(err) != c.reason {
				t.Errorf("the next call: reason %s", reason(err))
			}
			line := w.denied(t, "call.refuse")
			if line["caller"] != "spiffe://example.org"+path || line["reason"] != c.reason.String() {
				t.Errorf("audit line %v", line)
			}
			for err = nil; err == nil; {
				_, err = stream.Recv()
			}
			if reason(err) != c.reason {
				t.Errorf("the open stream: %v", err)
			}
			took := time.Since(began)
			_, _, err = w.attest("honest", []byte(name), "")
			refused(t, err, c.again, "")
			return took
		}
		t.Run("one that is "+c.name+" is cut off at once", func(t *testing.T) {
			took := cutOff(t, c.name)
			for try := range 4 { // who waits for something does so each time, a loaded machine seldom
				if took <= time.Second || t.Failed() {
					return
				}
				took = min(took, cutOff(t, fmt.Sprintf("%s-%d", c.name, try)))
			}
			if took > time.Second {
				t.Errorf("it took %s at the least", took)
			}
		})
	}
	for _, c := range []struct {
		name string
		id   *types.SPIFFEID
		code codes.Code
		part string
	}{
		{"that is unknown", id("/spire/agent/x"), codes.NotFound, "agent not found"},
		{"without an ID", nil, codes.InvalidArgument, "invalid agent ID"},
		{"that is a workload", id("/x"), codes.InvalidArgument, "not in the agent namespace"},
		{"of another trust domain", &types.SPIFFEID{TrustDomain: "x.test", Path: "/spire/agent/x"}, codes.InvalidArgument, "not a member"},
	} {
		t.Run("one "+c.name+" cannot be", func(t *testing.T) {
			_, err := w.agents().BanAgent(ctx, &agentv1.BanAgentRequest{Id: c.id})
			refused(t, err, c.code, c.part)
			w.denied(t, "agent.ban")
			_, err = w.agents().DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: c.id})
			refused(t, err, c.code, c.part)
			w.denied(t, "agent.evict")
			_, err = w.agents().GetAgent(ctx, &agentv1.GetAgentRequest{Id: c.id})
			refused(t, err, c.code, c.part)
			w.denied(t, "agent.get")
		})
	}
	w.unharmed()
}

func TestListAgents(t *testing.T) {
	w := start(t)
	ctx := w.context()
	for _, name := range []string{"a", "b", "once-c"} {
		if _, _, err := w.attest("honest", []byte(name), ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.agents().BanAgent(ctx, &agentv1.BanAgentRequest{Id: id("/spire/agent/honest/b")}); err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(2 * time.Hour).Format("2006-01-02 15:04:05 -0700 -07")
	type filter = agentv1.ListAgentsRequest_Filter
	for _, c := range []struct {
		name   string
		filter *filter
		want   []string
	}{
		{"all", nil, []string{"a", "b", "once-c"}},
		{"by type", &filter{ByAttestationType: "join_token"}, nil},
		{"banned", &filter{ByBanned: wrapperspb.Bool(true)}, []string{"b"}},
		{"not banned", &filter{ByBanned: wrapperspb.Bool(false)}, []string{"a", "once-c"}},
		{"that cannot attest again", &filter{ByCanReattest: wrapperspb.Bool(false)}, []string{"once-c"}},
		{"that expire soon", &filter{ByExpiresBefore: later}, []string{"a", "b", "once-c"}},
		{"with exact selectors", &filter{BySelectorMatch: &types.SelectorMatch{Selectors: selectors("honest:name:a")}}, []string{"a"}},
		{"with any selector", &filter{BySelectorMatch: &types.SelectorMatch{Match: types.SelectorMatch_MATCH_ANY, Selectors: selectors("honest:name:a", "honest:name:b")}}, []string{"a", "b"}},
		{"with a superset", &filter{BySelectorMatch: &types.SelectorMatch{Match: types.SelectorMatch_MATCH_SUPERSET, Selectors: selectors("honest:name:a", "honest:name:b")}}, nil},
		{"with a subset", &filter{BySelectorMatch: &types.SelectorMatch{Match: types.SelectorMatch_MATCH_SUBSET, Selectors: selectors("honest:name:a", "honest:name:z")}}, []string{"a"}},
	} {
		t.Run("agents "+c.name, func(t *testing.T) {
			resp, err := w.agents().ListAgents(ctx, &agentv1.ListAgentsRequest{Filter: c.filter})
			var got []string
			for _, a := range resp.GetAgents() {
				got = append(got, strings.TrimPrefix(a.GetId().GetPath(), "/spire/agent/honest/"))
			}
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("got %v, %v", got, err)
			}
			var f *agentv1.CountAgentsRequest_Filter
			if c.filter != nil {
				f = &agentv1.CountAgentsRequest_Filter{
					ByAttestationType: c.filter.ByAttestationType, BySelectorMatch: c.filter.BySelectorMatch, ByBanned: c.filter.ByBanned,
					ByCanReattest: c.filter.ByCanReattest, ByExpiresBefore: c.filter.ByExpiresBefore,
				}
			}
			if n, err := w.agents().CountAgents(ctx, &agentv1.CountAgentsRequest{Filter: f}); err != nil || int(n.GetCount()) != len(c.want) {
				t.Errorf("counted %v, %v", n, err)
			}
		})
	}
	t.Run("pages and masks are kept", func(t *testing.T) {
		first, err := w.agents().ListAgents(ctx, &agentv1.ListAgentsRequest{PageSize: 2, OutputMask: &types.AgentMask{Banned: true}})
		if err != nil || len(first.GetAgents()) != 2 || first.GetNextPageToken() == "" || !first.GetAgents()[1].GetBanned() || first.GetAgents()[0].GetSelectors() != nil {
			t.Fatalf("got %v, %v", first, err)
		}
		second, err := w.agents().ListAgents(ctx, &agentv1.ListAgentsRequest{PageSize: 2, PageToken: first.GetNextPageToken()})
		if err != nil || len(second.GetAgents()) != 1 || second.GetNextPageToken() != "" {
			t.Errorf("got %v, %v", second, err)
		}
	})
	t.Run("a banned agent has no serial number", func(t *testing.T) {
		a, err := w.agents().GetAgent(ctx, &agentv1.GetAgentRequest{Id: id("/spire/agent/honest/b")})
		if err != nil || !a.GetBanned() || a.GetX509SvidSerialNumber() != "" || len(a.GetSelectors()) != 1 || a.GetAttestationType() != "honest" {
			t.Errorf("got %v, %v", a, err)
		}
	})
	for _, c := range []struct {
		name string
		req  *agentv1.ListAgentsRequest
	}{
		{"a garbage page token", &agentv1.ListAgentsRequest{PageSize: 1, PageToken: "12"}},
		{"a negative page size", &agentv1.ListAgentsRequest{PageSize: -1}},
		{"a time in another form", &agentv1.ListAgentsRequest{Filter: &filter{ByExpiresBefore: "yesterday"}}},
		{"an empty selector match", &agentv1.ListAgentsRequest{Filter: &filter{BySelectorMatch: &types.SelectorMatch{}}}},
	} {
		t.Run(c.name+" is malformed", func(t *testing.T) {
			_, err := w.agents().ListAgents(ctx, c.req)
			refused(t, err, codes.InvalidArgument, "")
			w.denied(t, "agent.list")
		})
	}
}

func TestPostStatus(t *testing.T) {
	w := start(t)
	path, _, conn := w.agent("versioned")
	post := func(version string) error {
		_, err := agentv1.NewAgentClient(conn).PostStatus(w.context(), &agentv1.PostStatusRequest{AgentVersion: version})
		return err
	}
	if err := post("1.2.3"); err != nil {
		t.Fatal(err)
	}
	if err := post("1.2.3"); err != nil {
		t.Fatal(err)
	}
	refused(t, post(strings.Repeat("v", 256)), codes.InvalidArgument, "agent version is too long")
	refused(t, post("1\x1b[31m"), codes.InvalidArgument, "control character")
	// Another write is awaited by its caller, and the status was written before it.
	w.create(shop())
	if a, err := w.agents().GetAgent(w.context(), &agentv1.GetAgentRequest{Id: id(path)}); err != nil || a.GetAgentVersion() != "1.2.3" {
		t.Errorf("got %v, %v", a, err)
	}
}
