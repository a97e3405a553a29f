package awsapi

import (
	"fmt"
	"sync"
)

// Account is how things of one account are looked up, where that differs from others.
type Account struct {
	ID string `hcl:"id,label"`
	// AssumeRole is the name of the role in this account; empty: the server's own credentials are good
	// for it.
	AssumeRole string `hcl:"assume_role,optional"`
	ExternalID string `hcl:"external_id,optional"`
}

// Accounts are clients that ask about things of accounts, each with the role of a name that is assumed there.
type Accounts struct {
	own     *Client
	session string
	usual   Account
	special map[string]Account

	mu      sync.Mutex            // guards the map
	assumed map[[2]string]*Client // by account and partition
}

// NewAccounts returns clients that assume the role of the usual account, which has no ID, in every account that is
// not a special one. Without a name of a role they are own itself. AWS's logs call us by the session.
func NewAccounts(own *Client, usual Account, special []Account, session string) (*Accounts, error) {
	if err := CheckRole("assume_role", usual.AssumeRole, usual.ExternalID); err != nil {
		return nil, err
	}
	a := &Accounts{own: own, session: SessionName(session), usual: usual, special: map[string]Account{}, assumed: map[[2]string]*Client{}}
	for _, one := range special {
		if !IsAccount(one.ID) {
			return nil, fmt.Errorf("account %q is none, which is a number of twelve digits", one.ID)
		}
		if _, twice := a.special[one.ID]; twice {
			return nil, fmt.Errorf("account %q is there twice", one.ID)
		}
		if err := CheckRole("assume_role", one.AssumeRole, one.ExternalID); err != nil {
			return nil, fmt.Errorf("account %q: %w", one.ID, err)
		}
		a.special[one.ID] = one
	}
	return a, nil
}

func (a *Accounts) of(account string) Account {
	if one, ok := a.special[account]; ok {
		return one
	}
	return a.usual
}

// Whose is the account if a role is assumed there, and empty if it is asked about with the own credentials.
func (a *Accounts) Whose(account string) string {
	if a.of(account).AssumeRole == "" {
		return ""
	}
	return account
}

// Client is who asks in an account and region. Accounts are those that are accepted, so there is an end to them.
func (a *Accounts) Client(account, region string) *Client {
	if a.Whose(account) == "" {
		return a.own
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	key := [2]string{account, Partition(region)}
	client := a.assumed[key]
	if client == nil {
		one := a.of(account)
		client = a.Assume(region, account, one.AssumeRole, one.ExternalID)
		a.assumed[key] = client
	}
	return client
}

// Assume returns a client with a role of another name.
func (a *Accounts) Assume(region, account, role, external string) *Client {
	return a.own.Assume(Role{ARN: RoleARN(region, account, role), ExternalID: external, Session: a.session})
}
