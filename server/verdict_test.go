package server

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/wire/feedv1"
)

// image is a config digest.
const image = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func (w *world) decide(change func(*records.Verdict), texts ...string) {
	w.t.Helper()
	_, _, err := w.running.Records.UpdateVerdict(w.context(), image, func(v *records.Verdict) error {
		var list []attestor.Selector
		for _, text := range texts {
			s, err := attestor.ParseSelector(text)
			if err != nil {
				return err
			}
			list = append(list, s)
		}
		v.Selectors = attestor.NewSet(list...)
		if change != nil {
			change(v)
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// reporter follows the feed as an agent that runs images, and does nothing of what it is told.
type reporter struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[feedv1.FollowRequest, feedv1.FollowResponse]
}

func (w *world) report(conn *grpc.ClientConn, digests ...string) *reporter {
	w.t.Helper()
	stream, err := feedv1.NewFeedClient(conn).Follow(w.context())
	if err != nil {
		w.t.Fatal(err)
	}
	r := &reporter{w.t, stream}
	hello := &feedv1.Hello{Capabilities: []string{"verdicts"}, Running: digests}
	if err := stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: hello}}); err != nil {
		w.t.Fatal(err)
	}
	r.next()
	return r
}

// next takes a picture and returns what it says of the image.
func (r *reporter) next() *feedv1.Verdict {
	r.t.Helper()
	msg, err := r.stream.Recv()
	if err != nil {
		r.t.Fatal(err)
	}
	err = r.stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Ack{Ack: &feedv1.Ack{Revision: msg.GetRevision()}}})
	if err != nil {
		r.t.Fatal(err)
	}
	if len(msg.GetVerdicts()) == 0 {
		return nil
	}
	return msg.GetVerdicts()[0]
}

func TestSigningDemandsAVerdict(t *testing.T) {
	w := start(t)
	ctx := w.context()
	path, _, conn := w.agent("ours")
	stockPath, _, stock := w.agent("stock")
	gate := selectors("unix:uid:1000", "scan:policy:prod")
	e := w.create(shop(func(e *types.Entry) { e.ParentId, e.Selectors = id(path), gate }))
	theirs := w.create(shop(func(e *types.Entry) { e.ParentId, e.Selectors = id(stockPath), gate }))
	w.create(shop(func(e *types.Entry) { e.ParentId, e.SpiffeId = id(stockPath), id("/plain") }))
	w.decide(func(v *records.Verdict) { v.TTL, v.JWTTTL = 10*time.Minute, time.Minute }, "scan:policy:prod")

	x509New := func(conn *grpc.ClientConn, e *types.Entry) *svidv1.BatchNewX509SVIDResponse_Result {
		t.Helper()
		resp, err := svidv1.NewSVIDClient(conn).BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{
			Params: []*svidv1.NewX509SVIDParams{{EntryId: e.GetId(), Csr: csr(t, newKey(t))}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetResults()[0]
	}
	jwtNew := func(conn *grpc.ClientConn, e *types.Entry) (*svidv1.NewJWTSVIDResponse, error) {
		return svidv1.NewSVIDClient(conn).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: e.GetId(), Audience: []string{"bank"}})
	}

	t.Run("a stock agent sees no entry that demands a verdict", func(t *testing.T) {
		client := entryv1.NewEntryClient(stock)
		resp, err := client.GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
		if err != nil || len(resp.GetEntries()) != 1 || resp.GetEntries()[0].GetSpiffeId().GetPath() != "/plain" {
			t.Errorf("authorized: %v %v", resp, err)
		}
		stream, err := client.SyncAuthorizedEntries(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{}); err != nil {
			t.Fatal(err)
		}
		page, err := stream.Recv()
		if err != nil || len(page.GetEntries()) != 1 || page.GetEntries()[0].GetSpiffeId().GetPath() != "/plain" {
			t.Errorf("sync: %v %v", page, err)
		}
	})
	t.Run("and gets none signed, as if there were none; the audit line says why", func(t *testing.T) {
		if r := x509New(stock, theirs); codes.Code(r.GetStatus().GetCode()) != codes.NotFound || r.GetSvid() != nil {
			t.Errorf("X509-SVID: %v", r)
		}
		if line := w.lastAudit("svid.x509.new"); line["outcome"] != "deny" || !strings.Contains(line["reason"].(string), "no verdict on any image that the agent reported") {
			t.Errorf("audit line %v", line)
		}
		_, err := jwtNew(stock, theirs)
		refused(t, err, codes.NotFound, "entry not found")
	})

	agent := w.report(conn, image)
	t.Run("an agent that runs a good image has it signed, for no longer than the verdict allows", func(t *testing.T) {
		r := x509New(conn, e)
		if r.GetStatus().GetCode() != 0 {
			t.Fatal(r.GetStatus())
		}
		leaf, err := x509.ParseCertificate(r.GetSvid().GetCertChain()[0])
		if err != nil {
			t.Fatal(err)
		}
		if life := leaf.NotAfter.Sub(leaf.NotBefore); life > 10*time.Minute+10*time.Second || life < 9*time.Minute {
			t.Errorf("X509-SVID lives %s, want 10m and 10s before", life)
		}
		if line := w.lastAudit("svid.x509.new"); line["outcome"] != "allow" || !strings.HasPrefix(line["verdicts"].([]any)[0].(string), image+"@") {
			t.Errorf("audit line %v", line)
		}
		token, err := jwtNew(conn, e)
		if err != nil {
			t.Fatal(err)
		}
		if life := token.GetSvid().GetExpiresAt() - token.GetSvid().GetIssuedAt(); life > 60 {
			t.Errorf("JWT-SVID lives %ds, want at most 60", life)
		}
	})
	t.Run("after the verdict flips nothing is signed, whatever the agent makes of it", func(t *testing.T) {
		w.decide(func(v *records.Verdict) {
			v.Policies = []records.PolicyVerdict{{Policy: "prod", Status: "fail", Mode: "enforce", Summary: "CVE-2026-1 (critical) in report 7"}}
		}, "scan:status:prod:fail")
		agent.next() // so that the view has it
		r := x509New(conn, e)
		if codes.Code(r.GetStatus().GetCode()) != codes.FailedPrecondition || r.GetSvid() != nil {
			t.Errorf("X509-SVID: %v", r)
		}
		line := w.lastAudit("svid.x509.new")
		if reason, _ := line["reason"].(string); line["outcome"] != "deny" || !strings.Contains(reason, "policy prod says fail (CVE-2026-1 (critical) in report 7)") {
			t.Errorf("audit line %v", line)
		}
		_, err := jwtNew(conn, e)
		refused(t, err, codes.FailedPrecondition, "does not grant scan:policy:prod")
	})
	t.Run("a verdict that has ended is none", func(t *testing.T) {
		w.decide(func(v *records.Verdict) { v.NotAfter = time.Now().Add(-time.Second) }, "scan:policy:prod")
		agent.next()
		if r := x509New(conn, e); !strings.Contains(r.GetStatus().GetMessage(), "ended at") {
			t.Errorf("X509-SVID: %v", r)
		}
	})
	t.Run("an agent that runs another image gets nothing by a good one elsewhere", func(t *testing.T) {
		w.decide(func(v *records.Verdict) { v.NotAfter = time.Time{} }, "scan:policy:prod")
		agent.next()
		if r := x509New(conn, e); r.GetStatus().GetCode() != 0 {
			t.Fatal(r.GetStatus())
		}
		w.report(stock, strings.Replace(image, "0", "f", 1))
		if r := x509New(stock, theirs); r.GetStatus().GetCode() == 0 {
			t.Error("it was signed")
		}
	})
}
