// Package daemon is what the two long-running commands share: the log and its file, the signals, the
// listeners for probes and metrics, and what systemd wants to hear.
//
//	SIGTERM, SIGINT   stop taking calls, let open ones end, exit with status 0; a second one kills
//	SIGHUP            open the log file anew and apply the log level that the configuration has now
//
// Why it is so: everything that can fail at the start fails before the first call is taken and is one
// sentence on standard error with exit status 1; that is what an operator, systemd and a container
// runtime all understand.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/conf"
)

// Config is what a daemon's file says of the things in this package.
type Config struct {
	// Name is the program's, for the metrics: "assay_server" or "assay_agent".
	Name    string
	Version string
	// DataDir is the data directory. Its parents are made as the process's own umask says, for a
	// socket that everybody is to reach may be below them too.
	DataDir string
	Log     conf.Log
	Health  conf.Health
	// Metrics is the address of the metrics listener; empty means none.
	Metrics string
	// Reload reads the configuration again and returns what it says of the log now; nil means that
	// SIGHUP only opens files anew.
	Reload func() (conf.Log, error)
	// Garbage is how many bytes of garbage may pile up before they are collected, if more does not
	// live anyway; 0 means Go's default.
	Garbage uint64
}

// Daemon is a started log with its listeners bound, so that a port in use is found before anything
// else is done.
type Daemon struct {
	// Log is the daemon's log.
	Log *logrus.Logger
	// Registry is where the parts register their metrics.
	Registry *prometheus.Registry

	config  Config
	file    *File // nil: standard error
	health  net.Listener
	metrics net.Listener

	up      atomic.Pointer[state] // nil until Up
	started chan struct{}         // closed by the first Up
	hup     chan os.Signal

	mu     sync.Mutex // guards reopen
	reopen map[string]func() error
}

type state struct{ live, ready func() error }

// Start opens the log and binds the listeners. Files that the process makes from here on are for its
// owner only, unless the code that makes them says otherwise.
func Start(c Config) (*Daemon, error) {
	if c.DataDir != "" {
		if err := os.MkdirAll(filepath.Dir(c.DataDir), 0o755); err != nil { //nolint:gosec // see DataDir
			return nil, fmt.Errorf("make the parent of data_dir: %w", err)
		}
	}
	syscall.Umask(0o077)
	limitMemory(os.DirFS("/"))
	allowGarbage(c.Garbage)
	giveBack(calmAfter, freeMemory)
	d := &Daemon{Log: logrus.New(), Registry: prometheus.NewRegistry(), config: c, reopen: map[string]func() error{}, started: make(chan struct{}), hup: make(chan os.Signal, 1)}
	// From the start on: who was started with SIGHUP ignored, as by nohup, would else start plugins, programs
	// and commands that ignore it, too, and a program that is told by it that its files are new would never
	// know. What is handled here is as by default in whoever is started from here; a log that is to be opened
	// anew while the daemon starts is no reason to end, either.
	signal.Notify(d.hup, syscall.SIGHUP)
	d.Log.SetLevel(c.Log.Level)
	d.Log.SetFormatter(&logrus.TextFormatter{FullTimestamp: true, TimestampFormat: time.RFC3339Nano})
	if c.Log.JSON {
		d.Log.SetFormatter(&logrus.JSONFormatter{TimestampFormat: time.RFC3339Nano})
	}
	d.Log.SetReportCaller(c.Log.Source)
	d.Log.SetOutput(os.Stderr)
	if c.Log.File != "" {
		file, err := OpenFile(c.Log.File)
		if err != nil {
			return nil, err
		}
		d.file = file
		d.Log.SetOutput(file)
	}
	d.Registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: c.Name + "_build_info", Help: "Always 1; the version is a label.", ConstLabels: prometheus.Labels{"version": c.Version},
	})
	build.Set(1)
	d.Registry.MustRegister(build)
	var err error
	if d.health, err = listen(c.Health.Address, "health_checks"); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	if d.metrics, err = listen(c.Metrics, "telemetry.prometheus"); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func listen(address, key string) (net.Listener, error) {
	if address == "" {
		return nil, nil // no listener is configured
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("the address %s of %s is in use by another process", address, key)
		}
		return nil, fmt.Errorf("listen on %s for %s: %w", address, key, err)
	}
	return l, nil
}

// Close gives back what Start took. Run does so by itself.
func (d *Daemon) Close() error {
	signal.Stop(d.hup)
	var errs []error
	for _, l := range []net.Listener{d.health, d.metrics} {
		if l != nil {
			if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	if d.file != nil {
		d.Log.SetOutput(os.Stderr)
		errs = append(errs, d.file.Close())
	}
	return errors.Join(errs...)
}

// Up says that the daemon does its work: probes are answered by live and ready from here on, and
// systemd hears READY=1. Some seconds later, while Run runs, what the start left behind is given back to
// the system.
func (d *Daemon) Up(live, ready func() error) {
	if d.up.Swap(&state{live: live, ready: ready}) == nil {
		close(d.started)
		d.notify("READY=1\nSTATUS=ready")
	}
}

// OnReload adds a file to open anew on SIGHUP.
func (d *Daemon) OnReload(name string, reopen func() error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reopen[name] = reopen
}

// Run runs part until it returns or a signal stops it, and the listeners beside it. It returns what
// part returns; a stop by signal is no error.
func (d *Daemon) Run(ctx context.Context, part func(ctx context.Context) error) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	group, ctx := errgroup.WithContext(ctx)
	ended := make(chan struct{})
	group.Go(func() error {
		defer close(ended)
		err := part(ctx)
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			return nil
		}
		return err
	})
	group.Go(func() error {
		select {
		case <-ctx.Done():
			stop() // from here on a second signal ends the process at once
			d.Log.Info("stopping")
		case <-ended:
		}
		d.notify("STOPPING=1")
		return nil
	})
	group.Go(func() error { d.reloads(ended); return nil })
	group.Go(func() error { d.tidy(ended); return nil })
	group.Go(func() error { d.starting(ended); return nil })
	group.Go(func() error { d.watchdog(ended); return nil })
	group.Go(func() error { return serve(d.health, d.probes(), ended) })
	group.Go(func() error {
		return serve(d.metrics, promhttp.HandlerFor(d.Registry, promhttp.HandlerOpts{ErrorLog: d.Log}), ended)
	})
	err := group.Wait()
	return errors.Join(err, d.Close())
}

// settling is how long a daemon that is up still does what it does at a start: its first connections.
const settling = 3 * time.Second

// tidy gives back what the start took.
func (d *Daemon) tidy(ended <-chan struct{}) {
	select {
	case <-d.started:
	case <-ended:
		return
	}
	timer := time.NewTimer(settling)
	defer timer.Stop()
	select {
	case <-timer.C:
		forgetStart()
	case <-ended:
	}
}

// probes answers liveness and readiness: 200, or 503 with the reason.
func (d *Daemon) probes() http.Handler {
	mux := http.NewServeMux()
	answer := func(ask func(*state) func() error) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			err := errors.New("starting")
			if s := d.up.Load(); s != nil {
				err = ask(s)()
			}
			if err != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
				fmt.Fprintln(w, err)
				return
			}
			fmt.Fprintln(w, "ok")
		}
	}
	if d.config.Health.Address != "" {
		// A daemon that is still starting is alive: killing it would only make it start again.
		live := answer(func(s *state) func() error { return s.live })
		mux.HandleFunc("GET "+d.config.Health.LivePath, func(w http.ResponseWriter, r *http.Request) {
			if d.up.Load() == nil {
				fmt.Fprintln(w, "ok: starting")
				return
			}
			live(w, r)
		})
		mux.HandleFunc("GET "+d.config.Health.ReadyPath, answer(func(s *state) func() error { return s.ready }))
	}
	return mux
}

// serve answers HTTP on the listener until ended is closed.
func serve(l net.Listener, handler http.Handler, ended <-chan struct{}) error {
	if l == nil {
		return nil
	}
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ended:
		closed := server.Close()
		if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", l.Addr(), err)
		}
		return closed
	}
}

// startPause is how often systemd is told that a start still goes on, and startMore for how long it
// is to be patient then; a unit's default is 90 seconds.
const (
	startPause = 20 * time.Second
	startMore  = 60 * time.Second
)

// starting keeps systemd from taking a long start for a failed one: an agent that was never admitted
// waits for its server however long that is away. It returns when the daemon is up or ended is closed.
func (d *Daemon) starting(ended <-chan struct{}) {
	if !notified() {
		return
	}
	tick := time.NewTicker(startPause)
	defer tick.Stop()
	for d.up.Load() == nil {
		d.notify(fmt.Sprintf("STATUS=starting, not ready yet\nEXTEND_TIMEOUT_USEC=%d", startMore.Microseconds()))
		select {
		case <-ended:
			return
		case <-tick.C:
		}
	}
}

// watchdog gives systemd its sign of life for as long as the daemon finds itself alive; without it
// systemd starts the daemon anew. It returns when ended is closed.
func (d *Daemon) watchdog(ended <-chan struct{}) {
	period := watchdogPeriod(os.Getpid(), os.Getenv("WATCHDOG_PID"), os.Getenv("WATCHDOG_USEC"))
	if period == 0 || !notified() {
		return
	}
	tick := time.NewTicker(period / 3)
	defer tick.Stop()
	well := true
	for {
		err := error(nil)
		if s := d.up.Load(); s != nil {
			err = s.live()
		}
		if err == nil {
			d.notify("WATCHDOG=1")
		} else if well {
			d.Log.WithError(err).Error("not alive; systemd's watchdog will start this process anew")
		}
		well = err == nil
		select {
		case <-ended:
			return
		case <-tick.C:
		}
	}
}

// reloads does what SIGHUP asks for until ended is closed.
func (d *Daemon) reloads(ended <-chan struct{}) {
	for {
		select {
		case <-ended:
			return
		case <-d.hup:
			d.reload()
		}
	}
}

func (d *Daemon) reload() {
	if d.file != nil {
		if err := d.file.Reopen(); err != nil {
			d.Log.WithError(err).Error("cannot open the log file anew, going on with the old one")
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, reopen := range d.reopen {
		if err := reopen(); err != nil {
			d.Log.WithError(err).Errorf("cannot open the %s anew, going on with the old one", name)
		}
	}
	if d.config.Reload == nil {
		return
	}
	now, err := d.config.Reload()
	if err != nil {
		d.Log.WithError(err).Error("the configuration has mistakes, nothing of it is applied")
		return
	}
	d.Log.SetLevel(now.Level)
	d.Log.WithField("level", now.Level).Info("reloaded log_level, and what else the command reads again; other keys need a restart")
}

// File is an append-only log that can be opened anew after it was renamed. It is safe for concurrent
// use.
type File struct {
	path string

	mu   sync.Mutex // guards file
	file *os.File
}

// OpenFile opens a log, and makes it with mode 0600 if it does not exist.
func OpenFile(path string) (*File, error) {
	l := &File{path: path}
	return l, l.Reopen()
}

// Write appends to the file.
func (l *File) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Write(p)
}

// Reopen opens the path anew and closes the old file. On an error the old one stays.
func (l *File) Reopen() error {
	file, err := os.OpenFile(l.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open log file: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	old := l.file
	l.file = file
	if old != nil {
		return old.Close()
	}
	return nil
}

// Close closes the file.
func (l *File) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Close()
}
