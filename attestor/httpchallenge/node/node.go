// Package node is the agent's side of http_challenge: it serves the nonce while it attests, and nothing else.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/httpchallenge"
)

const (
	// requestTime is how long one request may take, maxHeader the most in bytes that it may say.
	requestTime, maxHeader = 10 * time.Second, 4 << 10
	// maxPort is the largest port.
	maxPort = 65535
)

// Kind returns the agent's side of http_challenge.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{
		Type:   httpchallenge.Type,
		Config: func() any { return &httpchallenge.AgentConfig{AgentName: "default"} },
		Open:   open,
	}
}

type node struct {
	config httpchallenge.AgentConfig

	mu   sync.Mutex // guards last
	last *desk      // of the attestation before
}

func open(config any, _ attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*httpchallenge.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("http_challenge configuration is a %T", config)
	}
	n := &node{config: *c}
	if n.config.HostName == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("find the machine's name (set hostname): %w", err)
		}
		n.config.HostName = name
	}
	if _, err := httpchallenge.HostName(n.config.HostName); err != nil {
		return nil, fmt.Errorf("hostname %q: %w", n.config.HostName, err)
	}
	if err := httpchallenge.CheckAgentName(c.AgentName); err != nil {
		return nil, fmt.Errorf("agentname %q: %w", c.AgentName, err)
	}
	for key, port := range map[string]int{"port": c.Port, "advertised_port": c.AdvertisedPort} {
		if port < 0 || port > maxPort {
			return nil, fmt.Errorf("%s: %d is no port", key, port)
		}
	}
	return n, nil
}

// Evidence begins to listen, for the port is part of it, and serves until ctx ends or the next attestation
// begins.
func (n *node) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.last != nil {
		n.last.close()
		n.last = nil
	}
	d, err := n.listen(ctx)
	if err != nil {
		return nil, nil, err
	}
	n.last = d
	port := n.config.AdvertisedPort
	if port == 0 {
		port = d.port
	}
	payload, err := json.Marshal(httpchallenge.Evidence{HostName: n.config.HostName, AgentName: n.config.AgentName, Port: port})
	if err != nil {
		return nil, nil, err
	}
	return payload, d.answer, nil
}

// desk is where the nonce is served.
type desk struct {
	port   int
	server *http.Server
	nonce  atomic.Pointer[string]
	done   chan struct{} // closed when nothing is served any more
}

func (n *node) listen(ctx context.Context) (*desk, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort("", strconv.Itoa(n.config.Port)))
	if err != nil {
		return nil, fmt.Errorf("listen for the server's question: %w", err)
	}
	address, ok := listener.Addr().(*net.TCPAddr)
	if !ok {
		_ = listener.Close()
		return nil, errors.New("listen for the server's question: it is no TCP port")
	}
	d := &desk{port: address.Port, done: make(chan struct{})}
	path := httpchallenge.Path(n.config.AgentName)
	d.server = &http.Server{
		ReadTimeout: requestTime, WriteTimeout: requestTime, MaxHeaderBytes: maxHeader,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			nonce := d.nonce.Load()
			if r.Method != http.MethodGet || r.URL.Path != path || nonce == nil {
				http.NotFound(w, r)
				return
			}
			w.Header().Set("Content-Type", "text/plain")
			_, _ = io.WriteString(w, *nonce+"\n")
		}),
	}
	d.server.SetKeepAlivesEnabled(false)
	go func() { // ends with close, which the end of ctx or the next attestation calls
		defer close(d.done)
		_ = d.server.Serve(listener)
	}()
	context.AfterFunc(ctx, func() { _ = d.server.Close() })
	return d, nil
}

func (d *desk) close() {
	_ = d.server.Close()
	<-d.done
}

// answer puts the nonce out.
func (d *desk) answer(ctx context.Context, message []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(message) > attestor.MaxEvidence {
		return nil, errors.New("challenge is too large")
	}
	var challenge httpchallenge.Challenge
	if err := attestor.Decode(message, &challenge); err != nil {
		return nil, fmt.Errorf("decode challenge: %w", err)
	}
	if !httpchallenge.IsNonce(challenge.Nonce) {
		return nil, errors.New("read challenge: it has no nonce that is one")
	}
	d.nonce.Store(&challenge.Nonce)
	return []byte(httpchallenge.Answer), nil
}
