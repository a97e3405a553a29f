package server

import (
	"crypto/x509"
	_ "embed" // the certificates
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/awsiid"
)

const (
	// maxCertificateFile is the largest certificate file in bytes.
	maxCertificateFile = 64 << 10
	// guide is where AWS publishes its certificates.
	guide = "AWS publishes them in the EC2 user guide, under \"AWS public certificates for instance identity document signatures\", RSA-2048"
)

// known has the certificates of AWS's regions, each after a line that begins with the region's name.
//
//go:embed regions.pem
var known string

// knownCertificates are AWS's certificates by region.
func knownCertificates() (map[string]*x509.Certificate, error) {
	all := map[string]*x509.Certificate{}
	for rest := known; ; {
		words, _, found := strings.Cut(rest, "-----BEGIN CERTIFICATE-----")
		if !found {
			return all, nil
		}
		head := words[strings.LastIndexByte(strings.TrimSuffix(words, "\n"), '\n')+1:]
		region, _, _ := strings.Cut(head, " ")
		block, after := pem.Decode([]byte(rest))
		if block == nil || !awsapi.IsRegion(region) || all[region] != nil {
			return nil, fmt.Errorf("certificate number %d of those that are built in is none", len(all)+1)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate of %s that is built in: %w", region, err)
		}
		all[region], rest = cert, string(after)
	}
}

// certificates are those of the regions whose instances are accepted.
func certificates(c *awsiid.ServerConfig, now time.Time) (map[string]*x509.Certificate, error) {
	all, err := knownCertificates()
	if err != nil {
		return nil, err
	}
	for region, path := range c.RegionCertificates {
		if !awsapi.IsRegion(region) {
			return nil, fmt.Errorf("region_certificates: %q is no region", region)
		}
		cert, err := readCertificate(path)
		if err != nil {
			return nil, fmt.Errorf("region_certificates: %s: %w", region, err)
		}
		if now.After(cert.NotAfter) {
			return nil, fmt.Errorf("region_certificates: %s: %s expired on %s; take the region's new one (%s)", region, path, cert.NotAfter.UTC().Format(time.DateOnly), guide)
		}
		all[region] = cert
	}
	accepted := c.Regions
	if len(accepted) == 0 && len(c.RegionCertificates) > 0 {
		accepted = slices.Sorted(maps.Keys(c.RegionCertificates))
	}
	if len(accepted) == 0 {
		return all, nil
	}
	some := map[string]*x509.Certificate{}
	for _, region := range accepted {
		cert := all[region]
		switch {
		case !awsapi.IsRegion(region):
			return nil, fmt.Errorf("regions: %q is no region", region)
		case cert == nil:
			return nil, fmt.Errorf("regions: the certificate of %s is not built in; name its file in region_certificates (%s)", region, guide)
		}
		some[region] = cert
	}
	for region := range c.RegionCertificates {
		if some[region] == nil {
			return nil, fmt.Errorf("region_certificates: %s is not one of the regions; add it there, or leave it out here", region)
		}
	}
	return some, nil
}

// readCertificate reads the one certificate of a region's file.
func readCertificate(path string) (*x509.Certificate, error) {
	text, err := attestor.ReadFile(path, maxCertificateFile)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s: no PEM certificate in it (%s)", path, guide)
	}
	if more, _ := pem.Decode(rest); more != nil {
		return nil, fmt.Errorf("%s: more than one PEM block in it", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cert, nil
}

// certificate is that of a region, if its instances are accepted and it is valid. What it says besides is for
// who reads the server's log.
func (j *judge) certificate(region string) (*x509.Certificate, error) {
	cert := j.certificates[region]
	switch now := j.now(); {
	case !awsapi.IsRegion(region):
		return nil, errors.New("document is of no region")
	case cert == nil && len(j.config.Regions)+len(j.config.RegionCertificates) > 0:
		return nil, fmt.Errorf("document is of %s, which is not accepted; name it in regions", region)
	case cert == nil:
		return nil, fmt.Errorf("document is of %s, whose certificate is not built in; name its file in region_certificates", region)
	case now.After(cert.NotAfter):
		return nil, fmt.Errorf("certificate of %s expired on %s; name the file of its new one in region_certificates", region, cert.NotAfter.UTC().Format(time.DateOnly))
	case now.Before(cert.NotBefore):
		return nil, fmt.Errorf("certificate of %s is not valid before %s; is the server's clock right?", region, cert.NotBefore.UTC().Format(time.DateOnly))
	}
	return cert, nil
}
