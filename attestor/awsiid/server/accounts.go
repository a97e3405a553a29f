package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/awsiid"
)

const (
	// defaultListTTL is how long the list of an organization's accounts is believed, and minListTTL how long
	// at least; both are SPIRE's.
	defaultListTTL = 3 * time.Minute
	minListTTL     = time.Minute
	// listAgain is the pause after a list that could not be had.
	listAgain = 5 * time.Second
	// maxAccountPages bounds the pages of an answer, of twenty accounts each.
	maxAccountPages = 2500
	// maxAccountFile is the largest file with accounts in bytes: some sixty thousand.
	maxAccountFile = 1 << 20
	// defaultOrganizationRegion is where organizations are, in the partition that most are in.
	defaultOrganizationRegion = "us-east-1"
)

func checkAccounts(c *awsiid.ServerConfig) error {
	if len(c.AccountIDs) == 0 && c.Organization == nil {
		return errors.New("account_ids is empty: name the AWS accounts whose instances are accepted, or an organization of them with verify_organization")
	}
	for _, id := range c.AccountIDs {
		if !awsapi.IsAccount(id) {
			return fmt.Errorf("account_ids: %q is no account, which is a number of twelve digits", id)
		}
	}
	return nil
}

// accept says whether instances of an account are accepted: because it is named, or is of the organization.
func (j *judge) accept(ctx context.Context, account string) error {
	if slices.Contains(j.config.AccountIDs, account) {
		return nil
	}
	if j.organization == nil {
		return attestor.Refusef("instance is of account %s, which is not accepted; account_ids does not name it", account)
	}
	is, err := j.organization.has(ctx, account)
	if err != nil {
		return fmt.Errorf("look account up: %w", err)
	}
	if !is {
		return attestor.Refusef("instance is of account %s, which is no active one of the organization, and account_ids does not name it", account)
	}
	return nil
}

// organization knows the accounts of one. Whoever has the turn owns the fields below it.
type organization struct {
	config awsiid.Organization
	client *awsapi.Client // nil: they are in a file
	ttl    time.Duration
	now    func() time.Time
	turn   chan token // capacity 1

	accounts map[string]bool
	failed   error
	until    time.Time // how long either is believed
}

// newOrganization returns nil where none is configured.
func newOrganization(c *awsiid.Organization, cloud *cloud) (*organization, error) {
	if c == nil {
		return nil, nil
	}
	o := &organization{config: *c, ttl: defaultListTTL, now: cloud.now, turn: make(chan token, 1)}
	if c.TTL != "" {
		ttl, err := time.ParseDuration(c.TTL)
		if err != nil || ttl < minListTTL {
			return nil, fmt.Errorf("verify_organization: org_account_map_ttl: %q is no length of time of %s or more, as 3m is", c.TTL, minListTTL)
		}
		o.ttl = ttl
	}
	if c.AccountList != "" {
		if c.ManagementAccount != "" || c.AssumeRole != "" || c.ManagementRegion != "" || c.Endpoint != "" {
			return nil, errors.New("verify_organization: the accounts are in account_list_file, or AWS is asked for them: leave one of the two out")
		}
		_, err := o.read()
		if err != nil {
			return nil, fmt.Errorf("verify_organization: account_list_file: %w", err)
		}
		return o, nil
	}
	if o.config.ManagementRegion == "" {
		o.config.ManagementRegion = defaultOrganizationRegion
	}
	switch {
	case !awsapi.IsAccount(c.ManagementAccount):
		return nil, fmt.Errorf("verify_organization: management_account_id: %q is no account, which is a number of twelve digits", c.ManagementAccount)
	case !awsapi.IsRegion(o.config.ManagementRegion):
		return nil, fmt.Errorf("verify_organization: management_account_region: %q is no region", c.ManagementRegion)
	case c.AssumeRole == "":
		return nil, errors.New("verify_organization: assume_org_role is empty: name the role of the management account that may list accounts")
	}
	if err := awsapi.CheckRole("assume_org_role", c.AssumeRole, ""); err != nil {
		return nil, fmt.Errorf("verify_organization: %w", err)
	}
	if err := awsapi.CheckEndpoint("organizations_endpoint", c.Endpoint); err != nil {
		return nil, fmt.Errorf("verify_organization: %w", err)
	}
	o.client = cloud.accounts.Assume(o.config.ManagementRegion, c.ManagementAccount, c.AssumeRole, "")
	return o, nil
}

// has says whether an account is an active one of the organization. A list that cannot be had is an error, and
// an old one is not used in its place: an account may have left.
func (o *organization) has(ctx context.Context, account string) (bool, error) {
	select {
	case o.turn <- token{}:
		defer func() { <-o.turn }()
	case <-ctx.Done():
		return false, ctx.Err()
	}
	if now := o.now(); !now.Before(o.until) {
		list := o.read
		if o.client != nil {
			list = func() (map[string]bool, error) { return o.list(ctx) }
		}
		accounts, err := list()
		if ctx.Err() != nil {
			return false, ctx.Err() // whose patience ended, not AWS's
		}
		o.accounts, o.failed, o.until = accounts, err, now.Add(o.ttl)
		if err != nil {
			o.until = now.Add(listAgain)
		}
	}
	return o.accounts[account], o.failed
}

// read reads the file.
func (o *organization) read() (map[string]bool, error) {
	text, err := attestor.ReadFile(o.config.AccountList, maxAccountFile)
	if err != nil {
		return nil, err
	}
	var ids []string
	if json.Unmarshal(text, &ids) != nil {
		return nil, fmt.Errorf("%s: it is no list of accounts in JSON, as [\"123456789012\"] is", o.config.AccountList)
	}
	all := map[string]bool{}
	for _, id := range ids {
		if !awsapi.IsAccount(id) {
			return nil, fmt.Errorf("%s: %q is no account, which is a number of twelve digits", o.config.AccountList, id)
		}
		all[id] = true
	}
	return all, nil
}

// list asks AWS.
func (o *organization) list(ctx context.Context) (map[string]bool, error) {
	region := defaultOrganizationRegion
	switch awsapi.Partition(o.config.ManagementRegion) {
	case "aws-cn":
		region = "cn-northwest-1"
	case "aws-us-gov":
		region = "us-gov-west-1"
	}
	all, next := map[string]bool{}, ""
	for range maxAccountPages {
		var said struct {
			Accounts []struct{ Id, Status, State string } // AWS's names
			Next     string                               `json:"NextToken"`
		}
		question := map[string]any{}
		if next != "" {
			question["NextToken"] = next
		}
		err := o.client.Call(ctx, o.config.Endpoint, "organizations."+region+"."+awsapi.Suffix(region), "organizations", region,
			"AWSOrganizationsV20161128.ListAccounts", question, &said)
		if err != nil {
			return nil, fmt.Errorf("list the organization's accounts: %w", err)
		}
		for _, a := range said.Accounts {
			state := a.State
			if state == "" {
				state = a.Status // its name before 2026
			}
			if strings.EqualFold(state, "ACTIVE") {
				all[a.Id] = true
			}
		}
		if next = said.Next; next == "" {
			return all, nil
		}
	}
	return nil, errors.New("list the organization's accounts: AWS's answer does not end")
}
