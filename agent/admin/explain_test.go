package admin

import (
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/admin/wire"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

var rewrite = flag.Bool("update", false, "write the pages in testdata anew")

func sel(text string) attestor.Selector {
	s, err := attestor.ParseSelector(text)
	if err != nil {
		panic(err)
	}
	return s
}

func set(texts ...string) attestor.Set {
	var list []attestor.Selector
	for _, text := range texts {
		list = append(list, sel(text))
	}
	return attestor.NewSet(list...)
}

func entry(id string, created int64, texts ...string) *identity.Entry {
	return &identity.Entry{
		ID: id, SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/" + id),
		ParentID:  spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/t"),
		Selectors: set(texts...), CreatedAt: time.Unix(created, 0),
	}
}

func TestSimilar(t *testing.T) {
	facts := set("unix:uid:0", "unix:user:root", "docker:label:app:shopp", "docker:label:tier:front", "docker:env:MODE=dev",
		"docker:env:PATH=/bin", "docker:env:HOME=/", "docker:image_id:nginx:1.2", "docker:label:Team:Red")
	for _, c := range []struct {
		name, want string
		have       []string
	}{
		{"another value of the same name", "unix:uid:1000", []string{"unix:uid:0"}},
		{"a letter too many", "docker:label:app:shop", []string{"docker:label:app:shopp"}},
		{"a letter swapped in the name", "docker:label:tire:front", []string{"docker:label:tier:front"}},
		{"upper and lower case", "docker:label:team:red", []string{"docker:label:Team:Red"}},
		{"another value of a variable, and no other variable", "docker:env:MODE=prod", []string{"docker:env:MODE=dev"}},
		{"the only one of its kind", "docker:image_id:registry/other@sha256:1", []string{"docker:image_id:nginx:1.2"}},
		{"another type", "k8s:uid:0", nil},
		{"nothing alike", "docker:label:owner:ann", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, s := range similar(sel(c.want), facts) {
				got = append(got, s.String())
			}
			if !slices.Equal(got, c.have) {
				t.Errorf("got %q, want %q", got, c.have)
			}
		})
	}
}

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"shop", "shop", 0}, {"shop", "shopp", 1}, {"shop", "shpo", 1}, {"shop", "chop", 1}, {"tier", "tire", 1}, {"kitten", "sitting", 3}} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("%q to %q: got %d, want %d", c.a, c.b, got, c.want)
		}
	}
	if distance(strings.Repeat("x", 5000), "x") < 100 {
		t.Error("a long text is compared")
	}
}

func TestWeigh(t *testing.T) {
	now := time.Unix(1000, 0)
	findings := []attestor.Finding{
		{Attestor: "unix", Selectors: set("unix:uid:7", "unix:gid:7", "unix:user:ann")},
		{Attestor: "docker", Err: errors.New("down")},
		{Attestor: "systemd"},
	}
	expired := entry("expired", 1, "unix:uid:7")
	expired.ExpiresAt = now
	hinted, shadowed := entry("hinted", 2, "unix:uid:7"), entry("shadowed", 3, "unix:gid:7")
	hinted.Hint, shadowed.Hint = "x", "x"
	entries := []*identity.Entry{
		entry("young", 9, "unix:uid:7"), shadowed, hinted, expired, entry("empty", 1),
		entry("far", 1, "unix:uid:8", "k8s:ns:x"),
		entry("one-of-one", 1, "k8s:ns:x"),
		entry("one-of-three", 1, "unix:uid:7", "unix:gid:7", "docker:label:a:b"),
		entry("one-of-one-close", 1, "unix:uid:8"),
		entry("unit", 1, "systemd:id:x"),
	}
	x := weigh(findings, view.New(nil).Picture(), entries, now)
	var matches, nearest []string
	for _, m := range x.matches {
		name := m.entry.ID
		if m.shadowed {
			name += " shadowed"
		}
		matches = append(matches, name)
	}
	for _, n := range x.near {
		nearest = append(nearest, n.entry.ID)
	}
	if want := []string{"hinted", "shadowed shadowed", "young"}; !slices.Equal(matches, want) {
		t.Errorf("matches are %q, want %q", matches, want)
	}
	if want := []string{"one-of-three", "one-of-one-close", "one-of-one", "unit", "far"}; !slices.Equal(nearest, want) {
		t.Errorf("nearest are %q, want %q", nearest, want)
	}
	reasons := map[string]string{}
	for _, n := range x.near {
		reasons[n.entry.ID] = n.missing[0].reason
	}
	for id, want := range map[string]string{
		"one-of-three": "docker attestor failed", "one-of-one": "perhaps because the docker", "unit": "nothing to say", "one-of-one-close": "",
	} {
		if !strings.Contains(reasons[id], want) || want == "" && reasons[id] != "" {
			t.Errorf("%s: reason is %q, want %q", id, reasons[id], want)
		}
	}
	t.Run("at most ten are shown", func(t *testing.T) {
		var many []*identity.Entry
		for i := range 50 {
			many = append(many, entry("e"+string(rune('a'+i%26)), int64(i), "unix:uid:9"))
		}
		if x := weigh(findings, view.New(nil).Picture(), many, now); len(x.near) != maxNear {
			t.Errorf("got %d", len(x.near))
		}
	})
}

// unable is an Attestation that is not asked; some selectors it never proves.
type unable map[string]string

func (unable) Attest(context.Context, attestor.Process) []attestor.Finding { return nil }
func (u unable) Abstains(want attestor.Selector) string                    { return u[want.String()] }

// errExpired stands for an SVID that is held and over.
var errExpired = errors.New("expired")

// situation is what Explain finds.
type situation struct {
	findings []attestor.Finding
	entries  []*identity.Entry
	about    *wire.Process
	st       Status
	rev      uint64
	unable   unable
	svids    map[string]error // by entry; nil: one is held
}

// answer is what Explain says of it.
func (c situation) answer(t *testing.T, now time.Time) *wire.ExplainResponse {
	t.Helper()
	held := view.New(nil)
	if c.rev != 0 {
		if err := held.Apply(view.Update{StoreID: "x", Rev: c.rev, Full: true, Entries: c.entries}); err != nil {
			t.Fatal(err)
		}
	}
	s := New(held, c.unable, Config{Status: func() Status { return c.st }, Now: func() time.Time { return now }})
	if c.svids != nil {
		s.cfg.SVID = func(entry string) (time.Time, error) {
			err, tried := c.svids[entry]
			switch {
			case errors.Is(err, errExpired):
				return now.Add(-3 * time.Minute), nil
			case !tried || err != nil:
				return time.Time{}, err
			}
			return now.Add(42 * time.Minute), nil
		}
	}
	about := c.about
	if about == nil {
		about = &wire.Process{Pid: 7, Name: "shop"}
	}
	return s.answer(about, c.findings, held.Picture())
}

func TestPages(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	about := &wire.Process{
		Pid: 4242, NamespacePid: 1, Uid: 1000, Gid: 1000, Exe: "/srv/shop", Name: "shop",
		Container: strings.Repeat("3f2a9c1b7d10", 6)[:64], Cgroup: "/docker/3f2a…", StartedAt: now.Add(-3 * time.Minute).UnixMilli(),
	}
	agent := Status{
		AgentID: spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/t"), Server: "10.0.0.1:8081",
		Uplink: "feed", Connected: true, Heard: now, ServerRev: 812,
	}
	gone := agent
	gone.Connected, gone.Uplink, gone.Heard = false, "connecting", now.Add(-5*time.Minute)
	gone.Err, gone.ErrAt = errors.New("dial tcp 10.0.0.1:8081: connection refused"), now.Add(-2*time.Second)
	unix := attestor.Finding{Attestor: "unix", Selectors: set("unix:uid:1000", "unix:gid:1000"), Took: 412 * time.Microsecond}
	docker := attestor.Finding{Attestor: "docker", Selectors: set("docker:label:app:shopp", "docker:env:MODE=it's"), Took: 3 * time.Millisecond}
	shop := entry("shop", 1, "unix:uid:1000", "docker:label:app:shop")
	shop.Hint, shop.DNSNames, shop.X509SVIDTTL = "inside", []string{"shop.example.org"}, time.Hour
	till := entry("till", 2, "docker:label:app:till", "docker:label:tier:front", "k8s:ns:shop")
	pod := attestor.Finding{Attestor: "k8s", Selectors: set("k8s:pod-uid:u1", "k8s:ns:shop", "k8s:container-name:main"), Took: time.Millisecond}
	other := entry("kube.prod.rule.u2", 1, "k8s:pod-uid:u2", "k8s:container-name:main")
	gated, side := entry("kube.prod.rule.u1", 2, "k8s:pod-uid:u1", "scan:policy:prod"), entry("kube.prod.rule.u1", 2, "k8s:pod-uid:u1", "k8s:container-name:side")
	hostile := &wire.Process{Pid: 7, Exe: "/tmp/\x1b[2Jevil", Name: "evil\x1b]0;x\a"}
	dockerDown := attestor.Finding{Attestor: "docker", Err: errors.New("dial unix /var/run/docker.sock: connect: no such file or directory"), Took: time.Millisecond}
	all, second := entry("all", 1, "unix:uid:1000"), entry("second", 2, "unix:gid:1000")
	stored := entry("stored", 1, "unix:uid:1000")
	stored.StoreSVID, stored.Hint = true, "db"
	second.Hint = "db"
	alias := entry("node", 1, "spiffe_id:"+agent.AgentID.String())
	fresh := Status{Server: agent.Server, Uplink: "disconnected", ErrAt: now.Add(-time.Second)}
	with := func(st Status, err string) Status {
		st.Err = errors.New(err)
		return st
	}
	banned := with(fresh, "banned")
	banned.Banned, banned.AgentID = true, agent.AgentID
	dial := `attest with join_token: rpc error: code = Unavailable desc = connection error: desc = "transport: Error while dialing: dial tcp 10.0.0.1:8081: connect: connection refused"`
	for _, c := range []struct {
		name string
		situation
	}{
		{"matched", situation{[]attestor.Finding{unix, docker}, []*identity.Entry{all, second, till}, about, agent, 812, nil, map[string]error{"all": nil, "second": nil}}},
		{"typo", situation{[]attestor.Finding{unix, docker}, []*identity.Entry{shop, till}, about, agent, 810, nil, nil}},
		{"docker-down", situation{[]attestor.Finding{unix, dockerDown}, []*identity.Entry{shop, till}, about, gone, 810, nil, nil}},
		{"no-entries", situation{[]attestor.Finding{unix}, nil, about, agent, 812, nil, nil}},
		{"no-entries-alias", situation{[]attestor.Finding{unix}, []*identity.Entry{alias}, about, agent, 812, nil, nil}},
		{"nothing-proved", situation{nil, []*identity.Entry{shop}, hostile, Status{}, 810, nil, nil}},
		{"never-joined", situation{[]attestor.Finding{unix}, nil, nil, with(fresh, dial), 0, nil, nil}},
		{"bad-bundle", situation{[]attestor.Finding{unix}, nil, nil, with(fresh, "read trust bundle /etc/assay/bundle.pem: no certificate in it"), 0, nil, nil}},
		{"bad-bundle-url", situation{[]attestor.Finding{unix}, nil, nil, with(fresh,
			`fetch trust bundle: Get "https://bundle.example.org/": tls: failed to verify certificate: x509: certificate signed by unknown authority`), 0, nil, nil}},
		{"no-config-map", situation{[]attestor.Finding{unix}, nil, nil, with(fresh,
			"get trust bundle: waiting for bundle.pem in ConfigMap assay/assay-bundle, which the server writes: not there yet"), 0, nil, nil}},
		{"other-server", situation{[]attestor.Finding{unix}, nil, nil, with(fresh,
			`attest with join_token: rpc error: code = Unavailable desc = connection error: desc = "transport: authentication handshake failed: x509svid: could not verify leaf certificate: x509: certificate signed by unknown authority"`), 0, nil, nil}},
		{"spent-token", situation{[]attestor.Finding{unix}, []*identity.Entry{alias, all}, nil, with(gone,
			"attest with join_token: rpc error: code = InvalidArgument desc = failed to attest: join token does not exist or has already been used; make a new one with `assay-server token generate`, give it to this agent"),
			812, nil, map[string]error{"all": nil}}},
		{"banned", situation{[]attestor.Finding{unix}, nil, nil, banned, 0, nil, nil}},
		{"turned-off", situation{[]attestor.Finding{unix}, []*identity.Entry{entry("path", 1, "unix:path:/srv/shop")}, nil, agent, 812,
			unable{"unix:path:/srv/shop": "no process shows unix:path until it is turned on"}, nil}},
		{"other-kind", situation{[]attestor.Finding{unix, {Attestor: "docker"}}, []*identity.Entry{
			entry("pod", 1, "k8s:ns:shop"), entry("pinned", 2, "image:id:sha256:00"), entry("label", 3, "docker:label:app:shop"),
		}, nil, agent, 812, nil, nil}},
		{"unsigned", situation{[]attestor.Finding{unix}, []*identity.Entry{all}, nil, agent, 812, nil,
			map[string]error{"all": errors.New("sign: rpc error: code = Internal desc = the disk is full")}}},
		{"unsigned-away", situation{[]attestor.Finding{unix}, []*identity.Entry{all}, nil, gone, 812, nil, map[string]error{}}},
		{"for-a-store", situation{[]attestor.Finding{unix}, []*identity.Entry{stored, entry("pod", 1, "k8s:ns:shop")}, nil, agent, 812, nil, nil}},
		{"for-a-store-beside-another", situation{[]attestor.Finding{unix}, []*identity.Entry{stored, second}, nil, agent, 812, nil, map[string]error{"second": nil}}},
		{"wrong-clock", situation{[]attestor.Finding{unix}, nil, nil, with(fresh,
			`attest with join_token: rpc error: code = Unavailable desc = connection error: desc = "transport: authentication handshake failed: x509svid: could not verify leaf certificate: x509: certificate has expired or is not yet valid: current time 2026-11-30T02:00:00Z is after 2026-11-29T22:00:00Z"`), 0, nil, nil}},
		{"other-pods", situation{[]attestor.Finding{unix, pod}, []*identity.Entry{other}, nil, agent, 812, nil, nil}},
		{"other-pods-last", situation{[]attestor.Finding{unix, pod}, []*identity.Entry{other, gated}, nil, agent, 812, nil, nil}},
		{"of-a-rule", situation{[]attestor.Finding{unix, pod}, []*identity.Entry{other, side}, nil, agent, 812, nil, nil}},
		{"expired-away", situation{[]attestor.Finding{unix}, []*identity.Entry{all}, nil, gone, 812, nil, map[string]error{"all": errExpired}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b strings.Builder
			if err := render(&b, c.answer(t, now), now); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", c.name+".txt")
			if *rewrite {
				if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), b.String()); d != "" {
				t.Errorf("page differs (run with -update and look at it): %s", d)
			}
			if strings.ContainsAny(b.String(), "\x1b\a") {
				t.Error("a process can write to the operator's terminal")
			}
		})
	}
}

func TestAdvice(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		name string
		st   Status
		f    []attestor.Finding
		want string
	}{
		{"a banned agent", Status{Banned: true}, nil, "banned"},
		{"no picture yet", Status{}, nil, "no picture"},
		{"an attestor without permission", Status{Connected: true}, []attestor.Finding{{Attestor: "docker", Err: os.ErrPermission}}, "lacks a permission"},
		{"a slow attestor", Status{Connected: true}, []attestor.Finding{{Attestor: "docker", Err: context.DeadlineExceeded}}, "in time"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := strings.Join(advise(weigh(c.f, view.New(nil).Picture(), nil, now), &wire.Process{}, c.st, 0, 0, now), "\n")
			if !strings.Contains(got, c.want) {
				t.Errorf("got %q, want %q in it", got, c.want)
			}
		})
	}
}

func TestQuote(t *testing.T) {
	for in, want := range map[string]string{
		"docker:label:a:b": "docker:label:a:b", "a b": "'a b'", "it's": `'it'\''s'`, "$(reboot)": "'$(reboot)'", "": "''", "x;y": "'x;y'",
	} {
		if got := quote(in); got != want {
			t.Errorf("%q: got %s, want %s", in, got, want)
		}
	}
}

func TestAliasesOfNodesAreNotExplained(t *testing.T) {
	alias := &identity.Entry{Selectors: attestor.NewSet(attestor.Selector{Type: "spiffe_id", Value: "spiffe://example.org/spire/agent/join_token/x"})}
	workload := &identity.Entry{Selectors: attestor.NewSet(attestor.Selector{Type: "unix", Value: "uid:0"})}
	if !forNodes(alias) || forNodes(workload) {
		t.Fatal("the wrong one is left out")
	}
}
