package terms

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server/wire/feedv1"
)

func digest(n int) string { return fmt.Sprintf("sha256:%064x", n) }

// come is the context of a call as the server gets it.
func come(ctx context.Context) context.Context {
	md, _ := metadata.FromOutgoingContext(ctx)
	return metadata.NewIncomingContext(context.Background(), md)
}

func TestTerms(t *testing.T) {
	t.Run("what is sent is what comes", func(t *testing.T) {
		want := []Item{{Revision: 7}, {Revision: 1, Verdicts: []Verdict{{digest(1), 9}, {digest(2), 1 << 60}}}, {Verdicts: []Verdict{{digest(1), 9}}}}
		got, err := Of(come(With(t.Context(), want...)), 3)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%v\n%s", err, diff)
		}
	})
	t.Run("a caller who says nothing is taken for what he is", func(t *testing.T) {
		if got, err := Of(t.Context(), 3); got != nil || err != nil {
			t.Errorf("got %v, %v", got, err)
		}
	})
	t.Run("a full call fits, one with very many images does not", func(t *testing.T) {
		full := make([]Item, 500)
		for n := range full {
			full[n] = Item{Revision: int64(n), Verdicts: []Verdict{{digest(n % 20), uint64(n % 20)}}}
		}
		if !Fit(full) {
			t.Error("500 entries of 20 images do not")
		}
		for n := range full {
			full[n].Verdicts = []Verdict{{digest(n), 1}}
		}
		if Fit(full) {
			t.Error("500 images do")
		}
		one := Item{}
		for n := range 10 * MaxVerdicts {
			one.Verdicts = append(one.Verdicts, Verdict{digest(n), 1 << 60})
		}
		if !Fit([]Item{one}) {
			t.Error("one entry of many images does not")
		}
	})
	for name, m := range map[string]*feedv1.SigningTerms{
		"for other requests":             {Items: []*feedv1.SigningTerms_Item{{}}},
		"of a verdict that is not there": {Items: []*feedv1.SigningTerms_Item{{Verdicts: []uint32{0}}, {}}},
		"of half a digest": {
			Items:    []*feedv1.SigningTerms_Item{{Verdicts: []uint32{0}}, {}},
			Verdicts: []*feedv1.SigningTerms_HeldVerdict{{Digest: []byte("short")}},
		},
		"of too many verdicts": {
			Items:    []*feedv1.SigningTerms_Item{{Verdicts: make([]uint32, MaxVerdicts+1)}, {}},
			Verdicts: []*feedv1.SigningTerms_HeldVerdict{{Digest: make([]byte, 32)}},
		},
	} {
		t.Run("terms "+name+" are refused", func(t *testing.T) {
			raw, err := proto.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Of(metadata.NewIncomingContext(t.Context(), metadata.Pairs(Key, string(raw))), 2); !errors.Is(err, ErrMalformed) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("garbage and two of them are refused", func(t *testing.T) {
		for _, md := range []metadata.MD{metadata.Pairs(Key, "\xff"), metadata.Pairs(Key, "", Key, ""), metadata.Pairs(Key, strings.Repeat("x", maxBytes+1))} {
			if _, err := Of(metadata.NewIncomingContext(t.Context(), md), 0); !errors.Is(err, ErrMalformed) {
				t.Errorf("got %v", err)
			}
		}
	})
}

func FuzzTerms(f *testing.F) {
	raw, _ := encode([]Item{{Revision: 1, Verdicts: []Verdict{{digest(1), 2}}}})
	f.Add(raw, 1)
	f.Fuzz(func(t *testing.T, raw []byte, requests int) {
		items, err := Of(metadata.NewIncomingContext(t.Context(), metadata.Pairs(Key, string(raw))), requests%1000)
		if err == nil && len(items) != requests%1000 {
			t.Errorf("%d items for %d requests", len(items), requests)
		}
	})
}
