package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/turn"
	"github.com/assay-id/assay/workloadapi/unixsocket"
)

// gate is a listener that holds connections to the limits: in all, per source address, and per
// source address of those whose handshake is not done. A connection over a limit is closed before a
// byte of it was read. How long a handshake may take is gRPC's to watch (grpc.ConnectionTimeout).
//
// Those that come without a certificate may have a tenth of the places: agents hold theirs for hours,
// strangers need one for the moment of an attestation.
//
// As many handshakes are computed at a time as there are processors, those that are half done before
// new ones; what waits for the network holds no place. When ten thousand agents come back at once the
// first are done in milliseconds, where otherwise all would be done together, after their patience.
type gate struct {
	net.Listener
	limits     Limits
	refusals   *refusals
	handshakes *turn.Stile

	mu      sync.Mutex // guards the rest
	total   int
	nobody  int // of total, those that showed no certificate
	sources map[string]*crowd
	strange map[*guest]struct{} // whose handshake is not done
}

// hearing is a listener that says so when there is no file descriptor for a connection.
type hearing struct {
	net.Listener
	refusals *refusals
}

// Accept returns the next connection.
func (h hearing) Accept() (net.Conn, error) {
	conn, err := h.Listener.Accept()
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		h.refusals.starved(err)
	}
	return conn, err
}

// crowd counts the connections of one source address.
type crowd struct{ all, halfOpen, nobody int }

func newGate(l net.Listener, limits Limits, refusals *refusals) *gate {
	return &gate{
		Listener: hearing{l, refusals}, limits: limits, refusals: refusals, sources: map[string]*crowd{}, strange: map[*guest]struct{}{},
		handshakes: turn.New(runtime.GOMAXPROCS(0), limits.MaxConnections),
	}
}

// Close stops listening, and hangs up on those whose handshake is not done: a server that stops has
// nothing for them, and would wait for them.
func (g *gate) Close() error {
	err := g.Listener.Close()
	g.mu.Lock()
	strange := slices.Collect(maps.Keys(g.strange))
	g.mu.Unlock()
	for _, c := range strange {
		_ = c.hangUp()
	}
	return err
}

// Accept returns the next connection that is within the limits.
func (g *gate) Accept() (net.Conn, error) {
	for {
		conn, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := g.enter(conn); c != nil {
			return c, nil
		}
		_ = conn.Close()
	}
}

func (g *gate) enter(conn net.Conn) *guest {
	source := caller.Source(conn.RemoteAddr())
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.sources[source]
	if c == nil {
		c = &crowd{}
	}
	limit := ""
	switch {
	case g.total >= g.limits.MaxConnections:
		limit = "connections"
	case c.all >= g.limits.MaxPerSource:
		limit = "connections of one address"
	case c.halfOpen >= g.limits.MaxHalfOpen:
		limit = "unfinished handshakes of one address"
	}
	if limit != "" {
		g.refusals.limit(source, limit)
		return nil
	}
	g.total++
	c.all++
	c.halfOpen++
	g.sources[source] = c
	in := &guest{Conn: conn, gate: g, source: source, halfOpen: true}
	in.patience, in.end = context.WithTimeout(context.Background(), g.limits.Handshake)
	g.strange[in] = struct{}{}
	return in
}

// tenth is the share of a limit that those without a certificate have; a small limit is all theirs.
func tenth(limit int) int { return max(limit/10, min(limit, 64)) }

// guest is a connection that the gate counts.
type guest struct {
	net.Conn
	gate   *gate
	source string

	// Only the handshake's goroutine uses these four, and none does after it.
	patience context.Context // of the handshake, which crypto/tls gives no context
	end      context.CancelFunc
	busy     bool // a handshake is being computed and holds a place
	reads    int

	shaking atomic.Bool // a handshake is under way

	// gate.mu guards the rest.
	halfOpen bool
	nobody   bool
	left     bool
}

// Read reads. During the handshake it gives the place back while it waits, and takes one again for
// what is computed from what was read.
func (c *guest) Read(p []byte) (int, error) {
	if !c.shaking.Load() {
		return c.Conn.Read(p)
	}
	c.rest()
	n, err := c.Conn.Read(p)
	if err != nil {
		return n, err
	}
	rank := turn.Urgent
	if c.reads++; c.reads == 1 {
		rank = turn.Usual
	}
	if err := c.gate.handshakes.Enter(c.patience, rank, c.source); err != nil {
		return 0, fmt.Errorf("wait for a turn: %w", err)
	}
	c.busy = true
	return n, nil
}

// rest gives the place back if there is one.
func (c *guest) rest() {
	if c.busy {
		c.busy = false
		c.gate.handshakes.Leave(c.source)
	}
}

// arrived says that the handshake is done, and with a certificate or not. It reports whether the
// connection may stay.
func (c *guest) arrived(nobody bool) bool {
	g := c.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	c.finish()
	if c.left || !nobody {
		return !c.left
	}
	crowd := g.sources[c.source]
	if g.nobody >= tenth(g.limits.MaxConnections) || crowd.nobody >= tenth(g.limits.MaxPerSource) {
		g.refusals.limit(c.source, "connections without a certificate")
		return false
	}
	g.nobody++
	crowd.nobody++
	c.nobody = true
	return true
}

// finish says that nothing of the handshake is left. gate.mu is held.
func (c *guest) finish() {
	c.decide()
	delete(c.gate.strange, c)
}

// decide stops counting the connection as half open. gate.mu is held.
func (c *guest) decide() {
	if c.halfOpen {
		c.halfOpen = false
		c.gate.sources[c.source].halfOpen--
	}
}

// Close closes the connection and makes room for another. While the handshake goes on it does nothing: gRPC's TLS
// closes what it refuses, and there may be a word to say.
func (c *guest) Close() error {
	if c.shaking.Load() {
		return nil
	}
	return c.hangUp()
}

func (c *guest) hangUp() error {
	c.gate.mu.Lock()
	if !c.left {
		c.left = true
		c.finish()
		c.gate.total--
		crowd := c.gate.sources[c.source]
		if c.nobody {
			c.gate.nobody--
			crowd.nobody--
		}
		if crowd.all--; crowd.all == 0 {
			delete(c.gate.sources, c.source)
		}
	}
	c.gate.mu.Unlock()
	c.end()
	return c.Conn.Close()
}

// How long, and for how much of what it sends, the other end is given to read why it is refused.
const (
	farewellTime  = time.Second
	farewellBytes = 64 << 10
)

// farewell lets the other end read why its certificate is refused: an agent that reads it attests again. It speaks
// before it reads, and on a connection that is closed that fails.
func (c *guest) farewell() {
	c.gate.mu.Lock()
	c.decide()
	c.gate.mu.Unlock()
	tcp, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok || c.SetReadDeadline(time.Now().Add(farewellTime)) != nil || tcp.CloseWrite() != nil {
		return
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(c.Conn, farewellBytes)) // until it hangs up
}

// greeter is gRPC's TLS, and tells the gate when a handshake is done.
type greeter struct {
	credentials.TransportCredentials
}

func newGreeter(config *tls.Config) credentials.TransportCredentials {
	return greeter{credentials.NewTLS(config)}
}

// errCrowd closes a connection without a certificate when there are too many of its kind.
var errCrowd = errors.New("too many connections without a certificate")

// ServerHandshake does TLS.
func (g greeter) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := conn.(*guest)
	if !ok {
		return g.TransportCredentials.ServerHandshake(conn)
	}
	c.shaking.Store(true)
	secured, auth, err := g.TransportCredentials.ServerHandshake(conn)
	c.rest()
	c.shaking.Store(false)
	c.end()
	if err != nil {
		c.gate.refusals.handshake(conn.RemoteAddr(), err)
		if _, ok := errors.AsType[*caller.RefusedCertificate](err); ok {
			c.farewell()
		}
		_ = c.Close()
		return nil, nil, err
	}
	shown, ok := auth.(credentials.TLSInfo)
	if nobody := !ok || len(shown.State.PeerCertificates) == 0; !c.arrived(nobody) {
		_ = secured.Close()
		return nil, nil, errCrowd
	}
	return secured, auth, nil
}

// Clone returns a copy.
func (g greeter) Clone() credentials.TransportCredentials {
	return greeter{g.TransportCredentials.Clone()}
}

// tlsConfig is the TCP listener's. Session tickets are off: a resumed session would carry a client's
// identity past the ban of its authority. Key exchange is left to Go, which prefers X25519MLKEM768,
// unless only post-quantum hybrids are wanted.
func tlsConfig(
	certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error), verify func(tls.ConnectionState) error, requirePQ bool,
) *tls.Config {
	config := &tls.Config{
		MinVersion:             tls.VersionTLS12,
		NextProtos:             []string{"h2"},
		GetCertificate:         certificate,
		ClientAuth:             tls.RequestClientCert, // AttestAgent and GetBundle come without one
		VerifyConnection:       verify,
		SessionTicketsDisabled: true,
	}
	if requirePQ {
		config.MinVersion = tls.VersionTLS13
		config.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768, tls.SecP256r1MLKEM768, tls.SecP384r1MLKEM1024}
	}
	return config
}

// listenUnix opens the socket that a key of the configuration names. One on which anybody listens is not ours to
// replace.
func listenUnix(key, path string, mode, dirMode fs.FileMode) (*unixsocket.Socket, error) {
	err := unixsocket.Vacant(path)
	var socket *unixsocket.Socket
	if err == nil {
		socket, err = unixsocket.Listen(path, mode, dirMode)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	return socket, nil
}
