package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/server/wire/adminv1"
)

// authorityKind is what the commands of both kinds of authority differ in.
type authorityKind struct {
	word, name                       string // on the command line, and in what is printed
	upstream                         bool   // SPIRE has a line about the authority above
	show                             func(context.Context, localauthorityv1.LocalAuthorityClient) (proto.Message, authorityStates, error)
	prepare, activate, taint, revoke authorityStep
}

// authorityStep takes a step and returns the answer, and the authority in it.
type authorityStep func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error)

type authorityStates struct {
	active, prepared, old *localauthorityv1.AuthorityState
}

var authorityX509 = authorityKind{
	word: "x509", name: "X.509", upstream: true,
	show: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient) (proto.Message, authorityStates, error) {
		r, err := c.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
		return r, authorityStates{r.GetActive(), r.GetPrepared(), r.GetOld()}, err
	},
	prepare: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, _ string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
		return r, r.GetPreparedAuthority(), err
	},
	activate: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: id})
		return r, r.GetActivatedAuthority(), err
	},
	taint: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id})
		return r, r.GetTaintedAuthority(), err
	},
	revoke: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: id})
		return r, r.GetRevokedAuthority(), err
	},
}

var authorityJWT = authorityKind{
	word: "jwt", name: "JWT",
	show: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient) (proto.Message, authorityStates, error) {
		r, err := c.GetJWTAuthorityState(ctx, &localauthorityv1.GetJWTAuthorityStateRequest{})
		return r, authorityStates{r.GetActive(), r.GetPrepared(), r.GetOld()}, err
	},
	prepare: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, _ string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.PrepareJWTAuthority(ctx, &localauthorityv1.PrepareJWTAuthorityRequest{})
		return r, r.GetPreparedAuthority(), err
	},
	activate: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.ActivateJWTAuthority(ctx, &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: id})
		return r, r.GetActivatedAuthority(), err
	},
	taint: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: id})
		return r, r.GetTaintedAuthority(), err
	},
	revoke: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: id})
		return r, r.GetRevokedAuthority(), err
	},
}

var authorityWIT = authorityKind{
	word: "wit", name: "WIT",
	show: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient) (proto.Message, authorityStates, error) {
		r, err := c.GetWITAuthorityState(ctx, &localauthorityv1.GetWITAuthorityStateRequest{})
		return r, authorityStates{r.GetActive(), r.GetPrepared(), r.GetOld()}, err
	},
	prepare: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, _ string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.PrepareWITAuthority(ctx, &localauthorityv1.PrepareWITAuthorityRequest{})
		return r, r.GetPreparedAuthority(), err
	},
	activate: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.ActivateWITAuthority(ctx, &localauthorityv1.ActivateWITAuthorityRequest{AuthorityId: id})
		return r, r.GetActivatedAuthority(), err
	},
	taint: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.TaintWITAuthority(ctx, &localauthorityv1.TaintWITAuthorityRequest{AuthorityId: id})
		return r, r.GetTaintedAuthority(), err
	},
	revoke: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
		r, err := c.RevokeWITAuthority(ctx, &localauthorityv1.RevokeWITAuthorityRequest{AuthorityId: id})
		return r, r.GetRevokedAuthority(), err
	},
}

// localAuthorityCommands is "localauthority" with a group for each kind.
func localAuthorityCommands() *cobra.Command {
	return cli.Group("localauthority", "Looks after the server's own authorities, and replaces one at once",
		authorityX509.commands(), authorityJWT.commands(), authorityWIT.commands())
}

func (k authorityKind) commands() *cobra.Command {
	return cli.Group(k.word, "Looks after the "+k.name+" authorities",
		k.showCommand(),
		k.step("prepare", "Prepared", "Makes another "+k.name+" authority and puts it into the bundle", k.prepare),
		k.step("activate", "Activated", "Lets the prepared "+k.name+" authority sign from now on", k.activate),
		k.step("taint", "Tainted", "Has everything replaced at once that an old "+k.name+" authority signed", k.taint),
		k.step("revoke", "Revoked", "Takes a tainted "+k.name+" authority out of the bundle", k.revoke),
		k.statusCommand(),
	)
}

func (k authorityKind) showCommand() *cobra.Command {
	return newRemote("show", "Shows the "+k.name+" authorities", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, states, err := k.show(ctx, localauthorityv1.NewLocalAuthorityClient(conn))
		if err != nil {
			return fmt.Errorf("could not get %s authorities: %w", k.name, err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			k.print(w, "Active", "active", states.active)
			fmt.Fprintln(w)
			k.print(w, "Prepared", "prepared", states.prepared)
			fmt.Fprintln(w)
			k.print(w, "Old", "old", states.old)
			return nil
		}, resp)
	}).Command
}

// print writes an authority under its title.
func (k authorityKind) print(w io.Writer, title, word string, a *localauthorityv1.AuthorityState) {
	fmt.Fprintf(w, "%s %s authority:\n", title, k.name)
	if a == nil {
		fmt.Fprintf(w, "  No %s %s authority found\n", word, k.name)
		return
	}
	fmt.Fprintf(w, "  Authority ID: %s\n  Expires at: %s\n", a.GetAuthorityId(), time.Unix(a.GetExpiresAt(), 0).UTC())
	switch {
	case !k.upstream:
	case a.GetUpstreamAuthoritySubjectKeyId() != "":
		fmt.Fprintf(w, "  Upstream authority Subject Key ID: %s\n", a.GetUpstreamAuthoritySubjectKeyId())
	default:
		fmt.Fprintln(w, "  Upstream authority ID: No upstream authority")
	}
}

// step is a command that does something with an authority.
func (k authorityKind) step(verb, done, short string, do authorityStep) *cobra.Command {
	var id string
	r := newRemote(verb, short, func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, state, err := do(ctx, localauthorityv1.NewLocalAuthorityClient(conn), id)
		if err != nil {
			return fmt.Errorf("could not %s %s authority: %w", verb, k.name, err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			k.print(w, done, verb, state)
			return nil
		}, resp)
	})
	if verb == "prepare" {
		return r.Command
	}
	r.checked(func() error {
		if id == "" {
			return errors.New("an authority ID is required")
		}
		return nil
	})
	r.Flags().StringVar(&id, "authorityID", "", "The authority, as \"localauthority "+k.word+" show\" names it")
	return r.Command
}

// notDone is how "status -wait" ends in vain.
func notDone(s *adminv1.RotationStatusResponse) error {
	const late = "the rotation has not reached every agent in time"
	if s.GetCounts().GetHolding() > 0 && slices.ContainsFunc(s.GetAuthorities(), func(a *adminv1.RotatingAuthority) bool { return a.GetState() == "old" }) {
		return errors.New(late + `; what an old authority signed is replaced in the course of its life, or at once when it is tainted`)
	}
	return errors.New(late)
}

// progress tells what "status -wait" waits for.
type progress struct {
	last string
	at   time.Time
}

// progressEvery is how often it is told, if it changes.
const progressEvery = 2 * time.Second

func (p *progress) say(w io.Writer, s *adminv1.RotationStatusResponse) {
	n := s.GetCounts()
	text := fmt.Sprintf("waiting for agents: %d of %d without the bundle, %d that still hold something of another authority …", n.GetBehind(), n.GetAgents(), n.GetHolding())
	if text != p.last && time.Since(p.at) >= progressEvery {
		p.last, p.at = text, time.Now()
		fmt.Fprintln(w, text)
	}
}

// statusEvery is how often "status -wait" looks.
const statusEvery = 500 * time.Millisecond

func (k authorityKind) statusCommand() *cobra.Command {
	var all bool
	var wait time.Duration
	r := newRemote("status", "Says which agents have yet to follow a rotation", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		client := adminv1.NewAdminClient(conn)
		told := new(progress)
		status, err := rotationStatus(ctx, client, k.word, all)
		for late := time.Now().Add(wait); err == nil && !settled(status) && time.Now().Before(late); {
			told.say(r.ErrOrStderr(), status)
			select {
			case <-time.After(statusEvery):
			case <-ctx.Done():
				return ctx.Err()
			}
			status, err = rotationStatus(ctx, client, k.word, all)
		}
		if err != nil {
			return fmt.Errorf("could not get the state of the rotation: %w", err)
		}
		err = r.output.Print(r.Command, func(w io.Writer) error { k.printStatus(w, status); return nil }, status)
		if err == nil && wait > 0 && !settled(status) {
			return notDone(status)
		}
		return err
	})
	r.Long = "Says which " + k.name + " authorities there are, and which agents have yet to put the bundle in force\n" +
		"or still hold something that another authority signed than the active one. Agents that\n" +
		"are away, and SPIRE's own, which do not tell, are listed as unknown: what they hold ends\n" +
		"with its lifetime."
	r.checked(func() error {
		if wait < 0 {
			return errors.New("-wait must not be negative")
		}
		r.socket.Quiet = wait > 0
		return nil
	})
	r.Flags().BoolVar(&all, "all", false, "Lists all agents, also those that are done")
	r.Flags().DurationVar(&wait, "wait", 0, "Looks until no connected agent is behind or holds anything, for this long at most; the exit status says whether it came to that")
	return r.Command
}

func rotationStatus(ctx context.Context, c adminv1.AdminClient, kind string, all bool) (*adminv1.RotationStatusResponse, error) {
	stream, err := c.RotationStatus(ctx, &adminv1.RotationStatusRequest{Kind: kind, All: all})
	if err != nil {
		return nil, err
	}
	whole := &adminv1.RotationStatusResponse{}
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return whole, nil
		}
		if err != nil {
			return nil, err
		}
		proto.Merge(whole, part)
	}
}

// settled says that there is nothing to wait for from agents that are connected and tell.
func settled(s *adminv1.RotationStatusResponse) bool {
	return s.GetCounts().GetBehind() == 0 && s.GetCounts().GetHolding() == 0
}

func (k authorityKind) printStatus(w io.Writer, s *adminv1.RotationStatusResponse) {
	for _, a := range s.GetAuthorities() {
		fmt.Fprintf(w, "%s authority %s: %s, expires at %s\n", k.name, a.GetAuthorityId(), a.GetState(), time.Unix(a.GetExpiresAt(), 0).UTC())
	}
	n := s.GetCounts()
	fmt.Fprintf(w, "\n%s: %d with the bundle as it is, %d without, %d that still hold something of another authority, %d unknown\n",
		cli.Count(int(n.GetAgents()), "agent", "agents"), n.GetCurrent(), n.GetBehind(), n.GetHolding(), n.GetUnknown())
	for _, a := range s.GetAgents() {
		fmt.Fprintf(w, "  %s:", a.GetSpiffeId())
		words := agentProgress(a)
		for i, word := range words {
			if i > 0 {
				fmt.Fprint(w, ",")
			}
			fmt.Fprintf(w, " %s", word)
		}
		fmt.Fprintln(w)
	}
}

// agentProgress says in words how far an agent has come.
func agentProgress(a *adminv1.RotatingAgent) []string {
	if a.GetReturning() {
		return []string{"connecting anew"}
	}
	if !a.GetConnected() {
		return []string{"unknown: not connected to the feed", "its SVID expires at " + time.Unix(a.GetExpiresAt(), 0).UTC().String()}
	}
	var words []string
	if !a.GetCurrent() {
		words = append(words, "has yet to put the bundle in force")
	}
	if !a.GetReports() {
		words = append(words, "does not tell what it holds")
	}
	if id := a.GetOwnAuthorityId(); id != "" {
		words = append(words, "connected with an SVID of "+id)
	}
	for _, h := range a.GetHeld() {
		words = append(words, fmt.Sprintf("holds %s of %s", cli.Count(int(h.GetSvids()), "SVID", "SVIDs"), h.GetAuthorityId()))
	}
	if len(words) == 0 {
		words = []string{"done"}
	}
	return words
}
