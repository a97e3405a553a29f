package compat

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/site"
)

const spireAgentPackage = "github.com/spiffe/spire/cmd/spire-agent"

func unmarshal(t *testing.T, text string, to any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), to); err != nil {
		t.Fatalf("parse %s: %v", text, err)
	}
}

// spireAgent is a real spire-agent joined to a site.
type spireAgent struct {
	*site.Process
	bin, socket, log string
}

// startSPIREAgent starts a stock spire-agent with the given node attestor block and arguments.
func startSPIREAgent(t *testing.T, s *site.Site, nodeAttestor string, args ...string) *spireAgent {
	t.Helper()
	// Before the clock of the waits below starts: the first build takes minutes on a busy machine.
	bin := peer(t, spireAgentPackage)
	ctx := patiently(t)
	bundle, err := s.WriteBundle(ctx)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.Dir, "spire-agent")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	a := &spireAgent{bin: bin, socket: filepath.Join(dir, "api.sock"), log: filepath.Join(s.Dir, "spire-agent.log")}
	config := fmt.Sprintf(`agent {
  data_dir          = %q
  log_level         = "DEBUG"
  server_address    = "127.0.0.1"
  server_port       = %d
  socket_path       = %q
  trust_domain      = %q
  trust_bundle_path = %q
}
plugins {
  NodeAttestor %s
  KeyManager "memory" { plugin_data {} }
  WorkloadAttestor "unix" { plugin_data { discover_workload_path = true } }
}
`, dir, s.Port, a.socket, site.TrustDomain, bundle, nodeAttestor)
	path := filepath.Join(s.Dir, "spire-agent.conf")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	a.Process, err = site.Start(a.log, nil, a.bin, append([]string{"run", "-config", path}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Kill()
		if t.Failed() {
			t.Logf("end of the spire-agent's log:\n%s", site.Tail(a.log, 60))
		}
	})
	err = a.WaitFor(ctx, "the spire-agent to be healthy", func() error {
		_, err := site.Run(ctx, nil, a.bin, "healthcheck", "-socketPath", a.socket)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// ends waits for the agent's process to end by itself.
func (a *spireAgent) ends(t *testing.T, why string) {
	t.Helper()
	select {
	case <-a.Done():
	case <-time.After(patience):
		t.Fatalf("the spire-agent did not end %s", why)
	}
}

func TestSPIREAgentByJoinToken(t *testing.T) {
	s := newSite(t, nil)
	token, err := s.Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	agent := startSPIREAgent(t, s, `"join_token" { plugin_data {} }`, "-joinToken", token)
	if got, want := onlyAgent(t, s), "/spire/agent/join_token/"+token; got != want {
		t.Fatalf("the agent is %s, want %s", got, want)
	}
	client := entries(t, s)
	entry := createEntry(t, client, newEntry(onlyAgent(t, s), "/shop"))
	w := watch(t, agent.socket)
	first := w.until(t, "X509-SVID", hasID("/shop"))

	t.Run("its workload gets a JWT-SVID that validates", func(t *testing.T) {
		checkJWT(t, agent.socket, "/shop")
	})
	t.Run("it follows an entry that changes", func(t *testing.T) {
		entry.DnsNames = []string{"shop.example.org"}
		resp, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{entry}})
		if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
			t.Fatal(resp, err)
		}
		w.until(t, "new X509-SVID", func(got sight) bool {
			if got.x509 == nil {
				return false
			}
			leaf := got.x509.DefaultSVID().Certificates[0]
			return leaf.SerialNumber.Cmp(first.x509.DefaultSVID().Certificates[0].SerialNumber) != 0 &&
				len(leaf.DNSNames) == 1 && leaf.Subject.CommonName == "shop.example.org"
		})
	})
	t.Run("it follows an entry that is deleted", func(t *testing.T) {
		deleteEntry(t, client, entry.GetId())
		w.until(t, "denial", denied)
	})
	t.Run("it posted its version", func(t *testing.T) {
		out, err := s.ServerCLI(t.Context(), "agent", "list", "-output", "json")
		if err != nil || !strings.Contains(out, "1.15.3") {
			t.Fatalf("got %s, %v", out, err)
		}
	})
	t.Run("evicted, it is cut off and cannot join with the token again", func(t *testing.T) {
		if _, err := s.ServerCLI(t.Context(), "agent", "evict", "-spiffeID", "spiffe://"+site.TrustDomain+"/spire/agent/join_token/"+token); err != nil {
			t.Fatal(err)
		}
		// It acts on PermissionDeniedDetails NOT_ATTESTED: it cannot re-attest with a spent token, says so and ends.
		agent.ends(t, "when evicted")
		log, err := os.ReadFile(agent.log)
		if err != nil || !strings.Contains(string(log), "needs to re-attest") {
			t.Fatalf("it ended without having been told to re-attest: %v", err)
		}
	})
}

func TestSPIREAgentBanned(t *testing.T) {
	s := newSite(t, nil)
	token, err := s.Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	agent := startSPIREAgent(t, s, `"join_token" { plugin_data {} }`, "-joinToken", token)
	id := "spiffe://" + site.TrustDomain + onlyAgent(t, s)
	if _, err := s.ServerCLI(t.Context(), "agent", "ban", "-spiffeID", id); err != nil {
		t.Fatal(err)
	}
	// SPIRE's agent acts on PermissionDeniedDetails BANNED: it deletes its SVID and ends.
	agent.ends(t, "when banned")
}

func TestSPIREAgentMustNotExceedItsEntries(t *testing.T) {
	s := newSite(t, nil)
	token, err := s.Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	agent := startSPIREAgent(t, s, `"join_token" { plugin_data {} }`, "-joinToken", token)
	client := entries(t, s)
	// More entries than the 500 up to which the first answer carries them whole.
	parent := onlyAgent(t, s)
	var batch []*types.Entry
	for i := range 1200 {
		e := newEntry(parent, fmt.Sprintf("/many/%d", i))
		e.Selectors = []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", 100000+i)}}
		batch = append(batch, e)
	}
	resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: batch})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range resp.GetResults() {
		if r.GetStatus().GetCode() != 0 {
			t.Fatal(r)
		}
	}
	createEntry(t, client, newEntry("/spire/agent/join_token/another", "/other"))
	mine := createEntry(t, client, newEntry(parent, "/shop"))
	w := watch(t, agent.socket)
	got := w.until(t, "X509-SVID", hasID("/shop"))
	if n := len(got.x509.SVIDs); n != 1 {
		t.Fatalf("%d SVIDs, want 1: an entry of another agent was served", n)
	}
	deleteEntry(t, client, mine.GetId())
	w.until(t, "denial", denied)
}

func TestSPIREAgentByX509PoP(t *testing.T) {
	for name, newKey := range map[string]func() (crypto.Signer, error){
		"ecdsa": func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) },
		"rsa":   func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) },
	} {
		t.Run(name, func(t *testing.T) {
			var pki machinePKI
			s := newSite(t, func(s *site.Site) {
				pki = newMachinePKI(t, s.Dir, newKey)
				// Short, so that the agent re-attests while we look.
				s.ServerExtra = `agent_ttl = "20s"`
				s.ServerBlocks = fmt.Sprintf("node_attestor \"x509pop\" {\n  ca_bundle_path = %q\n}", pki.ca)
			})
			agent := startSPIREAgent(t, s, fmt.Sprintf(
				`"x509pop" { plugin_data { private_key_path = %q certificate_path = %q } }`, pki.key, pki.cert))
			sum := sha1.Sum(pki.leaf.Raw)
			if got, want := onlyAgent(t, s), "/spire/agent/x509pop/"+hex.EncodeToString(sum[:]); got != want {
				t.Fatalf("the agent is %s, want %s", got, want)
			}
			client := entries(t, s)
			// Through a node alias, so that the node's selectors matter.
			alias := newEntry("/spire/server", "/machines")
			alias.Selectors = []*types.Selector{{Type: "x509pop", Value: "subject:cn:machine"}}
			createEntry(t, client, alias)
			createEntry(t, client, newEntry("/machines", "/shop"))
			w := watch(t, agent.socket)
			w.until(t, "X509-SVID", hasID("/shop"))

			serial := agentSerial(t, s)
			err := agent.WaitFor(patiently(t), "it to re-attest before its SVID of 20 s ends", func() error {
				if agentSerial(t, s) == serial {
					return fmt.Errorf("still the same serial number")
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if name == "rsa" {
				return
			}
			t.Run("evicted, it attests again by itself", func(t *testing.T) {
				if _, err := s.ServerCLI(t.Context(), "agent", "evict", "-spiffeID", "spiffe://"+site.TrustDomain+onlyAgent(t, s)); err != nil {
					t.Fatal(err)
				}
				err := agent.WaitFor(patiently(t), "it to be back", func() error {
					out, err := s.ServerCLI(t.Context(), "agent", "count")
					if err == nil && !strings.HasPrefix(out, "1 ") {
						err = fmt.Errorf("got %s", out)
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

func agentSerial(t *testing.T, s *site.Site) string {
	t.Helper()
	out, err := s.ServerCLI(t.Context(), "agent", "list", "-output", "json")
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Agents []struct {
			Serial string `json:"x509svid_serial_number"`
		} `json:"agents"`
	}
	unmarshal(t, out, &list)
	if len(list.Agents) != 1 || list.Agents[0].Serial == "" {
		t.Fatalf("want one agent with a serial number, have %s", out)
	}
	return list.Agents[0].Serial
}

// checkJWT fetches a JWT-SVID with go-spiffe and validates it, by the agent and by itself.
func checkJWT(t *testing.T, socket, path string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"})
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID.Path() != path {
		t.Fatalf("got a token of %s", svid.ID)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{"db"}); err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{"other"}); err == nil {
		t.Fatal("the token is valid for another audience")
	}
	if _, err := workloadapi.ValidateJWTSVID(ctx, svid.Marshal(), "db", workloadapi.WithAddr("unix://"+socket)); err != nil {
		t.Fatal(err)
	}
}

// machinePKI is a machine certificate with its authority, as files.
type machinePKI struct {
	ca, cert, key string
	leaf          *x509.Certificate
}

func newMachinePKI(t *testing.T, dir string, newKey func() (crypto.Signer, error)) machinePKI {
	t.Helper()
	caKey, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	ca := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "machines"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, caKey, caKey)
	leaf := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "machine"}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature,
	}, ca, key, caKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pki := machinePKI{
		ca: filepath.Join(dir, "machines.pem"), cert: filepath.Join(dir, "machine.pem"), key: filepath.Join(dir, "machine.key"), leaf: leaf,
	}
	for path, block := range map[string]*pem.Block{
		pki.ca:   {Type: "CERTIFICATE", Bytes: ca.Raw},
		pki.cert: {Type: "CERTIFICATE", Bytes: leaf.Raw},
		pki.key:  {Type: "PRIVATE KEY", Bytes: der},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return pki
}

func sign(t *testing.T, template, parent *x509.Certificate, key, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
