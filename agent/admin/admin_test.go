package admin_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent/admin"
	"github.com/assay-id/assay/agent/admin/wire"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// fakeAttestation proves the caller's name and user, and fails once.
type fakeAttestation func(context.Context, attestor.Process) []attestor.Finding

func (f fakeAttestation) Attest(ctx context.Context, p attestor.Process) []attestor.Finding {
	return f(ctx, p)
}

func (fakeAttestation) Abstains(want attestor.Selector) string {
	if want.Type == "never" {
		return "never is turned off"
	}
	return ""
}

func start(t *testing.T, attest fakeAttestation, cfg admin.Config, entries ...*identity.Entry) *grpc.ClientConn {
	t.Helper()
	held := view.New(nil)
	if err := held.Apply(view.Update{Rev: 7, Full: true, Entries: entries}); err != nil {
		t.Fatal(err)
	}
	cfg.SocketPath = filepath.Join(t.TempDir(), "private", "admin.sock")
	ready := make(chan struct{})
	cfg.Ready = func() { close(ready) }
	s := admin.New(held, attest, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	select {
	case <-ready:
	case <-time.After(time.Minute):
		t.Fatal("not ready")
	}
	conn, err := grpc.NewClient("unix:"+cfg.SocketPath, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	for path, want := range map[string]os.FileMode{cfg.SocketPath: 0o600, filepath.Dir(cfg.SocketPath): 0o700} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: mode %v, want %v", path, st.Mode().Perm(), want)
		}
	}
	return conn
}

func quiet() *logrus.Logger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

func proving(texts ...string) fakeAttestation {
	return func(context.Context, attestor.Process) []attestor.Finding {
		var list []attestor.Selector
		for _, text := range texts {
			s, err := attestor.ParseSelector(text)
			if err != nil {
				panic(err)
			}
			list = append(list, s)
		}
		return []attestor.Finding{{Attestor: "unix", Selectors: attestor.NewSet(list...), Took: time.Millisecond}}
	}
}

func TestExplain(t *testing.T) {
	entry := &identity.Entry{
		ID: "e1", SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/app"), CreatedAt: time.Unix(1, 0),
		Selectors: attestor.NewSet(attestor.Selector{Type: "unix", Value: "uid:7"}),
	}
	t.Run("a running process is explained", func(t *testing.T) {
		until := time.Now().Add(time.Hour)
		conn := start(t, proving("unix:uid:7"), admin.Config{
			Status: func() admin.Status { return admin.Status{Connected: true} },
			SVID:   func(string) (time.Time, error) { return until, nil },
		}, entry)
		got, err := wire.NewAdminClient(conn).Explain(t.Context(), &wire.ExplainRequest{Target: &wire.ExplainRequest_Pid{Pid: int32(os.Getpid())}})
		if err != nil {
			t.Fatal(err)
		}
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		p := got.GetProcess()
		if p.GetExe() != exe || p.GetUid() != uint32(os.Geteuid()) || p.GetExited() || p.GetStartedAt() == 0 ||
			time.Since(time.UnixMilli(p.GetStartedAt())) > time.Hour {
			t.Errorf("process is %v", p)
		}
		if len(got.GetMatches()) != 1 || got.GetMatches()[0].GetSpiffeId() != "spiffe://example.org/app" || got.GetAgent().GetHeldRev() != 7 || got.GetEntries() != 1 {
			t.Errorf("got %v", got)
		}
		var page bytes.Buffer
		if err := admin.Render(&page, got); err != nil || !strings.Contains(page.String(), "gets spiffe://example.org/app.\n") ||
			!strings.Contains(page.String(), "X509-SVID valid for ") {
			t.Errorf("page is %s, %v", page.String(), err)
		}
	})
	t.Run("a process that dies meanwhile is said to have", func(t *testing.T) {
		cmd := exec.Command("sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		conn := start(t, func(ctx context.Context, p attestor.Process) []attestor.Finding {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			return proving("unix:uid:7")(ctx, p)
		}, admin.Config{}, entry)
		got, err := wire.NewAdminClient(conn).Explain(t.Context(), &wire.ExplainRequest{Target: &wire.ExplainRequest_Pid{Pid: int32(cmd.Process.Pid)}})
		if err != nil || !got.GetProcess().GetExited() {
			t.Errorf("got %v, %v", got.GetProcess(), err)
		}
	})
	for _, c := range []struct {
		name string
		req  *wire.ExplainRequest
		code codes.Code
	}{
		{"no target", &wire.ExplainRequest{}, codes.InvalidArgument},
		{"PID 0", &wire.ExplainRequest{Target: &wire.ExplainRequest_Pid{}}, codes.InvalidArgument},
		{"a negative PID", &wire.ExplainRequest{Target: &wire.ExplainRequest_Pid{Pid: -1}}, codes.InvalidArgument},
		{"a PID nobody has", &wire.ExplainRequest{Target: &wire.ExplainRequest_Pid{Pid: 1 << 22}}, codes.NotFound},
		{"a container's name", &wire.ExplainRequest{Target: &wire.ExplainRequest_Container{Container: "shop"}}, codes.InvalidArgument},
		{"a path as container", &wire.ExplainRequest{Target: &wire.ExplainRequest_Container{Container: "../../../etc"}}, codes.InvalidArgument},
		{"a container nobody is in, as the status of its pod names it", &wire.ExplainRequest{Target: &wire.ExplainRequest_Container{Container: "containerd://0123456789ab"}}, codes.NotFound},
		{"a container nobody is in", &wire.ExplainRequest{Target: &wire.ExplainRequest_Container{Container: "0123456789ab"}}, codes.NotFound},
	} {
		t.Run("refused: "+c.name, func(t *testing.T) {
			conn := start(t, proving(), admin.Config{})
			_, err := wire.NewAdminClient(conn).Explain(t.Context(), c.req)
			if status.Code(err) != c.code {
				t.Errorf("got %v, want %v", err, c.code)
			}
		})
	}
}

func TestDebugAndLogger(t *testing.T) {
	log := quiet()
	log.SetLevel(logrus.InfoLevel)
	heard := time.Unix(1_700_000_000, 0)
	conn := start(t, proving(), admin.Config{Level: log, Log: log, Status: func() admin.Status {
		return admin.Status{Heard: heard, StartedAt: time.Now().Add(-time.Minute), X509Held: 3, JWTHeld: 2, Err: errors.New("x")}
	}})
	t.Run("debug says how the agent is", func(t *testing.T) {
		got, err := debugv1.NewDebugClient(conn).GetInfo(t.Context(), &debugv1.GetInfoRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if got.GetUptime() < 60 || got.GetLastSyncSuccess() != heard.Unix() || got.GetCachedX509SvidsCount() != 3 || got.GetCachedJwtSvidsCount() != 2 {
			t.Errorf("got %v", got)
		}
	})
	t.Run("the log level is changed and changed back", func(t *testing.T) {
		api := loggerv1.NewLoggerClient(conn)
		want := func(got *types.Logger, err error, current types.LogLevel) {
			t.Helper()
			if err != nil || got.GetCurrentLevel() != current || got.GetLaunchLevel() != types.LogLevel_INFO {
				t.Errorf("got %v, %v", got, err)
			}
		}
		got, err := api.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{})
		want(got, err, types.LogLevel_INFO)
		got, err = api.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_TRACE})
		want(got, err, types.LogLevel_TRACE)
		if log.GetLevel() != logrus.TraceLevel {
			t.Errorf("the log is at %v", log.GetLevel())
		}
		for _, bad := range []types.LogLevel{types.LogLevel_UNSPECIFIED, 8, -1} {
			if _, err := api.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: bad}); status.Code(err) != codes.InvalidArgument {
				t.Errorf("level %d: %v", bad, err)
			}
		}
		got, err = api.ResetLogLevel(t.Context(), &loggerv1.ResetLogLevelRequest{})
		want(got, err, types.LogLevel_INFO)
	})
}

func TestManyAtOnce(t *testing.T) {
	conn := start(t, proving("unix:uid:7"), admin.Config{})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			_, err := wire.NewAdminClient(conn).Explain(t.Context(), &wire.ExplainRequest{Target: &wire.ExplainRequest_Pid{Pid: int32(os.Getpid())}})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
