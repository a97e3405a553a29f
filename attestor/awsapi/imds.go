package awsapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	// defaultMetadata is where every instance finds its metadata service.
	defaultMetadata = "http://169.254.169.254"
	// maxMetadata is the largest answer of it, in bytes, that is read.
	maxMetadata = 32 << 10
	// metadataTime is how long it may take for one answer.
	metadataTime = 5 * time.Second
	tokenHeader  = "X-aws-ec2-metadata-token" //nolint:gosec // the name of a header
)

// ErrNotThere is what a metadata service says of a thing that it does not have.
var ErrNotThere = errors.New("there is no such thing")

// Metadata is a client of the instance metadata service, version 2: each session begins with a PUT that
// a proxy or a confused web server would not make.
type Metadata struct {
	endpoint string
	client   *http.Client
}

// NewMetadata returns a client; an empty endpoint is the usual address.
func NewMetadata(endpoint string) (*Metadata, error) {
	if endpoint == "" {
		endpoint = defaultMetadata
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Path != "" && u.Path != "/" {
		return nil, fmt.Errorf("ec2_metadata_endpoint: %q is no http address without a path", endpoint)
	}
	return &Metadata{
		endpoint: u.Scheme + "://" + u.Host,
		client: &http.Client{
			Timeout: metadataTime,
			// It is a neighbor on the link: no proxy, and nowhere else to go.
			Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil},
			CheckRedirect: func(*http.Request, []*http.Request) error {
				return errors.New("the instance metadata service redirects, which it never does")
			},
		},
	}, nil
}

// Get returns what the service has at the paths, each below /latest/.
func (m *Metadata) Get(ctx context.Context, paths ...string) ([]string, error) {
	token, err := m.do(ctx, http.MethodPut, "api/token", "X-aws-ec2-metadata-token-ttl-seconds", "60")
	if err != nil {
		return nil, err
	}
	texts := make([]string, len(paths))
	for i, path := range paths {
		if texts[i], err = m.do(ctx, http.MethodGet, path, tokenHeader, token); err != nil {
			return nil, err
		}
	}
	return texts, nil
}

func (m *Metadata) do(ctx context.Context, method, path, header, value string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, m.endpoint+"/latest/"+path, nil)
	if err != nil {
		return "", err
	}
	req.Header.Set(header, value)
	resp, err := m.client.Do(req)
	if err != nil {
		return "", fmt.Errorf("ask the instance metadata service: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxMetadata+1))
	switch {
	case err != nil:
		return "", fmt.Errorf("read from the instance metadata service: %w", err)
	case resp.StatusCode == http.StatusNotFound:
		return "", fmt.Errorf("%s: %w", path, ErrNotThere)
	case resp.StatusCode != http.StatusOK:
		return "", fmt.Errorf("%s: the instance metadata service answers %d", path, resp.StatusCode)
	case len(text) > maxMetadata:
		return "", fmt.Errorf("%s: the instance metadata service answers more than %d bytes", path, maxMetadata)
	}
	return string(text), nil
}

// RoleCredentials returns the credentials of the instance's role; ErrNotThere if it has none.
func (m *Metadata) RoleCredentials(ctx context.Context) (Credentials, error) {
	const at = "meta-data/iam/security-credentials/"
	names, err := m.Get(ctx, at)
	if err != nil {
		return Credentials{}, err
	}
	role, _, _ := strings.Cut(strings.TrimSpace(names[0]), "\n")
	if role == "" {
		return Credentials{}, fmt.Errorf("role of the instance: %w", ErrNotThere)
	}
	texts, err := m.Get(ctx, at+url.PathEscape(role))
	if err != nil {
		return Credentials{}, err
	}
	var said struct {
		Code, AccessKeyId, SecretAccessKey, Token string // AWS's names
	}
	if err := json.Unmarshal([]byte(texts[0]), &said); err != nil || said.Code != "Success" || said.AccessKeyId == "" {
		return Credentials{}, errors.New("the instance metadata service has no credentials for the instance's role")
	}
	return Credentials{ID: said.AccessKeyId, Secret: said.SecretAccessKey, Token: said.Token}, nil
}
