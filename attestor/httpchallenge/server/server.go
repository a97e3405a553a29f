// Package server is the server's side of http_challenge: it fetches the nonce from the host that the agent
// claims to be.
//
// Why it is so: whoever connects has the server ask a host of their choice, so what is asked is the operator's
// to bound (names, ports, networks) and what comes back is told to nobody. The address is looked at when it is
// connected to and not before, so that a name which resolves to something else a moment later is of no use;
// there are no redirects, no proxies and no second request; and a refusal is the same whether the host is
// away, closed or wrong.
package server

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/httpchallenge"
)

const (
	// fetchTime is how long fetching the nonce may take as a whole, and fetches how many are fetched at once.
	fetchTime, fetches = 10 * time.Second, 64
	// maxBody and maxHeader are the most, in bytes, that a host may say.
	maxBody, maxHeader = 64, 4 << 10
	// rootPorts is the first port that any user may listen on.
	rootPorts = 1024
	maxPort   = 65535
)

// Kind returns the server's side of http_challenge.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{Type: httpchallenge.Type, Config: func() any { return new(httpchallenge.ServerConfig) }, Open: open}
}

type judge struct {
	patterns []*regexp.Regexp
	networks []netip.Prefix // none: see allowed
	port     int            // 0: any
	anyPort  bool           // also of those that any user may listen on
	tofu     bool
	client   *http.Client
	slots    chan struct{}
	log      logrus.FieldLogger
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*httpchallenge.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("http_challenge configuration is a %T", config)
	}
	j := &judge{
		anyPort: c.AllowNonRootPorts == nil || *c.AllowNonRootPorts, tofu: c.TOFU == nil || *c.TOFU,
		slots: make(chan struct{}, fetches), log: needs.Log,
	}
	if j.log == nil {
		j.log = logrus.New()
	}
	if len(c.AllowedDNSPatterns) == 0 {
		return nil, errors.New(`allowed_dns_patterns is empty: name the hosts, as ["web[0-9]+\\.example\\.org"], or [".*"] for whatever an agent names`)
	}
	for _, text := range c.AllowedDNSPatterns {
		pattern, err := regexp.Compile(`^(?:` + text + `)$`)
		if err != nil {
			return nil, fmt.Errorf("allowed_dns_patterns: %q: %w", text, err)
		}
		j.patterns = append(j.patterns, pattern)
	}
	for _, text := range c.AllowedNetworks {
		network, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("allowed_networks: %q is no network like \"10.0.0.0/8\"", text)
		}
		j.networks = append(j.networks, network.Masked())
	}
	if p := c.RequiredPort; p != nil {
		if *p < 1 || *p > maxPort || !j.anyPort && *p >= rootPorts {
			return nil, fmt.Errorf("required_port: %d is no port that is allowed", *p)
		}
		j.port = *p
	}
	if !j.tofu && (j.port >= rootPorts || j.port == 0 && j.anyPort) {
		return nil, errors.New("tofu cannot be off while any user of a host can listen where the server asks: set allow_non_root_ports to false, or required_port below 1024")
	}
	resolver, err := resolverAt(c.DNSServer)
	if err != nil {
		return nil, err
	}
	j.client = j.newClient(resolver)
	return j, nil
}

// resolverAt returns a resolver that asks one server, or the system's.
func resolverAt(address string) (*net.Resolver, error) {
	if address == "" {
		return net.DefaultResolver, nil
	}
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dns_server: %q is no address with a port, as \"10.0.0.53:53\"", address)
	}
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}}, nil
}

func (j *judge) newClient(resolver *net.Resolver) *http.Client {
	dialer := &net.Dialer{
		Resolver: resolver,
		// Called for each address that is tried, with that address.
		Control: func(_, address string, _ syscall.RawConn) error {
			at, err := netip.ParseAddrPort(address)
			if err != nil || !j.allowed(at.Addr()) {
				return errors.New("address is not allowed")
			}
			return nil
		},
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                  nil, // the environment's would ask in the server's place
			DialContext:            dialer.DialContext,
			DisableKeepAlives:      true,
			DisableCompression:     true,
			MaxResponseHeaderBytes: maxHeader,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("redirects are not followed") },
	}
}

// nat64 is the prefix whose last four bytes are an address of IPv4 (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// metadata are the addresses of cloud providers that are about the server's own machine and not link-local:
// Amazon's by IPv6, Azure's, Alibaba's.
var metadata = []netip.Addr{
	netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("168.63.129.16"), netip.MustParseAddr("100.100.100.200"),
}

// allowed reports whether an address may be asked.
func (j *judge) allowed(address netip.Addr) bool {
	address = address.Unmap().WithZone("")
	for _, network := range j.networks {
		if network.Contains(address) {
			return true
		}
	}
	if len(j.networks) > 0 {
		return false
	}
	if nat64.Contains(address) {
		raw := address.As16()
		address = netip.AddrFrom4([4]byte(raw[12:]))
	}
	if slices.Contains(metadata, address) {
		return false
	}
	return address.IsGlobalUnicast() // private networks among them, which nodes are in
}

// Judge checks the name, has the agent put out a nonce and fetches it.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	if len(payload) > attestor.MaxEvidence {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is too large")
	}
	var evidence httpchallenge.Evidence
	if err := attestor.Decode(payload, &evidence); err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	host, err := j.check(evidence)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	raw := make([]byte, httpchallenge.NonceSize)
	_, _ = rand.Read(raw)
	nonce := base64.URLEncoding.EncodeToString(raw)
	question, err := json.Marshal(httpchallenge.Challenge{Nonce: nonce})
	if err != nil {
		return attestor.Proof{}, err
	}
	said, err := ask(ctx, question)
	if err != nil {
		return attestor.Proof{}, fmt.Errorf("ask challenge: %w", err)
	}
	if string(said) != httpchallenge.Answer {
		return attestor.Proof{}, attestor.Refusef("read answer: it is not the one that says that the nonce is there")
	}
	if err := j.fetch(ctx, host, evidence, nonce); err != nil {
		if ctx.Err() != nil {
			return attestor.Proof{}, fmt.Errorf("fetch nonce: %w", ctx.Err())
		}
		// Why is for the operator: it would tell a stranger what is open where, and the names are theirs.
		j.log.WithError(err).WithFields(logrus.Fields{"host": host, "port": evidence.Port}).Warn("nonce of an agent cannot be fetched")
		return attestor.Proof{}, attestor.Refusef("the host does not show the nonce")
	}
	proof := attestor.Proof{Path: httpchallenge.Type + "/" + host, CanReattest: !j.tofu}
	if s := (attestor.Selector{Type: httpchallenge.Type, Value: "hostname:" + host}); s.Check() == nil {
		proof.Selectors = []attestor.Selector{s}
	}
	return proof, nil
}

// check says what is wrong with a claim, or returns the host.
func (j *judge) check(e httpchallenge.Evidence) (string, error) {
	host, err := httpchallenge.HostName(e.HostName)
	if err != nil {
		return "", err
	}
	if err := httpchallenge.CheckAgentName(e.AgentName); err != nil {
		return "", err
	}
	switch {
	case e.Port < 1 || e.Port > maxPort:
		return "", errors.New("port is none")
	case j.port != 0 && e.Port != j.port, !j.anyPort && e.Port >= rootPorts:
		return "", fmt.Errorf("port %d is not one that this server asks", e.Port)
	}
	for _, pattern := range j.patterns {
		if pattern.MatchString(host) {
			return host, nil
		}
	}
	return "", errors.New("host is not one that this server asks")
}

// fetch fetches the nonce and compares it.
func (j *judge) fetch(ctx context.Context, host string, e httpchallenge.Evidence, nonce string) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	select {
	case j.slots <- struct{}{}:
		defer func() { <-j.slots }()
	case <-ctx.Done():
		return errors.New("too many are fetched at once")
	}
	at := url.URL{Scheme: "http", Host: net.JoinHostPort(host, strconv.Itoa(e.Port)), Path: httpchallenge.Path(e.AgentName)}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return err
	}
	request.Header.Set("User-Agent", "assay-server")
	response, err := j.client.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("it answers with status %d", response.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxBody+1))
	if err != nil {
		return err
	}
	if len(body) > maxBody {
		return errors.New("it answers with more than a nonce")
	}
	if subtle.ConstantTimeCompare([]byte(strings.TrimSpace(string(body))), []byte(nonce)) != 1 {
		return errors.New("it answers with something else")
	}
	return nil
}
