package ca

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/net/idna"
)

func TestValidDNSName(t *testing.T) {
	long := strings.Repeat("a", 63)
	for name, ok := range map[string]bool{
		"example.org": true, "EXAMPLE.org": true, "a": true, "0": true, "1.2.3.4": true, "a-b.c": true, "_tcp.example.org": true,
		"*.example.org": true, "*.org": true, long + ".org": true,
		strings.Repeat("a.", 126) + "a": true,
		"":                              false, ".": false, "*": false, "*.": false, "a.": false, ".a": false, "a..b": false, "*.*.org": false, "a.*.org": false,
		"*a.org": false, "a*.org": false, "**.org": false, "-a.org": false, "a-.org": false, "ab--c.org": false, "xn--bcher-kva.example": false,
		"bücher.example": false, "a b": false, " a": false, "a\n": false, "a\x00b": false, "a/b": false, "a:443": false, "[::1]": false,
		long + "a.org": false, strings.Repeat("a.", 127) + "a": false, "*." + strings.Repeat("a.", 126) + "a": false, "a@b": false, "a\xff": false,
	} {
		if err := ValidDNSName(name); (err == nil) != ok || err != nil && !errors.Is(err, ErrDNSName) {
			t.Errorf("%q: got %v", name, err)
		}
	}
	t.Run("an error does not repeat all of a long name", func(t *testing.T) {
		if err := ValidDNSName(strings.Repeat("a", 1<<20)); err == nil || len(err.Error()) > 400 {
			t.Errorf("%d bytes", len(err.Error()))
		}
	})
}

// FuzzDNSName compares with the rules that SPIRE has names checked by: whatever we take, they do.
func FuzzDNSName(f *testing.F) {
	for _, name := range []string{"example.org", "*.example.org", "a--b", "xn--a", "é", "a.", strings.Repeat("a.", 127)} {
		f.Add(name)
	}
	profile := idna.New(idna.StrictDomainName(true), idna.ValidateLabels(true), idna.VerifyDNSLength(true),
		idna.CheckJoiners(true), idna.BidiRule(), idna.CheckHyphens(true))
	f.Fuzz(func(t *testing.T, name string) {
		if ValidDNSName(name) != nil {
			return
		}
		rest := strings.TrimPrefix(name, "*.")
		ascii, err := profile.ToASCII(rest)
		if err != nil || ascii != rest {
			t.Errorf("%q became %q: %v", name, ascii, err)
		}
		if unicode, err := profile.ToUnicode(rest); err != nil || unicode != rest {
			t.Errorf("%q reads %q: %v", name, unicode, err)
		}
	})
}
