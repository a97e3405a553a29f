package server

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/http"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsiid"
	"github.com/assay-id/assay/test/fake/aws"
)

const (
	account     = "123456789012"
	theInstance = "i-0123456789abcdef0"
)

// here is where instances are, of the server's own account.
var here = place{region: "us-east-1"}

// nodes are agents that were admitted, as the server would keep them.
type nodes struct {
	mu      sync.Mutex
	all     map[string]attestor.Set
	changed chan struct{}
	updates int
}

func newNodes(ids ...string) *nodes {
	n := &nodes{all: map[string]attestor.Set{}, changed: make(chan struct{}, 1)}
	for _, id := range ids {
		n.all[pathTo(id)] = attestor.NewSet(selectors([]string{"instance:id:" + id, "account_id:" + account, "region:us-east-1"})...)
	}
	return n
}

// pathTo is one that says nothing of account and region, as an operator's template may make it.
func pathTo(id string) string { return "aws_iid/" + id }

func (n *nodes) Each() iter.Seq2[string, attestor.Set] {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.All(maps.Clone(n.all))
}

func (n *nodes) change(by func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.updates++
	by()
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

func (n *nodes) Update(_ context.Context, path string, s []attestor.Selector) error {
	n.change(func() { n.all[path] = attestor.NewSet(s...) })
	return nil
}

func (n *nodes) Evict(_ context.Context, path string) error {
	n.change(func() { delete(n.all, path) })
	return nil
}

// shown is what an agent has, nil if it is not admitted.
func (n *nodes) shown(id string) []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	set, ok := n.all[pathTo(id)]
	if !ok {
		return nil
	}
	return set.Strings()
}

// await waits until an agent shows a selector; "" is until it is evicted.
func (n *nodes) await(t *testing.T, id, want string) {
	t.Helper()
	late := time.After(time.Minute)
	for {
		if has := n.shown(id); want == "" && has == nil || want != "" && slices.Contains(has, want) {
			return
		}
		select {
		case <-n.changed:
		case <-late:
			t.Fatalf("never %q; it has %q", want, n.shown(id))
		}
	}
}

func newCloudWith(t *testing.T, ids ...string) *aws.Cloud {
	t.Helper()
	c := aws.New()
	t.Cleanup(c.Close)
	c.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: account, ARN: "arn:aws:iam::" + account + ":user/assay"}
	for _, id := range ids {
		c.Instances[id] = aws.Instance{
			ID: id, Account: account, State: "running", Profile: "arn:aws:iam::" + account + ":instance-profile/web-profile", Role: "web",
			Tags: map[string]string{"tier": "front"},
		}
	}
	return c
}

// alter changes an instance under the feet of the judge.
func alter(c *aws.Cloud, id string, how func(*aws.Instance)) {
	c.Lock()
	defer c.Unlock()
	i := c.Instances[id]
	how(&i)
	c.Instances[id] = i
}

func newJudge(t *testing.T, c *aws.Cloud) *judge {
	t.Helper()
	opened, err := open(&awsiid.ServerConfig{
		AccountIDs: []string{account}, RegionCertificates: map[string]string{"us-east-1": "../testdata/us-east-1.pem"},
		LookupInstance: true, AccessKeyID: "AKIASERVER", SecretAccessKey: "s3cret",
		STSEndpoint: c.URL(), EC2Endpoint: c.URL(), IAMEndpoint: c.URL(),
	}, attestor.Needs{})
	if err != nil {
		t.Fatal(err)
	}
	j, ok := opened.(*judge)
	if !ok {
		t.Fatalf("a %T", opened)
	}
	j.refresh = 10 * time.Millisecond
	return j
}

// follow runs Follow until the test ends.
func follow(t *testing.T, j *judge, n *nodes) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- j.Follow(ctx, n) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("follow: %v", err)
		}
	})
}

// rounds waits until EC2 was asked some more times.
func rounds(t *testing.T, c *aws.Cloud, more int) {
	t.Helper()
	asked := func() int {
		c.Lock()
		defer c.Unlock()
		return c.Asked["DescribeInstances"]
	}
	for late, until := time.Now().Add(time.Minute), asked()+more; asked() < until; <-time.After(time.Millisecond) { // there is nothing to be woken by
		if time.Now().After(late) {
			t.Fatal("EC2 is not asked any more")
		}
	}
}

func TestFollow(t *testing.T) {
	const tag = "aws_iid:tag:tier:front"
	t.Run("tags, groups and roles become what EC2 says; what the document proved stays", func(t *testing.T) {
		c := newCloudWith(t, theInstance)
		n := newNodes(theInstance)
		follow(t, newJudge(t, c), n)
		n.await(t, theInstance, tag)
		alter(c, theInstance, func(i *aws.Instance) {
			i.Tags, i.Groups = map[string]string{"tier": "back"}, map[string]string{"sg-9": "db"}
		})
		n.await(t, theInstance, "aws_iid:tag:tier:back")
		want := []string{
			"aws_iid:account_id:" + account, "aws_iid:iamrole:arn:aws:iam::" + account + ":role/web", "aws_iid:instance:id:" + theInstance,
			"aws_iid:region:us-east-1",
			"aws_iid:sg:id:sg-9", "aws_iid:sg:name:db", "aws_iid:tag:tier:back",
		}
		if got := n.shown(theInstance); !slices.Equal(got, want) {
			t.Errorf("selectors are %q", got)
		}
		updates := n.updates
		rounds(t, c, 3)
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.updates != updates {
			t.Errorf("%d updates where nothing changed", n.updates-updates)
		}
	})
	for _, state := range []string{"shutting-down", "terminated"} {
		t.Run("the agent of an instance that ended is evicted: "+state, func(t *testing.T) {
			c := newCloudWith(t, theInstance)
			n := newNodes(theInstance)
			follow(t, newJudge(t, c), n)
			n.await(t, theInstance, tag)
			alter(c, theInstance, func(i *aws.Instance) { i.State = state })
			n.await(t, theInstance, "")
		})
	}
	t.Run("one that EC2 has forgotten is evicted", func(t *testing.T) {
		c := newCloudWith(t)
		n := newNodes(theInstance)
		follow(t, newJudge(t, c), n)
		n.await(t, theInstance, "")
	})
	t.Run("a stopped instance keeps its agent", func(t *testing.T) {
		c := newCloudWith(t, theInstance)
		n := newNodes(theInstance)
		follow(t, newJudge(t, c), n)
		n.await(t, theInstance, tag)
		alter(c, theInstance, func(i *aws.Instance) { i.State, i.Tags = "stopped", map[string]string{"tier": "none"} })
		n.await(t, theInstance, "aws_iid:tag:tier:none")
	})
	t.Run("with another account's credentials nothing is concluded", func(t *testing.T) {
		c := newCloudWith(t, theInstance)
		c.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: "999999999999", ARN: "arn:aws:iam::999999999999:user/assay"}
		n := newNodes(theInstance)
		follow(t, newJudge(t, c), n)
		rounds(t, c, 3)
		if n.shown(theInstance) == nil || n.updates != 0 {
			t.Errorf("%q after %d updates", n.shown(theInstance), n.updates)
		}
	})
	for why, trouble := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"fails": func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(http.StatusInternalServerError)
			return true
		},
		"throttles": func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprint(w, "<Response><Errors><Error><Code>RequestLimitExceeded</Code></Error></Errors></Response>")
			return true
		},
		"answers nothing": func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "<x/>"); return true },
		"babbles":         func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "hello"); return true },
	} {
		t.Run("an AWS that "+why+" evicts nobody, and is followed when it is well again", func(t *testing.T) {
			c := newCloudWith(t, theInstance)
			n := newNodes(theInstance)
			failures := 0
			var took time.Duration
			last := time.Now()
			c.Trouble = func(w http.ResponseWriter, r *http.Request) bool {
				if failures == 4 {
					return false
				}
				failures++
				if failures > 1 {
					took = max(took, time.Since(last))
				}
				last = time.Now()
				return trouble(w, r)
			}
			follow(t, newJudge(t, c), n)
			n.await(t, theInstance, tag)
			c.Lock()
			defer c.Unlock()
			if failures != 4 || took < 10*time.Millisecond { // half of the first pause, 20 ms, is the least that it waits
				t.Errorf("%d failures, %s apart at most: it does not back off", failures, took)
			}
		})
	}
	t.Run("hundreds of instances are a few requests, however many pages the answer has", func(t *testing.T) {
		var ids []string
		for i := range 250 {
			ids = append(ids, fmt.Sprintf("i-%017x", i))
		}
		c := newCloudWith(t, ids...)
		c.Page = 60
		n := newNodes(ids...)
		j := newJudge(t, c)
		if err := j.refreshPlace(t.Context(), here, j.admitted(n)[here], n); err != nil {
			t.Fatal(err)
		}
		for _, id := range ids {
			if !slices.Contains(n.shown(id), tag) {
				t.Fatalf("%s has %q", id, n.shown(id))
			}
		}
		if got := c.Asked["DescribeInstances"]; got != 2+2+1 {
			t.Errorf("%d requests to EC2", got)
		}
		if got := c.Asked["GetInstanceProfile"]; got != 1 {
			t.Errorf("%d requests to IAM", got)
		}
	})
	t.Run("who does not look instances up follows none", func(t *testing.T) {
		c := newCloudWith(t)
		j := newJudge(t, c)
		j.config.LookupInstance = false
		n := newNodes(theInstance)
		follow(t, j, n)
		if len(c.Asked) != 0 || n.shown(theInstance) == nil {
			t.Error("AWS was asked")
		}
	})
}

func TestTheDocumentOfAnInstanceThatEndedOpensNothing(t *testing.T) {
	c := newCloudWith(t, theInstance)
	n := newNodes(theInstance)
	j := newJudge(t, c)
	payload, err := os.ReadFile("../testdata/real.json")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := j.Judge(t.Context(), payload, nil); err != nil {
		t.Fatal(err)
	}
	alter(c, theInstance, func(i *aws.Instance) { i.State = "terminated" })
	follow(t, j, n)
	n.await(t, theInstance, "")
	// The record that made the document good once is gone now.
	if proof, err := j.Judge(t.Context(), payload, nil); !errors.Is(err, attestor.ErrEvidence) {
		t.Errorf("terminated: %+v, %v", proof, err)
	}
	c.Lock()
	delete(c.Instances, theInstance)
	c.Unlock()
	if proof, err := j.Judge(t.Context(), payload, nil); !errors.Is(err, attestor.ErrEvidence) {
		t.Errorf("forgotten: %+v, %v", proof, err)
	}
}

func TestInstancesThatAttestTogetherAreLookedUpTogether(t *testing.T) {
	const many = 90
	var ids []string
	for i := range many {
		ids = append(ids, fmt.Sprintf("i-%017x", i))
	}
	c := newCloudWith(t, ids[1:]...)
	j := newJudge(t, c)
	// The first request is held until all others wait for the second.
	hold := make(chan struct{})
	var once sync.Once
	first := make(chan struct{})
	c.Trouble = func(http.ResponseWriter, *http.Request) bool {
		once.Do(func() { close(first); c.Unlock(); <-hold; c.Lock() })
		return false
	}
	results := make([]error, many)
	var all sync.WaitGroup
	ask := func(i int) {
		all.Go(func() {
			found, err := j.cloud.describe(t.Context(), awsiid.Document{AccountID: account, Region: "us-east-1", InstanceID: ids[i]})
			if err == nil && found.ID != ids[i] {
				err = errors.New("it is told of " + found.ID)
			}
			results[i] = err
		})
	}
	ask(1)
	<-first
	for i := range many {
		if i != 1 {
			ask(i)
		}
	}
	for gathered := 0; gathered < many-1 && t.Context().Err() == nil; <-time.After(time.Millisecond) {
		j.cloud.lookups.mu.Lock()
		if b := j.cloud.lookups.gather[here]; b != nil {
			gathered = len(b.ids)
		}
		j.cloud.lookups.mu.Unlock()
	}
	close(hold)
	all.Wait()
	for i, err := range results {
		if wants := i == 0; wants != errors.Is(err, attestor.ErrEvidence) || !wants && err != nil {
			t.Errorf("%s: %v", ids[i], err)
		}
	}
	if got := c.Asked["DescribeInstances"]; got != 2 {
		t.Errorf("%d requests for %d instances", got, many)
	}
	t.Run("one that leaves takes nobody with it", func(t *testing.T) {
		c := newCloudWith(t, ids...)
		j := newJudge(t, c)
		asked := make(chan struct{}, 8)
		let := make(chan struct{})
		c.Trouble = func(http.ResponseWriter, *http.Request) bool {
			asked <- struct{}{}
			c.Unlock()
			<-let
			c.Lock()
			return false
		}
		ctx, leave := context.WithCancel(t.Context())
		left, stays := make(chan error, 1), make(chan error, 1)
		d := awsiid.Document{AccountID: account, Region: "us-east-1", InstanceID: ids[1]}
		go func() { _, err := j.cloud.describe(ctx, d); left <- err }()
		<-asked
		d.InstanceID = ids[2]
		go func() { _, err := j.cloud.describe(t.Context(), d); stays <- err }()
		leave()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("who left: %v", err)
		}
		close(let)
		if err := <-stays; err != nil {
			t.Errorf("who stays: %v", err)
		}
	})
}
