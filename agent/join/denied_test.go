package join

import (
	"testing"

	logtest "github.com/sirupsen/logrus/hooks/test"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent/keep"
)

// slowAnswer is a refusal of the agent's certificate. After so many looks at it, something else happens.
type slowAnswer struct {
	looks int
	then  func()
}

func (*slowAnswer) Error() string { return "remote error: tls: bad certificate" }

func (a *slowAnswer) GRPCStatus() *status.Status {
	if a.looks--; a.looks == 0 {
		a.then()
	}
	return status.New(codes.Unavailable, a.Error())
}

func TestAnAnswerToAnSVIDThatIsReplacedMeanwhile(t *testing.T) {
	for look := 1; ; look++ {
		log, _ := logtest.NewNullLogger()
		old, next := &keep.Own{}, &keep.Own{}
		j := &Joiner{own: old, log: log, wake: make(chan struct{}, 1)}
		answer := &slowAnswer{looks: look, then: func() {
			j.mu.Lock()
			defer j.mu.Unlock()
			j.own = next
		}}
		j.Denied(old, answer)
		if answer.looks > 0 { // it was understood with fewer
			if !j.refused || len(j.wake) != 1 {
				t.Error("an answer to the SVID in force is not taken")
			}
			return
		}
		if j.refused || len(j.wake) != 0 {
			t.Errorf("replaced at look %d: the new one is given up", look)
		}
	}
}
