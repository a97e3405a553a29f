package main

import (
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"

	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/kube"
)

// clusterBlock is the type of the blocks about Kubernetes clusters.
const clusterBlock = "kubernetes"

// clusterKind decodes kubernetes "cluster" { … }.
func clusterKind() conf.NamedKind {
	return conf.NamedKind{Block: clusterBlock, Decode: func(name string, body hcl.Body) (any, []conf.KeyProblem, hcl.Diagnostics) {
		var b kube.Block
		diags := gohcl.DecodeBody(body, nil, &b)
		if diags.HasErrors() {
			return nil, nil, diags
		}
		c, problems := kube.NewConfig(name, b)
		list := make([]conf.KeyProblem, len(problems))
		for i, p := range problems {
			list[i] = conf.KeyProblem{Field: p.Field, Text: p.Text}
		}
		return c, list, diags
	}}
}

// clusters hands the file's Kubernetes clusters to the server.
func clusters(from *conf.Server) []*kube.Config {
	return conf.NamedOf[*kube.Config](from.Named, clusterBlock)
}
