package sds

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"sync"
	"time"

	"github.com/assay-id/assay/workloadapi/identity"
)

// What Config.CRL can be.
const (
	CRLAuto   = "auto"
	CRLAlways = "always"
	CRLNever  = "never"
)

// revocations are the lists of revoked certificates of a trust domain: none while nothing is revoked.
type revocations struct {
	lists []byte // PEM
	// listed says that each authority of the bundle has one; whole, that besides whoever signs for the trust
	// domain has. Envoy refuses everything that another one signed, once it is given a list at all.
	listed, whole bool
}

// reader reads lists once for all who are given the same bundle: there may be many on a node, and a list may
// have 100,000 lines.
type reader struct {
	mu   sync.Mutex // guards the rest
	last *identity.Bundle
	read revocations
}

func (r *reader) of(b *identity.Bundle, now time.Time) revocations {
	if len(b.CRLs) == 0 {
		return revocations{}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last != b {
		r.last, r.read = b, newRevocations(b, now)
	}
	return r.read
}

func newRevocations(b *identity.Bundle, now time.Time) revocations {
	r, any := revocations{listed: true}, false
	listed := map[string]bool{}
	for _, der := range b.CRLs {
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			return revocations{} // Envoy would refuse the bundle with it
		}
		any = any || len(list.RevokedCertificateEntries) > 0
		listed[string(list.AuthorityKeyId)] = true
		r.lists = append(r.lists, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
	}
	if !any {
		return revocations{} // an Envoy without lists refuses no more, and does not depend on the next ones
	}
	for _, a := range b.X509 {
		// One that has expired verifies nothing, and has no list any more.
		if now.Before(a.Certificate.NotAfter) && (len(a.Certificate.SubjectKeyId) == 0 || !listed[string(a.Certificate.SubjectKeyId)]) {
			r.listed = false
		}
	}
	r.whole = r.listed && !b.Nested
	return r
}

// given returns the lists that a client is given with plain authorities, or for Envoy's SPIFFE validator, which
// looks for a list of each authority up to the root: without one of it, it would refuse everything.
func (r *revocations) given(how string, plain bool) []byte {
	if r.whole && how != CRLNever || how == CRLAlways && (plain || r.listed) {
		return r.lists
	}
	return nil
}

// withLists returns authorities and their lists in one file, which is how Envoy's SPIFFE validator takes
// them: what its configuration has for lists, it reads in validation contexts of the other kind only.
func withLists(authorities, lists []byte) []byte {
	return bytes.Join([][]byte{authorities, lists}, nil)
}
