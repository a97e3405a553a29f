package hostile

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	agentdebugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	agentloggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	adminwire "github.com/assay-id/assay/agent/admin/wire"
	"github.com/assay-id/assay/server/wire/adminv1"
	"github.com/assay-id/assay/server/wire/downstreamv1"
	"github.com/assay-id/assay/server/wire/feedv1"
)

// message makes a good message; last is the response to the one before it.
type message func(g *ground, last []byte) proto.Message

// sample is a good call of a method.
type sample struct {
	// as is who calls it over TCP.
	as string
	// code is how it ends: OK, or Unimplemented for what is not served yet.
	code codes.Code
	// quiet says that it has no audit line when it goes well.
	quiet bool
	// endless says that the server does not end it.
	endless  bool
	messages []message
	// closing is a message that makes the server end an endless call with one of the texts in closed,
	// whatever it made of the one before, which it need not answer.
	closing proto.Message
	closed  []string
}

// fixed is a message that is always the same.
func fixed(m proto.Message) message { return func(*ground, []byte) proto.Message { return m } }

// call is a sample with one message.
func call(as string, m message) sample { return sample{as: as, messages: []message{m}} }

func (s sample) quietly() sample   { s.quiet = true; return s }
func (s sample) endlessly() sample { s.endless = true; return s }

func (s sample) closedBy(m proto.Message, texts ...string) sample {
	s.closing, s.closed = m, texts
	return s
}

// thisProcess is how a broker refers to this process.
var thisProcess = func() *brokerapi.WorkloadReference {
	ref, err := anypb.New(&brokerapi.WorkloadPIDReference{Pid: int32(os.Getpid())})
	if err != nil {
		panic(err)
	}
	return &brokerapi.WorkloadReference{Reference: ref}
}()

// samples has one good call for every method there is on any socket.
var samples = map[string]sample{
	"/spire.api.server.agent.v1.Agent/CountAgents": call("admin", fixed(&agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{ByAttestationType: "honest"}})),
	"/spire.api.server.agent.v1.Agent/ListAgents":  call("admin", fixed(&agentv1.ListAgentsRequest{PageSize: 2})),
	"/spire.api.server.agent.v1.Agent/GetAgent": call("admin", func(g *ground, _ []byte) proto.Message {
		return &agentv1.GetAgentRequest{Id: wireID(g.agents["agent"])}
	}),
	"/spire.api.server.agent.v1.Agent/DeleteAgent": call("admin", func(g *ground, _ []byte) proto.Message {
		path, _ := g.enroll(g.name())
		return &agentv1.DeleteAgentRequest{Id: wireID(path)}
	}),
	"/spire.api.server.agent.v1.Agent/BanAgent": call("admin", func(g *ground, _ []byte) proto.Message {
		path, _ := g.enroll(g.name())
		return &agentv1.BanAgentRequest{Id: wireID(path)}
	}),
	"/spire.api.server.agent.v1.Agent/AttestAgent": {as: "anyone", messages: []message{
		func(g *ground, _ []byte) proto.Message { return attestParams(g.name(), aCSR) },
		func(*ground, []byte) proto.Message { return because() },
	}},
	"/spire.api.server.agent.v1.Agent/RenewAgent": call("agent", fixed(&agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: aCSR}})),
	"/spire.api.server.agent.v1.Agent/PostStatus": call("agent", fixed(&agentv1.PostStatusRequest{AgentVersion: "1"})).quietly(),
	"/spire.api.server.agent.v1.Agent/CreateJoinToken": call("admin", func(g *ground, _ []byte) proto.Message {
		return &agentv1.CreateJoinTokenRequest{Ttl: 60, Token: g.name(), AgentId: wireID("/" + g.name())}
	}),

	"/spire.api.server.bundle.v1.Bundle/CountBundles":         call("admin", fixed(&bundlev1.CountBundlesRequest{})),
	"/spire.api.server.bundle.v1.Bundle/GetBundle":            call("anyone", fixed(&bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{X509Authorities: true}})).quietly(),
	"/spire.api.server.bundle.v1.Bundle/AppendBundle":         call("admin", fixed(&bundlev1.AppendBundleRequest{X509Authorities: aBundle("").X509Authorities, JwtAuthorities: aBundle("").JwtAuthorities, WitAuthorities: []*types.WITKey{aWITKey()}})),
	"/spire.api.server.bundle.v1.Bundle/PublishJWTAuthority":  call("downstream", fixed(&bundlev1.PublishJWTAuthorityRequest{JwtAuthority: aBundle("").JwtAuthorities[0]})),
	"/spire.api.server.bundle.v1.Bundle/PublishWITAuthority":  call("downstream", fixed(&bundlev1.PublishWITAuthorityRequest{WitAuthority: aWITKey()})),
	"/spire.api.server.bundle.v1.Bundle/ListFederatedBundles": call("admin", fixed(&bundlev1.ListFederatedBundlesRequest{PageSize: 2})),
	"/spire.api.server.bundle.v1.Bundle/GetFederatedBundle": call("admin", func(g *ground, _ []byte) proto.Message {
		return &bundlev1.GetFederatedBundleRequest{TrustDomain: g.federated()}
	}).quietly(),
	"/spire.api.server.bundle.v1.Bundle/BatchCreateFederatedBundle": call("admin", func(g *ground, _ []byte) proto.Message {
		return &bundlev1.BatchCreateFederatedBundleRequest{Bundle: []*types.Bundle{aBundle(g.name() + ".test")}}
	}),
	"/spire.api.server.bundle.v1.Bundle/BatchUpdateFederatedBundle": call("admin", func(g *ground, _ []byte) proto.Message {
		return &bundlev1.BatchUpdateFederatedBundleRequest{Bundle: []*types.Bundle{aBundle(g.federated())}}
	}),
	"/spire.api.server.bundle.v1.Bundle/BatchSetFederatedBundle": call("admin", fixed(&bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{aBundle("set.test")}})),
	"/spire.api.server.bundle.v1.Bundle/BatchDeleteFederatedBundle": call("admin", func(g *ground, _ []byte) proto.Message {
		td := g.name() + ".test"
		g.federate(td)
		return &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{td}}
	}),

	"/spire.api.server.entry.v1.Entry/CountEntries": call("admin", fixed(&entryv1.CountEntriesRequest{})),
	"/spire.api.server.entry.v1.Entry/ListEntries":  call("admin", fixed(&entryv1.ListEntriesRequest{PageSize: 5})),
	"/spire.api.server.entry.v1.Entry/GetEntry":     call("admin", func(g *ground, _ []byte) proto.Message { return &entryv1.GetEntryRequest{Id: g.entry} }),
	"/spire.api.server.entry.v1.Entry/BatchCreateEntry": call("admin", func(g *ground, _ []byte) proto.Message {
		return &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{goodEntry(g)}}
	}),
	"/spire.api.server.entry.v1.Entry/BatchUpdateEntry": call("admin", func(g *ground, _ []byte) proto.Message {
		e := goodEntry(g)
		e.Id = g.create(e)[0]
		e.Hint = "changed"
		return &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}}
	}),
	"/spire.api.server.entry.v1.Entry/BatchDeleteEntry": call("admin", func(g *ground, _ []byte) proto.Message {
		return &entryv1.BatchDeleteEntryRequest{Ids: g.create(goodEntry(g))}
	}),
	"/spire.api.server.entry.v1.Entry/GetAuthorizedEntries": call("agent", fixed(&entryv1.GetAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true}})).quietly(),
	"/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries": sample{as: "big", messages: []message{
		fixed(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true, RevisionNumber: true}}),
		func(_ *ground, last []byte) proto.Message {
			var resp entryv1.SyncAuthorizedEntriesResponse
			if proto.Unmarshal(last, &resp) != nil || len(resp.GetEntryRevisions()) == 0 {
				return &entryv1.SyncAuthorizedEntriesRequest{}
			}
			return &entryv1.SyncAuthorizedEntriesRequest{Ids: []string{resp.GetEntryRevisions()[0].GetId()}}
		},
	}}.quietly(),

	"/spire.api.server.svid.v1.SVID/MintX509SVID": call("admin", fixed(&svidv1.MintX509SVIDRequest{Csr: newCSR(aKey, "spiffe://example.org/minted"), Ttl: 60})),
	"/spire.api.server.svid.v1.SVID/MintJWTSVID":  call("admin", fixed(&svidv1.MintJWTSVIDRequest{Id: wireID("/minted"), Audience: []string{"a"}, Ttl: 60})),
	"/spire.api.server.svid.v1.SVID/MintWITSVID":  call("admin", fixed(&svidv1.MintWITSVIDRequest{Id: wireID("/minted"), PublicKey: aPublicKey, SigningAlgorithm: "ES256", Ttl: 60})),
	"/spire.api.server.svid.v1.SVID/BatchNewX509SVID": call("agent", func(g *ground, _ []byte) proto.Message {
		return &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: g.entry, Csr: aCSR}}}
	}),
	"/spire.api.server.svid.v1.SVID/NewJWTSVID": call("agent", func(g *ground, _ []byte) proto.Message {
		return &svidv1.NewJWTSVIDRequest{EntryId: g.entry, Audience: []string{"a"}}
	}),
	"/spire.api.server.svid.v1.SVID/BatchNewWITSVID": call("agent", func(g *ground, _ []byte) proto.Message {
		return &svidv1.BatchNewWITSVIDRequest{Params: []*svidv1.NewWITSVIDParams{{EntryId: g.entry, PublicKey: aPublicKey, SigningAlgorithm: "ES256"}}}
	}),
	"/spire.api.server.svid.v1.SVID/NewDownstreamX509CA": call("downstream", fixed(&svidv1.NewDownstreamX509CARequest{Csr: aCSR, PreferredTtl: 60})),

	"/spire.api.server.trustdomain.v1.TrustDomain/ListFederationRelationships": call("admin", fixed(&trustdomainv1.ListFederationRelationshipsRequest{PageSize: 2})),
	"/spire.api.server.trustdomain.v1.TrustDomain/GetFederationRelationship": call("admin", func(g *ground, _ []byte) proto.Message {
		return &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: g.related("related.test")}
	}),
	"/spire.api.server.trustdomain.v1.TrustDomain/BatchCreateFederationRelationship": call("admin", func(g *ground, _ []byte) proto.Message {
		return &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{aRelationship(g.name() + ".test")}}
	}),
	"/spire.api.server.trustdomain.v1.TrustDomain/BatchUpdateFederationRelationship": call("admin", func(g *ground, _ []byte) proto.Message {
		return &trustdomainv1.BatchUpdateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{aRelationship(g.related("related.test"))}}
	}),
	"/spire.api.server.trustdomain.v1.TrustDomain/BatchDeleteFederationRelationship": call("admin", func(g *ground, _ []byte) proto.Message {
		return &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{g.related(g.name() + ".test")}}
	}),
	// No endpoint is there to refresh from; server/trust and server have tests with one.
	"/spire.api.server.trustdomain.v1.TrustDomain/RefreshBundle": {as: "admin", code: codes.NotFound, messages: []message{fixed(&trustdomainv1.RefreshBundleRequest{TrustDomain: "nobody.test"})}},

	"/spire.api.server.localauthority.v1.LocalAuthority/GetJWTAuthorityState": call("admin", fixed(&localauthorityv1.GetJWTAuthorityStateRequest{})),
	"/spire.api.server.localauthority.v1.LocalAuthority/PrepareJWTAuthority":  call("admin", fixed(&localauthorityv1.PrepareJWTAuthorityRequest{})),
	"/spire.api.server.localauthority.v1.LocalAuthority/ActivateJWTAuthority": call("admin", func(g *ground, _ []byte) proto.Message {
		return &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: g.prepared("jwt")}
	}),
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintJWTAuthority": call("admin", func(g *ground, _ []byte) proto.Message {
		return &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: g.old("jwt")}
	}),
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeJWTAuthority": call("admin", func(g *ground, _ []byte) proto.Message {
		return &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: g.tainted("jwt")}
	}),
	"/spire.api.server.localauthority.v1.LocalAuthority/GetX509AuthorityState": call("admin", fixed(&localauthorityv1.GetX509AuthorityStateRequest{})),
	"/spire.api.server.localauthority.v1.LocalAuthority/PrepareX509Authority":  call("admin", fixed(&localauthorityv1.PrepareX509AuthorityRequest{})),
	"/spire.api.server.localauthority.v1.LocalAuthority/ActivateX509Authority": call("admin", func(g *ground, _ []byte) proto.Message {
		return &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: g.prepared("x509")}
	}),
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintX509Authority": call("admin", func(g *ground, _ []byte) proto.Message {
		return &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: g.old("x509")}
	}),
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintX509UpstreamAuthority": {as: "admin", code: codes.FailedPrecondition, messages: []message{fixed(&localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: "aa"})}},
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeX509Authority": call("admin", func(g *ground, _ []byte) proto.Message {
		return &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: g.tainted("x509")}
	}),
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeX509UpstreamAuthority": {as: "admin", code: codes.FailedPrecondition, messages: []message{fixed(&localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: "aa"})}},
	"/spire.api.server.localauthority.v1.LocalAuthority/GetWITAuthorityState":        call("admin", fixed(&localauthorityv1.GetWITAuthorityStateRequest{})),
	"/spire.api.server.localauthority.v1.LocalAuthority/PrepareWITAuthority":         call("admin", fixed(&localauthorityv1.PrepareWITAuthorityRequest{})),
	"/spire.api.server.localauthority.v1.LocalAuthority/ActivateWITAuthority": call("admin", func(g *ground, _ []byte) proto.Message {
		return &localauthorityv1.ActivateWITAuthorityRequest{AuthorityId: g.prepared("wit")}
	}),
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintWITAuthority": call("admin", func(g *ground, _ []byte) proto.Message {
		return &localauthorityv1.TaintWITAuthorityRequest{AuthorityId: g.old("wit")}
	}),
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeWITAuthority": call("admin", func(g *ground, _ []byte) proto.Message {
		return &localauthorityv1.RevokeWITAuthorityRequest{AuthorityId: g.tainted("wit")}
	}),

	"/assay.admin.v1.Admin/Backup":         call("", fixed(&adminv1.BackupRequest{})),
	"/assay.admin.v1.Admin/TakeSnapshot":   call("", fixed(&adminv1.TakeSnapshotRequest{})),
	"/assay.admin.v1.Admin/RotationStatus": call("admin", fixed(&adminv1.RotationStatusRequest{Kind: "x509", All: true})),

	"/spire.api.server.debug.v1.Debug/GetInfo":         call("", fixed(&debugv1.GetInfoRequest{})),
	"/spire.api.server.logger.v1.Logger/GetLogger":     call("", fixed(&loggerv1.GetLoggerRequest{})),
	"/spire.api.server.logger.v1.Logger/SetLogLevel":   call("", fixed(&loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_INFO})),
	"/spire.api.server.logger.v1.Logger/ResetLogLevel": call("", fixed(&loggerv1.ResetLogLevelRequest{})),

	"/assay.feed.v1.Feed/Follow": sample{as: "agent", messages: []message{
		fixed(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: &feedv1.Hello{
			AgentVersion: "1", Entries: []*feedv1.HeldEntry{{Id: "e"}}, Bundles: []*feedv1.HeldBundle{{TrustDomain: "a.test"}}, Capabilities: []string{"x"},
		}}}),
		func(g *ground, last []byte) proto.Message {
			var resp feedv1.FollowResponse
			_ = proto.Unmarshal(last, &resp)
			// A change makes the server answer to the acknowledgement.
			g.create(&types.Entry{
				SpiffeId: wireID("/" + g.name()), ParentId: wireID(g.agents["agent"]), Selectors: []*types.Selector{{Type: "unix", Value: "uid:2"}},
				ExpiresAt: time.Now().Add(time.Minute).Unix(),
			})
			return &feedv1.FollowRequest{Message: &feedv1.FollowRequest_Ack{Ack: &feedv1.Ack{Revision: resp.GetRevision()}}}
		},
	}}.quietly().endlessly().closedBy(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Ack{Ack: &feedv1.Ack{Revision: 1 << 62}}},
		fmt.Sprint("acknowledged revision ", 1<<62), "nothing is to be acknowledged"),

	"/assay.downstream.v1.Downstream/FollowBundle": call("downstream", fixed(&downstreamv1.FollowBundleRequest{})).quietly().endlessly(),

	"/SpiffeWorkloadAPI/FetchX509SVID":    call("workload", fixed(&workload.X509SVIDRequest{})).endlessly(),
	"/SpiffeWorkloadAPI/FetchX509Bundles": call("workload", fixed(&workload.X509BundlesRequest{})).endlessly(),
	"/SpiffeWorkloadAPI/FetchJWTSVID":     call("workload", fixed(&workload.JWTSVIDRequest{Audience: []string{"a"}})),
	"/SpiffeWorkloadAPI/FetchJWTBundles":  call("workload", fixed(&workload.JWTBundlesRequest{})).endlessly(),
	"/SpiffeWorkloadAPI/ValidateJWTSVID": call("workload", func(g *ground, _ []byte) proto.Message {
		return &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: g.token()}
	}),
	"/SpiffeWorkloadAPI/FetchWITSVID":    call("workload", fixed(&workload.WITSVIDRequest{})).endlessly(),
	"/SpiffeWorkloadAPI/FetchWITBundles": call("workload", fixed(&workload.WITBundlesRequest{})).endlessly(),

	"/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets": call("workload", fixed(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})).endlessly(),
	"/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets":  call("workload", fixed(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default"}})).endlessly(),
	"/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets":  call("workload", fixed(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})),

	"/assay.agentadmin.v1.Admin/Explain": call("operator", fixed(&adminwire.ExplainRequest{
		Target: &adminwire.ExplainRequest_Pid{Pid: int32(os.Getpid())},
	})),
	"/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs": call("operator", fixed(&delegatedv1.SubscribeToX509SVIDsRequest{
		Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("uid:", os.Getuid())}},
	})).endlessly(),
	"/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/FetchJWTSVIDs": call("operator", fixed(&delegatedv1.FetchJWTSVIDsRequest{
		Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("uid:", os.Getuid())}}, Audience: []string{"a"},
	})),
	"/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509Bundles": call("operator", fixed(&delegatedv1.SubscribeToX509BundlesRequest{})).endlessly(),
	"/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToJWTBundles":  call("operator", fixed(&delegatedv1.SubscribeToJWTBundlesRequest{})).endlessly(),
	"/spire.agent.debug.v1.Debug/GetInfo":                                            call("operator", fixed(&agentdebugv1.GetInfoRequest{})),
	"/spire.api.agent.logger.v1.Logger/GetLogger":                                    call("operator", fixed(&agentloggerv1.GetLoggerRequest{})),
	"/spire.api.agent.logger.v1.Logger/SetLogLevel":                                  call("operator", fixed(&agentloggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_INFO})),
	"/spire.api.agent.logger.v1.Logger/ResetLogLevel":                                call("operator", fixed(&agentloggerv1.ResetLogLevelRequest{})),

	"/spiffe.broker.API/SubscribeToX509SVID":    call("broker", fixed(&brokerapi.SubscribeToX509SVIDRequest{Reference: thisProcess})).endlessly(),
	"/spiffe.broker.API/SubscribeToX509Bundles": call("broker", fixed(&brokerapi.SubscribeToX509BundlesRequest{Reference: thisProcess})).endlessly(),
	"/spiffe.broker.API/FetchJWTSVID":           call("broker", fixed(&brokerapi.FetchJWTSVIDRequest{Reference: thisProcess, Audience: []string{"a"}})),
	"/spiffe.broker.API/SubscribeToJWTBundles":  call("broker", fixed(&brokerapi.SubscribeToJWTBundlesRequest{Reference: thisProcess})).endlessly(),

	"/grpc.health.v1.Health/Check": call("", fixed(&grpc_health_v1.HealthCheckRequest{})).quietly(),
	"/grpc.health.v1.Health/List":  call("", fixed(&grpc_health_v1.HealthListRequest{})).quietly(),
	"/grpc.health.v1.Health/Watch": call("", fixed(&grpc_health_v1.HealthCheckRequest{})).quietly().endlessly(),
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": call("", fixed(&grpc_reflection_v1.ServerReflectionRequest{
		MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
	})),
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": call("", fixed(&grpc_reflection_v1alpha.ServerReflectionRequest{ //nolint:staticcheck // served, so attacked
		MessageRequest: &grpc_reflection_v1alpha.ServerReflectionRequest_ListServices{},
	})),
}

// lenient excepts fields from what must be refused, with the reason.
var lenient = map[string]string{
	"spire.api.types.Entry.revision_number": "the server's to say; what is sent is ignored, as by SPIRE",
	"spire.api.types.Entry.created_at":      "likewise",

	"spire.api.types.WITKey.key_id":     "dropped unread: nothing verifies with WIT keys, and bundles of others may have them",
	"spire.api.types.WITKey.expires_at": "likewise",
	"spire.api.types.WITKey.public_key": "likewise",

	"spire.api.server.entry.v1.SyncAuthorizedEntriesRequest.ids": "an ID the agent may not have is skipped, so that the answer tells it nothing",

	"envoy.config.core.v3.SocketAddress.protocol": "what Envoy tells about itself; only its version and metadata are read",
	"google.rpc.Status.code":                      "why a client refused its secrets is its own affair, and logged",

	"assay.evidence.v1.Exception.created_at": "the server's to say; what is sent is ignored",
	"assay.evidence.v1.Exception.approver":   "who calls over TCP approves himself, whatever he says",

	"grpc.health.v1.HealthCheckRequest.service": "a service nobody knows is answered as such, and watched for, by gRPC's own code",

	"grpc.reflection.v1.ExtensionRequest.extension_number":      "answered inside the response, by gRPC's own code",
	"grpc.reflection.v1alpha.ExtensionRequest.extension_number": "likewise",
}

// A key and a CSR by it that stand for any.
var (
	aKey       = newKey()
	aPublicKey = publicKey(aKey)
	aCSR       = newCSR(aKey)
)

// goodEntry is one that can be created; every field that can be set is.
func goodEntry(g *ground) *types.Entry {
	name := g.name()
	return &types.Entry{
		Id: name, SpiffeId: wireID("/entry/" + name), ParentId: wireID("/nodes"),
		Selectors:   []*types.Selector{{Type: "unix", Value: "uid:1000"}, {Type: "unix", Value: "gid:1000"}},
		X509SvidTtl: 60, JwtSvidTtl: 60, DnsNames: []string{"a.test"}, Hint: "a", FederatesWith: []string{g.federated()},
		ExpiresAt: time.Now().Add(time.Hour).Unix(), AdditionalAttributes: &types.Entry_AdditionalAttributes{JwtSvidIncludeJti: true},
	}
}

// aBundle is a federated bundle.
func aBundle(td string) *types.Bundle {
	pkix, err := x509.MarshalPKIXPublicKey(aKey.Public())
	if err != nil {
		panic(err)
	}
	return &types.Bundle{
		TrustDomain: td, RefreshHint: 60, SequenceNumber: 1,
		X509Authorities: []*types.X509Certificate{{Asn1: anAuthority}},
		JwtAuthorities:  []*types.JWTKey{{PublicKey: pkix, KeyId: "k", ExpiresAt: time.Now().Add(time.Hour).Unix()}},
	}
}

func aWITKey() *types.WITKey {
	k := aBundle("").GetJwtAuthorities()[0]
	return &types.WITKey{PublicKey: k.GetPublicKey(), KeyId: "w", ExpiresAt: k.GetExpiresAt()}
}

var anAuthority = newAuthority()

// newAuthority makes a CA certificate.
func newAuthority() []byte {
	id := &url.URL{Scheme: "spiffe", Host: "other.test"}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "authority"}, URIs: []*url.URL{id},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, aKey.Public(), aKey)
	if err != nil {
		panic(err)
	}
	return der
}

// federated returns a trust domain that there is a bundle of.
func (g *ground) federated() string {
	g.t.Helper()
	const td = "federated.test"
	g.federate(td)
	return td
}

// aRelationship is with a trust domain whose endpoint nobody is at.
func aRelationship(td string) *types.FederationRelationship {
	return &types.FederationRelationship{
		TrustDomain: td, BundleEndpointUrl: "https://127.0.0.1:1/", TrustDomainBundle: aBundle(td),
		BundleEndpointProfile: &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: "spiffe://" + td + "/spire/server"}},
	}
}

// related makes such a federation, if there is none, and returns the trust domain.
func (g *ground) related(td string) string {
	g.t.Helper()
	resp, err := trustdomainv1.NewTrustDomainClient(g.as["local"]).BatchCreateFederationRelationship(g.context(), &trustdomainv1.BatchCreateFederationRelationshipRequest{
		FederationRelationships: []*types.FederationRelationship{aRelationship(td)},
	})
	if err != nil {
		g.t.Fatal(err)
	}
	if st := resp.GetResults()[0].GetStatus(); st.GetCode() != int32(codes.OK) && st.GetCode() != int32(codes.AlreadyExists) {
		g.t.Fatalf("create federation: %v", st)
	}
	return td
}

// federate stores a bundle of a trust domain.
func (g *ground) federate(td string) {
	g.t.Helper()
	resp, err := bundlev1.NewBundleClient(g.as["local"]).BatchSetFederatedBundle(g.context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{aBundle(td)}})
	if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
		g.t.Fatal(fmt.Errorf("set bundle: %w, %v", err, resp.GetResults()))
	}
}

// token returns a JWT-SVID for the audience "a".
func (g *ground) token() string {
	g.t.Helper()
	resp, err := svidv1.NewSVIDClient(g.as["local"]).MintJWTSVID(g.context(), &svidv1.MintJWTSVIDRequest{Id: wireID("/minted"), Audience: []string{"a"}})
	if err != nil {
		g.t.Fatal(err)
	}
	return resp.GetSvid().GetToken()
}

func publicKey(key crypto.Signer) []byte {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		panic(err)
	}
	return der
}
