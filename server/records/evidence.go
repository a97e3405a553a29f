package records

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/store/kv"
)

// What is known about images lies below v/, outside the picture, for nobody but server/verdict needs it:
//
//	v/b/<hash>/<nnnn>     a blob, compressed, in pieces
//	v/d/<ID>              EvidenceDocument
//	v/m/<ID>              EvidenceMark
//	v/i/<digest>          EvidenceImage
//	v/x/<ID>              EvidenceException
//	v/g/<policy>          EvidenceGuard
//	v/o/<number>          EvidenceAlert; zero padded to 20 digits, in the order they are to be sent
//	v/s/<unix>/<serial>   EvidenceSerial, by when the certificate expires; zero padded to 12 digits
//	v/c                   EvidenceCRL
//
// Why it is so: server/verdict has a parsed form of each of these in memory, so the stored messages
// are its second form and there is no third one here. What this file adds is the keys, the version
// byte, the limits, and that a change is one transaction.
const (
	evidencePrefix  = "v/"
	blobPrefix      = "v/b/"
	documentPrefix  = "v/d/"
	markPrefix      = "v/m/"
	imagePrefix     = "v/i/"
	exceptionPrefix = "v/x/"
	guardPrefix     = "v/g/"
	alertPrefix     = "v/o/"
	serialPrefix    = "v/s/"
	crlKey          = "v/c"
)

// blobPiece is the largest piece of a blob, so that one fits a transaction with room to spare.
const blobPiece = 512 << 10

// MaxBlob is the largest blob in bytes, before it is compressed.
const MaxBlob = 64 << 20

// Evidence is all that is known about images, but for blobs and serial numbers. The messages are the
// caller's.
type Evidence struct {
	Documents  map[string]*stored.EvidenceDocument  // by ID
	Marks      map[string]*stored.EvidenceMark      // by ID
	Images     map[string]*stored.EvidenceImage     // by config digest
	Exceptions map[string]*stored.EvidenceException // by ID
	Guards     map[string]*stored.EvidenceGuard     // by policy
	Alerts     map[uint64]*stored.EvidenceAlert     // by number
	CRL        *stored.EvidenceCRL                  // nil: there never was one
}

// ReadEvidence returns it as of one revision.
func (r *Records) ReadEvidence(ctx context.Context) (*Evidence, error) {
	e := &Evidence{
		Documents: map[string]*stored.EvidenceDocument{}, Marks: map[string]*stored.EvidenceMark{},
		Images: map[string]*stored.EvidenceImage{}, Exceptions: map[string]*stored.EvidenceException{},
		Guards: map[string]*stored.EvidenceGuard{}, Alerts: map[uint64]*stored.EvidenceAlert{},
	}
	// Blobs come first in the order of keys, and serial numbers last but for what is after them: neither
	// is wanted here.
	items, _, err := r.store.Range(ctx, kv.PrefixEnd(blobPrefix), serialPrefix, 0)
	if err != nil {
		return nil, fmt.Errorf("read evidence: %w", err)
	}
	after, _, err := r.store.Range(ctx, kv.PrefixEnd(serialPrefix), kv.PrefixEnd(evidencePrefix), 0)
	if err != nil {
		return nil, fmt.Errorf("read evidence: %w", err)
	}
	for _, it := range append(items, after...) {
		if err := e.read(it.Key, it.Value); err != nil {
			return nil, fmt.Errorf("read evidence: %w", damaged(it.Key, err))
		}
	}
	return e, nil
}

// read takes over one record. What a later version added is none of this one's business.
func (e *Evidence) read(key string, value []byte) error {
	prefix, rest := splitEvidence(key)
	var err error
	switch prefix {
	case documentPrefix:
		e.Documents[rest], err = decodeInto(value, &stored.EvidenceDocument{})
	case markPrefix:
		e.Marks[rest], err = decodeInto(value, &stored.EvidenceMark{})
	case imagePrefix:
		e.Images[rest], err = decodeInto(value, &stored.EvidenceImage{})
	case exceptionPrefix:
		e.Exceptions[rest], err = decodeInto(value, &stored.EvidenceException{})
	case guardPrefix:
		e.Guards[rest], err = decodeInto(value, &stored.EvidenceGuard{})
	case alertPrefix:
		var n uint64
		if n, err = strconv.ParseUint(rest, 10, 64); err == nil {
			e.Alerts[n], err = decodeInto(value, &stored.EvidenceAlert{})
		}
	case crlKey:
		e.CRL, err = decodeInto(value, &stored.EvidenceCRL{})
	}
	return err
}

// splitEvidence returns the part of the tree below v/ that a key belongs to, and what is behind it.
func splitEvidence(key string) (prefix, rest string) {
	if key == crlKey {
		return crlKey, ""
	}
	if len(key) >= len(documentPrefix) && strings.HasPrefix(key, evidencePrefix) {
		return key[:len(documentPrefix)], strings.Clone(key[len(documentPrefix):])
	}
	return "", key
}

func decodeInto[M proto.Message](value []byte, m M) (M, error) { return m, decode(value, m) }

// EvidenceChange is what WriteEvidence writes. A nil message deletes.
type EvidenceChange struct {
	Documents  map[string]*stored.EvidenceDocument
	Marks      map[string]*stored.EvidenceMark
	Images     map[string]*stored.EvidenceImage
	Exceptions map[string]*stored.EvidenceException
	Guards     map[string]*stored.EvidenceGuard
	Alerts     map[uint64]*stored.EvidenceAlert
	CRL        *stored.EvidenceCRL // nil: unchanged
	// DropBlobs are deleted after the rest was written.
	DropBlobs []string
}

// WriteEvidence writes all of the change or nothing, apart from blobs, and returns when it is on stable
// storage. Only one server writes evidence, so there are no conditions.
func (r *Records) WriteEvidence(ctx context.Context, c EvidenceChange) error {
	var ops []kv.Op
	var err error
	add := func(key string, m proto.Message, remove bool) {
		if remove {
			ops = append(ops, kv.Del(key))
			return
		}
		value, failed := encode(m)
		if failed != nil {
			err = errors.Join(err, failed)
			return
		}
		ops = append(ops, kv.Put(key, value))
	}
	for id, m := range c.Documents {
		add(documentPrefix+id, m, m == nil)
	}
	for id, m := range c.Marks {
		add(markPrefix+id, m, m == nil)
	}
	for digest, m := range c.Images {
		add(imagePrefix+digest, m, m == nil)
	}
	for id, m := range c.Exceptions {
		add(exceptionPrefix+id, m, m == nil)
	}
	for policy, m := range c.Guards {
		add(guardPrefix+policy, m, m == nil)
	}
	for n, m := range c.Alerts {
		add(fmt.Sprintf("%s%020d", alertPrefix, n), m, m == nil)
	}
	if c.CRL != nil {
		add(crlKey, c.CRL, false)
	}
	if err == nil && len(ops) > 0 {
		_, err = r.store.Commit(ctx, kv.Txn{Ops: ops})
	}
	if err != nil {
		return fmt.Errorf("write evidence: %w", err)
	}
	return r.DropBlobs(ctx, c.DropBlobs...)
}

// Full reports whether a change has grown to where it should be written before more is put into it.
func (c *EvidenceChange) Full() bool {
	return len(c.Documents)+len(c.Marks)+len(c.Images)+len(c.Exceptions)+len(c.Guards)+len(c.Alerts) >= kv.MaxOps/2
}

// PutBlob keeps bytes under their hash, and returns how to name them. Bytes that are there already are
// not written again.
func (r *Records) PutBlob(ctx context.Context, content []byte) (*stored.EvidenceBlob, error) {
	if len(content) > MaxBlob {
		return nil, fmt.Errorf("write blob of %d bytes: %w", len(content), kv.ErrTooLarge)
	}
	sum := sha256.Sum256(content)
	blob := &stored.EvidenceBlob{Hash: base64.RawURLEncoding.EncodeToString(sum[:]), Size: int64(len(content))}
	// The first piece is written last: where it is, the others are.
	if _, found, err := r.get(ctx, blobKey(blob.GetHash(), 0)); err != nil {
		return nil, fmt.Errorf("write blob: %w", err)
	} else if found {
		return blob, nil
	}
	var packed bytes.Buffer
	w, err := flate.NewWriter(&packed, flate.BestSpeed)
	if err != nil {
		return nil, fmt.Errorf("write blob: %w", err)
	}
	if _, err := w.Write(content); err != nil {
		return nil, fmt.Errorf("write blob: %w", err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("write blob: %w", err)
	}
	rest := packed.Bytes()
	for n := (len(rest) - 1) / blobPiece; n >= 0; n-- {
		piece := append([]byte{valueVersion}, rest[n*blobPiece:min(len(rest), (n+1)*blobPiece)]...)
		if _, err := r.store.Commit(ctx, kv.Txn{Ops: []kv.Op{kv.Put(blobKey(blob.GetHash(), n), piece)}}); err != nil {
			return nil, fmt.Errorf("write blob: %w", err)
		}
	}
	return blob, nil
}

func blobKey(hash string, piece int) string { return fmt.Sprintf("%s%s/%04d", blobPrefix, hash, piece) }

// Blob returns the bytes of a blob, or ErrNotFound. A blob whose bytes are not those that were put is
// ErrDamaged.
func (r *Records) Blob(ctx context.Context, blob *stored.EvidenceBlob) ([]byte, error) {
	prefix := blobPrefix + blob.GetHash() + "/"
	items, _, err := r.store.Range(ctx, prefix, kv.PrefixEnd(prefix), 0)
	if err == nil && (len(items) == 0 || blob.GetHash() == "") {
		err = ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("read blob: %w", err)
	}
	var packed bytes.Buffer
	for _, it := range items {
		if len(it.Value) == 0 || it.Value[0] != valueVersion {
			return nil, fmt.Errorf("read blob: %w", damaged(it.Key, errors.New("unknown version")))
		}
		packed.Write(it.Value[1:])
	}
	content, err := io.ReadAll(io.LimitReader(flate.NewReader(&packed), MaxBlob+1))
	if err != nil {
		return nil, fmt.Errorf("read blob: %w", damaged(prefix, err))
	}
	sum := sha256.Sum256(content)
	if base64.RawURLEncoding.EncodeToString(sum[:]) != blob.GetHash() {
		return nil, fmt.Errorf("read blob: %w", damaged(prefix, errors.New("it has another hash")))
	}
	return content, nil
}

// Blobs returns the hashes of all blobs, sorted, for the one who sweeps those that nothing names.
func (r *Records) Blobs(ctx context.Context) ([]string, error) {
	var hashes []string
	for start := blobPrefix; ; {
		items, _, err := r.store.Range(ctx, start, kv.PrefixEnd(blobPrefix), 1)
		if err != nil {
			return nil, fmt.Errorf("list blobs: %w", err)
		}
		if len(items) == 0 {
			return hashes, nil
		}
		hash, _, _ := strings.Cut(items[0].Key[len(blobPrefix):], "/")
		hashes = append(hashes, strings.Clone(hash))
		start = kv.PrefixEnd(blobPrefix + hash + "/")
	}
}

// DropBlobs deletes blobs. One that is not there is no error.
func (r *Records) DropBlobs(ctx context.Context, hashes ...string) error {
	for _, hash := range hashes {
		prefix := blobPrefix + hash + "/"
		items, _, err := r.store.Range(ctx, prefix, kv.PrefixEnd(prefix), 0)
		if err != nil {
			return fmt.Errorf("delete blob: %w", err)
		}
		for len(items) > 0 {
			n := min(len(items), kv.MaxOps)
			ops := make([]kv.Op, n)
			for i, it := range items[:n] {
				ops[i] = kv.Del(it.Key)
			}
			if _, err := r.store.Commit(ctx, kv.Txn{Ops: ops}); err != nil {
				return fmt.Errorf("delete blob: %w", err)
			}
			items = items[n:]
		}
	}
	return nil
}

// Serial is a certificate that was issued for an entry that demands evidence.
type Serial struct {
	Number string // decimal
	*stored.EvidenceSerial
}

func serialKey(expires int64, number string) string {
	return fmt.Sprintf("%s%012d/%s", serialPrefix, max(expires, 0), number)
}

// PutSerials writes serial numbers down, before their certificates are given out or to say that they
// are revoked.
func (r *Records) PutSerials(ctx context.Context, serials ...Serial) error {
	for len(serials) > 0 {
		n := min(len(serials), kv.MaxOps)
		ops := make([]kv.Op, n)
		for i, s := range serials[:n] {
			value, err := encode(s.EvidenceSerial)
			if err != nil {
				return fmt.Errorf("write serial numbers: %w", err)
			}
			ops[i] = kv.Put(serialKey(s.GetExpiresAt(), s.Number), value)
		}
		if _, err := r.store.Commit(ctx, kv.Txn{Ops: ops}); err != nil {
			return fmt.Errorf("write serial numbers: %w", err)
		}
		serials = serials[n:]
	}
	return nil
}

// Serials returns those whose certificates expire after the given time, in that order.
func (r *Records) Serials(ctx context.Context, after time.Time) ([]Serial, error) {
	items, _, err := r.store.Range(ctx, serialKey(after.Unix()+1, ""), kv.PrefixEnd(serialPrefix), 0)
	if err != nil {
		return nil, fmt.Errorf("read serial numbers: %w", err)
	}
	list := make([]Serial, 0, len(items))
	for _, it := range items {
		_, number, _ := strings.Cut(it.Key[len(serialPrefix):], "/")
		m, err := decodeInto(it.Value, &stored.EvidenceSerial{})
		if err != nil {
			return nil, fmt.Errorf("read serial numbers: %w", damaged(it.Key, err))
		}
		list = append(list, Serial{Number: strings.Clone(number), EvidenceSerial: m})
	}
	return list, nil
}

// SweepSerials deletes those whose certificates have expired before the given time.
func (r *Records) SweepSerials(ctx context.Context, before time.Time) error {
	for {
		items, _, err := r.store.Range(ctx, serialPrefix, serialKey(before.Unix(), ""), kv.MaxOps)
		if err != nil {
			return fmt.Errorf("sweep serial numbers: %w", err)
		}
		if len(items) == 0 {
			return nil
		}
		ops := make([]kv.Op, len(items))
		for i, it := range items {
			ops[i] = kv.Del(it.Key)
		}
		if _, err := r.store.Commit(ctx, kv.Txn{Ops: ops}); err != nil {
			return fmt.Errorf("sweep serial numbers: %w", err)
		}
	}
}

// checkEvidence reads one record below v/, for Check.
func checkEvidence(key string, value []byte) (known bool, err error) {
	scratch := &Evidence{
		Documents: map[string]*stored.EvidenceDocument{}, Marks: map[string]*stored.EvidenceMark{},
		Images: map[string]*stored.EvidenceImage{}, Exceptions: map[string]*stored.EvidenceException{},
		Guards: map[string]*stored.EvidenceGuard{}, Alerts: map[uint64]*stored.EvidenceAlert{},
	}
	switch prefix, _ := splitEvidence(key); prefix {
	case documentPrefix, markPrefix, imagePrefix, exceptionPrefix, guardPrefix, alertPrefix, crlKey:
		return true, scratch.read(key, value)
	case serialPrefix:
		_, err := decodeInto(value, &stored.EvidenceSerial{})
		return true, err
	case blobPrefix:
		if len(value) == 0 || value[0] != valueVersion {
			return true, errors.New("unknown version")
		}
		return true, nil
	}
	return false, nil
}
