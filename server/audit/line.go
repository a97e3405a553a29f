package audit

import (
	"crypto/sha256"
	"encoding/hex"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Limits that keep a hostile caller from filling the disk with few requests.
const (
	// MaxField is the longest text of one field in bytes; the rest is cut off and "…" put after it.
	MaxField = 5000
	// MaxFacts is the largest number of facts; the last fact then says how many were left out.
	MaxFacts = 1000
)

// appendLine appends the line as JSON and a newline. The order of the keys is part of the format:
// people read it.
func appendLine(b []byte, l *Line) []byte {
	b = append(b, `{"time":"`...)
	b = appendTime(b, l.Time)
	b = append(b, '"')
	b = appendText(b, "event", l.Event)
	b = appendText(b, "outcome", l.Outcome)
	b = appendText(b, "reason", l.Reason)
	b = appendText(b, "method", l.Method)
	b = appendText(b, "caller", l.Caller)
	b = appendText(b, "peer", l.Peer)
	b = appendText(b, "agent_id", l.Agent)
	b = appendText(b, "entry_id", l.EntryID)
	b = appendText(b, "spiffe_id", l.SPIFFEID)
	b = appendText(b, "serial", l.Serial)
	b = appendText(b, "authority_id", l.Authority)
	b = appendText(b, "policy", l.Policy)
	b = appendText(b, "finding", l.Finding)
	b = appendText(b, "report", l.Report)
	if !l.ExpiresAt.IsZero() {
		b = append(b, `,"expires_at":"`...)
		b = appendTime(b, l.ExpiresAt)
		b = append(b, '"')
	}
	if l.Rev != 0 {
		b = append(b, `,"rev":`...)
		b = strconv.AppendUint(b, uint64(l.Rev), 10)
	}
	if len(l.Facts) > 0 {
		b = appendFacts(b, "facts", l.Facts)
	}
	if len(l.Verdicts) > 0 {
		b = appendFacts(b, "verdicts", l.Verdicts)
	}
	return append(b, '}', '\n')
}

func appendTime(b []byte, t time.Time) []byte {
	// RFC 3339 has no year beyond 9999; no clock of ours is there, but JSON must not break over it.
	if year := t.UTC().Year(); year < 0 || year > 9999 {
		return strconv.AppendInt(b, t.Unix(), 10)
	}
	return t.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
}

func appendText(b []byte, key, value string) []byte {
	if value == "" {
		return b
	}
	b = append(b, ',', '"')
	b = append(b, key...)
	b = append(b, '"', ':')
	return appendString(b, value)
}

func appendFacts(b []byte, key string, facts []string) []byte {
	left := 0
	if len(facts) > MaxFacts {
		left = len(facts) - (MaxFacts - 1)
		facts = facts[:MaxFacts-1]
	}
	b = append(b, ',', '"')
	b = append(b, key...)
	b = append(b, `":[`...)
	for i, fact := range facts {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(b, Redact(fact))
	}
	if left > 0 {
		b = append(b, ',')
		b = appendString(b, "… and "+strconv.Itoa(left)+" more")
	}
	return append(b, ']')
}

// Redact returns the fact as it may be written down: the value of an environment variable, which
// often is a secret, as the beginning of its digest, everything else as it is.
func Redact(fact string) string {
	kind, value, found := strings.Cut(fact, ":")
	if !found {
		return fact
	}
	variable, found := strings.CutPrefix(value, "env:")
	if !found {
		return fact
	}
	// Without a '=' nothing says which part is the secret.
	name, secret, found := strings.Cut(variable, "=")
	if !found {
		name, secret = "", variable
	}
	sum := sha256.Sum256([]byte(secret))
	digest := "sha256:" + hex.EncodeToString(sum[:6])
	if found {
		digest = name + "=" + digest
	}
	return kind + ":env:" + digest
}

// appendString appends a JSON string. Whatever a terminal or a line-based tool might act on is
// escaped: control characters of both sets, line separators, marks that turn text around. Bytes
// that are no UTF-8 become U+FFFD.
func appendString(b []byte, s string) []byte {
	cut := len(s) > MaxField
	if cut {
		s = s[:MaxField]
		for i := 0; i < utf8.UTFMax && len(s) > 0; i++ { // not in the middle of a character
			if r, size := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || size != 1 {
				break
			}
			s = s[:len(s)-1]
		}
	}
	b = append(b, '"')
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			i++
			switch {
			case c == '"' || c == '\\':
				b = append(b, '\\', c)
			case c < 0x20 || c == 0x7f:
				b = appendEscape(b, uint16(c))
			default:
				b = append(b, c)
			}
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		i += size
		switch {
		case r == utf8.RuneError && size == 1:
			b = append(b, `\ufffd`...)
		case unicode.IsPrint(r):
			b = utf8.AppendRune(b, r)
		case r > 0xffff:
			r -= 0x10000
			b = appendEscape(b, uint16(0xd800+(r>>10))) //nolint:gosec // ten bits
			b = appendEscape(b, uint16(0xdc00+(r&0x3ff)))
		default:
			b = appendEscape(b, uint16(r)) //nolint:gosec // checked above
		}
	}
	if cut {
		b = append(b, "…"...)
	}
	return append(b, '"')
}

func appendEscape(b []byte, unit uint16) []byte {
	const digits = "0123456789abcdef"
	return append(b, '\\', 'u', digits[unit>>12], digits[unit>>8&15], digits[unit>>4&15], digits[unit&15])
}
