package api

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi/identity"
)

// debugService is debug.v1.
type debugService struct {
	debugv1.UnimplementedDebugServer
	api *API
}

func (s *debugService) GetInfo(context.Context, *debugv1.GetInfoRequest) (*debugv1.GetInfoResponse, error) {
	a := s.api
	federated := 0
	for _, b := range a.View.Bundles() {
		if b.TrustDomain != a.cfg.TrustDomain {
			federated++
		}
	}
	resp := &debugv1.GetInfoResponse{
		Uptime:                clampInt32(int(a.cfg.Now().Sub(a.started) / time.Second)),
		AgentsCount:           clampInt32(a.View.NodeCount()),
		EntriesCount:          clampInt32(a.View.EntryCount()),
		FederatedBundlesCount: clampInt32(federated),
	}
	for _, cert := range a.Chain() {
		c := &debugv1.GetInfoResponse_Cert{ExpiresAt: cert.NotAfter.Unix(), Subject: cert.Subject.String()}
		if len(cert.URIs) == 1 {
			if id, err := spiffeid.FromURI(cert.URIs[0]); err == nil {
				c.Id = identity.IDWire(id)
			}
		}
		resp.SvidChain = append(resp.SvidChain, c)
	}
	return resp, nil
}

// loggerService is logger.v1.
type loggerService struct {
	loggerv1.UnimplementedLoggerServer
	api *API
}

// The public names of logrus's levels.
var levels = map[types.LogLevel]logrus.Level{
	types.LogLevel_PANIC: logrus.PanicLevel,
	types.LogLevel_FATAL: logrus.FatalLevel,
	types.LogLevel_ERROR: logrus.ErrorLevel,
	types.LogLevel_WARN:  logrus.WarnLevel,
	types.LogLevel_INFO:  logrus.InfoLevel,
	types.LogLevel_DEBUG: logrus.DebugLevel,
	types.LogLevel_TRACE: logrus.TraceLevel,
}

func levelWire(level logrus.Level) types.LogLevel {
	for w, l := range levels {
		if l == level {
			return w
		}
	}
	return types.LogLevel_UNSPECIFIED
}

func (s *loggerService) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return s.state()
}

func (s *loggerService) SetLogLevel(_ context.Context, req *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	level, ok := levels[req.GetNewLevel()]
	if !ok {
		return nil, refusal(codes.InvalidArgument, "log level is missing or unknown")
	}
	return s.set(level)
}

func (s *loggerService) ResetLogLevel(context.Context, *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	return s.set(s.api.launch)
}

func (s *loggerService) set(level logrus.Level) (*types.Logger, error) {
	if s.api.Level != nil {
		s.api.Level.SetLevel(level)
		s.api.cfg.Log.WithField("level", level.String()).Info("log level set")
	}
	return s.state()
}

func (s *loggerService) state() (*types.Logger, error) {
	if s.api.Level == nil {
		return nil, refusal(codes.Unimplemented, "the log has no level that could be set")
	}
	return &types.Logger{CurrentLevel: levelWire(s.api.Level.GetLevel()), LaunchLevel: levelWire(s.api.launch)}, nil
}
