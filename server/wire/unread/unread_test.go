package unread

import (
	"bytes"
	"context"
	"testing"

	"google.golang.org/grpc/mem"
)

// TestNoAnswerIsTooSmallToCount: gRPC says nothing of small buffers, which it does not use again.
func TestNoAnswerIsTooSmallToCount(t *testing.T) {
	if mem.IsBelowBufferPoolingThreshold(leastCounted) {
		t.Fatalf("gRPC does not tell of buffers of %d bytes", leastCounted)
	}
	for _, size := range []int{0, 1, leastCounted - 1, leastCounted, 1 << 20} {
		call, over := context.WithCancel(t.Context())
		back := make(chan struct{})
		p := Take(call, func() { close(back) })
		if !p.keep() {
			t.Fatal("there is nothing to keep")
		}
		text := bytes.Repeat([]byte("x"), size)
		held := p.held(mem.BufferSlice{mem.Copy(text, mem.DefaultBufferPool())})
		if !bytes.Equal(held.ReadOnlyData(), text) {
			t.Errorf("%d bytes became %d", size, held.Len())
		}
		over()
		if !p.keep() {
			t.Errorf("an answer of %d bytes does not hold the place", size)
		}
		held.Free()
		p.let()
		<-back
		if p.keep() {
			t.Errorf("after an answer of %d bytes it is still held", size)
		}
	}
}
