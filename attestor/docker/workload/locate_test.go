package workload

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor/cgroup"
	fake "github.com/assay-id/assay/test/fake/docker"
)

const (
	idA = "3f2c1b0a9e8d7c6b5a4f3e2d1c0b9a8f7e6d5c4b3a2f1e0d9c8b7a6f5e4d3c2b"
	idB = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
)

func newTestLocator(t testing.TB, pods bool, matchers ...string) *locator {
	t.Helper()
	l, err := newLocator(matchers, pods)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLayouts(t *testing.T) {
	layouts, err := filepath.Glob("../testdata/layouts/*")
	if err != nil || len(layouts) == 0 {
		t.Fatalf("no layouts: %v", err)
	}
	l := newTestLocator(t, false)
	for _, layout := range layouts {
		t.Run(filepath.Base(layout), func(t *testing.T) {
			read := func(name string) string {
				text, err := os.ReadFile(filepath.Join(layout, name))
				if err != nil && name != "mountinfo" {
					t.Fatal(err)
				}
				return string(text)
			}
			proc := t.TempDir()
			if err := fake.WriteProcess(proc, 7, read("cgroup"), read("mountinfo")); err != nil {
				t.Fatal(err)
			}
			want := strings.TrimSpace(read("want"))
			at, err := l.locate(proc, 7)
			if (err != nil) != (want == "error") {
				t.Fatalf("error is %v", err)
			}
			if err == nil && at.ID != want {
				t.Errorf("container is %q, want %q", at.ID, want)
			}
			if at.Prefix != "" && !strings.Contains(at.Prefix, at.ID) {
				t.Errorf("cgroup %q does not name %q", at.Prefix, at.ID)
			}
		})
	}
}

func TestLocator(t *testing.T) {
	locate := func(t *testing.T, l *locator, text string) string {
		t.Helper()
		proc := t.TempDir()
		if err := fake.WriteProcess(proc, 7, text, ""); err != nil {
			t.Fatal(err)
		}
		at, err := l.locate(proc, 7)
		if err != nil {
			t.Fatal(err)
		}
		return at.ID
	}
	t.Run("pods are attested when asked for", func(t *testing.T) {
		l := newTestLocator(t, true)
		if got := locate(t, l, "0::/kubepods/besteffort/pod1/"+idA+"\n"); got != idA {
			t.Errorf("container is %q", got)
		}
	})
	t.Run("configured matchers replace the layouts", func(t *testing.T) {
		l := newTestLocator(t, false, "/docker/<id>", "/my.slice/*/<id>/*", "/kubepods/*/<id>")
		for path, want := range map[string]string{
			"/docker/" + idA:                 idA,
			"/my.slice/x/" + idA + "/y":      idA,
			"/my.slice/x/" + idA:             "",
			"/docker/" + idA + "/y":          "",
			"/system.slice/" + idA:           "",
			"/kubepods/burstable/" + idA:     idA,
			"/my.slice/x/" + idA[:60] + "/y": "",
			"/docker/" + idA + "x":           "",
		} {
			if got := locate(t, l, "0::"+path+"\n"); got != want {
				t.Errorf("in %s container is %q, want %q", path, got, want)
			}
		}
	})
	t.Run("a matcher that cannot match is refused", func(t *testing.T) {
		for _, matcher := range []string{"", "/docker", "/docker/<id>/<id>", "/docker-<id>", "/a//<id>", "/a*/<id>", "/<x>/<id>"} {
			if _, err := newLocator([]string{matcher}, false); err == nil {
				t.Errorf("%q is accepted", matcher)
			}
		}
	})
	t.Run("a process that is gone is gone", func(t *testing.T) {
		if _, err := newTestLocator(t, false).locate(t.TempDir(), 7); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("an endless file is not read to its end", func(t *testing.T) {
		proc := t.TempDir()
		if err := os.Mkdir(filepath.Join(proc, "7"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/dev/zero", filepath.Join(proc, "7", "cgroup")); err != nil {
			t.Fatal(err)
		}
		if _, err := newTestLocator(t, false).locate(proc, 7); err == nil {
			t.Error("no error")
		}
	})
}

func TestInside(t *testing.T) {
	l := newTestLocator(t, false)
	at := func(text string) cgroup.Place {
		p, _, err := cgroup.Parse(text, l)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	docker := "1:name=systemd:/docker/" + idA + "\n0::/docker/" + idA
	for why, c := range map[string]struct {
		process, first string
		want           bool
	}{
		"the same cgroup":                      {docker, docker, true},
		"below it":                             {"0::/docker/" + idA + "/x", "0::/docker/" + idA, true},
		"the first process moved below it":     {"0::/docker/" + idA + "/x", "0::/docker/" + idA + "/init.scope", true},
		"a cgroup a user made of that name":    {"0::/user.slice/user-1000.slice/user@1000.service/docker-" + idA + ".scope", "0::/system.slice/docker-" + idA + ".scope", false},
		"another hierarchy":                    {"3:cpuset:/docker/" + idA, "0::/docker/" + idA, false},
		"the first process is nowhere":         {"0::/docker/" + idA, "0::/", false},
		"another container's":                  {"0::/docker/" + idA, "0::/docker/" + idB, false},
		"both at the root of what is seen":     {"0::/", "0::/", true},
		"one at the root, one in a container":  {"0::/", "0::/docker/" + idA, false},
		"at the root of one hierarchy of two":  {"0::/\n1:name=systemd:/", "0::/\n1:name=systemd:/x", false},
		"a hierarchy is missing":               {"0::/", "1:name=systemd:/", false},
		"nothing known of either":              {"3:cpuset:/", "3:cpuset:/", false},
		"a sibling whose name begins the same": {"0::/ab", "0::/a", false},
	} {
		p := at(c.process)
		if got := p.Inside(at(c.first)); got != c.want {
			t.Errorf("%s: inside is %v", why, got)
		}
	}
}

func FuzzLocate(f *testing.F) {
	layouts, err := filepath.Glob("../testdata/layouts/*")
	if err != nil {
		f.Fatal(err)
	}
	for _, layout := range layouts {
		named, err := os.ReadFile(filepath.Join(layout, "cgroup"))
		if err != nil {
			f.Fatal(err)
		}
		mounts, _ := os.ReadFile(filepath.Join(layout, "mountinfo"))
		f.Add(string(named), string(mounts))
	}
	l := newTestLocator(f, false)
	matching := newTestLocator(f, false, "/docker/<id>", "/*/<id>")
	f.Fuzz(func(t *testing.T, text, mounts string) {
		for _, l := range []*locator{l, matching} {
			at, _, err := cgroup.Parse(text, l)
			if err == nil && at.ID != "" && (!cgroup.IsID(at.ID) || !strings.Contains(at.Prefix, at.ID)) {
				t.Fatalf("container %q in cgroup %q", at.ID, at.Prefix)
			}
			if name, err := cgroup.ParseMounts(mounts, l); err == nil && name.ID != "" && !cgroup.IsID(name.ID) {
				t.Fatalf("container %q", name.ID)
			}
		}
	})
}
