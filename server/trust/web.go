package trust

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"
)

// maxPEM is the largest certificate or key file that is read, in bytes.
const maxPEM = 1 << 20

// FileCertificate is a certificate for the profile https_web whose files something else renews.
type FileCertificate struct {
	certPath, keyPath string
	current           atomic.Pointer[loaded]
}

type loaded struct {
	cert, key []byte
	pair      *tls.Certificate
}

// OpenFileCertificate reads a certificate chain and its key, as PEM.
func OpenFileCertificate(certPath, keyPath string) (*FileCertificate, error) {
	f := &FileCertificate{certPath: certPath, keyPath: keyPath}
	if _, err := f.read(); err != nil {
		return nil, err
	}
	return f, nil
}

// read takes over what the files hold; changed says that it is another than before.
func (f *FileCertificate) read() (changed bool, err error) {
	var now loaded
	if now.cert, err = readPEM(f.certPath); err != nil {
		return false, fmt.Errorf("read serving certificate: %w", err)
	}
	if now.key, err = readPEM(f.keyPath); err != nil {
		return false, fmt.Errorf("read key of serving certificate: %w", err)
	}
	if old := f.current.Load(); old != nil && bytes.Equal(old.cert, now.cert) && bytes.Equal(old.key, now.key) {
		return false, nil
	}
	pair, err := tls.X509KeyPair(now.cert, now.key)
	if err != nil {
		return false, fmt.Errorf("read serving certificate %s: %w", f.certPath, err)
	}
	now.pair = &pair
	f.current.Store(&now)
	return true, nil
}

func readPEM(path string) ([]byte, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, err
	case info.Size() > maxPEM:
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxPEM)
	}
	return os.ReadFile(path)
}

// Run reads the files again at an interval until ctx ends. A pair that does not fit, as while it is being
// written, leaves the one before in use.
func (f *FileCertificate) Run(ctx context.Context, interval time.Duration, log logrus.FieldLogger) error {
	broken := ""
	for sleep(ctx, interval) {
		changed, err := f.read()
		switch {
		case err != nil && err.Error() != broken:
			broken = err.Error()
			log.WithError(err).Warn("the certificate before stays in use")
		case err == nil:
			broken = ""
			if changed {
				log.WithField("path", f.certPath).Info("serving certificate has changed")
			}
		}
	}
	return nil
}

// Config is the TLS of the endpoint.
func (f *FileCertificate) Config() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return f.current.Load().pair, nil },
	}
}

// ACME gets the certificate for the profile https_web from an authority of the web (RFC 8555).
type ACME struct {
	// Domain is the one name to get a certificate for.
	Domain string
	Email  string
	// DirectoryURL is the authority's. Empty: Let's Encrypt.
	DirectoryURL string
	// AcceptTOS is the operator's consent to the authority's terms of service, without which it gives nothing.
	AcceptTOS bool
	// Cache is a folder for the account's key and certificates. It is made with mode 0700.
	Cache string
}

// errTerms says that nobody consented.
var errTerms = errors.New("tos_accepted is not set: the ACME authority's terms of service have to be accepted")

// Config is the TLS of the endpoint, which also answers the authority's challenges (RFC 8737): the authority
// must reach it at port 443 of the domain.
func (a ACME) Config(log logrus.FieldLogger) (*tls.Config, error) {
	if !a.AcceptTOS {
		return nil, errTerms
	}
	m := &autocert.Manager{
		Prompt: autocert.AcceptTOS, Email: a.Email, Cache: autocert.DirCache(a.Cache),
		HostPolicy: autocert.HostWhitelist(a.Domain), // or anybody could have certificates ordered
	}
	m.Client = &acme.Client{DirectoryURL: a.DirectoryURL, HTTPClient: &http.Client{Transport: newOrders(http.DefaultTransport)}}
	if a.DirectoryURL == "" {
		m.Client.DirectoryURL = autocert.DefaultACMEDirectory
	}
	config := m.TLSConfig()
	config.MinVersion = tls.VersionTLS12
	config.SessionTicketsDisabled = true
	config.GetCertificate = a.warned(config.GetCertificate, time.Now, log)
	return config, nil
}

// warnAgain is how long it is quiet after a warning: strangers may ask for a certificate as often as they like.
const warnAgain = 10 * time.Minute

// warned has the operator told when the domain has no certificate, or one that nobody renews: callers are told
// nothing, and the library tells nobody. Other names and an authority's challenges are not the operator's matter.
func (a ACME) warned(get func(*tls.ClientHelloInfo) (*tls.Certificate, error), now func() time.Time, log logrus.FieldLogger) func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	log = log.WithField("domain", a.Domain)
	var last atomic.Int64 // when it was told, in Unix seconds
	return func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		cert, err := get(hello)
		if !strings.EqualFold(hello.ServerName, a.Domain) || slices.Contains(hello.SupportedProtos, acme.ALPNProto) {
			return cert, err
		}
		at, t := last.Load(), now()
		late := err == nil && cert.Leaf != nil && cert.Leaf.NotAfter.Sub(t) < cert.Leaf.NotAfter.Sub(cert.Leaf.NotBefore)/6
		if (err == nil && !late) || t.Sub(time.Unix(at, 0)) < warnAgain || !last.CompareAndSwap(at, t.Unix()) {
			return cert, err
		}
		if err != nil {
			log.WithField("error", clip(err.Error())).Warn("there is no certificate from the ACME authority; whoever connects is refused until there is one")
		} else {
			log.WithField("expires_at", cert.Leaf.NotAfter.UTC().Format(time.RFC3339)).Warn("the certificate from the ACME authority has not been renewed")
		}
		return cert, err
	}
}
