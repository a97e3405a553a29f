package keep

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Own is the agent's own SVID.
type Own struct {
	// Chain is the leaf and the intermediates, without the root.
	Chain []*x509.Certificate
	Key   crypto.Signer
	// Reattestable says that the server wants the agent to attest again where others renew.
	Reattestable bool
}

// ID returns the agent's SPIFFE ID.
func (o *Own) ID() (spiffeid.ID, error) {
	if len(o.Chain) == 0 || len(o.Chain[0].URIs) != 1 {
		return spiffeid.ID{}, errors.New("agent certificate does not have one URI")
	}
	return spiffeid.FromURI(o.Chain[0].URIs[0])
}

type ownJSON struct {
	Version      int      `json:"version"`
	Chain        [][]byte `json:"chain"`
	Key          []byte   `json:"key,omitempty"`       // PKCS #8
	TPM          *blob    `json:"tpm,omitempty"`       // in place of Key: it lives in the TPM
	Elsewhere    *placed  `json:"elsewhere,omitempty"` // likewise: in a plugin
	Reattestable bool     `json:"reattestable"`
}

// Own returns the kept SVID of the agent, or nil. Whether it is still valid is the caller's to say.
func (k *Keep) Own() *Own {
	var stored ownJSON
	if !k.load(ownFile, &stored) {
		return nil
	}
	own, err := stored.parse(k.keys)
	if err != nil {
		k.spoilt(ownFile, err)
		return nil
	}
	return own
}

func (s *ownJSON) parse(keys *Keys) (*Own, error) {
	if s.Version != jsonVersion {
		return nil, fmt.Errorf("version %d: %w", s.Version, errVersion)
	}
	own := &Own{Reattestable: s.Reattestable}
	for _, der := range s.Chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parse certificate: %w", err)
		}
		own.Chain = append(own.Chain, cert)
	}
	var err error
	switch {
	case len(own.Chain) == 0:
		return nil, errors.New("there is no certificate")
	case s.TPM != nil && keys.tpm == nil:
		return nil, errors.New("its key is in the TPM, and the key manager is another")
	case s.TPM != nil:
		own.Key, err = keys.tpm.key(s.TPM)
	case s.Elsewhere != nil:
		own.Key, err = keys.elsewhere.open(*s.Elsewhere, own.Chain[0].PublicKey)
	default:
		own.Key, err = parseKey(s.Key)
	}
	if err != nil {
		return nil, err
	}
	if _, err := own.ID(); err != nil {
		return nil, err
	}
	if !samePublic(own.Key, own.Chain[0]) {
		return nil, errors.New("key is not the certificate's")
	}
	return own, nil
}

// SaveOwn keeps the agent's SVID and returns when it is on disk.
func (k *Keep) SaveOwn(own *Own) error {
	stored := ownJSON{Version: jsonVersion, Reattestable: own.Reattestable}
	switch key := own.Key.(type) {
	case *tpmKey:
		stored.TPM = key.blob
	case *placedKey:
		stored.Elsewhere = &key.placed
	default:
		var err error
		if stored.Key, err = x509.MarshalPKCS8PrivateKey(own.Key); err != nil {
			return fmt.Errorf("marshal agent key: %w", err)
		}
	}
	for _, cert := range own.Chain {
		stored.Chain = append(stored.Chain, cert.Raw)
	}
	if stored.Elsewhere != nil && k.keys.elsewhere != nil {
		k.keys.elsewhere.use(stored.Elsewhere.Place) // it will be in use, also if it cannot be kept
	}
	return k.save(ownFile, stored)
}

// DropOwn forgets the agent's SVID.
func (k *Keep) DropOwn() error {
	k.fileMu.Lock()
	defer k.fileMu.Unlock()
	err := os.Remove(filepath.Join(k.dir, ownFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("drop agent SVID: %w", err)
	}
	return nil
}

type bundleJSON struct {
	Version int    `json:"version"`
	Bundle  []byte `json:"bundle"` // types.Bundle
}

// Bundle returns the kept bundle of the own trust domain, or nil.
func (k *Keep) Bundle() *identity.Bundle {
	var stored bundleJSON
	if !k.load(bundleFile, &stored) {
		return nil
	}
	if stored.Version != jsonVersion {
		k.spoilt(bundleFile, fmt.Errorf("version %d: %w", stored.Version, errVersion))
		return nil
	}
	b, err := parseBundle(stored.Bundle)
	if err != nil {
		k.spoilt(bundleFile, err)
		return nil
	}
	return b
}

// SaveBundle keeps the bundle of the own trust domain and returns when it is on disk.
func (k *Keep) SaveBundle(b *identity.Bundle) error {
	raw, err := marshalBundle(b)
	if err != nil {
		return err
	}
	return k.save(bundleFile, bundleJSON{Version: jsonVersion, Bundle: raw})
}

// Picture is the agent's picture at a revision.
type Picture struct {
	StoreID string // the store that Rev belongs to; empty: a SPIRE server, which has none
	Rev     uint64
	Entries []*identity.Entry
	Bundles []*identity.Bundle
	// Verdicts are on the images that run at the node.
	Verdicts []*identity.Verdict
	// HeardAt is when this was last known to be the server's picture; zero: unknown.
	HeardAt time.Time
}

type pictureJSON struct {
	Version  int      `json:"version"`
	StoreID  string   `json:"store_id"`
	Rev      uint64   `json:"rev"`
	Entries  [][]byte `json:"entries"`            // types.Entry
	Bundles  [][]byte `json:"bundles"`            // types.Bundle
	Verdicts [][]byte `json:"verdicts,omitempty"` // feedv1.Verdict
	HeardAt  int64    `json:"heard_at,omitempty"` // Unix seconds
	// CRLs are those of the bundles by trust domain, DER.
	CRLs map[string][][]byte `json:"crl_lists,omitempty"`
	// Nested are the trust domains of which servers below sign too.
	Nested []string `json:"nested,omitempty"`
}

// Picture returns the kept picture, or nil.
func (k *Keep) Picture() *Picture {
	var stored pictureJSON
	if !k.load(pictureFile, &stored) {
		return nil
	}
	p, err := stored.parse()
	if err != nil {
		k.spoilt(pictureFile, err)
		return nil
	}
	return p
}

func (s *pictureJSON) parse() (*Picture, error) {
	if s.Version != jsonVersion {
		return nil, fmt.Errorf("version %d: %w", s.Version, errVersion)
	}
	p := &Picture{StoreID: s.StoreID, Rev: s.Rev}
	for _, raw := range s.Entries {
		w := new(types.Entry)
		if err := proto.Unmarshal(raw, w); err != nil {
			return nil, fmt.Errorf("unmarshal entry: %w", err)
		}
		e, err := identity.EntryFromWire(w)
		if err != nil {
			return nil, fmt.Errorf("parse entry: %w", err)
		}
		p.Entries = append(p.Entries, e)
	}
	for _, raw := range s.Bundles {
		b, err := parseBundle(raw)
		if err != nil {
			return nil, err
		}
		b.CRLs = s.CRLs[b.TrustDomain.Name()]
		b.Nested = slices.Contains(s.Nested, b.TrustDomain.Name())
		p.Bundles = append(p.Bundles, b)
	}
	for _, raw := range s.Verdicts {
		w := new(feedv1.Verdict)
		if err := proto.Unmarshal(raw, w); err != nil {
			return nil, fmt.Errorf("unmarshal verdict: %w", err)
		}
		v, err := identity.VerdictFromWire(w)
		if err != nil {
			return nil, fmt.Errorf("parse verdict: %w", err)
		}
		p.Verdicts = append(p.Verdicts, v)
	}
	if s.HeardAt != 0 {
		p.HeardAt = time.Unix(s.HeardAt, 0)
	}
	return p, nil
}

// SavePicture keeps the picture soon. Its content must not change any more.
func (k *Keep) SavePicture(p *Picture) {
	k.soonest(pictureFile, func() (any, error) {
		stored := pictureJSON{Version: jsonVersion, StoreID: p.StoreID, Rev: p.Rev}
		for _, e := range p.Entries {
			raw, err := proto.Marshal(e.Wire())
			if err != nil {
				return nil, fmt.Errorf("marshal entry: %w", err)
			}
			stored.Entries = append(stored.Entries, raw)
		}
		for _, b := range p.Bundles {
			raw, err := marshalBundle(b)
			if err != nil {
				return nil, err
			}
			stored.Bundles = append(stored.Bundles, raw)
			if b.Nested {
				stored.Nested = append(stored.Nested, b.TrustDomain.Name())
			}
			if len(b.CRLs) > 0 {
				if stored.CRLs == nil {
					stored.CRLs = map[string][][]byte{}
				}
				stored.CRLs[b.TrustDomain.Name()] = b.CRLs
			}
		}
		for _, v := range p.Verdicts {
			raw, err := proto.Marshal(v.Wire())
			if err != nil {
				return nil, fmt.Errorf("marshal verdict: %w", err)
			}
			stored.Verdicts = append(stored.Verdicts, raw)
		}
		if !p.HeardAt.IsZero() {
			stored.HeardAt = p.HeardAt.Unix()
		}
		return stored, nil
	})
}

// SVID is a workload's SVID and what the entry was when it was signed: for one that is another by now, it is to be
// replaced.
type SVID struct {
	SVID           *identity.X509SVID
	EntryRevision  int64
	EntryCreatedAt time.Time // whole seconds
}

type svidsJSON struct {
	Version int        `json:"version"`
	SVIDs   []svidJSON `json:"svids"`
}

type svidJSON struct {
	EntryID   string   `json:"entry_id"`
	ID        string   `json:"spiffe_id"`
	Chain     [][]byte `json:"chain"`
	Key       []byte   `json:"key"` // PKCS #8
	Hint      string   `json:"hint,omitempty"`
	Revision  int64    `json:"entry_revision"`
	CreatedAt int64    `json:"entry_created_at"` // Unix seconds
}

// SVIDs returns the kept SVIDs of workloads. Those that have expired are among them.
func (k *Keep) SVIDs() []SVID {
	var stored svidsJSON
	if !k.load(svidsFile, &stored) {
		return nil
	}
	if stored.Version != jsonVersion {
		k.spoilt(svidsFile, fmt.Errorf("version %d: %w", stored.Version, errVersion))
		return nil
	}
	svids := make([]SVID, 0, len(stored.SVIDs))
	for i := range stored.SVIDs {
		s, err := stored.SVIDs[i].parse()
		if err != nil {
			k.spoilt(svidsFile, err)
			return nil
		}
		svids = append(svids, s)
	}
	return svids
}

func (s *svidJSON) parse() (SVID, error) {
	id, err := spiffeid.FromString(s.ID)
	if err != nil {
		return SVID{}, fmt.Errorf("parse SVID: %w", err)
	}
	if len(s.Chain) == 0 {
		return SVID{}, errors.New("parse SVID: no certificate")
	}
	leaf, err := x509.ParseCertificate(s.Chain[0])
	if err != nil {
		return SVID{}, fmt.Errorf("parse SVID: %w", err)
	}
	key, err := parseKey(s.Key)
	if err != nil {
		return SVID{}, err
	}
	if !samePublic(key, leaf) {
		return SVID{}, errors.New("parse SVID: key is not the certificate's")
	}
	created := time.Time{}
	if s.CreatedAt != 0 {
		created = time.Unix(s.CreatedAt, 0).UTC()
	}
	return SVID{
		SVID: &identity.X509SVID{
			EntryID: s.EntryID, ID: id, Chain: s.Chain, Key: key, KeyDER: s.Key,
			NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, Hint: s.Hint,
		},
		EntryRevision: s.Revision, EntryCreatedAt: created,
	}, nil
}

// SaveSVIDs keeps what all returns, soon. It is called from Run's goroutine, once for many calls.
func (k *Keep) SaveSVIDs(all func() []SVID) {
	k.soonest(svidsFile, func() (any, error) {
		stored := svidsJSON{Version: jsonVersion}
		for _, s := range all() {
			created := int64(0)
			if !s.EntryCreatedAt.IsZero() {
				created = s.EntryCreatedAt.Unix()
			}
			stored.SVIDs = append(stored.SVIDs, svidJSON{
				EntryID: s.SVID.EntryID, ID: s.SVID.ID.String(), Chain: s.SVID.Chain, Key: s.SVID.KeyDER,
				Hint: s.SVID.Hint, Revision: s.EntryRevision, CreatedAt: created,
			})
		}
		return stored, nil
	})
}

func parseKey(der []byte) (crypto.Signer, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("parse key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("parse key: %T cannot sign", key)
	}
	return signer, nil
}

func samePublic(key crypto.Signer, cert *x509.Certificate) bool {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(cert.PublicKey)
}

func parseBundle(raw []byte) (*identity.Bundle, error) {
	w := new(types.Bundle)
	if err := proto.Unmarshal(raw, w); err != nil {
		return nil, fmt.Errorf("unmarshal bundle: %w", err)
	}
	b, err := identity.BundleFromWire(w)
	if err != nil {
		return nil, fmt.Errorf("parse bundle: %w", err)
	}
	return b, nil
}

func marshalBundle(b *identity.Bundle) ([]byte, error) {
	w, err := b.Wire()
	if err != nil {
		return nil, err
	}
	raw, err := proto.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("marshal bundle: %w", err)
	}
	return raw, nil
}
