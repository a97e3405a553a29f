package server

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/ecs"
	"github.com/assay-id/assay/test/fake/aws"
)

func TestTasksOfAnotherAccountAreLookedUpWithTheRoleThere(t *testing.T) {
	const other = "210987654321"
	arn := strings.Replace(one, account, other, 1)
	is := ofStatus(arn, "RUNNING")
	is.Account = other
	c := newCloud(t, is)
	c.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: account, ARN: "arn:aws:iam::" + account + ":user/assay"}
	c.Roles["arn:aws:iam::"+other+":role/assay-lookup"] = aws.Role{Trust: []string{"arn:aws:iam::" + account + ":user/assay"}, ExternalID: "of-assay"}
	task, err := ecs.ParseTask(arn)
	if err != nil {
		t.Fatal(err)
	}
	config := ecs.ServerConfig{
		AccountIDs: []string{other}, Regions: []string{"us-east-1"}, TaskRoles: []string{"r"}, LookupTask: true,
		AccessKeyID: "AKIASERVER", SecretAccessKey: "s3cret", STSEndpoint: c.URL(), ECSEndpoint: c.URL(),
	}
	opened := func() *judge {
		t.Helper()
		o, err := open(&config, attestor.Needs{})
		if err != nil {
			t.Fatal(err)
		}
		return o.(*judge) // it is this package's
	}
	if _, err := opened().lookUp(t.Context(), task); !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "set assume_role") {
		t.Errorf("without a role: %v", err)
	}
	config.AssumeRole, config.ExternalID = "assay-lookup", "of-others"
	if _, err := opened().lookUp(t.Context(), task); err == nil || errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "external_id") {
		t.Errorf("with another external ID: %v", err)
	}
	config.ExternalID = "of-assay"
	j := opened()
	if values, err := j.lookUp(t.Context(), task); err != nil || values[1] != "cluster:prod" {
		t.Fatalf("%q, %v", values, err)
	}
	j.refresh = 10 * time.Millisecond
	a := admitted(arn)
	followed(t, j, a)
	c.Lock()
	delete(c.Tasks, arn)
	c.Unlock()
	a.mustEvict(t, arn)
}
