package files

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

// world is a trust domain and a Source that says what it is told to.
type world struct {
	t      *testing.T
	ca     *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64

	mu      sync.Mutex
	changed chan struct{}
	x509    *workload.X509SVIDResponse
	bundles *workload.JWTBundlesResponse
	tokens  []*workload.JWTSVID
	err     error
	asked   [][]string // audiences
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, changed: make(chan struct{}), serial: 1}
	w.newCA()
	return w
}

func (w *world) newCA() {
	w.t.Helper()
	var err error
	w.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(w.t, err)
	w.serial++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(w.serial), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}}, SubjectKeyId: []byte{1, byte(w.serial)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, w.key.Public(), w.key)
	must(w.t, err)
	w.ca, err = x509.ParseCertificate(der)
	must(w.t, err)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (w *world) svid(path string) *workload.X509SVID {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(w.t, err)
	w.serial++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(w.serial), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: path}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, w.ca, key.Public(), w.key)
	must(w.t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	must(w.t, err)
	return &workload.X509SVID{SpiffeId: "spiffe://example.org" + path, X509Svid: der, X509SvidKey: pkcs8, Bundle: w.ca.Raw}
}

func (w *world) crl() []byte {
	w.t.Helper()
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}, w.ca, w.key)
	must(w.t, err)
	return der
}

func token(sub string, life time.Duration) string {
	part := func(v any) string {
		text, _ := json.Marshal(v)
		return base64.RawURLEncoding.EncodeToString(text)
	}
	now := time.Now()
	return part(map[string]string{"alg": "ES256"}) + "." + part(map[string]any{"sub": sub, "iat": now.Unix(), "exp": now.Add(life).Unix()}) + ".sig"
}

// say changes what the Source says.
func (w *world) say(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *world) X509(ctx context.Context, fn func(*workload.X509SVIDResponse) error) error {
	return stream(ctx, w, func() *workload.X509SVIDResponse { return w.x509 }, fn)
}

func (w *world) JWTBundles(ctx context.Context, fn func(*workload.JWTBundlesResponse) error) error {
	return stream(ctx, w, func() *workload.JWTBundlesResponse { return w.bundles }, fn)
}

func stream[T any](ctx context.Context, w *world, get func() *T, fn func(*T) error) error {
	for {
		w.mu.Lock()
		m, changed, err := get(), w.changed, w.err
		w.mu.Unlock()
		if err == nil {
			err = fn(m)
		}
		if err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (w *world) JWT(_ context.Context, audience []string) (*workload.JWTSVIDResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = append(w.asked, audience)
	switch {
	case w.err != nil:
		return nil, w.err
	case len(w.tokens) == 0:
		return nil, ErrNoIdentity
	}
	return &workload.JWTSVIDResponse{Svids: w.tokens}, nil
}

// keep runs a Keeper until the test ends.
func (w *world) keep(cfg Config) *Keeper {
	w.t.Helper()
	k := New(w, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
	return k
}

// until waits for what comes soon.
func until(t *testing.T, what string, good func() error) {
	t.Helper()
	deadline := time.After(time.Minute)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := good()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("wait for %s: %v", what, err)
		case <-tick.C:
		}
	}
}

func all(dir string) Config {
	return Config{
		Dir: dir, Cert: "svid.pem", Key: "key.pem", Bundle: "bundle.pem", CRL: "crl.pem", JWTBundle: "bundle.json", JWKS: "jwks.json",
		JWTs: []JWT{{Audience: []string{"one", "two"}, File: "token"}},
	}
}

func (w *world) everything() {
	w.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{w.svid("/web")}, Crl: [][]byte{w.crl()}}
	w.bundles = &workload.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://example.org": []byte(`{"keys":[]}`)}}
	w.tokens = []*workload.JWTSVID{{SpiffeId: "spiffe://example.org/web", Svid: token("spiffe://example.org/web", time.Hour)}}
}

func leafOf(dir string) (*x509.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"))
	return pair.Leaf, err
}

func TestFiles(t *testing.T) {
	w := newWorld(t)
	w.everything()
	dir := filepath.Join(t.TempDir(), "a", "b")
	k := w.keep(all(dir))
	until(t, "the files", k.Ready)

	t.Run("all are there, with their modes", func(t *testing.T) {
		for name, mode := range map[string]os.FileMode{"svid.pem": 0o644, "key.pem": 0o600, "bundle.pem": 0o644, "crl.pem": 0o644, "bundle.json": 0o600, "jwks.json": 0o600, "token": 0o600} {
			info, err := os.Stat(filepath.Join(dir, name))
			must(t, err)
			if info.Mode().Perm() != mode {
				t.Errorf("%s has mode %o, want %o", name, info.Mode().Perm(), mode)
			}
		}
		entries, err := os.ReadDir(dir)
		must(t, err)
		if len(entries) != 7 {
			t.Errorf("there are %v", entries)
		}
	})
	t.Run("certificate and key are a pair, and the bundle verifies it", func(t *testing.T) {
		leaf, err := leafOf(dir)
		must(t, err)
		roots := x509.NewCertPool()
		text, err := os.ReadFile(filepath.Join(dir, "bundle.pem"))
		must(t, err)
		roots.AppendCertsFromPEM(text)
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Error(err)
		}
	})
	t.Run("the keys are there as spiffe-helper writes them and as a plain JWK set", func(t *testing.T) {
		text, err := os.ReadFile(filepath.Join(dir, "bundle.json"))
		must(t, err)
		if string(text) != `{"example.org":"eyJrZXlzIjpbXX0="}` {
			t.Errorf("the helper's is %s", text)
		}
		if text, err = os.ReadFile(filepath.Join(dir, "jwks.json")); err != nil || string(text) != `{"keys":[]}` {
			t.Errorf("the plain one is %s, %v", text, err)
		}
	})
	t.Run("a new certificate takes the place of the old one", func(t *testing.T) {
		before, err := leafOf(dir)
		must(t, err)
		w.say(func() { w.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{w.svid("/web")}} })
		until(t, "the new pair", func() error {
			leaf, err := leafOf(dir)
			if err == nil && leaf.SerialNumber.Cmp(before.SerialNumber) == 0 {
				return errors.New("it is the old one")
			}
			return err
		})
		if _, err := os.Stat(filepath.Join(dir, "crl.pem")); err != nil {
			t.Error("an answer without a list has taken the list away")
		}
	})
	t.Run("what makes no sense changes nothing", func(t *testing.T) {
		before, err := leafOf(dir)
		must(t, err)
		bad := w.svid("/web")
		bad.X509SvidKey = w.svid("/web").GetX509SvidKey()
		w.say(func() { w.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{bad}} })
		until(t, "the mistake to be known", func() error {
			if s := k.group(groupX509); s.err == nil || !strings.Contains(s.err.Error(), "it is not the certificate's") {
				return fmt.Errorf("it is %w", s.err)
			}
			return nil
		})
		after, err := leafOf(dir)
		must(t, err)
		if after.SerialNumber.Cmp(before.SerialNumber) != 0 {
			t.Error("the pair has changed")
		}
		if err := k.Live(); err != nil {
			t.Errorf("the files are well, and it says %v", err)
		}
	})
}

func TestWithdrawal(t *testing.T) {
	for _, how := range []string{Replace, Remove, Keep} {
		t.Run(how, func(t *testing.T) {
			w := newWorld(t)
			w.everything()
			dir := t.TempDir()
			cfg := all(dir)
			cfg.Withdrawn = how
			k := w.keep(cfg)
			until(t, "the files", k.Ready)
			was, err := leafOf(dir)
			must(t, err)

			w.say(func() { w.x509, w.bundles, w.tokens = nil, nil, nil })
			until(t, "the withdrawal", func() error {
				if err := k.Ready(); !errors.Is(err, ErrNoIdentity) {
					return fmt.Errorf("ready is %w", err)
				}
				_, err := os.Stat(filepath.Join(dir, "token"))
				if gone := errors.Is(err, os.ErrNotExist); gone != (how != Keep) {
					return fmt.Errorf("the token: %w", err)
				}
				return nil
			})
			leaf, err := leafOf(dir)
			switch how {
			case Replace:
				must(t, err)
				if leaf.Subject.CommonName != nobodyName || len(leaf.URIs) != 0 || time.Now().Before(leaf.NotAfter) {
					t.Errorf("in its place is %v", leaf.Subject)
				}
			case Remove:
				if !errors.Is(err, os.ErrNotExist) {
					t.Errorf("it is there: %v", err)
				}
			case Keep:
				must(t, err)
				if leaf.SerialNumber.Cmp(was.SerialNumber) != 0 {
					t.Error("it was changed")
				}
			}
			if _, err := os.Stat(filepath.Join(dir, "bundle.pem")); err != nil {
				t.Error("what verifies others is gone too")
			}
			w.say(w.everything)
			until(t, "the identity to be back", func() error {
				leaf, err := leafOf(dir)
				if err == nil && (leaf.Subject.CommonName == nobodyName || leaf.SerialNumber.Cmp(was.SerialNumber) == 0) {
					return errors.New("it is not the new one")
				}
				if err == nil {
					_, err = os.Stat(filepath.Join(dir, "token"))
				}
				return err
			})
		})
	}
	t.Run("what a run before has left is withdrawn too, and once only", func(t *testing.T) {
		w := newWorld(t)
		w.everything()
		dir := t.TempDir()
		must(t, New(w, all(dir)).Once(context.Background()))
		w.say(func() { w.x509, w.bundles, w.tokens = nil, nil, nil })
		for range 2 {
			if err := New(w, all(dir)).Once(context.Background()); !errors.Is(err, ErrNoIdentity) {
				t.Fatalf("it ends with %v", err)
			}
		}
		first, err := leafOf(dir)
		must(t, err)
		if err := New(w, all(dir)).Once(context.Background()); !errors.Is(err, ErrNoIdentity) {
			t.Fatalf("it ends with %v", err)
		}
		second, err := leafOf(dir)
		must(t, err)
		if first.Subject.CommonName != nobodyName || !first.Equal(second) {
			t.Error("it was replaced again")
		}
	})
	t.Run("an API that is away changes nothing", func(t *testing.T) {
		w := newWorld(t)
		w.everything()
		dir := t.TempDir()
		k := w.keep(all(dir))
		until(t, "the files", k.Ready)
		w.say(func() { w.err = errors.New("connection refused") })
		until(t, "the error to be known", func() error {
			if k.group(groupX509).err == nil {
				return errors.New("not yet")
			}
			return nil
		})
		if err := k.Ready(); err != nil {
			t.Errorf("what is there is good, and ready is %v", err)
		}
		if leaf, err := leafOf(dir); err != nil || leaf.Subject.CommonName == nobodyName {
			t.Errorf("the pair is %v, %v", leaf, err)
		}
	})
}

func TestChoice(t *testing.T) {
	w := newWorld(t)
	a, b := w.svid("/a"), w.svid("/b")
	b.Hint = "internal"
	w.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{a, b}}
	for _, c := range []struct {
		id, hint, want string
	}{
		{"", "", "spiffe://example.org/a"},
		{"spiffe://example.org/b", "", "spiffe://example.org/b"},
		{"", "internal", "spiffe://example.org/b"},
		{"spiffe://example.org/a", "internal", ""},
		{"spiffe://example.org/c", "", ""},
	} {
		t.Run(fmt.Sprintf("%q and %q is %q", c.id, c.hint, c.want), func(t *testing.T) {
			dir := t.TempDir()
			err := New(w, Config{Dir: dir, Cert: "svid.pem", Key: "key.pem", SPIFFEID: c.id, Hint: c.hint}).Once(context.Background())
			if c.want == "" {
				if _, there := leafOf(dir); there == nil {
					t.Error("it wrote one")
				}
				return
			}
			must(t, err)
			leaf, err := leafOf(dir)
			must(t, err)
			if leaf.URIs[0].String() != c.want {
				t.Errorf("it is %s", leaf.URIs[0])
			}
		})
	}
}

func TestTokens(t *testing.T) {
	w := newWorld(t)
	w.everything()
	dir := t.TempDir()
	k := w.keep(all(dir))
	until(t, "the files", k.Ready)
	t.Run("its audiences are asked for", func(t *testing.T) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if got := strings.Join(w.asked[0], " "); got != "one two" {
			t.Errorf("they are %q", got)
		}
	})
	t.Run("whose keys are the own trust domain's, is no question where no keys are written", func(t *testing.T) {
		k := New(w, Config{Dir: t.TempDir(), JWTs: []JWT{{Audience: []string{"one"}, File: "token"}}})
		must(t, k.jwtBundles(&workload.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://example.org": []byte(`{"keys":[]}`), "spiffe://a.test": []byte(`{"keys":[]}`)}}))
		if len(k.pokes[0]) != 1 {
			t.Error("the token is not fetched anew")
		}
	})
	t.Run("when keys change, it is fetched anew", func(t *testing.T) {
		next := token("spiffe://example.org/web", 2*time.Hour)
		w.say(func() {
			w.tokens = []*workload.JWTSVID{{SpiffeId: "spiffe://example.org/web", Svid: next}}
			w.bundles = &workload.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://example.org": []byte(`{"keys":[{}]}`)}}
		})
		until(t, "the new token", func() error {
			if text, err := os.ReadFile(filepath.Join(dir, "token")); err != nil || string(text) != next {
				return fmt.Errorf("it is %q, %w", text, err)
			}
			return nil
		})
	})
	for _, bad := range []string{"", "a.b", "a.!.c", "a.e30.c", "a." + base64.RawURLEncoding.EncodeToString([]byte(`{"exp":"x"}`)) + ".c"} {
		if _, _, err := times(bad); err == nil {
			t.Errorf("%q is read as a token", bad)
		}
	}
}

func TestBundleFiles(t *testing.T) {
	w := newWorld(t)
	w.everything()
	foreign := newWorld(t)
	w.x509.FederatedBundles = map[string][]byte{"spiffe://other.example": foreign.ca.Raw}
	w.bundles.Bundles["spiffe://other.example"] = []byte(`{"keys":[1]}`)
	certs := func(dir string) (n int) {
		text, err := os.ReadFile(filepath.Join(dir, "bundle.pem"))
		must(t, err)
		for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
			n++
		}
		return n
	}
	t.Run("federated ones are left out unless they are asked for", func(t *testing.T) {
		for federated, want := range map[bool]int{false: 1, true: 2} {
			dir := t.TempDir()
			cfg := all(dir)
			cfg.Federated = federated
			must(t, New(w, cfg).Once(context.Background()))
			if certs(dir) != want {
				t.Errorf("with %v there are %d", federated, certs(dir))
			}
			var sets map[string]string
			text, err := os.ReadFile(filepath.Join(dir, "bundle.json"))
			must(t, err)
			must(t, json.Unmarshal(text, &sets))
			if len(sets) != want {
				t.Errorf("with %v there are %v", federated, sets)
			}
		}
	})
	t.Run("expired authorities are left out if that is asked for", func(t *testing.T) {
		dir := t.TempDir()
		cfg := all(dir)
		cfg.Federated, cfg.OmitExpired = true, true
		cfg.Now = func() time.Time { return time.Now().Add(2 * time.Hour) }
		must(t, New(w, cfg).Once(context.Background()))
		if certs(dir) != 0 {
			t.Errorf("there are %d", certs(dir))
		}
	})
}
