package records

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/kv"
)

func openEvidence(t testing.TB) (*Records, *boltkv.Store) {
	t.Helper()
	store, err := boltkv.Open(filepath.Join(t.TempDir(), "store.db"), boltkv.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	r, err := Open(t.Context(), store, domain, Config{})
	if err != nil {
		t.Fatal(err)
	}
	return r, store
}

func fullEvidence() EvidenceChange {
	blob := &stored.EvidenceBlob{Hash: "h", Size: 3}
	digest := "sha256:" + strings.Repeat("a", 64)
	return EvidenceChange{
		Documents: map[string]*stored.EvidenceDocument{"d": {
			Kind: "report", Format: "trivy", Source: "ci", TrustPolicies: []string{"ci"}, Repository: "reg/shop", Hash: digest, Form: "bare",
			Subjects: []string{digest}, Body: blob, Raw: blob, ReceivedAt: 1, Selectors: []*stored.Selector{{Type: "sig", Value: "policy:ci"}},
		}},
		Marks:      map[string]*stored.EvidenceMark{"m": {Subject: digest, Source: "ci", Time: 5, DbTime: 6, Packages: 7}},
		Images:     map[string]*stored.EvidenceImage{digest: {SeenAt: 1, Verdicts: []*stored.EvidenceVerdict{{Policy: "p", Status: "pass", Allowed: true}}}},
		Exceptions: map[string]*stored.EvidenceException{"x": {Reason: "r", Approver: "a", ExpiresAt: 9}},
		Guards:     map[string]*stored.EvidenceGuard{"p": {TrippedAt: 3, Recent: []*stored.EvidenceWithdrawal{{Digest: digest, At: 2, Workloads: 1}}}},
		Alerts:     map[uint64]*stored.EvidenceAlert{0: {Body: []byte("{}"), Hook: "chat"}, 12: {Body: []byte("{}")}},
		CRL:        &stored.EvidenceCRL{Number: 4},
	}
}

func TestEvidence(t *testing.T) {
	r, store := openEvidence(t)
	change := fullEvidence()
	if err := r.WriteEvidence(t.Context(), change); err != nil {
		t.Fatal(err)
	}
	if err := r.PutSerials(t.Context(), Serial{"77", &stored.EvidenceSerial{ExpiresAt: 100}}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.PutBlob(t.Context(), []byte("blob")); err != nil {
		t.Fatal(err)
	}
	t.Run("what is written is read", func(t *testing.T) {
		e, err := r.ReadEvidence(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(e.Documents) != 1 || len(e.Marks) != 1 || len(e.Images) != 1 || len(e.Exceptions) != 1 || len(e.Guards) != 1 || len(e.Alerts) != 2 {
			t.Errorf("%+v", e)
		}
		if !proto.Equal(e.Documents["d"], change.Documents["d"]) || !proto.Equal(e.Guards["p"], change.Guards["p"]) || e.CRL.GetNumber() != 4 || e.Alerts[12] == nil {
			t.Errorf("%+v", e)
		}
	})
	t.Run("a store with it is sound, and no picture has it", func(t *testing.T) {
		c, err := Check(t.Context(), store)
		if err != nil || len(c.Findings) != 0 {
			t.Errorf("%v, %v", c, err)
		}
		s, err := r.Snapshot(t.Context())
		if err != nil || len(s.Entries)+len(s.Nodes)+len(s.Bundles)+len(s.Verdicts) != 0 {
			t.Errorf("%+v, %v", s, err)
		}
	})
	t.Run("nil deletes", func(t *testing.T) {
		err := r.WriteEvidence(t.Context(), EvidenceChange{
			Documents: map[string]*stored.EvidenceDocument{"d": nil}, Alerts: map[uint64]*stored.EvidenceAlert{12: nil},
		})
		e, read := r.ReadEvidence(t.Context())
		if err != nil || read != nil || len(e.Documents) != 0 || len(e.Alerts) != 1 || len(e.Marks) != 1 {
			t.Errorf("%+v, %v, %v", e, err, read)
		}
	})
	t.Run("a record of a newer version is refused", func(t *testing.T) {
		if _, err := store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("v/x/new", []byte{9, 1})}}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.ReadEvidence(t.Context()); !errors.Is(err, ErrDamaged) {
			t.Errorf("got %v", err)
		}
		c, err := Check(t.Context(), store)
		if err != nil || len(c.Findings) != 1 {
			t.Errorf("%v, %v", c, err)
		}
	})
}

func TestBlobs(t *testing.T) {
	r, store := openEvidence(t)
	large := make([]byte, 3*blobPiece)
	_, _ = rand.Read(large)
	for name, content := range map[string][]byte{"empty": {}, "small": []byte("x"), "in pieces": large, "that compresses": bytes.Repeat([]byte("abc"), 5<<20)} {
		t.Run("a blob "+name, func(t *testing.T) {
			blob, err := r.PutBlob(t.Context(), content)
			if err != nil {
				t.Fatal(err)
			}
			before, _ := store.Rev(t.Context())
			if again, err := r.PutBlob(t.Context(), content); err != nil || again.GetHash() != blob.GetHash() {
				t.Errorf("put again: %v, %v", again, err)
			}
			if after, _ := store.Rev(t.Context()); after != before {
				t.Error("it was written twice")
			}
			if got, err := r.Blob(t.Context(), blob); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	all, err := r.Blobs(t.Context())
	if err != nil || len(all) != 4 {
		t.Fatalf("%v, %v", all, err)
	}
	if err := r.DropBlobs(t.Context(), append(all, "nothing")...); err != nil {
		t.Error(err)
	}
	if all, err = r.Blobs(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
	if _, err := r.Blob(t.Context(), &stored.EvidenceBlob{Hash: "gone"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	t.Run("one that was tampered with is damaged", func(t *testing.T) {
		blob, err := r.PutBlob(t.Context(), []byte("honest"))
		if err != nil {
			t.Fatal(err)
		}
		other, err := r.PutBlob(t.Context(), []byte("forged"))
		if err != nil {
			t.Fatal(err)
		}
		item, _, err := r.get(t.Context(), blobKey(other.GetHash(), 0))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put(blobKey(blob.GetHash(), 0), item.Value)}}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Blob(t.Context(), blob); !errors.Is(err, ErrDamaged) {
			t.Errorf("got %v", err)
		}
	})
}

func TestSerials(t *testing.T) {
	r, _ := openEvidence(t)
	at := time.Unix(1_800_000_000, 0)
	var list []Serial
	for n := range 250 {
		list = append(list, Serial{fmt.Sprint(n), &stored.EvidenceSerial{EntryId: "e", ExpiresAt: at.Add(time.Duration(n) * time.Second).Unix()}})
	}
	if err := r.PutSerials(t.Context(), list...); err != nil {
		t.Fatal(err)
	}
	got, err := r.Serials(t.Context(), at.Add(99*time.Second))
	if err != nil || len(got) != 150 || got[0].Number != "100" {
		t.Errorf("%d, %v", len(got), err)
	}
	if err := r.SweepSerials(t.Context(), at.Add(200*time.Second)); err != nil {
		t.Fatal(err)
	}
	if got, err = r.Serials(t.Context(), time.Unix(0, 0)); err != nil || len(got) != 50 {
		t.Errorf("%d, %v", len(got), err)
	}
}

func FuzzEvidence(f *testing.F) {
	for _, c := range []proto.Message{fullEvidence().Documents["d"], fullEvidence().Guards["p"]} {
		b, err := encode(c)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		for _, key := range []string{"v/d/1", "v/m/1", "v/i/1", "v/x/1", "v/g/1", "v/o/00000000000000000001", "v/s/000000000001/1", "v/c", "v/b/x/0000"} {
			if known, _ := checkEvidence(key, value); !known {
				t.Errorf("%s is not known", key)
			}
		}
	})
}
