package kube

import "testing"

func TestNamespacesThatAreIgnored(t *testing.T) {
	ignore := []string{"dev|dev-.*", "kube-system"}
	c, wrong := NewConfig("c1", Block{IgnoreNamespaces: &ignore})
	if len(wrong) > 0 {
		t.Fatal(wrong)
	}
	for name, want := range map[string]bool{
		"dev": true, "dev-1": true, "kube-system": true, "devil": false, "my-dev": false, "kube-system-2": false, "shop": false,
	} {
		if got := c.ignored(name); got != want {
			t.Errorf("namespace %s is ignored: %v, want %v", name, got, want)
		}
	}
	ignore = []string{"a)(b"} // none of its own, but one with what is put around it
	if _, wrong = NewConfig("c1", Block{IgnoreNamespaces: &ignore}); len(wrong) != 1 {
		t.Errorf("%q is taken: %v", ignore, wrong)
	}
}
