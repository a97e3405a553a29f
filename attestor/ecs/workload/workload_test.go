package workload

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/ecs"
	"github.com/assay-id/assay/test/fake/aws"
)

const (
	account = "123456789012"
	taskID  = "158d1c8083dd49d6b527399fd6414f5c"
	arn     = "arn:aws:ecs:us-east-1:" + account + ":task/prod/" + taskID
	plainID = "ea32192c8553fbff06c9340478a2ff089b2bb5646fb718b4ee206641c9086d66"
	otherID = "3f2c1b0a9e8d7c6b5a4f3e2d1c0b9a8f7e6d5c4b3a2f1e0d9c8b7a6f5e4d3c2b"
	oldARN  = "arn:aws:ecs:us-east-1:" + account + ":task/0f9de17a-6465-404e-8b1b-2356dc13c2f8"
	oldID   = "1111111111111111111111111111111111111111111111111111111111111111"
)

// hostWith is a container instance with two tasks.
func hostWith(t testing.TB) *aws.Cloud {
	t.Helper()
	c := aws.New()
	t.Cleanup(c.Close)
	c.Tasks[arn] = aws.Task{
		ARN: arn, Cluster: "prod", Family: "shop", Revision: "26", Status: "RUNNING",
		Containers: map[string]string{plainID: "web", "22" + plainID[2:]: "log"},
	}
	c.Tasks[oldARN] = aws.Task{ARN: oldARN, Family: "batch", Revision: "1", Status: "RUNNING", Containers: map[string]string{oldID: "job"}}
	return c
}

// processes makes a /proc with processes in cgroups.
func processes(t testing.TB, cgroups ...string) (proc string) {
	t.Helper()
	proc = t.TempDir()
	for i, text := range cgroups {
		dir := filepath.Join(proc, strconv.Itoa(i+1))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(text, ":") {
			text = "0::" + text
		}
		for name, text := range map[string]string{"cgroup": text + "\n", "mountinfo": "30 20 0:26 /system.slice/docker-" + plainID + ".scope /x ro - cgroup2 cgroup rw\n"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return proc
}

func slice(task, id string) string {
	return "/ecstasks.slice/ecstasks-" + task + ".slice/docker-" + id + ".scope"
}

var web = []string{
	"ecs:account_id:" + account, "ecs:region:us-east-1", "ecs:cluster:prod", "ecs:task-arn:" + arn, "ecs:family:shop", "ecs:revision:26", "ecs:container:web",
}

func TestSuite(t *testing.T) {
	c := hostWith(t)
	cases := map[string]attestortest.Case{}
	for why, one := range map[string]struct {
		cgroup string
		want   []string
	}{
		"limits for tasks, by systemd":                                 {slice(taskID, plainID), web},
		"limits for tasks, by cgroupfs":                                {"4:memory:/ecs/" + taskID + "/" + plainID + "\n1:name=systemd:/ecs/" + taskID + "/" + plainID, web},
		"limits for tasks, with the cluster in the path":               {"1:name=systemd:/ecs/prod/" + taskID + "/" + plainID, web},
		"no limits for tasks, by systemd":                              {"/system.slice/docker-" + plainID + ".scope", web},
		"no limits for tasks, by cgroupfs":                             {"1:name=systemd:/docker/" + plainID, web},
		"an agent that is a task itself sees the container of another": {"/../../ecstasks-" + taskID + ".slice/docker-" + plainID + ".scope", web},
		"an agent in a container sees a whole path behind its steps":   {"/../.." + slice(taskID, plainID), web},
		"an agent that is a container of the same task":                {"/../docker-" + plainID + ".scope", web},
		"an ARN of before 2018 takes its cluster from the host": {"/docker/" + oldID, []string{
			"ecs:account_id:" + account, "ecs:region:us-east-1", "ecs:cluster:default", "ecs:task-arn:" + oldARN, "ecs:family:batch", "ecs:revision:1", "ecs:container:job",
		}},
		"a container that is not of a task":                   {"/system.slice/docker-" + otherID + ".scope", nil},
		"a plain process":                                     {"/system.slice/ssh.service", nil},
		"a cgroup that a user made in his own slice":          {"/user.slice/user-1000.slice/user@1000.service/ecstasks.slice/ecstasks-" + taskID + ".slice/docker-" + plainID + ".scope", nil},
		"one seen from a container":                           {"/../../user.slice/user-1000.slice/user@1000.service/docker-" + plainID + ".scope", nil},
		"a service's own cgroup":                              {"/system.slice/evil.service/docker-" + plainID + ".scope", nil},
		"a cgroup within a container":                         {slice(taskID, plainID) + "/docker-" + otherID + ".scope", nil},
		"an ID that is none":                                  {"/docker/" + plainID[:63], nil},
		"a process at the root whose mounts name a container": {"/", nil},
	} {
		cases[why] = attestortest.Case{Process: attestor.Process{PID: 1, Proc: processes(t, one.cgroup)}, Want: one.want}
	}
	attestortest.RunWorkload(t, attestortest.Workload{
		Kind: Kind(), Config: fmt.Sprintf("introspection_endpoint = %q\ntimeout = %q", c.URL(), patience), Cases: cases,
		Gone: attestor.Process{PID: 7, Proc: processes(t)}, README: "../README.md",
	})
}

func TestSidecar(t *testing.T) {
	c := aws.New()
	t.Cleanup(c.Close)
	id := taskID + "-2495160603"
	c.Tasks[arn] = aws.Task{
		ARN: arn, Cluster: "arn:aws:ecs:us-east-1:" + account + ":cluster/prod", Family: "shop", Revision: "26", Service: "front", LaunchType: "FARGATE",
		Status: "RUNNING", Containers: map[string]string{id: "web"},
	}
	const sha = "1f9bfba2ec4cb7dc0c29d1ffd6e4bd7dfb5a1eb0e97b1f2f6a8e0d8d5b7a9e3c"
	imageID := ""
	config := fmt.Sprintf("sidecar = true\nmetadata_uri = %q\ntimeout = %q", c.MetadataURI(arn), patience)
	opened, err := Kind().Open(&ecs.WorkloadConfig{Sidecar: true, MetadataURI: c.MetadataURI(arn), Timeout: patience}, attestor.Needs{})
	if err != nil {
		t.Fatal(err)
	}
	path := "1:name=systemd:/ecs/" + taskID + "/"
	found, err := opened.Attest(t.Context(), attestor.Process{PID: 1, Proc: processes(t, path+id)})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range found {
		if strings.HasPrefix(s.Value, "image-id:sha256:") && len(s.Value) == len("image-id:sha256:"+sha) {
			imageID = s.String()
		}
	}
	attestortest.RunWorkload(t, attestortest.Workload{
		Kind: Kind(), Config: config, README: "../README.md", Gone: attestor.Process{PID: 7, Proc: processes(t)},
		Cases: map[string]attestortest.Case{
			"a container of the task": {
				Process: attestor.Process{PID: 1, Proc: processes(t, path+id)},
				Want:    append(slices.Clone(web), "ecs:service:front", "ecs:launch-type:FARGATE", imageID),
			},
			"one that ECS does not name":      {Process: attestor.Process{PID: 1, Proc: processes(t, path+taskID+"-7")}},
			"a host's container":              {Process: attestor.Process{PID: 1, Proc: processes(t, slice(taskID, plainID))}},
			"a path with something before it": {Process: attestor.Process{PID: 1, Proc: processes(t, "/x/ecs/"+taskID+"/"+id)}},
		},
	})
	t.Run("a container in the cgroup of another task", func(t *testing.T) {
		other := "0f9de17a6465404e8b1b2356dc13c2f8"
		if s, err := opened.Attest(t.Context(), attestor.Process{PID: 1, Proc: processes(t, "1:name=systemd:/ecs/"+other+"/"+taskID+"-1")}); err == nil {
			t.Errorf("it shows %v", s)
		}
	})
}

func TestASidecarsMetadataServiceThatIsNotToBeBelieved(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	id := taskID + "-2495160603"
	say := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) }
	}
	const containers = `"Cluster":"prod","Family":"shop","Revision":"26","Containers":[`
	for why, h := range map[string]http.HandlerFunc{
		"it hangs": func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
		},
		"it redirects":                 func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) },
		"it floods":                    func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 2<<20)) },
		"it babbles":                   say("hello"),
		"it fails":                     func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) },
		"it names no task":             say(`{"TaskARN":"arn:aws:ecs:us-east-1:` + account + `:task/../x",` + containers + `{"DockerId":"` + id + `","Name":"web"}]}`),
		"it names another task":        say(`{"TaskARN":"arn:aws:ecs:us-east-1:` + account + `:task/prod/0f9de17a6465404e8b1b2356dc13c2f8",` + containers + `{"DockerId":"` + id + `","Name":"web"}]}`),
		"it names the container twice": say(`{"TaskARN":"` + arn + `",` + containers + `{"DockerId":"` + id + `","Name":"web"},{"DockerId":"` + id + `","Name":"db"}]}`),
	} {
		t.Run(why, func(t *testing.T) {
			s := httptest.NewServer(h)
			t.Cleanup(s.Close)
			opened, err := Kind().Open(&ecs.WorkloadConfig{Sidecar: true, MetadataURI: s.URL + "/v4/x", Timeout: patienceWith(why)}, attestor.Needs{})
			if err != nil {
				t.Fatal(err)
			}
			p := attestor.Process{PID: 1, Proc: processes(t, "1:name=systemd:/ecs/"+taskID+"/"+id)}
			if found, err := opened.Attest(t.Context(), p); err == nil || len(found) > 0 {
				t.Errorf("%v, %v", found, err)
			}
		})
	}
}

// patience is what an answer may take that comes, however loaded the machine.
const patience = "1m"

// patienceWith is shorter with who hangs, where it runs out.
func patienceWith(why string) string {
	if why == "it hangs" {
		return "300ms"
	}
	return patience
}

func openAt(t *testing.T, url, timeout string) *workload {
	t.Helper()
	opened, err := Kind().Open(&ecs.WorkloadConfig{IntrospectionEndpoint: url, Timeout: timeout}, attestor.Needs{})
	if err != nil {
		t.Fatal(err)
	}
	return opened.(*workload) // it is this package's
}

func TestAnECSAgentThatIsNotToBeBelieved(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	say := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) }
	}
	const containers = `"Family":"shop","Version":"26","Containers":[{"DockerId":"`
	for why, h := range map[string]http.HandlerFunc{
		"it hangs": func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
		},
		"it redirects":                                    func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) },
		"it floods":                                       func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 2<<20)) },
		"it babbles":                                      say("hello"),
		"it fails":                                        func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) },
		"it names another container":                      say(`{"Arn":"` + arn + `",` + containers + otherID + `","Name":"web"}]}`),
		"it names the beginning of the ID":                say(`{"Arn":"` + arn + `",` + containers + plainID[:12] + `","Name":"web"}]}`),
		"it names the container twice":                    say(`{"Arn":"` + arn + `",` + containers + plainID + `","Name":"web"},{"DockerId":"` + plainID + `","Name":"db"}]}`),
		"it names no container":                           say(`{"Arn":"` + arn + `","Family":"shop","Version":"26","Containers":[]}`),
		"its task is another than the cgroup's":           say(`{"Arn":"arn:aws:ecs:us-east-1:` + account + `:task/prod/0f9de17a6465404e8b1b2356dc13c2f8",` + containers + plainID + `","Name":"web"}]}`),
		"its task is none":                                say(`{"Arn":"arn:aws:ecs:us-east-1:` + account + `:task/../x",` + containers + plainID + `","Name":"web"}]}`),
		"it does not know a container in a task's cgroup": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) },
	} {
		t.Run(why, func(t *testing.T) {
			s := httptest.NewServer(h)
			t.Cleanup(s.Close)
			w := openAt(t, s.URL, patienceWith(why))
			p := attestor.Process{PID: 1, Proc: processes(t, slice(taskID, plainID))}
			if found, err := w.Attest(t.Context(), p); err == nil || len(found) > 0 {
				t.Errorf("%v, %v", found, err)
			}
			if again := w.again(); !slices.Equal(again, []int{1}) {
				t.Errorf("to be attested again: %v", again)
			}
		})
	}
	t.Run("nobody listens", func(t *testing.T) {
		s := httptest.NewServer(http.NotFoundHandler())
		s.Close()
		found, err := openAt(t, s.URL, patience).Attest(t.Context(), attestor.Process{PID: 1, Proc: processes(t, slice(taskID, plainID))})
		if err == nil || !strings.Contains(err.Error(), "nobody listens") {
			t.Errorf("%v, %v", found, err)
		}
	})
	t.Run("another user listens where the ECS agent would", func(t *testing.T) {
		c := hostWith(t)
		w := openAt(t, c.URL(), patience)
		_, port, err := net.SplitHostPort(strings.TrimPrefix(c.URL(), "http://"))
		if err != nil {
			t.Fatal(err)
		}
		number, _ := strconv.Atoi(port)
		dir := t.TempDir()
		row := fmt.Sprintf("   1: 0100007F:%04X 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 22 1 0 100 0 0 10 0\n", number)
		if err := os.WriteFile(filepath.Join(dir, "tcp"), []byte("  sl  local_address\n"+row), 0o600); err != nil {
			t.Fatal(err)
		}
		w.listener = func() error { return checkListener(dir, port, 0) }
		found, err := w.Attest(t.Context(), attestor.Process{PID: 1, Proc: processes(t, slice(taskID, plainID))})
		if err == nil || !strings.Contains(err.Error(), "user 1000") {
			t.Errorf("%v, %v", found, err)
		}
		if c.Asked["v1"] != 0 {
			t.Error("it was asked")
		}
	})
}

func TestWhatIsKnownIsNotAskedAgain(t *testing.T) {
	c := hostWith(t)
	w := openAt(t, c.URL(), patience)
	p := attestor.Process{PID: 1, Proc: processes(t, slice(taskID, plainID))}
	for range 3 {
		if found, err := w.Attest(t.Context(), p); err != nil || len(found) != len(web) {
			t.Fatalf("%v, %v", found, err)
		}
	}
	if c.Asked["v1"] != 1 {
		t.Errorf("asked %d times", c.Asked["v1"])
	}
}

func TestAContainerThatTheECSAgentLearnsOfLater(t *testing.T) {
	c := hostWith(t)
	task := c.Tasks[arn]
	delete(c.Tasks, arn)
	w := openAt(t, c.URL(), patience)
	p := attestor.Process{PID: 1, Proc: processes(t, "/docker/"+plainID)}
	if found, err := w.Attest(t.Context(), p); err != nil || len(found) > 0 {
		t.Fatalf("%v, %v", found, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	told, ended := make(chan int, 16), make(chan error, 1)
	go func() {
		ended <- w.Watch(ctx, func(pids ...int) {
			for _, pid := range pids {
				select {
				case told <- pid:
				default:
				}
			}
		})
	}()
	if pid := <-told; pid != 1 {
		t.Errorf("told of %d", pid)
	}
	c.Lock()
	c.Tasks[arn] = task
	c.Unlock()
	if found, err := w.Attest(t.Context(), p); err != nil || len(found) != len(web) {
		t.Errorf("%v, %v", found, err)
	}
	if again := w.again(); len(again) > 0 {
		t.Errorf("still to be attested again: %v", again)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	t.Run("one that stays unknown, or has ended, is left alone", func(t *testing.T) {
		now := time.Now()
		w.now = func() time.Time { return now }
		p := attestor.Process{PID: 1, Proc: processes(t, "/docker/"+otherID)}
		_, _ = w.Attest(t.Context(), p)
		now = now.Add(missedTime + time.Second)
		if again := w.again(); len(again) > 0 {
			t.Errorf("%v", again)
		}
		_, _ = w.Attest(t.Context(), p)
		if err := os.RemoveAll(filepath.Join(p.Proc, "1")); err != nil {
			t.Fatal(err)
		}
		if again := w.again(); len(again) > 0 {
			t.Errorf("%v", again)
		}
	})
}

func TestConfig(t *testing.T) {
	t.Setenv("ECS_CONTAINER_METADATA_URI_V4", "")
	for why, c := range map[string]ecs.WorkloadConfig{
		"an agent elsewhere":            {IntrospectionEndpoint: "http://10.0.0.1:51678"},
		"by name":                       {IntrospectionEndpoint: "http://localhost:51678"},
		"with a path":                   {IntrospectionEndpoint: "http://127.0.0.1:51678/v1"},
		"without a port":                {IntrospectionEndpoint: "http://127.0.0.1"},
		"both":                          {IntrospectionEndpoint: "http://127.0.0.1:51678", Sidecar: true},
		"a URI for none":                {MetadataURI: "http://169.254.170.2/v4/x"},
		"a sidecar of nothing":          {Sidecar: true},
		"a sidecar that asks elsewhere": {Sidecar: true, MetadataURI: "http://203.0.113.7/v4/x"},
		"a time that is none":           {Timeout: "soon"},
	} {
		if _, err := Kind().Open(&c, attestor.Needs{}); err == nil {
			t.Errorf("%s: accepted", why)
		}
	}
	for why, c := range map[string]ecs.WorkloadConfig{
		"nothing said": {}, "a sidecar": {Sidecar: true, MetadataURI: "http://169.254.170.2/v4/x"},
	} {
		if _, err := Kind().Open(&c, attestor.Needs{}); err != nil {
			t.Errorf("%s: %v", why, err)
		}
	}
}

func FuzzLayout(f *testing.F) {
	f.Add(slice(taskID, plainID))
	f.Add("/../../ecs/" + taskID + "/" + plainID)
	f.Fuzz(func(t *testing.T, path string) {
		for _, l := range []layout{{}, {sidecar: true}} {
			name, foreign := l.Cgroup(path)
			if foreign || name.ID != "" && (!strings.HasSuffix(strings.TrimSuffix(path, ".scope"), name.ID) || strings.Contains(path, "user.slice")) {
				t.Errorf("%q: %+v", path, name)
			}
		}
	})
}
