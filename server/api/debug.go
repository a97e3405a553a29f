package api

import (
	"context"
	"crypto/x509"
	"slices"
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
	resp := &debugv1.GetInfoResponse{
		Uptime:                clampInt32(int(a.cfg.Now().Sub(a.started) / time.Second)),
		AgentsCount:           clampInt32(a.View.NodeCount()),
		EntriesCount:          clampInt32(a.View.EntryCount()),
		FederatedBundlesCount: clampInt32(len(a.View.Bundles())), // as SPIRE counts, the own one too
	}
	for _, cert := range a.toRoot(a.Chain()) {
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

// toRoot returns the chain with the root that it hangs on.
func (a *API) toRoot(chain []*x509.Certificate) []*x509.Certificate {
	b, ok := a.View.Bundle(a.cfg.TrustDomain)
	if !ok || len(chain) == 0 {
		return chain
	}
	last := chain[len(chain)-1]
	for _, root := range b.X509 {
		if last.CheckSignatureFrom(root.Certificate) == nil {
			return append(slices.Clone(chain), root.Certificate)
		}
	}
	return chain
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
	if req.GetNewLevel() == types.LogLevel_UNSPECIFIED {
		return nil, refusal(codes.InvalidArgument, "newLevel value cannot be LogLevel_UNSPECIFIED")
	}
	level, ok := levels[req.GetNewLevel()]
	if !ok {
		return nil, refusal(codes.InvalidArgument, "unsupported log level")
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
