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

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/trust"
	"github.com/assay-id/assay/server/view"
)

// Federation is about exchanging bundles with other trust domains. The zero value serves no bundle
// endpoint, and fetches what trustdomain.v1 says.
type Federation struct {
	// Endpoint is where others fetch the own bundle. Nil: nowhere.
	Endpoint *BundleEndpoint
	// With are federations that win over those that were made through trustdomain.v1.
	With []*records.Federation
	// Shortest is the least time between two fetches of one bundle. 0: one minute.
	Shortest time.Duration
}

// BundleEndpoint is where others fetch the own bundle. Its profile is https_spiffe, with the server's own
// SVID, unless there is a File or an ACME, which make it https_web.
type BundleEndpoint struct {
	Address string
	Port    int
	// RefreshHint is how often others are told to look. 0: five minutes.
	RefreshHint time.Duration
	File        *ServingCertificate
	ACME        *trust.ACME
}

// ServingCertificate is a certificate in files that something else renews.
type ServingCertificate struct {
	CertPath, KeyPath string
	// Interval is how often the files are read again. 0: an hour.
	Interval time.Duration
}

func (f *Federation) check(own string, say func(bad bool, format string, args ...any)) {
	seen := map[string]bool{}
	for _, with := range f.With {
		name := with.TrustDomain.Name()
		say(name == own, "federation with %q: it is the server's own trust domain", name)
		say(seen[name], "federation with %q is configured twice", name)
		seen[name] = true
		if err := with.Check(); err != nil {
			say(true, "federation with %q: %w", name, err)
		}
	}
	if e := f.Endpoint; e != nil {
		say(e.Port < 0 || e.Port > 65535, "bundle endpoint port %d is out of range", e.Port)
		say(e.Address != "" && net.ParseIP(e.Address) == nil, "bundle endpoint address %q is no IP address", e.Address)
		say(e.File != nil && e.ACME != nil, "bundle endpoint has a certificate file and ACME: it can show one certificate")
	}
}

// abroad is what deals with other trust domains.
type abroad struct {
	fetcher  *trust.Fetcher
	endpoint *trust.Endpoint // nil if there is none, and then the rest too
	listener net.Listener
	tls      *tls.Config
	file     *trust.FileCertificate // nil if the certificate is not from files
	interval time.Duration
	log      logrus.FieldLogger
}

func openAbroad(cfg *Config, rec *records.Records, pictures *view.View, authority *ca.CA, log *audit.Log, logger logrus.FieldLogger) (*abroad, error) {
	a := &abroad{log: logger, fetcher: trust.New(rec, log, trust.Config{
		Static: cfg.Federation.With, Shortest: cfg.Federation.Shortest, Now: cfg.Now, Log: logger, Metrics: cfg.Metrics,
	})}
	e := cfg.Federation.Endpoint
	if e == nil {
		return a, nil
	}
	var err error
	switch {
	case e.File != nil:
		a.interval = e.File.Interval
		fill(&a.interval, time.Hour)
		if a.file, err = trust.OpenFileCertificate(e.File.CertPath, e.File.KeyPath); err != nil {
			return nil, fmt.Errorf("open bundle endpoint: %w", err)
		}
		a.tls = a.file.Config()
	case e.ACME != nil:
		acme := *e.ACME
		fill(&acme.Cache, filepath.Join(cfg.DataDir, "bundle-acme"))
		if a.tls, err = acme.Config(logger); err != nil {
			return nil, fmt.Errorf("open bundle endpoint: %w", err)
		}
	default:
		a.tls = trust.SVIDConfig(authority.ServerCertificate())
	}
	hint := e.RefreshHint
	fill(&hint, 5*time.Minute)
	a.endpoint = trust.NewEndpoint(cfg.TrustDomain, pictures, hint, cfg.Metrics)
	address := net.JoinHostPort(e.Address, strconv.Itoa(e.Port))
	if a.listener, err = net.Listen("tcp", address); err != nil {
		return nil, fmt.Errorf("listen for bundle endpoint at %s: %w", address, err)
	}
	return a, nil
}

// run fetches and serves until ctx ends; ready says that there is a bundle to serve.
func (a *abroad) run(ctx context.Context, ready <-chan struct{}) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return a.fetcher.Run(ctx) })
	if a.endpoint != nil {
		group.Go(func() error {
			select {
			case <-ready:
			case <-ctx.Done():
				return nil
			}
			a.log.WithField("address", a.listener.Addr().String()).Info("bundle endpoint is ready")
			return a.endpoint.Serve(ctx, a.listener, a.tls, a.log)
		})
	}
	if a.file != nil {
		group.Go(func() error { return a.file.Run(ctx, a.interval, a.log) })
	}
	return group.Wait()
}

// address is the bundle endpoint's, nil if there is none.
func (a *abroad) address() net.Addr {
	if a.listener == nil {
		return nil
	}
	return a.listener.Addr()
}

// Close closes the listener of a server that did not get to run.
func (a *abroad) Close() error {
	if a.listener == nil {
		return nil
	}
	if err := a.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
