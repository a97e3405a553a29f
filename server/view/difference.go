package view

import (
	"bytes"
	"crypto"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

// difference returns the change that turns what the graph holds into the snapshot. What is the same
// in both is not part of it, so agents that nothing changed for are not woken.
func (g *graph) difference(snap *records.Snapshot) records.Change {
	change := records.Change{Rev: snap.Rev}

	// In order of ID, so that the graph's lists are filled at their ends.
	entries := slices.SortedFunc(slices.Values(snap.Entries), byID)
	for _, e := range entries {
		if old := g.entry(e.ID); old == nil || !sameEntry(old, e) {
			change.Entries = append(change.Entries, records.EntryChange{ID: e.ID, Entry: e})
		}
	}
	for old := range g.entries.all() {
		if _, found := slices.BinarySearchFunc(entries, old, byID); !found {
			change.Entries = append(change.Entries, records.EntryChange{ID: old.ID})
		}
	}

	nodes := make(map[spiffeid.ID]struct{}, len(snap.Nodes))
	for _, n := range snap.Nodes {
		nodes[n.ID] = struct{}{}
		if old := g.agent(n.ID); old == nil || !sameNode(old.node, n) {
			change.Nodes = append(change.Nodes, records.NodeChange{ID: n.ID, Node: n})
		}
	}
	for old := range g.nodes.all() {
		if _, found := nodes[old.id]; !found {
			change.Nodes = append(change.Nodes, records.NodeChange{ID: old.id})
		}
	}

	bundles := make(map[spiffeid.TrustDomain]struct{}, len(snap.Bundles))
	for _, b := range snap.Bundles {
		bundles[b.TrustDomain] = struct{}{}
		if old := g.bundles[b.TrustDomain]; old == nil || !sameBundle(old, b) {
			change.Bundles = append(change.Bundles, records.BundleChange{TrustDomain: b.TrustDomain, Bundle: b})
		}
	}
	for td := range g.bundles {
		if _, found := bundles[td]; !found {
			change.Bundles = append(change.Bundles, records.BundleChange{TrustDomain: td})
		}
	}

	verdicts := make(map[string]struct{}, len(snap.Verdicts))
	for _, v := range snap.Verdicts {
		verdicts[v.Digest] = struct{}{}
		if old := g.images.verdicts[v.Digest]; old == nil || !sameVerdict(old, v) {
			change.Verdicts = append(change.Verdicts, records.VerdictChange{Digest: v.Digest, Verdict: v})
		}
	}
	for digest := range g.images.verdicts {
		if _, found := verdicts[digest]; !found {
			change.Verdicts = append(change.Verdicts, records.VerdictChange{Digest: digest})
		}
	}
	return change
}

// sameEntry compares every field. Revision numbers would do within one store, but not between a
// store and the one restored in its place.
func sameEntry(a, b *identity.Entry) bool {
	return a.ID == b.ID && a.SPIFFEID == b.SPIFFEID && a.ParentID == b.ParentID &&
		a.Selectors.Equal(b.Selectors) &&
		a.X509SVIDTTL == b.X509SVIDTTL && a.JWTSVIDTTL == b.JWTSVIDTTL &&
		slices.Equal(a.FederatesWith, b.FederatesWith) && slices.Equal(a.DNSNames, b.DNSNames) &&
		a.Hint == b.Hint && a.Admin == b.Admin && a.Downstream == b.Downstream &&
		a.StoreSVID == b.StoreSVID && a.NoPrefetch == b.NoPrefetch && a.JTI == b.JTI &&
		a.ExpiresAt.Equal(b.ExpiresAt) && a.CreatedAt.Equal(b.CreatedAt) && a.Revision == b.Revision
}

func sameNode(a, b *records.Node) bool {
	return a.ID == b.ID && a.Type == b.Type && a.Serial == b.Serial && a.NewSerial == b.NewSerial &&
		a.Key == b.Key && a.NewKey == b.NewKey &&
		a.ExpiresAt.Equal(b.ExpiresAt) && a.NewExpiresAt.Equal(b.NewExpiresAt) &&
		a.Selectors.Equal(b.Selectors) && a.Banned == b.Banned && a.CanReattest == b.CanReattest &&
		a.AgentVersion == b.AgentVersion && a.AttestedAt.Equal(b.AttestedAt)
}

func sameBundle(a, b *identity.Bundle) bool {
	return a.TrustDomain == b.TrustDomain && a.RefreshHint == b.RefreshHint && a.Sequence == b.Sequence &&
		slices.EqualFunc(a.X509, b.X509, func(a, b identity.X509Authority) bool {
			return a.Tainted == b.Tainted && bytes.Equal(a.Certificate.Raw, b.Certificate.Raw)
		}) &&
		slices.EqualFunc(a.JWT, b.JWT, sameKey) && slices.EqualFunc(a.WIT, b.WIT, sameKey)
}

func sameKey(a, b identity.JWTAuthority) bool {
	key, ok := a.Key.(interface{ Equal(crypto.PublicKey) bool })
	return a.KeyID == b.KeyID && a.Tainted == b.Tainted && a.ExpiresAt.Equal(b.ExpiresAt) && ok && key.Equal(b.Key)
}

func sameVerdict(a, b *records.Verdict) bool {
	return a.Digest == b.Digest && a.Seq == b.Seq && a.Selectors.Equal(b.Selectors) &&
		a.TTL == b.TTL && a.JWTTTL == b.JWTTTL && a.NotAfter.Equal(b.NotAfter) && a.Revoke == b.Revoke &&
		a.UpdatedAt.Equal(b.UpdatedAt) &&
		slices.EqualFunc(a.Policies, b.Policies, func(a, b records.PolicyVerdict) bool {
			return a.Policy == b.Policy && a.Status == b.Status && a.Mode == b.Mode && a.Until.Equal(b.Until) && a.Summary == b.Summary
		})
}
