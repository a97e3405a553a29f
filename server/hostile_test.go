package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/trust"
)

// raw opens a TCP connection from a loopback address.
func (w *world) raw(t *testing.T, from string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := d.DialContext(t.Context(), "tcp", w.running.Address.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// hungUp waits for the server to close the connection.
func hungUp(t *testing.T, conn net.Conn) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the server keeps the connection")
	}
}

func TestBytesThatAreNoTLS(t *testing.T) {
	w := start(t)
	noise := make([]byte, 64<<10)
	if _, err := rand.Read(noise); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		sent []byte
	}{
		{"plain HTTP", []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")},
		{"an HTTP/2 preface in the clear", []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")},
		{"random bytes", noise},
		{"a TLS record of the wrong length", append([]byte{0x16, 3, 1, 0xff, 0xff}, noise[:100]...)},
		{"zeros", make([]byte, 1000)},
	} {
		t.Run(c.name+" gets the connection closed", func(t *testing.T) {
			conn := w.raw(t, "127.0.0.1")
			_, _ = conn.Write(c.sent) // the server may hang up in the middle
			if c.name == "a TLS record of the wrong length" {
				_ = conn.(*net.TCPConn).CloseWrite()
			}
			hungUp(t, conn)
			w.unharmed()
		})
	}
	t.Run("noise inside TLS gets the connection closed", func(t *testing.T) {
		conn := tls.Client(w.raw(t, "127.0.0.1"), w.clientTLS(nil))
		if err := conn.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write(noise)
		hungUp(t, conn)
		w.unharmed()
	})
}

func TestSlowCallers(t *testing.T) {
	w := start(t, func(c *Config) { c.Limits.Handshake = 300 * time.Millisecond })
	t.Run("one that says nothing is hung up on", func(t *testing.T) { hungUp(t, w.raw(t, "127.0.0.1")) })
	t.Run("one that sends half a hello is hung up on", func(t *testing.T) {
		conn := w.raw(t, "127.0.0.1")
		if _, err := conn.Write([]byte{0x16, 3, 1, 2, 0, 1}); err != nil {
			t.Fatal(err)
		}
		hungUp(t, conn)
	})
	t.Run("one that does TLS and then nothing is hung up on", func(t *testing.T) {
		config := w.clientTLS(nil)
		for try := 0; ; try++ { // a loaded machine may do TLS for longer than that
			conn := tls.Client(w.raw(t, "127.0.0.1"), config)
			err := conn.HandshakeContext(t.Context())
			if err == nil {
				hungUp(t, conn)
				return
			}
			if try == 100 {
				t.Fatal(err)
			}
		}
	})
	w.unharmed()
}

func TestAThousandIdleConnections(t *testing.T) {
	// The idle ones stay for as long as the test: who waits for the end of one waits in vain.
	w := start(t, func(c *Config) { c.Limits.MaxHalfOpen, c.Limits.Handshake = 100, time.Hour })
	for range 1000 {
		w.raw(t, "127.0.0.1")
	}
	// Those of another address, and local ones, do not notice.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn := tls.Client(w.raw(t, "127.0.0.2"), w.clientTLS(nil))
	if err := conn.HandshakeContext(ctx); err != nil {
		t.Error(err)
	}
	w.unharmed()
}

func TestConnectionLimits(t *testing.T) {
	// So long that it is a limit that hangs up, and not the end of a handshake's time.
	const patient = time.Hour
	t.Run("connections of one address", func(t *testing.T) {
		w := start(t, func(c *Config) { c.Limits.MaxPerSource, c.Limits.Handshake = 2, patient })
		open := func() *tls.Conn {
			t.Helper()
			conn := tls.Client(w.raw(t, "127.0.0.3"), w.clientTLS(nil))
			if err := conn.HandshakeContext(t.Context()); err != nil {
				t.Fatal(err)
			}
			return conn
		}
		first := open()
		open()
		hungUp(t, w.raw(t, "127.0.0.3"))
		// Room that was left is room again: the server notices when it has read the end.
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		var err error
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
			conn := tls.Client(w.raw(t, "127.0.0.3"), w.clientTLS(nil))
			if err = conn.HandshakeContext(t.Context()); err == nil {
				return
			}
		}
		t.Errorf("no room after one left: %v", err)
	})
	t.Run("connections in all", func(t *testing.T) {
		w := start(t, func(c *Config) { c.Limits.MaxConnections, c.Limits.Handshake = 1, patient })
		conn := tls.Client(w.raw(t, "127.0.0.3"), w.clientTLS(nil))
		if err := conn.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		hungUp(t, w.raw(t, "127.0.0.4"))
		w.unharmed()
	})
	t.Run("unfinished handshakes of one address", func(t *testing.T) {
		w := start(t, func(c *Config) { c.Limits.MaxHalfOpen, c.Limits.Handshake = 2, patient })
		w.raw(t, "127.0.0.3")
		silent := w.raw(t, "127.0.0.3")
		hungUp(t, w.raw(t, "127.0.0.3"))
		shake := func(from string) error {
			return tls.Client(w.raw(t, from), w.clientTLS(nil)).HandshakeContext(t.Context())
		}
		if err := shake("127.0.0.4"); err != nil {
			t.Errorf("another address: %v", err)
		}
		if err := silent.Close(); err != nil {
			t.Fatal(err)
		}
		// Those whose handshake is done do not count, as soon as the server knows that it is.
		for range 4 {
			var err error
			for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
				if err = shake("127.0.0.3"); err == nil {
					break
				}
			}
			if err != nil {
				t.Errorf("no room after one left: %v", err)
			}
		}
		w.unharmed()
	})
}

func TestTLS(t *testing.T) {
	w := start(t)
	shake := func(w *world, change func(*tls.Config)) (tls.ConnectionState, error) {
		t := w.t
		config := w.clientTLS(nil)
		change(config)
		conn := tls.Client(w.raw(t, "127.0.0.1"), config)
		err := conn.HandshakeContext(t.Context())
		return conn.ConnectionState(), err
	}
	t.Run("a post-quantum hybrid is preferred", func(t *testing.T) {
		state, err := shake(w, func(*tls.Config) {})
		if err != nil || state.CurveID != tls.X25519MLKEM768 || state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != "h2" {
			t.Errorf("got %+v, %v", state, err)
		}
	})
	t.Run("TLS 1.2 is spoken", func(t *testing.T) {
		if _, err := shake(w, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }); err != nil {
			t.Error(err)
		}
	})
	t.Run("TLS 1.1 is not", func(t *testing.T) {
		if _, err := shake(w, func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }); err == nil {
			t.Error("it was")
		}
	})
	t.Run("another protocol than h2 is not", func(t *testing.T) {
		if _, err := shake(w, func(c *tls.Config) { c.NextProtos = []string{"h3"} }); err == nil {
			t.Error("it was")
		}
	})
	t.Run("sessions are not resumed", func(t *testing.T) {
		cache := tls.NewLRUClientSessionCache(4)
		for range 2 {
			state, err := shake(w, func(c *tls.Config) { c.ClientSessionCache, c.ServerName, c.MaxVersion = cache, "x", tls.VersionTLS12 })
			if err != nil || state.DidResume {
				t.Errorf("resumed %v, %v", state.DidResume, err)
			}
		}
	})
	t.Run("where a hybrid is required, nothing else will do", func(t *testing.T) {
		w := start(t, func(c *Config) { c.RequirePQKEM = true })
		if _, err := shake(w, func(*tls.Config) {}); err != nil {
			t.Error(err)
		}
		if _, err := shake(w, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }); err == nil {
			t.Error("X25519 alone was taken")
		}
		if _, err := shake(w, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }); err == nil {
			t.Error("TLS 1.2 was taken")
		}
	})
}

// forge makes a certificate of an agent under an authority of our own making.
func forge(t *testing.T, uri string) *tls.Certificate {
	t.Helper()
	key := newKey(t)
	id, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{"SPIRE"}}, URIs: []*url.URL{id},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// refusedConnection waits for the audit line of a connection whose certificate was refused: a client
// may know before the line is written.
func (w *world) refusedConnection(t *testing.T, shown string) (line map[string]any) {
	t.Helper()
	eventually(t, func() error {
		lines := w.audit()
		i := slices.IndexFunc(lines, func(l map[string]any) bool {
			return l["event"] == "connection.refuse" && strings.Contains(fmt.Sprint(l["reason"]), shown)
		})
		if i < 0 {
			return fmt.Errorf("no line names %q", shown)
		}
		if line = lines[i]; line["outcome"] != "deny" || line["caller"] != "anyone" || line["peer"] == "" {
			return fmt.Errorf("audit line %v", line)
		}
		return nil
	})
	return line
}

// eventually asks until there is no error, for a while.
func eventually(t *testing.T, ask func() error) {
	t.Helper()
	err := ask()
	for deadline := time.Now().Add(time.Minute); err != nil && time.Now().Before(deadline); err = ask() {
		select {
		case <-t.Context().Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
	if err != nil {
		t.Error(err)
	}
}

func TestRefusedConnectionsAreCounted(t *testing.T) {
	w := start(t, func(c *Config) { c.Limits.MaxHalfOpen = 100 })
	for range 100 {
		conn := w.raw(t, "127.0.0.1")
		_, _ = conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		hungUp(t, conn)
	}
	cert := forge(t, "spiffe://example.org/flood")
	for range 200 {
		config := w.clientTLS(cert)
		conn := tls.Client(w.raw(t, "127.0.0.1"), config)
		_ = conn.HandshakeContext(t.Context())
		hungUp(t, conn)
	}
	eventually(t, func() error {
		counts, err := w.counts("assay_server_connections_refused_total", "reason")
		if err == nil && (counts["handshake"] != 100 || counts["certificate"] != 200 || counts["limit"] != 0) {
			err = fmt.Errorf("counted %v", counts)
		}
		return err
	})
	lines := 0
	for _, line := range w.audit() {
		if line["event"] == "connection.refuse" {
			lines++
		}
	}
	if lines == 0 || lines > 200 { // how many there may be, TestBudgetOfLines knows
		t.Errorf("%d audit lines of 200 refusals", lines)
	}
	w.unharmed()
}

func TestBudgetOfLines(t *testing.T) {
	b := budgetOfLines{every: time.Second, most: 3}
	now := time.Unix(1000, 0)
	take := func(wantUnsaid int, want bool) {
		t.Helper()
		if unsaid, may := b.take(now); may != want || unsaid != wantUnsaid {
			t.Errorf("got %v after %d, want %v after %d", may, unsaid, want, wantUnsaid)
		}
	}
	for range 3 {
		take(0, true)
	}
	take(0, false)
	take(0, false)
	now = now.Add(time.Second)
	take(2, true)
	take(0, false)
	now = now.Add(time.Hour)
	take(1, true)
	take(0, true)
	take(0, true)
	take(0, false)
}

func TestClientCertificates(t *testing.T) {
	w := start(t)
	path, _, _ := w.agent("real")
	ctx, cancel := context.WithTimeout(w.context(), 20*time.Second)
	defer cancel()
	t.Run("a forged one does not connect", func(t *testing.T) {
		refused(t, ping(w.dial(forge(t, "spiffe://example.org"+path)), ctx), codes.Unavailable, "")
		w.refusedConnection(t, "spiffe://example.org"+path)
	})
	t.Run("one of a foreign trust domain does not connect", func(t *testing.T) {
		refused(t, ping(w.dial(forge(t, "spiffe://elsewhere.test/x")), ctx), codes.Unavailable, "")
		w.refusedConnection(t, "elsewhere.test")
	})
	t.Run("one of another server of the same name does not connect", func(t *testing.T) {
		other := start(t)
		_, cert, _ := other.agent("another")
		refused(t, ping(w.dial(cert), ctx), codes.Unavailable, "")
		w.refusedConnection(t, "spiffe://example.org/spire/agent/honest/another")
	})
	t.Run("what it names is cut where it is too long to be a name", func(t *testing.T) {
		refused(t, ping(w.dial(forge(t, "spiffe://example.org/"+strings.Repeat("x", 5000))), ctx), codes.Unavailable, "")
		if line := w.refusedConnection(t, "spiffe://example.org/x"); len(fmt.Sprint(line["reason"])) > 1000 {
			t.Errorf("the line has %d bytes", len(fmt.Sprint(line["reason"])))
		}
	})
	t.Run("who shows one reads why it is refused, though he speaks first", func(t *testing.T) {
		cert := forge(t, "spiffe://example.org/eager")
		conn, err := (&tls.Dialer{Config: &tls.Config{
			InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{*cert},
		}}).DialContext(ctx, "tcp", w.running.Address.String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		w.refusedConnection(t, "spiffe://example.org/eager")
		for range 3 { // gRPC reads nothing before it has written
			if _, err := conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "remote error: tls: bad certificate") {
			t.Errorf("it reads %v", err)
		}
	})
	t.Run("a workload's is no agent's", func(t *testing.T) {
		key := newKey(t)
		resp, err := w.svids().MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr(t, key, "spiffe://example.org/w")})
		if err != nil {
			t.Fatal(err)
		}
		conn := w.dial(&tls.Certificate{Certificate: resp.GetSvid().GetCertChain(), PrivateKey: key})
		refused(t, ping(conn, ctx), codes.PermissionDenied, "authorization denied")
		_, err = entryv1.NewEntryClient(conn).CountEntries(ctx, &entryv1.CountEntriesRequest{})
		refused(t, err, codes.PermissionDenied, "authorization denied")
		if line := w.lastAudit("call.refuse"); line["caller"] != "spiffe://example.org/w" || line["outcome"] != "deny" {
			t.Errorf("audit line %v", line)
		}
		// An admin entry makes it an administrator, and its end unmakes it.
		e := w.create(shop(func(e *types.Entry) { e.SpiffeId, e.Admin = id("/w"), true }))
		if _, err = entryv1.NewEntryClient(conn).CountEntries(ctx, &entryv1.CountEntriesRequest{}); err != nil {
			t.Error(err)
		}
		if _, err := w.entries().BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{e.GetId()}}); err != nil {
			t.Fatal(err)
		}
		_, err = entryv1.NewEntryClient(conn).CountEntries(ctx, &entryv1.CountEntriesRequest{})
		refused(t, err, codes.PermissionDenied, "authorization denied")
	})
	t.Run("an expired one is told to attest again", func(t *testing.T) {
		var mu sync.Mutex
		now := time.Now()
		w := start(t, func(c *Config) { c.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now } })
		_, cert, conn := w.agent("late")
		if err := ping(conn, ctx); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		now = now.Add(2 * time.Hour)
		mu.Unlock()
		err := ping(conn, ctx)
		if reason(err) != types.PermissionDeniedDetails_AGENT_EXPIRED {
			t.Errorf("got %v", err)
		}
		// A new connection with it is not even made, so that its agent comes without one.
		config := w.clientTLS(cert)
		config.VerifyConnection = nil // the server's own certificate is of the server's future
		raw := tls.Client(w.raw(t, "127.0.0.1"), config)
		if err := raw.HandshakeContext(ctx); err == nil {
			hungUp(t, raw) // TLS 1.3: a client learns of the refusal when it reads
		}
		w.refusedConnection(t, "spiffe://example.org/spire/agent/honest/late")
	})
	w.unharmed()
}

func TestRatesMakeCallersWait(t *testing.T) {
	w := start(t, func(c *Config) { c.Limits.AttestPerSecond, c.Limits.AttestBurst = 5, 1 })
	began := time.Now()
	for range 4 {
		if _, _, err := w.attest("honest", []byte("again"), ""); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took < 500*time.Millisecond {
		t.Errorf("four attestations at 5/s took %s", took)
	}
}

func TestTheServerDoesNotStart(t *testing.T) {
	once := start(t)
	_, taken, err := net.SplitHostPort(once.running.Address.String())
	if err != nil {
		t.Fatal(err)
	}
	used := testConfig(t)
	cases := []struct {
		name   string
		change func(*Config)
		part   string
	}{
		{"without a trust domain", func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} }, "trust domain is missing"},
		{"without a data directory", func(c *Config) { c.DataDir = "" }, "data directory is missing"},
		{"with an address that is none", func(c *Config) { c.BindAddress = "here" }, "is no IP address"},
		{"with an unknown key manager", func(c *Config) { c.KeyManager = "cloud" }, "key manager \"cloud\" is unknown"},
		{"with an unknown key type", func(c *Config) { c.CA.KeyType = "dsa" }, "unknown key type"},
		{"with a socket path that is too long", func(c *Config) { c.SocketPath = "/" + strings.Repeat("x", 200) }, "socket path is 201 bytes long"},
		{"with the same attestor twice", func(c *Config) { c.Judges = append(c.Judges, c.Judges[0]) }, "configured twice"},
		{"with an attestor that does not open", func(c *Config) {
			c.Judges = []Judge{{Kind: attestor.JudgeKind{Type: "x", Open: func(any, attestor.Needs) (attestor.Judge, error) { return nil, errors.New("no file") }}}}
		}, `open node attestor "x": no file`},
		{"on a port that is in use", func(c *Config) { _, err = fmt.Sscan(taken, &c.BindPort) }, "address already in use"},
		{"on the socket of another server", func(c *Config) { c.SocketPath = once.cfg.SocketPath }, "already listens there"},
		{"with OIDC discovery on the socket of another server", func(c *Config) {
			c.OIDC = &OIDCDiscovery{OIDC: trust.OIDC{Domains: []string{"oidc.example.org"}}, SocketPath: once.cfg.SocketPath}
		}, "oidc_discovery.listen_socket_path: listen on"},
		{"on a file that is no socket", func(c *Config) {
			c.SocketPath = filepath.Join(used.DataDir, "file")
		}, "there is a file which is not a socket"},
		{"on the store of another server", func(c *Config) { c.DataDir = once.cfg.DataDir }, "open store"},
		{"on the store of another trust domain", func(c *Config) {
			c.DataDir, c.TrustDomain = used.DataDir, spiffeid.RequireTrustDomainFromString("elsewhere.test")
		}, "example.org"},
		{"with an audit log that cannot be written", func(c *Config) { c.AuditPath = used.DataDir }, "open audit log"},
	}
	if err := os.MkdirAll(used.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(used.DataDir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	used.Ready = func(Running) { cancel() }
	if err := Run(ctx, used); err != nil { // marks the store with its trust domain
		t.Fatal(err)
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			cfg := testConfig(t)
			c.change(&cfg)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			cfg.Ready = func(Running) { cancel() }
			if err := Run(ctx, cfg); err == nil || !strings.Contains(err.Error(), c.part) {
				t.Errorf("got %v, want %q", err, c.part)
			}
		})
	}
	once.unharmed()
}

func TestASocketOfAKilledServerIsReplaced(t *testing.T) {
	cfg := testConfig(t)
	if err := os.MkdirAll(filepath.Dir(cfg.SocketPath), 0o750); err != nil {
		t.Fatal(err)
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: cfg.SocketPath}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Close(fd); err != nil { // leaves the file
		t.Fatal(err)
	}
	w := start(t, func(c *Config) { c.SocketPath = cfg.SocketPath })
	w.unharmed()
}

func TestALargeRequestIsRefused(t *testing.T) {
	w := start(t)
	big := shop(func(e *types.Entry) { e.Hint = string(bytes.Repeat([]byte("h"), 5<<20)) })
	_, err := w.entries().BatchCreateEntry(w.context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{big}})
	refused(t, err, codes.ResourceExhausted, "")
	_, err = w.agents().CreateJoinToken(w.context(), &agentv1.CreateJoinTokenRequest{Ttl: 1})
	if err != nil {
		t.Error(err)
	}
	w.unharmed()
}
