package trust

import (
	"bytes"
	"crypto"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi/identity"
)

// maxHint is the longest refresh hint that is believed.
const maxHint = 365 * 24 * time.Hour

// parse reads a SPIFFE bundle document of a trust domain. It is taken as a whole: one authority that is
// none refuses it, for a bundle that says something else than its maker meant is worse than yesterday's.
func parse(td spiffeid.TrustDomain, text []byte) (*identity.Bundle, error) {
	// The hint is read here, for seconds that a number of nanoseconds cannot hold.
	var numbers struct {
		Hint *int64            `json:"spiffe_refresh_hint"`
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(text, &numbers); err != nil {
		return nil, refuse("it is no SPIFFE bundle document") // the error would quote what came
	}
	if n := len(numbers.Keys); n > 2*identity.MaxAuthorities {
		return nil, refuse("it has %d authorities, the limit is %d", n, identity.MaxAuthorities)
	}
	if err := unambiguous(text, numbers.Keys); err != nil {
		return nil, err
	}
	doc, err := spiffebundle.Parse(td, text)
	if err != nil {
		return nil, refuse("it is no SPIFFE bundle document: %s", clip(err.Error()))
	}
	b := &identity.Bundle{TrustDomain: td}
	b.Origin, _ = doc.SequenceNumber()
	if numbers.Hint != nil && *numbers.Hint > 0 {
		b.RefreshHint = min(time.Duration(min(*numbers.Hint, int64(maxHint/time.Second)))*time.Second, maxHint)
	}
	certs, keys, wits := doc.X509Authorities(), doc.JWTAuthorities(), doc.WITAuthorities()
	switch n := max(len(certs), len(keys), len(wits)); {
	case n == 0:
		return nil, refuse("it has no authorities")
	case n > identity.MaxAuthorities:
		return nil, refuse("it has %d authorities, the limit is %d", n, identity.MaxAuthorities)
	}
	for _, cert := range certs {
		if err := identity.CheckAuthority(cert); err != nil {
			return nil, refuse("%s", err)
		}
		for _, uri := range cert.URIs {
			if uri.Scheme == "spiffe" && uri.Host != td.Name() {
				return nil, refuse("an authority is of trust domain %q", clip(uri.Host))
			}
		}
		if !b.HasX509(cert) {
			b.X509 = append(b.X509, identity.X509Authority{Certificate: cert})
		}
	}
	if b.JWT, err = checkedKeys("JWT", keys); err != nil {
		return nil, err
	}
	if b.WIT, err = checkedKeys("WIT", wits); err != nil {
		return nil, err
	}
	return b, nil
}

// unambiguous refuses a document that says a thing twice: of two members with one name, or two keys with one ID, each
// reader takes the one it likes (RFC 8259 section 4, RFC 7517 section 4.5), and so what is believed would be the
// reader's to say. The same key twice is the same key.
func unambiguous(text []byte, keys []json.RawMessage) error {
	if name := twice(text); name != "" {
		return refuse("it says %q twice", clip(name))
	}
	seen := map[string]json.RawMessage{}
	for _, key := range keys {
		if name := twice(key); name != "" {
			return refuse("one of its keys says %q twice", clip(name))
		}
		var of struct{ Use, Kid string }
		if json.Unmarshal(key, &of) != nil || of.Kid == "" {
			continue // whatever it is, it is not looked up by its ID
		}
		id := of.Use + " " + of.Kid
		if before, known := seen[id]; known && !bytes.Equal(before, key) {
			return refuse("two of its keys for %q have the ID %q", clip(of.Use), clip(of.Kid))
		}
		seen[id] = key
	}
	return nil
}

// twice returns a name that an object has more than once. Letter case does not tell names apart to every reader.
func twice(object []byte) string {
	in := json.NewDecoder(bytes.NewReader(object))
	if start, err := in.Token(); err != nil || start != json.Delim('{') {
		return ""
	}
	seen := map[string]bool{}
	for in.More() {
		token, err := in.Token()
		name, ok := token.(string)
		var value json.RawMessage
		if err != nil || !ok || in.Decode(&value) != nil {
			return "" // it is no JSON, which is somebody else's to say
		}
		folded := strings.ToLower(name)
		if seen[folded] {
			return name
		}
		seen[folded] = true
	}
	return ""
}

func checkedKeys(kind string, keys map[string]crypto.PublicKey) ([]identity.JWTAuthority, error) {
	var list []identity.JWTAuthority
	for _, id := range slices.Sorted(maps.Keys(keys)) {
		switch err := identity.CheckKey(keys[id]); {
		case err != nil:
			return nil, refuse("%s authority %q: %s", kind, clip(id), err)
		case id == "" || len(id) > identity.MaxKeyID:
			return nil, refuse("a %s authority has a key ID of %d bytes", kind, len(id))
		}
		list = append(list, identity.JWTAuthority{KeyID: id, Key: keys[id]})
	}
	return list, nil
}

// clip keeps a stranger's text from filling a message.
func clip(text string) string {
	const most = 200
	if len(text) > most {
		text = text[:most] + "…"
	}
	return strings.ToValidUTF8(text, "�")
}
