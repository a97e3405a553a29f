package main

import (
	"github.com/assay-id/assay/attestor"
	node "github.com/assay-id/assay/attestor/jointoken/node"
	judge "github.com/assay-id/assay/attestor/jointoken/server"
	unix "github.com/assay-id/assay/attestor/unix/workload"
)

// "assay dev" is one node that trusts itself and processes told apart by their user.
func judgeKind() attestor.JudgeKind       { return judge.Kind() }
func nodeKind() attestor.NodeKind         { return node.Kind() }
func workloadKind() attestor.WorkloadKind { return unix.Kind() }
