package hostile

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// TestListener attacks the server before there is any HTTP/2.
func TestListener(t *testing.T) {
	v := newVictim(t)
	hello := clientHello(t, v.is.Address)
	noise := make([]byte, 32<<10)
	if _, err := rand.Read(noise); err != nil {
		t.Fatal(err)
	}
	t.Run("connections that say nothing", func(t *testing.T) { waiting(t, v, nil) })
	t.Run("half a hello", func(t *testing.T) { waiting(t, v, hello[:len(hello)/2]) })
	t.Run("a hello, and then silence", func(t *testing.T) { waiting(t, v, hello) })
	t.Run("TLS, and then silence", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 128 * mib}, func(t *testing.T) {
			var conns []*tls.Conn
			for range scaled(200, 2000) {
				conn := tls.Client(tcp(t, v.is.Address), clientTLS(nil))
				if err := conn.HandshakeContext(t.Context()); err != nil {
					t.Fatal(err)
				}
				conns = append(conns, conn)
			}
			closed(t, conns)
		})
	})
	t.Run("half a preface, and then silence", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 128 * mib}, func(t *testing.T) {
			var conns []*tls.Conn
			for range scaled(200, 2000) {
				conn := tls.Client(tcp(t, v.is.Address), clientTLS(nil))
				if _, err := io.WriteString(conn, http2.ClientPreface[:12]); err != nil {
					t.Fatal(err)
				}
				conns = append(conns, conn)
			}
			closed(t, conns)
		})
	})
	t.Run("garbage", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 128 * mib}, func(t *testing.T) {
			crowd(scaled(300, 5000), func(i int) error {
				conn, err := net.Dial("tcp", v.is.Address)
				if err != nil {
					return err
				}
				defer conn.Close()
				at := i * 97 % len(noise)
				_, _ = conn.Write(noise[at:]) // it may hang up in the middle
				if i%3 == 0 {
					_, err = io.Copy(io.Discard, conn)
				}
				return err
			})
		})
	})
	t.Run("connects and drops", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 256 * mib}, func(t *testing.T) {
			failed := crowd(scaled(3_000, 20_000), func(i int) error {
				conn, err := net.Dial("tcp", v.is.Address)
				if err != nil {
					return err
				}
				defer conn.Close()
				switch i % 4 {
				case 1: // in the middle of the hello
					_, err = conn.Write(hello[:i%len(hello)])
				case 2: // when the server has computed its part
					if _, err = conn.Write(hello); err == nil {
						_, err = io.ReadFull(conn, make([]byte, 1))
					}
				case 3: // with a reset instead of an end
					err = conn.(*net.TCPConn).SetLinger(0)
				}
				return err
			})
			t.Logf("%d could not connect, or were closed first", failed)
		})
	})
	t.Run("handshakes and drops", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 256 * mib}, func(t *testing.T) {
			failed := crowd(scaled(1_000, 20_000), func(int) error {
				raw, err := net.Dial("tcp", v.is.Address)
				if err != nil {
					return err
				}
				defer raw.Close()
				return tls.Client(raw, clientTLS(nil)).HandshakeContext(t.Context())
			})
			if failed > 0 {
				t.Errorf("%d handshakes failed", failed)
			}
		})
	})
	t.Run("a renegotiation, an old version, a protocol nobody speaks", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
			for what, change := range map[string]func(*tls.Config){
				"TLS 1.1":  func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 },
				"HTTP/1.1": func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} },
				"a static RSA suite": func(c *tls.Config) {
					c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256}
				},
			} {
				config := clientTLS(nil)
				change(config)
				conn := tls.Client(tcp(t, v.is.Address), config)
				if err := conn.HandshakeContext(t.Context()); err != nil {
					continue
				}
				// Go's TLS lets an HTTP/1.1 client in where gRPC does not.
				_ = conn.SetReadDeadline(time.Now().Add(patience)) // it reports below
				if n, err := conn.Read(make([]byte, 1)); n > 0 || timedOut(err) {
					t.Errorf("%s was spoken", what)
				}
			}
		})
	})
	t.Run("sessions are never resumed", func(t *testing.T) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			cache := tls.NewLRUClientSessionCache(4)
			for range 3 {
				config := clientTLS(nil)
				config.ClientSessionCache, config.ServerName, config.MaxVersion = cache, "x", version
				conn := tls.Client(tcp(t, v.is.Address), config)
				if err := conn.HandshakeContext(t.Context()); err != nil {
					t.Fatal(err)
				}
				// TLS 1.3 sends its tickets after the handshake, with the first bytes.
				_ = conn.SetReadDeadline(time.Now().Add(patience)) // it reports below
				if _, err := conn.Read(make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
				if conn.ConnectionState().DidResume {
					t.Errorf("%s was resumed", tls.VersionName(version))
				}
				_ = conn.Close()
			}
		}
	})
}

// clientHello records what a client says first.
func clientHello(t *testing.T, address string) []byte {
	t.Helper()
	conn := &recorder{Conn: tcp(t, address)}
	if err := tls.Client(conn, clientTLS(nil)).HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return conn.first
}

type recorder struct {
	net.Conn
	first []byte
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.first == nil {
		r.first = bytes.Clone(p)
	}
	return r.Conn.Write(p)
}

// waiting opens connections that send something and then wait; all must be closed by the server.
func waiting(t *testing.T, v *victim, first []byte) {
	v.suffer(t, bounds{Peak: 128 * mib}, func(t *testing.T) {
		var conns []net.Conn
		for range scaled(300, 1500) { // in full, more than may be half open
			conn := tcp(t, v.is.Address)
			_, _ = conn.Write(first) // it may hang up in the middle
			conns = append(conns, conn)
		}
		closed(t, conns)
	})
}

// closed waits until the server has closed all of them.
func closed[C net.Conn](t *testing.T, conns []C) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for _, conn := range conns {
		if err := conn.SetReadDeadline(deadline); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); timedOut(err) {
			t.Fatal("the server keeps a connection")
		}
		_ = conn.Close()
	}
}
