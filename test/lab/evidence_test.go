package lab_test

import (
	"context"
	"encoding/json"
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

// node is a server and an agent, the built binaries, beside a real engine, for tests of image evidence.
type node struct {
	*site.Site
	t       *testing.T
	ctx     context.Context // of one test
	engine  *docker.Engine
	agent   *site.Agent
	parent  string // the agent's SPIFFE ID
	program string // a static workload, for images
	reports int
}

// newNode starts all of it, the server with the given blocks, and the agent with more than the engine's.
func newNode(t *testing.T, blocks string, attestors ...string) *node {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	n := &node{t: t, ctx: ctx}
	dir, err := os.MkdirTemp("", "lab") //nolint:usetesting // a socket's path may have 107 bytes
	n.must(err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	n.Site, err = site.New(dir, "../../bin")
	n.must(err)
	n.ServerBlocks = "node_attestor \"join_token\" {}\n" + strings.ReplaceAll(blocks, "DIR", dir)
	n.must(n.StartServer(ctx))
	t.Cleanup(func() { _ = n.Stop() })
	n.engine, err = docker.Start(ctx)
	n.must(err)
	t.Cleanup(func() {
		if err := n.engine.Close(); err != nil {
			t.Error(err)
		}
	})
	token, err := n.Token(ctx)
	n.must(err)
	n.parent = "spiffe://" + site.TrustDomain + "/spire/agent/join_token/" + token
	n.agent, err = n.NewAgent(ctx, "agent", site.AgentOptions{Token: token, Blocks: fmt.Sprintf(
		"node_attestor \"join_token\" {}\nworkload_attestor \"docker\" {\n  docker_socket_path = %q\n}", n.engine.Socket()) + "\n" + strings.ReplaceAll(strings.Join(attestors, ""), "DIR", dir)})
	n.must(err)
	n.must(n.agent.Start(ctx))
	t.Cleanup(func() { _ = n.agent.Stop(15 * time.Second) })
	n.program, err = docker.BuildStatic(ctx, dir, "github.com/assay-id/assay/test/demo/workload")
	n.must(err)
	return n
}

// needDocker ends the test if there can be no engine.
func needDocker(t *testing.T) {
	t.Helper()
	if err := docker.Available(); err != nil {
		lab.Missing(t, "Docker", err)
	}
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// entry makes an entry for containers with the label app=shop.
func (n *node) entry(path string, more ...string) {
	n.t.Helper()
	args := []string{"entry", "create", "-spiffeID", "spiffe://" + site.TrustDomain + path, "-parentID", n.parent, "-selector", "docker:label:app:shop"}
	for _, selector := range more {
		args = append(args, "-selector", selector)
	}
	_, err := n.ServerCLI(n.ctx, args...)
	n.must(err)
}

// run starts a container with the label app=shop.
func (n *node) run(image string, more ...string) docker.Running {
	n.t.Helper()
	running, err := n.engine.Run(n.ctx, docker.Container{
		Image: image, Labels: map[string]string{"app": "shop"}, Cmd: more,
		Env:   []string{"SPIFFE_ENDPOINT_SOCKET=unix:///assay/api.sock"},
		Binds: []string{filepath.Dir(n.agent.Socket) + ":/assay:ro", n.shared() + ":/shared"},
	})
	n.must(err)
	return running
}

// shared is a folder that containers see as /shared.
func (n *node) shared() string {
	n.t.Helper()
	path := filepath.Join(n.Dir, "shared")
	n.must(os.MkdirAll(path, 0o755))
	return path
}

// until waits until the agent gives the container the identity, or none for "".
func (n *node) until(c docker.Running, path string) {
	n.t.Helper()
	want := "gets spiffe://" + site.TrustDomain + path
	n.must(n.agent.WaitFor(n.ctx, "the container to have "+path, func() error {
		out, err := n.agent.CLI(n.ctx, "explain", "-container", c.ID, "-socketPath", n.agent.Admin)
		if err != nil {
			return err
		}
		if path == "" && strings.Contains(out, "gets spiffe://") || path != "" && !strings.Contains(out, want) {
			return fmt.Errorf("it says:\n%s", out)
		}
		return nil
	}))
}

// scan is a report as Trivy writes it. What it leaves out it does not say.
type scan struct {
	config   string
	digests  []string
	platform string // os/arch
	critical string // a finding
}

// write writes the report into a file and returns its path. Each is newer than the one before.
func (n *node) write(s scan) string {
	n.t.Helper()
	metadata, found := map[string]any{}, []any{}
	if s.config != "" {
		metadata["ImageID"] = s.config
	}
	if len(s.digests) > 0 {
		var refs []string
		for _, d := range s.digests {
			refs = append(refs, "shop@"+d)
		}
		metadata["RepoDigests"] = refs
	}
	if kind, arch, ok := strings.Cut(s.platform, "/"); ok {
		metadata["ImageConfig"] = map[string]any{"os": kind, "architecture": arch}
	}
	if s.critical != "" {
		found = append(found, map[string]any{
			"VulnerabilityID": s.critical, "PkgName": "libshop", "InstalledVersion": "1.0", "Severity": "CRITICAL",
			"PkgIdentifier": map[string]any{"PURL": "pkg:golang/example.org/libshop@1.0"},
		})
	}
	text, err := json.Marshal(map[string]any{
		"SchemaVersion": 2, "CreatedAt": time.Now().Format(time.RFC3339Nano), "ArtifactName": "shop:latest", "ArtifactType": "container_image",
		"Metadata": metadata,
		"Results": []any{map[string]any{
			"Target": "app", "Class": "lang-pkgs", "Type": "gobinary",
			"Packages": []any{map[string]any{"Name": "libshop", "Version": "1.0"}}, "Vulnerabilities": found,
		}},
	})
	n.must(err)
	n.reports++
	path := filepath.Join(n.Dir, fmt.Sprintf("scan-%d.json", n.reports))
	n.must(os.WriteFile(path, text, 0o600))
	return path
}

// push pushes a report for the image as an administrator and returns what was said of it.
func (n *node) push(image string, s scan) string {
	n.t.Helper()
	out, err := n.ServerCLI(n.ctx, "evidence", "push", "-image", image, "-scan", n.write(s))
	n.must(err)
	return out
}

// status is what the policy "prod" says of an image, empty if nothing is known of it.
func (n *node) status(config string) string {
	n.t.Helper()
	out, err := n.ServerCLI(n.ctx, "evidence", "list", "-output", "json")
	n.must(err)
	var told struct {
		Images []struct {
			Digest   string
			Verdicts []struct{ Policy, Status string }
		}
	}
	n.must(json.Unmarshal([]byte(out), &told))
	for _, i := range told.Images {
		for _, v := range i.Verdicts {
			if i.Digest == config && v.Policy == "prod" {
				return v.Status
			}
		}
	}
	return ""
}

// want compares the status with what it must be.
func (n *node) want(t *testing.T, config, status string) {
	t.Helper()
	if got := n.status(config); got != status {
		told, err := n.ServerCLI(n.ctx, "evidence", "explain", "-image", config)
		t.Errorf("the policy says %q, want %q\n%s%v", got, status, told, err)
	}
}
