// Package plugin runs plugins of SPIRE: programs of their own that speak SPIRE's plugin SDK over hashicorp's
// go-plugin. What they are for (attestors, keys, an upstream authority) is their users' business; here is
// how such a program is started, watched and spoken to.
//
// A program is nothing that this project vouches for. So its SHA-256 must be given, and what is run is a
// sealed copy in memory of what was hashed; it gets no environment but what the protocol needs and the
// operator names, no open files, and no way to gain rights; it is in a process group that ends with it, and
// it ends with us. Whoever listens at the socket that it names must be in that group. Every call has a
// deadline, every answer a limit; a program that ends is started again when it is asked next, with growing
// pauses, and one that answers nothing three times in a row is ended first. Each start and each end is told
// to Audit.
//
// Why it is so: go-plugin's own host would do the same with less care and more code: it checks the path and
// then runs the path, passes the whole environment on, and brings net/rpc, yamux and reflection into an
// agent whose size is promised. Its protocol is a line on standard output and three small gRPC services.
package plugin

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Config says which program is to be run, and as what.
type Config struct {
	// Name is the operator's name for it, which is also the type of its selectors.
	Name string
	// Type is SPIRE's name of what it is, for example "NodeAttestor", and Service the gRPC service that it must have.
	Type, Service string

	// Path is where the program is, Checksum what it must hash to.
	Path     string
	Args     []string
	Checksum [sha256.Size]byte
	// Env are variables of the environment: NAME to pass ours on, NAME=value to set one.
	Env []string
	// Data is its configuration, as text in its own syntax.
	Data string
	// Services are what it may ask of us.
	Services []Service

	TrustDomain spiffeid.TrustDomain
	// Trial says that it is only tried: it is asked whether its configuration is right, not configured.
	Trial bool
	// Patience is how long it may take to start, and to be configured. 0: 30 seconds.
	Patience time.Duration
	Log      logrus.FieldLogger
	// Audit is told of every start and end. Nil: nobody is.
	Audit func(event string, err error)
	// Now is the clock. Nil: time.Now.
	Now func() time.Time
}

// Service is a gRPC service for the plugin.
type Service struct {
	Name     string
	Register func(grpc.ServiceRegistrar)
}

// What Audit is told of.
const (
	Started = "plugin.start"
	Ended   = "plugin.end"
)

// How long is waited before a program that ended is started again.
const (
	firstPause = 100 * time.Millisecond
	mostPause  = 30 * time.Second
	// steady is how long one must have run to be forgiven earlier ends.
	steady = time.Minute
	// tooMute is how many calls in a row may go without an answer, and leastMute how long the last of
	// them must have taken to count.
	tooMute   = 3
	leastMute = time.Second
	// lastBreath is how long a program whose socket has gone may take to end.
	lastBreath = 2 * time.Second
)

var (
	errClosed = errors.New("plugin is closed")
	// ErrEnded says that the program has ended and is not started again yet.
	ErrEnded = errors.New("plugin has ended")
)

// Plugin is a program that runs, or will again when it is asked. It is safe for concurrent use.
type Plugin struct {
	cfg   Config
	image *image

	mu       sync.Mutex // guards the rest
	session  *session
	starting chan struct{} // closed when a start that is under way has come to an end
	closed   bool
	notUntil time.Time
	pause    time.Duration
	began    time.Time
	last     error // why it is not running
	watching sync.WaitGroup
}

// Open starts the program and makes sure that it is what it should be.
func Open(ctx context.Context, cfg Config) (*Plugin, error) {
	if cfg.Patience == 0 {
		cfg.Patience = 30 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Audit == nil {
		cfg.Audit = func(string, error) {}
	}
	p := &Plugin{cfg: cfg, pause: firstPause}
	var err error
	if p.image, err = openImage(cfg.Path, cfg.Checksum); err != nil {
		cfg.Audit(Started, err)
		return nil, fmt.Errorf("plugin %q: %w", cfg.Name, err)
	}
	if _, err = p.running(ctx); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// Close ends the program.
func (p *Plugin) Close() error {
	p.mu.Lock()
	p.closed = true
	s, starting := p.session, p.starting
	p.mu.Unlock()
	if starting != nil {
		<-starting
		p.mu.Lock()
		s = p.session
		p.mu.Unlock()
	}
	if s != nil {
		s.farewell()
	}
	p.watching.Wait()
	p.image.close()
	return nil
}

// Do lets fn talk to the plugin. Its context ends after patience at the latest.
func (p *Plugin) Do(ctx context.Context, patience time.Duration, fn func(ctx context.Context, conn grpc.ClientConnInterface) error) error {
	s, err := p.running(ctx)
	if err != nil {
		return err
	}
	asking, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	begun := p.cfg.Now()
	err = fn(asking, s.conn)
	late := errors.Is(asking.Err(), context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded // its end may be faster
	switch {
	case err == nil || !late && asking.Err() == nil && !cutOff(err):
		s.alive(p.cfg.Now())
	case late && s.answered.Load() < begun.UnixNano() && p.cfg.Now().Sub(begun) >= leastMute && s.mute.Add(1) >= tooMute:
		p.cfg.Log.WithField("calls", tooMute).Error("plugin does not answer; it is ended")
		s.kill()
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("plugin %q: %w: %w", p.cfg.Name, ctx.Err(), err)
	case late && overdue(ctx): // gRPC noticed before the context did
		return fmt.Errorf("plugin %q: %w: %w", p.cfg.Name, context.DeadlineExceeded, err)
	case cutOff(err): // its socket ends before it does
		select {
		case <-s.ended:
			return fmt.Errorf("plugin %q: %w while it was asked: %w", p.cfg.Name, ErrEnded, s.exit)
		case <-asking.Done():
		case <-time.After(lastBreath):
		}
	}
	return fmt.Errorf("plugin %q: %w", p.cfg.Name, err)
}

// overdue reports whether the deadline of who asks has passed.
func overdue(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ok && !time.Now().Before(deadline)
}

// cutOff reports whether a call may have failed because the connection ended: by the program's end, or by ours of
// the connection when we saw that end first.
func cutOff(err error) bool {
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.Canceled
}

// running returns the plugin, started if need be. Whoever asks while it starts waits for it.
func (p *Plugin) running(ctx context.Context) (*session, error) {
	for {
		p.mu.Lock()
		s, starting := p.session, p.starting
		wait := p.notUntil.Sub(p.cfg.Now())
		switch {
		case p.closed:
			p.mu.Unlock()
			return nil, errClosed
		case s != nil:
			p.mu.Unlock()
			return s, nil
		case starting == nil && p.last != nil && wait > 0:
			err := p.last
			p.mu.Unlock()
			return nil, fmt.Errorf("plugin %q: %w; it is started again in %s: %w", p.cfg.Name, ErrEnded, wait.Round(time.Millisecond), err)
		case starting == nil:
			done := make(chan struct{})
			p.starting = done
			p.mu.Unlock()
			s, err := p.start(ctx)
			p.mu.Lock()
			p.starting = nil
			close(done)
			p.took(s, err)
			p.mu.Unlock()
			if err != nil {
				return nil, err
			}
			return s, nil
		}
		p.mu.Unlock()
		select {
		case <-starting:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// took notes how a start came out. mu is held.
func (p *Plugin) took(s *session, err error) {
	p.began = p.cfg.Now()
	if err != nil {
		p.rest(err)
		return
	}
	p.session = s
	p.watching.Go(func() { p.watch(s) })
}

// rest puts the next start off. mu is held.
func (p *Plugin) rest(why error) {
	now := p.cfg.Now()
	if now.Sub(p.began) > steady {
		p.pause = firstPause
	}
	p.last, p.notUntil = why, now.Add(p.pause)
	p.pause = min(2*p.pause, mostPause)
}

// watch waits for the program's end.
func (p *Plugin) watch(s *session) {
	<-s.ended
	p.mu.Lock()
	p.session = nil
	p.rest(s.exit)
	p.mu.Unlock()
	if s.expected.Load() {
		return // whoever ended it releases it
	}
	s.release()
	p.cfg.Log.WithError(s.exit).Warn("plugin has ended; it is started again when it is asked")
	p.cfg.Audit(Ended, fmt.Errorf("ended by itself: %w", s.exit))
}

// start runs the program. It goes on when whoever asked has left: others wait for it.
func (p *Plugin) start(ctx context.Context) (*session, error) {
	ctx = context.WithoutCancel(ctx)
	proc, err := launch(&p.cfg, p.image, p.logOutput)
	var s *session
	if err == nil {
		if s, err = p.begin(ctx, proc); err != nil {
			proc.kill()
			<-proc.ended
		}
	}
	if err != nil {
		err = fmt.Errorf("start plugin %q, %s: %w", p.cfg.Name, p.cfg.Path, err)
		p.cfg.Audit(Started, err)
		return nil, err
	}
	p.cfg.Audit(Started, nil)
	p.cfg.Log.WithFields(logrus.Fields{"pid": s.pid, "path": p.cfg.Path, "sha256": fmt.Sprintf("%x", p.cfg.Checksum)}).Info("plugin runs")
	return s, nil
}

func (p *Plugin) logOutput(r io.Reader) { logLines(r, p.cfg.Log) }

// Explain makes of a plugin's gRPC error one that says what the plugin said, and no more than fits a line.
func Explain(err error) error {
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	return status.Error(s.Code(), sanitize(s.Message()))
}

// Said is what the plugin said in its error.
func Said(err error) string { return sanitize(status.Convert(err).Message()) }

// sanitize keeps a stranger's text from filling a log or steering a terminal.
func sanitize(text string) string {
	text = strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return ' '
		}
		return r
	}, text)
	if len(text) > 512 {
		return text[:512] + "…"
	}
	return text
}
