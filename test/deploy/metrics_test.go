package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"sigs.k8s.io/yaml"

	"github.com/assay-id/assay/test/lab/port"
	"github.com/assay-id/assay/test/lab/site"
)

const dashboardFile = "../../deploy/monitoring/dashboard.json"

// scraped is what the built binaries export: label values by metric and label.
type scraped map[string]map[string]map[string]bool

// TestMonitoring starts a server and an agent with all that there are metrics of, and holds the dashboard and
// the rules to what comes out at /metrics.
func TestMonitoring(t *testing.T) {
	queries := map[string]string{}
	for _, r := range rulesOf(t) {
		queries["rule "+r.Alert] = r.Expr
	}
	panels := dashboard(t)
	maps.Copy(queries, panels)
	t.Run("Prometheus takes the queries of the dashboard", func(t *testing.T) {
		file := ruleGroups{Groups: []ruleGroup{{Name: "panels"}}}
		for n, name := range slices.Sorted(maps.Keys(panels)) {
			file.Groups[0].Rules = append(file.Groups[0].Rules, rule{Record: fmt.Sprintf("panel%d", n), Expr: panels[name]})
		}
		text, err := yaml.Marshal(file)
		if err != nil {
			t.Fatal(err)
		}
		text = []byte(strings.ReplaceAll(string(text), `alert: ""`, ``))
		path := filepath.Join(t.TempDir(), "panels.yaml")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		promtool(t, "check", "rules", path)
	})
	all := scrape(t)
	t.Run("every metric, label and value in them is exported", func(t *testing.T) {
		for _, where := range slices.Sorted(maps.Keys(queries)) {
			for _, wrong := range all.unknown(queries[where]) {
				t.Errorf("%s: %s", where, wrong)
			}
		}
	})
	t.Run("what is not exported is found out", func(t *testing.T) {
		for query, want := range map[string]int{
			`assay_nonsense > 0`: 1, `sum by (nonsense) (assay_store_full)`: 1, `assay_server_snapshots_total{result="nonsense"}`: 1,
			`assay_server_snapshots_total{nonsense="ok"}`: 1, `sum by (instance) (assay_server_snapshots_total{result=~"ok|failed"})`: 0,
		} {
			if got := all.unknown(query); len(got) != want {
				t.Errorf("%s: %q", query, got)
			}
		}
	})
	t.Run("METRICS.md has a row for every metric, with its labels, and for no other", func(t *testing.T) {
		rows, text := table(t)
		made := inSource(t)
		for _, name := range slices.Sorted(maps.Keys(rows)) {
			if !made[name] {
				t.Errorf("nothing exports %s", name)
			}
			labels, exported := all[name]
			if !exported {
				continue // none of its kind has happened
			}
			for l := range labels {
				if !slices.Contains(rows[name], l) {
					t.Errorf("%s has a label %s that its row leaves out", name, l)
				}
			}
			for _, l := range rows[name] {
				if len(labels) > 0 && labels[l] == nil {
					t.Errorf("%s has no label %s", name, l)
				}
			}
		}
		for _, name := range slices.Sorted(maps.Keys(made)) {
			if _, ok := rows[name]; !ok {
				t.Errorf("%s has no row", name)
			}
		}
		for name := range all {
			base := regexp.MustCompile("_(bucket|sum|count)$").ReplaceAllString(name, "")
			if strings.HasPrefix(name, "assay_") && rows[name] == nil && rows[base] == nil {
				t.Errorf("%s is exported and has no row", name)
			}
		}
		commands(t, "METRICS.md", text)
	})
	t.Run("annotations speak of labels that the rule leaves, and of commands that there are", func(t *testing.T) {
		upgrade, err := os.ReadFile("../../deploy/UPGRADE.md")
		if err != nil {
			t.Fatal(err)
		}
		commands(t, "UPGRADE.md", string(upgrade))
		for _, r := range rulesOf(t) {
			text := r.Annotations["summary"] + " " + r.Annotations["description"]
			for _, m := range regexp.MustCompile(`\$labels\.(\w+)`).FindAllStringSubmatch(text, -1) {
				if m[1] != "instance" && !all.leaves(r.Expr, m[1]) {
					t.Errorf("%s speaks of the label %s, which it does not have", r.Alert, m[1])
				}
			}
			commands(t, r.Alert, text)
		}
	})
}

// commands refuses a text that names a command which the built binaries do not have.
func commands(t *testing.T, where, text string) {
	t.Helper()
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("[\"`](assay-(?:server|agent)(?: [a-z0-9]+| \\{\\{ \\$labels\\.kind \\}\\})+)").FindAllStringSubmatch(text, -1) {
		words := strings.Fields(strings.ReplaceAll(m[1], "{{ $labels.kind }}", "jwt"))
		out, err := site.Run(t.Context(), nil, filepath.Join(bin, words[0]), append(words[1:], "--help")...)
		if err != nil || !strings.Contains(out, strings.Join(words, " ")) {
			t.Errorf("%s: there is no %s (%v)", where, strings.Join(words, " "), err)
		}
	}
}

// table returns the metrics of METRICS.md with their labels, and its text.
func table(t *testing.T) (rows map[string][]string, text string) {
	t.Helper()
	file, err := os.ReadFile("../../deploy/monitoring/METRICS.md")
	if err != nil {
		t.Fatal(err)
	}
	rows = map[string][]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)(?:\\{([^}]*)\\})?` \\| ([^|]+) \\|$").FindAllStringSubmatch(string(file), -1) {
		if rows[m[1]] != nil {
			t.Errorf("%s has two rows", m[1])
		}
		rows[m[1]] = []string{}
		if m[2] != "" {
			rows[m[1]] = strings.Split(m[2], ", ")
		}
	}
	return rows, string(file)
}

// inSource returns the metrics that the code makes.
func inSource(t *testing.T) map[string]bool {
	t.Helper()
	// These two are put together from the program's name.
	made := map[string]bool{"assay_server_build_info": true, "assay_agent_build_info": true}
	named := regexp.MustCompile(`(?:Name:\s*|counter\(|gauge\(|[^/\s"]\()"(assay_[a-z0-9_]+_[a-z0-9_]+)"`)
	for _, dir := range []string{"server", "agent", "workloadapi", "attestor", "cmd"} {
		err := filepath.WalkDir(filepath.Join("../..", dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for _, m := range named.FindAllStringSubmatch(string(text), -1) {
				made[m[1]] = true
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(made) < 80 {
		t.Errorf("only %d metrics are found in the code", len(made))
	}
	return made
}

// dashboard returns the queries of the dashboard by panel, as Prometheus gets them.
func dashboard(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels []struct {
			ID      int    `json:"id"`
			Type    string `json:"type"`
			Title   string `json:"title"`
			Targets []struct {
				Expr   string `json:"expr"`
				Legend string `json:"legendFormat"`
			} `json:"targets"`
		} `json:"panels"`
		Templating struct {
			List []struct {
				Name  string          `json:"name"`
				Type  string          `json:"type"`
				Query json.RawMessage `json:"query"`
			} `json:"list"`
		} `json:"templating"`
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	queries := map[string]string{}
	ids := map[int]bool{}
	var variables []string
	for _, v := range d.Templating.List {
		variables = append(variables, "$"+v.Name)
		if m := regexp.MustCompile(`label_values\((\w+), instance\)`).FindStringSubmatch(string(v.Query)); v.Type == "query" {
			queries["variable "+v.Name] = m[1]
		}
	}
	for _, p := range d.Panels {
		if ids[p.ID] || p.Title == "" || p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %d, %q, is there twice, or has no title or no query", p.ID, p.Title)
		}
		ids[p.ID] = true
		for n, q := range p.Targets {
			expr := strings.ReplaceAll(q.Expr, "$__rate_interval", "5m")
			for _, v := range variables {
				expr = strings.ReplaceAll(expr, `"`+v+`"`, `".*"`)
			}
			if strings.Contains(expr, "$") {
				t.Errorf("panel %q has a variable that there is not: %s", p.Title, expr)
			}
			queries[fmt.Sprintf("panel %s %d", p.Title, n)] = expr
		}
	}
	return queries
}

var (
	selectors = regexp.MustCompile(`\b((?:assay|process)_[a-z0-9_]+)(?:\{([^}]*)\})?`)
	matchers  = regexp.MustCompile(`(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"`)
	grouping  = regexp.MustCompile(`\bby \(([^)]*)\)`)
)

// free are the labels that Prometheus and histograms bring.
var free = []string{"instance", "le"}

// unknown returns what a query speaks of that is not exported.
func (s scraped) unknown(query string) []string {
	var wrong, metrics []string
	for _, m := range selectors.FindAllStringSubmatch(query, -1) {
		labels, ok := s[m[1]]
		if !ok {
			wrong = append(wrong, "there is no metric "+m[1])
			continue
		}
		metrics = append(metrics, m[1])
		for _, l := range matchers.FindAllStringSubmatch(m[2], -1) {
			if slices.Contains(free, l[1]) {
				continue
			}
			values, ok := labels[l[1]]
			if !ok {
				wrong = append(wrong, fmt.Sprintf("%s has no label %s", m[1], l[1]))
				continue
			}
			for v := range strings.SplitSeq(l[3], "|") {
				if strings.HasPrefix(l[2], "=") && !values[v] {
					wrong = append(wrong, fmt.Sprintf("%s has no %s %q", m[1], l[1], v))
				}
			}
		}
	}
	for _, g := range grouping.FindAllStringSubmatch(query, -1) {
		for l := range strings.SplitSeq(g[1], ",") {
			l = strings.TrimSpace(l)
			if !slices.Contains(free, l) && !slices.ContainsFunc(metrics, func(m string) bool { return s[m][l] != nil }) {
				wrong = append(wrong, "no metric has the label "+l)
			}
		}
	}
	return wrong
}

// leaves reports whether what a query answers has the label.
func (s scraped) leaves(query, label string) bool {
	if groups := grouping.FindAllStringSubmatch(query, -1); len(groups) > 0 {
		return slices.Contains(strings.Split(strings.ReplaceAll(groups[0][1], " ", ""), ","), label)
	}
	m := selectors.FindStringSubmatch(query)
	return m != nil && s[m[1]][label] != nil
}

// add takes in what is at an address.
func (s scraped) add(ctx context.Context, address string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return s.read(resp.Body)
}

func (s scraped) read(from io.Reader) error {
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(from)
	for name, f := range families {
		for _, suffix := range map[dto.MetricType][]string{dto.MetricType_HISTOGRAM: {"_bucket", "_sum", "_count"}}[f.GetType()] {
			s.note(name+suffix, f)
		}
		s.note(name, f)
	}
	return err
}

func (s scraped) note(name string, f *dto.MetricFamily) {
	if s[name] == nil {
		s[name] = map[string]map[string]bool{}
	}
	for _, m := range f.GetMetric() {
		for _, l := range m.GetLabel() {
			if s[name][l.GetName()] == nil {
				s[name][l.GetName()] = map[string]bool{}
			}
			s[name][l.GetName()][l.GetValue()] = true
		}
	}
}

// has waits until a metric has a value of a label.
func (s scraped) has(t *testing.T, address, metric, label, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := s.add(ctx, address)
		if labels := s[metric]; err == nil && (labels[label][value] || value == "" && len(labels[label]) > 0) {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s never has a %s %q (%v): %v", metric, label, value, err, s[metric])
		}
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	n, err := port.Free()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// scrape has everything happen once that the dashboard and the rules are about, and collects what the binaries
// say of it.
func scrape(t *testing.T) scraped {
	t.Helper()
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s, err := site.New(dir, bin)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%v\n%s", err, site.Tail(s.ServerLog(), 20))
		}
	}
	serverPort, agentPort := freePort(t), freePort(t)
	server, agentAt := fmt.Sprintf("127.0.0.1:%d", serverPort), fmt.Sprintf("127.0.0.1:%d", agentPort)
	// A cluster that shows the server nothing.
	forbidden := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403}`)
	}))
	t.Cleanup(forbidden.Close)
	prometheus := "telemetry {\n  prometheus {\n    host = \"127.0.0.1\"\n    port = %d\n  }\n}\n"
	s.ServerExtra = `federation {
    federates_with "partner.example.com" {
      bundle_endpoint_url = "https://127.0.0.1:1/"
      bundle_endpoint_profile "https_web" {}
    }
  }`
	s.ServerBlocks = fmt.Sprintf(`node_attestor "join_token" {}
kubernetes "lab" {
  kubeconfig = %q
  leader_election {
    disabled = true
  }
}
scan_policy "prod" {
  sources = ["local"]
}
evidence {
  kev_file = %q
}
`+prometheus, file("kubeconfig", strings.ReplaceAll(kubeconfig, "https://127.0.0.1:1", forbidden.URL)), file("kev.json", `{"dateReleased":"2026-05-01T11:00:00Z","vulnerabilities":[{"cveID":"CVE-2021-44228"}]}`), serverPort)
	must(s.StartServer(t.Context()))
	t.Cleanup(func() { _ = s.Stop() })
	cli := func(args ...string) {
		t.Helper()
		_, err := s.ServerCLI(t.Context(), args...)
		must(err)
	}
	token, err := s.Token(t.Context(), "-spiffeID", "spiffe://example.org/node")
	must(err)
	agent, err := s.NewAgent(t.Context(), "agent", site.AgentOptions{
		Token: token, Blocks: "node_attestor \"join_token\" {}\nworkload_attestor \"unix\" {}\n" + fmt.Sprintf(prometheus, agentPort),
	})
	must(err)
	must(agent.Start(t.Context()))
	t.Cleanup(func() { _ = agent.Stop(15 * time.Second) })
	cli("entry", "create", "-parentID", "spiffe://example.org/node", "-spiffeID", "spiffe://example.org/shop", "-selector", fmt.Sprintf("unix:uid:%d", os.Getuid()))
	for _, fetch := range [][]string{{"x509"}, {"jwt", "-audience", "a"}} {
		_, err := agent.CLI(t.Context(), append(append([]string{"api", "fetch"}, fetch...), "-socketPath", agent.Socket)...)
		must(err)
	}
	digest := "sha256:" + strings.Repeat("ab", 32)
	cli("evidence", "push", "-image", digest, "-scan", file("trivy.json", fmt.Sprintf(`{"SchemaVersion":2,"CreatedAt":%q,"ArtifactName":"shop","ArtifactType":"container_image",
"Metadata":{"ImageID":%q,"OS":{"Family":"debian","Name":"12.9"}},"Results":[{"Target":"shop","Class":"os-pkgs","Type":"debian","Packages":[{"Name":"lib"}]}]}`,
		time.Now().Add(-time.Minute).Format(time.RFC3339Nano), digest)))
	// A node that is not let in.
	stranger, err := s.NewAgent(t.Context(), "stranger", site.AgentOptions{Token: "00000000-0000-0000-0000-000000000000"})
	must(err)
	must(stranger.Launch())
	t.Cleanup(func() { _ = stranger.Stop(15 * time.Second) })

	all := scraped{}
	all.has(t, server, "assay_server_attestations_total", "result", "refused")
	all.has(t, server, "assay_server_federation_fetches_total", "outcome", "failed")
	all.has(t, server, "assay_server_kube_watch_errors_total", "resource", "")
	all.has(t, server, "assay_server_verdict_changes_total", "policy", "prod")
	all.has(t, server, "assay_server_vulnerability_feed_timestamp_seconds", "feed", "kev")
	all.has(t, agentAt, "assay_agent_sign_seconds", "kind", "jwt")
	all.has(t, agentAt, "assay_workload_attestation_seconds", "attestor", "unix")
	must(agent.Stop(15 * time.Second))
	all.has(t, server, "assay_server_feed_streams_ended_total", "code", "")
	must(agent.Start(t.Context()))
	must(s.Stop())
	all.has(t, agentAt, "assay_agent_uplink_breaks_total", "cause", "")
	return all
}
