package hostile

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// client speaks HTTP/2 frame by frame, right or wrong.
type client struct {
	t    *testing.T
	conn net.Conn
	*http2.Framer
	head bytes.Buffer
	enc  *hpack.Encoder

	done chan struct{} // closed when the other end has closed, or reading was stopped

	mu sync.Mutex // guards what was received
	// goAway is set when the server sent one, with its code.
	goAway  bool
	code    http2.ErrCode
	resets  int
	refused int            // streams of those that were one too many
	begun   int            // streams whose answer has begun
	answers int            // streams that ended with trailers
	status  map[string]int // of those, by grpc-status
}

// tcp opens a TCP connection that is closed with the test.
func tcp(t *testing.T, address string) net.Conn {
	t.Helper()
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// overTLS opens an HTTP/2 connection to a server over TLS.
func overTLS(t *testing.T, address string, cert *tls.Certificate, settings ...http2.Setting) *client {
	t.Helper()
	conn := tls.Client(tcp(t, address), clientTLS(cert))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		t.Fatal(err)
	}
	return speak(t, conn, settings...)
}

// overUnix opens an HTTP/2 connection to a Unix socket.
func overUnix(t *testing.T, path string, settings ...http2.Setting) *client {
	t.Helper()
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return speak(t, conn, settings...)
}

// speak begins HTTP/2 and reads all that comes.
func speak(t *testing.T, conn net.Conn, settings ...http2.Setting) *client {
	t.Helper()
	c := &client{t: t, conn: conn, Framer: http2.NewFramer(conn, conn), done: make(chan struct{}), status: map[string]int{}}
	c.AllowIllegalWrites = true
	c.enc = hpack.NewEncoder(&c.head)
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteSettings(settings...); err != nil {
		t.Fatal(err)
	}
	go c.read()
	return c
}

// read takes in what the server sends until the connection ends.
func (c *client) read() {
	defer close(c.done)
	dec := hpack.NewDecoder(4096, nil)
	for {
		f, err := c.ReadFrame()
		if err != nil {
			return
		}
		c.mu.Lock()
		switch f := f.(type) {
		case *http2.GoAwayFrame:
			c.goAway, c.code = true, f.ErrCode
		case *http2.RSTStreamFrame:
			c.resets++
			if f.ErrCode == http2.ErrCodeRefusedStream {
				c.refused++
			}
		case *http2.HeadersFrame:
			fields, _ := dec.DecodeFull(f.HeaderBlockFragment())
			if f.StreamEnded() {
				c.answers++
			} else {
				c.begun++
			}
			for _, field := range fields {
				if field.Name == "grpc-status" {
					c.status[field.Value]++
				}
			}
		}
		c.mu.Unlock()
	}
}

// got looks at what was received.
func (c *client) got(look func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	look()
}

// headers encodes the headers of a call.
func (c *client) headers(method string, more ...string) []byte {
	c.head.Reset()
	fields := append([]string{
		":method", "POST", ":scheme", "https", ":path", method, ":authority", "x",
		"content-type", "application/grpc", "te", "trailers",
	}, more...)
	for i := 0; i < len(fields); i += 2 {
		_ = c.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}) // to memory
	}
	return c.head.Bytes()
}

// open begins a call and leaves it open.
func (c *client) open(stream uint32, method string, more ...string) error {
	return c.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: c.headers(method, more...), EndHeaders: true})
}

// framed puts gRPC's five bytes before a message.
func framed(compressed byte, length int, message []byte) []byte {
	return append([]byte{compressed, byte(length >> 24), byte(length >> 16), byte(length >> 8), byte(length)}, message...)
}

// hungUp waits for the other end to close.
func (c *client) hungUp(what string) {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(patience):
		c.t.Errorf("%s: the server keeps the connection", what)
	}
}

// unanswered checks that a call was refused by the transport, and that no method was asked.
func (c *client) unanswered(what string) {
	c.t.Helper()
	c.got(func() {
		if c.answers > 0 {
			c.t.Errorf("a call with %s was answered", what)
		}
	})
}

const (
	getBundle     = "/spire.api.server.bundle.v1.Bundle/GetBundle"
	getAuthorized = "/spire.api.server.entry.v1.Entry/GetAuthorizedEntries"
	attest        = "/spire.api.server.agent.v1.Agent/AttestAgent"
	fetchX509     = "/SpiffeWorkloadAPI/FetchX509SVID"
	fetchJWT      = "/SpiffeWorkloadAPI/FetchJWTSVID"
)

// newEncoder makes the header encoder of a client that was not made by speak.
func newEncoder(c *client) *hpack.Encoder { return hpack.NewEncoder(&c.head) }
