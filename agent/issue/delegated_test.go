package issue_test

import (
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/issue"
	"github.com/assay-id/assay/workloadapi/identity"
)

// TestDelegated holds both answers to one rule: SPIRE left admin and downstream entries out of delegated
// X509-SVIDs and forgot the JWT-SVIDs (#6972).
func TestDelegated(t *testing.T) {
	power := map[string]func(*identity.Entry){
		"admin":      func(e *identity.Entry) { e.Admin = true },
		"downstream": func(e *identity.Entry) { e.Downstream = true },
	}
	for name, give := range power {
		t.Run("an entry that is "+name+" is nobody's to have for another", func(t *testing.T) {
			bubble(t, issue.Config{}, func(w *world) {
				e := entry("power", 9, "a:1")
				e.Hint = "h" // which must not stand in the way of the other's
				give(e)
				f := entry("plain", 1, "a:1")
				f.Hint = "h"
				w.put(e, f)
				d := w.issuer.Delegated()
				x, _, err := d.X509(w.t.Context(), set("a:1"))
				if err != nil || !slices.Equal(ids(x), []string{"plain"}) {
					w.t.Errorf("got X509-SVIDs of %v, %v", ids(x), err)
				}
				j, _, err := d.JWT(w.t.Context(), set("a:1"), []string{"x"}, spiffeid.ID{})
				if err != nil || len(j) != 1 || j[0].EntryID != "plain" {
					w.t.Errorf("got JWT-SVIDs %v, %v", j, err)
				}
				if j, _, err := d.JWT(w.t.Context(), set("a:1"), []string{"x"}, e.SPIFFEID); err != nil || len(j) != 0 {
					w.t.Errorf("asked for by its ID, got JWT-SVIDs %v, %v", j, err)
				}
				if own, _ := w.fetch(set("a:1")); !slices.Equal(ids(own), []string{"power"}) {
					w.t.Errorf("the workload itself gets %v", ids(own))
				}
			})
		})
		t.Run("an entry that becomes "+name+" is taken away", func(t *testing.T) {
			bubble(t, issue.Config{}, func(w *world) {
				w.put(entry("e", 1, "a:1"))
				d := w.issuer.Delegated()
				x, changed, err := d.X509(w.t.Context(), set("a:1"))
				if err != nil || len(x.SVIDs) != 1 {
					w.t.Fatalf("got %v, %v", x, err)
				}
				e := entry("e", 1, "a:1")
				e.Revision = 1
				give(e)
				w.put(e)
				<-changed
				if x, _, err = d.X509(w.t.Context(), set("a:1")); err != nil || len(x.SVIDs) != 0 {
					w.t.Errorf("got %v, %v", x, err)
				}
			})
		})
	}
	t.Run("what facts entitle to is told without signing", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			got, changed := w.issuer.Entitled(set("a:1"))
			if len(got) != 0 {
				w.t.Errorf("got %v", got)
			}
			w.put(entry("old", 9, "a:1"), entry("new", 1, "a:1"))
			<-changed
			got, _ = w.issuer.Entitled(set("a:1"))
			if len(got) != 2 || got[0].Path() != "/old" {
				w.t.Errorf("got %v", got)
			}
			if n, _ := w.signer.count(); n != 0 {
				w.t.Errorf("%d signatures", n)
			}
		})
	})
}
