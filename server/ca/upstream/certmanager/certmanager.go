// Package certmanager is an upstream authority that is an issuer of cert-manager: the authority is asked for
// with a CertificateRequest (cert-manager.io/v1, isCA), which is deleted when it was answered.
//
// The server speaks to the Kubernetes API with four kinds of requests, so it has a small client for them and
// not client-go. Inside a cluster it is found as every pod finds it; outside a kubeconfig file names it, with
// a token or a client certificate. What the service account needs, in the issuer's namespace:
//
//	apiGroups: ["cert-manager.io"], resources: ["certificaterequests"], verbs: ["create", "get", "list", "delete"]
package certmanager

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Config says which issuer it is.
type Config struct {
	Namespace string
	// Name of the issuer; its kind is "Issuer" if it is empty, and its group "cert-manager.io".
	Name, Kind, Group string
	// KubeConfig is a kubeconfig file. Empty: the server is a pod of the cluster.
	KubeConfig string
}

// Authority is an issuer.
type Authority struct {
	cfg  Config
	kube *kube
}

var _ upstream.Authority = (*Authority)(nil)

// Open reads where the cluster is. It asks nobody yet.
func Open(cfg Config) (*Authority, error) {
	if cfg.Kind == "" {
		cfg.Kind = "Issuer"
	}
	if cfg.Group == "" {
		cfg.Group = "cert-manager.io"
	}
	k, err := openKube(cfg.KubeConfig)
	if err != nil {
		return nil, fmt.Errorf(`upstream_authority "cert-manager": %w`, err)
	}
	return &Authority{cfg: cfg, kube: k}, nil
}

// label marks the requests of this kind of server.
const label = "app.kubernetes.io/managed-by"

// request is a CertificateRequest, as far as it matters here.
type request struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Metadata   metadata `json:"metadata"`
	Spec       spec     `json:"spec"`
	Status     status   `json:"status,omitzero"`
}

type metadata struct {
	Name      string            `json:"name"`
	Namespace string            `json:"namespace"`
	Labels    map[string]string `json:"labels,omitempty"`
}

type spec struct {
	Request   []byte   `json:"request"`
	IsCA      bool     `json:"isCA"`
	Duration  string   `json:"duration"`
	Usages    []string `json:"usages"`
	IssuerRef struct {
		Name  string `json:"name"`
		Kind  string `json:"kind"`
		Group string `json:"group"`
	} `json:"issuerRef"`
}

type status struct {
	Certificate []byte      `json:"certificate,omitempty"`
	CA          []byte      `json:"ca,omitempty"`
	Conditions  []condition `json:"conditions,omitempty"`
}

type condition struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// Sign implements upstream.Authority.
func (a *Authority) Sign(ctx context.Context, r upstream.Request) (*upstream.Signed, error) {
	ask := &request{
		APIVersion: "cert-manager.io/v1", Kind: "CertificateRequest",
		Metadata: metadata{Name: "assay-" + strings.ToLower(rand.Text()), Namespace: a.cfg.Namespace, Labels: map[string]string{label: "assay-server"}},
		Spec: spec{
			Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR}),
			IsCA:    true, Duration: r.TTL.String(), Usages: []string{"cert sign", "crl sign"},
		},
	}
	ask.Spec.IssuerRef.Name, ask.Spec.IssuerRef.Kind, ask.Spec.IssuerRef.Group = a.cfg.Name, a.cfg.Kind, a.cfg.Group
	if err := a.kube.do(ctx, http.MethodPost, a.path(""), ask, nil); err != nil {
		return nil, fmt.Errorf("create CertificateRequest %s: %w", ask.Metadata.Name, err)
	}
	defer a.tidy(context.WithoutCancel(ctx), ask.Metadata.Name)
	got, err := a.wait(ctx, ask.Metadata.Name)
	if err != nil {
		return nil, fmt.Errorf("CertificateRequest %s: %w", ask.Metadata.Name, err)
	}
	chain, err := upstream.ParsePEM(got.Certificate)
	if err != nil {
		return nil, fmt.Errorf("%w: its certificate: %w", upstream.ErrRefused, err)
	}
	var roots []*x509.Certificate
	if len(got.CA) > 0 {
		if roots, err = upstream.ParsePEM(got.CA); err != nil {
			return nil, fmt.Errorf("%w: its CA: %w", upstream.ErrRefused, err)
		}
	}
	return &upstream.Signed{Chain: chain, Roots: roots}, nil
}

func (a *Authority) path(name string) string {
	path := "/apis/cert-manager.io/v1/namespaces/" + url.PathEscape(a.cfg.Namespace) + "/certificaterequests"
	if name != "" {
		path += "/" + url.PathEscape(name)
	}
	return path
}

// wait asks for the request until it has ended, or ctx does.
func (a *Authority) wait(ctx context.Context, name string) (*status, error) {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		var got request
		if err := a.kube.do(ctx, http.MethodGet, a.path(name), nil, &got); err != nil {
			return nil, err
		}
		waits := "it was not looked at yet"
		for _, c := range got.Status.Conditions {
			said := c.Reason + ": " + clip(c.Message)
			switch {
			case c.Type == "Ready" && c.Status == "True":
				return &got.Status, nil
			case (c.Type == "Denied" || c.Type == "InvalidRequest") && c.Status == "True",
				c.Type == "Ready" && c.Reason == "Failed":
				return nil, fmt.Errorf("the issuer %s will not sign: %s: %s", a.cfg.Name, c.Type, said)
			case c.Type == "Ready":
				waits = said
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the issuer %s (%s): %w", a.cfg.Name, waits, ctx.Err())
		}
	}
}

// tidy deletes a request. One that stays is litter, and no reason not to take its certificate.
func (a *Authority) tidy(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_ = a.kube.do(ctx, http.MethodDelete, a.path(name), nil, nil)
}

// PublishJWT implements upstream.Authority: cert-manager knows of certificates only.
func (a *Authority) PublishJWT(context.Context, identity.JWTAuthority) error {
	return upstream.ErrNoJWT
}

// PublishWIT implements upstream.Authority, as PublishJWT does.
func (a *Authority) PublishWIT(ctx context.Context, key identity.JWTAuthority) error {
	return a.PublishJWT(ctx, key)
}

// Follow implements upstream.Authority.
func (a *Authority) Follow(context.Context, func(upstream.Bundle)) error { return upstream.ErrNoBundle }

func clip(s string) string {
	if len(s) > 300 {
		return s[:300] + "…"
	}
	return s
}

// do asks the API server.
func (k *kube) do(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, upstream.Patience)
	defer cancel()
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, k.server+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	token, err := k.token()
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := k.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask the Kubernetes API: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, upstream.MaxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("read the Kubernetes API's answer: %w", err)
	case len(text) > upstream.MaxAnswer:
		return fmt.Errorf("the Kubernetes API's answer is over %d bytes long", upstream.MaxAnswer)
	case resp.StatusCode/100 != 2:
		var said struct {
			Message string `json:"message"`
		}
		if json.Unmarshal(text, &said) != nil || said.Message == "" {
			said.Message = http.StatusText(resp.StatusCode)
		}
		return fmt.Errorf("the Kubernetes API answers %d: %s", resp.StatusCode, clip(said.Message))
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return errors.New("the Kubernetes API's answer is not understood")
	}
	return nil
}
