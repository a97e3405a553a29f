package compat

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
)

// language is a program in languages, made of what its users install.
type language struct {
	name string
	// install makes the program in dir, once, and returns how it is run. The error says what could not be had.
	install func(ctx context.Context, dir string) ([]string, error)
}

var allLanguages = []language{
	{name: "python", install: installPython},
	{name: "java", install: installJava},
	{name: "rust", install: installRust},
}

// installing bounds what is fetched and built the first time.
const installing = 15 * time.Minute

// TestLanguages runs a workload in each language that the users of Assay write, with the client that those
// use: it fetches a JWT-SVID and an X509-SVID, watches a forced rotation, and speaks mTLS with go-spiffe before
// and after. Whoever is not who it says is refused by the client itself.
func TestLanguages(t *testing.T) {
	s := newSite(t, nil)
	agent := newAgent(t, s, "agent")
	createEntry(t, entries(t, s), newEntry(onlyAgent(t, s), "/shop"))
	server := startGreeter(t, agent.Socket)
	me := "spiffe://" + site.TrustDomain + "/shop"
	for _, l := range allLanguages {
		t.Run(l.name, func(t *testing.T) {
			p := l.start(t, agent.Socket)
			first := p.until(t, "an X509-SVID", func(m said) bool { return m.X509 == me })

			p.tell(t, "jwt api")
			token := p.until(t, "a JWT-SVID", func(m said) bool { return m.JWT != "" }).JWT
			bundles, err := workloadapi.FetchJWTBundles(patiently(t), workloadapi.WithAddr("unix://"+agent.Socket))
			if err != nil {
				t.Fatal(err)
			}
			if svid, err := jwtsvid.ParseAndValidate(token, bundles, []string{"api"}); err != nil || svid.ID.String() != me {
				t.Errorf("the token is %v, %v", svid, err)
			}
			greeted := func() {
				t.Helper()
				p.tell(t, "call "+server+" "+me)
				m := p.until(t, "an answer", func(m said) bool { return m.Heard != "" || m.Error != "" })
				if m.Heard != "hello "+me {
					t.Errorf("it heard %q, %s", m.Heard, m.Error)
				}
			}
			greeted()
			p.tell(t, "call "+server+" "+me+"/other")
			if m := p.until(t, "an answer", func(m said) bool { return m.Heard != "" || m.Error != "" }); m.Error == "" {
				t.Errorf("it took the server for another and heard %q", m.Heard)
			}

			forceX509(t, s)
			p.until(t, "another X509-SVID", func(m said) bool { return m.X509 == me && m.Serial != first.Serial })
			greeted()
		})
	}
}

// startGreeter is a server with go-spiffe that tells each caller who it is.
func startGreeter(t *testing.T, socket string) string {
	t.Helper()
	source, err := workloadapi.NewX509Source(patiently(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	config := tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeMemberOf(spiffeid.RequireTrustDomainFromString(site.TrustDomain)))
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			greetOne(conn.(*tls.Conn))
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

func greetOne(conn *tls.Conn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if conn.Handshake() != nil { // the caller says why
		return
	}
	_, _ = fmt.Fprintf(conn, "hello %s\n", conn.ConnectionState().PeerCertificates[0].URIs[0])
	_ = conn.CloseWrite()
	_, _ = io.Copy(io.Discard, conn)
}

// forceX509 replaces the X.509 authority, so that all is issued anew, and revokes the one before.
func forceX509(t *testing.T, s *site.Site) {
	t.Helper()
	step := func(args ...string) map[string]map[string]string {
		t.Helper()
		out, err := s.ServerCLI(patiently(t), append([]string{"localauthority", "x509"}, append(args, "-output", "json")...)...)
		if err != nil {
			t.Fatal(err)
		}
		var state map[string]map[string]string
		unmarshal(t, out, &state)
		return state
	}
	old := step("show")["active"]["authority_id"]
	next := step("prepare")["prepared_authority"]["authority_id"]
	step("activate", "-authorityID", next)
	step("taint", "-authorityID", old)
}

// said is a line of a program.
type said struct{ X509, Serial, JWT, Heard, Error string }

// program is a running one.
type program struct {
	*exec.Cmd
	in    io.WriteCloser
	lines chan said
	errs  *bytes.Buffer
}

func (l language) start(t *testing.T, socket string) *program {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join(bin, "peers", l.name))
	if err != nil {
		t.Fatal(err)
	}
	copyInto(t, dir, filepath.Join("languages", l.name))
	ctx, cancel := context.WithTimeout(t.Context(), installing)
	defer cancel()
	began := time.Now()
	run, err := l.install(ctx, dir)
	if err != nil {
		lab.Missing(t, "a SPIFFE client in "+l.name, err)
	}
	t.Logf("ready after %s", time.Since(began).Round(time.Second))
	p := &program{Cmd: exec.Command(run[0], run[1:]...), lines: make(chan said, 100), errs: new(bytes.Buffer)}
	p.Dir, p.Stderr = dir, p.errs
	p.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+socket)
	if l.name == "java" {
		p.Env[len(p.Env)-1] = "SPIFFE_ENDPOINT_SOCKET=unix:" + socket
	}
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.in, err = p.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.lines)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var m said
			if json.Unmarshal(lines.Bytes(), &m) == nil {
				p.lines <- m
			}
		}
	}()
	t.Cleanup(func() {
		p.in.Close()
		go func() {
			for range p.lines { // so that it can end
			}
		}()
		_ = p.Process.Kill()
		_ = p.Wait()
		if t.Failed() {
			t.Logf("it wrote:\n%s", p.errs)
		}
	})
	return p
}

func (p *program) tell(t *testing.T, line string) {
	t.Helper()
	if _, err := io.WriteString(p.in, line+"\n"); err != nil {
		t.Fatal(err)
	}
}

func (p *program) until(t *testing.T, what string, good func(said) bool) said {
	t.Helper()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	var last said
	for {
		select {
		case m, ok := <-p.lines:
			if !ok {
				t.Fatalf("no %s: it has ended", what)
			}
			if last = m; good(m) {
				return m
			}
		case <-timeout.C:
			t.Fatalf("no %s after %v; the last said is %+v", what, patience, last)
		}
	}
}

// installed runs what fetches from a registry, unless a mark says that it was done for the same inputs.
func installed(ctx context.Context, dir string, inputs []string, command ...string) error {
	var want bytes.Buffer
	for _, name := range inputs {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		want.Write(text)
	}
	mark := filepath.Join(dir, ".installed")
	if had, err := os.ReadFile(mark); err == nil && bytes.Equal(had, want.Bytes()) {
		return nil
	}
	tool, err := site.Tool(command[0])
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, tool, command[1:]...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(command, " "), err, last(out, 2000))
	}
	return os.WriteFile(mark, want.Bytes(), 0o600)
}

func last(text []byte, n int) []byte { return text[max(0, len(text)-n):] }

func installPython(ctx context.Context, dir string) ([]string, error) {
	python, err := site.Tool("python3")
	if err != nil {
		return nil, err
	}
	if err := installed(ctx, dir, []string{"requirements.txt"},
		python, "-m", "pip", "install", "--quiet", "--upgrade", "--target", dir, "-r", "requirements.txt"); err != nil {
		return nil, err
	}
	return []string{python, "peer.py"}, nil
}

func installJava(ctx context.Context, dir string) ([]string, error) {
	java, err := site.Tool("java")
	if err != nil {
		return nil, err
	}
	if err := installed(ctx, dir, []string{"pom.xml"}, "mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=lib"); err != nil {
		return nil, err
	}
	return []string{java, "-cp", "lib/*", "Peer.java"}, nil
}

func installRust(ctx context.Context, dir string) ([]string, error) {
	if err := installed(ctx, dir, []string{"Cargo.toml", "src/main.rs"}, "cargo", "build", "--quiet"); err != nil {
		return nil, err
	}
	return []string{filepath.Join(dir, "target", "debug", "peer")}, nil
}

// copyInto copies the files of a folder over those of another.
func copyInto(t *testing.T, to, from string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		if had, err := os.ReadFile(target); err == nil && bytes.Equal(had, text) {
			return nil // builds go by when it was changed
		}
		return os.WriteFile(target, text, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
}
