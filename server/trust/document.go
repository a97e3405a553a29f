package trust

import (
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
