package main

import (
	"github.com/assay-id/assay/attestor"
	all "github.com/assay-id/assay/attestor/all/node"
	awsiid "github.com/assay-id/assay/attestor/awsiid/node"
	docker "github.com/assay-id/assay/attestor/docker/workload"
	ecsnode "github.com/assay-id/assay/attestor/ecs/node"
	ecs "github.com/assay-id/assay/attestor/ecs/workload"
	external "github.com/assay-id/assay/attestor/external/node"
	plugins "github.com/assay-id/assay/attestor/external/workload"
	httpchallenge "github.com/assay-id/assay/attestor/httpchallenge/node"
	jointoken "github.com/assay-id/assay/attestor/jointoken/node"
	k8s "github.com/assay-id/assay/attestor/k8s/workload"
	k8spsat "github.com/assay-id/assay/attestor/k8spsat/node"
	sshpop "github.com/assay-id/assay/attestor/sshpop/node"
	systemd "github.com/assay-id/assay/attestor/systemd/workload"
	tpm "github.com/assay-id/assay/attestor/tpm/node"
	tpmdevid "github.com/assay-id/assay/attestor/tpmdevid/node"
	unix "github.com/assay-id/assay/attestor/unix/workload"
	vsphere "github.com/assay-id/assay/attestor/vsphere/node"
	x509pop "github.com/assay-id/assay/attestor/x509pop/node"
)

// nodes are the ways in which this agent can prove its node, one line each.
func nodes() []attestor.NodeKind {
	single := []attestor.NodeKind{
		jointoken.Kind(),
		k8spsat.Kind(),
		x509pop.Kind(),
		sshpop.Kind(),
		httpchallenge.Kind(),
		awsiid.Kind(),
		ecsnode.Kind(),
		vsphere.Kind(),
		tpm.Kind(),
		tpmdevid.Kind(),
	}
	return append(single, all.Kind(single), external.Kind()) // a plugin is no part: its type is its name
}

// workloads are the ways in which this agent proves things about processes, one line each.
func workloads() []attestor.WorkloadKind {
	return []attestor.WorkloadKind{
		unix.Kind(),
		docker.Kind(),
		systemd.Kind(),
		k8s.Kind(),
		ecs.Kind(),
		plugins.Kind(),
	}
}
