package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/assay-id/assay/workloadapi/identity"
)

// federate brings the federation relationships to what the ClusterFederatedTrustDomains ask for. There are
// few of them, so all are compared at once.
//
// A relationship has no place for a note of whose it is. What this registrar made is therefore written
// down in a ConfigMap beside the lease, before it is made and until it is gone: relationships that
// operators made by hand are not touched, and one whose resource was deleted while no registrar ran still
// goes.
func (d *desk) federate(ctx context.Context) error {
	want, statuses := d.wantedFederations()
	stored, err := d.listFederations(ctx)
	if err != nil {
		return err
	}
	ours, err := d.readLedger(ctx)
	if err != nil {
		return err
	}
	var create, update []*types.FederationRelationship
	var remove []string
	for td, w := range want {
		have := stored[td]
		switch {
		case have == nil:
			create = append(create, w)
		case !ours[td]:
			statuses[td].failed = errors.New("somebody else made a relationship with this trust domain, which stays in force")
		case !sameFederation(have, w):
			update = append(update, w)
		}
	}
	for td := range ours {
		if want[td] == nil {
			remove = append(remove, td)
		}
	}
	var wrong []error
	if len(create) > 0 {
		for _, w := range create {
			ours[w.GetTrustDomain()] = true
		}
		wrong = append(wrong, d.writeLedger(ctx, ours))
	}
	if errors.Join(wrong...) == nil {
		wrong = append(wrong, d.writeFederations(ctx, create, update, statuses))
		wrong = append(wrong, d.removeFederations(ctx, remove, ours))
	}
	for _, s := range statuses {
		wrong = append(wrong, d.writeFederationStatus(ctx, s))
	}
	return errors.Join(wrong...)
}

// federationOf is a resource and what became of it.
type federationOf struct {
	resource *unstructured.Unstructured
	failed   error
}

func (f *federationOf) trustDomain() string {
	td, _, _ := unstructured.NestedString(f.resource.Object, "spec", "trustDomain") // it was read before
	return td
}

// wantedFederations returns the relationships that resources ask for, by trust domain; of several
// resources for one trust domain the oldest counts.
func (d *desk) wantedFederations() (map[string]*types.FederationRelationship, map[string]*federationOf) {
	var all []*unstructured.Unstructured
	for _, o := range d.sees.trusts.GetStore().List() {
		all = append(all, o.(*unstructured.Unstructured))
	}
	slices.SortFunc(all, func(a, b *unstructured.Unstructured) int {
		at, bt := a.GetCreationTimestamp(), b.GetCreationTimestamp()
		if c := at.Compare(bt.Time); c != 0 {
			return c
		}
		return strings.Compare(a.GetName(), b.GetName())
	})
	want, statuses := map[string]*types.FederationRelationship{}, map[string]*federationOf{}
	for _, u := range all {
		var spec federationSpec
		err := readSpec(u, &spec)
		if err == nil && !d.cfg.classed(spec.ClassName) {
			continue
		}
		var w *types.FederationRelationship
		if err == nil {
			w, err = relationship(&spec)
		}
		switch {
		case err != nil:
			statuses["invalid "+u.GetName()] = &federationOf{u, err}
		case want[w.GetTrustDomain()] != nil:
			statuses["doubled "+u.GetName()] = &federationOf{u, fmt.Errorf("an older resource is about %q too, and counts", w.GetTrustDomain())}
		default:
			want[w.GetTrustDomain()], statuses[w.GetTrustDomain()] = w, &federationOf{resource: u}
		}
	}
	return want, statuses
}

func relationship(s *federationSpec) (*types.FederationRelationship, error) {
	td, err := spiffeid.TrustDomainFromString(s.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("spec.trustDomain: %q: %w", s.TrustDomain, err)
	}
	w := &types.FederationRelationship{TrustDomain: td.Name(), BundleEndpointUrl: s.BundleEndpointURL}
	switch p := s.BundleEndpointProfile; p.Type {
	case "https_web":
		w.BundleEndpointProfile = &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
	case "https_spiffe":
		w.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: p.EndpointSPIFFEID}}
	default:
		return nil, fmt.Errorf("spec.bundleEndpointProfile.type: %q is neither https_web nor https_spiffe", p.Type)
	}
	if s.TrustDomainBundle != "" {
		b, err := spiffebundle.Parse(td, []byte(s.TrustDomainBundle))
		if err != nil {
			return nil, fmt.Errorf("spec.trustDomainBundle: %w", err)
		}
		if w.TrustDomainBundle, err = bundleWire(b); err != nil {
			return nil, fmt.Errorf("spec.trustDomainBundle: %w", err)
		}
	}
	return w, nil
}

// bundleWire returns a bundle in its public form.
func bundleWire(b *spiffebundle.Bundle) (*types.Bundle, error) {
	parsed := &identity.Bundle{TrustDomain: b.TrustDomain()}
	for _, cert := range b.X509Authorities() {
		parsed.X509 = append(parsed.X509, identity.X509Authority{Certificate: cert})
	}
	for id, key := range b.JWTAuthorities() {
		parsed.JWT = append(parsed.JWT, identity.JWTAuthority{KeyID: id, Key: key})
	}
	slices.SortFunc(parsed.JWT, func(a, b identity.JWTAuthority) int { return strings.Compare(a.KeyID, b.KeyID) })
	if n, ok := b.SequenceNumber(); ok {
		parsed.Sequence = n
	}
	if hint, ok := b.RefreshHint(); ok {
		parsed.RefreshHint = hint
	}
	return parsed.Wire()
}

// sameFederation compares what a resource says for good. Its bundle is where the exchange begins, and is
// replaced by what is fetched.
func sameFederation(a, b *types.FederationRelationship) bool {
	plain := func(f *types.FederationRelationship) *types.FederationRelationship {
		return &types.FederationRelationship{TrustDomain: f.GetTrustDomain(), BundleEndpointUrl: f.GetBundleEndpointUrl(), BundleEndpointProfile: f.GetBundleEndpointProfile()}
	}
	return proto.Equal(plain(a), plain(b))
}

func (d *desk) listFederations(ctx context.Context) (map[string]*types.FederationRelationship, error) {
	all := map[string]*types.FederationRelationship{}
	for token := ""; ; {
		resp, err := d.api.TrustDomains.ListFederationRelationships(ctx, &trustdomainv1.ListFederationRelationshipsRequest{
			PageSize: listPage, PageToken: token,
			OutputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true, BundleEndpointProfile: true},
		})
		if err != nil {
			return nil, fmt.Errorf("list federation relationships: %w", err)
		}
		for _, f := range resp.GetFederationRelationships() {
			all[f.GetTrustDomain()] = f
		}
		if token = resp.GetNextPageToken(); token == "" {
			return all, nil
		}
	}
}

func (d *desk) writeFederations(ctx context.Context, create, update []*types.FederationRelationship, statuses map[string]*federationOf) error {
	var wrong []error
	note := func(td string, st *types.Status) {
		if err := statusError(st, nil); err != nil {
			statuses[td].failed = err
			if hopeless(err) { // no better another time: the resource's status says why
				d.log.WithFields(logrus.Fields{"trust_domain": td, "err": err}).Warn("a federation cannot be what the resource makes of it; there is none until that changes")
				return
			}
			wrong = append(wrong, fmt.Errorf("federation with %q: %w", td, err))
			return
		}
		d.log.WithFields(logrus.Fields{"trust_domain": td}).Info("federation written")
	}
	if len(create) > 0 {
		resp, err := d.api.TrustDomains.BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: create})
		if err != nil {
			return err
		}
		for i, w := range create[:min(len(create), len(resp.GetResults()))] {
			note(w.GetTrustDomain(), resp.GetResults()[i].GetStatus())
		}
	}
	if len(update) > 0 {
		resp, err := d.api.TrustDomains.BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{
			FederationRelationships: update,
			InputMask:               &types.FederationRelationshipMask{BundleEndpointUrl: true, BundleEndpointProfile: true},
		})
		if err != nil {
			return err
		}
		for i, w := range update[:min(len(update), len(resp.GetResults()))] {
			note(w.GetTrustDomain(), resp.GetResults()[i].GetStatus())
		}
	}
	return errors.Join(wrong...)
}

// removeFederations deletes what no resource asks for any more, and then forgets it.
func (d *desk) removeFederations(ctx context.Context, remove []string, ours map[string]bool) error {
	if len(remove) == 0 {
		return nil
	}
	resp, err := d.api.TrustDomains.BatchDeleteFederationRelationship(ctx, &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: remove})
	if err != nil {
		return err
	}
	for i, r := range resp.GetResults() {
		// What is gone already is gone.
		if err := statusError(r.GetStatus(), nil); err == nil || isNotFound(r.GetStatus()) {
			delete(ours, remove[i])
			d.log.WithFields(logrus.Fields{"trust_domain": remove[i]}).Info("federation deleted")
		}
	}
	return d.writeLedger(ctx, ours)
}

// ledgerKey is where the ConfigMap has the trust domains that this registrar federates with, by lines.
const ledgerKey = "federations"

func (d *desk) ledgerName() string {
	return d.cfg.LeaseName + "-" + strings.ToLower(strings.ReplaceAll(d.cfg.Name, "_", "-"))
}

func (d *desk) readLedger(ctx context.Context) (map[string]bool, error) {
	ours := map[string]bool{}
	m, err := d.cluster.Core.CoreV1().ConfigMaps(d.cfg.LeaseNamespace).Get(ctx, d.ledgerName(), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return ours, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read ConfigMap %s/%s: %w", d.cfg.LeaseNamespace, d.ledgerName(), err)
	}
	for td := range strings.Lines(m.Data[ledgerKey]) {
		ours[strings.TrimSpace(td)] = true
	}
	return ours, nil
}

func (d *desk) writeLedger(ctx context.Context, ours map[string]bool) error {
	var lines strings.Builder
	for _, td := range sortedKeys(ours) {
		lines.WriteString(td + "\n")
	}
	maps := d.cluster.Core.CoreV1().ConfigMaps(d.cfg.LeaseNamespace)
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: d.ledgerName()}, Data: map[string]string{ledgerKey: lines.String()}}
	_, err := maps.Update(ctx, m, metav1.UpdateOptions{FieldManager: fieldManager})
	if apierrors.IsNotFound(err) {
		_, err = maps.Create(ctx, m, metav1.CreateOptions{FieldManager: fieldManager})
	}
	if err != nil {
		return fmt.Errorf("write ConfigMap %s/%s: %w", d.cfg.LeaseNamespace, d.ledgerName(), err)
	}
	return nil
}

type federationStatus struct {
	Conditions []metav1.Condition `json:"conditions"`
}

func (d *desk) writeFederationStatus(ctx context.Context, f *federationOf) error {
	ready := metav1.Condition{Type: "Ready", Status: metav1.ConditionTrue, Reason: "RelationshipSet", Message: "the server federates; what it has fetched: assay-server bundle list -id spiffe://" + f.trustDomain()}
	if f.failed != nil {
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, "NotSet", f.failed.Error()
	}
	var before, now federationStatus
	readStatus(f.resource, &before)
	now.Conditions = conditions(before.Conditions, ready, f.resource.GetGeneration())
	return d.patchStatus(ctx, federations, f.resource, before, now)
}
