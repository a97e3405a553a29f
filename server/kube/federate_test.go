package kube

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/sirupsen/logrus"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// unfederated answers every relationship with one status.
type unfederated struct {
	trustdomainv1.TrustDomainClient
	code codes.Code
}

func (u unfederated) BatchCreateFederationRelationship(context.Context, *trustdomainv1.BatchCreateFederationRelationshipRequest, ...grpc.CallOption) (*trustdomainv1.BatchCreateFederationRelationshipResponse, error) {
	return &trustdomainv1.BatchCreateFederationRelationshipResponse{Results: []*trustdomainv1.BatchCreateFederationRelationshipResponse_Result{
		{Status: &types.Status{Code: int32(u.code), Message: "no"}},
	}}, nil
}

func TestFederationsThatAreTriedAgain(t *testing.T) {
	for code, again := range map[codes.Code]bool{codes.InvalidArgument: false, codes.Unavailable: true, codes.Internal: true} {
		log := logrus.New()
		log.SetOutput(io.Discard)
		d := &desk{Registrar: &Registrar{api: API{TrustDomains: unfederated{code: code}}, log: log}}
		of := &federationOf{}
		err := d.writeFederations(t.Context(), []*types.FederationRelationship{{TrustDomain: "bank.org"}}, nil, map[string]*federationOf{"bank.org": of})
		if (err != nil) != again {
			t.Errorf("%s is tried again: %v, want %v", code, err != nil, again)
		}
		if r, ok := errors.AsType[*refusal](of.failed); !ok || r.code != code {
			t.Errorf("%s is not in the resource's status, which is %v", code, of.failed)
		}
	}
}
