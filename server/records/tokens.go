package records

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/store/kv"
)

var _ attestor.TokenBurner = (*Records)(nil)

// tokenGrace is how long after its expiry a token's remains are looked at: an agent that used it in
// its last second must have become a node by then.
const tokenGrace = 5 * time.Minute

// CreateToken stores the hash of a join token that may be used once, until it expires. It returns
// ErrExists if there is such a token.
func (r *Records) CreateToken(ctx context.Context, token string, expires time.Time) error {
	value, err := encodeToken(expires)
	if err != nil {
		return fmt.Errorf("create join token: %w", err)
	}
	hash := hashToken(token)
	_, err = r.store.Commit(ctx, kv.Txn{
		If:  []kv.Cond{{Key: tokenKey(hash)}},
		Ops: []kv.Op{kv.Put(tokenKey(hash), value), kv.Put(expiryKey(expires.Add(tokenGrace), kindToken, hash), nil)},
	})
	if errors.Is(err, kv.ErrConflict) {
		err = ErrExists
	}
	if err != nil {
		return fmt.Errorf("create join token: %w", err)
	}
	return nil
}

// BurnToken uses up a join token: of all who try, on whatever server, exactly one gets nil, because
// the deletion is conditional on the very token that was read (a token that was read and then
// deleted unconditionally admitted several agents in SPIRE before 1.14.6). The others, and those who
// come with one that never was, get ErrTokenUnknown. An expired token is burnt too, with
// ErrTokenExpired.
func (r *Records) BurnToken(ctx context.Context, token string) error {
	key := tokenKey(hashToken(token))
	item, found, err := r.get(ctx, key)
	switch {
	case err != nil:
		return fmt.Errorf("burn join token: %w", err)
	case !found:
		return ErrTokenUnknown
	}
	expires, err := decodeToken(item.Value)
	if err != nil {
		return fmt.Errorf("burn join token: %w", damaged("token", err))
	}
	expired := !r.cfg.Now().Before(expires)
	// The expiry key stays: by then it is seen to that no alias is left without its node.
	_, err = r.store.Commit(ctx, kv.Txn{
		If:  []kv.Cond{{Key: key, Rev: item.Rev}},
		Ops: []kv.Op{kv.Del(key)},
	})
	switch {
	case errors.Is(err, kv.ErrConflict):
		return ErrTokenUnknown
	case err != nil:
		return fmt.Errorf("burn join token: %w", err)
	case expired:
		return ErrTokenExpired
	}
	return nil
}
