package workload

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/assay-id/assay/attestor"
)

const (
	// maxSecret bounds tokens, keys and certificates that are read from files.
	maxSecret = 1 << 20
	// maxPods bounds the reply that lists the pods of one node, in bytes; a node has a few hundred of some
	// 10 KiB.
	maxPods = 128 << 20
	// maxObject bounds one object of a list or one event of a watch; etcd takes 1.5 MiB.
	maxObject = 8 << 20
	// answerWithin is how long a list may take to begin, and to come.
	answerWithin = 10 * time.Second
)

// rest asks a Kubernetes endpoint over HTTP. Files are read anew whenever they are needed: tokens are
// replaced every hour, certificates every few months.
type rest struct {
	name       string // of the other end, for errors
	base       string // URL without a path
	serverName string // that its certificate must have; empty: the URL's host
	caPath     string
	unverified bool
	tokenPath  string
	certPath   string
	keyPath    string

	mu     sync.Mutex // guards client
	client *http.Client
}

// statusError is an answer that is no success.
type statusError struct {
	name, path string
	code       int
	text       string
}

func (e *statusError) Error() string {
	hint := ""
	switch e.code {
	case http.StatusUnauthorized:
		hint = ": the token has expired or is of another cluster; is token_path the one that Kubernetes renews?"
	case http.StatusForbidden:
		hint = ": the agent's role lacks a permission, see the k8s attestor's README"
	}
	return fmt.Sprintf("%s answers %d to %s%s (%s)", e.name, e.code, e.path, hint, e.text)
}

// connect returns a client with the certificates as they are now.
func (r *rest) connect() (*http.Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client != nil {
		return r.client, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: r.serverName}
	switch {
	case r.unverified:
		config.InsecureSkipVerify = true // the operator asked for it, and was warned
	case strings.HasPrefix(r.base, "https:"):
		text, err := attestor.ReadFile(r.caPath, maxSecret)
		if err != nil {
			return nil, fmt.Errorf("read CA certificates of %s: %w", r.name, err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("read CA certificates of %s: no PEM certificate in %s", r.name, r.caPath)
		}
	}
	if r.certPath != "" {
		pair, err := tls.LoadX509KeyPair(r.certPath, r.keyPath)
		if err != nil {
			return nil, fmt.Errorf("read client certificate for %s: %w", r.name, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	r.client = &http.Client{
		Transport: &http.Transport{
			TLSClientConfig: config, ForceAttemptHTTP2: true, TLSHandshakeTimeout: answerWithin / 2,
			ResponseHeaderTimeout: answerWithin, IdleConnTimeout: time.Minute,
			// A watch says nothing for minutes; that its other end is gone must be found out.
			HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return errors.New("it redirects, which would hand the token to another")
		},
	}
	return r.client, nil
}

// reconnect drops the client, so that files are read anew.
func (r *rest) reconnect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client != nil {
		r.client.CloseIdleConnections()
		r.client = nil
	}
}

// get opens the answer to one question. The caller closes it.
func (r *rest) get(ctx context.Context, path string, query url.Values, accept string) (io.ReadCloser, error) {
	client, err := r.connect()
	if err != nil {
		return nil, err
	}
	at := r.base + path
	if len(query) > 0 {
		at += "?" + query.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, at, http.NoBody)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", accept)
	request.Header.Set("User-Agent", "assay-agent")
	if r.tokenPath != "" {
		token, err := attestor.ReadFile(r.tokenPath, maxSecret)
		if err != nil {
			return nil, fmt.Errorf("read token for %s: %w", r.name, err)
		}
		request.Header.Set("Authorization", "Bearer "+string(bytes.TrimSpace(token)))
	}
	reply, err := client.Do(request)
	if err != nil {
		r.reconnect()
		return nil, fmt.Errorf("ask %s: %w", r.name, err)
	}
	if reply.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(reply.Body, 200)) // what there is of it
		_ = reply.Body.Close()
		r.reconnect()
		return nil, &statusError{r.name, path, reply.StatusCode, strings.TrimSpace(strings.Map(printable, string(text)))}
	}
	return reply.Body, nil
}

func printable(c rune) rune {
	if c < 0x20 || c == 0x7f {
		return ' '
	}
	return c
}

// readList reads a list of objects one after the other, so that never more than one is held as text, and
// returns the list's version and, if there is more, where to go on.
func readList(from io.Reader, item func(json.RawMessage) error) (version, more string, err error) {
	d := json.NewDecoder(io.LimitReader(from, maxPods))
	if err := want(d, json.Delim('{')); err != nil {
		return "", "", err
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return "", "", err
		}
		switch key {
		case "metadata":
			var meta struct{ ResourceVersion, Continue string }
			if err := d.Decode(&meta); err != nil {
				return "", "", err
			}
			version, more = meta.ResourceVersion, meta.Continue
		case "items":
			if err := readItems(d, item); err != nil {
				return "", "", err
			}
		default:
			var skipped json.RawMessage
			if err := d.Decode(&skipped); err != nil {
				return "", "", err
			}
		}
	}
	return version, more, want(d, json.Delim('}'))
}

func readItems(d *json.Decoder, item func(json.RawMessage) error) error {
	token, err := d.Token()
	if err != nil || token == nil { // null: an empty list
		return err
	}
	if token != json.Delim('[') {
		return errors.New("its items are no list")
	}
	for d.More() {
		var object json.RawMessage
		if err := d.Decode(&object); err != nil {
			return err
		}
		if err := item(object); err != nil {
			return err
		}
	}
	return want(d, json.Delim(']'))
}

func want(d *json.Decoder, delim json.Delim) error {
	token, err := d.Token()
	if err != nil {
		return err
	}
	if token != delim {
		return fmt.Errorf("found %v where %v should be", token, delim)
	}
	return nil
}
