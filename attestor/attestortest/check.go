package attestortest

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclparse"
	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
)

// Decode reads the body of a configuration block into what an attestor's Config returns, as the
// conf package does for the daemons.
func Decode(config func() any, body string) (any, hcl.Diagnostics) {
	file, diags := hclparse.NewParser().ParseHCL([]byte(body), "test.hcl")
	if diags.HasErrors() {
		return nil, diags
	}
	into := config()
	diags = gohcl.DecodeBody(file.Body, nil, into)
	return into, diags
}

func mustDecode(t testing.TB, config func() any, body string) any {
	t.Helper()
	into, diags := Decode(config, body)
	if diags.HasErrors() {
		t.Fatalf("decode configuration: %v", diags)
	}
	return into
}

func checkConfig(t *testing.T, name string, config func() any, body string) {
	t.Run(name, func(t *testing.T) {
		first, second := config(), config()
		if kind := reflect.TypeOf(first); kind.Kind() != reflect.Pointer || kind.Elem().Kind() != reflect.Struct {
			t.Fatalf("Config returns a %v, want a pointer to a struct", kind)
		}
		if first == second && reflect.TypeOf(first).Elem().Size() > 0 {
			t.Error("Config returns the same struct twice")
		}
		if !reflect.DeepEqual(first, second) {
			t.Error("Config does not return the same defaults twice")
		}
		mustDecode(t, config, body)
		for _, typo := range []string{"no_such_key = 1", "no_such_block {}", `no_such_block "x" { y = 1 }`} {
			_, diags := Decode(config, body+"\n"+typo+"\n")
			if !diags.HasErrors() {
				t.Errorf("%s is accepted", typo)
				continue
			}
			if diags[0].Subject == nil || diags[0].Subject.Start.Line == 0 {
				t.Errorf("the complaint about %s has no position: %v", typo, diags)
			}
		}
		checkKeysDocumented(t, first)
	})
}

// checkKeysDocumented demands that every field has an hcl tag: one without is silently never set.
func checkKeysDocumented(t *testing.T, config any) {
	t.Helper()
	kind := reflect.TypeOf(config).Elem()
	for field := range kind.Fields() {
		if field.IsExported() && field.Tag.Get("hcl") == "" {
			t.Errorf("field %s has no hcl tag", field.Name)
		}
	}
}

func fill(t testing.TB, needs attestor.Needs) attestor.Needs {
	t.Helper()
	if needs.TrustDomain.IsZero() {
		needs.TrustDomain = TrustDomain
	}
	if needs.Log == nil {
		log := logrus.New()
		log.SetOutput(t.Output())
		log.SetLevel(logrus.DebugLevel)
		needs.Log = log
	}
	if needs.Now == nil {
		needs.Now = time.Now
	}
	return needs
}

func texts(selectors []attestor.Selector) []string {
	var all []string
	for _, s := range selectors {
		all = append(all, s.String())
	}
	return all
}

// checkSelectors demands that selectors are well formed, of one of the types and not repeated.
func checkSelectors(t *testing.T, selectors []attestor.Selector, types ...string) {
	t.Helper()
	seen := make(map[attestor.Selector]bool)
	for _, s := range selectors {
		if err := s.Check(); err != nil {
			t.Error(err)
		}
		ours := false
		for _, kind := range types {
			ours = ours || s.Type == kind
		}
		if !ours {
			t.Errorf("selector %s is not of type %s", s, strings.Join(types, " or "))
		}
		if seen[s] {
			t.Errorf("selector %s comes twice", s)
		}
		seen[s] = true
	}
}

func readREADME(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var (
	code        = regexp.MustCompile("`([a-z0-9_]+:[^`]+)`")
	placeholder = regexp.MustCompile(`<[^>]+>`)
)

// checkDocumented demands that the README shows, in backquotes, a form of each selector, in which
// <anything> stands for what varies.
func checkDocumented(t *testing.T, readme string, selectors []string) {
	t.Helper()
	var forms []*regexp.Regexp
	for _, found := range code.FindAllStringSubmatch(readme, -1) {
		var form strings.Builder
		rest := found[1]
		for {
			at := placeholder.FindStringIndex(rest)
			if at == nil {
				break
			}
			form.WriteString(regexp.QuoteMeta(rest[:at[0]]) + "(?s:.+)")
			rest = rest[at[1]:]
		}
		forms = append(forms, regexp.MustCompile("^"+form.String()+regexp.QuoteMeta(rest)+"$"))
	}
	for _, s := range selectors {
		documented := false
		for _, form := range forms {
			documented = documented || form.MatchString(s)
		}
		if !documented {
			t.Errorf("the README does not explain %s", s)
		}
	}
}

// within runs f and fails the test if it takes longer than anything here should.
func within[T any](t *testing.T, f func() (T, error)) (T, error) {
	t.Helper()
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-time.After(patience):
		t.Fatal("still not back")
		panic("unreachable")
	}
}
