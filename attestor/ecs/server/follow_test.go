package server

import (
	"context"
	"iter"
	"maps"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/ecs"
	"github.com/assay-id/assay/test/fake/aws"
)

const (
	account = "123456789012"
	one     = "arn:aws:ecs:us-east-1:" + account + ":task/prod/158d1c8083dd49d6b527399fd6414f5c"
	two     = "arn:aws:ecs:us-east-1:" + account + ":task/prod/0f9de17a6465404e8b1b2356dc13c2f8"
)

// agents are those that were admitted, by path.
type agents struct {
	mu      sync.Mutex
	all     map[string]attestor.Set
	evicted chan string
}

func admitted(arns ...string) *agents {
	a := &agents{all: map[string]attestor.Set{}, evicted: make(chan string, 16)}
	for _, arn := range arns {
		a.all["ecs/"+account+"/"+ecs.LastPart(arn)] = attestor.NewSet(attestor.Selector{Type: ecs.Type, Value: "task-arn:" + arn})
	}
	return a
}

func (a *agents) Each() iter.Seq2[string, attestor.Set] {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.All(maps.Clone(a.all))
}

func (a *agents) Update(context.Context, string, []attestor.Selector) error { return nil }

func (a *agents) Evict(_ context.Context, path string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.all, path)
	a.evicted <- path
	return nil
}

func start(t *testing.T, c *aws.Cloud, a *agents) {
	t.Helper()
	c.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: account}
	opened, err := open(&ecs.ServerConfig{
		AccountIDs: []string{account}, Regions: []string{"us-east-1"}, TaskRoles: []string{"r"}, LookupTask: true,
		AccessKeyID: "AKIASERVER", SecretAccessKey: "s3cret", STSEndpoint: c.URL(), ECSEndpoint: c.URL(),
	}, attestor.Needs{})
	if err != nil {
		t.Fatal(err)
	}
	j := opened.(*judge) // it is this package's
	j.refresh = 10 * time.Millisecond
	followed(t, j, a)
}

// followed follows until the test ends.
func followed(t *testing.T, j *judge, a *agents) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- j.Follow(ctx, a) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("follow: %v", err)
		}
	})
}

func ofStatus(arn, status string) aws.Task {
	return aws.Task{ARN: arn, Account: account, Cluster: "prod", Family: "shop", Revision: "1", Status: status}
}

func newCloud(t *testing.T, tasks ...aws.Task) *aws.Cloud {
	t.Helper()
	c := aws.New()
	t.Cleanup(c.Close)
	for _, is := range tasks {
		c.Tasks[is.ARN] = is
	}
	return c
}

func (a *agents) mustEvict(t *testing.T, arn string) {
	t.Helper()
	select {
	case path := <-a.evicted:
		if want := "ecs/" + account + "/" + ecs.LastPart(arn); path != want {
			t.Errorf("evicted %s, want %s", path, want)
		}
	case <-time.After(time.Minute):
		t.Fatal("nobody is evicted")
	}
}

func TestFollow(t *testing.T) {
	for _, status := range []string{"STOPPED", "DEPROVISIONING"} {
		t.Run("the agent of a task that ended is evicted, and its neighbor is not: "+status, func(t *testing.T) {
			c := newCloud(t, ofStatus(one, "RUNNING"), ofStatus(two, "RUNNING"))
			a := admitted(one, two)
			start(t, c, a)
			c.Lock()
			c.Tasks[one] = ofStatus(one, status)
			c.Unlock()
			a.mustEvict(t, one)
			if left := slices.Collect(maps.Keys(maps.Collect(a.Each()))); len(left) != 1 {
				t.Errorf("left are %q", left)
			}
		})
	}
	t.Run("one that ECS has forgotten is evicted", func(t *testing.T) {
		a := admitted(one)
		start(t, newCloud(t), a)
		a.mustEvict(t, one)
	})
	t.Run("with another account's credentials, and while ECS is in trouble, nothing is concluded", func(t *testing.T) {
		c := newCloud(t, ofStatus(one, "STOPPED"))
		rounds := make(chan struct{}, 64)
		failing := true
		c.Trouble = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("X-Amz-Target") == "" {
				return false
			}
			select {
			case rounds <- struct{}{}:
			default:
			}
			if failing {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			return failing
		}
		a := admitted(one)
		start(t, c, a)
		c.Lock()
		c.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: "999999999999"}
		c.Unlock()
		for range 3 {
			<-rounds
		}
		c.Lock()
		failing = false
		c.Unlock()
		for range 3 {
			<-rounds
		}
		select {
		case path := <-a.evicted:
			t.Errorf("evicted %s", path)
		default:
		}
		c.Lock()
		c.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: account}
		c.Unlock()
		a.mustEvict(t, one)
	})
}
