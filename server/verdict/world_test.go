package verdict

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/trust"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// world is a service on a real store, with a clock that stands still until it is told to move.
type world struct {
	t *testing.T
	*Service
	dir   string
	store *boltkv.Store
	rec   *records.Records
	view  *fleet
	log   *lines
	rules Rules

	mu    sync.Mutex // guards at
	at    time.Time
	cfg   Config
	parts func(Parts) Parts // nil: they stay as they are
}

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.at
}

// pass moves the clock and does what its timer would do.
func (w *world) pass(d time.Duration) {
	w.t.Helper()
	w.mu.Lock()
	w.at = w.at.Add(d)
	w.mu.Unlock()
	w.due(w.t.Context())
}

// fleet is who runs what.
type fleet struct {
	mu      sync.Mutex // guards both
	runs    map[string]int
	entries []*identity.Entry
	fresh   chan struct{}
	loading chan struct{} // closed when the entries are there; nil: they are
}

func (f *fleet) Runners(digest string) []spiffeid.ID {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []spiffeid.ID
	for n := range f.runs[digest] {
		list = append(list, spiffeid.RequireFromPathf(td, "/spire/agent/test/%d", n))
	}
	return list
}

func (f *fleet) FollowDigests() ([]string, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []string
	for digest := range f.runs {
		list = append(list, digest)
	}
	return list, f.fresh
}

func (f *fleet) Wait(context.Context, kv.Rev) error { return nil }

func (f *fleet) Ready() <-chan struct{} {
	if f.loading != nil {
		return f.loading
	}
	done := make(chan struct{})
	close(done)
	return done
}

func (f *fleet) Entry(id string) (*identity.Entry, bool) {
	for _, e := range f.entries {
		if e.ID == id {
			return e, true
		}
	}
	return nil, false
}

func (f *fleet) ListEntries(view.EntryFilter, string, int) ([]*identity.Entry, string) {
	return f.entries, ""
}

// run says that agents run an image, and takes note of it as watchAgents does.
func (w *world) run(digest string, agents int) {
	w.t.Helper()
	w.view.mu.Lock()
	w.view.runs[digest] = agents
	w.view.mu.Unlock()
	if err := w.seen(w.t.Context(), []string{digest}); err != nil {
		w.t.Fatal(err)
	}
}

// lines is an audit log in memory.
type lines struct {
	mu  sync.Mutex // guards all
	all []audit.Line
}

func (l *lines) Write(line audit.Line) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, line)
	return nil
}

func (l *lines) of(event string) (found []audit.Line) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.all {
		if line.Event == event {
			found = append(found, line)
		}
	}
	return found
}

// decode reads blocks of one type from HCL.
func decode[B, V any, P fmt.Stringer](t *testing.T, text, kind string, name func(*B, string), make func(B) (V, []P)) (list []V) {
	t.Helper()
	file, diags := hclsyntax.ParseConfig([]byte(text), "test.hcl", hcl.InitialPos)
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	for _, block := range file.Body.(*hclsyntax.Body).Blocks {
		if block.Type != kind {
			continue
		}
		var b B
		if diags := gohcl.DecodeBody(block.Body, nil, &b); diags.HasErrors() {
			t.Fatal(diags)
		}
		name(&b, block.Labels[0])
		v, problems := make(b)
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		list = append(list, v)
	}
	return list
}

func rulesOf(t *testing.T, text string) Rules {
	t.Helper()
	return Rules{
		Policies: decode(t, text, "scan_policy", func(b *policy.Block, n string) { b.Name = n }, policy.New),
		Trust:    decode(t, text, "trust_policy", func(b *trust.PolicyBlock, n string) { b.Name = n }, trust.NewPolicy),
		Sources:  decode(t, text, "evidence_source", func(b *trust.SourceBlock, n string) { b.Name = n }, trust.NewSource),
	}
}

const prod = `
scan_policy "prod" {
  sources = ["local", "scanner"]
  fail {
    severity = "critical"
  }
}
`

// newWorld opens a service with the rules.
func newWorld(t *testing.T, rules string, change ...func(*world)) *world {
	t.Helper()
	w := &world{
		t: t, dir: t.TempDir(), log: &lines{}, at: time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC),
		view: &fleet{runs: map[string]int{}, fresh: make(chan struct{})}, rules: rulesOf(t, rules),
	}
	w.cfg = Config{MarksPath: filepath.Join(w.dir, "marks")}
	for _, f := range change {
		f(w)
	}
	w.open()
	t.Cleanup(w.close)
	return w
}

func (w *world) open() {
	w.t.Helper()
	var err error
	if w.store, err = boltkv.Open(filepath.Join(w.dir, "store.db"), boltkv.Config{}); err != nil {
		w.t.Fatal(err)
	}
	if w.rec, err = records.Open(w.t.Context(), w.store, td, records.Config{Now: w.now}); err != nil {
		w.t.Fatal(err)
	}
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	cfg := w.cfg
	cfg.Log, cfg.Now = silent, w.now
	parts := Parts{Store: w.rec, View: w.view, Audit: w.log}
	if w.parts != nil {
		parts = w.parts(parts)
	}
	if w.Service, err = Open(w.t.Context(), parts, w.rules, cfg); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) close() {
	if w.store != nil {
		if err := w.Close(); err != nil {
			w.t.Error(err)
		}
		if err := w.store.Close(); err != nil {
			w.t.Error(err)
		}
		w.store = nil
	}
}

// restart closes everything and opens it again.
func (w *world) restart() {
	w.t.Helper()
	w.close()
	w.open()
}

// config returns the digest of the nth image.
func config(n int) string { return digestOf(fmt.Appendf(nil, "image %d", n)) }

// scan is a report as Trivy writes it.
type scan struct {
	image    string
	at       time.Time
	findings []string // "CVE-… SEVERITY"
	packages int
}

func (s scan) json(t testing.TB) []byte {
	t.Helper()
	var list, packages []any
	for _, f := range s.findings {
		id, severity, _ := strings.Cut(f, " ")
		list = append(list, map[string]any{
			"VulnerabilityID": id, "PkgName": "lib", "InstalledVersion": "1", "FixedVersion": "2", "Severity": severity,
			"PkgIdentifier": map[string]any{"PURL": "pkg:deb/debian/lib@1"},
		})
	}
	for n := range max(s.packages, 1) {
		packages = append(packages, map[string]any{"Name": fmt.Sprintf("lib%d", n), "Version": "1"})
	}
	text, err := json.Marshal(map[string]any{
		"SchemaVersion": 2, "CreatedAt": s.at.Format(time.RFC3339Nano), "ArtifactName": "shop", "ArtifactType": "container_image",
		"Metadata": map[string]any{"ImageID": s.image, "OS": map[string]any{"Family": "debian", "Name": "12.5"}},
		"Results":  []any{map[string]any{"Target": "shop", "Class": "os-pkgs", "Type": "debian", "Packages": packages, "Vulnerabilities": list}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

var admin = Pusher{Name: "local", Admin: true}

// push pushes a scan as an administrator.
func (w *world) push(s scan) (*Pushed, error) {
	if s.at.IsZero() {
		s.at = w.now()
	}
	return w.Push(w.t.Context(), admin, Document{Image: "reg/shop@" + s.image, Content: s.json(w.t)})
}

func (w *world) mustPush(s scan) {
	w.t.Helper()
	if _, err := w.push(s); err != nil {
		w.t.Fatal(err)
	}
}

// gate reports whether agents are told that the gate of a policy is open for an image.
func (w *world) gate(digest, name string) bool {
	w.t.Helper()
	v, err := w.rec.Verdict(w.t.Context(), digest)
	if err != nil {
		return false
	}
	return slices.Contains(v.Selectors.Strings(), "scan:policy:"+name)
}

func (w *world) wantGate(digest string, open bool) {
	w.t.Helper()
	if got := w.gate(digest, "prod"); got != open {
		_, told, err := w.Explain(digest, "", nil)
		w.t.Fatalf("gate open: %t, want %t\n%s%v", got, open, strings.Join(told, "\n"), err)
	}
}

// status returns what a policy says.
func (w *world) status(digest, name string) string {
	w.t.Helper()
	v, err := w.rec.Verdict(w.t.Context(), digest)
	if err != nil {
		return ""
	}
	for _, p := range v.Policies {
		if p.Policy == name {
			return p.Status
		}
	}
	return ""
}
