package admin

import "testing"

func TestSelectorsThatAreAdvised(t *testing.T) {
	for _, c := range []struct{ facts, want []string }{
		{[]string{"k8s:ns:shop", "k8s:pod-name:a", "k8s:sa:default", "unix:uid:0"}, []string{"k8s:sa:default", "k8s:ns:shop"}}, // or every namespace's default would have it
		{[]string{"unix:gid:5", "unix:path:/bin/a", "unix:uid:5"}, []string{"unix:path:/bin/a", "unix:uid:5"}},
		{[]string{"unix:gid:5", "unix:uid:5"}, []string{"unix:uid:5"}},
	} {
		got := telling(set(c.facts...))
		same := len(got) == len(c.want)
		for i := range min(len(got), len(c.want)) {
			same = same && got[i].String() == c.want[i]
		}
		if !same {
			t.Errorf("of %q the advice is %v, want %q", c.facts, got, c.want)
		}
	}
}
