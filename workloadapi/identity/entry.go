package identity

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/attestor"
)

// Limits of an entry, beyond those of its SPIFFE IDs and selectors. The first two are SPIRE's.
const (
	MaxEntryID      = 255  // bytes
	MaxHint         = 1024 // bytes
	MaxSelectors    = 1000
	MaxDNSNames     = 500
	MaxFederates    = 500
	maxTTLInSeconds = 1<<31 - 1
)

// Entry says: who shows these selectors below this parent gets this SPIFFE ID. It is immutable once
// published; copy it to change it.
type Entry struct {
	ID       string
	SPIFFEID spiffeid.ID // what is given
	// ParentID is the agent whose workloads may have it, or the entry of an alias that agents have, or the server's
	// own ID for entries of agents.
	ParentID      spiffeid.ID
	Selectors     attestor.Set           // all of them must be shown; at least one
	X509SVIDTTL   time.Duration          // whole seconds; 0: the server's default
	JWTSVIDTTL    time.Duration          // whole seconds; 0: the server's default
	FederatesWith []spiffeid.TrustDomain // whose bundles the workload gets beside its own
	DNSNames      []string               // go into the certificate; the first is its common name too
	Hint          string                 // for the workload, to tell several identities apart
	Admin         bool                   // may administer the server
	Downstream    bool                   // may have a CA certificate: a server below
	// StoreSVID is SPIRE's, for SVIDs that its agents push elsewhere: the Workload API gives them to nobody.
	StoreSVID bool
	// NoPrefetch keeps the agent from asking for the X509-SVID before somebody wants it.
	NoPrefetch bool
	// JTI puts a fresh jti claim in every JWT-SVID, which are then never cached.
	JTI       bool
	ExpiresAt time.Time // whole seconds; zero: never
	CreatedAt time.Time // whole seconds
	// Revision starts at 0 and grows by one with each update. Not to be mistaken for a kv.Rev.
	Revision int64
}

// Expired reports whether the entry's own expiry has passed.
func (e *Entry) Expired(now time.Time) bool {
	return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt)
}

// Older orders entries by age: the first of several matching entries is the workload's default
// identity, and a younger entry must not take that place. Entries of one second are ordered by ID.
func Older(a, b *Entry) int {
	if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
		return c
	}
	switch {
	case a.ID < b.ID:
		return -1
	case a.ID > b.ID:
		return 1
	}
	return 0
}

// EntryFromWire parses an entry. It checks what makes an Entry a well-formed value (IDs parse,
// selectors and times are sane, limits hold); what a trust domain's rules ask beyond that is the
// API's to say. The error names the field.
func EntryFromWire(w *types.Entry) (*Entry, error) {
	if w == nil {
		return nil, errors.New("missing entry")
	}
	e := &Entry{
		ID:         w.GetId(),
		DNSNames:   slices.Clone(w.GetDnsNames()),
		Hint:       w.GetHint(),
		Admin:      w.GetAdmin(),
		Downstream: w.GetDownstream(),
		StoreSVID:  w.GetStoreSvid(),
		NoPrefetch: w.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
		JTI:        w.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
		Revision:   w.GetRevisionNumber(),
	}
	var err error
	if e.SPIFFEID, err = IDFromWire(w.GetSpiffeId()); err != nil {
		return nil, fmt.Errorf("invalid spiffe ID: %w", err)
	}
	// An agent asks for its entries without the parent.
	if w.GetParentId() != nil {
		if e.ParentID, err = IDFromWire(w.GetParentId()); err != nil {
			return nil, fmt.Errorf("invalid parent ID: %w", err)
		}
	}
	if e.Selectors, err = SelectorsFromWire(w.GetSelectors()); err != nil {
		return nil, err
	}
	if e.X509SVIDTTL, err = seconds(int64(w.GetX509SvidTtl())); err != nil {
		return nil, fmt.Errorf("invalid X509-SVID TTL: %w", err)
	}
	if e.JWTSVIDTTL, err = seconds(int64(w.GetJwtSvidTtl())); err != nil {
		return nil, fmt.Errorf("invalid JWT-SVID TTL: %w", err)
	}
	if e.FederatesWith, err = trustDomains(w.GetFederatesWith()); err != nil {
		return nil, err
	}
	if e.ExpiresAt, err = unixTime(w.GetExpiresAt()); err != nil {
		return nil, fmt.Errorf("invalid expiry: %w", err)
	}
	if e.CreatedAt, err = unixTime(w.GetCreatedAt()); err != nil {
		return nil, fmt.Errorf("invalid creation time: %w", err)
	}
	switch {
	case len(e.ID) > MaxEntryID:
		return nil, fmt.Errorf("invalid entry ID: %d bytes long, the limit is %d", len(e.ID), MaxEntryID)
	case len(e.Hint) > MaxHint:
		return nil, fmt.Errorf("hint is too long, max length is %d characters", MaxHint)
	case len(e.DNSNames) > MaxDNSNames:
		return nil, fmt.Errorf("invalid DNS names: %d of them, the limit is %d", len(e.DNSNames), MaxDNSNames)
	case e.Revision < 0:
		return nil, errors.New("invalid revision number: negative")
	}
	return e, nil
}

// Wire returns the whole entry in its public form.
func (e *Entry) Wire() *types.Entry {
	w := &types.Entry{
		Id:             e.ID,
		SpiffeId:       IDWire(e.SPIFFEID),
		Selectors:      SelectorsWire(e.Selectors),
		X509SvidTtl:    int32(e.X509SVIDTTL / time.Second), //nolint:gosec // seconds() keeps it in range
		JwtSvidTtl:     int32(e.JWTSVIDTTL / time.Second),  //nolint:gosec // seconds() keeps it in range
		Admin:          e.Admin,
		Downstream:     e.Downstream,
		StoreSvid:      e.StoreSVID,
		DnsNames:       slices.Clone(e.DNSNames),
		Hint:           e.Hint,
		RevisionNumber: e.Revision,
		ExpiresAt:      unixSeconds(e.ExpiresAt),
		CreatedAt:      unixSeconds(e.CreatedAt),
	}
	if !e.ParentID.IsZero() {
		w.ParentId = IDWire(e.ParentID)
	}
	for _, td := range e.FederatesWith {
		w.FederatesWith = append(w.FederatesWith, td.Name())
	}
	if e.NoPrefetch || e.JTI {
		w.AdditionalAttributes = &types.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: e.NoPrefetch,
			JwtSvidIncludeJti:       e.JTI,
		}
	}
	return w
}

func seconds(n int64) (time.Duration, error) {
	if n < 0 {
		return 0, errors.New("negative")
	}
	if n > maxTTLInSeconds {
		return 0, errors.New("too large")
	}
	return time.Duration(n) * time.Second, nil
}

// maxUnix is the end of year 9999, the last that an X.509 time can say (RFC 5280 4.1.2.5.2).
const maxUnix = 253402300799

func unixTime(n int64) (time.Time, error) {
	switch {
	case n == 0:
		return time.Time{}, nil
	case n < 0:
		return time.Time{}, errors.New("negative")
	case n > maxUnix:
		return time.Time{}, errors.New("after the year 9999")
	}
	return time.Unix(n, 0).UTC(), nil
}

func unixSeconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// trustDomains parses names or IDs of trust domains; the result is sorted and without duplicates.
func trustDomains(names []string) ([]spiffeid.TrustDomain, error) {
	if len(names) == 0 {
		return nil, nil
	}
	if len(names) > MaxFederates {
		return nil, fmt.Errorf("invalid federated trust domains: %d of them, the limit is %d", len(names), MaxFederates)
	}
	tds := make([]spiffeid.TrustDomain, 0, len(names))
	for _, name := range names {
		td, err := ParseTrustDomain(name)
		if err != nil {
			return nil, fmt.Errorf("invalid federated trust domain: %w", err)
		}
		tds = append(tds, td)
	}
	slices.SortFunc(tds, spiffeid.TrustDomain.Compare)
	return slices.Compact(tds), nil
}
