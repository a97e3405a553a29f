package policy

import (
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/assay-id/assay/server/verdict/report"
)

var commented = regexp.MustCompile(`(?m)^(\s*)#([a-z}])`)

func sample(t *testing.T, all bool) string {
	t.Helper()
	text, err := os.ReadFile("sample.hcl")
	if err != nil {
		t.Fatal(err)
	}
	if all {
		// A comment for people has a space after its sign; a key that is commented out has none.
		return commented.ReplaceAllString(string(text), "$1$2")
	}
	return string(text)
}

func TestSample(t *testing.T) {
	t.Run("it loads, and what is commented out is the default", func(t *testing.T) {
		p := compile(t, sample(t, false))
		want := defaults()
		want.Name, want.Sources = "prod", []string{"ci-trivy", "registry"}
		want.Fail = []FailRule{{Severity: report.Critical}, {Severity: report.High, OnlyFixed: true}}
		want.OnMissing = Otherwise{GraceFirst, 15 * time.Minute}
		want.OnStale = Otherwise{GraceFirst, 12 * time.Hour}
		want.Grace[report.High] = 72 * time.Hour
		if diff := cmp.Diff(want, p, cmpopts.IgnoreUnexported(ScanPolicy{})); diff != "" {
			t.Error(diff)
		}
		t.Run("with every key put into force only the examples are added", func(t *testing.T) {
			want.Fail = append(want.Fail, FailRule{KEV: true}, FailRule{EPSS: 0.5})
			want.VEX = VEXRule{Trust: []string{"security-team"}, Accept: []string{"not_affected", "fixed"}, RequireJustification: true, MaxAge: 90 * day}
			want.Blast = BlastGuard{MaxFraction: 0.2, Window: 5 * time.Minute, MinWorkloads: 10}
			if diff := cmp.Diff(want, compile(t, sample(t, true)), cmpopts.IgnoreUnexported(ScanPolicy{})); diff != "" {
				t.Error(diff)
			}
		})
	})
	t.Run("the blocks' defaults are what it says", func(t *testing.T) {
		p := compile(t, `scan_policy "p" {
			sources = ["ci"]
			vex { trust = ["security-team"] }
			blast_guard {}
		}`)
		full := compile(t, sample(t, true))
		if diff := cmp.Diff(full.VEX, p.VEX); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(full.Blast, p.Blast); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("every key is in it, and nothing else", func(t *testing.T) {
		file, diags := hclsyntax.ParseConfig([]byte(sample(t, true)), "sample.hcl", hcl.InitialPos)
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		got := map[string]bool{}
		var walk func(prefix string, body *hclsyntax.Body)
		walk = func(prefix string, body *hclsyntax.Body) {
			for name := range body.Attributes {
				got[prefix+name] = true
			}
			for _, b := range body.Blocks {
				walk(prefix+b.Type+".", b.Body)
			}
		}
		walk("", file.Body.(*hclsyntax.Body))
		want := map[string]bool{}
		var keys func(prefix string, of reflect.Type)
		keys = func(prefix string, of reflect.Type) {
			for field := range of.Fields() {
				name, kind, _ := strings.Cut(field.Tag.Get("hcl"), ",")
				switch kind {
				case "block":
					keys(prefix+name+".", field.Type.Elem())
				case "optional":
					want[prefix+name] = true
				}
			}
		}
		keys("scan_policy.", reflect.TypeFor[Block]())
		if diff := cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got))); diff != "" {
			t.Errorf("keys of the struct (-) and of the sample (+):\n%s", diff)
		}
	})
}

func TestProblems(t *testing.T) {
	t.Run("all mistakes are said at once, each with its field", func(t *testing.T) {
		p, problems := New(parseBlocks(t, `scan_policy "a:b" {
			mode              = "maybe"
			sources           = ["ci", "ci"]
			min_sources       = 3
			max_age           = "soon"
			max_db_age        = "-1h"
			feed_max_age      = "1s"
			unknown_as        = "bad"
			on_missing        = "perhaps"
			on_stale          = "grace:"
			on_error          = "grace:-1h"
			on_fail           = "explode"
			svid_ttl_max      = "25h"
			jwt_ttl_max       = "1e9d"
			exception_max_age = "0s"
			epss_below        = [0, 2]
			fail {}
			fail {
				severity = "unknown"
				epss     = 50
			}
			grace {
				severity = "high"
				for      = "1h"
			}
			grace {
				severity = "high"
			}
			grace {}
			vex {
				accept  = ["affected"]
				max_age = "x"
			}
			blast_guard {
				max_fraction  = 20
				window        = "0s"
				min_workloads = -1
			}
		}`)[0])
		if p != nil {
			t.Error("a policy came of it")
		}
		var got []string
		for _, problem := range problems {
			line := problem.String()
			at, text, found := strings.Cut(line, ": ")
			if !found || !strings.HasSuffix(text, ".") {
				t.Errorf("no sentence: %s", line)
			}
			got = append(got, at)
		}
		want := []string{
			"name", "mode", "sources", "min_sources", "max_age", "max_db_age", "feed_max_age", "fail[1]", "fail[2].severity", "fail[2].epss",
			"unknown_as", "on_missing", "on_stale", "on_error", "grace[2].severity", "grace[2].for", "grace[3].severity", "grace[3].for",
			"vex.trust", "vex.accept", "vex.max_age", "on_fail", "blast_guard.max_fraction", "blast_guard.min_workloads", "blast_guard.window",
			"svid_ttl_max", "jwt_ttl_max", "exception_max_age", "epss_below", "epss_below",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s\n%v", diff, problems)
		}
	})
	t.Run("a policy that nobody may feed is refused", func(t *testing.T) {
		if _, problems := New(Block{Name: "prod"}); len(problems) != 1 || problems[0].Field != "sources" {
			t.Errorf("problems are %v", problems)
		}
	})
	t.Run("worse findings may not have longer than lesser ones", func(t *testing.T) {
		for name, c := range map[string]struct {
			graces []Graces
			field  string // empty: it is taken
			nth    int
		}{
			"the worse shorter, as in the sample":   {[]Graces{{"critical", "0s"}, {"high", "72h"}}, "", 0},
			"both the same":                         {[]Graces{{"high", "3d"}, {"critical", "72h"}}, "", 0},
			"one alone":                             {[]Graces{{"critical", "72h"}}, "", 0},
			"the worse longer":                      {[]Graces{{"high", "24h"}, {"critical", "72h"}}, "grace.for", 2},
			"the lesser none":                       {[]Graces{{"high", "1h"}, {"low", "0s"}}, "grace.for", 1},
			"what is wrong by itself is said alone": {[]Graces{{"high", "x"}, {"critical", "72h"}}, "grace.for", 1},
		} {
			_, problems := New(Block{Name: "prod", Sources: []string{"ci"}, Grace: c.graces})
			switch {
			case c.field == "" && len(problems) > 0:
				t.Errorf("%s: %v", name, problems)
			case c.field != "" && (len(problems) != 1 || problems[0].Field != c.field || problems[0].Nth != c.nth):
				t.Errorf("%s: problems are %v", name, problems)
			}
		}
		_, problems := New(Block{Name: "prod", Sources: []string{"ci"}, Grace: []Graces{{"high", "24h"}, {"critical", "72h"}}})
		want := `"critical" findings have 3d, and "high" ones, which are lesser, only 24h; give the worse no longer than the lesser.`
		if len(problems) != 1 || problems[0].Text != want {
			t.Errorf("got %v, want %s", problems, want)
		}
	})
	t.Run("more sources are needed than there are", func(t *testing.T) {
		n := 2
		if _, problems := New(Block{Name: "prod", Sources: []string{"ci"}, MinSources: &n}); len(problems) != 1 || problems[0].Field != "min_sources" {
			t.Errorf("problems are %v", problems)
		}
	})
}

func TestDurations(t *testing.T) {
	for text, want := range map[string]time.Duration{"90s": 90 * time.Second, "1h30m": 90 * time.Minute, "1d": 24 * time.Hour, "1.5d": 36 * time.Hour, "90d": 90 * day} {
		if got, err := parseDuration(text); err != nil || got != want {
			t.Errorf("%s is read as %s, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "d", "xd", "9999999d", "1d1h", "5"} {
		if got, err := parseDuration(text); err == nil {
			t.Errorf("%q is read as %s", text, got)
		}
	}
	for want, d := range map[string]time.Duration{"15m": 15 * time.Minute, "24h": day, "2d": 2 * day, "1h30m": 90 * time.Minute, "1m30s": 90 * time.Second, "0s": 0, "10s": 10 * time.Second} {
		if got := length(d); got != want {
			t.Errorf("%s is written %s", want, got)
		}
	}
}
