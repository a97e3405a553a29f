package trust

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/assay-id/assay/server/records"
)

// maxDocument is the largest bundle document in bytes: a thousand authorities would not fill it.
const maxDocument = 1 << 20

// get returns what a federation's bundle endpoint answers.
func (f *Fetcher) get(ctx context.Context, federation *records.Federation) ([]byte, error) {
	if err := federation.Check(); err != nil { // stored by a server that knew other rules
		return nil, refuse("%s", err)
	}
	config, err := f.authentication(ctx, federation)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, f.cfg.Timeout)
	defer cancel()
	transport := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    10 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // a megabyte can be a thousand
		DisableKeepAlives:      true, // the endpoint proves itself each time
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{
		Transport: transport,
		// A redirect would be to a place that nobody federated with, perhaps inside this network.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, federation.URL, nil)
	if err != nil {
		return nil, refuse("its URL is none")
	}
	req.Header.Set("Accept", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, failed(err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return nil, refuse("the endpoint redirects, which is not followed")
	case resp.StatusCode != http.StatusOK:
		return nil, fail("the endpoint answers with status %d", resp.StatusCode)
	case resp.ContentLength > maxDocument:
		return nil, refuse("it is larger than %d bytes", maxDocument)
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	switch {
	case ctx.Err() != nil: // the endpoint may see the end of the time first, and end what it said
		return nil, failed(ctx.Err())
	case err != nil:
		return nil, failed(err)
	case len(text) > maxDocument:
		return nil, refuse("it is larger than %d bytes", maxDocument)
	}
	return text, nil
}

// authentication returns how the endpoint proves itself, by the federation's profile.
func (f *Fetcher) authentication(ctx context.Context, federation *records.Federation) (*tls.Config, error) {
	if federation.EndpointID.IsZero() {
		return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: f.cfg.Roots}, nil
	}
	td := federation.EndpointID.TrustDomain()
	held, err := f.store.Bundle(ctx, td)
	switch {
	case errors.Is(err, records.ErrNotFound), err == nil && len(held.X509) == 0:
		return nil, fail("there is no bundle of %q to verify its endpoint with; set one with \"bundle set\"", td.Name())
	case err != nil:
		return nil, err
	}
	config := tlsconfig.TLSClientConfig(held.X509Bundle(), tlsconfig.AuthorizeID(federation.EndpointID))
	config.MinVersion = tls.VersionTLS12
	verify := config.VerifyPeerCertificate
	config.VerifyPeerCertificate = nil
	// A resumed session is verified too, should there ever be one.
	config.VerifyConnection = func(state tls.ConnectionState) error {
		raw := make([][]byte, len(state.PeerCertificates))
		for i, cert := range state.PeerCertificates {
			raw[i] = cert.Raw
		}
		if err := verify(raw, nil); err != nil {
			return fmt.Errorf("%w: %w", errEndpoint, err)
		}
		return nil
	}
	return config, nil
}

// errEndpoint says that an endpoint is not who it should be.
var errEndpoint = errors.New("the endpoint's SVID")

// failed returns why nothing came, ErrRefused if the endpoint is not who it should be.
func failed(err error) error {
	if inner, ok := errors.AsType[*url.Error](err); ok {
		err = inner.Err // it repeats the URL
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fail("the endpoint took too long")
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return refuse("the endpoint's certificate: %s", clip(err.Error()))
	}
	if errors.Is(err, errEndpoint) {
		return refuse("%s", clip(err.Error()))
	}
	return fail("%s", clip(err.Error()))
}
