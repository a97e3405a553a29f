package conf

import (
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// NamedKind decodes the blocks of a type whose label is a name and whose keys are another package's
// business: scan_policy "prod" { … }.
type NamedKind struct {
	// Block is the type: "scan_policy", "trust_policy", "evidence_source", "kubernetes" or "role".
	Block string
	// Decode returns what the block says, what is wrong with its keys, and what the HCL library
	// complains about.
	Decode func(name string, body hcl.Body) (any, []KeyProblem, hcl.Diagnostics)
}

// KeyProblem is something that is wrong with one key of a named block.
type KeyProblem struct {
	// Field is the key with its blocks' names before it, as "fail.severity", and Nth in which of several
	// blocks of the first name, from 1; 0 if there can be one only.
	Field string
	Nth   int
	// Text is a sentence that says what is wrong and what to do.
	Text string
}

// String returns the problem as one line.
func (p KeyProblem) String() string {
	field := p.Field
	if p.Nth > 0 {
		block, key, _ := strings.Cut(field, ".")
		field = strings.TrimSuffix(fmt.Sprintf("%s[%d].%s", block, p.Nth, key), ".")
	}
	return field + ": " + p.Text
}

// Named is one decoded block.
type Named struct {
	Block, Name string
	Value       any

	where hcl.Range
	body  hcl.Body
}

// NamedProblem is something that is wrong with one block when it is compared with the others.
type NamedProblem struct {
	Block, Name string
	KeyProblem
}

// Evidence is what the server's file says of image evidence beside the named blocks.
type Evidence struct {
	// On says that there is anything about evidence in the file.
	On bool
	// KEVFile and EPSSFile are the vulnerability feeds, looked at every FeedRefresh.
	KEVFile, EPSSFile string
	FeedRefresh       time.Duration
	// KeepUnused is how long an image stays known that nobody runs and nobody pushes about. 0: for ever.
	KeepUnused time.Duration
	// RequireSigned refuses entries that rest on claims alone.
	RequireSigned bool
	// CRLFile and CRLAddress are where the list of revoked certificates is to be found.
	CRLFile, CRLAddress string
	// Registries are where manifests may be fetched, RegistryHosts where these may send on to, and
	// PlainRegistries those of both without TLS. PrivateRegistries lets names lead to private addresses.
	Registries, RegistryHosts, PlainRegistries []string
	PrivateRegistries                          bool
	// RegistryCredentials is a config.json of Docker; empty: registries are asked without credentials.
	RegistryCredentials string
	Webhooks            []Webhook
}

// Webhook is webhook "name" { … }.
type Webhook struct {
	Name, URL, KeyFile, CAFile string
	Events                     []string
}

type evidenceBlock struct {
	KEVFile     string         `hcl:"kev_file,optional"`
	EPSSFile    string         `hcl:"epss_file,optional"`
	FeedRefresh string         `hcl:"feed_refresh,optional"`
	KeepUnused  string         `hcl:"keep_unused,optional"`
	Require     string         `hcl:"require_evidence,optional"`
	CRLFile     string         `hcl:"crl_file,optional"`
	CRLAddress  string         `hcl:"crl_address,optional"`
	Registries  []string       `hcl:"registries,optional"`
	Hosts       []string       `hcl:"registry_hosts,optional"`
	Plain       []string       `hcl:"plain_registries,optional"`
	Private     bool           `hcl:"allow_private_registries,optional"`
	Credentials string         `hcl:"registry_credentials_path,optional"`
	Webhooks    []webhookBlock `hcl:"webhook,block"`
}

type webhookBlock struct {
	Name    string    `hcl:"name,label"`
	Where   hcl.Range `hcl:",def_range"`
	URL     string    `hcl:"url,optional"`
	KeyFile string    `hcl:"key_file,optional"`
	CAFile  string    `hcl:"ca_file,optional"`
	Events  []string  `hcl:"events,optional"`
}

func (l *loader) evidence(b *evidenceBlock) Evidence {
	e := Evidence{FeedRefresh: time.Minute, KeepUnused: 90 * 24 * time.Hour}
	if b == nil {
		return e
	}
	const key = "evidence."
	e.On = true
	// The feeds' files may come later: a cron job downloads them.
	e.KEVFile, e.EPSSFile = l.inFile(key+"kev_file", b.KEVFile), l.inFile(key+"epss_file", b.EPSSFile)
	e.FeedRefresh = l.duration(key+"feed_refresh", b.FeedRefresh, e.FeedRefresh, time.Second)
	e.KeepUnused = l.keepUnused(key+"keep_unused", b.KeepUnused, e.KeepUnused)
	e.RequireSigned = l.oneOf(key+"require_evidence", b.Require, "any", "signed") == "signed"
	e.CRLFile = l.inFile(key+"crl_file", b.CRLFile)
	if b.CRLAddress != "" {
		host, port, err := net.SplitHostPort(b.CRLAddress)
		if n, bad := strconv.Atoi(port); err != nil || bad != nil || n < 0 || n > 65535 || net.ParseIP(host) == nil {
			l.say(key+"crl_address", "Invalid address", "%q is no address to listen on: write an IP address and a port, as in \"127.0.0.1:8092\".", b.CRLAddress)
		}
		e.CRLAddress = b.CRLAddress
	}
	e.Registries, e.RegistryHosts, e.PlainRegistries, e.PrivateRegistries = b.Registries, b.Hosts, b.Plain, b.Private
	e.RegistryCredentials = l.credentials(key+"registry_credentials_path", b)
	for _, name := range slices.Concat(b.Registries, b.Hosts, b.Plain) {
		if name == "" || strings.ContainsAny(name, "/@ ") {
			l.say(key+"registries", "Invalid registry", "%q is no registry: write its host, with the port if it is not 443, as in \"registry.example.org:5000\".", name)
		}
	}
	for _, w := range b.Webhooks {
		e.Webhooks = append(e.Webhooks, l.webhook(w, e.Webhooks))
	}
	return e
}

// keepUnused reads a duration that may be written in days, or "0".
func (l *loader) keepUnused(key, text string, byDefault time.Duration) time.Duration {
	if text == "0" {
		return 0
	}
	if days, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			l.say(key, "Invalid duration", "%q is no duration: write a whole number of days, as in \"90d\", or \"0\" for ever.", text)
			return byDefault
		}
		text = strconv.FormatUint(n*24, 10) + "h"
	}
	return l.duration(key, text, byDefault, 24*time.Hour)
}

func (l *loader) webhook(b webhookBlock, before []Webhook) Webhook {
	key := "evidence.webhook." + b.Name + "."
	if slices.ContainsFunc(before, func(w Webhook) bool { return w.Name == b.Name }) {
		l.at(b.Where, "Duplicate webhook", fmt.Sprintf("The webhook %q is there twice; give each a name of its own.", b.Name))
	}
	u, err := url.Parse(b.URL)
	switch {
	case b.URL == "":
		l.required(key+"url", "", "it says where alerts are posted to")
	case err != nil, u.Scheme != "https" && u.Scheme != "http", u.Host == "", u.User != nil, u.Fragment != "":
		l.say(key+"url", "Invalid URL", "%q is no URL to post to: write https://host/path; a password does not belong in it.", b.URL)
	case u.Scheme == "http" && !loopback(u.Hostname()):
		l.say(key+"url", "Invalid URL", "%q is not https: alerts tell what is vulnerable where.", b.URL)
	}
	return Webhook{
		Name: b.Name, URL: b.URL, Events: b.Events,
		KeyFile: l.existing(key+"key_file", b.KeyFile, "it holds the secret that alerts are signed with"),
		CAFile:  l.existing(key+"ca_file", b.CAFile, "it holds the certificates that the webhook's is verified with"),
	}
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// at records a mistake at a place.
func (l *loader) at(r hcl.Range, summary, detail string) {
	l.wrong = append(l.wrong, Mistake{Where: r.String(), Summary: summary, Detail: detail, order: r.Start.Byte})
}

// named decodes the blocks of one type. Where the program has no kind for it, they stay undecoded.
func (l *loader) named(block string, blocks []typeBlock) []Named {
	var kind *NamedKind
	for i := range l.options.Named {
		if l.options.Named[i].Block == block {
			kind = &l.options.Named[i]
		}
	}
	var list []Named
	for _, b := range blocks {
		if slices.ContainsFunc(list, func(n Named) bool { return n.Name == b.Type }) {
			l.at(b.Where, "Duplicate "+block, fmt.Sprintf("The %s %q is there twice; give each a name of its own.", block, b.Type))
			continue
		}
		n := Named{Block: block, Name: b.Type, where: b.Where, body: b.Keys}
		if kind != nil {
			value, problems, diags := kind.Decode(b.Type, b.Keys)
			l.add(diags)
			n.Value = value
			if !diags.HasErrors() { // what could not be decoded has been complained about
				for _, p := range problems {
					l.problem(n, p)
				}
			}
		}
		list = append(list, n)
	}
	return list
}

// problem records what is wrong with a key of a named block, at the key's place.
func (l *loader) problem(n Named, p KeyProblem) {
	r := n.where
	if body, ok := n.body.(*hclsyntax.Body); ok {
		if found := findNth(body, p.Field, p.Nth); found != nil {
			r = *found
		}
	}
	l.at(r, "Invalid "+n.Block, fmt.Sprintf("%s %q, %s: %s", n.Block, n.Name, p.Field, p.Text))
}

// findNth returns the place of a key whose path may go through the nth of several blocks.
func findNth(body *hclsyntax.Body, field string, nth int) *hcl.Range {
	var best *hcl.Range
	rest := field
	for rest != "" {
		name := rest
		for i := range rest {
			if rest[i] == '.' {
				name = rest[:i]
				break
			}
		}
		if attr, ok := body.Attributes[name]; ok {
			return attr.Expr.Range().Ptr()
		}
		var inner *hclsyntax.Block
		for _, block := range body.Blocks {
			if block.Type != name {
				continue
			}
			inner = block
			if nth--; nth <= 0 {
				break
			}
		}
		if inner == nil {
			return best
		}
		nth = 1
		best, body = inner.DefRange().Ptr(), inner.Body
		if len(name) == len(rest) {
			return best
		}
		rest = rest[len(name)+1:]
	}
	return best
}

// NamedOf returns the values of the blocks of a type, in the order of the file.
func NamedOf[T any](all []Named, block string) []T {
	var list []T
	for _, n := range all {
		if v, ok := n.Value.(T); ok && n.Block == block {
			list = append(list, v)
		}
	}
	return list
}

// DecodeNamed reads only the named blocks of a text, as of a file under the given name, and says
// everything that is wrong with them. Whatever else stands there is left aside.
func DecodeNamed(file string, text []byte, kinds []NamedKind) ([]Named, error) {
	l := &loader{path: file, source: text, flags: map[string]string{}, options: Options{Named: kinds}}
	parsed, diags := hclsyntax.ParseConfig(text, file, hcl.InitialPos)
	l.add(diags)
	if diags.HasErrors() {
		return nil, l.mistakes()
	}
	var list []Named
	body, _ := parsed.Body.(*hclsyntax.Body) // hclsyntax makes nothing else
	for _, kind := range kinds {
		var blocks []typeBlock
		for _, b := range body.Blocks {
			if b.Type != kind.Block {
				continue
			}
			if len(b.Labels) != 1 {
				l.at(b.DefRange(), "Missing name for "+b.Type, fmt.Sprintf("Write %s \"name\" { … }.", b.Type))
				continue
			}
			blocks = append(blocks, typeBlock{Type: b.Labels[0], Where: b.DefRange(), Keys: b.Body})
		}
		list = append(list, l.named(kind.Block, blocks)...)
	}
	return list, l.mistakes()
}

// credentials checks the file that registries' passwords are in.
func (l *loader) credentials(key string, b *evidenceBlock) string {
	if b.Credentials != "" && len(b.Registries) == 0 {
		l.say(key, "Missing registries", "Credentials are for registries that may be asked; name these in registries.")
	}
	before := len(l.wrong)
	path := l.existing(key, b.Credentials, `"docker login" writes such a file`)
	if path != "" && l.options.Try && l.options.TryCredentials != nil && len(l.wrong) == before {
		if err := l.options.TryCredentials(path); err != nil {
			l.say(key, "Unusable credentials", "%s.", oneLine(err.Error()))
		}
	}
	return path
}
