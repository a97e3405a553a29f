package external_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/attestor/external/server"
	"github.com/assay-id/assay/attestor/external/workload"
	"github.com/assay-id/assay/test/fake/spireplugin"
)

// asking is a block of a plugin that asks us something.
func asking(t *testing.T, kind, mode, dir string) *external.Config {
	t.Helper()
	c, ok := config(t, kind, mode).(*external.Config)
	if !ok {
		t.Fatal("no configuration")
	}
	c.Data += fmt.Sprintf("\ndirectory = %q", dir)
	return c
}

// told collects what is told by several goroutines.
type told[T any] struct {
	mu  sync.Mutex
	all []T
}

func (l *told[T]) add(one T) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, one)
}

func (l *told[T]) list() []T {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]T(nil), l.all...)
}

func TestPluginsMeasure(t *testing.T) {
	took := new(told[attestor.Measurement])
	n := needs(t)
	kinds := map[string]attestor.MeasureKind{}
	var mu sync.Mutex // guards kinds
	n.Measure = func(m attestor.Measurement) error {
		mu.Lock()
		defer mu.Unlock()
		key := strings.Join(m.Key, "_")
		if kind, known := kinds[key]; known && kind != m.Kind {
			return errors.New("measured in another way already")
		}
		kinds[key] = m.Kind
		took.add(m)
		return nil
	}
	opened, err := workload.Kind().Open(asking(t, spireplugin.Workload, "measure", t.TempDir()), n)
	if err != nil {
		t.Fatal(err)
	}
	closing(t, opened)
	if _, err := opened.Attest(t.Context(), attestor.Process{PID: os.Getpid(), Proc: "/proc"}); err != nil {
		t.Fatal(err)
	}
	got := took.list()
	if len(got) != 4 || got[3].Value < 1000 {
		t.Fatalf("measured %+v", got)
	}
	got[3].Value = 1000
	labels := []attestor.Label{{Name: "how", Value: "well"}}
	want := []attestor.Measurement{
		{Source: spireplugin.Type, Kind: attestor.Gauge, Key: []string{"level"}, Value: 7, Labels: labels},
		{Source: spireplugin.Type, Kind: attestor.Counter, Key: []string{"asked"}, Value: 1, Labels: labels},
		{Source: spireplugin.Type, Kind: attestor.Sample, Key: []string{"size"}, Value: 3, Labels: labels},
		{Source: spireplugin.Type, Kind: attestor.Sample, Key: []string{"took"}, Value: 1000},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// identity is one of a server.
func identity(t *testing.T) *attestor.ServerIdentity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/spire/server"}}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &attestor.ServerIdentity{
		Chain: []*x509.Certificate{cert}, Key: key, X509: []attestor.ServerAuthority{{DER: der}, {DER: der, Tainted: true}},
		JWT: []attestor.ServerKey{{ID: "k", PKIX: []byte("pkix"), ExpiresAt: time.Unix(1, 0)}}, Sequence: 42,
	}
}

func TestPluginsAskForTheServersIdentity(t *testing.T) {
	held := identity(t)
	for _, c := range []struct {
		name    string
		granted bool
		give    func(context.Context) (*attestor.ServerIdentity, error)
		want    string
		audit   []string
	}{
		{"one that may has it, and each that is given out is audited once", true,
			func(context.Context) (*attestor.ServerIdentity, error) { return held, nil },
			"OK\nspiffe://example.org/spire/server example.org 2 1 42\n", []string{"plugin.identity plugin/shared_secret <nil>"}},
		{"one that may not is told what would allow it, and that is audited", false,
			func(context.Context) (*attestor.ServerIdentity, error) { return held, nil },
			"PermissionDenied\n", []string{"plugin.identity plugin/shared_secret the operator has not allowed it: plugin_identity = true in the plugin's block does"}},
		{"before there is one, it is SPIRE's answer", true,
			func(context.Context) (*attestor.ServerIdentity, error) { return nil, attestor.ErrNoIdentity },
			"FailedPrecondition\n", nil},
		{"why there is none is not a plugin's to know", true,
			func(context.Context) (*attestor.ServerIdentity, error) { return nil, errors.New("secret reason") },
			"Unavailable\n", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			lines := new(told[string])
			n := needs(t)
			n.Identity = c.give
			n.Audit = func(event, about string, err error) {
				if event == "plugin.identity" {
					lines.add(fmt.Sprint(event, " ", about, " ", err))
				}
			}
			block := asking(t, spireplugin.NodeServer, "identity", dir)
			block.Identity = c.granted
			judge, err := server.Kind().Open(block, n)
			if err != nil {
				t.Fatal(err)
			}
			closing(t, judge)
			for range 2 {
				if _, err := judge.Judge(t.Context(), []byte("node-one"), answering("open sesame")); err != nil {
					t.Fatal(err)
				}
			}
			text, err := os.ReadFile(filepath.Join(dir, "identity"))
			if err != nil || !strings.HasPrefix(string(text), c.want) || strings.Contains(string(text), "secret reason") {
				t.Errorf("the plugin was answered %s, %v", text, err)
			}
			if diff := cmp.Diff(c.audit, lines.list()); diff != "" {
				t.Errorf("audited: %s", diff)
			}
		})
	}
	t.Run("an agent has none to give", func(t *testing.T) {
		block := asking(t, spireplugin.Workload, "", t.TempDir())
		block.Identity = true
		if _, err := workload.Kind().Open(block, needs(t)); err == nil || !strings.Contains(err.Error(), "plugin_identity: agents have no identity to give") {
			t.Errorf("got %v", err)
		}
	})
}
