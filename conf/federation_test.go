package conf

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func withFederation(text string) string {
	return strings.Replace(goodServer, "}\nnode", "  federation {\n"+text+"\n  }\n}\nnode", 1)
}

func TestFederation(t *testing.T) {
	cert := write(t, "cert.pem", "x")
	s, err := LoadServer(write(t, "server.hcl", withFederation(`
    min_refresh_interval = "5s"
    bundle_endpoint {
      address = "127.0.0.1"
      port    = 8443
      profile "https_web" {
        serving_cert_file {
          cert_file_path = "`+cert+`"
          key_file_path  = "`+cert+`"
        }
      }
    }
    federates_with "a.test" {
      bundle_endpoint_url = "https://a.test:8443"
      bundle_endpoint_profile "https_spiffe" {
        endpoint_spiffe_id = "spiffe://a.test/spire/server"
      }
    }
    federates_with "b.test" {
      bundle_endpoint_url = "https://b.test/bundle"
      bundle_endpoint_profile "https_web" {}
    }`)), judges, Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := Federation{
		Shortest: 5 * time.Second,
		Endpoint: &BundleEndpoint{
			Address: "127.0.0.1", Port: 8443, RefreshHint: 5 * time.Minute,
			File: &ServingCertificate{CertPath: cert, KeyPath: cert, Interval: time.Hour},
		},
		With: []FederatesWith{
			{TrustDomain: spiffeid.RequireTrustDomainFromString("a.test"), URL: "https://a.test:8443", EndpointID: spiffeid.RequireFromString("spiffe://a.test/spire/server")},
			{TrustDomain: spiffeid.RequireTrustDomainFromString("b.test"), URL: "https://b.test/bundle"},
		},
	}
	if diff := cmp.Diff(want, s.Federation, cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }), cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

// TestFederationMistakes has one mistake per case.
func TestFederationMistakes(t *testing.T) {
	const spiffe = "\n      bundle_endpoint_url = \"https://a.test\"\n      bundle_endpoint_profile \"https_spiffe\" {\n        endpoint_spiffe_id = \"spiffe://a.test/s\"\n      }\n    }"
	endpoint := func(text string) string { return "    bundle_endpoint {\n      " + text + "\n    }" }
	acme := func(domain string) string {
		return endpoint("port = 1\n profile \"https_web\" {\n acme {\n domain_name = \"" + domain + "\"\n tos_accepted = true\n }\n }")
	}
	for _, c := range []struct{ name, text, want string }{
		{"no port", endpoint(`address = "127.0.0.1"`), `"port" is required`},
		{"a port beyond all", endpoint(`port = 70000`), "is no TCP port"},
		{"an address that is a name", endpoint("address = \"host\"\n port = 1"), "is no IP address"},
		{"an unknown profile", endpoint("port = 1\n profile \"http\" {}"), `"http" is unknown; there are "https_spiffe" and "https_web"`},
		{"two profiles", endpoint("port = 1\n profile \"https_spiffe\" {}\n profile \"https_spiffe\" {}"), "has one profile"},
		{"a web profile without a certificate", endpoint("port = 1\n profile \"https_web\" {}"), "needs a certificate"},
		{"a certificate for https_spiffe", endpoint("port = 1\n profile \"https_spiffe\" {\n acme {}\n }"), "shows the server's own SVID"},
		{"two certificates", endpoint("port = 1\n profile \"https_web\" {\n acme {}\n serving_cert_file {}\n }"), "keep one of them"},
		{"files that are not there", endpoint("port = 1\n profile \"https_web\" {\n serving_cert_file {\n cert_file_path = \"/nowhere/a\"\n key_file_path = \"/nowhere/b\"\n }\n }"), "/nowhere/a: no such file"},
		{"terms that nobody accepted", endpoint("port = 1\n profile \"https_web\" {\n acme {\n domain_name = \"a.test\"\n }\n }"), "set tos_accepted = true"},
		{"an ACME directory by http", endpoint("port = 1\n profile \"https_web\" {\n acme {\n domain_name = \"a.test\"\n tos_accepted = true\n directory_url = \"http://a.test\"\n }\n }"), "write https://"},
		{"an ACME domain with a scheme", acme("https://a.test"), "is no name that an authority of the web"},
		{"an ACME domain that is an address", acme("192.0.2.1"), "is no name that an authority of the web"},
		{"an ACME domain that is a pattern", acme("*.a.test"), "is no name that an authority of the web"},
		{"an ACME domain that ends in a dot", acme("a.test."), "is no name that an authority of the web"},
		{"an ACME domain without a dot", acme("localhost"), "is no name that an authority of the web"},
		{"oneself", `    federates_with "example.org" {` + spiffe, "own trust domain"},
		{"a trust domain that is none", `    federates_with "no domain" {` + spiffe, "must be a trust domain"},
		{"a trust domain twice", `    federates_with "a.test" {` + spiffe + "\n" + `    federates_with "a.test" {` + spiffe, "is there twice"},
		{"a URL by http", strings.Replace(`    federates_with "a.test" {`+spiffe, "https://", "http://", 1), "write https://"},
		{"a URL with a password", strings.Replace(`    federates_with "a.test" {`+spiffe, "https://", "https://a:b@", 1), "a password does not belong"},
		{"no profile", "    federates_with \"a.test\" {\n bundle_endpoint_url = \"https://a.test\"\n }", "needs one bundle_endpoint_profile"},
		{"no URL", "    federates_with \"a.test\" {\n bundle_endpoint_profile \"https_web\" {}\n }", "bundle_endpoint_url is required"},
		{"no endpoint ID", "    federates_with \"a.test\" {\n bundle_endpoint_url = \"https://a.test\"\n bundle_endpoint_profile \"https_spiffe\" {}\n }", "is no SPIFFE ID with a path"},
		{"an endpoint ID for the web", strings.Replace(`    federates_with "a.test" {`+spiffe, "https_spiffe", "https_web", 1), "is for the profile https_spiffe"},
		{"fetches without a pause", `    min_refresh_interval = "1ms"`, "at least 1s"},
	} {
		t.Run(c.name+" is a mistake", func(t *testing.T) {
			_, err := LoadServer(write(t, "server.hcl", withFederation(c.text)), judges, Options{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
