package k8spsat_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/k8spsat"
	"github.com/assay-id/assay/attestor/k8spsat/node"
	"github.com/assay-id/assay/attestor/k8spsat/server"
)

const (
	nodeUID = "5dbb7b21-65fe-11e9-b1b0-0800277ac80f"
	podUID  = "79261129-6b60-11e9-9054-0800277ac80f"
	// patience is how long anything may take on a busy machine before it counts as not happening.
	patience = 60 * time.Second
)

type dict = map[string]any

// apiServer is as much of an API server as the judge asks: the real one is in test/lab.
type apiServer struct {
	*httptest.Server
	kubeconfig string

	mu      sync.Mutex // guards all below
	token   string
	status  dict     // of the review of that token
	asked   []string // the audiences that the last review was for
	pod     dict
	node    dict
	away    bool
	version int
	woken   chan struct{}
}

func startAPI(t *testing.T) *apiServer {
	t.Helper()
	a := &apiServer{
		token: "good", woken: make(chan struct{}), version: 5,
		status: dict{
			"authenticated": true, "audiences": []string{"spire-server"},
			"user": dict{"username": "system:serviceaccount:assay:agent", "extra": dict{
				"authentication.kubernetes.io/pod-name": []string{"agent-x"}, "authentication.kubernetes.io/pod-uid": []string{podUID},
				"authentication.kubernetes.io/node-name": []string{"n1"}, "authentication.kubernetes.io/node-uid": []string{nodeUID},
			}},
		},
		pod: dict{
			"metadata": dict{"name": "agent-x", "namespace": "assay", "uid": podUID, "labels": dict{"app": "agent"}},
			"spec":     dict{"serviceAccountName": "agent", "nodeName": "n1"},
			"status":   dict{"phase": "Running", "hostIP": "172.16.10.1"},
		},
		node: dict{"metadata": dict{"name": "n1", "uid": nodeUID, "labels": dict{"zone": "a", "other": "x"}}},
	}
	a.Server = httptest.NewUnstartedServer(a)
	a.EnableHTTP2 = true
	a.StartTLS()
	t.Cleanup(func() { a.CloseClientConnections(); a.Close() })
	a.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})
	config, _ := json.Marshal(dict{ // YAML too
		"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": []dict{{"name": "c", "cluster": dict{"server": a.URL, "certificate-authority-data": ca}}},
		"users":    []dict{{"name": "u", "user": dict{"token": "server"}}},
		"contexts": []dict{{"name": "c", "context": dict{"cluster": "c", "user": "u"}}},
	})
	if err := os.WriteFile(a.kubeconfig, config, 0o600); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	away := a.away
	a.mu.Unlock()
	answer := func(kind string, object dict) {
		out := dict{"apiVersion": "v1", "kind": kind}
		if kind == "TokenReview" {
			out["apiVersion"] = "authentication.k8s.io/v1"
		}
		maps.Copy(out, object)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(out) // a caller who left
	}
	status := func(code int, reason string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		answer("Status", dict{"status": "Failure", "reason": reason, "code": code})
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case away:
		status(http.StatusServiceUnavailable, "ServiceUnavailable")
	case strings.HasSuffix(r.URL.Path, "/tokenreviews"):
		var review struct {
			Spec struct {
				Token     string
				Audiences []string
			}
		}
		if json.NewDecoder(r.Body).Decode(&review) != nil || review.Spec.Token != a.token {
			answer("TokenReview", dict{"status": dict{"authenticated": false, "error": "secret reason"}})
			return
		}
		a.asked = review.Spec.Audiences
		answer("TokenReview", dict{"status": a.status})
	case a.pod != nil && r.URL.Path == fmt.Sprintf("/api/v1/namespaces/%s/pods/agent-x", a.pod["metadata"].(dict)["namespace"]):
		answer("Pod", a.pod)
	case r.URL.Path == "/api/v1/nodes/n1" && a.node != nil:
		answer("Node", a.node)
	case r.URL.Query().Get("watch") != "" && r.URL.Query().Get("sendInitialEvents") == "":
		a.watch(w, r)
	case r.URL.Path == "/api/v1/nodes" && r.URL.Query().Get("watch") == "":
		answer("NodeList", dict{"metadata": dict{"resourceVersion": strconv.Itoa(a.version)}, "items": []dict{a.node}})
	case r.URL.Path == "/api/v1/namespaces/assay/pods" && r.URL.Query().Get("watch") == "":
		answer("PodList", dict{"metadata": dict{"resourceVersion": strconv.Itoa(a.version)}, "items": []dict{a.pod}})
	default:
		status(http.StatusNotFound, "NotFound")
	}
}

// watch tells of the object as it is whenever something has changed since the version that the caller
// knows. The caller holds mu.
func (a *apiServer) watch(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	told, err := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	if err != nil {
		told = a.version
	}
	for r.Context().Err() == nil {
		if told < a.version {
			told = a.version
			kind, object := "Node", a.node
			if strings.HasSuffix(r.URL.Path, "/pods") {
				kind, object = "Pod", a.pod
			}
			out := dict{"kind": kind, "apiVersion": "v1"}
			maps.Copy(out, object)
			_ = json.NewEncoder(w).Encode(dict{"type": "MODIFIED", "object": out}) // a caller who left
		}
		_ = http.NewResponseController(w).Flush()
		woken := a.woken
		a.mu.Unlock()
		select {
		case <-woken:
		case <-r.Context().Done():
		}
		a.mu.Lock()
	}
}

// change changes something while nobody looks, and wakes the watches.
func (a *apiServer) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	a.version++
	for _, o := range []dict{a.pod, a.node} {
		if o != nil {
			o["metadata"].(dict)["resourceVersion"] = strconv.Itoa(a.version)
		}
	}
	close(a.woken)
	a.woken = make(chan struct{})
}

func (a *apiServer) config(more string) string {
	return fmt.Sprintf(`cluster "prod" {
		service_account_allow_list = ["assay:agent"]
		kube_config_file = %q
		%s
	}`, a.kubeconfig, more)
}

const labels = `allowed_node_label_keys = ["zone", "absent"]
	allowed_pod_label_keys = ["app"]`

var selectors = []string{
	"k8s_psat:agent_node_ip:172.16.10.1", "k8s_psat:agent_node_label:zone:a", "k8s_psat:agent_node_name:n1",
	"k8s_psat:agent_node_uid:" + nodeUID, "k8s_psat:agent_ns:assay", "k8s_psat:agent_pod_label:app:agent",
	"k8s_psat:agent_pod_name:agent-x", "k8s_psat:agent_pod_uid:" + podUID, "k8s_psat:agent_sa:agent", "k8s_psat:cluster:prod",
}

func tokenFile(t *testing.T, token string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSuite(t *testing.T) {
	a := startAPI(t)
	attestortest.Run(t, attestortest.Pair{
		Node: node.Kind(), Judge: server.Kind(),
		NodeConfig:  fmt.Sprintf("cluster = \"prod\"\ntoken_path = %q", tokenFile(t, "good")),
		JudgeConfig: a.config(labels),
		Path:        "k8s_psat/prod/" + nodeUID, Selectors: selectors, CanReattest: true, Bearer: true,
		Foreign: map[string][]byte{
			"another cluster": []byte(`{"cluster":"other","token":"good"}`),
			"another token":   []byte(`{"cluster":"prod","token":"bad"}`),
			"no token":        []byte(`{"cluster":"prod","token":""}`),
			"a huge token":    []byte(`{"cluster":"prod","token":"` + strings.Repeat("x", k8spsat.MaxToken+1) + `"}`),
			"a wrong type":    []byte(`{"cluster":["prod"],"token":"good"}`),
		},
		README: "README.md",
	})
}

func openJudge(t *testing.T, body string) (attestor.Judge, error) {
	t.Helper()
	config, diags := attestortest.Decode(server.Kind().Config, body)
	if diags.HasErrors() {
		return nil, diags
	}
	return server.Kind().Open(config, attestor.Needs{})
}

func TestTheClusterAroundTheServerIsLookedForOnlyWhereItRuns(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for _, c := range []struct {
		name, body string
		trial      bool
		says       string
	}{
		{"outside", `service_account_allow_list = ["assay:agent"]`, false, "set kube_config_file"},
		{"outside, on trial", `service_account_allow_list = ["assay:agent"]`, true, ""},
		{"a mistake, on trial", `service_account_allow_list = ["agent"]`, true, `no "namespace:name"`},
		{"a file that is not there, on trial", "service_account_allow_list = [\"assay:agent\"]\nkube_config_file = \"/nowhere\"", true, "read kube_config_file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config, diags := attestortest.Decode(server.Kind().Config, "cluster \"prod\" {\n"+c.body+"\n}")
			if diags.HasErrors() {
				t.Fatal(diags)
			}
			_, err := server.Kind().Open(config, attestor.Needs{Trial: c.trial})
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %q", err, c.says)
			}
		})
	}
}

var good = []byte(`{"cluster":"prod","token":"good"}`)

func TestRefused(t *testing.T) {
	extra := func(a *apiServer) dict { return a.status["user"].(dict)["extra"].(dict) }
	meta := func(a *apiServer) dict { return a.pod["metadata"].(dict) }
	// as makes all that the API server says be of another account, so that nothing but the list refuses it.
	as := func(namespace, name string) func(a *apiServer) {
		return func(a *apiServer) {
			a.status["user"].(dict)["username"] = "system:serviceaccount:" + namespace + ":" + name
			meta(a)["namespace"], a.pod["spec"].(dict)["serviceAccountName"] = namespace, name
		}
	}
	const podName, podUIDKey = "authentication.kubernetes.io/pod-name", "authentication.kubernetes.io/pod-uid"
	for why, c := range map[string]struct {
		spoil func(a *apiServer)
		says  string
	}{
		"a token that is not good":                   {func(a *apiServer) { a.status["authenticated"] = false }, "token is not good"},
		"a token for another":                        {func(a *apiServer) { a.status["audiences"] = []string{"another"} }, "not for this server"},
		"an API server that knows no audiences":      {func(a *apiServer) { delete(a.status, "audiences") }, "not for this server"},
		"another service account":                    {as("assay", "agent2"), "not of a service account"},
		"another namespace":                          {as("evil", "agent"), "not of a service account"},
		"a user who is called like one":              {func(a *apiServer) { a.status["user"].(dict)["username"] = "assay:agent" }, "not of a service account"},
		"a token bound to no pod":                    {func(a *apiServer) { delete(extra(a), podName) }, "not bound to a pod"},
		"a token bound to no UID, and a pod without": {func(a *apiServer) { delete(extra(a), podUIDKey); meta(a)["uid"] = "" }, "not bound to a pod"},
		"a token bound to two pods":                  {func(a *apiServer) { extra(a)[podUIDKey] = []string{podUID, podUID} }, "several"},
		"a token bound to two nodes":                 {func(a *apiServer) { extra(a)["authentication.kubernetes.io/node-name"] = []string{"n1", "n2"} }, "several"},
		"a pod that is gone":                         {func(a *apiServer) { a.pod = nil }, "pod of the token is gone"},
		"another pod of that name":                   {func(a *apiServer) { meta(a)["uid"] = "other" }, "another has its name"},
		"a pod under another account":                {func(a *apiServer) { a.pod["spec"].(dict)["serviceAccountName"] = "default" }, "under another service account"},
		"a pod on no node":                           {func(a *apiServer) { a.pod["spec"].(dict)["nodeName"] = "" }, "not on its node"},
		"a pod on no node, and a token that names none": {func(a *apiServer) {
			a.pod["spec"].(dict)["nodeName"] = ""
			delete(extra(a), "authentication.kubernetes.io/node-name")
		}, "not on its node"},
		"a pod on another node than the token's":       {func(a *apiServer) { extra(a)["authentication.kubernetes.io/node-name"] = []string{"n2"} }, "not on its node"},
		"a node that has another UID than the token's": {func(a *apiServer) { extra(a)["authentication.kubernetes.io/node-uid"] = []string{"other"} }, "another has its name"},
		"a node without UID, and a token that names none": {func(a *apiServer) {
			a.node["metadata"].(dict)["uid"] = ""
			delete(extra(a), "authentication.kubernetes.io/node-uid")
		}, "another has its name"},
		"a node that is gone":  {func(a *apiServer) { a.node = nil }, "node of the token is gone"},
		"a pod that has ended": {func(a *apiServer) { a.pod["status"].(dict)["phase"] = "Succeeded" }, "has ended"},
		"a pod that failed":    {func(a *apiServer) { a.pod["status"].(dict)["phase"] = "Failed" }, "has ended"},
	} {
		t.Run(why, func(t *testing.T) {
			a := startAPI(t)
			j, err := openJudge(t, a.config(""))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := j.Judge(t.Context(), good, nil); err != nil {
				t.Fatalf("the good one is refused: %v", err)
			}
			a.change(func() {
				if !slices.Equal(a.asked, []string{k8spsat.DefaultAudience}) {
					t.Errorf("the token was reviewed for %q", a.asked)
				}
				c.spoil(a)
			})
			_, err = j.Judge(t.Context(), good, nil)
			if !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error is %v, want %q", err, c.says)
			}
			if !strings.Contains(err.Error(), `(cluster "prod"`) {
				t.Errorf("%v names no cluster", err)
			}
		})
	}
	t.Run("a refusal says whom it is about", func(t *testing.T) {
		a := startAPI(t)
		j, err := openJudge(t, a.config(""))
		if err != nil {
			t.Fatal(err)
		}
		a.change(func() { meta(a)["uid"] = "other" })
		_, err = j.Judge(t.Context(), good, nil)
		if want := `pod of the token is gone: another has its name (cluster "prod", service account "assay:agent", pod "` + a.pod["metadata"].(dict)["name"].(string) + `")`; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		a.change(func() { as("evil", "agent")(a) })
		_, err = j.Judge(t.Context(), good, nil)
		if want := `token is not of a service account that agents may have (cluster "prod", service account "evil:agent")`; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		_, err = j.Judge(t.Context(), []byte(`{"cluster":"`+strings.Repeat("x", 1000)+`","token":"good"}`), nil)
		if want := `cluster is not one that this server knows: "` + strings.Repeat("x", 100) + `"`; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	})
	t.Run("a label that cannot be a selector is left out", func(t *testing.T) {
		a := startAPI(t)
		j, err := openJudge(t, a.config(labels))
		if err != nil {
			t.Fatal(err)
		}
		a.change(func() { a.node["metadata"].(dict)["labels"] = dict{"zone": "a\nk8s_psat:agent_ns:kube-system"} })
		proof, err := j.Judge(t.Context(), good, nil)
		if has := attestor.NewSet(proof.Selectors...).Strings(); err != nil || strings.Contains(strings.Join(has, " "), "zone") {
			t.Errorf("selectors are %q, %v", has, err)
		}
	})
	t.Run("an API server that is away is no refusal", func(t *testing.T) {
		a := startAPI(t)
		j, err := openJudge(t, a.config(""))
		if err != nil {
			t.Fatal(err)
		}
		a.change(func() { a.away = true })
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if _, err := j.Judge(ctx, good, nil); err == nil || errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("with no audience the API server's counts, and agents may be pods", func(t *testing.T) {
		a := startAPI(t)
		j, err := openJudge(t, a.config("audience = []\nuse_pod_uid_for_agent_id = true"))
		if err != nil {
			t.Fatal(err)
		}
		a.change(func() { delete(a.status, "audiences") })
		proof, err := j.Judge(t.Context(), good, nil)
		if err != nil || proof.Path != "k8s_psat/prod/pod/"+podUID {
			t.Errorf("path %q, error %v", proof.Path, err)
		}
	})
}

func TestConfig(t *testing.T) {
	a := startAPI(t)
	for why, body := range map[string]string{
		"no cluster":                 "",
		"the same cluster twice":     a.config("") + "\n" + a.config(""),
		"an account without a space": strings.Replace(a.config(""), "assay:agent", "agent", 1),
		"an account of three parts":  strings.Replace(a.config(""), "assay:agent", "a:b:c", 1),
		"no account":                 strings.Replace(a.config(""), `"assay:agent"`, "", 1),
		"a name that is no segment":  strings.Replace(a.config(""), `"prod"`, `"a/b"`, 1),
		"no kubeconfig":              strings.Replace(a.config(""), a.kubeconfig, "/nowhere", 1),
	} {
		t.Run(why+" is refused", func(t *testing.T) {
			if _, err := openJudge(t, body); err == nil {
				t.Error("accepted")
			}
		})
	}
}

// agents are admitted ones, in memory.
type agents struct {
	mu   sync.Mutex
	have map[string]attestor.Set
}

func (g *agents) Each() iter.Seq2[string, attestor.Set] {
	return func(yield func(string, attestor.Set) bool) {
		g.mu.Lock()
		have := maps.Clone(g.have)
		g.mu.Unlock()
		for path, set := range have {
			if !yield(path, set) {
				return
			}
		}
	}
}

func (g *agents) Update(_ context.Context, path string, list []attestor.Selector) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.have[path] = attestor.NewSet(list...)
	return nil
}

func (g *agents) Evict(_ context.Context, path string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.have, path)
	return nil
}

func (g *agents) until(t *testing.T, path, what string, is func([]string) bool) {
	t.Helper()
	late := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		g.mu.Lock()
		has := g.have[path].Strings()
		g.mu.Unlock()
		if is(has) {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("never: %s; selectors are %q", what, has)
		}
	}
}

func TestFollow(t *testing.T) {
	a := startAPI(t)
	j, err := openJudge(t, a.config(labels))
	if err != nil {
		t.Fatal(err)
	}
	proof, err := j.Judge(t.Context(), good, nil)
	if err != nil {
		t.Fatal(err)
	}
	foreign := attestor.NewSet(attestor.Selector{Type: k8spsat.Type, Value: "cluster:other"}, attestor.Selector{Type: k8spsat.Type, Value: "agent_node_label:zone:z"})
	admitted := &agents{have: map[string]attestor.Set{proof.Path: attestor.NewSet(proof.Selectors...), "k8s_psat/other/x": foreign}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- j.(attestor.Follower).Follow(ctx, admitted) }()
	set := func(o dict, key, value string) func() {
		return func() { o["metadata"].(dict)["labels"] = dict{key: value} }
	}
	has := func(text string) func([]string) bool {
		return func(list []string) bool { return slices.Contains(list, text) }
	}
	a.change(set(a.node, "zone", "b"))
	admitted.until(t, proof.Path, "the node's label follows", has("k8s_psat:agent_node_label:zone:b"))
	a.change(set(a.pod, "app", "new"))
	admitted.until(t, proof.Path, "the pod's label follows", has("k8s_psat:agent_pod_label:app:new"))
	a.change(set(a.node, "other", "y"))
	admitted.until(t, proof.Path, "a label that is gone is gone", func(list []string) bool {
		return !strings.Contains(strings.Join(list, " "), "agent_node_label") && len(list) == len(selectors)-1
	})
	if got := admitted.have["k8s_psat/other/x"]; !got.Equal(foreign) {
		t.Errorf("another cluster's agent has %v", got.Strings())
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("it does not end")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(good)
	f.Add([]byte(`{"cluster":"`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		e, err := k8spsat.Parse(payload)
		if err == nil && (e.Cluster == "" || e.Token == "" || len(e.Token) > k8spsat.MaxToken) {
			t.Fatalf("accepted %q", payload)
		}
	})
}
