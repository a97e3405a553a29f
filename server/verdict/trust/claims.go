package trust

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math"
	"net/url"
	"slices"
	"strings"
	"time"
)

// claims are a token's claims whose signature was verified.
type claims struct {
	texts map[string]string   // texts, numbers and truth values; those within objects as "outer.inner"
	lists map[string][]string // of such, as groups and roles are
	raw   object
}

const maxClaims = 512

func parseClaims(raw []byte) (*claims, error) {
	m, err := topOf(raw)
	if err != nil {
		return nil, err
	}
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber() // an ID of 20 digits must not become 1e+19
	var all map[string]any
	if err := decoder.Decode(&all); err != nil {
		return nil, refuse(ErrMalformed, "the token's claims are unreadable: %w", err)
	}
	c := &claims{texts: map[string]string{}, lists: map[string][]string{}, raw: m}
	c.flatten("", all)
	if n := len(c.texts) + len(c.lists); n > maxClaims {
		return nil, refuse(ErrTooLarge, "the token has %d claims, the limit is %d", n, maxClaims)
	}
	return c, nil
}

// flatten takes the single values, and lists of them. Outer ones come last, so that an object cannot take the place of a
// claim whose name holds a dot.
func (c *claims) flatten(prefix string, values map[string]any) {
	for name, v := range values {
		if inner, ok := v.(map[string]any); ok {
			c.flatten(prefix+name+".", inner)
		}
	}
	for name, v := range values {
		if s, ok := word(v); ok {
			c.texts[prefix+name] = s
			delete(c.lists, prefix+name)
		}
		if list, ok := v.([]any); ok {
			delete(c.texts, prefix+name)
			c.lists[prefix+name] = words(list)
		}
	}
}

// words are those of a list that are one; what else is in it, nobody can ask for.
func words(list []any) []string {
	all := make([]string, 0, len(list))
	for _, v := range list {
		if s, ok := word(v); ok {
			all = append(all, s)
		}
	}
	return all
}

// hold says which condition does not. Of a list one value must be what is asked for: who is in three groups is in
// each of them.
func (c *claims) hold(where conditions) error {
	for _, w := range where {
		list, ok := c.lists[w.field]
		if !ok || !w.among {
			if err := (conditions{w}).hold(c.texts); err != nil {
				return err
			}
			continue
		}
		if !slices.ContainsFunc(list, w.is.match) {
			return refuse(ErrIdentity, "none of the %d values of %s is %s", len(list), w.field, w.is)
		}
	}
	return nil
}

// current checks the token's times (RFC 7519 sections 4.1.4 to 4.1.6) and returns when it expires.
func (c *claims) current(now time.Time) (time.Time, error) {
	expires, err := c.time("exp")
	if err != nil {
		return time.Time{}, err
	}
	if expires.IsZero() {
		return time.Time{}, refuse(ErrTime, "the token has no exp: it would be good for ever")
	}
	if !now.Before(expires.Add(tokenSkew)) {
		return time.Time{}, refuse(ErrTime, "the token expired at %s; now is %s", stamp(expires), stamp(now))
	}
	for _, name := range []string{"nbf", "iat"} {
		from, err := c.time(name)
		if err != nil {
			return time.Time{}, err
		}
		if now.Add(tokenSkew).Before(from) {
			return time.Time{}, refuse(ErrTime, "the token is good from %s (%s), and now is %s; a clock is wrong", stamp(from), name, stamp(now))
		}
	}
	return expires, nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// time reads a NumericDate (RFC 7519 section 2), zero if the claim is absent.
func (c *claims) time(name string) (time.Time, error) {
	raw, ok := c.raw[name]
	if !ok {
		return time.Time{}, nil
	}
	var seconds float64
	if err := json.Unmarshal(raw, &seconds); err != nil || seconds < 0 || seconds > math.MaxInt32*100 || string(raw) == "null" {
		return time.Time{}, refuse(ErrTime, "the token's %s is no time", name)
	}
	return time.Unix(int64(seconds), 0).UTC(), nil
}

// fields translates the claims of the CI systems that Fulcio knows as Fulcio does
// (https://github.com/sigstore/fulcio/blob/main/docs/oidc.md). Claims of others yield the subject only.
func (c *claims) fields(issuer string) map[string]string {
	t := c.texts
	f := map[string]string{FieldIssuer: issuer, FieldTokenSubject: t["sub"]}
	switch {
	case t["repository_owner_id"] != "" && t["workflow_ref"] != "":
		githubFields(f, t, issuer)
	case t["project_path"] != "" && t["namespace_path"] != "":
		gitlabFields(f, t, issuer)
	case t["oidc.circleci.com/project-id"] != "":
		f[FieldSourceID] = t["oidc.circleci.com/project-id"]
		_, f[FieldSourceOwnerID], _ = strings.Cut(issuer, "/org/")
		f[FieldSourceRef], f[FieldSourceURI] = t["oidc.circleci.com/vcs-ref"], t["oidc.circleci.com/vcs-origin"]
		if t["oidc.circleci.com/ssh-rerun"] == "true" {
			f[FieldRunnerEnvironment] = sshRerun
		}
	case t["pipeline_slug"] != "" && t["organization_slug"] != "":
		f[FieldSourceDigest], f[FieldSourceID], f[FieldSourceOwnerID] = t["build_commit"], t["pipeline_id"], t["organization_id"]
		if branch := t["build_branch"]; branch != "" {
			f[FieldSourceRef] = "refs/heads/" + branch
		}
	}
	for name, value := range f {
		if value == "" || len(value) > maxField {
			delete(f, name)
		}
	}
	return f
}

func githubFields(f, t map[string]string, issuer string) {
	base := githubBase(issuer)
	at := func(path string) string {
		if base == "" || path == "" {
			return ""
		}
		return base + "/" + path
	}
	f[FieldBuildSignerURI], f[FieldBuildSignerDigest] = at(t["job_workflow_ref"]), t["job_workflow_sha"]
	f[FieldRunnerEnvironment] = t["runner_environment"]
	f[FieldSourceURI], f[FieldSourceDigest], f[FieldSourceRef] = at(t["repository"]), t["sha"], t["ref"]
	f[FieldSourceID] = t["repository_id"]
	f[FieldSourceOwnerURI], f[FieldSourceOwnerID] = at(t["repository_owner"]), t["repository_owner_id"]
	f[FieldBuildConfigURI], f[FieldBuildConfigDigest] = at(t["workflow_ref"]), t["workflow_sha"]
	f[FieldBuildTrigger] = t["event_name"]
	f[FieldSourceVisibility] = t["repository_visibility"]
	f[FieldDeploymentEnvironment] = t["environment"]
	if t["repository"] != "" && t["run_id"] != "" {
		f[FieldRunInvocationURI] = at(t["repository"] + "/actions/runs/" + t["run_id"] + "/attempts/" + t["run_attempt"])
	}
}

// githubBase is where the repositories of an issuer of GitHub's are: github.com, a tenant's own host
// (https://token.actions.TENANT.ghe.com), or a server (https://HOST/_services/token).
func githubBase(issuer string) string {
	u, err := url.Parse(issuer)
	if err != nil {
		return ""
	}
	if u.Host == "token.actions.githubusercontent.com" {
		return "https://github.com"
	}
	if host, ok := strings.CutPrefix(u.Host, "token.actions."); ok {
		return "https://" + host
	}
	if strings.HasPrefix(u.Path, "/_services/token") {
		return "https://" + u.Host
	}
	return ""
}

func gitlabFields(f, t map[string]string, issuer string) {
	project := issuer + "/" + t["project_path"]
	f[FieldSourceURI], f[FieldSourceDigest], f[FieldSourceID] = project, t["sha"], t["project_id"]
	f[FieldSourceRef] = t["ref_path"]
	if f[FieldSourceRef] == "" && t["ref"] != "" {
		f[FieldSourceRef] = map[string]string{"branch": "refs/heads/", "tag": "refs/tags/"}[t["ref_type"]] + t["ref"]
	}
	f[FieldSourceOwnerURI], f[FieldSourceOwnerID] = issuer+"/"+t["namespace_path"], t["namespace_id"]
	if config := t["ci_config_ref_uri"]; config != "" {
		f[FieldBuildConfigURI], f[FieldBuildSignerURI] = "https://"+config, "https://"+config
		f[FieldBuildConfigDigest], f[FieldBuildSignerDigest] = t["ci_config_sha"], t["ci_config_sha"]
	}
	f[FieldRunnerEnvironment], f[FieldBuildTrigger] = t["runner_environment"], t["pipeline_source"]
	f[FieldSourceVisibility], f[FieldDeploymentEnvironment] = t["project_visibility"], t["environment"]
	if t["job_id"] != "" {
		f[FieldRunInvocationURI] = project + "/-/jobs/" + t["job_id"]
	}
}

func rawURL(s string) ([]byte, error) { return base64.RawURLEncoding.DecodeString(s) }

func isRefusal(err error) bool { return errors.Is(err, ErrRefused) }
