package kube

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
)

// noBundles gives no bundle.
type noBundles struct{ bundlev1.BundleClient }

func (noBundles) GetBundle(context.Context, *bundlev1.GetBundleRequest, ...grpc.CallOption) (*types.Bundle, error) {
	return nil, errors.New("there is none")
}

func TestNobodyFollowsTheRecordsAfterATerm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := logrus.New()
		log.SetOutput(io.Discard)
		ended := false
		d := &desk{sees: &sight{}, Registrar: &Registrar{
			log: log, cfg: Config{Resync: time.Hour, Publish: []Target{{ConfigMap: "bundle"}}},
			api: API{Bundles: noBundles{}, Changed: func(ctx context.Context) error {
				<-ctx.Done()
				time.Sleep(time.Second) // on its way back
				ended = true
				return ctx.Err()
			}},
		}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		d.publish(ctx)
		if !ended {
			t.Error("it still follows them, beside the next term")
		}
		synctest.Wait()
	})
}
