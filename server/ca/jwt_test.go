package ca

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/assay-id/assay/server/ca/keys"
)

// parts returns header and claims of a token as they were written.
func parts(t *testing.T, token string) (header, claims map[string]any) {
	t.Helper()
	fields := strings.Split(token, ".")
	if len(fields) != 3 {
		t.Fatalf("token has %d parts", len(fields))
	}
	for i, into := range []*map[string]any{&header, &claims} {
		text, err := base64.RawURLEncoding.DecodeString(fields[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(text, into); err != nil {
			t.Fatal(err)
		}
	}
	return header, claims
}

func TestSignJWT(t *testing.T) {
	ctx := t.Context()

	t.Run("a token has the header and claims of a JWT-SVID and no others", func(t *testing.T) {
		c, store := open(t, Config{Now: func() time.Time { return epoch.Add(300 * time.Millisecond) }})
		svid, err := c.SignJWT(ctx, JWTParams{ID: workload, Audience: []string{"b", "", "a", "b"}})
		if err != nil {
			t.Fatal(err)
		}
		header, claims := parts(t, svid.Token)
		kid := store.held().JWT[0].KeyID
		if diff := cmp.Diff(map[string]any{"alg": "ES256", "kid": kid, "typ": "JWT"}, header); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(map[string]any{
			"sub": workload.String(), "aud": []any{"b", "a", "b"}, "iat": float64(epoch.Unix()), "exp": float64(epoch.Add(5 * time.Minute).Unix()),
		}, claims); diff != "" {
			t.Error(diff)
		}
		if svid.ID != workload || !svid.IssuedAt.Equal(epoch) || !svid.ExpiresAt.Equal(epoch.Add(5*time.Minute)) {
			t.Errorf("result %+v", svid)
		}
		if len(kid) != 32 || len(c.x509.Load().line.AuthorityID) != 40 {
			t.Errorf("authority IDs %q and %q", kid, c.x509.Load().line.AuthorityID)
		}
	})

	t.Run("an audience of one is an array too, and issuer and ID are there when asked for", func(t *testing.T) {
		c, _ := open(t, Config{JWTIssuer: "https://example.org"})
		seen := map[any]bool{}
		for range 5 {
			svid, err := c.SignJWT(ctx, JWTParams{ID: workload, Audience: []string{"<a&b>"}, JTI: true})
			if err != nil {
				t.Fatal(err)
			}
			_, claims := parts(t, svid.Token)
			if !cmp.Equal(claims["aud"], []any{"<a&b>"}) || claims["iss"] != "https://example.org" {
				t.Errorf("claims %v", claims)
			}
			id, err := base64.RawURLEncoding.DecodeString(claims["jti"].(string))
			if err != nil || len(id) != 16 || id[6]>>4 != 4 || id[8]>>6 != 2 {
				t.Errorf("jti %v is no random UUID: %v", claims["jti"], err)
			}
			seen[claims["jti"]] = true
		}
		if len(seen) != 5 {
			t.Errorf("%d IDs for 5 tokens", len(seen))
		}
	})

	for kind, alg := range map[keys.Kind]jose.SignatureAlgorithm{keys.EC256: jose.ES256, keys.EC384: jose.ES384, keys.RSA2048: jose.RS256} {
		t.Run("other libraries verify tokens of a key of type "+string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, store := open(t, Config{JWTKeyType: kind, Now: time.Now})
				for range 60 { // some signatures have leading zeroes
					svid, err := c.SignJWT(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}})
					if err != nil {
						t.Fatal(err)
					}
					parsed, err := jwtsvid.ParseAndValidate(svid.Token, jwtSource(store.held()), []string{"a"})
					if err != nil {
						t.Fatal(err)
					}
					if parsed.ID != workload || !parsed.Expiry.Equal(svid.ExpiresAt) {
						t.Errorf("parsed as %+v", parsed)
					}
					token, err := jwt.ParseSigned(svid.Token, []jose.SignatureAlgorithm{alg})
					if err != nil {
						t.Fatal(err)
					}
					if err := token.Claims(store.held().JWT[0].Key, &jwt.Claims{}); err != nil {
						t.Fatal(err)
					}
					if kind == keys.RSA2048 {
						break
					}
				}
				svid, err := c.SignJWT(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := jwtsvid.ParseAndValidate(svid.Token, jwtSource(store.held()), []string{"b"}); err == nil {
					t.Error("valid for another audience")
				}
				i := strings.LastIndexByte(svid.Token, '.') + 5
				forged := svid.Token[:i] + string(rune('A'+(svid.Token[i]-'A'+1)%26)) + svid.Token[i+1:]
				if _, err := jwtsvid.ParseAndValidate(forged, jwtSource(store.held()), []string{"a"}); err == nil {
					t.Error("valid with another signature")
				}
			})
		})
	}

	t.Run("a token ends with its authority", func(t *testing.T) {
		c, _ := open(t, Config{})
		for _, ttl := range []time.Duration{25 * time.Hour, 1 << 62} {
			svid, err := c.SignJWT(ctx, JWTParams{ID: workload, Audience: []string{"a"}, TTL: ttl})
			if err != nil {
				t.Fatal(err)
			}
			if !svid.ExpiresAt.Equal(epoch.Add(24 * time.Hour)) {
				t.Errorf("TTL %s: until %s", ttl, svid.ExpiresAt)
			}
		}
	})

	t.Run("what must not be signed is not", func(t *testing.T) {
		c, _ := open(t, Config{})
		for name, test := range map[string]struct {
			err    error
			params JWTParams
		}{
			"no audience":         {ErrAudience, JWTParams{ID: workload}},
			"an empty audience":   {ErrAudience, JWTParams{ID: workload, Audience: []string{"", ""}}},
			"a broken audience":   {ErrAudience, JWTParams{ID: workload, Audience: []string{"a\xff"}}},
			"too many audiences":  {ErrAudience, JWTParams{ID: workload, Audience: slices.Repeat([]string{"a"}, MaxAudiences+1)}},
			"too long audiences":  {ErrAudience, JWTParams{ID: workload, Audience: []string{strings.Repeat("a", MaxAudienceBytes+1)}}},
			"no ID":               {ErrID, JWTParams{Audience: []string{"a"}}},
			"a foreign ID":        {ErrID, JWTParams{ID: spiffeid.RequireFromString("spiffe://other.org/a"), Audience: []string{"a"}}},
			"the trust domain":    {ErrID, JWTParams{ID: testTD.ID(), Audience: []string{"a"}}},
			"the server's ID":     {ErrID, JWTParams{ID: spiffeid.RequireFromPath(testTD, serverPath), Audience: []string{"a"}}},
			"a negative lifetime": {ErrTTL, JWTParams{ID: workload, Audience: []string{"a"}, TTL: -1}},
			"a tiny lifetime":     {ErrTTL, JWTParams{ID: workload, Audience: []string{"a"}, TTL: 1}},
		} {
			if _, err := c.SignJWT(ctx, test.params); !errors.Is(err, test.err) {
				t.Errorf("%s: got %v", name, err)
			}
		}
	})

	t.Run("a signature that is none is found out", func(t *testing.T) {
		for name, der := range map[string][]byte{
			"empty": nil, "text": []byte("signature"), "negative": {0x30, 6, 2, 1, 0xff, 2, 1, 1},
			"zero": {0x30, 6, 2, 1, 0, 2, 1, 1}, "trailing": {0x30, 6, 2, 1, 1, 2, 1, 1, 0},
		} {
			if _, err := fixedWidth(der, 32); err == nil {
				t.Errorf("%s was taken", name)
			}
		}
		got, err := fixedWidth([]byte{0x30, 6, 2, 1, 7, 2, 1, 9}, 32)
		if err != nil || len(got) != 64 || new(big.Int).SetBytes(got[:32]).Int64() != 7 || got[63] != 9 {
			t.Errorf("short numbers became %x, %v", got, err)
		}
	})
}

func TestJWTProfiles(t *testing.T) {
	ctx := t.Context()
	c, _ := open(t, Config{JWTIssuer: "https://own.example.org", JWTProfiles: []JWTProfile{
		{Name: "login", Audiences: []string{"login", "login/token"}, IDs: []string{workload.String()}, SubjectIssues: true, JTI: true, AudienceAsText: true},
		{Name: "below", Audiences: []string{"login"}, IDs: []string{"spiffe://" + workload.TrustDomain().Name() + "/batch/*"}, Issuer: "https://batch.example.org"},
	}})
	batch := spiffeid.RequireFromPath(workload.TrustDomain(), "/batch/one")
	batches := spiffeid.RequireFromPath(workload.TrustDomain(), "/batches")
	for _, test := range []struct {
		what     string
		id       spiffeid.ID
		audience []string
		issuer   string
		jti      bool
		aud      any
	}{
		{"its audience and ID", workload, []string{"login"}, workload.String(), true, "login"},
		{"several of its audiences", workload, []string{"login", "login/token"}, workload.String(), true, []any{"login", "login/token"}},
		{"not if it is for others too", workload, []string{"login", "api"}, "https://own.example.org", false, []any{"login", "api"}},
		{"not for another audience", workload, []string{"api"}, "https://own.example.org", false, []any{"api"}},
		{"all below a path", batch, []string{"login"}, "https://batch.example.org", false, []any{"login"}},
		{"not beside it", batches, []string{"login"}, "https://own.example.org", false, []any{"login"}},
	} {
		t.Run("a profile is for "+test.what, func(t *testing.T) {
			seen := map[any]bool{}
			for range 2 {
				svid, err := c.SignJWT(ctx, JWTParams{ID: test.id, Audience: test.audience})
				if err != nil {
					t.Fatal(err)
				}
				_, claims := parts(t, svid.Token)
				id, has := claims["jti"]
				if claims["iss"] != test.issuer || has != test.jti || has && seen[id] {
					t.Errorf("it says %v", claims)
				}
				seen[id] = true
				if diff := cmp.Diff(test.aud, claims["aud"]); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
}
