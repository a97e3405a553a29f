// Package machine boots a real systemd as the first process of a container of its own: Debian's
// systemd-nspawn over a copy-on-write view of this machine's files, with a network, cgroups and a D-Bus
// of its own. Nothing that happens in it leaves a trace outside.
//
// It returns errors and never calls testing functions, so that a program can use it too.
package machine

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// startTime is how long the boot may take, which takes two seconds on an idle machine.
	startTime = 2 * time.Minute
	// stopTime is how long it may take to power off before it is killed.
	stopTime = 30 * time.Second
)

// target is what is booted: D-Bus, and nothing else of what the machine outside would start.
const target = `[Unit]
Description=A machine of the lab
Requires=basic.target
Wants=dbus.service
After=basic.target dbus.service
AllowIsolate=yes
`

// Machine is a booted system. Only one goroutine may boot and stop it.
type Machine struct {
	dir     string
	cgroups []string
	booted  *exec.Cmd
	exited  chan struct{} // closed when booted has ended
	leader  int           // the PID, outside, of its first process
	console *os.File
	mounted []string // to unmount, last first
	// Netns is the path of a network namespace to boot in; empty is one of its own with nothing in it.
	netns string
}

// Config says what is special about a machine; the zero value is fine.
type Config struct {
	// Netns is the path of a network namespace to boot in, as /run/netns/NAME; empty is one of its own
	// with nothing but the loopback interface.
	Netns string
}

// Available says why there can be no machine here, or nil.
func Available() error {
	if os.Geteuid() != 0 {
		return errors.New("a machine of its own needs root")
	}
	for _, program := range []string{"systemd-nspawn", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%s is not installed (Debian: apt-get install systemd-container)", program)
		}
	}
	for _, file := range []string{"/lib/systemd/systemd", "/usr/bin/dbus-daemon"} {
		if _, err := os.Stat(file); err != nil {
			return fmt.Errorf("%s is not installed (Debian: apt-get install systemd dbus)", file)
		}
	}
	return nil
}

// Boot makes a machine and boots it.
func Boot(ctx context.Context, c Config) (_ *Machine, err error) {
	dir, err := os.MkdirTemp("", "assay-machine-")
	if err != nil {
		return nil, err
	}
	m := &Machine{dir: dir, netns: c.Netns}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if err := m.mountRoot(); err != nil {
		return nil, err
	}
	if err := m.furnish(); err != nil {
		return nil, err
	}
	if err := m.makeCgroups(); err != nil {
		return nil, err
	}
	return m, m.Up(ctx)
}

// Root is the machine's root directory as it is seen from outside.
func (m *Machine) Root() string { return filepath.Join(m.dir, "root") }

// Leader is the PID, outside, of the machine's first process.
func (m *Machine) Leader() int { return m.leader }

func (m *Machine) mount(source, to, kind, options string) error {
	if err := syscall.Mount(source, to, kind, 0, options); err != nil {
		return fmt.Errorf("mount %s at %s: %w", kind, to, err)
	}
	m.mounted = append(m.mounted, to)
	return nil
}

// mountRoot lays a layer of memory over the files of the machine outside.
func (m *Machine) mountRoot() error {
	layer := filepath.Join(m.dir, "layer")
	for _, dir := range []string{layer, m.Root()} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	if err := m.mount("assay-layer", layer, "tmpfs", "mode=0755"); err != nil {
		return err
	}
	upper, work := filepath.Join(layer, "upper"), filepath.Join(layer, "work")
	for _, dir := range []string{upper, work} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	return m.mount("assay-root", m.Root(), "overlay", "lowerdir=/,upperdir="+upper+",workdir="+work)
}

// furnish gives the machine a name and a target of its own, and takes away what is enabled outside, and what an
// Assay keeps that is used there.
func (m *Machine) furnish() error {
	id := make([]byte, 16)
	_, _ = rand.Read(id)
	if err := m.Write("/etc/machine-id", hex.EncodeToString(id)+"\n"); err != nil {
		return err
	}
	units := filepath.Join(m.Root(), "etc/systemd/system")
	wants, err := filepath.Glob(filepath.Join(units, "*.wants"))
	if err != nil {
		return err
	}
	for _, dir := range wants {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	for _, dir := range []string{"etc/assay", "var/lib/assay"} {
		if err := os.RemoveAll(filepath.Join(m.Root(), dir)); err != nil {
			return err
		}
	}
	return m.Write("/etc/systemd/system/lab.target", target)
}

// Write makes a file in the machine, and the directories it is in.
func (m *Machine) Write(path, text string) error {
	full := filepath.Join(m.Root(), path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		return err
	}
	_ = os.Remove(full) // it may be a link to elsewhere
	return os.WriteFile(full, []byte(text), 0o644)
}

// Copy copies a file into the machine, with its mode.
func (m *Machine) Copy(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	stat, err := in.Stat()
	if err != nil {
		return err
	}
	full := filepath.Join(m.Root(), to)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		return err
	}
	out, err := os.OpenFile(full, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, stat.Mode().Perm())
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		return errors.Join(err, out.Close())
	}
	return out.Close()
}

// makeCgroups makes a cgroup for this machine alone, in each hierarchy that systemd keeps its units in.
func (m *Machine) makeCgroups() error {
	name := filepath.Base(m.dir)
	roots := []string{"/sys/fs/cgroup"}
	if !unified() {
		roots = []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"}
	}
	for _, root := range roots {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("make cgroup: %w", err)
		}
		m.cgroups = append(m.cgroups, dir)
	}
	if len(m.cgroups) == 0 {
		return errors.New("no cgroup hierarchy that systemd could use is mounted")
	}
	return nil
}

func unified() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// Up boots the machine after Down.
func (m *Machine) Up(ctx context.Context) error {
	console, err := os.OpenFile(filepath.Join(m.dir, "console"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	m.console = console
	network := "--private-network"
	if m.netns != "" {
		network = "--network-namespace-path=" + m.netns
	}
	// A shell goes into the cgroups before it becomes systemd-nspawn, which keeps the one it finds
	// itself in.
	script := `for c in $CGROUPS; do echo $$ > $c/cgroup.procs || exit 1; done; exec "$@"`
	cmd := exec.Command("sh", "-c", script, "sh", "systemd-nspawn", "--quiet", "--directory="+m.Root(), "--register=no", "--keep-unit",
		"--machine="+filepath.Base(m.dir), network, "--boot", "systemd.unit=lab.target")
	mode := "0"
	if unified() {
		mode = "1"
	}
	cmd.Env = append(os.Environ(), "CGROUPS="+strings.Join(m.cgroups, " "), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY="+mode)
	cmd.Stdout, cmd.Stderr = console, console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	m.booted, m.exited = cmd, make(chan struct{})
	go func() { defer close(m.exited); _ = cmd.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for {
		if m.leader = child(cmd.Process.Pid); m.leader != 0 {
			// systemd takes its name on the bus a moment after the bus is up.
			if _, err := m.Run(ctx, "systemctl is-active lab.target && busctl status org.freedesktop.systemd1"); err == nil {
				return nil
			}
		}
		select {
		case <-m.exited:
			return fmt.Errorf("the machine ended while it booted; its console said:\n%s", m.Console())
		case <-ctx.Done():
			return fmt.Errorf("the machine has not booted: %w; its console said:\n%s", ctx.Err(), m.Console())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// child returns the first child of a process, 0 if there is none.
func child(pid int) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0
	}
	fields := bytes.Fields(text)
	if len(fields) == 0 {
		return 0
	}
	first, _ := strconv.Atoi(string(fields[0]))
	return first
}

// Console returns the end of what the machine said on its console.
func (m *Machine) Console() string {
	text, _ := os.ReadFile(filepath.Join(m.dir, "console"))
	return string(text[max(0, len(text)-4096):])
}

// Command makes a command that will run in the machine, as its root user, outside of all units.
func (m *Machine) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	into := []string{"--target=" + strconv.Itoa(m.leader), "--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup", "--", "env", "--chdir=/", name}
	cmd := exec.CommandContext(ctx, "nsenter", append(into, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}
	return cmd
}

// Run runs a shell script in the machine and returns what it printed.
func (m *Machine) Run(ctx context.Context, script string) (string, error) {
	out, err := m.Command(ctx, "sh", "-ec", script).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w: %s", script, err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// Down powers the machine off. Its files stay; Up boots it again.
func (m *Machine) Down() error {
	if m.booted == nil {
		return nil
	}
	_ = m.booted.Process.Signal(syscall.SIGTERM) // which systemd-nspawn makes a power button of
	select {
	case <-m.exited:
	case <-time.After(stopTime):
		_ = m.booted.Process.Kill()
		if m.leader != 0 {
			_ = syscall.Kill(m.leader, syscall.SIGKILL)
		}
		<-m.exited
	}
	m.booted, m.leader = nil, 0
	return m.console.Close()
}

// Close powers the machine off and removes all of it.
func (m *Machine) Close() error {
	errs := []error{m.Down()}
	for len(m.mounted) > 0 {
		last := len(m.mounted) - 1
		if err := syscall.Unmount(m.mounted[last], syscall.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.mounted[last], err))
		}
		m.mounted = m.mounted[:last]
	}
	for _, dir := range m.cgroups {
		errs = append(errs, removeCgroup(dir))
	}
	m.cgroups = nil
	return errors.Join(append(errs, os.RemoveAll(m.dir))...)
}

// removeCgroup removes a cgroup and those below it. Those of processes that just ended are busy for a
// moment.
func removeCgroup(dir string) error {
	below, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range below {
		if entry.IsDir() {
			if err := removeCgroup(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	for range 100 {
		if err = os.Remove(dir); err == nil || !errors.Is(err, syscall.EBUSY) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}
