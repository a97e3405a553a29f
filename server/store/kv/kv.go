// Package kv is the storage interface of the server: ordered keys, one revision per commit, and a
// watch that can be resumed from any revision that was not compacted away.
//
// The interface is as small as both an embedded file (server/store/boltkv) and an etcd cluster can
// honor it. What must hold is written at each method and checked by server/store/kvtest, which
// every implementation passes or is none.
//
// Why it is so: readers of the store (server/view) follow the log of commits in order and resume by
// number, so there is no event queue to overflow, no clock to compare and no gap to re-poll.
// A store knows nothing of time, randomness or encoding: expiry is a key that somebody deletes.
package kv

import (
	"context"
	"errors"
)

// Limits of one commit, the same on every store, so that code which works on a file works on a
// cluster (etcd's own defaults are 128 operations and 1.5 MiB). MaxOps counts operations and
// conditions, each for themselves. Keys are not empty.
const (
	MaxOps      = 100
	MaxTxnBytes = 1 << 20
	MaxKey      = 4 << 10 // bytes
)

var (
	// ErrConflict says that a condition of a Txn did not hold. Nothing was written.
	ErrConflict = errors.New("kv: a condition of the transaction does not hold")
	// ErrCompacted says that the changes after the asked revision are no longer stored. The reader
	// takes a full Range and watches from its revision.
	ErrCompacted = errors.New("kv: revision compacted")
	// ErrTooLarge says that a Txn is over MaxOps, MaxTxnBytes or MaxKey. Nothing was written.
	ErrTooLarge = errors.New("kv: transaction too large")
	// ErrFull says that the disk (or the quota) is full. Nothing was written; reads go on.
	ErrFull = errors.New("kv: no space left in the store")
	// ErrClosed says that the store was closed.
	ErrClosed = errors.New("kv: store closed")
)

// Rev numbers commits. The first commit of a store is revision 1. It only means something together
// with the store's ID.
type Rev uint64

// Item is one stored key.
type Item struct {
	Key   string
	Value []byte
	Rev   Rev // of the commit that last wrote it
}

// Cond names a key and the revision it must have; 0 means that the key must not exist.
type Cond struct {
	Key string
	Rev Rev
}

// Op writes a key, or deletes it. Deleting a key that does not exist is no error.
type Op struct {
	Key    string
	Value  []byte
	Delete bool
}

// Put and Del make the two kinds of Op.
func Put(key string, value []byte) Op { return Op{Key: key, Value: value} }
func Del(key string) Op               { return Op{Key: key, Delete: true} }

// Txn is written whole or not at all: if every condition holds, all operations become one revision.
// A key may appear in one operation only.
type Txn struct {
	If  []Cond
	Ops []Op
}

// Size returns the bytes that count against MaxTxnBytes.
func (t Txn) Size() int {
	size := 0
	for _, c := range t.If {
		size += len(c.Key)
	}
	for _, o := range t.Ops {
		size += len(o.Key) + len(o.Value)
	}
	return size
}

// Change is one commit as a watcher sees it: those of its operations that touch the watched prefix,
// in the order they were given.
type Change struct {
	Rev Rev
	Ops []Op
}

// Store is safe for concurrent use.
type Store interface {
	// ID is a random identity, made when the store was first created or restored from a backup.
	// Revisions of stores with different IDs cannot be compared.
	ID() string

	// Rev returns the revision of the last commit, 0 for an empty store.
	Rev(ctx context.Context) (Rev, error)

	// Range returns the items with start <= key < end in key order, at most limit of them (0: all),
	// as one consistent picture, and the revision of that picture. An empty end means no upper
	// bound.
	Range(ctx context.Context, start, end string, limit int) ([]Item, Rev, error)

	// Commit writes t and returns its revision once it is on stable storage. A Txn without
	// operations checks its conditions and returns the current revision.
	Commit(ctx context.Context, t Txn) (Rev, error)

	// Watch calls fn for every commit after the given revision that touches the prefix, in order,
	// once each, without gaps, until ctx ends or fn returns an error, which it returns. A commit is
	// seen after it is on stable storage, not before. It returns ErrCompacted when commits after
	// the given revision are gone, and also when that revision is in the future of the store.
	Watch(ctx context.Context, prefix string, after Rev, fn func(Change) error) error

	// Compact forgets the log of commits up to and including the given revision. Items stay.
	Compact(ctx context.Context, upTo Rev) error

	Close() error
}

// PrefixEnd returns the end of the range that holds exactly the keys with the given prefix, for
// Range. It is empty (no upper bound) for an empty prefix or one of only 0xff bytes.
func PrefixEnd(prefix string) string {
	b := []byte(prefix)
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] < 0xff {
			b[i]++
			return string(b[:i+1])
		}
	}
	return ""
}
