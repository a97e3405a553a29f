package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
)

// teller tells readers that files have changed: it signals, runs a command, and looks after the process
// that it started. It tells of the last change only, and of that until it has succeeded.
type teller struct {
	cfg *Config
	log logrus.FieldLogger

	mu      sync.Mutex // guards the next four
	started bool       // all files were there: Process may start
	event   string     // to tell; empty: nothing
	failed  error      // of the last try
	wake    chan struct{}

	process *exec.Cmd     // only run touches these two
	ended   chan struct{} // closed when process has
}

// Events, as commands see them.
const (
	eventRenewed   = "renewed"
	eventWithdrawn = "withdrawn"
)

func newTeller(cfg *Config, log logrus.FieldLogger) *teller {
	return &teller{cfg: cfg, log: log, wake: make(chan struct{}, 1)}
}

// renewed says that files are there, whether they have changed, and whether they are all there. A process is started
// when they are: it would miss the others, and be told of them before it can hear, which ends it.
func (t *teller) renewed(changed, all bool) {
	t.mu.Lock()
	first := all && !t.started
	t.started = t.started || all
	if changed {
		t.event = eventRenewed
	}
	t.mu.Unlock()
	if changed || first {
		t.poke()
	}
}

func (t *teller) withdrawn() {
	t.mu.Lock()
	t.event = eventWithdrawn
	t.mu.Unlock()
	t.poke()
}

func (t *teller) poke() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// err says why a reader could not be told.
func (t *teller) err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failed
}

// run tells until ctx ends, and then ends the process.
func (t *teller) run(ctx context.Context) {
	defer t.end()
	for tries := 0; ; {
		if tries == 0 {
			select {
			case <-ctx.Done():
				return
			case <-t.wake:
			}
		} else if !sleep(ctx, min(firstPause<<min(tries, 10), lastPause), t.wake) {
			return
		}
		t.mu.Lock()
		event, started := t.event, t.started
		t.event = ""
		t.mu.Unlock()
		err := t.tell(ctx, event, started)
		if ctx.Err() != nil {
			return
		}
		t.mu.Lock()
		first, again := err != nil && t.failed == nil, err == nil && t.failed != nil
		t.failed = err
		if err != nil && t.event == "" {
			t.event = event
		}
		t.mu.Unlock()
		if err == nil {
			if tries = 0; again {
				t.log.Info("the reader could be told now")
			}
			continue
		}
		tries++
		if log := t.log.WithError(err); first {
			log.Warn("files have changed, and their reader could not be told; trying again")
		} else {
			log.Debug("the reader could not be told; trying again")
		}
	}
}

// tell does all that is configured; the next try does all of it again.
func (t *teller) tell(ctx context.Context, event string, started bool) error {
	var errs []error
	if len(t.cfg.Process) > 0 && started {
		errs = append(errs, t.look(ctx, event))
	}
	if event == "" {
		return errors.Join(errs...)
	}
	if t.cfg.PIDFile != "" {
		errs = append(errs, t.signal())
	}
	if len(t.cfg.Command) > 0 {
		errs = append(errs, t.command(ctx, event))
	}
	return errors.Join(errs...)
}

// look starts the process if it does not run, and signals it otherwise.
func (t *teller) look(ctx context.Context, event string) error {
	if t.process != nil {
		select {
		case <-t.ended:
			t.process = nil
		default:
			if event == "" {
				return nil
			}
			if err := t.process.Process.Signal(t.cfg.Signal); err != nil {
				return fmt.Errorf("signal process %d: %w", t.process.Process.Pid, err)
			}
			return nil
		}
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), t.cfg.Process[0], t.cfg.Process[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, t.cfg.Stdout, t.cfg.Stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start process: %w", err)
	}
	t.log.WithFields(logrus.Fields{"pid": cmd.Process.Pid, "program": t.cfg.Process[0]}).Info("process started")
	ended := make(chan struct{})
	t.process, t.ended = cmd, ended
	go func() { // end waits for it
		defer close(ended)
		err := cmd.Wait()
		log := t.log.WithFields(logrus.Fields{"pid": cmd.Process.Pid, "program": t.cfg.Process[0]})
		if err != nil {
			log = log.WithError(err)
		}
		log.Info("process has ended")
	}()
	return nil
}

// stopPatience is how long a process is given to end.
const stopPatience = 10 * time.Second

// end ends the process.
func (t *teller) end() {
	if t.process == nil {
		return
	}
	_ = t.process.Process.Signal(syscall.SIGTERM) // an error says that it has ended
	timer := time.NewTimer(stopPatience)
	defer timer.Stop()
	select {
	case <-t.ended:
	case <-timer.C:
		_ = t.process.Process.Kill()
		<-t.ended
	}
}

// signal signals the process whose number is in the file.
func (t *teller) signal() error {
	in, err := os.Open(t.cfg.PIDFile)
	if err != nil {
		return fmt.Errorf("read pid file: %w", err)
	}
	defer in.Close()
	text, err := io.ReadAll(io.LimitReader(in, 64))
	if err != nil {
		return fmt.Errorf("read pid file: %w", err)
	}
	// PostgreSQL writes more lines below it.
	line, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || pid < 2 { // 0 and below are groups of processes, 1 is init
		return fmt.Errorf("read pid file %s: %q is no process", t.cfg.PIDFile, strings.TrimSpace(line))
	}
	if err := syscall.Kill(pid, t.cfg.Signal); err != nil {
		return fmt.Errorf("signal process %d: %w", pid, err)
	}
	return nil
}

// maxSaid is how much of what a command writes is kept for the log, in bytes.
const maxSaid = 4096

// command runs the command to its end.
func (t *teller) command(ctx context.Context, event string) error {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.CommandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, t.cfg.Command[0], t.cfg.Command[1:]...)
	cmd.Env = append(os.Environ(), "ASSAY_FILES_EVENT="+event, "ASSAY_FILES_DIR="+t.cfg.Dir)
	said := &head{max: maxSaid}
	cmd.Stdout, cmd.Stderr = said, said
	cmd.WaitDelay = time.Second // for what it left running with its output open
	err := cmd.Run()
	if ctx.Err() != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("not done after %s", t.cfg.CommandTimeout)
	}
	if err != nil {
		return fmt.Errorf("run %s: %w: %s", t.cfg.Command[0], err, strings.TrimSpace(said.String()))
	}
	t.log.WithFields(logrus.Fields{"program": t.cfg.Command[0], "event": event}).Debug("command has run")
	return nil
}

// head keeps the first bytes of what is written.
type head struct {
	strings.Builder
	max int
}

// Write never fails.
func (h *head) Write(p []byte) (int, error) {
	if left := h.max - h.Len(); left > 0 {
		_, _ = h.Builder.Write(p[:min(left, len(p))])
	}
	return len(p), nil
}
