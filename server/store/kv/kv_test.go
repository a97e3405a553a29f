package kv_test

import (
	"strings"
	"testing"

	"github.com/assay-id/assay/server/store/kv"
)

func TestPrefixEnd(t *testing.T) {
	for prefix, want := range map[string]string{
		"":           "",
		"a":          "b",
		"p/e/":       "p/e0",
		"a\xff":      "b",
		"\xff\xff":   "",
		"a\xffb\xff": "a\xffc",
	} {
		end := kv.PrefixEnd(prefix)
		if end != want {
			t.Errorf("the range of %q ends at %q, want %q", prefix, end, want)
		}
		for _, in := range []string{prefix, prefix + "\x00", prefix + "\xff\xff"} {
			if end != "" && in >= end {
				t.Errorf("%q has prefix %q and is not before %q", in, prefix, end)
			}
		}
	}
}

func TestSize(t *testing.T) {
	txn := kv.Txn{If: []kv.Cond{{Key: "abc", Rev: 1}}, Ops: []kv.Op{kv.Put("de", []byte("fgh")), kv.Del(strings.Repeat("x", 10))}}
	if got := txn.Size(); got != 18 {
		t.Errorf("size %d, want 18", got)
	}
}
