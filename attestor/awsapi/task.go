package awsapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"time"
)

const (
	// relativeURI and metadataURI are variables that ECS sets in each container of a task.
	relativeURI = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"
	metadataURI = "ECS_CONTAINER_METADATA_URI_V4"
	// taskEndpoint is where a task's credentials are.
	taskEndpoint = "http://169.254.170.2"
	// maxTask is the largest answer, in bytes, about a task that is read.
	maxTask = 1 << 20
)

// relativeForm is what the relative URI looks like.
var relativeForm = regexp.MustCompile(`^/[A-Za-z0-9/_.-]{1,200}$`)

// taskClient is for neighbors on the link or on the host: no proxy, and nowhere else to go.
var taskClient = &http.Client{
	Timeout:   metadataTime,
	Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil},
	CheckRedirect: func(*http.Request, []*http.Request) error {
		return errors.New("it redirects, which it never does")
	},
}

// Local asks a service beside this program, of the instance or of the task, and decodes the JSON of its answer.
// It is ErrNotThere if the service says so.
func Local(ctx context.Context, what, address string, into any) error {
	u, err := url.Parse(address)
	if err != nil || !isLocal(u) {
		return fmt.Errorf("%s: it is not at an address of this host or its link", what)
	}
	return local(ctx, what, u, "", into)
}

// local asks as Local does, with a token if there is one.
func local(ctx context.Context, what string, u *url.URL, token string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil) //nolint:gosec // G704: it goes to this host or its link, see above
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("Authorization", token)
	}
	resp, err := taskClient.Do(req) //nolint:gosec // G704: likewise
	if err != nil {
		return fmt.Errorf("ask %s: %w", what, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxTask+1))
	switch {
	case err != nil:
		return fmt.Errorf("read from %s: %w", what, err)
	case resp.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%s: %w", what, ErrNotThere)
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("%s answers %d", what, resp.StatusCode)
	case len(text) > maxTask:
		return fmt.Errorf("%s answers more than %d bytes", what, maxTask)
	}
	if json.Unmarshal(text, into) != nil {
		return fmt.Errorf("the answer of %s is not the JSON it should be", what)
	}
	return nil
}

// CheckLocal checks that an address, which a key or a variable names, is plain HTTP to this host or its link
// and nowhere else.
func CheckLocal(key, address string) error {
	u, err := url.Parse(address)
	if err == nil && isLocal(u) && u.RawQuery == "" {
		return nil
	}
	return fmt.Errorf("%s: %q is no http address of this host or its link", key, address)
}

func isLocal(u *url.URL) bool {
	ip, err := netip.ParseAddr(u.Hostname())
	return err == nil && u.Scheme == "http" && u.User == nil && (ip.IsLoopback() || ip.IsLinkLocalUnicast())
}

// TaskMetadataURI is where the task that this program runs in finds what ECS says of it; empty if it runs in
// none.
func TaskMetadataURI() string { return os.Getenv(metadataURI) }

// TaskCredentials returns the credentials of the task's role; ErrNotThere if this is no task or it has none.
func TaskCredentials(ctx context.Context) (Credentials, error) {
	path := os.Getenv(relativeURI)
	if path == "" {
		return Credentials{}, fmt.Errorf("role of the task: %w", ErrNotThere)
	}
	if !relativeForm.MatchString(path) {
		return Credentials{}, fmt.Errorf("%s is no path", relativeURI)
	}
	return CredentialsAt(ctx, taskEndpoint+path)
}

// CredentialsAt returns the credentials that are at an address.
func CredentialsAt(ctx context.Context, address string) (Credentials, error) {
	const what = "the service with the task's credentials"
	var said handedOut
	if err := Local(ctx, what, address, &said); err != nil {
		return Credentials{}, err
	}
	return said.credentials(what)
}

// handedOut are credentials as services beside a program write them.
type handedOut struct {
	AccessKeyId, SecretAccessKey, Token string // AWS's names
	Expiration                          time.Time
}

func (h handedOut) credentials(what string) (Credentials, error) {
	if h.AccessKeyId == "" || h.SecretAccessKey == "" {
		return Credentials{}, errors.New(what + " has none")
	}
	return Credentials{ID: h.AccessKeyId, Secret: h.SecretAccessKey, Token: h.Token}, nil
}
