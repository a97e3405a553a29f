// Package aws calls the two services of AWS that server/ca uses, Key Management Service and Private CA.
//
// Credentials and signatures are the SDK's: environment, files, web identity, containers and instances, as
// operators know them. The calls themselves are eight in number and the same JSON protocol, so the SDK's
// clients, which are several megabytes of a server's memory each, are left out; what is read of an answer
// is bounded in size and time.
package aws

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

// Service is one that speaks the JSON 1.1 protocol.
type Service struct{ name, target string }

// The services.
var (
	KMS = Service{"kms", "TrentService"}
	PCA = Service{"acm-pca", "ACMPrivateCA"}
)

// Config says where the service is and who asks.
type Config struct {
	Region string
	// Endpoint is an https URL that takes the place of the region's.
	Endpoint string
	// AccessKeyID and SecretAccessKey are used if both are set; otherwise what the environment has.
	AccessKeyID, SecretAccessKey string
	// AssumeRoleARN is a role to take on with these. Empty: none.
	AssumeRoleARN string
	// HTTP takes the place of the client. Nil: one with limits.
	HTTP *http.Client
}

const (
	maxAnswer = 1 << 20
	patience  = 20 * time.Second
	tries     = 3
)

// Client calls one service. It is safe for concurrent use.
type Client struct {
	service     Service
	region, url string
	credentials aws.CredentialsProvider
	signer      *v4.Signer
	http        *http.Client
}

// New returns a client. It asks nobody yet.
func New(ctx context.Context, service Service, cfg Config) (*Client, error) {
	if cfg.Region == "" {
		return nil, errors.New("the AWS region is missing")
	}
	c := &Client{service: service, region: cfg.Region, url: cfg.Endpoint, signer: v4.NewSigner(), http: cfg.HTTP}
	if c.url == "" {
		suffix := "amazonaws.com"
		if strings.HasPrefix(cfg.Region, "cn-") {
			suffix = "amazonaws.com.cn"
		}
		c.url = "https://" + service.name + "." + cfg.Region + "." + suffix + "/"
	}
	if u, err := url.Parse(c.url); err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("AWS endpoint %q is no https URL", c.url)
	}
	if c.http == nil {
		c.http = &http.Client{
			Timeout: patience,
			Transport: &http.Transport{
				Proxy: http.ProxyFromEnvironment, MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute,
				TLSHandshakeTimeout: 10 * time.Second, MaxResponseHeaderBytes: 64 << 10, ForceAttemptHTTP2: true,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
	}
	options := []func(*config.LoadOptions) error{config.WithRegion(cfg.Region)}
	if cfg.AccessKeyID != "" && cfg.SecretAccessKey != "" {
		options = append(options, config.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(cfg.AccessKeyID, cfg.SecretAccessKey, "")))
	}
	loaded, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("load AWS configuration: %w", err)
	}
	c.credentials = loaded.Credentials
	if cfg.AssumeRoleARN != "" {
		c.credentials = aws.NewCredentialsCache(stscreds.NewAssumeRoleProvider(sts.NewFromConfig(loaded), cfg.AssumeRoleARN))
	}
	return c, nil
}

// Error is what a service answers when it does not do what it was asked.
type Error struct{ Code, Message string }

func (e *Error) Error() string { return e.Code + ": " + e.Message }

// Is reports whether the error is one of a service with this code, as "NotFoundException".
func Is(err error, code string) bool {
	said, ok := errors.AsType[*Error](err)
	return ok && said.Code == code
}

// Do calls an operation. What is worth another try, and was not answered, gets one, after a while.
func (c *Client) Do(ctx context.Context, operation string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	for try := 1; ; try++ {
		again, err := c.once(ctx, operation, body, out)
		if err == nil || !again || try == tries {
			if err != nil {
				return fmt.Errorf("AWS %s %s: %w", c.service.name, operation, err)
			}
			return nil
		}
		wait := time.Duration(100<<try)*time.Millisecond + rand.N(200*time.Millisecond) //nolint:gosec // spreads load, hides nothing
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("AWS %s %s: %w", c.service.name, operation, errors.Join(ctx.Err(), err))
		}
	}
}

// once asks once, and says whether it is worth another try.
func (c *Client) once(ctx context.Context, operation string, body []byte, out any) (again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	req.Header.Set("Content-Type", "application/x-amz-json-1.1")
	req.Header.Set("X-Amz-Target", c.service.target+"."+operation)
	who, err := c.credentials.Retrieve(ctx)
	if err != nil {
		return false, fmt.Errorf("get credentials: %w", err)
	}
	sum := sha256.Sum256(body)
	if err := c.signer.SignHTTP(ctx, who, req, hex.EncodeToString(sum[:]), c.service.name, c.region, time.Now()); err != nil {
		return false, fmt.Errorf("sign request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return true, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return true, err
	case len(text) > maxAnswer:
		return false, fmt.Errorf("its answer is over %d bytes long", maxAnswer)
	case resp.StatusCode != http.StatusOK:
		e := refused(resp, text)
		return resp.StatusCode >= 500 || strings.Contains(e.Code, "Throttling"), e
	case out == nil:
		return false, nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return false, fmt.Errorf("its answer is not understood: %w", err)
	}
	return false, nil
}

func refused(resp *http.Response, text []byte) *Error {
	var said struct {
		Type    string `json:"__type"`
		Message string `json:"message"`
		Other   string `json:"Message"`
	}
	e := &Error{Code: resp.Status}
	if json.Unmarshal(text, &said) == nil {
		e.Message = said.Message
		if e.Message == "" {
			e.Message = said.Other
		}
		if said.Type != "" {
			e.Code = said.Type[strings.LastIndexByte(said.Type, '#')+1:]
		}
	}
	if len(e.Message) > 300 {
		e.Message = e.Message[:300] + "…"
	}
	return e
}
