package aws

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Role is one that may be assumed: by the users and roles whose ARNs Trust names, if they say ExternalID.
type Role struct {
	Trust      []string
	ExternalID string
}

var sessionName = regexp.MustCompile(`^[A-Za-z0-9_+=,.@-]{2,64}$`)

func (c *Cloud) now() time.Time {
	if c.Now != nil {
		return c.Now()
	}
	return time.Now()
}

// assume issues credentials of a role, for as long as was asked for, to whom its trust policy names. As STS it
// does not tell a role that is not there from one that does not trust.
func (c *Cloud) assume(w http.ResponseWriter, form url.Values, by Key) {
	refuse := func(status int, code string) {
		w.WriteHeader(status)
		fmt.Fprintf(w, "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type><Code>%s</Code><Message>User: %s is not authorized to perform: sts:AssumeRole on resource: %s</Message></Error></ErrorResponse>", code, by.ARN, form.Get("RoleArn"))
	}
	arn, session := form.Get("RoleArn"), form.Get("RoleSessionName")
	seconds, err := strconv.Atoi(form.Get("DurationSeconds"))
	parts := strings.SplitN(arn, ":", 6)
	if err != nil || seconds < 900 || seconds > 3600 || len(parts) != 6 || !sessionName.MatchString(session) || form.Get("Version") != "2011-06-15" {
		refuse(http.StatusBadRequest, "ValidationError")
		return
	}
	role, ok := c.Roles[arn]
	if !ok || !slices.Contains(role.Trust, by.ARN) || role.ExternalID != "" && role.ExternalID != form.Get("ExternalId") {
		refuse(http.StatusForbidden, "AccessDenied")
		return
	}
	key := c.issue(arn, session, time.Duration(seconds)*time.Second)
	fmt.Fprintf(w, assumed, "AssumeRole", session, key.ARN, key.ID, key.Secret, key.Token, key.Until.UTC().Format(time.RFC3339))
}

// assumed is STS's answer; %[1]s is the operation.
const assumed = `<%[1]sResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><%[1]sResult><AssumedRoleUser><AssumedRoleId>AROA:%[2]s</AssumedRoleId><Arn>%[3]s</Arn></AssumedRoleUser><Credentials><AccessKeyId>%[4]s</AccessKeyId><SecretAccessKey>%[5]s</SecretAccessKey><SessionToken>%[6]s</SessionToken><Expiration>%[7]s</Expiration></Credentials></%[1]sResult></%[1]sResponse>`

// assumeByWeb issues credentials of a role to the bearer of a service account's token. Nothing is signed.
func (c *Cloud) assumeByWeb(w http.ResponseWriter, r *http.Request, form url.Values) {
	arn := form.Get("RoleArn")
	if want, ok := c.WebTokens[arn]; !ok || form.Get("WebIdentityToken") != want || !sessionName.MatchString(form.Get("RoleSessionName")) ||
		form.Get("Version") != "2011-06-15" || r.Header.Get("Authorization") != "" {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>InvalidIdentityToken</Code></Error></ErrorResponse>`)
		return
	}
	key := c.issue(arn, form.Get("RoleSessionName"), time.Hour)
	fmt.Fprintf(w, assumed, "AssumeRoleWithWebIdentity", form.Get("RoleSessionName"), key.ARN, key.ID, key.Secret, key.Token, key.Until.UTC().Format(time.RFC3339))
}

// issue makes the key of a session.
func (c *Cloud) issue(arn, session string, lasting time.Duration) Key {
	parts := strings.SplitN(arn, ":", 6)
	name := arn[strings.LastIndexByte(arn, '/')+1:]
	n := c.Asked["AssumeRole"] + c.Asked["AssumeRoleWithWebIdentity"]
	key := Key{
		ID: fmt.Sprintf("ASIA%012d", n), Secret: fmt.Sprintf("secret of session %d", n), Token: fmt.Sprintf("token of session %d", n),
		Account: parts[4], ARN: "arn:" + parts[1] + ":sts::" + parts[4] + ":assumed-role/" + name + "/" + session,
		Until: c.now().Add(lasting),
	}
	c.Keys[key.ID] = key
	return key
}

// accountsPage is how many accounts AWS shows at a time.
const accountsPage = 20

func (c *Cloud) organizations(w http.ResponseWriter, target string, body []byte, by Key) {
	var question struct{ NextToken string }
	if target != "AWSOrganizationsV20161128.ListAccounts" || json.Unmarshal(body, &question) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	c.Asked["ListAccounts"]++
	if by.Account != c.Management {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `{"__type":"AccessDeniedException","Message":"You don't have permissions to access this resource."}`)
		return
	}
	from, _ := strconv.Atoi(question.NextToken)
	all := slices.Sorted(maps.Keys(c.Accounts))
	type account struct{ Id, Arn, Status, State string } // AWS's names
	answer := struct {
		Accounts  []account
		NextToken string `json:",omitempty"`
	}{}
	until := min(from+accountsPage, len(all))
	for _, id := range all[from:until] {
		answer.Accounts = append(answer.Accounts, account{id, "arn:aws:organizations::" + c.Management + ":account/o-1/" + id, c.Accounts[id], c.Accounts[id]})
	}
	if until < len(all) {
		answer.NextToken = strconv.Itoa(until)
	}
	_ = json.NewEncoder(w).Encode(answer)
}
