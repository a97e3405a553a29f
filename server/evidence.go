package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/api"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/verdict"
	registry "github.com/assay-id/assay/server/verdict/image"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Evidence is what the server is told about image evidence.
type Evidence struct {
	// Rules are the policies, and may be replaced while the server runs; see Running.
	Rules verdict.Rules
	// CRLPath is a file that holds the lists of revoked certificates as PEM, and CRLAddress an address where
	// they are served over HTTP; empty: neither.
	CRLPath, CRLAddress string
	// Registries say where manifests may be fetched; without any, nothing is.
	Registries registry.Config
}

// openEvidence returns nil if the configuration has nothing about evidence.
func openEvidence(ctx context.Context, cfg *Config, turned func(verdict.Turn), rec *records.Records, pictures *view.View, authority *ca.CA, log *audit.Log, logger logrus.FieldLogger) (*verdict.Service, error) {
	if cfg.Evidence == nil {
		return nil, nil // evidence is optional
	}
	parts := verdict.Parts{Store: rec, View: pictures, Audit: log, Signer: authority}
	if len(cfg.Evidence.Registries.Registries) > 0 {
		registries := cfg.Evidence.Registries
		registries.Dir = filepath.Join(cfg.DataDir, "manifests")
		fetcher, err := registry.NewFetcher(registries)
		if err != nil {
			return nil, fmt.Errorf("open registries: %w", err)
		}
		parts.Fetcher = fetcher
	}
	return verdict.Open(ctx, parts, cfg.Evidence.Rules, verdict.Config{
		MarksPath: filepath.Join(cfg.DataDir, "evidence-marks"),
		CRLPath:   cfg.Evidence.CRLPath,
		// The lists go the road that bundles go.
		CRLChanged: func(ctx context.Context, lists [][]byte) error {
			_, _, err := rec.UpdateBundle(ctx, cfg.TrustDomain, func(b *identity.Bundle) error {
				b.CRLs = lists
				return nil
			})
			return err
		},
		Turned: turned, Log: logger, Metrics: cfg.Metrics, Now: cfg.Now,
	})
}

// judging returns the service as the API takes it: no interface around a nil pointer.
func judging(judge *verdict.Service) api.Evidence {
	if judge == nil {
		return nil
	}
	return judge
}

// listenCRL opens the listener of the list of revoked certificates, nil if there is none.
func listenCRL(cfg *Config) (net.Listener, error) {
	if cfg.Evidence == nil || cfg.Evidence.CRLAddress == "" {
		return nil, nil // no listener is configured
	}
	l, err := net.Listen("tcp", cfg.Evidence.CRLAddress)
	if err != nil {
		return nil, fmt.Errorf("listen for crl_address: %w", err)
	}
	return l, nil
}

// serveCRL answers GET /crl with the active authority's list of revoked certificates (RFC 5280 section
// 4.2.1.13 asks for one list as DER over plain HTTP: it is signed and secret to nobody) and GET /crl.pem with
// those of all authorities, as crl_file has them, until ctx ends.
func serveCRL(ctx context.Context, l net.Listener, judge *verdict.Service) error {
	mux := http.NewServeMux()
	answer := func(kind string, content func(lists [][]byte) []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			lists := judge.CRLs()
			if len(lists) == 0 {
				http.Error(w, "there is no list yet", http.StatusServiceUnavailable)
				return
			}
			w.Header().Set("Content-Type", kind)
			_, _ = w.Write(content(lists)) // the client is gone if it fails
		}
	}
	mux.HandleFunc("GET /crl", answer("application/pkix-crl", func(lists [][]byte) []byte { return lists[0] }))
	mux.HandleFunc("GET /crl.pem", answer("application/x-pem-file", verdict.PEM))
	s := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()
	if err := s.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}
