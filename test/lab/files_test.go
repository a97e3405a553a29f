package lab_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/port"
	"github.com/assay-id/assay/test/lab/site"
)

// TestFilesForServers shows identities in files at work: nginx and Redis have theirs from the agent itself,
// PostgreSQL from "assay-agent files" that runs as its own user, and a client of all three has its own.
// All go through a forced rotation, and then the client's identity is withdrawn, and nginx's.
func TestFilesForServers(t *testing.T) {
	w := newFilesWorld(t)
	servers := []server{startNginxWithFiles(w), startPostgres(w), startRedis(w)}
	for _, s := range servers {
		t.Run(s.name+" and the client trust each other", func(t *testing.T) { w.until(t, s.call) })
	}

	before := map[string]string{}
	for _, s := range servers {
		before[s.name] = issuer(t, s.cert)
	}
	t.Run("all of them live through a forced rotation", func(t *testing.T) {
		w.rotate(t, func(step string) {
			for _, s := range servers {
				w.until(t, func() error {
					if err := s.call(); err != nil {
						return fmt.Errorf("%s after %s: %w", s.name, step, err)
					}
					return nil
				})
			}
		})
	})
	for _, s := range servers {
		if now := issuer(t, s.cert); now == before[s.name] {
			t.Errorf("the certificate of %s is of the authority from before", s.name)
		}
	}
	w.until(t, func() error {
		shown, err := servers[0].shown()
		if err == nil && shown == before["nginx"] {
			return errors.New("nginx shows a certificate of the authority from before")
		}
		return err
	})

	t.Run("when the client's identity is withdrawn, its files are of no use", func(t *testing.T) {
		w.delete("/app")
		for _, s := range servers {
			w.until(t, func() error {
				err := s.call()
				if err == nil {
					return fmt.Errorf("%s accepts it", s.name)
				}
				return s.why(err)
			})
		}
		if _, err := tls.LoadX509KeyPair(w.path("app", "svid.pem"), w.path("app", "svid_key.pem")); err != nil {
			t.Errorf("what is in their place is no pair: %v", err)
		}
	})
	t.Run("and when it is back, all is as before", func(t *testing.T) {
		w.entry("/app", "files:name:app", "-dns", "app")
		for _, s := range servers {
			w.until(t, s.call)
		}
	})
	t.Run("when a server's identity is withdrawn, its client refuses it", func(t *testing.T) {
		w.delete("/nginx")
		w.until(t, func() error {
			if err := servers[0].call(); err == nil {
				return errors.New("nginx is accepted")
			}
			return nil
		})
	})
	t.Run("a token is there, and is the client's", func(t *testing.T) {
		text, err := os.ReadFile(w.path("app", "token"))
		w.must(err)
		out, err := site.Run(w.ctx, account(t, "postgres"), filepath.Join(w.Dir, "assay-agent"),
			"api", "validate", "jwt", "-socketPath", w.agent.Socket, "-audience", "api", "-svid", string(text))
		if err != nil || !strings.Contains(out, "spiffe://"+site.TrustDomain+"/app") {
			t.Errorf("it says %q, %v", out, err)
		}
	})
}

// server is one that has its identity in files.
type server struct {
	name string
	// call speaks with it as the client, with what is in the client's files now.
	call func() error
	// cert is the path of its certificate; shown says who issued the one that it shows; nil: nobody asks.
	cert  string
	shown func() (string, error)
	// why says whether what call came to is that the server refused the client's certificate.
	why func(error) error
}

// says returns a server's why: what the error or its log says then.
func says(log, what string) func(error) error {
	return func(err error) error {
		text, _ := os.ReadFile(log) // which has nothing to say if it is not there
		if strings.Contains(err.Error(), what) || strings.Contains(string(text), what) {
			return nil
		}
		return fmt.Errorf("%q is nowhere: %w", what, err)
	}
}

// filesWorld is a server of ours and an agent with blocks of files.
type filesWorld struct {
	*site.Site
	t     *testing.T
	ctx   context.Context
	agent *site.Agent
	token string
	ids   map[string]string // entries by path
}

func (w *filesWorld) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// path is a file of a block.
func (w *filesWorld) path(block, name string) string {
	return filepath.Join(w.Dir, "svid-"+block, name)
}

func (w *filesWorld) until(t *testing.T, good func() error) {
	t.Helper()
	if err := w.agent.WaitFor(w.ctx, "it", good); err != nil {
		t.Fatal(err)
	}
}

func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := site.Tool(name)
	if err != nil {
		lab.Missing(t, name, err)
	}
	return path
}

func newFilesWorld(t *testing.T) *filesWorld {
	t.Helper()
	for _, name := range []string{"nginx", "redis-server", "redis-cli", "psql"} {
		tool(t, name)
	}
	if os.Getuid() != 0 {
		lab.Missing(t, "root", errors.New("the servers run as users of their own"))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	t.Cleanup(cancel)
	dir, err := os.MkdirTemp("", "files") //nolint:usetesting // a socket's path may have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := site.New(dir, "../../bin")
	if err != nil {
		t.Fatal(err)
	}
	w := &filesWorld{Site: s, t: t, ctx: ctx, ids: map[string]string{}}
	w.must(s.StartServer(ctx))
	t.Cleanup(func() { _ = s.Stop() })
	w.token, err = s.Token(ctx)
	w.must(err)
	block := func(name, more string) string {
		return fmt.Sprintf("files %q {\n  cert_dir = %q\n  svid_file_name = \"svid.pem\"\n  svid_key_file_name = \"svid_key.pem\"\n  svid_bundle_file_name = \"svid_bundle.pem\"\n%s\n}\n",
			name, filepath.Join(dir, "svid-"+name), more)
	}
	cli, socket := tool(t, "redis-cli"), filepath.Join(dir, "redis", "redis.sock")
	blocks := "node_attestor \"join_token\" {}\nworkload_attestor \"unix\" {}\n" +
		block("nginx", fmt.Sprintf("  pid_file_name = %q", filepath.Join(dir, "nginx", "nginx.pid"))) +
		block("redis", fmt.Sprintf("  file_owner = \"redis\"\n  file_group = \"redis\"\n  renew_command = [%q, \"-s\", %q, \"CONFIG\", \"SET\", \"tls-cert-file\", %q, \"tls-key-file\", %q, \"tls-ca-cert-file\", %q]",
			cli, socket, w.path("redis", "svid.pem"), w.path("redis", "svid_key.pem"), w.path("redis", "svid_bundle.pem"))) +
		block("app", "  jwt_svids = [{ jwt_audience = \"api\", jwt_svid_file_name = \"token\" }]")
	w.agent, err = s.NewAgent(ctx, "agent", site.AgentOptions{Token: w.token, Blocks: blocks})
	w.must(err)
	w.must(w.agent.Start(ctx))
	t.Cleanup(func() { _ = w.agent.Stop(15 * time.Second) })
	w.entry("/nginx", "files:name:nginx", "-dns", "localhost")
	w.entry("/redis", "files:name:redis", "-dns", "localhost")
	w.entry("/app", "files:name:app", "-dns", "app")
	for _, name := range []string{"nginx", "redis", "app"} {
		w.until(t, func() error { _, err := os.Stat(w.path(name, "svid.pem")); return err })
	}
	return w
}

func (w *filesWorld) entry(path, selector string, more ...string) {
	w.t.Helper()
	out, err := w.ServerCLI(w.ctx, append([]string{
		"entry", "create", "-spiffeID", "spiffe://" + site.TrustDomain + path, "-selector", selector,
		"-parentID", "spiffe://" + site.TrustDomain + "/spire/agent/join_token/" + w.token,
	}, more...)...)
	w.must(err)
	_, rest, _ := strings.Cut(out, "Entry ID")
	w.ids[path] = strings.TrimSpace(strings.SplitN(strings.TrimLeft(rest, " :"), "\n", 2)[0])
}

func (w *filesWorld) delete(path string) {
	w.t.Helper()
	_, err := w.ServerCLI(w.ctx, "entry", "delete", "-entryID", w.ids[path])
	w.must(err)
}

// rotate takes the X.509 authority away and calls after when each step has reached the agent.
func (w *filesWorld) rotate(t *testing.T, after func(step string)) {
	t.Helper()
	authority := func(args ...string) string {
		out, err := w.ServerCLI(w.ctx, append([]string{"localauthority", "x509"}, args...)...)
		w.must(err)
		return out
	}
	ids := func(out string) []string {
		var found []string
		for field := range strings.FieldsSeq(out) {
			if len(field) == 40 && strings.Trim(field, "0123456789abcdef") == "" {
				found = append(found, field)
			}
		}
		return found
	}
	old := issuer(t, w.path("nginx", "svid.pem"))
	prepared := ids(authority("prepare"))
	if len(prepared) != 1 {
		t.Fatalf("prepare names %v", prepared)
	}
	w.until(t, func() error {
		text, err := os.ReadFile(w.path("app", "svid_bundle.pem"))
		if err == nil && strings.Count(string(text), "BEGIN") < 2 {
			return errors.New("the new authority is not there")
		}
		return err
	})
	after("prepare")
	authority("activate", "-authorityID", prepared[0])
	authority("taint", "-authorityID", old)
	for _, name := range []string{"nginx", "redis", "app", "postgres"} {
		w.until(t, func() error {
			if issuer(t, w.path(name, "svid.pem")) == old {
				return errors.New("the certificate is of the old authority")
			}
			return nil
		})
	}
	after("taint")
	authority("revoke", "-authorityID", old)
	w.until(t, func() error {
		text, err := os.ReadFile(w.path("app", "svid_bundle.pem"))
		if err == nil && strings.Count(string(text), "BEGIN") != 1 {
			return errors.New("the old authority is there")
		}
		return err
	})
	after("revoke")
}

// issuer is the key identifier of who issued a certificate, as localauthority has it.
func issuer(t *testing.T, path string) string {
	t.Helper()
	cert, err := leaf(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", cert.AuthorityKeyId)
}

func leaf(path string) (*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s has no certificate", path)
	}
	return x509.ParseCertificate(block.Bytes)
}

// clientConfig is TLS with what is in the client's files now, to a server with the path.
func (w *filesWorld) clientConfig(path string) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(w.path("app", "svid.pem"), w.path("app", "svid_key.pem"))
	if err != nil {
		return nil, err
	}
	td := spiffeid.RequireTrustDomainFromString(site.TrustDomain)
	bundle, err := x509bundle.Load(td, w.path("app", "svid_bundle.pem"))
	if err != nil {
		return nil, err
	}
	config := tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(td, path)))
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	return config, nil
}

func freeAddress(t *testing.T) string {
	t.Helper()
	n, err := port.Free()
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(n))
}

func startNginxWithFiles(w *filesWorld) server {
	w.t.Helper()
	address, dir := freeAddress(w.t), filepath.Join(w.Dir, "nginx")
	w.must(os.Mkdir(dir, 0o755))
	config := filepath.Join(dir, "nginx.conf")
	w.must(os.WriteFile(config, fmt.Appendf(nil, `daemon off;
user root;
worker_processes 1;
pid %[1]s/nginx.pid;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s/body;
  proxy_temp_path %[1]s/proxy;
  fastcgi_temp_path %[1]s/fastcgi;
  uwsgi_temp_path %[1]s/uwsgi;
  scgi_temp_path %[1]s/scgi;
  server {
    listen %[2]s ssl;
    ssl_certificate %[3]s/svid.pem;
    ssl_certificate_key %[3]s/svid_key.pem;
    ssl_client_certificate %[3]s/svid_bundle.pem;
    ssl_verify_client on;
    ssl_session_cache off;
    return 200 "welcome";
  }
}
`, dir, address, filepath.Join(w.Dir, "svid-nginx")), 0o600))
	p, err := site.Start(filepath.Join(w.Dir, "nginx.log"), nil, tool(w.t, "nginx"), "-p", dir, "-c", config, "-e", "stderr")
	w.must(err)
	w.t.Cleanup(func() { _ = p.Stop(15 * time.Second) })
	return server{
		name: "nginx", cert: w.path("nginx", "svid.pem"), why: says("", "it answers 400"),
		call: func() error {
			config, err := w.clientConfig("/nginx")
			if err != nil {
				return err
			}
			transport := &http.Transport{TLSClientConfig: config}
			defer transport.CloseIdleConnections()
			req, err := http.NewRequestWithContext(w.ctx, http.MethodGet, "https://"+address+"/", http.NoBody)
			if err != nil {
				return err
			}
			resp, err := (&http.Client{Transport: transport}).Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			text, err := io.ReadAll(resp.Body)
			if err == nil && (resp.StatusCode != http.StatusOK || string(text) != "welcome") {
				return fmt.Errorf("it answers %d", resp.StatusCode)
			}
			return err
		},
		shown: func() (string, error) {
			conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}).DialContext(w.ctx, "tcp", address) // it is looked at, not trusted
			if err != nil {
				return "", err
			}
			defer conn.Close()
			return fmt.Sprintf("%x", conn.(*tls.Conn).ConnectionState().PeerCertificates[0].AuthorityKeyId), nil
		},
	}
}

// account is a user of the machine.
func account(t *testing.T, name string) *syscall.Credential {
	t.Helper()
	u, err := user.Lookup(name)
	if err != nil {
		lab.Missing(t, "user "+name, err)
	}
	uid, _ := strconv.Atoi(u.Uid) // numbers on every Unix
	gid, _ := strconv.Atoi(u.Gid)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

func startRedis(w *filesWorld) server {
	w.t.Helper()
	as, dir := account(w.t, "redis"), filepath.Join(w.Dir, "redis")
	_, port, _ := net.SplitHostPort(freeAddress(w.t))
	w.must(os.Mkdir(dir, 0o755))
	w.must(os.Chown(dir, int(as.Uid), int(as.Gid)))
	files := filepath.Join(w.Dir, "svid-redis")
	p, err := site.Start(filepath.Join(w.Dir, "redis.log"), as, tool(w.t, "redis-server"),
		"--loglevel", "verbose", "--port", "0", "--tls-port", port, "--bind", "127.0.0.1", "--dir", dir, "--save", "", "--unixsocket", filepath.Join(dir, "redis.sock"),
		"--tls-cert-file", filepath.Join(files, "svid.pem"), "--tls-key-file", filepath.Join(files, "svid_key.pem"),
		"--tls-ca-cert-file", filepath.Join(files, "svid_bundle.pem"), "--tls-auth-clients", "yes")
	w.must(err)
	w.t.Cleanup(func() { _ = p.Stop(15 * time.Second) })
	return server{
		name: "Redis", cert: filepath.Join(files, "svid.pem"), why: says(filepath.Join(w.Dir, "redis.log"), "certificate verify failed"),
		call: func() error {
			out, err := site.Run(w.ctx, nil, tool(w.t, "redis-cli"), "--tls", "-h", "127.0.0.1", "-p", port,
				"--cert", w.path("app", "svid.pem"), "--key", w.path("app", "svid_key.pem"), "--cacert", w.path("app", "svid_bundle.pem"), "PING")
			if err == nil && strings.TrimSpace(out) != "PONG" {
				return fmt.Errorf("it answers %q", out)
			}
			return err
		},
	}
}

// startPostgres starts PostgreSQL with the files that "assay-agent files" keeps as its user.
func startPostgres(w *filesWorld) server {
	w.t.Helper()
	as := account(w.t, "postgres")
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin") // the pattern is right
	if len(found) == 0 {
		lab.Missing(w.t, "PostgreSQL", site.ErrNoTool)
	}
	bin, dir, files := found[len(found)-1], filepath.Join(w.Dir, "postgres"), filepath.Join(w.Dir, "svid-postgres")
	for _, d := range []string{dir, files} {
		w.must(os.Mkdir(d, 0o755))
		w.must(os.Chown(d, int(as.Uid), int(as.Gid)))
	}
	w.entry("/postgres", fmt.Sprintf("unix:uid:%d", as.Uid), "-dns", "localhost")
	// A folder that the user cannot reach may hold the binaries.
	program := filepath.Join(w.Dir, "assay-agent")
	text, err := os.ReadFile(filepath.Join(w.Bin, "assay-agent"))
	w.must(err)
	w.must(os.WriteFile(program, text, 0o755))
	config := filepath.Join(w.Dir, "postgres.hcl")
	w.must(os.WriteFile(config, fmt.Appendf(nil, `agent_address = %q
cert_dir = %q
svid_file_name = "svid.pem"
svid_key_file_name = "svid_key.pem"
svid_bundle_file_name = "svid_bundle.pem"
pid_file_name = %q
log_level = "debug"
`, w.agent.Socket, files, filepath.Join(dir, "data", "postmaster.pid")), 0o644))
	keeper, err := site.Start(filepath.Join(w.Dir, "postgres-files.log"), as, program, "files", "-config", config)
	w.must(err)
	w.t.Cleanup(func() { _ = keeper.Stop(15 * time.Second) })
	w.must(keeper.WaitFor(w.ctx, "PostgreSQL's files", func() error { _, err := os.Stat(filepath.Join(files, "svid.pem")); return err }))

	_, err = site.Run(w.ctx, as, filepath.Join(bin, "initdb"), "-D", filepath.Join(dir, "data"), "-A", "trust", "-N", "--no-locale")
	w.must(err)
	w.must(os.WriteFile(filepath.Join(dir, "data", "pg_hba.conf"), []byte("local all all trust\nhostssl all all 127.0.0.1/32 cert\n"), 0o600))
	_, port, _ := net.SplitHostPort(freeAddress(w.t))
	p, err := site.Start(filepath.Join(w.Dir, "postgres.log"), as, filepath.Join(bin, "postgres"), "-D", filepath.Join(dir, "data"),
		"-c", "listen_addresses=127.0.0.1", "-c", "port="+port, "-c", "unix_socket_directories="+dir, "-c", "fsync=off",
		"-c", "ssl=on", "-c", "ssl_cert_file="+filepath.Join(files, "svid.pem"), "-c", "ssl_key_file="+filepath.Join(files, "svid_key.pem"),
		"-c", "ssl_ca_file="+filepath.Join(files, "svid_bundle.pem"))
	w.must(err)
	w.t.Cleanup(func() { _ = p.Stop(30 * time.Second) })
	psql := tool(w.t, "psql")
	w.must(p.WaitFor(w.ctx, "PostgreSQL", func() error {
		_, err := site.Run(w.ctx, as, psql, "-h", dir, "-p", port, "-d", "postgres", "-c", "CREATE ROLE app LOGIN")
		return err
	}))
	return server{
		name: "PostgreSQL", cert: filepath.Join(files, "svid.pem"), why: says("", "alert unknown ca"),
		call: func() error {
			out, err := site.Run(w.ctx, nil, psql, "-At", "-c", "SELECT current_user", fmt.Sprintf(
				"host=localhost hostaddr=127.0.0.1 port=%s user=app dbname=postgres sslmode=verify-full sslcert=%s sslkey=%s sslrootcert=%s",
				port, w.path("app", "svid.pem"), w.path("app", "svid_key.pem"), w.path("app", "svid_bundle.pem")))
			if err == nil && strings.TrimSpace(out) != "app" {
				return fmt.Errorf("it answers %q", out)
			}
			return err
		},
	}
}
