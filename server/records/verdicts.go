package records

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Limits of a verdict: what is said of one image travels to every agent that runs it, and is held
// there in memory.
const (
	maxVerdictSelectors = 500
	maxVerdictPolicies  = 100
	// MaxSummary is the longest PolicyVerdict.Summary in bytes; longer ones are cut.
	MaxSummary = 500
)

// Verdict is what is decided of one image, by all policies together. Values handed out are shared:
// Clone to change one.
type Verdict struct {
	// Digest is the image's config digest, "sha256:" and 64 lower-case hexadecimal digits.
	Digest string
	// Seq grows by one with each change. A verdict that was deleted and made again begins above every
	// number it had.
	Seq uint64
	// Selectors are what containers of the image show besides what agents find out: scan, sig and prov.
	Selectors attestor.Set
	// TTL and JWTTTL cap the lifetime of SVIDs of entries that rest on the verdict; whole seconds, 0:
	// no cap.
	TTL, JWTTTL time.Duration
	// NotAfter is when the verdict ends to count unless it is renewed, whole seconds; zero: never.
	NotAfter time.Time
	// Revoke says that what was issued on the strength of an earlier verdict is to be revoked too.
	Revoke    bool
	UpdatedAt time.Time // whole seconds
	Policies  []PolicyVerdict
}

// PolicyVerdict is what one policy says of an image, for people.
type PolicyVerdict struct {
	Policy string
	Status string    // pass, grace, fail, stale, missing, error or exempt
	Mode   string    // enforce, audit or off
	Until  time.Time // when the answer may change by time alone, whole seconds; zero: never
	// Summary says why in one sentence, in at most MaxSummary bytes.
	Summary string
}

// Clone returns a copy that can be changed without the original noticing.
func (v *Verdict) Clone() *Verdict {
	c := *v
	c.Policies = append([]PolicyVerdict(nil), v.Policies...)
	return &c
}

// ForAgents returns the verdict as agents hold it.
func (v *Verdict) ForAgents() *identity.Verdict {
	out := &identity.Verdict{Digest: v.Digest, Seq: v.Seq, Selectors: v.Selectors, NotAfter: v.NotAfter}
	for _, p := range v.Policies {
		out.Policies = append(out.Policies, identity.PolicyVerdict{Policy: p.Policy, Status: p.Status, Summary: p.Summary})
	}
	return out
}

// Expired reports whether the verdict has ended to count.
func (v *Verdict) Expired(now time.Time) bool {
	return !v.NotAfter.IsZero() && !now.Before(v.NotAfter)
}

// VerdictChange says what a verdict is now; Verdict is nil if it was deleted.
type VerdictChange struct {
	Digest  string
	Verdict *Verdict
}

func checkDigest(digest string) error {
	if !identity.ValidDigest(digest) {
		return fmt.Errorf("%q is no image digest: want sha256: and 64 lower-case hexadecimal digits", digest)
	}
	return nil
}

// Verdict returns the verdict on the image with the config digest, or ErrNotFound.
func (r *Records) Verdict(ctx context.Context, digest string) (*Verdict, error) {
	v, _, err := r.verdict(ctx, digest)
	if err != nil {
		return nil, fmt.Errorf("read verdict: %w", err)
	}
	return v, nil
}

func (r *Records) verdict(ctx context.Context, digest string) (*Verdict, kv.Item, error) {
	if err := checkDigest(digest); err != nil {
		return nil, kv.Item{}, err
	}
	item, found, err := r.get(ctx, verdictKey(digest))
	switch {
	case err != nil:
		return nil, kv.Item{}, err
	case !found:
		return nil, kv.Item{}, ErrNotFound
	}
	v, err := r.words.decodeVerdict(digest, item.Value)
	if err != nil {
		return nil, kv.Item{}, damaged(item.Key, err)
	}
	return v, item, nil
}

// UpdateVerdict creates or changes the verdict on an image: change is called with a copy (of an empty
// verdict, if none exists), perhaps several times, and its error is returned as it is. Seq and
// UpdatedAt are kept here: if nothing else changes, nothing is written. It returns the verdict and the
// revision of the commit that last wrote it, or ErrConflict.
func (r *Records) UpdateVerdict(ctx context.Context, digest string, change func(*Verdict) error) (*Verdict, kv.Rev, error) {
	var v *Verdict
	var rev kv.Rev
	err := r.retry(ctx, "verdict", func() error {
		at, err := r.store.Rev(ctx)
		if err != nil {
			return fmt.Errorf("update verdict: %w", err)
		}
		var item kv.Item
		v, item, err = r.verdict(ctx, digest)
		exists := err == nil
		if errors.Is(err, ErrNotFound) {
			// As with bundles: nobody has seen a number above the store's revision.
			v = &Verdict{Seq: uint64(at)}
		} else if err != nil {
			return fmt.Errorf("update verdict: %w", err)
		}
		seq, updated := v.Seq, v.UpdatedAt
		v = v.Clone()
		if err := change(v); err != nil {
			return err
		}
		v.Digest, v.Seq, v.UpdatedAt = digest, seq, updated
		value, err := encodeVerdict(v)
		if err != nil {
			return fmt.Errorf("update verdict: %w", err)
		}
		if exists && bytes.Equal(value, item.Value) {
			rev = item.Rev
			return nil
		}
		v.Seq, v.UpdatedAt = seq+1, r.cfg.Now()
		if value, err = encodeVerdict(v); err != nil {
			return fmt.Errorf("update verdict: %w", err)
		}
		// What is returned is what a reader of the store gets.
		if v, err = r.words.decodeVerdict(digest, value); err != nil {
			return fmt.Errorf("update verdict: %w", err)
		}
		rev, err = r.store.Commit(ctx, kv.Txn{
			If:  []kv.Cond{{Key: verdictKey(digest), Rev: item.Rev}},
			Ops: []kv.Op{kv.Put(verdictKey(digest), value)},
		})
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	return v, rev, nil
}

// DeleteVerdict deletes the verdict on an image: nothing is known of it any more. It returns the
// revision of the commit, or ErrNotFound.
func (r *Records) DeleteVerdict(ctx context.Context, digest string) (kv.Rev, error) {
	var rev kv.Rev
	if err := checkDigest(digest); err != nil {
		return 0, fmt.Errorf("delete verdict: %w", err)
	}
	err := r.retry(ctx, "verdict", func() error {
		item, found, err := r.get(ctx, verdictKey(digest))
		if err == nil && !found {
			err = ErrNotFound
		}
		if err != nil {
			return fmt.Errorf("delete verdict: %w", err)
		}
		rev, err = r.store.Commit(ctx, kv.Txn{
			If:  []kv.Cond{{Key: item.Key, Rev: item.Rev}},
			Ops: []kv.Op{kv.Del(item.Key)},
		})
		return err
	})
	return rev, err
}

// check refuses what must not be stored: selectors that verdicts have no say in, and more than an
// agent can be asked to hold.
func (v *Verdict) check() error {
	if err := checkDigest(v.Digest); err != nil {
		return err
	}
	if n := v.Selectors.Len(); n > maxVerdictSelectors {
		return fmt.Errorf("verdict with %d selectors, the limit is %d", n, maxVerdictSelectors)
	}
	for _, s := range v.Selectors.All() {
		if err := s.Check(); err != nil {
			return err
		}
		if !identity.Gating(s) {
			return fmt.Errorf("verdict with selector %s: its type is none of scan, sig and prov", s)
		}
	}
	if n := len(v.Policies); n > maxVerdictPolicies {
		return fmt.Errorf("verdict of %d policies, the limit is %d", n, maxVerdictPolicies)
	}
	if v.TTL < 0 || v.JWTTTL < 0 || v.TTL > maxTTL || v.JWTTTL > maxTTL {
		return errors.New("verdict with a lifetime that is negative or too long")
	}
	return nil
}

// maxTTL is the longest lifetime a stored number of seconds may stand for.
const maxTTL = (1<<31 - 1) * time.Second

func encodeVerdict(v *Verdict) ([]byte, error) {
	if err := v.check(); err != nil {
		return nil, err
	}
	m := &stored.Verdict{
		Sequence:  v.Seq,
		Selectors: encodeSelectors(v.Selectors),
		Ttl:       uint32((v.TTL + time.Second - 1) / time.Second),    //nolint:gosec // check keeps it in range
		JwtTtl:    uint32((v.JWTTTL + time.Second - 1) / time.Second), //nolint:gosec // check keeps it in range
		NotAfter:  unix(v.NotAfter),
		Revoke:    v.Revoke,
		UpdatedAt: unix(v.UpdatedAt),
	}
	for _, p := range v.Policies {
		m.Policies = append(m.Policies, &stored.PolicyVerdict{
			Policy: p.Policy, Status: p.Status, Mode: p.Mode, Until: unix(p.Until), Summary: cut(p.Summary, MaxSummary),
		})
	}
	return encode(m)
}

// cut shortens a text to n bytes, not in the middle of a character, and leaves out what is none.
func cut(text string, n int) string {
	return strings.ToValidUTF8(text[:min(len(text), n)], "")
}

func (w *words) decodeVerdict(digest string, b []byte) (*Verdict, error) {
	var m stored.Verdict
	if err := decode(b, &m); err != nil {
		return nil, err
	}
	v := &Verdict{
		Digest:    digest,
		Seq:       m.GetSequence(),
		Selectors: w.decodeSelectors(m.GetSelectors()),
		TTL:       time.Duration(m.GetTtl()) * time.Second,
		JWTTTL:    time.Duration(m.GetJwtTtl()) * time.Second,
		NotAfter:  timeOf(m.GetNotAfter()),
		Revoke:    m.GetRevoke(),
		UpdatedAt: timeOf(m.GetUpdatedAt()),
	}
	for _, p := range m.GetPolicies() {
		v.Policies = append(v.Policies, PolicyVerdict{
			Policy: w.one(p.GetPolicy()), Status: w.one(p.GetStatus()), Mode: w.one(p.GetMode()),
			Until: timeOf(p.GetUntil()), Summary: p.GetSummary(),
		})
	}
	if err := v.check(); err != nil {
		return nil, err
	}
	return v, nil
}
