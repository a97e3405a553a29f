package httpchallenge_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/httpchallenge"
	"github.com/assay-id/assay/attestor/httpchallenge/node"
	"github.com/assay-id/assay/attestor/httpchallenge/server"
	"github.com/assay-id/assay/test/fake/dns"
)

const host = "web1.example.org"

var loopback = netip.MustParseAddr("127.0.0.1")

// proxied is how often the environment's proxy was asked.
var proxied atomic.Int32

// TestMain sets the proxy for all tests: what of it net/http has once read, it reads no more.
func TestMain(m *testing.M) {
	proxy := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { proxied.Add(1) }))
	for _, name := range []string{"HTTP_PROXY", "http_proxy"} {
		if err := os.Setenv(name, proxy.URL); err != nil {
			panic(err)
		}
	}
	for _, name := range []string{"NO_PROXY", "no_proxy"} {
		if err := os.Unsetenv(name); err != nil {
			panic(err)
		}
	}
	code := m.Run()
	proxy.Close()
	os.Exit(code)
}

// names starts a DNS server that knows the host, and what it is told besides.
func names(t testing.TB, more map[string][]netip.Addr) *dns.Server {
	t.Helper()
	all := map[string][]netip.Addr{host: {loopback}}
	maps.Copy(all, more)
	s, err := dns.Start(all)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func TestSuite(t *testing.T) {
	resolver := names(t, nil).Address()
	attestortest.Run(t, attestortest.Pair{
		Node: node.Kind(), Judge: server.Kind(),
		NodeConfig: fmt.Sprintf("hostname = %q", strings.ToUpper(host)),
		JudgeConfig: fmt.Sprintf(`
			allowed_dns_patterns = ["web[0-9]\\.example\\.org"]
			allowed_networks = ["127.0.0.0/8"]
			dns_server = %q`, resolver),
		Path:      "http_challenge/" + host,
		Selectors: []string{"http_challenge:hostname:" + host},
		Foreign: map[string][]byte{
			"x509pop evidence": []byte(`{"certificates":["MIIB"]}`),
		},
		README: "README.md",
	})
}

// judgeOf opens a judge that asks where the tests are.
func judgeOf(t testing.TB, resolver string, change func(*httpchallenge.ServerConfig)) attestor.Judge {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	return judgeThatTells(t, resolver, change, log)
}

func judgeThatTells(t testing.TB, resolver string, change func(*httpchallenge.ServerConfig), log logrus.FieldLogger) attestor.Judge {
	t.Helper()
	c := &httpchallenge.ServerConfig{AllowedDNSPatterns: []string{`.*\.example\.org`}, AllowedNetworks: []string{"127.0.0.0/8"}, DNSServer: resolver}
	if change != nil {
		change(c)
	}
	judge, err := server.Kind().Open(c, attestor.Needs{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return judge
}

func evidence(t testing.TB, e httpchallenge.Evidence) []byte {
	t.Helper()
	payload, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return payload
}

// web is a host that answers as a test says, with the nonce at hand.
type web struct {
	port  int
	nonce atomic.Pointer[string]
	asked atomic.Int32
}

func newWeb(t testing.TB, answer func(w http.ResponseWriter, r *http.Request, nonce string)) *web {
	t.Helper()
	w := &web{}
	s := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		w.asked.Add(1)
		answer(out, r, *w.nonce.Load())
	}))
	t.Cleanup(s.Close)
	at, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	if w.port, err = strconv.Atoi(at.Port()); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *web) ask(_ context.Context, challenge []byte) ([]byte, error) {
	var c httpchallenge.Challenge
	if err := json.Unmarshal(challenge, &c); err != nil {
		return nil, err
	}
	w.nonce.Store(&c.Nonce)
	return []byte("\n"), nil
}

func TestHostThatAnswersBadlyIsRefused(t *testing.T) {
	resolver := names(t, nil).Address()
	judge := judgeOf(t, resolver, nil)
	other := newWeb(t, func(w http.ResponseWriter, _ *http.Request, nonce string) { fmt.Fprint(w, nonce) })
	for why, answer := range map[string]func(w http.ResponseWriter, r *http.Request, nonce string){
		"another nonce": func(w http.ResponseWriter, _ *http.Request, _ string) { fmt.Fprint(w, strings.Repeat("A", 43)+"=") },
		"nothing":       func(http.ResponseWriter, *http.Request, string) {},
		"an error with the nonce": func(w http.ResponseWriter, _ *http.Request, nonce string) {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, nonce)
		},
		"the nonce and much after": func(w http.ResponseWriter, _ *http.Request, nonce string) {
			fmt.Fprint(w, nonce+strings.Repeat(" ", 1<<20))
		},
		"an answer without end": func(w http.ResponseWriter, r *http.Request, _ string) {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 4096)); err != nil {
					return
				}
			}
		},
		"headers without end": func(w http.ResponseWriter, _ *http.Request, nonce string) {
			for i := range 100 {
				w.Header().Set(fmt.Sprintf("X-%d", i), strings.Repeat("x", 1000))
			}
			fmt.Fprint(w, nonce)
		},
		"a redirect to where the nonce is": func(w http.ResponseWriter, r *http.Request, nonce string) {
			other.nonce.Store(&nonce)
			http.Redirect(w, r, fmt.Sprintf("http://%s:%d%s", host, other.port, r.URL.Path), http.StatusFound)
		},
		"a connection that is cut": func(w http.ResponseWriter, _ *http.Request, _ string) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				_ = conn.Close()
			}
		},
		"no HTTP": func(w http.ResponseWriter, _ *http.Request, nonce string) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				fmt.Fprintln(conn, nonce)
				_ = conn.Close()
			}
		},
	} {
		t.Run(why, func(t *testing.T) {
			w := newWeb(t, answer)
			_, err := judge.Judge(t.Context(), evidence(t, httpchallenge.Evidence{HostName: host, AgentName: "default", Port: w.port}), w.ask)
			if !errors.Is(err, attestor.ErrEvidence) || err.Error() != "the host does not show the nonce" {
				t.Errorf("error is %v", err)
			}
			if n := w.asked.Load(); n != 1 {
				t.Errorf("the host was asked %d times", n)
			}
		})
	}
	if other.asked.Load() != 0 {
		t.Error("the redirect was followed")
	}
	t.Run("an answer without end is read no further than a nonce is long", func(t *testing.T) {
		log, lines := test.NewNullLogger()
		judge := judgeThatTells(t, resolver, nil, log)
		w := newWeb(t, func(w http.ResponseWriter, r *http.Request, _ string) {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 4096)); err != nil {
					return
				}
			}
		})
		_, _ = judge.Judge(t.Context(), evidence(t, httpchallenge.Evidence{HostName: host, AgentName: "default", Port: w.port}), w.ask)
		line := lines.LastEntry()
		if line == nil || !strings.Contains(fmt.Sprint(line.Data["error"]), "more than a nonce") {
			t.Errorf("the log says %v", line)
		}
	})
	t.Run("and who answers well is believed", func(t *testing.T) {
		w := newWeb(t, func(w http.ResponseWriter, r *http.Request, nonce string) {
			if r.URL.Path != "/.well-known/spiffe/nodeattestor/http_challenge/default/challenge" || r.Method != http.MethodGet {
				http.NotFound(w, r)
				return
			}
			fmt.Fprintln(w, nonce)
		})
		if _, err := judge.Judge(t.Context(), evidence(t, httpchallenge.Evidence{HostName: host, AgentName: "default", Port: w.port}), w.ask); err != nil {
			t.Error(err)
		}
	})
	t.Run("a host that is slow does not hold the server beyond the caller's patience", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := newWeb(t, func(_ http.ResponseWriter, r *http.Request, _ string) {
			cancel()
			<-r.Context().Done()
		})
		_, err := judge.Judge(ctx, evidence(t, httpchallenge.Evidence{HostName: host, AgentName: "default", Port: w.port}), w.ask)
		if !errors.Is(err, context.Canceled) || errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
	})
}

func TestClaimThatLeadsElsewhereIsRefused(t *testing.T) {
	resolver := names(t, nil).Address()
	w := newWeb(t, func(w http.ResponseWriter, _ *http.Request, nonce string) { fmt.Fprint(w, nonce) })
	judge := judgeOf(t, resolver, func(c *httpchallenge.ServerConfig) {
		c.AllowedDNSPatterns = []string{`web[0-9]\.example\.org`, `db\.example\.org|cache\.example\.org`}
	})
	// What no claim may come to: from there on, any trouble of the network refuses it too.
	ask := func(context.Context, []byte) ([]byte, error) {
		t.Error("the agent is given a nonce")
		return nil, errors.New("no answer")
	}
	for why, e := range map[string]httpchallenge.Evidence{
		"localhost":                              {HostName: "localhost"},
		"a name below localhost":                 {HostName: "a.localhost"},
		"an address":                             {HostName: "127.0.0.1"},
		"a short address":                        {HostName: "127.1"},
		"an address as one number":               {HostName: "2130706433"},
		"an address with a zone":                 {HostName: "fe80::1%eth0"},
		"an address in octal":                    {HostName: "0177.0.0.1"},
		"an address in hex":                      {HostName: "0x7f000001"},
		"an address of IPv6":                     {HostName: "::1"},
		"an address in brackets":                 {HostName: "[::1]"},
		"a port in the name":                     {HostName: host + ":80"},
		"a path in the name":                     {HostName: host + "/x?"},
		"a user in the name":                     {HostName: "web2.example.org@" + host},
		"a fragment in the name":                 {HostName: "evil.test#.example.org"},
		"a dot at the end":                       {HostName: host + "."},
		"two dots":                               {HostName: "web1..example.org"},
		"a percent sign":                         {HostName: "web1%2eexample.org"},
		"a space":                                {HostName: "web1 .example.org"},
		"a line break":                           {HostName: "web1\r\nHost: x.example.org"},
		"no ASCII":                               {HostName: "wéb.example.org"},
		"a name without end":                     {HostName: strings.Repeat("a.", 200) + "example.org"},
		"a name of another domain":               {HostName: "web1.example.com"},
		"a name with ours within":                {HostName: "web1.example.org.evil.test"},
		"a name with ours at its end":            {HostName: "evil-web1.example.org"},
		"a name that begins with one of two":     {HostName: "db.example.org.evil.test"},
		"a name that ends with the other of two": {HostName: "evil-cache.example.org"},
		"no name":                                {HostName: ""},
		"an agent's name with dots":              {AgentName: "../../admin"},
		"an agent's name with slash":             {AgentName: "a/b"},
		"an agent's name too long":               {AgentName: strings.Repeat("a", 33)},
		"no agent's name":                        {AgentName: "-"},
		"port 0":                                 {Port: -1},
		"port 65536":                             {Port: 65536},
	} {
		t.Run(why, func(t *testing.T) {
			if e.HostName == "" && why != "no name" {
				e.HostName = host
			}
			if e.AgentName == "" {
				e.AgentName = "default"
			}
			if e.Port == 0 {
				e.Port = w.port
			}
			_, err := judge.Judge(t.Context(), evidence(t, e), ask)
			if !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("error is %v", err)
			}
		})
	}
	if _, err := judge.Judge(t.Context(), evidence(t, httpchallenge.Evidence{HostName: host, AgentName: "default", Port: w.port}), w.ask); err != nil {
		t.Errorf("an honest claim: %v", err)
	}
	if n := w.asked.Load(); n != 1 {
		t.Errorf("the host was asked %d times", n)
	}
}

func TestAddressThatIsNotAllowedIsNotAsked(t *testing.T) {
	w := newWeb(t, func(w http.ResponseWriter, _ *http.Request, nonce string) { fmt.Fprint(w, nonce) })
	resolver := names(t, map[string][]netip.Addr{
		"metadata.example.org": {netip.MustParseAddr("169.254.169.254")},
		"here.example.org":     {netip.MustParseAddr("0.0.0.0")},
		"azure.example.org":    {netip.MustParseAddr("168.63.129.16")},
	}).Address()
	for _, name := range []string{host, "metadata.example.org", "here.example.org", "azure.example.org"} {
		judge := judgeOf(t, resolver, func(c *httpchallenge.ServerConfig) { c.AllowedNetworks = nil })
		_, err := judge.Judge(t.Context(), evidence(t, httpchallenge.Evidence{HostName: name, AgentName: "default", Port: w.port}), w.ask)
		if !errors.Is(err, attestor.ErrEvidence) || err.Error() != "the host does not show the nonce" {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	t.Run("a name that is rebound after it was looked up", func(t *testing.T) {
		// Whoever looks the name up first sees an address of the networks, and connects to another.
		dns := names(t, map[string][]netip.Addr{"rebound.example.org": {netip.MustParseAddr("10.255.255.1"), loopback}})
		judge := judgeOf(t, dns.Address(), func(c *httpchallenge.ServerConfig) { c.AllowedNetworks = []string{"10.0.0.0/8"} })
		resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, dns.Address())
		}}
		if at, err := resolver.LookupNetIP(t.Context(), "ip4", "rebound.example.org"); err != nil || at[0].String() != "10.255.255.1" {
			t.Fatalf("%v, %v", at, err)
		}
		_, err := judge.Judge(t.Context(), evidence(t, httpchallenge.Evidence{HostName: "rebound.example.org", AgentName: "default", Port: w.port}), w.ask)
		if !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
	})
	if w.asked.Load() != 0 {
		t.Error("a host was asked")
	}
}

func TestEnvironmentsProxyIsNotAsked(t *testing.T) {
	w := newWeb(t, func(w http.ResponseWriter, _ *http.Request, nonce string) { fmt.Fprint(w, nonce) })
	judge := judgeOf(t, names(t, nil).Address(), nil)
	_, err := judge.Judge(t.Context(), evidence(t, httpchallenge.Evidence{HostName: host, AgentName: "default", Port: w.port}), w.ask)
	if err != nil || proxied.Load() != 0 {
		t.Errorf("the proxy was asked %d times: %v", proxied.Load(), err)
	}
}

func TestPorts(t *testing.T) {
	resolver := names(t, nil).Address()
	asked := errors.New("asked")
	for why, c := range map[string]struct {
		change func(*httpchallenge.ServerConfig)
		port   int
		ok     bool
	}{
		"the required port":         {func(c *httpchallenge.ServerConfig) { c.RequiredPort = new(8080) }, 8080, true},
		"another":                   {func(c *httpchallenge.ServerConfig) { c.RequiredPort = new(8080) }, 8081, false},
		"root's port":               {func(c *httpchallenge.ServerConfig) { c.AllowNonRootPorts = new(false) }, 1023, true},
		"anybody's port":            {func(c *httpchallenge.ServerConfig) { c.AllowNonRootPorts = new(false) }, 1024, false},
		"anybody's port by default": {nil, 1024, true},
	} {
		t.Run(why, func(t *testing.T) {
			_, err := judgeOf(t, resolver, c.change).Judge(t.Context(), evidence(t, httpchallenge.Evidence{HostName: host, AgentName: "a", Port: c.port}),
				func(context.Context, []byte) ([]byte, error) { return nil, asked })
			if errors.Is(err, asked) != c.ok || errors.Is(err, attestor.ErrEvidence) == c.ok {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func TestConfigurationIsRefused(t *testing.T) {
	all := []string{".*"}
	for says, c := range map[string]httpchallenge.ServerConfig{
		"allowed_dns_patterns is empty":     {},
		"allowed_dns_patterns: \"(\"":       {AllowedDNSPatterns: []string{"("}},
		"allowed_networks: \"10\"":          {AllowedDNSPatterns: all, AllowedNetworks: []string{"10"}},
		"required_port: 0":                  {AllowedDNSPatterns: all, RequiredPort: new(0)},
		"required_port: 8080":               {AllowedDNSPatterns: all, RequiredPort: new(8080), AllowNonRootPorts: new(false)},
		"tofu cannot be off":                {AllowedDNSPatterns: all, TOFU: new(false)},
		"tofu cannot be off while any user": {AllowedDNSPatterns: all, TOFU: new(false), RequiredPort: new(8080)},
		"dns_server: \"ns.example.org\" is": {AllowedDNSPatterns: all, DNSServer: "ns.example.org"},
	} {
		if _, err := server.Kind().Open(&c, attestor.Needs{}); err == nil || !strings.HasPrefix(err.Error(), says) {
			t.Errorf("want %s, got %v", says, err)
		}
	}
	good := httpchallenge.ServerConfig{AllowedDNSPatterns: all, TOFU: new(false), RequiredPort: new(80)}
	if _, err := server.Kind().Open(&good, attestor.Needs{}); err != nil {
		t.Error(err)
	}
	for says, c := range map[string]httpchallenge.AgentConfig{
		"hostname \"1.2.3.4\"": {HostName: "1.2.3.4", AgentName: "a"},
		"agentname \"a.b\"":    {HostName: host, AgentName: "a.b"},
		"port: -1":             {HostName: host, AgentName: "a", Port: -1},
		"advertised_port: 7e4": {HostName: host, AgentName: "a", AdvertisedPort: 70000},
	} {
		says = strings.Replace(says, "7e4", "70000", 1)
		if _, err := node.Kind().Open(&c, attestor.Needs{}); err == nil || !strings.HasPrefix(err.Error(), says) {
			t.Errorf("want %s, got %v", says, err)
		}
	}
}

func TestAgentServesOnlyTheNonceAndOnlyWhileItAttests(t *testing.T) {
	n, err := node.Kind().Open(&httpchallenge.AgentConfig{HostName: host, AgentName: "blue"}, attestor.Needs{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	payload, answer, err := n.Evidence(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var e httpchallenge.Evidence
	if err := json.Unmarshal(payload, &e); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf(`{"hostname":"web1.example.org","agentname":"blue","port":%d}`, e.Port); string(payload) != want {
		t.Errorf("payload is %s, want SPIRE's %s", payload, want)
	}
	get := func(method, path string) (int, string) {
		request, err := http.NewRequestWithContext(t.Context(), method, fmt.Sprintf("http://127.0.0.1:%d%s", e.Port, path), nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return 0, ""
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		return response.StatusCode, string(body)
	}
	if status, _ := get(http.MethodGet, httpchallenge.Path("blue")); status != http.StatusNotFound {
		t.Errorf("before the challenge it answers %d", status)
	}
	nonce := strings.Repeat("A", 43) + "="
	if said, err := answer(ctx, []byte(`{"nonce":"`+nonce+`"}`)); err != nil || string(said) != "\n" {
		t.Fatalf("%q, %v", said, err)
	}
	if status, body := get(http.MethodGet, httpchallenge.Path("blue")); status != http.StatusOK || body != nonce+"\n" {
		t.Errorf("it answers %d %q", status, body)
	}
	for _, path := range []string{"/", httpchallenge.Path("default"), httpchallenge.Path("blue") + "/x", "/../../etc/passwd"} {
		if status, _ := get(http.MethodGet, path); status != http.StatusNotFound {
			t.Errorf("%s: it answers %d", path, status)
		}
	}
	if status, _ := get(http.MethodPost, httpchallenge.Path("blue")); status != http.StatusNotFound {
		t.Errorf("to a POST it answers %d", status)
	}
	if _, _, err := n.Evidence(ctx); err != nil { // closes the first before it opens another
		t.Fatal(err)
	}
	if status, _ := get(http.MethodGet, httpchallenge.Path("blue")); status != 0 {
		t.Errorf("after the attestation it answers %d", status)
	}
	cancel()
	deadline := time.Now().Add(30 * time.Second)
	for status := 1; status != 0; status, _ = get(http.MethodGet, "/") {
		if time.Now().After(deadline) {
			t.Fatal("it still listens when its attestation has ended")
		}
	}
}

func FuzzEvidence(f *testing.F) {
	f.Add([]byte(`{"hostname":"web1.example.org","agentname":"default","port":80}`))
	f.Add([]byte(`{"hostname":"0","agentname":"a","port":1e9}`))
	judge := judgeOf(f, "127.0.0.1:1", nil)
	asked := errors.New("asked")
	f.Fuzz(func(t *testing.T, payload []byte) {
		_, err := judge.Judge(t.Context(), payload, func(context.Context, []byte) ([]byte, error) { return nil, asked })
		if !errors.Is(err, attestor.ErrEvidence) && !errors.Is(err, asked) {
			t.Fatal(err)
		}
	})
}
