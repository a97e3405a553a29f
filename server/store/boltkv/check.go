package boltkv

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"slices"

	"github.com/assay-id/assay/server/store/kv"
)

// This file reads bbolt's file format (version 2) without bbolt and without mapping the file. bbolt
// itself walks the pages in a goroutine of its own where a damaged page is a panic, and a page that
// is not there a fault, that nobody can recover from; so no file gets to bbolt before this walk has
// found every page in order.

const (
	pageHeader    = 16 // id 8, flags 2, count 2, overflow 4
	pageElement   = 16 // branch: pos 4, ksize 4, page 8; leaf: flags 4, pos 4, ksize 4, vsize 4
	bucketHeader  = 16 // root page 8, sequence 8
	metaSize      = 64 // magic 4, version 4, page size 4, flags 4, root 16, freelist 8, pages 8, txid 8, checksum 8
	metaMagic     = 0xED0CDAED
	metaVersion   = 2
	flagBranch    = 0x01
	flagLeaf      = 0x02
	flagBucket    = 0x01
	maxDepth      = 64 // of the tree; a real one has less than ten levels
	maxNesting    = 4  // of buckets; ours are not nested at all
	smallestPage  = 1 << 10
	largestPage   = 1 << 16
	firstDataPage = 2
)

var order = binary.NativeEndian // bbolt writes its structs as they lie in memory

// checker walks one file.
type checker struct {
	file     io.ReaderAt
	size     int64
	pageSize int64
	pages    uint64 // high water mark: all pages are below it
	seen     []bool
	// damages are what was found, at most limit of them.
	damages []error
	limit   int
}

// errEnough ends a walk that found as many damages as it may.
var errEnough = errors.New("enough damage")

// found takes down one damage, and returns errEnough if the walk is to end.
func (c *checker) found(err error) error {
	if errors.Is(err, errEnough) {
		return err
	}
	if c.damages = append(c.damages, err); len(c.damages) < c.limit {
		return nil
	}
	return errEnough
}

// checkFile returns the first damage in the file, or nil.
func checkFile(file io.ReaderAt, size int64) error {
	c := &checker{file: file, size: size, limit: 1}
	c.walk()
	return errors.Join(c.damages...)
}

// maxDamages is how many damages are told of one file.
const maxDamages = 100

// inspectFile returns everything that is damaged in the file.
func inspectFile(file io.ReaderAt, size int64) []error {
	c := &checker{file: file, size: size, limit: maxDamages}
	c.walk()
	return c.damages
}

// walk goes through all pages that are in use.
func (c *checker) walk() {
	if err := c.pageTree(); err != nil {
		_ = c.found(err) // there is nothing left to end
	}
}

func (c *checker) pageTree() error {
	root, err := c.meta()
	if err != nil {
		return err
	}
	if need := c.pages; need > uint64(c.size/c.pageSize) { //nolint:gosec // neither is negative
		return fmt.Errorf("the file has %d bytes where %d pages of %d bytes should be: it was cut short", c.size, need, c.pageSize)
	}
	c.seen = make([]bool, c.pages)
	return c.tree(root, nil, nil, 0)
}

// meta finds the newer of the two meta pages that is whole, and returns the root page.
func (c *checker) meta() (root uint64, err error) {
	if c.pageSize, err = c.findPageSize(); err != nil {
		return 0, err
	}
	var newest uint64
	found := false
	for i := range int64(2) {
		m, err := c.readMeta(i * c.pageSize)
		if err != nil || int64(order.Uint32(m[8:])) != c.pageSize {
			continue
		}
		if txid := order.Uint64(m[48:]); !found || txid > newest {
			found, newest = true, txid
			root, c.pages = order.Uint64(m[16:]), order.Uint64(m[40:])
		}
	}
	if !found {
		return 0, errors.New("both meta pages are invalid")
	}
	return root, nil
}

// findPageSize looks where a meta page of each possible page size would be.
func (c *checker) findPageSize() (int64, error) {
	for at := int64(0); at <= largestPage; at = max(at*2, smallestPage) {
		m, err := c.readMeta(at)
		if err != nil {
			continue
		}
		if size := int64(order.Uint32(m[8:])); size >= smallestPage && size <= largestPage && size&(size-1) == 0 {
			return size, nil
		}
	}
	return 0, errors.New("it is no bbolt file, or both its meta pages are invalid")
}

func (c *checker) readMeta(at int64) ([]byte, error) {
	page := make([]byte, pageHeader+metaSize)
	if _, err := c.file.ReadAt(page, at); err != nil {
		return nil, err
	}
	m := page[pageHeader:]
	sum := fnv.New64a()
	sum.Write(m[:56])
	if order.Uint32(m) != metaMagic || order.Uint32(m[4:]) != metaVersion || order.Uint64(m[56:]) != sum.Sum64() {
		return nil, errors.New("invalid meta page")
	}
	return m, nil
}

// page is one page with its overflow.
type page struct {
	id    uint64
	bytes []byte
	flags uint16
	count int
}

// read returns a page, which nothing may have referred to before.
func (c *checker) read(id uint64) (*page, error) {
	if id < firstDataPage || id >= c.pages {
		return nil, fmt.Errorf("page %d: referred to, but there are %d pages", id, c.pages)
	}
	at := int64(id) * c.pageSize //nolint:gosec // below the number of pages of the file
	p := &page{id: id, bytes: make([]byte, c.pageSize)}
	if _, err := c.file.ReadAt(p.bytes, at); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	if self := order.Uint64(p.bytes); self != id {
		return nil, fmt.Errorf("page %d: says it is page %d", id, self)
	}
	overflow := uint64(order.Uint32(p.bytes[12:]))
	if overflow >= c.pages-id {
		return nil, fmt.Errorf("page %d: goes on for %d pages, beyond the end", id, overflow)
	}
	for i := id; i <= id+overflow; i++ {
		if c.seen[i] {
			return nil, fmt.Errorf("page %d: used twice", i)
		}
		c.seen[i] = true
	}
	if overflow > 0 {
		p.bytes = make([]byte, (int64(overflow)+1)*c.pageSize) //nolint:gosec // checked above
		if _, err := c.file.ReadAt(p.bytes, at); err != nil {
			return nil, fmt.Errorf("page %d: %w", id, err)
		}
	}
	return p, p.header()
}

func (p *page) header() error {
	p.flags, p.count = order.Uint16(p.bytes[8:]), int(order.Uint16(p.bytes[10:]))
	if p.flags != flagBranch && p.flags != flagLeaf {
		return fmt.Errorf("page %d: neither branch nor leaf (flags %#x)", p.id, p.flags)
	}
	if pageHeader+p.count*pageElement > len(p.bytes) {
		return fmt.Errorf("page %d: %d elements do not fit", p.id, p.count)
	}
	return nil
}

// part returns n bytes of the page, pos bytes after the i-th element's start.
func (p *page) part(i int, pos, n uint32) ([]byte, error) {
	start := uint64(pageHeader) + uint64(i)*pageElement + uint64(pos) //nolint:gosec // i is a count
	end := start + uint64(n)
	if end > uint64(len(p.bytes)) {
		return nil, fmt.Errorf("page %d: element %d lies outside of it", p.id, i)
	}
	return p.bytes[start:end], nil
}

// tree checks the pages of one bucket below id, whose keys must be at least low and less than high
// (nil: no bound). path is the names of the buckets around.
func (c *checker) tree(id uint64, low, high []byte, depth int, path ...string) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d: the tree is too deep", id)
	}
	p, err := c.read(id)
	if err != nil {
		return err
	}
	if p.flags == flagLeaf {
		return c.leaf(p, low, high, path)
	}
	if p.count == 0 {
		return fmt.Errorf("page %d: branch without children", id)
	}
	type child struct {
		key []byte
		id  uint64
	}
	children := make([]child, p.count)
	for i := range children {
		e := p.bytes[pageHeader+i*pageElement:]
		key, err := p.part(i, order.Uint32(e), order.Uint32(e[4:]))
		if err != nil {
			return err
		}
		children[i] = child{key: key, id: order.Uint64(e[8:])}
		if err := inOrder(p, i, key, low, high); err != nil {
			return err
		}
		low = key
	}
	for i, ch := range children {
		next := high
		if i+1 < len(children) {
			next = children[i+1].key
		}
		if err := c.tree(ch.id, ch.key, next, depth+1, path...); err != nil {
			if err := c.found(lostKeys(err, path, ch.key, next)); err != nil {
				return err
			}
		}
	}
	return nil
}

// lostKeys says which keys of which bucket a page that cannot be read takes with it.
func lostKeys(err error, path []string, low, high []byte) error {
	if len(path) == 0 || errors.Is(err, errEnough) {
		return err
	}
	until := "to the end"
	if high != nil {
		until = "up to " + keyText(path, high)
	}
	return fmt.Errorf("%w: %s from %s %s cannot be read", err, path[0], keyText(path, low), until)
}

func keyText(path []string, key []byte) string {
	if path[0] == string(logBucket) && len(key) == 8 {
		return fmt.Sprintf("revision %d", binary.BigEndian.Uint64(key))
	}
	return fmt.Sprintf("%q", key)
}

// inOrder checks that key is not below the previous one (or the bound), equal only to a bound, and
// below high.
func inOrder(p *page, i int, key, low, high []byte) error {
	if c := bytes.Compare(key, low); c < 0 || c == 0 && i > 0 {
		return fmt.Errorf("page %d: key %d is out of order", p.id, i)
	}
	if high != nil && bytes.Compare(key, high) >= 0 {
		return fmt.Errorf("page %d: key %d belongs on a later page", p.id, i)
	}
	return nil
}

func (c *checker) leaf(p *page, low, high []byte, path []string) error {
	for i := range p.count {
		e := p.bytes[pageHeader+i*pageElement:]
		flags, pos, ksize, vsize := order.Uint32(e), order.Uint32(e[4:]), order.Uint32(e[8:]), order.Uint32(e[12:])
		key, err := p.part(i, pos, ksize)
		if err != nil {
			return err
		}
		if uint64(pos)+uint64(ksize) > uint64(len(p.bytes)) {
			return fmt.Errorf("page %d: element %d lies outside of it", p.id, i)
		}
		value, err := p.part(i, pos+ksize, vsize)
		if err != nil {
			return err
		}
		if err := inOrder(p, i, key, low, high); err != nil {
			return err
		}
		low = key
		switch flags {
		case 0:
			if err = content(path, key, value); err != nil {
				err = fmt.Errorf("page %d: %w", p.id, err)
			}
		case flagBucket:
			err = c.bucket(p, value, append(slices.Clip(path), string(key)))
		default:
			err = fmt.Errorf("page %d: key %d has unknown flags %#x", p.id, i, flags)
		}
		if err != nil {
			if err := c.found(err); err != nil {
				return err
			}
		}
	}
	return nil
}

// bucket checks a bucket inside of another: one with pages of its own, or, while it is small, with
// its one page in the value.
func (c *checker) bucket(p *page, value []byte, path []string) error {
	if len(value) < bucketHeader || len(path) > maxNesting {
		return fmt.Errorf("page %d: bucket %q cannot be read", p.id, path)
	}
	if root := order.Uint64(value); root != 0 {
		return c.tree(root, nil, nil, 0, path...)
	}
	if len(value) < bucketHeader+pageHeader {
		return fmt.Errorf("page %d: bucket %q cannot be read", p.id, path)
	}
	inline := &page{id: p.id, bytes: value[bucketHeader:]}
	if err := inline.header(); err != nil {
		return err
	}
	if inline.flags != flagLeaf {
		return fmt.Errorf("page %d: bucket %q cannot be read", p.id, path)
	}
	return c.leaf(inline, nil, nil, path)
}

// content checks what this package itself put into a key of one of its buckets.
func content(path []string, key, value []byte) error {
	if len(path) != 1 {
		return nil
	}
	switch path[0] {
	case string(itemsBucket):
		if _, _, err := decodeItem(key, value); err != nil {
			return fmt.Errorf("item %q: %w", key, err)
		}
	case string(logBucket):
		if len(key) != 8 {
			return fmt.Errorf("log key %x is no revision", key)
		}
		rev := binary.BigEndian.Uint64(key)
		if err := decodeLog(kv.Rev(rev), value, func(_, _ []byte, _ bool) {}); err != nil {
			return fmt.Errorf("log of revision %d: %w", rev, err)
		}
	}
	return nil
}
