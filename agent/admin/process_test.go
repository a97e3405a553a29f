package admin

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fakeProc writes a procfs with these processes: PID, PID inside, cgroup file.
func fakeProc(t *testing.T, processes ...[3]any) string {
	t.Helper()
	proc := t.TempDir()
	for _, p := range processes {
		dir := filepath.Join(proc, fmt.Sprint(p[0]))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{
			"cgroup": fmt.Sprint(p[2]), "status": fmt.Sprintf("Name:\tx\nNSpid:\t%v\t%v\n", p[0], p[1]),
		} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return proc
}

func TestContainers(t *testing.T) {
	outer, inner := strings.Repeat("0123456789ab", 6)[:64], strings.Repeat("ba9876543210", 6)[:64]
	for _, c := range []struct{ name, cgroup, want string }{
		{"cgroup v2, systemd driver", "0::/system.slice/docker-" + outer + ".scope\n", outer},
		{"cgroup v1", "12:pids:/docker/" + outer + "\n1:name=systemd:/docker/" + outer + "\n", outer},
		{"kubernetes", "0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + outer + ".scope\n", outer},
		{"podman", "0::/user.slice/user-1000.slice/libpod-" + outer + ".scope/container\n", outer},
		{"a container in a container", "0::/docker/" + outer + "/docker/" + inner + "\n", inner},
		{"none", "0::/user.slice/session-1.scope\n", ""},
		{"garbage", "nonsense\n::\n", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, cgroup := cgroupOf(fakeProc(t, [3]any{10, 10, c.cgroup}), 10)
			if got != c.want || got != "" && !strings.Contains(cgroup, got) {
				t.Errorf("got %q in %q", got, cgroup)
			}
		})
	}
	t.Run("the container's first process is meant", func(t *testing.T) {
		line := "0::/docker/" + outer + "\n"
		proc := fakeProc(t, [3]any{7, 40, line}, [3]any{30, 1, line}, [3]any{31, 12, line}, [3]any{5, 5, "0::/\n"})
		got, err := inContainer(proc, outer[:12])
		if err != nil || !slices.Equal(got, []int{30, 7, 31}) {
			t.Errorf("got %v, %v", got, err)
		}
	})
}

func TestTheCgroupThatIsShownIsNotTheRootOfAnUnusedHierarchy(t *testing.T) {
	for text, want := range map[string]string{
		"2:pids:/\n1:name=systemd:/system.slice/web.service\n0::/\n": "/system.slice/web.service",
		"1:name=systemd:/system.slice/web.service\n2:pids:/\n0::/\n": "/system.slice/web.service",
		"1:name=systemd:/old\n0::/system.slice/web.service\n":        "/system.slice/web.service",
		"0::/\n": "/",
	} {
		if container, cgroup := cgroupOf(fakeProc(t, [3]any{10, 10, text}), 10); container != "" || cgroup != want {
			t.Errorf("%q: %q in %q", text, container, cgroup)
		}
	}
}
