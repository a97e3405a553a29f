package trust

import (
	"bytes"
	"encoding/json"

	"github.com/assay-id/assay/server/verdict/report"
)

// object is a JSON object's members under their exact keys, unlike decoding into a struct, which also takes
// "Subject" for "subject". Its JSON was checked by report: good syntax, UTF-8, no key twice, not too deep.
// So it means the same to encoding/json, to protojson and to us.
type object map[string][]byte

// topOf checks a whole document. One that is no object has no members.
func topOf(data []byte) (object, error) {
	top, err := report.Top(data)
	if err != nil {
		return nil, refuse(ErrMalformed, "unreadable JSON: %w", oneLine(err))
	}
	return top, nil
}

// objectOf returns the members of a value within a document that was checked.
func objectOf(value []byte, what string) (object, error) {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(value, &m); err != nil || m == nil {
		return nil, refuse(ErrMalformed, "%s is no JSON object", what)
	}
	o := make(object, len(m))
	for k, v := range m {
		o[k] = v
	}
	return o, nil
}

// text returns a member that must be a string; absent and null are "".
func (o object) text(key, what string) (string, error) {
	raw, ok := o[key]
	if !ok || string(raw) == "null" {
		return "", nil
	}
	if len(raw) >= 2 && raw[0] == '"' && bytes.IndexByte(raw, '\\') < 0 {
		return string(raw[1 : len(raw)-1]), nil // a payload of megabytes is plain base64
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", refuse(ErrMalformed, "%s: its %s is no string", what, key)
	}
	return s, nil
}
