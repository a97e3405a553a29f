package spire

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1" // the name that x509pop gives a node
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/assay-id/assay/test/lab/site"
)

// These suites need servers and agents that are set up for them, so each starts its own: ours, or those of
// SPIRE whose paths are in BLACKBOX_SERVER and BLACKBOX_AGENT.

// part is an attestor or an upstream authority in a configuration, in our words and in SPIRE's.
func part(kind, name, format string, args ...any) (ours, spires string) {
	body := fmt.Sprintf(format, args...)
	spire := map[string]string{"node_attestor": "NodeAttestor", "upstream_authority": "UpstreamAuthority"}[kind]
	return fmt.Sprintf("%s %q {\n%s\n}\n", kind, name, body), fmt.Sprintf("%s %q {\n plugin_data {\n%s\n}\n}\n", spire, name, body)
}

// with adds a part to a server.
func with(s *site.Site, ours, spires string) {
	if s.ServerBlocks == "" {
		s.ServerBlocks = "node_attestor \"join_token\" {}\n"
	}
	s.ServerBlocks += ours
	s.SPIRE.ServerPlugins += spires
}

// machine is the agent's part of x509pop.
func machine(p *pop, o *site.AgentOptions) {
	ours, spires := part("node_attestor", "x509pop", "private_key_path = %q\ncertificate_path = %q", p.key, p.cert)
	o.Blocks, o.SPIRENode = ours+"workload_attestor \"unix\" {}\n", spires
}

// field is a server and an agent with what the cases of newTarget need.
func field(t *testing.T, s *site.Site, name string, o site.AgentOptions) (*target, *site.Agent) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var err error
	if o.Blocks == "" {
		if o.Token, err = s.Token(ctx); err != nil {
			t.Fatal(err)
		}
		if s.SPIRE.Agent != "" {
			o.Extra += fmt.Sprintf("\n  join_token = %q", o.Token)
			o.Token = ""
		}
	}
	a, err := s.NewAgent(ctx, name, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = a.Stop(15 * time.Second)
		if t.Failed() {
			t.Logf("end of the log of %s:\n%s", name, site.Tail(a.Log, 20))
		}
	})
	g := &target{
		server: s.Bin + "/assay-server", agent: s.Bin + "/assay-agent", serverSocket: s.ServerSocket(), agentSocket: a.Socket,
		address: fmt.Sprintf("127.0.0.1:%d", s.Port), domain: site.TrustDomain,
	}
	if s.SPIRE.Server != "" {
		g.server = s.SPIRE.Server
	}
	if s.SPIRE.Agent != "" {
		g.agent = s.SPIRE.Agent
	}
	if g.conn, err = grpc.NewClient("unix://"+g.serverSocket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.conn.Close() })
	g.agentID = onlyAgent(t, g)
	return g, a
}

// onlyAgent waits for an agent to be known: one is healthy as soon as it answers.
func onlyAgent(t *testing.T, g *target) (id *types.SPIFFEID) {
	t.Helper()
	eventually(t, "the agent to be known", func() error {
		list, err := agentv1.NewAgentClient(g.conn).ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
		if err == nil && len(list.GetAgents()) == 0 {
			err = errors.New("there is none")
		}
		if err == nil {
			id = list.GetAgents()[0].GetId()
		}
		return err
	})
	return id
}

// pop is a node's certificate, its key and the root it hangs on, in files.
type pop struct{ key, cert, root, path string }

func newPop(t *testing.T) *pop {
	t.Helper()
	dir := t.TempDir()
	root := newRoot(t, dir, "root", "machines")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "machine"}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, root.ca, key.Public(), root.signer)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha1.Sum(der)
	return &pop{
		key: writePEM(t, dir, "node.key", "PRIVATE KEY", pkcs8(t, key)), cert: writePEM(t, dir, "node.pem", "CERTIFICATE", der),
		root: root.cert, path: "/spire/agent/x509pop/" + hex.EncodeToString(sum[:]),
	}
}

// authority is a CA in files.
type authority struct {
	cert, key string
	ca        *x509.Certificate
	signer    *ecdsa.PrivateKey
}

func newRoot(t *testing.T, dir, file, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour), BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{
		cert: writePEM(t, dir, file+".pem", "CERTIFICATE", der), key: writePEM(t, dir, file+".key", "PRIVATE KEY", pkcs8(t, key)), ca: ca, signer: key,
	}
}

func pkcs8(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func writePEM(t *testing.T, dir, name, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// written fetches the workload's X509-SVID into files and returns the leaf and the roots, verified.
func (g *target) written(t *testing.T) (leaf *x509.Certificate, roots []*x509.Certificate, err error) {
	t.Helper()
	chain, roots, err := g.chain(t)
	if len(chain) > 0 {
		leaf = chain[0]
	}
	return leaf, roots, err
}

// chain is written with the whole chain.
func (g *target) chain(t *testing.T) (chain, roots []*x509.Certificate, err error) {
	t.Helper()
	dir := t.TempDir()
	if _, err := site.Run(t.Context(), nil, g.agent, "api", "fetch", "x509", "-write", dir, "-socketPath", g.agentSocket); err != nil {
		return nil, nil, err
	}
	chain, roots = readPEM(t, filepath.Join(dir, "svid.0.pem")), readPEM(t, filepath.Join(dir, "bundle.0.pem"))
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	for _, cert := range chain[1:] {
		between.AddCert(cert)
	}
	_, err = chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return chain, roots, err
}

func readPEM(t *testing.T, path string) (certs []*x509.Certificate) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, cert)
	}
	return certs
}

func alone(t *testing.T) {
	t.Helper()
	if os.Getenv("BLACKBOX_SERVER_SOCKET") != "" {
		t.Skip("a server that others use is left alone")
	}
}
