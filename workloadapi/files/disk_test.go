package files

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

func TestHostileDirectory(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "victim")
	must(t, os.WriteFile(outside, []byte("mine"), 0o600))
	for name, trap := range map[string]func(dir string) error{
		"a link in place of the file":           func(dir string) error { return os.Symlink(outside, filepath.Join(dir, "key.pem")) },
		"a link in place of the temporary file": func(dir string) error { return os.Symlink(outside, filepath.Join(dir, ".key.pem.new")) },
	} {
		t.Run(name+" is replaced and not followed", func(t *testing.T) {
			w := newWorld(t)
			w.everything()
			dir := t.TempDir()
			must(t, trap(dir))
			must(t, New(w, Config{Dir: dir, Cert: "svid.pem", Key: "key.pem"}).Once(context.Background()))
			if text, err := os.ReadFile(outside); err != nil || string(text) != "mine" {
				t.Errorf("it was written through: %q, %v", text, err)
			}
			if info, err := os.Lstat(filepath.Join(dir, "key.pem")); err != nil || !info.Mode().IsRegular() {
				t.Errorf("the key is %v, %v", info, err)
			}
		})
	}
	t.Run("a file that is right but for its mode or its owner is written anew", func(t *testing.T) {
		w := newWorld(t)
		w.everything()
		dir := t.TempDir()
		owner, group := os.Getuid(), os.Getgid()
		if owner == 0 {
			owner, group = 1234, 4321 // numbers of nobody
		}
		cfg := Config{Dir: dir, Cert: "svid.pem", Key: "key.pem", Owner: &owner, Group: &group}
		key := filepath.Join(dir, "key.pem")
		for what, spoil := range map[string]func() error{
			"nothing":   func() error { return nil },
			"its mode":  func() error { return os.Chmod(key, 0o644) },
			"its owner": func() error { return os.Chown(key, os.Getuid(), -1) },
			"its group": func() error { return os.Chown(key, -1, os.Getgid()) },
			"a byte": func() error {
				text, err := os.ReadFile(key)
				if err != nil {
					return err
				}
				text[len(text)/2] ^= 1
				return os.WriteFile(key, text, 0o600)
			},
		} {
			must(t, New(w, cfg).Once(context.Background()))
			before, err := os.ReadFile(key)
			must(t, err)
			must(t, spoil())
			must(t, New(w, cfg).Once(context.Background()))
			info, err := os.Stat(key)
			must(t, err)
			is := info.Sys().(*syscall.Stat_t)
			if int(is.Uid) != owner || int(is.Gid) != group || info.Mode() != 0o600 {
				t.Errorf("%s was wrong: it is %d:%d's with mode %o", what, is.Uid, is.Gid, info.Mode())
			}
			if after, err := os.ReadFile(key); err != nil || string(after) != string(before) {
				t.Errorf("%s was wrong: the key is another: %v", what, err)
			}
		}
	})
	t.Run("a directory in place of a file is an error that health tells of", func(t *testing.T) {
		w := newWorld(t)
		w.everything()
		dir := t.TempDir()
		must(t, os.MkdirAll(filepath.Join(dir, "key.pem", "x"), 0o700))
		k := w.keep(Config{Dir: dir, Cert: "svid.pem", Key: "key.pem"})
		until(t, "the error", func() error {
			if err := k.Live(); !errors.Is(err, errWrite) {
				return fmt.Errorf("live is %w", err)
			}
			return nil
		})
	})
}

// TestWhatCannotBeWrittenIsTold holds that an operator who reads no debug log learns of a file that cannot be
// written, and does so once.
func TestWhatCannotBeWrittenIsTold(t *testing.T) {
	w := newWorld(t)
	w.everything()
	log, lines := logtest.NewNullLogger()
	log.SetLevel(logrus.DebugLevel)
	told := func(level logrus.Level, what string) (n int) {
		for _, e := range lines.AllEntries() {
			if err, _ := e.Data[logrus.ErrorKey].(error); e.Level == level && e.Data["what"] == what && errors.Is(err, errWrite) {
				n++
			}
		}
		return n
	}
	wait := func(level logrus.Level, what string, n int) {
		t.Helper()
		until(t, fmt.Sprintf("%s of %s", level, what), func() error {
			if told(level, what) < n {
				return errors.New("nobody was told")
			}
			return nil
		})
	}
	dir := t.TempDir()
	obstacle := func(name string) { must(t, os.MkdirAll(filepath.Join(dir, name, "x"), 0o700)) }
	for _, name := range []string{"key.pem", "token", "jwks.json"} {
		obstacle(name)
	}
	cfg := Config{Dir: dir, Cert: "svid.pem", Key: "key.pem", JWKS: "jwks.json", JWTs: []JWT{{Audience: []string{"one"}, File: "token"}}, Log: log}
	k := w.keep(cfg)
	for _, what := range []string{groupX509, groupJWTBundles, "JWT-SVID token"} {
		wait(logrus.WarnLevel, what, 1)
		wait(logrus.DebugLevel, what, 1)
		if n := told(logrus.WarnLevel, what); n != 1 {
			t.Errorf("%s: it was told %d times", what, n)
		}
	}
	for _, name := range []string{"key.pem", "token", "jwks.json"} {
		must(t, os.RemoveAll(filepath.Join(dir, name)))
	}
	until(t, "the files", k.Ready)
	until(t, "the token", func() error { _, err := os.Stat(filepath.Join(dir, "token")); return err })
	must(t, os.Remove(filepath.Join(dir, "key.pem")))
	obstacle("key.pem")
	w.say(func() { w.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{w.svid("/web")}} })
	wait(logrus.WarnLevel, groupX509, 2)
}
