package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// ruleItem stands for a rule where statuses are due.
const ruleItem = "rule"

// ruleStats are the counts in the status of a ClusterSPIFFEID, by their published names.
type ruleStats struct {
	NamespacesSelected     int `json:"namespacesSelected"`
	NamespacesIgnored      int `json:"namespacesIgnored"`
	PodsSelected           int `json:"podsSelected"`
	PodEntryRenderFailures int `json:"podEntryRenderFailures"`
	EntriesMasked          int `json:"entriesMasked"`
	EntriesToSet           int `json:"entriesToSet"`
	EntryFailures          int `json:"entryFailures"`
}

type ruleStatus struct {
	Stats      ruleStats          `json:"stats"`
	Conditions []metav1.Condition `json:"conditions"`
}

type staticStatus struct {
	Rendered   bool               `json:"rendered"`
	Masked     bool               `json:"masked"`
	Set        bool               `json:"set"`
	Conditions []metav1.Condition `json:"conditions"`
}

// dueStatuses marks the resources that an item's outcomes are of. d.mu is held.
func (d *desk) dueStatuses(it item, before, after map[string]*outcome) {
	if it.kind == staticItem {
		d.due[it] = true
		return
	}
	for _, outcomes := range []map[string]*outcome{before, after} {
		for name := range outcomes {
			d.due[item{ruleItem, name}] = true
		}
	}
}

// dueStatus marks the resource that one outcome is of. d.mu is held.
func (d *desk) dueStatus(it item, rule string) {
	if it.kind != staticItem {
		it = item{ruleItem, rule}
	}
	d.due[it] = true
}

// dueRules marks all rules: the namespaces are not what they were.
func (d *desk) dueRules() {
	d.mu.Lock()
	for _, r := range d.rules {
		d.due[item{ruleItem, r.name}] = true
	}
	d.mu.Unlock()
	d.wakeStatuses()
}

func (d *desk) wakeStatuses() {
	select {
	case d.told <- struct{}{}:
	default:
	}
}

// writeStatuses writes the statuses that are due until ctx ends.
func (d *desk) writeStatuses(ctx context.Context) {
	for {
		select {
		case <-d.told:
		case <-d.ruled:
			d.dueRules()
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(d.cfg.StatusEvery):
		case <-ctx.Done():
			return
		}
		d.mu.Lock()
		due := slices.Collect(maps.Keys(d.due))
		clear(d.due)
		stats := d.count(due)
		d.mu.Unlock()
		for _, it := range due {
			if err := d.writeStatus(ctx, it, stats[it.name]); err != nil && ctx.Err() == nil {
				d.log.WithFields(logrus.Fields{"resource": it.kind + " " + it.name, "err": err}).Debug("a status could not be written")
				d.mu.Lock()
				d.due[it] = true // with the next news
				d.mu.Unlock()
			}
		}
	}
}

// tally is what the outcomes of a rule come to.
type tally struct {
	stats ruleStats
	first string // the first thing that is wrong, and where
}

// count adds up the outcomes of the rules that are due. d.mu is held.
func (d *desk) count(due []item) map[string]*tally {
	all := map[string]*tally{}
	for _, it := range due {
		if it.kind == ruleItem {
			all[it.name] = &tally{}
		}
	}
	if len(all) == 0 {
		return all
	}
	for it, h := range d.holders {
		for name, o := range h.outcomes {
			if t := all[name]; t != nil && it.kind == podItem {
				t.add(it, o)
			}
		}
	}
	return all
}

func (t *tally) add(it item, o *outcome) {
	t.stats.PodsSelected++
	switch {
	case o.broken != nil:
		t.stats.PodEntryRenderFailures++
		t.wrong(it, o.broken)
	case o.masked:
		t.stats.EntriesMasked++
	default:
		t.stats.EntriesToSet++
		if o.failed != nil {
			t.stats.EntryFailures++
			t.wrong(it, o.failed)
		}
	}
}

// wrong keeps one example, the first by name so that it does not change from time to time.
func (t *tally) wrong(it item, err error) {
	text := fmt.Sprintf("%s %s: %s", it.kind, it.name, err)
	if t.first == "" || strings.Compare(text, t.first) < 0 {
		t.first = text
	}
}

func (d *desk) writeStatus(ctx context.Context, it item, t *tally) error {
	switch it.kind {
	case ruleItem:
		return d.writeRuleStatus(ctx, it.name, t)
	case staticItem:
		return d.writeStaticStatus(ctx, it)
	}
	return nil
}

func (d *desk) writeRuleStatus(ctx context.Context, name string, t *tally) error {
	u := seen[*unstructured.Unstructured](d.sees.rules, name)
	d.mu.Lock()
	at := slices.IndexFunc(d.rules, func(r *rule) bool { return r.name == name })
	var r *rule
	if at >= 0 {
		r = d.rules[at]
	}
	d.mu.Unlock()
	if u == nil || r == nil || t == nil {
		return nil
	}
	if r.broken == nil {
		for _, o := range d.sees.namespaces.GetStore().List() {
			switch ns := o.(*corev1.Namespace); {
			case !r.namespaces.Matches(labelsOf(ns)):
			case d.cfg.ignored(ns.Name):
				t.stats.NamespacesIgnored++
			default:
				t.stats.NamespacesSelected++
			}
		}
	}
	unknown := d.cfg.unknownPolicy(&r.spec)
	now := ruleStatus{Stats: t.stats}
	ready := metav1.Condition{Type: "Ready", Status: metav1.ConditionTrue, Reason: "EntriesSet", Message: fmt.Sprintf("%d entries", t.stats.EntriesToSet)}
	switch {
	case r.broken != nil:
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, "InvalidSpec", r.broken.Error()
	case unknown != "":
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, "UnknownPolicy", unknown
	case t.stats.PodEntryRenderFailures > 0:
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, "RenderFailures", fmt.Sprintf("%d pods have no entry, for example %s", t.stats.PodEntryRenderFailures, t.first)
	case t.stats.EntryFailures > 0:
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, "EntryFailures", fmt.Sprintf("%d entries could not be written, for example %s", t.stats.EntryFailures, t.first)
	}
	var before ruleStatus
	readStatus(u, &before)
	now.Conditions = conditions(before.Conditions, ready, u.GetGeneration())
	return d.patchStatus(ctx, spiffeIDs, u, before, now)
}

// unknownPolicy says which policy a rule names that the server does not have, empty if none: its pods have entries, and
// no image ever shows what those demand.
func (c *Config) unknownPolicy(spec *spiffeIDSpec) string {
	if c.Policies == nil || spec.ScanPolicy == "" && spec.TrustPolicy == "" {
		return ""
	}
	scan, trust := c.Policies()
	var all []string
	for _, one := range []struct {
		field, block, name string
		has                []string
	}{{"scanPolicy", "scan_policy", spec.ScanPolicy, scan}, {"trustPolicy", "trust_policy", spec.TrustPolicy, trust}} {
		if one.name == "" || slices.Contains(one.has, one.name) {
			continue
		}
		text := fmt.Sprintf("spec.%s: the server has no %s %q, so no pod gets this identity", one.field, one.block, one.name)
		if len(one.has) > 0 {
			text += "; it has " + strings.Join(one.has, ", ")
		}
		all = append(all, text)
	}
	return strings.Join(all, "\n")
}

func (d *desk) writeStaticStatus(ctx context.Context, it item) error {
	u := d.sees.static(it.name)
	d.mu.Lock()
	var o outcome
	h := d.holders[it]
	if h != nil && h.outcomes[""] != nil {
		o = *h.outcomes[""]
	} else {
		h = nil
	}
	d.mu.Unlock()
	if u == nil || h == nil {
		return nil
	}
	now := staticStatus{Rendered: o.broken == nil, Masked: o.masked, Set: o.broken == nil && !o.masked && o.failed == nil}
	ready := metav1.Condition{Type: "Ready", Status: metav1.ConditionTrue, Reason: "EntrySet", Message: "entry " + o.id}
	switch {
	case o.broken != nil:
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, "InvalidSpec", o.broken.Error()
	case o.masked:
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, "Masked", "somebody else made a similar entry, which stays in force"
	case o.failed != nil:
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, "EntryFailure", o.failed.Error()
	}
	var before staticStatus
	readStatus(u, &before)
	now.Conditions = conditions(before.Conditions, ready, u.GetGeneration())
	return d.patchStatus(ctx, staticEntries, u, before, now)
}

// readStatus reads what a resource's status is at the moment; what cannot be read is written anew.
func readStatus(u *unstructured.Unstructured, to any) {
	status, _, err := unstructured.NestedMap(u.Object, "status")
	if err == nil {
		_ = runtime.DefaultUnstructuredConverter.FromUnstructured(status, to) // see above
	}
}

// maxMessage is what the API server takes as a condition's message.
const maxMessage = 32 << 10

// conditions returns the conditions with one that says how it is now. The time is that of its last change.
func conditions(before []metav1.Condition, now metav1.Condition, generation int64) []metav1.Condition {
	now.Message = strings.ToValidUTF8(now.Message[:min(len(now.Message), maxMessage)], "")
	now.ObservedGeneration, now.LastTransitionTime = generation, metav1.NewTime(time.Now().UTC().Truncate(time.Second))
	all := slices.Clone(before)
	i := slices.IndexFunc(all, func(c metav1.Condition) bool { return c.Type == now.Type })
	if i < 0 {
		return append(all, now)
	}
	if all[i].Status == now.Status {
		now.LastTransitionTime = all[i].LastTransitionTime
	}
	all[i] = now
	return all
}

// patchStatus writes a status if it is another than before.
func (d *desk) patchStatus(ctx context.Context, of schema.GroupVersionResource, u *unstructured.Unstructured, before, now any) error {
	was, err := json.Marshal(before)
	if err != nil {
		return fmt.Errorf("encode status: %w", err)
	}
	is, err := json.Marshal(now)
	if err != nil {
		return fmt.Errorf("encode status: %w", err)
	}
	if string(was) == string(is) {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"status": json.RawMessage(is)})
	if err != nil {
		return fmt.Errorf("encode status: %w", err)
	}
	_, err = d.cluster.Dynamic.Resource(of).Patch(ctx, u.GetName(), types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) {
		return nil // the resource went, or its CRD has no status
	}
	return err
}
