package admin

import (
	"fmt"
	"strings"

	"github.com/assay-id/assay/agent/admin/wire"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// image is an image that the process runs, and what the server has decided of it.
type image struct {
	digest string
	// verdict is nil if the agent holds none; counts says that it is in force.
	verdict *identity.Verdict
	counts  bool
}

func imagesOf(facts attestor.Set, p *view.Picture) []image {
	var images []image
	for _, digest := range identity.Running(facts) {
		_, counts := p.Verdict(digest)
		images = append(images, image{digest: digest, verdict: p.Verdicts[digest], counts: counts})
	}
	return images
}

// ungranted says why a selector is missing that only a verdict can vouch for.
func (x explanation) ungranted() string {
	if len(x.images) == 0 {
		return "only a verdict on the image vouches for it, and of this process no image is known"
	}
	var why []string
	for _, im := range x.images {
		switch {
		case im.verdict == nil:
			why = append(why, "the agent holds no verdict on image "+im.digest+": the server has none, or no workload that runs it has asked for an identity lately")
		case !im.counts:
			why = append(why, "the verdict on image "+im.digest+" does not count any more: its time is over, or the server was not heard from for too long")
		default:
			why = append(why, fmt.Sprintf("verdict %d on image %s does not have it%s", im.verdict.Seq, im.digest, said(im.verdict)))
		}
	}
	return strings.Join(why, "; ")
}

// said is what policies say that is not good.
func said(v *identity.Verdict) string {
	var texts []string
	for _, p := range v.Policies {
		if p.Status == "pass" {
			continue
		}
		text := "policy " + p.Policy + " says " + p.Status
		if p.Summary != "" {
			text += " (" + p.Summary + ")"
		}
		texts = append(texts, text)
	}
	if len(texts) == 0 {
		return ""
	}
	return ": " + strings.Join(texts, ", ")
}

// ungrantedOf returns the missing selectors that only a verdict can vouch for.
func ungrantedOf(n near) []string {
	var gates []string
	for _, m := range n.missing {
		if identity.Gating(m.selector) {
			gates = append(gates, m.selector.String())
		}
	}
	return gates
}

// sentence begins with a capital letter.
func sentence(text string) string {
	if text == "" {
		return ""
	}
	return strings.ToUpper(text[:1]) + text[1:]
}

// digestOf is the image's digest as an argument, if there is one.
func digestOf(x explanation) string {
	if len(x.images) == 0 {
		return ""
	}
	return " " + x.images[0].digest
}

func imageWire(im image) *wire.Image {
	w := &wire.Image{Digest: im.digest, Counts: im.counts}
	if v := im.verdict; v != nil {
		w.Verdict, w.Sequence, w.NotAfter, w.Selectors = true, v.Seq, millis(v.NotAfter), selectorsWire(v.Selectors.All())
		for _, p := range v.Policies {
			w.Policies = append(w.Policies, &wire.Policy{Name: p.Policy, Status: p.Status, Summary: p.Summary})
		}
	}
	return w
}

// images writes what is known of the process's images.
func (p *page) images(r *wire.ExplainResponse) {
	for _, im := range r.GetImages() {
		switch {
		case !im.GetVerdict():
			p.line("  %s  no verdict is held", im.GetDigest())
		case !im.GetCounts():
			p.line("  %s  verdict %d, which does not count any more", im.GetDigest(), im.GetSequence())
		default:
			p.line("  %s  verdict %d", im.GetDigest(), im.GetSequence())
		}
		for _, x := range im.GetPolicies() {
			p.line("      policy   %s says %s%s", x.GetName(), x.GetStatus(), because(x.GetSummary()))
		}
		for _, s := range im.GetSelectors() {
			p.line("      has      %s", text(s))
		}
	}
}

func because(summary string) string {
	if summary == "" {
		return ""
	}
	return ": " + summary
}
