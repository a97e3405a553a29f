package awsapi

import (
	"context"
	"encoding/json"
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
)

const (
	// maxAnswer is the largest answer of AWS, in bytes, that is read.
	maxAnswer = 4 << 20
	// answerTime is how long it may take.
	answerTime = 10 * time.Second
	// keepCredentials is how long credentials of an instance or a task are used before they are
	// asked for again; they are good for hours.
	keepCredentials = 5 * time.Minute
)

var (
	// ErrRefused says that AWS understood a request and refused it.
	ErrRefused = errors.New("AWS refused the request")
	// ErrThrottled says that AWS was asked too often, of which the evidence is not guilty.
	ErrThrottled = errors.New("AWS is asked too often")
	// ErrNoInstance says that EC2 knows that there is no such instance.
	ErrNoInstance = errors.New("EC2 knows no such instance")
)

// Config is how to reach AWS's services, and as whom.
type Config struct {
	// AccessKeyID and SecretAccessKey are the credentials; without them those of the environment, of the
	// pod, of the task and of the instance that this runs on.
	AccessKeyID, SecretAccessKey string
	// MetadataEndpoint is where the instance's metadata service is, if not at its usual address.
	MetadataEndpoint string
	// STSEndpoint is where STS is, if not at its usual addresses.
	STSEndpoint string
	Now         func() time.Time
}

// Client asks AWS's services. Nothing is retried beside what its callers retry.
type Client struct {
	config   Config
	client   *http.Client
	metadata *Metadata
	now      func() time.Time
	assumed  *assumed // nil: it speaks with credentials of its own

	mu    sync.Mutex // guards the two below
	kept  Credentials
	until time.Time
}

// NewClient returns a client.
func NewClient(c Config) (*Client, error) {
	if (c.AccessKeyID == "") != (c.SecretAccessKey == "") {
		return nil, errors.New("access_key_id and secret_access_key go together")
	}
	if err := CheckEndpoint("sts_endpoint", c.STSEndpoint); err != nil {
		return nil, err
	}
	metadata, err := NewMetadata(c.MetadataEndpoint)
	if err != nil {
		return nil, err
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Client{config: c, metadata: metadata, now: c.Now, client: &http.Client{
		Timeout:       answerTime,
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("AWS redirects, which it never does") },
	}}, nil
}

// CheckEndpoint checks the address of a service that a key of the configuration names; empty is fine.
func CheckEndpoint(key, endpoint string) error {
	if u, err := url.Parse(endpoint); endpoint != "" && (err != nil || u.Scheme != "https" && !isLoopback(u) || u.Host == "") {
		return fmt.Errorf("%s: %q is no https address", key, endpoint)
	}
	return nil
}

func isLoopback(u *url.URL) bool {
	return u.Scheme == "http" && (u.Hostname() == "127.0.0.1" || u.Hostname() == "::1")
}

// send sends a signed request and returns its answer.
func (c *Client) send(ctx context.Context, endpoint string, r Request) ([]byte, error) {
	if endpoint == "" {
		endpoint = "https://" + r.Host
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, strings.TrimSuffix(endpoint, "/")+r.Path, strings.NewReader(r.Body))
	if err != nil {
		return nil, err
	}
	req.Host = r.Host
	for name, value := range r.Headers {
		req.Header.Set(name, value)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask AWS: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read from AWS: %w", err)
	case len(text) > maxAnswer:
		return nil, fmt.Errorf("AWS answers more than %d bytes", maxAnswer)
	case resp.StatusCode != http.StatusOK:
		return nil, complaint(resp.StatusCode, text)
	}
	return text, nil
}

func decodeXML(text []byte, into any) error {
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

// complaint makes an error of an answer that is none. Services say why in three shapes.
func complaint(status int, text []byte) error {
	var said struct {
		EC2    string `xml:"Errors>Error>Code"`
		Others string `xml:"Error>Code"`
	}
	var inJSON struct {
		Type string `json:"__type"`
	}
	code := ""
	if xml.Unmarshal(text, &said) == nil {
		code = said.EC2 + said.Others
	} else if json.Unmarshal(text, &inJSON) == nil {
		code = inJSON.Type[strings.LastIndexByte(inJSON.Type, '#')+1:]
	}
	if !codeForm.MatchString(code) {
		code = ""
	}
	what := strings.TrimSpace(strconv.Itoa(status) + " " + code)
	switch {
	case status == http.StatusTooManyRequests, slices.Contains(throttles, code):
		return fmt.Errorf("%w: %s", ErrThrottled, what)
	case code == "InvalidInstanceID.NotFound":
		return ErrNoInstance
	case status == http.StatusForbidden, status == http.StatusBadRequest, status == http.StatusUnauthorized:
		return fmt.Errorf("%w: %s", ErrRefused, what)
	}
	return fmt.Errorf("AWS answers %s", what)
}

// Query sends a form of the client's own to a service and decodes the XML of its answer.
func (c *Client) Query(ctx context.Context, endpoint, host, service, region string, form url.Values, into any) error {
	text, err := c.own(ctx, endpoint, service, region, Request{
		Method: http.MethodPost, Host: host, Path: "/", Body: form.Encode(),
		Headers: map[string]string{"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"},
	})
	if err != nil {
		return err
	}
	return decodeXML(text, into)
}

// Call sends JSON of the client's own to a service, for one of its operations, and decodes that of its answer.
func (c *Client) Call(ctx context.Context, endpoint, host, service, region, operation string, question, into any) error {
	body, err := json.Marshal(question)
	if err != nil {
		return err
	}
	text, err := c.own(ctx, endpoint, service, region, Request{
		Method: http.MethodPost, Host: host, Path: "/", Body: string(body),
		Headers: map[string]string{"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": operation},
	})
	if err != nil {
		return err
	}
	if json.Unmarshal(text, into) != nil {
		return errors.New("AWS's answer is not the JSON it should be")
	}
	return nil
}

// own sends a request with the client's own credentials.
func (c *Client) own(ctx context.Context, endpoint, service, region string, r Request) ([]byte, error) {
	credentials, err := c.credentials(ctx, region)
	if err != nil {
		return nil, fmt.Errorf("find credentials for AWS: %w", err)
	}
	r.Sign(credentials, region, service, c.now())
	return c.send(ctx, endpoint, r)
}

// credentials returns those of the role that is assumed, the configured ones, those of the environment, of the
// pod, of the task, or of the instance.
func (c *Client) credentials(ctx context.Context, region string) (Credentials, error) {
	if c.assumed != nil {
		return c.assumed.credentials(ctx, region)
	}
	if c.config.AccessKeyID != "" {
		return Credentials{ID: c.config.AccessKeyID, Secret: c.config.SecretAccessKey}, nil
	}
	if id := os.Getenv("AWS_ACCESS_KEY_ID"); id != "" {
		return Credentials{ID: id, Secret: os.Getenv("AWS_SECRET_ACCESS_KEY"), Token: os.Getenv("AWS_SESSION_TOKEN")}, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now().Before(c.until) {
		return c.kept, nil
	}
	found, err := c.webIdentity(ctx, region)
	if errors.Is(err, ErrNotThere) {
		found, err = podCredentials(ctx)
	}
	if errors.Is(err, ErrNotThere) {
		found, err = TaskCredentials(ctx)
	}
	if errors.Is(err, ErrNotThere) {
		found, err = c.metadata.RoleCredentials(ctx)
	}
	if err != nil {
		return Credentials{}, err
	}
	c.kept, c.until = found, c.now().Add(keepCredentials)
	return found, nil
}

// authorization is a header as Sign makes it, and nothing else: of a part that is there twice, AWS might take the
// one that was not looked at here.
var authorization = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=[A-Za-z0-9/_-]{1,200}, SignedHeaders=([a-z0-9;-]{1,200}), Signature=[0-9a-f]{64}$`)

// caller has AWS say who signed a proof.
func (c *Client) caller(ctx context.Context, region, trustDomain string, nonce []byte, r Response) (account, arn string, err error) {
	request := CallerRequest(region, trustDomain, nonce)
	request.Headers["X-Amz-Date"] = r.Date
	if r.Token != "" {
		request.Headers["X-Amz-Security-Token"] = r.Token
	}
	// STS says whose signature it is, not what it covers; a nonce that is not signed is nobody's.
	signed := authorization.FindStringSubmatch(r.Authorization)
	if signed == nil || signed[1] != request.SignedHeaders() || strings.ContainsAny(r.Date+r.Token, "\r\n") {
		return "", "", attestor.Refusef("verify proof: it does not sign what was asked for")
	}
	request.Headers["Authorization"] = r.Authorization
	var said struct {
		Account string `xml:"GetCallerIdentityResult>Account"`
		ARN     string `xml:"GetCallerIdentityResult>Arn"`
	}
	text, err := c.send(ctx, c.config.STSEndpoint, request)
	if errors.Is(err, ErrRefused) {
		return "", "", attestor.Refusef("verify proof: AWS does not believe the signature")
	}
	if err == nil {
		err = decodeXML(text, &said)
	}
	if err != nil {
		return "", "", fmt.Errorf("verify proof: %w", err)
	}
	return said.Account, said.ARN, nil
}

// Account is whose credentials the client has.
func (c *Client) Account(ctx context.Context, region string) (string, error) {
	var said struct {
		Account string `xml:"GetCallerIdentityResult>Account"`
	}
	err := c.Query(ctx, c.config.STSEndpoint, "sts."+region+"."+Suffix(region), "sts", region,
		url.Values{"Action": {"GetCallerIdentity"}, "Version": {"2011-06-15"}}, &said)
	if err != nil {
		return "", fmt.Errorf("ask whose credentials the server has: %w", err)
	}
	if !IsAccount(said.Account) {
		return "", errors.New("ask whose credentials the server has: AWS does not say")
	}
	return said.Account, nil
}
