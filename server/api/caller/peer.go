package caller

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"

	"github.com/assay-id/assay/workloadapi/identity"
)

// maxPeerChain is how many certificates a client may present. The work of verifying grows with them
// and is done before anything is known about the caller.
const maxPeerChain = 10

// Bundles is what client certificates are verified against; *view.View is one.
type Bundles interface {
	Bundle(td spiffeid.TrustDomain) (*identity.Bundle, bool)
}

// Verifier checks client certificates in the TLS handshake.
type Verifier struct {
	// TrustDomain is the server's own.
	TrustDomain spiffeid.TrustDomain
	// Bundles holds the own bundle and the federated ones.
	Bundles Bundles
	// AdminIDs may come from a federated trust domain; all other callers are of the own one.
	AdminIDs []spiffeid.ID
	// Now is the clock.
	Now func() time.Time
}

// RefusedCertificate is the error of Verify.
type RefusedCertificate struct {
	// Shown is the name in the certificate, of which nothing is proved; cut where it is too long to be one.
	Shown string
	// Err says why.
	Err error
}

// Error says why.
func (r *RefusedCertificate) Error() string { return "verify client certificate: " + r.Err.Error() }

// Unwrap returns why.
func (r *RefusedCertificate) Unwrap() error { return r.Err }

// maxShown is how much of a name is repeated that nothing vouches for.
const maxShown = 256

// Verify is for tls.Config.VerifyConnection of a server that requests a client certificate and does
// without one. It accepts no certificate, a chain that verifies against the bundle of its trust
// domain, and a leaf with another number of URI SANs than one: such a leaf is nobody's SPIFFE ID
// (X509-SVID section 2), it is refused per call, as Unauthenticated, because a failed handshake
// would tell the caller nothing.
func (v *Verifier) Verify(state tls.ConnectionState) error {
	chain := state.PeerCertificates
	if len(chain) == 0 || len(chain[0].URIs) != 1 {
		return nil
	}
	if err := v.verify(chain); err != nil {
		shown := chain[0].URIs[0].String()
		return &RefusedCertificate{Shown: shown[:min(len(shown), maxShown)], Err: err}
	}
	return nil
}

func (v *Verifier) verify(chain []*x509.Certificate) error {
	if len(chain) > maxPeerChain {
		return fmt.Errorf("%d certificates, the limit is %d", len(chain), maxPeerChain)
	}
	for _, cert := range chain {
		if err := identity.CheckCertificateKey(cert); err != nil {
			return err
		}
	}
	_, _, err := x509svid.Verify(chain, source{v}, x509svid.WithTime(v.Now()))
	return err
}

// source hands out the bundle of a trust domain that a client may be of.
type source struct{ v *Verifier }

func (s source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != s.v.TrustDomain && !slices.ContainsFunc(s.v.AdminIDs, func(id spiffeid.ID) bool { return id.MemberOf(td) }) {
		return nil, fmt.Errorf("no callers of trust domain %q are known", td.Name())
	}
	bundle, ok := s.v.Bundles.Bundle(td)
	if !ok {
		return nil, fmt.Errorf("no bundle of trust domain %q", td.Name())
	}
	return bundle.X509Bundle(), nil
}

// peerID returns the one SPIFFE ID of a verified leaf.
func peerID(leaf *x509.Certificate) (spiffeid.ID, error) {
	if len(leaf.URIs) != 1 {
		return spiffeid.ID{}, fmt.Errorf("client certificate has %d URI SANs, want one", len(leaf.URIs))
	}
	id, err := spiffeid.FromURI(leaf.URIs[0])
	if err != nil {
		return spiffeid.ID{}, err
	}
	return id, identity.CheckID(id)
}

// InsideCredentials are the transport credentials of a connection that a part of this process makes to it,
// such as what makes entries of a cluster's pods: no handshake, and the part's name for the audit line. It
// may what a local caller may.
func InsideCredentials(part string) credentials.TransportCredentials { return insideCredentials{part} }

// insidePeer is a part of this process.
type insidePeer struct {
	credentials.CommonAuthInfo
	part string
}

// AuthType names the way the caller was identified.
func (insidePeer) AuthType() string { return "inside" }

type insideCredentials struct{ part string }

func (c insideCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return conn, insidePeer{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, c.part}, nil
}

func (c insideCredentials) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return conn, insidePeer{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, c.part}, nil
}

func (insideCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "inside"}
}

func (c insideCredentials) Clone() credentials.TransportCredentials { return c }

func (insideCredentials) OverrideServerName(string) error { return nil }

// UnixCredentials are the transport credentials of the private Unix socket: no handshake, and the
// caller's process credentials as the kernel had them when it connected (SO_PEERCRED, unix(7)).
func UnixCredentials() credentials.TransportCredentials { return unixCredentials{} }

// unixPeer is what UnixCredentials finds out about a caller.
type unixPeer struct {
	credentials.CommonAuthInfo
	uid, gid uint32
	pid      int32
}

// AuthType names the way the caller was identified.
func (unixPeer) AuthType() string { return "unix" }

type unixCredentials struct{}

func (unixCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return nil, nil, fmt.Errorf("read peer credentials: %T is no socket", conn)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, nil, fmt.Errorf("read peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, nil, fmt.Errorf("read peer credentials: %w", err)
	}
	if credErr != nil {
		return nil, nil, fmt.Errorf("read peer credentials: %w", credErr)
	}
	return conn, unixPeer{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		uid:            cred.Uid, gid: cred.Gid, pid: cred.Pid,
	}, nil
}

func (unixCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("unix credentials are the server's only")
}

func (unixCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

func (c unixCredentials) Clone() credentials.TransportCredentials { return c }

func (unixCredentials) OverrideServerName(string) error { return nil }
