package kube

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// someLease answers with an error, or with nothing.
type someLease struct {
	resourcelock.Interface
	err error
}

func (s *someLease) Get(context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	return nil, nil, s.err
}
func (*someLease) Describe() string { return "assay/assay-registrar" }

func TestAClusterThatDoesNotAnswerIsToldOf(t *testing.T) {
	leases := schema.GroupResource{Group: "coordination.k8s.io", Resource: "leases"}
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	var out bytes.Buffer
	log := logrus.New()
	log.SetOutput(&out)
	lease := &someLease{}
	told := &toldLease{Interface: lease, log: log, now: func() time.Time { return now }}
	ask := func(err error) string {
		out.Reset()
		lease.err = err
		_, _, _ = told.Get(t.Context())
		return out.String()
	}
	for _, err := range []error{nil, apierrors.NewNotFound(leases, "x"), apierrors.NewConflict(leases, "x", errors.New("y"))} {
		if text := ask(err); text != "" {
			t.Errorf("%v is told of: %s", err, text)
		}
	}
	refused := errors.New("connection refused")
	if text := ask(refused); !strings.Contains(text, "does not answer") || !strings.Contains(text, "connection refused") || !strings.Contains(text, "warning") {
		t.Errorf("it is not told of: %q", text)
	}
	now = now.Add(2 * time.Second)
	if text := ask(refused); text != "" {
		t.Errorf("it is told of again at once: %s", text)
	}
	now = now.Add(tellEvery)
	if text := ask(refused); text == "" {
		t.Error("it goes on, and is not told of any more")
	}
	if text := ask(nil); !strings.Contains(text, "answers again") {
		t.Errorf("that it is over is not told: %q", text)
	}
	if text := ask(apierrors.NewForbidden(leases, "x", errors.New("y"))); !strings.Contains(text, "role needs") {
		t.Errorf("a role that is missing is told as %q", text)
	}
}
