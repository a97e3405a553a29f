package trust

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Push is a caller who may push evidence, and what is known of it.
type Push struct {
	// Kind is "oidc" or "svid".
	Kind string
	// Issuer and Subject are the token's iss and sub; the trust domain and SPIFFE ID of an SVID.
	Issuer, Subject string
	// Fields are the token's claims under the names that certificates have for them (FieldSourceURI and
	// so on): which run of which workflow pushes. They are about the push, not about the image.
	Fields map[string]string
	// ExpiresAt is when the token expires, zero for an SVID.
	ExpiresAt time.Time
	// Sources are those whose rules the caller fulfills, by name; never empty.
	Sources []*Source

	among *[]*Source // what was in force when the caller was let in
}

// For returns the sources among the push's that may push for the repository, which must be without tag and
// digest. None means that the push is to be refused.
func (p *Push) For(repository string) []*Source {
	var fit []*Source
	for _, s := range p.Sources {
		if s.Allows(repository) {
			fit = append(fit, s)
		}
	}
	return fit
}

// CallersConfig are the optional parts of Callers.
type CallersConfig struct {
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log is told when keys cannot be fetched; nil tells nobody.
	Log logrus.FieldLogger
	// Metrics takes the counters; nil counts for nobody.
	Metrics prometheus.Registerer
	// Block is what the sources are in the configuration, for errors; "": evidence_source.
	Block string
}

// Callers knows who may push evidence. It is safe for concurrent use.
type Callers struct {
	sources atomic.Pointer[[]*Source]
	issuers *issuers
	now     func() time.Time
	block   string
	tokens  *prometheus.CounterVec
}

// NewCallers returns Callers with the given sources. Nothing is fetched before the first token comes. The
// error says that the metrics could not be registered.
func NewCallers(sources []*Source, config CallersConfig) (*Callers, error) {
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.Log == nil {
		quiet := logrus.New()
		quiet.SetLevel(logrus.PanicLevel)
		config.Log = quiet
	}
	c := &Callers{
		now: config.Now, block: cmp.Or(config.Block, "evidence_source"),
		tokens: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_evidence_tokens_total",
			Help: "OIDC tokens shown by who pushes evidence, by result: accepted, or why not.",
		}, []string{"result"}),
	}
	fetches := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "assay_server_evidence_key_fetches_total",
		Help: "Fetches of OIDC issuers' keys, by result: ok or failed.",
	}, []string{"result"})
	c.issuers = &issuers{now: config.Now, log: config.Log, fetches: fetches, sets: map[string]*remoteKeys{}}
	if config.Metrics != nil {
		for _, m := range []prometheus.Collector{c.tokens, fetches} {
			if err := config.Metrics.Register(m); err != nil {
				return nil, fmt.Errorf("register evidence metrics: %w", err)
			}
		}
	}
	c.Replace(sources)
	return c, nil
}

// Replace puts other sources in force.
func (c *Callers) Replace(sources []*Source) {
	sources = slices.SortedFunc(slices.Values(sources), func(a, b *Source) int { return strings.Compare(a.name, b.name) })
	c.sources.Store(&sources)
}

// Sources returns the sources in force, by name. The caller must not change the slice.
func (c *Callers) Sources() []*Source { return *c.sources.Load() }

// Current reports whether the sources in force are still those by which the push was let in.
func (c *Callers) Current(p *Push) bool { return p.among == c.sources.Load() }

// SVID says what a caller may push who proved an X.509-SVID of the ID. The error wraps ErrRefused.
func (c *Callers) SVID(id spiffeid.ID) (*Push, error) {
	among := c.sources.Load()
	p := &Push{Kind: "svid", Issuer: id.TrustDomain().IDString(), Subject: id.String(), among: among}
	for _, s := range *among {
		if slices.ContainsFunc(s.ids, func(pattern string) bool { return under(pattern, id.String()) }) {
			p.Sources = append(p.Sources, s)
		}
	}
	if len(p.Sources) == 0 {
		return nil, refuse(ErrIdentity, "no evidence_source lets %s push", id)
	}
	return p, nil
}

// Token says what a caller may push who shows an OIDC token (a JWT, without "Bearer "). The error wraps
// ErrRefused if the token is no good, and says why; it is ErrUnavailable if the issuer's keys could not be
// fetched, or that of ctx. It never holds the token.
func (c *Callers) Token(ctx context.Context, token string) (*Push, error) {
	p, err := c.token(ctx, token)
	result := "accepted"
	if err != nil {
		result = reasonOf(err)
	}
	c.tokens.WithLabelValues(result).Inc()
	return p, err
}

// maxToken is several times what CI systems make.
const maxToken = 16 << 10

// tokenSkew is how far the issuer's clock may be off: a token is worth little beyond its minutes.
const tokenSkew = time.Minute

func (c *Callers) token(ctx context.Context, token string) (*Push, error) {
	claimed, err := issuerOf(token)
	if err != nil {
		return nil, err
	}
	var push *Push
	var refusals []error
	known := false
	among := c.sources.Load()
	for _, s := range *among {
		for _, r := range s.tokens {
			if r.issuer != claimed {
				continue
			}
			known = true
			p, err := c.rule(ctx, r, token)
			if err != nil {
				if !isRefusal(err) {
					return nil, err
				}
				refusals = append(refusals, fmt.Errorf("%s %q: %w", c.block, s.name, err))
				continue
			}
			if push == nil {
				push, p.among = p, among
			}
			push.Sources = append(push.Sources, s)
			break
		}
	}
	switch {
	case !known:
		return nil, refuse(ErrUntrusted, "no %s accepts tokens of issuer %q", c.block, clip(claimed))
	case push == nil:
		return nil, join(refusals)
	}
	return push, nil
}

// issuerOf returns who a token says it is from, which decides with whose keys it is verified.
func issuerOf(token string) (string, error) {
	if len(token) > maxToken {
		return "", refuse(ErrTooLarge, "the token is %d bytes long, the limit is %d", len(token), maxToken)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", refuse(ErrMalformed, "the token is no signed JWT of three parts")
	}
	claims, err := rawURL(parts[1])
	if err != nil {
		return "", refuse(ErrMalformed, "the claims of the token are not base64")
	}
	m, err := topOf(claims)
	if err != nil {
		return "", err
	}
	return m.text("iss", "the token's claims")
}

// rule verifies a token under one rule.
func (c *Callers) rule(ctx context.Context, r *tokenRule, token string) (*Push, error) {
	names := make([]string, len(r.algorithms))
	for i, a := range r.algorithms {
		names[i] = string(a)
	}
	keys := c.issuers.keys(r)
	verifier := oidc.NewVerifier(r.issuer, keys, &oidc.Config{
		SupportedSigningAlgs: names,
		// The audience and times are compared below: the library knows one audience and no skew.
		SkipClientIDCheck: true,
		SkipExpiryCheck:   true,
	})
	idToken, err := verifier.Verify(ctx, token)
	if err != nil {
		if keys.failed != nil {
			return nil, keys.failed
		}
		return nil, refuse(ErrSignature, "the token does not verify: %w", oneLine(err))
	}
	if idToken.Issuer != r.issuer { // the library lets Google's two forms pass for each other
		return nil, refuse(ErrIdentity, "the token is of issuer %q, and not of %q", clip(idToken.Issuer), r.issuer)
	}
	if !slices.ContainsFunc(idToken.Audience, func(a string) bool { return r.audiences[a] }) {
		return nil, refuse(ErrAudience, "the token is made for %s, and not for %s", clip(orList(idToken.Audience)), orList(sortedKeys(r.audiences)))
	}
	var raw json.RawMessage
	if err := idToken.Claims(&raw); err != nil {
		return nil, refuse(ErrMalformed, "the token's claims are unreadable: %w", oneLine(err))
	}
	claims, err := parseClaims(raw)
	if err != nil {
		return nil, err
	}
	expires, err := claims.current(c.now())
	if err != nil {
		return nil, err
	}
	if err := claims.hold(r.where); err != nil {
		return nil, err
	}
	return &Push{Kind: "oidc", Issuer: r.issuer, Subject: idToken.Subject, Fields: claims.fields(r.issuer), ExpiresAt: expires}, nil
}
