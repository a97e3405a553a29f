package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/assay-id/assay/cmd/cli"
)

// agentPage is how many agents are asked for at a time.
const agentPage = 1000

// expiresBeforeForm is how -expiresBefore is written.
const expiresBeforeForm = "2006-01-02 15:04:05 -0700 -07"

// agentFilter are the flags that choose agents.
type agentFilter struct {
	selectors                         []string
	matchSelectorsOn, attestationType string
	canReattest, banned               string
	expiresBefore                     string
}

func (f *agentFilter) addTo(c *cobra.Command) {
	flags := c.Flags()
	flags.StringArrayVar(&f.selectors, "selector", nil, "Only agents whose node has this selector, as type:value. Can be used more than once")
	flags.StringVar(&f.matchSelectorsOn, "matchSelectorsOn", "superset", "How -selector is matched: exact, any, superset or subset")
	flags.StringVar(&f.attestationType, "attestationType", "", "Only agents admitted by this type, like join_token or x509pop")
	flags.StringVar(&f.canReattest, "canReattest", "", "true: only agents that can re-attest; false: only others")
	flags.StringVar(&f.banned, "banned", "", "true: only banned agents; false: only others")
	flags.StringVar(&f.expiresBefore, "expiresBefore", "", fmt.Sprintf("Only agents whose SVID expires before this time, as %q", expiresBeforeForm))
}

// parsed returns the filter in its public form.
func (f *agentFilter) parsed() (*agentv1.ListAgentsRequest_Filter, error) {
	out := &agentv1.ListAgentsRequest_Filter{
		ByAttestationType: f.attestationType,
		ByCanReattest:     trueOrFalse(f.canReattest),
		ByBanned:          trueOrFalse(f.banned),
		ByExpiresBefore:   f.expiresBefore,
	}
	if len(f.selectors) > 0 {
		var err error
		if out.BySelectorMatch, err = selectorMatch(f.selectors, f.matchSelectorsOn); err != nil {
			return nil, err
		}
	}
	if f.expiresBefore != "" {
		if _, err := time.Parse(expiresBeforeForm, f.expiresBefore); err != nil {
			return nil, fmt.Errorf("date is not valid: %w", err)
		}
	}
	return out, nil
}

// trueOrFalse reads a flag of three states; any other text means all.
func trueOrFalse(text string) *wrapperspb.BoolValue {
	switch text {
	case "true":
		return wrapperspb.Bool(true)
	case "false":
		return wrapperspb.Bool(false)
	}
	return nil
}

func agentList() *cobra.Command {
	var f agentFilter
	r := newRemote("list", "Lists admitted agents", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		filter, err := f.parsed()
		if err != nil {
			return err
		}
		all, err := listAgents(ctx, agentv1.NewAgentClient(conn), &agentv1.ListAgentsRequest{Filter: filter})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			if len(all.Agents) == 0 {
				fmt.Fprintln(w, "No attested agents found")
				return nil
			}
			fmt.Fprintf(w, "Found %s:\n\n", cli.Count(len(all.Agents), "attested agent", "attested agents"))
			for _, a := range all.Agents {
				printAgent(w, a)
				fmt.Fprintln(w)
			}
			return nil
		}, all)
	})
	f.addTo(r.Command)
	return r.Command
}

// listAgents returns all pages of what the request asks for.
func listAgents(ctx context.Context, client agentv1.AgentClient, req *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	all := new(agentv1.ListAgentsResponse)
	req.PageSize = agentPage
	for {
		page, err := client.ListAgents(ctx, req)
		if err != nil {
			return nil, err
		}
		all.Agents = append(all.Agents, page.GetAgents()...)
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			return all, nil
		}
	}
}

// printAgent shows an agent in the lines that scripts look for.
func printAgent(w io.Writer, a *types.Agent) {
	line := func(name string, value any) { fmt.Fprintf(w, "%-18s: %v\n", name, value) }
	line("SPIFFE ID", idText(a.GetId()))
	line("Attestation type", a.GetAttestationType())
	line("Expiration time", time.Unix(a.GetX509SvidExpiresAt(), 0))
	if a.GetBanned() { // and has no serial number any more
		line("Banned", true)
	} else {
		line("Serial number", a.GetX509SvidSerialNumber())
	}
	line("Can re-attest", a.GetCanReattest())
	if v := a.GetAgentVersion(); v != "" {
		line("Agent version", v)
	}
}

func agentCount() *cobra.Command {
	var f agentFilter
	r := newRemote("count", "Counts admitted agents", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		p, err := f.parsed()
		if err != nil {
			return err
		}
		resp, err := agentv1.NewAgentClient(conn).CountAgents(ctx, &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{
			ByAttestationType: p.ByAttestationType, ByCanReattest: p.ByCanReattest, ByBanned: p.ByBanned,
			ByExpiresBefore: p.ByExpiresBefore, BySelectorMatch: p.BySelectorMatch,
		}})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			_, err := fmt.Fprintln(w, cli.Count(int(resp.GetCount()), "attested agent", "attested agents"))
			return err
		}, resp)
	})
	f.addTo(r.Command)
	return r.Command
}

// byID makes a command about the one agent that -spiffeID names.
func byID(use, short string, do func(ctx context.Context, r *remote, client agentv1.AgentClient, id *types.SPIFFEID) error) *cobra.Command {
	var spiffeID string
	r := newRemote(use, short, func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		id, err := parseID(spiffeID)
		if err != nil {
			return fmt.Errorf("SPIFFE ID %q: %w", spiffeID, err)
		}
		return do(ctx, r, agentv1.NewAgentClient(conn), id)
	}).checked(func() error {
		if spiffeID == "" {
			return errors.New("a SPIFFE ID is required")
		}
		return nil
	})
	r.Flags().StringVar(&spiffeID, "spiffeID", "", "SPIFFE ID of the agent")
	return r.Command
}

func agentShow() *cobra.Command {
	return byID("show", "Shows an agent", func(ctx context.Context, r *remote, client agentv1.AgentClient, id *types.SPIFFEID) error {
		a, err := client.GetAgent(ctx, &agentv1.GetAgentRequest{Id: id})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprint(w, "Found an attested agent given its SPIFFE ID\n\n")
			printAgent(w, a)
			for _, s := range a.GetSelectors() {
				fmt.Fprintf(w, "%-18s: %s:%s\n", "Selectors", s.GetType(), s.GetValue())
			}
			return nil
		}, a)
	})
}

func agentBan() *cobra.Command {
	return byID("ban", "Shuts an agent out for good", func(ctx context.Context, r *remote, client agentv1.AgentClient, id *types.SPIFFEID) error {
		done, err := client.BanAgent(ctx, &agentv1.BanAgentRequest{Id: id})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, says("Agent banned successfully"), done)
	})
}

func agentEvict() *cobra.Command {
	return byID("evict", "Forgets an agent, which may attest again", func(ctx context.Context, r *remote, client agentv1.AgentClient, id *types.SPIFFEID) error {
		done, err := client.DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: id})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, says("Agent evicted successfully"), done)
	})
}

// says returns what prints one line.
func says(text string) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := fmt.Fprintln(w, text)
		return err
	}
}

// purged is what "agent purge" did.
type purged struct {
	Agents []*purgedAgent `json:"expired_agents"`
}

type purgedAgent struct {
	AgentID string `json:"agent_id"`
	Deleted bool   `json:"deleted"`
	Error   string `json:"error,omitempty"`
}

func agentPurge() *cobra.Command {
	var expiredFor time.Duration
	var dryRun bool
	r := newRemote("purge", "Forgets agents whose SVID expired long ago and who can attest again", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		client := agentv1.NewAgentClient(conn)
		all, err := listAgents(ctx, client, &agentv1.ListAgentsRequest{
			// One that is banned stays so: forgotten, it could attest again.
			Filter:     &agentv1.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(true), ByBanned: wrapperspb.Bool(false)},
			OutputMask: &types.AgentMask{X509SvidExpiresAt: true},
		})
		if err != nil {
			return fmt.Errorf("failed to list agents: %w", err)
		}
		result := purged{Agents: []*purgedAgent{}}
		for _, a := range all.Agents {
			if time.Since(time.Unix(a.GetX509SvidExpiresAt(), 0)) <= expiredFor {
				continue
			}
			p := &purgedAgent{AgentID: idText(a.GetId())}
			if !dryRun {
				if _, err := client.DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: a.GetId()}); err != nil {
					p.Error = err.Error()
				} else {
					p.Deleted = true
				}
			}
			result.Agents = append(result.Agents, p)
		}
		return r.output.PrintValue(r.Command, func(w io.Writer) error { printPurged(w, result, dryRun); return nil }, result)
	}).checked(func() error {
		if expiredFor < 0 {
			return errors.New("-expiredFor must not be negative")
		}
		return nil
	})
	r.Flags().DurationVar(&expiredFor, "expiredFor", 30*24*time.Hour, "How long ago the agent's SVID must have expired")
	r.Flags().BoolVar(&dryRun, "dryRun", false, "Only print which agents would be forgotten")
	return r.Command
}

func printPurged(w io.Writer, p purged, dryRun bool) {
	if len(p.Agents) == 0 {
		fmt.Fprintln(w, "No agents to purge.")
		return
	}
	fmt.Fprintf(w, "Found %s\n\n", cli.Count(len(p.Agents), "expired agent", "expired agents"))
	list := func(title string, wanted func(*purgedAgent) bool) {
		for _, a := range p.Agents {
			if !wanted(a) {
				continue
			}
			if title != "" {
				fmt.Fprintln(w, title)
				title = ""
			}
			fmt.Fprintf(w, "%-18s: %s\n", "SPIFFE ID", a.AgentID)
			if a.Error != "" {
				fmt.Fprintf(w, "%-18s: %s\n", "Error", a.Error)
			}
		}
	}
	if dryRun {
		list("\nAgents that can be purged:", func(*purgedAgent) bool { return true })
		return
	}
	list("Agents purged:", func(a *purgedAgent) bool { return a.Deleted })
	list("Agents not purged:", func(a *purgedAgent) bool { return !a.Deleted })
}
