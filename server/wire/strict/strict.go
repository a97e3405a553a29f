// Package strict answers requests that are no messages: bytes that are not protobuf, text that is not
// UTF-8, fields of the wrong wire type.
//
// gRPC's own answer to them is Internal, given before any interceptor has run: nobody asked who
// calls, no audit line says that somebody tried, and an operator's alarm for errors of the server
// goes off for what a stranger sent. With this package such a request is taken as an empty message
// with a mark, goes through the interceptors like any other, so that a caller who may not call learns
// no more than that, and is refused as InvalidArgument by the innermost one.
//
// Why it is here: server and agent both serve strangers, and server/wire is what both may import.
package strict

import (
	"bytes"
	"context"
	"fmt"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that Codec stands before
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// mark is what a request that could not be read holds: one unknown field with the highest number
// there is, which no message of ours declares. Who sends it deliberately is refused likewise.
var mark = protowire.AppendString(protowire.AppendTag(nil, protowire.MaxValidNumber, protowire.BytesType), "not a message")

// errGarbled is the answer. What was wrong with the bytes is not told: the parser's text would echo
// them.
var errGarbled = status.Error(codes.InvalidArgument, "request is not a message of this method")

// Codec returns gRPC's codec for protobuf, except that it never refuses a request. It must be used
// together with Unary and Stream.
func Codec() encoding.CodecV2 { return codec{encoding.GetCodecV2("proto")} }

type codec struct{ encoding.CodecV2 }

// Unmarshal reads a request, or marks it as one that could not be read.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	err := c.CodecV2.Unmarshal(data, v)
	if err == nil {
		return nil
	}
	m, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("read request: %w", err)
	}
	proto.Reset(m)
	m.ProtoReflect().SetUnknown(mark)
	return nil
}

// garbled reports whether a request could not be read.
func garbled(req any) bool {
	m, ok := req.(proto.Message)
	return ok && bytes.Equal(m.ProtoReflect().GetUnknown(), mark)
}

// Unary is the interceptor for calls with one request and one response. It belongs behind those that
// decide who may call and that write down what was decided.
func Unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if garbled(req) {
		return nil, errGarbled
	}
	return handle(ctx, req)
}

// Stream is the interceptor for all other calls.
func Stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	s := &stream{ServerStream: ss}
	err := handle(srv, s)
	if err != nil && s.refused.Load() {
		return errGarbled // whatever the method made of it
	}
	return err
}

type stream struct {
	grpc.ServerStream
	refused atomic.Bool // a message could not be read; some methods receive in another goroutine
}

// RecvMsg receives a message, or says that it could not be read.
func (s *stream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	if garbled(m) {
		s.refused.Store(true)
		return errGarbled
	}
	return nil
}
