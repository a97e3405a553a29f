package deploy

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/assay-id/assay/test/lab"
)

const rulesFile = "../../deploy/monitoring/alerts.yaml"

// series are the samples of some series, a minute apart, as promtool writes them: from+stepxtimes.
type series map[string]string

// alerts has, for each alert, series on which it must fire once at the time, and series that look like them on
// which it must not. Time begins at 0, and what was before is negative.
var alerts = map[string]struct {
	at           string
	fires, quiet series
}{
	"AssayStoreFull":      {"10m", series{`assay_store_full{instance="a"}`: "0x3 1x10"}, series{`assay_store_full{instance="a"}`: "0x5 1 0x10"}},
	"AssayStoreFillingUp": {"30m", series{`assay_store_free_bytes{instance="a"}`: "100e6x40"}, series{`assay_store_free_bytes{instance="a"}`: "1e9x40"}},
	"AssayServerOutOfDescriptors": {
		"20m", series{`assay_server_connections_refused_total{instance="a",reason="descriptors"}`: "0x15 3x10"},
		series{`assay_server_connections_refused_total{instance="a",reason="handshake"}`: "0x15 3x10", `assay_server_connections_refused_total{instance="a",reason="descriptors"}`: "3x30"},
	},
	"AssayAgentOutOfDescriptors": {
		"20m", series{`assay_peer_refused_connections_total{instance="n",reason="descriptors"}`: "0x15 3x10"},
		series{`assay_peer_refused_connections_total{instance="n",reason="dead"}`: "0x15 3x10", `assay_peer_refused_connections_total{instance="n",reason="descriptors"}`: "3x30"},
	},
	"AssaySnapshotFailed": {
		"30m", series{`assay_server_snapshots_total{instance="a",result="failed"}`: "0x10 1x30"},
		series{`assay_server_snapshots_total{instance="a",result="failed"}`: "1x40", `assay_server_snapshots_total{instance="a",result="ok"}`: "0+1x40"},
	},
	"AssayStoreDamaged": {
		"30m", series{`assay_server_snapshots_total{instance="a",result="damaged"}`: "0x10 1x30"},
		series{`assay_server_snapshots_total{instance="a",result="damaged"}`: "0x40"},
	},
	// An old snapshot of what has not changed is as good as a new one.
	"AssaySnapshotOld": {
		"165m", series{`assay_server_snapshot_timestamp_seconds{instance="a"}`: "-9000x200", `assay_server_view_revision{instance="a"}`: "1+1x200"},
		series{`assay_server_snapshot_timestamp_seconds{instance="a"}`: "-9000x200", `assay_server_view_revision{instance="a"}`: "7x200"},
	},
	"AssayAuthorityNearExpiry": {
		"2h", series{`assay_server_ca_authority_expires_seconds{instance="a",kind="x509"}`: "9000x130"},
		series{`assay_server_ca_authority_expires_seconds{instance="a",kind="x509"}`: "90000x130"},
	},
	"AssayRotationStuck": {
		"2h", series{`assay_server_ca_authority_due_seconds{instance="a",kind="jwt"}`: "3600x130"},
		series{`assay_server_ca_authority_due_seconds{instance="a",kind="jwt"}`: "7000x130"},
	},
	"AssayRotationFailing": {
		"40m", series{`assay_server_ca_rotation_failures_total{instance="a"}`: "0+6x50"},
		series{`assay_server_ca_rotation_failures_total{instance="a"}`: "0x5 1x50"},
	},
	"AssayUpstreamFailing": {
		"40m", series{`assay_server_ca_upstream_failures_total{instance="a",what="sign"}`: "0+6x50"},
		series{`assay_server_ca_upstream_failures_total{instance="a",what="sign"}`: "0x5 1x50"},
	},
	"AssaySigningErrors": {
		"30m", series{`assay_server_ca_refused_total{instance="a",profile="workload"}`: "0+6x40", `assay_server_ca_signed_total{instance="a",profile="workload"}`: "0+60x40"},
		series{`assay_server_ca_refused_total{instance="a",profile="workload"}`: "0+1x40", `assay_server_ca_signed_total{instance="a",profile="workload"}`: "0+60x40"},
	},
	"AssayAuditFailing": {
		"10m", series{`assay_server_audit_failures_total{instance="a"}`: "0x7 2x10"}, series{`assay_server_audit_failures_total{instance="a"}`: "2x20"},
	},
	"AssayServerPanicked": {"10m", series{`assay_server_panics_total{instance="a"}`: "0x7 1x10"}, series{`assay_server_panics_total{instance="a"}`: "1x20"}},
	"AssayAgentsBehind": {
		"30m", series{`assay_server_feed_lagging_streams{instance="a"}`: "30x40", `assay_server_feed_streams{instance="a"}`: "200x40"},
		series{`assay_server_feed_lagging_streams{instance="a"}`: "3x40", `assay_server_feed_streams{instance="a"}`: "200x40"},
	},
	"AssayAgentsLost": {
		"2h", series{`assay_server_feed_streams{instance="a"}`: "100x90 60x60"}, series{`assay_server_feed_streams{instance="a"}`: "100x90 90x60"},
	},
	"AssayFederationStale": {
		"3h", series{
			`assay_server_federation_fetches_total{instance="a",trust_domain="b.org",outcome="failed"}`: "0+1x200",
			`assay_server_federation_fetches_total{instance="a",trust_domain="b.org",outcome="same"}`:   "7x200",
		},
		series{
			`assay_server_federation_fetches_total{instance="a",trust_domain="b.org",outcome="failed"}`: "0+1x200",
			`assay_server_federation_fetches_total{instance="a",trust_domain="b.org",outcome="same"}`:   "0+1x200",
		},
	},
	"AssayAttestationsRefused": {
		"40m", series{`assay_server_attestations_total{instance="a",type="k8s_psat",result="refused"}`: "0+2x50"},
		series{`assay_server_attestations_total{instance="a",type="k8s_psat",result="refused"}`: "0x5 2x50"},
	},
	"AssayEvidenceRefused": {
		"30m", series{`assay_server_evidence_rejected_total{instance="a",reason="untrusted"}`: "0x20 1x20"},
		series{`assay_server_evidence_rejected_total{instance="a",reason="not-newer"}`: "0+1x40"},
	},
	"AssayVerdictsLate": {
		"30m", series{`assay_server_verdict_overdue_seconds{instance="a"}`: "0x10 0+60x30"}, series{`assay_server_verdict_overdue_seconds{instance="a"}`: "0x20 70 0x20"},
	},
	"AssayVerdictsNotWritten": {
		"30m", series{`assay_server_verdict_failures_total{instance="a"}`: "0+1x40"}, series{`assay_server_verdict_failures_total{instance="a"}`: "0x5 1x40"},
	},
	"AssayBlastGuardTripped": {
		"30m", series{`assay_server_verdict_guard_trips_total{instance="a",policy="prod"}`: "0x20 1x20"},
		series{`assay_server_verdict_guard_trips_total{instance="a",policy="prod"}`: "1x40"},
	},
	"AssayVulnerabilityFeedOld": {
		"90m", series{`assay_server_vulnerability_feed_timestamp_seconds{instance="a",feed="kev"}`: "-300000x100"},
		series{`assay_server_vulnerability_feed_timestamp_seconds{instance="a",feed="kev"}`: "-3600x100"},
	},
	"AssayWebhookFailing": {
		"40m", series{`assay_server_webhook_posts_total{instance="a",result="failed"}`: "0+1x50"},
		series{`assay_server_webhook_posts_total{instance="a",result="failed"}`: "0x5 2x50", `assay_server_webhook_dropped_total{instance="a"}`: "0x50"},
	},
	"AssayRegistrarFailing": {
		"40m", series{`assay_server_kube_entries_total{instance="a",cluster="c",result="failed"}`: "0+1x50"},
		series{`assay_server_kube_entries_total{instance="a",cluster="c",result="created"}`: "0+1x50"},
	},
	"AssayClusterUnattended": {
		"30m", series{`assay_server_kube_in_sight{instance="a",cluster="c"}`: "0x40", `assay_server_kube_in_sight{instance="b",cluster="c"}`: "1x10 0x30"},
		series{`assay_server_kube_in_sight{instance="a",cluster="c"}`: "0x40", `assay_server_kube_in_sight{instance="b",cluster="c"}`: "1x40"},
	},
	"AssayRegistrarBlind": {
		"40m", series{`assay_server_kube_watch_errors_total{instance="a",cluster="c",resource="pods"}`: "0+1x50"},
		series{`assay_server_kube_watch_errors_total{instance="a",cluster="c",resource="pods"}`: "0x5 1x50"},
	},
	"AssayAgentDisconnected": {"30m", series{`assay_agent_connected{instance="n"}`: "1x10 0x30"}, series{`assay_agent_connected{instance="n"}`: "1x20 0 1x20"}},
	"AssayAgentOwnSVIDExpiring": {
		"30m", series{`assay_agent_own_svid_expiry_seconds{instance="n"}`: "1900x40"}, series{`assay_agent_own_svid_expiry_seconds{instance="n"}`: "5400x40"},
	},
	"AssayWorkloadsWithoutSVID": {
		"30m", series{`assay_agent_svids_missing{instance="n"}`: "0x10 2x30"}, series{`assay_agent_svids_missing{instance="n"}`: "0x20 1 0x20"},
	},
	"AssayAgentSigningFails": {
		"40m", series{`assay_agent_svids_total{instance="n",kind="x509",result="failed"}`: "0+1x50", `assay_agent_svids_total{instance="n",kind="x509",result="ok"}`: "3x50"},
		series{`assay_agent_svids_total{instance="n",kind="x509",result="failed"}`: "0+1x50", `assay_agent_svids_total{instance="n",kind="x509",result="ok"}`: "0+1x50"},
	},
	"AssayAttestorFailing": {
		"40m", series{`assay_workload_attestations_total{instance="n",attestor="k8s",result="timeout"}`: "0+1x50", `assay_workload_attestations_total{instance="n",attestor="k8s",result="ok"}`: "0+2x50"},
		series{`assay_workload_attestations_total{instance="n",attestor="k8s",result="timeout"}`: "0+1x50", `assay_workload_attestations_total{instance="n",attestor="k8s",result="ok"}`: "0+20x50"},
	},
	"AssayAgentPanicked": {"10m", series{`assay_workloadapi_panics_total{instance="n"}`: "0x7 1x10"}, series{`assay_workloadapi_panics_total{instance="n"}`: "1x20"}},
}

// promtool runs Prometheus' own checker.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		lab.Missing(t, "promtool", err)
	}
	if text, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, text)
	}
}

// rule is a rule as Prometheus reads it.
type rule struct {
	Alert       string            `json:"alert"`
	Record      string            `json:"record,omitempty"`
	Expr        string            `json:"expr"`
	For         string            `json:"for,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type ruleGroup struct {
	Name  string `json:"name"`
	Rules []rule `json:"rules"`
}

type ruleGroups struct {
	Groups []ruleGroup `json:"groups"`
}

func rulesOf(t *testing.T) []rule {
	t.Helper()
	text, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	var file ruleGroups
	if err := yaml.UnmarshalStrict(text, &file); err != nil {
		t.Fatal(err)
	}
	var all []rule
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

func TestAlerts(t *testing.T) {
	t.Run("Prometheus takes the rules", func(t *testing.T) { promtool(t, "check", "rules", rulesFile) })
	t.Run("each says what it is about, how bad it is, and what to do", func(t *testing.T) {
		for _, r := range rulesOf(t) {
			if r.Annotations["summary"] == "" || len(r.Annotations["description"]) < 40 || !slices.Contains([]string{"critical", "warning"}, r.Labels["severity"]) {
				t.Errorf("%s: %v %v", r.Alert, r.Labels, r.Annotations)
			}
			if _, ok := alerts[r.Alert]; !ok {
				t.Errorf("%s is not tried", r.Alert)
			}
		}
		if len(rulesOf(t)) != len(alerts) {
			t.Errorf("%d rules, and %d are tried", len(rulesOf(t)), len(alerts))
		}
	})
	t.Run("each fires on what it is for, and on nothing that looks like it", func(t *testing.T) {
		rules, err := filepath.Abs(rulesFile)
		if err != nil {
			t.Fatal(err)
		}
		var tests []map[string]any
		for _, name := range slices.Sorted(maps.Keys(alerts)) {
			a := alerts[name]
			for fired, all := range map[int]series{1: a.fires, 0: a.quiet} {
				var input []map[string]any
				for _, s := range slices.Sorted(maps.Keys(all)) {
					input = append(input, map[string]any{"series": s, "values": all[s]})
				}
				tests = append(tests, map[string]any{
					"name": fmt.Sprintf("%s fires %d times", name, fired), "interval": "1m", "input_series": input,
					"promql_expr_test": []map[string]any{{
						"expr": fmt.Sprintf(`count(ALERTS{alertname=%q,alertstate="firing"}) or vector(0)`, name), "eval_time": a.at,
						"exp_samples": []map[string]any{{"labels": "{}", "value": fired}},
					}},
				})
			}
		}
		text, err := yaml.Marshal(map[string]any{"rule_files": []string{rules}, "evaluation_interval": "1m", "tests": tests})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "alerts_test.yaml")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		promtool(t, "test", "rules", path)
	})
}
