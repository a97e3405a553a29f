package server

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor/awsiid"
)

// TestInstancesOfOthers is about what EC2 tells of an account that is not the document's, as of subnets that are shared.
func TestInstancesOfOthers(t *testing.T) {
	reservation := func(owner, state string) string {
		return fmt.Sprintf(`<item><ownerId>%s</ownerId><instancesSet><item><instanceId>%s</instanceId><instanceState><name>%s</name></instanceState></item></instancesSet></item>`, owner, theInstance, state)
	}
	document := awsiid.Document{AccountID: account, Region: "us-east-1", InstanceID: theInstance}
	for name, c := range map[string]struct{ answer, says string }{
		"one of the account is believed":      {reservation(account, "running"), ""},
		"one of another account is not":       {reservation(otherAccount, "running"), "another of that account"},
		"one of no account is not":            {reservation("", "running"), "another of that account"},
		"one that is named twice is not":      {reservation(otherAccount, "running") + reservation(account, "running"), "names an instance twice"},
		"one that is named twice is not, too": {reservation(account, "running") + reservation(otherAccount, "running"), "names an instance twice"},
	} {
		t.Run(name, func(t *testing.T) {
			cloud := newCloudWith(t)
			cloud.Trouble = func(w http.ResponseWriter, _ *http.Request) bool {
				fmt.Fprintf(w, `<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><reservationSet>%s</reservationSet></DescribeInstancesResponse>`, c.answer)
				return true
			}
			j := judgeOf(t, cloud, awsiid.ServerConfig{AccountIDs: []string{account}, LookupInstance: true}, time.Now)
			_, err := j.lookUp(t.Context(), document, "")
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("error is %v, want %q", err, c.says)
			}
		})
	}
	t.Run("what is told of another account's evicts nobody, and changes nothing", func(t *testing.T) {
		n := newNodes(theInstance)
		j := judgeOf(t, newCloudWith(t), awsiid.ServerConfig{AccountIDs: []string{account}, LookupInstance: true}, time.Now)
		m := member{document: document, path: pathTo(theInstance), selectors: n.all[pathTo(theInstance)]}
		for _, state := range []string{"running", "terminated"} {
			if err := j.refreshOne(t.Context(), m, instance{ID: theInstance, Owner: otherAccount, State: state}, n); err != nil || n.updates != 0 {
				t.Errorf("%s: %d updates, %v", state, n.updates, err)
			}
		}
		if err := j.refreshOne(t.Context(), m, instance{ID: theInstance, Owner: account, State: "terminated"}, n); err != nil || n.shown(theInstance) != nil {
			t.Errorf("one of the account that is terminated: %v", err)
		}
	})
}
