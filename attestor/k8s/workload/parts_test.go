package workload

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor/cgroup"
)

func TestLayouts(t *testing.T) {
	layouts, err := filepath.Glob("../testdata/layouts/*")
	if err != nil || len(layouts) == 0 {
		t.Fatalf("no layouts: %v", err)
	}
	for _, path := range layouts {
		t.Run(filepath.Base(path), func(t *testing.T) {
			proc := t.TempDir()
			dir := filepath.Join(proc, strconv.Itoa(7))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			// One file a layout: its cgroups, "mounts:" and its mounts, "want:" and the container's ID and pod.
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			rest, want, ok := strings.Cut(string(text), "want:\n")
			groups, mounts, _ := strings.Cut(rest, "mounts:\n")
			if !ok {
				t.Fatal("the fixture does not say what it wants")
			}
			for name, text := range map[string]string{"cgroup": groups, "mountinfo": mounts} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			at, err := cgroup.Locate(proc, 7, layout{})
			got := strings.TrimSpace(at.ID + " " + at.Pod + " " + at.Container)
			if err != nil {
				got = "error"
			}
			if want = strings.TrimSpace(want); strings.Join(strings.Fields(got), " ") != want {
				t.Errorf("found %q, want %q (%v)", got, want, err)
			}
		})
	}
}

func FuzzLayout(f *testing.F) {
	id := strings.Repeat("a", 64)
	for _, path := range []string{
		"/kubepods/besteffort/pod79261129-6b60-11e9-9054-0800277ac80f/" + id,
		"/kubepods.slice/kubepods-pod79261129_6b60_11e9_9054_0800277ac80f.slice/cri-containerd-" + id + ".scope",
		"/system.slice/containerd.service/kubepods-besteffort-pod79261129_6b60_11e9_9054_0800277ac80f.slice:cri-containerd:" + id,
		"/../" + id, "/..", "/pod", "/kubepods-pod.slice:",
	} {
		f.Add(path, "/var/lib/kubelet/pods/79261129-6b60-11e9-9054-0800277ac80f/containers/main/1")
	}
	f.Fuzz(func(t *testing.T, path, root string) {
		name, _ := layout{}.Cgroup(path)
		if name.ID != "" && (!cgroup.IsID(name.ID) || !strings.HasSuffix(name.Prefix, name.ID) && !strings.HasSuffix(name.Prefix, name.ID+".scope") || !strings.HasPrefix(path, name.Prefix) && strings.HasPrefix(path, "/")) {
			t.Fatalf("container %q in %q", name.ID, name.Prefix)
		}
		if name.Pod != "" && !isUID(name.Pod) {
			t.Fatalf("pod %q", name.Pod)
		}
		if name := (layout{}).Mount(root, "/dev/termination-log"); name.Pod != "" && !isUID(name.Pod) {
			t.Fatalf("pod %q", name.Pod)
		}
	})
}

func FuzzPod(f *testing.F) {
	f.Add([]byte(`{"metadata":{"name":"a","namespace":"b","uid":"c","labels":{"x":"y"}},"spec":{"containers":[{"name":"m","image":"i"}]}}`))
	f.Add([]byte(`{"metadata":{"name":"a\n","namespace":"b","uid":"c"}}`))
	f.Fuzz(func(t *testing.T, object []byte) {
		p, err := decodePod(json.RawMessage(object))
		if err != nil {
			return
		}
		for _, s := range p.selectors {
			if err := s.Check(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func FuzzList(f *testing.F) {
	f.Add(`{"metadata":{"resourceVersion":"1"},"items":[{},{"a":1}]}`)
	f.Add(`{"items":null}`)
	f.Fuzz(func(t *testing.T, text string) {
		n := 0
		_, _, err := readList(strings.NewReader(text), func(object json.RawMessage) error {
			if !json.Valid(object) {
				t.Fatalf("%q is no JSON", object)
			}
			n++
			return nil
		})
		if err == nil && n > len(text) {
			t.Fatal("more objects than text")
		}
	})
}

func TestFullReference(t *testing.T) {
	for short, full := range map[string]string{
		"nginx":                             "docker.io/library/nginx:latest",
		"nginx:1":                           "docker.io/library/nginx:1",
		"team/app":                          "docker.io/team/app:latest",
		"localhost/app":                     "localhost/app:latest",
		"reg.example/app:1":                 "reg.example/app:1",
		"reg:5000/app":                      "reg:5000/app:latest",
		"nginx@sha256:abc":                  "docker.io/library/nginx@sha256:abc",
		"sha256:" + strings.Repeat("a", 64): "sha256:" + strings.Repeat("a", 64),
		"":                                  "",
	} {
		if got := fullReference(short); got != full {
			t.Errorf("%q is %q, want %q", short, got, full)
		}
	}
}
