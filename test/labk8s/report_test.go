package labk8s

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// report collects the times for the end. They are printed, never judged: machines differ.
type report struct {
	rows []string
}

func (r *report) add(what string, times ...time.Duration) {
	if len(times) == 0 {
		return
	}
	slices.Sort(times)
	at := func(p int) time.Duration { return times[min(len(times)-1, len(times)*p/100)].Round(time.Millisecond) }
	r.rows = append(r.rows, fmt.Sprintf("%-72s %4d %10s %10s", what, len(times), at(50), at(99)))
}

func (r *report) note(what, value string) {
	r.rows = append(r.rows, fmt.Sprintf("%-72s %26s", what, value))
}

func (r *report) print(t *testing.T) {
	text := fmt.Sprintf("%-72s %4s %10s %10s\n%s\n", "Kubernetes on one node", "n", "p50", "p99", strings.Join(r.rows, "\n"))
	t.Logf("\n%s", text)
	if path := os.Getenv("LAB_REPORT"); path != "" {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Error(err)
		}
	}
}

// mainPID is the process of a pod's container, as the node sees it.
func (w *world) mainPID(t *testing.T, p *corev1.Pod) int {
	t.Helper()
	found := 0
	eventually(t, "pod "+p.Name+" has a process", func() error {
		each(func(pid int, dir string) {
			text, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
			line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
			if strings.Contains(string(text), "pod"+string(p.UID)+"/") && strings.HasPrefix(string(line), "/pod\x00") {
				found = pid
			}
		})
		if found == 0 {
			return fmt.Errorf("it has none")
		}
		return nil
	})
	return found
}

// processOf is the process of one of ours in a pod.
func (w *world) processOf(t *testing.T, name string) int {
	t.Helper()
	found := 0
	each(func(pid int, dir string) {
		text, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if strings.Contains(string(text), "kubepods") && strings.HasPrefix(string(line), "/bin/"+name+"\x00") {
			found = pid
		}
	})
	if found == 0 {
		t.Fatalf("no process of %s", name)
	}
	return found
}

func each(f func(pid int, dir string)) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		var pid int
		if _, err := fmt.Sscan(filepath.Base(dir), &pid); err == nil {
			f(pid, dir)
		}
	}
}

// cpuOf is the processor time of a process, which the kernel counts in hundredths of a second.
func cpuOf(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var user, system int64
	_, _ = fmt.Sscan(fields[11], &user)
	_, _ = fmt.Sscan(fields[12], &system)
	return time.Duration(user+system) * 10 * time.Millisecond
}

func rssOf(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strings.Join(strings.Fields(rest), " ")
		}
	}
	return "?"
}
