package podman

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// rootless is a user that is not root and has a Podman: a name, a range of subordinate users and a part of
// the unified cgroups, as systemd gives one to each user, all in a mount namespace of its own. The machine's
// list of users stays as it is.
type rootless struct {
	uid    int
	cgroup string // its name below the root of the unified hierarchy
	holder *exec.Cmd
	input  *os.File // closed, it ends the holder
}

// firstSub is the first of the user's subordinate users, of which there are subs.
const firstSub, subs = 1 << 20, 1 << 16

// holding makes the namespace and stays in it. It is told the folder and the name of the cgroup.
const holding = `set -eu
mount --make-rshared /
for file in passwd group subuid subgid; do touch /etc/$file; mount --bind "$DIR/$file" /etc/$file; done
mount -t cgroup2 none /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$CGROUP" "/sys/fs/cgroup/$CGROUP/user"
chown -R "$ID:$ID" "/sys/fs/cgroup/$CGROUP"
echo ready
read -r end || true
`

// RootlessAvailable says why there can be no private Podman of a user's own here, or nil.
func RootlessAvailable() error {
	if err := Available(); err != nil {
		return err
	}
	for tool, of := range map[string]string{"newuidmap": "uidmap", "setpriv": "util-linux", "unshare": "util-linux"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is not installed (Debian: apt-get install %s)", tool, of)
		}
	}
	text, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	if err == nil && strings.TrimSpace(string(text)) == "0" {
		err = errors.New("user namespaces are turned off (user.max_user_namespaces)")
	}
	return err
}

// newRootless makes a user whose files are in dir.
func newRootless(dir string, uid int) (_ *rootless, err error) {
	r := &rootless{uid: uid, cgroup: filepath.Base(dir)}
	for name, text := range map[string]string{
		"passwd": fmt.Sprintf("lab:x:%d:%d::%s/home:/bin/sh\n", uid, uid, dir), "group": fmt.Sprintf("lab:x:%d:\n", uid),
		"subuid": fmt.Sprintf("lab:%d:%d\n", firstSub, subs), "subgid": fmt.Sprintf("lab:%d:%d\n", firstSub, subs),
	} {
		before, err := os.ReadFile(filepath.Join("/etc", name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, name), append(before, text...), 0o644); err != nil {
			return nil, err
		}
	}
	for _, folder := range []string{".", "home", "tmp", "xdg"} {
		path := filepath.Join(dir, folder)
		if err := errors.Join(os.MkdirAll(path, 0o700), os.Chown(path, uid, uid)); err != nil {
			return nil, err
		}
	}
	theirs, ours, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	r.holder, r.input = exec.Command("unshare", "--mount", "sh", "-c", holding), ours
	r.holder.Env = append(os.Environ(), "DIR="+dir, "CGROUP="+r.cgroup, "ID="+strconv.Itoa(uid))
	r.holder.Stdin = theirs
	r.holder.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said strings.Builder
	r.holder.Stderr = &said
	out, err := r.holder.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := r.holder.Start(); err != nil {
		return nil, err
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		return nil, fmt.Errorf("make a namespace for a user: %w: %s", errors.Join(err, r.close()), said.String())
	}
	return r, nil
}

// command is a program that the user runs.
func (r *rootless) command(ctx context.Context, dir, netns, name string, args ...string) *exec.Cmd {
	const script = `echo $$ > "/sys/fs/cgroup/$CGROUP/user/cgroup.procs" && cd "$DIR" && exec setpriv --reuid "$ID" --regid "$ID" --clear-groups \
	env -i PATH="$PATH" HOME="$DIR/home" XDG_RUNTIME_DIR="$DIR/xdg" TMPDIR="$DIR/tmp" "$@"`
	into := []string{fmt.Sprintf("--mount=/proc/%d/ns/mnt", r.holder.Process.Pid)}
	if netns != "" {
		into = append(into, "--net="+netns)
	}
	cmd := exec.CommandContext(ctx, "nsenter", append(append(into, "--", "sh", "-c", script, "sh", name), args...)...)
	cmd.Env = append(os.Environ(), "DIR="+dir, "CGROUP="+r.cgroup, "ID="+strconv.Itoa(r.uid))
	return cmd
}

// Impostor starts a process of the user's in a cgroup of the user's own that has the name of the one that
// another process is in, and returns its ID. It ends with the engine.
func (e *Engine) Impostor(ctx context.Context, pid int) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return 0, err
	}
	_, path, ok := strings.Cut("\n"+string(text), "\n0::")
	if !ok {
		return 0, errors.New("the process is in no unified cgroup")
	}
	const script = `mkdir -p "/sys/fs/cgroup/$1" && echo $$ > "/sys/fs/cgroup/$1/cgroup.procs" && echo $$ && exec sleep 3600`
	own := filepath.Join(e.user.cgroup, "user", "mine", filepath.Base(strings.TrimSpace(path)))
	cmd := e.user.command(ctx, e.dir, "", "sh", "-c", script, "sh", own)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	go func() { _ = cmd.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(line))
}

// close ends what the user left running, and removes the cgroup.
func (r *rootless) close() error {
	root := "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "unified")); err == nil {
		root = filepath.Join(root, "unified")
	}
	dir := filepath.Join(root, r.cgroup)
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); <-time.After(20 * time.Millisecond) {
		if err = removeCgroups(dir); err == nil {
			break
		}
	}
	_ = r.input.Close()
	_ = r.holder.Wait()
	return err
}

// removeCgroups ends the processes in a cgroup and those below it, and removes them.
func removeCgroups(dir string) error {
	below, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range below {
		if entry.IsDir() {
			if err := removeCgroups(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return os.Remove(dir)
}
