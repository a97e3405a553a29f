package uplink

import "testing"

func TestWhatIsWorthTelling(t *testing.T) {
	was := Holding{By: []HeldBy{{Authority: "a", X509: 3}, {Authority: "b", X509: 1}}, Latest: []string{"b", ""}}
	for name, c := range map[string]struct {
		now  Holding
		want bool
	}{
		"the same":                             {was, false},
		"more by the one that signed last":     {Holding{By: []HeldBy{{Authority: "a", X509: 3}, {Authority: "b", X509: 9}}, Latest: was.Latest}, false},
		"less by another":                      {Holding{By: []HeldBy{{Authority: "a", X509: 2}, {Authority: "b", X509: 1}}, Latest: was.Latest}, true},
		"nothing by another":                   {Holding{By: []HeldBy{{Authority: "b", X509: 1}}, Latest: was.Latest}, true},
		"another that signed last, of no more": {Holding{By: was.By, Latest: []string{"a", ""}}, true},
		"nothing at all":                       {Holding{Latest: was.Latest}, true},
	} {
		t.Run(name, func(t *testing.T) {
			if got := c.now.differs(was); got != c.want {
				t.Errorf("differs %t", got)
			}
		})
	}
}
