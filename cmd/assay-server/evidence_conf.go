package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/verdict/image"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/rules"
	"github.com/assay-id/assay/server/verdict/trust"
)

// evidence returns what the file says of image evidence, nil if that is nothing.
func evidence(from *conf.Server) (*server.Evidence, error) {
	if !from.Evidence.On {
		return nil, nil // evidence is optional
	}
	r, err := evidenceRules(from)
	if err != nil {
		return nil, err
	}
	e := from.Evidence
	registries := image.Config{Registries: e.Registries, Hosts: e.RegistryHosts, Plain: e.PlainRegistries, AllowPrivate: e.PrivateRegistries}
	if e.RegistryCredentials != "" {
		if registries.Auths, err = image.OpenAuths(e.RegistryCredentials); err != nil {
			return nil, err
		}
	}
	return &server.Evidence{Rules: r, CRLPath: e.CRLFile, CRLAddress: e.CRLAddress, Registries: registries}, nil
}

// reloadEvidence puts the rules of a file that was read anew in force.
func reloadEvidence(ctx context.Context, now *conf.Server, r *server.Running) error {
	if r.SetRules == nil {
		if now.Evidence.On {
			return errors.New("the file is about evidence now, and was not when the server started: a restart is needed")
		}
		return nil
	}
	set, err := evidenceRules(now)
	if err != nil {
		return err
	}
	return r.SetRules(ctx, set)
}

func evidenceRules(from *conf.Server) (verdict.Rules, error) {
	e := from.Evidence
	r := verdict.Rules{
		Policies: conf.NamedOf[*policy.ScanPolicy](from.Named, rules.Scan),
		Trust:    conf.NamedOf[*trust.Policy](from.Named, rules.Trust),
		Sources:  conf.NamedOf[*trust.Source](from.Named, rules.Source),
		KEVPath:  e.KEVFile, EPSSPath: e.EPSSFile, FeedEvery: e.FeedRefresh, KeepUnused: e.KeepUnused,
	}
	for _, w := range e.Webhooks {
		hook := verdict.Webhook{Name: w.Name, URL: w.URL, Events: w.Events}
		for _, event := range w.Events {
			if !slices.Contains(verdict.EventTypes, event) {
				return r, fmt.Errorf("webhook %q: there is no event %q; there are %s", w.Name, event, strings.Join(verdict.EventTypes, ", "))
			}
		}
		if w.KeyFile != "" {
			key, err := os.ReadFile(w.KeyFile)
			if err != nil {
				return r, fmt.Errorf("webhook %q: read key: %w", w.Name, err)
			}
			if hook.Key = []byte(strings.TrimSpace(string(key))); len(hook.Key) < 16 {
				return r, fmt.Errorf("webhook %q: the key in %s is shorter than 16 bytes and could be guessed", w.Name, w.KeyFile)
			}
		}
		if w.CAFile != "" {
			client, err := clientFor(w.CAFile)
			if err != nil {
				return r, fmt.Errorf("webhook %q: %w", w.Name, err)
			}
			hook.Client = client
		}
		r.Webhooks = append(r.Webhooks, hook)
	}
	return r, nil
}

// clientFor returns a client that trusts the certificates in the file and no others.
func clientFor(path string) (*http.Client, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, errors.New("there is no PEM certificate in " + path)
	}
	return &http.Client{
		Timeout:       10 * time.Second,
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}
