package trust

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
)

const (
	// maxFetched is the largest discovery document or key set, in bytes.
	maxFetched = 1 << 20
	maxJWKs    = 100
	// fetchTime is the time for one fetch, from connecting to the last byte.
	fetchTime = 10 * time.Second
	// keysFresh is how long keys are used before they are fetched again; keysStale is how long they
	// are used if that fails.
	keysFresh = time.Hour
	keysStale = 24 * time.Hour
	// fetchPause is between two fetches from one issuer, so that tokens with invented key IDs, which
	// anybody can send, do not make us a nuisance to it.
	fetchPause = 15 * time.Second
	maxIssuers = 256
)

// ErrUnavailable marks that an issuer's keys could not be had, which says nothing of the token: the caller
// may come again. It is no refusal.
var ErrUnavailable = errors.New("issuer's keys unavailable")

// issuers holds the keys of the issuers that are discovered.
type issuers struct {
	now     func() time.Time
	log     logrus.FieldLogger
	fetches *prometheus.CounterVec

	mu   sync.Mutex
	sets map[string]*remoteKeys // guarded by mu
}

// keys returns the key set that a rule's tokens are verified with.
func (is *issuers) keys(r *tokenRule) *keyVerifier {
	if r.keys != nil {
		return &keyVerifier{algorithms: r.algorithms, find: func(context.Context, string) ([]jose.JSONWebKey, error) { return r.keys, nil }}
	}
	return &keyVerifier{algorithms: r.algorithms, find: is.remote(r).find}
}

// remote returns the one set of an issuer, made new if its certificate authorities changed.
func (is *issuers) remote(r *tokenRule) *remoteKeys {
	is.mu.Lock()
	defer is.mu.Unlock()
	if set := is.sets[r.issuer]; set != nil && sameRoots(set.roots, r.roots) {
		return set
	}
	if len(is.sets) >= maxIssuers { // those of sources that are gone
		clear(is.sets)
	}
	set := &remoteKeys{issuer: r.issuer, roots: r.roots, client: newClient(r.roots), in: is, turn: make(chan struct{}, 1)}
	is.sets[r.issuer] = set
	return set
}

func sameRoots(a, b *x509.CertPool) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Equal(b)
}

// remoteKeys are the keys of one issuer, found through its discovery document.
type remoteKeys struct {
	issuer string
	roots  *x509.CertPool
	client *http.Client
	in     *issuers
	turn   chan struct{} // held by who fetches

	// mu guards those below; it is never held while something is fetched.
	mu      sync.Mutex
	known   []jose.JSONWebKey
	fetched time.Time // when known was
	tried   time.Time // when fetching was last tried
	failed  error     // why that failed, nil if it did not
}

// find returns the keys, fetched anew if they are old or the key ID is not among them.
func (k *remoteKeys) find(ctx context.Context, keyID string) ([]jose.JSONWebKey, error) {
	if keys, enough, err := k.cached(keyID); enough {
		return keys, err
	}
	// One fetches, the others wait and then find what it got.
	select {
	case k.turn <- struct{}{}:
		defer func() { <-k.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if keys, enough, err := k.cached(keyID); enough {
		return keys, err
	}
	keys, err := k.fetch(ctx)
	if err != nil && ctx.Err() != nil {
		return nil, ctx.Err() // the caller went away; nobody else pays for it
	}
	now := k.in.now()
	k.mu.Lock()
	k.tried, k.failed = now, nil
	if err != nil {
		k.failed = fmt.Errorf("%w: %s: %w", ErrUnavailable, k.issuer, err)
		if now.Sub(k.fetched) >= keysStale {
			k.known = nil
		}
	} else {
		k.known, k.fetched = keys, now
	}
	k.mu.Unlock()
	if err != nil {
		k.in.fetches.WithLabelValues("failed").Inc()
		k.in.log.WithError(err).WithField("issuer", k.issuer).Warn("cannot fetch keys of OIDC issuer")
	} else {
		k.in.fetches.WithLabelValues("ok").Inc()
	}
	keys, _, err = k.cached(keyID)
	return keys, err
}

// cached returns the keys that are there, and whether they will do.
func (k *remoteKeys) cached(keyID string) (keys []jose.JSONWebKey, enough bool, err error) {
	now := k.in.now()
	k.mu.Lock()
	defer k.mu.Unlock()
	pause := !k.tried.IsZero() && now.Sub(k.tried) < fetchPause
	if len(k.known) == 0 {
		return nil, pause, k.failed
	}
	fresh := now.Sub(k.fetched) < keysFresh
	return k.known, pause || fresh && hasKey(k.known, keyID), nil
}

func hasKey(keys []jose.JSONWebKey, keyID string) bool {
	for _, k := range keys {
		if keyID == "" || k.KeyID == keyID {
			return true
		}
	}
	return false
}

// fetch asks the issuer where its keys are, and for them.
func (k *remoteKeys) fetch(ctx context.Context) ([]jose.JSONWebKey, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	provider, err := oidc.NewProvider(oidc.ClientContext(ctx, k.client), k.issuer)
	if err != nil {
		return nil, fmt.Errorf("discover OIDC issuer: %w", oneLine(err))
	}
	var where struct {
		KeysURI string `json:"jwks_uri"`
	}
	if err := provider.Claims(&where); err != nil {
		return nil, fmt.Errorf("read discovery document: %w", oneLine(err))
	}
	u, err := url.Parse(where.KeysURI)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("read discovery document: jwks_uri %q is no https URL", clip(where.KeysURI))
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("ask for keys: %w", err)
	}
	response, err := k.client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("ask for keys: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask for keys at %s: %s", u, response.Status)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	return parseKeySet(body)
}

// newClient returns a client that speaks https only, follows no redirect and reads no more than
// maxFetched. Connections are not kept: there is one fetch an hour.
func newClient(roots *x509.CertPool) *http.Client {
	return &http.Client{
		Timeout: fetchTime,
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return errors.New("the issuer redirects, and is not followed")
		},
		Transport: &bounded{&http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			MaxResponseHeaderBytes: 64 << 10,
			DisableKeepAlives:      true,
			ForceAttemptHTTP2:      true,
		}},
	}
}

// bounded is a transport whose answers are never longer than maxFetched.
type bounded struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b *bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" {
		return nil, fmt.Errorf("%s is not fetched: only https is", r.URL.Redacted())
	}
	response, err := b.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	response.Body = &boundedBody{ReadCloser: response.Body, left: maxFetched}
	return response, nil
}

type boundedBody struct {
	io.ReadCloser
	left int64
}

// Read implements io.Reader; it fails, rather than to end, where the limit is.
func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("the answer is longer than %d bytes", maxFetched)
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.ReadCloser.Read(p)
	b.left -= int64(n)
	return n, err
}

// parseKeySet reads a JSON Web Key Set (RFC 7517 section 5) and keeps the public keys that can sign. Keys
// of unknown kinds are left out, as the RFC asks; symmetric and weak ones are never taken.
func parseKeySet(text []byte) ([]jose.JSONWebKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if _, err := topOf(text); err != nil {
		return nil, fmt.Errorf("read key set: %w", oneLine(err)) // no refusal: it is not the caller's
	}
	if err := json.Unmarshal(text, &set); err != nil {
		return nil, fmt.Errorf("read key set: %w", err)
	}
	if len(set.Keys) > maxJWKs {
		return nil, fmt.Errorf("read key set: it has %d keys, the limit is %d", len(set.Keys), maxJWKs)
	}
	var keys []jose.JSONWebKey
	for _, raw := range set.Keys {
		var k jose.JSONWebKey
		if json.Unmarshal(raw, &k) != nil || !k.Valid() || !k.IsPublic() || k.Use != "" && k.Use != "sig" || !strongEnough(k) {
			continue
		}
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return nil, errors.New("read key set: there is no public key in it that a signature can be verified with")
	}
	return keys, nil
}

// keyVerifier implements oidc.KeySet for one token.
type keyVerifier struct {
	algorithms []jose.SignatureAlgorithm
	find       func(ctx context.Context, keyID string) ([]jose.JSONWebKey, error)
	// failed is why there are no keys, which the library does not pass on.
	failed error
}

// VerifySignature returns the payload of a token that is signed with one of the keys.
func (v *keyVerifier) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	signed, err := jose.ParseSignedCompact(token, v.algorithms)
	if err != nil {
		return nil, fmt.Errorf("parse token: %w", err)
	}
	if len(signed.Signatures) != 1 {
		return nil, errors.New("token must have one signature")
	}
	header := signed.Signatures[0].Header
	keys, err := v.find(ctx, header.KeyID)
	if err != nil {
		v.failed = err
		return nil, err
	}
	for i := range keys {
		k := &keys[i]
		// A token that names its key is verified with that key; a key that names its algorithm signs
		// with no other (RFC 7515 section 4.1.4, RFC 7517 section 4.4).
		if header.KeyID != "" && k.KeyID != header.KeyID || k.Algorithm != "" && k.Algorithm != header.Algorithm {
			continue
		}
		if payload, err := signed.Verify(k.Key); err == nil {
			return payload, nil
		}
	}
	return nil, fmt.Errorf("no key of the issuer verifies it (key ID %q)", clip(header.KeyID))
}
