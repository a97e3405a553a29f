package workload

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/systemd"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/machine"
)

// inside says that this test binary runs in the machine.
const inside = "ATTESTOR_INSIDE_MACHINE"

// TestRealSystemd boots a machine and runs itself in it, where it looks at what the manager runs.
func TestRealSystemd(t *testing.T) {
	if os.Getenv(inside) != "" {
		insideMachine(t)
		return
	}
	if err := machine.Available(); err != nil {
		lab.Missing(t, "a real systemd", err)
	}
	m, err := machine.Boot(t.Context(), machine.Config{})
	if err != nil {
		lab.Missing(t, "a real systemd", err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const program = "/opt/lab/attestor.test"
	if err := m.Copy(self, program); err != nil {
		t.Fatal(err)
	}
	cmd := m.Command(t.Context(), program, "-test.run=^TestRealSystemd$", "-test.v", "-test.timeout=5m")
	cmd.Env = append(cmd.Env, inside+"=1")
	out, err := cmd.CombinedOutput()
	t.Logf("in the machine:\n%s", out)
	if err != nil || !strings.Contains(string(out), "--- PASS: TestRealSystemd") {
		t.Errorf("the test in the machine did not pass: %v", err)
	}
}

func sh(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// mainOf returns the process of a unit that runs "sleep".
func mainOf(t *testing.T, unit string) attestor.Process {
	t.Helper()
	pid, err := strconv.Atoi(sh(t, "systemctl show -p MainPID --value "+unit))
	if err != nil || pid == 0 {
		t.Fatalf("%s has no main process: %v", unit, err)
	}
	return attestor.Process{PID: pid, Proc: "/proc"}
}

// expect compares what is said of a process, order aside.
func expect(t *testing.T, w *workload, p attestor.Process, want ...string) {
	t.Helper()
	found, err := w.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	got := attestor.NewSet(found...).Strings()
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("selectors are\n%q, want\n%q", got, want)
	}
}

func insideMachine(t *testing.T) {
	w := openWith(t, *systemd.Defaults())
	const text = "[Service]\nUser=nobody\nExecStart=/bin/sleep infinity\n"
	digest := sha256.Sum256([]byte(text))
	hash := hex.EncodeToString(digest[:])
	write(t, "/etc/systemd/system/plain.service", text)
	write(t, "/etc/systemd/system/many@.service", "[Service]\nSlice=system-web.slice\nExecStart=/bin/sleep infinity\n")
	write(t, "/etc/systemd/system/lent.service", "[Service]\nDelegate=yes\nExecStart=/bin/sleep infinity\n")
	sh(t, "systemctl daemon-reload; systemctl start plain.service many@blue.service lent.service")
	invocation := func(unit string) string {
		return "systemd:invocation_id:" + sh(t, "systemctl show -p InvocationID --value "+unit)
	}
	plain := []string{
		"systemd:id:plain.service", "systemd:fragment_path:/etc/systemd/system/plain.service", "systemd:slice:system.slice",
		"systemd:transient:false", "systemd:user:nobody", "systemd:exec_main:true",
	}
	t.Run("a plain service", func(t *testing.T) {
		expect(t, w, mainOf(t, "plain.service"), append(slices.Clone(plain), invocation("plain.service"),
			"systemd:dropin:none", "systemd:fragment_sha256:"+hash)...)
	})
	t.Run("an instance of a template, in a slice of its own below", func(t *testing.T) {
		write(t, "/etc/systemd/system/system-web.slice", "[Slice]\n")
		if set, err := w.Attest(t.Context(), mainOf(t, "many@blue.service")); err != nil || !slices.Contains(attestor.NewSet(set...).Strings(), "systemd:template:many@.service") {
			t.Errorf("selectors %v, %v", set, err)
		}
	})
	t.Run("a transient service", func(t *testing.T) {
		sh(t, "systemd-run --quiet --unit=fleeting sleep infinity")
		found, err := w.Attest(t.Context(), mainOf(t, "fleeting.service"))
		set := attestor.NewSet(found...)
		if err != nil || !set.Has(attestor.Selector{Type: "systemd", Value: "transient:true"}) ||
			!set.Has(attestor.Selector{Type: "systemd", Value: "fragment_path:/run/systemd/transient/fleeting.service"}) {
			t.Errorf("selectors %q, %v", set.Strings(), err)
		}
	})
	t.Run("this process, in no unit, gets nothing", func(t *testing.T) {
		expect(t, w, attestor.Process{PID: os.Getpid(), Proc: "/proc"})
	})
	t.Run("a unit outside of the slices gets nothing", func(t *testing.T) {
		sh(t, "systemd-run --quiet --slice=user.slice --unit=impostor sleep infinity")
		expect(t, w, mainOf(t, "impostor.service"))
	})
	t.Run("who names a cgroup of its own after a unit is still in its own unit", func(t *testing.T) {
		pid := inCgroup(t, mainOf(t, "lent.service").PID, "plain.service")
		found, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: "/proc"})
		set := attestor.NewSet(found...)
		if err != nil || !set.Has(attestor.Selector{Type: "systemd", Value: "id:lent.service"}) || set.Has(attestor.Selector{Type: "systemd", Value: "id:plain.service"}) {
			t.Errorf("selectors %q, %v", set.Strings(), err)
		}
		if !set.Has(attestor.Selector{Type: "systemd", Value: "exec_main:false"}) {
			t.Errorf("it is the main process: %q", set.Strings())
		}
	})
	t.Run("a cgroup named after a unit that is not loaded proves nothing", func(t *testing.T) {
		pid := inCgroup(t, mainOf(t, "plain.service").PID, "../ghost.service")
		if found, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: "/proc"}); err == nil || len(found) != 0 {
			t.Errorf("selectors %v, %v", found, err)
		}
	})
	woken := make(chan []int, 64)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Watch(ctx, func(pids ...int) { woken <- pids }) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("watch: %v", err)
		}
	}()
	wake := func(t *testing.T, do func()) {
		t.Helper()
		for {
			do()
			select {
			case pids := <-woken:
				if len(pids) != 0 {
					t.Errorf("woken for %v, want for all", pids)
				}
				return
			case <-time.After(time.Second): // the watch may not have been listening yet
			case <-t.Context().Done():
				t.Fatal("never woken")
			}
		}
	}
	t.Run("a drop-in counts when it is loaded, and the change is told", func(t *testing.T) {
		const path = "/etc/systemd/system/plain.service.d/env.conf"
		p, loaded := mainOf(t, "plain.service"), append(slices.Clone(plain), invocation("plain.service"))
		write(t, path, "[Service]\nEnvironment=A=b\n")
		expect(t, w, p, append(slices.Clone(loaded), "systemd:dropin:none", "systemd:fragment_sha256:"+hash)...)
		wake(t, func() { sh(t, "systemctl daemon-reload") })
		expect(t, w, p, append(slices.Clone(loaded), "systemd:dropin:"+path, "systemd:fragment_sha256:"+hash)...)
		sh(t, "touch --date=tomorrow "+path)
		expect(t, w, p, loaded...)
		wake(t, func() { sh(t, "systemctl daemon-reload") })
		expect(t, w, p, append(slices.Clone(loaded), "systemd:dropin:"+path, "systemd:fragment_sha256:"+hash)...)
	})
	t.Run("another start is another invocation", func(t *testing.T) {
		before := invocation("plain.service")
		sh(t, "systemctl restart plain.service")
		if after := invocation("plain.service"); after == before {
			t.Fatal("systemd gives the same invocation twice")
		}
		expect(t, w, mainOf(t, "plain.service"), append(slices.Clone(plain), invocation("plain.service"),
			"systemd:dropin:/etc/systemd/system/plain.service.d/env.conf", "systemd:fragment_sha256:"+hash)...)
	})
	t.Run("without D-Bus there is an error and nothing, and when it is back all is told", func(t *testing.T) {
		p := mainOf(t, "plain.service")
		sh(t, "systemctl stop dbus.socket dbus.service")
		if found, err := w.Attest(t.Context(), p); err == nil || len(found) != 0 {
			t.Errorf("selectors %v, %v", found, err)
		}
		for len(woken) > 0 {
			<-woken
		}
		sh(t, "systemctl start dbus.socket")
		for { // who is woken too early is woken again
			wake(t, func() {})
			if _, err := w.Attest(t.Context(), p); err == nil {
				break
			}
		}
	})
	t.Run("what it costs", func(t *testing.T) {
		p := mainOf(t, "plain.service")
		took := testing.Benchmark(func(b *testing.B) {
			for b.Loop() {
				if _, err := w.Attest(b.Context(), p); err != nil {
					b.Fatal(err)
				}
			}
		})
		t.Logf("one attestation: %s", took)
	})
}

// inCgroup starts a process in a cgroup relative to that of another process.
func inCgroup(t *testing.T, of int, name string) int {
	t.Helper()
	file, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", of))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	dir := ""
	for lines := bufio.NewScanner(file); lines.Scan(); {
		fields := strings.SplitN(lines.Text(), ":", 3)
		switch {
		case fields[1] == "name=systemd":
			dir = "/sys/fs/cgroup/systemd" + fields[2]
		case fields[1] == "" && dir == "":
			dir = "/sys/fs/cgroup" + fields[2]
		}
	}
	dir = filepath.Join(dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sleep", "infinity")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}
