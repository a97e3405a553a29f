package admin

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/agent/admin/wire"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestExplainingVerdicts(t *testing.T) {
	digest := "sha256:" + strings.Repeat("a", 64)
	now := time.Unix(1_700_000_000, 0)
	inContainer := []attestor.Finding{{Attestor: "docker", Selectors: set("docker:label:app:shop", "image:id:"+digest)}}
	gated := entry("gated", 1, "docker:label:app:shop", "scan:policy:prod")
	verdict := func(change func(*identity.Verdict), texts ...string) *identity.Verdict {
		v := &identity.Verdict{Digest: digest, Seq: 12, Selectors: set(texts...)}
		if change != nil {
			change(v)
		}
		return v
	}
	failed := func(v *identity.Verdict) {
		v.Policies = []identity.PolicyVerdict{{Policy: "prod", Status: "fail", Summary: "CVE-2026-1 is critical"}, {Policy: "dev", Status: "pass"}}
	}
	for _, c := range []struct {
		name     string
		findings []attestor.Finding
		verdict  *identity.Verdict
		lapsed   bool
		want     []string // parts of the page
		not      string
	}{
		{"a good verdict", inContainer, verdict(nil, "scan:policy:prod"), false, []string{"verdict 12", "has      scan:policy:prod", "Entries that match: 1 of 1"}, "MISSING"},
		{"a bad one says why", inContainer, verdict(failed, "scan:status:prod:fail"), false, []string{
			"policy   prod says fail: CVE-2026-1 is critical", "has      scan:status:prod:fail", "MISSING  scan:policy:prod",
			"verdict 12 on image " + digest + " does not have it: policy prod says fail (CVE-2026-1 is critical)", "assay-server evidence explain -image " + digest,
		}, "entry update"},
		{"none is held", inContainer, nil, false, []string{digest + "  no verdict is held", "the agent holds no verdict on image"}, ""},
		{"one that has ended", inContainer, verdict(func(v *identity.Verdict) { v.NotAfter = now }, "scan:policy:prod"), false, []string{
			"verdict 12, which does not count any more", "its time is over",
		}, "Entries that match: 1"},
		{"an agent that is cut off", inContainer, verdict(nil, "scan:policy:prod"), true, []string{"does not count any more"}, "Entries that match: 1"},
		{
			"no image at all", []attestor.Finding{{Attestor: "docker", Selectors: set("docker:label:app:shop")}}, verdict(nil, "scan:policy:prod"), false,
			[]string{"of this process no image is known"}, "decided of its image",
		},
		{
			"an attestor that asserts verdicts", []attestor.Finding{{Attestor: "docker", Selectors: set("docker:label:app:shop", "scan:policy:prod")}}, nil, false,
			[]string{"MISSING  scan:policy:prod"}, "Entries that match: 1",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			held := view.New(func() time.Time { return now })
			u := view.Update{Full: true, Entries: []*identity.Entry{gated}}
			if c.verdict != nil {
				u.Verdicts = []*identity.Verdict{c.verdict}
			}
			if err := held.Apply(u); err != nil {
				t.Fatal(err)
			}
			held.Lapse(c.lapsed)
			x := weigh(c.findings, held.Picture(), held.Entries(), now)
			var page bytes.Buffer
			if err := render(&page, respond(x, c.findings, &wire.Process{Pid: 7}, Status{Connected: true}, 1, 1, now), now); err != nil {
				t.Fatal(err)
			}
			flat := strings.Join(strings.Fields(page.String()), " ")
			for _, want := range c.want {
				if !strings.Contains(flat, strings.Join(strings.Fields(want), " ")) {
					t.Errorf("page lacks %q:\n%s", want, page.String())
				}
			}
			if c.not != "" && strings.Contains(flat, c.not) {
				t.Errorf("page has %q:\n%s", c.not, page.String())
			}
		})
	}
}
