package api

import (
	"context"
	"reflect"
	"strings"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A method that is not overridden answers Unimplemented whatever it is asked; one of ours, that has no API
// behind it, answers something else or panics.
func TestEveryMethodOfSPIREIsBuilt(t *testing.T) {
	for _, one := range []struct {
		desc grpc.ServiceDesc
		impl any
	}{
		{agentv1.Agent_ServiceDesc, &agentService{}},
		{bundlev1.Bundle_ServiceDesc, &bundleService{}},
		{debugv1.Debug_ServiceDesc, &debugService{}},
		{entryv1.Entry_ServiceDesc, &entryService{}},
		{localauthorityv1.LocalAuthority_ServiceDesc, &authorityService{}},
		{loggerv1.Logger_ServiceDesc, &loggerService{}},
		{svidv1.SVID_ServiceDesc, &svidService{}},
		{trustdomainv1.TrustDomain_ServiceDesc, &trustDomainService{}},
	} {
		var names []string
		for _, m := range one.desc.Methods {
			names = append(names, m.MethodName)
		}
		for _, s := range one.desc.Streams {
			names = append(names, s.StreamName)
		}
		for _, name := range names {
			full := "/" + one.desc.ServiceName + "/" + name
			if strings.Contains(name, "WIT") {
				continue // SPIRE itself serves them only behind a feature flag
			}
			t.Run(full, func(t *testing.T) {
				if !builds(reflect.ValueOf(one.impl).MethodByName(name)) {
					t.Error("it is not built")
				}
			})
		}
	}
}

func builds(method reflect.Value) (built bool) {
	defer func() {
		if recover() != nil {
			built = true
		}
	}()
	var in []reflect.Value
	for arg := range method.Type().Ins() {
		switch {
		case arg == reflect.TypeFor[context.Context]():
			in = append(in, reflect.ValueOf(context.Background()))
		case arg.Kind() == reflect.Pointer:
			in = append(in, reflect.New(arg.Elem()))
		default: // a stream
			in = append(in, reflect.Zero(arg))
		}
	}
	out := method.Call(in)
	err, _ := reflect.TypeAssert[error](out[len(out)-1])
	return status.Code(err) != codes.Unimplemented
}
