// Package node is the agent's side of vsphere: it says which virtual machine it is in and reads what
// vCenter has written into it.
package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/vsphere"
)

const (
	// maxOutput is the most that vmtoolsd may print, in bytes.
	maxOutput = 4 << 10
	// readTime is how long one reading of guestinfo may take, and readPause the wait before the next.
	readTime, readPause = 5 * time.Second, 200 * time.Millisecond
	// reads is how often guestinfo is read: it may take a moment to arrive in the machine.
	reads = 10
)

// Kind returns the agent's side of vsphere.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{
		Type: vsphere.Type,
		Config: func() any {
			return &vsphere.AgentConfig{Vmtoolsd: "/usr/bin/vmtoolsd", DMI: "/sys/class/dmi/id"}
		},
		Open: open,
	}
}

// guest is the virtual machine as it is seen from inside.
type guest interface {
	uuid() (string, error)
	// get returns a guestinfo value, empty if there is none.
	get(ctx context.Context, key string) (string, error)
	// set writes a guestinfo value, which vCenter then shows.
	set(ctx context.Context, key, value string) error
}

type node struct {
	guest       guest
	trustDomain string
	vcenter     string
}

func open(config any, needs attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*vsphere.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("vsphere configuration is a %T", config)
	}
	if !filepath.IsAbs(c.Vmtoolsd) {
		return nil, fmt.Errorf("vmtoolsd_path: %q is no absolute path", c.Vmtoolsd)
	}
	return &node{tools{program: c.Vmtoolsd, dmi: c.DMI}, needs.TrustDomain.Name(), c.VCenter}, nil
}

// Evidence says who the machine is, for no key.
func (n *node) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	return n.EvidenceFor(ctx, attestor.KeyHash{})
}

// EvidenceFor says who the machine is.
func (n *node) EvidenceFor(ctx context.Context, key attestor.KeyHash) ([]byte, attestor.Ask, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	uuid, err := n.guest.uuid()
	if err != nil {
		return nil, nil, fmt.Errorf("find the UUID of the virtual machine: %w", err)
	}
	nonce := make([]byte, vsphere.NonceSize)
	_, _ = rand.Read(nonce)
	payload, err := json.Marshal(vsphere.Evidence{BIOSUUID: uuid, Nonce: nonce, VCenter: n.vcenter})
	if err != nil {
		return nil, nil, err
	}
	return payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
		return n.answer(ctx, vsphere.Evidence{BIOSUUID: uuid, Nonce: nonce}, key, challenge)
	}, nil
}

func (n *node) answer(ctx context.Context, e vsphere.Evidence, own attestor.KeyHash, challenge []byte) ([]byte, error) {
	var c vsphere.Challenge
	if len(challenge) > attestor.MaxEvidence {
		return nil, errors.New("challenge is too large")
	}
	if err := attestor.Decode(challenge, &c); err != nil {
		return nil, fmt.Errorf("read challenge: %w", err)
	}
	if !vsphere.IsKey(c.Key) {
		return nil, errors.New("challenge names a key that no nonce is at")
	}
	if c.Answer != "" && !vsphere.IsAnswer(c.Answer, c.Key) {
		return nil, errors.New("challenge names a key that no answer is written to")
	}
	for range reads {
		text, err := n.guest.get(ctx, c.Key)
		if err != nil {
			return nil, fmt.Errorf("read guestinfo: %w", err)
		}
		if text != "" {
			nonce, err := base64.StdEncoding.DecodeString(text)
			if err != nil || len(nonce) != vsphere.NonceSize {
				return nil, errors.New("read guestinfo: it holds no nonce")
			}
			mac := vsphere.MAC(nonce, e.Nonce, c.Key, n.trustDomain, e.BIOSUUID, own)
			if c.Answer != "" {
				if err := n.guest.set(ctx, c.Answer, base64.StdEncoding.EncodeToString(mac)); err != nil {
					return nil, fmt.Errorf("write guestinfo: %w", err)
				}
			}
			return json.Marshal(vsphere.Response{MAC: mac})
		}
		select {
		case <-time.After(readPause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return nil, errors.New("guestinfo has no nonce: the server has written it into another virtual machine than this one")
}

// tools is a virtual machine with open-vm-tools in it.
type tools struct{ program, dmi string }

func (g tools) uuid() (string, error) {
	if serial, err := attestor.ReadFile(filepath.Join(g.dmi, "product_serial"), maxOutput); err == nil {
		if uuid, ok := vsphere.UUIDOfSerial(string(serial)); ok {
			return uuid, nil
		}
	}
	text, err := attestor.ReadFile(filepath.Join(g.dmi, "product_uuid"), maxOutput)
	if err != nil {
		return "", fmt.Errorf("%w (the agent must run as root to read it)", err)
	}
	uuid := strings.ToLower(strings.TrimSpace(string(text)))
	if !vsphere.IsUUID(uuid) {
		return "", errors.New("the machine's product_uuid is no UUID")
	}
	return uuid, nil
}

// get reads a value.
func (g tools) get(ctx context.Context, key string) (string, error) {
	out, said, err := g.run(ctx, "info-get "+key)
	if err != nil && strings.Contains(said, "No value found") {
		return "", nil
	}
	return out, err
}

// set writes a value.
func (g tools) set(ctx context.Context, key, value string) error {
	_, _, err := g.run(ctx, "info-set "+key+" "+value)
	return err
}

// run runs vmtoolsd, which alone knows the ways to the hypervisor, the privileged one among them.
func (g tools) run(ctx context.Context, command string) (out, said string, err error) {
	ctx, cancel := context.WithTimeout(ctx, readTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, g.program, "--cmd", command)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C"}
	cmd.WaitDelay = time.Second
	var printed, complaint limited
	cmd.Stdout, cmd.Stderr = &printed, &complaint
	err = cmd.Run()
	said = strings.TrimSpace(printed.String() + " " + complaint.String())
	switch {
	case ctx.Err() != nil:
		return "", "", fmt.Errorf("%s: %w", g.program, ctx.Err())
	case err != nil:
		return "", said, fmt.Errorf("%s: %w: %.200s", g.program, err, said)
	}
	return strings.TrimSpace(printed.String()), said, nil
}

// limited keeps the first of what is written to it.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := maxOutput - l.Len(); room > 0 {
		_, _ = l.Buffer.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}
