package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/admit"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/wire/evidencev1"
	"github.com/assay-id/assay/server/wire/later"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestRates(t *testing.T) {
	t.Run("a caller over the rate waits, others do not", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRates(1, 1)
			began := time.Now()
			for range 3 {
				if err := r.wait(t.Context(), "a", 1); err != nil {
					t.Fatal(err)
				}
			}
			if took := time.Since(began); took != 2*time.Second {
				t.Errorf("three at 1/s took %s", took)
			}
			began = time.Now()
			if err := r.wait(t.Context(), "b", 1); err != nil || time.Since(began) != 0 {
				t.Errorf("another source: %v after %s", err, time.Since(began))
			}
			if err := r.wait(t.Context(), "", 100); err != nil || time.Since(began) != 0 {
				t.Errorf("a local caller: %v after %s", err, time.Since(began))
			}
		})
	})
	t.Run("a batch counts as many", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRates(500, 500)
			began := time.Now()
			for range 3 {
				if err := r.wait(t.Context(), "a", 500); err != nil {
					t.Fatal(err)
				}
			}
			if took := time.Since(began); took != 2*time.Second {
				t.Errorf("1500 at 500/s took %s", took)
			}
		})
	})
	t.Run("waiters are limited", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRates(0.001, 1)
			ctx, cancel := context.WithCancel(t.Context())
			if err := r.wait(ctx, "a", 1); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for range maxWaiters {
				wg.Go(func() {
					if err := r.wait(ctx, "a", 1); status.Code(err) != codes.Canceled {
						t.Errorf("got %v, want Canceled", err)
					}
				})
			}
			synctest.Wait()
			if err := r.wait(ctx, "a", 1); status.Code(err) != codes.ResourceExhausted {
				t.Errorf("got %v, want ResourceExhausted", err)
			}
			cancel()
			wg.Wait()
		})
	})
	t.Run("a deadline that is too early is said at once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRates(0.01, 1)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_ = r.wait(ctx, "a", 1)
			if err := r.wait(ctx, "a", 1); status.Code(err) != codes.ResourceExhausted {
				t.Errorf("got %v", err)
			}
		})
	})
	t.Run("those who are sent away are told to come back one after the other", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRates(1, 1)
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			_ = r.wait(ctx, "a", 1)
			last := time.Duration(0)
			for i := range 100 {
				err := r.wait(ctx, "a", 1)
				if in := hint(err); status.Code(err) != codes.ResourceExhausted || in-last != time.Second && i > 0 {
					t.Fatalf("number %d: %v, in %s after %s", i, err, in, last)
				}
				last = hint(err)
			}
			if last < 100*time.Second || last > 102*time.Second {
				t.Errorf("the hundredth is to come back in %s", last)
			}
			for range 1000 {
				_ = r.wait(ctx, "a", 1)
			}
			if in := hint(r.wait(ctx, "a", 1)); in < later.Max/2 || in > later.Max {
				t.Errorf("the last is to come back in %s", in)
			}
		})
	})
	t.Run("sources are forgotten before there are too many", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRates(1, 1)
			for i := range maxSources {
				if err := r.wait(t.Context(), fmt.Sprint(i), 1); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.wait(t.Context(), "one too many", 1); len(r.sources) >= maxSources && status.Code(err) != codes.ResourceExhausted {
				t.Errorf("got %v", err)
			}
			<-time.After(2 * time.Minute) // in a bubble: no time passes outside
			if err := r.wait(t.Context(), "later", 1); err != nil {
				t.Errorf("got %v", err)
			}
		})
	})
	t.Run("no rate is no limit", func(t *testing.T) {
		if err := newRates(-1, 0).wait(t.Context(), "a", 1<<30); err != nil {
			t.Error(err)
		}
	})
}

// hint returns when a caller is told to come back.
func hint(err error) time.Duration {
	in, _ := later.Hint(err)
	return in
}

// log is an audit log that may be broken.
type log struct {
	mu    sync.Mutex
	err   error
	lines []audit.Line
}

func (l *log) Write(line audit.Line) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.lines = append(l.lines, line)
	}
	return l.err
}

func TestLedgers(t *testing.T) {
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	ctx := caller.NewContext(t.Context(), &caller.Caller{Kind: caller.Local, UID: 5})
	const mint = "/spire.api.server.svid.v1.SVID/MintX509SVID"
	const get = "/spire.api.server.bundle.v1.Bundle/GetBundle"
	call := func(o *Ledgers, method string, do func(context.Context) (any, error)) (any, error) {
		return o.Unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: method}, func(ctx context.Context, _ any) (any, error) { return do(ctx) })
	}
	fine := func(context.Context) (any, error) { return "certificate", nil }

	t.Run("a call has one line, with what was noted", func(t *testing.T) {
		l := &log{}
		_, err := call(newLedgers(l, silent, time.Now), mint, func(ctx context.Context) (any, error) {
			ledgerOf(ctx).note(func(line *audit.Line) { line.Serial = "7" })
			return nil, nil
		})
		if err != nil || len(l.lines) != 1 || l.lines[0].Serial != "7" || l.lines[0].Event != "svid.x509.mint" || l.lines[0].Outcome != audit.Allow || l.lines[0].Caller != "local" {
			t.Errorf("lines %+v, %v", l.lines, err)
		}
	})
	t.Run("a batch has a line per item", func(t *testing.T) {
		l := &log{}
		_, _ = call(newLedgers(l, silent, time.Now), mint, func(ctx context.Context) (any, error) {
			ledgerOf(ctx).item(audit.Line{EntryID: "a"}, nil)
			ledgerOf(ctx).item(audit.Line{EntryID: "b"}, refusal(codes.NotFound, "no"))
			ledgerOf(ctx).item(audit.Line{EntryID: "c"}, fail("failed", errors.New("disk")))
			return nil, nil
		})
		if len(l.lines) != 3 || l.lines[0].Outcome != audit.Allow || l.lines[1].Outcome != audit.Deny || l.lines[2].Outcome != audit.Error || !strings.Contains(l.lines[2].Reason, "disk") {
			t.Errorf("lines %+v", l.lines)
		}
	})
	t.Run("a quiet method has a line only when it fails", func(t *testing.T) {
		l := &log{}
		o := newLedgers(l, silent, time.Now)
		_, _ = call(o, get, fine)
		_, _ = call(o, get, func(context.Context) (any, error) { return nil, refusal(codes.NotFound, "no") })
		if len(l.lines) != 1 || l.lines[0].Outcome != audit.Deny {
			t.Errorf("lines %+v", l.lines)
		}
	})
	t.Run("without a line there is no answer, and nothing more is done until there is one", func(t *testing.T) {
		l := &log{err: errors.New("disk full")}
		o := newLedgers(l, silent, time.Now)
		if resp, err := call(o, mint, fine); resp != nil || status.Code(err) != codes.Unavailable {
			t.Errorf("got %v, %v", resp, err)
		}
		_, err := call(o, mint, func(context.Context) (any, error) { t.Error("it was done"); return nil, nil })
		if status.Code(err) != codes.Unavailable || o.Err() == nil {
			t.Errorf("got %v", err)
		}
		if _, err := call(o, get, fine); err != nil {
			t.Errorf("what needs no line: %v", err)
		}
		l.err = nil
		if resp, err := call(o, mint, fine); resp != "certificate" || err != nil || o.Err() != nil {
			t.Errorf("got %v, %v", resp, err)
		}
		if len(l.lines) != 2 || l.lines[0].Event != "audit.resume" {
			t.Errorf("lines %+v", l.lines)
		}
	})
}

func TestErrorsBecomeCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		code codes.Code
		text string
	}{
		{errors.New("secret"), codes.Internal, "did"},
		{records.ErrNotFound, codes.NotFound, "did"},
		{records.ErrConflict, codes.Aborted, "did: it is being changed by others"},
		{records.ErrTokenExpired, codes.InvalidArgument, "did: join token expired"},
		{&records.MissingBundleError{TrustDomain: spiffeid.RequireTrustDomainFromString("a.test")}, codes.FailedPrecondition, `did: unable to find federated bundle "a.test"`},
		{&admit.UnknownTypeError{Type: "x"}, codes.FailedPrecondition, `did: could not find node attestor type "x"`},
		{admit.ErrBanned, codes.PermissionDenied, "did: agent is banned"},
		{attestor.ErrUsed, codes.PermissionDenied, "did: attestation data has already been used to attest an agent"},
		{attestor.Refusef("a liar"), codes.InvalidArgument, "did: a liar"},
		{kv.ErrFull, codes.ResourceExhausted, "did: no space left in the store"},
		{kv.ErrClosed, codes.Unavailable, "did: server is stopping"},
		{ca.ErrNoAuthority, codes.Unavailable, "did: no valid authority to sign with"},
		{ca.ErrTTL, codes.InvalidArgument, "did: invalid TTL"},
		{context.DeadlineExceeded, codes.DeadlineExceeded, "did: it took too long"},
		{malformed("inner", errors.New("x")), codes.InvalidArgument, "inner: x"},
	} {
		st := status.Convert(fail("did", c.err))
		if st.Code() != c.code || st.Message() != c.text {
			t.Errorf("%v: got %s %q, want %s %q", c.err, st.Code(), st.Message(), c.code, c.text)
		}
	}
}

func TestPages(t *testing.T) {
	for _, c := range []struct {
		size  int32
		token string
		want  page
		bad   bool
	}{
		{size: 0, want: page{}},
		{size: 7, want: page{size: 7}},
		{size: maxPage, want: page{size: maxPage}},
		{size: maxPage + 1, want: page{size: maxPage}},
		{size: math.MaxInt32, token: pageToken("x"), want: page{size: maxPage, after: "x"}},
		{size: 5, token: pageToken(strings.Repeat("x", identity.MaxSPIFFEID)), want: page{size: 5, after: strings.Repeat("x", identity.MaxSPIFFEID)}},
		{size: 5, token: pageToken(strings.Repeat("x", identity.MaxSPIFFEID+1)), bad: true},
		{size: 5, token: "b1.eA", bad: true},
		{size: -1, bad: true},
	} {
		if got, err := pageFromWire(c.size, c.token); got != c.want || (err != nil) != c.bad {
			t.Errorf("a page of %d after %.20q: got %+v, %v", c.size, c.token, got, err)
		}
	}
	t.Run("a page of images is as large as one may be and no larger", func(t *testing.T) {
		for size, want := range map[int32]int{0: defaultImages, 5: 5, maxImages: maxImages, maxImages + 1: maxImages, math.MaxInt32: maxImages} {
			judge := &lister{}
			s := &evidenceService{api: &API{Parts: Parts{Evidence: judge}}}
			if _, err := s.List(t.Context(), &evidencev1.ListRequest{PageSize: size}); err != nil || judge.limit != want {
				t.Errorf("of a page of %d, %d are asked for: %v", size, judge.limit, err)
			}
		}
	})
}

// lister is asked for images, and notes how many.
type lister struct {
	Evidence
	limit int
}

func (l *lister) List(_ string, _ bool, _ string, limit int) ([]verdict.Summary, string) {
	l.limit = limit
	return nil, ""
}

func FuzzPageToken(f *testing.F) {
	for _, seed := range []string{"", "12", "a1.", "a1.eA", "a1.!!", pageToken("spiffe://example.org/x")} {
		f.Add(int32(5), seed)
	}
	f.Fuzz(func(t *testing.T, size int32, token string) {
		p, err := pageFromWire(size, token)
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("got %v", err)
			}
			return
		}
		again, err := pageFromWire(size, pageToken(p.after))
		if err != nil || again != p {
			t.Errorf("%+v became %+v, %v", p, again, err)
		}
	})
}

func FuzzEntryFromWire(f *testing.F) {
	a := &API{cfg: Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")}}
	seed, err := proto.Marshal(&types.Entry{
		SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/x"}, ParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/y"},
		Selectors: []*types.Selector{{Type: "a", Value: "b"}}, DnsNames: []string{"a.b"}, FederatesWith: []string{"c.test"}, Hint: "h", Id: "i",
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		w := &types.Entry{}
		if proto.Unmarshal(b, w) != nil {
			return
		}
		e, err := a.entryFromWire(w)
		if err != nil {
			return
		}
		// What was taken is well formed: it is taken again, and is the same.
		again, err := a.entryFromWire(e.Wire())
		if err != nil || !proto.Equal(again.Wire(), e.Wire()) {
			t.Errorf("%v became %v, %v", e.Wire(), again.Wire(), err)
		}
		if !e.SPIFFEID.MemberOf(a.cfg.TrustDomain) || strings.HasPrefix(e.SPIFFEID.Path(), "/spire/") || e.Selectors.Len() == 0 {
			t.Errorf("taken: %v", e)
		}
	})
}
