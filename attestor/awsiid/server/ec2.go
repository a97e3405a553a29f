package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/awsiid"
)

const (
	// maxBatch is how many instances one request asks for. EC2 takes 200 values in a filter, and answers
	// with about ten kilobytes for each.
	maxBatch = 100
	// maxPages bounds the pages of one answer.
	maxPages = maxBatch
	// keepRoles is how long the roles of an instance profile are believed: as long as it takes the
	// instances of a group that was started at once to attest.
	keepRoles = 30 * time.Second
	// maxProfiles bounds how many are kept.
	maxProfiles = 4096
)

// cloud asks EC2 and IAM.
type cloud struct {
	*awsapi.Client
	config   awsiid.ServerConfig
	now      func() time.Time
	accounts *awsapi.Accounts
	lookups  lookups
}

// place is where instances are asked for together: a region, with the server's own credentials or, of an
// account that has a name here, with those of the role there.
type place struct{ account, region string }

func newCloud(c awsiid.ServerConfig, trustDomain string, now func() time.Time) (*cloud, error) {
	if !c.LookupInstance && (c.AssumeRole != "" || len(c.Accounts) > 0 || c.WithoutRoles) {
		return nil, errors.New("assume_role, account and disable_instance_profile_selectors need lookup_instance, which is what they are about")
	}
	for key, endpoint := range map[string]string{"ec2_endpoint": c.EC2Endpoint, "iam_endpoint": c.IAMEndpoint} {
		if err := awsapi.CheckEndpoint(key, endpoint); err != nil {
			return nil, err
		}
	}
	client, err := awsapi.NewClient(awsapi.Config{
		AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey,
		MetadataEndpoint: c.MetadataEndpoint, STSEndpoint: c.STSEndpoint, Now: now,
	})
	if err != nil {
		return nil, err
	}
	accounts, err := awsapi.NewAccounts(client, awsapi.Account{AssumeRole: c.AssumeRole, ExternalID: c.ExternalID}, c.Accounts, "assay-server@"+trustDomain)
	if err != nil {
		return nil, err
	}
	return &cloud{Client: client, config: c, now: now, accounts: accounts, lookups: newLookups()}, nil
}

// at is where instances of an account and region are asked for.
func (c *cloud) at(account, region string) place { return place{c.accounts.Whose(account), region} }

// client is who asks there.
func (c *cloud) client(at place) *awsapi.Client { return c.accounts.Client(at.account, at.region) }

// instance is what EC2 says of one.
type instance struct {
	ID      string `xml:"instanceId"`
	State   string `xml:"instanceState>name"`
	Profile string `xml:"iamInstanceProfile>arn"`
	Groups  []struct {
		ID   string `xml:"groupId"`
		Name string `xml:"groupName"`
	} `xml:"groupSet>item"`
	Tags []struct {
		Key   string `xml:"key"`
		Value string `xml:"value"`
	} `xml:"tagSet>item"`
	// Owner is the account, which EC2 says of the reservation.
	Owner string `xml:"-"`
}

// lookups are what is being asked and what is remembered for a moment.
//
// Why it is so: EC2 and IAM allow an account a few requests per second. A thousand instances that boot
// together must not be a thousand requests, so while one is under way in a region, those who come
// gather, and the next asks for all of them.
type lookups struct {
	mu       *sync.Mutex          // guards the maps
	gather   map[place]*batch     // what may be joined
	turn     map[place]chan token // capacity 1: whose request is under way
	profiles map[string]profile   // by ARN
}

type token struct{}

// batch is a request for some instances of a region, and its answer once done is closed.
type batch struct {
	ids   map[string]bool
	done  chan token
	found map[string]instance
	err   error
}

// profile is which roles an instance profile had.
type profile struct {
	roles []string
	until time.Time
}

// errLeft says that whoever was to ask for a batch has left.
var errLeft = errors.New("whoever asked has left")

func newLookups() lookups {
	return lookups{mu: new(sync.Mutex), gather: map[place]*batch{}, turn: map[place]chan token{}, profiles: map[string]profile{}}
}

// describe looks an instance up, in its account or, where no role is assumed, that of the server's credentials.
func (c *cloud) describe(ctx context.Context, d awsiid.Document) (instance, error) {
	at := c.at(d.AccountID, d.Region)
	for {
		found, err := c.join(ctx, at, d.InstanceID)
		switch {
		case errors.Is(err, errLeft) && ctx.Err() == nil:
			continue // somebody else leads the next
		case ctx.Err() != nil:
			return instance{}, fmt.Errorf("look instance up: %w", ctx.Err())
		case errors.Is(err, awsapi.ErrNoInstance):
			if at.account == "" {
				return instance{}, attestor.Refusef("look instance up: EC2 does not know it in the account of the server's credentials; if account %s is another one, set assume_role", d.AccountID)
			}
			return instance{}, attestor.Refusef("look instance up: EC2 does not know it in account %s", d.AccountID)
		case err != nil:
			return instance{}, fmt.Errorf("look instance up: %w", err)
		case found.Owner != d.AccountID:
			return instance{}, attestor.Refusef("look instance up: EC2 knows another of that account")
		}
		return found, nil
	}
}

// join asks for one instance together with whoever else asks.
func (c *cloud) join(ctx context.Context, at place, id string) (instance, error) {
	l := &c.lookups
	l.mu.Lock()
	b := l.gather[at]
	if b != nil && len(b.ids) < maxBatch {
		b.ids[id] = true
		l.mu.Unlock()
		select {
		case <-b.done:
		case <-ctx.Done():
			return instance{}, ctx.Err()
		}
		return b.of(id)
	}
	b = &batch{ids: map[string]bool{id: true}, done: make(chan token)}
	l.gather[at] = b
	turn := l.turn[at]
	if turn == nil {
		turn = make(chan token, 1)
		l.turn[at] = turn
	}
	l.mu.Unlock()

	mine := false
	select {
	case turn <- token{}:
		mine = true
	case <-ctx.Done():
	}
	l.mu.Lock()
	if l.gather[at] == b {
		delete(l.gather, at) // nobody joins from here on
	}
	l.mu.Unlock()
	if b.err = ctx.Err(); b.err == nil {
		b.found, b.err = c.describeAll(ctx, at, slices.Sorted(maps.Keys(b.ids)))
	}
	if ctx.Err() != nil {
		b.err = errLeft
	}
	close(b.done)
	if mine {
		<-turn
	}
	return b.of(id)
}

// of is what a batch that is done says of one instance.
func (b *batch) of(id string) (instance, error) {
	if b.err != nil {
		return instance{}, b.err
	}
	found, ok := b.found[id]
	if !ok {
		return instance{}, awsapi.ErrNoInstance
	}
	return found, nil
}

// describeAll looks up to maxBatch instances of a region up. It asks by filter, which leaves out what it
// does not find; a list of IDs is refused as a whole if one of them is gone.
func (c *cloud) describeAll(ctx context.Context, at place, ids []string) (map[string]instance, error) {
	form := url.Values{"Filter.1.Name": {"instance-id"}}
	for i, id := range ids {
		form.Set("Filter.1.Value."+strconv.Itoa(i+1), id)
	}
	all := map[string]instance{}
	for range maxPages {
		next, err := c.page(ctx, at, form, all)
		if err != nil || next == "" {
			return all, err
		}
		form.Set("NextToken", next)
	}
	return nil, errors.New("EC2's answer does not end")
}

// isGone asks for one instance by its ID, about which EC2 says so if there is none.
func (c *cloud) isGone(ctx context.Context, at place, id string) (bool, error) {
	_, err := c.page(ctx, at, url.Values{"InstanceId.1": {id}}, map[string]instance{})
	if errors.Is(err, awsapi.ErrNoInstance) {
		return true, nil
	}
	return false, err
}

// page asks for one page of instances, adds them to all, and returns where the next begins.
func (c *cloud) page(ctx context.Context, at place, form url.Values, all map[string]instance) (next string, err error) {
	var said struct {
		Reservations []struct {
			Owner     string     `xml:"ownerId"`
			Instances []instance `xml:"instancesSet>item"`
		} `xml:"reservationSet>item"`
		Next string `xml:"nextToken"`
	}
	form.Set("Action", "DescribeInstances")
	form.Set("Version", "2016-11-15")
	if err := c.client(at).Query(ctx, c.config.EC2Endpoint, "ec2."+at.region+"."+awsapi.Suffix(at.region), "ec2", at.region, form, &said); err != nil {
		return "", err
	}
	for _, r := range said.Reservations {
		for _, i := range r.Instances {
			if _, twice := all[i.ID]; twice {
				return "", errors.New("EC2 names an instance twice")
			}
			i.Owner = r.Owner
			all[i.ID] = i
		}
	}
	return said.Next, nil
}

// roles returns the ARNs of the roles of an instance profile.
func (c *cloud) roles(ctx context.Context, at place, arn string) ([]string, error) {
	l := &c.lookups
	l.mu.Lock()
	known, ok := l.profiles[arn]
	l.mu.Unlock()
	if ok && c.now().Before(known.until) {
		return known.roles, nil
	}
	var said struct {
		Roles []string `xml:"GetInstanceProfileResult>InstanceProfile>Roles>member>Arn"`
	}
	host, signing := "iam.amazonaws.com", "us-east-1"
	if strings.HasPrefix(at.region, "cn-") {
		host, signing = "iam.cn-north-1.amazonaws.com.cn", "cn-north-1"
	} else if strings.HasPrefix(at.region, "us-gov-") {
		host, signing = "iam.us-gov.amazonaws.com", "us-gov-west-1"
	}
	err := c.client(at).Query(ctx, c.config.IAMEndpoint, host, "iam", signing, url.Values{
		"Action": {"GetInstanceProfile"}, "Version": {"2010-05-08"}, "InstanceProfileName": {path.Base(arn)},
	}, &said)
	if err != nil {
		return nil, fmt.Errorf("look role up: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.profiles) >= maxProfiles {
		clear(l.profiles)
	}
	l.profiles[arn] = profile{said.Roles, c.now().Add(keepRoles)}
	return said.Roles, nil
}
