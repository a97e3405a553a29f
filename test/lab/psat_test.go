package lab_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/k8spsat"
	psat "github.com/assay-id/assay/attestor/k8spsat/server"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/kube"
)

// psatPatience is how long anything may take on a busy machine before it counts as not happening.
const psatPatience = 60 * time.Second

// TestPSAT has a real API server issue and review the tokens of k8s_psat.
func TestPSAT(t *testing.T) {
	bin, err := filepath.Abs("../../bin/k8s")
	if err != nil {
		t.Fatal(err)
	}
	if err := kube.Available(bin, false); err != nil {
		lab.Missing(t, "Kubernetes' API server", err)
	}
	c, err := kube.Start(t.Context(), bin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close cluster: %v", err)
		}
	})
	w := &psatWorld{Cluster: c}
	w.prepare(t)
	judge := w.judge(t)
	good := w.token(t, "agent", w.pod, "spire-server")

	proof, err := judge.Judge(t.Context(), psatEvidence(good), nil)
	if err != nil {
		t.Fatalf("the good token is refused: %v", err)
	}
	t.Run("the good token is believed", func(t *testing.T) {
		if want := "k8s_psat/lab/" + string(w.node.UID); proof.Path != want {
			t.Errorf("path is %q, want %q", proof.Path, want)
		}
		for _, want := range []string{
			"agent_ns:assay", "agent_sa:agent", "agent_pod_name:agent-x", "agent_pod_uid:" + string(w.pod.UID),
			"agent_node_name:n1", "agent_node_uid:" + string(w.node.UID), "agent_node_label:zone:a", "cluster:lab",
		} {
			if !slices.Contains(proof.Selectors, attestor.Selector{Type: k8spsat.Type, Value: want}) {
				t.Errorf("no %s in %v", want, proof.Selectors)
			}
		}
	})
	t.Run("one that is signed anew, as those below are, is believed", func(t *testing.T) {
		if _, err := judge.Judge(t.Context(), psatEvidence(forged(t, good, accountKey(t, c), nil)), nil); err != nil {
			t.Errorf("it is refused: %v", err)
		}
	})
	other := w.makePod(t, "other", "default")
	for why, token := range map[string]string{
		"for another audience":     w.token(t, "agent", w.pod, "another"),
		"for the API server":       w.token(t, "agent", w.pod),
		"bound to no pod":          w.token(t, "agent", nil, "spire-server"),
		"of another account":       w.token(t, "default", other, "spire-server"),
		"that another key signed":  forged(t, good, nil, nil),
		"that has expired":         forged(t, good, accountKey(t, c), func(claims map[string]any) { claims["exp"] = time.Now().Add(-time.Hour).Unix() }),
		"of another cluster":       forged(t, good, nil, func(claims map[string]any) { claims["iss"] = "https://kubernetes.other.example" }),
		"of another issuer":        forged(t, good, accountKey(t, c), func(claims map[string]any) { claims["iss"] = "https://kubernetes.other.example" }),
		"with a signature cut off": good[:strings.LastIndexByte(good, '.')+1],
		"that is none":             "x.y.z",
	} {
		t.Run("a token "+why+" is refused", func(t *testing.T) {
			if proof, err := judge.Judge(t.Context(), psatEvidence(token), nil); !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("path %q, error %v", proof.Path, err)
			}
		})
	}
	t.Run("labels of the node follow", func(t *testing.T) { w.follow(t, judge, proof) })
	t.Run("a token whose pod is gone is refused", func(t *testing.T) {
		now := int64(0)
		err := w.Client.CoreV1().Pods("assay").Delete(t.Context(), w.pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := judge.Judge(t.Context(), psatEvidence(good), nil); !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
		w.pod = w.makePod(t, "agent-x", "agent")
		if _, err := judge.Judge(t.Context(), psatEvidence(good), nil); !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("with another pod of its name, error is %v", err)
		}
		if _, err := judge.Judge(t.Context(), psatEvidence(w.token(t, "agent", w.pod, "spire-server")), nil); err != nil {
			t.Errorf("the new pod's token is refused: %v", err)
		}
	})
	t.Run("an API server that is away is no refusal, and is found again", func(t *testing.T) {
		token := w.token(t, "agent", w.pod, "spire-server")
		c.Kill("kube-apiserver")
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if _, err := judge.Judge(ctx, psatEvidence(token), nil); err == nil || errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
		if err := c.StartAPIServer(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := judge.Judge(t.Context(), psatEvidence(token), nil); err != nil {
			t.Errorf("refused: %v", err)
		}
	})
}

type psatWorld struct {
	*kube.Cluster
	node *corev1.Node
	pod  *corev1.Pod
}

// prepare makes a node that nobody runs, and an agent's pod on it.
func (w *psatWorld) prepare(t *testing.T) {
	t.Helper()
	ctx, core := t.Context(), w.Client.CoreV1()
	var err error
	if w.node, err = core.Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{"zone": "a"}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "assay"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"agent", "default"} {
		if _, err := core.ServiceAccounts("assay").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	w.pod = w.makePod(t, "agent-x", "agent")
}

func (w *psatWorld) makePod(t *testing.T, name, account string) *corev1.Pod {
	t.Helper()
	pod, err := w.Client.CoreV1().Pods("assay").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			NodeName: "n1", ServiceAccountName: account,
			Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			Containers:  []corev1.Container{{Name: "main", Image: "none.local/x:1"}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

// token has the API server issue one, as the kubelet does for a projected volume.
func (w *psatWorld) token(t *testing.T, account string, pod *corev1.Pod, audience ...string) string {
	t.Helper()
	request := &authv1.TokenRequest{Spec: authv1.TokenRequestSpec{Audiences: audience}}
	if pod != nil {
		request.Spec.BoundObjectRef = &authv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}
	}
	reply, err := w.Client.CoreV1().ServiceAccounts("assay").CreateToken(t.Context(), account, request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return reply.Status.Token
}

func (w *psatWorld) judge(t *testing.T) attestor.Judge {
	t.Helper()
	j, err := psat.Kind().Open(&k8spsat.ServerConfig{Clusters: []k8spsat.Cluster{{
		Name: "lab", ServiceAccounts: []string{"assay:agent"}, KubeConfig: w.Kubeconfig("admin"), NodeLabels: []string{"zone"},
	}}}, attestor.Needs{})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func psatEvidence(token string) []byte {
	text, _ := json.Marshal(k8spsat.Evidence{Cluster: "lab", Token: token}) // strings only
	return text
}

// forged is the same token, signed by another cluster's key.
// With a key and a change it is signed by that key and says something else.
func forged(t *testing.T, token string, key *rsa.PrivateKey, change func(map[string]any)) string {
	t.Helper()
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		t.Fatal(err)
	}
	claims := map[string]any{}
	if err := parsed.UnsafeClaimsWithoutVerification(&claims); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(claims)
	}
	if key == nil {
		if key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			t.Fatal(err)
		}
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: parsed.Headers[0].KeyID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// accountKey is what the cluster signs tokens of its service accounts with.
func accountKey(t *testing.T, c *kube.Cluster) *rsa.PrivateKey {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(c.Dir, "pki", "sa.key"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key.(*rsa.PrivateKey)
}

// follow changes the node's label while its judge follows.
func (w *psatWorld) follow(t *testing.T, judge attestor.Judge, proof attestor.Proof) {
	follower, ok := judge.(attestor.Follower)
	if !ok {
		t.Fatal("it does not follow")
	}
	have := &admittedAgents{path: proof.Path, set: attestor.NewSet(proof.Selectors...), news: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- follower.Follow(ctx, have) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for _, value := range []string{"b", "c"} {
		patch := fmt.Sprintf(`{"metadata":{"labels":{"zone":%q}}}`, value)
		if _, err := w.Client.CoreV1().Nodes().Patch(t.Context(), "n1", types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		late := time.After(psatPatience)
		for !have.has("agent_node_label:zone:" + value) {
			select {
			case <-have.news:
			case <-late:
				t.Fatalf("zone %s never came", value)
			}
		}
	}
}

// admittedAgents is one agent, in memory.
type admittedAgents struct {
	path string
	news chan struct{}
	mu   sync.Mutex
	set  attestor.Set
}

func (a *admittedAgents) has(value string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.set.Has(attestor.Selector{Type: k8spsat.Type, Value: value})
}

// Each yields it.
func (a *admittedAgents) Each() iter.Seq2[string, attestor.Set] {
	a.mu.Lock()
	defer a.mu.Unlock()
	set := a.set
	return func(yield func(string, attestor.Set) bool) { yield(a.path, set) }
}

// Evict is never called: the pod stays.
func (a *admittedAgents) Evict(context.Context, string) error { return nil }

// Update changes it.
func (a *admittedAgents) Update(_ context.Context, _ string, list []attestor.Selector) error {
	a.mu.Lock()
	a.set = attestor.NewSet(list...)
	a.mu.Unlock()
	select {
	case a.news <- struct{}{}:
	default:
	}
	return nil
}
