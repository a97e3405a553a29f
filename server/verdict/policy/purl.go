package policy

import (
	"net/url"
	"strings"
)

// packageKey returns what two scanners call the same package: a purl without its qualifiers and
// subpath, which each of them writes as it likes, with its type in lower case and nothing escaped; or
// the text as it is if it is no purl.
func packageKey(text string) string {
	if !isPURL(text) {
		return text
	}
	if i := strings.IndexAny(text, "?#"); i >= 0 {
		text = text[:i]
	}
	if strings.Contains(text, "%") {
		if plain, err := url.PathUnescape(text); err == nil {
			text = plain
		}
	}
	kind, rest, _ := strings.Cut(text[len("pkg:"):], "/")
	if lower := strings.ToLower(kind); lower != kind {
		text = "pkg:" + lower + "/" + rest
	}
	return text
}

func isPURL(text string) bool { return strings.HasPrefix(text, "pkg:") }

// covers reports whether a statement or an exception about the package pattern is also about the
// package text of a finding. What the pattern leaves out, version or qualifiers, may be anything; what
// it says must be so.
func covers(pattern, text string) bool {
	if pattern == text {
		return true
	}
	if isPURL(pattern) != isPURL(text) {
		return false
	}
	want, got := packageKey(pattern), packageKey(text)
	if want != got {
		name, versioned := cutVersion(want)
		if gotName, _ := cutVersion(got); versioned || name != gotName {
			return false
		}
	}
	if !isPURL(pattern) {
		return true
	}
	_, subpath, found := strings.Cut(pattern, "#")
	if _, has, _ := strings.Cut(text, "#"); found && subpath != has {
		return false
	}
	wanted := qualifiers(pattern)
	if len(wanted) == 0 {
		return true
	}
	have := qualifiers(text)
	for key, value := range wanted {
		if v, ok := have[key]; !ok || v != value {
			return false
		}
	}
	return true
}

// cutVersion returns the name of name@version and whether there is a version: what follows the last @
// that is not part of the name (pkg:npm/@angular/core).
func cutVersion(key string) (name string, found bool) {
	i := strings.LastIndexByte(key, '@')
	if i <= 0 || i < strings.LastIndexByte(key, '/') && isPURL(key) || key[i-1] == '/' {
		return key, false
	}
	return key[:i], true
}

func qualifiers(text string) map[string]string {
	text, _, _ = strings.Cut(text, "#")
	_, query, found := strings.Cut(text, "?")
	if !found {
		return nil
	}
	all := map[string]string{}
	for pair := range strings.SplitSeq(query, "&") {
		key, value, _ := strings.Cut(pair, "=")
		if plain, err := url.PathUnescape(value); err == nil {
			value = plain
		}
		all[strings.ToLower(key)] = value
	}
	return all
}
