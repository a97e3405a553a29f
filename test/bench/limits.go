package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
)

// primitives are what nobody can do without, measured on this machine: the limit of what can be reached.
type primitives struct {
	sign      time.Duration // check a CSR, sign a certificate, parse it
	signature time.Duration // one ECDSA signature, as of a JWT
	handshake time.Duration // one end's share of a TLS handshake
	hop       time.Duration // a message over a Unix socket to who waits for it
	fsync     time.Duration // a page written to where the server's store is
	wire      time.Duration // an entry parsed and serialized
}

// limits says for figures what the primitives in them come to, in the figure's unit. Where nothing need be
// done the limit is 0; a figure without a line has none that is known.
var limits = map[string]func(p primitives) float64{
	"entry created → SVID on the stream, p50":                       func(p primitives) float64 { return millis(p.fsync + p.sign + 2*p.hop) },
	"the same with 100,000 entries: created, p50":                   func(p primitives) float64 { return millis(p.fsync + p.sign + 2*p.hop) },
	"entry updated → stream, p50":                                   func(p primitives) float64 { return millis(p.fsync + p.sign + 2*p.hop) },
	"entry deleted → stream, p50":                                   func(p primitives) float64 { return millis(p.fsync + 2*p.hop) },
	"FetchJWTSVID, cached: CPU of agent + server":                   func(p primitives) float64 { return 0 },
	"FetchJWTSVID, not cached: CPU of agent + server":               func(p primitives) float64 { return micros(p.signature, 1) },
	"agent attested by join token: server CPU":                      func(p primitives) float64 { return micros(p.handshake+p.sign, 1) },
	"X509-SVID signed, batch of 1: server CPU each":                 func(p primitives) float64 { return micros(p.sign, 1) },
	"X509-SVID signed, batch of 50: server CPU each":                func(p primitives) float64 { return micros(p.sign, 1) },
	"NewJWTSVID: server CPU":                                        func(p primitives) float64 { return micros(p.signature, 1) },
	"entry create, batches of 100, on disk: server CPU each":        func(p primitives) float64 { return micros(p.wire, 1) },
	"single creates, 8 clients, synced: each":                       func(p primitives) float64 { return micros(p.fsync, 8) },
	"100,000 entries at rest: server CPU":                           func(p primitives) float64 { return 0 },
	"list 100,000 in pages of 1,000: server CPU each":               func(p primitives) float64 { return micros(p.wire, 2) },
	"200 agents connected and idle, feed held: server CPU":          func(p primitives) float64 { return 0 },
	"Docker workload, container known: dockerd CPU per call":        func(p primitives) float64 { return 0 },
	"Docker entry created after the container runs → SVID, p50":     func(p primitives) float64 { return millis(p.fsync + p.sign + 2*p.hop) },
	"authority tainted: CPU of server + agent, each workload":       func(p primitives) float64 { return micros(p.sign+2*p.signature, 1) },
	"federated bundle set → stream, p50":                            func(p primitives) float64 { return millis(p.fsync + 2*p.hop) },
	"agent restart: SVIDs signed again":                             func(p primitives) float64 { return 0 },
	"server start → first full answer to an agent, 10,000 entries":  func(p primitives) float64 { return millis(p.wire*10_000/2 + p.handshake) },
	"server start → first full answer to an agent, 100,000 entries": func(p primitives) float64 { return millis(p.wire*100_000/2 + p.handshake) },
}

func millis(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// measure measures the primitives in dir, on whose disk the store is.
func measure(ctx context.Context, dir string) (p primitives, err error) {
	var errs []error
	keep := func(d time.Duration, err error) time.Duration { errs = append(errs, err); return d }
	signing, signature, err := signers()
	if err != nil {
		return p, err
	}
	p.sign = keep(fastest(ctx, 20, signing))
	p.signature = keep(fastest(ctx, 50, signature))
	p.handshake = keep(fastest(ctx, 5, handshaking())) / 2
	hop, closeHop, err := hopping()
	if err != nil {
		return p, err
	}
	defer closeHop()
	p.hop = keep(fastest(ctx, 50, hop)) / 2
	sync, closeSync, err := syncing(dir)
	if err != nil {
		return p, err
	}
	defer closeSync()
	p.fsync = keep(fastest(ctx, 3, sync))
	p.wire = keep(fastest(ctx, 200, wiring))
	if err := errors.Join(errs...); err != nil {
		return p, fmt.Errorf("measure the limits: %w", err)
	}
	return p, nil
}

// fastest returns what one call of do takes when nobody else is in the way: the best of many small rounds.
func fastest(ctx context.Context, calls int, do func() error) (time.Duration, error) {
	best := time.Duration(0)
	for range 30 {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		start := time.Now()
		for range calls {
			if err := do(); err != nil {
				return 0, err
			}
		}
		if took := time.Since(start) / time.Duration(calls); best == 0 || took < best {
			best = took
		}
	}
	return best, nil
}

// selfSigned makes a certificate that is its own authority.
func selfSigned() (tls.Certificate, *x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "limit"}, DNSNames: []string{"limit"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: cert}, cert, err
}

func signers() (certificate, signature func() error, err error) {
	own, authority, err := selfSigned()
	if err != nil {
		return nil, nil, err
	}
	key := own.PrivateKey.(*ecdsa.PrivateKey)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{Country: []string{"US"}}}, key)
	if err != nil {
		return nil, nil, err
	}
	certificate = func() error {
		req, err := x509.ParseCertificateRequest(csr)
		if err == nil {
			err = req.CheckSignature()
		}
		if err != nil {
			return err
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(2), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"w"},
		}, authority, req.PublicKey, key)
		if err == nil {
			_, err = x509.ParseCertificate(der)
		}
		return err
	}
	sum := sha256.Sum256([]byte("a token"))
	signature = func() error {
		_, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
		return err
	}
	return certificate, signature, nil
}

func handshaking() func() error {
	own, authority, err := selfSigned()
	roots := x509.NewCertPool()
	if err == nil {
		roots.AddCert(authority)
	}
	server := &tls.Config{Certificates: []tls.Certificate{own}, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true}
	client := &tls.Config{RootCAs: roots, ServerName: "limit", MinVersion: tls.VersionTLS13}
	return func() error {
		if err != nil {
			return err
		}
		a, b := net.Pipe()
		defer a.Close()
		defer b.Close()
		done := make(chan error, 1)
		go func() { done <- tls.Server(a, server).Handshake() }()
		return errors.Join(tls.Client(b, client).Handshake(), <-done)
	}
}

// hopping returns one there and back over a socket.
func hopping() (round func() error, done func(), err error) {
	dir, err := os.MkdirTemp("", "hop")
	if err != nil {
		return nil, nil, err
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}
	}()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		return nil, nil, errors.Join(err, l.Close(), os.RemoveAll(dir))
	}
	message := bytes.Repeat([]byte{7}, 1000)
	round = func() error {
		if _, err := c.Write(message); err != nil {
			return err
		}
		_, err := io.ReadFull(c, message)
		return err
	}
	return round, func() { c.Close(); l.Close(); os.RemoveAll(dir) }, nil
}

func syncing(dir string) (page func() error, done func(), err error) {
	file, err := os.CreateTemp(dir, "fsync")
	if err != nil {
		return nil, nil, err
	}
	bytes := make([]byte, 4096)
	page = func() error {
		_, err := file.WriteAt(bytes, 0)
		return errors.Join(err, file.Sync())
	}
	return page, func() { file.Close(); os.Remove(file.Name()) }, nil
}

var onWire, _ = proto.Marshal(unrelated(1)[0]) // of a message of ours: cannot fail

func wiring() error {
	var e types.Entry
	if err := proto.Unmarshal(onWire, &e); err != nil {
		return err
	}
	_, err := proto.Marshal(&e)
	return err
}
