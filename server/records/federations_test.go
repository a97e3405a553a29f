package records

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/store/kv"
)

func TestFederations(t *testing.T) {
	r, _ := open(t)
	ctx := t.Context()
	third := spiffeid.RequireTrustDomainFromString("third.test")
	begin, err := r.CreateFederation(ctx, fullFederation())
	if err != nil {
		t.Fatal(err)
	}
	t.Run("one is created once", func(t *testing.T) {
		if _, err := r.CreateFederation(ctx, fullFederation()); !errors.Is(err, ErrExists) {
			t.Errorf("again: %v", err)
		}
		got, err := r.Federation(ctx, other)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(fullFederation(), got, equal); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("there is none with oneself", func(t *testing.T) {
		for _, td := range []spiffeid.TrustDomain{domain, {}} {
			if _, err := r.CreateFederation(ctx, &Federation{TrustDomain: td, URL: "https://a"}); err == nil {
				t.Errorf("%q was created", td.Name())
			}
		}
	})
	t.Run("what does not change is not written", func(t *testing.T) {
		_, rev, err := r.UpdateFederation(ctx, other, func(*Federation) error { return nil })
		if err != nil || rev != begin {
			t.Errorf("revision %d, %v, want %d", rev, err, begin)
		}
	})
	t.Run("a change is seen by who follows", func(t *testing.T) {
		_, rev, err := r.UpdateFederation(ctx, other, func(f *Federation) error {
			f.URL, f.EndpointID = "https://new.test", spiffeid.ID{}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		stop := errors.New("stop")
		if err := r.FollowFederations(ctx, begin, func(at kv.Rev) error {
			if at != rev {
				t.Errorf("change at %d, want %d", at, rev)
			}
			return stop
		}); !errors.Is(err, stop) {
			t.Error(err)
		}
	})
	t.Run("all are listed by name", func(t *testing.T) {
		if _, err := r.CreateFederation(ctx, &Federation{TrustDomain: third, URL: "https://third.test"}); err != nil {
			t.Fatal(err)
		}
		all, _, err := r.Federations(ctx)
		if err != nil || len(all) != 2 || all[0].TrustDomain != other || all[0].URL != "https://new.test" || all[1].TrustDomain != third {
			t.Errorf("%v, %v", all, err)
		}
	})
	t.Run("none that is not there can be changed or deleted", func(t *testing.T) {
		if _, err := r.DeleteFederation(ctx, third); err != nil {
			t.Fatal(err)
		}
		if _, err := r.DeleteFederation(ctx, third); !errors.Is(err, ErrNotFound) {
			t.Errorf("delete: %v", err)
		}
		if _, _, err := r.UpdateFederation(ctx, third, func(*Federation) error { return nil }); !errors.Is(err, ErrNotFound) {
			t.Errorf("update: %v", err)
		}
		if _, err := r.Federation(ctx, third); !errors.Is(err, ErrNotFound) {
			t.Errorf("read: %v", err)
		}
	})
}

func TestFederationsThatAreNone(t *testing.T) {
	server := spiffeid.RequireFromPath(other, "/spire/server")
	for name, c := range map[string]struct {
		f    Federation
		says string // empty: it is one
	}{
		"https_web":             {Federation{URL: "https://other.test/bundle"}, ""},
		"https_spiffe":          {Federation{URL: "https://192.0.2.1:8443", EndpointID: server}, ""},
		"a URL as long as any":  {Federation{URL: "https://a/" + strings.Repeat("x", maxURL-10)}, ""},
		"a URL without end":     {Federation{URL: "https://a/" + strings.Repeat("x", maxURL-9)}, "the limit is"},
		"no URL":                {Federation{}, "is missing"},
		"a URL that is none":    {Federation{URL: "https://a b/%"}, "malformed"},
		"no TLS":                {Federation{URL: "http://other.test"}, "https scheme"},
		"a file":                {Federation{URL: "file:///etc/passwd"}, "https scheme"},
		"no host":               {Federation{URL: "https:///bundle"}, "specify the host"},
		"a port without a host": {Federation{URL: "https://:8443/bundle"}, "specify the host"},
		"a user":                {Federation{URL: "https://me@other.test"}, "user info"},
		"a password":            {Federation{URL: "https://me:secret@other.test"}, "user info"},
		"a fragment":            {Federation{URL: "https://other.test/#x"}, "fragment"},
		"an ID without a path":  {Federation{URL: "https://other.test", EndpointID: other.ID()}, "has no path"},
	} {
		c.f.TrustDomain = other
		err := c.f.Check()
		if (err == nil) != (c.says == "") || err != nil && (!strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "secret")) {
			t.Errorf("%s: error is %v, want %q", name, err, c.says)
		}
	}
}
