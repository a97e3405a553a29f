package lab_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
)

// postgresFiles has the agent keep certificate, key, bundle and list for PostgreSQL, and tell it.
const postgresFiles = `
files "postgres" {
  cert_dir              = "DIR/svid-postgres"
  svid_file_name        = "svid.pem"
  svid_key_file_name    = "svid_key.pem"
  svid_bundle_file_name = "svid_bundle.pem"
  crl_file_name         = "crl.pem"
  file_owner            = "postgres"
  file_group            = "postgres"
  pid_file_name         = "DIR/postgres/data/postmaster.pid"
}
`

// vault is a PostgreSQL that lets in everybody whom the bundle verifies and the list does not name. Nobody
// touches it but the agent.
type vault struct {
	*site.Process
	n          *node
	psql, port string
	files      string
}

func startVault(n *node) *vault {
	n.t.Helper()
	if os.Getuid() != 0 {
		lab.Missing(n.t, "root", errors.New("PostgreSQL runs as a user of its own"))
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin") // the pattern is right
	if len(found) == 0 {
		lab.Missing(n.t, "PostgreSQL", site.ErrNoTool)
	}
	as, bin, dir := account(n.t, "postgres"), found[len(found)-1], filepath.Join(n.Dir, "postgres")
	v := &vault{n: n, psql: tool(n.t, "psql"), files: filepath.Join(n.Dir, "svid-postgres")}
	_, v.port, _ = net.SplitHostPort(freeAddress(n.t))
	n.must(os.Mkdir(dir, 0o755))
	n.must(os.Chown(dir, int(as.Uid), int(as.Gid)))
	data := filepath.Join(dir, "data")
	_, err := site.Run(n.ctx, as, filepath.Join(bin, "initdb"), "-D", data, "-A", "trust", "-N", "--no-locale")
	n.must(err)
	n.must(os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte("local all all trust\nhostssl all all 127.0.0.1/32 trust clientcert=verify-ca\n"), 0o600))
	_, err = n.ServerCLI(n.ctx, "entry", "create", "-spiffeID", "spiffe://"+site.TrustDomain+"/postgres", "-parentID", n.parent, "-selector", "files:name:postgres")
	n.must(err)
	n.must(n.agent.WaitFor(n.ctx, "a list before anything is revoked", func() error { _, err := os.Stat(filepath.Join(v.files, "crl.pem")); return err }))
	v.Process, err = site.Start(filepath.Join(n.Dir, "postgres.log"), as, filepath.Join(bin, "postgres"), "-D", data,
		"-c", "listen_addresses=127.0.0.1", "-c", "port="+v.port, "-c", "unix_socket_directories="+dir, "-c", "fsync=off", "-c", "ssl=on",
		"-c", "ssl_cert_file="+filepath.Join(v.files, "svid.pem"), "-c", "ssl_key_file="+filepath.Join(v.files, "svid_key.pem"),
		"-c", "ssl_ca_file="+filepath.Join(v.files, "svid_bundle.pem"), "-c", "ssl_crl_file="+filepath.Join(v.files, "crl.pem"))
	n.must(err)
	n.t.Cleanup(func() { _ = v.Stop(30 * time.Second) })
	n.must(v.WaitFor(n.ctx, "PostgreSQL", func() error {
		_, err := site.Run(n.ctx, as, v.psql, "-h", dir, "-p", v.port, "-d", "postgres", "-c", "SELECT 1")
		return err
	}))
	return v
}

// admits says whether PostgreSQL answers who comes with a certificate.
func (v *vault) admits(svid tls.Certificate) error {
	dir, err := os.MkdirTemp(v.n.Dir, "client")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		return err
	}
	var chain strings.Builder
	for _, der := range svid.Certificate {
		_ = pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a builder never fails
	}
	for name, text := range map[string]string{"svid.pem": chain.String(), "key.pem": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	out, err := site.Run(v.n.ctx, nil, v.psql, "-At", "-c", "SELECT 42", fmt.Sprintf(
		"host=127.0.0.1 port=%s user=postgres dbname=postgres sslmode=verify-ca sslcert=%s sslkey=%s sslrootcert=%s",
		v.port, filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"), filepath.Join(v.files, "svid_bundle.pem")))
	if err == nil && strings.TrimSpace(out) != "42" {
		return fmt.Errorf("it answers %q", out)
	}
	return err
}

// refuses says whether PostgreSQL refuses who comes with a certificate because it was revoked.
func (v *vault) refuses(svid tls.Certificate) error {
	switch err := v.admits(svid); {
	case err == nil:
		return errors.New("it is admitted")
	case !strings.Contains(err.Error(), "certificate revoked"):
		return fmt.Errorf("it is not refused for being revoked: %w", err)
	}
	return nil
}

// until waits for what is said of PostgreSQL.
func (v *vault) until(what string, holds func() error) {
	v.n.t.Helper()
	v.n.must(v.WaitFor(v.n.ctx, "PostgreSQL: "+what, holds))
}
