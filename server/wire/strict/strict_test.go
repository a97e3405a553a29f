package strict

import (
	"context"
	"errors"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
)

// raw sends bytes as they are.
type raw struct{}

func (raw) Name() string { return "proto" }
func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

var _ encoding.CodecV2 = raw{}

func dial(t *testing.T, asked *int) *grpc.ClientConn {
	t.Helper()
	listener := bufconn.Listen(1 << 16)
	srv := grpc.NewServer(grpc.ForceServerCodecV2(Codec()),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			*asked++
			return handle(ctx, req)
		}, Unary),
		grpc.ChainStreamInterceptor(func(s any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			*asked++
			return handle(s, ss)
		}, Stream))
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return conn
}

func TestRequestsThatAreNoMessages(t *testing.T) {
	asked := 0
	conn := dial(t, &asked)
	good, err := proto.Marshal(&grpc_health_v1.HealthCheckRequest{Service: ""})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		sent []byte
		code codes.Code
	}{
		{"a message is served", good, codes.OK},
		{"a field nobody knows is served", []byte{0x98, 0x06, 0x01}, codes.OK},
		{"text that is not UTF-8 is refused", []byte{0x0a, 0x02, 0xff, 0xfe}, codes.InvalidArgument},
		{"half a message is refused", []byte{0x0a, 0x05, 'a'}, codes.InvalidArgument},
		{"a tag that is none is refused", []byte{0x07}, codes.InvalidArgument},
		{"an endless number is refused", []byte{0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80}, codes.InvalidArgument},
		{"the mark itself is refused", mark, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			asked = 0
			var out []byte
			err := conn.Invoke(t.Context(), "/grpc.health.v1.Health/Check", c.sent, &out, grpc.ForceCodecV2(raw{}))
			if status.Code(err) != c.code {
				t.Errorf("a call got %v, want %s", err, c.code)
			}
			s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, "/grpc.health.v1.Health/Watch", grpc.ForceCodecV2(raw{}))
			if err == nil {
				err = errors.Join(s.SendMsg(c.sent), s.CloseSend())
			}
			if err == nil {
				err = s.RecvMsg(&out)
			}
			if status.Code(err) != c.code {
				t.Errorf("a stream got %v, want %s", err, c.code)
			}
			if asked != 2 {
				t.Errorf("the interceptors before were asked %d times, want 2", asked)
			}
		})
	}
}
