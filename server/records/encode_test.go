package records

import (
	"bytes"
	"encoding/hex"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

var update = flag.Bool("update", false, "write testdata/v1 anew (only before version 1 is released)")

// fullEntry and those below have every field set; a test checks that.
func fullEntry() *identity.Entry {
	return &identity.Entry{
		ID: "id-1", SPIFFEID: spiffeid.RequireFromPath(domain, "/web"), ParentID: agent("x509pop/1"),
		Selectors: sel("docker:label:app:web", "unix:uid:1000", "unix:path:/bin/ü"), X509SVIDTTL: time.Hour, JWTSVIDTTL: time.Minute,
		FederatesWith: []spiffeid.TrustDomain{domain, other}, DNSNames: []string{"web", "*.web"}, Hint: "main",
		Admin: true, Downstream: true, StoreSVID: true, NoPrefetch: true, JTI: true,
		ExpiresAt: noon, CreatedAt: noon.Add(-time.Hour), Revision: 3,
	}
}

func fullNode() *Node {
	return &Node{
		ID: agent("x509pop/1"), Type: "x509pop", Serial: "340282366920938463463374607431768211455", NewSerial: "2",
		ExpiresAt: noon, NewExpiresAt: noon.Add(time.Hour), Selectors: sel("x509pop:subject:cn:a"),
		Banned: true, CanReattest: true, AgentVersion: "1.2.3", AttestedAt: noon.Add(-time.Hour), Parts: []string{"tpm/1"},
		Key: attestor.KeyHash{1}, NewKey: attestor.KeyHash{2},
	}
}

func fullJournal() Journal {
	return Journal{
		Kind: "x509", AuthorityID: "a1", State: "active", KeyID: "k", Certificate: []byte{1}, PublicKey: []byte{2},
		NotBefore: noon, NotAfter: noon.Add(1), CreatedAt: noon.Add(time.Second), ActivatedAt: noon.Add(time.Minute),
		Chain: [][]byte{{3}, {4}}, UpstreamID: "ab12",
	}
}

const digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func fullVerdict() *Verdict {
	return &Verdict{
		Digest: digest, Seq: 7, Selectors: sel("scan:policy:prod", "prov:policy:ci", "sig:policy:ci"),
		TTL: 10 * time.Minute, JWTTTL: 2 * time.Minute, NotAfter: noon.Add(15 * time.Minute), Revoke: true, UpdatedAt: noon,
		Policies: []PolicyVerdict{{Policy: "prod", Status: "grace", Mode: "enforce", Until: noon.Add(time.Hour), Summary: "CVE-2026-1 in zlib"}},
	}
}

func fullBundle(t testing.TB) *identity.Bundle {
	cert, key := certificate(t)
	return &identity.Bundle{
		TrustDomain: other, RefreshHint: time.Minute, Sequence: 9, Origin: 4, CRLs: [][]byte{{3}}, Nested: true,
		X509: []identity.X509Authority{{Certificate: cert, Tainted: true}},
		JWT:  []identity.JWTAuthority{{KeyID: "k", Key: key, ExpiresAt: noon, Tainted: true}},
		WIT:  []identity.JWTAuthority{{KeyID: "w", Key: key, ExpiresAt: noon, Tainted: true}},
	}
}

func fullFederation() *Federation {
	return &Federation{TrustDomain: other, URL: "https://other.test:8443/bundle", EndpointID: spiffeid.RequireFromPath(other, "/spire/server")}
}

func TestRoundTrip(t *testing.T) {
	var w words
	t.Run("the test values have every field set", func(t *testing.T) {
		j := fullJournal()
		for _, v := range []any{fullEntry(), fullNode(), &j, fullBundle(t), fullFederation(), fullVerdict(), &fullVerdict().Policies[0]} {
			s := reflect.ValueOf(v).Elem()
			for i := range s.NumField() {
				if s.Field(i).IsZero() {
					t.Errorf("%T.%s is not set: a new field needs a place in stored.proto and here", v, s.Type().Field(i).Name)
				}
			}
		}
	})
	t.Run("entry", func(t *testing.T) {
		for _, e := range []*identity.Entry{fullEntry(), {ID: "x", SPIFFEID: fullEntry().SPIFFEID, ParentID: domain.ID(), Selectors: sel("a:1")}} {
			b, err := encodeEntry(e)
			if err != nil {
				t.Fatal(err)
			}
			got, err := w.decodeEntry(e.ID, b)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(e, got, equal); diff != "" {
				t.Error(diff)
			}
		}
	})
	t.Run("node", func(t *testing.T) {
		for _, n := range []*Node{fullNode(), {ID: agent("a")}} {
			b, err := encodeNode(n)
			if err != nil {
				t.Fatal(err)
			}
			got, err := w.decodeNode(n.ID, b)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(n, got, equal); diff != "" {
				t.Error(diff)
			}
		}
	})
	t.Run("journal", func(t *testing.T) {
		j := fullJournal()
		j.NotAfter = noon
		b, err := encodeJournal(j)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeJournal(j.AuthorityID, b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(j, got); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("bundle", func(t *testing.T) {
		for _, bundle := range []*identity.Bundle{fullBundle(t), {TrustDomain: other}} {
			b, err := encodeBundle(bundle)
			if err != nil {
				t.Fatal(err)
			}
			got, err := decodeBundle(other, b)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(bundle, got) {
				t.Errorf("put %+v, got %+v", bundle, got)
			}
		}
	})
	t.Run("federation", func(t *testing.T) {
		for _, f := range []*Federation{fullFederation(), {TrustDomain: other, URL: "https://other.test"}} {
			b, err := encodeFederation(f)
			if err != nil {
				t.Fatal(err)
			}
			got, err := decodeFederation(other, b)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(f, got, equal); diff != "" {
				t.Error(diff)
			}
		}
	})
	t.Run("verdict", func(t *testing.T) {
		for _, v := range []*Verdict{fullVerdict(), {Digest: digest}} {
			b, err := encodeVerdict(v)
			if err != nil {
				t.Fatal(err)
			}
			got, err := w.decodeVerdict(digest, b)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(v, got, equal); diff != "" {
				t.Error(diff)
			}
		}
	})
	t.Run("token", func(t *testing.T) {
		b, err := encodeToken(noon)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := decodeToken(b); err != nil || !got.Equal(noon) {
			t.Errorf("%s, %v", got, err)
		}
	})
}

// TestVersion1 reads what version 1 wrote. Files in testdata/v1 are never changed once released; a
// later version adds its own folder.
func TestVersion1(t *testing.T) {
	var w words
	read := func(t *testing.T, name string, fresh func() ([]byte, error)) []byte {
		path := filepath.Join("testdata", "v1", name+".hex")
		if *update && fresh != nil {
			b, err := fresh()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(hex.EncodeToString(b)+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := hex.DecodeString(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	t.Run("entry", func(t *testing.T) {
		got, err := w.decodeEntry("id-1", read(t, "entry", func() ([]byte, error) { return encodeEntry(fullEntry()) }))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(fullEntry(), got, equal); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("node", func(t *testing.T) {
		want := fullNode()
		want.Parts = nil // it was written before there were any
		want.Key, want.NewKey = attestor.KeyHash{}, attestor.KeyHash{}
		got, err := w.decodeNode(agent("x509pop/1"), read(t, "node", func() ([]byte, error) { return encodeNode(want) }))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, equal); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("journal", func(t *testing.T) {
		want := fullJournal()
		want.NotAfter = noon
		want.Chain, want.UpstreamID = nil, "" // it was written before there were any
		got, err := decodeJournal("a1", read(t, "journal", func() ([]byte, error) { return encodeJournal(want) }))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("bundle", func(t *testing.T) {
		got, err := decodeBundle(other, read(t, "bundle", func() ([]byte, error) { return encodeBundle(fullBundle(t)) }))
		if err != nil {
			t.Fatal(err)
		}
		if got.Sequence != 9 || got.RefreshHint != time.Minute || !got.X509[0].Tainted || got.X509[0].Certificate.Subject.CommonName != "ca" ||
			got.JWT[0].KeyID != "k" || !got.JWT[0].ExpiresAt.Equal(noon) || !got.JWT[0].Tainted {
			t.Errorf("%+v", got)
		}
	})
	t.Run("federation", func(t *testing.T) {
		got, err := decodeFederation(other, read(t, "federation", func() ([]byte, error) { return encodeFederation(fullFederation()) }))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(fullFederation(), got, equal); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("verdict", func(t *testing.T) {
		got, err := w.decodeVerdict(digest, read(t, "verdict", func() ([]byte, error) { return encodeVerdict(fullVerdict()) }))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(fullVerdict(), got, equal); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("token", func(t *testing.T) {
		got, err := decodeToken(read(t, "token", func() ([]byte, error) { return encodeToken(noon) }))
		if err != nil || !got.Equal(noon) {
			t.Errorf("%s, %v", got, err)
		}
	})
	t.Run("fields of a later version are no error, a later version is", func(t *testing.T) {
		b := read(t, "entry", nil)
		if _, err := w.decodeEntry("id-1", append(bytes.Clone(b), 0xfa, 0x07, 1, 'x')); err != nil {
			t.Errorf("unknown field: %v", err)
		}
		b[0] = valueVersion + 1
		if _, err := w.decodeEntry("id-1", b); err == nil || !strings.Contains(err.Error(), "newer") {
			t.Errorf("later version: %v", err)
		}
	})
	t.Run("the keys have not moved", func(t *testing.T) {
		e := fullEntry()
		e.ParentID = agent("join_token/secret")
		e.Selectors = sel("spiffe_id:" + e.ParentID.String())
		for got, want := range map[string]string{
			entryKey(e.ID):                    "p/e/id-1",
			nodeKey(e.ParentID):               "p/n/spire/agent/join_token/secret",
			bundleKey(other):                  "p/b/other.test",
			federationKey(other):              "f/other.test",
			verdictKey(digest):                "p/v/" + digest,
			journalKey("a"):                   "j/a",
			tokenKey(hashToken("secret")):     "t/K7gNU3sdo-OL0wNhqoVWhr3g6s1xYv72ol_pe_Unols",
			aliasKey(e):                       "i/a/K7gNU3sdo-OL0wNhqoVWhr3g6s1xYv72ol_pe_Unols/id-1",
			entryExpiryKey(e):                 "x/001772366400/e/id-1",
			similarKey(fullEntry()):           "i/s/web:dD7XyL5kW-Xom021IOxu1Q",
			similarKeyV1(fullEntry()):         "i/s/dD7XyL5kW-Xom021IOxu1TiU5VOx4NJPCxC8F3zRo6U",
			expiryKey(noon, kindToken, "a_-"): "x/001772366400/t/a_-",
			expiryBefore(noon.Unix() + 1):     "x/001772366401/",
		} {
			if got != want {
				t.Errorf("key %q, want %q", got, want)
			}
		}
	})
}

func TestWords(t *testing.T) {
	var w words
	for i := range 3 * maxWords {
		s := strings.Repeat("x", i%300) + string(rune('a'+i%26)) + time.Duration(i).String()
		if got := w.one(s); got != s {
			t.Fatalf("one(%q) = %q", s, got)
		}
	}
	if len(w.seen) > maxWords {
		t.Errorf("%d words are kept", len(w.seen))
	}
}

// fuzz checks that no bytes make a reader panic, and that what it accepts it can write and read
// again.
func fuzz[T any](f *testing.F, seed string, dec func([]byte) (T, error), enc func(T) ([]byte, error)) {
	text, err := os.ReadFile(filepath.Join("testdata", "v1", seed+".hex"))
	if err != nil {
		f.Fatal(err)
	}
	b, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Add([]byte{})
	f.Add([]byte{valueVersion})
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := dec(b)
		if err != nil {
			return
		}
		first, err := enc(v)
		if err != nil {
			t.Fatalf("encode %+v: %v", v, err)
		}
		if v, err = dec(first); err != nil {
			t.Fatalf("decode what was encoded: %v", err)
		}
		if second, err := enc(v); err != nil || !bytes.Equal(first, second) {
			t.Fatalf("encoded to %x, then to %x, %v", first, second, err)
		}
	})
}

func FuzzDecodeEntry(f *testing.F) {
	var w words
	fuzz(f, "entry", func(b []byte) (*identity.Entry, error) { return w.decodeEntry("id", b) }, encodeEntry)
}

func FuzzDecodeNode(f *testing.F) {
	var w words
	fuzz(f, "node", func(b []byte) (*Node, error) { return w.decodeNode(agent("a"), b) }, encodeNode)
}

func FuzzDecodeBundle(f *testing.F) {
	fuzz(f, "bundle", func(b []byte) (*identity.Bundle, error) { return decodeBundle(other, b) }, encodeBundle)
}

func FuzzDecodeFederation(f *testing.F) {
	fuzz(f, "federation", func(b []byte) (*Federation, error) { return decodeFederation(other, b) }, encodeFederation)
}

func FuzzDecodeVerdict(f *testing.F) {
	var w words
	fuzz(f, "verdict", func(b []byte) (*Verdict, error) { return w.decodeVerdict(digest, b) }, encodeVerdict)
}

func FuzzDecodeJournal(f *testing.F) {
	fuzz(f, "journal", func(b []byte) (Journal, error) { return decodeJournal("a", b) }, encodeJournal)
}

func FuzzDecodeToken(f *testing.F) { fuzz(f, "token", decodeToken, encodeToken) }

func FuzzParseExpiryKey(f *testing.F) {
	f.Add("x/001772366400/e/id-1")
	f.Add("x//")
	f.Fuzz(func(t *testing.T, key string) {
		at, kind, id, err := parseExpiryKey(key)
		if err != nil || at < 0 || at > 1<<40 || strings.Contains(kind, "/") {
			return
		}
		again, k, i, err := parseExpiryKey(expiryKey(time.Unix(at, 0), kind, id))
		if err != nil || again != at || k != kind || i != id {
			t.Errorf("%q: %d %q %q, %v", key, again, k, i, err)
		}
	})
}
