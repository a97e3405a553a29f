package workloadapi

import (
	"fmt"
	"testing"

	"github.com/assay-id/assay/attestor"
)

func TestShelf(t *testing.T) {
	s := &Server{logged: map[string]bool{"unix": true}}
	set := func(values ...string) attestor.Set {
		var all []attestor.Selector
		for _, v := range values {
			all = append(all, attestor.Selector{Type: "unix", Value: v})
		}
		return attestor.NewSet(all...)
	}
	t.Run("equal facts are one in memory", func(t *testing.T) {
		if a, b := s.prove(set("uid:1", "gid:2")), s.prove(set("gid:2", "uid:1")); a != b {
			t.Errorf("%v and %v", a, b)
		}
	})
	t.Run("others are not", func(t *testing.T) {
		a, b := s.prove(set("uid:1")), s.prove(set("uid:2"))
		if a == b || a.key == b.key || a.digest == b.digest || !a.facts.Has(attestor.Selector{Type: "unix", Value: "uid:1"}) {
			t.Errorf("%v and %v", a, b)
		}
	})
	t.Run("there is an end to how many are kept, and what is in use stays what it is", func(t *testing.T) {
		first := s.prove(set("uid:first"))
		for i := range 3 * maxShared {
			s.prove(set(fmt.Sprint("uid:", i)))
			if n := len(s.shelf.all); n > maxShared {
				t.Fatalf("%d are kept", n)
			}
		}
		if again := s.prove(set("uid:first")); again.key != first.key || first.facts.Len() != 1 {
			t.Errorf("%v and %v", first, again)
		}
	})
}
