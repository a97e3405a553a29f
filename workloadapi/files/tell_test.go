package files

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

func TestTelling(t *testing.T) {
	count := func(path string) int {
		text, _ := os.ReadFile(path)
		return strings.Count(string(text), "\n")
	}
	t.Run("a command runs at each change, knows which, and not when nothing has changed", func(t *testing.T) {
		w := newWorld(t)
		w.everything()
		dir, out := t.TempDir(), filepath.Join(t.TempDir(), "out")
		cfg := Config{Dir: dir, Cert: "svid.pem", Key: "key.pem", Command: []string{"sh", "-c", `echo "$ASSAY_FILES_EVENT" >> "$0"`, out}}
		k := w.keep(cfg)
		said := func(want string) {
			until(t, want, func() error {
				if text, err := os.ReadFile(out); err != nil || string(text) != want {
					return fmt.Errorf("it said %q, %w", text, err)
				}
				return nil
			})
		}
		said("renewed\n")
		w.say(func() {}) // the same again
		w.say(func() { w.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{w.svid("/web")}} })
		said("renewed\nrenewed\n")
		w.say(func() { w.x509 = nil })
		said("renewed\nrenewed\nwithdrawn\n")
		must(t, k.Live())
	})
	t.Run("a command that fails is run again, and health says so", func(t *testing.T) {
		w := newWorld(t)
		w.everything()
		dir := t.TempDir()
		flag, runs := filepath.Join(dir, "flag"), filepath.Join(dir, "runs")
		k := w.keep(Config{Dir: dir, Cert: "svid.pem", Key: "key.pem", Command: []string{"sh", "-c", `echo >> "$1"; test -e "$0"`, flag, runs}})
		until(t, "it to fail", func() error {
			if k.Live() == nil {
				return errors.New("it is live")
			}
			return nil
		})
		must(t, os.WriteFile(flag, nil, 0o600))
		until(t, "it to succeed", k.Live)
		if count(runs) < 2 {
			t.Errorf("it ran %d times", count(runs))
		}
	})
	t.Run("the process in the pid file gets the signal", func(t *testing.T) {
		w := newWorld(t)
		w.everything()
		dir := t.TempDir()
		out := filepath.Join(dir, "out")
		reader := background(t, "sh", "-c", `trap 'echo >> "$0"' USR1; echo ready > "$0.ready"; while :; do read -t 1 x || sleep 0.05; done`, out)
		until(t, "the reader", func() error { _, err := os.Stat(out + ".ready"); return err })
		pid := filepath.Join(dir, "pid")
		must(t, os.WriteFile(pid, []byte(strconv.Itoa(reader)+"\n/var/lib/more\n"), 0o600))
		w.keep(Config{Dir: dir, Cert: "svid.pem", Key: "key.pem", PIDFile: pid, Signal: syscall.SIGUSR1})
		until(t, "the signal", func() error {
			if count(out) < 1 {
				return errors.New("none")
			}
			return nil
		})
	})
	for text, want := range map[string]string{"": "no process", "0\n": "no process", "-1\n": "no process", "1\n": "no process", "x": "no process"} {
		t.Run(fmt.Sprintf("%q is nobody to signal", text), func(t *testing.T) {
			pid := filepath.Join(t.TempDir(), "pid")
			must(t, os.WriteFile(pid, []byte(text), 0o600))
			k := New(newWorld(t), Config{Dir: t.TempDir(), PIDFile: pid})
			if err := k.tell.signal(); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("it says %v", err)
			}
		})
	}
	t.Run("without a word it is SIGHUP", func(t *testing.T) {
		if k := New(newWorld(t), Config{Dir: t.TempDir()}); k.cfg.Signal != syscall.SIGHUP {
			t.Errorf("it is %v", k.cfg.Signal)
		}
	})
	t.Run("a process is started once the files are there, signalled, and ended", func(t *testing.T) {
		w := newWorld(t)
		dir := t.TempDir()
		out := filepath.Join(dir, "out")
		k := New(w, Config{Dir: dir, Cert: "svid.pem", Key: "key.pem", JWKS: "jwks.json", JWTs: []JWT{{Audience: []string{"one"}, File: "token"}}, Signal: syscall.SIGUSR1, Process: []string{
			// SIGHUP would be ignored by a shell below nohup.
			"sh", "-c", `trap 'echo USR1 >> "$0"' USR1; trap 'echo TERM >> "$0"; exit' TERM; cd "$1" && test -e svid.pem && test -e jwks.json && test -e token && echo started >> "$0" || echo early >> "$0"; while :; do sleep 0.05; done`,
			out, dir,
		}})
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		said := func(want string) {
			until(t, want, func() error {
				if text, _ := os.ReadFile(out); string(text) != want {
					return fmt.Errorf("it said %q", text)
				}
				return nil
			})
		}
		there := func(name string) {
			until(t, name, func() error { _, err := os.Stat(filepath.Join(dir, name)); return err })
		}
		w.say(func() { w.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{w.svid("/web")}} })
		there("svid.pem")
		w.say(func() {
			w.bundles = &workload.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://example.org": []byte(`{"keys":[]}`)}}
		})
		there("jwks.json")
		w.say(func() {
			w.tokens = []*workload.JWTSVID{{SpiffeId: "spiffe://example.org/web", Svid: token("spiffe://example.org/web", time.Hour)}}
		})
		said("started\n")
		w.say(func() { w.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{w.svid("/web")}} })
		said("started\nUSR1\n")
		cancel()
		must(t, <-done)
		said("started\nUSR1\nTERM\n")
	})
}

// background runs a program until the test ends and returns its number.
func background(t *testing.T, name string, args ...string) int {
	t.Helper()
	cmd := exec.Command(name, args...)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}
