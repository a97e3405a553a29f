package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
)

func TestSignWIT(t *testing.T) {
	ctx := t.Context()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c, store := open(t, Config{WIT: true, WITIssuer: "https://issuer.example.org", Now: time.Now})

	t.Run("a token names the key, and verifies by the bundle", func(t *testing.T) {
		svid, err := c.SignWIT(ctx, WITParams{ID: workload, PublicKey: key.Public(), Algorithm: "ES256", TTL: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		header, claims := parts(t, svid.Token)
		if header["typ"] != "wit+jwt" || header["kid"] != store.held().WIT[0].KeyID || len(header) != 3 {
			t.Errorf("its header is %v", header)
		}
		if _, has := claims["aud"]; has || claims["iss"] != "https://issuer.example.org" || claims["exp"].(float64)-claims["iat"].(float64) > 60 {
			t.Errorf("it says %v", claims)
		}
		keys := map[string]crypto.PublicKey{}
		for _, a := range store.held().WIT {
			keys[a.KeyID] = a.Key
		}
		parsed, err := witsvid.ParseAndValidate(svid.Token, witbundle.FromWITAuthorities(workload.TrustDomain(), keys))
		if err != nil {
			t.Fatal(err)
		}
		if parsed.ID != workload || !key.PublicKey.Equal(parsed.PublicKey) {
			t.Errorf("it is of %s", parsed.ID)
		}
		for _, a := range store.held().JWT {
			if a.KeyID == header["kid"] {
				t.Error("the key verifies JWT-SVIDs too")
			}
		}
	})
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	large, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]WITParams{
		"a weak key":                 {ID: workload, PublicKey: small.Public(), Algorithm: "RS256"},
		"another kind's algorithm":   {ID: workload, PublicKey: key.Public(), Algorithm: "RS256"},
		"another curve's":            {ID: workload, PublicKey: key.Public(), Algorithm: "ES384"},
		"no algorithm":               {ID: workload, PublicKey: key.Public()},
		"none":                       {ID: workload, PublicKey: key.Public(), Algorithm: "none"},
		"none of an RSA key":         {ID: workload, PublicKey: large.Public(), Algorithm: "none"},
		"a symmetric one of RSA":     {ID: workload, PublicKey: large.Public(), Algorithm: "HS256"},
		"a curve's of an RSA key":    {ID: workload, PublicKey: large.Public(), Algorithm: "ES256"},
		"no algorithm of an RSA key": {ID: workload, PublicKey: large.Public()},
		"a symmetric one":            {ID: workload, PublicKey: key.Public(), Algorithm: "HS256"},
		"no key":                     {ID: workload, Algorithm: "ES256"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			if _, err := c.SignWIT(ctx, p); !errors.Is(err, ErrKey) {
				t.Errorf("it says %v", err)
			}
		})
	}
	t.Run("a server that was not told to signs none, and publishes no authority", func(t *testing.T) {
		c, store := open(t, Config{})
		if _, err := c.SignWIT(ctx, WITParams{ID: workload, PublicKey: key.Public(), Algorithm: "ES256"}); !errors.Is(err, ErrNoWIT) {
			t.Errorf("it says %v", err)
		}
		if n := len(store.held().WIT); n != 0 {
			t.Errorf("there are %d", n)
		}
	})
	t.Run("an authority is replaced by force", func(t *testing.T) {
		before := c.current(KindWIT).line.AuthorityID
		next, _, err := c.PrepareAuthority(ctx, KindWIT)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.ActivateAuthority(ctx, KindWIT, next.AuthorityID); err != nil {
			t.Fatal(err)
		}
		if _, _, err := c.TaintAuthority(ctx, KindWIT, before); err != nil {
			t.Fatal(err)
		}
		if _, _, err := c.RevokeAuthority(ctx, KindWIT, before); err != nil {
			t.Fatal(err)
		}
		if held := store.held().WIT; len(held) != 1 || held[0].KeyID != next.AuthorityID {
			t.Errorf("the bundle has %v", held)
		}
	})
}
