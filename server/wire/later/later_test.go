package later

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

func TestHint(t *testing.T) {
	detail := func(d *durationpb.Duration) error {
		st, err := status.New(codes.Unavailable, "x").WithDetails(&errdetails.RetryInfo{RetryDelay: d})
		if err != nil {
			t.Fatal(err)
		}
		return st.Err()
	}
	for _, c := range []struct {
		name string
		err  error
		want time.Duration
		ok   bool
	}{
		{"what was said is heard", Status("busy", 3*time.Second).Err(), 3 * time.Second, true},
		{"through other errors", fmt.Errorf("call: %w", Status("busy", time.Second).Err()), time.Second, true},
		{"no error says nothing", nil, 0, false},
		{"an error without a status says nothing", errors.New("x"), 0, false},
		{"a status without details says nothing", status.Error(codes.ResourceExhausted, "x"), 0, false},
		{"nobody is kept away for good", detail(durationpb.New(1000 * time.Hour)), Max, true},
		{"a time that is past is now", detail(durationpb.New(-time.Hour)), 0, true},
		{"a time that is none says nothing", detail(&durationpb.Duration{Seconds: 1, Nanos: -1}), 0, false},
		{"no time says nothing", detail(nil), 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, ok := Hint(c.err); got != c.want || ok != c.ok {
				t.Errorf("got %s, %v, want %s, %v", got, ok, c.want, c.ok)
			}
		})
	}
}
