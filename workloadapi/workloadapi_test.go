package workloadapi_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/workloadapitest"
)

func TestSuite(t *testing.T) {
	workloadapitest.Run(t, func(t *testing.T) workloadapitest.Target {
		w := serve(t, workloadapi.Config{Hold: 200 * time.Millisecond}, newFake(byUID))
		return workloadapitest.Target{
			Socket: w.socket, TrustDomain: td,
			Grant: func(_ *testing.T, path, hint string) func() {
				e := *w.put(path, fmt.Sprintf("unix:uid:%d", os.Getuid()))
				e.Hint = hint
				w.src.Put(&e)
				return func() { w.src.Delete(e.ID) }
			},
		}
	})
}

func TestHold(t *testing.T) {
	t.Run("a caller without an entry is refused when the hold is over", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Hold: 50 * time.Millisecond}, newFake(say("a:b")))
		wantEnd(t, w.stream(t, t.Context()), codes.PermissionDenied, "no identity issued")
		w.audit.wait(t, func(l workloadapi.Line) bool { return l.Outcome == "deny" && l.Reason == "no entry matches" })
	})
	t.Run("a caller is refused at once when there is no hold", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Hold: -1}, newFake(say("a:b")))
		wantEnd(t, w.stream(t, t.Context()), codes.PermissionDenied, "no identity issued")
	})
	t.Run("an entry that arrives meanwhile is served at once", func(t *testing.T) {
		for name, call := range map[string]func(*testing.T, *world) error{
			"X.509": func(t *testing.T, w *world) error { _, err := w.stream(t, t.Context()).Recv(); return err },
			"JWT": func(t *testing.T, w *world) error {
				api, _ := workloadapitest.Dial(t, w.socket)
				_, err := api.FetchJWTSVID(workloadapitest.Header(t.Context()), &workload.JWTSVIDRequest{Audience: []string{"a"}})
				return err
			},
			"bundles": func(t *testing.T, w *world) error {
				api, _ := workloadapitest.Dial(t, w.socket)
				s, err := api.FetchJWTBundles(workloadapitest.Header(t.Context()), &workload.JWTBundlesRequest{})
				if err == nil {
					_, err = s.Recv()
				}
				return err
			},
		} {
			t.Run(name, func(t *testing.T) {
				attested := make(chan struct{}, 1)
				w := serve(t, workloadapi.Config{Hold: time.Hour}, newFake(func(context.Context, attestor.Process) ([]attestor.Selector, error) {
					attested <- struct{}{}
					return selectors("a:b"), nil
				}))
				got := make(chan error, 1)
				go func() { got <- call(t, w) }()
				<-attested
				w.src.Touch() // a change that does not help
				w.put("/late", "a:b")
				if err := <-got; err != nil {
					t.Error(err)
				}
			})
		}
	})
	t.Run("an attestor that recovers meanwhile counts", func(t *testing.T) {
		var n atomic.Int32
		w := serve(t, workloadapi.Config{Hold: time.Hour}, newFake(say("a:b")), newFake(
			func(context.Context, attestor.Process) ([]attestor.Selector, error) {
				if n.Add(1) == 1 {
					return nil, errors.New("engine is starting")
				}
				return selectors("docker:label:x:y"), nil
			}))
		w.put("/container", "docker:label:x:y")
		wantPaths(t, w.stream(t, t.Context()), "/container")
	})
}

func TestAttestation(t *testing.T) {
	t.Run("attestors that fail, hang or panic cost only their own selectors", func(t *testing.T) {
		release := make(chan struct{})
		t.Cleanup(func() { close(release) })
		w := serveWithin(t, 2*time.Second, workloadapi.Config{}, newFake(say("a:b")), newFake(
			func(context.Context, attestor.Process) ([]attestor.Selector, error) {
				return nil, errors.New("engine is down")
			}),
			newFake(func(context.Context, attestor.Process) ([]attestor.Selector, error) { <-release; return nil, nil }),
			newFake(func(context.Context, attestor.Process) ([]attestor.Selector, error) { panic("bad bytes") }),
			newFake(func(context.Context, attestor.Process) ([]attestor.Selector, error) {
				return []attestor.Selector{{Type: "a", Value: "line\nbreak"}, {Type: "c", Value: "d"}}, nil
			}))
		w.put("/ok", "a:b", "c:d")
		wantPaths(t, w.stream(t, t.Context()), "/ok")
		for _, want := range []string{"engine is down", "deadline exceeded", "bad bytes"} {
			if !strings.Contains(w.log.String(), want) {
				t.Errorf("the log does not say %q", want)
			}
		}
	})
	t.Run("if all fail the caller hears that attestation failed", func(t *testing.T) {
		w := serve(t, workloadapi.Config{}, newFake(
			func(context.Context, attestor.Process) ([]attestor.Selector, error) { return nil, errors.New("down") }))
		wantEnd(t, w.stream(t, t.Context()), codes.Unavailable, "workload attestation failed")
		w.audit.wait(t, func(l workloadapi.Line) bool { return l.Outcome == "error" && l.Reason == "every attestor failed" })
	})
	t.Run("an attestor without an answer is none that failed", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Hold: -1}, newFake(say()), newFake(
			func(context.Context, attestor.Process) ([]attestor.Selector, error) { return nil, errors.New("down") }))
		wantEnd(t, w.stream(t, t.Context()), codes.PermissionDenied, "no identity issued")
	})
	t.Run("without attestors nobody has an identity", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Hold: -1})
		w.put("/everybody") // an entry without selectors, which no server makes
		wantEnd(t, w.stream(t, t.Context()), codes.PermissionDenied, "no identity issued")
	})
}

func TestReattestation(t *testing.T) {
	var say atomic.Pointer[[]string]
	var fail atomic.Pointer[error]
	failed := make(chan struct{}, 1)
	set := func(texts ...string) { say.Store(&texts) }
	changing := func() *fakeAttestor {
		return newFake(func(context.Context, attestor.Process) ([]attestor.Selector, error) {
			if err := fail.Load(); err != nil {
				select {
				case failed <- struct{}{}:
				default:
				}
				return nil, *err
			}
			return selectors(*say.Load()...), nil
		})
	}
	t.Run("a stream follows what the process has become", func(t *testing.T) {
		set("v:1")
		a := changing()
		w := serve(t, workloadapi.Config{}, a)
		<-a.ready
		w.put("/one", "v:1")
		w.put("/two", "v:2")
		s := w.stream(t, t.Context())
		wantPaths(t, s, "/one")
		set("v:2")
		a.changed(os.Getpid())
		wantPaths(t, s, "/two")
		set("v:1", "v:2")
		a.changed() // anybody
		wantPaths(t, s, "/one /two")
		set("v:3")
		a.changed(1, os.Getpid())
		wantEnd(t, s, codes.PermissionDenied, "no identity issued")
		w.audit.wait(t, func(l workloadapi.Line) bool { return l.Outcome == "deny" && l.Reason == "no entry matches any more" })
	})
	t.Run("facts are renewed on a timer", func(t *testing.T) {
		set("v:1")
		w := serve(t, workloadapi.Config{Reattest: 50 * time.Millisecond}, changing())
		w.put("/one", "v:1")
		w.put("/two", "v:2")
		s := w.stream(t, t.Context())
		wantPaths(t, s, "/one")
		set("v:2")
		wantPaths(t, s, "/two")
	})
	t.Run("an attestor that fails later keeps its last word, for a while", func(t *testing.T) {
		set("v:1")
		a := changing()
		w := serve(t, workloadapi.Config{KeepFacts: time.Hour}, a)
		<-a.ready
		w.put("/one", "v:1")
		s := w.stream(t, t.Context())
		wantPaths(t, s, "/one")
		down := errors.New("engine restarts")
		fail.Store(&down)
		a.changed(os.Getpid())
		<-failed
		w.put("/also", "v:1") // the stream is alive and still has its facts
		wantPaths(t, s, "/one /also")
		fail.Store(nil)
	})
	t.Run("its last word does not count for ever", func(t *testing.T) {
		set("v:1")
		a := changing()
		w := serve(t, workloadapi.Config{KeepFacts: -1}, a)
		<-a.ready
		w.put("/one", "v:1")
		s := w.stream(t, t.Context())
		wantPaths(t, s, "/one")
		down := errors.New("engine is gone")
		fail.Store(&down)
		defer fail.Store(nil)
		a.changed(os.Getpid())
		wantEnd(t, s, codes.Unavailable, "workload attestation failed")
	})
	t.Run("nothing is sent when nothing differs", func(t *testing.T) {
		set("v:1")
		a := changing()
		w := serve(t, workloadapi.Config{}, a)
		<-a.ready
		w.put("/one", "v:1")
		s := w.stream(t, t.Context())
		wantPaths(t, s, "/one")
		for range 10 {
			w.src.Touch()
			a.changed(os.Getpid())
		}
		set("v:1", "w:2") // other facts, same identities
		a.changed(os.Getpid())
		w.put("/two", "v:1")
		wantPaths(t, s, "/one /two") // and not "/one" once more
	})
}

// An answer is shared by all of whom the same is proved, but not beyond its end.
func TestWhatIsSharedExpires(t *testing.T) {
	var ahead atomic.Int64
	w := serve(t, workloadapi.Config{Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }}, newFake(say("v:1")))
	w.put("/one", "v:1")
	wantPaths(t, w.stream(t, t.Context()), "/one")
	made := w.src.Made()
	wantPaths(t, w.stream(t, t.Context()), "/one")
	if now := w.src.Made(); now != made {
		t.Errorf("it is made again for the second, %d times", now-made)
	}
	// No timer goes off while a machine sleeps: nobody has said that anything has changed.
	ahead.Store(int64(365 * 24 * time.Hour))
	w.src.Quietly(errors.New("nothing valid"))
	s := w.stream(t, t.Context())
	if resp, err := s.Recv(); err == nil {
		t.Errorf("what has expired is handed out: %d SVIDs", len(resp.GetSvids()))
	}
}

func TestSourceErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		code codes.Code
		text string
	}{
		{"nothing valid is held", fmt.Errorf("sign: %w", identity.ErrUnavailable), codes.Unavailable, "identity is not available at the moment"},
		{"the source ends", context.Canceled, codes.Unavailable, "identity is not available at the moment"},
		{"anything else", errors.New("secret detail"), codes.Internal, "internal error"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := serve(t, workloadapi.Config{}, newFake(say("a:b")))
			w.put("/one", "a:b")
			w.src.Fail(c.err)
			wantEnd(t, w.stream(t, t.Context()), c.code, c.text)
			api, _ := workloadapitest.Dial(t, w.socket)
			_, err := api.FetchJWTSVID(workloadapitest.Header(t.Context()), &workload.JWTSVIDRequest{Audience: []string{"a"}})
			workloadapitest.WantCode(t, err, c.code)
			w.src.Fail(nil)
			wantPaths(t, w.stream(t, t.Context()), "/one")
		})
	}
}

func TestShutdown(t *testing.T) {
	w := serve(t, workloadapi.Config{}, newFake(say("a:b")))
	w.put("/one", "a:b")
	s := w.stream(t, t.Context())
	wantPaths(t, s, "/one")
	done := make(chan struct{})
	go func() { w.stop(); close(done) }()
	wantEnd(t, s, codes.Unavailable, "") // never Canceled: go-spiffe would not come back
	<-done
	if _, err := os.Lstat(w.socket); err != nil {
		t.Errorf("the socket is missing until the agent is back: %v", err)
	}
}

func TestRemovedSocket(t *testing.T) {
	w := serve(t, workloadapi.Config{}, newFake(say("a:b")))
	w.put("/one", "a:b")
	before := w.stream(t, t.Context())
	wantPaths(t, before, "/one")
	for range 2 {
		if err := os.Remove(w.socket); err != nil {
			t.Fatal(err)
		}
		for _, err := os.Lstat(w.socket); err != nil; _, err = os.Lstat(w.socket) {
			if !os.IsNotExist(err) || t.Context().Err() != nil {
				t.Fatal(err)
			}
			<-time.After(20 * time.Millisecond)
		}
		wantPaths(t, w.stream(t, t.Context()), "/one") // who comes is served
	}
	w.put("/two", "a:b")
	wantPaths(t, before, "/one /two") // and who was there goes on
}

func TestARequestWithoutTheSecurityHeaderIsAudited(t *testing.T) {
	w := serve(t, workloadapi.Config{Hold: -1}, newFake(say("a:b")))
	w.put("/one", "a:b")
	client, _ := workloadapitest.Dial(t, w.socket)
	for event, call := range map[string]func() error{
		"x509_svid": func() error {
			stream, err := client.FetchX509SVID(t.Context(), &workload.X509SVIDRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
		"jwt_validate": func() error {
			_, err := client.ValidateJWTSVID(t.Context(), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "b"})
			return err
		},
	} {
		t.Run(event, func(t *testing.T) {
			if err := call(); status.Code(err) != codes.InvalidArgument {
				t.Errorf("got %v", err)
			}
			l := w.audit.wait(t, func(l workloadapi.Line) bool { return l.Event == event })
			if l.Outcome != "deny" || l.Reason != "security header missing from request" || l.PID != os.Getpid() || len(l.SPIFFEIDs) != 0 || l.Facts != "" {
				t.Errorf("got %+v", l)
			}
		})
	}
	wantPaths(t, w.stream(t, t.Context()), "/one")
}

func TestAuditTo(t *testing.T) {
	out := &lockedBuffer{}
	w := serve(t, workloadapi.Config{Hold: -1, Audit: workloadapi.AuditTo(out, nil), LogSelectors: []string{"a"}}, newFake(say("a:b", "secret:password")))
	wantEnd(t, w.stream(t, t.Context()), codes.PermissionDenied, "")
	w.put("/one", "a:b")
	wantPaths(t, w.stream(t, t.Context()), "/one")
	w.stop()
	if strings.Contains(out.String(), "password") {
		t.Errorf("a value that must not be logged: %s", out.String())
	}
	var lines []workloadapi.Line
	for text := range strings.Lines(out.String()) {
		var l workloadapi.Line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		lines = append(lines, l)
	}
	if len(lines) != 2 || lines[0].Outcome != "deny" || lines[1].Outcome != "allow" ||
		!slices.Equal(lines[1].Selectors, []string{"a:b"}) || !slices.Equal(lines[1].Types, []string{"a", "secret"}) {
		t.Errorf("got %+v", lines)
	}
}
