package lab_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/test/fake/aws"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/docker"
	"github.com/assay-id/assay/test/lab/site"
)

// TestECS runs the built binaries as on a container instance: real containers where the ECS agent would put them,
// beside a stand-in for that agent and for AWS. The node is a task, too, and proves itself by its role.
func TestECS(t *testing.T) {
	if err := docker.Available(); err != nil {
		lab.Missing(t, "Docker", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const (
		account = "123456789012"
		own     = "158d1c8083dd49d6b527399fd6414f5c"
		shop    = "0f9de17a6465404e8b1b2356dc13c2f8"
		task    = "arn:aws:ecs:us-east-1:" + account + ":task/prod/"
	)
	cloud := aws.New()
	t.Cleanup(cloud.Close)
	cloud.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: account}
	is := aws.Task{ARN: task + own, Account: account, Cluster: "prod", Family: "assay", Revision: "1", Service: "agents", LaunchType: "EC2", Status: "RUNNING"}
	cloud.AddTask(is, aws.Key{ID: "ASIATASK", Secret: "x", Token: "y", Account: account, ARN: "arn:aws:sts::" + account + ":assumed-role/assay-task/" + own})

	engine, err := docker.Start(ctx)
	must(err)
	t.Cleanup(func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	})
	dir, err := os.MkdirTemp("", "lab") //nolint:usetesting // a socket's path may have 107 bytes
	must(err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := site.New(dir, "../../bin")
	must(err)
	s.ServerBlocks = fmt.Sprintf(`node_attestor "ecs" {
  account_ids       = [%q]
  regions           = ["us-east-1"]
  task_roles        = ["assay-task"]
  clusters          = ["prod"]
  lookup_task       = true
  refresh_interval  = "5s"
  access_key_id     = "AKIASERVER"
  secret_access_key = "s3cret"
  sts_endpoint      = %[2]q
  ecs_endpoint      = %[2]q
}`, account, cloud.URL())
	must(s.StartServer(ctx))
	t.Cleanup(func() { _ = s.Stop() })
	agent, err := s.NewAgent(ctx, "agent", site.AgentOptions{Blocks: fmt.Sprintf(`node_attestor "ecs" {
  metadata_uri    = %q
  credentials_uri = %q
}
workload_attestor "ecs" {
  introspection_endpoint = %q
}
workload_attestor "docker" {
  docker_socket_path = %q
}`, cloud.MetadataURI(task+own), cloud.CredentialsURI(), cloud.URL(), engine.Socket())})
	must(err)
	parent := "spiffe://" + site.TrustDomain + "/spire/agent/ecs/" + account + "/" + own
	_, err = s.ServerCLI(ctx, "entry", "create", "-parentID", parent, "-spiffeID", "spiffe://"+site.TrustDomain+"/shop",
		"-selector", "ecs:cluster:prod", "-selector", "ecs:family:shop", "-selector", "ecs:container:web", "-selector", "docker:label:team:a")
	must(err)
	must(agent.Start(ctx))
	t.Cleanup(func() { _ = agent.Stop(15 * time.Second) })

	client, err := docker.BuildStatic(ctx, dir, "github.com/assay-id/assay/test/demo/workload")
	must(err)
	_, err = engine.BuildScratch(ctx, docker.Image{Tag: "shop:latest", Program: client, Labels: map[string]string{"team": "a"}})
	must(err)
	run := func(parent string) docker.Running {
		t.Helper()
		running, err := engine.Run(ctx, docker.Container{
			Image: "shop:latest", CgroupParent: parent, Env: []string{"SPIFFE_ENDPOINT_SOCKET=unix:///assay/api.sock"},
			Binds: []string{filepath.Dir(agent.Socket) + ":/assay:ro"},
			// What the ECS agent would say of it, said by whoever may start containers.
			Labels: map[string]string{"com.amazonaws.ecs.cluster": "prod", "com.amazonaws.ecs.task-definition-family": "shop", "com.amazonaws.ecs.container-name": "web"},
		})
		must(err)
		return running
	}
	explain := func(c docker.Running) string {
		t.Helper()
		out, err := agent.CLI(ctx, "explain", "-pid", fmt.Sprint(c.PID), "-socketPath", agent.Admin)
		must(err)
		return out
	}
	web := run("/ecs/" + shop)
	t.Run("a container is what the ECS agent says of it, once it does", func(t *testing.T) {
		if out := explain(web); strings.Contains(out, "gets spiffe://") {
			t.Errorf("before:\n%s", out)
		}
		cloud.Lock()
		cloud.Tasks[task+shop] = aws.Task{ARN: task + shop, Account: account, Cluster: "prod", Family: "shop", Revision: "7", Status: "RUNNING", Containers: map[string]string{web.ID: "web"}}
		cloud.Unlock()
		if err := agent.WaitFor(ctx, "the container's identity", func() error {
			if out := engine.Output(ctx, web.ID); !strings.Contains(out, "spiffe://"+site.TrustDomain+"/shop") {
				return fmt.Errorf("it wrote %q", out)
			}
			return nil
		}); err != nil {
			t.Fatalf("%v\n%s", err, explain(web))
		}
		out := explain(web)
		for _, want := range []string{"ecs:task-arn:" + task + shop, "ecs:revision:7", "ecs:container:web", "gets spiffe://" + site.TrustDomain + "/shop"} {
			if !strings.Contains(out, want) {
				t.Errorf("%q is not in\n%s", want, out)
			}
		}
	})
	t.Run("labels alone are nothing", func(t *testing.T) {
		out := explain(run(""))
		if strings.Contains(out, "gets spiffe://") || !strings.Contains(out, "MISSING  ecs:cluster:prod") {
			t.Errorf("explain says\n%s", out)
		}
	})
	t.Run("the node is the task that ECS says it is, for as long as it runs", func(t *testing.T) {
		agents, err := s.ServerCLI(ctx, "agent", "list", "-output", "json")
		must(err)
		for _, want := range []string{"/spire/agent/ecs/" + account + "/" + own, "service:agents", "family:assay"} {
			if !strings.Contains(agents, want) {
				t.Errorf("%q is not in %s", want, agents)
			}
		}
		cloud.Lock()
		is.Status = "STOPPED"
		cloud.Tasks[task+own] = is
		cloud.Unlock()
		for {
			agents, err := s.ServerCLI(ctx, "agent", "list", "-output", "json")
			must(err)
			if !strings.Contains(agents, own) {
				break
			}
			select {
			case <-time.After(200 * time.Millisecond):
			case <-ctx.Done():
				t.Fatalf("still there: %s", agents)
			}
		}
	})
}
