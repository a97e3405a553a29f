package verdict

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/verdict/trust"
)

// signer is a key that a trust policy knows by its file.
type signer struct {
	*ecdsa.PrivateKey
	path string
}

func newSigner(t *testing.T) signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return signer{key, path}
}

// sign puts a statement about the digests in a DSSE envelope.
func (s signer) sign(t *testing.T, predicateType string, predicate any, digests ...string) []byte {
	t.Helper()
	var subject []any
	for _, d := range digests {
		subject = append(subject, map[string]any{"name": "shop", "digest": map[string]any{"sha256": strings.TrimPrefix(d, "sha256:")}})
	}
	payload, err := json.Marshal(map[string]any{
		"_type": "https://in-toto.io/Statement/v1", "subject": subject, "predicateType": predicateType, "predicate": predicate,
	})
	if err != nil {
		t.Fatal(err)
	}
	const kind = "application/vnd.in-toto+json"
	sum := sha256.Sum256(fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(kind), kind, len(payload), payload))
	sig, err := ecdsa.SignASN1(rand.Reader, s.PrivateKey, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(map[string]any{
		"payload": base64.StdEncoding.EncodeToString(payload), "payloadType": kind,
		"signatures": []any{map[string]any{"sig": base64.StdEncoding.EncodeToString(sig)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

const (
	vulnPredicate = "https://cosign.sigstore.dev/attestation/vuln/v1"
	slsaPredicate = "https://slsa.dev/provenance/v1"
	vexPredicate  = "https://openvex.dev/ns/v0.2.0"
)

func vulnOf(t *testing.T, s scan) map[string]any {
	at := s.at.Format(time.RFC3339)
	return map[string]any{
		"invocation": map[string]any{}, "scanner": map[string]any{"uri": "pkg:github/aquasecurity/trivy@0.50", "version": "0.50", "result": json.RawMessage(s.json(t))},
		"metadata": map[string]any{"scanStartedOn": at, "scanFinishedOn": at},
	}
}

func slsa(commit string) map[string]any {
	return map[string]any{
		"buildDefinition": map[string]any{
			"buildType": "https://example.org/build", "externalParameters": map[string]any{},
			"resolvedDependencies": []any{map[string]any{"uri": "git+https://example.org/shop", "digest": map[string]any{"gitCommit": commit}}},
		},
		"runDetails": map[string]any{"builder": map[string]any{"id": "https://example.org/builder"}},
	}
}

func trusting(key signer, more string) string {
	return fmt.Sprintf("\ntrust_policy \"scanner\" {\n  predicate_types = [\"scan\", \"vex\", \"provenance\"]\n  %s\n  key {\n    path = %q\n  }\n}\n", more, key.path)
}

func (w *world) send(image string, content []byte, manifests ...[]byte) (*Pushed, error) {
	return w.Push(w.t.Context(), admin, Document{Image: "reg/shop@" + image, Content: content, Manifests: manifests})
}

func TestAForgedReportIsRefused(t *testing.T) {
	key, other := newSigner(t), newSigner(t)
	w := newWorld(t, prod+trusting(key, ""))
	image := config(1)
	good := key.sign(t, vulnPredicate, vulnOf(t, scan{image: image, at: w.now()}), image)
	for name, content := range map[string][]byte{
		"by another key":       other.sign(t, vulnPredicate, vulnOf(t, scan{image: image, at: w.now()}), image),
		"about another digest": key.sign(t, vulnPredicate, vulnOf(t, scan{image: config(2), at: w.now()}), config(2)),
		"with a bit flipped":   []byte(strings.Replace(string(good), `"payload":"eyJ`, `"payload":"eyK`, 1)),
		"truncated":            good[:len(good)/2],
	} {
		if _, err := w.send(image, content); !errors.Is(err, ErrRefused) {
			t.Errorf("a report %s is answered with %v", name, err)
		}
	}
	if _, err := w.send(image, good); err != nil {
		t.Fatal(err)
	}
	w.wantGate(image, true)
}

func TestARevokedKeyTakesWithItWhatItSigned(t *testing.T) {
	key := newSigner(t)
	w := newWorld(t, prod+trusting(key, ""))
	image := config(1)
	if _, err := w.send(image, key.sign(t, vulnPredicate, vulnOf(t, scan{image: image, at: w.now()}), image)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.send(image, key.sign(t, slsaPredicate, slsa("aaaa"), image)); err != nil {
		t.Fatal(err)
	}
	has := func(selector string) bool {
		v, err := w.rec.Verdict(t.Context(), image)
		return err == nil && slices.Contains(v.Selectors.Strings(), selector)
	}
	if w.wantGate(image, true); !has("prov:policy:scanner") || !has("sig:policy:scanner") {
		t.Error("provenance gives no selectors")
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(der)
	revoked := rulesOf(t, prod+trusting(key, fmt.Sprintf("revoked_keys = [%q]", "sha256:"+hex.EncodeToString(sum[:]))))
	if err := w.Replace(t.Context(), revoked); err != nil {
		t.Fatal(err)
	}
	if w.wantGate(image, false); has("prov:policy:scanner") || has("sig:policy:scanner") {
		t.Error("provenance of a revoked key still counts")
	}
	t.Run("and it is found at the next start, too", func(t *testing.T) {
		w.rules = rulesOf(t, prod+trusting(key, ""))
		w.restart()
		w.wantGate(image, true)
		w.rules = revoked
		w.restart()
		w.wantGate(image, false)
	})
}

// reloading is the context of a push while which other rules are put in force: once it is known by which rules the
// document is judged, for the context is asked from then on.
type reloading struct {
	context.Context
	replace func()
}

func (r *reloading) Err() error {
	if replace := r.replace; replace != nil {
		r.replace = nil
		replace()
	}
	return r.Context.Err()
}

func TestRulesThatArePutInForceMeanwhileDecide(t *testing.T) {
	key, other := newSigner(t), newSigner(t)
	w := newWorld(t, prod+trusting(key, ""))
	replace := func(rules string) func() {
		return func() {
			if err := w.Replace(t.Context(), rulesOf(t, rules)); err != nil {
				t.Error(err)
			}
		}
	}
	push := func(image string, s signer, rules string) error {
		ctx := &reloading{Context: t.Context(), replace: replace(rules)}
		content := s.sign(t, vulnPredicate, vulnOf(t, scan{image: image, at: w.now()}), image)
		_, err := w.Push(ctx, admin, Document{Image: "reg/shop@" + image, Content: content})
		if ctx.replace != nil {
			t.Fatal("the rules were not replaced")
		}
		return err
	}
	if err := push(config(1), key, prod+trusting(other, "")); !errors.Is(err, trust.ErrRefused) {
		t.Errorf("by a key that is not trusted any more: %v", err)
	}
	w.wantGate(config(1), false)
	if err := push(config(2), other, prod+trusting(other, "")); err != nil {
		t.Errorf("by a key that is trusted still: %v", err)
	}
	w.wantGate(config(2), true)
}

func TestWhoWasLetInByOtherRulesPushesNothing(t *testing.T) {
	source := func(id string) string {
		return strings.Replace(prod, `"scanner"]`, `"ci"]`, 1) + `
evidence_source "ci" {
  repositories   = ["reg/shop"]
  allow_unsigned = true
  svid {
    ids = ["spiffe://example.org/` + id + `"]
  }
}
`
	}
	w := newWorld(t, source("ci"))
	image := config(1)
	send := func(push *trust.Push) error {
		_, err := w.Push(t.Context(), Pusher{Name: "ci", Push: push}, Document{Image: "reg/shop@" + image, Content: scan{image: image, at: w.now()}.json(t)})
		return err
	}
	push, err := w.Callers().SVID(spiffeid.RequireFromPath(td, "/ci"))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Replace(t.Context(), rulesOf(t, source("build"))); err != nil {
		t.Fatal(err)
	}
	if err := send(push); !errors.Is(err, ErrRules) || errors.Is(err, ErrRefused) {
		t.Errorf("got %v", err)
	}
	w.wantGate(image, false)
	if push, err = w.Callers().SVID(spiffeid.RequireFromPath(td, "/build")); err != nil {
		t.Fatal(err)
	}
	if err := send(push); err != nil {
		t.Error(err)
	}
	w.wantGate(image, true)
}

// manifestOf returns a manifest with the config, and its digest.
func manifestOf(config string) ([]byte, string) {
	m := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` +
		config + `","size":1},"layers":[]}`)
	return m, digestOf(m)
}

func indexOf(platforms map[string]string) ([]byte, string) {
	var list []string
	for platform, manifest := range platforms {
		os, arch, _ := strings.Cut(platform, "/")
		list = append(list, `{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"`+manifest+`","size":1,"platform":{"os":"`+os+`","architecture":"`+arch+`"}}`)
	}
	slices.Sort(list)
	x := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[` + strings.Join(list, ",") + `]}`)
	return x, digestOf(x)
}

func TestAnIndexDoesNotLendItsVerdictToAnotherPlatform(t *testing.T) {
	key := newSigner(t)
	w := newWorld(t, prod+trusting(key, ""))
	amd, arm := config(1), config(2)
	amdManifest, amdDigest := manifestOf(amd)
	armManifest, armDigest := manifestOf(arm)
	index, indexDigest := indexOf(map[string]string{"linux/amd64": amdDigest, "linux/arm64": armDigest})
	blobs := [][]byte{amdManifest, armManifest, index}
	w.run(amd, 1)
	w.run(arm, 1)
	t.Run("a scan of one platform, pushed for the index", func(t *testing.T) {
		if _, err := w.send(indexDigest, scan{image: amd, at: w.now()}.json(t), blobs...); err != nil {
			t.Fatal(err)
		}
		w.wantGate(amd, true)
		w.wantGate(arm, false)
	})
	t.Run("provenance of one platform's manifest", func(t *testing.T) {
		if _, err := w.send(armDigest, key.sign(t, slsaPredicate, slsa("bbbb"), armDigest), blobs...); err != nil {
			t.Fatal(err)
		}
		has := func(image string) bool {
			v, err := w.rec.Verdict(t.Context(), image)
			return err == nil && slices.Contains(v.Selectors.Strings(), "prov:policy:scanner")
		}
		if !has(arm) || has(amd) {
			t.Errorf("arm64 has it: %t, amd64 has it: %t", has(arm), has(amd))
		}
	})
	t.Run("a manifest nobody proved leads nowhere", func(t *testing.T) {
		_, stray := manifestOf(config(3))
		p, err := w.send(stray, key.sign(t, slsaPredicate, slsa("cccc"), stray))
		if err != nil || len(p.Images) != 0 || len(p.Notes) == 0 {
			t.Errorf("%+v, %v", p, err)
		}
	})
}

func TestAVEXStatementGivesTheIdentityBack(t *testing.T) {
	key := newSigner(t)
	w := newWorld(t, strings.Replace(prod, "fail {", "vex {\n    trust = [\"scanner\"]\n  }\n  fail {", 1)+trusting(key, ""))
	image := config(1)
	w.mustPush(scan{image: image, findings: []string{critical}})
	w.wantGate(image, false)
	statement := func(status, justification string, version int) []byte {
		return key.sign(t, vexPredicate, map[string]any{
			"@context": vexPredicate, "@id": "https://example.org/vex/1", "author": "team", "timestamp": w.now().Format(time.RFC3339), "version": version,
			"statements": []any{map[string]any{
				"vulnerability": map[string]any{"name": "CVE-2026-1"},
				"products":      []any{map[string]any{"@id": "pkg:oci/shop@" + image, "subcomponents": []any{map[string]any{"@id": "pkg:deb/debian/lib@1"}}}},
				"status":        status, "justification": justification, "timestamp": w.now().Format(time.RFC3339),
			}},
		}, image)
	}
	if _, err := w.send(image, statement("not_affected", "", 1)); err != nil {
		t.Fatal(err)
	}
	w.wantGate(image, false) // no justification
	if _, err := w.send(image, statement("not_affected", "vulnerable_code_not_present", 2)); err != nil {
		t.Fatal(err)
	}
	w.wantGate(image, true)
	if _, err := w.send(image, statement("affected", "", 1)); !errors.Is(err, ErrStale) {
		t.Errorf("an older version is answered with %v", err)
	}
	w.wantGate(image, true)
	w.pass(time.Minute)
	if _, err := w.send(image, statement("affected", "", 3)); err != nil {
		t.Fatal(err)
	}
	w.wantGate(image, false)
}

func TestAlertsAreSignedAndSurviveARestart(t *testing.T) {
	var got []event
	taken := make(chan struct{}, 100)
	down := true
	hook := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if down {
			http.Error(rw, "later", http.StatusServiceUnavailable)
			return
		}
		body, _ := io.ReadAll(r.Body)
		at, sum, _ := strings.Cut(strings.TrimPrefix(r.Header.Get(SignatureHeader), "t="), ",v1=")
		mac := hmac.New(sha256.New, []byte("secret"))
		mac.Write([]byte(at + "." + string(body)))
		if hex.EncodeToString(mac.Sum(nil)) != sum {
			t.Error("wrong signature")
		}
		var e event
		if err := json.Unmarshal(body, &e); err != nil {
			t.Error(err)
		}
		got = append(got, e)
		taken <- struct{}{}
	}))
	defer hook.Close()
	w := newWorld(t, prod, func(w *world) {
		w.rules.Webhooks = []Webhook{{Name: "chat", URL: hook.URL, Key: []byte("secret")}}
	})
	image := config(1)
	w.run(image, 1)
	w.mustPush(scan{image: image})
	w.pass(time.Minute)
	w.mustPush(scan{image: image, findings: []string{critical}})
	if _, err := w.send(image, []byte("nonsense")); !errors.Is(err, ErrRefused) {
		t.Fatal(err)
	}
	w.restart()
	down = false
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.deliver(ctx) }()
	for range 3 {
		<-taken
	}
	for _, m := w.first("chat"); m != nil; _, m = w.first("chat") {
		runtime.Gosched() // the last is taken, and about to be forgotten
	}
	stop()
	<-done
	var kinds []string
	for _, e := range got {
		kinds = append(kinds, e.Type)
	}
	if !slices.Equal(kinds, []string{eventRestore, eventWithdraw, eventRejected}) || got[1].Finding != "CVE-2026-1" || got[1].Digest != image || len(got[1].Agents) != 1 {
		t.Errorf("got %v: %+v", kinds, got)
	}
	w.restart()
	if n, m := w.first("chat"); m != nil {
		t.Errorf("alert %d is still there", n)
	}
}

func TestATokensSourceVouchesOnlyForItsRepositories(t *testing.T) {
	w := newWorld(t, strings.Replace(prod, `"scanner"]`, `"ci"]`, 1)+`
evidence_source "ci" {
  repositories   = ["reg/shop"]
  allow_unsigned = true
  svid {
    ids = ["spiffe://example.org/ci/*"]
  }
}
`)
	image := config(1)
	push, err := w.Callers().SVID(spiffeid.RequireFromPath(td, "/ci/build"))
	if err != nil {
		t.Fatal(err)
	}
	push.Fields = map[string]string{trust.FieldRunInvocationURI: "https://ci.example.org/run/7"} // as a token's claims are
	who := Pusher{Name: "ci", Push: push}
	content := scan{image: image, at: w.now()}.json(t)
	if _, err := w.Push(t.Context(), who, Document{Image: "reg/other@" + image, Content: content}); !errors.Is(err, ErrVouch) {
		t.Errorf("for another repository: %v", err)
	}
	if _, err := w.Push(t.Context(), who, Document{Image: image, Content: content}); !errors.Is(err, ErrVouch) {
		t.Errorf("for no repository: %v", err)
	}
	if _, err := w.Push(t.Context(), who, Document{Image: "reg/shop@" + image, Content: content}); err != nil {
		t.Fatal(err)
	}
	w.wantGate(image, true)
	t.Run("it is remembered which run has pushed, and that says nothing of the image", func(t *testing.T) {
		w.restart()
		whole, err := w.Show(image, nil)
		if err != nil || len(whole.Documents) != 1 || whole.Documents[0].PushedWith[trust.FieldRunInvocationURI] != "https://ci.example.org/run/7" {
			t.Errorf("got %+v, %v", whole, err)
		}
		if strings.Contains(strings.Join(whole.Selectors, " "), "run/7") {
			t.Errorf("its workloads are given %v", whole.Selectors)
		}
	})
	t.Run("until the source is gone", func(t *testing.T) {
		rules := w.rules
		rules.Sources = nil
		if err := w.Replace(t.Context(), rules); err != nil {
			t.Fatal(err)
		}
		w.wantGate(image, false)
	})
	if _, err := w.Callers().SVID(td.ID()); !errors.Is(err, trust.ErrRefused) {
		t.Errorf("a stranger: %v", err)
	}
}
