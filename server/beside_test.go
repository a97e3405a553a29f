package server

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/server/backup"
	"github.com/assay-id/assay/server/kube"
	"github.com/assay-id/assay/server/store/boltkv"
)

func TestASecondServerLeavesTheAuditLogAlone(t *testing.T) {
	cfg := testConfig(t)
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	first, err := boltkv.Open(filepath.Join(cfg.DataDir, backup.StoreFile), boltkv.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	synctest.Test(t, func(t *testing.T) { // it waits for the first for some time
		if err := Run(t.Context(), cfg); !errors.Is(err, boltkv.ErrLocked) {
			t.Errorf("got %v", err)
		}
	})
	if _, err := os.Stat(filepath.Join(cfg.DataDir, "audit.log")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it opened the audit log of the first: %v", err)
	}
}

func TestAnInsideServerThatIsStoppedBeforeItServesIsNoError(t *testing.T) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	ready := make(chan struct{})
	close(ready)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 { // whether it notices first that it is ready, or that it is to end, is left to chance
		inside, conn, err := serveInside("test", nil, func(grpc.ServiceRegistrar) {})
		if err != nil {
			t.Fatal(err)
		}
		registrar, err := kube.New(kube.API{}, kube.Cluster{}, kube.Config{Name: "c", Log: log, NoLease: true, Metrics: prometheus.NewRegistry()})
		if err != nil {
			t.Fatal(err)
		}
		inside.server.Stop() // as the registrar's end does, before the server's own goroutine has begun
		c := &clusters{registrars: []*kube.Registrar{registrar}, conns: []*grpc.ClientConn{conn}, inside: []*insideServer{inside}}
		if err := c.run(ended, ready); err != nil {
			t.Fatal(err)
		}
	}
}
