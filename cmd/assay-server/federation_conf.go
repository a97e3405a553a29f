package main

import (
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/trust"
)

// federation hands the file's federation block to the server.
func federation(from conf.Federation) server.Federation {
	f := server.Federation{Shortest: from.Shortest}
	for _, with := range from.With {
		f.With = append(f.With, &records.Federation{TrustDomain: with.TrustDomain, URL: with.URL, EndpointID: with.EndpointID})
	}
	e := from.Endpoint
	if e == nil {
		return f
	}
	f.Endpoint = &server.BundleEndpoint{Address: e.Address, Port: e.Port, RefreshHint: e.RefreshHint}
	if e.File != nil {
		f.Endpoint.File = &server.ServingCertificate{CertPath: e.File.CertPath, KeyPath: e.File.KeyPath, Interval: e.File.Interval}
	}
	if e.ACME != nil {
		// That the terms are accepted is what conf insists on.
		f.Endpoint.ACME = &trust.ACME{Domain: e.ACME.Domain, Email: e.ACME.Email, DirectoryURL: e.ACME.DirectoryURL, AcceptTOS: true}
	}
	return f
}

// oidcDiscovery hands the file's oidc_discovery block to the server.
func oidcDiscovery(from *conf.OIDCDiscovery) *server.OIDCDiscovery {
	if from == nil {
		return nil
	}
	o := &server.OIDCDiscovery{
		OIDC: trust.OIDC{
			Domains: from.Domains, Issuer: from.Issuer, JWKSURI: from.JWKSURI, Prefix: from.Prefix,
			SetKeyUse: from.SetKeyUse, Plain: from.PlainHTTP,
		},
		Address: from.Address, Port: from.Port, SocketPath: from.SocketPath,
	}
	if from.File != nil {
		o.File = &server.ServingCertificate{CertPath: from.File.CertPath, KeyPath: from.File.KeyPath, Interval: from.File.Interval}
	}
	if from.ACME != nil {
		o.ACME = &trust.ACME{Domain: from.ACME.Domain, Email: from.ACME.Email, DirectoryURL: from.ACME.DirectoryURL, AcceptTOS: true}
	}
	return o
}
