package join

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Limits on what a bootstrap source may give.
const (
	maxBootstrap     = 1 << 20 // bytes
	bootstrapTimeout = 30 * time.Second
	maxRedirects     = 5
)

// Bootstrap says how the agent knows the server before it has a bundle of its own. At most one of
// Authorities, Path, URL, ConfigMap and Insecure is set.
type Bootstrap struct {
	// Authorities are trusted as they are.
	Authorities []*x509.Certificate
	// Path names a file and URL an https URL with the authorities; both are read again whenever they
	// are needed.
	Path, URL string
	// ConfigMap names one of the cluster that the agent is a pod of, as "name" in the pod's own namespace or
	// "namespace/name"; its key bundle.pem is waited for.
	ConfigMap string
	// Cluster is where ConfigMap is.
	Cluster Cluster
	// SPIFFE says that Path, URL or ConfigMap gives a SPIFFE bundle document; otherwise it is PEM.
	SPIFFE bool
	// Insecure trusts whoever answers with the server's SPIFFE ID.
	Insecure bool
	// Again is how long the server must have been unknown to the held bundle before the source is believed
	// again. A bundle that missed a whole rotation of authorities would otherwise lock the agent out for
	// good. 0: 10 minutes; negative: never.
	Again time.Duration
	// Roots verify the host of URL; nil: the system's.
	Roots *x509.CertPool
}

// load returns the authorities; none with Insecure.
func (b Bootstrap) load(ctx context.Context, td spiffeid.TrustDomain) ([]*x509.Certificate, error) {
	switch {
	case b.Insecure:
		return nil, nil
	case len(b.Authorities) > 0:
		return b.Authorities, nil
	case b.Path != "":
		raw, err := attestor.ReadFile(b.Path, maxBootstrap)
		if err != nil {
			return nil, fmt.Errorf("read trust bundle: %w", err)
		}
		certs, err := b.parse(td, raw)
		if err != nil {
			return nil, fmt.Errorf("read trust bundle %s: %w", b.Path, err)
		}
		return certs, nil
	case b.URL != "":
		raw, err := b.fetch(ctx)
		if err != nil {
			return nil, fmt.Errorf("fetch trust bundle: %w", err)
		}
		certs, err := b.parse(td, raw)
		if err != nil {
			return nil, fmt.Errorf("fetch trust bundle %s: %w", b.URL, err)
		}
		return certs, nil
	case b.ConfigMap != "":
		raw, err := b.configMap(ctx)
		if err != nil {
			return nil, fmt.Errorf("get trust bundle: %w", err)
		}
		certs, err := b.parse(td, raw)
		if err != nil {
			return nil, fmt.Errorf("get trust bundle from ConfigMap %s: %w", b.ConfigMap, err)
		}
		return certs, nil
	}
	return nil, errors.New("no source of trust is configured")
}

// Check says why a file is of no use, for who wants to know before an agent runs.
func (b Bootstrap) Check(td spiffeid.TrustDomain) error {
	_, err := b.load(context.Background(), td)
	return err
}

func (b Bootstrap) parse(td spiffeid.TrustDomain, raw []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	if b.SPIFFE {
		bundle, err := spiffebundle.Parse(td, raw)
		if err != nil {
			return nil, err
		}
		certs = bundle.X509Authorities()
	} else {
		for {
			var block *pem.Block
			if block, raw = pem.Decode(raw); block == nil {
				break
			}
			if block.Type != "CERTIFICATE" {
				return nil, fmt.Errorf("PEM block %q is no CERTIFICATE", block.Type)
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, err
			}
			certs = append(certs, cert)
		}
		if len(bytes.TrimSpace(raw)) > 0 {
			return nil, errors.New("text that is no PEM")
		}
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in it")
	}
	for _, cert := range certs {
		if err := identity.CheckAuthority(cert); err != nil {
			return nil, err
		}
	}
	return certs, nil
}

func readAll(r io.Reader) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxBootstrap+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxBootstrap {
		return nil, fmt.Errorf("more than %d bytes", maxBootstrap)
	}
	return raw, nil
}

// fetch asks the URL, over https only, redirections included: the answer is what all trust hangs on.
func (b Bootstrap) fetch(ctx context.Context) (raw []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, bootstrapTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.URL, nil)
	if err != nil {
		return nil, err
	}
	if req.URL.Scheme != "https" {
		return nil, fmt.Errorf("%s: scheme must be https", b.URL)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = tlsForRoots(b.Roots)
	defer transport.CloseIdleConnections()
	client := &http.Client{
		Transport: transport,
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if req.URL.Scheme != "https" {
				return errors.New("redirected away from https")
			}
			if len(via) >= maxRedirects {
				return fmt.Errorf("more than %d redirections", maxRedirects)
			}
			return nil
		},
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: answered %s", b.URL, resp.Status)
	}
	return readAll(resp.Body)
}
