// Command workload is the application of `make demo`: it knows nothing but a Unix socket, gets its
// identity from it with go-spiffe as any SPIFFE workload would, and tells what it sees as one JSON
// line per event.
//
// It runs in a container built FROM scratch and as a plain process, so it is built without cgo.
package main

import (
	"bufio"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"crypto/tls"
)

// event is one line on standard output.
type event struct {
	Event    string `json:"event"` // svid, denied, jwt, listening, served, called, error
	At       int64  `json:"at"`    // Unix nanoseconds
	ID       string `json:"id,omitempty"`
	Serial   string `json:"serial,omitempty"`
	DNS      string `json:"dns,omitempty"`
	Peer     string `json:"peer,omitempty"`
	Audience string `json:"audience,omitempty"`
	Error    string `json:"error,omitempty"`
}

var stdout struct {
	sync.Mutex
	*json.Encoder
}

func emit(e event) {
	e.At = time.Now().UnixNano()
	stdout.Lock()
	defer stdout.Unlock()
	if err := stdout.Encode(e); err != nil {
		os.Exit(1) // nobody listens any more
	}
}

func main() {
	stdout.Encoder = json.NewEncoder(os.Stdout)
	var (
		listen   = flag.String("listen", "", "Unix socket to serve mTLS on")
		dial     = flag.String("dial", "", "Unix socket of the peer to call once with mTLS")
		peer     = flag.String("peer", "", "SPIFFE ID the peer must have")
		audience = flag.String("audience", "", "also fetch a JWT-SVID for this audience")
		write    = flag.String("write", "", "folder to write svid.pem and bundle.pem to")
		key      = flag.Bool("key", false, "write the private key too, as key.pem")
		again    = flag.Bool("again", false, "call the peer again whenever the identity has changed, and tell if it refuses")
	)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, *listen, *dial, *peer, *audience, &watcher{*write, *key}, *again); err != nil && ctx.Err() == nil {
		emit(event{Event: "error", Error: err.Error()})
		stop()
		os.Exit(1) // stop ran
	}
}

func run(ctx context.Context, listen, dial, peer, audience string, w *watcher, again bool) error {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	watched := make(chan error, 1)
	go func() { watched <- client.WatchX509Context(ctx, w) }()

	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClient(client))
	if err != nil {
		return err
	}
	defer source.Close()
	if audience != "" {
		token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
		if err != nil {
			return err
		}
		if _, err := client.ValidateJWTSVID(ctx, token.Marshal(), audience); err != nil {
			return err
		}
		emit(event{Event: "jwt", ID: token.ID.String(), Audience: audience})
	}
	if peer != "" {
		want, err := spiffeid.FromString(peer)
		if err != nil {
			return err
		}
		if listen != "" {
			go serve(ctx, listen, tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(want)))
		}
		if dial != "" {
			changed := source.Updated()
			call(ctx, dial, tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(want)), again)
			for again && ctx.Err() == nil {
				select {
				case <-changed:
					call(ctx, dial, tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(want)), again)
				case <-ctx.Done():
				}
			}
		}
	}
	return <-watched
}

// watcher reports what arrives on the X.509 stream.
type watcher struct {
	write string
	key   bool
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	svid := c.DefaultSVID()
	leaf := svid.Certificates[0]
	e := event{Event: "svid", ID: svid.ID.String(), Serial: leaf.SerialNumber.Text(16)}
	if len(leaf.DNSNames) > 0 {
		e.DNS = leaf.DNSNames[0]
	}
	if w.write != "" {
		bundle, found := c.Bundles.Get(svid.ID.TrustDomain())
		if !found {
			emit(event{Event: "error", Error: "no bundle for " + svid.ID.TrustDomain().String()})
			return
		}
		var err error
		if w.key {
			err = writeKey(filepath.Join(w.write, "key.pem"), svid.PrivateKey)
		}
		err = errors.Join(err,
			writePEM(filepath.Join(w.write, "svid.pem"), svid.Certificates),
			writePEM(filepath.Join(w.write, "bundle.pem"), bundle.X509Authorities()))
		if err != nil {
			emit(event{Event: "error", Error: err.Error()})
			return
		}
	}
	emit(e)
}

func (w *watcher) OnX509ContextWatchError(err error) {
	emit(event{Event: "denied", Error: err.Error()})
}

func writeKey(path string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func writePEM(path string, certs []*x509.Certificate) error {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return os.WriteFile(path, out, 0o600)
}

func serve(ctx context.Context, socket string, config *tls.Config) {
	_ = os.Remove(socket)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		emit(event{Event: "error", Error: err.Error()})
		return
	}
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	_ = os.Chmod(socket, 0o777)
	emit(event{Event: "listening"})
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			secure := tls.Server(conn, config)
			_ = secure.SetDeadline(time.Now().Add(10 * time.Second))
			if err := secure.HandshakeContext(ctx); err != nil {
				emit(event{Event: "refused", Error: err.Error()})
				return
			}
			id := secure.ConnectionState().PeerCertificates[0].URIs[0].String()
			fmt.Fprintf(secure, "hello %s\n", id)
			emit(event{Event: "served", Peer: id})
		}()
	}
}

// call calls the peer once. If that may go wrong, it is told as "refused".
func call(ctx context.Context, socket string, config *tls.Config, mayFail bool) {
	failed := "error"
	if mayFail {
		failed = "refused"
	}
	dialer := &net.Dialer{}
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		emit(event{Event: "error", Error: err.Error()})
		return
	}
	defer conn.Close()
	secure := tls.Client(conn, config)
	_ = secure.SetDeadline(time.Now().Add(10 * time.Second))
	line, err := bufio.NewReader(secure).ReadString('\n')
	if err != nil {
		emit(event{Event: failed, Error: err.Error()})
		return
	}
	id := secure.ConnectionState().PeerCertificates[0].URIs[0].String()
	emit(event{Event: "called", Peer: id, ID: line[len("hello ") : len(line)-1]})
}
