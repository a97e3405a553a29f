// Package caller says who calls the server's API and whether they may.
//
// Who: the Unix socket's peer as the kernel knows it, or the holder of the client certificate that
// the TLS handshake verified, or nobody in particular. Whether: the one table in table.go. An agent
// is also looked up, at every call and all the while a stream is open, because a certificate lives
// on after its agent was banned or evicted, or renewed it.
//
// Why it is so: every method's rule is in one place as data, so that a test can walk the generated
// service descriptors and find the method that has none; and the same code that lets a call in ends
// a stream, so that the two cannot disagree.
package caller

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/assay-id/assay/workloadapi/identity"
)

// Kind is a set of the things a caller can be.
type Kind uint8

// The kinds of caller. In a row of the table, Anyone lets everybody in.
const (
	// Local called over the private Unix socket.
	Local Kind = 1 << iota
	// Admin holds an SVID whose ID is in the configuration's admin IDs or has an admin entry.
	Admin
	// Agent holds the active SVID of an attested node that is not banned.
	Agent
	// Downstream holds an SVID whose ID has a downstream entry.
	Downstream
	// Anyone may be without a client certificate.
	Anyone
	// Scoped is an administrator within roles, by an SVID, a token or a Unix user. It is in no row of the
	// table: where Local or Admin are, roles may let Scoped in.
	Scoped
)

// String names the kinds for a log or audit line.
func (k Kind) String() string {
	var names []string
	for i, name := range []string{"local", "admin", "agent", "downstream", "anyone", "scoped"} {
		if k&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, "+")
}

// Caller is who makes a call. It is immutable.
type Caller struct {
	// Kind is what let the caller in. It may be more than that too.
	Kind Kind
	// ID is the SPIFFE ID of the client certificate; zero without one.
	ID spiffeid.ID
	// Cert is the verified client certificate; nil without one.
	Cert *x509.Certificate
	// UnixPeer says that the call came over the Unix socket, and UID, GID and PID are that peer's.
	UnixPeer bool
	UID, GID uint32
	PID      int32
	// Part is the part of this process that calls, which is local too; empty for all others.
	Part string
	// Addr is the source address of a TCP caller.
	Addr net.Addr
	// Roles are what a Scoped caller was let in with, and Subject who its token is of, if it showed one.
	Roles   []*Role
	Subject string
	// Entries are those that make a caller Admin or Downstream; none for one of the configuration's
	// admin IDs.
	Entries []*identity.Entry
}

// local reports whether the call came over the Unix socket.
func (c *Caller) local() bool { return c.UnixPeer || c.Kind&Local != 0 }

// Name says who the caller is, for a log or audit line.
func (c *Caller) Name() string {
	switch {
	case c.Part != "":
		return c.Part
	case c.local():
		return "local" + c.as()
	case !c.ID.IsZero():
		return c.ID.String() + c.as()
	case c.Subject != "":
		return c.Subject + c.as()
	default:
		return "anyone"
	}
}

// as names the roles, for a log or audit line.
func (c *Caller) as() string {
	var names []string
	for _, r := range c.Roles {
		names = append(names, " as "+r.Name)
	}
	return strings.Join(names, "")
}

// Peer says where the call came from, for a log or audit line.
func (c *Caller) Peer() string {
	if c.Part != "" {
		return "inside"
	}
	if c.local() {
		return fmt.Sprintf("uid=%d gid=%d pid=%d", c.UID, c.GID, c.PID)
	}
	if c.Addr == nil {
		return ""
	}
	return c.Addr.String()
}

// Source is what rates are counted by, as the function Source says, or empty for a local caller, whom
// no rate holds back.
func (c *Caller) Source() string {
	if c.local() || c.Addr == nil {
		return ""
	}
	return Source(c.Addr)
}

// Share is what shares of signing are counted by: the SPIFFE ID that the caller proved to hold, so that a
// fleet behind one address is not one caller; without one as Source. A local caller's is empty.
func (c *Caller) Share() string {
	if !c.local() && !c.ID.IsZero() {
		return c.ID.String()
	}
	return c.Source()
}

// Source returns what rates and limits of a source address are counted by: an IPv4 address, or the
// first half of an IPv6 one, which is what a single customer is given (RFC 6177).
func Source(addr net.Addr) string {
	from, err := netip.ParseAddrPort(addr.String())
	if err != nil {
		return addr.String()
	}
	ip := from.Addr().Unmap().WithZone("")
	if ip.Is4() {
		return ip.String()
	}
	half, err := ip.Prefix(64)
	if err != nil {
		return ip.String()
	}
	return half.String()
}

type contextKey struct{}

// call is what the interceptors put into a call's context.
type call struct {
	caller *Caller
	again  func(context.Context) error
}

// FromContext returns who makes the call that ctx belongs to. It panics outside a call that the
// interceptors of an Authorizer let in: code that asks has no other answer to go on with.
func FromContext(ctx context.Context) *Caller {
	c, ok := ctx.Value(contextKey{}).(*call)
	if !ok {
		panic("caller: no caller in this context")
	}
	return c.caller
}

// NewContext returns ctx with a caller, for code that is called beside gRPC, and for tests.
func NewContext(ctx context.Context, c *Caller) context.Context {
	return context.WithValue(ctx, contextKey{}, &call{caller: c, again: func(context.Context) error { return nil }})
}

// Reauthorize asks again what was asked when the call was let in, and returns the gRPC error that
// the call would be refused with now, or nil. Code that keeps a stream open for long asks before
// each thing it sends.
func Reauthorize(ctx context.Context) error {
	c, ok := ctx.Value(contextKey{}).(*call)
	if !ok {
		panic("caller: no caller in this context")
	}
	return c.again(ctx)
}

// fromPeer finds out what the transport knows of the caller. A client certificate that is nobody's
// SPIFFE ID is an error.
func fromPeer(ctx context.Context) (*Caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, fmt.Errorf("call without a peer")
	}
	switch auth := p.AuthInfo.(type) {
	case unixPeer:
		return &Caller{Kind: Local, UnixPeer: true, UID: auth.uid, GID: auth.gid, PID: auth.pid}, nil
	case insidePeer:
		return &Caller{Kind: Local, Part: auth.part}, nil
	case credentials.TLSInfo:
		c := &Caller{Addr: p.Addr}
		if certs := auth.State.PeerCertificates; len(certs) > 0 {
			id, err := peerID(certs[0])
			if err != nil {
				return c, err
			}
			c.ID, c.Cert = id, certs[0]
		}
		return c, nil
	default:
		return &Caller{Addr: p.Addr}, fmt.Errorf("call over an unknown transport %T", p.AuthInfo)
	}
}
