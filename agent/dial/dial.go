// Package dial reaches the server: how its name is looked up, how a connection is begun, when it is given up, and
// what is done for packets that a network loses without a word.
package dial

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

const (
	// patience is how long a connection may take to be begun, its handshake not counted.
	patience = 10 * time.Second
	// FirstRetry and MaxRetry bound the wait between attempts to reach a server.
	FirstRetry = 250 * time.Millisecond
	MaxRetry   = 30 * time.Second
)

// Server returns a connection to the server at target, host:port, with whatever else more says. It does not wait
// for it: the first call does. One name may stand for several servers, which take turns.
func Server(target string, config *tls.Config, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("dns:///"+target, append([]grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: FirstRetry, Multiplier: 1.6, Jitter: 0.2, MaxDelay: MaxRetry},
			MinConnectTimeout: patience,
		}),
		grpc.WithContextDialer(new(dialer{pauses: pauses, connect: connect}).dial),
	}, more...)...)
	if err != nil {
		return nil, fmt.Errorf("dial server: %w", err)
	}
	return conn, nil
}

// pauses are after how long without an answer another attempt joins those under way; the last is kept to.
//
// A packet that asks for a connection and is dropped, since a link is down or a packet filter does not know the
// server's new address yet, is sent again by the kernel after 1, 3 and 7 seconds. Whoever waits for that may reach
// a server four seconds after it could be reached; with these, and the kernel's own, a packet leaves each second.
var pauses = []time.Duration{250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second}

// connect makes one TCP connection.
func connect(ctx context.Context, address string) (net.Conn, error) {
	return (&net.Dialer{
		// Finds out within half a minute that the other end has silently gone, without HTTP/2 pings,
		// for which a SPIRE server ends the connection if they come more often than every five minutes.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 4},
	}).DialContext(ctx, "tcp", address)
}

type dialer struct {
	pauses  []time.Duration
	connect func(ctx context.Context, address string) (net.Conn, error)
}

type attempt struct {
	conn net.Conn
	err  error
}

// dial returns the connection of the attempt that is answered first; an answer that refuses counts too.
func (d *dialer) dial(ctx context.Context, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	answers := make(chan attempt)
	try := func() {
		conn, err := d.connect(ctx, address)
		select {
		case answers <- attempt{conn, err}:
		case <-ctx.Done(): // another was first
			if conn != nil {
				_ = conn.Close()
			}
		}
	}
	go try()
	timer := time.NewTimer(d.pauses[0])
	defer timer.Stop()
	for n := 1; ; n++ {
		select {
		case first := <-answers:
			return first.conn, first.err
		case <-ctx.Done():
			return nil, fmt.Errorf("dial tcp %s: nobody answers: %w", address, ctx.Err())
		case <-timer.C:
			go try()
			timer.Reset(d.pauses[min(n, len(d.pauses)-1)])
		}
	}
}

// CertificateRefused reports whether a call failed because the server, which had proved itself, does not take the
// certificate that the agent shows: none of its authorities signed it, as after a server was made anew or brought back
// from a backup. gRPC hands on the words of TLS alone.
func CertificateRefused(err error) bool {
	if status.Code(err) != codes.Unavailable {
		return false
	}
	_, alert, ok := strings.Cut(err.Error(), "remote error: tls: ")
	return ok && slices.ContainsFunc(refusals, func(r string) bool { return strings.HasPrefix(alert, r) })
}

// refusals are the alerts of RFC 8446 §6.2 that are about a certificate, in the words of crypto/tls.
var refusals = []string{"bad certificate", "unsupported certificate", "revoked certificate", "expired certificate", "unknown certificate"}
