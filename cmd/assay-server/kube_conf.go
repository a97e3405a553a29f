package main

import (
	"fmt"
	"slices"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"

	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/kube"
	"github.com/assay-id/assay/server/verdict/rules"
	"github.com/assay-id/assay/server/verdict/trust"
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

// checkNamed says what is wrong between the blocks of a file. The reports of a cluster are a source that scan
// policies can name; they are not signed, so it must not be one whose signature counts.
func checkNamed(all []conf.Named) []conf.NamedProblem {
	var sources []string
	var problems []conf.NamedProblem
	for _, c := range conf.NamedOf[*kube.Config](all, clusterBlock) {
		if c.ReportSource == "" {
			continue
		}
		sources = append(sources, c.ReportSource)
		if slices.ContainsFunc(conf.NamedOf[*trust.Policy](all, rules.Trust), func(p *trust.Policy) bool { return p.Name() == c.ReportSource }) {
			problems = append(problems, conf.NamedProblem{Block: clusterBlock, Name: c.Name, KeyProblem: conf.KeyProblem{
				Field: "vulnerability_reports",
				Text:  fmt.Sprintf("%q is a trust_policy's name, and these reports are not signed: name a source of their own.", c.ReportSource),
			}})
		}
	}
	return append(problems, rules.Check(all, sources...)...)
}

// clusters hands the file's Kubernetes clusters to the server.
func clusters(from *conf.Server) []*kube.Config {
	return conf.NamedOf[*kube.Config](from.Named, clusterBlock)
}
