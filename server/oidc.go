package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/server/trust"
	"github.com/assay-id/assay/server/view"
)

// OIDCDiscovery is where verifiers that speak OpenID Connect find the keys of JWT-SVIDs. Its certificate is
// from a File or by ACME; without both it speaks plain HTTP, for a proxy that does TLS.
type OIDCDiscovery struct {
	trust.OIDC
	Address string
	Port    int
	// SocketPath is a Unix socket for the proxy, in place of Address and Port.
	SocketPath string
	File       *ServingCertificate
	ACME       *trust.ACME
}

func (o *OIDCDiscovery) check(say func(bad bool, format string, args ...any)) {
	if o == nil {
		return
	}
	say(len(o.Domains) == 0, "OIDC discovery has no domain")
	say(o.Port < 0 || o.Port > 65535, "OIDC discovery port %d is out of range", o.Port)
	say(o.Address != "" && net.ParseIP(o.Address) == nil, "OIDC discovery address %q is no IP address", o.Address)
	say(o.File != nil && o.ACME != nil, "OIDC discovery has a certificate file and ACME: it can show one certificate")
	say(len(o.SocketPath) > maxSocketPath, "OIDC discovery socket path is %d bytes long, the limit is %d", len(o.SocketPath), maxSocketPath)
}

// discovery is the listener of OIDC discovery; nil if there is none.
type discovery struct {
	documents *trust.Discovery
	listener  net.Listener
	tls       *tls.Config            // nil: plain
	file      *trust.FileCertificate // nil if the certificate is not from files
	interval  time.Duration
	log       logrus.FieldLogger
}

func openDiscovery(cfg *Config, pictures *view.View, log logrus.FieldLogger) (*discovery, error) {
	o := cfg.OIDC
	if o == nil {
		return nil, nil // it is optional
	}
	d := &discovery{log: log, documents: trust.NewDiscovery(cfg.TrustDomain, pictures, o.OIDC, cfg.Metrics)}
	var err error
	switch {
	case o.File != nil:
		d.interval = o.File.Interval
		fill(&d.interval, time.Hour)
		if d.file, err = trust.OpenFileCertificate(o.File.CertPath, o.File.KeyPath); err != nil {
			return nil, fmt.Errorf("open OIDC discovery: %w", err)
		}
		d.tls = d.file.Config()
	case o.ACME != nil:
		acme := *o.ACME
		fill(&acme.Cache, filepath.Join(cfg.DataDir, "oidc-acme"))
		if d.tls, err = acme.Config(log); err != nil {
			return nil, fmt.Errorf("open OIDC discovery: %w", err)
		}
	}
	if d.listener, err = o.listen(); err != nil {
		return nil, err
	}
	return d, nil
}

// listen opens the socket. One that a run before has left is replaced.
func (o *OIDCDiscovery) listen() (net.Listener, error) {
	if o.SocketPath == "" {
		address := net.JoinHostPort(o.Address, strconv.Itoa(o.Port))
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("listen for OIDC discovery at %s: %w", address, err)
		}
		return l, nil
	}
	// The proxy runs as somebody else, and what is served is public.
	l, err := listenUnix("oidc_discovery.listen_socket_path", o.SocketPath, 0o777, 0o755)
	if err != nil {
		return nil, err // not a *Socket that is nil
	}
	return l, nil
}

// run serves until ctx ends; ready says that there is a bundle to serve.
func (d *discovery) run(ctx context.Context, ready <-chan struct{}) error {
	if d == nil {
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		select {
		case <-ready:
		case <-ctx.Done():
			return nil
		}
		d.log.WithField("address", d.listener.Addr().String()).Info("OIDC discovery is ready")
		return d.documents.Serve(ctx, d.listener, d.tls, d.log)
	})
	if d.file != nil {
		group.Go(func() error { return d.file.Run(ctx, d.interval, d.log) })
	}
	return group.Wait()
}

// address is the listener's, nil if there is none.
func (d *discovery) address() net.Addr {
	if d == nil {
		return nil
	}
	return d.listener.Addr()
}

// Close closes the listener of a server that did not get to run.
func (d *discovery) Close() error {
	if d == nil {
		return nil
	}
	if err := d.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
