// Package server is the server's side of aws_iid: it verifies the identity document, has the instance
// prove itself where that is configured, and looks it up where that is.
//
// Why it is so: a document is not a secret. Whoever has read an instance's document once can show it, so
// alone it is good for the first agent of that instance and no other (trust on first use). The
// credentials of an instance's role, in contrast, are issued to that instance, under its ID as the
// session's name, and change by the hour; a request signed with them proves the instance again at any
// time. A session's name can be chosen by whoever may assume the role otherwise, which is why the roles
// that count are named in the configuration.
package server

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/agentpath"
	"github.com/assay-id/assay/attestor/awsiid"
)

// maxTags bounds the selectors out of tags and groups; AWS allows 50 and a few more.
const maxTags = 128

// Kind returns the server's side of aws_iid.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{Type: awsiid.Type, Config: func() any { return new(awsiid.ServerConfig) }, Open: open}
}

type judge struct {
	config       awsiid.ServerConfig
	certificates map[string]*x509.Certificate // by region
	path         *agentpath.Template
	maxAge       time.Duration
	refresh      time.Duration
	trustDomain  string
	cloud        *cloud
	organization *organization // nil: accounts are accepted by name
	log          logrus.FieldLogger
	now          func() time.Time
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*awsiid.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("aws_iid configuration is a %T", config)
	}
	j := &judge{config: *c, trustDomain: needs.TrustDomain.Name(), log: needs.Log, now: needs.Now, refresh: defaultRefresh}
	if j.now == nil {
		j.now = time.Now
	}
	if j.log == nil {
		j.log = logrus.StandardLogger()
	}
	if err := checkAccounts(c); err != nil {
		return nil, err
	}
	var err error
	if j.certificates, err = certificates(c, j.now()); err != nil {
		return nil, err
	}
	if c.MaxInstanceAge != "" {
		age, err := time.ParseDuration(c.MaxInstanceAge)
		if err != nil || age <= 0 {
			return nil, fmt.Errorf("max_instance_age: %q is no length of time, as 10m is", c.MaxInstanceAge)
		}
		j.maxAge = age
	}
	template := c.AgentPathTemplate
	if template == "" {
		template = awsiid.DefaultAgentPath
	}
	path, err := agentpath.Parse(template)
	if err == nil {
		err = tellsApart(path)
	}
	if err != nil {
		return nil, err
	}
	j.path = path
	if c.RefreshInterval != "" {
		every, err := time.ParseDuration(c.RefreshInterval)
		switch {
		case err != nil || every < minRefresh:
			return nil, fmt.Errorf("refresh_interval: %q is no length of time of %s or more, as 5m is", c.RefreshInterval, minRefresh)
		case !c.LookupInstance:
			return nil, errors.New("refresh_interval needs lookup_instance, which is what is refreshed")
		}
		j.refresh = every
	}
	if c.RequireProof && len(c.InstanceRoles) == 0 {
		return nil, errors.New("require_proof needs instance_roles, the roles by which instances prove themselves")
	}
	if j.cloud, err = newCloud(*c, j.trustDomain, j.now); err != nil {
		return nil, err
	}
	j.organization, err = newOrganization(c.Organization, j.cloud)
	return j, err
}

// tellsApart checks that the agents of two instances have two paths, and that there is all that the template asks
// for: else every instance would be refused, or one let in under another's ID.
func tellsApart(path *agentpath.Template) error {
	var made [2]string
	for i, id := range []string{"i-0123456789abcdef0", "i-0fedcba9876543210"} {
		one, err := path.Path(pathValues(awsiid.Document{AccountID: "123456789012", Region: "us-east-1", InstanceID: id}))
		if err != nil {
			return fmt.Errorf("agent_path_template: %w; there are .PluginName, .AccountID, .Region and .InstanceID, and no .Tags, which change", err)
		}
		made[i] = one
	}
	if made[0] == made[1] {
		return errors.New("agent_path_template: all instances would have one path; put {{ .InstanceID }} into it")
	}
	return nil
}

func pathValues(d awsiid.Document) map[string]any {
	return map[string]any{"PluginName": awsiid.Type, "AccountID": d.AccountID, "Region": d.Region, "InstanceID": d.InstanceID}
}

// Judge verifies the document, challenges an agent that can answer, and describes the instance.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	if len(payload) > attestor.MaxEvidence {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is too large")
	}
	var evidence awsiid.Evidence
	if json.Unmarshal(payload, &evidence) != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is not the JSON it should be")
	}
	document, err := j.verify(evidence)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("verify identity document: %w", err)
	}
	if err := j.accept(ctx, document.AccountID); err != nil {
		return attestor.Proof{}, err
	}
	path, err := j.path.Path(pathValues(document))
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("%w", err)
	}
	role := ""
	switch {
	case evidence.Proof && len(j.config.InstanceRoles) > 0:
		if role, err = j.challenge(ctx, document, ask); err != nil {
			return attestor.Proof{}, err
		}
	case j.config.RequireProof:
		return attestor.Proof{}, attestor.Refusef("instance does not prove itself; it needs a role that is one of the server's instance_roles")
	case j.maxAge > 0 && j.now().Sub(document.PendingTime) > j.maxAge:
		return attestor.Proof{}, attestor.Refusef("instance is too old to be believed for its document alone")
	}
	values := []string{
		"account_id:" + document.AccountID, "region:" + document.Region, "instance:id:" + document.InstanceID,
	}
	if document.AvailabilityZone != "" {
		values = append(values, "az:"+document.AvailabilityZone)
	}
	if document.ImageID != "" {
		values = append(values, "image:id:"+document.ImageID)
	}
	if j.config.LookupInstance {
		found, err := j.lookUp(ctx, document, role)
		if err != nil {
			return attestor.Proof{}, err
		}
		values = append(values, found...)
	}
	return attestor.Proof{
		Path:        path,
		Selectors:   selectors(values),
		CanReattest: role != "",
	}, nil
}

// challenge has the instance prove itself and returns the name of the role it did so by.
func (j *judge) challenge(ctx context.Context, d awsiid.Document, ask attestor.Ask) (string, error) {
	session, err := j.cloud.Challenge(ctx, d.Region, j.trustDomain, ask)
	switch {
	case err != nil:
		return "", err
	case session.Account != d.AccountID, session.Name != d.InstanceID:
		return "", attestor.Refusef("verify proof: it is by another instance")
	case !slices.Contains(j.config.InstanceRoles, session.Role):
		return "", attestor.Refusef("verify proof: it is by a role that is not one of the server's instance_roles")
	}
	return session.Role, nil
}

// lookUp asks AWS about the instance: it must be one that runs, and have the role it proved itself by.
func (j *judge) lookUp(ctx context.Context, d awsiid.Document, role string) ([]string, error) {
	found, err := j.cloud.describe(ctx, d)
	if err != nil {
		return nil, err
	}
	if found.State != "running" && found.State != "pending" {
		return nil, attestor.Refusef("instance does not run")
	}
	values, roles, err := j.facts(ctx, d, found)
	if err != nil {
		return nil, err
	}
	if role != "" && !j.config.WithoutRoles && !slices.ContainsFunc(roles, func(arn string) bool { return strings.HasSuffix(arn, "/"+role) }) {
		return nil, attestor.Refusef("verify proof: it is by another role than the instance has")
	}
	return values, nil
}

// facts are the selectors out of what EC2 says of an instance, and its roles.
func (j *judge) facts(ctx context.Context, d awsiid.Document, found instance) (values, roles []string, err error) {
	for _, tag := range found.Tags[:min(len(found.Tags), maxTags)] {
		values = append(values, "tag:"+tag.Key+":"+tag.Value)
	}
	for _, group := range found.Groups[:min(len(found.Groups), maxTags)] {
		values = append(values, "sg:id:"+group.ID, "sg:name:"+group.Name)
	}
	if found.Profile != "" && !j.config.WithoutRoles {
		if roles, err = j.cloud.roles(ctx, j.cloud.at(d.AccountID, d.Region), found.Profile); err != nil {
			return nil, nil, err
		}
		for _, arn := range roles {
			values = append(values, "iamrole:"+arn)
		}
	}
	return values, roles, nil
}

// selectors makes a sorted list. What cannot be a selector, as a tag with control characters, is left
// out: a tag is no reason to refuse a proved instance.
func selectors(values []string) []attestor.Selector {
	var found []attestor.Selector
	for _, value := range values {
		if s := (attestor.Selector{Type: awsiid.Type, Value: value}); s.Check() == nil {
			found = append(found, s)
		}
	}
	return attestor.NewSet(found...).All()
}
