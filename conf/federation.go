package conf

import (
	"fmt"
	"net/url"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// How often the files of a certificate are read again.
const (
	defaultFileSync = time.Hour
	minFileSync     = time.Second
)

// The profiles of bundle endpoints.
const (
	profileSPIFFE = "https_spiffe"
	profileWeb    = "https_web"
)

// Federation is federation { … } of the server.
type Federation struct {
	Endpoint *BundleEndpoint // nil: the bundle is not served
	With     []FederatesWith
	// Shortest is the least time between two fetches of one bundle.
	Shortest time.Duration
}

// BundleEndpoint is where others fetch this server's bundle. Without ACME and File it shows the server's
// own SVID.
type BundleEndpoint struct {
	Address     string
	Port        int
	RefreshHint time.Duration
	ACME        *ACME
	File        *ServingCertificate
}

// ACME orders the endpoint's certificate.
type ACME struct {
	Domain, Email, DirectoryURL string
}

// ServingCertificate is the endpoint's certificate in files.
type ServingCertificate struct {
	CertPath, KeyPath string
	Interval          time.Duration
}

// FederatesWith is a trust domain whose bundle is fetched.
type FederatesWith struct {
	TrustDomain spiffeid.TrustDomain
	URL         string
	EndpointID  spiffeid.ID // zero: https_web
}

type federationBlock struct {
	Endpoint *bundleEndpointBlock `hcl:"bundle_endpoint,block"`
	With     []federatesWithBlock `hcl:"federates_with,block"`
	Shortest string               `hcl:"min_refresh_interval,optional"`
}

type bundleEndpointBlock struct {
	Address     string         `hcl:"address,optional"`
	Port        *int           `hcl:"port,optional"`
	RefreshHint string         `hcl:"refresh_hint,optional"`
	Profiles    []profileBlock `hcl:"profile,block"`
}

type profileBlock struct {
	Name  string        `hcl:"name,label"`
	Where hcl.Range     `hcl:",def_range"`
	ACME  *acmeBlock    `hcl:"acme,block"`
	File  *servingBlock `hcl:"serving_cert_file,block"`
}

type acmeBlock struct {
	Domain       string `hcl:"domain_name,optional"`
	Email        string `hcl:"email,optional"`
	DirectoryURL string `hcl:"directory_url,optional"`
	Accepted     bool   `hcl:"tos_accepted,optional"`
}

type servingBlock struct {
	CertPath string `hcl:"cert_file_path,optional"`
	KeyPath  string `hcl:"key_file_path,optional"`
	Interval string `hcl:"file_sync_interval,optional"`
}

type federatesWithBlock struct {
	Name     string                 `hcl:"name,label"`
	Where    hcl.Range              `hcl:",def_range"`
	URL      string                 `hcl:"bundle_endpoint_url,optional"`
	Profiles []endpointProfileBlock `hcl:"bundle_endpoint_profile,block"`
}

type endpointProfileBlock struct {
	Name       string    `hcl:"name,label"`
	Where      hcl.Range `hcl:",def_range"`
	EndpointID string    `hcl:"endpoint_spiffe_id,optional"`
}

func (l *loader) federation(b *federationBlock, own spiffeid.TrustDomain) Federation {
	f := Federation{Shortest: time.Minute}
	if b == nil {
		return f
	}
	f.Shortest = l.duration("server.federation.min_refresh_interval", b.Shortest, f.Shortest, time.Second)
	if b.Endpoint != nil {
		f.Endpoint = l.bundleEndpoint(b.Endpoint)
	}
	seen := map[spiffeid.TrustDomain]bool{}
	for _, with := range b.With {
		w := l.federatesWith(with, own)
		if seen[w.TrustDomain] && !w.TrustDomain.IsZero() {
			l.at(with.Where, "Duplicate federates_with", fmt.Sprintf("%q is there twice; keep one of the blocks.", with.Name))
		}
		seen[w.TrustDomain] = true
		f.With = append(f.With, w)
	}
	return f
}

func (l *loader) bundleEndpoint(b *bundleEndpointBlock) *BundleEndpoint {
	const key = "server.federation.bundle_endpoint."
	e := &BundleEndpoint{
		Address:     l.ip(key+"address", b.Address, "0.0.0.0"),
		Port:        l.port(key+"port", b.Port, 0, 0),
		RefreshHint: l.duration(key+"refresh_hint", b.RefreshHint, 5*time.Minute, time.Second),
	}
	if b.Port == nil {
		l.required(key+"port", "", "it is the TCP port that others fetch this server's bundle at, for example 8443")
	}
	for i, p := range b.Profiles {
		switch {
		case i > 0:
			l.at(p.Where, "Duplicate profile", "A bundle endpoint has one profile; keep one of the blocks.")
		case p.Name == profileSPIFFE:
			if p.ACME != nil || p.File != nil {
				l.at(p.Where, "Conflicting profile", "https_spiffe shows the server's own SVID; a certificate is for https_web.")
			}
		case p.Name == profileWeb:
			l.web(e, p)
		default:
			l.at(p.Where, "Unknown profile", fmt.Sprintf("%q is unknown; there are %s.", p.Name, quoted([]string{profileSPIFFE, profileWeb})))
		}
	}
	return e
}

// web reads where the certificate of https_web comes from.
func (l *loader) web(e *BundleEndpoint, p profileBlock) {
	const key = "server.federation.bundle_endpoint.profile.https_web."
	switch {
	case p.ACME == nil && p.File == nil:
		l.at(p.Where, "Missing certificate", "https_web needs a certificate: add acme { … } or serving_cert_file { … }.")
	case p.ACME != nil && p.File != nil:
		l.at(p.Where, "Conflicting certificates", "acme and serving_cert_file are two ways to one certificate; keep one of them.")
	case p.File != nil:
		const key = key + "serving_cert_file."
		l.required(key+"cert_file_path", p.File.CertPath, "it holds the endpoint's certificate chain as PEM")
		l.required(key+"key_file_path", p.File.KeyPath, "it holds the certificate's key as PEM")
		e.File = l.servingFile(key, p.File)
	default:
		e.ACME = l.acme(key+"acme.", p.ACME)
	}
}

// federatesWith reads one trust domain. Its name has dots, so mistakes are told at the block.
func (l *loader) federatesWith(b federatesWithBlock, own spiffeid.TrustDomain) FederatesWith {
	at := func(format string, args ...any) {
		l.at(b.Where, "Invalid federates_with", fmt.Sprintf("federates_with %q: ", b.Name)+fmt.Sprintf(format, args...))
	}
	w := FederatesWith{URL: b.URL}
	var err error
	switch w.TrustDomain, err = spiffeid.TrustDomainFromString(b.Name); {
	case err != nil:
		at("its label must be a trust domain: %s.", err)
	case w.TrustDomain == own:
		at("that is this server's own trust domain.")
	}
	if b.URL == "" {
		at("bundle_endpoint_url is required: it says where the bundle is fetched.")
	} else {
		l.https(b.URL, func(why string) { at("bundle_endpoint_url: %s", why) })
	}
	switch {
	case len(b.Profiles) != 1:
		at("it needs one bundle_endpoint_profile, %q or %q, and has %d.", profileSPIFFE, profileWeb, len(b.Profiles))
	case b.Profiles[0].Name == profileSPIFFE:
		id, err := spiffeid.FromString(b.Profiles[0].EndpointID)
		if err != nil || id.Path() == "" {
			at("endpoint_spiffe_id %q is no SPIFFE ID with a path; SPIRE's and Assay's servers have spiffe://<trust domain>/spire/server.", b.Profiles[0].EndpointID)
		}
		w.EndpointID = id
	case b.Profiles[0].Name == profileWeb:
		if b.Profiles[0].EndpointID != "" {
			at("endpoint_spiffe_id is for the profile https_spiffe.")
		}
	default:
		at("bundle_endpoint_profile %q is unknown; there are %s.", b.Profiles[0].Name, quoted([]string{profileSPIFFE, profileWeb}))
	}
	return w
}

// https says why a text is no URL to fetch from.
func (l *loader) https(text string, say func(why string)) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.Fragment != "" {
		say(fmt.Sprintf("%q is no URL to fetch from: write https://host/path; a password does not belong in it.", text))
	}
}
