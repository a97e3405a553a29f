// Package audit writes one line for every decision of the server: who asked for what, on which
// node, with which proved facts, at which revision, and what came of it.
//
// The rule is: no line, no certificate. Write returns after the kernel has the line, and whoever
// asked must refuse the request when it returns an error. Lines are JSON, one object a line, in a
// file that is only ever appended to; each line is one write, so lines of a server that was killed
// are whole, and the first line after a torn one (full disk, power cut) starts on a fresh line.
//
// # What is not in it
//
// Private keys, tokens, evidence payloads and certificate requests have no field here. Facts can
// hold secrets: the environment variables of a container are facts (docker:env:NAME=value). The
// value of every fact whose text is "TYPE:env:…" is written as the first 12 hexadecimal digits of
// its SHA-256, "docker:env:DB_PASSWORD=sha256:9f86d081884c", which tells values apart without
// telling them. The digest of a weak secret can be guessed: treat the file accordingly. It is made
// with mode 0600.
//
// # Why it is so
//
// One lock around one write(2) costs about three microseconds a line, a fiftieth of a signature, so
// there is no queue that could be lost with the process. A line is not synced to disk on its own:
// it survives a crash of the server, and a crash of the machine as far as the file system does.
//
// A full disk must not take the identities of a whole trust domain with it, and the rule holds all the
// same: room for some ten thousand lines is reserved behind the end of the file while there is room,
// and lines go on into it when there is none.
package audit

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/store/kv"
)

// Outcomes of a decision.
const (
	Allow = "allow" // it was done
	Deny  = "deny"  // the caller may not, or asked for what cannot be
	Error = "error" // the server could not
)

// ErrClosed says that the log was closed.
var ErrClosed = errors.New("audit log is closed")

// Line is one decision. Event and Outcome are required; empty fields are left out.
type Line struct {
	Time   time.Time // zero: now
	Event  string    // what was decided, for example "svid.x509.new" or "agent.ban"
	Method string    // the full gRPC method, if there was one

	Caller string // the caller's SPIFFE ID, or what kind of caller without one it was
	Peer   string // the caller's address, or "uid=… pid=…" on the Unix socket

	Agent    string // SPIFFE ID of the node's agent that the decision concerns
	EntryID  string
	SPIFFEID string // what was or would have been issued, created or changed
	// Serial is the serial number of an issued certificate in decimal, or the jti of a token.
	Serial    string
	Authority string    // ID of the authority that signed
	ExpiresAt time.Time // of what was issued
	// Facts are the selectors the decision rests on, as attestor.Selector writes them. Write
	// redacts those that may hold secrets.
	Facts []string
	// Verdicts are those that the decision rests on: the image's digest, "@", the verdict's sequence
	// number.
	Verdicts []string
	// Policy, Finding and Report name what decided on an image: the scan policy, the vulnerability, the
	// hash of the document.
	Policy, Finding, Report string
	Rev                     kv.Rev // of the picture that was decided on, or of the commit that was made

	Outcome string // Allow, Deny or Error
	Reason  string // why not, in full: the caller is told less
}

// Config is what a Log can do without.
type Config struct {
	Now     func() time.Time      // default time.Now
	Log     logrus.FieldLogger    // default: nothing is logged
	Metrics prometheus.Registerer // default: nothing is registered
}

// Log appends lines. It is safe for concurrent use.
type Log struct {
	path string // empty: no file of our own
	now  func() time.Time
	log  logrus.FieldLogger

	lines, failures prometheus.Counter

	mu     sync.Mutex // held while writing
	out    io.Writer  // guarded by mu; nil once closed
	file   *os.File   // guarded by mu; out, if it is ours
	torn   bool       // guarded by mu; the last write left half a line
	chain  chain      // guarded by mu
	ahead  reserve    // guarded by mu
	buffer []byte     // guarded by mu
}

// Open appends to the file, which is made with mode 0600 if it does not exist.
func Open(path string, cfg Config) (*Log, error) {
	l, err := New(nil, cfg)
	if err != nil {
		return nil, err
	}
	l.path = path
	if err := l.open(); err != nil {
		return nil, err
	}
	l.out = l.file
	l.ahead.refill(l.file)
	return l, nil
}

// New writes lines to w, which must take a line in one Write or return an error. Reopen does
// nothing and Close does not close w.
func New(w io.Writer, cfg Config) (*Log, error) {
	l := &Log{now: cfg.Now, log: cfg.Log, out: w, chain: chain{prev: prevNone}}
	if l.now == nil {
		l.now = time.Now
	}
	if l.log == nil {
		silent := logrus.New()
		silent.SetOutput(io.Discard)
		l.log = silent
	}
	l.lines = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "assay_server_audit_lines_total",
		Help: "Audit lines that were written.",
	})
	l.failures = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "assay_server_audit_failures_total",
		Help: "Audit lines that could not be written; what they were about was refused.",
	})
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{l.lines, l.failures} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, fmt.Errorf("register audit metrics: %w", err)
			}
		}
	}
	return l, nil
}

// Write appends the line and returns once the kernel has it. After an error the line must be taken
// as not written, and what it was about must not happen.
func (l *Log) Write(line Line) error {
	err := l.write(line)
	if err != nil {
		l.failures.Inc()
		return fmt.Errorf("write audit line: %w", err)
	}
	l.lines.Inc()
	return nil
}

func (l *Log) write(line Line) error {
	switch {
	case line.Event == "":
		return errors.New("line without an event")
	case line.Outcome != Allow && line.Outcome != Deny && line.Outcome != Error:
		return fmt.Errorf("unknown outcome %q", line.Outcome)
	}
	if line.Time.IsZero() {
		line.Time = l.now()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.out == nil {
		return ErrClosed
	}
	text := l.buffer[:0]
	if l.torn {
		text = append(text, '\n')
	}
	text = l.chain.link(appendLine(text, &line), l.torn)
	if cap(text) <= maxBuffer {
		l.buffer = text
	}
	n, err := l.out.Write(text)
	l.chain.wrote(text, n, l.torn)
	l.ahead.used(l.file, n)
	if err == nil && n < len(text) {
		err = io.ErrShortWrite
	}
	if err != nil {
		// Half a line is on the disk: what comes next must not be taken for its end.
		l.torn = l.torn || n > 0
		return err
	}
	l.torn = false
	return nil
}

// maxBuffer bounds what one long line leaves allocated.
const maxBuffer = 64 << 10

// Reopen closes the file and opens its path anew: after a log was rotated by renaming it. If the
// path cannot be opened, lines go on to the old file and the error says so.
func (l *Log) Reopen() error {
	if l.path == "" {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.out == nil {
		return ErrClosed
	}
	old := l.file
	if err := l.open(); err != nil {
		return fmt.Errorf("%w; audit lines go on to the old file", err)
	}
	l.ahead.giveBack(old)
	if err := old.Close(); err != nil {
		l.log.WithError(err).WithField("path", l.path).Warn("Old audit log was not closed cleanly")
	}
	l.out = l.file
	l.ahead.refill(l.file)
	return nil
}

// Close syncs and closes the file. Further lines are refused.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out = nil
	if l.file == nil {
		return nil
	}
	file := l.file
	l.file = nil
	l.ahead.giveBack(file)
	err := file.Sync()
	// A pipe or a terminal in the file's place cannot be synced.
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTSUP) {
		err = nil
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("close audit log: %w", err)
	}
	return nil
}

// open opens the path for appending, and finds out how the file ends. An empty one goes on with the chain
// of the file before it. After an error nothing has changed. mu is held, or nobody has the Log yet.
func (l *Log) open() error {
	if l.path == "" {
		return errors.New("open audit log: no path")
	}
	file, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open audit log: %w", err)
	}
	line, torn, known, err := lastLine(l.path)
	if err != nil {
		return errors.Join(fmt.Errorf("read end of audit log: %w", err), file.Close())
	}
	switch {
	case !known:
		// Whether its last line is whole is not known either; an empty line in between does no harm, and
		// what the chain says of it is that it is not known.
		l.chain = chain{prev: prevUnknown}
		torn = false
		if _, err := file.WriteString("\n"); err != nil {
			return errors.Join(fmt.Errorf("open audit log: %w", err), file.Close())
		}
	case torn:
		l.chain = chain{prev: hashOf(line), half: line}
	case line != nil:
		l.chain = chain{prev: hashOf(line)}
	case l.torn: // the file before ends with half a line
		l.chain = chain{prev: hashOf(l.chain.half)}
	}
	l.file, l.torn = file, torn
	l.log.WithField("path", l.path).WithField("last", l.chain.prev).Info("audit log opened; the chain goes on after this hash")
	return nil
}
