package awsapi

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"time"
)

const (
	// assumedFor is how long STS is asked to let a role be assumed; it lets every role for an hour.
	assumedFor = time.Hour
	// askAgain is how long a refusal of STS is believed, so that a thousand instances that attest are not a
	// thousand requests that will be refused.
	askAgain = 5 * time.Second
)

var (
	roleForm     = regexp.MustCompile(`^([A-Za-z0-9_+=,.@-]+/)*[A-Za-z0-9_+=,.@-]{1,64}$`)
	externalForm = regexp.MustCompile(`^[A-Za-z0-9_+=,.@:/-]+$`)
	sessionForm  = regexp.MustCompile(`[^A-Za-z0-9_+=,.@-]`)
)

// Role is a role that somebody with the client's credentials can assume.
type Role struct {
	// ARN names it, and ExternalID is what its trust policy asks for, if it does.
	ARN, ExternalID string
	// Session is what AWS's logs call who assumed it.
	Session string
}

// CheckRole checks the name of a role, with its path if it has one, and an external ID; both may be empty.
func CheckRole(key, role, external string) error {
	switch {
	case role != "" && (len(role) > 512 || !roleForm.MatchString(role)):
		return fmt.Errorf("%s: %q is no name of a role, as assay-lookup is; the ARN is made of it and the account", key, role)
	case external != "" && role == "":
		return fmt.Errorf("external_id goes with %s, and there is none", key)
	case external != "" && (len(external) < 2 || len(external) > 1224 || !externalForm.MatchString(external)):
		return errors.New("external_id is none: 2 to 1224 letters, digits and +=,.@:/-")
	}
	return nil
}

// RoleARN is the ARN of the role of a name in an account of the partition that a region is of.
func RoleARN(region, account, role string) string {
	return "arn:" + Partition(region) + ":iam::" + account + ":role/" + role
}

// SessionName makes a name for a session of what may have more signs than AWS takes, or be longer.
func SessionName(text string) string {
	text = sessionForm.ReplaceAllString(text, "-")
	return text[:min(len(text), 64)]
}

// assumed is a role in use. Whoever has the turn owns the fields below it.
type assumed struct {
	role Role
	by   *Client
	turn chan struct{} // capacity 1

	kept Credentials
	// From renew on STS is asked for others, and at ends they are of no use.
	renew, ends time.Time
	// failed is what STS said, until again.
	failed error
	again  time.Time
}

// Assume returns a client that speaks with the credentials of a role, which it has STS of the region that it
// speaks with give it, and give it again before they end.
func (c *Client) Assume(r Role) *Client {
	return &Client{config: c.config, client: c.client, metadata: c.metadata, now: c.now, assumed: &assumed{role: r, by: c, turn: make(chan struct{}, 1)}}
}

// credentials are the role's.
func (a *assumed) credentials(ctx context.Context, region string) (Credentials, error) {
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return Credentials{}, ctx.Err()
	}
	now := a.by.now()
	switch {
	case now.Before(a.renew):
		return a.kept, nil
	case a.failed != nil && now.Before(a.again):
		return a.orElse(now, a.failed)
	}
	kept, ends, err := a.ask(ctx, region)
	if ctx.Err() != nil {
		return Credentials{}, ctx.Err() // whose patience ended, not STS's
	}
	if err != nil {
		a.failed, a.again = err, now.Add(askAgain)
		return a.orElse(now, err)
	}
	a.failed, a.kept, a.ends = nil, kept, ends
	a.renew = now.Add(ends.Sub(now) / 2)
	return kept, nil
}

// orElse are the credentials that are good still, or why there are no others.
func (a *assumed) orElse(now time.Time, err error) (Credentials, error) {
	if now.Add(answerTime).Before(a.ends) {
		return a.kept, nil
	}
	return Credentials{}, err
}

func (a *assumed) ask(ctx context.Context, region string) (Credentials, time.Time, error) {
	var said struct {
		Got issued `xml:"AssumeRoleResult>Credentials"`
	}
	form := url.Values{
		"Action": {"AssumeRole"}, "Version": {"2011-06-15"}, "RoleArn": {a.role.ARN}, "RoleSessionName": {a.role.Session},
		"DurationSeconds": {fmt.Sprint(int(assumedFor.Seconds()))},
	}
	if a.role.ExternalID != "" {
		form.Set("ExternalId", a.role.ExternalID)
	}
	err := a.by.Query(ctx, a.by.config.STSEndpoint, "sts."+region+"."+Suffix(region), "sts", region, form, &said)
	switch {
	case errors.Is(err, ErrRefused):
		return Credentials{}, time.Time{}, fmt.Errorf("assume role %s: %w; allow the server's credentials sts:AssumeRole of it, name them in its trust policy, and set external_id if that asks for one", a.role.ARN, err)
	case err != nil:
		return Credentials{}, time.Time{}, fmt.Errorf("assume role %s: %w", a.role.ARN, err)
	case !said.Got.good(a.by.now()):
		return Credentials{}, time.Time{}, fmt.Errorf("assume role %s: STS answers without credentials that are good", a.role.ARN)
	}
	return said.Got.credentials(), said.Got.Expires, nil
}

// issued are credentials as STS writes them.
type issued struct {
	ID      string    `xml:"AccessKeyId"`
	Secret  string    `xml:"SecretAccessKey"`
	Token   string    `xml:"SessionToken"`
	Expires time.Time `xml:"Expiration"`
}

func (i issued) good(now time.Time) bool {
	return i.ID != "" && i.Secret != "" && i.Token != "" && i.Expires.After(now)
}

func (i issued) credentials() Credentials {
	return Credentials{ID: i.ID, Secret: i.Secret, Token: i.Token}
}
