package awsapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"

	"github.com/assay-id/assay/attestor"
)

const (
	// roleARN and webToken are variables that EKS sets in pods whose service account has a role, and sessionName
	// one that an operator may.
	roleARN, webToken, sessionName = "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_SESSION_NAME" //nolint:gosec // names of variables
	// fullURI and podToken are those of EKS's Pod Identity.
	fullURI, podToken = "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE" //nolint:gosec // names of variables
	// maxToken is the largest token in bytes.
	maxToken = 20_000
)

// podIdentity is where Pod Identity's agent is with IPv6; with IPv4 it is on the link.
var podIdentity = netip.MustParseAddr("fd00:ec2::23")

// webIdentity are the credentials of the role that a pod's service account has: STS gives them for the account's
// token, which the cluster signs and renews, so the file is read each time. It is ErrNotThere outside of such pods.
func (c *Client) webIdentity(ctx context.Context, region string) (Credentials, error) {
	path, arn := os.Getenv(webToken), os.Getenv(roleARN)
	if path == "" || arn == "" {
		return Credentials{}, fmt.Errorf("role of the service account: %w", ErrNotThere)
	}
	token, err := readToken(path)
	if err != nil {
		return Credentials{}, fmt.Errorf("%s: %w", webToken, err)
	}
	session := os.Getenv(sessionName)
	if session == "" {
		session = "assay"
	}
	text, err := c.send(ctx, c.config.STSEndpoint, Request{
		Method: http.MethodPost, Host: "sts." + region + "." + Suffix(region), Path: "/",
		Headers: map[string]string{"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"},
		Body: url.Values{
			"Action": {"AssumeRoleWithWebIdentity"}, "Version": {"2011-06-15"},
			"RoleArn": {arn}, "RoleSessionName": {SessionName(session)}, "WebIdentityToken": {token},
		}.Encode(),
	})
	if err != nil {
		return Credentials{}, fmt.Errorf("assume role %s by the service account: %w", arn, err)
	}
	var said struct {
		Got issued `xml:"AssumeRoleWithWebIdentityResult>Credentials"`
	}
	if err := decodeXML(text, &said); err != nil {
		return Credentials{}, fmt.Errorf("assume role %s by the service account: %w", arn, err)
	}
	if !said.Got.good(c.now()) {
		return Credentials{}, fmt.Errorf("assume role %s by the service account: STS answers without credentials that are good", arn)
	}
	return said.Got.credentials(), nil
}

// podCredentials are those that the agent of EKS's Pod Identity has for a pod; ErrNotThere outside of such pods.
func podCredentials(ctx context.Context) (Credentials, error) {
	const what = "the service with the pod's credentials"
	address := os.Getenv(fullURI)
	if address == "" {
		return Credentials{}, fmt.Errorf("role of the pod: %w", ErrNotThere)
	}
	u, err := url.Parse(address)
	if err != nil || !isLocal(u) && !isPodIdentity(u) {
		return Credentials{}, fmt.Errorf("%s: %q is no http address of this host or its link", fullURI, address)
	}
	token := ""
	if path := os.Getenv(podToken); path != "" {
		if token, err = readToken(path); err != nil {
			return Credentials{}, fmt.Errorf("%s: %w", podToken, err)
		}
	}
	var said handedOut
	if err := local(ctx, what, u, token, &said); err != nil {
		return Credentials{}, err
	}
	return said.credentials(what)
}

func isPodIdentity(u *url.URL) bool {
	ip, err := netip.ParseAddr(u.Hostname())
	return err == nil && u.Scheme == "http" && u.User == nil && ip == podIdentity
}

// readToken reads a token, which becomes a header or part of a form.
func readToken(path string) (string, error) {
	text, err := attestor.ReadFile(path, maxToken)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(text))
	if token == "" || strings.ContainsAny(token, "\r\n\x00") {
		return "", errors.New(path + " has no token in it")
	}
	return token, nil
}
