package awsiid_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/awsiid"
	"github.com/assay-id/assay/attestor/awsiid/node"
	"github.com/assay-id/assay/attestor/awsiid/server"
	"github.com/assay-id/assay/test/fake/aws"
)

const (
	account  = "123456789012"
	instance = "i-0123456789abcdef0"
)

// selectors are those that the document alone proves.
var selectors = []string{
	"aws_iid:account_id:" + account, "aws_iid:az:us-east-1a", "aws_iid:image:id:ami-0123456789abcdef0",
	"aws_iid:instance:id:" + instance, "aws_iid:region:us-east-1",
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func forged(t testing.TB) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob("testdata/forged/*.json")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no forged evidence: %v", err)
	}
	all := map[string][]byte{}
	for _, path := range paths {
		all[strings.TrimSuffix(filepath.Base(path), ".json")] = read(t, path)
	}
	return all
}

// instanceKey is the key that EC2 would issue to the role of an instance.
func instanceKey(id, role string) aws.Key {
	return aws.Key{
		ID: "ASIA" + strings.ToUpper(id[2:]), Secret: "secret of " + id, Token: "token of " + id, Account: account,
		ARN: "arn:aws:sts::" + account + ":assumed-role/" + role + "/" + id,
	}
}

// newCloud is a cloud with one instance, seen from within that instance.
func newCloud(t testing.TB) *aws.Cloud {
	t.Helper()
	c := aws.New()
	t.Cleanup(c.Close)
	var e awsiid.Evidence
	if err := json.Unmarshal(read(t, "testdata/real.json"), &e); err != nil {
		t.Fatal(err)
	}
	c.Metadata["dynamic/instance-identity/document"] = e.Document
	c.Metadata["dynamic/instance-identity/signature"] = "AAAA"
	c.Metadata["dynamic/instance-identity/rsa2048"] = e.RSA2048
	c.Instances[instance] = aws.Instance{
		ID: instance, Account: account, State: "running", Profile: "arn:aws:iam::" + account + ":instance-profile/web-profile", Role: "web",
		Tags: map[string]string{"tier": "front"}, Groups: map[string]string{"sg-1": "default"},
	}
	c.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: account, ARN: "arn:aws:iam::" + account + ":user/assay"}
	c.GiveRole("web", instanceKey(instance, "web"))
	return c
}

const judgeConfig = `
	account_ids         = ["123456789012"]
	region_certificates = {
		"us-east-1" = "testdata/us-east-1.pem"
		"eu-west-1" = "testdata/eu-west-1.pem"
	}`

func proving(c *aws.Cloud) string {
	return judgeConfig + fmt.Sprintf("\ninstance_roles = [\"web\"]\nrequire_proof = true\nsts_endpoint = %q\n", c.URL())
}

func looking(c *aws.Cloud) string {
	return fmt.Sprintf("\nlookup_instance = true\nec2_endpoint = %[1]q\niam_endpoint = %[1]q\naccess_key_id = \"AKIASERVER\"\nsecret_access_key = \"s3cret\"\n", c.URL())
}

func openJudge(t testing.TB, body string) attestor.Judge {
	t.Helper()
	return attestortest.OpenJudge(t, server.Kind(), body, attestor.Needs{})
}

func openNode(t testing.TB, c *aws.Cloud, td string) ([]byte, attestor.Ask) {
	t.Helper()
	n, err := node.Kind().Open(&awsiid.AgentConfig{MetadataEndpoint: c.URL()}, attestor.Needs{TrustDomain: spiffeid.RequireTrustDomainFromString(td)})
	if err != nil {
		t.Fatal(err)
	}
	payload, answer, err := n.Evidence(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return payload, answer
}

func TestSuite(t *testing.T) {
	c := newCloud(t)
	foreign := forged(t)
	foreign["the document alone"] = read(t, "testdata/real.json")
	attestortest.Run(t, attestortest.Pair{
		Node: node.Kind(), Judge: server.Kind(),
		NodeConfig: fmt.Sprintf("ec2_metadata_endpoint = %q", c.URL()), JudgeConfig: proving(c) + looking(c),
		Path: "aws_iid/" + account + "/us-east-1/" + instance,
		Selectors: slices.Sorted(slices.Values(append(slices.Clone(selectors),
			"aws_iid:tag:tier:front", "aws_iid:sg:id:sg-1", "aws_iid:sg:name:default", "aws_iid:iamrole:arn:aws:iam::"+account+":role/web"))),
		CanReattest: true,
		Foreign:     foreign,
		README:      "README.md",
	})
}

// mustNotAsk fails the test if the judge asks anything.
func mustNotAsk(t *testing.T) attestor.Ask {
	return func(context.Context, []byte) ([]byte, error) {
		t.Error("a challenge")
		return nil, errors.New("a challenge")
	}
}

func TestDocumentAlone(t *testing.T) {
	judge := openJudge(t, judgeConfig)
	for _, name := range []string{"real", "real-indefinite-lengths"} {
		t.Run("SPIRE's payload is good once: "+name, func(t *testing.T) {
			proof, err := judge.Judge(t.Context(), read(t, "testdata/"+name+".json"), mustNotAsk(t))
			if err != nil || proof.CanReattest || proof.Path != "aws_iid/"+account+"/us-east-1/"+instance {
				t.Errorf("%+v, %v", proof, err)
			}
			if got := attestor.NewSet(proof.Selectors...).Strings(); !slices.Equal(got, selectors) {
				t.Errorf("selectors are %q", got)
			}
		})
	}
	for why, payload := range forged(t) {
		t.Run("forged: "+why, func(t *testing.T) {
			if proof, err := judge.Judge(t.Context(), payload, mustNotAsk(t)); !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("%+v, %v", proof, err)
			}
		})
	}
	t.Run("an instance that is too old is refused without proof", func(t *testing.T) {
		_, err := openJudge(t, judgeConfig+"\nmax_instance_age = \"10m\"").Judge(t.Context(), read(t, "testdata/real.json"), mustNotAsk(t))
		if !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "too old") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("an instance without a role shows the document alone", func(t *testing.T) {
		c := newCloud(t)
		delete(c.Metadata, "meta-data/iam/security-credentials/")
		payload, answer := openNode(t, c, "example.org")
		if answer != nil {
			t.Error("it would answer challenges")
		}
		if _, err := judge.Judge(t.Context(), payload, mustNotAsk(t)); err != nil {
			t.Error(err)
		}
		if _, err := openJudge(t, proving(c)).Judge(t.Context(), payload, mustNotAsk(t)); !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("where proof is required: %v", err)
		}
	})
}

func TestProof(t *testing.T) {
	c := newCloud(t)
	payload, answer := openNode(t, c, "example.org")
	refuse := func(t *testing.T, body string, ask attestor.Ask, want string) {
		t.Helper()
		if proof, err := openJudge(t, body).Judge(t.Context(), payload, ask); !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v, %v; want %q", proof, err, want)
		}
	}
	other := newCloud(t)
	other.GiveRole("web", instanceKey("i-0fedcba9876543210", "web"))
	_, byOther := openNode(t, other, "example.org")
	c.Lock()
	maps.Copy(c.Keys, other.Keys)
	c.Unlock()
	t.Run("another instance of the account cannot answer", func(t *testing.T) {
		refuse(t, proving(c), byOther, "another instance")
	})
	t.Run("another account's role of that name cannot, in a session that is called as the instance", func(t *testing.T) {
		impostor := newCloud(t)
		key := instanceKey(instance, "web")
		key.ID, key.Account, key.ARN = "ASIAIMPOSTOR", "210987654321", "arn:aws:sts::210987654321:assumed-role/web/"+instance
		impostor.GiveRole("web", key)
		_, by := openNode(t, impostor, "example.org")
		c.Lock()
		c.Keys[key.ID] = key
		c.Unlock()
		refuse(t, proving(c), by, "another instance")
	})
	t.Run("a role that is not configured does not count", func(t *testing.T) {
		refuse(t, strings.Replace(proving(c), `["web"]`, `["db"]`, 1), answer, "instance_roles")
	})
	t.Run("an answer made for another trust domain's server is refused", func(t *testing.T) {
		_, elsewhere := openNode(t, c, "other.org")
		refuse(t, proving(c), elsewhere, "AWS does not believe")
	})
	t.Run("a user of the account with a fitting name is no instance", func(t *testing.T) {
		impostor := newCloud(t)
		key := aws.Key{ID: "AKIAUSER", Secret: "x", Account: account, ARN: "arn:aws:iam::" + account + ":user/web/" + instance}
		impostor.GiveRole("web", key)
		_, by := openNode(t, impostor, "example.org")
		c.Lock()
		c.Keys[key.ID] = key
		c.Unlock()
		refuse(t, proving(c), by, "not by a role in use")
	})
	t.Run("a signature that leaves the nonce out is refused before anybody is asked", func(t *testing.T) {
		all := awsapi.CallerRequest("us-east-1", "example.org", make([]byte, awsapi.NonceSize))
		key := instanceKey(instance, "web")
		all.Sign(awsapi.Credentials{ID: key.ID, Secret: key.Secret, Token: key.Token}, "us-east-1", "sts", time.Now())
		whole := "SignedHeaders=" + all.SignedHeaders()
		for how, dress := range map[string]func(string) string{
			"plainly":                           func(a string) string { return a },
			"and names it before":               func(a string) string { return strings.Replace(a, "SignedHeaders=", whole+", SignedHeaders=", 1) },
			"and names it after":                func(a string) string { return strings.Replace(a, ", Signature=", ", "+whole+", Signature=", 1) },
			"and names it at the end":           func(a string) string { return a + ", " + whole + "," },
			"and names it in another's key":     func(a string) string { return strings.Replace(a, "Credential=", "Credential="+whole+",", 1) },
			"and names it in a line of its own": func(a string) string { return a + "\r\nX: " + whole + "," },
		} {
			asked := c.Asked["GetCallerIdentity"]
			refuse(t, proving(c), func(context.Context, []byte) ([]byte, error) {
				request := awsapi.CallerRequest("us-east-1", "example.org", make([]byte, awsapi.NonceSize))
				delete(request.Headers, awsapi.NonceHeader)
				request.Sign(awsapi.Credentials{ID: key.ID, Secret: key.Secret, Token: key.Token}, "us-east-1", "sts", time.Now())
				return json.Marshal(awsapi.Response{Authorization: dress(request.Headers["Authorization"]), Date: request.Headers["X-Amz-Date"], Token: key.Token})
			}, "does not sign what was asked for")
			if c.Asked["GetCallerIdentity"] != asked {
				t.Errorf("%s: AWS was asked", how)
			}
		}
	})
	t.Run("an instance that was stopped is refused", func(t *testing.T) {
		for _, state := range []string{"stopping", "stopped", "shutting-down", "terminated", "", "of another world"} {
			stopped := c.Instances[instance]
			stopped.State = state
			c.Lock()
			c.Instances[instance] = stopped
			c.Unlock()
			refuse(t, proving(c)+looking(c), answer, "does not run")
		}
	})
	t.Run("an instance of another role than it proves is refused", func(t *testing.T) {
		changed := c.Instances[instance]
		changed.State, changed.Role = "running", "db"
		c.Lock()
		c.Instances[instance] = changed
		c.Unlock()
		refuse(t, proving(c)+looking(c), answer, "another role")
	})
	t.Run("AWS that hangs is given up with the context", func(t *testing.T) {
		slow, hang := newCloud(t), make(chan struct{})
		defer close(hang)
		judge := openJudge(t, proving(slow)+looking(slow))
		slow.Trouble = func(_ http.ResponseWriter, r *http.Request) bool {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
			return true
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if proof, err := judge.Judge(ctx, payload, answer); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("%+v, %v", proof, err)
		}
	})
	t.Run("AWS in trouble is nobody's fault", func(t *testing.T) {
		for why, trouble := range map[string]func(http.ResponseWriter, *http.Request) bool{
			"it fails": func(w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(http.StatusInternalServerError)
				return true
			},
			"it redirects": func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
				return true
			},
			"it babbles": func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "hello"); return true },
			"it is asked too often": func(w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(http.StatusBadRequest)
				fmt.Fprint(w, "<ErrorResponse><Error><Code>Throttling</Code></Error></ErrorResponse>")
				return true
			},
			"it floods": func(w http.ResponseWriter, _ *http.Request) bool {
				_, _ = w.Write(make([]byte, 5<<20))
				return true
			},
		} {
			broken := newCloud(t)
			broken.Trouble = trouble
			if proof, err := openJudge(t, proving(broken)).Judge(t.Context(), payload, answer); err == nil || errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("%s: %+v, %v", why, proof, err)
			}
		}
	})
}

func TestNode(t *testing.T) {
	t.Run("it signs for its own region's STS and nothing else", func(t *testing.T) {
		c := newCloud(t)
		_, answer := openNode(t, c, "example.org")
		for _, region := range []string{"eu-west-1", "", "us-east-1.evil.example/"} {
			question, _ := json.Marshal(awsapi.Challenge{Region: region, Nonce: make([]byte, awsapi.NonceSize)})
			if _, err := answer(t.Context(), question); err == nil {
				t.Errorf("region %q: answered", region)
			}
		}
	})
	t.Run("nor a nonce of another size", func(t *testing.T) {
		_, answer := openNode(t, newCloud(t), "example.org")
		for size, want := range map[int]bool{0: false, awsapi.NonceSize - 1: false, awsapi.NonceSize: true, awsapi.NonceSize + 1: false} {
			question, _ := json.Marshal(awsapi.Challenge{Region: "us-east-1", Nonce: make([]byte, size)})
			if _, err := answer(t.Context(), question); (err == nil) != want {
				t.Errorf("a nonce of %d bytes: %v", size, err)
			}
		}
	})
	t.Run("a metadata service that redirects, babbles or floods is refused", func(t *testing.T) {
		for why, trouble := range map[string]func(http.ResponseWriter, *http.Request) bool{
			"redirects": func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, "/elsewhere", http.StatusFound)
				return true
			},
			"babbles": func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "hello"); return true },
			"floods":  func(w http.ResponseWriter, _ *http.Request) bool { _, _ = w.Write(make([]byte, 1<<20)); return true },
			"refuses": func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(http.StatusForbidden); return true },
		} {
			c := newCloud(t)
			c.Trouble = trouble
			n, err := node.Kind().Open(&awsiid.AgentConfig{MetadataEndpoint: c.URL()}, attestor.Needs{TrustDomain: attestortest.TrustDomain})
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := n.Evidence(t.Context()); err == nil {
				t.Errorf("%s: no error", why)
			}
		}
	})
	t.Run("one that hangs is given up with the context", func(t *testing.T) {
		hang := make(chan struct{})
		c := newCloud(t)
		c.Trouble = func(_ http.ResponseWriter, r *http.Request) bool {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
			return true
		}
		defer close(hang)
		n, err := node.Kind().Open(&awsiid.AgentConfig{MetadataEndpoint: c.URL()}, attestor.Needs{TrustDomain: attestortest.TrustDomain})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, _, err := n.Evidence(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error is %v", err)
		}
	})
}

func TestAgentPathTemplate(t *testing.T) {
	judge := openJudge(t, judgeConfig+"\nagent_path_template = \"{{ .PluginName }}/{{ .Region }}/{{ .InstanceID }}\"")
	proof, err := judge.Judge(t.Context(), read(t, "testdata/real.json"), mustNotAsk(t))
	if err != nil || proof.Path != "aws_iid/us-east-1/"+instance {
		t.Errorf("%+v, %v", proof, err)
	}
	for template, want := range map[string]string{
		"{{ .PluginName }}/{{ .InstanceID }}/{{ .Tags.tier }}": "no .Tags",
		"{{ .PluginName }}/{{ .AccountID }}/{{ .Region }}":     "all instances would have one path",
	} {
		config := awsiid.ServerConfig{AccountIDs: []string{account}, AgentPathTemplate: template}
		if _, err := server.Kind().Open(&config, attestor.Needs{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", template, err)
		}
	}
}

func TestConfig(t *testing.T) {
	for why, c := range map[string]awsiid.ServerConfig{
		"no accounts":             {RegionCertificates: map[string]string{"us-east-1": "testdata/us-east-1.pem"}},
		"an account that is no":   {AccountIDs: []string{"*"}, RegionCertificates: map[string]string{"us-east-1": "testdata/us-east-1.pem"}},
		"a region that is none":   {AccountIDs: []string{account}, RegionCertificates: map[string]string{"*": "testdata/us-east-1.pem"}},
		"no certificate":          {AccountIDs: []string{account}, RegionCertificates: map[string]string{"us-east-1": "testdata/real.json"}},
		"proof without roles":     {AccountIDs: []string{account}, RegionCertificates: map[string]string{"us-east-1": "testdata/us-east-1.pem"}, RequireProof: true},
		"half a key":              {AccountIDs: []string{account}, RegionCertificates: map[string]string{"us-east-1": "testdata/us-east-1.pem"}, AccessKeyID: "x"},
		"an age that is none":     {AccountIDs: []string{account}, RegionCertificates: map[string]string{"us-east-1": "testdata/us-east-1.pem"}, MaxInstanceAge: "old"},
		"a template that is none": {AccountIDs: []string{account}, RegionCertificates: map[string]string{"us-east-1": "testdata/us-east-1.pem"}, AgentPathTemplate: "{{"},
		"refreshing nothing":      {AccountIDs: []string{account}, RegionCertificates: map[string]string{"us-east-1": "testdata/us-east-1.pem"}, RefreshInterval: "1m"},
		"refreshing always":       {AccountIDs: []string{account}, RegionCertificates: map[string]string{"us-east-1": "testdata/us-east-1.pem"}, RefreshInterval: "1s", LookupInstance: true},
		"plain HTTP":              {AccountIDs: []string{account}, RegionCertificates: map[string]string{"us-east-1": "testdata/us-east-1.pem"}, STSEndpoint: "http://sts.example.org"},
	} {
		if _, err := server.Kind().Open(&c, attestor.Needs{}); err == nil {
			t.Errorf("%s: accepted", why)
		}
	}
}

func FuzzJudge(f *testing.F) {
	f.Add(read(f, "testdata/real.json"))
	for _, payload := range forged(f) {
		f.Add(payload)
	}
	judge := openJudge(f, judgeConfig)
	f.Fuzz(func(t *testing.T, payload []byte) {
		proof, err := judge.Judge(t.Context(), payload, nil)
		if err == nil && proof.Path != "aws_iid/"+account+"/us-east-1/"+instance {
			t.Errorf("believed: %+v", proof)
		}
	})
}
