// Package aws stands in for the parts of Amazon's cloud that attestation talks to: the instance metadata
// service in its second version, STS, EC2, IAM and ECS, the metadata and credentials services of a task, and the
// ECS agent of a container instance, over HTTP on the loopback interface. It checks
// signatures as AWS does, with code of its own, and knows whose credentials are whose.
package aws

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Key is an access key and who it belongs to.
type Key struct {
	ID, Secret, Token, Account, ARN string
	// Until is when it ends; zero is never.
	Until time.Time
}

// Instance is what EC2 knows of one.
type Instance struct {
	ID, Account, State, Profile, Role string
	Tags, Groups                      map[string]string
}

// Cloud is the services together. Its fields may be changed between requests, under Lock.
type Cloud struct {
	sync.Mutex
	// Metadata is what the metadata service has, by path below /latest/.
	Metadata map[string]string
	// Keys are the access keys there are, by ID.
	Keys map[string]Key
	// Instances by ID.
	Instances map[string]Instance
	// Tasks are those of ECS, by ARN.
	Tasks map[string]Task
	// Role is the key that a task's credentials service hands out.
	Role Key
	// Roles are those that may be assumed, by ARN, and Accounts those of the organization, with their state;
	// whoever has a role in the account Management may list them.
	Roles      map[string]Role
	Accounts   map[string]string
	Management string
	// WebTokens are tokens of service accounts by the ARN of the role they are good for, PodToken is what the
	// agent of EKS's Pod Identity asks for, at /v1/credentials, before it hands out Role.
	WebTokens map[string]string
	PodToken  string
	// Now is the clock that requests are dated and keys end by; time.Now if nil.
	Now func() time.Time
	// Page is how many instances EC2 shows at a time; 0 is all.
	Page int
	// Trouble answers in place of the service if it returns true.
	Trouble func(w http.ResponseWriter, r *http.Request) bool
	// Asked counts requests by what was asked for.
	Asked map[string]int

	server *httptest.Server
	more   []*httptest.Server
	tokens map[string]time.Time
}

// New starts the services; Close ends them.
func New() *Cloud {
	c := &Cloud{Metadata: map[string]string{}, Keys: map[string]Key{}, Instances: map[string]Instance{}, Tasks: map[string]Task{}, Roles: map[string]Role{}, Accounts: map[string]string{}, WebTokens: map[string]string{}, Asked: map[string]int{}, tokens: map[string]time.Time{}}
	c.server = httptest.NewServer(c)
	return c
}

// Also serves at another listener, as 169.254.169.254 of a machine; Close ends that too.
func (c *Cloud) Also(l net.Listener) (url string) {
	s := httptest.NewUnstartedServer(c)
	_ = s.Listener.Close()
	s.Listener = l
	s.Start()
	c.more = append(c.more, s)
	return s.URL
}

// URL is where all of the services are.
func (c *Cloud) URL() string { return c.server.URL }

// Close ends the services.
func (c *Cloud) Close() {
	for _, s := range append(c.more, c.server) {
		s.Close()
	}
}

// ServeHTTP answers for the metadata service below /latest/ and for the others at /.
func (c *Cloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.Lock()
	defer c.Unlock()
	if c.Trouble != nil && c.Trouble(w, r) {
		return
	}
	if path, ok := strings.CutPrefix(r.URL.Path, "/latest/"); ok {
		c.metadata(w, r, path)
		return
	}
	if r.URL.Path != "/" {
		c.beside(w, r)
		return
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if form, err := url.ParseQuery(string(body)); err == nil && form.Get("Action") == "AssumeRoleWithWebIdentity" {
		c.Asked[form.Get("Action")]++
		c.assumeByWeb(w, r, form)
		return
	}
	key, service, err := c.verify(r, string(body))
	if err != nil {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprintf(w, "<ErrorResponse><Error><Code>SignatureDoesNotMatch</Code><Message>%s</Message></Error></ErrorResponse>", err)
		return
	}
	switch service {
	case "ecs":
		c.ecs(w, r.Header.Get("X-Amz-Target"), body, key)
		return
	case "organizations":
		c.organizations(w, r.Header.Get("X-Amz-Target"), body, key)
		return
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c.Asked[form.Get("Action")]++
	switch service + " " + form.Get("Action") {
	case "sts GetCallerIdentity":
		fmt.Fprintf(w, `<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult><Arn>%s</Arn><UserId>AROA:x</UserId><Account>%s</Account></GetCallerIdentityResult></GetCallerIdentityResponse>`, key.ARN, key.Account)
	case "sts AssumeRole":
		c.assume(w, form, key)
	case "ec2 DescribeInstances":
		c.describe(w, form, key.Account)
	case "iam GetInstanceProfile":
		c.profile(w, form.Get("InstanceProfileName"), key.Account)
	default:
		w.WriteHeader(http.StatusBadRequest)
	}
}

func (c *Cloud) metadata(w http.ResponseWriter, r *http.Request, path string) {
	if path == "api/token" {
		if r.Method != http.MethodPut || r.Header.Get("X-aws-ec2-metadata-token-ttl-seconds") == "" || r.Header.Get("X-Forwarded-For") != "" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		raw := make([]byte, 16)
		_, _ = rand.Read(raw)
		token := hex.EncodeToString(raw)
		c.tokens[token] = time.Now().Add(time.Minute)
		fmt.Fprint(w, token)
		return
	}
	if until, ok := c.tokens[r.Header.Get("X-aws-ec2-metadata-token")]; !ok || time.Now().After(until) {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	text, ok := c.Metadata[path]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	fmt.Fprint(w, text)
}

// GiveRole lets the metadata service hand out a key as the credentials of a role.
func (c *Cloud) GiveRole(role string, key Key) {
	c.Lock()
	defer c.Unlock()
	c.Keys[key.ID] = key
	text, _ := json.Marshal(map[string]string{
		"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": key.ID, "SecretAccessKey": key.Secret, "Token": key.Token,
	})
	c.Metadata["meta-data/iam/security-credentials/"] = role
	c.Metadata["meta-data/iam/security-credentials/"+role] = string(text)
}

// describe shows the instances of an account: one that is asked for by its ID and must be there, or those
// that a filter names and that are, Page at a time.
func (c *Cloud) describe(w http.ResponseWriter, form url.Values, account string) {
	if id := form.Get("InstanceId.1"); id != "" {
		i, ok := c.Instances[id]
		if !ok || i.Account != account {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, "<Response><Errors><Error><Code>InvalidInstanceID.NotFound</Code></Error></Errors></Response>")
			return
		}
		fmt.Fprintf(w, described, reservation(i), "")
		return
	}
	if form.Get("Filter.1.Name") != "instance-id" || form.Get("Filter.1.Value.201") != "" {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, "<Response><Errors><Error><Code>InvalidParameterValue</Code></Error></Errors></Response>")
		return
	}
	from, _ := strconv.Atoi(form.Get("NextToken"))
	var all strings.Builder
	shown, next := 0, ""
	for n := from + 1; ; n++ {
		id := form.Get("Filter.1.Value." + strconv.Itoa(n))
		if id == "" {
			break
		}
		if i, ok := c.Instances[id]; ok && i.Account == account {
			all.WriteString(reservation(i))
			shown++
		}
		if c.Page > 0 && shown == c.Page {
			next = "<nextToken>" + strconv.Itoa(n) + "</nextToken>"
			break
		}
	}
	fmt.Fprintf(w, described, all.String(), next)
}

const described = `<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><reservationSet>%s</reservationSet>%s</DescribeInstancesResponse>`

func reservation(i Instance) string {
	var groups, tags, profile string
	for id, name := range i.Groups {
		groups += "<item><groupId>" + id + "</groupId><groupName>" + name + "</groupName></item>"
	}
	for key, value := range i.Tags {
		tags += "<item><key>" + key + "</key><value>" + value + "</value></item>"
	}
	if i.Profile != "" {
		profile = "<iamInstanceProfile><arn>" + i.Profile + "</arn><id>AIPA</id></iamInstanceProfile>"
	}
	return fmt.Sprintf(`<item><ownerId>%s</ownerId><instancesSet><item><instanceId>%s</instanceId><instanceState><code>16</code><name>%s</name></instanceState>%s<groupSet>%s</groupSet><tagSet>%s</tagSet></item></instancesSet></item>`,
		i.Account, i.ID, i.State, profile, groups, tags)
}

func (c *Cloud) profile(w http.ResponseWriter, name, account string) {
	for _, i := range c.Instances {
		if strings.HasSuffix(i.Profile, "/"+name) && i.Account == account {
			fmt.Fprintf(w, `<GetInstanceProfileResponse xmlns="https://iam.amazonaws.com/doc/2010-05-08/"><GetInstanceProfileResult><InstanceProfile><Roles><member><Arn>arn:aws:iam::%s:role/%s</Arn></member></Roles></InstanceProfile></GetInstanceProfileResult></GetInstanceProfileResponse>`, i.Account, i.Role)
			return
		}
	}
	w.WriteHeader(http.StatusNotFound)
}

// verify checks a request's Signature Version 4 and returns whose it is and for which service.
func (c *Cloud) verify(r *http.Request, body string) (Key, string, error) {
	rest, ok := strings.CutPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ")
	parts := map[string]string{}
	for part := range strings.SplitSeq(rest, ", ") {
		name, value, _ := strings.Cut(part, "=")
		parts[name] = value
	}
	scope := strings.Split(parts["Credential"], "/")
	if !ok || len(scope) != 5 || scope[4] != "aws4_request" {
		return Key{}, "", fmt.Errorf("no credential")
	}
	key, ok := c.Keys[scope[0]]
	if !ok || key.Token != r.Header.Get("X-Amz-Security-Token") {
		return Key{}, "", fmt.Errorf("unknown key or token")
	}
	if !key.Until.IsZero() && c.now().After(key.Until) {
		return Key{}, "", fmt.Errorf("token has expired")
	}
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil || c.now().Sub(at).Abs() > 15*time.Minute || at.Format("20060102") != scope[1] {
		return Key{}, "", fmt.Errorf("date is not now")
	}
	if want := scope[3] + "." + scope[2] + "."; scope[3] != "iam" && !strings.HasPrefix(r.Host, want) {
		return Key{}, "", fmt.Errorf("signed for %s, sent to %s", want, r.Host)
	}
	var request strings.Builder
	request.WriteString(r.Method + "\n/\n\n")
	for name := range strings.SplitSeq(parts["SignedHeaders"], ";") {
		value := r.Header.Get(name)
		if name == "host" {
			value = r.Host
		}
		request.WriteString(name + ":" + value + "\n")
	}
	request.WriteString("\n" + parts["SignedHeaders"] + "\n" + sum(body))
	text := "AWS4-HMAC-SHA256\n" + r.Header.Get("X-Amz-Date") + "\n" + strings.Join(scope[1:], "/") + "\n" + sum(request.String())
	signing := mac(mac(mac(mac([]byte("AWS4"+key.Secret), scope[1]), scope[2]), scope[3]), scope[4])
	if hex.EncodeToString(mac(signing, text)) != parts["Signature"] {
		return Key{}, "", fmt.Errorf("signature is wrong")
	}
	return key, scope[3], nil
}

func mac(key []byte, text string) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(text))
	return m.Sum(nil)
}

func sum(text string) string {
	s := sha256.Sum256([]byte(text))
	return hex.EncodeToString(s[:])
}
