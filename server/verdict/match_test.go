package verdict

import (
	"testing"

	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/report"
)

func TestWhichImageADocumentIsAbout(t *testing.T) {
	const none = policy.Match("")
	w := newWorld(t, prod)
	amd, arm := config(1), config(2)
	amdManifest, amdDigest := manifestOf(amd)
	armManifest, armDigest := manifestOf(arm)
	both, bothDigest := indexOf(map[string]string{"linux/amd64": amdDigest, "linux/arm64": armDigest})
	_, unproved := indexOf(map[string]string{"linux/amd64": amdDigest, "linux/s390x": digestOf([]byte("x"))})
	proved, err := prove([][]byte{amdManifest, armManifest, both})
	if err != nil {
		t.Fatal(err)
	}
	for image, links := range proved {
		i := w.newImage(image)
		for digest, l := range links {
			w.addLink(i, digest, l)
		}
	}
	scanned := func(image, platform string, digests ...string) *document {
		d := &document{
			EvidenceDocument: &stored.EvidenceDocument{Kind: kindReport, Subjects: digests},
			report:           &report.Report{Subject: report.Subject{Config: image, Manifests: digests, Platform: platform}},
		}
		if image != "" {
			d.Subjects = append([]string{image}, digests...)
		}
		return d
	}
	signed := func(digests ...string) *document {
		return &document{EvidenceDocument: &stored.EvidenceDocument{Kind: kindProvenance, Subjects: digests}}
	}
	for _, c := range []struct {
		name string
		of   *document
		// what it is to the image of each platform
		amd64, arm64 policy.Match
	}{
		{"the config digest itself", scanned(amd, ""), policy.Strong, none},
		{"a manifest that was proved", scanned("", "", amdDigest), policy.Strong, none},
		{"a manifest that was not proved", scanned("", "", digestOf([]byte("unknown"))), none, none},
		{"an index and the platform", scanned("", "linux/amd64", bothDigest), policy.Weak, none},
		{"an index and the platform, said in other words", scanned("", "linux/arm64/v8", bothDigest), none, policy.Weak},
		{"an index without a platform", scanned("", "", bothDigest), none, none},
		{"an index and the platform, but another image", scanned(amd, "linux/arm64", bothDigest), policy.Strong, none},
		{"a manifest, but another image", scanned(config(3), "", amdDigest), none, none},
		{"an index that was not proved", scanned("", "linux/amd64", unproved), none, none},
		{"a manifest's digest in place of the config's", scanned(amdDigest, ""), policy.Strong, none},
		{"an index's digest in place of the config's", scanned(bothDigest, ""), none, none},
		{"the best of several", scanned("", "linux/amd64", armDigest, bothDigest, amdDigest), policy.Strong, policy.Strong},
		{"a signature on the index", signed(bothDigest), policy.Weak, policy.Weak},
		{"a signature on the manifest of one platform", signed(armDigest), none, policy.Strong},
		{"a signature on an index that was not proved", signed(unproved), none, none},
		{"a name is no digest", scanned("", "linux/amd64", "shop:latest"), none, none},
		{"a document about nothing", signed(), none, none},
	} {
		t.Run(c.name, func(t *testing.T) {
			for digest, want := range map[string]policy.Match{amd: c.amd64, arm: c.arm64} {
				if got := w.match(c.of, w.state.images[digest]); got != want {
					t.Errorf("to %s it is %q, want %q", digest, got, want)
				}
			}
		})
	}
}
