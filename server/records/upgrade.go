package records

import (
	"context"
	"encoding/base64"
	"fmt"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// upgrade brings a store of an older schema to the present one. A step can be broken off anywhere and be
// done again from its beginning: what it has done already it finds done, and the version is written last,
// on condition that it still is what it was. Nobody else writes meanwhile, because Open has not returned.
func (r *Records) upgrade(ctx context.Context, from uint32, at kv.Rev) error {
	if from == schemaVersion {
		return nil
	}
	r.cfg.Log.WithFields(logrus.Fields{"from": from, "to": schemaVersion}).Info("upgrading the store's schema")
	if from < 2 {
		if err := r.moveSimilarKeys(ctx); err != nil {
			return fmt.Errorf("upgrade schema to version 2: %w", err)
		}
	}
	value, err := encodeSchema(r.td, schemaVersion)
	if err != nil {
		return err
	}
	_, err = r.store.Commit(ctx, kv.Txn{If: []kv.Cond{{Key: schemaKey, Rev: at}}, Ops: []kv.Op{kv.Put(schemaKey, value)}})
	return err
}

// moveSimilarKeys gives the index of similar entries the keys of version 2.
func (r *Records) moveSimilarKeys(ctx context.Context) error {
	items, _, err := r.store.Range(ctx, entryPrefix, kv.PrefixEnd(entryPrefix), 0)
	if err != nil {
		return err
	}
	pieces := make([]*piece, len(items))
	for i, it := range items {
		e, err := r.words.decodeEntry(it.Key[len(entryPrefix):], it.Value)
		if err != nil {
			return damaged(it.Key, err)
		}
		pieces[i] = &piece{txn: kv.Txn{
			If:  []kv.Cond{{Key: it.Key, Rev: it.Rev}},
			Ops: []kv.Op{kv.Del(similarKeyV1(e)), kv.Put(similarKey(e), []byte(e.ID))},
		}}
	}
	r.commit(ctx, pieces)
	for _, p := range pieces {
		if p.err != nil {
			return p.err
		}
	}
	return nil
}

// similarKeyV1 is similarKey in version 1 of the schema.
func similarKeyV1(e *identity.Entry) string {
	sum := similarity(e)
	return similarIndex + base64.RawURLEncoding.EncodeToString(sum[:])
}
