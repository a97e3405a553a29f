package join

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/assay-id/assay/attestor"
)

const (
	// awaitFor is how long one question for a ConfigMap waits for it to come.
	awaitFor = 10 * time.Second
	// maxConfigMap bounds the answer: etcd takes 1.5 MiB for each, and there may be a few versions in it.
	maxConfigMap = 8 << 20
	// configMapKey is where in a ConfigMap the server writes its bundle.
	configMapKey = "bundle.pem"
	// serviceAccountDir is where Kubernetes puts a pod's token, the cluster's CA certificates and the namespace.
	serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"
)

// errAwaited says that what the agent waits for is not there yet, and that it is to be asked for again at once.
var errAwaited = errors.New("not there yet")

// Cluster is how a pod reaches the API server of its cluster. The zero value is as Kubernetes tells every pod.
type Cluster struct {
	// URL is the API server's; empty: https at the address that is in the environment.
	URL string
	// Dir has token, ca.crt and namespace of the service account.
	Dir string
}

// configMap asks the API server for the bundle in the ConfigMap, and waits a while if it is not there: when a cluster's
// first agents start, the server has not written it yet. A volume of it would do the same, but a kubelet that
// found none looks again up to two minutes later.
func (b Bootstrap) configMap(ctx context.Context) ([]byte, error) {
	dir := b.Cluster.Dir
	if dir == "" {
		dir = serviceAccountDir
	}
	namespace, name, ok := strings.Cut(b.ConfigMap, "/")
	if !ok {
		own, err := attestor.ReadFile(filepath.Join(dir, "namespace"), maxBootstrap)
		if err != nil {
			return nil, fmt.Errorf("%w (is this a pod with a service account's token? trust_bundle_config_map needs one)", err)
		}
		namespace, name = string(bytes.TrimSpace(own)), b.ConfigMap
	}
	body, stop, err := b.Cluster.watch(ctx, dir, namespace, name)
	if err != nil {
		return nil, err
	}
	defer stop()
	text, err := firstOf(body, configMapKey)
	if errors.Is(err, io.EOF) || errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, fmt.Errorf("waiting for %s in ConfigMap %s/%s, which the server writes: %w", configMapKey, namespace, name, errAwaited)
	}
	return text, err
}

// watch opens the stream of what becomes of one ConfigMap, which begins with what it is.
func (c Cluster) watch(ctx context.Context, dir, namespace, name string) (body io.Reader, stop func(), err error) {
	base := c.URL
	if base == "" {
		host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
		if host == "" || port == "" {
			return nil, nil, errors.New("find API server: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod (use trust_bundle_path)")
		}
		base = "https://" + net.JoinHostPort(host, port)
	}
	if !strings.HasPrefix(base, "https://") {
		return nil, nil, fmt.Errorf("%s: scheme must be https", base)
	}
	token, err := attestor.ReadFile(filepath.Join(dir, "token"), maxBootstrap) // anew each time: Kubernetes replaces it
	if err != nil {
		return nil, nil, err
	}
	roots := x509.NewCertPool()
	if text, err := attestor.ReadFile(filepath.Join(dir, "ca.crt"), maxBootstrap); err != nil {
		return nil, nil, err
	} else if !roots.AppendCertsFromPEM(text) {
		return nil, nil, fmt.Errorf("%s: no PEM certificate in it", filepath.Join(dir, "ca.crt"))
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}, ForceAttemptHTTP2: true}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error {
		return errors.New("it redirects, which would hand the token to another")
	}}
	// The API server ends the stream; that it is gone without a word, the deadline finds out.
	ctx, cancel := context.WithTimeout(ctx, awaitFor+awaitFor/2)
	// Version 0 is what the API server has at hand, and then what changes. Without it the API server would first make
	// sure that it has the very latest, which fails for minutes where its etcd does not tell of its progress.
	query := url.Values{
		"watch": {"true"}, "resourceVersion": {"0"}, "fieldSelector": {"metadata.name=" + name},
		"timeoutSeconds": {strconv.Itoa(int(awaitFor / time.Second))},
	}
	at := base + "/api/v1/namespaces/" + url.PathEscape(namespace) + "/configmaps?" + query.Encode()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, at, http.NoBody) //nolint:gosec // the address is Kubernetes', and ca.crt vouches for who is there
	if err != nil {
		cancel()
		return nil, nil, err
	}
	request.Header.Set("Accept", "application/json")
	request.Header.Set("User-Agent", "assay-agent")
	request.Header.Set("Authorization", "Bearer "+string(bytes.TrimSpace(token)))
	reply, err := client.Do(request) //nolint:gosec // likewise
	if err != nil {
		cancel()
		transport.CloseIdleConnections()
		return nil, nil, fmt.Errorf("ask API server: %w", err)
	}
	stop = func() {
		cancel()
		_ = reply.Body.Close() // it was read as far as it is of use
		transport.CloseIdleConnections()
	}
	if reply.StatusCode != http.StatusOK {
		stop()
		return nil, nil, fmt.Errorf("API server answers %s to a watch of ConfigMap %s/%s%s", reply.Status, namespace, name, hintOf(reply.StatusCode))
	}
	return io.LimitReader(reply.Body, maxConfigMap), stop, nil
}

func hintOf(code int) string {
	switch code {
	case http.StatusUnauthorized:
		return ": the service account's token has expired or is of another cluster"
	case http.StatusForbidden:
		return ": the agent's role needs get and watch on it (deploy/k8s/base/agent-access.yaml)"
	}
	return ""
}

// firstOf reads events until one has the key.
func firstOf(events io.Reader, key string) ([]byte, error) {
	for d := json.NewDecoder(events); ; {
		var event struct {
			Type   string
			Object struct {
				Message string
				Data    map[string]string
			}
		}
		if err := d.Decode(&event); err != nil {
			return nil, err
		}
		switch event.Type {
		case "ERROR":
			return nil, fmt.Errorf("API server says %q", event.Object.Message)
		case "ADDED", "MODIFIED":
			if text := event.Object.Data[key]; text != "" {
				return []byte(text), nil
			}
		}
	}
}
