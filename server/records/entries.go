package records

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Entry returns the entry with the ID, or ErrNotFound.
func (r *Records) Entry(ctx context.Context, id string) (*identity.Entry, error) {
	e, _, err := r.entry(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("read entry: %w", err)
	}
	return e, nil
}

func (r *Records) entry(ctx context.Context, id string) (*identity.Entry, kv.Rev, error) {
	key := entryKey(id)
	item, found, err := r.get(ctx, key)
	switch {
	case err != nil:
		return nil, 0, err
	case !found:
		return nil, 0, ErrNotFound
	}
	e, err := r.words.decodeEntry(id, item.Value)
	if err != nil {
		return nil, 0, damaged(key, err)
	}
	return e, item.Rev, nil
}

// CreateEntries creates entries, each for itself: what is wrong with one is in its result and stops
// no other. It sets CreatedAt and Revision, and the ID of an entry that has none. An entry that is
// similar to an existing one, or has its ID, gets ErrExists and the existing one; one that federates
// with a trust domain whose bundle is not stored gets a *MissingBundleError. The revision is that of
// the last commit it took, 0 for none. The error is not nil only if nothing was tried.
func (r *Records) CreateEntries(ctx context.Context, entries []*identity.Entry) ([]EntryResult, kv.Rev, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, fmt.Errorf("create entries: %w", err)
	}
	results := make([]EntryResult, len(entries))
	now := r.cfg.Now().UTC()
	bundles := r.bundleChecker(ctx)
	var pending []*piece
	for i, e := range entries {
		e, err := draft(e, now)
		if err == nil {
			err = bundles(e)
		}
		var txn kv.Txn
		if err == nil {
			txn, err = creation(e)
		}
		results[i] = EntryResult{Entry: e, Err: err}
		if err != nil {
			results[i].Entry = nil
			continue
		}
		pending = append(pending, &piece{at: i, txn: txn})
	}
	var last kv.Rev
	for len(pending) > 0 {
		// Two similar entries of one batch cannot be in one transaction; the second learns what
		// became of the first.
		round, later := distinct(pending)
		r.commit(ctx, round)
		again := settle(round, func(p *piece) error {
			existing, err := r.existing(ctx, results[p.at].Entry)
			if err == nil && existing != nil {
				results[p.at].Entry, err = existing, ErrExists
			}
			return err
		})
		waits := make(map[*piece]bool, len(again))
		for _, p := range again {
			waits[p] = true
		}
		fates := map[string]EntryResult{} // of those that are settled, by key
		for _, p := range round {
			if p.err == nil {
				last = max(last, p.rev)
			} else if results[p.at].Err = p.err; !errors.Is(p.err, ErrExists) {
				results[p.at].Entry = nil
			}
			if !waits[p] {
				note(fates, p, results[p.at])
			}
		}
		later = slices.DeleteFunc(later, func(p *piece) bool { return follows(fates, p, results) })
		pending = append(again, later...)
	}
	return results, last, nil
}

// note remembers what became of an entry under the keys that no other may have. Without it a batch of
// equal entries would be tried one by one, each with a look at all that are left.
func note(fates map[string]EntryResult, p *piece, r EntryResult) {
	if r.Entry == nil {
		for _, c := range p.txn.If {
			fates[c.Key] = r
		}
		return
	}
	r.Err = ErrExists
	fates[entryKey(r.Entry.ID)] = r
	fates[similarKey(r.Entry)] = r
}

// follows settles an entry that one before it has settled: it exists now, or failed for the same
// reason.
func follows(fates map[string]EntryResult, p *piece, results []EntryResult) bool {
	e := results[p.at].Entry
	for _, key := range []string{similarKey(e), entryKey(e.ID)} {
		if r, ok := fates[key]; ok {
			results[p.at] = r
			return true
		}
	}
	return false
}

// draft returns the entry as it will be stored.
func draft(e *identity.Entry, now time.Time) (*identity.Entry, error) {
	if e == nil {
		return nil, errors.New("missing entry")
	}
	d := *e
	d.FederatesWith, d.DNSNames = slices.Clone(e.FederatesWith), slices.Clone(e.DNSNames)
	d.ExpiresAt = d.ExpiresAt.UTC().Truncate(time.Second)
	d.CreatedAt, d.Revision = now.Truncate(time.Second), 0
	if d.ID == "" {
		d.ID = newID(now)
	}
	if len(d.ID) > identity.MaxEntryID {
		return nil, fmt.Errorf("entry ID is %d bytes long, the limit is %d", len(d.ID), identity.MaxEntryID)
	}
	return &d, nil
}

// newID returns a UUID of version 7 (RFC 9562 section 5.7). It begins with the time, so that entries
// which are made together lie together in the store: a batch touches few pages, not one per entry.
func newID(now time.Time) string {
	var u [16]byte
	_, _ = rand.Read(u[6:]) // never fails
	stamp := uint64(now.UnixMilli()) << 16
	binary.BigEndian.PutUint64(u[:], stamp|uint64(binary.BigEndian.Uint16(u[6:])))
	u[6] = u[6]&0x0f | 0x70
	u[8] = u[8]&0x3f | 0x80
	text := make([]byte, 0, 36)
	for i, part := range [][]byte{u[:4], u[4:6], u[6:8], u[8:10], u[10:]} {
		if i > 0 {
			text = append(text, '-')
		}
		text = hex.AppendEncode(text, part)
	}
	return string(text)
}

// creation returns the transaction that creates an entry.
func creation(e *identity.Entry) (kv.Txn, error) {
	value, err := encodeEntry(e)
	if err != nil {
		return kv.Txn{}, err
	}
	similar := similarKey(e)
	t := kv.Txn{
		If:  []kv.Cond{{Key: entryKey(e.ID)}, {Key: similar}},
		Ops: []kv.Op{kv.Put(entryKey(e.ID), value), kv.Put(similar, []byte(e.ID))},
	}
	if k := aliasKey(e); k != "" {
		t.Ops = append(t.Ops, kv.Put(k, nil))
	}
	if k := entryExpiryKey(e); k != "" {
		t.Ops = append(t.Ops, kv.Put(k, nil))
	}
	return t, nil
}

// distinct splits pieces into those whose keys are all different and those to try after them. What comes
// later in the list never overtakes what it has a key in common with: the first of two has precedence.
func distinct(pieces []*piece) (round, later []*piece) {
	seen := make(map[string]struct{}, 2*len(pieces))
	for _, p := range pieces {
		waits := false
		for _, o := range p.txn.Ops {
			_, twice := seen[o.Key]
			waits = waits || twice
			seen[o.Key] = struct{}{}
		}
		if waits {
			later = append(later, p)
		} else {
			round = append(round, p)
		}
	}
	return round, later
}

// existing returns the entry that is similar to e or has its ID, nil if there is none.
func (r *Records) existing(ctx context.Context, e *identity.Entry) (*identity.Entry, error) {
	ids := []string{e.ID}
	item, found, err := r.get(ctx, similarKey(e))
	if err != nil {
		return nil, err
	}
	if found {
		ids = []string{string(item.Value), e.ID}
	}
	for _, id := range ids {
		other, _, err := r.entry(ctx, id)
		if err == nil {
			return other, nil
		}
		if !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	return nil, nil
}

// bundleChecker returns a function that finds out whether the bundles which an entry needs are
// stored; it asks for each one once. A bundle that is deleted afterwards leaves the entry as it is:
// readers leave out what is not there.
func (r *Records) bundleChecker(ctx context.Context) func(*identity.Entry) error {
	known := map[string]bool{r.td.Name(): true}
	return func(e *identity.Entry) error {
		for _, td := range e.FederatesWith {
			there, asked := known[td.Name()]
			if !asked {
				var err error
				if _, there, err = r.get(ctx, bundleKey(td)); err != nil {
					return err
				}
				known[td.Name()] = there
			}
			if !there {
				return &MissingBundleError{TrustDomain: td}
			}
		}
		return nil
	}
}

// UpdateEntry changes one entry: change is called with a copy, perhaps several times, and its error
// is returned as it is. ID and CreatedAt stay, Revision grows by one. It returns the changed entry
// and the revision of the commit; ErrNotFound; ErrExists if another entry is similar to what this one
// would become; a *MissingBundleError; or ErrConflict.
func (r *Records) UpdateEntry(ctx context.Context, id string, change func(*identity.Entry) error) (*identity.Entry, kv.Rev, error) {
	var after *identity.Entry
	var rev kv.Rev
	err := r.retry(ctx, "entry", func() error {
		before, at, err := r.entry(ctx, id)
		if err != nil {
			return fmt.Errorf("update entry: %w", err)
		}
		e := *before
		e.FederatesWith, e.DNSNames = slices.Clone(before.FederatesWith), slices.Clone(before.DNSNames)
		if err := change(&e); err != nil {
			return err
		}
		e.ID, e.CreatedAt, e.Revision = before.ID, before.CreatedAt, before.Revision+1
		e.ExpiresAt = e.ExpiresAt.UTC().Truncate(time.Second)
		if err := r.bundleChecker(ctx)(&e); err != nil {
			return err
		}
		t, err := replacement(before, &e, at)
		if err != nil {
			return err
		}
		after = &e
		rev, err = r.store.Commit(ctx, t)
		if errors.Is(err, kv.ErrConflict) {
			if taken, err := r.takenByOther(ctx, &e); err != nil {
				return err
			} else if taken {
				return ErrExists
			}
		}
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	return after, rev, nil
}

// replacement returns the transaction that makes before, written at a revision, into after.
func replacement(before, after *identity.Entry, at kv.Rev) (kv.Txn, error) {
	value, err := encodeEntry(after)
	if err != nil {
		return kv.Txn{}, err
	}
	t := kv.Txn{
		If:  []kv.Cond{{Key: entryKey(after.ID), Rev: at}},
		Ops: []kv.Op{kv.Put(entryKey(after.ID), value)},
	}
	was, is := indexKeys(before), indexKeys(after)
	for k := range was {
		if _, stays := is[k]; !stays {
			t.Ops = append(t.Ops, kv.Del(k))
		}
	}
	for k, v := range is {
		if _, had := was[k]; !had {
			t.Ops = append(t.Ops, kv.Put(k, v))
		}
	}
	if k := similarKey(after); was[k] == nil {
		t.If = append(t.If, kv.Cond{Key: k})
	}
	return t, nil
}

// takenByOther reports whether an entry with another ID is similar to e.
func (r *Records) takenByOther(ctx context.Context, e *identity.Entry) (bool, error) {
	item, found, err := r.get(ctx, similarKey(e))
	return found && !bytes.Equal(item.Value, []byte(e.ID)), err
}

// DeleteEntries deletes entries, each for itself. The errors are in the order of the IDs: nil,
// ErrNotFound, or what kept the entry from being deleted. The revision is that of the last commit it
// took, 0 for none. The last error is not nil only if nothing was tried.
func (r *Records) DeleteEntries(ctx context.Context, ids []string) ([]error, kv.Rev, error) {
	return r.DeleteEntriesIf(ctx, ids, anyEntry)
}

func anyEntry(*identity.Entry) bool { return true }

// DeleteEntriesIf is DeleteEntries for those entries that are, when they are deleted, as still says. For the others
// the error is ErrNotFound.
func (r *Records) DeleteEntriesIf(ctx context.Context, ids []string, still func(*identity.Entry) bool) ([]error, kv.Rev, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, fmt.Errorf("delete entries: %w", err)
	}
	errs := make([]error, len(ids))
	pending := make([]*piece, 0, len(ids))
	seen := make(map[string]struct{}, len(ids))
	for i, id := range ids {
		if _, twice := seen[id]; twice {
			errs[i] = ErrNotFound
			continue
		}
		seen[id] = struct{}{}
		p := &piece{at: i}
		if p.txn, errs[i] = r.deletion(ctx, id, still); errs[i] == nil {
			pending = append(pending, p)
		}
	}
	var last kv.Rev
	for len(pending) > 0 {
		r.commit(ctx, pending)
		again := settle(pending, func(p *piece) (err error) {
			p.txn, err = r.deletion(ctx, ids[p.at], still)
			return err
		})
		for _, p := range pending {
			if errs[p.at] = p.err; p.err == nil {
				last = max(last, p.rev)
			}
		}
		pending = again
	}
	return errs, last, nil
}

// deletion returns the transaction that deletes an entry as it is now, or ErrNotFound if it is not as still says.
func (r *Records) deletion(ctx context.Context, id string, still func(*identity.Entry) bool) (kv.Txn, error) {
	e, at, err := r.entry(ctx, id)
	if err == nil && !still(e) {
		err = ErrNotFound
	}
	if err != nil {
		return kv.Txn{}, err
	}
	return deletionOf(e, at), nil
}

func deletionOf(e *identity.Entry, at kv.Rev) kv.Txn {
	t := kv.Txn{
		If:  []kv.Cond{{Key: entryKey(e.ID), Rev: at}},
		Ops: []kv.Op{kv.Del(entryKey(e.ID))},
	}
	for k := range indexKeys(e) {
		t.Ops = append(t.Ops, kv.Del(k))
	}
	return t
}
