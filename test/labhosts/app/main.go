// Command app is a workload of the lab's hosts. It keeps a stream of the Workload API open, serves mTLS to
// whoever is of its trust domain, and tells and does what is asked of it on a port of its own host:
//
//	GET /state          what identity it has, and since when
//	GET /fetch          what its agent serves it at this moment, however that ends
//	GET /call?addr=A    call another by mTLS, and say who that is
//
// An identity that it was told is withdrawn, it has no more; one that it was told nothing about, as its agent
// is away, it keeps, as every workload should.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// state is what it tells of itself.
type state struct {
	// IDs are the identities it has, the default one first, each with the serial number of its SVID.
	IDs     []string  `json:"ids"`
	Serials []string  `json:"serials"`
	Since   time.Time `json:"since"`
	// Code is the gRPC code that the stream ended with last, empty if it is open.
	Code   string    `json:"code"`
	Why    string    `json:"why"`
	CodeAt time.Time `json:"code_at"`
}

// said is how a call went.
type said struct {
	Peer  string `json:"peer"`
	Heard string `json:"heard"`
	Error string `json:"error"`
}

// app is the workload; it is the source of its own TLS.
type app struct {
	mu    sync.Mutex // guards the rest
	now   *workloadapi.X509Context
	state state
}

func main() {
	control := flag.String("control", "127.0.0.1:7001", "address to be asked at")
	listen := flag.String("listen", ":7000", "address to serve mTLS on")
	input := flag.Bool("stdin", false, "end when standard input does")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *input {
		go func() { _, _ = io.Copy(io.Discard, os.Stdin); stop() }()
	}
	if err := new(app).run(ctx, *control, *listen); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, err)
		stop()
		os.Exit(1) // stop ran
	}
}

func (a *app) run(ctx context.Context, control, listen string) error {
	client, err := workloadapi.New(ctx, workloadapi.WithBackoffStrategy(often{}))
	if err != nil {
		return err
	}
	defer client.Close()
	asked, err := net.Listen("tcp", control)
	if err != nil {
		return err
	}
	served, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	go a.serve(served)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /state", func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		_ = json.NewEncoder(w).Encode(a.state)
	})
	mux.HandleFunc("GET /call", func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(a.call(r.Context(), r.FormValue("addr")))
	})
	mux.HandleFunc("GET /fetch", func(w http.ResponseWriter, r *http.Request) { _ = json.NewEncoder(w).Encode(fetch(r.Context())) })
	go func() { _ = http.Serve(asked, mux) }()
	return client.WatchX509Context(ctx, a)
}

// fetchTime is how long an agent may take that has something to serve.
const fetchTime = 20 * time.Second

// fetch asks as a workload does that has just been started.
func fetch(ctx context.Context) state {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	got, err := workloadapi.FetchX509Context(ctx)
	if err != nil {
		return state{Code: status.Code(err).String(), Why: err.Error(), CodeAt: time.Now()}
	}
	return of(got)
}

func of(c *workloadapi.X509Context) state {
	s := state{Since: time.Now()}
	for _, svid := range c.SVIDs {
		s.IDs = append(s.IDs, svid.ID.String())
		s.Serials = append(s.Serials, svid.Certificates[0].SerialNumber.Text(16))
	}
	return s
}

// OnX509ContextUpdate takes what it is given.
func (a *app) OnX509ContextUpdate(c *workloadapi.X509Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.now, a.state = c, of(c)
}

// OnX509ContextWatchError drops what was withdrawn.
func (a *app) OnX509ContextWatchError(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	code := status.Code(err)
	if a.state.Code != code.String() {
		a.state.Code, a.state.CodeAt = code.String(), time.Now()
	}
	a.state.Why = err.Error()
	if code == codes.PermissionDenied && a.now != nil {
		a.now, a.state.IDs, a.state.Serials, a.state.Since = nil, nil, nil, time.Now()
	}
}

var errNone = errors.New("no identity")

// GetX509SVID is for TLS.
func (a *app) GetX509SVID() (*x509svid.SVID, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.now == nil {
		return nil, errNone
	}
	return a.now.DefaultSVID(), nil
}

// GetX509BundleForTrustDomain is for TLS.
func (a *app) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.now == nil {
		return nil, errNone
	}
	return a.now.Bundles.GetX509BundleForTrustDomain(td)
}

// ours accepts every identity of the own trust domain.
func (a *app) ours() tlsconfig.Authorizer {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.now == nil {
		return func(spiffeid.ID, [][]*x509.Certificate) error { return errNone }
	}
	return tlsconfig.AuthorizeMemberOf(a.now.DefaultSVID().ID.TrustDomain())
}

func (a *app) serve(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			secure := tls.Server(conn, tlsconfig.MTLSServerConfig(a, a, a.ours()))
			_ = secure.SetDeadline(time.Now().Add(callTime))
			if err := secure.Handshake(); err != nil {
				return
			}
			fmt.Fprintf(secure, "hello %s\n", secure.ConnectionState().PeerCertificates[0].URIs[0])
		}()
	}
}

// callTime is how long one call may take.
const callTime = 10 * time.Second

func (a *app) call(ctx context.Context, addr string) said {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	dialer := &tls.Dialer{Config: tlsconfig.MTLSClientConfig(a, a, a.ours())}
	conn, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return said{Error: err.Error()}
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(callTime))
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return said{Error: err.Error()}
	}
	secure, _ := conn.(*tls.Conn)
	return said{Peer: secure.ConnectionState().PeerCertificates[0].URIs[0].String(), Heard: line[:len(line)-1]}
}

// often asks again soon: the times that are measured are not to be those of a client's patience.
type often struct{}

func (often) NewBackoff() workloadapi.Backoff { return often{} }
func (often) Next() time.Duration             { return 50 * time.Millisecond }
func (often) Reset()                          {}
