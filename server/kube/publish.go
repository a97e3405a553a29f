package kube

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apply "k8s.io/client-go/applyconfigurations/core/v1"

	"github.com/assay-id/assay/workloadapi/identity"
)

// Target is a place in the cluster that the trust domain's bundle is written to: a ConfigMap in every
// namespace that the selector selects, or a ClusterTrustBundle.
type Target struct {
	// ConfigMap is its name, Key where in it the bundle is (bundle.pem if empty).
	ConfigMap, Key string
	// Namespaces are those that get one; nil: all.
	Namespaces labels.Selector
	// Format is "pem" (the X.509 authorities) or "spiffe" (the SPIFFE bundle, JWT authorities included);
	// empty: pem.
	Format string
	// ClusterTrustBundle is the name of one; then the rest is empty, and it is PEM. A name with a signer
	// begins with it: "example.org/assay" gives "example.org:assay:NAME" to certificates.k8s.io.
	ClusterTrustBundle, Signer string
}

// publishAgain is how soon what could not be written is tried again.
const publishAgain = 5 * time.Second

// fieldManager is whose the fields are that are written here.
const fieldManager = "assay-server"

// trustBundleVersions are those of certificates.k8s.io that may have ClusterTrustBundles, the best first.
var trustBundleVersions = []string{"v1", "v1beta1", "v1alpha1"}

// publish writes the bundle to its targets whenever it or the namespaces change, until ctx ends.
func (d *desk) publish(ctx context.Context) {
	if len(d.cfg.Publish) == 0 {
		return
	}
	committed := make(chan struct{}, 1)
	var follower sync.WaitGroup
	follower.Go(func() { d.follow(ctx, committed) })
	defer follower.Wait()          // else it could take a change away from that of the next term
	written := map[string]string{} // what is where, as far as is known
	tick := time.NewTicker(d.cfg.Resync)
	defer tick.Stop()
	for {
		var again <-chan time.Time
		if err := d.publishOnce(ctx, written); err != nil && ctx.Err() == nil {
			d.log.WithError(err).Warn("the bundle could not be published everywhere; trying again")
			again = time.After(publishAgain)
		}
		select {
		case <-committed:
		case <-d.sees.spaces:
		case <-again:
		case <-tick.C:
			clear(written) // somebody may have changed it by hand
		case <-ctx.Done():
			return
		}
	}
}

// follow puts a token into a channel for each change of the server's records.
func (d *desk) follow(ctx context.Context, token chan<- struct{}) {
	for d.api.Changed(ctx) == nil {
		select {
		case token <- struct{}{}:
		default:
		}
	}
}

func (d *desk) publishOnce(ctx context.Context, written map[string]string) error {
	w, err := d.api.Bundles.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return fmt.Errorf("get bundle: %w", err)
	}
	b, err := identity.BundleFromWire(w)
	if err != nil {
		return fmt.Errorf("read bundle: %w", err)
	}
	var wrong []error
	for _, t := range d.cfg.Publish {
		text, err := t.format(b)
		if err != nil {
			wrong = append(wrong, err)
			continue
		}
		if t.ClusterTrustBundle != "" {
			key := "ClusterTrustBundle " + t.ClusterTrustBundle
			if written[key] == text {
				continue
			}
			if err := d.putTrustBundle(ctx, t, text); err != nil {
				wrong = append(wrong, err)
				continue
			}
			written[key] = text
			continue
		}
		wrong = append(wrong, d.putConfigMaps(ctx, t, text, written))
	}
	return errors.Join(wrong...)
}

// format returns the bundle as a target has it. Tainted authorities are in it: what they signed is still
// in force until they are revoked.
func (t *Target) format(b *identity.Bundle) (string, error) {
	if t.Format == "spiffe" {
		text, err := b.SPIFFEBundle().Marshal()
		return string(text), err
	}
	var text strings.Builder
	for _, a := range b.X509Bundle().X509Authorities() {
		if err := pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: a.Raw}); err != nil {
			return "", err
		}
	}
	return text.String(), nil
}

func (d *desk) putConfigMaps(ctx context.Context, t Target, text string, written map[string]string) error {
	var wrong []error
	before := maps.Clone(written)
	// What is no longer written to is forgotten: a namespace that is made anew is another one, without the bundle.
	maps.DeleteFunc(written, func(key, _ string) bool { return strings.HasPrefix(key, t.prefix()) })
	for _, o := range d.sees.namespaces.GetStore().List() {
		ns := o.(*corev1.Namespace)
		if t.Namespaces != nil && !t.Namespaces.Matches(labelsOf(ns)) || ns.DeletionTimestamp != nil {
			continue
		}
		key := t.prefix() + string(ns.UID)
		if before[key] == text {
			written[key] = text
			continue
		}
		at := t.Key
		if at == "" {
			at = "bundle.pem"
		}
		m := apply.ConfigMap(t.ConfigMap, ns.Name).WithData(map[string]string{at: text}).
			WithLabels(map[string]string{"app.kubernetes.io/managed-by": fieldManager})
		_, err := d.cluster.Core.CoreV1().ConfigMaps(ns.Name).Apply(ctx, m, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
		if err != nil {
			wrong = append(wrong, fmt.Errorf("write ConfigMap %s/%s: %w", ns.Name, t.ConfigMap, err))
			continue
		}
		written[key] = text
	}
	return errors.Join(wrong...)
}

// prefix begins the keys under which it is noted what was written for a target.
func (t *Target) prefix() string { return "ConfigMap " + t.ConfigMap + "/" }

func (d *desk) putTrustBundle(ctx context.Context, t Target, text string) error {
	spec := map[string]any{"trustBundle": text}
	name := t.ClusterTrustBundle
	if t.Signer != "" {
		// The API server asks for this form of a name with a signer.
		spec["signerName"], name = t.Signer, strings.ReplaceAll(t.Signer, "/", ":")+":"+name
	}
	for _, version := range trustBundleVersions {
		of := schema.GroupVersionResource{Group: "certificates.k8s.io", Version: version, Resource: "clustertrustbundles"}
		_, err := d.cluster.Dynamic.Resource(of).Apply(ctx, name, &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "certificates.k8s.io/" + version, "kind": "ClusterTrustBundle",
			"metadata": map[string]any{"name": name}, "spec": spec,
		}}, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("write ClusterTrustBundle %s: %w", name, err)
		}
		return nil
	}
	return fmt.Errorf("write ClusterTrustBundle %s: the cluster's API server does not serve certificates.k8s.io ClusterTrustBundles", name)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
