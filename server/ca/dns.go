package ca

import (
	"errors"
	"fmt"
	"strings"

	"github.com/assay-id/assay/workloadapi/identity"
)

// Limits of a DNS name (RFC 1035 2.3.4).
const (
	maxDNSName  = 253
	maxDNSLabel = 63
)

// ValidDNSName says what is wrong with a DNS name that is to go into a certificate, or nil. The
// error wraps ErrDNSName.
//
// A name is labels of ASCII letters, digits, '-' and '_' (RFC 5890 2.3.1, and '_' because SPIRE
// takes it), at most 63 bytes each and 253 together, without a trailing dot. The first label may be
// a whole '*', if a name follows it (RFC 6125 6.4.3). Labels that begin or end with '-' and those
// with "--" as third and fourth character, which is what punycode looks like, are refused.
func ValidDNSName(name string) error {
	if err := checkDNSName(name); err != nil {
		if len(name) > maxDNSName {
			name = name[:maxDNSName] + "…"
		}
		return fmt.Errorf("%w %q: %w", ErrDNSName, name, err)
	}
	return nil
}

func checkDNSName(name string) error {
	switch stars := strings.Count(name, "*"); {
	case name == "":
		return errors.New("empty")
	case len(name) > maxDNSName:
		return fmt.Errorf("%d bytes long, the limit is %d", len(name), maxDNSName)
	case stars > 1:
		return errors.New("too many wildcards")
	case stars == 1 && !strings.HasPrefix(name, "*."):
		return errors.New("a wildcard must be the whole first label")
	}
	rest := strings.TrimPrefix(name, "*.")
	if rest == "" {
		return errors.New("nothing follows the wildcard")
	}
	if strings.HasSuffix(rest, ".") {
		return errors.New("ends with a dot")
	}
	for label := range strings.SplitSeq(rest, ".") {
		if err := checkDNSLabel(label); err != nil {
			return err
		}
	}
	return nil
}

func checkDNSLabel(label string) error {
	switch {
	case label == "":
		return errors.New("empty label")
	case len(label) > maxDNSLabel:
		return fmt.Errorf("label of %d bytes, the limit is %d", len(label), maxDNSLabel)
	case label[0] == '-' || label[len(label)-1] == '-':
		return errors.New("label begins or ends with a hyphen")
	case len(label) >= 4 && label[2:4] == "--":
		return errors.New("label is punycode or reserved")
	}
	for i := range len(label) {
		switch c := label[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		default:
			return errors.New("character that is not a letter, digit, hyphen or underscore")
		}
	}
	return nil
}

// checkDNSNames checks each name and their number.
func checkDNSNames(names []string) error {
	if len(names) > identity.MaxDNSNames {
		return fmt.Errorf("%ws: %d of them, the limit is %d", ErrDNSName, len(names), identity.MaxDNSNames)
	}
	for _, name := range names {
		if err := ValidDNSName(name); err != nil {
			return err
		}
	}
	return nil
}
