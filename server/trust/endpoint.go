package trust

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	stdlog "log" //nolint:depguard // net/http takes no other
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/netutil"

	"github.com/assay-id/assay/workloadapi/identity"
)

// Pictures has the own bundle; *view.View is one.
type Pictures interface {
	Bundle(td spiffeid.TrustDomain) (*identity.Bundle, bool)
}

// Limits of the endpoint: everybody may come, nobody may stay.
const (
	maxGuests   = 1000
	maxGreeting = 8 << 10
	patience    = 10 * time.Second
)

// Endpoint answers GET / with the own bundle as a SPIFFE bundle document (SPIFFE Federation section 5).
type Endpoint struct {
	td       spiffeid.TrustDomain
	pictures Pictures
	hint     time.Duration
	written  atomic.Pointer[document]
	requests *prometheus.CounterVec
}

// document is a bundle with its document, which is made once.
type document struct {
	of   *identity.Bundle
	text []byte
}

// NewEndpoint returns the endpoint of a trust domain. hint is how often others are told to look.
func NewEndpoint(td spiffeid.TrustDomain, pictures Pictures, hint time.Duration, metrics prometheus.Registerer) *Endpoint {
	e := &Endpoint{
		td: td, pictures: pictures, hint: hint,
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_bundle_endpoint_requests_total",
			Help: "Requests to the bundle endpoint, by what came of them: served, refused (not GET /), failed.",
		}, []string{"outcome"}),
	}
	if metrics != nil {
		metrics.MustRegister(e.requests)
	}
	return e
}

// ServeHTTP answers one request. It never redirects.
func (e *Endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Path != "/":
		e.requests.WithLabelValues("refused").Inc()
		http.Error(w, "404 page not found", http.StatusNotFound)
		return
	case r.Method != http.MethodGet:
		e.requests.WithLabelValues("refused").Inc()
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "405 method not allowed", http.StatusMethodNotAllowed)
		return
	}
	text, err := e.document()
	if err != nil {
		e.requests.WithLabelValues("failed").Inc()
		http.Error(w, "500 unable to retrieve local bundle", http.StatusInternalServerError)
		return
	}
	e.requests.WithLabelValues("served").Inc()
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(text) // the client is gone if it fails
}

func (e *Endpoint) document() ([]byte, error) {
	b, ok := e.pictures.Bundle(e.td)
	if !ok {
		return nil, errors.New("there is no bundle yet")
	}
	if d := e.written.Load(); d != nil && d.of == b {
		return d.text, nil
	}
	doc := b.SPIFFEBundle()
	doc.SetRefreshHint(e.hint)
	text, err := doc.Marshal()
	if err != nil {
		return nil, fmt.Errorf("write bundle document: %w", err)
	}
	e.written.Store(&document{of: b, text: text})
	return text, nil
}

// Serve serves the endpoint over TLS until ctx ends, and closes the listener.
func (e *Endpoint) Serve(ctx context.Context, listener net.Listener, config *tls.Config, log logrus.FieldLogger) error {
	noise := log.WithField("listener", "bundle_endpoint")
	s := &http.Server{
		Handler: e, TLSConfig: config,
		ReadHeaderTimeout: patience, ReadTimeout: patience, WriteTimeout: patience, IdleTimeout: patience,
		MaxHeaderBytes: maxGreeting,
		ErrorLog:       stdlog.New(debugWriter{noise}, "", 0),
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() }) // a document is short: nobody waits for it
	defer stop()
	if err := s.ServeTLS(netutil.LimitListener(listener, maxGuests), "", ""); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve bundle endpoint: %w", err)
	}
	return nil
}

// debugWriter is what the HTTP server says of strangers' broken handshakes.
type debugWriter struct{ log logrus.FieldLogger }

func (w debugWriter) Write(p []byte) (int, error) {
	w.log.Debug(clip(string(p)))
	return len(p), nil
}

var _ io.Writer = debugWriter{}

// SVIDConfig is the TLS of the profile https_spiffe: the endpoint shows the server's own SVID.
func SVIDConfig(certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: certificate, SessionTicketsDisabled: true}
}
