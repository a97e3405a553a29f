package workload_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/unix"
	"github.com/assay-id/assay/attestor/unix/workload"
)

// TestMain lets the test binary be the workload: a child that says its PID is there and waits.
func TestMain(m *testing.M) {
	if os.Getenv("ATTESTED_CHILD") != "" {
		fmt.Println("ready")
		_, _ = os.Stdin.Read(make([]byte, 1)) // until the parent closes it
		return
	}
	os.Exit(m.Run())
}

// start runs a program as a child with the given credentials until the test ends.
func start(t *testing.T, path string, as *syscall.Credential) attestor.Process {
	t.Helper()
	cmd := exec.CommandContext(context.Background(), path)
	cmd.Env = append(os.Environ(), "ATTESTED_CHILD=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Wait()
	})
	if _, err := stdout.Read(make([]byte, 6)); err != nil {
		t.Fatalf("child did not start: %v", err)
	}
	p := attestor.Process{PID: cmd.Process.Pid, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Proc: "/proc"}
	if as != nil {
		p.UID, p.GID = as.Uid, as.Gid
	}
	return p
}

func open(t testing.TB, c unix.Config) attestor.Workload {
	t.Helper()
	log := logrus.New()
	log.SetOutput(t.Output())
	w, err := workload.Kind().Open(&c, attestor.Needs{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func attest(t *testing.T, w attestor.Workload, p attestor.Process) attestor.Set {
	t.Helper()
	found, err := w.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return attestor.NewSet(found...)
}

func has(t *testing.T, set attestor.Set, want ...string) {
	t.Helper()
	for _, text := range want {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			t.Fatal(err)
		}
		if !set.Has(s) {
			t.Errorf("no %s in %q", s, set.Strings())
		}
	}
}

func hasNone(t *testing.T, set attestor.Set, prefix string) {
	t.Helper()
	for _, s := range set.Strings() {
		if strings.HasPrefix(s, prefix) {
			t.Errorf("there is a %s", s)
		}
	}
}

func hashOf(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// copyOf copies an executable into the test's folder.
func copyOf(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	copied := filepath.Join(dir, "app")
	if err := os.WriteFile(copied, text, 0o755); err != nil {
		t.Fatal(err)
	}
	return copied
}

func TestSuite(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	child := start(t, self, nil)
	cases := map[string]attestortest.Case{
		"a fixture": {
			Process: attestor.Process{PID: 42, UID: 4294967294, GID: 4294967293, Proc: fixture(t)},
			Want: []string{
				"unix:uid:4294967294", "unix:gid:4294967293",
				"unix:supplementary_gid:0", "unix:supplementary_group:root",
				"unix:supplementary_gid:4294967292",
				"unix:path:" + self, "unix:sha256:" + hashOf(t, self),
			},
		},
		"a real process": {Process: child, Want: ofSelf(t, self)},
	}
	attestortest.RunWorkload(t, attestortest.Workload{
		Kind:   workload.Kind(),
		Config: "discover_workload_path = true\nworkload_size_limit = 0",
		Cases:  cases,
		Gone:   attestor.Process{PID: 1 << 22, Proc: "/proc"},
		README: "../README.md",
	})
}

// fixture makes a procfs with process 42, which runs this test binary.
func fixture(t *testing.T) string {
	t.Helper()
	proc := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(proc, "42"), 0o755); err != nil {
		t.Fatal(err)
	}
	status := "Name:\tapp\nUid:\t1\t2\t3\t4\nGid:\t1\t2\t3\t4\nGroups:\t0 4294967292 \nNStgid:\t42\n"
	if err := os.WriteFile(filepath.Join(proc, "42", "status"), []byte(status), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(proc, "42", "exe")); err != nil {
		t.Fatal(err)
	}
	return proc
}

func ofSelf(t *testing.T, self string) []string {
	t.Helper()
	want := []string{"unix:path:" + self, "unix:sha256:" + hashOf(t, self)}
	uid, gid := strconv.Itoa(os.Getuid()), strconv.Itoa(os.Getgid())
	want = append(want, "unix:uid:"+uid, "unix:gid:"+gid)
	if u, err := user.LookupId(uid); err == nil {
		want = append(want, "unix:user:"+u.Username)
	}
	if g, err := user.LookupGroupId(gid); err == nil {
		want = append(want, "unix:group:"+g.Name)
	}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	for _, gid := range groups {
		want = append(want, fmt.Sprintf("unix:supplementary_gid:%d", gid))
		if g, err := user.LookupGroupId(strconv.Itoa(gid)); err == nil {
			want = append(want, "unix:supplementary_group:"+g.Name)
		}
	}
	slices.Sort(want)
	return slices.Compact(want)
}

func TestWhoAsks(t *testing.T) {
	t.Run("another user's process, with its groups", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip("SKIPPED: only root can start a process as somebody else")
		}
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		app := copyOf(t, self)
		for dir := filepath.Dir(app); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		p := start(t, app, &syscall.Credential{Uid: 65534, Gid: 65534, Groups: []uint32{1, 77777}})
		set := attest(t, open(t, unix.Config{DiscoverWorkloadPath: true}), p)
		has(t, set, "unix:uid:65534", "unix:gid:65534", "unix:supplementary_gid:1", "unix:supplementary_gid:77777",
			"unix:path:"+app, "unix:sha256:"+hashOf(t, app))
		if u, err := user.LookupId("65534"); err == nil {
			has(t, set, "unix:user:"+u.Username)
		}
		if g, err := user.LookupGroupId("1"); err == nil {
			has(t, set, "unix:supplementary_group:"+g.Name)
		}
	})
	t.Run("the user is who connected, not who runs in its place by now", func(t *testing.T) {
		// The connection was made by user 1000; the process has executed a set-user-ID program since.
		set := attest(t, open(t, unix.Config{}), attestor.Process{PID: os.Getpid(), UID: 1000, GID: 1000, Proc: "/proc"})
		has(t, set, "unix:uid:1000", "unix:gid:1000")
		if os.Getuid() == 0 {
			hasNone(t, set, "unix:uid:0")
		}
	})
	t.Run("path and hash are not looked for unless asked", func(t *testing.T) {
		set := attest(t, open(t, unix.Config{}), attestor.Process{PID: os.Getpid(), Proc: "/proc"})
		hasNone(t, set, "unix:path:")
		hasNone(t, set, "unix:sha256:")
	})
}

func TestExecutable(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("a replaced executable has no path, and the hash of what runs", func(t *testing.T) {
		app := copyOf(t, self)
		sum := hashOf(t, app)
		p := start(t, app, nil)
		w := open(t, unix.Config{DiscoverWorkloadPath: true})
		has(t, attest(t, w, p), "unix:path:"+app, "unix:sha256:"+sum)
		if err := os.Rename(app, app+".old"); err != nil {
			t.Fatal(err)
		}
		has(t, attest(t, w, p), "unix:path:"+app+".old")
		if err := os.Remove(app + ".old"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(app, []byte("something else"), 0o755); err != nil {
			t.Fatal(err)
		}
		set := attest(t, w, p)
		hasNone(t, set, "unix:path:")
		has(t, set, "unix:sha256:"+sum)
	})
	t.Run("a file over the limit is not hashed", func(t *testing.T) {
		p := attestor.Process{PID: os.Getpid(), Proc: "/proc"}
		for _, limit := range []int64{-1, 1000} {
			set := attest(t, open(t, unix.Config{DiscoverWorkloadPath: true, WorkloadSizeLimit: limit}), p)
			has(t, set, "unix:path:"+self)
			hasNone(t, set, "unix:sha256:")
		}
		has(t, attest(t, open(t, unix.Config{DiscoverWorkloadPath: true, WorkloadSizeLimit: 1 << 40}), p), "unix:sha256:"+hashOf(t, self))
	})
	t.Run("one that cannot be read is an error", func(t *testing.T) {
		proc := fixture(t)
		if err := os.Remove(filepath.Join(proc, "42", "exe")); err != nil {
			t.Fatal(err)
		}
		found, err := open(t, unix.Config{DiscoverWorkloadPath: true}).
			Attest(t.Context(), attestor.Process{PID: 42, UID: 1000, GID: 1000, Proc: proc})
		if err == nil || len(found) != 0 {
			t.Errorf("selectors %q, %v", found, err)
		}
	})
	t.Run("what is no file is not opened as one", func(t *testing.T) {
		proc := fixture(t)
		exe := filepath.Join(proc, "42", "exe")
		if err := os.Remove(exe); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/dev/zero", exe); err != nil {
			t.Fatal(err)
		}
		if _, err := open(t, unix.Config{DiscoverWorkloadPath: true}).
			Attest(t.Context(), attestor.Process{PID: 42, Proc: proc}); err == nil {
			t.Error("no error")
		}
	})
	t.Run("status that is not one is an error", func(t *testing.T) {
		for _, status := range []string{"", "Groups:\tx\n", "Groups:\t-1\n", "Groups:\t4294967296\n", "Name:\tGroups:\n", "Groups:" + strings.Repeat(" 7", 2000)} {
			proc := fixture(t)
			if err := os.WriteFile(filepath.Join(proc, "42", "status"), []byte(status), 0o600); err != nil {
				t.Fatal(err)
			}
			found, err := open(t, unix.Config{}).Attest(t.Context(), attestor.Process{PID: 42, UID: 7, Proc: proc})
			if err == nil || len(found) != 0 {
				t.Errorf("status %.20q: selectors %q, %v", status, found, err)
			}
		}
	})
}

func TestGone(t *testing.T) {
	_, err := open(t, unix.Config{DiscoverWorkloadPath: true}).Attest(t.Context(), attestor.Process{PID: 1 << 22, Proc: "/proc"})
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
}

func BenchmarkAttest(b *testing.B) {
	for name, c := range map[string]unix.Config{"ids": {}, "path": {DiscoverWorkloadPath: true}} {
		b.Run(name, func(b *testing.B) {
			w := open(b, c)
			p := attestor.Process{PID: os.Getpid(), UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Proc: "/proc"}
			for b.Loop() {
				if _, err := w.Attest(b.Context(), p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
