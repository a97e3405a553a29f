// Package awsiid is node attestation by the instance identity document of Amazon EC2: a document that AWS
// signs for each instance, and, in an Assay agent, a request to AWS that only the instance can sign.
//
// This package holds the names, the configuration and the messages. The payload is SPIRE's; the field
// "proof" is ours, and with it the challenge, which a SPIRE agent never sees.
package awsiid

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/assay-id/assay/attestor/awsapi"
)

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "aws_iid"

// DefaultAgentPath is SPIRE's too.
const DefaultAgentPath = "{{ .PluginName }}/{{ .AccountID }}/{{ .Region }}/{{ .InstanceID }}"

// AgentConfig is the agent's configuration block.
type AgentConfig struct {
	// MetadataEndpoint is where the instance metadata service is, if not at its usual address.
	MetadataEndpoint string `hcl:"ec2_metadata_endpoint,optional"`
	// DisableProof keeps the instance's role from being used to prove the instance; the server then
	// believes the document alone, once.
	DisableProof bool `hcl:"disable_proof,optional"`
}

// ServerConfig is the server's configuration block.
type ServerConfig struct {
	// AccountIDs are the AWS accounts whose instances are accepted.
	AccountIDs []string `hcl:"account_ids,optional"`
	// Organization says, besides, which accounts are accepted: those of an organization of AWS's.
	Organization *Organization `hcl:"verify_organization,block"`
	// Regions are those whose instances are accepted; empty: those that RegionCertificates names, and
	// without these all whose certificates are known.
	Regions []string `hcl:"regions,optional"`
	// RegionCertificates names, for a region, the file of the certificate that AWS signs its documents
	// with, where it is another than the one that is known: PEM, the one for RSA-2048.
	RegionCertificates map[string]string `hcl:"region_certificates,optional"`
	// InstanceRoles are the names of IAM roles by which an instance may prove itself.
	InstanceRoles []string `hcl:"instance_roles,optional"`
	// RequireProof refuses instances that show the document alone.
	RequireProof bool `hcl:"require_proof,optional"`
	// MaxInstanceAge is how old an instance may be that shows the document alone; empty is any age.
	MaxInstanceAge string `hcl:"max_instance_age,optional"`
	// AgentPathTemplate makes the agent's path; DefaultAgentPath if empty.
	AgentPathTemplate string `hcl:"agent_path_template,optional"`
	// LookupInstance asks EC2 for the instance's state, tags and security groups, and IAM for its role.
	LookupInstance bool `hcl:"lookup_instance,optional"`
	// WithoutRoles keeps IAM from being asked, where it cannot be reached.
	WithoutRoles bool `hcl:"disable_instance_profile_selectors,optional"`
	// AssumeRole is the name of the role that the server assumes in the account of each instance that it
	// looks up, and ExternalID what the trust policy of that role asks for, if it does.
	AssumeRole string `hcl:"assume_role,optional"`
	ExternalID string `hcl:"external_id,optional"`
	// Accounts say where an account is different.
	Accounts []awsapi.Account `hcl:"account,block"`
	// RefreshInterval is how often that is asked again of the instances whose agents were admitted.
	RefreshInterval string `hcl:"refresh_interval,optional"`
	// AccessKeyID and SecretAccessKey are the credentials for that; without them those of the
	// environment, then those of the instance that the server runs on.
	AccessKeyID     string `hcl:"access_key_id,optional"`
	SecretAccessKey string `hcl:"secret_access_key,optional"`
	// The endpoints are for tests and private endpoints.
	STSEndpoint      string `hcl:"sts_endpoint,optional"`
	EC2Endpoint      string `hcl:"ec2_endpoint,optional"`
	IAMEndpoint      string `hcl:"iam_endpoint,optional"`
	MetadataEndpoint string `hcl:"ec2_metadata_endpoint,optional"`
}

// Organization is where the list of an organization's accounts is: at AWS, or in a file.
type Organization struct {
	ManagementAccount string `hcl:"management_account_id,optional"`
	ManagementRegion  string `hcl:"management_account_region,optional"`
	AssumeRole        string `hcl:"assume_org_role,optional"`
	// TTL is how long the list is believed.
	TTL string `hcl:"org_account_map_ttl,optional"`
	// AccountList is a file with a list of accounts in JSON, in place of asking AWS.
	AccountList string `hcl:"account_list_file,optional"`
	// Endpoint is for tests and private endpoints.
	Endpoint string `hcl:"organizations_endpoint,optional"`
}

// Evidence is the payload.
type Evidence struct {
	// Document and Signature are SPIRE's; nothing is believed of them. What counts is what RSA2048, a
	// PKCS #7 message in base64, holds and signs.
	Document  string `json:"document"`
	Signature string `json:"signature"`
	RSA2048   string `json:"rsa2048"`
	// Proof says that the agent can answer a challenge.
	Proof bool `json:"proof,omitempty"`
}

// Document is what an identity document says.
type Document struct {
	AccountID        string    `json:"accountId"`
	Region           string    `json:"region"`
	AvailabilityZone string    `json:"availabilityZone"`
	InstanceID       string    `json:"instanceId"`
	ImageID          string    `json:"imageId"`
	PendingTime      time.Time `json:"pendingTime"`
}

// What the parts of a document look like. They become parts of an agent's ID, of host names and of
// queries, so nothing else is let through.
var (
	zoneForm     = regexp.MustCompile(`^[a-z0-9-]{1,40}$`)
	instanceForm = regexp.MustCompile(`^i-[0-9a-f]{8,17}$`)
	imageForm    = regexp.MustCompile(`^ami-[0-9a-f]{8,17}$`)
)

// ParseDocument reads a document and checks its form.
func ParseDocument(text []byte) (Document, error) {
	var d Document
	if err := json.Unmarshal(text, &d); err != nil {
		return Document{}, errors.New("document is not the JSON it should be") // the parser's text would echo it
	}
	for _, part := range []struct {
		name, value string
		is          func(string) bool
	}{
		{"accountId", d.AccountID, awsapi.IsAccount},
		{"region", d.Region, awsapi.IsRegion},
		{"instanceId", d.InstanceID, instanceForm.MatchString},
	} {
		if !part.is(part.value) {
			return Document{}, fmt.Errorf("document has no %s that is one", part.name)
		}
	}
	if d.AvailabilityZone != "" && !zoneForm.MatchString(d.AvailabilityZone) {
		return Document{}, errors.New("document has no availabilityZone that is one")
	}
	if d.ImageID != "" && !imageForm.MatchString(d.ImageID) {
		return Document{}, errors.New("document has no imageId that is one")
	}
	return d, nil
}
