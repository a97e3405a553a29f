package records

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/assay-id/assay/workloadapi/identity"
)

// FuzzEntries creates, changes and deletes entries in an order made of any bytes, and compares each answer
// and all that is stored with a model. There are few IDs and few contents, so that they meet often.
func FuzzEntries(f *testing.F) {
	f.Add([]byte{0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 2, 0, 0, 0, 1})
	f.Add([]byte("creates, updates and deletes as the letters fall, until there are no more of them"))
	all := make([]byte, 0, 300)
	for i := range 300 {
		all = append(all, byte(i*29+i/5))
	}
	f.Add(all)
	f.Fuzz(func(t *testing.T, history []byte) {
		r, _ := open(t)
		m := &entryModel{t: t, r: r, held: map[string]*identity.Entry{}, history: history}
		for step := 0; len(m.history) > 0 && step < 40; step++ {
			switch m.next(3) {
			case 0:
				m.create()
			case 1:
				m.update()
			case 2:
				m.remove()
			}
			m.compare(step)
		}
	})
}

type entryModel struct {
	t       *testing.T
	r       *Records
	held    map[string]*identity.Entry
	history []byte
}

func (m *entryModel) next(n int) int {
	if len(m.history) == 0 {
		return 0
	}
	b := int(m.history[0])
	m.history = m.history[1:]
	return b % n
}

// content is what may be the same for two entries, so that they are similar.
func (m *entryModel) content() *identity.Entry {
	return entry(fmt.Sprint("w", m.next(2)), fmt.Sprint("unix:uid:", m.next(2)))
}

func (m *entryModel) id() string { return fmt.Sprint("id-", m.next(4)) }

func like(a, b *identity.Entry) bool {
	return a.SPIFFEID == b.SPIFFEID && a.ParentID == b.ParentID && a.Selectors.Key() == b.Selectors.Key()
}

// similar returns the ID of an entry that is similar to e, other than not.
func (m *entryModel) similar(e *identity.Entry, not string) string {
	for id, o := range m.held {
		if id != not && like(o, e) {
			return id
		}
	}
	return ""
}

func (m *entryModel) create() {
	m.t.Helper()
	var batch []*identity.Entry
	for range 1 + m.next(3) {
		e := m.content()
		e.ID, e.Hint = m.id(), fmt.Sprint("h", m.next(3))
		batch = append(batch, e)
	}
	results, _, err := m.r.CreateEntries(m.t.Context(), batch)
	if err != nil {
		m.t.Fatal(err)
	}
	for i, e := range batch {
		if other := m.similar(e, ""); other != "" || m.held[e.ID] != nil {
			if !errors.Is(results[i].Err, ErrExists) {
				m.t.Fatalf("create %s %s, as there is %q: %v", e.ID, e.SPIFFEID, other, results[i].Err)
			}
			continue
		}
		if results[i].Err != nil || results[i].Entry.Revision != 0 {
			m.t.Fatalf("create %s: %+v", e.ID, results[i])
		}
		m.held[e.ID] = results[i].Entry
	}
}

func (m *entryModel) update() {
	m.t.Helper()
	id, to, hint := m.id(), m.content(), fmt.Sprint("u", m.next(3))
	before := m.held[id]
	got, _, err := m.r.UpdateEntry(m.t.Context(), id, func(e *identity.Entry) error {
		e.SPIFFEID, e.Selectors, e.Hint = to.SPIFFEID, to.Selectors, hint
		return nil
	})
	switch {
	case before == nil:
		if !errors.Is(err, ErrNotFound) {
			m.t.Fatalf("update %s, which is not there: %v", id, err)
		}
	case m.similar(to, id) != "":
		if !errors.Is(err, ErrExists) {
			m.t.Fatalf("update %s to what another one is: %v", id, err)
		}
	case err != nil || got.ID != id || !like(got, to) || got.Hint != hint || !got.CreatedAt.Equal(before.CreatedAt) || got.Revision != before.Revision+1:
		m.t.Fatalf("update %s: %+v after %+v, %v", id, got, before, err)
	default:
		m.held[id] = got
	}
}

func (m *entryModel) remove() {
	m.t.Helper()
	ids := []string{m.id()}
	if other := m.id(); other != ids[0] {
		ids = append(ids, other)
	}
	errs, _, err := m.r.DeleteEntries(m.t.Context(), ids)
	if err != nil {
		m.t.Fatal(err)
	}
	for i, id := range ids {
		if was := m.held[id] != nil; was != (errs[i] == nil) || !was && !errors.Is(errs[i], ErrNotFound) {
			m.t.Fatalf("delete %s, there %v: %v", id, was, errs[i])
		}
		delete(m.held, id)
	}
}

// compare compares all that is stored with the model.
func (m *entryModel) compare(step int) {
	m.t.Helper()
	all, err := m.r.Snapshot(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	if len(all.Entries) != len(m.held) || !slices.IsSortedFunc(all.Entries, func(a, b *identity.Entry) int { return strings.Compare(a.ID, b.ID) }) {
		m.t.Fatalf("step %d: %d entries are stored, want %d", step, len(all.Entries), len(m.held))
	}
	for _, e := range all.Entries {
		want := m.held[e.ID]
		if want == nil || !like(want, e) || want.Hint != e.Hint || want.Revision != e.Revision || !want.CreatedAt.Equal(e.CreatedAt) {
			m.t.Fatalf("step %d: %+v is stored, want %+v", step, e, want)
		}
	}
}
