package workload

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/systemd"
)

// told is a manager that knows the units it was told of.
type told map[string]unit

func (t told) unit(ctx context.Context, name string) (unit, error) {
	u, ok := t[name]
	if !ok {
		return unit{}, errNoUnit
	}
	return u, ctx.Err()
}

// fixture makes a procfs with the given cgroup file for process 42.
func fixture(t testing.TB, cgroup string) attestor.Process {
	t.Helper()
	proc := t.TempDir()
	if err := os.Mkdir(filepath.Join(proc, "42"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(proc, "42", "cgroup"), []byte(cgroup), 0o600); err != nil {
		t.Fatal(err)
	}
	return attestor.Process{PID: 42, Proc: proc}
}

func TestSuite(t *testing.T) {
	fragment := filepath.Join(t.TempDir(), "web@.service")
	if err := os.WriteFile(fragment, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	manager := told{
		"web@blue.service": {id: "web@blue.service", fragment: fragment, invocation: "8874385e6cbe4461a3b16fbdb63ed964", cgroup: "/system.slice/system-web.slice/web@blue.service", user: "www-data", mainPID: 42},
		"run-1.scope":      {id: "run-1.scope", fragment: "/run/systemd/transient/run-1.scope", transient: true, dropIns: []string{"/etc/systemd/system/scope.d/x.conf"}, cgroup: "/system.slice/run-1.scope"},
		"stale.service":    {id: "stale.service", fragment: fragment, stale: true, cgroup: "/system.slice/stale.service", dynamic: true},
	}
	kind := Kind()
	kind.Open = func(config any, needs attestor.Needs) (attestor.Workload, error) {
		opened, err := open(config, needs)
		if err == nil {
			opened.(*workload).manager = manager // it is what open makes
		}
		return opened, err
	}
	attestortest.RunWorkload(t, attestortest.Workload{
		Kind:   kind,
		Config: `slices = ["system.slice"]` + "\n" + `bus_address = "unix:path=/nonexistent"`,
		Cases: map[string]attestortest.Case{
			"an instance of a template": {
				Process: fixture(t, "0::/system.slice/system-web.slice/web@blue.service\n"),
				Want: []string{
					"systemd:id:web@blue.service", "systemd:fragment_path:" + fragment, "systemd:slice:system.slice", "systemd:slice:system-web.slice",
					"systemd:template:web@.service", "systemd:invocation_id:8874385e6cbe4461a3b16fbdb63ed964", "systemd:transient:false",
					"systemd:user:www-data", "systemd:exec_main:true", "systemd:dropin:none",
					"systemd:fragment_sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
				},
			},
			"a transient scope": {
				Process: fixture(t, "1:name=systemd:/system.slice/run-1.scope\n0::/elsewhere\n"),
				Want: []string{
					"systemd:id:run-1.scope", "systemd:fragment_path:/run/systemd/transient/run-1.scope", "systemd:slice:system.slice",
					"systemd:transient:true", "systemd:dropin:/etc/systemd/system/scope.d/x.conf",
				},
			},
			"a unit whose files changed after they were loaded": {
				Process: fixture(t, "0::/system.slice/stale.service/below\n"),
				Want: []string{
					"systemd:id:stale.service", "systemd:fragment_path:" + fragment, "systemd:slice:system.slice",
					"systemd:transient:false", "systemd:exec_main:false",
				},
			},
			"a user's own unit": {Process: fixture(t, "0::/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service\n")},
			"no unit":           {Process: fixture(t, "0::/docker/8874385e6cbe4461a3b16fbdb63ed964\n")},
		},
		Gone:   attestor.Process{PID: 1 << 22, Proc: "/proc"},
		README: "../README.md",
	})
}

func TestCgroups(t *testing.T) {
	for _, c := range []struct{ why, text, unit string }{
		{"the unified hierarchy", "0::/system.slice/a.service\n", "a.service"},
		{"the legacy one, with an empty unified one beside it", "9:name=systemd:/system.slice/a.service\n8:pids:/\n0::/\n", "a.service"},
		{"both", "1:name=systemd:/system.slice/a.service\n0::/system.slice/a.service\n", "a.service"},
		{"another hierarchy's name does not count", "3:cpu:/system.slice/a.service\n0::/\n", ""},
		{"the outermost unit counts", "0::/system.slice/a.service/nginx.service\n", "a.service"},
		{"a slice below a unit does not", "0::/system.slice/a.service/system.slice/nginx.service\n", "a.service"},
		{"a user's manager is one unit of the system's", "0::/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service\n", "user@1000.service"},
		{"a part that is no unit ends the search", "0::/system.slice/what/nginx.service\n", ""},
		{"an escaped name", "0::/system.slice/_cpu.service\n", "cpu.service"},
		{"a path from outside of the agent's own view", "0::/../../system.slice/nginx.service\n", ""},
		{"a cgroup that was removed", "0::/system.slice/nginx.service (deleted)\n", ""},
		{"a cgroup below a unit that was removed", "0::/system.slice/nginx.service/x (deleted)\n", ""},
		{"a path that does not begin at the root", "0::./system.slice/nginx.service\n", ""},
		{"a path without its beginning", "0::xsystem.slice/nginx.service\n", ""},
		{"a name that systemd never gives", "0::/system.slice/ng inx.service\n", ""},
		{"a name without its first part", "0::/system.slice/.service\n", ""},
		{"a kind that has no processes", "0::/system.slice/a.timer\n", ""},
		{"the root", "0::/\n", ""},
		{"nothing", "", ""},
		{"lines that are none", "0:/system.slice/a.service\n:::\nx\n", ""},
	} {
		t.Run(c.why, func(t *testing.T) {
			at, err := parse(c.text)
			if err != nil || at.unit != c.unit {
				t.Errorf("unit is %q, %v, want %q", at.unit, err, c.unit)
			}
		})
	}
	t.Run("two units are none", func(t *testing.T) {
		if at, err := parse("1:name=systemd:/system.slice/a.service\n0::/system.slice/b.service\n"); !errors.Is(err, errTwoUnits) || at.unit != "" {
			t.Errorf("unit is %q, %v", at.unit, err)
		}
	})
	t.Run("a file without an end is not read", func(t *testing.T) {
		p := fixture(t, strings.Repeat("0::/a\n", maxCgroup))
		if _, err := locate(p.Proc, p.PID); err == nil {
			t.Error("no error")
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{"", "0::/system.slice/a@b.service\n", "1:name=systemd:/_a.slice/b.scope\n0::/", "0::/a.slice//b.service"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		at, err := parse(text)
		if err == nil && at.unit != "" && (!isUnitName(at.unit) || !strings.HasPrefix(at.path, "/")) {
			t.Errorf("%+v", at)
		}
		_ = template(at.unit)
	})
}

func openWith(t testing.TB, c systemd.Config) *workload {
	t.Helper()
	log := logrus.New()
	log.SetOutput(t.Output())
	opened, err := open(&c, attestor.Needs{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return opened.(*workload) // it is what open makes
}

func TestDoubt(t *testing.T) {
	w := openWith(t, *systemd.Defaults())
	p := fixture(t, "0::/system.slice/a.service\n")
	for why, manager := range map[string]told{
		"a unit the manager does not know":  {},
		"a unit whose cgroup is another":    {"a.service": {id: "a.service", cgroup: "/system.slice/b.service"}},
		"a unit whose cgroup is only alike": {"a.service": {id: "a.service", cgroup: "/system.slice/a.serv"}},
		"a unit that has no cgroup":         {"a.service": {id: "a.service"}},
	} {
		t.Run(why, func(t *testing.T) {
			w.manager = manager
			if found, err := w.Attest(t.Context(), p); err == nil || len(found) != 0 {
				t.Errorf("selectors %v, %v", found, err)
			}
		})
	}
	t.Run("a process that is moved meanwhile", func(t *testing.T) {
		w.manager = mover(func() {
			if err := os.WriteFile(filepath.Join(p.Proc, "42", "cgroup"), []byte("0::/system.slice/b.service\n"), 0o600); err != nil {
				t.Error(err)
			}
		})
		if found, err := w.Attest(t.Context(), p); err == nil || len(found) != 0 {
			t.Errorf("selectors %v, %v", found, err)
		}
	})
	t.Run("slices that users fill are refused", func(t *testing.T) {
		for _, slice := range []string{"user.slice", "user-1000.slice", "system", "", "../x.slice"} {
			if _, err := open(&systemd.Config{Slices: []string{slice}}, attestor.Needs{}); err == nil {
				t.Errorf("%q is accepted", slice)
			}
		}
	})
	t.Run("a process without a number is no unit's main one, as a unit without one has none", func(t *testing.T) {
		main := attestor.Selector{Type: systemd.Type, Value: "exec_main:true"}
		for pid, want := range map[int]bool{0: false, 7: true, 8: false} {
			if got := attestor.NewSet(describe(place{unit: "a.service"}, unit{mainPID: uint32(min(pid, 7))}, pid)...).Has(main); got != want {
				t.Errorf("process %d is the main one: %t", pid, got)
			}
		}
	})
	t.Run("what would be two selectors in a log is none", func(t *testing.T) {
		found := describe(place{unit: "a.service"}, unit{id: "a.service", fragment: "/a\nsystemd:user:root", user: "www\x00root", stale: true}, 1)
		for _, s := range found {
			if strings.ContainsAny(s.Value, "\n\x00") {
				t.Errorf("there is %q", s)
			}
		}
	})
	t.Run("what is no unit file has no sum", func(t *testing.T) {
		big := filepath.Join(t.TempDir(), "big")
		if err := os.WriteFile(big, make([]byte, maxFragment+1), 0o600); err != nil {
			t.Fatal(err)
		}
		pipe := filepath.Join(t.TempDir(), "pipe")
		if err := syscall.Mkfifo(pipe, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{"", "/nonexistent", "/dev/zero", "/dev/null", "/", big, pipe} {
			if got := sum(path); got != "" {
				t.Errorf("%q has the sum %s", path, got)
			}
		}
	})
}

// mover is a manager during whose answer something happens.
type mover func()

func (m mover) unit(context.Context, string) (unit, error) {
	m()
	return unit{id: "a.service", cgroup: "/system.slice/a.service"}, nil
}

// A bus that is not there, is silent, or speaks another tongue gives an error in time, never selectors.
func TestBadBus(t *testing.T) {
	listen := func(t *testing.T, serve func(net.Conn)) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "bus")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go serve(conn)
			}
		}()
		return "unix:path=" + path
	}
	for why, address := range map[string]string{
		"down":   "unix:path=/nonexistent",
		"silent": listen(t, func(net.Conn) {}),
		"closing": listen(t, func(c net.Conn) {
			c.Close()
		}),
		"speaking another tongue": listen(t, func(c net.Conn) {
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			c.Close()
		}),
		"no address": "nothing",
	} {
		t.Run(why, func(t *testing.T) {
			w := openWith(t, systemd.Config{Slices: []string{"system.slice"}, BusAddress: address})
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			found, err := w.Attest(ctx, fixture(t, "0::/system.slice/a.service\n"))
			if err == nil || len(found) != 0 {
				t.Errorf("selectors %v, %v", found, err)
			}
			if found, err := w.Attest(t.Context(), fixture(t, "0::/\n")); err != nil || len(found) != 0 {
				t.Errorf("a process in no unit: selectors %v, %v", found, err)
			}
		})
	}
}
