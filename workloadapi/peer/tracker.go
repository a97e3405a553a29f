package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/assay-id/assay/attestor"
)

// procInterval is how often processes are looked at that no pidfd could be had for.
const procInterval = 500 * time.Millisecond

// logInterval is how often, at most, refused connections are logged.
const logInterval = 10 * time.Second

// Tracker identifies the processes behind connections and waits for all of them to exit with one
// epoll instance. It is safe for concurrent use.
type Tracker struct {
	proc    string
	log     logrus.FieldLogger
	now     func() time.Time
	refused *prometheus.CounterVec

	// noPeerPidfd and noPidfd make a new kernel look like an old one; only tests set them.
	noPeerPidfd, noPidfd bool

	mu      sync.Mutex // guards the rest; nothing else is locked while it is held
	epoll   int        // -1 once closed
	wake    int        // an eventfd, -1 once closed
	next    uint64
	peers   map[uint64]*Peer // every one that has neither exited nor been released
	slow    int              // how many of them have no pidfd
	lastLog time.Time
	quiet   int // refusals since then that were not logged
}

// Open makes a Tracker. Close it when Run has returned and its connections are closed.
func Open(cfg Config) (*Tracker, error) {
	t := &Tracker{proc: cfg.Proc, log: cfg.Log, now: cfg.Now, peers: map[uint64]*Peer{}}
	if t.proc == "" {
		t.proc = "/proc"
	}
	if t.log == nil {
		quiet := logrus.New()
		quiet.SetOutput(io.Discard)
		t.log = quiet
	}
	if t.now == nil {
		t.now = time.Now
	}
	t.refused = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "assay_peer_refused_connections_total",
		Help: "Connections closed because their process was dead, of a pid_namespace out of sight or unidentified, or over a limit; and descriptors, for want of which one waited.",
	}, []string{"reason"})
	metrics := cfg.Metrics
	if metrics == nil {
		metrics = prometheus.NewRegistry()
	}
	if err := metrics.Register(t.refused); err != nil {
		var again prometheus.AlreadyRegisteredError
		if !errors.As(err, &again) {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
		if known, ok := again.ExistingCollector.(*prometheus.CounterVec); ok {
			t.refused = known // a second socket of the same agent
		}
	}
	for _, reason := range []string{"dead", "pid_namespace", "unidentified", "limit", "descriptors"} {
		t.refused.WithLabelValues(reason)
	}
	var err error
	if t.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("create epoll instance: %w", err)
	}
	if t.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		_ = unix.Close(t.epoll)
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	if err := unix.EpollCtl(t.epoll, unix.EPOLL_CTL_ADD, t.wake, event(0)); err != nil {
		_ = unix.Close(t.wake)
		_ = unix.Close(t.epoll)
		return nil, fmt.Errorf("watch eventfd: %w", err)
	}
	return t, nil
}

// Close gives the tracker's descriptors back. Peers that are left stay usable, only their Done is
// never closed any more.
func (t *Tracker) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.epoll >= 0 {
		_ = unix.Close(t.epoll)
		_ = unix.Close(t.wake)
		t.epoll, t.wake = -1, -1
	}
}

// Run closes Done of each process that exits, and its connection, until ctx ends.
func (t *Tracker) Run(ctx context.Context) error {
	t.mu.Lock()
	epoll := t.epoll
	t.mu.Unlock()
	if epoll < 0 {
		return errors.New("run peer tracker: closed")
	}
	stop := context.AfterFunc(ctx, t.nudge)
	defer stop()
	events := make([]unix.EpollEvent, 128)
	for ctx.Err() == nil {
		n, err := unix.EpollWait(epoll, events, t.patience())
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for processes: %w", err)
		}
		for _, ev := range events[:max(n, 0)] {
			if id := eventID(ev); id != 0 {
				t.exit(id)
			} else {
				t.drain()
			}
		}
		t.scan()
	}
	return nil
}

// patience is how long, in milliseconds, epoll may wait before processes without a pidfd must be
// looked at; -1 is forever.
func (t *Tracker) patience() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.slow == 0 {
		return -1
	}
	return int(procInterval / time.Millisecond)
}

// nudge wakes Run.
func (t *Tracker) nudge() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.wake >= 0 {
		_, _ = unix.Write(t.wake, []byte{1, 0, 0, 0, 0, 0, 0, 1}) // any number but zero
	}
}

func (t *Tracker) drain() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.wake >= 0 {
		_, _ = unix.Read(t.wake, make([]byte, 8))
	}
}

// exit is called when the process is known to have exited.
func (t *Tracker) exit(id uint64) {
	t.mu.Lock()
	p := t.peers[id]
	if p != nil {
		t.drop(p)
	}
	t.mu.Unlock()
	if p != nil {
		p.exited()
	}
}

// scan looks at the processes that have no pidfd to wait for.
func (t *Tracker) scan() {
	t.mu.Lock()
	var slow []*Peer
	if t.slow > 0 {
		for _, p := range t.peers {
			if !p.pin.pidfd {
				slow = append(slow, p)
			}
		}
	}
	t.mu.Unlock()
	for _, p := range slow {
		if !p.Alive() {
			t.exit(p.id)
		}
	}
}

// track begins to wait for the process to exit; closer is called when it has.
func (t *Tracker) track(process attestor.Process, pinned pin, closer func()) (*Peer, error) {
	p := &Peer{Process: process, tracker: t, done: make(chan struct{}), pin: pinned, close: closer}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next++
	p.id = t.next
	if t.epoll < 0 {
		_ = unix.Close(pinned.fd)
		return nil, errors.New("track process: tracker is closed")
	}
	if pinned.pidfd {
		if err := unix.EpollCtl(t.epoll, unix.EPOLL_CTL_ADD, pinned.fd, event(p.id)); err != nil {
			_ = unix.Close(pinned.fd)
			return nil, fmt.Errorf("watch process: %w", err)
		}
	} else {
		t.slow++
		_, _ = unix.Write(t.wake, []byte{1, 0, 0, 0, 0, 0, 0, 1}) // Run must begin to look regularly
	}
	t.peers[p.id] = p
	return p, nil
}

// forget stops waiting for the process.
func (t *Tracker) forget(p *Peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.peers[p.id] == p {
		t.drop(p)
	}
}

// drop takes the peer off the books. mu is held. An event of it that has been fetched already finds
// nothing under its ID: that is why events carry an ID and not a descriptor's number.
func (t *Tracker) drop(p *Peer) {
	delete(t.peers, p.id)
	if !p.pin.pidfd {
		t.slow--
		return
	}
	if t.epoll >= 0 {
		_ = unix.EpollCtl(t.epoll, unix.EPOLL_CTL_DEL, p.pin.fd, nil)
	}
}

// event makes an epoll event that fires once and carries the ID.
func event(id uint64) *unix.EpollEvent {
	ev := &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(uint32(id)), Pad: int32(uint32(id >> 32))} //nolint:gosec // the two halves of a number
	if id != 0 {
		ev.Events |= unix.EPOLLONESHOT
	}
	return ev
}

func eventID(ev unix.EpollEvent) uint64 {
	return uint64(uint32(ev.Fd)) | uint64(uint32(ev.Pad))<<32 //nolint:gosec // the two halves of a number
}

// identify pins the process that connected.
func (t *Tracker) identify(c *net.UnixConn, closer func()) (*Peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	pinned := pin{fd: -1, pidfd: true}
	var credErr, pinErr error
	err = raw.Control(func(fd uintptr) {
		if cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr != nil {
			return
		}
		if t.noPeerPidfd {
			pinErr = unix.ENOPROTOOPT
			return
		}
		pinned.fd, pinErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	})
	if err = errors.Join(err, credErr); err != nil {
		return nil, fmt.Errorf("read peer credentials: %w", err)
	}
	if cred.Pid <= 0 {
		if pinErr == nil {
			_ = unix.Close(pinned.fd)
		}
		return nil, ErrInvisible
	}
	switch {
	case pinErr == nil:
		unix.CloseOnExec(pinned.fd) // the kernel sets it already; a leak into an attestor's helper would be ours
	case errors.Is(pinErr, unix.ENOPROTOOPT):
		if pinned, err = t.identifyByNumber(cred); err != nil {
			return nil, err
		}
	case starved(pinErr):
		return nil, fmt.Errorf("open pidfd: %w", pinErr)
	default: // kernels before 6.16 have no pidfd for a process that was reaped
		return nil, fmt.Errorf("%w: %w", ErrDead, pinErr)
	}
	process := attestor.Process{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid, Proc: t.proc}
	return t.track(process, pinned, closer)
}

// identifyByNumber is for kernels without SO_PEERPIDFD. See the package comment for what it cannot
// rule out.
func (t *Tracker) identifyByNumber(cred *unix.Ucred) (pin, error) {
	pinned, err := t.open(int(cred.Pid))
	if err != nil {
		return pin{}, err
	}
	uid, _, err := ids(t.proc, int(cred.Pid))
	if err == nil && uid != cred.Uid {
		err = fmt.Errorf("%w: its PID belongs to user %d, and user %d connected", ErrDead, uid, cred.Uid)
	}
	if err == nil && !pinned.alive() {
		err = ErrDead
	}
	if err != nil {
		_ = unix.Close(pinned.fd)
		return pin{}, err
	}
	return pinned, nil
}

// open pins whatever process has the PID now.
func (t *Tracker) open(pid int) (pin, error) {
	if pid <= 0 {
		return pin{}, ErrInvisible
	}
	if !t.noPidfd {
		fd, err := unix.PidfdOpen(pid, 0)
		switch {
		case err == nil:
			return pin{fd: fd, pidfd: true}, nil
		case errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL):
			return pin{}, ErrDead // the last two: there is a thread of that number, but no process
		case !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM): // a seccomp filter says EPERM
			return pin{}, fmt.Errorf("open pidfd: %w", err)
		}
	}
	fd, err := unix.Open(filepath.Join(t.proc, strconv.Itoa(pid)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return pin{}, ErrDead
	}
	if err != nil {
		return pin{}, fmt.Errorf("open process directory: %w", err)
	}
	return pin{fd: fd}, nil
}

// refuse counts a connection that is not served, and logs it unless it did so a moment ago.
func (t *Tracker) refuse(reason string, err error) {
	t.refused.WithLabelValues(reason).Inc()
	now := t.now()
	t.mu.Lock()
	due := now.Sub(t.lastLog) >= logInterval
	quiet := t.quiet
	if due {
		t.lastLog, t.quiet = now, 0
	} else {
		t.quiet++
	}
	t.mu.Unlock()
	if starved(err) {
		err = fmt.Errorf("%w; raise LimitNOFILE of the agent's unit (ulimit -n), or see who holds so many connections", err)
	}
	if due {
		t.log.WithError(err).WithFields(logrus.Fields{"reason": reason, "unlogged": quiet}).Warn("connection refused")
	}
}
