package certmanager

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/assay-id/assay/server/ca/upstream"
)

// kube is the API server of a cluster.
type kube struct {
	server    string
	tokenPath string // read for each request: Kubernetes renews it
	fixed     string
	http      *http.Client
}

func (k *kube) token() (string, error) {
	if k.tokenPath == "" {
		return k.fixed, nil
	}
	text, err := os.ReadFile(k.tokenPath)
	if err != nil {
		return "", fmt.Errorf("read the service account's token: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

// inCluster is where a pod finds its service account.
const inCluster = "/var/run/secrets/kubernetes.io/serviceaccount"

func openKube(path string) (*kube, error) {
	if path != "" {
		return fromFile(path)
	}
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("this server is not in a Kubernetes cluster: name a kubeconfig file in kube_config_file")
	}
	ca, err := os.ReadFile(filepath.Join(inCluster, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("read the cluster's roots: %w", err)
	}
	return newKube("https://"+net.JoinHostPort(host, port), ca, nil, kube{tokenPath: filepath.Join(inCluster, "token")})
}

func newKube(server string, ca []byte, pair *tls.Certificate, k kube) (*kube, error) {
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("the Kubernetes API at %q is no https URL", server)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(ca) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			return nil, errors.New("the cluster's roots are no certificates in PEM")
		}
	}
	if pair != nil {
		config.Certificates = []tls.Certificate{*pair}
	}
	k.server = strings.TrimSuffix(server, "/")
	k.http = &http.Client{
		Timeout: upstream.Patience,
		Transport: &http.Transport{
			TLSClientConfig: config, Proxy: http.ProxyFromEnvironment, IdleConnTimeout: time.Minute,
			TLSHandshakeTimeout: 10 * time.Second, MaxResponseHeaderBytes: 64 << 10, ForceAttemptHTTP2: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return &k, nil
}

// kubeconfig is what is understood of such a file. Programs that print credentials are not run: the file would
// choose what the server executes, and what it got would be renewed by rules of its own. What else is in such
// files and would be needed is refused by name, and not passed over.
type kubeconfig struct {
	Current  string `yaml:"current-context"`
	Contexts []struct {
		Name    string `yaml:"name"`
		Context struct {
			Cluster string `yaml:"cluster"`
			User    string `yaml:"user"`
		} `yaml:"context"`
	} `yaml:"contexts"`
	Clusters []struct {
		Name    string `yaml:"name"`
		Cluster struct {
			Server string `yaml:"server"`
			CAPath string `yaml:"certificate-authority"`
			CAText string `yaml:"certificate-authority-data"`

			Insecure bool   `yaml:"insecure-skip-tls-verify"`
			Name     string `yaml:"tls-server-name"`
			Proxy    string `yaml:"proxy-url"`
		} `yaml:"cluster"`
	} `yaml:"clusters"`
	Users []struct {
		Name string `yaml:"name"`
		User struct {
			Token     string `yaml:"token"`
			TokenPath string `yaml:"tokenFile"`
			CertPath  string `yaml:"client-certificate"`
			KeyPath   string `yaml:"client-key"`
			CertText  string `yaml:"client-certificate-data"`
			KeyText   string `yaml:"client-key-data"`

			Exec *struct {
				Command string `yaml:"command"`
			} `yaml:"exec"`
			Provider *struct {
				Name string `yaml:"name"`
			} `yaml:"auth-provider"`
			Username string `yaml:"username"`
			As       string `yaml:"as"`
		} `yaml:"user"`
	} `yaml:"users"`
}

func fromFile(path string) (*kube, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w", err)
	}
	var f kubeconfig
	if len(text) > upstream.MaxAnswer || yaml.Unmarshal(text, &f) != nil {
		return nil, fmt.Errorf("kubeconfig %s is not understood", path)
	}
	at := func(p string) string { // paths in it are relative to it
		if p == "" || filepath.IsAbs(p) {
			return p
		}
		return filepath.Join(filepath.Dir(path), p)
	}
	for _, c := range f.Contexts {
		if c.Name != f.Current {
			continue
		}
		server, ca, err := f.cluster(c.Context.Cluster, at)
		if err != nil {
			return nil, fmt.Errorf("kubeconfig %s: %w", path, err)
		}
		k, pair, err := f.user(c.Context.User, at)
		if err != nil {
			return nil, fmt.Errorf("kubeconfig %s: %w", path, err)
		}
		return newKube(server, ca, pair, k)
	}
	return nil, fmt.Errorf("kubeconfig %s has no context %q, which it says is the current one", path, f.Current)
}

// either returns what is in the file in base64, or in another one.
func either(text, path string) ([]byte, error) {
	if text != "" {
		return base64.StdEncoding.DecodeString(text)
	}
	if path == "" {
		return nil, nil
	}
	return os.ReadFile(path)
}

func (f *kubeconfig) cluster(name string, at func(string) string) (server string, ca []byte, err error) {
	for _, c := range f.Clusters {
		if c.Name == name {
			for key, there := range map[string]bool{
				"insecure-skip-tls-verify": c.Cluster.Insecure, "tls-server-name": c.Cluster.Name != "", "proxy-url": c.Cluster.Proxy != "",
			} {
				if there {
					return "", nil, fmt.Errorf("cluster %q has %s, which is not supported: the API server is verified by its name and the roots in certificate-authority", name, key)
				}
			}
			ca, err = either(c.Cluster.CAText, at(c.Cluster.CAPath))
			return c.Cluster.Server, ca, err
		}
	}
	return "", nil, fmt.Errorf("it has no cluster %q", name)
}

func (f *kubeconfig) user(name string, at func(string) string) (k kube, pair *tls.Certificate, err error) {
	for _, u := range f.Users {
		if u.Name != name {
			continue
		}
		const instead = "; give the server a kubeconfig with a tokenFile that somebody keeps up to date, or a client certificate"
		switch {
		case u.User.Exec != nil:
			return kube{}, nil, fmt.Errorf("user %q has its credentials from a program (exec: %q), which is not run%s", name, u.User.Exec.Command, instead)
		case u.User.Provider != nil:
			return kube{}, nil, fmt.Errorf("user %q has its credentials from an auth-provider (%q), which is not supported%s", name, u.User.Provider.Name, instead)
		case u.User.Username != "":
			return kube{}, nil, fmt.Errorf("user %q has a password, which Kubernetes takes no longer%s", name, instead)
		case u.User.As != "":
			return kube{}, nil, fmt.Errorf("user %q acts as %q, which is not supported%s", name, u.User.As, instead)
		}
		if u.User.Token != "" || u.User.TokenPath != "" {
			return kube{fixed: u.User.Token, tokenPath: at(u.User.TokenPath)}, nil, nil
		}
		cert, err := either(u.User.CertText, at(u.User.CertPath))
		if err != nil {
			return kube{}, nil, err
		}
		key, err := either(u.User.KeyText, at(u.User.KeyPath))
		if err != nil {
			return kube{}, nil, err
		}
		made, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return kube{}, nil, fmt.Errorf("user %q has neither a token nor a client certificate that can be used", name)
		}
		return kube{}, &made, nil
	}
	return kube{}, nil, fmt.Errorf("it has no user %q", name)
}
