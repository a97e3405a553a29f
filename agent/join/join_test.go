package join_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/join"
	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/test/fake/fakeserver"
	"github.com/assay-id/assay/workloadapi/identity"
)

// token is a node attestor that shows a token and answers challenges.
type token string

func (k token) Evidence(context.Context) ([]byte, attestor.Ask, error) {
	if k == "" {
		return nil, nil, errors.New("no token was given")
	}
	return []byte(k), func(_ context.Context, c []byte) ([]byte, error) { return append(c, '!'), nil }, nil
}

// node is a joiner with its disk.
type node struct {
	t      *testing.T
	dir    string
	cfg    join.Config
	join   *join.Joiner
	log    *logtest.Hook
	banned chan struct{}
	stop   func()
}

func prepare(t *testing.T, server *fakeserver.Server) *node {
	t.Helper()
	n := &node{t: t, dir: t.TempDir(), banned: make(chan struct{}, 10), stop: func() {}}
	n.cfg = join.Config{
		TrustDomain: fakeserver.TrustDomain, Target: server.Addr, Type: "test", Node: token("x"),
		Bootstrap: join.Bootstrap{Authorities: server.Authorities()},
		OnBan:     func() { n.banned <- struct{}{} },
	}
	return n
}

// start runs the joiner as a new process would.
func (n *node) start() *node {
	n.t.Helper()
	log, hook := logtest.NewNullLogger()
	n.log, n.cfg.Log, n.cfg.Metrics = hook, log, prometheus.NewRegistry()
	keys, err := keep.DiskKeys(n.dir)
	if err != nil {
		n.t.Fatal(err)
	}
	k, err := keep.Open(n.dir, keys, log)
	if err != nil {
		n.t.Fatal(err)
	}
	if n.join, err = join.New(k, n.cfg); err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { _ = n.join.Run(ctx) })
	n.stop = sync.OnceFunc(func() { cancel(); work.Wait() })
	n.t.Cleanup(n.stop)
	return n
}

// patience is far above what anything here takes.
const patience = time.Minute

// until waits for an SVID that is as wanted.
func (n *node) until(what string, ok func(*keep.Own) bool) *keep.Own {
	n.t.Helper()
	timeout := time.After(patience)
	for {
		own, changed := n.join.Own()
		if ok(own) {
			return own
		}
		select {
		case <-changed:
		case <-timeout:
			n.t.Fatalf("%s: not within %s; %v", what, patience, n.join.Err())
		}
	}
}

func there(own *keep.Own) bool { return own != nil }

// wait polls for what has no channel.
func (n *node) wait(what string, ok func() bool) {
	n.t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			n.t.Fatalf("%s: not within %s; said %v", what, patience, n.said())
		}
	}
}

func (n *node) said() []string {
	var out []string
	for _, e := range n.log.AllEntries() {
		text, _ := e.String()
		out = append(out, text)
	}
	return out
}

func (n *node) heard(level logrus.Level, text string) bool {
	for _, e := range n.log.AllEntries() {
		if line, _ := e.String(); e.Level == level && strings.Contains(line, text) {
			return true
		}
	}
	return false
}

func TestAttest(t *testing.T) {
	t.Run("with a challenge, and with the bundle the server has", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{Challenge: "who?", Reattestable: true})
		n := prepare(t, server).start()
		own := n.until("attestation", there)
		id, err := own.ID()
		if err != nil || id.String() != "spiffe://example.org/spire/agent/test/node" || !own.Reattestable {
			t.Errorf("got %v %v", id, err)
		}
		if b := n.join.Bundle(); b == nil || b.Sequence != 1 || len(b.JWT) != 1 {
			t.Errorf("bundle %+v", b)
		}
	})
	t.Run("a server that is down is waited for, and said so once", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Stop()
		n := prepare(t, server).start()
		n.wait("a word", func() bool { return n.heard(logrus.WarnLevel, "waiting for the server to attest") })
		server.Start()
		n.until("attestation", there)
		if len(n.log.AllEntries()) > 3 {
			t.Errorf("said %q", n.said())
		}
	})
	t.Run("a server that has too much to do is asked again, not before it says", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Busy("AttestAgent", 1500*time.Millisecond)
		began := time.Now()
		n := prepare(t, server).start()
		n.until("attestation", there)
		if took := time.Since(began); took < 1500*time.Millisecond || server.Calls("AttestAgent") != 2 {
			t.Errorf("it took %s and %d attempts", took, server.Calls("AttestAgent"))
		}
	})
	t.Run("a restart uses the SVID there is", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Token("secret-token")
		n := prepare(t, server)
		n.cfg.Type, n.cfg.Node = "join_token", token("secret-token")
		own := n.start().until("attestation", there)
		n.stop()
		server.Stop()
		n.start()
		if again, _ := n.join.Own(); again == nil || !again.Chain[0].Equal(own.Chain[0]) {
			t.Error("it does not")
		}
		if b := n.join.Bundle(); b == nil {
			t.Error("the bundle was not kept")
		}
	})
	t.Run("a spent join token and a lost SVID: it is said what is needed, and never which token it was", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Token("secret-token")
		n := prepare(t, server)
		n.cfg.Type, n.cfg.Node = "join_token", token("secret-token")
		n.start().until("attestation", there)
		n.stop()
		n.dir = t.TempDir()
		n.start()
		n.wait("a word", func() bool { return n.heard(logrus.ErrorLevel, "assay-server token generate") })
		for _, line := range n.said() {
			if strings.Contains(line, "secret-token") {
				t.Errorf("said %q", line)
			}
		}
		if n.join.Err() == nil {
			t.Error("no error")
		}
	})
	t.Run("evidence that cannot be had is waited for", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		n := prepare(t, server)
		n.cfg.Node = token("")
		n.start()
		n.wait("a word", func() bool { return n.heard(logrus.ErrorLevel, "no token was given") })
	})
	t.Run("state of another trust domain is refused", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		n := prepare(t, server).start()
		n.until("attestation", there)
		n.stop()
		keys, err := keep.DiskKeys(n.dir)
		if err != nil {
			t.Fatal(err)
		}
		k, err := keep.Open(n.dir, keys, n.cfg.Log)
		if err != nil {
			t.Fatal(err)
		}
		n.cfg.TrustDomain, n.cfg.Metrics = spiffeid.RequireTrustDomainFromString("other.org"), nil
		if _, err := join.New(k, n.cfg); err == nil || !strings.Contains(err.Error(), `belongs to trust domain "example.org"`) {
			t.Errorf("got %v", err)
		}
	})
}

func TestTrust(t *testing.T) {
	t.Run("a server of another CA gets no evidence", func(t *testing.T) {
		server, other := fakeserver.New(t, fakeserver.Config{}), fakeserver.New(t, fakeserver.Config{})
		n := prepare(t, server)
		n.cfg.Bootstrap.Authorities = other.Authorities()
		n.start()
		n.wait("a word", func() bool { return n.heard(logrus.WarnLevel, "verify server") })
		if !n.heard(logrus.WarnLevel, "prints the one of now") {
			t.Errorf("it is not told what to do: %q", n.said())
		}
		if server.Calls("AttestAgent") != 0 {
			t.Error("it does")
		}
	})
	t.Run("insecure bootstrap is loud, and only for the first time", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		n := prepare(t, server)
		n.cfg.Bootstrap = join.Bootstrap{Insecure: true}
		n.start().until("attestation", there)
		if !n.heard(logrus.WarnLevel, "INSECURE BOOTSTRAP") {
			t.Errorf("said %q", n.said())
		}
		n.stop()
		impostor := fakeserver.New(t, fakeserver.Config{})
		n.cfg.Target = impostor.Addr
		n.start()
		own, _ := n.join.Own()
		server.Stop()
		n.join.Denied(own, deniedAs(t, impostor))
		n.wait("a word", func() bool { return n.heard(logrus.WarnLevel, "verify server") })
		if impostor.Calls("AttestAgent") != 0 {
			t.Error("an impostor was believed")
		}
	})
	t.Run("insecure bootstrap is said once, however often the server is asked", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Busy("AttestAgent", time.Millisecond, time.Millisecond)
		n := prepare(t, server)
		n.cfg.Bootstrap = join.Bootstrap{Insecure: true}
		n.start().until("attestation", there)
		if tries, said := server.Calls("AttestAgent"), strings.Count(strings.Join(n.said(), "\n"), "INSECURE BOOTSTRAP"); tries < 3 || said != 1 {
			t.Errorf("said %d times in %d tries", said, tries)
		}
	})
	t.Run("insecure bootstrap still wants the server's ID", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		n := prepare(t, server)
		n.cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
		n.cfg.Bootstrap = join.Bootstrap{Insecure: true}
		n.start()
		n.wait("a word", func() bool {
			return n.heard(logrus.WarnLevel, `it is \"spiffe://example.org/spire/server\", not \"spiffe://other.org/spire/server\"`) ||
				n.heard(logrus.WarnLevel, "verify server: it is")
		})
		if server.Calls("AttestAgent") != 0 {
			t.Error("it does not")
		}
	})
	t.Run("a bundle that missed a whole rotation is mended from the bootstrap source, after a while", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		path := filepath.Join(t.TempDir(), "bundle.pem")
		write(t, path, server.BundlePEM())
		var mu sync.Mutex
		var ahead time.Duration
		n := prepare(t, server)
		n.cfg.Bootstrap = join.Bootstrap{Path: path}
		n.cfg.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return time.Now().Add(ahead) }
		own := n.start().until("attestation", there)
		server.Stop()
		server.Rotate(false)
		server.ForgetOld()
		server.Evict()
		write(t, path, server.BundlePEM())
		server.Start()
		n.join.Denied(own, deniedAs(t, server))
		n.wait("distrust", func() bool { return n.heard(logrus.WarnLevel, "verify server") })
		if again, _ := n.join.Own(); again != own {
			t.Error("believed at once")
		}
		mu.Lock()
		ahead = 11 * time.Minute
		mu.Unlock()
		n.until("trust", func(o *keep.Own) bool { return o != nil && o != own })
		if !n.heard(logrus.WarnLevel, "known to the bootstrap bundle") {
			t.Errorf("said %q", n.said())
		}
	})
}

func TestRotation(t *testing.T) {
	for name, reattestable := range map[string]bool{"renewed": false, "attested again": true} {
		// turn says how an SVID was replaced when it was not at half of its life.
		turn := func(t *testing.T) error {
			t.Helper()
			server := fakeserver.New(t, fakeserver.Config{AgentTTL: 3 * time.Second, Reattestable: reattestable})
			n := prepare(t, server).start()
			defer n.stop()
			own := n.until("attestation", there)
			began := time.Now()
			next := n.until("rotation", func(o *keep.Own) bool { return o != nil && o != own })
			if took := time.Since(began); took < 900*time.Millisecond || took > 2500*time.Millisecond {
				return fmt.Errorf("after %v", took)
			}
			if next.Key == own.Key || next.Chain[0].URIs[0].String() != own.Chain[0].URIs[0].String() {
				t.Error("the key is the same, or the ID is not")
			}
			attested := 1
			if reattestable {
				attested = 2
			}
			if server.Calls("AttestAgent") != attested {
				t.Errorf("attested %d times", server.Calls("AttestAgent"))
			}
			return nil
		}
		t.Run("the SVID is "+name+" at half of its life, with another key", func(t *testing.T) {
			var err error
			for range 5 { // a rule that is wrong is so each time, a loaded machine late now and then
				if err = turn(t); err == nil {
					return
				}
			}
			t.Error(err)
		})
	}
	t.Run("an SVID that expired while the server was away is replaced by attesting again", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{AgentTTL: time.Second})
		n := prepare(t, server).start()
		n.until("attestation", there)
		server.Stop()
		n.wait("expiry", func() bool { own, _ := n.join.Own(); return own == nil })
		server.Start()
		n.until("attestation", there)
	})
	t.Run("an SVID whose authority is tainted is replaced at once", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		n := prepare(t, server).start()
		own := n.until("attestation", there)
		server.Rotate(true)
		auth := server.Authorities()
		n.join.SetBundle(&identity.Bundle{TrustDomain: fakeserver.TrustDomain, Sequence: 2, X509: []identity.X509Authority{
			{Certificate: auth[0]}, {Certificate: auth[1], Tainted: true},
		}})
		next := n.until("rotation", func(o *keep.Own) bool { return o != nil && o != own })
		if err := next.Chain[0].CheckSignatureFrom(auth[0]); err != nil {
			t.Error(err)
		}
	})
	t.Run("so is one whose authority has left the bundle", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		n := prepare(t, server).start()
		own := n.until("attestation", there)
		server.Rotate(false)
		n.join.SetBundle(&identity.Bundle{TrustDomain: fakeserver.TrustDomain, Sequence: 2, X509: []identity.X509Authority{
			{Certificate: server.Authorities()[0]},
		}})
		n.until("rotation", func(o *keep.Own) bool { return o != nil && o != own })
	})
	t.Run("one that a tainted authority signed all the same is replaced soon", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		n := prepare(t, server).start()
		own := n.until("attestation", there)
		auth := server.Authorities()
		bundle := &identity.Bundle{TrustDomain: fakeserver.TrustDomain, Sequence: 2, X509: []identity.X509Authority{
			{Certificate: auth[0], Tainted: true},
		}}
		n.join.SetBundle(bundle)
		second := n.until("rotation", func(o *keep.Own) bool { return o != nil && o != own })
		n.until("another rotation", func(o *keep.Own) bool { return o != nil && o != second })
	})
}

func TestBan(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{})
	n := prepare(t, server).start()
	own := n.until("attestation", there)
	server.Ban()
	n.join.Denied(own, deniedAs(t, server))
	<-n.banned
	t.Run("empties the agent, loudly", func(t *testing.T) {
		if got, _ := n.join.Own(); got != nil || !n.join.Banned() {
			t.Error("it does not")
		}
		if id, err := own.ID(); err != nil || n.join.ID() != id {
			t.Errorf("it is %s to operators, want %s", n.join.ID(), id)
		}
		n.wait("a word", func() bool { return n.heard(logrus.ErrorLevel, "BANNED") })
	})
	t.Run("is not fought", func(t *testing.T) {
		n.wait("the one try", func() bool { return server.Calls("AttestAgent") == 2 })
	})
	t.Run("outlives a restart, and ends when it is lifted", func(t *testing.T) {
		n.stop()
		n.start()
		<-n.banned
		if !n.join.Banned() {
			t.Error("forgotten")
		}
		n.stop()
		server.Unban()
		n.start().until("attestation", there)
		if n.join.Banned() {
			t.Error("still banned")
		}
	})
	t.Run("an answer to an SVID that was replaced means nothing", func(t *testing.T) {
		err := deniedAs(t, server)
		n.join.Denied(own, err)
		if n.join.Banned() {
			t.Error("it does")
		}
	})
}

func TestBootstrapSources(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{})
	spiffe, err := (&identity.Bundle{TrustDomain: fakeserver.TrustDomain, X509: []identity.X509Authority{{Certificate: server.Authorities()[0]}}}).
		SPIFFEBundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		content []byte
		spiffe  bool
		want    string // "" is good
	}{
		"PEM":                    {server.BundlePEM(), false, ""},
		"PEM twice":              {append(server.BundlePEM(), server.BundlePEM()...), false, ""},
		"a SPIFFE bundle":        {spiffe, true, ""},
		"nothing":                {nil, false, "no certificate"},
		"a SPIFFE bundle as PEM": {spiffe, false, "no PEM"},
		"PEM as SPIFFE bundle":   {server.BundlePEM(), true, "unable to parse"},
		"text after the PEM":     {append(server.BundlePEM(), "rest"...), false, "no PEM"},
		"a private key":          {[]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), false, "is no CERTIFICATE"},
		"a broken certificate":   {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), false, "x509"},
		"a leaf certificate":     {leaf(t), false, "is no CA certificate"},
		"two megabytes":          {make([]byte, 2<<20), false, "than 1048576 bytes"},
	} {
		t.Run(name+" from a file", func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "bundle")
			write(t, path, c.content)
			check(t, server, join.Bootstrap{Path: path, SPIFFE: c.spiffe}, c.want)
		})
		t.Run(name+" from a URL", func(t *testing.T) {
			web := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(c.content) }))
			t.Cleanup(web.Close)
			check(t, server, join.Bootstrap{URL: web.URL, SPIFFE: c.spiffe, Roots: roots(web)}, c.want)
		})
	}
	t.Run("a file that is not there", func(t *testing.T) {
		check(t, server, join.Bootstrap{Path: "/does/not/exist"}, "no such file")
	})
	t.Run("plain http", func(t *testing.T) {
		check(t, server, join.Bootstrap{URL: "http://127.0.0.1:1/bundle"}, "scheme must be https")
	})
	t.Run("a redirection to plain http", func(t *testing.T) {
		plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(server.BundlePEM()) }))
		t.Cleanup(plain.Close)
		web := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusFound))
		t.Cleanup(web.Close)
		check(t, server, join.Bootstrap{URL: web.URL, Roots: roots(web)}, "redirected away from https")
	})
	t.Run("a host that nobody vouches for", func(t *testing.T) {
		web := httptest.NewTLSServer(http.NotFoundHandler())
		t.Cleanup(web.Close)
		check(t, server, join.Bootstrap{URL: web.URL}, "certificate")
	})
	t.Run("an answer that is none", func(t *testing.T) {
		web := httptest.NewTLSServer(http.NotFoundHandler())
		t.Cleanup(web.Close)
		check(t, server, join.Bootstrap{URL: web.URL, Roots: roots(web)}, "404")
	})
	t.Run("no source at all", func(t *testing.T) { check(t, server, join.Bootstrap{}, "no source of trust") })
}

// check attests with the source, or demands the error.
func check(t *testing.T, server *fakeserver.Server, b join.Bootstrap, want string) {
	t.Helper()
	n := prepare(t, server)
	n.cfg.Bootstrap = b
	n.start()
	if want == "" {
		n.until("attestation", there)
		return
	}
	n.wait("the error", func() bool { err := n.join.Err(); return err != nil && strings.Contains(err.Error(), want) })
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func roots(web *httptest.Server) *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(web.Certificate())
	return pool
}
