package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log" //nolint:depguard // what the registry of these tests writes to
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// site is a registry with an image for two platforms.
type site struct {
	host       string
	asked      atomic.Int32 // requests that came in
	index      string
	manifests  map[string]string // by platform
	configs    map[string]string
	repository string
}

func newSite(t *testing.T, before func(w http.ResponseWriter, r *http.Request) bool) *site {
	t.Helper()
	s := &site{manifests: map[string]string{}, configs: map[string]string{}}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	pushed := false
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		if pushed && before != nil && before(w, r) {
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	s.host = strings.TrimPrefix(server.URL, "http://")
	s.repository = s.host + "/team/shop"
	ref, err := name.NewTag(s.repository+":latest", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	idx := mutate.IndexMediaType(emptyIndex(t), "application/vnd.oci.image.index.v1+json")
	for _, arch := range []string{"amd64", "arm64"} {
		img, err := random.Image(64, 1)
		if err != nil {
			t.Fatal(err)
		}
		file, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		file = file.DeepCopy()
		file.OS, file.Architecture = "linux", arch
		if img, err = mutate.ConfigFile(img, file); err != nil {
			t.Fatal(err)
		}
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		digest, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		config, err := img.ConfigName()
		if err != nil {
			t.Fatal(err)
		}
		s.manifests["linux/"+arch], s.configs["linux/"+arch] = digest.String(), config.String()
	}
	if err := remote.WriteIndex(ref, idx); err != nil {
		t.Fatal(err)
	}
	digest, err := idx.Digest()
	if err != nil {
		t.Fatal(err)
	}
	s.index = digest.String()
	s.asked.Store(0)
	pushed = true
	return s
}

// emptyIndex is an index without manifests.
func emptyIndex(t *testing.T) v1.ImageIndex {
	t.Helper()
	idx, err := random.Index(1, 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	return idx
}

func (s *site) fetcher(t *testing.T, change ...func(*Config)) *Fetcher {
	t.Helper()
	cfg := Config{Registries: []string{s.host}, Plain: []string{s.host}, AllowPrivate: true}
	for _, f := range change {
		f(&cfg)
	}
	f, err := NewFetcher(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// prove fetches a digest and says what it leads to.
func (s *site) prove(t *testing.T, f *Fetcher, digest string) Proved {
	t.Helper()
	content, err := f.Fetch(t.Context(), s.repository, digest)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Prove(digest, content)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestIndexOfTwoPlatforms(t *testing.T) {
	s := newSite(t, nil)
	f := s.fetcher(t)
	got := map[string]string{}
	for _, m := range s.prove(t, f, s.index).Manifests {
		if m.Digest != s.manifests[m.Platform] {
			t.Errorf("%s is %s, want %s", m.Platform, m.Digest, s.manifests[m.Platform])
		}
		got[m.Platform] = s.prove(t, f, m.Digest).Config
	}
	if diff := cmp.Diff(s.configs, got); diff != "" {
		t.Error(diff)
	}
}

func TestCache(t *testing.T) {
	s := newSite(t, nil)
	dir := filepath.Join(t.TempDir(), "blobs")
	fetch := func(t *testing.T) {
		t.Helper()
		s.prove(t, s.fetcher(t, func(c *Config) { c.Dir = dir }), s.index)
	}
	fetch(t)
	s.asked.Store(0)
	fetch(t)
	if n := s.asked.Load(); n != 0 {
		t.Errorf("%d requests for what is on disk", n)
	}
	t.Run("what somebody has changed on disk is fetched anew", func(t *testing.T) {
		path := filepath.Join(dir, strings.TrimPrefix(s.index, "sha256:"))
		if err := os.WriteFile(path, manifest(s.configs["linux/arm64"]), 0o600); err != nil {
			t.Fatal(err)
		}
		fetch(t)
		if s.asked.Load() == 0 {
			t.Error("it was believed")
		}
	})
}

func TestWhatIsRefused(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("somebody was sent to %s", r.URL)
		w.WriteHeader(http.StatusTeapot)
	}))
	defer elsewhere.Close()
	fetch := func(t *testing.T, s *site, f *Fetcher) error {
		t.Helper()
		_, err := f.Fetch(t.Context(), s.repository, s.index)
		return err
	}
	t.Run("a registry that is not on the list", func(t *testing.T) {
		s := newSite(t, nil)
		err := fetch(t, s, s.fetcher(t, func(c *Config) { c.Registries = []string{"example.org"} }))
		if !errors.Is(err, ErrRefused) || s.asked.Load() != 0 {
			t.Errorf("got %v after %d requests", err, s.asked.Load())
		}
	})
	t.Run("an address that is not public", func(t *testing.T) {
		s := newSite(t, nil)
		err := fetch(t, s, s.fetcher(t, func(c *Config) { c.AllowPrivate = false }))
		if !errors.Is(err, ErrRefused) || s.asked.Load() != 0 {
			t.Errorf("got %v after %d requests", err, s.asked.Load())
		}
	})
	t.Run("a registry without TLS", func(t *testing.T) {
		s := newSite(t, nil)
		if err := fetch(t, s, s.fetcher(t, func(c *Config) { c.Plain = nil })); err == nil {
			t.Error("it was asked")
		}
	})
	t.Run("a redirection to another host", func(t *testing.T) {
		s := newSite(t, func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			http.Redirect(w, r, elsewhere.URL+"/latest/meta-data", http.StatusTemporaryRedirect)
			return true
		})
		if err := fetch(t, s, s.fetcher(t)); !errors.Is(err, ErrRefused) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a token service on another host", func(t *testing.T) {
		s := newSite(t, func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="x"`, elsewhere.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		if err := fetch(t, s, s.fetcher(t)); err == nil {
			t.Error("it was asked")
		}
	})
	t.Run("an answer that is too large", func(t *testing.T) {
		s := newSite(t, func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			w.Header().Set("Content-Type", ociIndex)
			for range 64 { // no length is said
				_, _ = w.Write(make([]byte, 1<<16))
				w.(http.Flusher).Flush()
			}
			return true
		})
		if err := fetch(t, s, s.fetcher(t, func(c *Config) { c.MaxSize = 1 << 20 })); !errors.Is(err, ErrTooLarge) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("content of another digest", func(t *testing.T) {
		s := newSite(t, func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			w.Header().Set("Content-Type", ociManifest)
			_, _ = w.Write(manifest(digestOf("a lie")))
			return true
		})
		if err := fetch(t, s, s.fetcher(t)); err == nil {
			t.Error("it was believed")
		}
	})
	t.Run("a registry that never answers", func(t *testing.T) {
		release := make(chan struct{})
		s := newSite(t, func(_ http.ResponseWriter, r *http.Request) bool {
			select {
			case <-release:
			case <-r.Context().Done():
			}
			return true
		})
		defer close(release)
		if err := fetch(t, s, s.fetcher(t, func(c *Config) { c.Timeout = 50 * time.Millisecond })); !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a tag, or a digest that is none", func(t *testing.T) {
		s := newSite(t, nil)
		for _, digest := range []string{"latest", "", "sha256:1", strings.ToUpper(s.index)} {
			if _, err := s.fetcher(t).Fetch(t.Context(), s.repository, digest); !errors.Is(err, ErrDigest) {
				t.Errorf("%q: %v", digest, err)
			}
		}
		for _, repository := range []string{"", s.host, s.host + "/../x", "http://" + s.host + "/x"} {
			if _, err := s.fetcher(t).Fetch(t.Context(), repository, s.index); err == nil {
				t.Errorf("repository %q was asked", repository)
			}
		}
		if s.asked.Load() != 0 {
			t.Errorf("%d requests", s.asked.Load())
		}
	})
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func TestAddresses(t *testing.T) {
	f, err := NewFetcher(Config{})
	if err != nil {
		t.Fatal(err)
	}
	for text, public := range map[string]bool{
		"127.0.0.1": false, "::1": false, "10.1.2.3": false, "172.16.0.1": false, "192.168.1.1": false, "169.254.169.254": false,
		"100.64.0.1": false, "0.0.0.0": false, "::": false, "fe80::1": false, "fd00:ec2::254": false, "224.0.0.1": false,
		"255.255.255.255": false, "::ffff:127.0.0.1": false, "::ffff:10.0.0.1": false, "64:ff9b::7f00:1": false, "2002:7f00:1::": false,
		"8.8.8.8": true, "2606:4700::1111": true, "::ffff:8.8.8.8": true,
	} {
		address := netip.AddrPortFrom(netip.MustParseAddr(text), 443).String()
		if err := f.control("tcp", address, nil); (err == nil) != public {
			t.Errorf("%s: %v", text, err)
		}
	}
}
