package agent

import (
	"context"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/agent/view"
)

// lease lets verdicts on images count only while the server is heard from, or was lately: an agent that
// is cut off cannot know that an image was condemned, so in the end it must not vouch for any. Entries
// that demand no verdict are served on.
type lease struct {
	length time.Duration
	view   *view.View
	// synced returns when the picture was last known to be the server's.
	synced func() time.Time
	// keep keeps for the next start that the server was heard from just now.
	keep func()
	now  func() time.Time
	log  logrus.FieldLogger

	mu sync.Mutex // guards the rest
	// heard is when the picture was last known to be the server's; zero: never.
	heard time.Time
	saved time.Time // when heard was last kept
	over  bool
}

func (l *lease) run(ctx context.Context) {
	ticker := time.NewTicker(max(min(l.length/10, 5*time.Second), 10*time.Millisecond))
	defer ticker.Stop()
	for {
		l.look()
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// look decides whether verdicts count at this moment.
func (l *lease) look() {
	synced := l.synced()
	l.mu.Lock()
	if synced.After(l.heard) {
		l.heard = synced
	}
	keep := l.decide() && l.heard.Sub(l.saved) >= l.length/3
	if keep {
		l.saved = l.heard
	}
	l.mu.Unlock()
	if keep {
		l.keep()
	}
}

// contact notes that the picture in force is the server's at this moment.
func (l *lease) contact() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard = l.now()
	l.decide()
}

// decide lets the verdicts count or not, and reports whether there are any that do. mu is held.
func (l *lease) decide() bool {
	now := l.now()
	if l.heard.After(now) { // the clock was set back
		l.heard = now
	}
	over := now.Sub(l.heard) >= l.length
	held := len(l.view.Picture().Verdicts)
	if over != l.over && held > 0 {
		log := l.log.WithFields(logrus.Fields{"verdicts": held, "heard": l.heard})
		if over {
			log.Warn("the server was not heard from for too long: entries that demand a verdict on an image match nobody until it is back")
		} else {
			log.Info("the server's verdicts on images count")
		}
	}
	l.over = over
	l.view.Lapse(over)
	return held > 0 && !over
}
