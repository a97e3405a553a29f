package view

import (
	"iter"
	"slices"
)

// chunk is the most elements that one chunk of a sorted list holds: small enough that inserting into
// one is a short memmove, large enough that the list of chunks stays short.
const chunk = 512

// sorted is a sorted list without duplicates, kept in chunks, so that a change costs O(log n) and a
// page can start anywhere. It is not safe for concurrent use; the zero value with compare set is empty.
type sorted[T any] struct {
	compare func(a, b T) int
	chunks  [][]T // none empty
	size    int
}

// find returns where an element is, or would be. The key says how an element compares to what is
// looked for, in the list's own order.
func (s *sorted[T]) find(key func(T) int) (chunkAt, at int, found bool) {
	chunkAt, _ = slices.BinarySearchFunc(s.chunks, 0, func(c []T, _ int) int {
		if key(c[len(c)-1]) < 0 {
			return -1
		}
		return 1
	})
	if chunkAt == len(s.chunks) {
		return chunkAt, 0, false
	}
	at, found = slices.BinarySearchFunc(s.chunks[chunkAt], 0, func(e T, _ int) int { return key(e) })
	return chunkAt, at, found
}

// get returns the element that compares equal to the key.
func (s *sorted[T]) get(key func(T) int) (T, bool) {
	if i, j, found := s.find(key); found {
		return s.chunks[i][j], true
	}
	var none T
	return none, false
}

// put inserts e, in place of an equal element if there is one.
func (s *sorted[T]) put(e T) {
	i, j, found := s.find(func(o T) int { return s.compare(o, e) })
	if found {
		s.chunks[i][j] = e
		return
	}
	s.size++
	if i == len(s.chunks) { // behind all others
		if i == 0 || len(s.chunks[i-1]) == chunk {
			s.chunks = append(s.chunks, []T{e})
			return
		}
		i--
		j = len(s.chunks[i])
	}
	if len(s.chunks[i]) == chunk {
		tail := slices.Clone(s.chunks[i][chunk/2:])
		clear(s.chunks[i][chunk/2:])
		s.chunks[i] = s.chunks[i][:chunk/2]
		s.chunks = slices.Insert(s.chunks, i+1, tail)
		if j > chunk/2 {
			i, j = i+1, j-chunk/2
		}
	}
	s.chunks[i] = slices.Insert(s.chunks[i], j, e)
}

// remove takes out the element that is equal to e, if there is one.
func (s *sorted[T]) remove(e T) {
	i, j, found := s.find(func(o T) int { return s.compare(o, e) })
	if !found {
		return
	}
	s.size--
	s.chunks[i] = slices.Delete(s.chunks[i], j, j+1)
	switch {
	case len(s.chunks[i]) == 0:
		s.chunks = slices.Delete(s.chunks, i, i+1)
	case i > 0 && len(s.chunks[i-1])+len(s.chunks[i]) <= chunk/2:
		s.chunks[i-1] = append(s.chunks[i-1], s.chunks[i]...)
		s.chunks = slices.Delete(s.chunks, i, i+1)
	}
}

// after yields, in order, the elements whose key is above 0, that is behind what is looked for.
func (s *sorted[T]) after(key func(T) int) iter.Seq[T] {
	i, j, found := s.find(key)
	if found {
		j++
	}
	return func(yield func(T) bool) {
		for ; i < len(s.chunks); i, j = i+1, 0 {
			for _, e := range s.chunks[i][j:] {
				if !yield(e) {
					return
				}
			}
		}
	}
}

// all yields every element in order.
func (s *sorted[T]) all() iter.Seq[T] {
	return s.after(func(T) int { return 1 })
}
