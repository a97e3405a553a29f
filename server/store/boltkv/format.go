package boltkv

import (
	"encoding/binary"
	"errors"
	"hash/crc32"

	"github.com/assay-id/assay/server/store/kv"
)

// Pages of bbolt have no checksum. Ours makes sure that a flipped bit in a selector or a serial
// number is found, not served.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

const itemHeader = 8 + 4

var errChecksum = errors.New("checksum does not match")

// encodeItem returns the stored form of a value.
func encodeItem(key string, rev kv.Rev, value []byte) []byte {
	b := make([]byte, itemHeader, itemHeader+len(value))
	binary.BigEndian.PutUint64(b, uint64(rev))
	b = append(b, value...)
	binary.BigEndian.PutUint32(b[8:], itemSum([]byte(key), b))
	return b
}

// decodeItem returns revision and value; the value is part of b.
func decodeItem(key, b []byte) (kv.Rev, []byte, error) {
	if len(b) < itemHeader {
		return 0, nil, errors.New("item is too short")
	}
	if binary.BigEndian.Uint32(b[8:]) != itemSum(key, b) {
		return 0, nil, errChecksum
	}
	return kv.Rev(binary.BigEndian.Uint64(b)), b[itemHeader:], nil
}

func itemSum(key, b []byte) uint32 {
	sum := crc32.Update(0, castagnoli, key)
	sum = crc32.Update(sum, castagnoli, b[:8])
	return crc32.Update(sum, castagnoli, b[itemHeader:])
}

// A log record is the operations in order, each
//
//	flags (1 byte; 1: delete), length of key (uvarint), key, length of value (uvarint), value
//
// where a deletion has no value, and then the CRC-32C of the revision and all that.
const flagDelete = 1

func logKey(rev kv.Rev) []byte { return binary.BigEndian.AppendUint64(nil, uint64(rev)) }

// encodeLog returns the stored form of one commit.
func encodeLog(rev kv.Rev, ops []kv.Op) []byte {
	size := 4
	for _, o := range ops {
		size += 1 + 2*binary.MaxVarintLen32 + len(o.Key) + len(o.Value)
	}
	b := make([]byte, 0, size)
	for _, o := range ops {
		if o.Delete {
			b = append(b, flagDelete)
		} else {
			b = append(b, 0)
		}
		b = binary.AppendUvarint(b, uint64(len(o.Key)))
		b = append(b, o.Key...)
		if !o.Delete {
			b = binary.AppendUvarint(b, uint64(len(o.Value)))
			b = append(b, o.Value...)
		}
	}
	return binary.BigEndian.AppendUint32(b, logSum(rev, b))
}

func logSum(rev kv.Rev, b []byte) uint32 {
	return crc32.Update(crc32.Checksum(logKey(rev), castagnoli), castagnoli, b)
}

// decodeLog calls fn for each operation. Its arguments are parts of b; value is nil for a deletion.
func decodeLog(rev kv.Rev, b []byte, fn func(key, value []byte, del bool)) error {
	if len(b) < 4 {
		return errors.New("log record is too short")
	}
	body, sum := b[:len(b)-4], binary.BigEndian.Uint32(b[len(b)-4:])
	if sum != logSum(rev, body) {
		return errChecksum
	}
	for len(body) > 0 {
		flags := body[0]
		body = body[1:]
		key, rest, ok := cut(body)
		if !ok || flags > flagDelete {
			return errors.New("log record cannot be read")
		}
		body = rest
		if flags == flagDelete {
			fn(key, nil, true)
			continue
		}
		value, rest, ok := cut(body)
		if !ok {
			return errors.New("log record cannot be read")
		}
		body = rest
		fn(key, value, false)
	}
	return nil
}

// cut splits off what its length goes before.
func cut(b []byte) (part, rest []byte, ok bool) {
	n, used := binary.Uvarint(b)
	if used <= 0 || n > uint64(len(b)-used) { //nolint:gosec // Uvarint used no more than there is
		return nil, nil, false
	}
	b = b[used:]
	return b[:n], b[n:], true
}
