package server

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/assay-id/assay/server/wire/later"
	"github.com/assay-id/assay/server/wire/strict"
	"github.com/assay-id/assay/server/wire/unread"
)

// patient answers when it is told to.
type patient struct {
	grpc_health_v1.UnimplementedHealthServer
	answer chan struct{}
}

func (p *patient) Check(ctx context.Context, _ *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	select {
	case <-p.answer:
		return &grpc_health_v1.HealthCheckResponse{}, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

const check = "/grpc.health.v1.Health/Check"

// budgeted serves over a connection in memory.
func budgeted(t *testing.T, limits Limits) (*budget, *patient, *grpc.ClientConn) {
	t.Helper()
	p := &patient{answer: make(chan struct{})}
	b, conn := budgetedFor(t, limits, func(r grpc.ServiceRegistrar) { grpc_health_v1.RegisterHealthServer(r, p) })
	return b, p, conn
}

// budgetedFor is the same with others who answer.
func budgetedFor(t *testing.T, limits Limits, register func(grpc.ServiceRegistrar)) (*budget, *grpc.ClientConn) {
	t.Helper()
	b := newBudget(limits)
	listener := bufconn.Listen(1 << 16)
	srv := grpc.NewServer(grpc.InTapHandle(b.tap), grpc.ForceServerCodecV2(unread.Codec(strict.Codec())), grpc.UnaryInterceptor(unread.Unary), grpc.StreamInterceptor(unread.Stream))
	register(b.registrar(srv))
	done := make(chan error, 1)
	go func() { done <- srv.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithStaticStreamWindowSize(1<<16), // it would grow with what comes
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
	return b, conn
}

func TestTheBudgetOfCalls(t *testing.T) {
	t.Run("a caller gets as many as are free, is told when to come back, and gives them back", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b, p, conn := budgeted(t, Limits{MaxCalls: 6})
			client := grpc_health_v1.NewHealthClient(conn)
			results := make(chan error)
			for range 3 {
				go func() {
					_, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
					results <- err
				}()
			}
			synctest.Wait()
			_, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
			if in, ok := later.Hint(err); status.Code(err) != codes.ResourceExhausted || !ok || in < time.Second {
				t.Errorf("the fourth call of one caller got %v, hint %s", err, in)
			}
			if !b.enter("another", false) {
				t.Error("there is no room for another caller")
			}
			b.leave("another", false)
			close(p.answer)
			for range 3 {
				if err := <-results; err != nil {
					t.Error(err)
				}
			}
			synctest.Wait()
			if b.free != 6 || len(b.open) != 0 {
				t.Errorf("%d places are free and callers have %v", b.free, b.open)
			}
		})
	})
	t.Run("a call that is given up is given back", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b, _, conn := budgeted(t, Limits{MaxCalls: 100})
			for range 20 {
				ctx, cancel := context.WithCancel(t.Context())
				stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, check)
				if err != nil {
					t.Fatal(err)
				}
				if err := stream.SendMsg(&grpc_health_v1.HealthCheckRequest{}); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				cancel()
			}
			synctest.Wait()
			if b.free != 100 || len(b.open) != 0 {
				t.Errorf("%d places are free and callers have %v", b.free, b.open)
			}
		})
	})
	t.Run("large answers are few", func(t *testing.T) {
		b := newBudget(Limits{MaxCalls: 1000})
		for range largeCalls {
			if !b.enter("a", true) {
				t.Fatal("refused")
			}
		}
		if b.enter("a", true) {
			t.Error("there is no limit")
		}
		if !b.enter("a", false) || !b.enter("b", true) {
			t.Error("what is not large, or another's, was refused")
		}
	})
}

func TestARequestThatNeverComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, _, conn := budgeted(t, Limits{MaxCalls: 100})
		began := time.Now()
		stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, check)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.RecvMsg(&grpc_health_v1.HealthCheckResponse{}); status.Code(err) != codes.Canceled {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took != receiveTime {
			t.Errorf("it took %s", took)
		}
		synctest.Wait()
		if b.free != 100 {
			t.Errorf("%d places are free", b.free)
		}
	})
}

func TestRequestsAreReceivedInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, conn := budgeted(t, Limits{MaxCalls: 10 * receivers})
		close(p.answer)
		began := time.Now()
		for range receivers + 10 { // more than are received at a time
			if _, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, check); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
			t.Errorf("after %s: %v", time.Since(began), err)
		}
	})
}
