package records

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

func admit(t *testing.T, r *Records, id spiffeid.ID) *Node {
	t.Helper()
	n, _, err := r.UpdateNode(t.Context(), id, func(n *Node, _ bool) error {
		n.Type, n.Serial, n.AttestedAt = "join_token", "123", noon
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func alias(t *testing.T, r *Records, node spiffeid.ID, name string) *identity.Entry {
	t.Helper()
	e := entry(name)
	e.ParentID, e.Selectors = node, sel("spiffe_id:"+node.String())
	return create(t, r, e)
}

func TestNodes(t *testing.T) {
	id := agent("x509pop/1f")
	t.Run("a node is made, changed and read", func(t *testing.T) {
		r, _ := open(t)
		if _, err := r.Node(t.Context(), id); !errors.Is(err, ErrNotFound) {
			t.Errorf("missing node: %v", err)
		}
		n, rev, err := r.UpdateNode(t.Context(), id, func(n *Node, exists bool) error {
			if exists || n.ID != id {
				t.Errorf("exists %v, %+v", exists, n)
			}
			n.ID = agent("other")
			n.Serial, n.Selectors, n.ExpiresAt = "7", sel("x509pop:subject:cn:a"), noon.Add(time.Hour)
			return nil
		})
		if err != nil || n.ID != id {
			t.Fatal(n, err)
		}
		n, again, err := r.UpdateNode(t.Context(), id, func(n *Node, exists bool) error {
			if !exists || n.Serial != "7" {
				t.Errorf("exists %v, %+v", exists, n)
			}
			n.Banned = true
			return nil
		})
		if err != nil || again <= rev {
			t.Fatal(again, err)
		}
		got, err := r.Node(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(n, got, equal); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("an update that changes nothing writes nothing", func(t *testing.T) {
		r, _ := open(t)
		admit(t, r, id)
		before, err := r.store.Rev(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, rev, err := r.UpdateNode(t.Context(), id, func(*Node, bool) error { return nil })
		if err != nil || rev != before {
			t.Errorf("revision went from %d to %d, %v", before, rev, err)
		}
	})
	t.Run("50 at once lose no update", func(t *testing.T) {
		r, _ := open(t)
		var group sync.WaitGroup
		for range 50 {
			group.Go(func() {
				_, _, err := r.UpdateNode(t.Context(), id, func(n *Node, _ bool) error { n.AgentVersion += "."; return nil })
				if err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		if n, err := r.Node(t.Context(), id); err != nil || len(n.AgentVersion) != 50 {
			t.Errorf("%+v, %v", n, err)
		}
	})
	t.Run("an ID of another trust domain, or without a path, is refused", func(t *testing.T) {
		r, _ := open(t)
		for _, id := range []spiffeid.ID{{}, domain.ID(), spiffeid.RequireFromPath(other, "/spire/agent/a")} {
			if _, _, err := r.UpdateNode(t.Context(), id, func(*Node, bool) error { return nil }); err == nil {
				t.Errorf("%q was accepted", id)
			}
			if _, err := r.DeleteNode(t.Context(), id); !errors.Is(err, ErrNotFound) {
				t.Errorf("delete %q: %v", id, err)
			}
		}
	})
	t.Run("the error of change comes back as it is", func(t *testing.T) {
		r, _ := open(t)
		want := errors.New("no")
		if _, _, err := r.UpdateNode(t.Context(), id, func(*Node, bool) error { return want }); err != want { //nolint:errorlint // returned as it is
			t.Error(err)
		}
		if _, err := r.Node(t.Context(), id); !errors.Is(err, ErrNotFound) {
			t.Errorf("it was made: %v", err)
		}
	})
}

func TestDeleteNode(t *testing.T) {
	node, neighbor := agent("join_token/secret"), agent("join_token/secret2")
	t.Run("the aliases of its join token go with it, and nothing else does", func(t *testing.T) {
		r, _ := open(t)
		gone := []*identity.Entry{alias(t, r, node, "a"), alias(t, r, node, "b")}
		workload := entry("workload", "unix:uid:1")
		workload.ParentID = node
		more := entry("more", "spiffe_id:"+node.String(), "a:1")
		more.ParentID = node
		stays := []*identity.Entry{alias(t, r, neighbor, "a"), create(t, r, workload), create(t, r, more)}
		admit(t, r, node)
		admit(t, r, neighbor)
		if _, err := r.DeleteNode(t.Context(), node); err != nil {
			t.Fatal(err)
		}
		for _, e := range gone {
			if _, err := r.Entry(t.Context(), e.ID); !errors.Is(err, ErrNotFound) {
				t.Errorf("alias %s: %v", e.SPIFFEID, err)
			}
		}
		for _, e := range stays {
			if _, err := r.Entry(t.Context(), e.ID); err != nil {
				t.Errorf("entry %s: %v", e.SPIFFEID, err)
			}
		}
		if _, err := r.Node(t.Context(), node); !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
		if _, err := r.DeleteNode(t.Context(), node); !errors.Is(err, ErrNotFound) {
			t.Errorf("again: %v", err)
		}
		if _, err := r.Node(t.Context(), neighbor); err != nil {
			t.Error(err)
		}
	})
	t.Run("one that is not any more as whoever deletes it thinks is left alone", func(t *testing.T) {
		r, _ := open(t)
		admit(t, r, node)
		asked := false
		_, err := r.DeleteNodeIf(t.Context(), node, func(n *Node) bool { asked = n.ID == node; return false })
		if !asked || !errors.Is(err, ErrNotFound) {
			t.Errorf("asked %v, %v", asked, err)
		}
		if _, err := r.Node(t.Context(), node); err != nil {
			t.Error(err)
		}
	})
	t.Run("more aliases than fit in one transaction go too", func(t *testing.T) {
		r, _ := open(t)
		admit(t, r, node)
		for i := range 70 {
			alias(t, r, node, fmt.Sprint(i))
		}
		if _, err := r.DeleteNode(t.Context(), node); err != nil {
			t.Fatal(err)
		}
		if s, err := r.Snapshot(t.Context()); err != nil || len(s.Entries) != 0 {
			t.Errorf("%d entries are left, %v", len(s.Entries), err)
		}
	})
}

func TestTokens(t *testing.T) {
	t.Run("of 50 agents with one token exactly one gets in", func(t *testing.T) {
		r, _ := open(t)
		if err := r.CreateToken(t.Context(), "secret", noon.Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		var won atomic.Int32
		start := make(chan struct{})
		var group sync.WaitGroup
		for range 50 {
			group.Go(func() {
				<-start
				switch err := r.BurnToken(t.Context(), "secret"); {
				case err == nil:
					won.Add(1)
				case !errors.Is(err, ErrTokenUnknown):
					t.Error(err)
				}
			})
		}
		close(start)
		group.Wait()
		if won.Load() != 1 {
			t.Errorf("%d got in", won.Load())
		}
	})
	t.Run("an unknown, used or expired token is refused as evidence, an expired one burnt", func(t *testing.T) {
		r, c := open(t)
		ctx := t.Context()
		if err := r.CreateToken(ctx, "secret", noon.Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		check := func(token string, want error) {
			t.Helper()
			err := r.BurnToken(ctx, token)
			if !errors.Is(err, want) || !errors.Is(err, attestor.ErrEvidence) {
				t.Errorf("burn %q: %v", token, err)
			}
		}
		check("", ErrTokenUnknown)
		check("secre", ErrTokenUnknown)
		c.set(noon.Add(time.Minute))
		check("secret", ErrTokenExpired)
		c.set(noon)
		check("secret", ErrTokenUnknown)
		if got := ErrTokenUnknown.Error(); got != "join token does not exist or has already been used" {
			t.Errorf("text %q", got)
		}
		if got := ErrTokenExpired.Error(); got != "join token expired" {
			t.Errorf("text %q", got)
		}
	})
	t.Run("a token exists once", func(t *testing.T) {
		r, _ := open(t)
		for i, want := range []error{nil, ErrExists} {
			if err := r.CreateToken(t.Context(), "secret", noon.Add(time.Hour)); !errors.Is(err, want) {
				t.Errorf("try %d: %v", i, err)
			}
		}
	})
	t.Run("the token itself is not stored", func(t *testing.T) {
		r, _ := open(t)
		const token = "4b4e1ab9-68f3-4ad2-b3a5-c6b74f36a1f2"
		if err := r.CreateToken(t.Context(), token, noon.Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		items, _, err := r.store.Range(t.Context(), "", "", 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, it := range items {
			if strings.Contains(it.Key+string(it.Value), token) {
				t.Errorf("key %q has the token", it.Key)
			}
		}
	})
}

func TestSweep(t *testing.T) {
	t.Run("what has expired goes, what has not stays", func(t *testing.T) {
		r, _ := open(t)
		ids := map[string]string{}
		for name, at := range map[string]time.Time{
			"past": noon.Add(-time.Hour), "now": noon, "soon": noon.Add(time.Second), "never": {},
		} {
			e := entry(name, "a:1")
			e.ExpiresAt = at
			ids[name] = create(t, r, e).ID
		}
		moved := entry("moved", "a:1")
		moved.ExpiresAt = noon
		moved = create(t, r, moved)
		_, _, err := r.UpdateEntry(t.Context(), moved.ID, func(e *identity.Entry) error { e.ExpiresAt = noon.Add(time.Hour); return nil })
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Sweep(t.Context(), noon); err != nil {
			t.Fatal(err)
		}
		for name, id := range ids {
			_, err := r.Entry(t.Context(), id)
			if gone := name == "past" || name == "now"; gone != errors.Is(err, ErrNotFound) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := r.Entry(t.Context(), moved.ID); err != nil {
			t.Errorf("moved: %v", err)
		}
	})
	t.Run("thousands go in one sweep", func(t *testing.T) {
		r, _ := open(t)
		var batch []*identity.Entry
		for i := range 2 * sweepPage {
			e := entry("a", fmt.Sprintf("a:%d", i))
			e.ExpiresAt = noon
			batch = append(batch, e)
		}
		if _, _, err := r.CreateEntries(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
		if err := r.Sweep(t.Context(), noon); err != nil {
			t.Fatal(err)
		}
		if s, err := r.Snapshot(t.Context()); err != nil || len(s.Entries) != 0 {
			t.Errorf("%d entries are left, %v", len(s.Entries), err)
		}
	})
	t.Run("an unused token goes with its aliases; a used one's stay with the node", func(t *testing.T) {
		r, _ := open(t)
		ctx := t.Context()
		left := map[string]bool{}
		for _, c := range []struct {
			token       string
			burn, admit bool
		}{{"unused", false, false}, {"failed", true, false}, {"good", true, true}} {
			node := agent("join_token/" + c.token)
			if err := r.CreateToken(ctx, c.token, noon); err != nil {
				t.Fatal(err)
			}
			a := alias(t, r, node, c.token)
			left[a.ID] = c.admit
			if c.burn {
				if err := r.BurnToken(ctx, c.token); !errors.Is(err, ErrTokenExpired) {
					t.Fatal(err)
				}
			}
			if c.admit {
				admit(t, r, node)
			}
		}
		many := agent("join_token/many")
		if err := r.CreateToken(ctx, "many", noon); err != nil {
			t.Fatal(err)
		}
		for i := range maxAliases + 5 {
			left[alias(t, r, many, fmt.Sprintf("m%d", i)).ID] = false
		}
		for range 2 { // the second one deletes what did not fit in one transaction
			if err := r.Sweep(ctx, noon.Add(tokenGrace)); err != nil {
				t.Fatal(err)
			}
		}
		for id, want := range left {
			if _, err := r.Entry(ctx, id); (err == nil) != want {
				t.Errorf("alias %s: want it left: %v; %v", id, want, err)
			}
		}
		for _, prefix := range []string{expiryPrefix, tokenPrefix} {
			items, _, err := r.store.Range(ctx, prefix, kv.PrefixEnd(prefix), 0)
			if err != nil || len(items) > 0 {
				t.Errorf("left over: %v, %v", items, err)
			}
		}
	})
	t.Run("the end of a token's time is not that of one made again under its name", func(t *testing.T) {
		r, _ := open(t)
		ctx := t.Context()
		for _, expires := range []time.Time{noon.Add(time.Minute), noon.Add(time.Hour)} {
			if err := r.CreateToken(ctx, "again", expires); err != nil {
				t.Fatal(err)
			}
			if expires.Equal(noon.Add(time.Minute)) {
				if err := r.BurnToken(ctx, "again"); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := r.Sweep(ctx, noon.Add(time.Minute+tokenGrace)); err != nil {
			t.Fatal(err)
		}
		if err := r.BurnToken(ctx, "again"); err != nil {
			t.Errorf("the second: %v", err)
		}
	})
	t.Run("expiry keys lie in the order of time", func(t *testing.T) {
		for _, pair := range [][2]time.Time{
			{time.Unix(9, 0), time.Unix(10, 0)}, {time.Unix(999999999, 0), time.Unix(1000000000, 0)},
			{noon, time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)},
		} {
			if a, b := expiryKey(pair[0], kindEntry, "z"), expiryKey(pair[1], kindEntry, "a"); a >= b {
				t.Errorf("%q is not before %q", a, b)
			}
		}
	})
}

func TestCompact(t *testing.T) {
	t.Run("the log keeps the last revisions and the last hour", func(t *testing.T) {
		r, _ := open(t)
		r.cfg.KeepRevisions, r.cfg.KeepFor = 50, time.Hour
		put := func(n int) {
			for i := range n {
				id := agent(fmt.Sprintf("x509pop/%d", i))
				if _, _, err := r.UpdateNode(t.Context(), id, func(n *Node, _ bool) error { n.Serial += "1"; return nil }); err != nil {
					t.Fatal(err)
				}
			}
		}
		var marks []mark
		step := func(after time.Duration, want error, from kv.Rev) {
			t.Helper()
			var err error
			if marks, err = r.compact(t.Context(), marks, noon.Add(after)); err != nil {
				t.Fatal(err)
			}
			stop := errors.New("stop")
			err = r.Follow(t.Context(), from, func(Change) error { return stop })
			if want == nil {
				want = stop
			}
			if !errors.Is(err, want) {
				t.Errorf("after %s, from %d: %v", after, from, err)
			}
		}
		put(30) // revision 31
		step(0, nil, 0)
		put(10) // 41
		step(59*time.Minute, nil, 0)
		step(60*time.Minute, kv.ErrCompacted, 30)
		step(60*time.Minute, nil, 31)
		put(60) // 101
		step(61*time.Minute, kv.ErrCompacted, 50)
		step(61*time.Minute, nil, 51)
	})
}

func TestPartsOfNodes(t *testing.T) {
	one, two := agent("all/a/x509pop/1"), agent("all/a/x509pop/2")
	update := func(t *testing.T, r *Records, id spiffeid.ID, parts ...string) error {
		t.Helper()
		_, _, err := r.UpdateNode(t.Context(), id, func(n *Node, _ bool) error {
			n.Type, n.Parts = "all", parts
			return nil
		})
		return err
	}
	whole := func(t *testing.T, store kv.Store) {
		t.Helper()
		c, err := Check(t.Context(), store)
		if err != nil || len(c.Findings) > 0 {
			t.Errorf("the store is not whole: %v, %v", c.Findings, err)
		}
	}
	t.Run("a part belongs to one node at a time", func(t *testing.T) {
		r, _ := open(t)
		if err := update(t, r, one, "x509pop/1", "tpm/1"); err != nil {
			t.Fatal(err)
		}
		if err := update(t, r, two, "x509pop/2", "tpm/1"); !errors.Is(err, ErrTaken) {
			t.Errorf("the TPM of another node: %v", err)
		}
		if _, err := r.Node(t.Context(), two); !errors.Is(err, ErrNotFound) {
			t.Errorf("the second node is there: %v", err)
		}
		if err := update(t, r, one, "x509pop/1", "tpm/1"); err != nil {
			t.Errorf("the same again: %v", err)
		}
		whole(t, r.store)
		if err := update(t, r, one, "x509pop/1", "tpm/3"); err != nil {
			t.Fatal(err)
		}
		if err := update(t, r, two, "x509pop/2", "tpm/1"); err != nil {
			t.Errorf("a part that was let go: %v", err)
		}
		whole(t, r.store)
		if _, err := r.DeleteNode(t.Context(), one); err != nil {
			t.Fatal(err)
		}
		if err := update(t, r, two, "x509pop/1", "tpm/3"); err != nil {
			t.Errorf("parts of a node that is gone: %v", err)
		}
		whole(t, r.store)
	})
	t.Run("of many that come at once with one part, one gets it", func(t *testing.T) {
		r, _ := open(t)
		var all sync.WaitGroup
		var won atomic.Int32
		for i := range 8 {
			all.Go(func() {
				switch err := update(t, r, agent(fmt.Sprintf("all/a/x509pop/%d", i)), "tpm/1"); {
				case err == nil:
					won.Add(1)
				case !errors.Is(err, ErrTaken):
					t.Error(err)
				}
			})
		}
		all.Wait()
		if won.Load() != 1 {
			t.Errorf("%d nodes have it", won.Load())
		}
		whole(t, r.store)
	})
}
