package agentpath

import (
	"strings"
	"testing"
)

func TestPath(t *testing.T) {
	values := map[string]any{
		"PluginName": "sshpop", "Hostname": "Web1", "Principals": []string{"web1.example.org", "web1"},
		"Evil": "a/../x509pop/b", "Serial": uint64(7), "Empty": "", "None": []string{},
	}
	for text, want := range map[string]string{
		"{{ .PluginName}}/{{ .Hostname | lower }}":     "sshpop/web1",
		"/{{ .PluginName}}/{{ index .Principals 1 }}":  "sshpop/web1",
		"static/{{ .Serial }}":                         "static/7",
		`x/{{ .Evil | replace "/" "-" }}`:              "x/a-..-x509pop-b",
		`x/{{ sha256sum .Evil | printf "%.8s" }}`:      "x/" + sum8(t, "a/../x509pop/b"),
		`x/{{ default "none" .Empty }}`:                "x/none",
		`x/{{ first .Principals | trimSuffix ".org"}}`: "x/web1.example",
	} {
		tmpl, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := tmpl.Path(values); err != nil || got != want {
			t.Errorf("%s is %q, %v; want %q", text, got, err, want)
		}
	}
	for why, text := range map[string]string{
		"a value that makes segments":      "x/{{ .Evil }}",
		"one in the middle of another":     "x/a-{{ .Evil }}-b",
		"a value that is not there":        "x/{{ .Missing }}",
		"an index past the end":            "x/{{ index .Principals 2 }}",
		"the first of none":                "x/{{ first .None }}",
		"a path without end":               "x/{{ range $i := .Principals }}" + strings.Repeat("a", maxPath) + "{{ end }}",
		"a list of values with a slash in": `x/{{ join "-" (splitList "." .Evil) }}`,
	} {
		tmpl, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := tmpl.Path(values); err == nil {
			t.Errorf("%s is not refused: %q", why, got)
		} else if strings.Contains(err.Error(), "x509pop") {
			t.Errorf("%s: the refusal tells of the value: %v", why, err)
		}
	}
	for _, text := range []string{"{{ .Hostname", "{{ nosuch .Hostname }}", `{{ template "x" }}{{ end }}`} {
		if _, err := Parse(text); err == nil {
			t.Errorf("%s is a template", text)
		}
	}
}

func sum8(t *testing.T, s string) string {
	t.Helper()
	tmpl, err := Parse(`{{ sha256sum .S }}`)
	if err != nil {
		t.Fatal(err)
	}
	sum, err := tmpl.Path(map[string]any{"S": s})
	if err != nil {
		t.Fatal(err)
	}
	return sum[:8]
}
