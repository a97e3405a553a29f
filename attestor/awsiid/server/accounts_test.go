package server

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/awsiid"
	"github.com/assay-id/assay/test/fake/aws"
)

const (
	otherAccount = "210987654321"
	management   = "111111111111"
	lookupRole   = "assay-lookup"
	theServer    = "arn:aws:iam::" + account + ":user/assay"
)

// abroad is a cloud with the instance in another account than the server's credentials.
func abroad(t *testing.T) *aws.Cloud {
	t.Helper()
	c := newCloudWith(t)
	c.Instances[theInstance] = aws.Instance{
		ID: theInstance, Account: otherAccount, State: "running", Profile: "arn:aws:iam::" + otherAccount + ":instance-profile/web-profile", Role: "web",
		Tags: map[string]string{"tier": "front"},
	}
	c.Roles["arn:aws:iam::"+otherAccount+":role/"+lookupRole] = aws.Role{Trust: []string{theServer}, ExternalID: "of-assay"}
	return c
}

// judgeOf opens a judge that looks instances up as the configuration says, at a time.
func judgeOf(t *testing.T, c *aws.Cloud, config awsiid.ServerConfig, now func() time.Time) *judge {
	t.Helper()
	config.AccessKeyID, config.SecretAccessKey = "AKIASERVER", "s3cret"
	config.STSEndpoint, config.EC2Endpoint, config.IAMEndpoint = c.URL(), c.URL(), c.URL()
	opened, err := open(&config, attestor.Needs{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Now: now})
	if err != nil {
		t.Fatal(err)
	}
	return opened.(*judge) // it is this package's
}

func assuming(role string) awsiid.ServerConfig {
	return awsiid.ServerConfig{AccountIDs: []string{account, otherAccount}, LookupInstance: true, AssumeRole: role, ExternalID: "of-assay"}
}

func TestAssumedRoles(t *testing.T) {
	theirs := awsiid.Document{AccountID: otherAccount, Region: "us-east-1", InstanceID: theInstance}
	t.Run("an instance of another account is looked up with the role there", func(t *testing.T) {
		c := abroad(t)
		j := judgeOf(t, c, assuming(lookupRole), nil)
		values, err := j.lookUp(t.Context(), theirs, "web")
		want := []string{"tag:tier:front", "iamrole:arn:aws:iam::" + otherAccount + ":role/web"}
		if err != nil || !slices.Equal(values, want) {
			t.Errorf("%q, %v", values, err)
		}
		if _, err := j.lookUp(t.Context(), theirs, "web"); err != nil || c.Asked["AssumeRole"] != 1 {
			t.Errorf("%v; the role was assumed %d times", err, c.Asked["AssumeRole"])
		}
	})
	t.Run("AWS's logs are told who assumed it", func(t *testing.T) {
		c := abroad(t)
		j := judgeOf(t, c, assuming(lookupRole), nil)
		if _, err := j.lookUp(t.Context(), theirs, ""); err != nil {
			t.Fatal(err)
		}
		if arn := c.Keys["ASIA000000000001"].ARN; arn != "arn:aws:sts::"+otherAccount+":assumed-role/assay-lookup/assay-server@example.org" {
			t.Errorf("it is %q", arn)
		}
	})
	t.Run("without it, the refusal says what is missing", func(t *testing.T) {
		_, err := judgeOf(t, abroad(t), awsiid.ServerConfig{AccountIDs: []string{otherAccount}, LookupInstance: true}, nil).lookUp(t.Context(), theirs, "")
		if !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "set assume_role") {
			t.Errorf("error is %v", err)
		}
	})
	for why, change := range map[string]func(*aws.Cloud, *awsiid.ServerConfig){
		"a role that does not trust the server": func(c *aws.Cloud, _ *awsiid.ServerConfig) {
			c.Roles["arn:aws:iam::"+otherAccount+":role/"+lookupRole] = aws.Role{Trust: []string{"arn:aws:iam::999999999999:user/other"}}
		},
		"a role that is not there":    func(_ *aws.Cloud, config *awsiid.ServerConfig) { config.AssumeRole = "another" },
		"another external ID":         func(_ *aws.Cloud, config *awsiid.ServerConfig) { config.ExternalID = "of-others" },
		"an external ID that is none": func(_ *aws.Cloud, config *awsiid.ServerConfig) { config.ExternalID = "" },
	} {
		t.Run(why+" is the operator's to mend, not the instance's fault", func(t *testing.T) {
			c, config := abroad(t), assuming(lookupRole)
			change(c, &config)
			j := judgeOf(t, c, config, nil)
			for range 3 {
				_, err := j.lookUp(t.Context(), theirs, "")
				if err == nil || errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "arn:aws:iam::"+otherAccount+":role/") || !strings.Contains(err.Error(), "trust policy") {
					t.Errorf("error is %v", err)
				}
			}
			if got := c.Asked["AssumeRole"]; got != 1 {
				t.Errorf("STS was asked %d times", got)
			}
		})
	}
	t.Run("a refusal is not believed for long", func(t *testing.T) {
		c := abroad(t)
		role := c.Roles["arn:aws:iam::"+otherAccount+":role/"+lookupRole]
		clear(c.Roles)
		now := time.Now()
		j := judgeOf(t, c, assuming(lookupRole), func() time.Time { return now })
		if _, err := j.lookUp(t.Context(), theirs, ""); err == nil {
			t.Fatal("no error")
		}
		c.Roles["arn:aws:iam::"+otherAccount+":role/"+lookupRole] = role
		now = now.Add(10 * time.Second)
		if _, err := j.lookUp(t.Context(), theirs, ""); err != nil {
			t.Error(err)
		}
	})
	t.Run("credentials are renewed before they end, and while STS is in trouble those there are used", func(t *testing.T) {
		c := abroad(t)
		now := time.Now()
		c.Now = func() time.Time { return now }
		j := judgeOf(t, c, assuming(lookupRole), c.Now)
		look := func(later time.Duration) error {
			now = now.Add(later)
			_, err := j.lookUp(t.Context(), theirs, "")
			return err
		}
		for i, want := range []int{1, 1, 2} {
			if err := look(20 * time.Minute); err != nil || c.Asked["AssumeRole"] != want {
				t.Errorf("look %d: %v; the role was assumed %d times", i+1, err, c.Asked["AssumeRole"])
			}
		}
		c.Trouble = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasPrefix(r.Host, "sts.") {
				return false
			}
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		if err := look(50 * time.Minute); err != nil {
			t.Errorf("with what is good still: %v", err)
		}
		if err := look(10 * time.Minute); err == nil || errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("with what has ended: %v", err)
		}
	})
	t.Run("an account may have another role, or none", func(t *testing.T) {
		c := abroad(t)
		c.Roles["arn:aws:iam::"+otherAccount+":role/path/other"] = aws.Role{Trust: []string{theServer}}
		own := c.Instances[theInstance]
		own.ID, own.Account = "i-00000000", account
		c.Instances[own.ID] = own
		config := assuming(lookupRole)
		config.Accounts = []awsapi.Account{{ID: account}, {ID: otherAccount, AssumeRole: "path/other"}}
		j := judgeOf(t, c, config, nil)
		for _, d := range []awsiid.Document{theirs, {AccountID: account, Region: "us-east-1", InstanceID: own.ID}} {
			if _, err := j.lookUp(t.Context(), d, ""); err != nil {
				t.Errorf("%s: %v", d.AccountID, err)
			}
		}
	})
	t.Run("instances of several accounts are followed, each with the role there", func(t *testing.T) {
		c := abroad(t)
		own := c.Instances[theInstance]
		own.ID, own.Account = "i-00000000", account
		c.Instances[own.ID] = own
		n := newNodes(own.ID)
		n.all[pathTo(theInstance)] = attestor.NewSet(selectors([]string{"instance:id:" + theInstance, "account_id:" + otherAccount, "region:us-east-1"})...)
		config := assuming(lookupRole)
		config.Accounts = []awsapi.Account{{ID: account}}
		j := judgeOf(t, c, config, nil)
		j.refresh = 10 * time.Millisecond
		follow(t, j, n)
		n.await(t, theInstance, "aws_iid:tag:tier:front")
		n.await(t, own.ID, "aws_iid:tag:tier:front")
		c.Lock()
		delete(c.Instances, theInstance)
		c.Unlock()
		n.await(t, theInstance, "")
		if n.shown(own.ID) == nil {
			t.Error("the other one is evicted too")
		}
	})
	t.Run("roles are not looked up where IAM cannot be reached", func(t *testing.T) {
		c := abroad(t)
		config := assuming(lookupRole)
		config.WithoutRoles = true
		values, err := judgeOf(t, c, config, nil).lookUp(t.Context(), theirs, "web")
		if err != nil || !slices.Equal(values, []string{"tag:tier:front"}) || c.Asked["GetInstanceProfile"] != 0 {
			t.Errorf("%q, %v", values, err)
		}
	})
	for why, bad := range map[string]awsiid.ServerConfig{
		"no role":                 {AssumeRole: "arn:aws:iam::1:role/x", LookupInstance: true},
		"an external ID alone":    {ExternalID: "abc", LookupInstance: true},
		"no external ID":          {AssumeRole: "x", ExternalID: "a b", LookupInstance: true},
		"nothing to look up":      {AssumeRole: "x"},
		"no account":              {Accounts: []awsapi.Account{{ID: "12"}}, LookupInstance: true},
		"an account twice":        {Accounts: []awsapi.Account{{ID: account}, {ID: account}}, LookupInstance: true},
		"no role of an account's": {Accounts: []awsapi.Account{{ID: account, AssumeRole: "*"}}, LookupInstance: true},
	} {
		bad.AccountIDs = []string{account}
		if _, err := open(&bad, attestor.Needs{}); err == nil {
			t.Errorf("%s: accepted", why)
		}
	}
}

func TestOrganization(t *testing.T) {
	one := newAuthority(t, time.Now().Add(time.Hour))
	regions := map[string]string{"us-east-1": one.path}
	ofOrganization := func(t *testing.T, c *aws.Cloud, now func() time.Time) *judge {
		t.Helper()
		c.Management = management
		c.Roles["arn:aws:iam::"+management+":role/lister"] = aws.Role{Trust: []string{theServer}}
		for i := range 50 {
			c.Accounts[fmt.Sprintf("3%011d", i)] = "ACTIVE"
		}
		c.Accounts[otherAccount] = "ACTIVE"
		c.Accounts["999999999999"] = "SUSPENDED"
		return judgeOf(t, c, awsiid.ServerConfig{RegionCertificates: regions, Organization: &awsiid.Organization{
			ManagementAccount: management, AssumeRole: "lister", Endpoint: c.URL(),
		}}, now)
	}
	t.Run("accounts of it are accepted while they are active, others and suspended ones are not", func(t *testing.T) {
		c := newCloudWith(t)
		j := ofOrganization(t, c, nil)
		for id, is := range map[string]bool{otherAccount: true, "300000000049": true, "999999999999": false, account: false} {
			_, err := j.Judge(t.Context(), one.sign(t, id, "us-east-1"), nil)
			if is && err != nil || !is && !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("%s: %v", id, err)
			}
		}
		if got := c.Asked["ListAccounts"]; got != 3 {
			t.Errorf("%d requests for three pages", got)
		}
	})
	t.Run("one that left is not accepted any more when the list is old, nor anybody while AWS is in trouble", func(t *testing.T) {
		c := newCloudWith(t)
		now := time.Now()
		j := ofOrganization(t, c, func() time.Time { return now })
		evidence := one.sign(t, otherAccount, "us-east-1")
		if _, err := j.Judge(t.Context(), evidence, nil); err != nil {
			t.Fatal(err)
		}
		now = now.Add(defaultListTTL)
		c.Trouble = func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		if _, err := j.Judge(t.Context(), evidence, nil); err == nil || errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("in trouble: %v", err)
		}
		c.Trouble = nil
		delete(c.Accounts, otherAccount)
		now = now.Add(2 * listAgain)
		if _, err := j.Judge(t.Context(), evidence, nil); !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("it left: %v", err)
		}
	})
	t.Run("the list may be a file, which is read again", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "accounts.json")
		write := func(text string) {
			t.Helper()
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write(`["` + otherAccount + `"]`)
		now := time.Now()
		config := awsiid.ServerConfig{RegionCertificates: regions, Organization: &awsiid.Organization{AccountList: path, TTL: "1m"}}
		opened, err := open(&config, attestor.Needs{Now: func() time.Time { return now }})
		if err != nil {
			t.Fatal(err)
		}
		judge := func() error {
			_, err := opened.Judge(t.Context(), one.sign(t, otherAccount, "us-east-1"), nil)
			return err
		}
		if err := judge(); err != nil {
			t.Error(err)
		}
		write("[]")
		if err := judge(); err != nil {
			t.Errorf("while the list is believed: %v", err)
		}
		now = now.Add(time.Minute)
		if err := judge(); !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("of an empty list: %v", err)
		}
		now = now.Add(time.Minute)
		write("{}")
		if err := judge(); err == nil || errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), path) {
			t.Errorf("of no list: %v", err)
		}
	})
	for why, bad := range map[string]awsiid.Organization{
		"nothing":                 {},
		"no role":                 {ManagementAccount: management},
		"no account":              {ManagementAccount: "1", AssumeRole: "x"},
		"no region":               {ManagementAccount: management, AssumeRole: "x", ManagementRegion: "moon"},
		"a list and an account":   {ManagementAccount: management, AccountList: "x"},
		"a file that is not here": {AccountList: "testdata/none.json"},
		"a list for too short":    {ManagementAccount: management, AssumeRole: "x", TTL: "1s"},
		"plain HTTP":              {ManagementAccount: management, AssumeRole: "x", Endpoint: "http://example.org"},
	} {
		if _, err := open(&awsiid.ServerConfig{Organization: &bad}, attestor.Needs{}); err == nil {
			t.Errorf("%s: accepted", why)
		}
	}
}
