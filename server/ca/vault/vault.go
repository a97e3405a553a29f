// Package vault is a client of HashiCorp Vault and OpenBao, for the two things that server/ca asks of them:
// signatures by the transit engine, and certificates by the PKI engine.
//
// It is a small client of its own, because what it needs are six paths and four ways to log in, every answer
// of which is bounded in size and time. Its own token is renewed by logging in again, when a third of its
// life is left, or when it is refused; a token from the configuration is read anew when it is in a file, and
// renewed by Keep as long as Vault lets it.
package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/assay-id/assay/attestor"
)

// Config says where Vault is and how to log in. Exactly one of the ways is set.
type Config struct {
	// Address is an https URL; http is for tests and for a proxy on the same machine.
	Address   string
	Namespace string
	// CAPath are the roots in PEM that verify Vault. Empty: the system's.
	CAPath string

	Token   *TokenAuth
	AppRole *AppRoleAuth
	Cert    *CertAuth
	K8s     *K8sAuth
}

// TokenAuth is a token, or the path of a file with one, which something else renews.
type TokenAuth struct{ Token, Path string }

// AppRoleAuth logs in at auth/<Mount>/login with a role and its secret, which is given or in the file at SecretPath.
type AppRoleAuth struct{ Mount, RoleID, SecretID, SecretPath string }

// CertAuth logs in at auth/<Mount>/login with a TLS certificate and its key, both in PEM files. Without a Role Vault
// tries all that fit.
type CertAuth struct{ Mount, Role, CertPath, KeyPath string }

// K8sAuth logs in at auth/<Mount>/login with a service account's token, which is read anew for each login. An empty
// TokenPath is where Kubernetes puts it.
type K8sAuth struct{ Mount, Role, TokenPath string }

const (
	maxAnswer = 1 << 20  // bytes, as of a file of roots
	maxSecret = 64 << 10 // bytes
	patience  = 30 * time.Second
	// defaultTokenPath is where Kubernetes puts a service account's token.
	defaultTokenPath = "/var/run/secrets/kubernetes.io/serviceaccount/token" //nolint:gosec // a path
)

var (
	// ErrNotFound says that there is nothing at the path.
	ErrNotFound = errors.New("not found in Vault")
	// ErrDenied says that the token may not do it.
	ErrDenied = errors.New("permission denied by Vault")
)

// Client is safe for concurrent use.
type Client struct {
	cfg  Config
	base *url.URL
	http *http.Client

	mu    sync.Mutex // guards the rest
	token string     // of a login
	again time.Time  // when to log in again
}

// New returns a client. It asks nobody yet.
func New(cfg Config) (*Client, error) {
	base, err := url.Parse(cfg.Address)
	if err != nil || base.Host == "" || (base.Scheme != "https" && base.Scheme != "http") {
		return nil, fmt.Errorf("vault address %q is no https URL", cfg.Address)
	}
	if base.Scheme == "http" && base.Hostname() != "127.0.0.1" && base.Hostname() != "localhost" && base.Hostname() != "::1" {
		return nil, fmt.Errorf("vault address %q: plain http is for a proxy on this machine; use https", cfg.Address)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CAPath != "" {
		text, err := attestor.ReadFile(cfg.CAPath, maxAnswer)
		if err != nil {
			return nil, fmt.Errorf("read Vault's roots: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("read Vault's roots: %s holds no certificate in PEM", cfg.CAPath)
		}
	}
	if a := cfg.Cert; a != nil {
		if _, err := tls.LoadX509KeyPair(a.CertPath, a.KeyPath); err != nil {
			return nil, fmt.Errorf("read the certificate to log in to Vault with: %w", err)
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(a.CertPath, a.KeyPath) // it is renewed in place
			return &pair, err
		}
	}
	return &Client{cfg: cfg, base: base, http: &http.Client{
		Timeout: patience,
		Transport: &http.Transport{
			TLSClientConfig: config, MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute,
			TLSHandshakeTimeout: 10 * time.Second, MaxResponseHeaderBytes: 64 << 10, Proxy: http.ProxyFromEnvironment,
		},
		// A redirect would carry the token to somebody else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Do asks Vault, logging in as needed. in and out may be nil; out takes the field "data" of the answer.
func (c *Client) Do(ctx context.Context, method, path string, in, out any) error {
	token, fresh, err := c.login(ctx)
	if err != nil {
		return err
	}
	err = c.ask(ctx, method, path, token, in, &envelope{Data: out})
	if errors.Is(err, ErrDenied) && !fresh && c.cfg.Token == nil {
		// The token may have been revoked.
		c.mu.Lock()
		if c.token == token {
			c.token = ""
		}
		c.mu.Unlock()
		if token, _, err = c.login(ctx); err != nil {
			return err
		}
		err = c.ask(ctx, method, path, token, in, &envelope{Data: out})
	}
	return err
}

// envelope is what all answers are in.
type envelope struct {
	Data any   `json:"data,omitempty"`
	Auth *auth `json:"auth,omitempty"`
}

type auth struct {
	Token    string `json:"client_token"`
	Duration int64  `json:"lease_duration"` // seconds; 0: it does not end
}

// login returns a token, and whether it was just made.
func (c *Client) login(ctx context.Context) (token string, fresh bool, err error) {
	if a := c.cfg.Token; a != nil {
		if a.Path == "" {
			return a.Token, false, nil
		}
		token, err := secret(a.Path)
		return token, false, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token != "" && (c.again.IsZero() || time.Now().Before(c.again)) {
		return c.token, false, nil
	}
	mount, in, err := c.proof()
	if err != nil {
		return "", false, err
	}
	var out envelope
	if err := c.ask(ctx, http.MethodPost, "auth/"+strings.Trim(mount, "/")+"/login", "", in, &out); err != nil {
		return "", false, fmt.Errorf("log in to Vault: %w", err)
	}
	if out.Auth == nil || out.Auth.Token == "" {
		return "", false, errors.New("log in to Vault: the answer has no token")
	}
	c.token, c.again = out.Auth.Token, time.Time{}
	if out.Auth.Duration > 0 {
		c.again = time.Now().Add(time.Duration(min(out.Auth.Duration, 1<<30)) * time.Second * 2 / 3)
	}
	return c.token, true, nil
}

// proof returns where to log in, and with what.
func (c *Client) proof() (mount string, in map[string]string, err error) {
	switch {
	case c.cfg.AppRole != nil:
		a := c.cfg.AppRole
		id := a.SecretID
		if a.SecretPath != "" {
			if id, err = secret(a.SecretPath); err != nil {
				return "", nil, err
			}
		}
		return or(a.Mount, "approle"), map[string]string{"role_id": a.RoleID, "secret_id": id}, nil
	case c.cfg.Cert != nil:
		return or(c.cfg.Cert.Mount, "cert"), map[string]string{"name": c.cfg.Cert.Role}, nil
	case c.cfg.K8s != nil:
		jwt, err := secret(or(c.cfg.K8s.TokenPath, defaultTokenPath))
		return or(c.cfg.K8s.Mount, "kubernetes"), map[string]string{"role": c.cfg.K8s.Role, "jwt": jwt}, err
	}
	return "", nil, errors.New("no way to log in to Vault is configured")
}

func or(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

// secret reads a file with one.
func secret(path string) (string, error) {
	text, err := attestor.ReadFile(path, maxSecret)
	if err != nil {
		return "", fmt.Errorf("read a secret for Vault: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

// ask sends one request. Errors have what Vault says, which is no secret, clipped.
func (c *Client) ask(ctx context.Context, method, path, token string, in any, out *envelope) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	at := *c.base
	at.Path = filepath.ToSlash(filepath.Join("/", at.Path, "v1", path))
	if strings.HasSuffix(path, "?list=true") {
		at.Path, at.RawQuery = strings.TrimSuffix(at.Path, "?list=true"), "list=true"
	}
	req, err := http.NewRequestWithContext(ctx, method, at.String(), body)
	if err != nil {
		return err
	}
	req.Header.Set("X-Vault-Request", "true")
	if token != "" {
		req.Header.Set("X-Vault-Token", token)
	}
	if c.cfg.Namespace != "" {
		req.Header.Set("X-Vault-Namespace", c.cfg.Namespace)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask Vault at %s: %w", c.base.Host, err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("read Vault's answer: %w", err)
	case len(text) > maxAnswer:
		return fmt.Errorf("vault's answer is over %d bytes long", maxAnswer)
	case resp.StatusCode/100 != 2:
		return refused(resp.StatusCode, text)
	case len(text) == 0 && resp.StatusCode != http.StatusNoContent && out.Data != nil:
		return errors.New("vault's answer is empty") // which is no list without keys
	case len(text) == 0:
		return nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("vault's answer is not understood: %w", err)
	}
	return nil
}

func refused(code int, text []byte) error {
	var said struct {
		Errors []string `json:"errors"`
	}
	_ = json.Unmarshal(text, &said)
	why := strings.Join(said.Errors, "; ")
	if len(why) > 300 {
		why = why[:300] + "…"
	}
	switch code {
	case http.StatusNotFound:
		return fmt.Errorf("%w: %s", ErrNotFound, or(why, "nothing is mounted there, or it does not exist"))
	case http.StatusForbidden, http.StatusUnauthorized:
		return fmt.Errorf("%w: %s", ErrDenied, or(why, "its policy does not allow it"))
	}
	return fmt.Errorf("vault answers %d: %s", code, or(why, http.StatusText(code)))
}
