package awsapi

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/attestor"
)

// NonceSize is the size in bytes of the server's nonce.
const NonceSize = 32

// NonceHeader carries the server's nonce and the trust domain it is for, so that a server of another
// trust domain cannot pass its own challenge on.
const NonceHeader = "X-Assay-Nonce"

// Challenge asks for a signed request that says whose the credentials are.
type Challenge struct {
	// Region is the one of whose STS the server will ask.
	Region string `json:"region"`
	Nonce  []byte `json:"nonce"`
}

// Response is that request, as far as the server does not know it anyway.
type Response struct {
	Authorization string `json:"authorization"`
	Date          string `json:"date"`
	Token         string `json:"token"`
}

// CallerRequest is the one request that is signed as proof, of the STS of a region.
func CallerRequest(region, trustDomain string, nonce []byte) Request {
	return Request{
		Method: "POST", Host: "sts." + region + "." + Suffix(region), Path: "/",
		Headers: map[string]string{
			"Content-Type": "application/x-www-form-urlencoded; charset=utf-8",
			NonceHeader:    trustDomain + ":" + fmt.Sprintf("%x", nonce),
		},
		Body: "Action=GetCallerIdentity&Version=2011-06-15",
	}
}

// Prover answers challenges with an agent's own credentials. It signs one request only, GetCallerIdentity of
// the STS of its own region, with the trust domain in it: no server can have anything else signed, or use the
// answer at another trust domain's server.
type Prover struct {
	Region, TrustDomain string
	Credentials         func(context.Context) (Credentials, error)
	Now                 func() time.Time
}

// Answer answers a challenge.
func (p Prover) Answer(ctx context.Context, challenge []byte) ([]byte, error) {
	var c Challenge
	if len(challenge) > attestor.MaxEvidence || json.Unmarshal(challenge, &c) != nil {
		return nil, errors.New("challenge is not the JSON it should be")
	}
	if c.Region != p.Region {
		return nil, fmt.Errorf("challenge is for region %q, this is %q", c.Region, p.Region)
	}
	if len(c.Nonce) != NonceSize {
		return nil, fmt.Errorf("challenge has a nonce of %d bytes, want %d", len(c.Nonce), NonceSize)
	}
	credentials, err := p.Credentials(ctx)
	if err != nil {
		return nil, fmt.Errorf("get credentials of the role: %w", err)
	}
	request := CallerRequest(p.Region, p.TrustDomain, c.Nonce)
	request.Sign(credentials, p.Region, "sts", p.Now())
	return json.Marshal(Response{
		Authorization: request.Headers["Authorization"], Date: request.Headers["X-Amz-Date"], Token: credentials.Token,
	})
}

// Session is a role in use: EC2 names the sessions it hands to an instance by the instance's ID, ECS those of
// a task by the task's.
type Session struct{ Account, Role, Name string }

// Challenge has an agent prove whose credentials it has.
func (c *Client) Challenge(ctx context.Context, region, trustDomain string, ask attestor.Ask) (Session, error) {
	nonce := make([]byte, NonceSize)
	_, _ = rand.Read(nonce)
	var response Response
	if err := attestor.Challenge(ctx, ask, Challenge{Region: region, Nonce: nonce}, &response); err != nil {
		return Session{}, err
	}
	account, arn, err := c.caller(ctx, region, trustDomain, nonce, response)
	if err != nil {
		return Session{}, err
	}
	// arn:aws:sts::123456789012:assumed-role/ROLE/SESSION
	parts := strings.Split(arn[strings.LastIndexByte(arn, ':')+1:], "/")
	if len(parts) != 3 || parts[0] != "assumed-role" || slices.Contains(parts, "") {
		return Session{}, attestor.Refusef("verify proof: it is not by a role in use")
	}
	return Session{Account: account, Role: parts[1], Name: parts[2]}, nil
}
