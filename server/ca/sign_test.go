package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestSign(t *testing.T) {
	ctx := t.Context()
	c, store := open(t, Config{AgentTTL: 30 * time.Minute})
	key := newKey(t)

	t.Run("a workload's certificate is what the profile says", func(t *testing.T) {
		chain, err := c.SignWorkload(ctx, WorkloadParams{
			PublicKey: key.Public(), ID: workload, DNSNames: []string{"shop.example.org", "*.shop"}, TTL: 10 * time.Minute,
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(chain) != 1 {
			t.Fatalf("chain of %d", len(chain))
		}
		cert := chain[0]
		var spki struct {
			Algorithm pkix.AlgorithmIdentifier
			Bits      asn1.BitString
		}
		if _, err := asn1.Unmarshal(cert.RawSubjectPublicKeyInfo, &spki); err != nil {
			t.Fatal(err)
		}
		sum := sha1.Sum(spki.Bits.Bytes)
		got := map[string]any{
			"subject": cert.Subject.String(), "issuer": cert.Issuer.Organization[0], "uri": cert.URIs[0].String(), "dns": cert.DNSNames,
			"not before": cert.NotBefore, "not after": cert.NotAfter, "usage": cert.KeyUsage, "extended": cert.ExtKeyUsage,
			"ca": cert.IsCA, "constraints": cert.BasicConstraintsValid, "ski": cert.SubjectKeyId, "aki": cert.AuthorityKeyId,
			"extensions": len(cert.Extensions), "key": key.PublicKey.Equal(cert.PublicKey),
		}
		want := map[string]any{
			"subject": "CN=shop.example.org,O=SPIRE,C=US", "issuer": "SPIFFE", "uri": workload.String(), "dns": []string{"shop.example.org", "*.shop"},
			"not before": epoch.Add(-10 * time.Second), "not after": epoch.Add(10 * time.Minute),
			"usage":    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement,
			"extended": []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			"ca":       false, "constraints": true, "ski": sum[:], "aki": c.x509.Load().cert.SubjectKeyId, "extensions": 6, "key": true,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		if err := verify(store.held(), chain, epoch); err != nil {
			t.Error(err)
		}
	})

	t.Run("the authority's certificate is what the profile says", func(t *testing.T) {
		cert := c.x509.Load().cert
		got := map[string]any{
			"org": cert.Subject.Organization, "country": cert.Subject.Country, "serial": cert.Subject.SerialNumber, "uri": cert.URIs[0].String(),
			"uris": len(cert.URIs), "usage": cert.KeyUsage, "ca": cert.IsCA, "path": cert.MaxPathLen, "extensions": len(cert.Extensions),
			"not before": cert.NotBefore, "not after": cert.NotAfter,
		}
		want := map[string]any{
			"org": []string{"SPIFFE"}, "country": []string{"US"}, "serial": cert.SerialNumber.String(), "uri": "spiffe://example.org",
			"uris": 1, "usage": x509.KeyUsageCertSign | x509.KeyUsageCRLSign, "ca": true, "path": -1, "extensions": 4,
			"not before": epoch.Add(-10 * time.Second), "not after": epoch.Add(24 * time.Hour),
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})

	t.Run("agents, the server and minted ones differ in name and life only", func(t *testing.T) {
		agent, err := c.SignAgent(ctx, key.Public(), spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/x"))
		if err != nil {
			t.Fatal(err)
		}
		server, err := c.SignServer(ctx, key.Public())
		if err != nil {
			t.Fatal(err)
		}
		minted, err := c.SignMint(ctx, MintParams{
			PublicKey: key.Public(), ID: workload, TTL: 2 * time.Hour, DNSNames: []string{"a.example.org"},
			Subject: pkix.Name{Organization: []string{"Shop"}, CommonName: "given way"},
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []struct {
			chain       []*x509.Certificate
			id, subject string
			life        time.Duration
		}{
			{agent, "spiffe://example.org/spire/agent/join_token/x", "O=SPIRE,C=US", 30 * time.Minute},
			{server, "spiffe://example.org/spire/server", "O=SPIRE,C=US", time.Hour},
			{minted, workload.String(), "CN=a.example.org,O=Shop", 2 * time.Hour},
		} {
			cert := want.chain[0]
			if cert.URIs[0].String() != want.id || cert.Subject.String() != want.subject || !cert.NotAfter.Equal(epoch.Add(want.life)) {
				t.Errorf("%s: subject %s, until %s", cert.URIs[0], cert.Subject, cert.NotAfter)
			}
			if err := verify(store.held(), want.chain, epoch); err != nil {
				t.Error(err)
			}
		}
	})

	t.Run("every accepted kind of key gets a certificate", func(t *testing.T) {
		large, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		for _, signer := range []crypto.Signer{large, onCurve(t, elliptic.P256()), onCurve(t, elliptic.P384()), onCurve(t, elliptic.P521())} {
			chain, err := c.SignWorkload(ctx, WorkloadParams{PublicKey: signer.Public(), ID: workload})
			if err != nil {
				t.Fatal(err)
			}
			if err := verify(store.held(), chain, epoch); err != nil {
				t.Error(err)
			}
		}
	})

	t.Run("serial numbers do not repeat", func(t *testing.T) {
		seen := map[string]bool{}
		for range 50 {
			chain, err := c.SignWorkload(ctx, WorkloadParams{PublicKey: key.Public(), ID: workload})
			if err != nil {
				t.Fatal(err)
			}
			seen[chain[0].SerialNumber.String()] = true
		}
		if len(seen) != 50 {
			t.Errorf("%d of 50", len(seen))
		}
	})

	t.Run("a life is cut to the authority's", func(t *testing.T) {
		for _, ttl := range []time.Duration{24*time.Hour + time.Second, 1 << 62} {
			chain, err := c.SignWorkload(ctx, WorkloadParams{PublicKey: key.Public(), ID: workload, TTL: ttl})
			if err != nil {
				t.Fatal(err)
			}
			if !chain[0].NotAfter.Equal(c.x509.Load().cert.NotAfter) {
				t.Errorf("TTL %s: until %s", ttl, chain[0].NotAfter)
			}
		}
	})

	t.Run("what must not be signed is not", func(t *testing.T) {
		other := spiffeid.RequireFromString("spiffe://other.org/shop")
		long, err := spiffeid.FromPath(testTD, "/"+strings.Repeat("a", identity.MaxSPIFFEID))
		if err != nil {
			t.Fatal(err)
		}
		weak, err := rsa.GenerateKey(rand.Reader, 1024)
		if err != nil {
			t.Fatal(err)
		}
		good := func() WorkloadParams { return WorkloadParams{PublicKey: key.Public(), ID: workload} }
		for name, test := range map[string]struct {
			err    error
			change func(p *WorkloadParams)
		}{
			"no key":            {ErrKey, func(p *WorkloadParams) { p.PublicKey = nil }},
			"a weak key":        {ErrKey, func(p *WorkloadParams) { p.PublicKey = weak.Public() }},
			"a private key":     {ErrKey, func(p *WorkloadParams) { p.PublicKey = key }},
			"no ID":             {ErrID, func(p *WorkloadParams) { p.ID = spiffeid.ID{} }},
			"a foreign ID":      {ErrID, func(p *WorkloadParams) { p.ID = other }},
			"no path":           {ErrID, func(p *WorkloadParams) { p.ID = testTD.ID() }},
			"the server's ID":   {ErrID, func(p *WorkloadParams) { p.ID = spiffeid.RequireFromPath(testTD, serverPath) }},
			"an agent's ID":     {ErrID, func(p *WorkloadParams) { p.ID = spiffeid.RequireFromPath(testTD, "/spire/agent/a") }},
			"the reserved root": {ErrID, func(p *WorkloadParams) { p.ID = spiffeid.RequireFromPath(testTD, "/spire") }},
			"an ID too long":    {ErrID, func(p *WorkloadParams) { p.ID = long }},
			"a negative TTL":    {ErrTTL, func(p *WorkloadParams) { p.TTL = -time.Second }},
			"a tiny TTL":        {ErrTTL, func(p *WorkloadParams) { p.TTL = time.Millisecond }},
			"a bad DNS name":    {ErrDNSName, func(p *WorkloadParams) { p.DNSNames = []string{"a.org", "b..org"} }},
			"too many names":    {ErrDNSName, func(p *WorkloadParams) { p.DNSNames = slices.Repeat([]string{"a.org"}, identity.MaxDNSNames+1) }},
		} {
			p := good()
			test.change(&p)
			// A rule of the profile would hold it back too, once it is signed.
			if _, err := c.SignWorkload(ctx, p); !errors.Is(err, test.err) || errors.Is(err, ErrLint) {
				t.Errorf("%s: got %v", name, err)
			}
			if name == "an agent's ID" || name == "no key" {
				continue
			}
			if _, err := c.SignMint(ctx, MintParams{PublicKey: p.PublicKey, ID: p.ID, DNSNames: p.DNSNames, TTL: p.TTL}); !errors.Is(err, test.err) || errors.Is(err, ErrLint) {
				t.Errorf("minted with %s: got %v", name, err)
			}
		}
		for _, id := range []spiffeid.ID{{}, other, testTD.ID(), spiffeid.RequireFromPath(testTD, serverPath)} {
			if _, err := c.SignAgent(ctx, key.Public(), id); !errors.Is(err, ErrID) {
				t.Errorf("agent %s: got %v", id, err)
			}
		}
		// A path that only begins like the reserved one is not reserved.
		if _, err := c.SignWorkload(ctx, WorkloadParams{PublicKey: key.Public(), ID: spiffeid.RequireFromPath(testTD, "/spirelike/a")}); err != nil {
			t.Error(err)
		}
		canceled, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := c.SignWorkload(canceled, good()); !errors.Is(err, context.Canceled) {
			t.Errorf("canceled: got %v", err)
		}
	})

	t.Run("a life is no longer than its cap, whoever asked for it", func(t *testing.T) {
		for _, test := range []struct{ ttl, most, want time.Duration }{
			{0, 0, time.Hour}, {0, 10 * time.Minute, 10 * time.Minute}, {2 * time.Hour, 10 * time.Minute, 10 * time.Minute},
			{5 * time.Minute, 10 * time.Minute, 5 * time.Minute}, {2 * time.Hour, 0, 2 * time.Hour},
		} {
			c, _ := open(t, Config{X509SVIDTTL: time.Hour, JWTSVIDTTL: time.Hour})
			chain, err := c.SignWorkload(ctx, WorkloadParams{PublicKey: key.Public(), ID: workload, TTL: test.ttl, MaxTTL: test.most})
			if err != nil || chain[0].NotAfter.Sub(epoch) != test.want {
				t.Errorf("asked for %s of at most %s: until %s, %v", test.ttl, test.most, chain[0].NotAfter, err)
			}
			svid, err := c.SignJWT(ctx, JWTParams{ID: workload, Audience: []string{"a"}, TTL: test.ttl, MaxTTL: test.most})
			if err != nil || svid.ExpiresAt.Sub(epoch) != test.want {
				t.Errorf("a token asked for %s of at most %s: %v, %v", test.ttl, test.most, svid, err)
			}
		}
	})

	t.Run("a signer that returns something else is found out", func(t *testing.T) {
		c, _ := open(t, Config{})
		a := *c.x509.Load()
		a.signer = liar{a.signer}
		c.x509.Store(&a)
		if _, err := c.SignWorkload(ctx, WorkloadParams{PublicKey: key.Public(), ID: workload}); err == nil {
			t.Error("a certificate with a wrong signature left")
		}
	})
}

// liar signs something else than it was asked to.
type liar struct{ crypto.Signer }

func (l liar) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return l.Signer.Sign(rand.Reader, make([]byte, len(digest)), opts)
}

func onCurve(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestOpenSSL has somebody else's verifier look at the chains, as strictly as it can.
func TestOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("SKIPPED: there is no openssl command here; apt-get install openssl")
	}
	for _, kind := range []keys.Kind{keys.EC256, keys.EC384, keys.RSA2048} {
		t.Run("openssl verify accepts what an authority of type "+string(kind)+" signs", func(t *testing.T) {
			c, _ := open(t, Config{KeyType: kind, Now: time.Now})
			id := spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/a")
			agent, err := c.SignAgent(t.Context(), newKey(t).Public(), id)
			if err != nil {
				t.Fatal(err)
			}
			shop, err := c.SignWorkload(t.Context(), WorkloadParams{PublicKey: newKey(t).Public(), ID: workload, DNSNames: []string{"shop.example.org"}})
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			root := writePEM(t, dir, "root.pem", c.x509.Load().cert)
			for name, leaf := range map[string]*x509.Certificate{"agent.pem": agent[0], "shop.pem": shop[0]} {
				path := writePEM(t, dir, name, leaf)
				for _, purpose := range []string{"sslserver", "sslclient"} {
					args := []string{"verify", "-x509_strict", "-check_ss_sig", "-purpose", purpose, "-CAfile", root, path}
					out, err := exec.Command(openssl, args...).CombinedOutput()
					if err != nil || !strings.HasSuffix(strings.TrimSpace(string(out)), ": OK") {
						t.Errorf("openssl %s: %v: %s", strings.Join(args, " "), err, out)
					}
				}
				out, err := exec.Command(openssl, "x509", "-in", path, "-noout", "-ext", "subjectAltName").CombinedOutput()
				if err != nil || !strings.Contains(string(out), "URI:"+leaf.URIs[0].String()) {
					t.Errorf("openssl x509: %v: %s", err, out)
				}
			}
			stranger, _ := open(t, Config{Now: time.Now})
			other := writePEM(t, dir, "other.pem", stranger.x509.Load().cert)
			if out, err := exec.Command(openssl, "verify", "-CAfile", other, filepath.Join(dir, "shop.pem")).CombinedOutput(); err == nil {
				t.Errorf("verified by a stranger: %s", out)
			}
		})
	}
}

func writePEM(t *testing.T, dir, name string, cert *x509.Certificate) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func newCSR(t testing.TB, key crypto.Signer, change func(*x509.CertificateRequest)) []byte {
	t.Helper()
	template := &x509.CertificateRequest{Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestParseCSR(t *testing.T) {
	t.Run("a good request gives its key", func(t *testing.T) {
		large, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range []crypto.Signer{newKey(t), onCurve(t, elliptic.P384()), onCurve(t, elliptic.P521()), large} {
			csr, err := ParseCSR(newCSR(t, key, nil))
			if err != nil || !samePublic(csr.PublicKey, key.Public()) {
				t.Errorf("%T: %v", key, err)
			}
		}
		csr, err := ParseCSR(newCSR(t, large, func(c *x509.CertificateRequest) { c.SignatureAlgorithm = x509.SHA384WithRSAPSS }))
		if err != nil || csr.SignatureAlgorithm != x509.SHA384WithRSAPSS {
			t.Errorf("PSS: %v", err)
		}
	})

	key := newKey(t)
	good := newCSR(t, key, nil)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	strong, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	flip := func(i int) []byte {
		der := bytes.Clone(good)
		der[(i+len(der))%len(der)] ^= 1
		return der
	}
	for name, test := range map[string]struct {
		der []byte
		err error
	}{
		"nothing":       {nil, ErrCSR},
		"no ASN.1":      {[]byte("-----BEGIN CERTIFICATE REQUEST-----"), ErrCSR},
		"half of it":    {good[:len(good)/2], ErrCSR},
		"more after it": {append(bytes.Clone(good), 0), ErrCSR},
		"much else in it": {newCSR(t, key, func(c *x509.CertificateRequest) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Value: make([]byte, MaxCSR)}}
		}), ErrCSR},
		"a broken signature":         {flip(-1), ErrCSR},
		"another subject":            {flip(20), ErrCSR},
		"RSA-1024":                   {newCSR(t, weak, nil), ErrKey},
		"P-224":                      {newCSR(t, onCurve(t, elliptic.P224()), nil), ErrKey},
		"a SHA-1 signature":          {newCSR(t, strong, func(c *x509.CertificateRequest) { c.SignatureAlgorithm = x509.SHA1WithRSA }), ErrCSR},
		"a certificate in its place": {selfSigned(t), ErrCSR},
		"another's key in its place": {bytes.Replace(bytes.Clone(good), point(t, key), point(t, newKey(t)), 1), ErrCSR},
	} {
		t.Run("a request with "+name+" is refused", func(t *testing.T) {
			if csr, err := ParseCSR(test.der); !errors.Is(err, test.err) || csr != nil {
				t.Errorf("got %v", err)
			}
		})
	}
}

func point(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	b, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func selfSigned(t *testing.T) []byte {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestCheckKey(t *testing.T) {
	good, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	bits := func(n int) *big.Int { return new(big.Int).SetBit(big.NewInt(1), n-1, 1) }
	for name, test := range map[string]struct {
		key crypto.PublicKey
		ok  bool
	}{
		"RSA-2048":                        {good.Public(), true},
		"RSA-8192":                        {&rsa.PublicKey{N: bits(8192), E: 65537}, true},
		"RSA-8193":                        {&rsa.PublicKey{N: bits(8193), E: 65537}, false},
		"RSA-2047":                        {&rsa.PublicKey{N: bits(2047), E: 65537}, false},
		"RSA with exponent 3":             {&rsa.PublicKey{N: good.N, E: 3}, false},
		"RSA with exponent 1":             {&rsa.PublicKey{N: good.N, E: 1}, false},
		"RSA with an even exponent":       {&rsa.PublicKey{N: good.N, E: 65538}, false},
		"RSA with an even modulus":        {&rsa.PublicKey{N: new(big.Int).Lsh(bits(2000), 100), E: 65537}, false},
		"RSA without a modulus":           {&rsa.PublicKey{}, false},
		"no RSA key":                      {(*rsa.PublicKey)(nil), false},
		"P-256":                           {newKey(t).Public(), true},
		"P-224":                           {onCurve(t, elliptic.P224()).Public(), false},
		"a point beside the curve":        {&ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}, false}, //nolint:staticcheck // a point no parser lets through
		"no ECDSA key":                    {(*ecdsa.PublicKey)(nil), false},
		"an ECDSA key without a curve":    {&ecdsa.PublicKey{}, false},
		"nothing":                         {nil, false},
		"something else":                  {"key", false},
		"an ECDSA key that is no pointer": {newKey(t).PublicKey, false},
	} {
		t.Run(name, func(t *testing.T) {
			if err := CheckKey(test.key); (err == nil) != test.ok || err != nil && !errors.Is(err, ErrKey) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func FuzzParseCSR(f *testing.F) {
	key := newKey(f)
	good := newCSR(f, key, func(c *x509.CertificateRequest) { c.DNSNames = []string{"a.org"} })
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, der []byte) {
		csr, err := ParseCSR(der)
		if err != nil {
			if csr != nil || !errors.Is(err, ErrCSR) && !errors.Is(err, ErrKey) {
				t.Errorf("got %v", err)
			}
			return
		}
		if err := csr.CheckSignature(); err != nil {
			t.Errorf("not signed by its key: %v", err)
		}
		if err := CheckKey(csr.PublicKey); err != nil {
			t.Error(err)
		}
	})
}

func BenchmarkSignWorkload(b *testing.B) {
	c, _ := open(b, Config{})
	der := newCSR(b, newKey(b), nil)
	b.ReportAllocs()
	for b.Loop() {
		csr, err := ParseCSR(der)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.SignWorkload(b.Context(), WorkloadParams{PublicKey: csr.PublicKey, ID: workload}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseCSR(b *testing.B) {
	der := newCSR(b, newKey(b), nil)
	for b.Loop() {
		if _, err := ParseCSR(der); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSignJWT(b *testing.B) {
	c, _ := open(b, Config{})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.SignJWT(b.Context(), JWTParams{ID: workload, Audience: []string{"spiffe://example.org/db"}}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLint(b *testing.B) {
	c, _ := open(b, Config{})
	chain, err := c.SignWorkload(b.Context(), WorkloadParams{PublicKey: newKey(b).Public(), ID: workload})
	if err != nil {
		b.Fatal(err)
	}
	cert := chain[0]
	w := &want{
		profile: profileWorkload, issuer: c.x509.Load().cert, id: workload, subject: plainSubject,
		notBefore: cert.NotBefore, notAfter: cert.NotAfter, now: epoch,
	}
	w.spki, w.keyID, _ = keyIdentifier(cert.PublicKey)
	for b.Loop() {
		if err := lint(cert, w); err != nil {
			b.Fatal(err)
		}
	}
}
