package server

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsiid"
)

const (
	// maxAnswer is the largest answer of AWS, in bytes, that is read.
	maxAnswer = 4 << 20
	// answerTime is how long it may take.
	answerTime = 10 * time.Second
	// keepCredentials is how long the credentials of the server's own instance are used before they are
	// asked for again; they are good for hours.
	keepCredentials = 5 * time.Minute
)

var (
	// errRefusedByAWS says that AWS understood a request and refused it.
	errRefusedByAWS = errors.New("AWS refused the request")
	// errThrottled says that AWS was asked too often, of which the evidence is not guilty.
	errThrottled = errors.New("AWS is asked too often")
	// errNoInstance says that EC2 knows that there is no such instance.
	errNoInstance = errors.New("EC2 knows no such instance")
)

// cloud asks AWS's services, of which three requests are needed: no SDK, nothing that retries beside the
// agent's own retries and those of following.
type cloud struct {
	config   awsiid.ServerConfig
	client   *http.Client
	metadata *awsiid.Metadata
	now      func() time.Time

	mu    sync.Mutex // guards the two below
	kept  awsiid.Credentials
	until time.Time

	lookups lookups
}

func newCloud(c awsiid.ServerConfig, now func() time.Time) (*cloud, error) {
	for key, endpoint := range map[string]string{"sts_endpoint": c.STSEndpoint, "ec2_endpoint": c.EC2Endpoint, "iam_endpoint": c.IAMEndpoint} {
		if u, err := url.Parse(endpoint); endpoint != "" && (err != nil || u.Scheme != "https" && !isLoopback(u) || u.Host == "") {
			return nil, fmt.Errorf("%s: %q is no https address", key, endpoint)
		}
	}
	metadata, err := awsiid.NewMetadata(c.MetadataEndpoint)
	if err != nil {
		return nil, err
	}
	return &cloud{config: c, metadata: metadata, now: now, lookups: newLookups(), client: &http.Client{
		Timeout:       answerTime,
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("AWS redirects, which it never does") },
	}}, nil
}

func isLoopback(u *url.URL) bool {
	return u.Scheme == "http" && (u.Hostname() == "127.0.0.1" || u.Hostname() == "::1")
}

// send sends a signed request and decodes the XML of its answer.
func (c *cloud) send(ctx context.Context, endpoint string, r awsiid.Request, into any) error {
	if endpoint == "" {
		endpoint = "https://" + r.Host
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, strings.TrimSuffix(endpoint, "/")+r.Path, strings.NewReader(r.Body))
	if err != nil {
		return err
	}
	req.Host = r.Host
	for name, value := range r.Headers {
		req.Header.Set(name, value)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return fmt.Errorf("ask AWS: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("read from AWS: %w", err)
	case len(text) > maxAnswer:
		return fmt.Errorf("AWS answers more than %d bytes", maxAnswer)
	case resp.StatusCode != http.StatusOK:
		return complaint(resp.StatusCode, text)
	}
	if err := xml.Unmarshal(text, into); err != nil {
		return errors.New("AWS's answer is not the XML it should be")
	}
	return nil
}

// throttles are the codes with which AWS's services say that they are asked too often. Some come with the
// status of a bad request.
var throttles = []string{"Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "RequestThrottledException", "RequestLimitExceeded", "TooManyRequestsException", "EC2ThrottledException", "SlowDown"}

// codeForm is what a code looks like; what does not, is not repeated in errors.
var codeForm = regexp.MustCompile(`^[A-Za-z0-9.]{1,80}$`)

// complaint makes an error of an answer that is none. EC2 says why in one shape, the others in another.
func complaint(status int, text []byte) error {
	var said struct {
		EC2    string `xml:"Errors>Error>Code"`
		Others string `xml:"Error>Code"`
	}
	code := ""
	if xml.Unmarshal(text, &said) == nil && codeForm.MatchString(said.EC2+said.Others) {
		code = said.EC2 + said.Others
	}
	what := strings.TrimSpace(strconv.Itoa(status) + " " + code)
	switch {
	case status == http.StatusTooManyRequests, slices.Contains(throttles, code):
		return fmt.Errorf("%w: %s", errThrottled, what)
	case code == "InvalidInstanceID.NotFound":
		return errNoInstance
	case status == http.StatusForbidden, status == http.StatusBadRequest, status == http.StatusUnauthorized:
		return fmt.Errorf("%w: %s", errRefusedByAWS, what)
	}
	return fmt.Errorf("AWS answers %s", what)
}

// query sends a request of the server's own.
func (c *cloud) query(ctx context.Context, endpoint, host, service, region string, parameters url.Values, into any) error {
	credentials, err := c.credentials(ctx)
	if err != nil {
		return fmt.Errorf("find credentials for AWS: %w", err)
	}
	r := awsiid.Request{
		Method: http.MethodPost, Host: host, Path: "/", Body: parameters.Encode(),
		Headers: map[string]string{"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"},
	}
	r.Sign(credentials, region, service, c.now())
	return c.send(ctx, endpoint, r, into)
}

// credentials returns the configured ones, those of the environment, or those of the server's instance.
func (c *cloud) credentials(ctx context.Context) (awsiid.Credentials, error) {
	if c.config.AccessKeyID != "" {
		return awsiid.Credentials{ID: c.config.AccessKeyID, Secret: c.config.SecretAccessKey}, nil
	}
	if id := os.Getenv("AWS_ACCESS_KEY_ID"); id != "" {
		return awsiid.Credentials{ID: id, Secret: os.Getenv("AWS_SECRET_ACCESS_KEY"), Token: os.Getenv("AWS_SESSION_TOKEN")}, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now().Before(c.until) {
		return c.kept, nil
	}
	found, err := c.metadata.RoleCredentials(ctx)
	if err != nil {
		return awsiid.Credentials{}, err
	}
	c.kept, c.until = found, c.now().Add(keepCredentials)
	return found, nil
}

// caller has AWS say who signed a proof.
func (c *cloud) caller(ctx context.Context, region, trustDomain string, nonce []byte, r awsiid.Response) (account, arn string, err error) {
	request := awsiid.CallerRequest(region, trustDomain, nonce)
	request.Headers["X-Amz-Date"] = r.Date
	if r.Token != "" {
		request.Headers["X-Amz-Security-Token"] = r.Token
	}
	// STS says whose signature it is, not what it covers; a nonce that is not signed is nobody's.
	if !strings.Contains(r.Authorization, "SignedHeaders="+request.SignedHeaders()+",") || strings.ContainsAny(r.Authorization+r.Date+r.Token, "\r\n") {
		return "", "", attestor.Refusef("verify proof: it does not sign what was asked for")
	}
	request.Headers["Authorization"] = r.Authorization
	var said struct {
		Account string `xml:"GetCallerIdentityResult>Account"`
		ARN     string `xml:"GetCallerIdentityResult>Arn"`
	}
	err = c.send(ctx, c.config.STSEndpoint, request, &said)
	if errors.Is(err, errRefusedByAWS) {
		return "", "", attestor.Refusef("verify proof: AWS does not believe the signature")
	}
	if err != nil {
		return "", "", fmt.Errorf("verify proof: %w", err)
	}
	return said.Account, said.ARN, nil
}
