package caller

// table is who may call what: one row for every method of every service that is registered. A
// method without a row is refused to everybody, so that a forgotten one is a bug report and not a
// hole. The rows are SPIRE's (its authorization policy at v1.15.3), and ours for the feed and for
// what SPIRE has no call for.
//
// Admin and Local never imply Agent: who administers the server has no node to be given entries for.
var table = map[string]Kind{
	"/spire.api.server.agent.v1.Agent/CountAgents":     Local | Admin,
	"/spire.api.server.agent.v1.Agent/ListAgents":      Local | Admin,
	"/spire.api.server.agent.v1.Agent/GetAgent":        Local | Admin,
	"/spire.api.server.agent.v1.Agent/DeleteAgent":     Local | Admin,
	"/spire.api.server.agent.v1.Agent/BanAgent":        Local | Admin,
	"/spire.api.server.agent.v1.Agent/AttestAgent":     Anyone,
	"/spire.api.server.agent.v1.Agent/RenewAgent":      Agent,
	"/spire.api.server.agent.v1.Agent/PostStatus":      Agent,
	"/spire.api.server.agent.v1.Agent/CreateJoinToken": Local | Admin,

	"/spire.api.server.bundle.v1.Bundle/CountBundles":               Local | Admin,
	"/spire.api.server.bundle.v1.Bundle/GetBundle":                  Anyone,
	"/spire.api.server.bundle.v1.Bundle/AppendBundle":               Local | Admin,
	"/spire.api.server.bundle.v1.Bundle/PublishJWTAuthority":        Downstream,
	"/spire.api.server.bundle.v1.Bundle/PublishWITAuthority":        Downstream,
	"/spire.api.server.bundle.v1.Bundle/ListFederatedBundles":       Local | Admin,
	"/spire.api.server.bundle.v1.Bundle/GetFederatedBundle":         Local | Admin | Agent,
	"/spire.api.server.bundle.v1.Bundle/BatchCreateFederatedBundle": Local | Admin,
	"/spire.api.server.bundle.v1.Bundle/BatchUpdateFederatedBundle": Local | Admin,
	"/spire.api.server.bundle.v1.Bundle/BatchSetFederatedBundle":    Local | Admin,
	"/spire.api.server.bundle.v1.Bundle/BatchDeleteFederatedBundle": Local | Admin,

	"/spire.api.server.entry.v1.Entry/CountEntries":          Local | Admin,
	"/spire.api.server.entry.v1.Entry/ListEntries":           Local | Admin,
	"/spire.api.server.entry.v1.Entry/GetEntry":              Local | Admin,
	"/spire.api.server.entry.v1.Entry/BatchCreateEntry":      Local | Admin,
	"/spire.api.server.entry.v1.Entry/BatchUpdateEntry":      Local | Admin,
	"/spire.api.server.entry.v1.Entry/BatchDeleteEntry":      Local | Admin,
	"/spire.api.server.entry.v1.Entry/GetAuthorizedEntries":  Agent,
	"/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries": Agent,

	"/spire.api.server.svid.v1.SVID/MintX509SVID":        Local | Admin,
	"/spire.api.server.svid.v1.SVID/MintJWTSVID":         Local | Admin,
	"/spire.api.server.svid.v1.SVID/MintWITSVID":         Local | Admin,
	"/spire.api.server.svid.v1.SVID/BatchNewX509SVID":    Agent,
	"/spire.api.server.svid.v1.SVID/NewJWTSVID":          Agent,
	"/spire.api.server.svid.v1.SVID/BatchNewWITSVID":     Agent,
	"/spire.api.server.svid.v1.SVID/NewDownstreamX509CA": Downstream,

	"/spire.api.server.trustdomain.v1.TrustDomain/ListFederationRelationships":       Local | Admin,
	"/spire.api.server.trustdomain.v1.TrustDomain/GetFederationRelationship":         Local | Admin,
	"/spire.api.server.trustdomain.v1.TrustDomain/BatchCreateFederationRelationship": Local | Admin,
	"/spire.api.server.trustdomain.v1.TrustDomain/BatchUpdateFederationRelationship": Local | Admin,
	"/spire.api.server.trustdomain.v1.TrustDomain/BatchDeleteFederationRelationship": Local | Admin,
	"/spire.api.server.trustdomain.v1.TrustDomain/RefreshBundle":                     Local | Admin,

	"/spire.api.server.localauthority.v1.LocalAuthority/GetJWTAuthorityState":        Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/PrepareJWTAuthority":         Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/ActivateJWTAuthority":        Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintJWTAuthority":           Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeJWTAuthority":          Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/GetX509AuthorityState":       Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/PrepareX509Authority":        Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/ActivateX509Authority":       Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintX509Authority":          Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintX509UpstreamAuthority":  Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeX509Authority":         Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeX509UpstreamAuthority": Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/GetWITAuthorityState":        Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/PrepareWITAuthority":         Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/ActivateWITAuthority":        Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/TaintWITAuthority":           Local | Admin,
	"/spire.api.server.localauthority.v1.LocalAuthority/RevokeWITAuthority":          Local | Admin,

	"/spire.api.server.logger.v1.Logger/GetLogger":     Local,
	"/spire.api.server.logger.v1.Logger/SetLogLevel":   Local,
	"/spire.api.server.logger.v1.Logger/ResetLogLevel": Local,

	"/spire.api.server.debug.v1.Debug/GetInfo": Local,

	"/grpc.health.v1.Health/Check": Local,
	"/grpc.health.v1.Health/List":  Local,
	"/grpc.health.v1.Health/Watch": Local,

	"/assay.feed.v1.Feed/Follow": Agent,

	"/assay.downstream.v1.Downstream/FollowBundle": Downstream,

	// Who may push is for the trust policies to say, by token or SVID.
	"/assay.evidence.v1.Evidence/Push":            Local | Admin | Anyone,
	"/assay.evidence.v1.Evidence/Collect":         Local | Admin | Anyone,
	"/assay.evidence.v1.Evidence/List":            Local | Admin,
	"/assay.evidence.v1.Evidence/Show":            Local | Admin,
	"/assay.evidence.v1.Evidence/Explain":         Local | Admin,
	"/assay.evidence.v1.Evidence/Simulate":        Local | Admin,
	"/assay.evidence.v1.Evidence/PutException":    Local | Admin,
	"/assay.evidence.v1.Evidence/ListExceptions":  Local | Admin,
	"/assay.evidence.v1.Evidence/DeleteException": Local | Admin,
	"/assay.evidence.v1.Evidence/Release":         Local | Admin,
	"/assay.evidence.v1.Evidence/Accept":          Local | Admin,

	"/assay.admin.v1.Admin/Backup":         Local,
	"/assay.admin.v1.Admin/TakeSnapshot":   Local,
	"/assay.admin.v1.Admin/RotationStatus": Local | Admin,
}
