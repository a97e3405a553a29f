package api

import (
	"errors"
	"slices"
	"strings"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// errClaims is what the maker of an entry is told that anybody could come to.
var errClaims = errors.New("its selectors are all claims that whoever starts or builds a container can write " +
	"(labels, environment variables, names of images): add one that is proved, such as image:id, prov:policy, sig:policy or unix:sha256; " +
	"require_evidence = \"signed\" asks for that")

// claims are the selectors, by type and the beginning of the value, whose value is not proved by anything:
// who starts a container, or builds an image, writes them.
var claims = map[string][]string{
	"claim":  {""},
	"docker": {"label:", "env:", "image_id:"},
	"k8s":    {"pod-label:", "pod-annotation:", "pod-name:", "container-name:", "container-image:", "pod-image:"},
}

func isClaim(s attestor.Selector) bool {
	return slices.ContainsFunc(claims[s.Type], func(prefix string) bool { return strings.HasPrefix(s.Value, prefix) })
}

// restsOnClaims reports whether nothing that the entry demands is proved.
func restsOnClaims(e *identity.Entry) bool {
	return !slices.ContainsFunc(e.Selectors.All(), func(s attestor.Selector) bool { return !isClaim(s) })
}

// scanStatus is how a selector begins that says what a policy makes of an image, good or bad.
const scanStatus = "status:"

// onlyStatus reports whether the entry is for images of which a policy says nothing good: an identity for
// quarantine, or a mistake.
func onlyStatus(e *identity.Entry) bool {
	bad, good := false, false
	for _, s := range e.Selectors.All() {
		if s.Type != identity.ScanType {
			continue
		}
		status, ok := strings.CutPrefix(s.Value, scanStatus)
		_, word, _ := strings.Cut(status, ":")
		switch {
		case !ok, word == "pass", word == "grace", word == "exempt":
			good = true
		default:
			bad = true
		}
	}
	return bad && !good && !strings.Contains(e.SPIFFEID.Path(), "quarantine") && !strings.Contains(e.Hint, "quarantine")
}

// selectorTypes are the types of the entry's selectors.
func selectorTypes(e *identity.Entry) []string {
	var types []string
	for _, s := range e.Selectors.All() { // in order of types
		if n := len(types); n == 0 || types[n-1] != s.Type {
			types = append(types, s.Type)
		}
	}
	return types
}

// lint refuses entries that rest on claims alone where that is asked for, and warns of what is probably
// not meant.
func (a *API) lint(e *identity.Entry) error {
	log := a.cfg.Log
	if log != nil {
		log = log.WithField("entry_id", e.ID).WithField("spiffe_id", e.SPIFFEID.String())
	}
	if restsOnClaims(e) {
		if a.cfg.RequireSigned {
			return errClaims
		}
		if log != nil {
			// Their values may hold what was never meant to leave the container's environment.
			log.WithField("selector_types", selectorTypes(e)).Warn("The entry rests on claims alone: whoever starts or builds a container can have its identity")
		}
	}
	if onlyStatus(e) && log != nil {
		log.Warn("The entry is for images that a scan policy does not allow; if it is an identity for quarantine, put that word into its path or hint")
	}
	return nil
}
