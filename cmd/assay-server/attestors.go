package main

import (
	"github.com/assay-id/assay/attestor"
	all "github.com/assay-id/assay/attestor/all/server"
	awsiid "github.com/assay-id/assay/attestor/awsiid/server"
	ecs "github.com/assay-id/assay/attestor/ecs/server"
	external "github.com/assay-id/assay/attestor/external/server"
	httpchallenge "github.com/assay-id/assay/attestor/httpchallenge/server"
	jointoken "github.com/assay-id/assay/attestor/jointoken/server"
	k8spsat "github.com/assay-id/assay/attestor/k8spsat/server"
	sshpop "github.com/assay-id/assay/attestor/sshpop/server"
	tpm "github.com/assay-id/assay/attestor/tpm/server"
	tpmdevid "github.com/assay-id/assay/attestor/tpmdevid/server"
	vsphere "github.com/assay-id/assay/attestor/vsphere/server"
	x509pop "github.com/assay-id/assay/attestor/x509pop/server"
)

// judges are the ways in which this server lets nodes prove themselves, one line each.
func judges() []attestor.JudgeKind {
	single := []attestor.JudgeKind{
		jointoken.Kind(),
		k8spsat.Kind(),
		x509pop.Kind(),
		sshpop.Kind(),
		httpchallenge.Kind(),
		awsiid.Kind(),
		ecs.Kind(),
		vsphere.Kind(),
		tpm.Kind(),
		tpmdevid.Kind(),
	}
	return append(single, all.Kind(single), external.Kind()) // a plugin is no part: its type is its name
}
