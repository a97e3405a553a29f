package workloadapi

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"hash"
	"maps"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi/identity"
)

// forger makes tokens with whatever is wrong with them.
type forger struct {
	t      *testing.T
	p256   *ecdsa.PrivateKey
	p384   *ecdsa.PrivateKey
	rsa    *rsa.PrivateKey
	bundle []*identity.Bundle
}

func newForger(t *testing.T) *forger {
	t.Helper()
	f := &forger{t: t}
	var err error
	if f.p256, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	if f.p384, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	if f.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	f.bundle = []*identity.Bundle{{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
		JWT:         []identity.JWTAuthority{{KeyID: "p256", Key: f.p256.Public()}, {KeyID: "p384", Key: f.p384.Public()}, {KeyID: "rsa", Key: f.rsa.Public()}},
	}, {
		TrustDomain: spiffeid.RequireTrustDomainFromString("other.test"),
		JWT:         []identity.JWTAuthority{{KeyID: "theirs", Key: f.p384.Public()}},
	}}
	return f
}

type fields map[string]any

// with returns the fields with some changed; a nil value takes one away.
func (f fields) with(change fields) fields {
	out := maps.Clone(f)
	for k, v := range change {
		if out[k] = v; v == nil {
			delete(out, k)
		}
	}
	return out
}

func segment(t *testing.T, v any) string {
	t.Helper()
	raw, ok := v.([]byte)
	if !ok {
		var err error
		if raw, err = json.Marshal(v); err != nil {
			t.Fatal(err)
		}
	}
	return base64.RawURLEncoding.EncodeToString(raw)
}

// es signs as ES256 and its like do.
func (f *forger) es(key *ecdsa.PrivateKey, digest hash.Hash) func([]byte) []byte {
	return func(input []byte) []byte {
		digest.Write(input)
		r, s, err := ecdsa.Sign(rand.Reader, key, digest.Sum(nil))
		if err != nil {
			f.t.Fatal(err)
		}
		size := (key.Params().BitSize + 7) / 8
		return append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
	}
}

func (f *forger) mac(secret []byte) func([]byte) []byte {
	return func(input []byte) []byte {
		m := hmac.New(sha256.New, secret)
		m.Write(input)
		return m.Sum(nil)
	}
}

func (f *forger) rs(input []byte) []byte {
	sum := sha256.Sum256(input)
	sig, err := rsa.SignPKCS1v15(rand.Reader, f.rsa, crypto.SHA256, sum[:])
	if err != nil {
		f.t.Fatal(err)
	}
	return sig
}

func (f *forger) token(head, claims any, sign func([]byte) []byte) string {
	input := segment(f.t, head) + "." + segment(f.t, claims)
	return input + "." + base64.RawURLEncoding.EncodeToString(sign([]byte(input)))
}

func TestTokensByTheLetter(t *testing.T) {
	f := newForger(t)
	s := &Server{foreign: map[string]bool{"sub": true, "aud": true, "exp": true}}
	now := time.Now().Unix()
	head := fields{"alg": "ES256", "kid": "p256", "typ": "JWT"}
	claims := fields{"sub": "spiffe://example.org/w", "aud": []string{"a"}, "exp": now + 60, "iat": now - 1}
	es256 := func() func([]byte) []byte { return f.es(f.p256, sha256.New()) }
	constant := func(sig []byte) func([]byte) []byte { return func([]byte) []byte { return sig } }
	pkix, err := x509.MarshalPKIXPublicKey(f.p256.Public())
	if err != nil {
		t.Fatal(err)
	}
	rsaPKIX, err := x509.MarshalPKIXPublicKey(f.rsa.Public())
	if err != nil {
		t.Fatal(err)
	}
	pemKey := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: rsaPKIX})
	order := f.p256.Params().N
	good := f.token(head, claims, es256())
	part := strings.Split(good, ".")

	for _, c := range []struct{ name, token string }{
		{"one that is good", good},
		{"one without typ", f.token(head.with(fields{"typ": nil}), claims, es256())},
		{"typ JOSE", f.token(head.with(fields{"typ": "JOSE"}), claims, es256())},
		{"RS256", f.token(fields{"alg": "RS256", "kid": "rsa"}, claims, f.rs)},
		{"ES384 with its own curve", f.token(fields{"alg": "ES384", "kid": "p384"}, claims, f.es(f.p384, sha512.New384()))},
		{"one of another trust domain by its own key", f.token(fields{"alg": "ES384", "kid": "theirs"}, claims.with(fields{"sub": "spiffe://other.test/w"}), f.es(f.p384, sha512.New384()))},
		{"a single audience as text", f.token(head, claims.with(fields{"aud": "a"}), es256())},
	} {
		t.Run(c.name+" is taken", func(t *testing.T) {
			if _, err := s.verify(c.token, "a", f.bundle); err != nil {
				t.Error(err)
			}
		})
	}

	for _, c := range []struct{ name, token string }{
		{"alg none without a signature", segment(t, fields{"alg": "none", "kid": "p256"}) + "." + part[1] + "."},
		{"alg None in other letters", segment(t, fields{"alg": "nOnE", "kid": "p256"}) + "." + part[1] + "."},
		{"alg none with a signature", segment(t, fields{"alg": "none", "kid": "p256"}) + "." + part[1] + "." + part[2]},
		{"no alg", f.token(head.with(fields{"alg": nil}), claims, es256())},
		{"HS256 keyed with the public key's DER", f.token(fields{"alg": "HS256", "kid": "p256"}, claims, f.mac(pkix))},
		{"HS256 keyed with the public key's PEM", f.token(fields{"alg": "HS256", "kid": "rsa"}, claims, f.mac(pemKey))},
		{"HS256 keyed with the RSA modulus", f.token(fields{"alg": "HS256", "kid": "rsa"}, claims, f.mac(f.rsa.N.Bytes()))},
		{"HS256 keyed with nothing", f.token(fields{"alg": "HS256", "kid": "p256"}, claims, f.mac(nil))},
		{"EdDSA", f.token(head.with(fields{"alg": "EdDSA"}), claims, constant(make([]byte, 64)))},
		{"ES256K", f.token(head.with(fields{"alg": "ES256K"}), claims, es256())},
		{"a signature of zeros", f.token(head, claims, constant(make([]byte, 64)))},
		{"a signature with r zero", f.token(head, claims, constant(append(make([]byte, 32), big.NewInt(1).FillBytes(make([]byte, 32))...)))},
		{"a signature with s zero", f.token(head, claims, constant(append(big.NewInt(1).FillBytes(make([]byte, 32)), make([]byte, 32)...)))},
		{"a signature with r and s the order", f.token(head, claims, constant(append(order.Bytes(), order.Bytes()...)))},
		{"an empty signature", part[0] + "." + part[1] + "."},
		{"a short signature", f.token(head, claims, constant(make([]byte, 63)))},
		{"a long signature", f.token(head, claims, constant(make([]byte, 1<<15)))},
		{"another token's signature", f.token(head, claims.with(fields{"sub": "spiffe://example.org/admin"}), constant(decode(t, part[2])))},
		{"RS256 with an ECDSA key", f.token(head.with(fields{"alg": "RS256"}), claims, f.rs)},
		{"ES256 with an RSA key", f.token(head.with(fields{"kid": "rsa"}), claims, es256())},
		{"ES256 with a P-384 key", f.token(fields{"alg": "ES256", "kid": "p384"}, claims, func(input []byte) []byte {
			sum := sha256.Sum256(input)
			r, s, err := ecdsa.Sign(rand.Reader, f.p384, sum[:])
			if err != nil {
				t.Fatal(err)
			}
			// Cut to P-256's size, so that nothing but the curve is wrong with the form.
			return append(new(big.Int).Rsh(r, 128).FillBytes(make([]byte, 32)), new(big.Int).Rsh(s, 128).FillBytes(make([]byte, 32))...)
		})},
		// A signature that holds, in the form of the algorithm that it says it is: the curve alone is wrong.
		{"ES384 with a P-256 key", f.token(fields{"alg": "ES384", "kid": "p256"}, claims, func(input []byte) []byte {
			sum := sha512.Sum384(input)
			r, s, err := ecdsa.Sign(rand.Reader, f.p256, sum[:])
			if err != nil {
				t.Fatal(err)
			}
			return append(r.FillBytes(make([]byte, 48)), s.FillBytes(make([]byte, 48))...)
		})},
		{"RS256 signed as PS256 says", f.token(fields{"alg": "PS256", "kid": "rsa"}, claims, f.rs)},

		{"typ at+jwt", f.token(head.with(fields{"typ": "at+jwt"}), claims, es256())},
		{"typ in small letters", f.token(head.with(fields{"typ": "jwt"}), claims, es256())},
		{"typ empty", f.token(head.with(fields{"typ": ""}), claims, es256())},
		{"typ a number", f.token(head.with(fields{"typ": 1}), claims, es256())},
		{"no kid", f.token(head.with(fields{"kid": nil}), claims, es256())},
		{"an empty kid", f.token(head.with(fields{"kid": ""}), claims, es256())},
		{"an unknown kid", f.token(head.with(fields{"kid": "x"}), claims, es256())},
		{"the kid of another trust domain", f.token(fields{"alg": "ES384", "kid": "theirs"}, claims, f.es(f.p384, sha512.New384()))},
		{"a key of its own", f.token(head.with(fields{"jwk": fields{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}}), claims, es256())},
		{"a URL of keys", f.token(head.with(fields{"jku": "https://evil.test/keys"}), claims, es256())},
		{"a certificate", f.token(head.with(fields{"x5c": []string{"AA"}}), claims, es256())},
		{"a URL of certificates", f.token(head.with(fields{"x5u": "https://evil.test/c"}), claims, es256())},
		{"a critical header", f.token(head.with(fields{"crit": []string{"exp"}, "exp": 1}), claims, es256())},
		{"a payload that is not encoded", f.token(head.with(fields{"b64": false, "crit": []string{"b64"}}), claims, es256())},
		{"a content type", f.token(head.with(fields{"cty": "JWT"}), claims, es256())},
		{"a private header", f.token(head.with(fields{"x": 1}), claims, es256())},
		{"a header twice", f.token([]byte(`{"alg":"ES256","alg":"none","kid":"p256"}`), claims, es256())},
		{"a header that is a list", f.token([]byte(`["ES256"]`), claims, es256())},
		{"a header that is nothing", f.token([]byte(`null`), claims, es256())},

		{"no sub", f.token(head, claims.with(fields{"sub": nil}), es256())},
		{"a sub that is no SPIFFE ID", f.token(head, claims.with(fields{"sub": "admin"}), es256())},
		{"a sub with a query", f.token(head, claims.with(fields{"sub": "spiffe://example.org/w?x"}), es256())},
		{"a sub of more than 2048 bytes", f.token(head, claims.with(fields{"sub": "spiffe://example.org/" + strings.Repeat("a", 2048)}), es256())},
		{"a sub of another trust domain by our key", f.token(head, claims.with(fields{"sub": "spiffe://other.test/w"}), es256())},
		{"a sub of a trust domain nobody knows", f.token(head, claims.with(fields{"sub": "spiffe://nobody.test/w"}), es256())},
		{"a claim twice", f.token(head, []byte(`{"sub":"spiffe://example.org/w","sub":"spiffe://example.org/v","aud":"a","exp":99999999999}`), es256())},
		{"no exp", f.token(head, claims.with(fields{"exp": nil}), es256())},
		{"an exp that is past by more than clocks differ", f.token(head, claims.with(fields{"exp": now - 120}), es256())},
		{"an exp that is text", f.token(head, claims.with(fields{"exp": "never"}), es256())},
		{"an exp of zero", f.token(head, claims.with(fields{"exp": 0}), es256())},
		{"an exp below zero", f.token(head, claims.with(fields{"exp": -1}), es256())},
		{"an nbf in the future", f.token(head, claims.with(fields{"nbf": now + 3600}), es256())},
		{"an iat in the future", f.token(head, claims.with(fields{"iat": now + 3600}), es256())},
		{"no aud", f.token(head, claims.with(fields{"aud": nil}), es256())},
		{"an empty aud", f.token(head, claims.with(fields{"aud": []string{}}), es256())},
		{"another aud", f.token(head, claims.with(fields{"aud": []string{"b", "A", "a "}}), es256())},

		{"JSON serialization", `{"payload":"` + part[1] + `","protected":"` + part[0] + `","signature":"` + part[2] + `"}`},
		{"a segment more", good + "." + part[2]},
		{"a segment less", part[0] + "." + part[1]},
		{"padding", part[0] + "=." + part[1] + "." + part[2]},
		{"bits after the end", part[0][:len(part[0])-1] + "_." + part[1] + "." + part[2]},
		{"white space", " " + good},
		{"a line break", part[0] + "\n." + part[1] + "." + part[2]},
		{"an encrypted token", segment(t, fields{"alg": "dir", "enc": "A128GCM"}) + "..a.b.c"},
		{"nothing", ""},
		{"dots", ".."},
	} {
		t.Run(c.name+" is refused", func(t *testing.T) {
			resp, err := s.verify(c.token, "a", f.bundle)
			if _, ok := err.(invalid); !ok { //nolint:errorlint // it is what the caller is told
				t.Errorf("got %v, %v", resp, err)
			}
		})
	}
}

// TestAlgorithmIsItsKeys is about what the libraries below refuse too, so that no token shows whether we do.
func TestAlgorithmIsItsKeys(t *testing.T) {
	f := newForger(t)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	own := f.bundle[0]
	own.JWT = append(own.JWT, identity.JWTAuthority{KeyID: "weak", Key: weak.Public()}, identity.JWTAuthority{KeyID: "p521", Key: p521.Public()})
	for _, c := range []struct {
		head joseHeader
		td   spiffeid.TrustDomain
		want string // empty: it fits
	}{
		{joseHeader{"ES256", "p256"}, own.TrustDomain, ""},
		{joseHeader{"ES384", "p384"}, own.TrustDomain, ""},
		{joseHeader{"ES512", "p521"}, own.TrustDomain, ""},
		{joseHeader{"RS256", "rsa"}, own.TrustDomain, ""},
		{joseHeader{"ES384", "theirs"}, f.bundle[1].TrustDomain, ""},
		{joseHeader{"ES384", "p256"}, own.TrustDomain, "algorithm is not its key's"},
		{joseHeader{"ES512", "p256"}, own.TrustDomain, "algorithm is not its key's"},
		{joseHeader{"ES256", "p384"}, own.TrustDomain, "algorithm is not its key's"},
		{joseHeader{"ES256", "p521"}, own.TrustDomain, "algorithm is not its key's"},
		{joseHeader{"RS256", "p256"}, own.TrustDomain, "algorithm is not its key's"},
		{joseHeader{"none", "p256"}, own.TrustDomain, "algorithm is not its key's"},
		{joseHeader{"RS256", "weak"}, own.TrustDomain, "1024"},
		{joseHeader{"ES384", "theirs"}, own.TrustDomain, "not known"},
		{joseHeader{"ES256", "p256"}, f.bundle[1].TrustDomain, "not known"},
		{joseHeader{"ES256", "nobody's"}, own.TrustDomain, "not known"},
	} {
		t.Run(c.head.Algorithm+" with the key "+c.head.KeyID+" of "+c.td.Name(), func(t *testing.T) {
			err := c.head.fits(f.bundle, c.td)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func decode(t *testing.T, text string) []byte {
	t.Helper()
	raw, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
