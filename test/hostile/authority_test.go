package hostile

import (
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
)

// This file makes authorities in the states that good calls of localauthority.v1 want. None of them has
// signed anything that somebody here relies on.

func (g *ground) authorities() localauthorityv1.LocalAuthorityClient {
	return localauthorityv1.NewLocalAuthorityClient(g.as["local"])
}

// prepared returns the ID of a prepared authority.
func (g *ground) prepared(kind string) string {
	g.t.Helper()
	var state *localauthorityv1.AuthorityState
	var err error
	switch kind {
	case "wit":
		var r *localauthorityv1.PrepareWITAuthorityResponse
		r, err = g.authorities().PrepareWITAuthority(g.context(), &localauthorityv1.PrepareWITAuthorityRequest{})
		state = r.GetPreparedAuthority()
	case "x509":
		var r *localauthorityv1.PrepareX509AuthorityResponse
		r, err = g.authorities().PrepareX509Authority(g.context(), &localauthorityv1.PrepareX509AuthorityRequest{})
		state = r.GetPreparedAuthority()
	default:
		var r *localauthorityv1.PrepareJWTAuthorityResponse
		r, err = g.authorities().PrepareJWTAuthority(g.context(), &localauthorityv1.PrepareJWTAuthorityRequest{})
		state = r.GetPreparedAuthority()
	}
	if err != nil {
		g.t.Fatal(err)
	}
	return state.GetAuthorityId()
}

// old returns the ID of an authority that is not active any more, and never was for long.
func (g *ground) old(kind string) string {
	g.t.Helper()
	var first string
	for n := range 2 {
		id := g.prepared(kind)
		var err error
		switch kind {
		case "wit":
			_, err = g.authorities().ActivateWITAuthority(g.context(), &localauthorityv1.ActivateWITAuthorityRequest{AuthorityId: id})
		case "x509":
			_, err = g.authorities().ActivateX509Authority(g.context(), &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: id})
		default:
			_, err = g.authorities().ActivateJWTAuthority(g.context(), &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: id})
		}
		if err != nil {
			g.t.Fatal(err)
		}
		if n == 0 {
			first = id
		}
	}
	return first
}

// tainted returns the ID of such an authority that is tainted.
func (g *ground) tainted(kind string) string {
	g.t.Helper()
	id := g.old(kind)
	var err error
	switch kind {
	case "wit":
		_, err = g.authorities().TaintWITAuthority(g.context(), &localauthorityv1.TaintWITAuthorityRequest{AuthorityId: id})
	case "x509":
		_, err = g.authorities().TaintX509Authority(g.context(), &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id})
	default:
		_, err = g.authorities().TaintJWTAuthority(g.context(), &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: id})
	}
	if err != nil {
		g.t.Fatal(err)
	}
	return id
}
