package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/spire-plugin-sdk/private"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/assay-id/assay/attestor/external"
)

// MaxAnswer is how large one message of a plugin may be, in bytes.
const MaxAnswer = 1 << 20

// maxServices is how many services a plugin may say it has; it needs two.
const maxServices = 32

// session is a plugin that runs and was initialized.
type session struct {
	*process
	conn  *grpc.ClientConn
	hosts *grpc.Server // our services for it
	group *errgroup.Group
	stop  context.CancelFunc

	answered atomic.Int64 // when, in Unix nanoseconds, it last answered anything
	mute     atomic.Int32 // calls in a row that had no answer in time
	expected atomic.Bool  // we end it ourselves
}

// begin talks to a process until it is of use: as go-plugin and SPIRE's SDK have it, its services are made
// known to each other, and it is configured.
func (p *Plugin) begin(ctx context.Context, proc *process) (*session, error) {
	socket, err := proc.greeting(p.cfg.Patience)
	if err != nil {
		return nil, err
	}
	s := &session{process: proc, group: new(errgroup.Group)}
	s.conn, err = grpc.NewClient("passthrough:plugin",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a socket whose owner is looked at
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx, socket, proc.pid) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxAnswer)),
		grpc.WithNoProxy(), grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(),
		grpc.WithMaxHeaderListSize(16<<10),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			stream, err := streamer(ctx, desc, cc, method, opts...)
			if err != nil || strings.HasPrefix(method, "/plugin.") { // go-plugin's own say nothing of the plugin
				return stream, err
			}
			return &heard{stream, s, p.cfg.Now}, nil
		}),
	)
	if err != nil {
		return nil, err
	}
	talk, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	if err = s.host(talk, p.cfg.Services); err == nil {
		s.group.Go(func() error { s.follow(talk, p.logOutput); return nil })
		err = p.initialize(ctx, s)
	}
	if err != nil {
		s.expected.Store(true)
		s.release()
		return nil, err
	}
	return s, nil
}

// heard is a stream whose messages are signs of life.
type heard struct {
	grpc.ClientStream
	of  *session
	now func() time.Time
}

func (h *heard) RecvMsg(m any) error {
	err := h.ClientStream.RecvMsg(m)
	if err == nil {
		h.of.alive(h.now())
	}
	return err
}

// alive notes a sign of life.
func (s *session) alive(now time.Time) {
	s.answered.Store(now.UnixNano())
	s.mute.Store(0)
}

// release takes down what is there besides the process.
func (s *session) release() {
	s.stop()
	_ = s.conn.Close()
	if s.hosts != nil {
		s.hosts.Stop()
	}
	_ = s.group.Wait() // nothing of interest
}

// dial connects to a plugin's socket, and makes sure that it is the plugin that listens there.
func dial(ctx context.Context, socket string, pid int) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	if err := ofGroup(conn, pid); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// ofGroup says whether the other end of a Unix socket is in the process group of the plugin.
func ofGroup(conn net.Conn, pgid int) error {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return errors.New("no Unix socket")
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var asked error
	if err := raw.Control(func(fd uintptr) { cred, asked = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if asked != nil {
		return fmt.Errorf("ask who is at the socket: %w", asked)
	}
	if group, err := unix.Getpgid(int(cred.Pid)); err != nil || group != pgid {
		return fmt.Errorf("process %d at the socket is not the plugin, which is process %d", cred.Pid, pgid)
	}
	return nil
}

// host serves what the plugin may ask of us, and tells it where, as go-plugin's broker does: by number.
func (s *session) host(ctx context.Context, services []Service) error {
	socket := filepath.Join(s.dir.path, "host")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("listen for its questions: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return errors.Join(err, listener.Close())
	}
	s.hosts = grpc.NewServer(grpc.MaxRecvMsgSize(64<<10), grpc.MaxConcurrentStreams(16), grpc.MaxHeaderListSize(16<<10))
	for _, service := range services {
		service.Register(s.hosts)
	}
	s.group.Go(func() error { return s.hosts.Serve(&own{listener, s.pid}) })
	stream, err := s.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/plugin.GRPCBroker/StartStream", grpc.ForceCodecV2(rawCodec{}))
	if err != nil {
		return fmt.Errorf("open go-plugin's broker: %w", err)
	}
	if err := stream.SendMsg(connInfo(private.HostServiceProviderID, socket)); err != nil {
		return fmt.Errorf("tell go-plugin's broker where we listen: %w", err)
	}
	s.group.Go(func() error { // what a plugin offers there, nobody asked for
		for {
			if err := stream.RecvMsg(new([]byte)); err != nil {
				return err
			}
		}
	})
	return nil
}

// own accepts only the plugin.
type own struct {
	net.Listener
	pgid int
}

func (o *own) Accept() (net.Conn, error) {
	for {
		conn, err := o.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if ofGroup(conn, o.pgid) == nil {
			return conn, nil
		}
		_ = conn.Close() // a stranger
	}
}

// follow reads what the plugin prints, which go-plugin sends by gRPC, so that it is never blocked by it.
func (s *session) follow(ctx context.Context, log func(io.Reader)) {
	stream, err := s.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/plugin.GRPCStdio/StreamStdio", grpc.ForceCodecV2(rawCodec{}))
	if err == nil {
		err = errors.Join(stream.SendMsg(new([]byte)), stream.CloseSend())
	}
	if err != nil {
		return // older ones have no such service
	}
	out, in := io.Pipe()
	var reading errgroup.Group
	reading.Go(func() error { log(out); return nil })
	for {
		var chunk []byte
		if err := stream.RecvMsg(&chunk); err != nil {
			break
		}
		_, _ = in.Write(field(chunk, 2))
	}
	_ = in.Close()
	_ = reading.Wait() // no errors
}

// initialize makes the services known and configures the plugin.
func (p *Plugin) initialize(ctx context.Context, s *session) error {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Patience)
	defer cancel()
	var names []string
	for _, service := range p.cfg.Services {
		names = append(names, service.Name)
	}
	has, err := private.Init(ctx, s.conn, names)
	if err != nil {
		return fmt.Errorf("initialize: %w", Explain(err))
	}
	if len(has) > maxServices {
		return fmt.Errorf("initialize: it says that it has %d services, the limit is %d", len(has), maxServices)
	}
	hasConfig, hasService := false, false
	for _, name := range has {
		hasConfig = hasConfig || name == configv1.Config_ServiceDesc.ServiceName
		hasService = hasService || name == p.cfg.Service
	}
	if !hasService {
		return fmt.Errorf("it has no service %s, only %s", p.cfg.Service, external.Clip(strings.Join(has, ", ")))
	}
	if !hasConfig {
		if strings.TrimSpace(p.cfg.Data) != "" {
			return errors.New("it cannot be configured, and there is plugin_data")
		}
		return nil
	}
	core := &configv1.CoreConfiguration{TrustDomain: p.cfg.TrustDomain.Name()}
	config := configv1.NewConfigClient(s.conn)
	if p.cfg.Trial {
		answer, err := config.Validate(ctx, &configv1.ValidateRequest{CoreConfiguration: core, HclConfiguration: p.cfg.Data})
		if status.Code(err) != codes.Unimplemented {
			switch {
			case err != nil:
				return fmt.Errorf("validate its plugin_data: %w", Explain(err))
			case !answer.GetValid():
				return fmt.Errorf("it refuses its plugin_data: %s", sanitize(strings.Join(answer.GetNotes(), "; ")))
			}
			return nil
		}
	}
	if _, err := config.Configure(ctx, &configv1.ConfigureRequest{CoreConfiguration: core, HclConfiguration: p.cfg.Data}); err != nil {
		return fmt.Errorf("configure: %w", Explain(err))
	}
	return nil
}

// farewell asks the plugin to end, and ends it if it does not.
func (s *session) farewell() {
	s.expected.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	_ = private.Deinit(ctx, s.conn) // it is ended all the same
	_ = s.conn.Invoke(ctx, "/plugin.GRPCController/Shutdown", new([]byte), new([]byte), grpc.ForceCodecV2(rawCodec{}))
	select {
	case <-s.ended:
	case <-ctx.Done():
	}
	cancel()
	s.kill()
	<-s.ended
	s.release()
}

// rawCodec leaves messages as they are: the few of go-plugin's own protocol are put together below, since
// the library keeps their Go types to itself.
type rawCodec struct{}

var _ encoding.CodecV2 = rawCodec{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	text, ok := v.(*[]byte)
	if !ok {
		return nil, fmt.Errorf("marshal %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(*text)}, nil
}

func (rawCodec) Unmarshal(text mem.BufferSlice, v any) error {
	into, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("unmarshal %T", v)
	}
	*into = text.Materialize()
	return nil
}

// connInfo is plugin.ConnInfo: which number listens where.
func connInfo(id uint32, socket string) *[]byte {
	b := protowire.AppendTag(nil, 1, protowire.VarintType)
	b = protowire.AppendVarint(b, uint64(id))
	b = protowire.AppendTag(b, 2, protowire.BytesType)
	b = protowire.AppendString(b, "unix")
	b = protowire.AppendTag(b, 3, protowire.BytesType)
	b = protowire.AppendString(b, socket)
	return &b
}

// field returns the bytes of a field of a message; those of plugin.StdioData are number 2.
func field(message []byte, want protowire.Number) []byte {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return nil
		}
		message = message[n:]
		if number == want && kind == protowire.BytesType {
			value, n := protowire.ConsumeBytes(message)
			if n < 0 {
				return nil
			}
			return value
		}
		if n = protowire.ConsumeFieldValue(number, kind, message); n < 0 {
			return nil
		}
		message = message[n:]
	}
	return nil
}
