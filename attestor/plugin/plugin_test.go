package plugin_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/attestor/plugin"
	"github.com/assay-id/assay/test/fake/spireplugin"
)

func TestMain(m *testing.M) {
	spireplugin.RunIfAsked()
	if dir := os.Getenv("PLUGIN_TEST_PARENT"); dir != "" {
		parent(dir)
	}
	os.Exit(m.Run())
}

// parent runs a plugin until it is killed.
func parent(dir string) {
	path, err := os.Executable()
	if err != nil {
		panic(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	c := config(path, sha256.Sum256(text), spireplugin.Workload, fmt.Sprintf("directory = %q", dir))
	c.Log = logrus.New()
	if _, err := plugin.Open(context.Background(), c); err != nil {
		panic(err)
	}
	fmt.Println("runs")
	select {}
}

const patience = time.Minute

func config(path string, sum [sha256.Size]byte, kind, data string) plugin.Config {
	return plugin.Config{
		Name: "test", Type: "WorkloadAttestor", Service: workloadattestorv1.WorkloadAttestor_ServiceDesc.ServiceName,
		Path: path, Args: spireplugin.Args(kind), Env: spireplugin.Env(), Checksum: sum, Data: data,
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Patience: patience,
	}
}

// lines collects what Audit is told.
type lines struct {
	mu   sync.Mutex
	told []string
}

func (l *lines) add(event string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.told = append(l.told, fmt.Sprintf("%s %v", event, err))
}

func (l *lines) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.told...)
}

type setup struct {
	plugin.Config
	audit *lines
	dir   string
}

func newSetup(t *testing.T, kind, mode string) *setup {
	t.Helper()
	path, sum := spireplugin.Self(t)
	s := &setup{audit: new(lines), dir: t.TempDir()}
	s.Config = config(path, sum, kind, fmt.Sprintf("mode = %q\ndirectory = %q", mode, s.dir))
	s.Audit = s.audit.add
	log := logrus.New()
	log.SetOutput(t.Output())
	log.SetLevel(logrus.DebugLevel)
	s.Log = log
	return s
}

func (s *setup) open(t *testing.T) *plugin.Plugin {
	t.Helper()
	p, err := plugin.Open(t.Context(), s.Config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func attest(ctx context.Context, p *plugin.Plugin, patience time.Duration) ([]string, error) {
	var values []string
	err := p.Do(ctx, patience, func(ctx context.Context, conn grpc.ClientConnInterface) error {
		answer, err := workloadattestorv1.NewWorkloadAttestorClient(conn).Attest(ctx, &workloadattestorv1.AttestRequest{Pid: 4711})
		values = answer.GetSelectorValues()
		return plugin.Explain(err)
	})
	return values, err
}

// eventually waits for something to become true.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not: %s", what)
		}
	}
}

func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func readPID(t *testing.T, path string) int {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(strings.TrimPrefix(string(text), "pid "), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestPlugin(t *testing.T) {
	t.Run("a plugin made with SPIRE's SDK answers, and sees nothing of ours", func(t *testing.T) {
		t.Setenv("SECRET_OF_THE_AGENT", "hunter2")
		t.Setenv("PASSED_ON", "yes")
		s := newSetup(t, spireplugin.Workload, "")
		s.Env = []string{"PASSED_ON", "SET=to this", "NOT_THERE"}
		p := s.open(t)
		values, err := attest(t.Context(), p, patience)
		if err != nil || strings.Join(values, " ") != "seen:true pid:4711" {
			t.Fatalf("got %v, %v", values, err)
		}
		seen, err := os.ReadFile(filepath.Join(s.dir, "seen"))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(seen)) {
			line = strings.TrimSpace(line)
			name, _, _ := strings.Cut(strings.TrimPrefix(line, "env "), "=")
			switch {
			case strings.HasPrefix(line, "pid "), line == "NoNewPrivs:\t1":
			case strings.HasPrefix(line, "env "):
				switch name {
				case "WorkloadAttestor", "PLUGIN_PROTOCOL_VERSIONS", "PLUGIN_UNIX_SOCKET_DIR", "TMPDIR", "PASSED_ON", "SET":
				default:
					t.Errorf("the plugin's environment has %s", name)
				}
			case strings.HasPrefix(line, "fd pipe:"), strings.HasPrefix(line, "fd socket:"), strings.HasPrefix(line, "fd anon_inode:"),
				line == "fd /dev/null", strings.HasPrefix(line, "fd /proc/"), strings.HasPrefix(line, "fd /sys/fs/cgroup"):
			default:
				t.Errorf("the plugin sees %q", line)
			}
		}
		if !strings.Contains(string(seen), "NoNewPrivs:\t1") {
			t.Errorf("the plugin could gain rights:\n%s", seen)
		}
		if !strings.Contains(string(seen), "env PASSED_ON=yes") || !strings.Contains(string(seen), "env SET=to this") {
			t.Errorf("the environment lacks what was named:\n%s", seen)
		}
	})

	t.Run("what it starts ends with it", func(t *testing.T) {
		s := newSetup(t, spireplugin.Workload, "child")
		s.Env = []string{"PATH"}
		p := s.open(t)
		child := readPID(t, filepath.Join(s.dir, "child"))
		if !alive(child) {
			t.Fatal("there is no child")
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the child has ended", func() bool { return !alive(child) })
		if _, err := attest(t.Context(), p, patience); err == nil {
			t.Error("a closed plugin answers")
		}
	})

	t.Run("it ends with us, however we end", func(t *testing.T) {
		dir := t.TempDir()
		path, _ := spireplugin.Self(t)
		cmd := exec.CommandContext(t.Context(), path)
		temporary := t.TempDir()
		cmd.Env = append(os.Environ(), "PLUGIN_TEST_PARENT="+dir, "TMPDIR="+temporary)
		cmd.Stderr = t.Output()
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		pid := readPID(t, filepath.Join(dir, "seen"))
		if !alive(pid) {
			t.Fatal("there is no plugin")
		}
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait() // killed
		eventually(t, "the plugin has ended", func() bool { return !alive(pid) })
		left := func() []string {
			found, err := filepath.Glob(filepath.Join(temporary, "assay-plugin-*"))
			if err != nil {
				t.Fatal(err)
			}
			return found
		}
		if len(left()) != 1 {
			t.Errorf("killed, it left %q", left())
		}
		t.Setenv("TMPDIR", temporary)
		p := newSetup(t, spireplugin.Workload, "").open(t)
		if len(left()) != 1 {
			t.Errorf("the next has %q, and not its own alone", left())
		}
		if err := p.Close(); err != nil || len(left()) != 0 {
			t.Errorf("closed, it leaves %q, %v", left(), err)
		}
	})

	t.Run("one that ends is started again, and both are told", func(t *testing.T) {
		s := newSetup(t, spireplugin.Workload, "crash-once")
		p := s.open(t)
		if _, err := attest(t.Context(), p, patience); !errors.Is(err, plugin.ErrEnded) || !strings.Contains(err.Error(), "exit status 6") {
			t.Fatalf("got %v", err)
		}
		var values []string
		eventually(t, "the plugin answers again", func() (ok bool) {
			var err error
			values, err = attest(t.Context(), p, patience)
			return err == nil
		})
		if len(values) == 0 {
			t.Error("no selectors")
		}
		told := strings.Join(s.audit.all(), "\n")
		if want := "plugin.start <nil>\nplugin.end ended by itself: exit status 6\nplugin.start <nil>"; told != want {
			t.Errorf("told\n%s\nwant\n%s", told, want)
		}
	})

	t.Run("one that always ends is refused with growing pauses", func(t *testing.T) {
		s := newSetup(t, spireplugin.Workload, "crash")
		p := s.open(t)
		eventually(t, "it says when there will be another", func() bool {
			_, err := attest(t.Context(), p, patience)
			if !errors.Is(err, plugin.ErrEnded) {
				t.Fatalf("got %v", err)
			}
			return strings.Contains(err.Error(), "it is started again in")
		})
	})

	t.Run("one that hangs is ended and started again", func(t *testing.T) {
		s := newSetup(t, spireplugin.Workload, "hang")
		p := s.open(t)
		first := readPID(t, filepath.Join(s.dir, "seen"))
		for range 3 {
			if _, err := attest(t.Context(), p, 1100*time.Millisecond); err == nil {
				t.Fatal("it answered")
			}
		}
		eventually(t, "the first has ended", func() bool { return !alive(first) })
		eventually(t, "there is another", func() bool {
			_, _ = attest(t.Context(), p, time.Millisecond)
			return readPID(t, filepath.Join(s.dir, "seen")) != first
		})
	})

	t.Run("a huge answer is refused, and the next call answered", func(t *testing.T) {
		p := newSetup(t, spireplugin.Workload, "big").open(t)
		if _, err := attest(t.Context(), p, patience); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("got %v", err)
		}
	})

	t.Run("one that floods its output is answered to all the same, and the log stays small", func(t *testing.T) {
		s := newSetup(t, spireplugin.Workload, "flood")
		log, hook := logtest.NewNullLogger()
		s.Log = log
		if _, err := attest(t.Context(), s.open(t), patience); err != nil {
			t.Fatal(err)
		}
		if n := len(hook.AllEntries()); n == 0 || n > 20_000 { // of 160,000
			t.Errorf("%d lines were logged", n)
		}
	})

	t.Run("what it says of its errors fits a line", func(t *testing.T) {
		p := newSetup(t, spireplugin.Workload, "error").open(t)
		_, err := attest(t.Context(), p, patience)
		if err == nil || strings.ContainsAny(err.Error(), "\n\x1b") || len(err.Error()) > 700 || !strings.Contains(err.Error(), "it went wrong in") {
			t.Errorf("got %q", err)
		}
	})
}

func TestRefusedAtTheStart(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	for _, c := range []struct{ name, kind, mode, want string }{
		{"it ends", "workload+crash", "", "it ended before it said where it listens: exit status 3"},
		{"it ends at once, content", "workload+exit", "", "it ended before it said where it listens: exit status 0"},
		{"it is of another version of SPIRE's plugins", "workload+next", "", `it is a plugin of version "2", not 1`},
		{"it says something else", "workload+chatter", "", `it said "hello, I am no plugin"`},
		{"it says too much", "workload+flood", "", "its first line is longer than 4096 bytes"},
		{"it listens at TCP", "workload+tcp", "", "only Unix sockets are spoken to"},
		{"it sends us to somebody else", "workload+elsewhere", "", "is not the plugin"},
		{"it speaks net/rpc", "workload+netrpc", "", `it speaks "netrpc", not gRPC`},
		{"it is from the future", "workload+future", "", `version "2" of the plugin protocol`},
		{"it is of another kind", "agent-keys", "", "it ended before it said where it listens"}, // the cookie does not fit
		{"it cannot be configured", "unconfigurable", "", "it cannot be configured, and there is plugin_data"},
		{"it refuses its configuration", "workload", "bad-config", "configure: rpc error: code = InvalidArgument desc = failed to decode configuration: mode is not to my taste"},
		{"it ends while it is configured", "workload", "crash-configure", "configure: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSetup(t, c.kind, c.mode)
			s.Env = []string{"ELSEWHERE=" + elsewhere}
			_, err := plugin.Open(t.Context(), s.Config)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if told := s.audit.all(); len(told) != 1 || !strings.HasPrefix(told[0], "plugin.start ") || !strings.Contains(told[0], c.want) {
				t.Errorf("told %q", told)
			}
		})
	}
	for _, c := range []struct{ name, kind, mode, want string }{
		{"it says nothing", "workload+mute", "", "it has not said within"},
		{"it hangs while it is configured", "workload", "slow-configure", "DeadlineExceeded"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSetup(t, c.kind, c.mode)
			s.Patience = 3 * time.Second // a loaded machine starts it within, or it is as mute as it should be
			if _, err := plugin.Open(t.Context(), s.Config); err == nil || !strings.Contains(err.Error(), c.want) && !strings.Contains(err.Error(), "it has not said within") {
				t.Fatalf("got %v, want %q", err, c.want)
			}
		})
	}
	t.Run("for trial, it is asked whether its configuration is right", func(t *testing.T) {
		s := newSetup(t, spireplugin.Workload, "bad-config")
		s.Trial = true
		if _, err := plugin.Open(t.Context(), s.Config); err == nil || !strings.Contains(err.Error(), "it refuses its plugin_data: mode is not to my taste") {
			t.Errorf("got %v", err)
		}
	})
}

func TestOnlyWhatWasHashedIsRun(t *testing.T) {
	path, sum := spireplugin.Self(t)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(t.TempDir(), "plugin")
	write := func(text []byte, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(copied, text, mode); err != nil {
			t.Fatal(err)
		}
	}
	write(text, 0o755)
	t.Run("a program that is replaced after the check stays what it was, also when it is started again", func(t *testing.T) {
		s := newSetup(t, spireplugin.Workload, "crash-once")
		s.Path, s.Checksum = copied, sum
		p := s.open(t)
		write([]byte("#!/bin/sh\ntouch "+s.dir+"/evil\n"), 0o755) // in place: what runs is not busy
		eventually(t, "it runs again", func() bool { _, err := attest(t.Context(), p, patience); return err == nil })
		if _, err := os.Stat(filepath.Join(s.dir, "evil")); err == nil {
			t.Error("what was not hashed was run")
		}
	})
	t.Run("another program is refused", func(t *testing.T) {
		write(append(text, 0), 0o755)
		s := newSetup(t, spireplugin.Workload, "")
		s.Path, s.Checksum = copied, sum
		_, err := plugin.Open(t.Context(), s.Config)
		if wrong, ok := errors.AsType[*external.ChecksumError](err); !ok || wrong.Got == sum || !strings.Contains(err.Error(), "change plugin_checksum") {
			t.Errorf("got %v", err)
		}
		if told := s.audit.all(); len(told) != 1 || !strings.Contains(told[0], "plugin_checksum demands") {
			t.Errorf("told %q", told)
		}
		if _, err := os.Stat(filepath.Join(s.dir, "seen")); err == nil {
			t.Error("it was run")
		}
	})
	for name, c := range map[string]struct {
		make func()
		want string
	}{
		"a script":                 {func() { write([]byte("#!/bin/sh\n"), 0o755) }, "is no ELF program"},
		"an empty file":            {func() { write(nil, 0o755) }, "is no ELF program"},
		"what is not executable":   {func() { _ = os.Remove(copied); write(text, 0o644) }, "is not executable"},
		"a directory":              {func() { _ = os.Remove(copied); _ = os.Mkdir(copied, 0o755) }, "is not a regular file"},
		"a pipe nobody writes to":  {func() { _ = os.Remove(copied); _ = syscall.Mkfifo(copied, 0o755) }, "is not a regular file"},
		"what is not there at all": {func() { _ = os.Remove(copied) }, "no such file"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			c.make()
			if _, err := external.Checksum(copied); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	for _, text := range []string{"", "abc", strings.Repeat("zz", 32), strings.Repeat("00", 31), strings.Repeat("00", 33)} {
		if _, err := external.ParseChecksum(text); err == nil {
			t.Errorf("%q was taken for a checksum", text)
		}
	}
}
