package report

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// How long texts may be, in bytes; longer ones are clipped.
const (
	maxWord = 128  // identifiers, versions, times, states
	maxText = 1024 // names, purls, URLs, reasons
	// maxDigests is how many digests of one subject are kept before the document is refused.
	maxDigests = 1000
	// maxAliases is how many other names one vulnerability may have before the document is refused.
	maxAliases = 64
	// maxTexts is how many texts a list may have that is kept.
	maxTexts = 1000
)

// clean makes a text fit to be stored, logged and printed: control characters, which could forge a
// line of a log or move a terminal's cursor, become U+FFFD, and what is over max bytes is cut off.
func clean(s string, max int) string {
	for i := 0; i < len(s) && i < max; i++ {
		if s[i] < 0x20 || s[i] == 0x7f || s[i] == 0xc2 { // 0xc2 leads U+0080 to U+009f, control too
			s = strings.Map(func(r rune) rune {
				if r < 0x20 || r >= 0x7f && r <= 0x9f {
					return utf8.RuneError
				}
				return r
			}, s)
			break
		}
	}
	if len(s) <= max {
		return s
	}
	for max > 0 && !utf8.RuneStart(s[max]) {
		max--
	}
	return strings.Clone(s[:max])
}

var digestRE = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// digest is s, if it is a SHA-256 digest as OCI writes it: nothing shorter, longer, upper-case or of
// another algorithm joins a report to an image.
func digest(s string) (string, error) {
	if !digestRE.MatchString(s) {
		return "", fmt.Errorf("%q is not sha256: and 64 lower-case hex digits", clean(s, maxWord))
	}
	return s, nil
}

// digestOfRef is the digest of a reference by digest, registry/repository@sha256:…. It is empty
// for a reference by name or tag, which says nothing.
func digestOfRef(ref string) (string, error) {
	_, d, ok := strings.Cut(ref, "@")
	if !ok {
		return "", nil
	}
	return digest(d)
}

// purlType is the type of a package URL, empty if s is none.
func purlType(s string) string {
	rest, ok := strings.CutPrefix(s, "pkg:")
	if !ok {
		return ""
	}
	kind, _, ok := strings.Cut(strings.TrimLeft(rest, "/"), "/")
	if !ok {
		return ""
	}
	return strings.ToLower(kind)
}

// isImagePurl says that a package URL names a container image and not a package in one.
func isImagePurl(s string) bool {
	t := purlType(s)
	return t == "oci" || t == "docker"
}

// digestOfPurl is the digest of a package URL that names an image, pkg:oci/name@sha256:…, empty if it
// names the image by a tag or not at all. The @ and the colon may be percent-encoded.
func digestOfPurl(s string) (string, error) {
	s, _, _ = strings.Cut(s, "?")
	s, _, _ = strings.Cut(s, "#")
	_, version, ok := strings.Cut(s, "@")
	if !ok {
		return "", nil
	}
	version, err := url.PathUnescape(version)
	if err != nil {
		return "", fmt.Errorf("package URL: %w", err)
	}
	if !strings.HasPrefix(version, "sha256:") {
		return "", nil
	}
	return digest(version)
}

// addDigest adds a digest to a sorted list, once.
func addDigest(all []string, d string) ([]string, error) {
	i, found := slices.BinarySearch(all, d)
	switch {
	case d == "" || found:
		return all, nil
	case len(all) == maxDigests:
		return nil, fmt.Errorf("more than %d digests", maxDigests)
	}
	return slices.Insert(all, i, d), nil
}

var platformRE = regexp.MustCompile(`^[a-z0-9]+/[a-z0-9_]+(/[a-z0-9.]+)?$`)

// platform joins what an image's configuration says of where it runs. Half an answer is none.
func platform(os, arch, variant string) string {
	p := strings.ToLower(os + "/" + arch)
	if variant != "" {
		p += "/" + strings.ToLower(variant)
	}
	if !platformRE.MatchString(p) {
		return ""
	}
	return p
}

// packageName is the purl if there is one, else name@version.
func packageName(purl, name, version string) string {
	switch {
	case purl != "":
		return purl
	case version == "":
		return name
	default:
		return clean(name+"@"+version, maxText)
	}
}

// scannerName is the last word of where a scanner comes from: a package URL, an URL or a name.
func scannerName(uri string) string {
	uri, _, _ = strings.Cut(uri, "?")
	uri, _, _ = strings.Cut(uri, "@")
	uri = strings.TrimRight(uri, "/")
	return strings.ToLower(clean(uri[strings.LastIndexByte(uri, '/')+1:], maxWord))
}
