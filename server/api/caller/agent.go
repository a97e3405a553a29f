package caller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
)

// agentPrefix is where the SPIFFE IDs of agents are.
const agentPrefix = "/spire/agent/"

func isAgent(id spiffeid.ID, td spiffeid.TrustDomain) bool {
	return id.MemberOf(td) && strings.HasPrefix(id.Path(), agentPrefix)
}

// denial is a PermissionDenied status that says to our own code what was the matter.
type denial struct {
	method string
	reason types.PermissionDeniedDetails_Reason
}

// denied returns the error of a refused call. Agents act on the reason in its details (they attest
// again, or stop for good), never on the text.
func denied(method string, reason types.PermissionDeniedDetails_Reason) error {
	return denial{method: method, reason: reason}
}

func (d denial) Error() string { return "authorization denied for method " + d.method }

// GRPCStatus makes gRPC send the status with its details.
func (d denial) GRPCStatus() *status.Status {
	return Denied(d.Error(), d.reason)
}

// Denied returns a PermissionDenied status with the reason in its details, if there is one.
func Denied(message string, reason types.PermissionDeniedDetails_Reason) *status.Status {
	st := status.New(codes.PermissionDenied, message)
	if reason == types.PermissionDeniedDetails_UNKNOWN {
		return st
	}
	if with, err := st.WithDetails(&types.PermissionDeniedDetails{Reason: reason}); err == nil {
		return with
	}
	return st
}

// state of an agent's certificate.
type state int

const (
	current state = iota
	promote       // the certificate is the renewed one, used for the first time
	banned
	unknown
	inactive
)

// judge compares a certificate's serial number with its node.
func judge(n *records.Node, serial string) state {
	switch {
	case n == nil:
		return unknown
	case n.Banned:
		return banned
	case n.Serial == serial && serial != "":
		return current
	case n.NewSerial == serial && serial != "":
		return promote
	default:
		return inactive
	}
}

// agent decides on the call of an agent. The picture answers the usual case; before an agent is
// refused for not being known, or not by this serial number, the records are asked, since an agent
// that is refused throws its SVID away.
func (a *Authorizer) agent(ctx context.Context, who *Caller, method string, first bool) (Kind, error) {
	if a.cfg.Now().After(who.Cert.NotAfter) {
		return 0, denied(method, types.PermissionDeniedDetails_AGENT_EXPIRED)
	}
	serial := who.Cert.SerialNumber.String()
	node, _ := a.view.Node(who.ID)
	st := judge(node, serial)
	if st == unknown || st == inactive {
		node, err := a.nodes.Node(ctx, who.ID)
		switch {
		case errors.Is(err, records.ErrNotFound):
			st = unknown
		case err != nil:
			return 0, status.Error(codes.Unavailable, "cannot look the agent up at the moment")
		default:
			st = judge(node, serial)
		}
	}
	if st == promote && first {
		var err error
		if st, err = a.promote(ctx, who.ID, serial, who.Cert.NotAfter); err != nil {
			a.cfg.Log.WithError(err).WithField("agent_id", who.ID.String()).Warn("cannot promote an agent's new SVID")
			return 0, status.Error(codes.Unavailable, "cannot look the agent up at the moment")
		}
	}
	switch st {
	case current, promote:
		return Agent, nil
	case banned:
		return 0, denied(method, types.PermissionDeniedDetails_AGENT_BANNED)
	case unknown:
		return 0, denied(method, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	case inactive:
		if !first {
			// The agent renewed its SVID and uses the new one; this stream is still on the old one. It
			// is to come back with the new one, not to attest again, which NOT_ACTIVE would make it do.
			return 0, status.Error(codes.Unavailable, "the agent's SVID was replaced")
		}
	}
	return 0, denied(method, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
}

// errSettled says that there is nothing to write.
var errSettled = errors.New("settled")

// promote makes the new serial number the current one. From here on the old certificate is refused:
// the agent has shown that it holds the new one.
func (a *Authorizer) promote(ctx context.Context, id spiffeid.ID, serial string, notAfter time.Time) (state, error) {
	st := unknown
	_, rev, err := a.nodes.UpdateNode(ctx, id, func(n *records.Node, exists bool) error {
		if !exists {
			n = nil
		}
		if st = judge(n, serial); st != promote {
			return errSettled // somebody else promoted it, or it was banned or evicted meanwhile
		}
		n.Serial, n.NewSerial = serial, ""
		n.ExpiresAt, n.NewExpiresAt = notAfter, time.Time{}
		n.Key, n.NewKey = n.NewKey, attestor.KeyHash{}
		return nil
	})
	switch {
	case errors.Is(err, errSettled):
		return st, nil
	case err != nil:
		return st, fmt.Errorf("promote serial number: %w", err)
	}
	if err := a.view.Wait(ctx, rev); err != nil {
		return st, fmt.Errorf("wait for revision %d: %w", rev, err)
	}
	return current, nil
}
