package daemon

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/conf"
)

// started returns a running daemon whose part ends when the test does.
func started(t *testing.T, c Config) (d *Daemon, stopped func() error) {
	t.Helper()
	before := syscall.Umask(0)
	t.Cleanup(func() { syscall.Umask(before) })
	d, err := Start(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	running, result := make(chan struct{}), make(chan error, 1)
	go func() {
		result <- d.Run(ctx, func(ctx context.Context) error {
			close(running)
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	<-running
	stopped = func() error { cancel(); return <-result }
	return d, stopped
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestListeners(t *testing.T) {
	d, stop := started(t, Config{
		Name: "assay_test", Version: "v1", Log: conf.Log{Level: logrus.PanicLevel},
		Health:  conf.Health{Address: "127.0.0.1:0", LivePath: "/live", ReadyPath: "/ready"},
		Metrics: "127.0.0.1:0",
	})
	probe := "http://" + d.health.Addr().String()
	t.Run("a daemon that starts is alive and not ready", func(t *testing.T) {
		if code, _ := get(t, probe+"/live"); code != 200 {
			t.Errorf("live: %d", code)
		}
		if code, text := get(t, probe+"/ready"); code != 503 || text != "starting\n" {
			t.Errorf("ready: %d, %q", code, text)
		}
	})
	t.Run("then it is what it says it is", func(t *testing.T) {
		var ready error
		d.Up(func() error { return nil }, func() error { return ready })
		if code, text := get(t, probe+"/ready"); code != 200 || text != "ok\n" {
			t.Errorf("ready: %d, %q", code, text)
		}
		ready = errors.New("store is full")
		if code, text := get(t, probe+"/ready"); code != 503 || text != "store is full\n" {
			t.Errorf("ready: %d, %q", code, text)
		}
		if code, _ := get(t, probe+"/live"); code != 200 {
			t.Errorf("live: %d", code)
		}
	})
	t.Run("metrics tell the version", func(t *testing.T) {
		code, text := get(t, "http://"+d.metrics.Addr().String()+"/metrics")
		if code != 200 || !strings.Contains(text, `assay_test_build_info{version="v1"} 1`) {
			t.Errorf("got %d, %q", code, text)
		}
	})
	t.Run("a port in use is one sentence", func(t *testing.T) {
		_, err := Start(Config{Metrics: d.metrics.Addr().String()})
		want := "the address " + d.metrics.Addr().String() + " of telemetry.prometheus is in use by another process"
		if err == nil || err.Error() != want {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a stop from outside is no error", func(t *testing.T) {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestPartThatFails(t *testing.T) {
	d, err := Start(Config{Name: "assay_test", Log: conf.Log{Level: logrus.PanicLevel}})
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if err := d.Run(context.Background(), func(context.Context) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

func TestReload(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	level, wrong := logrus.InfoLevel, error(nil)
	d, stop := started(t, Config{
		Name: "assay_test", Log: conf.Log{Level: logrus.InfoLevel, File: path},
		Reload: func() (conf.Log, error) { return conf.Log{Level: level}, wrong },
	})
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	reopened := 0
	d.OnReload("audit log", func() error { reopened++; return nil })
	t.Run("the log goes on in a new file after the old one was renamed", func(t *testing.T) {
		d.Log.Info("first")
		if err := os.Rename(path, path+".1"); err != nil {
			t.Fatal(err)
		}
		d.Log.Info("second")
		d.reload()
		d.Log.Info("third")
		old, _ := os.ReadFile(path + ".1")
		now, _ := os.ReadFile(path)
		if !strings.Contains(string(old), "second") || strings.Contains(string(old), "third") || !strings.Contains(string(now), "third") {
			t.Errorf("old %q, new %q", old, now)
		}
		if reopened != 1 {
			t.Errorf("the audit log was opened anew %d times", reopened)
		}
	})
	t.Run("the level of the file is applied", func(t *testing.T) {
		level = logrus.DebugLevel
		d.reload()
		if d.Log.GetLevel() != logrus.DebugLevel {
			t.Errorf("got %v", d.Log.GetLevel())
		}
	})
	t.Run("a file with mistakes changes nothing", func(t *testing.T) {
		level, wrong = logrus.ErrorLevel, errors.New("mistake")
		d.reload()
		if d.Log.GetLevel() != logrus.DebugLevel {
			t.Errorf("got %v", d.Log.GetLevel())
		}
	})
	t.Run("a log file that cannot be made is one sentence", func(t *testing.T) {
		_, err := Start(Config{Log: conf.Log{File: filepath.Join(dir, "no", "log")}})
		if err == nil || !strings.HasPrefix(err.Error(), "open log file: ") {
			t.Errorf("got %v", err)
		}
	})
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := l.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	hear := func() string {
		b := make([]byte, 100)
		n, err := l.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	d, stop := started(t, Config{Name: "assay_test", Log: conf.Log{Level: logrus.PanicLevel}})
	nothing := func() error { return nil }
	if got := hear(); got != "STATUS=starting, not ready yet\nEXTEND_TIMEOUT_USEC=60000000" {
		t.Errorf("got %q", got)
	}
	d.Up(nothing, nothing)
	d.Up(nothing, nothing)
	if got := hear(); got != "READY=1\nSTATUS=ready" {
		t.Errorf("got %q", got)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if got := hear(); got != "STOPPING=1" {
		t.Errorf("got %q: it must be told once that the daemon is ready", got)
	}
}

func TestMemoryLimit(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	for _, c := range []struct {
		name string
		root fstest.MapFS
		want int64
	}{
		{"version 2", fstest.MapFS{"proc/self/cgroup": file("0::/a/b\n"), "sys/fs/cgroup/a/b/memory.max": file("max\n"), "sys/fs/cgroup/a/memory.max": file("1048576\n")}, 1 << 20},
		{"a cgroup namespace", fstest.MapFS{"proc/self/cgroup": file("0::/\n"), "sys/fs/cgroup/memory.max": file("2048\n")}, 2048},
		{"version 1", fstest.MapFS{"proc/self/cgroup": file("5:cpu:/x\n4:memory:/a\n"), "sys/fs/cgroup/memory/a/memory.limit_in_bytes": file("4096\n"), "sys/fs/cgroup/memory/memory.limit_in_bytes": file("9223372036854771712\n")}, 4096},
		{"no limit", fstest.MapFS{"proc/self/cgroup": file("0::/a\n"), "sys/fs/cgroup/a/memory.max": file("max\n")}, 0},
		{"no cgroups", fstest.MapFS{}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := cgroupLimit(c.root); got != c.want {
				t.Errorf("got %d, want %d", got, c.want)
			}
		})
	}
}

func TestWatchdogPeriod(t *testing.T) {
	for _, c := range []struct {
		pid, usec string
		want      time.Duration
	}{
		{"", "30000000", 30 * time.Second},
		{"42", "1000", time.Millisecond},
		{"43", "1000", 0}, // for another process
		{"", "", 0},
		{"", "-1", 0},
		{"", "x", 0},
		{"", "9223372036854775807", 0},
	} {
		if got := watchdogPeriod(42, c.pid, c.usec); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}
