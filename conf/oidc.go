package conf

import (
	"net"
	"net/url"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// OIDCDiscovery is oidc_discovery { … } of the server: where verifiers that speak OpenID Connect find the
// keys of JWT-SVIDs. Without ACME and File it speaks plain HTTP, for a proxy.
type OIDCDiscovery struct {
	Domains                 []string
	Address                 string
	Port                    int
	SocketPath              string // in place of Address and Port
	ACME                    *ACME
	File                    *ServingCertificate
	Issuer, JWKSURI, Prefix string
	SetKeyUse, PlainHTTP    bool // the second: the documents say http
}

// JWTProfile is jwt_profile "NAME" { … }: other claims in JWT-SVIDs for certain audiences.
type JWTProfile struct {
	Name           string
	Audiences      []string
	IDs            []string
	SubjectIssues  bool
	Issuer         string
	JTI            bool
	AudienceAsText bool
}

type oidcBlock struct {
	Where       hcl.Range     `hcl:",def_range"`
	Domains     []string      `hcl:"domains,optional"`
	Address     string        `hcl:"bind_address,optional"`
	Port        *int          `hcl:"bind_port,optional"`
	SocketPath  string        `hcl:"listen_socket_path,optional"`
	ACME        *acmeBlock    `hcl:"acme,block"`
	File        *servingBlock `hcl:"serving_cert_file,block"`
	BehindProxy bool          `hcl:"behind_proxy,optional"`
	Issuer      string        `hcl:"jwt_issuer,optional"`
	JWKSURI     string        `hcl:"jwks_uri,optional"`
	Prefix      string        `hcl:"server_path_prefix,optional"`
	SetKeyUse   bool          `hcl:"set_key_use,optional"`
	PlainHTTP   bool          `hcl:"allow_insecure_scheme,optional"`
}

type jwtProfileBlock struct {
	Name           string    `hcl:"name,label"`
	Where          hcl.Range `hcl:",def_range"`
	Audiences      []string  `hcl:"audiences,optional"`
	IDs            []string  `hcl:"spiffe_ids,optional"`
	Issuer         string    `hcl:"issuer,optional"`
	JTI            bool      `hcl:"jti,optional"`
	AudienceAsText bool      `hcl:"audience_as_text,optional"`
}

// subjectIssues is what issuer says to mean that it is the subject.
const subjectIssues = "subject"

// oidc checks the block. issuer is what the tokens say.
func (l *loader) oidc(b *oidcBlock, issuer string) *OIDCDiscovery {
	if b == nil {
		return nil
	}
	const key = "oidc_discovery."
	o := &OIDCDiscovery{
		Domains: b.Domains, Issuer: b.Issuer, JWKSURI: b.JWKSURI, SetKeyUse: b.SetKeyUse, PlainHTTP: b.PlainHTTP,
		Address: l.ip(key+"bind_address", b.Address, "0.0.0.0"),
	}
	if len(b.Domains) == 0 {
		l.required(key+"domains", "", "they are the names that the documents may be asked for by, for example [\"oidc.example.org\"]")
	}
	for n, d := range b.Domains {
		if d == "" || strings.ContainsAny(d, "/: \t") {
			l.say(key+"domains", "Invalid domain", "%q is no name of a host; write it without scheme, port and path.", d)
		}
		o.Domains[n] = strings.TrimSuffix(d, ".")
	}
	o.Prefix = strings.TrimSuffix(b.Prefix, "/")
	if o.Prefix != "" && (!strings.HasPrefix(o.Prefix, "/") || strings.ContainsAny(o.Prefix, " ?#%") || strings.Contains(o.Prefix, "//")) {
		l.say(key+"server_path_prefix", "Invalid path", "%q is no URL path: it must begin with a slash and have no query.", b.Prefix)
	}
	l.oidcListener(o, b)
	for k, text := range map[string]string{"jwt_issuer": b.Issuer, "jwks_uri": b.JWKSURI} {
		if text != "" {
			l.webURL(key+k, text, b.PlainHTTP)
		}
	}
	switch {
	case issuer == "":
		l.say("server.jwt_issuer", "Missing issuer", "Verifiers look the documents up by the iss claim of a token, and without jwt_issuer tokens have none: set it to https://%s%s.", first(o.Domains), o.Prefix)
	case b.Issuer != "" && b.Issuer != issuer:
		l.say(key+"jwt_issuer", "Conflicting issuers", "The documents would say %q and the tokens %q; verifiers want both to be the same. Leave it out here.", b.Issuer, issuer)
	default:
		o.Issuer = issuer
		l.webURL("server.jwt_issuer", issuer, b.PlainHTTP)
	}
	return o
}

func first(list []string) string {
	if len(list) == 0 {
		return "oidc.example.org"
	}
	return list[0]
}

// oidcListener reads where the documents are served and with which certificate.
func (l *loader) oidcListener(o *OIDCDiscovery, b *oidcBlock) {
	const key = "oidc_discovery."
	ways := 0
	for _, on := range []bool{b.ACME != nil, b.File != nil, b.BehindProxy} {
		if on {
			ways++
		}
	}
	if ways != 1 {
		l.at(b.Where, "Missing certificate", "The listener needs exactly one of acme { … }, serving_cert_file { … } and behind_proxy = true, with which it speaks plain HTTP to a proxy that does TLS.")
	}
	switch {
	case b.SocketPath != "":
		o.SocketPath = l.socket(key+"listen_socket_path", b.SocketPath, "")
		if b.Port != nil || b.Address != "" {
			l.say(key+"listen_socket_path", "Conflicting listeners", "It is one of listen_socket_path and bind_address with bind_port.")
		}
		if !b.BehindProxy {
			l.say(key+"listen_socket_path", "Conflicting listeners", "A Unix socket is for a proxy: set behind_proxy = true.")
		}
	case b.Port == nil:
		l.required(key+"bind_port", "", "it is the TCP port of the listener, for example 443")
	default:
		o.Port = l.port(key+"bind_port", b.Port, 0, 0)
	}
	if b.File != nil {
		const key = key + "serving_cert_file."
		l.required(key+"cert_file_path", b.File.CertPath, "it holds the listener's certificate chain as PEM")
		l.required(key+"key_file_path", b.File.KeyPath, "it holds the certificate's key as PEM")
		o.File = l.servingFile(key, b.File)
	}
	if b.ACME != nil {
		o.ACME = l.acme(key+"acme.", b.ACME)
		if b.ACME.Domain != "" && !slices.Contains(o.Domains, b.ACME.Domain) {
			l.say(key+"acme.domain_name", "Conflicting names", "The certificate would be for %q, which is none of the domains.", b.ACME.Domain)
		}
	}
}

// servingFile reads where a certificate is that something else renews.
func (l *loader) servingFile(key string, b *servingBlock) *ServingCertificate {
	return &ServingCertificate{
		CertPath: l.existing(key+"cert_file_path", b.CertPath, "it holds the listener's certificate chain"),
		KeyPath:  l.existing(key+"key_file_path", b.KeyPath, "it holds the certificate's key"),
		Interval: l.duration(key+"file_sync_interval", b.Interval, defaultFileSync, minFileSync),
	}
}

// acme reads how a certificate is ordered.
func (l *loader) acme(key string, b *acmeBlock) *ACME {
	l.required(key+"domain_name", b.Domain, "it is the name that the certificate is ordered for")
	if d := b.Domain; d != "" && (strings.ContainsAny(d, "/:*@ \t") || strings.HasSuffix(d, ".") || !strings.Contains(d, ".") || net.ParseIP(d) != nil) {
		l.say(key+"domain_name", "Invalid domain", "%q is no name that an authority of the web gives a certificate for; write one in DNS, as in \"bundle.example.org\", without scheme, port and path.", d)
	}
	if !b.Accepted {
		l.say(key+"tos_accepted", "Terms not accepted", "The authority gives certificates to who accepts its terms of service: read them, and set tos_accepted = true.")
	}
	if b.DirectoryURL != "" {
		l.https(b.DirectoryURL, func(why string) { l.say(key+"directory_url", "Invalid URL", "%s", why) })
	}
	return &ACME{Domain: b.Domain, Email: b.Email, DirectoryURL: b.DirectoryURL}
}

// webURL checks a URL that stands in a document.
func (l *loader) webURL(key, text string, plain bool) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" && (u.Scheme != "http" || !plain) || u.Hostname() == "" || u.User != nil || u.Fragment != "" || u.RawQuery != "" {
		l.say(key, "Invalid URL", "%q is no https URL without a query.", text)
	}
}

// jwtProfiles checks the blocks. A block that could never apply, or that changes nothing, is a mistake.
func (l *loader) jwtProfiles(blocks []jwtProfileBlock, td spiffeid.TrustDomain) []JWTProfile {
	var out []JWTProfile
	seen := map[string]bool{}
	for _, b := range blocks {
		key := "jwt_profile." + b.Name + "."
		p := JWTProfile{
			Name: b.Name, Audiences: b.Audiences, IDs: b.IDs, JTI: b.JTI, AudienceAsText: b.AudienceAsText,
			SubjectIssues: b.Issuer == subjectIssues,
		}
		if !p.SubjectIssues {
			p.Issuer = b.Issuer
		}
		if seen[b.Name] {
			l.at(b.Where, "Duplicate jwt_profile", "There are two blocks of this name; keep one of them.")
		}
		seen[b.Name] = true
		if len(b.Audiences) == 0 || slices.Contains(b.Audiences, "") {
			l.say(key+"audiences", "Missing audience", "A profile is for certain audiences, for example [\"https://login.example.org/token\"].")
		}
		for _, text := range b.IDs {
			exact, wild := strings.CutSuffix(text, "/*")
			id, err := spiffeid.FromString(exact)
			switch {
			case err != nil || id.Path() == "" && !wild:
				l.say(key+"spiffe_ids", "Invalid SPIFFE ID", "%q is no SPIFFE ID with a path; it may end in \"/*\" for all below it.", text)
			case id.TrustDomain() != td && !td.IsZero():
				l.say(key+"spiffe_ids", "Invalid SPIFFE ID", "%q is of another trust domain, for which this server signs nothing.", text)
			}
		}
		if b.Issuer == "" && !b.JTI && !b.AudienceAsText {
			l.at(b.Where, "Idle jwt_profile", "It changes nothing; set issuer, jti or audience_as_text.")
		}
		out = append(out, p)
	}
	return out
}
