package spire

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/test/lab/site"
)

// words are the names that a transcript has for what is another at each run, and the connections of those
// who ask.
type words struct {
	site     *site.Site
	local    *grpc.ClientConn
	conns    map[string]*grpc.ClientConn
	names    map[string]string // value to name
	values   map[string]string // name to value
	counts   map[string]int
	fixtures map[string]string // name to base64
	lastKey  crypto.Signer     // of the newest CSR
	changed  bool              // what SPIRE keeps in a cache may be another since settle waited
}

// serverAlone is a server without agents, of ours or of SPIRE's.
func serverAlone(t *testing.T, change ...func(*site.Site)) *site.Site {
	t.Helper()
	dir, err := os.MkdirTemp("", "spire") //nolint:usetesting // a socket's path may have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := site.New(dir, "../../../bin")
	if err != nil {
		t.Fatal(err)
	}
	s.SPIRE = site.SPIRE{Server: os.Getenv("BLACKBOX_SERVER"), Agent: os.Getenv("BLACKBOX_AGENT")}
	for _, f := range change {
		f(s)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.StartServer(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("end of the server's log:\n%s", site.Tail(s.ServerLog(), 10))
		}
	})
	return s
}

func newWords(t *testing.T, s *site.Site) *words {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+s.ServerSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &words{
		site: s, local: conn, conns: map[string]*grpc.ClientConn{"local": conn},
		names: map[string]string{}, values: map[string]string{}, counts: map[string]int{}, fixtures: map[string]string{},
	}
}

// conn is the connection of somebody who asks.
func (w *words) conn(t *testing.T, who string) *grpc.ClientConn {
	t.Helper()
	if conn, ok := w.conns[who]; ok {
		return conn
	}
	var cert *tls.Certificate
	switch {
	case who == "anyone":
	case strings.HasPrefix(who, "/"):
		key, der := csr(t, "spiffe://"+site.TrustDomain+who)
		resp, err := svidv1.NewSVIDClient(w.local).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: der})
		if err != nil {
			t.Fatal(err)
		}
		cert = &tls.Certificate{Certificate: resp.GetSvid().GetCertChain(), PrivateKey: key}
	default:
		t.Fatalf("nobody knows who %q is", who)
	}
	w.conns[who] = w.dial(t, cert)
	return w.conns[who]
}

// dial connects to the TCP port.
func (w *words) dial(t *testing.T, cert *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString(site.TrustDomain)
	b, err := bundlev1.NewBundleClient(w.local).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	bundle := x509bundle.New(td)
	for _, a := range b.GetX509Authorities() {
		// SPIRE appends what is no certificate, too.
		if authority, err := x509.ParseCertificate(a.GetAsn1()); err == nil {
			bundle.AddX509Authority(authority)
		}
	}
	config := tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(td, "/spire/server")))
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient(fmt.Sprintf("127.0.0.1:%d", w.site.Port), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// note takes down who was attested, and with what.
func (w *words) note(t *testing.T, q *question, out proto.Message) {
	t.Helper()
	var svid *types.X509SVID
	switch out := out.(type) {
	case *agentv1.AttestAgentResponse:
		svid = out.GetResult().GetSvid()
	case *agentv1.RenewAgentResponse:
		svid = out.GetSvid()
	}
	if svid == nil {
		return
	}
	path := svid.GetId().GetPath()
	who := "agent" + path[strings.LastIndex(path, "/"):]
	if old, ok := w.conns[who]; ok {
		w.conns[who+"/before"] = old
	}
	w.conns[who] = w.dial(t, &tls.Certificate{Certificate: svid.GetCertChain(), PrivateKey: w.lastKey})
	_ = q
}

var placeholder = regexp.MustCompile(`\$\{([^}]*)\}`)

// fill replaces the names in a request by what they stand for.
func (w *words) fill(t *testing.T, text string) string {
	t.Helper()
	return placeholder.ReplaceAllStringFunc(text, func(name string) string {
		if value, ok := w.values[name[2:len(name)-1]]; ok {
			return value
		}
		kind, arg, _ := strings.Cut(name[2:len(name)-1], " ")
		switch kind {
		case "csr":
			key, der := csr(t, strings.Fields(arg)...)
			w.lastKey = key
			return base64.StdEncoding.EncodeToString(der)
		case "ca", "leaf", "pkix", "x509":
			return w.fixture(t, name[2:len(name)-1], kind, arg)
		case "b64":
			return base64.StdEncoding.EncodeToString([]byte(arg))
		case "long":
			n, err := strconv.Atoi(arg)
			if err != nil {
				t.Fatal(err)
			}
			return strings.Repeat("x", n)
		case "in":
			seconds, err := strconv.Atoi(arg)
			if err != nil {
				t.Fatal(err)
			}
			return strconv.FormatInt(time.Now().Unix()+int64(seconds), 10)
		}
		t.Fatalf("nothing is known by the name %q", name)
		return ""
	})
}

// fixture is a key or a certificate that is the same throughout a transcript.
func (w *words) fixture(t *testing.T, name, kind, arg string) string {
	t.Helper()
	if text, ok := w.fixtures[name]; ok {
		return text
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var der []byte
	if kind == "pkix" {
		der, err = x509.MarshalPKIXPublicKey(key.Public())
	} else {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: arg},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
			BasicConstraintsValid: true, IsCA: kind == "ca",
		}
		if kind == "ca" {
			template.KeyUsage = x509.KeyUsageCertSign
		}
		der, err = x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	}
	if err != nil {
		t.Fatal(err)
	}
	text := base64.StdEncoding.EncodeToString(der)
	w.fixtures[name], w.names[text] = text, "${"+name+"}"
	return text
}

// name gives a value a name, the same each time.
func (w *words) name(kind, value string) string {
	if name, ok := w.names[value]; ok {
		return name
	}
	w.counts[kind]++
	name := fmt.Sprintf("%s-%d", kind, w.counts[kind])
	w.names[value], w.values[name] = name, value
	return name
}

var (
	serialNumber = regexp.MustCompile(`SERIALNUMBER=\d+`)

	uuid   = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	moment = regexp.MustCompile(`\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( [+-]\d{4} [A-Z]+|Z)?`)
)

// plain writes names into a text.
func (w *words) plain(text string) string {
	// protobuf writes one space or another into its errors, by the program, so that nobody compares them.
	text = strings.ReplaceAll(text, "\u00a0", " ")
	text = uuid.ReplaceAllStringFunc(text, func(s string) string { return w.name("uuid", s) })
	for _, value := range slices.SortedFunc(maps.Keys(w.names), func(a, b string) int { return len(b) - len(a) }) {
		if len(value) > 8 {
			text = strings.ReplaceAll(text, value, w.names[value])
		}
	}
	return moment.ReplaceAllString(text, "TIME")
}

// text writes a message in words.
func (w *words) text(t *testing.T, m proto.Message) string {
	t.Helper()
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(w.walk("", v)); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out.String())
}

func (w *words) walk(key string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		delete(v, "uptime") // in seconds, of which there may be none
		for _, k := range slices.Sorted(maps.Keys(v)) {
			name := k
			if strings.HasPrefix(k, "spiffe://") { // of a map by trust domain
				name = key
			}
			v[k] = w.walk(name, v[k])
		}
		return v
	case []any:
		for i := range v {
			v[i] = w.walk(key, v[i])
		}
		if key == "entries" { // in no order
			slices.SortStableFunc(v, func(a, b any) int { return strings.Compare(idOf(a), idOf(b)) })
		}
		return v
	case float64:
		switch key {
		case "code":
			return codeName(v)
		case "exp", "iat":
			return "NUMBER"
		}
	case string:
		return w.value(key, v)
	}
	return v
}

func idOf(v any) string {
	entry, _ := v.(map[string]any)
	id, _ := entry["id"].(string)
	return id
}

func (w *words) value(key, v string) string {
	if name, ok := w.names[v]; ok || v == "" {
		return name
	}
	switch key {
	case "private_key":
		return "KEY"
	case "expires_at", "created_at", "issued_at", "last_sync_success", "x509svid_expires_at":
		if n, err := strconv.ParseInt(v, 10, 64); err == nil && time.Until(time.Unix(n, 0)).Abs() < 72*time.Hour {
			return "TIME"
		}
	case "sequence_number":
		return "NUMBER"
	case "x509svid_serial_number":
		return "SERIAL"
	case "next_page_token":
		return w.name("page", v)
	case "key_id", "authority_id":
		if len(v) >= 32 {
			return w.name("key", v)
		}
	case "asn1", "cert_chain", "ca_cert_chain", "x509_authorities", "x509_svid", "root_cas", "bundle", "federated_bundles":
		if der, err := base64.StdEncoding.DecodeString(v); err == nil {
			return certificate(der)
		}
	case "public_key":
		if der, err := base64.StdEncoding.DecodeString(v); err == nil {
			key, err := x509.ParsePKIXPublicKey(der)
			return fmt.Sprintf("%T %v", key, err)
		}
	case "ca_certificates":
		return chains(v)
	case "token", "svid":
		return w.plain(token(v))
	case "x509_svid_key":
		return "KEY"
	case "jti":
		return "ID"
	case "bundles":
		return keySet(v)
	case "inline_bytes":
		return inPEM(v)
	case "nonce", "version", "version_info", "system_version_info":
		return "NUMBER"
	case "subject":
		return serialNumber.ReplaceAllString(v, "SERIALNUMBER=NUMBER")
	}
	return w.plain(v)
}

// certificate says what is in one, but for what is another each time.
func certificate(der []byte) string {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return err.Error()
	}
	subject := c.Subject
	serial := ""
	if subject.SerialNumber != "" {
		subject.SerialNumber, serial = "", " with serial number"
	}
	text := fmt.Sprintf("%s%s, for %s, %v %v, usage %b %v, CA %t %d, key IDs %t %t", subject, serial, c.NotAfter.Sub(c.NotBefore).Round(time.Minute), c.URIs, c.DNSNames,
		c.KeyUsage, c.ExtKeyUsage, c.IsCA, c.MaxPathLen, len(c.SubjectKeyId) > 0, len(c.AuthorityKeyId) > 0)
	var oids []string
	for _, e := range c.Extensions {
		oids = append(oids, e.Id.String())
	}
	slices.Sort(oids)
	return text + " " + strings.Join(oids, " ")
}

// token says what is in one.
func token(text string) string {
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		return text
	}
	var header, claims map[string]any
	for i, into := range []*map[string]any{&header, &claims} {
		raw, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil || json.Unmarshal(raw, into) != nil {
			return text
		}
	}
	if exp, ok := claims["exp"].(float64); ok {
		if iat, ok := claims["iat"].(float64); ok {
			claims["exp"] = fmt.Sprintf("iat+%v", exp-iat)
			if exp-iat > 80_000 { // as long as the key lives
				claims["exp"] = "iat+a day"
			}
		}
	}
	delete(claims, "iat")
	delete(header, "kid")
	if cnf, ok := claims["cnf"].(map[string]any); ok {
		if jwk, ok := cnf["jwk"].(map[string]any); ok {
			delete(jwk, "x")
			delete(jwk, "y")
		}
	}
	if _, ok := claims["jti"]; ok {
		claims["jti"] = "ID"
	}
	return fmt.Sprintf("%v %v", header, claims)
}

// keySet says which keys are in a JWKS in base64, but for what is another each time.
func keySet(text string) string {
	raw, err := base64.StdEncoding.DecodeString(text)
	var set struct {
		Keys []map[string]any `json:"keys"`
	}
	if err != nil || json.Unmarshal(raw, &set) != nil {
		return chains(text) // X.509 bundles are called so too
	}
	out := make([]string, 0, len(set.Keys))
	for _, key := range set.Keys {
		for _, name := range []string{"kid", "x", "y"} {
			if key[name] != nil {
				key[name] = "…"
			}
		}
		out = append(out, fmt.Sprint(key))
	}
	return fmt.Sprintf("%d keys %s", len(out), strings.Join(out, " "))
}

// chains says what is in the certificates that follow each other in base64.
func chains(v string) string {
	der, err := base64.StdEncoding.DecodeString(v)
	if err != nil {
		return v
	}
	all, err := x509.ParseCertificates(der)
	if err != nil {
		return v
	}
	out := make([]string, 0, len(all))
	for _, c := range all {
		out = append(out, certificate(c.Raw))
	}
	return strings.Join(out, " + ")
}
