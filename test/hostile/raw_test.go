package hostile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// asIs is a codec that sends and receives bytes as they are.
type asIs struct{}

func (asIs) Name() string { return "proto" }

func (asIs) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (asIs) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// patience is how long a call may take until it counts as hung. Nothing waits for it but a hang.
const patience = time.Minute

// answer is how a call ended.
type answer struct {
	err   error
	last  []byte // the last response
	count int    // of responses
}

// turns are the messages of a call: each is made from the response to the one before.
type turns []func(last []byte) ([]byte, error)

// converse makes a call. Each message but the last is followed by one response, where there is more than
// one; after the last, the
// call is read to its end, or, if it has none, up to one response. With a closing message, that is sent
// after the last, and the call is read to its end in any case.
func converse(ctx context.Context, conn *grpc.ClientConn, method protoreflect.MethodDescriptor, endless bool, closing []byte, messages turns) (a answer) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	desc := &grpc.StreamDesc{ClientStreams: method.IsStreamingClient(), ServerStreams: method.IsStreamingServer()}
	stream, err := conn.NewStream(ctx, desc, fullName(method), grpc.ForceCodecV2(asIs{}), grpc.MaxCallRecvMsgSize(64<<20))
	if err != nil {
		return answer{err: err}
	}
	receive := func() bool {
		var in []byte
		if a.err = stream.RecvMsg(&in); a.err != nil {
			return false
		}
		a.last = in
		a.count++
		return true
	}
	for i, make := range messages {
		if i > 0 && method.IsStreamingServer() && !receive() {
			break
		}
		message, err := make(a.last)
		if err != nil {
			return answer{err: fmt.Errorf("make message %d: %w", i, err)}
		}
		// An error here says that the stream has ended; why, RecvMsg says.
		_ = stream.SendMsg(message)
	}
	if a.err == nil && (!endless || closing != nil) {
		if closing != nil {
			_ = stream.SendMsg(closing)
		}
		_ = stream.CloseSend()
		for receive() { // to the end
		}
	} else if a.err == nil {
		receive()
	}
	if errors.Is(a.err, io.EOF) {
		a.err = nil
	}
	return a
}

func fullName(m protoreflect.MethodDescriptor) string {
	return fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
}

// bad says what is wrong with an answer to a bad request, or nothing: the caller must not be told that
// it is the server's fault, and must be told something at all.
func bad(method protoreflect.MethodDescriptor, a answer) string {
	switch code := status.Code(a.err); code {
	case codes.Internal, codes.Unknown, codes.DataLoss, codes.DeadlineExceeded, codes.Unavailable:
		return fmt.Sprintf("the call ended with %v", a.err)
	}
	for _, st := range items(method, a.last) {
		switch st.code {
		case codes.Internal, codes.Unknown, codes.DataLoss, codes.DeadlineExceeded, codes.Unavailable:
			return fmt.Sprintf("an item ended with %s %q", st.code, st.message)
		}
	}
	return ""
}

// refused reports whether the call, or an item of it, was refused.
func refused(method protoreflect.MethodDescriptor, a answer) bool {
	if status.Code(a.err) != codes.OK {
		return true
	}
	for _, st := range items(method, a.last) {
		if st.code != codes.OK {
			return true
		}
	}
	return false
}

type item struct {
	code    codes.Code
	message string
}

// items returns the statuses of a batch's items: all values of type spire.api.types.Status.
func items(method protoreflect.MethodDescriptor, response []byte) (found []item) {
	if len(response) == 0 {
		return nil
	}
	kind, err := protoregistry.GlobalTypes.FindMessageByName(method.Output().FullName())
	if err != nil {
		return nil
	}
	m := kind.New()
	if err := proto.Unmarshal(response, m.Interface()); err != nil {
		return []item{{codes.DataLoss, err.Error()}}
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if !f.IsList() || f.Message() == nil {
			return true
		}
		for i := range v.List().Len() {
			one := v.List().Get(i).Message()
			st := one.Descriptor().Fields().ByName("status")
			if st == nil || st.Message() == nil || st.Message().FullName() != "spire.api.types.Status" {
				continue
			}
			s := one.Get(st).Message()
			fields := s.Descriptor().Fields()
			found = append(found, item{
				codes.Code(s.Get(fields.ByName("code")).Int()),
				s.Get(fields.ByName("message")).String(),
			})
		}
		return true
	})
	return found
}
