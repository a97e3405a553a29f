package ecs_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/ecs"
	"github.com/assay-id/assay/attestor/ecs/node"
	"github.com/assay-id/assay/attestor/ecs/server"
	"github.com/assay-id/assay/test/fake/aws"
)

const (
	account = "123456789012"
	taskID  = "158d1c8083dd49d6b527399fd6414f5c"
	arn     = "arn:aws:ecs:us-east-1:" + account + ":task/prod/" + taskID
)

func theTask() aws.Task {
	return aws.Task{
		ARN: arn, Account: account, Cluster: "prod", Family: "shop", Revision: "26", Service: "front", LaunchType: "FARGATE", Status: "RUNNING",
		Containers: map[string]string{taskID + "-2495160603": "web"},
	}
}

// roleKey is the key that ECS would issue to the role of a task.
func roleKey(id, role string) aws.Key {
	return aws.Key{
		ID: "ASIA" + strings.ToUpper(id[:16]), Secret: "secret of " + id, Token: "token of " + id, Account: account,
		ARN: "arn:aws:sts::" + account + ":assumed-role/" + role + "/" + id,
	}
}

func newCloud(t testing.TB) *aws.Cloud {
	t.Helper()
	c := aws.New()
	t.Cleanup(c.Close)
	c.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: account, ARN: "arn:aws:iam::" + account + ":user/assay"}
	c.AddTask(theTask(), roleKey(taskID, "shop-task"))
	return c
}

func nodeConfig(c *aws.Cloud) string {
	return fmt.Sprintf("metadata_uri = %q\ncredentials_uri = %q", c.MetadataURI(arn), c.CredentialsURI())
}

func proving(c *aws.Cloud) string {
	return fmt.Sprintf("account_ids = [%q]\nregions = [\"us-east-1\"]\ntask_roles = [\"shop-task\"]\nsts_endpoint = %q\n", account, c.URL())
}

func looking(c *aws.Cloud) string {
	return fmt.Sprintf("lookup_task = true\necs_endpoint = %q\naccess_key_id = \"AKIASERVER\"\nsecret_access_key = \"s3cret\"\n", c.URL())
}

var proved = []string{"ecs:account_id:" + account, "ecs:task-id:" + taskID, "ecs:task-role:shop-task"}

func TestSuite(t *testing.T) {
	c := newCloud(t)
	foreign := map[string][]byte{
		"another account":          []byte(`{"task_arn":"arn:aws:ecs:us-east-1:999999999999:task/prod/` + taskID + `"}`),
		"another region":           []byte(`{"task_arn":"arn:aws:ecs:eu-west-1:` + account + `:task/prod/` + taskID + `"}`),
		"no task":                  []byte(`{"task_arn":"arn:aws:ecs:us-east-1:` + account + `:service/prod/front"}`),
		"a region that is a path":  []byte(`{"task_arn":"arn:aws:ecs:evil.example/x:` + account + `:task/prod/` + taskID + `"}`),
		"a task ID that is a path": []byte(`{"task_arn":"arn:aws:ecs:us-east-1:` + account + `:task/prod/.."}`),
		"nothing":                  []byte(`{}`),
	}
	t.Run("proof alone", func(t *testing.T) {
		attestortest.Run(t, attestortest.Pair{
			Node: node.Kind(), Judge: server.Kind(), NodeConfig: nodeConfig(c), JudgeConfig: proving(c),
			Path: "ecs/" + account + "/" + taskID, Selectors: proved, CanReattest: true, Foreign: foreign, README: "README.md",
		})
	})
	t.Run("proof, and what ECS says", func(t *testing.T) {
		attestortest.Run(t, attestortest.Pair{
			Node: node.Kind(), Judge: server.Kind(), NodeConfig: nodeConfig(c), JudgeConfig: proving(c) + looking(c) + "clusters = [\"prod\"]",
			Path: "ecs/" + account + "/" + taskID, CanReattest: true, Foreign: foreign, README: "README.md",
			Selectors: []string{
				"ecs:account_id:" + account, "ecs:cluster:prod", "ecs:family:shop", "ecs:launch-type:FARGATE", "ecs:region:us-east-1",
				"ecs:revision:26", "ecs:service:front", "ecs:task-arn:" + arn, "ecs:task-id:" + taskID, "ecs:task-role:shop-task",
			},
		})
	})
}

func openJudge(t *testing.T, body string) attestor.Judge {
	t.Helper()
	return attestortest.OpenJudge(t, server.Kind(), body, attestor.Needs{})
}

func evidence(t *testing.T, c *aws.Cloud, arn, td string) ([]byte, attestor.Ask) {
	t.Helper()
	n, err := node.Kind().Open(&ecs.AgentConfig{MetadataURI: c.MetadataURI(arn), CredentialsURI: c.CredentialsURI()},
		attestor.Needs{TrustDomain: spiffeid.RequireTrustDomainFromString(td)})
	if err != nil {
		t.Fatal(err)
	}
	payload, ask, err := n.Evidence(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return payload, ask
}

func TestForgeries(t *testing.T) {
	c := newCloud(t)
	payload, answer := evidence(t, c, arn, "example.org")
	refuse := func(t *testing.T, body string, payload []byte, ask attestor.Ask, want string) {
		t.Helper()
		if proof, err := openJudge(t, body).Judge(t.Context(), payload, ask); !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v, %v; want %q", proof, err, want)
		}
	}
	const otherID = "0f9de17a6465404e8b1b2356dc13c2f8"
	t.Run("another task of the same role cannot be this one", func(t *testing.T) {
		other := newCloud(t)
		other.AddTask(theTask(), roleKey(otherID, "shop-task"))
		c.Lock()
		c.Keys[other.Role.ID] = other.Role
		c.Unlock()
		_, by := evidence(t, other, arn, "example.org")
		refuse(t, proving(c), payload, by, "another task")
	})
	t.Run("another account's role of that name cannot, in a session that is called as the task", func(t *testing.T) {
		impostor := newCloud(t)
		key := roleKey(taskID, "shop-task")
		key.ID, key.Account, key.ARN = "ASIAIMPOSTOR", "210987654321", "arn:aws:sts::210987654321:assumed-role/shop-task/"+taskID
		impostor.AddTask(theTask(), key)
		c.Lock()
		c.Keys[key.ID] = key
		c.Unlock()
		_, by := evidence(t, impostor, arn, "example.org")
		refuse(t, proving(c), payload, by, "another task")
	})
	t.Run("an account that is not accepted does not count, however well it proves itself", func(t *testing.T) {
		const theirs = "210987654321"
		elsewhere := newCloud(t)
		key := roleKey(taskID, "shop-task")
		key.ID, key.Account, key.ARN = "ASIATHEIRS", theirs, "arn:aws:sts::"+theirs+":assumed-role/shop-task/"+taskID
		elsewhere.AddTask(theTask(), key)
		c.Lock()
		c.Keys[key.ID] = key
		c.Unlock()
		_, by := evidence(t, elsewhere, arn, "example.org")
		claim := []byte(strings.Replace(string(payload), account, theirs, 1))
		refuse(t, proving(c), claim, by, "account that is not accepted")
		proof, err := openJudge(t, strings.Replace(proving(c), account, theirs, 1)).Judge(t.Context(), claim, by)
		if err != nil || proof.Path != "ecs/"+theirs+"/"+taskID {
			t.Errorf("where it is accepted: %+v, %v", proof, err)
		}
	})
	t.Run("an ARN of the old form names no cluster to look the task up in", func(t *testing.T) {
		claim := []byte(strings.Replace(string(payload), "task/prod/", "task/", 1))
		refuse(t, proving(c)+looking(c), claim, answer, "ARN of the old form")
	})
	t.Run("a role that is not configured does not count", func(t *testing.T) {
		refuse(t, strings.Replace(proving(c), "shop-task", "db-task", 1), payload, answer, "task_roles")
	})
	t.Run("an instance's role does not count, whatever its session is called", func(t *testing.T) {
		other := newCloud(t)
		key := roleKey(taskID, "shop-task")
		key.ID, key.ARN = "AKIAUSER", "arn:aws:iam::"+account+":user/shop-task/"+taskID
		other.AddTask(theTask(), key)
		c.Lock()
		c.Keys[key.ID] = key
		c.Unlock()
		_, by := evidence(t, other, arn, "example.org")
		refuse(t, proving(c), payload, by, "not by a role in use")
	})
	t.Run("an answer made for another trust domain's server is refused", func(t *testing.T) {
		_, elsewhere := evidence(t, c, arn, "other.org")
		refuse(t, proving(c), payload, elsewhere, "AWS does not believe")
	})
	t.Run("another cluster's name in the ARN is found out", func(t *testing.T) {
		claim := []byte(strings.Replace(string(payload), "/prod/", "/dev/", 1))
		refuse(t, proving(c)+looking(c), claim, answer, "no such task")
	})
	t.Run("a cluster that is not accepted", func(t *testing.T) {
		refuse(t, proving(c)+looking(c)+`clusters = ["dev"]`, payload, answer, "cluster that is not accepted")
	})
	for _, status := range []string{"STOPPED", "STOPPING", "DEPROVISIONING"} {
		t.Run("a task that ended: "+status, func(t *testing.T) {
			ended := newCloud(t)
			is := theTask()
			is.Status = status
			ended.AddTask(is, ended.Role)
			payload, answer := evidence(t, ended, arn, "example.org")
			refuse(t, proving(ended)+looking(ended), payload, answer, "does not run")
		})
	}
	t.Run("ECS in trouble is nobody's fault", func(t *testing.T) {
		for why, trouble := range map[string]func(http.ResponseWriter, *http.Request) bool{
			"it fails": func(w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(http.StatusInternalServerError)
				return true
			},
			"it throttles": func(w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(http.StatusBadRequest)
				fmt.Fprint(w, `{"__type":"ThrottlingException"}`)
				return true
			},
			"it redirects": func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
				return true
			},
			"it babbles": func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "hello"); return true },
			"it floods":  func(w http.ResponseWriter, _ *http.Request) bool { _, _ = w.Write(make([]byte, 5<<20)); return true },
		} {
			broken := newCloud(t)
			payload, answer := evidence(t, broken, arn, "example.org")
			judge := openJudge(t, proving(broken)+looking(broken))
			broken.Lock()
			broken.Trouble = func(w http.ResponseWriter, r *http.Request) bool {
				return r.Header.Get("X-Amz-Target") != "" && trouble(w, r)
			}
			broken.Unlock()
			if proof, err := judge.Judge(t.Context(), payload, answer); err == nil || errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("%s: %+v, %v", why, proof, err)
			}
		}
	})
}

func TestParseTask(t *testing.T) {
	const uuid = "0f9de17a-6465-404e-8b1b-2356dc13c2f8"
	of := func(text string) string { return strings.NewReplacer("ACCOUNT", account, "ID", taskID).Replace(text) }
	for text, want := range map[string]ecs.Task{
		"arn:aws:ecs:us-east-1:ACCOUNT:task/prod/ID":            {Region: "us-east-1", Account: account, Cluster: "prod", ID: taskID},
		"arn:aws-cn:ecs:cn-north-1:ACCOUNT:task/prod/ID":        {Region: "cn-north-1", Account: account, Cluster: "prod", ID: taskID},
		"arn:aws:ecs:us-east-1:ACCOUNT:task/" + uuid:            {Region: "us-east-1", Account: account, ID: uuid},
		"arn:aws-fake:ecs:us-east-1:ACCOUNT:task/prod/ID":       {},
		"arn:aws:ec2:us-east-1:ACCOUNT:task/prod/ID":            {},
		"urn:aws:ecs:us-east-1:ACCOUNT:task/prod/ID":            {},
		"arn:aws:ecs:us-east-1:ACCOUNT:task-definition/prod/ID": {},
		"arn:aws:ecs:us-east-1:ACCOUNT:service/ID":              {},
		"arn:aws:ecs:us-east-1:ACCOUNT:task/prod/more/ID":       {},
		"arn:aws:ecs:us-east-1:ACCOUNT:task/prod/../ID":         {},
		"arn:aws:ecs:us-east-1:ACCOUNT:task/prod/IDx":           {},
		"arn:aws:ecs:us-east-1:ACCOUNT:task/prod/..":            {},
		"arn:aws:ecs:us-east-1:ACCOUNT:task/prod/":              {},
		"arn:aws:ecs:us-east-1:ACCOUNT:task//ID":                {},
		"arn:aws:ecs:us-east-1:ACCOUNT:task/a.b/ID":             {},
		"arn:aws:ecs:us-east-1:ACCOUNT1:task/prod/ID":           {},
		"arn:aws:ecs:us-east-1::task/prod/ID":                   {},
		"arn:aws:ecs:us-east-1.evil.test:ACCOUNT:task/prod/ID":  {},
		"arn:aws:ecs::ACCOUNT:task/prod/ID":                     {},
		"arn:aws:ecs:us-east-1:ACCOUNT:task/prod/ID:more":       {},
		"": {},
	} {
		text = of(text)
		if want.ID != "" {
			want.ARN = text
		}
		if got, err := ecs.ParseTask(text); got != want || (err == nil) != (want.ID != "") {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}

func TestNode(t *testing.T) {
	t.Run("a metadata service that redirects, babbles, floods or names no task is an error", func(t *testing.T) {
		for why, trouble := range map[string]func(http.ResponseWriter, *http.Request) bool{
			"redirects": func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, "/elsewhere", http.StatusFound)
				return true
			},
			"babbles":       func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "hello"); return true },
			"floods":        func(w http.ResponseWriter, _ *http.Request) bool { _, _ = w.Write(make([]byte, 2<<20)); return true },
			"names nothing": func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "{}"); return true },
			"refuses":       func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(http.StatusForbidden); return true },
		} {
			c := newCloud(t)
			c.Trouble = trouble
			n, err := node.Kind().Open(&ecs.AgentConfig{MetadataURI: c.MetadataURI(arn)}, attestor.Needs{TrustDomain: attestortest.TrustDomain})
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := n.Evidence(t.Context()); err == nil {
				t.Errorf("%s: no error", why)
			}
		}
	})
	t.Run("a credentials service that redirects, babbles, floods or has none answers no challenge", func(t *testing.T) {
		for why, trouble := range map[string]func(http.ResponseWriter, *http.Request){
			"redirects": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) },
			"babbles":   func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") },
			"floods":    func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 2<<20)) },
			"has none":  func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") },
			"refuses":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) },
		} {
			c := newCloud(t)
			c.Trouble = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasPrefix(r.URL.Path, "/v2/credentials/") {
					return false
				}
				trouble(w, r)
				return true
			}
			n, err := node.Kind().Open(&ecs.AgentConfig{MetadataURI: c.MetadataURI(arn), CredentialsURI: c.CredentialsURI()}, attestor.Needs{TrustDomain: attestortest.TrustDomain})
			if err != nil {
				t.Fatal(err)
			}
			_, answer, err := n.Evidence(t.Context())
			if err != nil {
				t.Fatalf("%s: %v", why, err)
			}
			question, _ := json.Marshal(awsapi.Challenge{Region: "us-east-1", Nonce: make([]byte, awsapi.NonceSize)})
			if said, err := answer(t.Context(), question); err == nil {
				t.Errorf("%s: it answers %s", why, said)
			}
		}
	})
	t.Run("one that hangs is given up with the context", func(t *testing.T) {
		c := newCloud(t)
		hang := make(chan struct{})
		defer close(hang)
		c.Trouble = func(_ http.ResponseWriter, r *http.Request) bool {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
			return true
		}
		n, err := node.Kind().Open(&ecs.AgentConfig{MetadataURI: c.MetadataURI(arn)}, attestor.Needs{TrustDomain: attestortest.TrustDomain})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, _, err := n.Evidence(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("outside of ECS it says so", func(t *testing.T) {
		t.Setenv("ECS_CONTAINER_METADATA_URI_V4", "")
		n, err := node.Kind().Open(&ecs.AgentConfig{}, attestor.Needs{TrustDomain: attestortest.TrustDomain})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := n.Evidence(t.Context()); err == nil || !strings.Contains(err.Error(), "ECS_CONTAINER_METADATA_URI_V4") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("the environment does not lead it away from its link", func(t *testing.T) {
		t.Setenv("ECS_CONTAINER_METADATA_URI_V4", "http://203.0.113.7/v4/x")
		n, err := node.Kind().Open(&ecs.AgentConfig{}, attestor.Needs{TrustDomain: attestortest.TrustDomain})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := n.Evidence(t.Context()); err == nil || !strings.Contains(err.Error(), "link") {
			t.Errorf("error is %v", err)
		}
	})
}

func TestConfig(t *testing.T) {
	good := ecs.ServerConfig{AccountIDs: []string{account}, Regions: []string{"us-east-1"}, TaskRoles: []string{"shop-task"}}
	for why, flaw := range map[string]func(*ecs.ServerConfig){
		"no accounts":                      func(c *ecs.ServerConfig) { c.AccountIDs = nil },
		"an account that is no":            func(c *ecs.ServerConfig) { c.AccountIDs = []string{"*"} },
		"no regions":                       func(c *ecs.ServerConfig) { c.Regions = nil },
		"no roles":                         func(c *ecs.ServerConfig) { c.TaskRoles = nil },
		"a role that is an ARN":            func(c *ecs.ServerConfig) { c.TaskRoles = []string{"arn:aws:iam::1:role/x"} },
		"clusters that nobody looks up":    func(c *ecs.ServerConfig) { c.Clusters = []string{"prod"} },
		"refreshing what is not looked up": func(c *ecs.ServerConfig) { c.RefreshInterval = "1m" },
		"refreshing always":                func(c *ecs.ServerConfig) { c.LookupTask, c.RefreshInterval = true, "1ms" },
		"half a key":                       func(c *ecs.ServerConfig) { c.AccessKeyID = "x" },
		"plain HTTP":                       func(c *ecs.ServerConfig) { c.ECSEndpoint = "http://ecs.example.org" },
	} {
		c := good
		flaw(&c)
		if _, err := server.Kind().Open(&c, attestor.Needs{}); err == nil {
			t.Errorf("%s: accepted", why)
		}
	}
	if _, err := server.Kind().Open(&good, attestor.Needs{}); err != nil {
		t.Error(err)
	}
}

func FuzzJudge(f *testing.F) {
	f.Add([]byte(`{"task_arn":"` + arn + `"}`))
	f.Add([]byte(`{"task_arn":"arn:aws:ecs:::task//"}`))
	judge, err := server.Kind().Open(&ecs.ServerConfig{AccountIDs: []string{account}, Regions: []string{"us-east-1"}, TaskRoles: []string{"r"}}, attestor.Needs{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		proof, err := judge.Judge(t.Context(), payload, func(context.Context, []byte) ([]byte, error) { return []byte("{}"), nil })
		if err == nil {
			t.Errorf("believed: %+v", proof)
		}
	})
}
