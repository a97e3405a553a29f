package verdict

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/server/records"
	proofs "github.com/assay-id/assay/server/verdict/image"
	"github.com/assay-id/assay/server/verdict/policy"
)

const critical = "CVE-2026-1 CRITICAL"

func TestTheIdentityFollowsTheReports(t *testing.T) {
	w := newWorld(t, prod)
	image := config(1)
	w.run(image, 1)
	w.wantGate(image, false)
	if s := w.status(image, "prod"); s != "missing" {
		t.Errorf("an image that runs and of which nothing is known is %q", s)
	}
	w.mustPush(scan{image: image})
	w.wantGate(image, true)
	w.pass(time.Minute)
	w.mustPush(scan{image: image, findings: []string{critical}})
	w.wantGate(image, false)
	lines := w.log.of("verdict.change")
	if last := lines[len(lines)-1]; last.Finding != "CVE-2026-1" || last.Policy != "prod" || last.Report == "" || !strings.HasPrefix(last.Verdicts[0], image+"@") {
		t.Errorf("the audit line is %+v", last)
	}
	w.pass(time.Minute)
	w.mustPush(scan{image: image})
	w.wantGate(image, true)
}

func TestAReplayedReportChangesNothing(t *testing.T) {
	image := config(1)
	w := newWorld(t, prod)
	clean := scan{image: image, at: w.now()}
	w.mustPush(clean)
	w.pass(time.Hour)
	w.mustPush(scan{image: image, findings: []string{critical}})
	replay := func() {
		t.Helper()
		if _, err := w.push(clean); !errors.Is(err, ErrStale) || !errors.Is(err, ErrRefused) {
			t.Errorf("a replay is answered with %v", err)
		}
		w.wantGate(image, false)
	}
	t.Run("after the image was condemned", func(*testing.T) { replay() })
	t.Run("after a restart", func(*testing.T) { w.restart(); replay() })
	t.Run("the report in force is known already", func(t *testing.T) {
		if p, err := w.push(scan{image: image, at: w.now(), findings: []string{critical}}); err != nil || !p.Duplicate {
			t.Errorf("%+v, %v", p, err)
		}
	})
	t.Run("an empty copy of a time between the two", func(*testing.T) {
		clean.at = clean.at.Add(time.Minute)
		replay()
	})
}

func TestARestoredStoreRemembersWhatItForgot(t *testing.T) {
	w := newWorld(t, prod)
	image := config(1)
	clean := scan{image: image, at: w.now()}
	w.mustPush(clean)
	w.close()
	backup, err := os.ReadFile(filepath.Join(w.dir, "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	w.open()
	w.pass(time.Hour)
	w.mustPush(scan{image: image, findings: []string{critical}})
	w.wantGate(image, false)
	w.close()
	if err := os.WriteFile(filepath.Join(w.dir, "store.db"), backup, 0o600); err != nil {
		t.Fatal(err)
	}
	w.open()
	t.Run("the clean report in the backup clears nothing", func(*testing.T) { w.wantGate(image, false) })
	t.Run("nor does it if it is pushed again", func(t *testing.T) {
		clean.at = clean.at.Add(time.Second)
		if _, err := w.push(clean); !errors.Is(err, ErrStale) {
			t.Errorf("a replay is answered with %v", err)
		}
		w.wantGate(image, false)
	})
	t.Run("a newer one does", func(*testing.T) {
		w.pass(time.Hour)
		w.mustPush(scan{image: image})
		w.wantGate(image, true)
	})
}

func TestBadDocumentsLeaveTheVerdictInForce(t *testing.T) {
	w := newWorld(t, prod)
	image := config(1)
	w.mustPush(scan{image: image})
	good := scan{image: image, at: w.now().Add(time.Minute)}.json(t)
	w.pass(2 * time.Minute)
	for _, c := range []struct {
		name string
		doc  Document
		want error
		says string
	}{
		{"a tag instead of a digest", Document{Image: "reg/shop:latest", Content: good}, ErrImage, "a name or a tag says nothing"},
		{"a digest of the wrong length", Document{Image: "reg/shop@sha256:abcd", Content: good}, ErrImage, "64 lower-case hex"},
		{"about another image", Document{Image: "reg/shop@" + config(2), Content: good}, ErrSubject, "and was pushed for"},
		{"from the future", Document{Image: image, Content: scan{image: image, at: w.now().Add(time.Hour)}.json(t)}, ErrStale, "yet to come"},
		{"no JSON", Document{Image: image, Content: []byte("hello")}, ErrRefused, ""},
		{"duplicate keys", Document{Image: image, Content: []byte(`{"SchemaVersion":2,"SchemaVersion":2}`)}, ErrRefused, ""},
		{"nested 10,000 deep", Document{Image: image, Content: []byte(strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000))}, ErrRefused, ""},
		{"too large", Document{Image: image, Content: make([]byte, 33<<20)}, ErrRefused, ""},
		{"an unknown schema", Document{Image: image, Content: []byte(`{"SchemaVersion":99,"ArtifactName":"x"}`)}, ErrRefused, ""},
		{"unsigned provenance", Document{Image: image, Content: []byte(`{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"` + image[7:] +
			`"}}],"predicateType":"https://slsa.dev/provenance/v1","predicate":{"buildDefinition":{"buildType":"x"},"runDetails":{"builder":{"id":"b"}}}}`)}, ErrVouch, "signed"},
		{"a broken envelope", Document{Image: image, Content: []byte(`{"payloadType":"x","payload":"!","signatures":[{"sig":"!"}]}`)}, ErrRefused, ""},
		{"a manifest that is none", Document{Image: image, Content: good, Manifests: [][]byte{[]byte("{}")}}, ErrImage, "manifest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := w.Push(t.Context(), admin, c.doc)
			if !errors.Is(err, c.want) || !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v", err)
			}
			w.wantGate(image, true)
		})
	}
	t.Run("nobody but an administrator names a source", func(t *testing.T) {
		if _, err := w.Push(t.Context(), Pusher{Name: "x"}, Document{Image: image, Content: good, Source: "local"}); !errors.Is(err, ErrVouch) {
			t.Errorf("got %v", err)
		}
	})
}

func TestTimeTakesIdentitiesAway(t *testing.T) {
	w := newWorld(t, strings.Replace(prod, `fail {`, "max_age = \"24h\"\n  grace {\n    severity = \"critical\"\n    for = \"72h\"\n  }\n  fail {", 1))
	image := config(1)
	w.run(image, 1)
	w.mustPush(scan{image: image})
	w.wantGate(image, true)
	w.pass(23 * time.Hour)
	w.wantGate(image, true)
	w.pass(61 * time.Minute)
	if w.wantGate(image, false); w.status(image, "prod") != "stale" {
		t.Errorf("it is %s", w.status(image, "prod"))
	}
	condemned := func() {
		w.mustPush(scan{image: image, findings: []string{critical}})
	}
	condemned()
	if w.wantGate(image, true); w.status(image, "prod") != "grace" {
		t.Errorf("it is %s", w.status(image, "prod"))
	}
	for range 3 {
		w.pass(23 * time.Hour)
		w.restart()
		condemned()
	}
	w.wantGate(image, true)
	w.pass(3*time.Hour + time.Minute)
	w.wantGate(image, false)
	kinds := map[string]int{}
	for _, line := range w.log.of("verdict.change") {
		kinds[line.Outcome]++
	}
	if kinds["deny"] == 0 || kinds["allow"] == 0 {
		t.Errorf("the audit log tells of %v", kinds)
	}
}

func TestVerdictsThatAreLate(t *testing.T) {
	w := newWorld(t, strings.Replace(prod, `fail {`, "max_age = \"24h\"\n  fail {", 1))
	w.run(config(1), 1)
	w.mustPush(scan{image: config(1)})
	w.pass(23 * time.Hour)
	if late := w.overdue(); late != 0 {
		t.Errorf("nothing is due, and it is late by %s", late)
	}
	w.mu.Lock()
	w.at = w.at.Add(3 * time.Hour) // nobody gets to it
	w.mu.Unlock()
	if late := w.overdue(); late < time.Hour || late > 3*time.Hour {
		t.Errorf("what was due two hours ago is late by %s", late)
	}
	w.pass(0)
	if late := w.overdue(); late != 0 {
		t.Errorf("it is done, and late by %s", late)
	}
}

func TestTheBlastGuardHoldsAMassWithdrawal(t *testing.T) {
	w := newWorld(t, strings.Replace(prod, "fail {", "blast_guard {\n    max_fraction = 0.2\n    window = \"5m\"\n  }\n  fail {", 1))
	const images = 100
	for n := range images {
		w.run(config(n), 1)
		w.mustPush(scan{image: config(n)})
	}
	w.pass(time.Minute)
	for n := range images {
		w.mustPush(scan{image: config(n), findings: []string{critical}})
	}
	open := func() (n int) {
		for k := range images {
			if w.gate(config(k), "prod") {
				n++
			}
		}
		return n
	}
	if n := open(); n != 80 {
		t.Errorf("%d of %d images keep their gate, want 80: a fifth may go", n, images)
	}
	if len(w.log.of("guard.hold")) == 0 {
		t.Error("the audit log does not tell of it")
	}
	w.restart()
	t.Run("also after a restart and when the window is over", func(t *testing.T) {
		w.pass(10 * time.Minute)
		if n := open(); n != 80 {
			t.Errorf("%d of %d images keep their gate, want 80", n, images)
		}
	})
	t.Run("until an operator lets them go", func(t *testing.T) {
		list, err := w.Release(t.Context(), "prod", "operator")
		if err != nil || len(list) != 80 {
			t.Errorf("released %d, %v", len(list), err)
		}
		if n := open(); n != 0 {
			t.Errorf("%d images keep their gate", n)
		}
	})
	t.Run("a policy that is not there has nothing to release", func(t *testing.T) {
		if _, err := w.Release(t.Context(), "other", "operator"); !errors.Is(err, ErrNoPolicy) {
			t.Errorf("got %v", err)
		}
	})
}

func TestAnExceptionClearsForAWhile(t *testing.T) {
	w := newWorld(t, prod)
	image := config(1)
	w.mustPush(scan{image: image, findings: []string{critical}})
	w.wantGate(image, false)
	e, err := w.PutException(t.Context(), policy.Exception{
		Digest: image, Vulnerability: "cve-2026-1", Reason: "not reachable", Approver: "alice", Expires: w.now().Add(time.Hour),
	}, "local")
	if err != nil {
		t.Fatal(err)
	}
	w.wantGate(image, true)
	w.restart()
	w.wantGate(image, true)
	w.pass(61 * time.Minute)
	w.wantGate(image, false)
	if err := w.DeleteException(t.Context(), e.ID, "local"); err != nil {
		t.Error(err)
	}
	for name, bad := range map[string]policy.Exception{
		"without a reason":         {Digest: image, Approver: "a", Expires: w.now().Add(time.Hour)},
		"without an approver":      {Digest: image, Reason: "r", Expires: w.now().Add(time.Hour)},
		"without an end":           {Digest: image, Reason: "r", Approver: "a"},
		"longer than policies let": {Digest: image, Reason: "r", Approver: "a", Expires: w.now().Add(1000 * time.Hour * 24)},
		"for everything":           {Reason: "r", Approver: "a", Expires: w.now().Add(time.Hour)},
		"for half a digest":        {Digest: "sha256:12", Reason: "r", Approver: "a", Expires: w.now().Add(time.Hour)},
	} {
		if _, err := w.PutException(t.Context(), bad, "local"); !errors.Is(err, ErrRefused) {
			t.Errorf("an exception %s: %v", name, err)
		}
	}
}

func TestAFeedThatChangesCondemns(t *testing.T) {
	w := newWorld(t, strings.Replace(prod, "fail {", "fail {\n    kev = true\n  }\n  fail {", 1))
	w.rules.KEVPath = filepath.Join(w.dir, "kev.json")
	write := func(ids string) {
		t.Helper()
		if err := os.WriteFile(w.rules.KEVPath, []byte(`{"dateReleased":"2026-05-01T11:00:00Z","vulnerabilities":[`+ids+`]}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(w.rules.KEVPath, w.now(), w.now()); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"cveID":"CVE-1999-1"}`)
	if err := w.Replace(t.Context(), w.rules); err != nil {
		t.Fatal(err)
	}
	image := config(1)
	w.mustPush(scan{image: image, findings: []string{"CVE-2026-2 LOW"}})
	w.wantGate(image, true)
	w.pass(time.Minute)
	write(`{"cveID":"CVE-1999-1"},{"cveID":"CVE-2026-2"}`)
	w.mu2(func() {
		if !w.readFeeds() {
			t.Error("the change went unnoticed")
		}
		if err := w.evaluate(t.Context(), "feed", w.all()); err != nil {
			t.Error(err)
		}
	})
	w.wantGate(image, false)
	t.Run("a broken feed leaves what was known", func(t *testing.T) {
		if err := os.WriteFile(w.rules.KEVPath, []byte(`{`), 0o600); err != nil {
			t.Fatal(err)
		}
		w.mu2(func() { w.readFeeds() })
		if !w.feeds.now.KEV["CVE-2026-2"] {
			t.Error("it was forgotten")
		}
	})
}

func (w *world) mu2(f func()) {
	w.Service.mu.Lock()
	defer w.Service.mu.Unlock()
	f()
}

func TestSimulateHasNoEffect(t *testing.T) {
	w := newWorld(t, prod)
	image := config(1)
	w.mustPush(scan{image: image, findings: []string{"CVE-2026-3 HIGH"}})
	w.wantGate(image, true)
	strict := rulesOf(t, strings.Replace(prod, "critical", "high", 1)).Policies
	images, list, err := w.Simulate(t.Context(), strict, false)
	if err != nil || images != 1 || len(list) != 1 || list[0].Before != policy.Pass || list[0].After != policy.Fail || list[0].AllowedAfter {
		t.Errorf("%d images, %+v, %v", images, list, err)
	}
	w.wantGate(image, true)
	if _, list, err = w.Simulate(t.Context(), w.rules.Policies, true); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestRulesThatChangeAreApplied(t *testing.T) {
	w := newWorld(t, prod)
	image := config(1)
	w.mustPush(scan{image: image, findings: []string{"CVE-2026-3 HIGH"}})
	w.wantGate(image, true)
	if err := w.Replace(t.Context(), rulesOf(t, strings.Replace(prod, "critical", "high", 1))); err != nil {
		t.Fatal(err)
	}
	w.wantGate(image, false)
	if err := w.Replace(t.Context(), Rules{}); err != nil {
		t.Fatal(err)
	}
	if v, err := w.rec.Verdict(t.Context(), image); err != nil || v.Selectors.Len() != 0 {
		t.Errorf("without policies the verdict says %v, %v", v, err)
	}
}

// Docker's containerd image store, the default of new engines, says a container's manifest and not its
// configuration.
func TestAnImageThatRunsUnderTheDigestOfItsManifest(t *testing.T) {
	w := newWorld(t, prod)
	config, other := config(1), config(2)
	blob, manifest := manifestOf(config)
	otherBlob, otherManifest := manifestOf(other)
	index, indexDigest := indexOf(map[string]string{"linux/amd64": manifest, "linux/arm64": otherManifest})
	blobs := [][]byte{blob, otherBlob, index}
	w.run(manifest, 1)
	w.wantGate(manifest, false)
	t.Run("as long as nothing is proved, a report on the config digest is not about it", func(*testing.T) {
		w.mustPush(scan{image: config})
		w.wantGate(config, true)
		w.wantGate(manifest, false)
	})
	t.Run("it shares the verdict of the config digest from when the manifest proves it", func(t *testing.T) {
		w.pass(time.Minute)
		if _, err := w.send(indexDigest, scan{image: config, at: w.now()}.json(t), blobs...); err != nil {
			t.Fatal(err)
		}
		w.wantGate(manifest, true)
	})
	t.Run("and loses it", func(*testing.T) {
		w.pass(time.Minute)
		w.mustPush(scan{image: config, findings: []string{critical}})
		w.wantGate(manifest, false)
		w.restart()
		w.wantGate(manifest, false)
	})
	t.Run("an exception is for both, by whichever name", func(t *testing.T) {
		for _, digest := range []string{config, manifest} {
			e, err := w.PutException(t.Context(), policy.Exception{
				Digest: digest, Vulnerability: "CVE-2026-1", Reason: "not reachable", Approver: "alice", Expires: w.now().Add(time.Hour),
			}, "local")
			if err != nil {
				t.Fatal(err)
			}
			w.wantGate(manifest, true)
			w.wantGate(config, true)
			if err := w.DeleteException(t.Context(), e.ID, "local"); err != nil {
				t.Fatal(err)
			}
			w.wantGate(manifest, false)
		}
	})
	t.Run("a scanner on such an engine names the manifest for the image", func(t *testing.T) {
		w.pass(time.Minute)
		w.run(config, 1) // elsewhere
		w.mustPush(scan{image: config})
		w.pass(time.Minute)
		w.mustPush(scan{image: manifest, findings: []string{critical}})
		w.wantGate(manifest, false)
		w.wantGate(config, false)
	})
	t.Run("the other platform of the index gets nothing of all that", func(*testing.T) {
		w.run(otherManifest, 1)
		w.wantGate(otherManifest, false)
	})
}

// registry answers with what it holds.
type registry map[string][]byte

func (r registry) Fetch(_ context.Context, _, digest string) ([]byte, error) {
	if blob, ok := r[digest]; ok {
		return blob, nil
	}
	return nil, errors.New("not found")
}

func (registry) Attached(context.Context, string, string, func(string) bool) ([]proofs.Attachment, error) {
	return nil, nil
}

func TestARegistryIsAskedForAManifestThatRuns(t *testing.T) {
	w := newWorld(t, prod)
	blob, manifest := manifestOf(config(1))
	w.Fetcher = registry{manifest: blob}
	w.run(manifest, 1)
	w.mustPush(scan{image: config(1)})
	w.wantGate(manifest, false)
	w.pass(time.Minute)
	if _, err := w.send(manifest, scan{image: config(1), at: w.now()}.json(t)); err != nil {
		t.Fatal(err)
	}
	w.wantGate(manifest, true)
}

// brokenStore refuses to write evidence.
type brokenStore struct {
	Store
	broken bool
}

func (b *brokenStore) WriteEvidence(ctx context.Context, c records.EvidenceChange) error {
	if b.broken {
		return errors.New("disk on fire")
	}
	return b.Store.WriteEvidence(ctx, c)
}

func TestWhatCannotBeWrittenDoesNotCount(t *testing.T) {
	w := newWorld(t, prod)
	image := config(1)
	w.mustPush(scan{image: image, findings: []string{critical}})
	w.pass(time.Minute)
	store := &brokenStore{Store: w.Store, broken: true}
	w.Store = store
	if _, err := w.push(scan{image: image}); err == nil || errors.Is(err, ErrRefused) {
		t.Errorf("got %v", err)
	}
	store.broken = false
	w.mu2(func() {
		if err := w.evaluate(t.Context(), "test", w.all()); err != nil {
			t.Error(err)
		}
	})
	w.wantGate(image, false)
}

func TestAVerdictIsRenewedAsLongAsItsImageRuns(t *testing.T) {
	w := newWorld(t, prod)
	image, idle := config(1), config(2)
	w.run(image, 1)
	w.mustPush(scan{image: image})
	w.mustPush(scan{image: idle})
	left := func(digest string) time.Duration {
		v, err := w.rec.Verdict(t.Context(), digest)
		if err != nil {
			t.Fatal(err)
		}
		return v.NotAfter.Sub(w.now())
	}
	for range 6 {
		w.pass(8 * time.Minute)
		if d := left(image); d < 7*time.Minute {
			t.Fatalf("the verdict ends in %s", d)
		}
	}
	if d := left(idle); d > 0 {
		t.Errorf("the verdict on an image that nobody runs still has %s", d)
	}
	w.run(idle, 1)
	if d := left(idle); d < 14*time.Minute {
		t.Errorf("the verdict on an image that runs again ends in %s", d)
	}
}

func TestAStoreThatFailsIsAskedAgainAfterAPause(t *testing.T) {
	w := newWorld(t, prod)
	image := config(1)
	w.run(image, 1)
	w.mustPush(scan{image: image})
	store := &brokenStore{Store: w.Store, broken: true}
	w.Store = store
	w.mu.Lock()
	w.at = w.at.Add(25 * time.Hour) // too old
	w.mu.Unlock()
	if pause := w.due(t.Context()); pause != retryAfter {
		t.Errorf("it is tried again after %s", pause)
	}
	select {
	case <-w.woken:
		t.Error("it is tried again at once")
	default:
	}
	store.broken = false
	w.pass(retryAfter)
	if w.state.images[image].unwritten {
		t.Fatal("it is not written yet")
	}
	w.restart()
	if got := w.log.of("verdict.change"); len(got) < 2 {
		t.Fatal("the end of the verdict was not told")
	}
	w.wantGate(image, false)
	if i := w.state.images[image]; i.force["prod"].GetAllowed() {
		t.Error("what is in force was not stored")
	}
}

func TestGatesWithoutAScanPolicyAreCappedToo(t *testing.T) {
	w := newWorld(t, "")
	w.run(config(1), 1)
	v, err := w.rec.Verdict(t.Context(), config(1))
	if err != nil {
		t.Fatal(err)
	}
	if v.TTL != policy.DefaultSVIDTTL || v.JWTTTL != policy.DefaultJWTTTL {
		t.Errorf("identities behind signed provenance alone live %s, tokens %s", v.TTL, v.JWTTTL)
	}
}
