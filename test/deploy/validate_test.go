package deploy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// kubeconfig stands for the cluster that a pod runs in. Nothing is asked of it.
const kubeconfig = `{"apiVersion":"v1","kind":"Config","current-context":"x","contexts":[{"name":"x","context":{"cluster":"c","user":"u"}}],
"clusters":[{"name":"c","cluster":{"server":"https://127.0.0.1:1"}}],"users":[{"name":"u","user":{"token":"t"}}]}`

// Operators judge the files as they are, on their own machine, before they are in any cluster.
func TestConfigurationsAreJudgedOutsideOfTheCluster(t *testing.T) {
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"base", "overlays/high-security"} { // those that name no files of the pod
		for _, name := range []string{"server", "agent"} {
			cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "assay-"+name), "validate", "-config", "../../deploy/k8s/"+dir+"/"+name+".hcl")
			cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
			if text, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s of %s: %v: %s", name, dir, err, text)
			}
		}
	}
}

// validate has the binaries judge the configuration of each pod, with the files that the pod would see where
// it would see them, and returns how many there were.
func validate(t *testing.T, all []*unstructured.Unstructured) int {
	t.Helper()
	n := 0
	for _, o := range all {
		var spec corev1.PodSpec
		switch o.GetKind() {
		case "StatefulSet":
			var s appsv1.StatefulSet
			convert(t, o, &s)
			spec = s.Spec.Template.Spec
		case "DaemonSet":
			var d appsv1.DaemonSet
			convert(t, o, &d)
			spec = d.Spec.Template.Spec
		default:
			continue
		}
		for _, c := range spec.Containers {
			if c.Name == "server" || c.Name == "agent" {
				n++
				if err := validatePod(t, all, &spec, &c); err != nil {
					t.Errorf("%s: %v", key(o), err)
				}
			}
		}
	}
	return n
}

func convert(t *testing.T, o *unstructured.Unstructured, to any) {
	t.Helper()
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(o.Object, to, true); err != nil {
		t.Fatalf("%s: %v", key(o), err)
	}
}

func validatePod(t *testing.T, all []*unstructured.Unstructured, spec *corev1.PodSpec, c *corev1.Container) error {
	t.Helper()
	root := t.TempDir()
	moved := map[string]string{}
	for _, m := range c.VolumeMounts {
		for _, v := range spec.Volumes {
			if v.Name != m.Name {
				continue
			}
			files, err := contents(all, &v)
			if err != nil {
				return err
			}
			if files == nil {
				continue
			}
			dir := filepath.Join(root, m.MountPath)
			if err := os.MkdirAll(dir, 0o750); err != nil {
				return err
			}
			for name, text := range files {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					return err
				}
			}
			moved[m.MountPath] = dir
		}
	}
	path := filepath.Join(root, "etc/assay", c.Name+".hcl")
	if want := filepath.Join("/etc/assay", c.Name+".hcl"); c.Args[len(c.Args)-1] != want {
		return fmt.Errorf("it runs with %v and not with %s", c.Args, want)
	}
	if err := transplant(path, root, moved); err != nil {
		return err
	}
	bin, err := binaries()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "assay-"+c.Name), "validate", "-config", path)
	if text, err := cmd.CombinedOutput(); err != nil {
		config, _ := os.ReadFile(path)
		return fmt.Errorf("%w: %s\n%s", err, text, config)
	}
	return nil
}

// contents returns the files of a volume that holds configuration, nil for one that does not.
func contents(all []*unstructured.Unstructured, v *corev1.Volume) (map[string]string, error) {
	var kind, name string
	switch {
	case v.ConfigMap != nil && strings.HasSuffix(v.ConfigMap.Name, "-bundle"):
		// The server writes it.
		authority, err := secrets()
		return map[string]string{"bundle.pem": authority["ca.pem"]}, err
	case v.ConfigMap != nil:
		kind, name = "ConfigMap", v.ConfigMap.Name
	case v.Secret != nil:
		kind, name = "Secret", v.Secret.SecretName
	default:
		return nil, nil
	}
	for _, o := range all {
		if o.GetKind() == kind && o.GetName() == name {
			files, _, err := unstructured.NestedStringMap(o.Object, map[string]string{"ConfigMap": "data", "Secret": "stringData"}[kind])
			return files, err
		}
	}
	if kind == "Secret" {
		return secrets() // what is secret is not among manifests
	}
	return nil, fmt.Errorf("there is no %s %s", kind, name)
}

// transplant points a configuration at the folders that stand for those of the pod, and at a cluster that
// stands for the pod's.
func transplant(path, root string, moved map[string]string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	config := string(text)
	for from, to := range moved {
		config = strings.ReplaceAll(config, `"`+from+`/`, `"`+to+`/`)
	}
	cluster := filepath.Join(root, "kubeconfig")
	if err := os.WriteFile(cluster, []byte(kubeconfig), 0o600); err != nil {
		return err
	}
	file, wrong := hclwrite.ParseConfig([]byte(config), path, hcl.InitialPos)
	if wrong.HasErrors() {
		return wrong
	}
	for _, b := range file.Body().Blocks() {
		switch b.Type() {
		case "kubernetes":
			b.Body().SetAttributeValue("kubeconfig", cty.StringVal(cluster))
		case "node_attestor":
			for _, c := range b.Body().Blocks() {
				c.Body().SetAttributeValue("kube_config_file", cty.StringVal(cluster))
			}
		}
	}
	return os.WriteFile(path, file.Bytes(), 0o600)
}

// secrets are an authority's certificate and key, and a public key, which stand for those that operators have.
var secrets = sync.OnceValues(func() (map[string]string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	return map[string]string{
		"ca.pem":  string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		"ca.key":  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})),
		"key.pub": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})),
	}, nil
})
