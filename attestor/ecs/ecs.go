// Package ecs is attestation on Amazon's Elastic Container Service: of a process by the container of a task it
// runs in, as the ECS agent of the host, or ECS itself in Fargate, says; and of a node that is a task, as a
// Fargate sidecar's is, by a request to AWS that only that task can sign.
//
// This package holds the names, the configuration, the messages and the form of a task's ARN.
package ecs

import (
	"errors"
	"regexp"
	"strings"

	"github.com/assay-id/assay/attestor/awsapi"
)

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "ecs"

// WorkloadConfig is the configuration block of workload attestation in the agent.
type WorkloadConfig struct {
	// IntrospectionEndpoint is where the host's ECS agent answers, DefaultIntrospection if empty.
	IntrospectionEndpoint string `hcl:"introspection_endpoint,optional"`
	// Sidecar says that this agent is a container of a task and attests that task's other containers, as in
	// Fargate, where there is no host to ask.
	Sidecar bool `hcl:"sidecar,optional"`
	// MetadataURI is where a sidecar finds what ECS says of its task, if not where the environment says.
	MetadataURI string `hcl:"metadata_uri,optional"`
	// Timeout is how long one answer may take, for example "2s", which is the default.
	Timeout string `hcl:"timeout,optional"`
}

// DefaultIntrospection is where the ECS agent listens on a container instance.
const DefaultIntrospection = "http://127.0.0.1:51678"

// AgentConfig is the configuration block of node attestation in the agent.
type AgentConfig struct {
	// MetadataURI is where the task finds what ECS says of it, if not where the environment says.
	MetadataURI string `hcl:"metadata_uri,optional"`
	// CredentialsURI is where the credentials of the task's role are, if not where the environment says.
	CredentialsURI string `hcl:"credentials_uri,optional"`
}

// ServerConfig is the configuration block of the server.
type ServerConfig struct {
	// AccountIDs and Regions are where tasks are accepted from.
	AccountIDs []string `hcl:"account_ids"`
	Regions    []string `hcl:"regions"`
	// TaskRoles are the names of IAM roles by which tasks prove themselves.
	TaskRoles []string `hcl:"task_roles"`
	// Clusters are those whose tasks are accepted, all if empty; that needs LookupTask.
	Clusters []string `hcl:"clusters,optional"`
	// LookupTask asks ECS about the task, and whether it still runs.
	LookupTask bool `hcl:"lookup_task,optional"`
	// AssumeRole is the name of the role that the server assumes in the account of each task that it looks
	// up, ExternalID what the trust policy of that role asks for, and Accounts say where one is different.
	AssumeRole string           `hcl:"assume_role,optional"`
	ExternalID string           `hcl:"external_id,optional"`
	Accounts   []awsapi.Account `hcl:"account,block"`
	// RefreshInterval is how often that is asked again of the tasks whose agents were admitted.
	RefreshInterval string `hcl:"refresh_interval,optional"`
	// AccessKeyID and SecretAccessKey are the credentials for that; without them those of the
	// environment, then those of the task or instance that the server runs on.
	AccessKeyID     string `hcl:"access_key_id,optional"`
	SecretAccessKey string `hcl:"secret_access_key,optional"`
	// The endpoints are for tests and private endpoints.
	STSEndpoint      string `hcl:"sts_endpoint,optional"`
	ECSEndpoint      string `hcl:"ecs_endpoint,optional"`
	MetadataEndpoint string `hcl:"ec2_metadata_endpoint,optional"`
}

// Evidence is the payload: which task it is, which is where to look and proves nothing.
type Evidence struct {
	TaskARN string `json:"task_arn"`
}

// Task is what the ARN of a task says.
type Task struct {
	ARN, Region, Account string
	// Cluster is empty in the ARNs of before 2018.
	Cluster, ID string
}

var (
	idForm      = regexp.MustCompile(`^[0-9a-f]{32}$|^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	clusterForm = regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}$`)
	partitions  = map[string]bool{"aws": true, "aws-cn": true, "aws-us-gov": true}
)

// IsCluster reports whether a text is the name of a cluster.
func IsCluster(text string) bool { return clusterForm.MatchString(text) }

// ParseTask reads a task's ARN: arn:aws:ecs:REGION:ACCOUNT:task/CLUSTER/ID.
func ParseTask(arn string) (Task, error) {
	parts := strings.Split(arn, ":")
	if len(arn) > 512 || len(parts) != 6 || parts[0] != "arn" || !partitions[parts[1]] || parts[2] != "ecs" {
		return Task{}, errors.New("no ARN of ECS")
	}
	t := Task{ARN: arn, Region: parts[3], Account: parts[4]}
	names := strings.Split(parts[5], "/")
	switch {
	case len(names) == 3 && IsCluster(names[1]):
		t.Cluster, t.ID = names[1], names[2]
	case len(names) == 2:
		t.ID = names[1]
	default:
		return Task{}, errors.New("no ARN of a task")
	}
	if names[0] != "task" || !idForm.MatchString(t.ID) || !awsapi.IsRegion(t.Region) || !awsapi.IsAccount(t.Account) {
		return Task{}, errors.New("no ARN of a task")
	}
	return t, nil
}

// LastPart is the name in an ARN, or the name itself.
func LastPart(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

// Metadata is what the task metadata service, version 4, says of a task, as far as it is read.
type Metadata struct {
	Cluster     string      `json:"Cluster"`
	TaskARN     string      `json:"TaskARN"`
	Family      string      `json:"Family"`
	Revision    string      `json:"Revision"`
	ServiceName string      `json:"ServiceName"`
	LaunchType  string      `json:"LaunchType"`
	Containers  []Container `json:"Containers"`
}

// Container is what it says of one.
type Container struct {
	DockerID string `json:"DockerId"`
	Name     string `json:"Name"`
	ImageID  string `json:"ImageID"`
}
