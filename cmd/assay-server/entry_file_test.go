package main

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestInParts(t *testing.T) {
	parts := func(items []string, fail int) (sizes []int, err error) {
		err = inParts(items, func(s string) int { return len(s) }, func(part []string) error {
			if len(sizes) == fail {
				return errors.New("away")
			}
			sizes = append(sizes, len(part))
			return nil
		})
		return sizes, err
	}
	small := slices.Repeat([]string{"a"}, 2*partItems+1)
	t.Run("no call has more items than one can hold", func(t *testing.T) {
		if got, err := parts(small, -1); err != nil || !slices.Equal(got, []int{partItems, partItems, 1}) {
			t.Errorf("%v, %v", got, err)
		}
	})
	t.Run("nor more bytes, but for an item that is larger by itself", func(t *testing.T) {
		half := strings.Repeat("a", partBytes/2)
		if got, err := parts([]string{half, half, half, half + half + half, "a"}, -1); err != nil || !slices.Equal(got, []int{2, 1, 1, 1}) {
			t.Errorf("%v, %v", got, err)
		}
	})
	t.Run("nothing goes on after a failure, and how far it came is told", func(t *testing.T) {
		got, err := parts(small, 1)
		if err == nil || len(got) != 1 {
			t.Errorf("%v, %v", got, err)
		}
		if err := notAll(partItems, len(small), err); err == nil || err.Error() != "500 of 1001 were sent, and then: away" {
			t.Error(err)
		}
	})
	t.Run("nothing to send is no call", func(t *testing.T) {
		if got, err := parts(nil, 0); err != nil || got != nil {
			t.Errorf("%v, %v", got, err)
		}
	})
}
