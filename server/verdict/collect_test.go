package verdict

import (
	"context"
	"errors"
	"maps"
	"slices"
	"testing"
	"time"

	proofs "github.com/assay-id/assay/server/verdict/image"
	"github.com/assay-id/assay/server/verdict/trust"
)

// attaching is a registry in which something is attached to digests.
type attaching struct {
	registry
	attached map[string][]proofs.Attachment
	err      error
}

func (a attaching) Attached(_ context.Context, _, digest string, wanted func(string) bool) ([]proofs.Attachment, error) {
	return slices.DeleteFunc(slices.Clone(a.attached[digest]), func(one proofs.Attachment) bool { return !wanted(one.MediaType) }), a.err
}

func attachment(mediaType string, content []byte) proofs.Attachment {
	return proofs.Attachment{MediaType: mediaType, Digest: digestOf(content), Content: content}
}

// TestWhatIsAttachedInTheRegistryCounts has the server fetch what CI left beside the image: the signed statement
// counts, whoever asks; what somebody else has attached does not.
func TestWhatIsAttachedInTheRegistryCounts(t *testing.T) {
	const envelope = "application/vnd.dsse.envelope.v1+json"
	key, stranger := newSigner(t), newSigner(t)
	w := newWorld(t, prod+trusting(key, ""))
	image := config(1)
	blob, manifest := manifestOf(image)
	var unsigned []byte
	reg := attaching{registry: registry{manifest: blob}, attached: map[string][]proofs.Attachment{}}
	w.Fetcher = &reg
	unsigned = scan{image: image, at: w.now()}.json(t)
	reg.attached[manifest] = []proofs.Attachment{
		attachment(envelope, stranger.sign(t, vulnPredicate, vulnOf(t, scan{image: image, at: w.now()}), manifest)),
		attachment(envelope, unsigned),
		attachment("application/json", unsigned),
		attachment(envelope, key.sign(t, slsaPredicate, slsa("abc"), manifest)),
	}
	// Signed once for the manifest and once for what is found by the configuration.
	reg.attached[image] = []proofs.Attachment{reg.attached[manifest][3]}

	got, err := w.Collect(t.Context(), admin, "reg/shop@"+manifest)
	if err != nil || len(got) != 3 {
		t.Fatalf("collected %+v, %v", got, err)
	}
	for n, want := range []bool{false, false, true} {
		if (got[n].Pushed != nil) != want || (got[n].Refused == nil) != want {
			t.Errorf("document %d: %+v", n, got[n])
		}
	}
	v, err := w.rec.Verdict(t.Context(), image)
	if err != nil || !slices.Contains(v.Selectors.Strings(), "prov:policy:scanner") {
		t.Errorf("the signed statement gives nothing: %v, %v", v, err)
	}
	w.wantGate(image, false)

	t.Run("a scan that was attached since opens the gate", func(*testing.T) {
		w.pass(time.Minute)
		reg.attached[manifest] = append(reg.attached[manifest], attachment(envelope, key.sign(t, vulnPredicate, vulnOf(t, scan{image: image, at: w.now()}), manifest)))
		if _, err := w.Collect(t.Context(), admin, "reg/shop@"+manifest); err != nil {
			t.Fatal(err)
		}
		w.wantGate(image, true)
	})
	t.Run("only for repositories that the caller may push for", func(t *testing.T) {
		if _, err := w.Collect(t.Context(), Pusher{Name: "pipeline", Push: &trust.Push{}}, "reg/shop@"+manifest); !errors.Is(err, ErrVouch) {
			t.Errorf("got %v", err)
		}
	})
	for name, c := range map[string]struct {
		image string
		with  func()
	}{
		"an image without a repository":     {image: manifest},
		"a tag":                             {image: "reg/shop:latest"},
		"what the registry does not know":   {image: "reg/shop@" + config(9)},
		"a registry that says nothing":      {"reg/shop@" + manifest, func() { reg.attached, reg.err = nil, errors.New("down") }},
		"a server that may ask no registry": {"reg/shop@" + manifest, func() { w.Fetcher = nil }},
	} {
		t.Run(name+" is refused with a sentence", func(t *testing.T) {
			was, before := w.Fetcher, attaching{reg.registry, maps.Clone(reg.attached), reg.err}
			defer func() { w.Fetcher, reg = was, before }()
			if c.with != nil {
				c.with()
			}
			if _, err := w.Collect(t.Context(), admin, c.image); !errors.Is(err, ErrImage) || len(err.Error()) < 20 {
				t.Errorf("got %v", err)
			}
		})
	}
}
