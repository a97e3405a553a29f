package admin

import (
	"context"
	"math"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/peer"
)

// debugService is SPIRE's agent debug service.
type debugService struct {
	debugv1.UnimplementedDebugServer
	*Server
}

// GetInfo says how the agent is.
func (d debugService) GetInfo(context.Context, *debugv1.GetInfoRequest) (*debugv1.GetInfoResponse, error) {
	st := d.cfg.Status()
	started := st.StartedAt
	if started.IsZero() {
		started = d.started
	}
	resp := &debugv1.GetInfoResponse{
		Uptime:               clamp(int(d.now().Sub(started) / time.Second)),
		CachedX509SvidsCount: clamp(st.X509Held),
		CachedJwtSvidsCount:  clamp(st.JWTHeld),
		SvidsCount:           clamp(st.X509Held), //nolint:staticcheck // deprecated, and what older command lines print
	}
	if !st.Heard.IsZero() {
		resp.LastSyncSuccess = st.Heard.Unix()
	}
	for _, cert := range st.Chain {
		c := &debugv1.GetInfoResponse_Cert{ExpiresAt: cert.NotAfter.Unix(), Subject: cert.Subject.String()}
		if id, err := x509svid.IDFromCert(cert); err == nil {
			c.Id = identity.IDWire(id)
		}
		resp.SvidChain = append(resp.SvidChain, c)
	}
	return resp, nil
}

// clamp fits a count into the wire's field.
func clamp(n int) int32 { return int32(max(0, min(n, math.MaxInt32))) }

// loggerService is SPIRE's agent logger service.
type loggerService struct {
	loggerv1.UnimplementedLoggerServer
	*Server
}

// GetLogger returns the log level, and the one the agent was started with.
func (l loggerService) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return l.level()
}

// SetLogLevel changes the log level.
func (l loggerService) SetLogLevel(ctx context.Context, req *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	want := req.GetNewLevel()
	if want == types.LogLevel_UNSPECIFIED {
		return nil, toStatus(errLevelUnset)
	}
	if _, known := types.LogLevel_name[int32(want)]; !known {
		return nil, toStatus(errLevel)
	}
	return l.set(ctx, logrus.Level(want-1)) //nolint:gosec // the wire's levels are logrus's plus one
}

// ResetLogLevel changes it back.
func (l loggerService) ResetLogLevel(ctx context.Context, _ *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	return l.set(ctx, l.launch)
}

func (l loggerService) set(ctx context.Context, level logrus.Level) (*types.Logger, error) {
	if l.cfg.Level == nil {
		return nil, toStatus(errNoLevel)
	}
	old := l.cfg.Level.GetLevel()
	l.cfg.Level.SetLevel(level)
	line := l.log.WithFields(logrus.Fields{"from": old.String(), "to": level.String()})
	if p, ok := peer.FromContext(ctx); ok {
		line = line.WithFields(logrus.Fields{"pid": p.PID, "uid": p.UID})
	}
	line.Warn("log level changed") // a quieter log is worth a line that is seen
	return l.level()
}

func (l loggerService) level() (*types.Logger, error) {
	if l.cfg.Level == nil {
		return nil, toStatus(errNoLevel)
	}
	return &types.Logger{CurrentLevel: wireLevel(l.cfg.Level.GetLevel()), LaunchLevel: wireLevel(l.launch)}, nil
}

func wireLevel(level logrus.Level) types.LogLevel { return types.LogLevel(level + 1) } //nolint:gosec // seven levels
