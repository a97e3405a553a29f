package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	ociManifest = "application/vnd.oci.image.manifest.v1+json"
	ociIndex    = "application/vnd.oci.image.index.v1+json"
	ociConfig   = "application/vnd.oci.image.config.v1+json"
)

func digestOf(name string) string { return sumOf([]byte(name)) }

func manifest(config string) []byte {
	return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":1},"layers":[]}`, ociManifest, ociConfig, config)
}

// index names manifests, each with a platform "os/architecture[/variant]".
func index(children ...[2]string) []byte {
	var list []any
	for _, c := range children {
		parts := append(strings.Split(c[1], "/"), "", "")
		list = append(list, map[string]any{
			"mediaType": ociManifest, "digest": c[0],
			"platform": map[string]string{"os": parts[0], "architecture": parts[1], "variant": parts[2]},
		})
	}
	raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ociIndex, "manifests": list})
	if err != nil {
		panic(err)
	}
	return raw
}

func TestMatch(t *testing.T) {
	amd, arm := digestOf("config amd64"), digestOf("config arm64")
	amdManifest, armManifest := manifest(amd), manifest(arm)
	both := index([2]string{sumOf(amdManifest), "linux/amd64"}, [2]string{sumOf(armManifest), "linux/arm64/v8"})
	unproved := index([2]string{digestOf("another"), "linux/amd64"}, [2]string{sumOf(amdManifest), "linux/amd64"}, [2]string{digestOf("x"), "linux/s390x"})
	var links Links
	for _, content := range [][]byte{amdManifest, armManifest, both} {
		if _, err := links.Prove(sumOf(content), content); err != nil {
			t.Fatal(err)
		}
	}
	onAMD, onARM := Subject{Config: amd, Platform: "linux/amd64"}, Subject{Config: arm, Platform: "linux/arm64"}
	digests := func(contents ...[]byte) (list []string) {
		for _, c := range contents {
			list = append(list, sumOf(c))
		}
		return list
	}
	for _, c := range []struct {
		name    string
		claim   Claim
		subject Subject
		want    Strength
		steps   int
	}{
		{"the config digest itself", Claim{ImageID: amd}, onAMD, Strong, 0},
		{"another image's config digest", Claim{ImageID: arm}, onAMD, None, 0},
		{"a manifest that was proved", Claim{Digests: digests(amdManifest)}, onAMD, Strong, 1},
		{"the manifest of the other platform", Claim{Digests: digests(armManifest)}, onAMD, None, 0},
		{"a manifest that was not proved", Claim{Digests: []string{digestOf("unknown")}}, onAMD, None, 0},
		{"an index and the platform", Claim{Digests: digests(both), Platform: "linux/amd64"}, onAMD, Weak, 2},
		{"an index and the platform, said in other words", Claim{Digests: digests(both), Platform: "linux/arm64/v8"}, onARM, Weak, 2},
		{"an index and another platform", Claim{Digests: digests(both), Platform: "linux/amd64"}, onARM, None, 0},
		{"an index without a platform", Claim{Digests: digests(both)}, onAMD, None, 0},
		{"an index and the platform, but another image", Claim{ImageID: amd, Digests: digests(both), Platform: "linux/arm64"}, onARM, None, 0},
		{"a manifest, but another image", Claim{ImageID: digestOf("other"), Digests: digests(amdManifest)}, onAMD, None, 0},
		{"a signature on the index", Claim{Digests: digests(both), Whole: true}, onARM, Strong, 2},
		{"a signature on the other manifest", Claim{Digests: digests(armManifest), Whole: true}, onAMD, None, 0},
		{"an index that was not proved", Claim{Digests: digests(unproved), Platform: "linux/amd64", Whole: true}, onAMD, None, 0},
		{"a manifest's digest in place of the config's", Claim{ImageID: sumOf(amdManifest)}, onAMD, Strong, 1},
		{"an index's digest in place of the config's", Claim{ImageID: sumOf(both)}, onAMD, None, 0},
		{"the best of several", Claim{Digests: digests(armManifest, both, amdManifest), Platform: "linux/amd64"}, onAMD, Strong, 1},
		{"a container whose image is not known", Claim{ImageID: "", Digests: digests(both), Whole: true}, Subject{Platform: "linux/amd64"}, None, 0},
		{"nothing is not nothing", Claim{}, Subject{}, None, 0},
		{"names are no digests", Claim{Digests: []string{"shop:latest"}, ImageID: ""}, onAMD, None, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, proof := Match(c.claim, c.subject, &links)
			if got != c.want || len(proof) != c.steps {
				t.Fatalf("%s by %v, want %s in %d steps", got, proof, c.want, c.steps)
			}
			for n, link := range proof { // the proof leads to the config without a gap
				if n > 0 && proof[n-1].To != link.From || n == len(proof)-1 && link.To != c.subject.Config {
					t.Errorf("proof %v", proof)
				}
			}
		})
	}
}

func TestProve(t *testing.T) {
	good := manifest(digestOf("config"))
	both := strings.Replace(string(good), `"layers":[]`, `"layers":[],"manifests":[]`, 1)
	for _, c := range []struct {
		name    string
		content string
		want    error
	}{
		{"a manifest", string(good), nil},
		{"an index", string(index([2]string{digestOf("m"), "linux/amd64"})), nil},
		{"no JSON", "hello", ErrNoImage},
		{"nothing", "", ErrNoImage},
		{"null", "null", ErrNoImage},
		{"a manifest that is an index too", both, ErrNoImage},
		{"a manifest that says it is an index", strings.Replace(string(good), ociManifest, ociIndex, 1), ErrNoImage},
		{"another kind of artifact", strings.Replace(string(good), ociConfig, "application/vnd.cncf.helm.config.v1+json", 1), ErrNoImage},
		{"a config digest that is none", strings.Replace(string(good), digestOf("config"), "sha256:1", 1), ErrNoImage},
		{"an old schema", `{"schemaVersion":1,"fsLayers":[]}`, ErrNoImage},
		{"an index without end", string(index(make([][2]string, maxManifests+1)...)), ErrNoImage},
	} {
		t.Run(c.name, func(t *testing.T) {
			var links Links
			_, err := links.Prove(sumOf([]byte(c.content)), []byte(c.content))
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	t.Run("bytes of another digest prove nothing", func(t *testing.T) {
		var links Links
		for _, digest := range []string{digestOf("other"), "sha256:1", "", "md5:" + digestOf("")[7:]} {
			if _, err := links.Prove(digest, good); !errors.Is(err, ErrDigest) {
				t.Errorf("%q: %v", digest, err)
			}
		}
		if strength, _ := Match(Claim{Digests: []string{digestOf("other")}}, Subject{Config: digestOf("config")}, &links); strength != None {
			t.Error(strength)
		}
	})
	t.Run("attestations are no images", func(t *testing.T) {
		content := fmt.Sprintf(`{"schemaVersion":2,"manifests":[
			{"mediaType":%[1]q,"digest":%[2]q,"platform":{"os":"linux","architecture":"amd64"}},
			{"mediaType":%[1]q,"digest":%[3]q,"platform":{"os":"unknown","architecture":"unknown"},"annotations":{"vnd.docker.reference.type":"attestation-manifest"}}
		]}`, ociManifest, digestOf("image"), digestOf("attestation"))
		var links Links
		p, err := links.Prove(sumOf([]byte(content)), []byte(content))
		if err != nil {
			t.Fatal(err)
		}
		want := []Link{{From: sumOf([]byte(content)), To: digestOf("image"), Platform: "linux/amd64"}}
		if diff := cmp.Diff(want, p.Manifests); diff != "" {
			t.Error(diff)
		}
	})
}

// FuzzProve checks that no bytes make the parser panic, and that what it accepts leads somewhere.
func FuzzProve(f *testing.F) {
	f.Add(manifest(digestOf("config")))
	f.Add(index([2]string{digestOf("m"), "linux/arm/v7"}))
	f.Add([]byte(`{"schemaVersion":2,"manifests":null}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		var links Links
		p, err := links.Prove(sumOf(content), content)
		if err != nil {
			return
		}
		if p.Config != "" {
			if got, proof := Match(Claim{Digests: []string{sumOf(content)}}, Subject{Config: p.Config}, &links); got != Strong || len(proof) != 1 {
				t.Errorf("%s by %v", got, proof)
			}
		}
	})
}
