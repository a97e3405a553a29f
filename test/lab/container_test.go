package lab_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/docker"
	"github.com/assay-id/assay/test/lab/site"
)

// patience is far above what any wait here takes, so that a busy machine fails nothing.
const patience = 2 * time.Minute

// TestContainer runs the built binaries beside a real engine: what an operator sees of a container,
// what does not move when a tag does, and what an engine that is away costs.
func TestContainer(t *testing.T) {
	if err := docker.Available(); err != nil {
		lab.Missing(t, "Docker", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	engine, err := docker.Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	})
	dir, err := os.MkdirTemp("", "lab") //nolint:usetesting // a socket's path may have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := site.New(dir, "../../bin")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.StartServer(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Stop() })
	token, err := s.Token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	agent, err := s.NewAgent(ctx, "agent", site.AgentOptions{Token: token, Blocks: fmt.Sprintf(
		"node_attestor \"join_token\" {}\nworkload_attestor \"docker\" {\n  docker_socket_path = %q\n}", engine.Socket())})
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agent.Stop(15 * time.Second) })

	client, err := docker.BuildStatic(ctx, dir, "github.com/assay-id/assay/test/demo/workload")
	if err != nil {
		t.Fatal(err)
	}
	image, err := engine.BuildScratch(ctx, docker.Image{Tag: "shop:latest", Program: client, Labels: map[string]string{"team": "a"}})
	if err != nil {
		t.Fatal(err)
	}
	other, err := engine.BuildScratch(ctx, docker.Image{Tag: "other:latest", Program: client, Labels: map[string]string{"team": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	create := func(path string, selectors ...string) {
		t.Helper()
		args := []string{"entry", "create", "-spiffeID", "spiffe://" + site.TrustDomain + path,
			"-parentID", "spiffe://" + site.TrustDomain + "/spire/agent/join_token/" + token}
		for _, selector := range selectors {
			args = append(args, "-selector", selector)
		}
		if _, err := s.ServerCLI(ctx, args...); err != nil {
			t.Fatal(err)
		}
	}
	create("/shop", "docker:image_config_digest:"+image, "docker:label:app:shop")
	create("/other", "docker:image_config_digest:"+other)
	run := func() docker.Running {
		t.Helper()
		running, err := engine.Run(ctx, docker.Container{
			Image: "shop:latest", Labels: map[string]string{"app": "shop", "team": "spoofed"},
			Env:   []string{"SPIFFE_ENDPOINT_SOCKET=unix:///assay/api.sock"},
			Binds: []string{filepath.Dir(agent.Socket) + ":/assay:ro"},
		})
		if err != nil {
			t.Fatal(err)
		}
		return running
	}
	saw := func(c docker.Running, text string) {
		t.Helper()
		err := agent.WaitFor(ctx, text+" from the container", func() error {
			if out := engine.Output(ctx, c.ID); !strings.Contains(out, text) {
				return fmt.Errorf("it wrote %q", out)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	explain := func(c docker.Running) string {
		t.Helper()
		out, err := agent.CLI(ctx, "explain", "-container", c.ID, "-socketPath", agent.Admin)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	first := run()
	saw(first, "spiffe://"+site.TrustDomain+"/shop")

	t.Run("explain tells the container's story", func(t *testing.T) {
		out := explain(first)
		for _, want := range []string{
			"gets spiffe://example.org/shop", "docker:label:app:shop", "image:id:" + image, "claim:image:team:a", "claim:runtime:team:spoofed",
			"MISSING  docker:image_config_digest:" + other,
		} {
			if !strings.Contains(out, want) {
				t.Errorf("it does not say %q:\n%s", want, out)
			}
		}
	})
	t.Run("a tag that moves under it does not move its identity", func(t *testing.T) {
		if err := engine.Tag(ctx, other, "shop:latest"); err != nil {
			t.Fatal(err)
		}
		out := explain(first)
		if !strings.Contains(out, "gets spiffe://example.org/shop") || strings.Contains(out, "image:id:"+other) {
			t.Errorf("it took the other image's identity:\n%s", out)
		}
		second := run() // of the same name, and now another image
		saw(second, "spiffe://"+site.TrustDomain+"/other")
	})
	t.Run("an engine that is away costs a known container nothing, and comes back by itself", func(t *testing.T) {
		if err := engine.Down(); err != nil {
			t.Fatal(err)
		}
		if out := explain(first); !strings.Contains(out, "gets spiffe://example.org/shop") {
			t.Errorf("the container lost its identity:\n%s", out)
		}
		if err := engine.Up(ctx); err != nil {
			t.Fatal(err)
		}
		third := run()
		saw(third, "spiffe://"+site.TrustDomain+"/other")
	})
}
