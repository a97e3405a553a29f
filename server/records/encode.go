package records

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/workloadapi/identity"
)

// valueVersion is the first byte of every stored message. A reader refuses versions it does not
// know, and reads all that ever were.
const valueVersion = 1

var marshal = proto.MarshalOptions{Deterministic: true}

func encode(m proto.Message) ([]byte, error) {
	b, err := marshal.MarshalAppend(append(make([]byte, 0, 256), valueVersion), m)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	return b, nil
}

func decode(b []byte, m proto.Message) error {
	if len(b) == 0 {
		return errors.New("no version byte")
	}
	if b[0] != valueVersion {
		return fmt.Errorf("it has version %d, this server knows version %d: it was written by a newer one", b[0], valueVersion)
	}
	return proto.Unmarshal(b[1:], m)
}

// words keeps one copy of strings that many records share: parents, selectors, trust domains. With
// 100,000 entries it is the difference between 40 and 90 MB. It forgets everything when it is full;
// what was handed out stays valid.
type words struct {
	mu   sync.Mutex
	seen map[string]string // mu guards it
}

const (
	maxWords      = 1 << 15
	maxWordLength = 256
)

// one returns a string equal to s, the same one as before if possible.
func (w *words) one(s string) string {
	if s == "" || len(s) > maxWordLength {
		return s
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if known, ok := w.seen[s]; ok {
		return known
	}
	if w.seen == nil || len(w.seen) >= maxWords {
		w.seen = make(map[string]string)
	}
	s = strings.Clone(s)
	w.seen[s] = s
	return s
}

func encodeEntry(e *identity.Entry) ([]byte, error) {
	m := &stored.Entry{
		SpiffeId:    e.SPIFFEID.String(),
		ParentId:    e.ParentID.String(),
		Selectors:   encodeSelectors(e.Selectors),
		X509SvidTtl: uint32(e.X509SVIDTTL / time.Second), //nolint:gosec // identity keeps it in range
		JwtSvidTtl:  uint32(e.JWTSVIDTTL / time.Second),  //nolint:gosec // identity keeps it in range
		DnsNames:    e.DNSNames,
		Hint:        e.Hint,
		Admin:       e.Admin,
		Downstream:  e.Downstream,
		StoreSvid:   e.StoreSVID,
		NoPrefetch:  e.NoPrefetch,
		Jti:         e.JTI,
		ExpiresAt:   unix(e.ExpiresAt),
		CreatedAt:   unix(e.CreatedAt),
		Revision:    e.Revision,
	}
	for _, td := range e.FederatesWith {
		m.FederatesWith = append(m.FederatesWith, td.Name())
	}
	return encode(m)
}

func (w *words) decodeEntry(id string, b []byte) (*identity.Entry, error) {
	var m stored.Entry
	if err := decode(b, &m); err != nil {
		return nil, err
	}
	e := &identity.Entry{
		ID:          id,
		Selectors:   w.decodeSelectors(m.GetSelectors()),
		X509SVIDTTL: time.Duration(m.GetX509SvidTtl()) * time.Second,
		JWTSVIDTTL:  time.Duration(m.GetJwtSvidTtl()) * time.Second,
		DNSNames:    slices.Clip(m.GetDnsNames()),
		Hint:        w.one(m.GetHint()),
		Admin:       m.GetAdmin(),
		Downstream:  m.GetDownstream(),
		StoreSVID:   m.GetStoreSvid(),
		NoPrefetch:  m.GetNoPrefetch(),
		JTI:         m.GetJti(),
		ExpiresAt:   timeOf(m.GetExpiresAt()),
		CreatedAt:   timeOf(m.GetCreatedAt()),
		Revision:    m.GetRevision(),
	}
	var err error
	if e.SPIFFEID, err = spiffeid.FromString(m.GetSpiffeId()); err != nil {
		return nil, fmt.Errorf("SPIFFE ID: %w", err)
	}
	if e.ParentID, err = spiffeid.FromString(w.one(m.GetParentId())); err != nil {
		return nil, fmt.Errorf("parent ID: %w", err)
	}
	if n := len(m.GetFederatesWith()); n > 0 {
		e.FederatesWith = make([]spiffeid.TrustDomain, n)
	}
	for i, name := range m.GetFederatesWith() {
		if e.FederatesWith[i], err = spiffeid.TrustDomainFromString(w.one(name)); err != nil {
			return nil, fmt.Errorf("federated trust domain: %w", err)
		}
	}
	return e, nil
}

func encodeSelectors(set attestor.Set) []*stored.Selector {
	list := make([]*stored.Selector, 0, set.Len())
	for _, s := range set.All() {
		list = append(list, &stored.Selector{Type: s.Type, Value: s.Value})
	}
	return list
}

func (w *words) decodeSelectors(list []*stored.Selector) attestor.Set {
	var few [8]attestor.Selector // NewSet copies
	selectors := few[:0]
	for _, s := range list {
		selectors = append(selectors, attestor.Selector{Type: w.one(s.GetType()), Value: w.one(s.GetValue())})
	}
	return attestor.NewSet(selectors...)
}

func encodeNode(n *Node) ([]byte, error) {
	return encode(&stored.Node{
		Type:         n.Type,
		Serial:       n.Serial,
		NewSerial:    n.NewSerial,
		ExpiresAt:    unix(n.ExpiresAt),
		NewExpiresAt: unix(n.NewExpiresAt),
		Selectors:    encodeSelectors(n.Selectors),
		Banned:       n.Banned,
		CanReattest:  n.CanReattest,
		AgentVersion: n.AgentVersion,
		AttestedAt:   unix(n.AttestedAt),
		Parts:        n.Parts,
		Key:          encodeKey(n.Key),
		NewKey:       encodeKey(n.NewKey),
	})
}

func encodeKey(k attestor.KeyHash) []byte {
	if k == (attestor.KeyHash{}) {
		return nil
	}
	return k[:]
}

func decodeKey(b []byte) (k attestor.KeyHash) {
	copy(k[:], b)
	return k
}

func (w *words) decodeNode(id spiffeid.ID, b []byte) (*Node, error) {
	var m stored.Node
	if err := decode(b, &m); err != nil {
		return nil, err
	}
	return &Node{
		ID:           id,
		Type:         w.one(m.GetType()),
		Serial:       m.GetSerial(),
		NewSerial:    m.GetNewSerial(),
		ExpiresAt:    timeOf(m.GetExpiresAt()),
		NewExpiresAt: timeOf(m.GetNewExpiresAt()),
		Selectors:    w.decodeSelectors(m.GetSelectors()),
		Banned:       m.GetBanned(),
		CanReattest:  m.GetCanReattest(),
		AgentVersion: w.one(m.GetAgentVersion()),
		AttestedAt:   timeOf(m.GetAttestedAt()),
		Parts:        m.GetParts(),
		Key:          decodeKey(m.GetKey()),
		NewKey:       decodeKey(m.GetNewKey()),
	}, nil
}

func encodeBundle(b *identity.Bundle) ([]byte, error) {
	m := &stored.Bundle{RefreshHint: int64(b.RefreshHint / time.Second), Sequence: b.Sequence, Origin: b.Origin, Crls: b.CRLs, Nested: b.Nested}
	for _, a := range b.X509 {
		m.X509 = append(m.X509, &stored.X509Authority{Certificate: a.Certificate.Raw, Tainted: a.Tainted})
	}
	var err error
	if m.Jwt, err = encodeKeys(b.JWT); err != nil {
		return nil, fmt.Errorf("encode JWT %w", err)
	}
	if m.Wit, err = encodeKeys(b.WIT); err != nil {
		return nil, fmt.Errorf("encode WIT %w", err)
	}
	return encode(m)
}

func decodeBundle(td spiffeid.TrustDomain, b []byte) (*identity.Bundle, error) {
	var m stored.Bundle
	if err := decode(b, &m); err != nil {
		return nil, err
	}
	bundle := &identity.Bundle{
		TrustDomain: td,
		RefreshHint: time.Duration(m.GetRefreshHint()) * time.Second,
		Sequence:    m.GetSequence(),
		Origin:      m.GetOrigin(),
		CRLs:        m.GetCrls(),
		Nested:      m.GetNested(),
	}
	for _, a := range m.GetX509() {
		cert, err := x509.ParseCertificate(a.GetCertificate())
		if err != nil {
			return nil, fmt.Errorf("X.509 authority: %w", err)
		}
		bundle.X509 = append(bundle.X509, identity.X509Authority{Certificate: cert, Tainted: a.GetTainted()})
	}
	var err error
	if bundle.JWT, err = decodeKeys(m.GetJwt()); err != nil {
		return nil, fmt.Errorf("JWT %w", err)
	}
	if bundle.WIT, err = decodeKeys(m.GetWit()); err != nil {
		return nil, fmt.Errorf("WIT %w", err)
	}
	return bundle, nil
}

func encodeKeys(list []identity.JWTAuthority) ([]*stored.JWTAuthority, error) {
	var out []*stored.JWTAuthority
	for _, a := range list {
		key, err := x509.MarshalPKIXPublicKey(a.Key)
		if err != nil {
			return nil, fmt.Errorf("authority %q: %w", a.KeyID, err)
		}
		out = append(out, &stored.JWTAuthority{KeyId: a.KeyID, PublicKey: key, ExpiresAt: unix(a.ExpiresAt), Tainted: a.Tainted})
	}
	return out, nil
}

func decodeKeys(list []*stored.JWTAuthority) ([]identity.JWTAuthority, error) {
	var out []identity.JWTAuthority
	for _, a := range list {
		key, err := x509.ParsePKIXPublicKey(a.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("authority %q: %w", a.GetKeyId(), err)
		}
		out = append(out, identity.JWTAuthority{KeyID: a.GetKeyId(), Key: key, ExpiresAt: timeOf(a.GetExpiresAt()), Tainted: a.GetTainted()})
	}
	return out, nil
}

func encodeFederation(f *Federation) ([]byte, error) {
	m := &stored.Federation{Url: f.URL}
	if !f.EndpointID.IsZero() {
		m.EndpointId = f.EndpointID.String()
	}
	return encode(m)
}

func decodeFederation(td spiffeid.TrustDomain, b []byte) (*Federation, error) {
	var m stored.Federation
	if err := decode(b, &m); err != nil {
		return nil, err
	}
	f := &Federation{TrustDomain: td, URL: m.GetUrl()}
	if m.GetEndpointId() != "" {
		var err error
		if f.EndpointID, err = spiffeid.FromString(m.GetEndpointId()); err != nil {
			return nil, fmt.Errorf("endpoint SPIFFE ID: %w", err)
		}
	}
	return f, nil
}

func encodeJournal(j Journal) ([]byte, error) {
	return encode(&stored.Journal{
		Kind:        j.Kind,
		State:       j.State,
		KeyId:       j.KeyID,
		Certificate: j.Certificate,
		PublicKey:   j.PublicKey,
		NotBefore:   unix(j.NotBefore),
		NotAfter:    unix(j.NotAfter),
		CreatedAt:   unix(j.CreatedAt),
		ActivatedAt: unix(j.ActivatedAt),
		Chain:       j.Chain,
		UpstreamId:  j.UpstreamID,
	})
}

func decodeJournal(authorityID string, b []byte) (Journal, error) {
	var m stored.Journal
	if err := decode(b, &m); err != nil {
		return Journal{}, err
	}
	return Journal{
		Kind:        m.GetKind(),
		AuthorityID: authorityID,
		State:       m.GetState(),
		KeyID:       m.GetKeyId(),
		Certificate: m.GetCertificate(),
		PublicKey:   m.GetPublicKey(),
		NotBefore:   timeOf(m.GetNotBefore()),
		NotAfter:    timeOf(m.GetNotAfter()),
		CreatedAt:   timeOf(m.GetCreatedAt()),
		ActivatedAt: timeOf(m.GetActivatedAt()),
		Chain:       m.GetChain(),
		UpstreamID:  m.GetUpstreamId(),
	}, nil
}

func encodeToken(expires time.Time) ([]byte, error) {
	return encode(&stored.Token{ExpiresAt: unix(expires)})
}

func decodeToken(b []byte) (expires time.Time, err error) {
	var m stored.Token
	if err := decode(b, &m); err != nil {
		return time.Time{}, err
	}
	return timeOf(m.GetExpiresAt()), nil
}

func encodeSchema(td spiffeid.TrustDomain, version uint32) ([]byte, error) {
	return encode(&stored.Schema{Version: version, TrustDomain: td.Name()})
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func timeOf(unix int64) time.Time {
	if unix == 0 {
		return time.Time{}
	}
	return time.Unix(unix, 0).UTC()
}
