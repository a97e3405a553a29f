package server

import (
	"context"
	"crypto/tls"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/turn"
	"github.com/assay-id/assay/server/wire/later"
	"github.com/assay-id/assay/server/wire/unread"
)

const (
	// streamTime is how long a stream may take that its caller does not keep open: an attestation
	// that waits for its rate, a synchronization.
	streamTime = 6 * time.Minute
	// receiveTime is how long the one request of a call may take to come when its turn has.
	receiveTime = 10 * time.Second
	// receivers is how many requests of more than a flow-control window (64 KiB) may be on their way
	// into memory at a time; each may take Limits.MaxMessage. strangers is how many of callers that
	// showed no certificate.
	receivers = 96
	strangers = 32
	// largeCalls is how many calls with a large answer one caller may have open: an answer that
	// nobody reads stays in memory.
	largeCalls = 8
)

// large are the calls whose answers grow with what is stored.
var large = map[string]bool{
	"/spire.api.server.entry.v1.Entry/GetAuthorizedEntries":   true,
	"/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries":  true,
	"/spire.api.server.entry.v1.Entry/ListEntries":            true,
	"/spire.api.server.agent.v1.Agent/ListAgents":             true,
	"/spire.api.server.bundle.v1.Bundle/ListFederatedBundles": true,
}

// budget bounds the memory and the time that calls over TCP may take before anything is known about
// what they want: how many are open, in all and of one caller, how long each may be, and how many
// requests are received at a time. It is asked when a call's headers have come, before there is a
// goroutine for it. A call is open until nothing of its answer is left in memory either.
//
// The memory of all calls that are under way is then at most MaxCalls flow-control windows of 64 KiB
// and receivers requests of MaxMessage, whatever the number of connections; the package comment does
// the sum.
//
// Calls are shared without knowing how many callers there are: a caller may open one more only while
// it has fewer open than are free. One greedy caller gets half of all, two get a third each, and one
// that comes later still finds room. (Dynamic thresholds, as switches share their packet memory:
// Choudhury and Hahne, 1998.) The feed is not counted: it is an agent's, and has its own limit.
type budget struct {
	single map[string]bool // methods with one request and one response; set before anybody calls
	// receiving are requests on their way, of callers that are known and of others.
	receiving, receivingStrangers *turn.Stile

	mu   sync.Mutex // guards the rest
	free int
	open map[string]int // calls by caller
	big  map[string]int // large calls by caller
}

func newBudget(limits Limits) *budget {
	return &budget{
		single:    map[string]bool{},
		receiving: turn.NewModest(receivers, limits.MaxCalls), receivingStrangers: turn.NewModest(strangers, limits.MaxCalls),
		free: limits.MaxCalls, open: map[string]int{}, big: map[string]int{},
	}
}

// counted is a call that the budget counts, in the call's context.
type counted struct {
	name  string
	known bool               // the name is a SPIFFE ID
	end   context.CancelFunc // ends the call
}

type countedKey struct{}

// tap is asked about each call when its headers have come.
func (b *budget) tap(ctx context.Context, call *tap.Info) (context.Context, error) {
	method := call.FullMethodName
	if endless[method] {
		return ctx, nil
	}
	name, known := callerName(ctx)
	big := large[method]
	if !b.enter(name, big) {
		unread.Collect()
		return ctx, soon("too many calls are open")
	}
	limit := streamTime
	if b.single[method] {
		limit = 2 * callTime
	}
	place := unread.Take(ctx, func() { b.leave(name, big) })
	ctx, end := context.WithTimeout(ctx, limit) //nolint:gosec // whoever counted the call ends it
	return context.WithValue(place.In(ctx), countedKey{}, &counted{name, known, end}), nil
}

func (b *budget) enter(name string, big bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open[name] >= b.free || big && b.big[name] >= largeCalls {
		return false
	}
	b.free--
	b.open[name]++
	if big {
		b.big[name]++
	}
	return true
}

func (b *budget) leave(name string, big bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free++
	if b.open[name]--; b.open[name] == 0 {
		delete(b.open, name)
	}
	if !big {
		return
	}
	if b.big[name]--; b.big[name] == 0 {
		delete(b.big, name)
	}
}

// callerName is what a caller's share is counted by: the SPIFFE ID of a client certificate, which the
// handshake verified (it is known then), or else the source address.
func callerName(ctx context.Context) (name string, known bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", false
	}
	if auth, ok := p.AuthInfo.(credentials.TLSInfo); ok {
		if id, ok := shownID(auth.State); ok {
			return id, true
		}
	}
	return caller.Source(p.Addr), false
}

// shownID returns the SPIFFE ID of the verified client certificate, if there is one.
func shownID(state tls.ConnectionState) (string, bool) {
	if len(state.PeerCertificates) == 0 || len(state.PeerCertificates[0].URIs) != 1 {
		return "", false
	}
	return state.PeerCertificates[0].URIs[0].String(), true
}

// soon is the answer to a caller who is to come back in a second or two: those who are sent away together
// must not come back together.
func soon(why string) error {
	return later.Status(why, time.Second+rand.N(time.Second)).Err() //nolint:gosec // spreads load, hides nothing
}

// registrar returns one that registers services whose single requests are received in turn.
func (b *budget) registrar(s grpc.ServiceRegistrar) grpc.ServiceRegistrar {
	return registrar{b, s}
}

type registrar struct {
	budget *budget
	next   grpc.ServiceRegistrar
}

// RegisterService registers the service with the methods' handlers wrapped.
func (r registrar) RegisterService(service *grpc.ServiceDesc, impl any) {
	wrapped := *service
	wrapped.Methods = slices.Clone(service.Methods)
	for i := range wrapped.Methods {
		m := &wrapped.Methods[i]
		r.budget.single["/"+service.ServiceName+"/"+m.MethodName] = true
		handle := m.Handler
		m.Handler = func(srv any, ctx context.Context, receive func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
			return handle(srv, ctx, func(req any) error { return r.budget.receive(ctx, receive, req) }, intercept)
		}
	}
	r.next.RegisterService(&wrapped, impl)
}

// receive receives a request when it is the caller's turn. A caller who sends slowly is cut off: he
// takes memory and somebody else's turn.
func (b *budget) receive(ctx context.Context, receive func(any) error, req any) error {
	call, ok := ctx.Value(countedKey{}).(*counted)
	if !ok {
		return receive(req)
	}
	places := b.receivingStrangers
	if call.known {
		places = b.receiving
	}
	if err := places.Enter(ctx, turn.Usual, call.name); err != nil {
		if ctx.Err() != nil {
			return status.FromContextError(ctx.Err()).Err()
		}
		return soon("too many requests are being received")
	}
	defer places.Leave(call.name)
	slow := time.AfterFunc(receiveTime, call.end)
	defer slow.Stop()
	return receive(req)
}
