package server

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"github.com/assay-id/assay/server/backup"
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
