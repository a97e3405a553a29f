package attestor_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor"
)

func sel(t *testing.T, text string) attestor.Selector {
	t.Helper()
	s, err := attestor.ParseSelector(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func set(t *testing.T, texts ...string) attestor.Set {
	t.Helper()
	list := make([]attestor.Selector, 0, len(texts))
	for _, text := range texts {
		list = append(list, sel(t, text))
	}
	return attestor.NewSet(list...)
}

func TestSelector(t *testing.T) {
	t.Run("only the first colon separates", func(t *testing.T) {
		got := sel(t, "docker:label:app:shop")
		if got.Type != "docker" || got.Value != "label:app:shop" {
			t.Fatalf("got %#v", got)
		}
		if got.String() != "docker:label:app:shop" {
			t.Fatalf("got %q", got)
		}
	})
	for name, text := range map[string]string{
		"no colon":             "unix",
		"an empty type":        ":uid:0",
		"an empty value":       "unix:",
		"a newline":            "unix:uid:0\nunix:uid:1",
		"a null byte":          "unix:uid\x000",
		"a delete character":   "unix:uid:\x7f",
		"a control in type":    "un\x1bix:uid",
		"a type too long":      strings.Repeat("a", attestor.MaxTypeLength+1) + ":v",
		"a value too long":     "t:" + strings.Repeat("a", attestor.MaxValueLength+1),
		"a huge value, no end": strings.Repeat("x", 1<<20),
	} {
		t.Run("refuses "+name, func(t *testing.T) {
			s, err := attestor.ParseSelector(text)
			if err == nil {
				t.Fatalf("accepted %q", s)
			}
			if len(err.Error()) > 300 {
				t.Fatalf("the error repeats %d bytes of the input", len(err.Error()))
			}
		})
	}
	if err := (attestor.Selector{Type: "a:b", Value: "c"}).Check(); err == nil {
		t.Error("accepted a type with a colon: its text form would parse as another selector")
	}
}

func TestSet(t *testing.T) {
	a := set(t, "unix:uid:1", "docker:label:a:b", "unix:uid:1")
	t.Run("is sorted and without duplicates", func(t *testing.T) {
		if want := []string{"docker:label:a:b", "unix:uid:1"}; !slices.Equal(a.Strings(), want) {
			t.Fatalf("got %v", a.Strings())
		}
	})
	t.Run("does not share memory with its arguments", func(t *testing.T) {
		in := []attestor.Selector{{Type: "b", Value: "1"}, {Type: "a", Value: "1"}}
		s := attestor.NewSet(in...)
		in[0].Value, in[1].Value = "x", "x"
		if !slices.Equal(s.Strings(), []string{"a:1", "b:1"}) {
			t.Fatalf("got %v", s.Strings())
		}
	})
	for _, c := range []struct {
		name     string
		sub, sup attestor.Set
		want     bool
	}{
		{"a set is in itself", a, a, true},
		{"one of two", set(t, "unix:uid:1"), a, true},
		{"the first of two", set(t, "docker:label:a:b"), a, true},
		{"another value", set(t, "unix:uid:2"), a, false},
		{"one more", set(t, "unix:uid:1", "unix:gid:1"), a, false},
		{"the empty set", attestor.Set{}, a, true},
		{"anything in the empty set", a, attestor.Set{}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := c.sub.In(c.sup); got != c.want {
				t.Fatalf("In = %v, want %v", got, c.want)
			}
			if got := len(c.sub.Missing(c.sup)) == 0; got != c.want {
				t.Fatalf("Missing = %v", c.sub.Missing(c.sup))
			}
		})
	}
	t.Run("keys differ where sets differ", func(t *testing.T) {
		one := attestor.NewSet(attestor.Selector{Type: "a", Value: "b:c"})
		two := attestor.NewSet(attestor.Selector{Type: "a", Value: "b"}, attestor.Selector{Type: "c", Value: "d"})
		if one.Key() == two.Key() || one.Equal(two) {
			t.Fatal("two sets, one key")
		}
		if u := attestor.Union(one, two); u.Len() != 3 || !one.In(u) || !two.In(u) {
			t.Fatalf("union is %v", u.Strings())
		}
	})
}

func FuzzParseSelector(f *testing.F) {
	for _, seed := range []string{"unix:uid:0", "docker:label:a:b:c", ":", "a:", "\x00:a"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			return
		}
		if s.String() != text {
			t.Fatalf("%q became %q", text, s)
		}
		if err := s.Check(); err != nil {
			t.Fatalf("parsed what Check refuses: %v", err)
		}
	})
}
