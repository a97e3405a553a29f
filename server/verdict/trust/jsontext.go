package trust

import (
	"encoding/json"
	"strings"
	"unicode/utf8"
)

// checkJSON refuses what two readers could read differently or one could choke on: bad syntax, bytes
// that are not UTF-8, a key twice in one object, nesting deeper than maxDepth. What it lets pass means
// the same to encoding/json with exact keys, to protojson and to us.
func checkJSON(data []byte) error {
	if !utf8.Valid(data) {
		return refuse(ErrMalformed, "the JSON is not UTF-8")
	}
	var whole json.RawMessage
	if err := json.Unmarshal(data, &whole); err != nil {
		return refuse(ErrMalformed, "not JSON: %w", err)
	}
	return checkKeys(data)
}

// frame is an object or array that is open.
type frame struct {
	keys map[string]struct{} // nil for an array
	key  bool                // the next string is a key
}

// checkKeys walks over JSON whose syntax is known to be right.
func checkKeys(data []byte) error {
	var open []frame
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '{', '[':
			if len(open) == maxDepth {
				return refuse(ErrMalformed, "the JSON is nested deeper than %d", maxDepth)
			}
			if data[i] == '{' {
				open = append(open, frame{keys: map[string]struct{}{}, key: true})
			} else {
				open = append(open, frame{})
			}
		case '}', ']':
			open = open[:len(open)-1]
		case ',':
			top := &open[len(open)-1]
			top.key = top.keys != nil
		case '"':
			end := stringEnd(data, i)
			if len(open) > 0 {
				if err := open[len(open)-1].take(data[i:end]); err != nil {
					return err
				}
			}
			i = end - 1
		}
	}
	return nil
}

// stringEnd returns the index after the string that begins at i.
func stringEnd(data []byte, i int) int {
	for i++; data[i] != '"'; i++ {
		if data[i] == '\\' {
			i++
		}
	}
	return i + 1
}

// take looks at a string within an object or array.
func (f *frame) take(quoted []byte) error {
	if !f.key {
		return nil
	}
	f.key = false
	key := string(quoted[1 : len(quoted)-1])
	if strings.ContainsRune(key, '\\') {
		if err := json.Unmarshal(quoted, &key); err != nil {
			return refuse(ErrMalformed, "not JSON: %w", err)
		}
	}
	if _, twice := f.keys[key]; twice {
		return refuse(ErrMalformed, "the JSON has the key %q twice in one object", clip(key))
	}
	f.keys[key] = struct{}{}
	return nil
}

// members returns the members of a JSON object under their exact keys, unlike decoding into a struct,
// which also takes "Subject" for "subject".
func members(data []byte, what string) (map[string]json.RawMessage, error) {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(data, &m); err != nil || m == nil {
		return nil, refuse(ErrMalformed, "%s is no JSON object", what)
	}
	return m, nil
}

// text returns a member that must be a string; absent and null are "".
func text(m map[string]json.RawMessage, key, what string) (string, error) {
	raw, ok := m[key]
	if !ok || string(raw) == "null" {
		return "", nil
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", refuse(ErrMalformed, "%s: its %s is no string", what, key)
	}
	return s, nil
}
