package ca

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
)

// TestMain lets the test binary be the server that is killed.
func TestMain(m *testing.M) {
	if start := os.Getenv("CA_TEST_START"); start != "" {
		if err := signUntilKilled(start); err != nil {
			fmt.Println("error", err)
		}
		return
	}
	os.Exit(m.Run())
}

// openFiles opens a CA over real files in the folder.
func openFiles(ctx context.Context, dir string, now func() time.Time) (c *CA, r *records.Records, closeAll func() error, err error) {
	store, err := boltkv.Open(filepath.Join(dir, "store.db"), boltkv.Config{})
	if err != nil {
		return nil, nil, nil, err
	}
	if r, err = records.Open(ctx, store, testTD, records.Config{Now: now}); err != nil {
		return nil, nil, nil, errors.Join(err, store.Close())
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	km, err := keys.OpenDisk(filepath.Join(dir, "keys.json"), log)
	if err != nil {
		return nil, nil, nil, errors.Join(err, store.Close())
	}
	closeAll = func() error { return errors.Join(km.Close(), store.Close()) }
	if c, err = Open(ctx, km, r, testTD, Config{Now: now, X509SVIDTTL: 3 * time.Hour}); err != nil {
		return nil, nil, nil, errors.Join(err, closeAll())
	}
	return c, r, closeAll, nil
}

// signUntilKilled lets an hour pass with every step and says what it signed when.
func signUntilKilled(start string) error {
	seconds, err := strconv.ParseInt(start, 10, 64)
	if err != nil {
		return err
	}
	now, ctx := &clock{now: time.Unix(seconds, 0)}, context.Background()
	c, _, _, err := openFiles(ctx, ".", now.Now)
	if err != nil {
		return err
	}
	key, err := keys.Generate(keys.EC256)
	if err != nil {
		return err
	}
	for {
		chain, err := c.SignWorkload(ctx, WorkloadParams{PublicKey: key.Public(), ID: workload})
		if err != nil {
			return err
		}
		fmt.Println("signed", now.Now().Unix(), hex.EncodeToString(chain[0].Raw))
		now.pass(time.Hour)
		if err := c.step(ctx); err != nil {
			return err
		}
	}
}

func TestKill(t *testing.T) {
	t.Run("a server killed again and again goes on, and what it signed still verifies", func(t *testing.T) {
		dir, at := t.TempDir(), epoch
		var signed []*x509.Certificate
		for round := range 5 {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "CA_TEST_START="+strconv.FormatInt(at.Unix(), 10))
			cmd.Dir = dir
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(out)
			lines.Buffer(nil, 1<<20)
			for n := 0; lines.Scan(); n++ {
				var when int64
				var text string
				if _, err := fmt.Sscanf(lines.Text(), "signed %d %s", &when, &text); err != nil {
					t.Errorf("server: %s", lines.Text())
					continue
				}
				der, err := hex.DecodeString(text)
				if err != nil {
					t.Fatal(err)
				}
				cert, err := x509.ParseCertificate(der)
				if err != nil {
					t.Fatal(err)
				}
				signed, at = append(signed, cert), time.Unix(when, 0)
				// Around the steps where an authority is prepared, published and activated.
				if n == 11+4*round {
					_ = cmd.Process.Kill()
				}
			}
			_ = cmd.Wait()

			c, r, closeAll, err := openFiles(t.Context(), dir, func() time.Time { return at })
			if err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			b, err := r.Bundle(t.Context(), testTD)
			if err != nil {
				t.Fatal(err)
			}
			for _, cert := range signed {
				if at.Before(cert.NotAfter) {
					if err := verify(b, []*x509.Certificate{cert}, at); err != nil {
						t.Errorf("round %d: %v", round, err)
					}
				}
			}
			if chain, err := c.SignWorkload(t.Context(), WorkloadParams{PublicKey: newKey(t).Public(), ID: workload}); err != nil {
				t.Error(err)
			} else if err := verify(b, chain, at); err != nil {
				t.Error(err)
			}
			if err := closeAll(); err != nil {
				t.Fatal(err)
			}
			at = at.Add(time.Hour)
		}
		if len(signed) < 5*12 {
			t.Errorf("only %d certificates were signed", len(signed))
		}
	})
}
