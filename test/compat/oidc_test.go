package compat

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/port"
	"github.com/assay-id/assay/test/lab/site"
)

// openID is a site whose JWT-SVIDs strangers verify.
type openID struct {
	*site.Site
	agent    *site.Agent
	source   *workloadapi.JWTSource
	issuer   string // of the tokens
	login    string // an authorization server's issuer identifier, for which there is a profile
	endpoint string // of the bundle
	certPath string // that both listeners show
	web      *http.Client
}

func newOpenID(t *testing.T) *openID {
	t.Helper()
	o := &openID{}
	ports := freePorts(t, 3)
	o.issuer, o.login, o.endpoint = "https://localhost:"+ports[0], "http://127.0.0.1:"+ports[1], "https://localhost:"+ports[2]+"/"
	var keyPath string
	o.certPath, keyPath = webCertificate(t, t.TempDir())
	o.Site = newSite(t, func(s *site.Site) {
		serving := fmt.Sprintf("serving_cert_file {\n cert_file_path = %q\n key_file_path = %q\n}", o.certPath, keyPath)
		s.ServerExtra = fmt.Sprintf("jwt_issuer = %q\n federation {\n bundle_endpoint {\n address = \"127.0.0.1\"\n port = %s\n profile \"https_web\" {\n %s\n}\n}\n}", o.issuer, ports[2], serving)
		s.ServerBlocks = fmt.Sprintf(`node_attestor "join_token" {}
oidc_discovery {
  domains      = ["localhost"]
  bind_address = "127.0.0.1"
  bind_port    = %s
  set_key_use  = true
  %s
}
jwt_profile "login" {
  audiences        = [%q]
  spiffe_ids       = ["spiffe://%s/shop"]
  issuer           = "subject"
  jti              = true
  audience_as_text = true
}
`, ports[0], serving, o.login, site.TrustDomain)
	})
	o.agent = newAgent(t, o.Site, "agent")
	createEntry(t, entries(t, o.Site), newEntry(onlyAgent(t, o.Site), "/shop"))
	source, err := workloadapi.NewJWTSource(patiently(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+o.agent.Socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	o.source = source
	roots := x509.NewCertPool()
	text, err := os.ReadFile(o.certPath)
	if err != nil {
		t.Fatal(err)
	}
	roots.AppendCertsFromPEM(text)
	o.web = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}}, Timeout: patience}
	t.Cleanup(o.web.CloseIdleConnections)
	return o
}

func freePorts(t *testing.T, n int) []string {
	t.Helper()
	var ports []string
	for range n {
		free, err := port.Free()
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, strconv.Itoa(free))
	}
	return ports
}

// token fetches a JWT-SVID.
func (o *openID) token(t *testing.T, audience string, more ...string) string {
	t.Helper()
	svid, err := o.source.FetchJWTSVID(patiently(t), jwtsvid.Params{Audience: audience, ExtraAudiences: more})
	if err != nil {
		t.Fatal(err)
	}
	return svid.Marshal()
}

func TestOIDC(t *testing.T) {
	o := newOpenID(t)
	me := "spiffe://" + site.TrustDomain + "/shop"

	t.Run("go-oidc finds the keys and verifies a token, also after a forced rotation", func(t *testing.T) {
		ctx := oidc.ClientContext(patiently(t), o.web)
		provider, err := oidc.NewProvider(ctx, o.issuer)
		if err != nil {
			t.Fatal(err)
		}
		verifier := provider.VerifierContext(ctx, &oidc.Config{ClientID: "api", SupportedSigningAlgs: []string{"ES256"}})
		check := func() string {
			t.Helper()
			raw := o.token(t, "api")
			token, err := verifier.Verify(ctx, raw)
			if err != nil {
				t.Fatal(err)
			}
			if token.Subject != me || token.Issuer != o.issuer {
				t.Errorf("it is of %s by %s", token.Subject, token.Issuer)
			}
			return raw
		}
		before := check()
		if _, err := provider.VerifierContext(ctx, &oidc.Config{ClientID: "other", SupportedSigningAlgs: []string{"ES256"}}).Verify(ctx, before); err == nil {
			t.Error("a token for somebody else was accepted")
		}
		prepared := o.authority(t, "prepare")
		o.authority(t, "activate", "-authorityID", prepared)
		old := header(t, before)
		o.authority(t, "taint", "-authorityID", old)
		if err := o.agent.WaitFor(ctx, "a token of the new authority", func() error {
			if header(t, o.token(t, "api")) == old {
				return fmt.Errorf("it is of the old one")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		check()
		o.authority(t, "revoke", "-authorityID", old)
		if err := o.agent.WaitFor(ctx, "the old key to be gone", func() error {
			// A verifier that looks now: what it would have held is its own business.
			fresh, err := oidc.NewProvider(ctx, o.issuer)
			if err != nil {
				return err
			}
			if _, err := fresh.VerifierContext(ctx, &oidc.Config{ClientID: "api", SupportedSigningAlgs: []string{"ES256"}}).Verify(ctx, before); err == nil {
				return fmt.Errorf("a token of a revoked authority is accepted")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("another name is refused", func(t *testing.T) {
		req, err := http.NewRequestWithContext(patiently(t), http.MethodGet, o.issuer+"/.well-known/openid-configuration", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "evil.example.org"
		resp, err := o.web.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("it answers %d", resp.StatusCode)
		}
	})

	t.Run("jose, openid-client and oidc-provider", func(t *testing.T) {
		first, second, loose := o.token(t, o.login), o.token(t, o.login), o.token(t, o.login, "elsewhere")
		if first == second {
			t.Error("a token with a jti was handed out twice")
		}
		got := o.javascript(t, me, first, first, second, loose)
		if got.Issuer != o.issuer || !got.Jose.OK || got.Jose.Sub != me || got.JoseOther.OK {
			t.Errorf("they say %+v", got)
		}
		for n, want := range []struct {
			what string
			ok   bool
		}{{"the first assertion", true}, {"the same again", false}, {"the second", true}, {"one that is for others too, without the profile", false}} {
			if got.Logins[n].OK != want.ok {
				t.Errorf("%s: %+v", want.what, got.Logins[n])
			}
		}
	})
}

// verdictsOfJavaScript is what verify.mjs writes.
type verdictsOfJavaScript struct {
	Issuer          string
	Jose, JoseOther outcome
	Logins          []outcome
}

type outcome struct {
	OK    bool
	Sub   string
	Error string
}

// javascript runs the verifiers from npm.
func (o *openID) javascript(t *testing.T, id string, assertions ...string) verdictsOfJavaScript {
	t.Helper()
	dir := npmPackages(t)
	node, err := site.Tool("node")
	if err != nil {
		lab.Missing(t, "node", err)
	}
	task, err := json.Marshal(map[string]any{
		"issuer": o.issuer, "audience": "api", "token": o.token(t, "api"), "client": id, "as": o.login, "assertions": assertions,
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(patiently(t), node, "verify.mjs")
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(task)
	cmd.Env = append(os.Environ(), "NODE_EXTRA_CA_CERTS="+o.certPath, "NODE_NO_WARNINGS=1")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("verify.mjs: %v: %s%s", err, stderr.String(), stdout.String())
	}
	var got verdictsOfJavaScript
	unmarshal(t, stdout.String(), &got)
	if len(got.Logins) != len(assertions) {
		t.Fatalf("it says %s", stdout.String())
	}
	return got
}

// npmPackages returns a folder with verify.mjs and what it needs, installed below bin the first time.
func npmPackages(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join(bin, "peers", "oidc"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	same := true
	for _, name := range []string{"package.json", "verify.mjs"} {
		text, err := os.ReadFile(filepath.Join("oidc", name))
		if err != nil {
			t.Fatal(err)
		}
		if name == "package.json" {
			had, _ := os.ReadFile(filepath.Join(dir, name))
			same = bytes.Equal(had, text)
		}
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "oidc-provider", "package.json")); err == nil && same {
		return dir
	}
	npm, err := site.Tool("npm")
	if err != nil {
		lab.Missing(t, "npm", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		_ = os.Remove(filepath.Join(dir, "package.json")) // it is not installed
		lab.Missing(t, "jose, openid-client and oidc-provider from npm", fmt.Errorf("npm install: %w: %s", err, out))
	}
	return dir
}

// authority runs a step of a rotation of the JWT authority and returns the ID it prints.
func (o *openID) authority(t *testing.T, args ...string) string {
	t.Helper()
	out, err := o.ServerCLI(patiently(t), append([]string{"localauthority", "jwt"}, append(args, "-output", "json")...)...)
	if err != nil {
		t.Fatal(err)
	}
	var said struct {
		Prepared struct {
			ID string `json:"authority_id"`
		} `json:"prepared_authority"`
	}
	unmarshal(t, out, &said)
	return said.Prepared.ID
}

// header returns a token's key ID.
func header(t *testing.T, token string) string {
	t.Helper()
	var head struct {
		KeyID string `json:"kid"`
	}
	text, err := base64.RawURLEncoding.DecodeString(strings.SplitN(token, ".", 2)[0])
	if err != nil {
		t.Fatal(err)
	}
	unmarshal(t, string(text), &head)
	return head.KeyID
}

// TestSPIFFEClientAuthentication is an authorization server by draft-ietf-oauth-spiffe-client-auth: it takes
// a JWT-SVID as a client assertion of a type of its own, or an X509-SVID in the handshake, and verifies either
// with what it fetched from the bundle endpoint. Nothing is registered with it but the trust domain.
func TestSPIFFEClientAuthentication(t *testing.T) {
	o := newOpenID(t)
	ctx := patiently(t)
	td := spiffeid.RequireTrustDomainFromString(site.TrustDomain)
	bundle, err := federation.FetchBundle(ctx, td, o.endpoint, federation.WithWebPKIRoots(o.roots(t)))
	if err != nil {
		t.Fatal(err)
	}
	as := startAuthorizationServer(t, bundle)
	ask := func(t *testing.T, config *tls.Config, form url.Values) (int, string) {
		t.Helper()
		config.RootCAs = as.roots
		transport := &http.Transport{TLSClientConfig: config}
		defer transport.CloseIdleConnections()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, as.URL+"/token", strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		resp, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(text)
	}
	assertion := func(token string) url.Values {
		return url.Values{"grant_type": {"client_credentials"}, "client_assertion_type": {jwtSPIFFE}, "client_assertion": {token}}
	}
	plain := func() *tls.Config { return &tls.Config{MinVersion: tls.VersionTLS12} }
	me := "spiffe://" + site.TrustDomain + "/shop"
	t.Run("by JWT-SVID", func(t *testing.T) {
		if code, text := ask(t, plain(), assertion(o.token(t, as.URL))); code != http.StatusOK || text != me {
			t.Errorf("%d %s", code, text)
		}
	})
	t.Run("not by one for somebody else, or for others too", func(t *testing.T) {
		for _, token := range []string{o.token(t, "other"), o.token(t, as.URL, "other")} {
			if code, text := ask(t, plain(), assertion(token)); code != http.StatusUnauthorized {
				t.Errorf("%d %s", code, text)
			}
		}
	})
	t.Run("by X509-SVID", func(t *testing.T) {
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+o.agent.Socket)))
		if err != nil {
			t.Fatal(err)
		}
		defer source.Close()
		config := plain()
		config.GetClientCertificate = tlsconfig.GetClientCertificate(source)
		if code, text := ask(t, config, url.Values{"grant_type": {"client_credentials"}, "client_id": {me}}); code != http.StatusOK || text != me {
			t.Errorf("%d %s", code, text)
		}
		if code, text := ask(t, config, url.Values{"grant_type": {"client_credentials"}, "client_id": {me + "/other"}}); code != http.StatusUnauthorized {
			t.Errorf("as another client: %d %s", code, text)
		}
	})
	t.Run("not by nothing", func(t *testing.T) {
		if code, text := ask(t, plain(), url.Values{"grant_type": {"client_credentials"}, "client_id": {me}}); code != http.StatusUnauthorized {
			t.Errorf("%d %s", code, text)
		}
	})
}

// jwtSPIFFE is the type of a JWT-SVID as an assertion.
const jwtSPIFFE = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"

func (o *openID) roots(t *testing.T) *x509.CertPool {
	t.Helper()
	roots := x509.NewCertPool()
	text, err := os.ReadFile(o.certPath)
	if err != nil {
		t.Fatal(err)
	}
	roots.AppendCertsFromPEM(text)
	return roots
}

type authorizationServer struct {
	*httptest.Server
	roots *x509.CertPool
}

func startAuthorizationServer(t *testing.T, bundle *spiffebundle.Bundle) *authorizationServer {
	t.Helper()
	as := &authorizationServer{roots: x509.NewCertPool()}
	as.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := ""
		switch {
		case r.PostFormValue("client_assertion_type") == jwtSPIFFE:
			svid, err := jwtsvid.ParseAndValidate(r.PostFormValue("client_assertion"), bundle, []string{as.URL})
			// The audience is this server and nobody else.
			if err == nil && len(svid.Audience) == 1 {
				who = svid.ID.String()
			}
		case len(r.TLS.PeerCertificates) > 0:
			verify := tlsconfig.VerifyPeerCertificate(bundle, tlsconfig.AuthorizeMemberOf(bundle.TrustDomain()))
			var raw [][]byte
			for _, c := range r.TLS.PeerCertificates {
				raw = append(raw, c.Raw)
			}
			if verify(raw, nil) == nil {
				who = r.TLS.PeerCertificates[0].URIs[0].String()
			}
		}
		if id := r.PostFormValue("client_id"); who == "" || id != "" && id != who {
			http.Error(w, "invalid_client", http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, who)
	}))
	as.TLS = &tls.Config{MinVersion: tls.VersionTLS12, ClientAuth: tls.RequestClientCert}
	as.StartTLS()
	t.Cleanup(as.Close)
	as.roots.AddCert(as.Certificate())
	return as
}
