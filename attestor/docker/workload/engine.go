package workload

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor/docker"
)

const (
	// maxReply is the largest reply of the engine in bytes. A container's description is some
	// 10 KiB and grows with its labels and variables.
	maxReply = 8 << 20
	// maxCalls is how many calls may be under way at once: when a full node starts, the engine is
	// busy enough.
	maxCalls = 8
	// sayAgain is how long a warning that the engine is away is not repeated for an engine that
	// comes and goes.
	sayAgain = time.Minute
)

// errNotKnown says that the engine has no such container or image.
var errNotKnown = errors.New("engine does not know it")

// engine is the engine's API as the attestor uses it. It connects when first needed, finds out again
// how to speak with an engine that was away (it may come back upgraded), and knows whether it is there.
type engine struct {
	host    string // a URL, as the client wants it
	version string
	timeout time.Duration
	log     logrus.FieldLogger
	now     func() time.Time

	calls chan struct{} // a place for each call under way
	// back gets a value when an engine that was away answers again.
	back chan struct{}

	mu        sync.Mutex // guards all below
	client    *client.Client
	transport *http.Transport // the client's
	away      bool
	said      bool      // this absence was warned of
	warned    time.Time // when the last warning was given
}

func newEngine(c *docker.Config, log logrus.FieldLogger, now func() time.Time) (*engine, error) {
	host, err := hostOf(c)
	if err != nil {
		return nil, err
	}
	e := &engine{
		host: host, version: c.Version, timeout: 2 * time.Second, log: log.WithField("engine", host), now: now,
		calls: make(chan struct{}, maxCalls), back: make(chan struct{}, 1),
	}
	if c.Timeout != "" {
		if e.timeout, err = time.ParseDuration(c.Timeout); err != nil || e.timeout <= 0 {
			return nil, fmt.Errorf("engine_timeout: %q is no duration above zero", c.Timeout)
		}
	}
	if _, _, err := e.newClient(); err != nil { // dials nothing, but refuses a version that is none
		return nil, err
	}
	return e, nil
}

// hostOf returns the engine's URL. An engine on another machine says nothing about processes here, so
// none is accepted.
func hostOf(c *docker.Config) (string, error) {
	if c.SocketPath != "" && c.Host != "" {
		return "", errors.New("set docker_socket_path or docker_host, not both")
	}
	text := c.SocketPath
	if text == "" {
		text = c.Host
	}
	if text == "" {
		text = docker.DefaultSocketPath
	}
	if filepath.IsAbs(text) {
		text = "unix://" + text
	}
	u, err := url.Parse(text)
	if err != nil {
		return "", fmt.Errorf("engine address %q is no URL", text)
	}
	switch {
	case u.Scheme == "unix" && u.Host == "" && filepath.IsAbs(u.Path):
		return text, nil
	case u.Scheme == "tcp" && c.Host != "" && isLoopback(u.Hostname()) && u.Port() != "":
		return text, nil
	}
	return "", fmt.Errorf("engine address %q: want unix:///path, or in docker_host tcp://127.0.0.1:port", text)
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (e *engine) newClient() (*client.Client, *http.Transport, error) {
	transport := &http.Transport{MaxIdleConns: maxCalls, MaxIdleConnsPerHost: maxCalls, IdleConnTimeout: 30 * time.Second}
	if path, ok := strings.CutPrefix(e.host, "unix://"); ok {
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}
	}
	made, err := client.New(
		client.WithHost(e.host),
		client.WithHTTPClient(&http.Client{Transport: bounded{transport}, CheckRedirect: client.CheckRedirect}),
		client.WithAPIVersion(e.version),
		client.WithUserAgent("assay-agent"),
	)
	if err != nil {
		return nil, nil, fmt.Errorf("make engine client: %w", err)
	}
	return made, transport, nil
}

// bounded keeps the replies of the engine below maxReply, but for the stream of events.
type bounded struct{ *http.Transport }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	reply, err := b.Transport.RoundTrip(r)
	if err == nil && !strings.HasSuffix(r.URL.Path, "/events") {
		reply.Body = http.MaxBytesReader(nil, reply.Body, maxReply)
	}
	return reply, err
}

// connect returns a client that has agreed with the engine on a version.
func (e *engine) connect(ctx context.Context) (*client.Client, error) {
	e.mu.Lock()
	connected := e.client
	e.mu.Unlock()
	if connected != nil {
		return connected, nil
	}
	made, transport, err := e.newClient()
	if err != nil {
		return nil, err
	}
	// Without this the client would go on with the newest version it knows, which an older engine
	// refuses, and take the version while others write it.
	if _, err := made.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
		transport.CloseIdleConnections()
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client != nil { // somebody else was faster
		transport.CloseIdleConnections()
		return e.client, nil
	}
	e.client, e.transport = made, transport
	return made, nil
}

// call runs one call with the engine's deadline, in its turn.
func call[T any](ctx context.Context, e *engine, f func(context.Context, *client.Client) (T, error)) (T, error) {
	var none T
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	select {
	case e.calls <- struct{}{}:
		defer func() { <-e.calls }()
	case <-ctx.Done():
		return none, ctx.Err()
	}
	connected, err := e.connect(ctx)
	if err != nil {
		e.observe(err)
		return none, err
	}
	value, err := f(ctx, connected)
	e.observe(err)
	if cerrdefs.IsNotFound(err) {
		return none, errNotKnown
	}
	return value, err
}

// container describes a container by its ID.
func (e *engine) container(ctx context.Context, id string) (container.InspectResponse, error) {
	described, err := call(ctx, e, func(ctx context.Context, c *client.Client) (client.ContainerInspectResult, error) {
		return c.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	})
	return described.Container, err
}

// image describes an image by its ID.
func (e *engine) image(ctx context.Context, id string) (client.ImageInspectResult, error) {
	return call(ctx, e, func(ctx context.Context, c *client.Client) (client.ImageInspectResult, error) {
		return c.ImageInspect(ctx, id)
	})
}

// probe asks whether the engine is there.
func (e *engine) probe(ctx context.Context) error {
	_, err := call(ctx, e, func(ctx context.Context, c *client.Client) (client.PingResult, error) {
		return c.Ping(ctx, client.PingOptions{})
	})
	return err
}

// isAway reports whether the last call found the engine away.
func (e *engine) isAway() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.away
}

// observe learns from the end of a call whether the engine is there, and says so once when that
// changes. A refusal is an answer; a caller who hung up says nothing about the engine.
func (e *engine) observe(err error) {
	away := err != nil
	switch {
	case errors.Is(err, context.Canceled):
		return
	case cerrdefs.IsNotFound(err), cerrdefs.IsConflict(err):
		away = false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !away {
		if !e.away {
			return
		}
		e.away = false
		if e.said {
			e.log.Info("container engine answers again")
		}
		select {
		case e.back <- struct{}{}:
		default:
		}
		return
	}
	if !e.away {
		e.away, e.said = true, false
		e.disconnect()
	}
	if !e.said && e.now().Sub(e.warned) >= sayAgain {
		e.said, e.warned = true, e.now()
		e.log.WithError(err).Warn("container engine does not answer: containers that it was not asked about before get no docker selectors until it does")
	}
}

// disconnect drops the client; calls under way keep theirs. The caller holds mu.
func (e *engine) disconnect() {
	if e.client != nil {
		e.transport.CloseIdleConnections()
		e.client, e.transport = nil, nil
	}
}

// stream is the engine's events about containers and images.
type stream struct {
	client.EventsResult
	close context.CancelFunc
}

// events opens the stream of events since a moment (seconds.nanoseconds; empty: from now on). That it
// returns does not mean that the engine answered: its error may come through the stream. The caller
// closes it.
func (e *engine) events(ctx context.Context, since string) (*stream, error) {
	ctx, cancel := context.WithCancel(ctx)
	connected, err := e.connect(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	// The client waits for the engine's first byte as long as its context lives.
	slow := time.AfterFunc(e.timeout, cancel)
	opened := connected.Events(ctx, client.EventsListOptions{
		Since: since,
		Filters: client.Filters{}.
			Add("type", "container", "image").
			// The Podman of before 5.0 takes its own name only for what it then tells of as "die".
			Add("event", "start", "die", "died", "stop", "restart", "rename", "destroy", "remove", "tag", "untag", "delete"),
	})
	if !slow.Stop() {
		cancel()
		return nil, fmt.Errorf("open engine events: %w", context.DeadlineExceeded)
	}
	return &stream{opened, cancel}, nil
}
