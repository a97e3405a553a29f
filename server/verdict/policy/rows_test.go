package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/server/verdict/report"
)

// lines tells the rows of a report in short.
func lines(rows []*row) []string {
	var all []string
	for _, r := range rows {
		line := fmt.Sprintf("%s in %s %s", strings.Join(r.ids, "="), strings.Join(append([]string{r.found.Package}, r.packages...), "|"), severityWord(r.found.Severity))
		if r.found.Fixed {
			line += " fixed"
		}
		if r.hidden {
			line += " hidden"
		}
		all = append(all, line)
	}
	return all
}

func TestRows(t *testing.T) {
	find := func(id, pkg string, severity report.Severity, also ...string) report.Finding {
		return report.Finding{ID: id, Package: pkg, Severity: severity, Aliases: also, EPSS: -1}
	}
	for _, c := range []struct {
		name string
		in   []report.Finding
		want []string
	}{
		{"a CVE leads where the report leads with another name",
			[]report.Finding{find("GHSA-1", "a", report.Low, "CVE-1")},
			[]string{"CVE-1=GHSA-1 in a low"}},
		{"names hang together by way of others",
			[]report.Finding{find("GHSA-1", "a", report.Low, "GHSA-2"), find("GO-1", "a", report.High, "GHSA-3"), find("GHSA-2", "a", report.Medium, "GHSA-3")},
			[]string{"GHSA-1=GHSA-2=GHSA-3=GO-1 in a high"}},
		{"two CVEs stay two, whatever else they are called",
			[]report.Finding{find("CVE-1", "a", report.Low, "GHSA-1"), find("CVE-2", "a", report.High, "GHSA-1")},
			[]string{"CVE-1=GHSA-1 in a low", "CVE-2=GHSA-1 in a high"}},
		{"an advisory that stands for two says of both what it says",
			[]report.Finding{find("CVE-1", "a", report.Low, "GHSA-1"), find("CVE-2", "a", report.Low, "GHSA-1"), find("GHSA-1", "a", report.High), find("GHSA-9", "a", report.Low)},
			[]string{"CVE-1=GHSA-1 in a high", "CVE-2=GHSA-1 in a high", "GHSA-9 in a low"}},
		{"what belongs to no CVE stays beside it, in whatever order it comes",
			[]report.Finding{find("GHSA-9", "a", report.Low), find("GHSA-8", "a", report.Low), find("GHSA-1", "a", report.High), find("CVE-1", "a", report.Low, "GHSA-1")},
			[]string{"CVE-1=GHSA-1 in a high", "GHSA-8 in a low", "GHSA-9 in a low"}},
		{"one finding that claims two CVEs is two",
			[]report.Finding{find("GHSA-1", "a", report.Low, "CVE-1", "CVE-2")},
			[]string{"CVE-1=GHSA-1 in a low", "CVE-2=GHSA-1 in a low"}},
		{"other packages stay apart, other writings of one do not",
			[]report.Finding{find("CVE-1", "pkg:deb/debian/a@1?arch=amd64", report.Low), find("CVE-1", "pkg:DEB/debian/a@1", report.Low), find("CVE-1", "pkg:deb/debian/a@2", report.Low)},
			[]string{"CVE-1 in pkg:DEB/debian/a@1|pkg:deb/debian/a@1?arch=amd64 low", "CVE-1 in pkg:deb/debian/a@2 low"}},
		{"shared advisories do not tie",
			[]report.Finding{find("CVE-1", "a", report.Low, "DSA-1"), find("CVE-2", "a", report.Low, "DSA-1")},
			[]string{"CVE-1 in a low", "CVE-2 in a low"}},
		{"severities out of range are unknown",
			[]report.Finding{find("CVE-1", "a", 99), find("CVE-2", "a", -1)},
			[]string{"CVE-1 in a unknown", "CVE-2 in a unknown"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := fmt.Sprint(c.in)
			got := lines(NewIndex(&report.Report{Findings: c.in}).rows)
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
			if fmt.Sprint(c.in) != before {
				t.Error("the report was changed")
			}
			slices.Reverse(c.in)
			if diff := cmp.Diff(c.want, lines(NewIndex(&report.Report{Findings: c.in}).rows)); diff != "" {
				t.Errorf("the other way round: %s", diff)
			}
		})
	}
}

func TestHostileReports(t *testing.T) {
	// Each of these would take hours, or all memory, if a step took time by the square of their size.
	const many = 20_000
	for name, finding := range map[string]func(i int) report.Finding{
		"one finding again and again": func(int) report.Finding {
			return report.Finding{ID: "CVE-1", Package: "a", Aliases: []string{"GHSA-1"}}
		},
		"a chain of names": func(i int) report.Finding {
			return report.Finding{ID: fmt.Sprint("GHSA-", i), Package: "a", Aliases: []string{fmt.Sprint("GHSA-", i+1)}}
		},
		"one package in many writings": func(i int) report.Finding {
			return report.Finding{ID: "CVE-1", Package: fmt.Sprint("pkg:deb/a@1?x=", i)}
		},
		"many findings in one package": func(i int) report.Finding { return report.Finding{ID: fmt.Sprint("CVE-", i), Package: "a"} },
		"an advisory for very many CVEs": func(i int) report.Finding {
			return report.Finding{ID: fmt.Sprint("CVE-", i), Package: "a", Aliases: []string{"GHSA-1"}}
		},
		"advisories and CVEs by one name": func(i int) report.Finding {
			return report.Finding{ID: fmt.Sprint([]string{"CVE-", "GO-"}[i%2], i), Package: "a", Aliases: []string{"GHSA-1"}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := &report.Report{}
			for i := range many {
				r.Findings = append(r.Findings, finding(i))
			}
			for _, row := range NewIndex(r).rows {
				if len(row.ids) > maxNames || len(row.packages) > maxNames || len(row.found.Aliases) > 2*maxNames {
					t.Fatalf("a row has %d names", len(row.ids))
				}
			}
		})
	}
}

func TestPackages(t *testing.T) {
	for _, c := range []struct {
		pattern, text string
		want          bool
	}{
		{"pkg:deb/debian/openssl", "pkg:deb/debian/openssl@3.0.1?arch=amd64", true},
		{"pkg:deb/debian/openssl@3.0.1", "pkg:deb/debian/openssl@3.0.1?arch=amd64", true},
		{"pkg:deb/debian/openssl@3.0.1?arch=arm64", "pkg:deb/debian/openssl@3.0.1?arch=amd64", false},
		{"pkg:deb/debian/openssl@3.0.1?arch=amd64", "pkg:deb/debian/openssl@3.0.1?arch=amd64&distro=debian-12", true},
		{"pkg:deb/debian/openssl@3.0.1?arch=amd64", "pkg:deb/debian/openssl@3.0.1", false},
		{"pkg:deb/debian/openssl@3.0.2", "pkg:deb/debian/openssl@3.0.1", false},
		{"pkg:deb/debian/open", "pkg:deb/debian/openssl@3.0.1", false},
		{"pkg:deb/debian", "pkg:deb/debian/openssl@3.0.1", false},
		{"pkg:npm/@angular/core", "pkg:npm/%40angular/core@1.0.0", true},
		{"pkg:npm/%40angular/core@1.0.0", "pkg:npm/@angular/core@1.0.0", true},
		{"pkg:npm/@angular", "pkg:npm/@angular@1.0.0", true},
		{"pkg:golang/x/net#http2", "pkg:golang/x/net@1#http2", true},
		{"pkg:golang/x/net#http2", "pkg:golang/x/net@1#html", false},
		{"openssl", "openssl@3.0.1", true},
		{"openssl@3.0.1", "openssl@3.0.1", true},
		{"openssl@3.0.2", "openssl@3.0.1", false},
		{"openssl", "pkg:deb/debian/openssl@3.0.1", false},
		{"", "openssl", false},
	} {
		if got := covers(c.pattern, c.text); got != c.want {
			t.Errorf("%q covers %q: %t", c.pattern, c.text, got)
		}
	}
}
