// Package node is the agent's side of k8s_psat: it presents the token that the kubelet mounted. The file is
// read at each attestation, because the kubelet replaces the token before it expires.
package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/k8spsat"
)

// Kind returns the agent's side of k8s_psat.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{
		Type:   k8spsat.Type,
		Config: func() any { return new(k8spsat.AgentConfig) },
		Open:   open,
	}
}

type presenter struct{ cluster, path string }

// open does not read the token: it may be mounted later.
func open(config any, _ attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*k8spsat.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("k8s_psat configuration is a %T", config)
	}
	if c.Cluster == "" {
		return nil, errors.New("cluster must be set, to the name that the server has for it")
	}
	path := c.TokenPath
	if path == "" {
		path = k8spsat.DefaultTokenPath
	}
	return presenter{c.Cluster, path}, nil
}

// Evidence returns the token as it is now. The server asks no challenge.
func (p presenter) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	token, err := attestor.ReadFile(p.path, k8spsat.MaxToken)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, fmt.Errorf("read service account token: %w (is a projected volume with a serviceAccountToken mounted there?)", err)
	case err != nil:
		return nil, nil, fmt.Errorf("read service account token: %w", err)
	}
	token = bytes.TrimSpace(token)
	if len(token) == 0 {
		return nil, nil, fmt.Errorf("read service account token: %s is empty", p.path)
	}
	payload, err := json.Marshal(k8spsat.Evidence{Cluster: p.cluster, Token: string(token)})
	if err != nil {
		return nil, nil, fmt.Errorf("encode evidence: %w", err)
	}
	return payload, nil, nil
}
