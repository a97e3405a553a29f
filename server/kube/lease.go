package kube

import (
	"context"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// toldLease is a lease that tells of trouble: client-go tries again and again and says nothing of it, and
// whoever looks why pods have no identities finds it here first.
type toldLease struct {
	resourcelock.Interface
	log logrus.FieldLogger
	now func() time.Time

	// mu guards the two below.
	mu    sync.Mutex
	since time.Time // of the trouble; zero: there is none
	told  time.Time
}

// tellEvery is how often trouble that goes on is told of.
const tellEvery = 5 * time.Minute

// Get implements resourcelock.Interface.
func (l *toldLease) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	record, raw, err := l.Interface.Get(ctx)
	l.note(ctx, err)
	return record, raw, err
}

// Create implements resourcelock.Interface.
func (l *toldLease) Create(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	err := l.Interface.Create(ctx, r)
	l.note(ctx, err)
	return err
}

// Update implements resourcelock.Interface.
func (l *toldLease) Update(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	err := l.Interface.Update(ctx, r)
	l.note(ctx, err)
	return err
}

func (l *toldLease) note(ctx context.Context, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	// That there is none yet, or that another registrar was faster, is how elections go.
	if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		if !l.told.IsZero() {
			l.log.WithField("after", now.Sub(l.since).Round(time.Second).String()).Info("the cluster answers again")
		}
		l.since, l.told = time.Time{}, time.Time{}
		return
	}
	if ctx.Err() != nil && l.since.IsZero() {
		return // the server ends
	}
	if l.since.IsZero() {
		l.since = now
	}
	if now.Sub(l.told) < tellEvery {
		return
	}
	l.told = now
	log := l.log.WithError(err).WithField("lease", l.Describe())
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		log.Warn("the server may not hold the registrar's lease: its role needs get, create and update on leases; until then new pods get no entries")
		return
	}
	log.Warn("the cluster's API server does not answer: what is stored stays, and new pods get no entries")
}
