package robust

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/assay-id/assay/test/lab/site"
)

// activeAuthority is the ID of the X.509 authority that signs, which is its subject key ID.
func activeAuthority(t *testing.T, s *site.Site) string {
	t.Helper()
	out, err := s.ServerCLI(patiently(t), "localauthority", "x509", "show", "-output", "json")
	if err != nil {
		t.Fatal(err)
	}
	var state struct {
		Active struct {
			ID string `json:"authority_id"`
		} `json:"active"`
	}
	if err := json.Unmarshal([]byte(out), &state); err != nil || state.Active.ID == "" {
		t.Fatalf("%v: %s", err, out)
	}
	return state.Active.ID
}

// signedBy is a condition for until: the workload has one SVID, and that authority signed it.
func signedBy(path, authority string) func(*workloadapi.X509Context, error) bool {
	return func(c *workloadapi.X509Context, err error) bool {
		return err == nil && fmt.Sprint(paths(c)) == fmt.Sprint([]string{path}) &&
			hex.EncodeToString(c.SVIDs[0].Certificates[0].AuthorityKeyId) == authority
	}
}

// TestAServerThatKnowsLessThanItsAgents puts servers in the place of one that are the same to nobody: the agents'
// SVIDs are of authorities that they have never seen. The agents attest again, well before their SVIDs end.
func TestAServerThatKnowsLessThanItsAgents(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server, agent := machine(t, s)
	s.ServerBlocks = server
	h := newHistory()
	start(t, s)
	trust, env := publish(t, s)
	a := newAgent(t, s, "agent", site.AgentOptions{Blocks: agent, Trust: trust, Env: []string{env}, Extra: `rebootstrap_mode = "always"`})
	node := onlyAgent(t, s)
	h.mustCreate(t, dial(t, s), newEntry(node, "/one"))
	w := newWorkload(t, a.Socket)
	first := activeAuthority(t, s)
	w.until("an SVID", signedBy("/one", first))
	cli := func(args ...string) string {
		t.Helper()
		out, err := s.ServerCLI(patiently(t), args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	again := func(change func(data string)) {
		t.Helper()
		if err := s.Server().Stop(time.Minute); err != nil {
			t.Fatal(err)
		}
		change(s.ServerData())
		start(t, s)
	}

	t.Run("from a backup of before its authorities were rotated", func(t *testing.T) {
		file := filepath.Join(s.Dir, "backup.db")
		cli("backup", "-path", file)
		keys, err := os.ReadFile(filepath.Join(s.ServerData(), "keys.json")) // both are backed up, README.md says
		if err != nil {
			t.Fatal(err)
		}
		var prepared struct {
			Authority struct {
				ID string `json:"authority_id"`
			} `json:"prepared_authority"`
		}
		if err := json.Unmarshal([]byte(cli("localauthority", "x509", "prepare", "-output", "json")), &prepared); err != nil {
			t.Fatal(err)
		}
		next := prepared.Authority.ID
		cli("localauthority", "x509", "activate", "-authorityID", next)
		cli("localauthority", "x509", "taint", "-authorityID", first)
		w.until("an SVID of the next authority", signedBy("/one", next))
		cli("localauthority", "x509", "status", "-wait", "60s") // the agent's own too
		again(func(data string) {
			if out, err := site.Run(patiently(t), nil, filepath.Join(s.Bin, "assay-server"), "restore", "-from", file, "-dataDir", data, "-force"); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if err := os.WriteFile(filepath.Join(data, "keys.json"), keys, 0o600); err != nil {
				t.Fatal(err)
			}
		})
		w.until("an SVID of the first authority again", signedBy("/one", first))
	})
	t.Run("made anew", func(t *testing.T) {
		again(func(data string) {
			if err := os.RemoveAll(data); err != nil {
				t.Fatal(err)
			}
		})
		newHistory().mustCreate(t, dial(t, s), newEntry(node, "/two"))
		w.until("an SVID of an authority that nobody knew", signedBy("/two", activeAuthority(t, s)))
	})
}
