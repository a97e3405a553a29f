package trust

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	stdlog "log" //nolint:depguard // net/http takes no other
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/netutil"

	"github.com/assay-id/assay/workloadapi/identity"
)

// OIDC says how JWT-SVIDs are made known to verifiers that speak OpenID Connect.
type OIDC struct {
	// Domains are the names that the documents may be asked for by, without a port. At least one.
	Domains []string
	// Issuer is what the documents say; it must be what the tokens say. Empty: the scheme, the domain that
	// was asked and Prefix.
	Issuer string
	// JWKSURI is where the keys are. Empty: below the domain that was asked.
	JWKSURI string
	// Prefix is the path below which both documents are, "" or "/like/this".
	Prefix string
	// SetKeyUse adds "use": "sig" to each key, which some verifiers insist on.
	SetKeyUse bool
	// Plain writes http in place of https where the documents are not behind TLS at all, for trials.
	Plain bool
}

// Paths of the documents (OpenID Connect Discovery 1.0 section 4; the second is ours to choose, and SPIRE's).
const (
	discoveryPath = "/.well-known/openid-configuration"
	keysPath      = "/keys"
)

// Discovery answers with the discovery document and the keys of the own trust domain's JWT authorities.
type Discovery struct {
	td       spiffeid.TrustDomain
	pictures Pictures
	cfg      OIDC
	written  atomic.Pointer[document]
	requests *prometheus.CounterVec
}

// NewDiscovery returns the documents of a trust domain.
func NewDiscovery(td spiffeid.TrustDomain, pictures Pictures, cfg OIDC, metrics prometheus.Registerer) *Discovery {
	d := &Discovery{
		td: td, pictures: pictures, cfg: cfg,
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_oidc_requests_total",
			Help: "Requests to the OIDC discovery listener, by what came of them: served, refused (another path, method or host), failed.",
		}, []string{"outcome"}),
	}
	if metrics != nil {
		metrics.MustRegister(d.requests)
	}
	return d
}

// maxAge is how long a verifier may go on with what it has, in seconds. It is told of new keys long before
// they sign; of revoked ones it is to know soon.
const maxAge = 60

// ServeHTTP answers one request. It never redirects.
func (d *Discovery) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	refuse := func(code int, text string) {
		d.requests.WithLabelValues("refused").Inc()
		http.Error(w, text, code)
	}
	host, ok := d.host(r.Host)
	if !ok {
		// Or a name that somebody else points here would be an issuer of ours.
		refuse(http.StatusBadRequest, "400 the documents are not served by this name")
		return
	}
	path, inside := strings.CutPrefix(r.URL.Path, d.cfg.Prefix)
	if !inside || path != discoveryPath && path != keysPath {
		refuse(http.StatusNotFound, "404 page not found")
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		refuse(http.StatusMethodNotAllowed, "405 method not allowed")
		return
	}
	var text []byte
	var err error
	if path == keysPath {
		text, err = d.keys()
	} else {
		text, err = d.discovery(host)
	}
	if err != nil {
		d.requests.WithLabelValues("failed").Inc()
		http.Error(w, "500 document not available", http.StatusInternalServerError)
		return
	}
	d.requests.WithLabelValues("served").Inc()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", fmt.Sprintf("public, max-age=%d", maxAge))
	_, _ = w.Write(text) //nolint:gosec // it is JSON, and says so; an error says that the client is gone
}

// host returns the name that was asked, with its port if it had one, if it is one of the domains.
func (d *Discovery) host(asked string) (string, bool) {
	name := asked
	if host, _, err := net.SplitHostPort(asked); err == nil {
		name = host
	}
	for _, domain := range d.cfg.Domains {
		if strings.EqualFold(strings.TrimSuffix(name, "."), domain) {
			return asked, true
		}
	}
	return "", false
}

// discovery makes the document for who asked by a name.
func (d *Discovery) discovery(host string) ([]byte, error) {
	scheme := "https://"
	if d.cfg.Plain {
		scheme = "http://"
	}
	base := scheme + host + d.cfg.Prefix
	doc := struct {
		Issuer     string   `json:"issuer"`
		JWKSURI    string   `json:"jwks_uri"`
		Endpoint   string   `json:"authorization_endpoint"`
		Responses  []string `json:"response_types_supported"`
		Subjects   []string `json:"subject_types_supported"`
		Algorithms []string `json:"id_token_signing_alg_values_supported"`
	}{
		Issuer: d.cfg.Issuer, JWKSURI: d.cfg.JWKSURI,
		// There is none, but the document must name it; verifiers of tokens do not ask.
		Endpoint:  "",
		Responses: []string{"id_token"}, Subjects: []string{"public"}, Algorithms: []string{"RS256", "ES256", "ES384"},
	}
	if doc.Issuer == "" {
		doc.Issuer = base
	}
	if doc.JWKSURI == "" {
		doc.JWKSURI = base + keysPath
	}
	return json.Marshal(doc)
}

// keys is the JWK set of the authorities, made once for each bundle.
func (d *Discovery) keys() ([]byte, error) {
	b, ok := d.pictures.Bundle(d.td)
	if !ok {
		return nil, errors.New("there is no bundle yet")
	}
	if doc := d.written.Load(); doc != nil && doc.of == b {
		return doc.text, nil
	}
	set := jose.JSONWebKeySet{Keys: make([]jose.JSONWebKey, 0, len(b.JWT))}
	for _, a := range b.JWT {
		key := jose.JSONWebKey{Key: a.Key, KeyID: a.KeyID, Algorithm: algorithm(a)}
		if d.cfg.SetKeyUse {
			key.Use = "sig"
		}
		set.Keys = append(set.Keys, key)
	}
	slices.SortFunc(set.Keys, func(x, y jose.JSONWebKey) int { return strings.Compare(x.KeyID, y.KeyID) })
	text, err := json.Marshal(set)
	if err != nil {
		return nil, fmt.Errorf("write JWK set: %w", err)
	}
	d.written.Store(&document{of: b, text: text})
	return text, nil
}

// algorithm is what the key signs with (RFC 7518 section 3), empty if that is not decided by the key.
func algorithm(a identity.JWTAuthority) string {
	switch key := a.Key.(type) {
	case *rsa.PublicKey:
		return "RS256"
	case *ecdsa.PublicKey:
		switch key.Curve.Params().BitSize {
		case 256:
			return "ES256"
		case 384:
			return "ES384"
		}
	}
	return ""
}

// Serve serves the documents until ctx ends, and closes the listener. config is nil behind a proxy.
func (d *Discovery) Serve(ctx context.Context, listener net.Listener, config *tls.Config, log logrus.FieldLogger) error {
	s := &http.Server{
		Handler: d, TLSConfig: config,
		ReadHeaderTimeout: patience, ReadTimeout: patience, WriteTimeout: patience, IdleTimeout: patience,
		MaxHeaderBytes: maxGreeting,
		ErrorLog:       stdlog.New(debugWriter{log.WithField("listener", "oidc_discovery")}, "", 0),
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()
	guests := netutil.LimitListener(listener, maxGuests)
	var err error
	if config == nil {
		err = s.Serve(guests)
	} else {
		err = s.ServeTLS(guests, "", "")
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve OIDC discovery: %w", err)
	}
	return nil
}
