package records

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/store/kv"
)

// Federation says where the bundle of another trust domain is to be had. Values handed out may be
// changed by who got them.
type Federation struct {
	TrustDomain spiffeid.TrustDomain
	URL         string
	// EndpointID is the SPIFFE ID that the bundle endpoint shows (profile https_spiffe). Zero: it is
	// authenticated by the web's authorities (profile https_web).
	EndpointID spiffeid.ID
}

// Federation returns the federation with a trust domain, or ErrNotFound.
func (r *Records) Federation(ctx context.Context, td spiffeid.TrustDomain) (*Federation, error) {
	f, _, err := r.federation(ctx, td)
	if err != nil {
		return nil, fmt.Errorf("read federation: %w", err)
	}
	return f, nil
}

func (r *Records) federation(ctx context.Context, td spiffeid.TrustDomain) (*Federation, kv.Item, error) {
	item, found, err := r.get(ctx, federationKey(td))
	switch {
	case err != nil:
		return nil, kv.Item{}, err
	case !found:
		return nil, kv.Item{}, ErrNotFound
	}
	f, err := decodeFederation(td, item.Value)
	if err != nil {
		return nil, kv.Item{}, damaged(item.Key, err)
	}
	return f, item, nil
}

// Federations returns all of them, sorted by the name of the trust domain, and the revision they are of.
func (r *Records) Federations(ctx context.Context) ([]*Federation, kv.Rev, error) {
	items, rev, err := r.store.Range(ctx, federations, kv.PrefixEnd(federations), 0)
	if err != nil {
		return nil, 0, fmt.Errorf("read federations: %w", err)
	}
	list := make([]*Federation, len(items))
	for i, it := range items {
		td, err := spiffeid.TrustDomainFromString(it.Key[len(federations):])
		if err == nil {
			list[i], err = decodeFederation(td, it.Value)
		}
		if err != nil {
			return nil, 0, fmt.Errorf("read federations: %w", damaged(it.Key, err))
		}
	}
	return list, rev, nil
}

// FollowFederations calls fn for every commit after the given revision that changes a federation, until
// ctx ends or fn returns an error, which it returns. It returns kv.ErrCompacted if it cannot go on from
// that revision.
func (r *Records) FollowFederations(ctx context.Context, after kv.Rev, fn func(kv.Rev) error) error {
	return r.store.Watch(ctx, federations, after, func(c kv.Change) error { return fn(c.Rev) })
}

// CreateFederation stores a federation. It returns the revision of the commit, or ErrExists.
func (r *Records) CreateFederation(ctx context.Context, f *Federation) (kv.Rev, error) {
	if f.TrustDomain.IsZero() || f.TrustDomain == r.td {
		return 0, errors.New("create federation: it is with no other trust domain")
	}
	value, err := encodeFederation(f)
	if err != nil {
		return 0, fmt.Errorf("create federation: %w", err)
	}
	rev, err := r.store.Commit(ctx, kv.Txn{
		If:  []kv.Cond{{Key: federationKey(f.TrustDomain)}},
		Ops: []kv.Op{kv.Put(federationKey(f.TrustDomain), value)},
	})
	if errors.Is(err, kv.ErrConflict) {
		err = ErrExists
	}
	if err != nil {
		return 0, fmt.Errorf("create federation: %w", err)
	}
	return rev, nil
}

// UpdateFederation changes a federation: change is called with a copy, perhaps several times, and its
// error is returned as it is. It returns what is stored now and the revision of the commit that last
// wrote it, ErrNotFound or ErrConflict.
func (r *Records) UpdateFederation(ctx context.Context, td spiffeid.TrustDomain, change func(*Federation) error) (*Federation, kv.Rev, error) {
	var f *Federation
	var rev kv.Rev
	err := r.retry(ctx, "federation", func() error {
		var item kv.Item
		var err error
		if f, item, err = r.federation(ctx, td); err != nil {
			return fmt.Errorf("update federation: %w", err)
		}
		if err := change(f); err != nil {
			return err
		}
		f.TrustDomain = td
		value, err := encodeFederation(f)
		if err != nil {
			return fmt.Errorf("update federation: %w", err)
		}
		if bytes.Equal(value, item.Value) {
			rev = item.Rev
			return nil
		}
		rev, err = r.store.Commit(ctx, kv.Txn{
			If:  []kv.Cond{{Key: item.Key, Rev: item.Rev}},
			Ops: []kv.Op{kv.Put(item.Key, value)},
		})
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	return f, rev, nil
}

// DeleteFederation ends a federation; the other trust domain's bundle stays as it is. It returns the
// revision of the commit, or ErrNotFound.
func (r *Records) DeleteFederation(ctx context.Context, td spiffeid.TrustDomain) (kv.Rev, error) {
	var rev kv.Rev
	err := r.retry(ctx, "federation", func() error {
		item, found, err := r.get(ctx, federationKey(td))
		if err == nil && !found {
			err = ErrNotFound
		}
		if err != nil {
			return fmt.Errorf("delete federation: %w", err)
		}
		rev, err = r.store.Commit(ctx, kv.Txn{
			If:  []kv.Cond{{Key: item.Key, Rev: item.Rev}},
			Ops: []kv.Op{kv.Del(item.Key)},
		})
		return err
	})
	return rev, err
}

// maxURL is the longest URL of a bundle endpoint in bytes.
const maxURL = 2048

// Check says why a federation cannot be, or nil: the URL must be https, of a host, and without a password
// or a fragment (SPIFFE Federation section 5.1); an endpoint's SPIFFE ID has a path.
func (f *Federation) Check() error {
	if len(f.URL) > maxURL {
		return fmt.Errorf("bundle endpoint URL is %d bytes long, the limit is %d", len(f.URL), maxURL)
	}
	u, err := url.Parse(f.URL)
	switch {
	case f.URL == "":
		return errors.New("bundle endpoint URL is missing")
	case err != nil:
		return errors.New("bundle endpoint URL is malformed")
	case u.Scheme != "https":
		return errors.New("bundle endpoint URL must use the https scheme")
	case u.Hostname() == "":
		return errors.New("bundle endpoint URL must specify the host")
	case u.User != nil:
		return errors.New("bundle endpoint URL must not contain user info")
	case u.Fragment != "":
		return errors.New("bundle endpoint URL must not contain a fragment")
	case !f.EndpointID.IsZero() && f.EndpointID.Path() == "":
		return errors.New("bundle endpoint SPIFFE ID has no path")
	}
	return nil
}
