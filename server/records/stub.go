package records

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

var errStub = errors.New("not built yet")

// Open returns the records in the store, which it marks with the trust domain on first use.
func Open(ctx context.Context, store kv.Store, td spiffeid.TrustDomain, cfg Config) (*Records, error) {
	return nil, errStub
}
func (r *Records) StoreID() string { return r.store.ID() }
func (r *Records) CreateEntries(ctx context.Context, entries []*identity.Entry) ([]EntryResult, kv.Rev, error) {
	return nil, 0, errStub
}
func (r *Records) UpdateEntry(ctx context.Context, id string, change func(*identity.Entry) error) (*identity.Entry, kv.Rev, error) {
	return nil, 0, errStub
}
func (r *Records) DeleteEntries(ctx context.Context, ids []string) ([]error, kv.Rev, error) {
	return nil, 0, errStub
}
func (r *Records) Entry(ctx context.Context, id string) (*identity.Entry, error) { return nil, errStub }
func (r *Records) UpdateNode(ctx context.Context, id spiffeid.ID, change func(n *Node, exists bool) error) (*Node, kv.Rev, error) {
	return nil, 0, errStub
}
func (r *Records) DeleteNode(ctx context.Context, id spiffeid.ID) (kv.Rev, error) { return 0, errStub }
func (r *Records) Node(ctx context.Context, id spiffeid.ID) (*Node, error)        { return nil, errStub }
func (r *Records) CreateToken(ctx context.Context, token string, expires time.Time) error {
	return errStub
}
func (r *Records) BurnToken(ctx context.Context, token string) error { return errStub }
func (r *Records) UpdateBundle(ctx context.Context, td spiffeid.TrustDomain, change func(*identity.Bundle) error) (*identity.Bundle, kv.Rev, error) {
	return nil, 0, errStub
}
func (r *Records) Bundle(ctx context.Context, td spiffeid.TrustDomain) (*identity.Bundle, error) {
	return nil, errStub
}
func (r *Records) DeleteBundle(ctx context.Context, td spiffeid.TrustDomain) (kv.Rev, error) {
	return 0, errStub
}
func (r *Records) Journal(ctx context.Context) ([]Journal, error) { return nil, errStub }
func (r *Records) PutJournal(ctx context.Context, upserts []Journal, deletes []string) error {
	return errStub
}
func (r *Records) Snapshot(ctx context.Context) (*Snapshot, error) { return nil, errStub }
func (r *Records) Follow(ctx context.Context, after kv.Rev, fn func(Change) error) error {
	return errStub
}
func (r *Records) Sweep(ctx context.Context, now time.Time) error { return errStub }
func (r *Records) Run(ctx context.Context) error                  { return errStub }
