package compat

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/site"
)

// rotation is what "localauthority … status" says.
type rotation struct {
	Counts struct{ Agents, Behind, Current, Holding, Unknown int }
}

// TestAuthoritiesWithTwoAgents walks an authority of each kind through its life while one of two agents hangs:
// the status names who is left, the other agent's workloads are not held up, and it is done when the agent is back.
func TestAuthoritiesWithTwoAgents(t *testing.T) {
	s := newSite(t, nil)
	conn, err := s.DialServer()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	known := map[string]bool{}
	newest := func() (path string) {
		t.Helper()
		err := s.Server().WaitFor(patiently(t), "the agent to be known", func() error {
			list, err := agentv1.NewAgentClient(conn).ListAgents(t.Context(), &agentv1.ListAgentsRequest{OutputMask: &types.AgentMask{}})
			if err != nil {
				return err
			}
			for _, a := range list.GetAgents() {
				if path = a.GetId().GetPath(); !known[path] {
					known[path] = true
					return nil
				}
			}
			return errors.New("there is none")
		})
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	quick := newAgent(t, s, "quick")
	createEntry(t, entries(t, s), newEntry(newest(), "/quick"))
	slow := newAgent(t, s, "slow")
	slowID := newest()
	createEntry(t, entries(t, s), newEntry(slowID, "/slow"))
	source := func(a *site.Agent) *workloadapi.X509Source {
		source, err := workloadapi.NewX509Source(patiently(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+a.Socket)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { source.Close() })
		return source
	}
	sources := map[string]*workloadapi.X509Source{"quick": source(quick), "slow": source(slow)}
	command := func(kind string, args ...string) string {
		t.Helper()
		out, err := s.ServerCLI(t.Context(), append([]string{"localauthority", kind}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	id := func(kind, of string, args ...string) string {
		t.Helper()
		var state map[string]struct {
			ID string `json:"authority_id"`
		}
		unmarshal(t, command(kind, append(args, "-output", "json")...), &state)
		return state[of].ID
	}
	// status waits for what it says; what goes with it is the text for people.
	status := func(kind, what string, good func(rotation) bool) string {
		t.Helper()
		var last rotation
		err := s.Server().WaitFor(patiently(t), what, func() error {
			out, err := s.ServerCLI(t.Context(), "localauthority", kind, "status", "-output", "json")
			if err == nil {
				err = json.Unmarshal([]byte(out), &last)
			}
			if err == nil && !good(last) {
				err = fmt.Errorf("it is %+v", last)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return command(kind, "status")
	}

	for _, kind := range []string{"x509", "jwt"} {
		t.Run(kind, func(t *testing.T) {
			status(kind, "both agents to be done", func(r rotation) bool { return r.Counts.Agents == 2 && r.Counts.Current == 2 && r.Counts.Holding == 0 })
			if kind == "jwt" {
				for _, a := range []*site.Agent{quick, slow} {
					if _, err := workloadapi.FetchJWTSVID(patiently(t), jwtsvid.Params{Audience: "a"}, workloadapi.WithAddr("unix://"+a.Socket)); err != nil {
						t.Fatal(err)
					}
				}
			}
			old := id(kind, "active", "show")
			if err := slow.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			stopped := true
			defer func() {
				if stopped {
					_ = slow.Signal(syscall.SIGCONT)
				}
			}()
			next := id(kind, "prepared_authority", "prepare")
			if text := status(kind, "the agent that hangs to be behind", func(r rotation) bool { return r.Counts.Behind == 1 && r.Counts.Current == 1 }); !strings.Contains(text, slowID) {
				t.Errorf("the status does not name %s: %s", slowID, text)
			}
			// It is waited for, but not for ever.
			if got := id(kind, "activated_authority", "activate", "-authorityID", next); got != next {
				t.Errorf("activated %s, want %s", got, next)
			}
			command(kind, "taint", "-authorityID", old)
			if kind == "x509" {
				by := func() (string, error) {
					svid, err := sources["quick"].GetX509SVID()
					if err != nil {
						return "", err
					}
					return fmt.Sprintf("%x", svid.Certificates[0].AuthorityKeyId), nil
				}
				for got, err := by(); got != next; got, err = by() {
					if err != nil {
						t.Fatal(err)
					}
					if err := sources["quick"].WaitUntilUpdated(patiently(t)); err != nil {
						t.Fatalf("the workload of the other agent is not served: %v", err)
					}
				}
			}
			if _, err := s.ServerCLI(t.Context(), "localauthority", kind, "status", "-wait", "1s"); err == nil {
				t.Error("the status says that it is done while an agent hangs")
			}
			if err := slow.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			stopped = false
			if out, err := s.ServerCLI(t.Context(), "localauthority", kind, "status", "-wait", "60s"); err != nil {
				t.Fatalf("with the agent back: %s, %v", out, err)
			}
			command(kind, "revoke", "-authorityID", old)
			for name, source := range sources {
				err := s.Server().WaitFor(patiently(t), "the workload of "+name, func() error {
					b, err := source.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(site.TrustDomain))
					if err == nil && len(b.X509Authorities()) != 1 {
						err = errors.New("the old authority is in its bundle")
					}
					return err
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
}
