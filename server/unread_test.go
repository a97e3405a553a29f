package server

import (
	"bytes"
	"context"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// lengthy answers with more than a window of flow control holds, and returns at once.
type lengthy struct {
	grpc_health_v1.UnimplementedHealthServer
}

func lengthyAnswer() *grpc_health_v1.HealthCheckResponse {
	resp := &grpc_health_v1.HealthCheckResponse{}
	resp.ProtoReflect().SetUnknown(protowire.AppendBytes(protowire.AppendTag(nil, 100, protowire.BytesType), bytes.Repeat([]byte("x"), 1<<20)))
	return resp
}

func (lengthy) Check(context.Context, *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	return lengthyAnswer(), nil
}

// serveLengthy registers the service, and one that does the same on a stream.
func serveLengthy(r grpc.ServiceRegistrar) {
	grpc_health_v1.RegisterHealthServer(r, lengthy{})
	r.RegisterService(&grpc.ServiceDesc{ServiceName: "test.Lengthy", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{{
		StreamName: "Say", ServerStreams: true,
		Handler: func(_ any, stream grpc.ServerStream) error { return stream.SendMsg(lengthyAnswer()) },
	}}}, lengthy{})
}

// ask makes a call, and leaves its answer to whoever reads.
func ask(t *testing.T, conn *grpc.ClientConn, method string) (grpc.ClientStream, context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err == nil {
		err = stream.SendMsg(&grpc_health_v1.HealthCheckRequest{})
	}
	if err == nil {
		err = stream.CloseSend()
	}
	if err != nil {
		t.Fatal(err)
	}
	return stream, cancel
}

func TestAnAnswerThatNobodyReadsIsAnOpenCall(t *testing.T) {
	for name, method := range map[string]string{"of a call": check, "on a stream": "/test.Lengthy/Say"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, conn := budgetedFor(t, Limits{MaxCalls: 4}, serveLengthy)
				open := func(want int) {
					t.Helper()
					synctest.Wait()
					if len(b.open) > 1 || b.free != 4-want {
						t.Errorf("%d places are free and callers have %v, want %d open", b.free, b.open, want)
					}
				}
				read, _ := ask(t, conn, method)
				_, cancel := ask(t, conn, method)
				open(2)
				more, _ := ask(t, conn, method)
				if err := more.RecvMsg(&grpc_health_v1.HealthCheckResponse{}); status.Code(err) != codes.ResourceExhausted {
					t.Errorf("one more got %v", err)
				}
				if err := read.RecvMsg(&grpc_health_v1.HealthCheckResponse{}); err != nil {
					t.Error(err)
				}
				open(1)
				cancel()
				open(0)
			})
		})
	}
	t.Run("until its connection ends", func(t *testing.T) {
		b, conn := budgetedFor(t, Limits{MaxCalls: 4}, serveLengthy)
		_, _ = ask(t, conn, check)
		stream, _ := ask(t, conn, check)
		if _, err := stream.Header(); err != nil { // the answer is on its way
			t.Error(err)
		}
		_ = conn.Close()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			runtime.GC()
			b.mu.Lock()
			free := b.free
			b.mu.Unlock()
			if free == 4 {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d places are free", free)
			}
		}
	})
}
