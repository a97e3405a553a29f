package kube

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// namesIP is the address of CoreDNS's service, which every pod asks.
const namesIP = "10.96.0.10"

//go:embed coredns.yaml
var namesManifest string

// startNames has CoreDNS run in the cluster, as it does in others.
func (c *Cluster) startNames(ctx context.Context) error {
	if _, err := c.Import(ctx, "lab.local/coredns:1", map[string]string{"/coredns": filepath.Join(c.bin, "coredns")}, "/coredns"); err != nil {
		return err
	}
	text := strings.NewReplacer("NAMES_IP", namesIP, "NODE_IP", NodeIP, "NODE_NAME", NodeName).Replace(namesManifest)
	if err := os.WriteFile(c.path("coredns.yaml"), []byte(text), 0o600); err != nil {
		return err
	}
	_, err := c.Kubectl(ctx, "apply", "-f", c.path("coredns.yaml"))
	return err
}

// WaitForNames waits until pods can ask for names.
func (c *Cluster) WaitForNames(ctx context.Context) error {
	return c.wait(ctx, "kubelet", func(ctx context.Context) error {
		d, err := c.Client.AppsV1().Deployments("kube-system").Get(ctx, "coredns", metav1.GetOptions{})
		if err == nil && d.Status.ReadyReplicas == 0 {
			err = errors.New("CoreDNS is not ready")
		}
		return err
	})
}

// preparePolicies has all through that no policy is about, whatever else is in the machine's table.
func (c *Cluster) preparePolicies(ctx context.Context) error {
	if err := cleanPolicies(ctx); err != nil { // of a run that was killed
		return err
	}
	for _, rule := range forwarded {
		if err := run(ctx, "iptables", append([]string{"-w", "-A", "FORWARD"}, rule...)...); err != nil {
			return err
		}
	}
	return c.StartPolicies()
}

// StartPolicies starts who enforces NetworkPolicies, again after Stop("netpol").
func (c *Cluster) StartPolicies() error {
	return c.start("netpol", filepath.Join(c.bin, "netpol"), "-kubeconfig", c.Kubeconfig("admin"), "-node", NodeName, "-services", serviceNet)
}

// forwarded are the rules that let pods' traffic through, below those of policies.
var forwarded = [][]string{{"-s", podNet + ".0/24", "-j", "ACCEPT"}, {"-d", podNet + ".0/24", "-j", "ACCEPT"}}

// cleanPolicies takes away the chains and sets that enforce policies: their controller leaves them in force.
func cleanPolicies(ctx context.Context) error {
	for _, rule := range forwarded {
		_ = run(ctx, "iptables", append([]string{"-w", "-D", "FORWARD"}, rule...)...) // it may not be there
	}
	rules, err := output(ctx, nil, "iptables", "-w", "-S")
	if err != nil {
		return err
	}
	var jumps, flush, remove []string
	for line := range strings.Lines(rules) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		ours := false
		for _, prefix := range []string{"KUBE-ROUTER-", "KUBE-POD-FW-", "KUBE-NWPLCY-"} {
			ours = ours || strings.HasPrefix(fields[1], prefix)
		}
		switch {
		case fields[0] == "-N" && ours:
			flush, remove = append(flush, "-F "+fields[1]), append(remove, "-X "+fields[1])
		case fields[0] == "-A" && !ours && strings.Contains(line, "-j KUBE-ROUTER-"):
			jumps = append(jumps, "-D"+strings.TrimPrefix(strings.TrimSpace(line), "-A"))
		}
	}
	if len(flush) > 0 {
		text := "*filter\n" + strings.Join(slices.Concat(jumps, flush, remove), "\n") + "\nCOMMIT\n"
		if _, err := output(ctx, strings.NewReader(text), "iptables-restore", "-w", "--noflush"); err != nil {
			return err
		}
	}
	sets, err := output(ctx, nil, "ipset", "list", "-n")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(sets) {
		if strings.HasPrefix(name, "KUBE-") || strings.HasPrefix(name, "kube-router-") {
			if err := run(ctx, "ipset", "destroy", name); err != nil {
				return err
			}
		}
	}
	return nil
}

// output runs a program and returns what it printed.
func output(ctx context.Context, stdin io.Reader, name string, args ...string) (string, error) {
	program, err := find(name)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin = stdin
	out, err := cmd.Output()
	if err != nil {
		if failed, ok := errors.AsType[*exec.ExitError](err); ok {
			err = fmt.Errorf("%w: %s", err, failed.Stderr)
		}
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return string(out), nil
}
