package uplink

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/server/wire/later"
	"github.com/assay-id/assay/server/wire/terms"
	"github.com/assay-id/assay/workloadapi/identity"
)

const (
	// maxBatch is the most that servers sign in one call.
	maxBatch = 500
	// signTimeout bounds one call. Servers make callers wait for their share.
	signTimeout = 30 * time.Second
	// minPause is the least between two calls to a server that has too much to do.
	minPause = 100 * time.Millisecond
	// otherTimeout is how long a refused call waits for another own SVID. Attesting takes less.
	otherTimeout = 2 * time.Second
)

// batchLimit is how many requests go into one call: halved when the server finds a call too large,
// doubled when it does not.
type batchLimit struct {
	mu    sync.Mutex
	limit int // 0: maxBatch
}

func (b *batchLimit) get() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.limit == 0 {
		return maxBatch
	}
	return b.limit
}

func (b *batchLimit) tried(size int, tooLarge bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if tooLarge {
		b.limit = max(1, size/2)
	} else if b.limit != 0 && size >= b.limit {
		b.limit = min(maxBatch, b.limit*2)
	}
}

// SignX509 asks the server to sign one X509-SVID for each entry, with the CSR at the same place. It
// returns a chain (DER, leaf first, without the root) or an error for each: identity.ErrUnknownEntry
// if the server does not (or not yet) grant the entry to this agent, and an error wrapping
// identity.ErrUnavailable if the server cannot be asked at the moment.
func (u *Uplink) SignX509(ctx context.Context, asked []identity.Asked, csrs [][]byte) (chains [][][]byte, errs []error) {
	chains = make([][][]byte, len(asked))
	errs = make([]error, len(asked))
	by := termsOf(asked...)
	for at := 0; at < len(asked); {
		end := min(len(asked), at+u.batch.get())
		for end-at > 1 && !terms.Fit(by[at:end]) {
			end = at + (end-at)/2
		}
		req := &svidv1.BatchNewX509SVIDRequest{}
		for i := at; i < end; i++ {
			req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: asked[i].EntryID, Csr: csrs[i]})
		}
		var resp *svidv1.BatchNewX509SVIDResponse
		err := u.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
			resp, err = svidv1.NewSVIDClient(conn).BatchNewX509SVID(terms.With(ctx, by[at:end]...), req)
			return err
		})
		if err == nil && len(resp.GetResults()) != end-at {
			err = fmt.Errorf("server answered %d requests of %d", len(resp.GetResults()), end-at)
		}
		_, busy := later.Hint(err) // then it is not the batch that is too large
		tooLarge := codeOf(err) == codes.ResourceExhausted && !busy
		u.batch.tried(end-at, tooLarge)
		if tooLarge && end-at > 1 {
			continue // with half of them
		}
		for i := at; i < end; i++ {
			if err != nil {
				errs[i] = fmt.Errorf("sign X509-SVID: %w", err)
				continue
			}
			chains[i], errs[i] = x509Result(resp.GetResults()[i-at])
		}
		at = end
	}
	return chains, errs
}

// termsOf is what requests go by, as the server is told.
func termsOf(asked ...identity.Asked) []terms.Item {
	items := make([]terms.Item, len(asked))
	for n, a := range asked {
		items[n].Revision = a.Revision
		for _, v := range a.Verdicts {
			items[n].Verdicts = append(items[n].Verdicts, terms.Verdict{Digest: v.Digest, Seq: v.Seq})
		}
	}
	return items
}

func x509Result(r *svidv1.BatchNewX509SVIDResponse_Result) ([][]byte, error) {
	switch code := codes.Code(r.GetStatus().GetCode()); code { //nolint:gosec // unknown codes stay unknown
	case codes.OK:
	case codes.NotFound:
		return nil, identity.ErrUnknownEntry
	case codes.FailedPrecondition: // the server has seen a change that has yet to arrive here
		return nil, fmt.Errorf("%w: %s", identity.ErrUnknownEntry, r.GetStatus().GetMessage())
	default:
		return nil, fmt.Errorf("sign X509-SVID: %w", status.Error(code, r.GetStatus().GetMessage()))
	}
	if len(r.GetSvid().GetCertChain()) == 0 {
		return nil, errors.New("sign X509-SVID: server sent no certificate")
	}
	return r.GetSvid().GetCertChain(), nil
}

// SignJWT asks the server to sign a JWT-SVID for the entry. Its errors are as SignX509's.
func (u *Uplink) SignJWT(ctx context.Context, asked identity.Asked, audience []string) (*identity.JWTSVID, error) {
	var resp *svidv1.NewJWTSVIDResponse
	err := u.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		resp, err = svidv1.NewSVIDClient(conn).NewJWTSVID(terms.With(ctx, termsOf(asked)...), &svidv1.NewJWTSVIDRequest{EntryId: asked.EntryID, Audience: audience})
		return err
	})
	switch codeOf(err) {
	case codes.NotFound:
		return nil, identity.ErrUnknownEntry
	case codes.FailedPrecondition:
		return nil, fmt.Errorf("%w: %w", identity.ErrUnknownEntry, err)
	}
	if err != nil {
		return nil, fmt.Errorf("sign JWT-SVID: %w", err)
	}
	return tokenFromWire("JWT-SVID", asked.EntryID, resp.GetSvid())
}

// SignWIT asks the server to sign a WIT-SVID for the entry and the key (PKIX), which will prove with the
// algorithm. Its errors are as SignX509's, or wrap identity.ErrUnsupported: the server signs none.
func (u *Uplink) SignWIT(ctx context.Context, asked identity.Asked, key []byte, algorithm string) (*identity.JWTSVID, error) {
	var resp *svidv1.BatchNewWITSVIDResponse
	err := u.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		resp, err = svidv1.NewSVIDClient(conn).BatchNewWITSVID(terms.With(ctx, termsOf(asked)...), &svidv1.BatchNewWITSVIDRequest{
			Params: []*svidv1.NewWITSVIDParams{{EntryId: asked.EntryID, PublicKey: key, SigningAlgorithm: algorithm}},
		})
		return err
	})
	if codeOf(err) == codes.Unimplemented {
		return nil, fmt.Errorf("sign WIT-SVID: %w: %w", identity.ErrUnsupported, err)
	}
	if err == nil && len(resp.GetResults()) != 1 {
		err = fmt.Errorf("server answered %d requests of 1", len(resp.GetResults()))
	}
	if err != nil {
		return nil, fmt.Errorf("sign WIT-SVID: %w", err)
	}
	r := resp.GetResults()[0]
	switch code := codes.Code(r.GetStatus().GetCode()); code { //nolint:gosec // unknown codes stay unknown
	case codes.OK:
	case codes.NotFound:
		return nil, identity.ErrUnknownEntry
	case codes.FailedPrecondition:
		return nil, fmt.Errorf("%w: %s", identity.ErrUnknownEntry, r.GetStatus().GetMessage())
	default:
		return nil, fmt.Errorf("sign WIT-SVID: %w", status.Error(code, r.GetStatus().GetMessage()))
	}
	return tokenFromWire("WIT-SVID", asked.EntryID, r.GetSvid())
}

// wireToken is a JWT-SVID or a WIT-SVID in its public form.
type wireToken interface {
	GetToken() string
	GetId() *types.SPIFFEID
	GetHint() string
	GetIssuedAt() int64
	GetExpiresAt() int64
}

func tokenFromWire(kind, entryID string, svid wireToken) (*identity.JWTSVID, error) {
	id, err := identity.IDFromWire(svid.GetId())
	if err != nil {
		return nil, fmt.Errorf("sign %s: server sent: %w", kind, err)
	}
	switch {
	case svid.GetToken() == "":
		return nil, fmt.Errorf("sign %s: server sent no token", kind)
	case svid.GetIssuedAt() <= 0 || svid.GetExpiresAt() <= 0 || svid.GetIssuedAt() > svid.GetExpiresAt():
		return nil, fmt.Errorf("sign %s: server sent times that cannot be", kind)
	}
	return &identity.JWTSVID{
		EntryID: entryID, ID: id, Token: svid.GetToken(), Hint: svid.GetHint(),
		IssuedAt: time.Unix(svid.GetIssuedAt(), 0), ExpiresAt: time.Unix(svid.GetExpiresAt(), 0),
	}, nil
}

// call makes one call on the connection of the moment. A call that was refused because the own SVID
// was being replaced while it was under way is made once more as the new one. A server that has too
// much to do is asked again when it says, if that is soon enough.
func (u *Uplink) call(ctx context.Context, do func(context.Context, *grpc.ClientConn) error) error {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	own, err := u.callOnce(ctx, do)
	for u.heeded(ctx, err) {
		own, err = u.callOnce(ctx, do)
	}
	if codeOf(err) != codes.PermissionDenied {
		return err
	}
	if u.awaitOther(ctx, own) {
		own, err = u.callOnce(ctx, do)
	}
	if codeOf(err) == codes.PermissionDenied {
		u.self.Denied(own, err)
	}
	return err
}

// heeded waits as long as the server asks for, and reports whether it did. If there is less time than
// that, it does not begin to.
func (u *Uplink) heeded(ctx context.Context, err error) bool {
	hint, ok := later.Hint(err)
	if !ok {
		return false
	}
	wait := hint + jitter(max(hint/10, minPause))
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
		return false
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (u *Uplink) callOnce(ctx context.Context, do func(context.Context, *grpc.ClientConn) error) (*keep.Own, error) {
	u.calls.RLock()
	defer u.calls.RUnlock()
	if u.conn == nil {
		return nil, fmt.Errorf("ask server: the agent is not attested: %w", identity.ErrUnavailable)
	}
	err := do(ctx, u.conn)
	switch codeOf(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		err = fmt.Errorf("%w: %w", identity.ErrUnavailable, err)
	case codes.ResourceExhausted:
		if _, busy := later.Hint(err); busy {
			err = fmt.Errorf("%w: %w", identity.ErrUnavailable, err)
		}
	}
	return u.own, err
}

// awaitOther waits a moment until calls are made as somebody else than own.
func (u *Uplink) awaitOther(ctx context.Context, own *keep.Own) bool {
	timer := time.NewTimer(otherTimeout)
	defer timer.Stop()
	for {
		u.calls.RLock()
		now, replaced := u.own, u.replaced
		u.calls.RUnlock()
		if now != nil && now != own {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return false
		case <-replaced:
		}
	}
}
