package identity

import "errors"

// ErrUnavailable says that an identity exists but cannot be had at the moment: the server cannot be
// reached and nothing that is still valid is held.
var ErrUnavailable = errors.New("identity is not available at the moment")

// ErrUnsupported says that the server does not sign what is asked for, to nobody.
var ErrUnsupported = errors.New("the server does not issue this kind of SVID")

// ErrUnknownEntry says that the server does not grant an entry to the agent that asked: it was deleted,
// or the server has not heard of it yet. The next picture says which.
var ErrUnknownEntry = errors.New("entry is not known to the server")

// X509Context is everything a workload's X.509 stream carries at one moment. It is immutable.
type X509Context struct {
	// SVIDs are ordered by the age of their entries, the oldest, which is the default, first.
	SVIDs []*X509SVID
	// Bundle is the own trust domain's.
	Bundle *Bundle
	// Federated are the bundles of the trust domains that the matching entries federate with.
	Federated []*Bundle
	// Rev is the server's revision that this context reflects.
	Rev uint64
}

// BundleSet is everything a bundle stream carries at one moment. It is immutable.
type BundleSet struct {
	Own *Bundle // of the own trust domain
	// Federated are the bundles of the trust domains that the matching entries federate with.
	Federated []*Bundle
	// Matched is the number of entries the caller matches; 0 means it has no identity.
	Matched int
	// Rev is the server's revision that this set reflects.
	Rev uint64
}
