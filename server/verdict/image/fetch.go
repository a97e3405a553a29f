package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	// ErrRefused says that a Fetcher may not ask where it was to ask.
	ErrRefused = errors.New("registry is not allowed")
	// ErrTooLarge says that a registry sent more than it may.
	ErrTooLarge = errors.New("answer of the registry is too large")
)

// Config says what a Fetcher may do. The zero value may nothing.
type Config struct {
	// Registries are the hosts, with a port if it is not 443, that images may be asked for at.
	// "docker.io" stands for Docker Hub and what belongs to it.
	Registries []string
	// Hosts are others that registries may send on to: token services and stores of blobs.
	Hosts []string
	// Plain are those of Registries and Hosts that speak HTTP without TLS.
	Plain []string
	// AllowPrivate lets names lead to loopback, private, link-local and other addresses that are not
	// public. Without it a registry's name, or a redirection, cannot be used to reach what stands
	// beside the server.
	AllowPrivate bool
	// Auths has credentials for registries. Nil: for none.
	Auths *Auths
	// Dir is where content is kept, by digest; empty: nothing is kept.
	Dir string
	// MaxSize is the largest answer in bytes; 0: 4 MiB, which is the largest manifest registries take.
	MaxSize int64
	// MaxDocument is the largest document attached to an image; 0: 32 MiB, which is what is taken of a pusher.
	MaxDocument int64
	// Timeout bounds one fetch, redirections included; 0: 10 s.
	Timeout time.Duration
}

// Fetcher gets manifests and indexes from registries. It is safe for concurrent use.
type Fetcher struct {
	cfg  Config
	tr   http.RoundTripper
	disk *cache // nil: none
}

// dockerHub is what belongs to docker.io.
var dockerHub = []string{"index.docker.io", "registry-1.docker.io", "auth.docker.io"}

// NewFetcher returns a Fetcher. It makes Config.Dir.
func NewFetcher(cfg Config) (*Fetcher, error) {
	if cfg.MaxSize == 0 {
		cfg.MaxSize = 4 << 20
	}
	if cfg.MaxDocument == 0 {
		cfg.MaxDocument = 32 << 20
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	f := &Fetcher{cfg: cfg}
	if slices.Contains(cfg.Registries, "docker.io") {
		f.cfg.Registries = append(slices.Clone(cfg.Registries), dockerHub...)
	}
	dialer := &net.Dialer{Timeout: cfg.Timeout, Control: f.control}
	f.tr = &gate{f: f, next: &http.Transport{
		// No proxy: it would be asked in our place, and could reach what we may not.
		DialContext:            dialer.DialContext,
		TLSHandshakeTimeout:    cfg.Timeout,
		ResponseHeaderTimeout:  cfg.Timeout,
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConns:           16,
		IdleConnTimeout:        30 * time.Second,
		ForceAttemptHTTP2:      true,
	}}
	if cfg.Dir != "" {
		var err error
		if f.disk, err = openCache(cfg.Dir); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// Fetch returns the manifest or index with the digest, from disk or from the repository
// ("registry/name"). What it returns has the digest.
func (f *Fetcher) Fetch(ctx context.Context, repository, digest string) ([]byte, error) {
	if !identity.ValidDigest(digest) {
		return nil, fmt.Errorf("fetch image: %w: %.80q is no sha256 digest", ErrDigest, digest)
	}
	if content, ok := f.disk.get(digest); ok {
		return content, nil
	}
	ref, err := f.reference(repository)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, f.cfg.Timeout)
	defer cancel()
	options, err := f.options(ctx, ref)
	if err != nil {
		return nil, err
	}
	got, err := remote.Get(ref.Digest(digest), options...)
	if err != nil {
		return nil, fmt.Errorf("fetch %s@%s: %w", repository, digest, reason(err))
	}
	if sum := sumOf(got.Manifest); sum != digest {
		return nil, fmt.Errorf("fetch %s@%s: %w", repository, digest, ErrDigest)
	}
	f.disk.put(digest, got.Manifest)
	return got.Manifest, nil
}

// reference parses a repository and refuses registries that are not allowed.
func (f *Fetcher) reference(repository string) (name.Repository, error) {
	var opts []name.Option
	host, path, _ := strings.Cut(repository, "/")
	if slices.ContainsFunc(strings.Split(path, "/"), func(part string) bool { return strings.Trim(part, ".") == "" }) {
		return name.Repository{}, fmt.Errorf("fetch image: %.200q is no repository: want registry/name", repository)
	}
	if slices.Contains(f.cfg.Plain, host) {
		opts = append(opts, name.Insecure)
	}
	ref, err := name.NewRepository(repository, append(opts, name.StrictValidation)...)
	if err != nil {
		return name.Repository{}, fmt.Errorf("fetch image: %w", err)
	}
	if !slices.Contains(f.cfg.Registries, ref.RegistryStr()) {
		return name.Repository{}, fmt.Errorf("fetch image: %w: %s", ErrRefused, ref.RegistryStr())
	}
	return ref, nil
}

func (f *Fetcher) options(ctx context.Context, ref name.Repository) ([]remote.Option, error) {
	auth := authn.Anonymous
	if f.cfg.Auths != nil {
		config, ok, err := f.cfg.Auths.For(ref.RegistryStr())
		if err != nil {
			return nil, err
		}
		if ok {
			auth = authn.FromConfig(config)
		}
	}
	return []remote.Option{
		remote.WithContext(ctx), remote.WithTransport(f.tr), remote.WithAuth(auth),
		// Whoever needs the answer asks again in his own time.
		remote.WithRetryStatusCodes(), remote.WithRetryPredicate(func(error) bool { return false }),
		remote.WithUserAgent("assay-server"),
	}, nil
}

// reason finds what the gate has said below what the client makes of it.
func reason(err error) error {
	for _, known := range []error{ErrRefused, ErrTooLarge} {
		if errors.Is(err, known) || strings.Contains(err.Error(), known.Error()) {
			return fmt.Errorf("%w: %w", known, err)
		}
	}
	return err
}

// asDocument marks the context of a request for a document, which may be larger than a manifest.
type asDocument struct{}

// gate lets only requests through that the configuration allows, each redirection and each question for
// a token on its own, and cuts answers that are too large.
type gate struct {
	f    *Fetcher
	next http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (g *gate) RoundTrip(r *http.Request) (*http.Response, error) {
	cfg := &g.f.cfg
	host := r.URL.Host
	allowed := slices.Contains(cfg.Registries, host) || slices.Contains(cfg.Hosts, host)
	if trimmed, ok := strings.CutSuffix(host, ":443"); ok && !allowed {
		allowed = slices.Contains(cfg.Registries, trimmed) || slices.Contains(cfg.Hosts, trimmed)
	}
	switch {
	case !allowed:
		return nil, fmt.Errorf("%w: %s", ErrRefused, host)
	case r.URL.Scheme != "https" && !slices.Contains(cfg.Plain, host):
		return nil, fmt.Errorf("%w: %s without TLS", ErrRefused, host)
	case r.Method != http.MethodGet && r.Method != http.MethodHead && r.Method != http.MethodPost: // a token may be asked for by POST
		return nil, fmt.Errorf("%w: method %s", ErrRefused, r.Method)
	}
	resp, err := g.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	most := cfg.MaxSize
	if r.Context().Value(asDocument{}) != nil {
		most = cfg.MaxDocument
	}
	if resp.ContentLength > most {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, resp.ContentLength, most)
	}
	resp.Body = &limited{ReadCloser: resp.Body, left: most}
	return resp, nil
}

// limited is a body that ends in an error when it is too long.
type limited struct {
	io.ReadCloser
	left int64
}

func (l *limited) Read(p []byte) (int, error) {
	n, err := l.ReadCloser.Read(p[:min(int64(len(p)), l.left+1)])
	if l.left -= int64(n); l.left < 0 {
		return n, ErrTooLarge
	}
	return n, err
}

// notPublic are the addresses that net/netip has no word for.
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("240.0.0.0/4"),
	// These carry an IPv4 address within, which may be any.
	netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("64:ff9b:1::/48"), netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("2001::/32"),
	netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("100::/64"), netip.MustParsePrefix("fec0::/10"),
}

// control refuses a connection to an address that is not public: after the name was looked up, so that
// no name can be changed between the question and the connection.
func (f *Fetcher) control(_, address string, _ syscall.RawConn) error {
	if f.cfg.AllowPrivate {
		return nil
	}
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%w: address %s", ErrRefused, address)
	}
	ip := at.Addr().Unmap()
	if !ip.IsGlobalUnicast() || ip.IsPrivate() || slices.ContainsFunc(notPublic, func(p netip.Prefix) bool { return p.Contains(ip) }) {
		return fmt.Errorf("%w: address %s is not public", ErrRefused, ip)
	}
	return nil
}

// cache keeps content by its digest. A nil one keeps nothing. What is read is hashed anew, so it does not
// matter who else can write there, or what a crash has left.
type cache struct{ dir string }

func openCache(dir string) (*cache, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make image cache: %w", err)
	}
	return &cache{dir: dir}, nil
}

func (c *cache) path(digest string) string {
	return filepath.Join(c.dir, strings.TrimPrefix(digest, "sha256:"))
}

func (c *cache) get(digest string) ([]byte, bool) {
	if c == nil {
		return nil, false
	}
	content, err := os.ReadFile(c.path(digest))
	if err != nil || sumOf(content) != digest {
		return nil, false
	}
	return content, true
}

// put keeps content. A disk that is full costs a fetch, and nobody anything else.
func (c *cache) put(digest string, content []byte) {
	if c == nil {
		return
	}
	file, err := os.CreateTemp(c.dir, "new-*")
	if err != nil {
		return
	}
	_, err = file.Write(content)
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(file.Name(), c.path(digest))
	}
	if err != nil {
		_ = os.Remove(file.Name())
	}
}
